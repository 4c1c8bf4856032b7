"""Each experiment from its command line: it learns, logs, refuses, and ends.

Exit status 0; 1 where a MACH failed or the log cannot be written; 2 for bad
hyperparameters or data, in one line; 130 after Ctrl-C, with the results so far.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import types
import urllib.request

import conftest
import pytest
import torch
import tqdm

from mach import data as mach_data
from mach import metrics

ROOT = conftest.ROOT
SYNCHRONOUS, ASYNCHRONOUS = conftest.SYNCHRONOUS, conftest.ASYNCHRONOUS
EXPERIMENTS = SYNCHRONOUS + ASYNCHRONOUS
SEVERAL = EXPERIMENTS[1:]  # those of k MACHs
TINY = ('--precision=fp32 --batch_size=16 --hidden=32 --student_hidden=32 '
        '--steps=6 --log_every=3').split()
LONG = 60  # seconds, after which something hangs
# Proxies that refuse at once, and one thread for torch.
ENVIRONMENT = dict.fromkeys(
    'http_proxy https_proxy HTTP_PROXY HTTPS_PROXY'.split(),
    'http://127.0.0.1:9')
ENVIRONMENT |= dict(no_proxy='', NO_PROXY='', OMP_NUM_THREADS='1')
every_experiment = pytest.mark.parametrize('experiment', EXPERIMENTS)
several_machs = pytest.mark.parametrize('experiment', SEVERAL)
synchronous = pytest.mark.parametrize('experiment', SYNCHRONOUS)
asynchronous = pytest.mark.parametrize('experiment', ASYNCHRONOUS)


def hyperparameters(experiment):
    """Name -> dataclass field."""
    main = conftest.load_main(experiment)
    return {f.name: f for f in dataclasses.fields(main.Hyperparameters)}


@contextlib.contextmanager
def running(folder, tmp_path, *words, prefix=(), out=None):
    """A process of folder/main.py, ended at the end.

    Args:
        folder: of the experiment, under ROOT or a path.
        tmp_path: under it there will be a folder for its output.
        *words: its command line; --data is added unless it is there.
        prefix: of the command.
        out: what stdout is; a file by default.
    Yields:
        The Popen; its methods said(stream) and end() -> (code, stdout, stderr).
    """
    if '--data' not in words:
        words = '--data', conftest.DATA or tmp_path / 'data', *words
    command = [*prefix, sys.executable, ROOT / folder / 'main.py', *words]
    path = tmp_path / f'process{next(NUMBERS)}'
    path.mkdir()
    paths = path / 'stdout', path / 'stderr'
    with open(paths[0], 'wb') as file, open(paths[1], 'wb') as err:
        process = subprocess.Popen(list(map(str, command)),
                                   env={
                                       **os.environ,
                                       **ENVIRONMENT
                                   },
                                   stdin=subprocess.DEVNULL,
                                   stdout=out or file,
                                   stderr=err)
    process.said = lambda name: (path / name).read_text(encoding='utf-8')
    process.end = lambda: (process.wait(3 * LONG), *(p.read_text()
                                                     for p in paths))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ended(*args, **kwargs):
    """What `running` gives in the end."""
    with running(*args, **kwargs) as process:
        return process.end()


NUMBERS = itertools.count()


def wait_until(condition, seconds=LONG):
    """Whether it comes true in that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def two_at_a_time(work, items):
    """The list of work(item), as map() has it."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, items))


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
    """Runs an experiment's main here, on the little dataset unless words say.

    Gives its exit status, the Log, and stderr.
    """

    def run_here(experiment, *words):
        main, before = conftest.load_main(experiment), threading.enumerate()
        if not any(word.startswith('--data') for word in words):
            monkeypatch.setattr(mach_data, 'load', lambda *_, **__: dataset)
        monkeypatch.setattr(tqdm.tqdm, 'monitor_interval', 0)  # no thread
        handler = signal.getsignal(signal.SIGINT)
        try:
            code = main.main([*TINY, *words])
        except SystemExit as stopped:
            code = stopped.code
        except KeyboardInterrupt:
            code = 'KeyboardInterrupt'
        finally:
            if signal.getsignal(signal.SIGINT) != handler:
                signal.signal(signal.SIGINT, handler)
        release.set()
        for thread in set(threading.enumerate()) - set(before):
            thread.join(LONG)  # one that computes at the very end would abort
        out, err = capsys.readouterr()
        return code, out and metrics.parse_log(out), err

    # Whom a test holds waits for it.
    release = run_here.release = threading.Event()
    return run_here


@pytest.fixture(name='at_batch')
def fixture_at_batch(monkeypatch):
    """Makes each MACH call act(mach, n, trainers) before its n-th batch, n >= 1.

    What it returns, unless it is None, takes the batch's place: x, y.
    """

    def take(mach, trainers, act, numbers, take_next):
        batch = take_next()
        return act(mach, next(numbers), trainers) or batch

    def at_batch(experiment, act):
        main = conftest.load_main(experiment)

        def make_trainers(*args, make=main.make_trainers):
            trainers = make(*args)
            together = trainers[0].batches  # lockstep: a list, unless single
            if len(trainers) > 1 or not isinstance(together, list):
                together = [one.batches for one in trainers]
            for mach, batches in enumerate(together):
                batches.next = functools.partial(take, mach, trainers, act,
                                                 itertools.count(1),
                                                 batches.next)
            return trainers

        monkeypatch.setattr(main, 'make_trainers', make_trainers)

    return at_batch


# ------------------------------------------------- one run of each experiment

STEPS, LOG_EVERY, EVALUATE_EVERY, K = 200, 40, 80, 3
# Underscores, dashes and = are all as good.
WORDS = (f'--steps {STEPS} --batch-size 64 --hidden=128 --student-hidden=128 '
         f'--log_every={LOG_EVERY} --evaluate-every={EVALUATE_EVERY} '
         '--learning_rate 2e-3 --student-learning-rate 0.003 '
         '--precision fp32').split()
GIVEN = dict(steps=STEPS, batch_size=64, hidden=128, student_hidden=128)
GIVEN |= dict(log_every=LOG_EVERY, evaluate_every=EVALUATE_EVERY)
GIVEN |= dict(learning_rate=2e-3, student_learning_rate=3e-3, precision='fp32')
# (synthetic, real) of every MACH after so few steps: 2 points below what is
# seen; with MNIST, and with drawn digits. In synchronous_single a student has
# all of its teacher's embedding to learn.
FLOORS = {name: ((88, 88), (87, 87)) for name in EXPERIMENTS}
FLOORS['synchronous_single'] = (76, 88), (77, 87)
RUN_KEYS = ('experiment dataset train validation test seed device precision '
            'torch torchvision numpy python commit').split()
STEP_KEYS = 'step mach loss train synthetic_loss staleness rate'.split()
FINAL_KEYS = (
    'experiment dataset seed mach synthetic real steps rate staleness '
    'staleness_max dropped seconds lost').split()


@pytest.fixture(scope='session', name='runs')
def fixture_runs(tmp_path_factory):
    """Experiment -> exit code, stdout and stderr; two run at a time."""
    folder = tmp_path_factory.mktemp('runs')

    def run(experiment):
        several = ['--k', K, '--grad_weight=1'] if experiment in SEVERAL else []
        return ended(experiment, folder, *WORDS, *several)

    return dict(zip(EXPERIMENTS, two_at_a_time(run, EXPERIMENTS)))


@pytest.fixture(name='log')
def fixture_log(runs, experiment):
    """The Log of that run; `machs` are the MACHs in it."""
    log = metrics.parse_log(runs[experiment][1])
    log.machs = range(K if experiment in SEVERAL else 1)
    return log


@every_experiment
def test_run_ends_well_and_stdout_is_the_log_alone(runs, log, experiment):
    code, out, err = runs[experiment]
    assert code == 0 and 'Traceback' not in err
    kinds = [metrics.parse_line(line)[0] for line in out.splitlines()]
    steps, count = STEPS // LOG_EVERY * len(log.machs), len(log.machs) + 1
    assert kinds[:3] == ['run', 'hparams', 'step']
    assert sorted(kinds[2:-count]) == ['eval'] * 3 + ['step'] * steps
    assert kinds[-count:] == ['final'] * count


@every_experiment
def test_run_and_hyperparameters_are_logged(log, experiment):
    run, fields = log.run, hyperparameters(experiment)
    name = 'MNIST' if conftest.DATA else 'drawn-digits'
    assert list(run) == RUN_KEYS
    assert [run[key] for key in RUN_KEYS[:8]
           ] == [experiment, name, 55000, 5000, 10000, 0, 'cpu', 'fp32']
    assert run['torch'] == torch.__version__
    assert re.fullmatch('none|[0-9a-f]{7}(-dirty)?', run['commit'])
    given = dict(GIVEN, data=log.hparams['data'], checkpoint='-')
    if experiment in SEVERAL:
        given |= dict(k=K, grad_weight=1.0)
    if experiment in ASYNCHRONOUS:
        given |= dict(hosts='-', log_folder='-')
    assert list(log.hparams) == list(fields)
    assert log.hparams == {n: f.default for n, f in fields.items()} | given


@every_experiment
def test_every_mach_reports_every_interval(log):
    for mach in log.machs:
        steps = [f['step'] for f in log.steps if f['mach'] == mach]
        assert steps == [*range(LOG_EVERY, STEPS + 1, LOG_EVERY)]
    assert all(list(fields) == STEP_KEYS for fields in log.steps)
    # At the multiples, and at the last step.
    assert [f['step'] for f in log.evals] == [80, 160, STEPS]
    for fields in log.evals:
        assert list(fields) == 'step mach synthetic real seconds'.split()
        assert fields['mach'] == 'mean' and fields['seconds'] > 0


@every_experiment
def test_finals(log, experiment):
    assert [f['mach'] for f in log.finals] == [*log.machs, 'mean']
    for final in log.finals:
        assert list(final) == FINAL_KEYS
        assert final['experiment'] == experiment
        assert final['dataset'] == log.run['dataset']
        assert (final['seed'], final['steps'], final['lost']) == (0, STEPS, 0)
        slack = 0.06 * (final['rate'] + final['seconds'])  # of the decimals
        if final['mach'] != 'mean':
            assert abs(final['rate'] * final['seconds'] - STEPS) <= slack


@every_experiment
def test_the_mean_is_the_mean(log):
    *machs, mean = log.finals
    for key in FINAL_KEYS[4:]:
        combine = dict(staleness_max=max, dropped=sum, seconds=max,
                       lost=sum).get(key, statistics.fmean)
        numbers = [f[key] for f in machs if not math.isnan(f[key])]
        slack = 0.11 if key in ('seconds', 'rate') else 0.011
        assert mean[key] == pytest.approx(combine(numbers), abs=slack), key


@every_experiment
def test_it_learns(log, experiment):
    for mach in log.machs:
        first, *_, last = [f for f in log.steps if f['mach'] == mach]
        assert last['loss'] < 0.7 * first['loss']
        assert last['train'] > first['train'] + 15
    floors = FLOORS[experiment][log.run['dataset'] != 'MNIST']
    for final in log.finals:
        assert floors[0] <= final['synthetic'] < 100
        assert floors[1] <= final['real'] < 100
    # Validation images are others than those of the test, of the same kind.
    for key in ('synthetic', 'real'):
        assert log.evals[-1][key] == pytest.approx(log.mean[key], abs=4)
        assert log.evals[-1][key] != log.mean[key]


@every_experiment
def test_staleness_is_counted(log, experiment):
    for final in log.finals:
        if experiment.endswith('sequence') and final['mach'] == K - 1:
            assert math.isnan(final['staleness'])  # the last has no parent
        elif experiment in ASYNCHRONOUS:
            assert 0 < final['staleness'] <= final['staleness_max']
        else:
            assert final['staleness'] == final['staleness_max'] == 1
            assert final['dropped'] == 0


# ------------------------------------------------------- threads, evaluations


def without_time(log):
    """The lines of results, less how long they took; as text: nan equals nan."""
    return [
        str({
            k: v for k, v in fields.items() if k not in ('rate', 'seconds')
        }) for fields in log.steps + log.evals + log.finals
    ]


@synchronous
def test_same_seed_same_log_however_slow_evaluations_are(
        run_here, monkeypatch, experiment):
    main, found = conftest.load_main(experiment), []
    evaluate = main.evaluate
    for seconds, seed in ((0, 7), (0.03, 7), (0, 8)):
        monkeypatch.setattr(main,
                            'evaluate',
                            lambda *a, s=seconds: time.sleep(s) or evaluate(*a))
        code, log, _ = run_here(experiment, f'--seed={seed}', '--steps=12',
                                '--evaluate_every=1')
        assert code == 0 and [f['step'] for f in log.evals] == [*range(1, 13)]
        found.append(without_time(log))
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.fixture(name='evaluations')
def fixture_evaluations(monkeypatch):
    """Patches evaluate of an experiment; lists (steps of copies, images)."""

    def watch(experiment, before=lambda: None):
        main, seen = conftest.load_main(experiment), []
        evaluate = main.evaluate

        def watched(copies, settings, images, labels):
            steps = {i: copies[i].tally.steps for i in copies}
            seen.append((steps, len(images)))
            before()
            return evaluate(copies, settings, images, labels)

        monkeypatch.setattr(main, 'evaluate', watched)
        return seen

    return watch


@every_experiment
def test_nobody_rests_for_an_evaluation(run_here, at_batch, evaluations,
                                        experiment):
    trainers, went_on = [], []
    at_batch(experiment, lambda _, __, everybody: trainers.extend(everybody))

    def wait_for_others():  # they take all their steps in the meantime
        if not went_on:
            went_on.append(
                wait_until(lambda: {t.steps_taken for t in trainers} == {120}))

    seen = evaluations(experiment, wait_for_others)
    code, log, _ = run_here(experiment, '--steps=120', '--log_every=120',
                            '--evaluate_every=30')
    assert (code, went_on) == (0, [True])
    # Its step is the fewest of the copies'. The test set is for the end.
    expected = [30, 60, 90, 120]
    assert [f['step'] for f in log.evals] == expected
    assert [min(steps.values()) for steps, _ in seen[:-1]] == expected
    assert [images for _, images in seen] == [100] * 4 + [200]


def others_have_ended(mach, trainers):
    """Whether they do, in time."""
    return wait_until(lambda: all(
        one.steps_taken == 6 for one in trainers if one.index != mach))


@asynchronous
def test_a_straggler_holds_nobody_up(run_here, at_batch, evaluations,
                                     experiment):
    ends = []
    at_batch(
        experiment,
        lambda mach, n, trainers: ends.append(others_have_ended(mach, trainers))
        if (mach, n) == (1, 1) else None)
    seen = evaluations(experiment)
    code, log, _ = run_here(experiment, '--k=3', '--evaluate_every=2')
    assert (code, ends) == (0, [True])
    assert [f['step'] for f in log.evals] == [2, 4, 6]
    assert seen[0][0] == {0: 6, 1: 2, 2: 6}


@pytest.mark.parametrize('depth', [0, 1, 2, 3])
@several_machs
def test_evaluation_asks_the_children(experiment, dataset, depth):
    main, copies = conftest.load_main(experiment), {}
    settings = main.Hyperparameters(k=4,
                                    depth=depth,
                                    hidden=8,
                                    embedding=6,
                                    student_hidden=8)
    images = torch.cat([dataset.train_images, dataset.test_images])
    labels = torch.cat([dataset.train_labels, dataset.test_labels])
    made = main.make_networks(settings)
    for i, (_, mach, student) in enumerate(made):
        for parameter in mach.parameters():
            parameter.data.normal_()  # of many opinions
        copies[i] = types.SimpleNamespace(mach=mach, student=student)
    copies[1].mach = copies[1].student = None  # it failed

    def answer(i, x, depth):
        inputs = copies[i].student(x) if made[i][0] else None
        for position, child in enumerate(made[i][0]):
            if depth > 0 and child != 1:
                inputs[:, position] = answer(child, x, depth - 1)
        return copies[i].mach(x, inputs)

    def accuracy(i, depth):
        if i == 1:
            return math.nan
        x = mach_data.normalise(images)
        guess = copies[i].mach.head(answer(i, x, depth)).argmax(1)
        return 100 * (guess == labels).double().mean().item()

    with torch.no_grad():
        found = main.evaluate(copies, settings, images, labels)
        expected = [(i, accuracy(i, 0), accuracy(i, depth)) for i in range(4)]
    assert len({line['real'] for line in found}) > 2
    assert [
        (f['mach'], f['synthetic'], f['real']) for f in found
    ] == [pytest.approx(fields, nan_ok=True, abs=0.3) for fields in expected]


def test_evaluation_of_a_teacher_and_its_student(dataset):
    main = conftest.load_main('synchronous_single')
    settings = main.Hyperparameters(hidden=8, embedding=6, student_hidden=8)
    trainer, = main.make_trainers(settings, dataset)
    for parameter in trainer.mach.parameters():
        parameter.data.normal_()  # of many opinions
    images, labels = dataset.train_images, dataset.train_labels
    found, = main.evaluate(trainer.copy(), settings, images, labels)
    x, expected = mach_data.normalise(images), []
    for d in (trainer.student(x)[:, 0], trainer.mach(x)):
        guess = trainer.mach.head(d).argmax(1)
        expected.append(100 * (guess == labels).double().mean().item())
    assert expected[0] != expected[1]
    assert list(found.values()) == pytest.approx([0, *expected], abs=0.3)
    found, = main.evaluate(trainer.copy(False), settings, images, labels)
    assert math.isnan(found['synthetic']) and math.isnan(found['real'])


# ------------------------------------------------------------- other settings


@pytest.mark.parametrize('words', ['--steps=9 --precision=bf16', '--steps=1'])
@every_experiment
def test_few_steps(run_here, experiment, words):
    code, log, _ = run_here(experiment, *words.split())
    assert code == 0 and log.evals
    assert {f['steps'] for f in log.finals} == {log.hparams['steps']}
    assert log.run['precision'] == log.hparams['precision']


@every_experiment
def test_dry_run_trains_nothing(run_here, experiment):
    code, log, _ = run_here(experiment, '--dry_run=True')
    assert code == 0 and log.run and log.hparams['dry_run'] is True
    assert not log.steps + log.evals + log.finals
    code, log, err = run_here(experiment, '--dry_run=True', '--batch_size=1001')
    assert (code, log) == (2, '') and 'batch_size 1001' in err


@every_experiment
def test_eval_lines_can_be_left_out(run_here, experiment):
    code, log, _ = run_here(experiment, '--evaluate_every=0')
    assert code == 0 and log.steps and not log.evals and log.mean['real'] >= 0


@several_machs
@pytest.mark.parametrize('words', ['--k=1', '--k=2 --connected=False'])
def test_central_and_isolated(run_here, experiment, words):
    code, log, _ = run_here(experiment, *words.split(), '--inputs=real')
    assert code == 0 and len(log.finals) == log.hparams['k'] + 1
    for final in log.finals:  # nobody is asked, so there is but one answer
        assert final['synthetic'] == final['real']
        assert (final['staleness_max'], final['dropped']) == (0, 0)
    assert all(math.isnan(f['synthetic_loss']) for f in log.steps)


@several_machs
def test_real_inputs(run_here, experiment):
    code, log, _ = run_here(experiment, '--inputs=real', '--k=4', '--depth=2',
                            *['--deadline=30'] * (experiment in ASYNCHRONOUS))
    assert code == 0 and log.hparams['inputs'] == 'real'
    assert [f['steps'] for f in log.finals] == [6] * 5
    assert any(f['synthetic_loss'] > 0 for f in log.steps)
    assert log.mean['seconds'] < 8  # nobody who waits keeps others from a core


@pytest.mark.parametrize('delay', [0, 2])
@synchronous
def test_staleness_is_the_delay(run_here, experiment, delay):
    _, log, _ = run_here(experiment, f'--delay={delay}')
    assert log.mean['staleness'] == log.mean['staleness_max'] == delay


@asynchronous
def test_conditions(run_here, at_batch, experiment):

    def settings_without_mail(*words):
        code, log, _ = run_here(experiment, '--k=3', *words)
        assert code == 0 and [f['steps'] for f in log.finals] == [6] * 4
        assert math.isnan(log.mean['staleness'])  # nobody's Grad has come
        assert all(math.isnan(f['synthetic_loss']) for f in log.steps)
        return log.mean['lost']

    assert settings_without_mail('--loss_rate=1') > 0
    assert settings_without_mail('--latency=1e6') == 0
    assert settings_without_mail('--jitter=1e6') == 0
    at_batch(experiment, lambda *_: time.sleep(0.01))
    code, log, _ = run_here(experiment, '--k=3', '--slow_mach=1',
                            '--slow_factor=12', '--loss_rate=.2')
    assert code == 0 and log.mean['lost'] > 0
    assert log.finals[1]['seconds'] >= 0.6  # 5 of its 6 steps last 0.12 s


# ---------------------------------------------------------------------- MACHs


@pytest.mark.parametrize('experiment', SEVERAL)
def test_children(experiment):
    main = conftest.load_main(experiment)

    def children(**words):
        return main.children_of(main.Hyperparameters(**words))

    assert children(k=1) == [[]]
    assert children(k=3, connected=False) == [[]] * 3
    if experiment.endswith('sequence'):
        assert children(k=4) == [[], [0], [1], [2]]
        return
    assert children(k=4) == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    for k, n in ((9, 1), (9, 4), (9, 8), (100, 3)):
        found = children(k=k, neighbours=n)
        assert all(len({*own, i}) == n + 1 for i, own in enumerate(found))
        parents = sorted(child for own in found for child in own)
        assert parents == sorted([*range(k)] * n)
    drawn = [str(children(k=50, neighbours=3, seed=s)) for s in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len({*drawn}) == 3
    assert children(k=3, neighbours=2, connected=False) == [[]] * 3


@several_machs
def test_networks_are_drawn_by_the_seed_with_heads_alike(experiment):
    main = conftest.load_main(experiment)

    def first_weights(seed):
        settings = main.Hyperparameters(k=3, seed=seed, hidden=8)
        machs = [mach for _, mach, _ in main.make_networks(settings)]
        assert len({str(m.head.state_dict()) for m in machs}) == 1
        return [m.local[0].weight.sum().item() for m in machs]

    one, same, other = map(first_weights, (1, 1, 2))
    assert one == same and len({*one, *other}) == 6


@pytest.mark.parametrize('experiment',
                         [name for name in SEVERAL if name.endswith('kgraph')])
def test_a_hundred_machs_of_few_neighbours(experiment, dataset):
    main = conftest.load_main(experiment)
    settings = main.Hyperparameters(k=100,
                                    neighbours=2,
                                    batch_size=2,
                                    shards='full')
    began = time.perf_counter()
    trainers = main.make_trainers(settings, dataset)
    assert time.perf_counter() - began < 30
    if experiment in ASYNCHRONOUS:
        assert sum(len(t.links) for t in trainers) <= 400
        assert {t.mach.joiner.in_features for t in trainers} == {128}


@asynchronous
def test_links_are_as_the_settings_say(experiment, dataset):
    main, sent = conftest.load_main(experiment), []
    settings = main.Hyperparameters(k=3, latency=2.0, jitter=4.0, hidden=8)
    for trainer in main.make_trainers(settings, dataset):
        for j, link in trainer.links.items():
            put = lambda message, delay, *to: sent.append((message, delay))
            link._mailbox.put = put  # pylint: disable=protected-access
            link.send((trainer.index, j))
    delays = [delay for _, delay in sent]
    assert len({*delays
               }) == len(delays) and 2 <= min(delays) <= max(delays) <= 6
    pairs = {
        (i, j) for i, own in enumerate(main.children_of(settings)) for j in own
    }
    assert {pair for pair, _ in sent} == pairs | {(j, i) for i, j in pairs}


# -------------------------------------------------------------- refused input

# What each hyperparameter may not be.
BAD_VALUES = dict(line.strip().split(maxsplit=1) for line in """
    steps many 2.5 1e3 0 1000000001 nan True; seed -1; batch-size 0 60001;
    log_every 0; evaluate-every -5; validation 9 50001; k 0 -3 three 1001;
    hidden 1 1000000000000; student_hidden 0; embedding 0; depth -1 1000000;
    strict_data 1 yes; dry_run maybe; connected 0; shards some; inputs maybe;
    precision bf fp8; learning_rate fast nan inf 1e999 -0.1 -1e-3 -.5;
    student-learning-rate -1e-3; weight_decay nan; warmup 1 -.5; dropout 1.0;
    label_smoothing 1.5; grad_weight -1; delay -1; deadline 0; mailbox 0;
    share 0 1.1; recent 0; latency -1; jitter nan; loss_rate 1.1;
    slow_mach -2; slow_factor 0.5; neighbours -1; checkpoint_every 0 1.5;
    resume yes; patience -1; wire_precision fp8""".split(';'))
FREE = 'data', 'device', 'checkpoint', 'hosts', 'log_folder'
REFUSED = [  # otherwise; and what the one line says
    ('--lerning_rate 1', 'unknown: --lerning_rate; the closest is --learning_'),
    ('--lerning-rate=1', 'the closest is --learning_rate'),
    ('--step 3', 'unknown: --step; the closest is --steps'),  # no abbreviation
    ('--xyzzy', 'unknown: --xyzzy; the closest is --'),
    ('--steps 3 xyzzy', 'unknown: xyzzy'),
    ('--steps', '--steps'),
    ('--steps --seed', '--steps'),
    ('--steps=', "--steps: must be int, 1 to 1000000000, not ''"),
    ('--device cuda:9', '--device must be cpu'),
    ('--device gpu', '--device must be cpu'),
    ('--device=', '--device must be cpu'),
    ('--neighbours 3 --k 3', '--neighbours'),
    ('--slow_mach 3 --k 3', '--slow_mach'),
    ('--resume True', '--resume needs the folder --checkpoint'),
    ('--hosts a,b', '--hosts needs a secret'),
    ('--batch_size 1001', 'batch_size 1001'),
    ('--k 2 --shards disjoint --batch_size 501', 'batch_size 501'),
    ('--shards disjoint --k 101', '101 disjoint shards'),
]


def check_refused(run_here, experiment, words, *messages):
    """Exit status 2 and one line on stderr that says all of this."""
    code, out, err = conftest.within(LONG, lambda: run_here(experiment, *words))
    assert (code, out) == (2, '')
    assert err.startswith(f'{experiment}: ')
    assert err.count('\n') == 1 and err.endswith('\n')
    assert all(str(message) in err for message in messages), err


@every_experiment
def test_every_hyperparameter_has_its_limits(run_here, experiment):
    for name, field in hyperparameters(experiment).items():
        flag = name if name in BAD_VALUES else name.replace('_', '-')
        assert flag in BAD_VALUES or name in FREE
        for value in BAD_VALUES.get(flag, '').split():
            for words in ([f'--{flag}', value], [f'--{flag}={value}']):
                check_refused(run_here, experiment, words, f'--{name}',
                              f'must be {field.type.__name__}, ',
                              f'not {value!r}')


@pytest.mark.parametrize('words, message', REFUSED)
@every_experiment
def test_refused_in_one_line(run_here, experiment, words, message):
    needed = {'--neighbours', '--slow_mach', '--shards', '--hosts'}
    needed &= set(words.split())
    if needed <= {f'--{name}' for name in hyperparameters(experiment)}:
        check_refused(run_here, experiment, words.split(), message)


def test_refused_in_a_process_of_its_own(tmp_path):
    (tmp_path / 'file').touch()
    for experiment, words in (('synchronous_single',
                               ['--learning-rate',
                                '-1e-3']), ('asynchronous_kgraph',
                                            ['--data', tmp_path / 'file'])):
        code, out, err = ended(experiment, tmp_path, *words)
        assert (code, out, err.count('\n')) == (2, '', 1)
        assert err.startswith(f'{experiment}: ')


@every_experiment
def test_refused_data(run_here, monkeypatch, tmp_path, experiment):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(urllib.request, '_opener', None)  # it knows no proxies
    (tmp_path / 'file').touch()
    for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        check_refused(run_here, experiment, [f'--data={path}'], path)
    check_refused(run_here, experiment,
                  ['--strict_data=True', f'--data={tmp_path}'],
                  'MNIST cannot be had')


@pytest.mark.parametrize('name, default', [('seed', -3), ('seed', 2.5),
                                           ('weight_decay', 'fast'),
                                           ('warmup', 1), ('strict_data', 0),
                                           ('device', 'gpu')])
@every_experiment
def test_an_edited_default_is_checked(run_here, monkeypatch, experiment, name,
                                      default):
    monkeypatch.setattr(hyperparameters(experiment)[name], 'default', default)
    check_refused(run_here, experiment, [], f'--{name}', 'must be ')


@every_experiment
def test_help_names_every_hyperparameter(capsys, experiment):
    with pytest.raises(SystemExit) as stopped:
        conftest.load_main(experiment).main(['--help'])
    out, err = capsys.readouterr()
    assert (stopped.value.code, err) == (0, '')
    for name, field in hyperparameters(experiment).items():
        assert f'--{name}' in out and field.metadata['reason'].split()[0] in out
    assert f'python {experiment}/main.py' in out


# ----------------------------------------------------------- a MACH that fails


def raise_error():
    """A batch that cannot be had."""
    raise RuntimeError('the dog ate it')


def make_nan():
    """A batch from which nothing can be learned."""
    return torch.full((16, 784), torch.nan), torch.zeros(16).long()


SPOILT = [(raise_error, 'RuntimeError: the dog ate it'),
          (make_nan, 'FloatingPointError: the target loss')]


@pytest.mark.parametrize('spoil, said', SPOILT)
@pytest.mark.parametrize('inputs', ['synthetic', 'real'])
@asynchronous
def test_others_go_on_when_one_mach_fails(run_here, at_batch, capsys,
                                          experiment, inputs, spoil, said):
    at_batch(experiment, lambda mach, n, _: spoil()
             if (mach, n) == (1, 3) else None)
    code, log, err = run_here(experiment, '--k=3', f'--inputs={inputs}',
                              '--deadline=0.1', '--evaluate_every=2')
    assert code == 1
    assert err.startswith(f'{experiment}: mach 1 failed in step 3: Traceback')
    assert said in err and err.count('Traceback') == 1
    assert [f['mach'] for f in log.finals] == [0, 1, 2, 'mean']
    assert [f['steps'] for f in log.finals] == [6, 2, 6, 5]
    # No result is flattered by who is missing.
    for key in ('real', 'synthetic'):
        nan = [math.isnan(final[key]) for final in log.finals]
        assert nan == [False, True, False, True]
    assert experiment not in metrics.compare([log])
    assert 'a MACH failed, left out' in capsys.readouterr().err


@asynchronous
def test_eval_lines_go_on_when_one_mach_fails(run_here, at_batch, experiment):

    def fail_late(mach, n, trainers):
        if (mach, n) == (1, 3):
            others_have_ended(mach, trainers)
            time.sleep(0.3)  # until their copies are handed over
            raise_error()

    at_batch(experiment, fail_late)
    code, log, _ = run_here(experiment, '--k=3', '--evaluate_every=2')
    last = log.evals[-1]  # of those that go on
    assert (code, last['step']) == (1, 6) and math.isnan(last['real'])


@pytest.mark.parametrize('spoil, said', SPOILT)
@synchronous
def test_one_mach_fails_in_lockstep(run_here, at_batch, experiment, spoil,
                                    said):
    at_batch(experiment, lambda _, n, __: spoil() if n == 5 else None)
    code, log, err = run_here(experiment)
    assert code == 1
    assert err.startswith(f'{experiment}: training failed in step 5: Traceback')
    assert said in err and err.count('Traceback') == 1
    assert log.mean and len(log.finals) > 1
    for final in log.finals:
        assert final['steps'] == 4
        assert math.isnan(final['real']) and math.isnan(final['synthetic'])


@every_experiment
def test_learning_rate_beyond_reason(run_here, experiment):
    code, log, err = run_here(experiment, '--learning_rate=1e6', '--steps=40',
                              '--student_learning_rate=1e6', '--warmup=0.001')
    lost = [f['mach'] for f in log.finals if math.isnan(f['real'])]
    assert code == bool(lost) and bool(err) == bool(lost)
    assert log.mean and (not lost or lost[-1] == 'mean')


# --------------------------------------------------------------------- Ctrl-C


def interrupt(tmp_path, experiment, *words, times=1, moment='\nstep', wait=0.0):
    """Presses Ctrl-C once stdout says it is the moment.

    Args:
        times: how often.
        wait: seconds more.
    Returns:
        Its Log, after the checks that hold always.
    """
    words = ['--steps=1000000', '--log_every=10', '--hidden=64', *words]
    with running(experiment, tmp_path, *words) as process:
        assert wait_until(lambda: moment in process.said('stdout'))
        time.sleep(wait)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        code, out, err = process.end()
    assert code == 130
    assert 'Traceback' not in err and 'terminate called' not in err
    log = metrics.parse_log(out)
    machs = range(log.hparams.get('k', 1))
    assert [f['mach'] for f in log.finals] == [*machs, 'mean']
    assert max(f['steps'] for f in log.finals) < 1000000
    return log


def test_ctrl_c_in_training(tmp_path):
    logs = two_at_a_time(
        lambda case: interrupt(tmp_path, case[0], times=case[1]),
        zip(('synchronous_single', 'synchronous_kgraph', *ASYNCHRONOUS),
            (3, 1, 2, 3)))
    for log in logs:
        assert log.steps and max(f['steps'] for f in log.finals) >= 10


# More than two seconds a step; more MACHs than cores.
@pytest.mark.parametrize('words', [
    '--batch_size=9000 --hidden=2048',
    '--k=48 --student_hidden=8 --neighbours=4 --precision=fp32'
])
def test_ctrl_c_while_the_first_steps_last(tmp_path, words):
    words = words.split()
    interrupt(tmp_path, ASYNCHRONOUS[1], *words, moment='hparams', wait=0.5)


@every_experiment
def test_ctrl_c_in_the_final_evaluation(run_here, evaluations, experiment):
    seen = evaluations(
        experiment,
        lambda: seen[-1][1] == 200 and os.kill(os.getpid(), signal.SIGINT))
    code, log, err = run_here(experiment)
    assert (code, err) == (130, '')
    assert log.mean['steps'] == 6 and log.mean['real'] >= 0


@asynchronous
def test_ctrl_c_while_one_mach_does_not_answer(run_here, at_batch, experiment):

    def hang(mach, n, _):
        if (mach, n) == (1, 3):
            os.kill(os.getpid(), signal.SIGINT)
            run_here.release.wait(LONG)

    at_batch(experiment, hang)
    code, log, err = run_here(experiment, '--k=4', '--steps=100000')
    assert (code, err) == (130, '')
    assert [f['mach'] for f in log.finals] == [0, 1, 2, 3, 'mean']
    assert [math.isnan(f['real']) for f in log.finals
           ] == [False, True, False, False, True]


def test_ctrl_c_in_the_imports_and_after(tmp_path):

    def run(moment):
        # The interpreter says of each module that it has been imported.
        with running(EXPERIMENTS[moment % 5],
                     tmp_path,
                     '--steps=1000000',
                     prefix=['env', 'PYTHONPROFILEIMPORTTIME=1']) as process:
            # Before this line the interpreter is on its own.
            started = wait_until(
                lambda: re.search(r'\| *argparse', process.said('stderr')))
            time.sleep(moment * 0.24)
            process.send_signal(signal.SIGINT)
            code, _, err = process.end()
        said = [l for l in err.splitlines() if not l.startswith('import time')]
        return started, code, [l for l in said if 'warning' not in l]

    assert two_at_a_time(run, range(10)) == [(True, 130, [])] * 10


# -------------------------------------------------- stdout, data, other folders


@pytest.mark.parametrize('where', ['pipe', '/dev/full', 'closed'])
def test_stdout_that_fails(tmp_path, where):
    experiment = 'asynchronous_sequence'
    words = ['--steps=1000000', '--log_every=1', '--hidden=64']
    prefix = ['sh', '-c', 'exec "$@" >&-', 'sh'] if where == 'closed' else []
    with open('/dev/full', 'wb') as full:
        out = dict(pipe=subprocess.PIPE).get(where, full)
        with running(experiment, tmp_path, *words, prefix=prefix,
                     out=out) as process:
            if where == 'pipe':  # as `| head -3` does
                assert [process.stdout.readline() for _ in range(3)][2]
                process.stdout.close()
            code, _, err = process.end()
    *warnings, line = err.splitlines()
    assert code == 1 and line.startswith(f'{experiment}: ')
    assert all(warning.startswith('warning') for warning in warnings)


def test_without_mnist_digits_are_drawn(tmp_path):
    code, out, err = ended('synchronous_single', tmp_path, '--data',
                           tmp_path / 'empty', '--steps=4', '--hidden=64')
    assert code == 0
    log = metrics.parse_log(out)
    assert {f['dataset'] for f in [log.run, *log.finals]} == {'drawn-digits'}
    warning, = err.splitlines()
    assert warning.startswith('warning') and str(tmp_path) in warning


def test_a_copy_is_an_experiment_of_its_own(tmp_path):
    ignored = shutil.ignore_patterns('__pycache__')
    for old, new in (('mach', 'mach'), ('asynchronous_kgraph', 'my_idea')):
        shutil.copytree(ROOT / old, tmp_path / new, ignore=ignored)
    path = tmp_path / 'my_idea' / 'main.py'
    text, count = re.subn(r'(\n    seed: int = hparam\()0,', r'\g<1>7,',
                          path.read_text(encoding='utf-8'))
    assert count == 1
    path.write_text(text, encoding='utf-8')
    code, out, _ = ended(path.parent, tmp_path, '--steps=4', '--k=2')
    log = metrics.parse_log(out)
    assert code == 0 and log.run['commit'] == 'none'
    assert [(f['experiment'], f['seed']) for f in [log.run, *log.finals]
           ] == [('my_idea', 7)] * 4
