"""Checkpoints: who is resumed goes on as if it had never been stopped."""

import errno
import pathlib
import re

import conftest
import pytest
import test_main
import test_trainer
import torch

fixture_dataset = test_main.fixture_dataset  # of run_here
fixture_run_here = test_main.fixture_run_here
every_experiment = test_main.every_experiment
synchronous, asynchronous = test_main.synchronous, test_main.asynchronous
snapshot = test_trainer.snapshot


def words_of(path, *more):
    """A command line with checkpoints in a folder."""
    return [f'--checkpoint={path}', '--checkpoint_every=1', *more]


def make(experiment, path, **names):
    """A whole experiment of new trainers with files in `path`."""
    names = dict(delay=2, dropout=0.5, checkpoint=str(path)) | names
    return test_trainer.make_all(experiment, **names)


def take_steps(run, steps):
    """So many of every trainer, in turn."""
    for _ in range(steps):
        for one in run.trainers:
            one.step()


def for_all(run, experiment, name):
    """Calls save or resume for all its trainers; gives the run back."""
    for one in run.trainers:
        getattr(conftest.load(experiment).checkpoint,
                name)(one, one.settings.checkpoint)
    return run


def counts(run):
    """All that its MACHs count, less the time: a list of dicts."""
    copies = [c for one in run.trainers for c in one.copy(False).values()]
    return [dict(vars(c.tally), seconds=0, _began=0) for c in copies]


def files(path):
    """Name -> content of each file in a folder."""
    return {p.name: p.read_bytes() for p in path.iterdir()}


def fail_at(patch, experiment, count):
    """Has trainers raise in the step after so many."""
    trainer = conftest.load(experiment).trainer.Trainer

    def step(one, *args, take=trainer.step):
        if one.steps_taken == count:
            raise RuntimeError('killed')
        take(one, *args)

    patch.setattr(trainer, 'step', step)


def no_space(*_, **__):
    """In place of what writes."""
    raise OSError(errno.ENOSPC, 'no space left')


# ------------------------------------------------------ as if it never stopped


@synchronous
@pytest.mark.parametrize('delay', [0, 2])
@pytest.mark.parametrize('inputs', ['synthetic', 'real'])
def test_lockstep_goes_on_to_the_bit(experiment, tmp_path, delay, inputs):
    """Wherever it was stopped: with Grads in flight, in a log's window."""
    names = dict(delay=delay, inputs=inputs)
    for stopped in (1, 2, 5):
        whole = make(experiment, tmp_path, **names)
        take_steps(whole, stopped)
        take_steps(for_all(whole, experiment, 'save'), 6)
        run = make(experiment, tmp_path, **names)
        torch.manual_seed(6)
        for_all(run, experiment, 'resume')
        assert run.trainers[0].steps_taken == stopped
        take_steps(run, 6)
        assert torch.equal(snapshot(*run.machs, *run.students),
                           snapshot(*whole.machs, *whole.students))
        assert str(counts(run)) == str(counts(whole))
        for one, other in zip(run.batches, whole.batches):
            assert torch.equal(one.next()[0], other.next()[0])


@synchronous
@pytest.mark.parametrize('words', ['--delay=0', '--delay=2 --dropout=.4'])
def test_lockstep_ends_the_same_from_the_command_line(run_here, monkeypatch,
                                                      tmp_path, experiment,
                                                      words):
    """Stopped in the middle of an epoch and of a log's window."""
    words = words.split()[:1 if experiment == 'synchronous_single' else 2]
    words += '--batch_size=300 --steps=12 --log_every=4 --seed=4'.split()
    words += ['--evaluate_every=0']
    _, whole, _ = run_here(experiment, *words)
    words += words_of(tmp_path)
    with monkeypatch.context() as patch:
        fail_at(patch, experiment, 7)
        code, first, _ = run_here(experiment, *words)
        assert code == 1 and first.mean['steps'] == 7
    code, second, err = run_here(experiment, *words, '--resume=True')
    assert (code, err, len(second.steps)) == (0, '', 2 * len(first.steps))
    second.steps = first.steps + second.steps
    assert test_main.without_time(second) == test_main.without_time(whole)


@every_experiment
def test_a_finished_run_ends_at_once_with_the_same_results(
        run_here, tmp_path, experiment):
    words = words_of(tmp_path)
    code, log, _ = run_here(experiment, *words)
    again, found, err = run_here(experiment, *words, '--resume=True')
    assert (code, again, err) == (0, 0, '') and not found.steps
    for key in ('real', 'synthetic', 'steps', 'staleness', 'lost', 'seconds'):
        one, other = [[f[key] for f in l.finals] for l in (log, found)]
        assert one == pytest.approx(other, nan_ok=True), key


# -------------------------------------------------- written whole or not at all


@every_experiment
@pytest.mark.parametrize('where', ['open', 'fsync', 'replace'])
def test_a_write_that_fails_leaves_the_old_file(experiment, tmp_path,
                                                monkeypatch, capsys, where):
    run = make(experiment, tmp_path)
    take_steps(run, 2)
    for_all(run, experiment, 'save')
    before, names = files(tmp_path), {one.file for one in run.trainers}
    assert set(before) == names
    take_steps(run, 1)
    with monkeypatch.context() as patch:
        owner = conftest.load(experiment).checkpoint
        owner = owner if where == 'open' else owner.os
        patch.setattr(owner, where, no_space, raising=False)
        for_all(run, experiment, 'save')
    assert files(tmp_path) == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(names)
    assert all('warning: no checkpoint of step 3: ' in l for l in lines)
    for_all(run, experiment, 'save')
    assert set(files(tmp_path)) == names
    again = for_all(make(experiment, tmp_path), experiment, 'resume')
    assert again.trainers[0].steps_taken == 3


@every_experiment
def test_a_disk_that_fails_stops_nobody(run_here, monkeypatch, tmp_path,
                                        experiment):
    monkeypatch.setattr('os.fsync', no_space)
    code, log, err = run_here(experiment, *words_of(tmp_path, '--steps=2'))
    assert code == 0 and log.mean['steps'] == 2 and not files(tmp_path)
    assert re.fullmatch('(warning: no checkpoint of step [12]: .*\n)+', err)


# ---------------------------------------------------------------------- refused


class Evil:
    """Its pickle creates a file where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@every_experiment
def test_damaged_files_are_refused_in_one_line(run_here, tmp_path, experiment):
    words = words_of(tmp_path, '--steps=2')
    assert run_here(experiment, *words)[0] == 0
    words.append('--resume=True')
    path, evil = max(tmp_path.iterdir()), tmp_path / 'evil'
    content, state = path.read_bytes(), torch.load(path)
    half = len(content) // 2  # in the midst of some tensor's numbers
    flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1:]
    state['trainer']['optimisers'][0][0]['head.bias'] = torch.zeros(3)
    for spoilt in (b'', content[:half], flipped, [1, 2], state, Evil(evil)):
        if isinstance(spoilt, bytes):
            path.write_bytes(spoilt)
        else:
            torch.save(spoilt, path)
        test_main.check_refused(run_here, experiment, words,
                                f'{path} is damaged')
    assert not evil.exists()
    torch.load(path, weights_only=False)
    assert evil.exists(), 'that was a test'
    path.write_bytes(content)
    assert run_here(experiment, *words)[0] == 0


@every_experiment
def test_other_hyperparameters_are_refused_by_name(run_here, tmp_path,
                                                   experiment):
    words = words_of(tmp_path, '--steps=2')
    assert run_here(experiment, *words)[0] == 0
    words.append('--resume=True')
    others = 'seed=1 steps=3 batch_size=17 delay=3 share=0.5'
    for name, value in re.findall(r'(\w+)=(\S+)', others):
        if name in test_main.hyperparameters(experiment):
            test_main.check_refused(run_here, experiment,
                                    [*words, f'--{name}={value}'],
                                    f'cannot resume from {tmp_path}/mach',
                                    f'.pt: {name} was ', f'it is {value}\n')
    words += '--log_every=1 --evaluate_every=1 --checkpoint_every=7'.split()
    assert run_here(experiment, *words)[::2] == (0, '')


@every_experiment
def test_folders(run_here, tmp_path, experiment):
    """Created if need be; without files in it, all begin."""
    (tmp_path / 'file').touch()
    for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        test_main.check_refused(run_here, experiment, words_of(path), path)
    path = tmp_path / 'deep' / 'er'
    code, log, err = run_here(experiment, *words_of(path, '--resume=True'))
    assert code == 0 and log.mean['steps'] == 6
    assert sorted(err.splitlines()) == sorted(
        f'warning: no {path / name}: from the beginning'
        for name in files(path))


# -------------------------------------------------- a life after an earlier one


@asynchronous
def test_each_goes_on_from_its_own_step(run_here, monkeypatch, tmp_path,
                                        experiment):
    """One of them from the beginning, as it has no file."""
    words = words_of(tmp_path, '--k=3', '--steps=9')
    with monkeypatch.context() as patch:
        fail_at(patch, experiment, 4)
        assert run_here(experiment, *words)[0] == 1
    (tmp_path / 'mach1.pt').unlink()
    main, began = conftest.load_main(experiment), []
    monkeypatch.setattr(main,
                        'work',
                        lambda one, *args, work=main.work: (began.append(
                            (one.index, one.steps_taken)), work(one, *args)))
    code, log, err = run_here(experiment, *words, '--resume=True')
    assert code == 0 and sorted(began) == [(0, 4), (1, 0), (2, 4)]
    assert err == f'warning: no {tmp_path}/mach1.pt: from the beginning\n'
    assert {f['steps'] for f in log.finals} == {9}
    assert all(f['real'] >= 0 and f['synthetic'] >= 0 for f in log.finals)


@asynchronous
def test_mail_of_an_earlier_life_does_no_harm(experiment, tmp_path):
    sent, late = [], []
    run = make(experiment, tmp_path, loss=0.2)
    for one in run.trainers:
        one.mailbox.put = lambda *content, i=one.index, put=one.mailbox.put: (
            sent.append((i, content)), put(*content))
    take_steps(run, 3)
    take_steps(for_all(run, experiment, 'save'), 6)
    again = make(experiment, tmp_path, loss=0.2)
    lost = sum(c['lost'] for c in counts(for_all(again, experiment, 'resume')))
    assert 0 < lost < sum(c['lost'] for c in counts(run))
    for i, content in sent:  # all that ever came comes again
        again.trainers[i].mailbox.put(*content)
    for one in again.trainers:
        one.tally.grad = late.append
    take_steps(again, 6)
    assert lost < sum(c['lost'] for c in counts(again))
    assert max(m.version for _, (m, _) in sent if hasattr(m, 'gradient')) > 3
    assert late and min(late) == 0
    assert snapshot(*again.machs).isfinite().all()


def test_ctrl_c_and_on(tmp_path):
    """A MACH goes on from the step in which it was stopped."""

    def run(experiment):
        words = f'--checkpoint={tmp_path / experiment}', '--precision=fp32'
        logs = [
            test_main.interrupt(tmp_path, experiment, '--k=3', *words, resume)
            for resume in ('--resume=False', '--resume=True')
        ]
        for mach in range(3):
            stopped = logs[0].finals[mach]['steps']
            steps = [f['step'] for f in logs[1].steps if f['mach'] == mach]
            assert not steps or steps[0] == 10 * (stopped // 10 + 1)
            assert logs[1].finals[mach]['steps'] >= stopped

    test_main.two_at_a_time(run, ('synchronous_kgraph', 'asynchronous_kgraph'))
