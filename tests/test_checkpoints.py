"""Checkpoints: who is resumed goes on as if it had never been stopped."""

import errno
import pathlib
import pickle
import re

import conftest
import pytest
import test_main
import test_trainer
import torch

from mach import data

fixture_dataset = test_main.fixture_dataset
fixture_run_here = test_main.fixture_run_here

FOLDERS = conftest.SYNCHRONOUS + conftest.ASYNCHRONOUS
every_folder = pytest.mark.parametrize('folder', FOLDERS)
synchronous = pytest.mark.parametrize('folder', conftest.SYNCHRONOUS)
asynchronous = pytest.mark.parametrize('folder', conftest.ASYNCHRONOUS)


def words_of(path, *more):
    """A command line with a checkpoint in a folder."""
    return [f'--checkpoint={path}', '--checkpoint_every=1', *more]


def make(folder, path, **names):
    """A whole experiment of new trainers with files in `path`."""
    names = dict(delay=2, dropout=0.5, checkpoint=str(path)) | names
    return test_trainer.make_all(folder, **names)


def run_steps(folder, run, steps, save=False):
    """Takes so many steps of every trainer, in turn."""
    for _ in range(steps):
        for one in run.trainers:
            one.step()
    for one in run.trainers if save else ():
        conftest.load(folder).trainer.save(one, one.settings.checkpoint)


def resume(folder, run):
    """Has all trainers go on from their files."""
    for one in run.trainers:
        conftest.load(folder).trainer.resume(one, one.settings.checkpoint)
    return run


def counts(run):
    """All that is counted, less the time."""
    tallies = [t for one in run.trainers for t in one.copy(False).values()]
    return [{
        k: v for k, v in vars(t.tally).items() if k not in ('seconds', '_began')
    } for t in tallies]


def fail_at(patch, folder, count):
    """Has trainers raise in the step after so many."""
    trainer = conftest.load(folder).trainer.Trainer

    def step(one, *args, take=trainer.step):
        if one.steps_taken == count:
            raise RuntimeError('killed')
        take(one, *args)

    patch.setattr(trainer, 'step', step)


def files(path):
    """Name -> content of each file in a folder."""
    return {p.name: p.read_bytes() for p in pathlib.Path(path).iterdir()}


# ------------------------------------------------------ as if it never stopped


@synchronous
@pytest.mark.parametrize('delay', [0, 2])
@pytest.mark.parametrize('inputs', ['synthetic', 'real'])
def test_lockstep_goes_on_to_the_bit(folder, tmp_path, delay, inputs):
    """Wherever it was stopped: with Grads in flight, in a log's window."""
    names = dict(delay=delay, inputs=inputs)
    for stopped in (1, 2, 5):
        torch.manual_seed(5)
        whole = make(folder, tmp_path, **names)
        run_steps(folder, whole, stopped, save=True)
        run_steps(folder, whole, 6)
        torch.manual_seed(6)  # neither dropout nor weights are drawn anew
        run = resume(folder, make(folder, tmp_path, seed=3, **names))
        assert run.trainers[0].steps_taken == stopped
        run_steps(folder, run, 6)
        expected = test_trainer.snapshot(*whole.machs, *whole.students)
        found = test_trainer.snapshot(*run.machs, *run.students)
        assert torch.equal(found, expected)
        assert str(counts(run)) == str(counts(whole))
        assert len(files(tmp_path)) == 1
        for one, other in zip(run.batches, whole.batches):
            assert torch.equal(one.next()[0], other.next()[0])


@synchronous
@pytest.mark.parametrize('words', ['--delay=0', '--delay=2 --dropout=.4'])
def test_lockstep_ends_the_same_from_the_command_line(run_here, monkeypatch,
                                                      tmp_path, folder, words):
    """In the middle of its run, of an epoch and of a log's window."""
    words = [w for w in words.split() if 'single' not in folder or 'del' in w]
    words += ['--batch_size=300', '--steps=12', '--log_every=4', '--seed=4']
    more = '--evaluate_every=0', *words_of(tmp_path)
    code, whole, _ = run_here(folder, *words, '--evaluate_every=0')
    assert code == 0
    with monkeypatch.context() as patch:
        fail_at(patch, folder, 7)
        code, first, _ = run_here(folder, *words, *more)
        assert code == 1 and first.mean['steps'] == 7
    code, second, err = run_here(folder, *words, *more, '--resume=True')
    assert (code, err, len(second.steps)) == (0, '', 2 * len(first.steps))
    second.steps = first.steps + second.steps
    assert test_main.without_time(second) == test_main.without_time(whole)
    assert second.mean['seconds'] >= first.mean['seconds']


@every_folder
def test_a_finished_run_ends_at_once_with_the_same_results(
        run_here, tmp_path, folder):
    code, log, err = run_here(folder, *words_of(tmp_path))
    again, found, _ = run_here(folder, *words_of(tmp_path, '--resume=True'))
    assert (code, again, err) == (0, 0, '') and not found.steps
    for key in ('real', 'synthetic', 'steps', 'staleness', 'lost'):
        one, other = [[f[key] for f in l.finals] for l in (log, found)]
        assert one == pytest.approx(other, nan_ok=True), key


def test_batches_go_on_where_they_were(dataset):
    one, other = [
        data.deal(dataset, 2, 'disjoint', 64, seed)[0] for seed in (0, 0)
    ]
    for _ in range(10):  # in the second epoch
        one.next()
    state = one.state()
    assert state['queue'].untyped_storage().nbytes() == state['queue'].nbytes
    expected = [one.next() for _ in range(20)]
    other.restore(state)
    for batch in expected:
        assert all(map(torch.equal, batch, other.next()))
    others = data.deal(dataset, 2, 'disjoint', 64, 0)[1]
    with pytest.raises(data.DataError, match='images are others'):
        others.restore(state)


# ---------------------------------------------------- written whole or not at all


@every_folder
@pytest.mark.parametrize('where', ['open', 'fsync', 'replace'])
def test_a_write_that_fails_leaves_the_old_file(folder, tmp_path, monkeypatch,
                                                capsys, where):
    run = make(folder, tmp_path)
    run_steps(folder, run, 2, save=True)
    before = files(tmp_path)
    names = {'machs.pt'} if len(
        run.trainers) == 1 else {f'mach{one.index}.pt' for one in run.trainers}
    assert set(before) == names

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, 'no space left')

    owner = conftest.load(folder).trainer
    with monkeypatch.context() as patch:
        if where == 'open':
            patch.setattr(owner, 'open', fail, raising=False)
        else:
            patch.setattr(owner.os, where, fail)
        run_steps(folder, run, 1, save=True)
    assert files(tmp_path) == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(run.trainers)
    assert all('warning: no checkpoint of step 3: ' in line for line in lines)
    run_steps(folder, run, 0, save=True)
    assert files(tmp_path).keys() == before.keys()
    assert resume(folder, make(folder, tmp_path)).trainers[0].steps_taken == 3


@every_folder
def test_a_disk_that_fails_stops_nobody(run_here, monkeypatch, tmp_path,
                                        folder):

    def fail(*_):
        raise OSError(errno.ENOSPC, 'no space left')

    owner = conftest.load(folder).trainer
    monkeypatch.setattr(owner.os, 'fsync', fail)
    code, log, err = run_here(folder, *words_of(tmp_path, '--steps=2'))
    assert code == 0 and log.mean['steps'] == 2
    assert all(
        re.match('warning: no checkpoint of step [12]: .*no space', line)
        for line in err.splitlines()) and err
    assert not files(tmp_path)


# ------------------------------------------------------------------- refused


class Evil:
    """Its pickle creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def spoil(path, how):
    """Damages a file."""
    content = path.read_bytes()
    if how == 'cut':
        path.write_bytes(content[:len(content) // 2])
    elif how == 'bit':  # in a tensor's numbers, of which it is mostly made
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) +
                         content[middle + 1:])
    elif how == 'other':
        torch.save([1, 2], path)
    elif how == 'shape':
        state = torch.load(path)
        state['optimisers'][0][0]['head.bias'] = torch.zeros(3)
        torch.save(state, path)
    elif how == 'pickle':
        path.write_bytes(pickle.dumps(Evil(path.with_name('evil'))))
    elif how == 'evil':
        torch.save(dict(a=Evil(path.with_name('evil'))), path)
    else:
        path.write_bytes(b'')


@every_folder
def test_damaged_files_are_refused_in_one_line(run_here, tmp_path, folder):
    words = words_of(tmp_path, '--steps=2')
    assert run_here(folder, *words)[0] == 0
    path = max(tmp_path.iterdir())
    content = path.read_bytes()
    for how in ('empty', 'cut', 'bit', 'other', 'shape', 'pickle', 'evil'):
        path.write_bytes(content)
        spoil(path, how)
        test_main.check_refused(run_here, folder, [*words, '--resume=True'],
                                f'{path} is damaged')
    assert not (tmp_path / 'evil').exists()
    path.write_bytes(content)
    assert run_here(folder, *words, '--resume=True')[0] == 0


def test_the_evil_file_is_one(tmp_path):
    spoil(tmp_path / 'file', 'empty')
    spoil(tmp_path / 'file', 'evil')
    torch.load(tmp_path / 'file', weights_only=False)
    assert (tmp_path / 'evil').exists()


@every_folder
def test_other_hyperparameters_are_refused_by_name(run_here, tmp_path, folder):
    words = words_of(tmp_path, '--steps=2')
    assert run_here(folder, *words)[0] == 0
    fields = test_main.hyperparameters(folder)
    for name, value in dict(seed=1,
                            steps=3,
                            batch_size=17,
                            precision='bf16',
                            learning_rate=0.1,
                            delay=3,
                            share=0.5,
                            shards='full',
                            latency=1.0).items():
        if name in fields and fields[name].default != value:
            test_main.check_refused(
                run_here, folder,
                [*words, '--resume=True', f'--{name}={value}'],
                f'cannot resume from {tmp_path}', f'pt: {name} was ',
                f'it is {value}')
    code, _, err = run_here(folder, *words, '--resume=True', '--log_every=1',
                            '--evaluate_every=1', '--checkpoint_every=7')
    assert (code, err) == (0, '')


@every_folder
def test_folders_that_cannot_be(run_here, tmp_path, folder):
    (tmp_path / 'file').touch()
    for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        test_main.check_refused(run_here, folder, words_of(path), path)
    test_main.check_refused(run_here, folder, ['--resume=True'],
                            '--resume needs the folder --checkpoint')


@every_folder
def test_without_a_file_it_begins(run_here, tmp_path, folder):
    path = tmp_path / 'deep' / 'er'
    code, log, err = run_here(folder, *words_of(path, '--resume=True'))
    machs = len(log.finals) - 1 if folder in conftest.ASYNCHRONOUS else 1
    assert code == 0 and log.mean['steps'] == 6
    lines = err.splitlines()
    assert len(lines) == machs == len(files(path))
    assert all(line.startswith(f'warning: no {path}/mach') for line in lines)


# -------------------------------------------------- a life after an earlier one


@asynchronous
def test_asynchronous_machs_go_on_from_their_steps(run_here, monkeypatch,
                                                   tmp_path, folder):
    """One of them from the beginning, as it has no file."""
    words = words_of(tmp_path, '--k=3', '--steps=9', '--evaluate_every=3')
    main = conftest.load_main(folder)
    with monkeypatch.context() as patch:
        fail_at(patch, folder, 4)
        assert run_here(folder, *words)[0] == 1
    assert len(files(tmp_path)) == 3
    (tmp_path / 'mach1.pt').unlink()
    began = []
    work = main.work
    monkeypatch.setattr(
        main, 'work', lambda one, *args: (began.append(
            (one.index, one.steps_taken)), work(one, *args)))
    code, log, err = run_here(folder, *words, '--resume=True')
    assert code == 0 and sorted(began) == [(0, 4), (1, 0), (2, 4)]
    assert err == f'warning: no {tmp_path}/mach1.pt: from the beginning\n'
    assert {f['steps'] for f in log.finals} == {9}
    assert all(f['real'] >= 0 and f['synthetic'] >= 0 for f in log.finals)


def make_lone(folder, path, **names):
    """A MACH of one child, which is the test; its Sink."""
    one, sinks = test_trainer.make_lone(folder, checkpoint=str(path), **names)
    return one, sinks[0]


@asynchronous
def test_mail_of_an_earlier_life_does_no_harm(folder, tmp_path):
    run, mail, late = make(folder, tmp_path), [], []
    for one in run.trainers:
        one.mailbox.put = lambda message, delay=0, box=one.mailbox: (
            mail.append((run.trainers[box.index], message)), type(box).put(
                box, message, delay))
        one.mailbox.index = one.index
    run_steps(folder, run, 3, save=True)
    run_steps(folder, run, 6)
    again = resume(folder, make(folder, tmp_path))
    for receiver, message in mail:  # all that was ever sent comes again
        again.trainers[receiver.index].mailbox.put(message)
    for one in again.trainers:
        one.tally.grad = late.append
    run_steps(folder, again, 6)
    assert max(m.version for _, m in mail if hasattr(m, 'gradient')) > 3
    assert late and min(late) == 0
    assert test_trainer.snapshot(*again.machs).isfinite().all()


@asynchronous
def test_no_key_comes_again(folder, tmp_path):
    keys = []
    for _ in range(3):
        one, sink = make_lone(folder, tmp_path)
        for _ in range(20):
            one.step()
        keys += [spike.key for spike in sink.take('Spike')]
    assert len({*keys}) == len(keys) == 60


@asynchronous
def test_a_child_that_was_set_back_is_taught_again(folder, tmp_path):
    one, sink = make_lone(folder, tmp_path, steps=9)
    versions = []
    for version in (None, 9, 4):
        if version:
            key = sink.take('Spike')[-1].key
            one.tell('Answer', key, 0, test_trainer.random_d(1), version)
            one.serve(0.0)
        one.step()
        versions.append([grad.version for grad in sink.take('Grad')])
    assert versions == [[-1], [], [4]]


@asynchronous
def test_a_finished_mach_teaches_in_its_second_life(folder, tmp_path):
    save, go_on = [
        getattr(conftest.load(folder).trainer, name)
        for name in ('save', 'resume')
    ]
    one, _ = make_lone(folder, tmp_path, steps=2)
    one.step()
    one.step()
    save(one, tmp_path)
    one, sink = make_lone(folder, tmp_path, steps=2)
    go_on(one, tmp_path)
    before = test_trainer.snapshot(one.mach)
    for version in (1, 1, 2):  # of the child's two steps
        one.serve(0.0)
        spike = sink.take('Spike')[-1]
        assert len(sink.take('Grad')) == 1
        one.tell('Answer', spike.key, 0, test_trainer.random_d(1), version)
    one.serve(0.0)
    assert not sink.messages, 'all over'
    assert torch.equal(test_trainer.snapshot(one.mach), before)


@asynchronous
def test_losses_of_both_lives_are_counted(folder, tmp_path):
    names = dict(loss=0.5, mailbox=2)
    run = make(folder, tmp_path, **names)
    run_steps(folder, run, 9, save=True)
    again = resume(folder, make(folder, tmp_path, **names))
    first = counts(run)
    assert str(first) == str(counts(again))
    run_steps(folder, again, 9)
    for key in ('lost', 'dropped'):
        assert 0 < sum(c[key] for c in first) < sum(
            c[key] for c in counts(again))


def test_ctrl_c_and_on(tmp_path):
    """A MACH goes on from the step in which it was stopped."""

    def run(folder):
        words = words_of(tmp_path / folder, '--precision=fp32', '--k=3')
        first = test_main.interrupt(tmp_path, folder, *words)
        second = test_main.interrupt(tmp_path, folder, *words, '--resume=True')
        for mach, final in enumerate(first.finals[:-1]):
            steps = [f['step'] for f in second.steps if f['mach'] == mach]
            assert not steps or steps[0] == 10 * (final['steps'] // 10 + 1)
        assert second.steps and second.mean['steps'] > first.mean['steps']

    test_main.two_at_a_time(run, ('synchronous_kgraph', 'asynchronous_kgraph'))
