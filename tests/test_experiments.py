"""Each experiment from its command line: it runs, learns, and logs what it did.

MNIST is read from the folder in MACH_DATA, or from data; where it is in neither,
nothing is fetched: the experiments draw digits, and the floors are those.
"""

import math
import functools
import importlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import threading
import urllib.request

import conftest
import pytest
import torch

from mach import data as mach_data
from mach import metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENTS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph', 'asynchronous_sequence',
               'asynchronous_kgraph')
SEVERAL = EXPERIMENTS[1:]  # those of k MACHs
ASYNCHRONOUS = EXPERIMENTS[3:]

STEPS, LOG_EVERY, EVALUATE_EVERY, K = 200, 25, 100, 3
# Underscores, dashes and = are all as good.
WORDS = (f'--steps {STEPS} --batch-size 64 --hidden=128 --student-hidden=128 '
         f'--log_every={LOG_EVERY} --evaluate-every={EVALUATE_EVERY} '
         '--learning_rate 0.002 --student-learning-rate 0.003 '
         '--precision fp32').split()
READ = dict(steps=STEPS, batch_size=64, hidden=128, student_hidden=128)
READ |= dict(log_every=LOG_EVERY, evaluate_every=EVALUATE_EVERY)
READ |= dict(learning_rate=2e-3, student_learning_rate=3e-3)

# (synthetic, real) of every MACH after so few steps: 1 to 2.5 points below the
# least of two seeds. A student has the whole embedding of its teacher to learn
# in synchronous_single, but only what its children add in the others.
FLOORS = {
    'MNIST': {
        'synchronous_single': (78.0, 90.2),
        'synchronous_sequence': (90.5, 90.7),
        'synchronous_kgraph': (90.3, 90.4),
        'asynchronous_sequence': (88.0, 88.5),
        'asynchronous_kgraph': (88.0, 88.0),
    },
    'drawn-digits': {
        'synchronous_single': (80.0, 89.6),
        'synchronous_sequence': (89.2, 90.2),
        'synchronous_kgraph': (89.7, 90.1),
        'asynchronous_sequence': (87.5, 87.5),
        'asynchronous_kgraph': (87.5, 87.5),
    },
}
FINAL_KEYS = tuple(
    'experiment dataset seed mach synthetic real steps rate staleness '
    'staleness_max dropped seconds'.split())


def offline(environment):
    """`environment`, with proxies that refuse at once; one thread for torch."""
    proxies = dict.fromkeys(
        ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'),
        'http://127.0.0.1:9')
    return dict(environment,
                **proxies,
                no_proxy='',
                NO_PROXY='',
                OMP_NUM_THREADS='1')


def start(folder, *words, cwd=ROOT):
    """Runs `folder`/main.py to its end, within two minutes."""
    return subprocess.run(
        [sys.executable,
         str(folder / 'main.py'), *map(str, words)],
        cwd=cwd,
        env=offline(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        encoding='utf-8',
        timeout=120)


@pytest.fixture(scope='session', name='data_folder')
def fixture_data_folder(tmp_path_factory):
    """Where MNIST is; else an empty folder, which stays so."""
    folder = pathlib.Path(os.environ.get('MACH_DATA') or ROOT / 'data')
    raw = folder / 'MNIST' / 'raw'
    if all((raw / plain).exists() or (raw / f'{plain}.gz').exists()
           for plain in mach_data.UNPACKED_MD5):
        return folder.resolve()
    return tmp_path_factory.mktemp('data')


@pytest.fixture(scope='session', name='dataset')
def fixture_dataset():
    """A thousand images, each of its class's grey with noise."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (1000, 100, 200):
        labels = torch.arange(count) % 10
        noise = torch.randint(80, (count, 784), generator=generator)
        parts += [(noise + 15 * labels[:, None]).to(torch.uint8), labels]
    return mach_data.Dataset('greys', *parts)


@pytest.fixture(name='run_here')
def fixture_run_here(monkeypatch, capsys, dataset):
    """Runs an experiment's main here, on the little dataset: its Log."""

    def run_here(experiment, *words):
        main = conftest.load_main(ROOT / experiment)
        monkeypatch.setattr(mach_data, 'load', lambda *_, **__: dataset)
        code = main.main([
            '--precision=fp32', '--batch_size=16', '--hidden=32',
            '--student_hidden=32', '--steps=6', '--log_every=3', *words
        ])
        # A worker that computes at the interpreter's end would abort it.
        for thread in threading.enumerate():
            if isinstance(thread, main.Worker):
                thread.join(5)
        out, err = capsys.readouterr()
        assert (code, err) == (0, '')
        return metrics.parse_log(out)

    return run_here


# ------------------------------------------------- one run of each experiment


@pytest.fixture(scope='session', name='run_of')
def fixture_run_of(data_folder):
    """Runs an experiment on all the data, or gives the run it has had."""

    @functools.cache
    def run_of(experiment, repetition=0):
        del repetition  # Of an experiment that has been run another one.
        several = ('--k', K, '--grad_weight',
                   1) if experiment in SEVERAL else ()
        process = start(ROOT / experiment, '--data', data_folder, *several,
                        *WORDS)
        process.experiment = experiment
        return process

    return run_of


@pytest.fixture(scope='session', name='process', params=EXPERIMENTS)
def fixture_process(request, run_of):
    """The subprocess, which has ended, of each experiment."""
    return run_of(request.param)


@pytest.fixture(name='log')
def fixture_log(process):
    """The Log of that run."""
    return metrics.parse_log(process.stdout, process.experiment)


def test_run_ends_well(process):
    assert process.returncode == 0, process.stderr
    assert 'Traceback' not in process.stderr


def test_lines_come_in_order(process, log):
    kinds = [(metrics.parse_line(line) or ['empty'])[0]
             for line in process.stdout.splitlines()]
    machs = log.hparams.get('k', 1)
    number = machs * STEPS // LOG_EVERY + STEPS // EVALUATE_EVERY
    middle = kinds[2:2 + number]
    assert kinds[:2] == ['run', 'hparams']
    assert sorted(middle) == (['eval'] * (STEPS // EVALUATE_EVERY) + ['step'] *
                              (machs * STEPS // LOG_EVERY))
    assert middle[0] == 'step'
    assert kinds[2 + number:] == ['final'] * (machs + 1)
    assert process.stdout.endswith('\n')


def test_run_line(process, log):
    packages = ('torch', 'torchvision', 'numpy')
    assert list(log.run)[:2] == ['experiment', 'dataset']
    assert log.run['experiment'] == process.experiment
    assert (log.run['seed'], log.run['device']) == (0, 'cpu')
    assert log.run['precision'] == 'fp32'
    assert log.run['python'].count('.') == 2
    assert re.fullmatch('none|[0-9a-f]{7,}(-dirty)?', log.run['commit'])
    for package in packages:
        version = importlib.metadata.version(package).split('+')[0]
        assert log.run[package].split('+')[0] == version


def test_hyperparameters_are_logged_as_given(process, log, data_folder):
    given = dict(READ, data=str(data_folder), precision='fp32')
    if process.experiment in SEVERAL:
        given['k'] = K
    assert {name: log.hparams[name] for name in given} == given


def test_one_dataset_in_every_result(log, data_folder):
    here = (data_folder / 'MNIST').exists()
    assert log.run['dataset'] == ('MNIST' if here else 'drawn-digits')
    assert {f['dataset'] for f in log.finals} == {log.run['dataset']}


def test_every_mach_reports_every_interval(log):
    machs = range(log.hparams.get('k', 1))
    for i in machs:
        steps = [f['step'] for f in log.steps if f['mach'] == i]
        assert steps == [*range(LOG_EVERY, STEPS + 1, LOG_EVERY)]
    assert {f['mach'] for f in log.steps} == set(machs)
    assert [(f['mach'], f['step']) for f in log.evals
           ] == [('mean', step)
                 for step in range(EVALUATE_EVERY, STEPS + 1, EVALUATE_EVERY)]


def test_finals(process, log):
    machs = log.hparams.get('k', 1)
    assert [f['mach'] for f in log.finals] == [*range(machs), 'mean']
    for final in log.finals:
        assert tuple(final)[:len(FINAL_KEYS)] == FINAL_KEYS
        assert final['experiment'] == process.experiment
        assert (final['seed'], final['steps']) == (0, STEPS)
        if not math.isnan(final['staleness']):  # it has received Grads
            assert 0 <= final['staleness'] <= final['staleness_max']
        assert final['seconds'] > 0
    for final in log.finals[:-1]:  # the mean's seconds are the slowest's
        assert final['rate'] * final['seconds'] == pytest.approx(STEPS, rel=0.1)


def test_the_mean_is_the_mean(log):
    *machs, mean = log.finals
    for key, combine in (('synthetic', statistics.fmean), ('real',
                                                           statistics.fmean),
                         ('steps', statistics.fmean), ('staleness',
                                                       statistics.fmean),
                         ('staleness_max', max), ('dropped', sum), ('seconds',
                                                                    max)):
        # Each number has lost what comes after its last decimal.
        slack = 0.1 if key == 'seconds' else 0.011
        numbers = [final[key] for final in machs]
        expected = combine([n for n in numbers if not math.isnan(n)])
        assert mean[key] == pytest.approx(expected, abs=slack), key


def test_losses_fall(log):
    for i in range(log.hparams.get('k', 1)):
        lines = [f for f in log.steps if f['mach'] == i]
        assert lines[-1]['loss'] < 0.7 * lines[0]['loss']
        assert lines[-1]['train'] > lines[0]['train'] + 20


def test_accuracies(process, log):
    floors = FLOORS[log.run['dataset']][process.experiment]
    for final in log.finals:
        for key, floor in zip(('synthetic', 'real'), floors, strict=True):
            assert floor <= final[key] < 100, key
    # Validation images are others than those of the test, of the same kind.
    last = log.evals[-1]
    assert last['real'] == pytest.approx(log.mean['real'], abs=4)
    assert last['synthetic'] == pytest.approx(log.mean['synthetic'], abs=4)


def test_staleness_is_counted(process, log):
    for final in log.finals:
        if process.experiment.endswith('sequence') and final['mach'] == K - 1:
            continue  # The last of a row has no parent that sends it Grads.
        if process.experiment in ASYNCHRONOUS:
            assert 0 < final['staleness'] <= final['staleness_max']
        else:
            assert final['staleness'] == log.hparams['delay']
            assert final['staleness_max'] == log.hparams['delay']
        if process.experiment not in ASYNCHRONOUS:
            assert final['dropped'] == 0


# ------------------------------------------------------------- other settings


def without_time(log):
    """The lines of results, less how long they took."""
    return [
        {
            key:
                str(value)  # so that nan equals nan
            for key, value in fields.items()
            if key not in ('rate', 'seconds')
        }
        for fields in log.steps + log.evals + log.finals
    ]


def test_one_seed_gives_one_result(run_of):
    one, same = (without_time(
        metrics.parse_log(run_of('synchronous_single', repetition).stdout))
                 for repetition in (0, 1))
    assert len(one) == STEPS // LOG_EVERY + STEPS // EVALUATE_EVERY + 2
    assert one == same


@pytest.mark.parametrize('experiment', EXPERIMENTS[:3])
def test_synchronous_results_depend_on_the_seed_alone(run_here, experiment):
    one, same, other = (
        without_time(run_here(experiment, '--seed', seed)) for seed in '778')
    assert one == same
    assert [f.get('loss') for f in one] != [f.get('loss') for f in other]


def knows(experiment, name):
    """Whether it has a hyperparameter of this name."""
    text = (ROOT / experiment / 'main.py').read_text(encoding='utf-8')
    return re.search(rf'^    {name}: \w+ = hparam\(', text, re.M) is not None


@pytest.mark.parametrize('experiment',
                         [e for e in EXPERIMENTS if knows(e, 'connected')])
def test_isolated(run_here, experiment):
    log = run_here(experiment, '--connected', 'False', '--k=2')
    assert log.hparams['connected'] is False
    assert [f['mach'] for f in log.finals] == [0, 1, 'mean']
    for final in log.finals:  # nobody is asked, so there is but one answer
        assert final['synthetic'] == final['real']
        assert (final['staleness_max'], final['dropped']) == (0, 0)
    assert {f['synthetic_loss'] for f in log.steps} == {0}


@pytest.mark.parametrize('experiment', SEVERAL)
def test_one_mach_is_the_central_baseline(run_here, experiment):
    log = run_here(experiment, '--k', '1')
    assert [f['mach'] for f in log.finals] == [0, 'mean']
    assert log.finals[0]['synthetic'] == log.finals[0]['real']


@pytest.mark.parametrize('experiment', SEVERAL)
def test_real_inputs(run_here, experiment):
    log = run_here(experiment, '--inputs', 'real', '--k', '3', '--depth', '2')
    assert log.hparams['inputs'] == 'real'
    assert [f['steps'] for f in log.finals] == [6] * 4
    assert any(f['synthetic_loss'] > 0 for f in log.steps)


@pytest.mark.parametrize('experiment',
                         [e for e in EXPERIMENTS if knows(e, 'delay')])
@pytest.mark.parametrize('delay', [0, 2])
def test_staleness_is_the_delay(run_here, experiment, delay):
    log = run_here(experiment, f'--delay={delay}')
    assert log.mean['staleness_max'] == delay


@pytest.mark.parametrize('words',
                         [['--k=2'], ['--connected=False', '--k=2'], ['--k=1']])
@pytest.mark.parametrize('experiment', ASYNCHRONOUS)
def test_nobody_waits_for_whom_it_has_not(run_here, experiment, words):
    log = run_here(experiment, '--inputs=real', '--deadline=3', *words)
    assert log.mean['seconds'] < 3


@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_eval_lines_can_be_left_out(run_here, experiment):
    log = run_here(experiment, '--evaluate_every', '0')
    assert log.steps and not log.evals and log.mean


# ------------------------------------------------------ copies of experiments


@pytest.fixture(scope='session', name='fork')
def fixture_fork(tmp_path_factory, data_folder):
    """`cp -r asynchronous_kgraph my_idea`, a default edited, run from afar."""
    root = tmp_path_factory.mktemp('repository')
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / 'mach', root / 'mach', ignore=ignored)
    shutil.copytree(ROOT / 'asynchronous_kgraph',
                    root / 'my_idea',
                    ignore=ignored)
    edit(root / 'my_idea', 'seed', 7)
    return start(root / 'my_idea',
                 '--data',
                 data_folder,
                 '--steps=4',
                 '--log_every=2',
                 '--k=2',
                 cwd=tmp_path_factory.mktemp('elsewhere'))


def edit(folder, name, default):
    """Edits a hyperparameter in place."""
    path = folder / 'main.py'
    text, count = re.subn(rf'^(    {name}: \w+ = hparam\(\s*)[^,]+,',
                          rf'\g<1>{default},',
                          path.read_text(encoding='utf-8'),
                          flags=re.M)
    assert count == 1
    path.write_text(text, encoding='utf-8')


def test_a_copy_is_an_experiment_of_its_own(fork):
    assert fork.returncode == 0, fork.stderr
    log = metrics.parse_log(fork.stdout)
    assert log.run['experiment'] == 'my_idea'
    assert [f['experiment'] for f in log.finals] == ['my_idea'] * 3


def test_what_is_edited_in_place_takes_effect(fork):
    log = metrics.parse_log(fork.stdout)
    assert (log.run['seed'], log.hparams['seed']) == (7, 7)
    assert [f['seed'] for f in log.finals] == [7] * 3


@pytest.mark.parametrize('experiment', EXPERIMENTS)
@pytest.mark.parametrize('name, default', [('steps', -3), ('steps', 2.5),
                                           ('learning_rate', "'fast'"),
                                           ('warmup', 1), ('strict_data', 0),
                                           ('precision', "'fp8'")])
def test_what_is_edited_in_place_is_checked(tmp_path, capsys, experiment, name,
                                            default):
    folder = tmp_path / 'my_idea'
    shutil.copytree(ROOT / experiment, folder)
    edit(folder, name, default)
    with pytest.raises(SystemExit) as stopped:
        conftest.load_main(folder).main([])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, '')
    assert err.startswith(f'my_idea: --{name} must be ')
    assert err.count('\n') == 1


# --------------------------------------------------------------- without MNIST


def test_without_mnist_digits_are_drawn(tmp_path):
    process = start(ROOT / 'synchronous_single', '--data', tmp_path,
                    '--steps=4', '--hidden=64')
    assert process.returncode == 0, process.stderr
    log = metrics.parse_log(process.stdout)
    assert log.run['dataset'] == 'drawn-digits'
    assert [f['dataset'] for f in log.finals] == ['drawn-digits'] * 2
    warning, = process.stderr.splitlines()
    assert 'warning' in warning and str(tmp_path) in warning
    assert 'rawn digits' in warning


@pytest.mark.parametrize('experiment', EXPERIMENTS)
def test_without_mnist_strict_data_refuses(tmp_path, monkeypatch, capsys,
                                           experiment):
    for name, value in offline({}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(urllib.request, '_opener', None)  # it knows no proxies
    code = conftest.load_main(ROOT / experiment).main(
        ['--strict_data', 'True', '--data',
         str(tmp_path)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, '')
    assert err.startswith(f'{experiment}: MNIST cannot be had')
    assert err.count('\n') == 1
