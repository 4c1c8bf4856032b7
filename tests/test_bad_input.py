"""Wrong use and mishaps: one line that says what is wrong, and the exit status.

2 for a setting that cannot be, before anything is printed; 1 where a MACH
failed, while the others go on; 130 for Ctrl-C, with the results so far.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import conftest
import pytest
import torch

from mach import data as mach_data
from mach import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENTS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph', 'asynchronous_sequence',
               'asynchronous_kgraph')
SYNCHRONOUS, ASYNCHRONOUS = EXPERIMENTS[:3], EXPERIMENTS[3:]
HANG_SECONDS = 20  # Ctrl-C must have had its effect by then.


def join_threads(main):
    """Waits for workers: one that computes at the interpreter's end aborts it.

    Args:
        main: the module of the experiment.
    """
    for thread in threading.enumerate():
        if isinstance(thread, main.Worker):
            thread.join(5)


def knows(experiment, name):
    """Whether it has a hyperparameter of this name."""
    text = (ROOT / experiment / 'main.py').read_text(encoding='utf-8')
    return re.search(rf'^    {name}: \w+ = hparam\(', text, re.M) is not None


def offline():
    """An environment whose proxies refuse at once, and with one torch thread."""
    proxies = dict.fromkeys(
        ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'),
        'http://127.0.0.1:9')
    return dict(os.environ,
                **proxies,
                no_proxy='',
                NO_PROXY='',
                OMP_NUM_THREADS='1')


@pytest.fixture(scope='session', name='dataset')
def fixture_dataset():
    """A thousand training images of noise, a hundred of each class."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (1000, 100, 100):
        images = torch.randint(256, (count, 784), generator=generator)
        parts += [images.to(torch.uint8), torch.arange(count) % 10]
    return mach_data.Dataset('noise', *parts)


@pytest.fixture(name='run_here')
def fixture_run_here(monkeypatch, capsys, dataset):
    """Runs an experiment's main here: its exit status, stdout and stderr.

    The data are the little dataset, unless a folder is given.
    """

    def run_here(experiment, *words):
        main = conftest.load_main(ROOT / experiment)
        if not any(word.startswith('--data') for word in words):
            monkeypatch.setattr(mach_data, 'load', lambda *_, **__: dataset)
        try:
            code = main.main(list(words))
        except SystemExit as stopped:
            code = stopped.code
        join_threads(main)
        return code, *capsys.readouterr()

    return run_here


# -------------------------------------------------------------- refused input

CUDA = 'cuda:99' if torch.cuda.is_available() else 'cuda'
# The words, what the message says, and the hyperparameter that it is about.
REFUSED = [
    ('--lerning_rate 1', 'lerning_rate; did you mean --learning_rate?', None),
    ('--lerning-rate=1', 'lerning-rate; did you mean --learning_rate?', None),
    ('--stepz 3', 'stepz; did you mean --steps?', None),
    ('--step 3', 'step; did you mean --steps?', None),  # No abbreviations.
    ('--xyzzy 3', 'no hyperparameter --xyzzy', None),
    ('--xyzzy', 'no hyperparameter --xyzzy', None),
    ('xyzzy', 'xyzzy', None),
    ('--steps 3 xyzzy', 'xyzzy', None),
    ('--steps', '--steps', None),
    ('--steps --k', '--steps', 'k'),
    ('--steps=', "--steps must be a whole number, not ''", None),
    ('--steps many', "--steps must be a whole number, not 'many'", None),
    ('--steps 2.5', '--steps must be a whole number', None),
    ('--steps 1e3', '--steps must be a whole number', None),
    ('--steps 0', '--steps must be >= 1, not 0', None),
    ('--steps nan', '--steps must be a whole number', None),
    ('--batch_size True', '--batch_size must be a whole number', None),
    ('--batch-size 0', '--batch_size must be >= 1', None),
    ('--seed -1', '--seed must be >= 0, not -1', None),
    ('--log_every 0', '--log_every must be >= 1', None),
    ('--evaluate_every -5', '--evaluate_every must be >= 0', None),
    ('--validation -1', '--validation must be >= 0', None),
    ('--hidden 0', '--hidden must be >= 2', None),
    ('--student_hidden -1', '--student_hidden must be >= 1', None),
    ('--embedding 0', '--embedding must be >= 1', None),
    ('--strict_data maybe', '--strict_data must be True or False', None),
    ('--strict_data 1', '--strict_data must be True or False', None),
    ('--connected yes', '--connected must be True or False', 'connected'),
    ('--k 0', '--k must be >= 1, not 0', 'k'),
    ('--k -3', '--k must be >= 1, not -3', 'k'),
    ('--k=-3', '--k must be >= 1, not -3', 'k'),
    ('--k three', '--k must be a whole number', 'k'),
    ('--shards some', '--shards must be in disjoint full', 'shards'),
    ('--learning_rate fast', '--learning_rate must be a number', None),
    ('--learning_rate nan', '--learning_rate must be a number', None),
    ('--learning_rate inf', '--learning_rate must be a number', None),
    ('--learning_rate 1e999', '--learning_rate must be a number', None),
    ('--learning_rate -0.1', '--learning_rate must be >= 0, not -0.1', None),
    ('--learning_rate -1e-3', '--learning_rate must be >= 0, not -0.001', None),
    ('--learning-rate -1e-3', '--learning_rate must be >= 0', None),
    ('--learning_rate=-1e-3', '--learning_rate must be >= 0', None),
    ('--student_learning_rate -1', '--student_learning_rate must be', None),
    ('--weight_decay nan', '--weight_decay must be a number', None),
    ('--weight_decay -1', '--weight_decay must be >= 0', None),
    ('--warmup 1', '--warmup must be < 1', None),
    ('--warmup -.5', '--warmup must be > 0', None),
    ('--label_smoothing 1.5', '--label_smoothing must be < 1', None),
    ('--dropout 1.0', '--dropout must be < 1, not 1.0', 'dropout'),
    ('--dropout -0.1', '--dropout must be >= 0', 'dropout'),
    ('--grad_weight nan', '--grad_weight must be a number', 'grad_weight'),
    ('--grad_weight -1', '--grad_weight must be >= 0', 'grad_weight'),
    ('--delay -1', '--delay must be >= 0, not -1', 'delay'),
    ('--depth -1', '--depth must be >= 0, not -1', 'depth'),
    ('--inputs maybe', '--inputs must be in synthetic real', 'inputs'),
    ('--deadline 0', '--deadline must be > 0', 'deadline'),
    ('--mailbox 0', '--mailbox must be >= 1', 'mailbox'),
    ('--precision fp8', '--precision must be in fp32 bf16 auto', None),
    ('--precision bf', '--precision must be in fp32 bf16 auto', None),
    (f'--device {CUDA}', '--device must be one of cpu', None),
    ('--device gpu', '--device must be one of cpu', None),
    ('--device cuda:x', '--device must be one of cpu', None),
    ('--device=', '--device', None),
    ('--device meta', '--device must be one of cpu',
     None),  # torch has it, without numbers
]


@pytest.mark.parametrize('experiment, words, message', [
    pytest.param(experiment, words, message, id=f'{experiment} {words}')
    for words, message, name in REFUSED
    for experiment in EXPERIMENTS
    if name is None or knows(experiment, name)
])
def test_refused(run_here, experiment, words, message):
    # The first of two mistakes is none.
    code, out, err = run_here(experiment, '--batch_size', '32', '--seed=3',
                              *words.split())
    assert (code, out) == (2, '')
    assert err.startswith(f'{experiment}: ') and message in err
    assert err.count('\n') == 1 and err.endswith('\n')


@pytest.mark.parametrize('experiment, words, message', [
    pytest.param(experiment, words, message, id=f'{experiment} {words}')
    for words, message in (
        ('--k 101 --shards disjoint', '101 disjoint shards'),
        ('--batch_size 1001', 'batch'),
        ('--batch_size 501 --k 2 --shards disjoint', 'batch'),
    )
    for experiment in EXPERIMENTS
    if '--k' not in words or knows(experiment, 'k')
])
def test_more_than_there_is(run_here, experiment, words, message):
    code, out, err = run_here(experiment, *words.split(), '--steps=2',
                              '--hidden=8', '--student_hidden=8')
    assert (code, out) == (2, '')
    assert err.startswith(f'{experiment}: ') and message in err
    assert err.count('\n') == 1


@pytest.mark.parametrize('experiment', EXPERIMENTS)
@pytest.mark.parametrize('path', ['file', 'file/below'])
def test_data_folder_that_is_none(run_here, tmp_path, experiment, path):
    (tmp_path / 'file').write_text('no folder', encoding='utf-8')
    code, out, err = run_here(experiment, '--data', str(tmp_path / path))
    assert (code, out) == (2, '')
    assert err.startswith(f'{experiment}: ') and str(tmp_path / path) in err
    assert err.count('\n') == 1


def test_refused_in_a_process_of_its_own(tmp_path):
    (tmp_path / 'file').touch()
    words = {
        'synchronous_single': ['--learning-rate', '-1e-3'],
        'asynchronous_kgraph': ['--data', 'file'],
    }
    processes = {
        name:
            subprocess.Popen(
                [sys.executable, f'{ROOT}/{name}/main.py', *words[name]],
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding='utf-8') for name in words
    }
    try:
        for name, process in processes.items():
            out, err = process.communicate(timeout=100)
            assert (process.returncode, out) == (2, '')
            assert err.startswith(f'{name}: ') and err.count('\n') == 1
    finally:
        for process in processes.values():
            process.kill()


# --------------------------------------------------------------------- Ctrl-C


def interrupt(tmp_path, experiment, stream, moment, *words, python=(), times=1):
    """Runs an experiment until Ctrl-C, when `stream` first matches `moment`.

    Args:
        tmp_path: of the test.
        experiment: its folder.
        stream: 'stdout' or 'stderr'.
        moment: regular expression, of whole lines.
        *words: its command line.
        python: options of the interpreter.
        times: how often Ctrl-C is pressed, 0.1 s apart.
    Returns:
        Exit code, stdout and stderr.
    """
    paths = {name: tmp_path / name for name in ('stdout', 'stderr')}
    (tmp_path / 'data').mkdir()
    with open(paths['stdout'], 'wb') as out, open(paths['stderr'], 'wb') as err:
        process = subprocess.Popen([
            sys.executable, *python, f'{ROOT}/{experiment}/main.py', '--data',
            f'{tmp_path}/data', '--steps=1000000', *words
        ],
                                   env=offline(),
                                   stdin=subprocess.DEVNULL,
                                   stdout=out,
                                   stderr=err)
    try:
        deadline = time.monotonic() + 100
        while not re.search(f'^{moment}$', paths[stream].read_text('utf-8'),
                            re.M):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        process.wait(HANG_SECONDS)
    finally:
        process.kill()
        process.wait(10)
    return (process.returncode,
            *(path.read_text('utf-8') for path in paths.values()))


@pytest.mark.parametrize('times', [1, 3])
@pytest.mark.parametrize('experiment',
                         ['asynchronous_kgraph', 'synchronous_sequence'])
def test_ctrl_c_in_training(tmp_path, experiment, times):
    code, out, err = interrupt(tmp_path,
                               experiment,
                               'stdout',
                               'step .*',
                               '--log_every=10',
                               '--hidden=64',
                               '--k=3',
                               '--precision=fp32',
                               times=times)
    assert code == 130
    assert 'Traceback' not in err
    log = metrics.parse_log(out)
    assert [f['mach'] for f in log.finals] == [0, 1, 2, 'mean']
    assert max(final['steps'] for final in log.finals) >= 10
    for final in log.finals:
        assert final['steps'] < 1000000
        assert 0 <= final['real'] <= 100


# The interpreter tells of each module that it has imported. `trainer` is the
# last: what follows are the settings and the data, two seconds of drawing.
@pytest.mark.parametrize('experiment, moment', [
    ('synchronous_single', 'argparse'),
    ('asynchronous_kgraph', r'torch\.autograd'),
    ('synchronous_kgraph', 'trainer'),
])
def test_ctrl_c_at_the_start(tmp_path, experiment, moment):
    code, out, err = interrupt(tmp_path,
                               experiment,
                               'stderr',
                               rf'import time:.*\| *{moment}',
                               python=('-X', 'importtime'))
    said = [line for line in err.splitlines() if line[:12] != 'import time:']
    assert (code, out) == (130, '')
    assert all('warning' in line for line in said), said


# ----------------------------------------------------------- a MACH that fails


@pytest.fixture(name='fail')
def fixture_fail(monkeypatch, run_here):
    """Runs an experiment in which the n-th batch of one MACH is made bad."""

    def fail(experiment, spoil, mach=0, n=3, words=()):
        main = conftest.load_main(ROOT / experiment)
        load_data = main.load_data

        def load_bad_data(settings):
            dataset, batches = load_data(settings)
            of_mach = batches[mach] if isinstance(batches, list) else batches
            take, count = of_mach.next, iter(range(1, 1000))
            of_mach.next = lambda: (spoil(*take())
                                    if next(count) == n else take())
            return dataset, batches

        monkeypatch.setattr(main, 'load_data', load_bad_data)
        code, out, err = run_here(experiment, '--steps=8', '--hidden=16',
                                  '--student_hidden=16', '--batch_size=8',
                                  '--log_every=2', '--precision=fp32', *words)
        return code, metrics.parse_log(out), err

    return fail


def raise_error(*_):
    """A batch that cannot be had."""
    raise RuntimeError('the dog ate it')


def make_nan(x, y):
    """A batch of x [B, 784], y [B] from which nothing can be learned."""
    return torch.full_like(x, torch.nan), y


def make_huge(x, y):
    """A batch of x [B, 784], y [B], finite, whose loss is not."""
    return torch.full_like(x, 3e38), y


@pytest.mark.parametrize('experiment', ASYNCHRONOUS)
def test_others_go_on_when_one_mach_raises(fail, experiment):
    code, log, err = fail(experiment, raise_error, mach=1, words=['--k=3'])
    assert code == 1
    first, *rest = err.splitlines()
    assert first.startswith(f'{experiment}: mach 1 failed in step 3')
    assert 'Traceback' in err and rest[-1] == 'RuntimeError: the dog ate it'
    assert err.count('Traceback') == err.count('failed') == 1
    assert [f['mach'] for f in log.finals] == [0, 2, 'mean']
    assert {f['steps'] for f in log.finals} == {8}


@pytest.mark.parametrize('spoil', [make_nan, make_huge])
@pytest.mark.parametrize('inputs', ['synthetic', 'real'])
@pytest.mark.parametrize('experiment', ASYNCHRONOUS)
def test_others_go_on_when_one_loss_is_not_finite(fail, experiment, inputs,
                                                  spoil):
    code, log, err = fail(
        experiment,
        spoil,
        mach=1,
        words=['--k=3', f'--inputs={inputs}', '--deadline=0.1'])
    assert code == 1
    assert err.startswith(f'{experiment}: mach 1 failed in step 3: ')
    assert re.search(r'loss is (nan|inf)', err) and 'Traceback' not in err
    assert err.count('\n') == 1
    assert [f['mach'] for f in log.finals] == [0, 2, 'mean']
    assert {f['steps'] for f in log.finals} == {8}


@pytest.mark.parametrize('experiment', SYNCHRONOUS)
def test_one_mach_raises_in_lockstep(fail, experiment):
    code, log, err = fail(experiment, raise_error)
    assert code == 1
    assert re.match(f'{experiment}: .*machs? .*failed in step 3', err)
    assert err.splitlines()[-1] == 'RuntimeError: the dog ate it'
    assert [f['step'] for f in log.steps if f['mach'] == 0] == [2]
    assert not log.finals


@pytest.mark.parametrize('experiment', SYNCHRONOUS)
def test_one_loss_is_not_finite_in_lockstep(fail, experiment):
    # With data of its own for each MACH, MACH 1 alone has bad ones.
    several = knows(experiment, 'k')
    code, log, err = fail(
        experiment,
        make_nan,
        mach=int(several),
        words=['--k=3', '--shards=disjoint'] if several else [])
    assert code == 1
    named = 'mach 1' if several else 'mach 0'
    assert re.match(f'{experiment}: .*failed in step 3: ', err)
    assert named in err and re.search('loss.* is nan', err)
    assert err.count('\n') == 1
    assert not log.finals


@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_learning_rate_beyond_reason(run_here, experiment):
    code, out, err = run_here(experiment, '--learning_rate=1e30', '--steps=40',
                              '--hidden=16', '--student_hidden=16',
                              '--batch_size=8', '--precision=fp32')
    assert code == 1
    assert not metrics.parse_log(out).finals
    lines = err.splitlines()
    assert lines and all(
        re.match(
            f'{experiment}: .*failed in step [0-9]+: .*loss.* is '
            '(nan|inf)', line) for line in lines), err
