"""What a shell and a fork may do to a run: signals, streams, edits, profilers.

Each test here starts processes.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import conftest
import pytest

from mach import metrics

wait_until = conftest.wait_until

# -------------------------------------------------------------------- signals

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
STEP, BEGIN = '\nstep', '\nhparams'
SIGNALS = [
    ('synchronous_single', STEP, [INT] * 3),
    ('asynchronous_sequence', STEP, [HUP, TERM]),
    # A second later, a second one ends it at once, without results.
    ('asynchronous_kgraph', BEGIN, [INT, None, INT]),
    # The imports: there are no results yet.
    ('synchronous_single', r'\| *argparse\n', [INT]),
    ('asynchronous_sequence', r'\| *torch\n', [TERM]),
]


def test_signals_to_processes(tmp_path):

    def run(number):
        experiment, moment, signals = SIGNALS[number]
        words = ['--steps=1000000', '--log_every=10', '--hidden=64']
        if moment == BEGIN:  # the first steps last
            words += ['--batch_size=9000', '--hidden=2048']
        path = tmp_path / str(number)
        profiled = ('python=$1; shift; exec "$python" -m cProfile -o '
                    f'{path}.profile "$@"')
        with conftest.running(path,
                              experiment,
                              *words,
                              prefix=['sh', '-c', profiled, 'sh'] *
                              (moment == STEP)) as process:
            assert wait_until(lambda: re.search(moment, process.said()))
            for one in signals:
                if one:
                    process.send_signal(one)
                time.sleep(0.05 if one else 1.2)
            code, out, err = process.end()
        assert code == 128 + signals[0], experiment
        assert 'Traceback' not in err and 'terminate called' not in err
        assert os.path.exists(f'{path}.profile') == (moment == STEP)
        if None in signals:
            assert 'final' not in out
        elif moment in (STEP, BEGIN):
            assert err.count('ends with the results so far') == 1
            log = metrics.parse_log(out)
            assert len(log.finals) == log.hparams.get('k', 1) + 1
            assert log.mean['steps'] < 1000000
            assert log.mean['real'] > 0 or moment == BEGIN

    conftest.two_at_a_time(run, range(len(SIGNALS)))


@pytest.mark.parametrize('experiment', ['synchronous_single', 'mach'])
def test_what_the_parent_ignores_stays_ignored(tmp_path, experiment):
    """As after nohup, or in a job of a script; in the imports, and later."""
    words = ['--steps=40', '--log_every=1', '--hidden=32']
    if experiment == 'mach':
        words += ['--only=asynchronous_kgraph', f'--logs={tmp_path / "logs"}']
    shell = 'sh', '-c', 'trap "" INT HUP TERM; exec "$@"', 'sh'
    with conftest.running(tmp_path / 'run', experiment, *words,
                          prefix=shell) as process:
        for moment in r'\| *argparse\n', STEP:
            assert wait_until(lambda at=moment: re.search(at, process.said()))
            for one in INT, HUP, TERM:
                os.killpg(process.pid, one)
        code, out, _ = process.end()
    assert code == 0 and 'mach mean' in out


def test_a_library_gets_its_handlers_back():
    before = signal.getsignal(TERM)
    with metrics.catch_signals(pytest.fail):
        assert signal.getsignal(TERM) != before
    assert signal.getsignal(TERM) == before


def test_tests_send_signals_under_nohup_too():
    """The test above fails where SIGTERM is ignored."""
    command = ['sh', '-c', 'trap "" INT TERM HUP; exec "$@"', 'sh']
    command += [sys.executable, '-m', 'pytest', '--numprocesses=0', __file__]
    command += ['-k', test_a_library_gets_its_handlers_back.__name__]
    subprocess.run(command, check=True)


# -------------------------------------------------------------------- streams


@pytest.mark.parametrize('experiment, redirect, number', [
    ('synchronous_kgraph', '', None),
    ('asynchronous_sequence', '', INT),
    ('asynchronous_kgraph', '>/dev/full', None),
])
def test_stdout_that_fails(tmp_path, experiment, redirect, number):
    """As with `| head -3`, or a Ctrl-C that also ends `| tee log.txt`."""
    with conftest.running(tmp_path / 'run',
                          experiment,
                          '--steps=1000000',
                          '--log_every=1',
                          f'--checkpoint={tmp_path}/saved',
                          prefix=['sh', '-c', f'exec "$@" {redirect}', 'sh'],
                          out=subprocess.PIPE) as process:
        while not redirect:  # a run that trains has results
            line = process.stdout.readline()
            assert line
            if line.startswith(b'step'):
                break
        process.stdout.close()
        if number:
            process.send_signal(number)
        code, _, err = process.end()
    lines = [l for l in err.splitlines() if not l.startswith('warning')]
    assert code == (128 + number if number else 1) and 'Traceback' not in err
    assert sum('cannot write the log to ' in line for line in lines) == 1
    finals = [line for line in lines if line.startswith('final')]
    assert len(finals) == (0 if redirect else 4)  # of three MACHs, and the mean
    assert bool(os.listdir(tmp_path / 'saved')) == (not redirect)
    assert not redirect or len(lines) == 1


# --------------------------------------------------- other ways to be started


@pytest.mark.parametrize('experiment',
                         conftest.SYNCHRONOUS + conftest.ASYNCHRONOUS)
def test_the_command_line_is_read_before_torch_is_imported(
        tmp_path, experiment):
    for word, status in ('--help', 0), ('--stepz=3', 2), ('--seed=none', 2):
        with conftest.running(tmp_path / word, experiment, word) as process:
            code, out, _ = process.end()
        assert code == status and 'argparse' in process.said()
        assert not re.search(r'\| *torch\n', process.said())
        if word == '--help':
            assert f'python {experiment}/main.py' in out and '()' not in out
            assert '1 to 1000000000; default' in ' '.join(out.split())
            assert 'fp32, bf16 or auto' in ' '.join(out.split())
            for name, field in conftest.hyperparameters(experiment).items():
                assert f'--{name} ' in out and field.metadata['reason'].split(
                )[0] in out


# As on Windows: what that lacks is gone.
WINDOWS = '''import os, runpy, signal, sys
del signal.SIGHUP, signal.pthread_sigmask, os.fork, os.O_NONBLOCK, os.O_CLOEXEC
sys.modules["fcntl"], sys.argv = None, sys.argv[2:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")'''


def test_windows(tmp_path, monkeypatch):
    prefix = sys.executable, '-c', WINDOWS

    def run(name, *words):
        with conftest.running(tmp_path / name,
                              'asynchronous_kgraph',
                              *conftest.TINY,
                              *words,
                              prefix=prefix) as process:
            return process.end()

    code, out, err = run('threads', f'--checkpoint={tmp_path}/saved')
    assert code == 0 and 'Traceback' not in err
    assert metrics.parse_log(out).mean['steps'] == 6
    log, picture = tmp_path / 'threads' / 'out', tmp_path / 'a.svg'
    words = conftest.ROOT / 'mach/main.py', '--compare', log, '--plot', picture
    subprocess.run([*prefix, sys.executable, *words], check=True)
    assert picture.stat().st_size
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    code, _, err = run('processes')
    assert code == 2 and err.endswith(
        'kgraph: several processes need Linux or macOS; threads need nothing\n')


# ---------------------------------------------------------------------- forks


def test_what_a_fork_may_do(tmp_path):
    """It may exit in a step, fail in an evaluation, lose stderr."""
    shutil.copytree(conftest.ROOT / 'mach', tmp_path / 'mach')
    folder = tmp_path / 'deep' / 'asynchronous_kgraph'
    shutil.copytree(conftest.ROOT / 'asynchronous_kgraph', folder)
    text = (folder / 'main.py').read_text(encoding='utf-8')
    text = text.replace(
        'def evaluate(snapshots, settings, images, labels, edges=False):\n',
        'def evaluate(snapshots, settings, images, labels, edges=False):\n'
        '    assert settings.seed != 1\n')
    text = text.replace(
        'trainer.step(halt.is_set)',
        'trainer.step(halt.is_set); settings.seed == 2 and sys.exit()')
    (folder / 'main.py').write_text(text, encoding='utf-8')

    def run(seed):
        foreign = 'PYTHONSAFEPATH=1 TQDM_NCOLS=x exec "$@" 2>&-'
        prefix = [] if seed else ['sh', '-c', foreign, 'sh']
        words = ['--steps=4', '--hidden=32', f'--seed={seed}']
        with conftest.running(tmp_path / str(seed),
                              folder,
                              *words,
                              prefix=prefix) as process:
            return process.end()

    normal, broken, left = conftest.two_at_a_time(run, range(3))
    assert normal[0] == 0
    assert metrics.parse_log(normal[1]).mean['steps'] == 4
    assert broken[0] == 1 and 'AssertionError' in broken[2]
    assert left[0] == 1 and 'SystemExit' in left[2]
    assert math.isnan(metrics.parse_log(left[1]).mean['real'])
    for _, _, err in normal, broken, left:
        assert 'terminate called' not in err


def test_a_copy_of_a_folder_is_an_experiment_of_its_own(tmp_path):
    ignored = shutil.ignore_patterns('__pycache__')
    for old, new in (('mach', 'mach'), ('asynchronous_kgraph', 'f/my_idea')):
        shutil.copytree(conftest.ROOT / old, tmp_path / new, ignore=ignored)
    folder = tmp_path / 'f/my_idea'
    text = (folder / 'main.py').read_text(encoding='utf-8')
    text = text.replace('seed: int = hparam(0', 'seed: int = hparam(7')
    (folder / 'main.py').write_text(text, encoding='utf-8')
    # There is neither MNIST nor a network: it draws digits.
    with conftest.running(tmp_path / 'run', folder, '--steps=4', '--k=2',
                          f'--data={tmp_path}') as process:
        code, out, err = process.end()
    log, warning = metrics.parse_log(out), err.splitlines()[0]
    assert code == 0 and log.run['commit'] == 'none'
    for fields in [log.run, *log.finals]:
        assert [fields[key] for key in ('experiment', 'dataset', 'seed')
               ] == ['my_idea', 'drawn-digits', 7]
    assert warning.startswith('warning: ') and str(tmp_path) in warning
