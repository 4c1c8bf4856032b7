"""Checkpoints: a resumed run continues as if it had never been stopped."""

import contextlib
import errno
import os
import re
import signal

import conftest
import pytest
import test_main
import torch

every_experiment = test_main.every_experiment
check_refused = test_main.check_refused
synchronous, asynchronous = test_main.synchronous, test_main.asynchronous


def make(experiment, path, **names):
    """A whole experiment of new Trainers with files in `path`."""
    return conftest.make_all(experiment, checkpoint=str(path), **names)


def take_steps(run, steps):
    """So many steps of every Trainer, in turn."""
    for one in run.trainers * steps:
        one.step()


def for_all(run, experiment, name):
    """Calls `save` or `resume` for all Trainers of a run."""
    function = getattr(conftest.load(experiment).checkpoint, name)
    for one in run.trainers:
        function(one, one.settings.checkpoint)


# ---------------------------------------------------- as if it had never stopped


@synchronous
@pytest.mark.parametrize('delay', [0, 2])
@pytest.mark.parametrize('inputs', ['synthetic', 'real'])
def test_lockstep_continues_to_the_bit(experiment, tmp_path, delay, inputs):
    """With Grads in flight, and in the middle of a log's interval."""
    names = dict(delay=delay, inputs=inputs, dropout=0.5)
    for stopped in (1, 2, 5):
        whole, run = (make(experiment, tmp_path, **names) for _ in range(2))
        take_steps(whole, stopped)
        for_all(whole, experiment, 'save')
        for_all(run, experiment, 'resume')
        for one in whole, run:
            take_steps(one, 6)
            one.weights = conftest.weights(*one.networks, *one.students)
        assert torch.equal(whole.weights, run.weights)


@every_experiment
def test_a_stopped_run_continues(run_here, before, tmp_path, experiment):
    """It stops in the middle of an epoch and of a log's interval."""
    options = dict(batch_size=300, steps=60, log_every=2, evaluate_every=0)
    options |= dict(k=3, delay=2, dropout=0.4)
    names = options.keys() & conftest.hyperparameters(experiment)
    words = [f'--{name}={options[name]}' for name in names]
    _, whole, _ = run_here(experiment, *words)
    words, taken = [*words, f'--checkpoint={tmp_path}'], []

    def interrupt(*_):
        taken.append(1)
        if len(taken) == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    before(experiment, 'step', interrupt)
    code, first, _ = run_here(experiment, *words)
    again, second, err = run_here(experiment, *words, '--resume=True')
    assert (code, again, err) == (143, 0, '')
    for mach, final in enumerate(first.finals[:-1]):
        steps = [f['step'] for f in second.steps if f['mach'] == mach]
        assert steps == [*range(final['steps'] // 2 * 2 + 2, 61, 2)]
    if experiment in conftest.SYNCHRONOUS:
        second.steps = first.steps + second.steps
        assert test_main.without_time(second) == test_main.without_time(whole)


@every_experiment
def test_each_mach_continues_from_its_last_file(run_here, before, tmp_path,
                                                experiment):
    path, began, stop = tmp_path / 'deep' / 'er', [], [5]

    def fail(one, *_):
        if stop == [one.steps_taken]:
            raise RuntimeError('killed')

    before(experiment, 'step', fail)
    before(experiment, 'work', lambda one, *_: began.append(one.steps_taken))
    words = [f'--checkpoint={path}', '--checkpoint_every=2']
    assert run_here(experiment, *words)[0] == 1
    count = len(list(path.iterdir()))
    stop.clear()
    code, log, err = run_here(experiment, *words, '--resume=True')
    assert code == 0 and {f['steps'] for f in log.finals} == {6}
    assert sorted(began) == [0] * count + [4] * count and err == ''
    max(path.iterdir()).unlink()
    check_refused(run_here, experiment, [*words, '--resume=True'],
                  'cannot resume: ', path)


@asynchronous
def test_messages_to_an_earlier_process_do_no_harm(experiment, tmp_path):
    run, again, late = *(make(experiment, tmp_path) for _ in range(2)), []
    for one, other in zip(run.trainers, again.trainers):
        mailbox, twin = one.exchange.mailbox, other.exchange.mailbox
        mailbox.put = lambda *content, put=mailbox.put, twin=twin: (put(
            *content), twin.put(*content))
        other.tally.grad = lambda steps, _: late.append(steps)
    take_steps(run, 3)
    for_all(run, experiment, 'save')
    take_steps(run, 6)
    for_all(again, experiment, 'resume')
    take_steps(again, 6)  # with all messages of the earlier Trainers
    assert late and min(late) == 0
    assert conftest.weights(*again.networks).isfinite().all()


# ----------------------------------------------------- files; what is refused


@every_experiment
def test_a_run_replaces_no_file_of_another(run_here, tmp_path, experiment):
    words = f'--checkpoint={tmp_path}', '--steps=3'
    with contextlib.ExitStack() as stack:  # another run goes on
        trainers = make(experiment, tmp_path).trainers
        conftest.load(experiment).checkpoint.begin(trainers,
                                                   trainers[0].settings, stack)
        for more in [], ['--resume=True'] * bool(list(tmp_path.glob('*.pt'))):
            check_refused(run_here, experiment, [*words, *more],
                          f'another run writes to {tmp_path}')
    assert not list(tmp_path.iterdir())
    assert run_here(experiment, *words)[0] == 0
    old = {path: path.read_bytes() for path in tmp_path.iterdir()}
    check_refused(run_here, experiment, words, 'of an earlier run: --resume')
    assert old == {path: path.read_bytes() for path in tmp_path.iterdir()}


@every_experiment
def test_a_resumed_run_keeps_its_precision(run_here, tmp_path, experiment):
    words = f'--checkpoint={tmp_path}', '--steps=3'
    assert run_here(experiment, *words, '--precision=bf16')[0] == 0
    for precision, then in ('auto', 'bf16'), ('fp32', 'fp32'):
        code, log, _ = run_here(experiment, *words, '--resume=True',
                                f'--precision={precision}')
        assert code == 0 and log.run['precision'] == then


@pytest.mark.parametrize('where', ['open', 'fsync', 'replace'])
@every_experiment
def test_a_disk_that_fails_stops_nobody(run_here, monkeypatch, tmp_path,
                                        experiment, where):

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, 'no space left')

    words = [f'--checkpoint={tmp_path}']
    run_here(experiment, *words)
    old = {path: path.read_bytes() for path in tmp_path.iterdir()}
    owner = conftest.load(experiment).checkpoint if where == 'open' else os
    monkeypatch.setattr(owner, where, no_space, raising=False)
    code, log, err = run_here(experiment, *words, '--resume=True')
    assert code == 0 and log.mean['steps'] == 6
    assert old == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert re.fullmatch('(warning: no checkpoint of step 6: .*\n)+', err)


class Evil:
    """Its pickle makes a folder where it is read."""

    def __reduce__(self):
        return os.mkdir, ('evil',)


@every_experiment
def test_damaged_files_are_refused(run_here, monkeypatch, tmp_path, experiment):
    words = [f'--checkpoint={tmp_path}', '--resume=True']
    assert run_here(experiment, words[0])[0] == 0
    monkeypatch.chdir(tmp_path)
    path = max(tmp_path.iterdir())
    content, state = path.read_bytes(), torch.load(path, weights_only=True)
    half = len(content) // 2  # in the midst of a tensor's numbers
    flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1:]
    for spoilt in (b'', content[:half], flipped, [1, 2], Evil()):
        if isinstance(spoilt, bytes):
            path.write_bytes(spoilt)
        else:
            torch.save(spoilt, path)
        check_refused(run_here, experiment, words, f'{path} is damaged')
    assert not (tmp_path / 'evil').exists()
    del state['trainer']['optimiser']
    torch.save(state, path)
    check_refused(run_here, experiment, words,
                  f"{path}: 'optimiser' is missing")


@every_experiment
def test_networks_of_other_shapes_are_named(run_here, monkeypatch, tmp_path,
                                            experiment):
    words = [f'--checkpoint={tmp_path}', '--resume=True']
    assert run_here(experiment, words[0])[0] == 0
    main = conftest.load_main(experiment)
    monkeypatch.setattr(main,
                        'Mach',
                        lambda count, _, e, of=main.Mach: of(count, 48, e))
    check_refused(run_here, experiment, words, 'cannot resume from ',
                  'local.0.weight', '[32, 784]', '[48, 784]')


@every_experiment
def test_other_hyperparameters_are_refused(run_here, tmp_path, experiment):
    words = [f'--checkpoint={tmp_path}', '--resume=True']
    code, log, _ = run_here(experiment, words[0])
    file = min(tmp_path.iterdir())
    for other in 'seed=1 steps=3 batch_size=17 delay=3 share=0.5'.split():
        name, value = other.split('=')
        if name in conftest.hyperparameters(experiment):
            check_refused(run_here, experiment, [*words, f'--{other}'],
                          f'cannot resume from {file}: {name} was ',
                          f'it is {value}\n')
    # With others that may differ, the finished run has the same results.
    words += '--log_every=1 --evaluate_every=1 --checkpoint_every=7'.split()
    again, found, err = run_here(experiment, *words)
    assert (code, again, err) == (0, 0, '') and not found.steps
    for key in ('real', 'synthetic', 'steps', 'staleness', 'lost', 'seconds'):
        one, other = [[f[key] for f in l.finals] for l in (log, found)]
        assert one == pytest.approx(other, nan_ok=True), key
