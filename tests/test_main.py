"""What a user of the five command lines sees: logs, results, refusals, ends.

Exit status 0; 1 if a MACH failed or stdout fails; 2 for bad hyperparameters or
data, in one line; 130 after Ctrl-C and 143 after SIGTERM, with the results so far.
"""

import math
import os
import re
import signal
import sys
import threading
import time
import weakref

import conftest
import pytest
import torch

from mach import data as mach_data
from mach import metrics

SYNCHRONOUS, ASYNCHRONOUS = conftest.SYNCHRONOUS, conftest.ASYNCHRONOUS
EXPERIMENTS = SYNCHRONOUS + ASYNCHRONOUS
SEVERAL = EXPERIMENTS[1:]  # of k MACHs
every_experiment = pytest.mark.parametrize('experiment', EXPERIMENTS)
several_machs = pytest.mark.parametrize('experiment', SEVERAL)
synchronous = pytest.mark.parametrize('experiment', SYNCHRONOUS)
asynchronous = pytest.mark.parametrize('experiment', ASYNCHRONOUS)
wait_until = conftest.wait_until
hyperparameters = conftest.hyperparameters

# ------------------------------------------------- one run of each experiment

GIVEN = dict(precision='fp32', steps=200, log_every=40, evaluate_every=80)
GIVEN |= dict(batch_size=64, hidden=128, student_hidden=128)
GIVEN |= dict(learning_rate=2e-3, student_learning_rate=3e-3)
# (synthetic, real) of every MACH after so few steps, 2 points below what is seen
# with drawn digits; MNIST is easier.
FLOORS = dict.fromkeys(SEVERAL, (89, 89)) | dict(synchronous_single=(80, 88))
RUN_KEYS = ('experiment dataset train validation test seed device precision '
            'torch torchvision numpy python commit threads processes '
            'cpu').split()
STEP_KEYS = 'step mach loss train synthetic_loss staleness rate'.split()
FINAL_KEYS = ('experiment dataset seed mach synthetic real steps rate '
              'staleness staleness_max dropped seconds lost in_flight').split()
EDGE_KEYS = 'mach child worth staleness messages lost'.split()


@every_experiment
def test_a_run_learns_and_logs(run_here, tmp_path, experiment):
    given = dict(GIVEN, data=str(conftest.DATA or tmp_path))
    if experiment in SEVERAL:
        given |= dict(k=3, grad_weight=1.0)
    if experiment in ASYNCHRONOUS:  # an eighth of a small batch is few rows
        given |= dict(share=0.25)
    words = [f'--{name}={value}' for name, value in given.items()]
    code, log, err = run_here(experiment, *words)
    assert code == 0 and 'Traceback' not in err
    check_run(experiment, log, given)
    for mach in range(log.hparams.get('k', 1)):
        first, *_, last = found = [f for f in log.steps if f['mach'] == mach]
        assert [f['step'] for f in found] == [40, 80, 120, 160, 200]
        assert list(first) == STEP_KEYS
        assert last['loss'] < 0.7 * first['loss']
        assert last['train'] > first['train'] + 15
    # The slowest MACH's multiples of evaluate_every, and its last step.
    assert [f['step'] for f in log.evals] == [80, 160, 200]
    for fields in log.evals:
        assert list(fields) == 'step mach synthetic real seconds'.split()
        assert fields['mach'] == 'mean' and fields['seconds'] > 0
    check_finals(experiment, log)
    check_edges(experiment, log)
    for key, floor in zip(('synthetic', 'real'), FLOORS[experiment]):
        assert all(floor <= final[key] < 100 for final in log.finals)
        # Validation images differ from test images, and are as difficult.
        assert log.evals[-1][key] == pytest.approx(log.mean[key], abs=4)
        assert log.evals[-1][key] != log.mean[key]


def check_run(experiment, log, given):
    """The run and all its hyperparameters are logged, in order."""
    name = 'MNIST' if conftest.DATA else 'drawn-digits'
    assert list(log.run) == RUN_KEYS
    assert [*log.run.values()
           ][:8] == [experiment, name, 55000, 5000, 10000, 0, 'cpu', 'fp32']
    assert log.run['torch'] == torch.__version__
    assert re.fullmatch('none|[0-9a-f]{7}(-dirty)?', log.run['commit'])
    fields = hyperparameters(experiment)
    defaults = {name: field.default for name, field in fields.items()}
    expected = {n: '-' if v == '' else v for n, v in (defaults | given).items()}
    assert list(log.hparams.items()) == list(expected.items())


def check_finals(experiment, log):
    """Every MACH and the mean have a final line, with what was counted."""
    *machs, last = range(log.hparams.get('k', 1))
    assert [f['mach'] for f in log.finals] == [*machs, last, 'mean']
    for final in log.finals:
        assert list(final) == FINAL_KEYS
        assert final['experiment'] == experiment
        assert final['dataset'] == log.run['dataset']
        assert (final['seed'], final['steps'], final['lost']) == (0, 200, 0)
        if experiment.endswith('sequence') and final['mach'] == last:
            assert math.isnan(final['staleness'])  # it has no parent
        elif experiment in ASYNCHRONOUS:
            assert 0 < final['staleness'] <= final['staleness_max']
        else:
            assert final['staleness'] == final['staleness_max'] == 1
            assert final['dropped'] == 0


def check_edges(experiment, log):
    """Every MACH has a shard line, every edge has a line, in order."""
    assert [f['mach'] for f in log.shards] == [*range(len(log.finals) - 1)]
    for fields in log.shards:
        counts = list(map(int, fields['classes'].split(',')))
        assert len(counts) == 10 and sum(counts) == fields['images']
    whole = log.hparams.get('shards', 'full') == 'full'
    images = [f['images'] for f in log.shards]
    assert set(images) == {55000} if whole else sum(images) == 55000
    ways = []
    if experiment in SEVERAL:
        main = conftest.load_main(experiment)
        settings = main.Hyperparameters(k=log.hparams['k'])
        for i, children in enumerate(main.children_of(settings)):
            ways += [(i, child) for child in children]
    assert [(f['mach'], f['child']) for f in log.edges] == ways
    for edge in log.edges:
        assert list(edge) == EDGE_KEYS
        late = [
            f['staleness_max'] for f in log.finals if f['mach'] == edge['child']
        ]
        assert 0 < edge['staleness'] <= late[0]
        assert 150 < edge['messages'] and edge['lost'] == 0
    if ways:
        assert max(abs(edge['worth']) for edge in log.edges) > 0.1


# ------------------------------------------------------- threads, evaluations


def without_time(log):
    """The lines of results without durations; as text, where nan equals nan."""
    lines = [dict(f) for f in log.steps + log.evals + log.finals]
    return [str(f | dict(rate=0, seconds=0)) for f in lines]


@synchronous
def test_same_seed_same_log_on_any_cores_at_any_speed_of_evaluation(
        run_here, before, monkeypatch, experiment):
    found, pause, threads = [], [0], set()
    before(experiment, 'evaluate', lambda *_: time.sleep(pause[0]))
    before(experiment, 'step', lambda *_: threads.add(torch.get_num_threads()))
    for pause[0], seed, cores in ((0, 7, 1), (0.03, 7, 3), (0, 8, 1)):
        monkeypatch.setattr(conftest.load_main(experiment), 'CORES', cores)
        code, log, _ = run_here(experiment, f'--seed={seed}', '--steps=12',
                                '--evaluate_every=1')
        assert code == 0 and [f['step'] for f in log.evals] == [*range(1, 13)]
        found.append(without_time(log))
    assert found[0] == found[1] != found[2]
    assert threads == {1}  # several for one product depend on idle cores


@pytest.mark.parametrize('experiment',
                         ['synchronous_sequence', 'synchronous_kgraph'])
def test_lockstep_computes_on_several_threads(run_here, before, monkeypatch,
                                              experiment):
    both = threading.Barrier(2)
    before(experiment, '_learn', lambda *_: both.wait(conftest.LONG))
    monkeypatch.setattr(conftest.load_main(experiment), 'CORES', 2)
    assert run_here(experiment, '--k=2')[0] == 0


def test_a_student_learns_beside_its_teacher(run_here, before, monkeypatch):
    """Its lesson and the teacher's backward wait for each other."""
    both, single = threading.Barrier(2), EXPERIMENTS[0]

    def grad(*args, then=metrics.Tally.grad):
        both.wait(conftest.LONG)
        then(*args)

    monkeypatch.setattr(metrics.Tally, 'grad', grad)
    before(single, '_teach_student', lambda *_: both.wait(conftest.LONG))
    assert run_here(single, '--delay=0')[0] == 0


@every_experiment
def test_training_goes_on_during_an_evaluation(run_here, before, experiment):
    trainers, seen = weakref.WeakSet(), []

    def evaluate(snapshots, _, images, *__):
        slowest = min(one.tally.steps for one in snapshots.values())
        seen.append((slowest, len(images)))
        assert wait_until(lambda: {t.steps_taken for t in trainers} == {120})

    before(experiment, 'step', lambda one, *_: trainers.add(one))
    before(experiment, 'evaluate', evaluate)
    code, log, _ = run_here(experiment, '--steps=120', '--log_every=120',
                            '--evaluate_every=30')
    assert code == 0 and [f['step'] for f in log.evals] == [30, 60, 90, 120]
    # Only the last evaluation is on the test set.
    assert seen[:-1] == [(30, 100), (60, 100), (90, 100), (120, 100)]
    assert seen[-1][1] == 200


def hold(before, experiment, number):
    """Holds MACH 1 before a step until MACHs 0 and 2 have finished."""
    serving = set()  # a MACH that serves has handed over its last Snapshot

    def wait(one, *_):
        if (one.index, one.steps_taken) == (1, number - 1):
            assert wait_until(lambda: serving >= {0, 2})

    before(experiment, 'serve', lambda one, *_: serving.add(one.index))
    before(experiment, 'step', wait)


@asynchronous
def test_a_straggler_holds_nobody_up(run_here, before, experiment):
    seen = []
    hold(before, experiment, 1)
    before(experiment, 'evaluate',
           lambda snapshots, *_: seen.append({**snapshots}))
    code, log, _ = run_here(experiment, '--k=3', '--evaluate_every=2')
    assert code == 0 and [f['step'] for f in log.evals] == [2, 4, 6]
    assert [seen[0][mach].tally.steps for mach in range(3)] == [6, 2, 6]


@pytest.mark.parametrize('depth', [0, 1, 2, 3])
@several_machs
def test_evaluation_is_a_composition_of_the_networks(experiment, dataset,
                                                     depth):
    main, images = conftest.load_main(experiment), dataset.train_images
    settings = main.Hyperparameters(k=4, depth=depth, hidden=8, embedding=6)
    children, snapshots = main.children_of(settings), {}
    snapshot = conftest.load(experiment).trainer.Snapshot
    for i, (_, network, student) in enumerate(main.make_networks(settings)):
        for parameter in network.parameters():
            parameter.data.normal_()  # so that MACHs disagree
        snapshots[i] = snapshot(metrics.Tally(i), network, student)
    snapshots[0], worths = snapshot(metrics.Tally(0), failed=True), []

    @torch.no_grad()
    def embed(i, x, depth, inputs=False):
        one, asked = snapshots[i], inputs
        inputs = one.student(x) if one.student else None
        for position, child in enumerate(children[i]):
            if depth > 0 and child != 0:
                d = embed(child, x, depth - 1)
                inputs[:, position] = snapshots[child].network.answer(d)
        return inputs if asked else one.network(x, inputs)

    for i in (1, 2, 3):
        for key, edges in (('synthetic', 0), ('real', depth)):
            d = embed(i, mach_data.normalise(images), edges)
            labels = snapshots[i].network.head(d).argmax(1)
            found = main.evaluate(snapshots, settings, images, labels, True)
            assert found[i][key] > 99.5
            assert math.isnan(found[0][key])
        # Labels are those of the last composition, which is `real`.
        for position, child in enumerate(children[i]):
            if child == 0:  # it has failed
                assert math.isnan(found[i]['worth'][0])
                continue
            inputs = embed(i, mach_data.normalise(images), depth, inputs=True)
            inputs[:, position] = 0
            with torch.no_grad():
                d = snapshots[i].network(mach_data.normalise(images), inputs)
                wrong = snapshots[i].network.head(d).argmax(1) != labels
            assert found[i]['worth'][child] == pytest.approx(
                100 * wrong.double().mean(), abs=0.5)
            worths.append(found[i]['worth'][child])
        assert main.evaluate(snapshots, settings, images,
                             labels)[i]['worth'] == {}
    assert max(worths) > 0.1


def test_evaluation_of_a_teacher_and_its_student(dataset):
    main = conftest.load_main('synchronous_single')
    settings = main.Hyperparameters(hidden=8, embedding=6, student_hidden=8)
    trainer, images = main.make_trainer(settings, dataset), dataset.train_images
    network, x = trainer.network, mach_data.normalise(images)
    for parameter in network.parameters():
        parameter.data.normal_()  # so that both disagree
    answers = dict(real=network(x), synthetic=trainer.student(x)[:, 0])
    for key, d in answers.items():
        labels = network.head(d).argmax(1)
        found, = main.evaluate(trainer.snapshot(), settings, images, labels)
        assert found[key] > 99.5 and found['real'] != found['synthetic']


# ------------------------------------------------------------- other settings


@every_experiment
def test_other_settings(run_here, experiment):
    for words in '--steps=9 --precision=bf16', '--steps=1':
        code, log, _ = run_here(experiment, *words.split())
        assert code == 0 and log.evals
        assert {f['steps'] for f in log.finals} == {log.hparams['steps']}
        assert log.run['precision'] == log.hparams['precision']
    code, log, _ = run_here(experiment, '--dry_run=True')
    assert code == 0 and log.run and log.shards and log.hparams['dry_run']
    assert not log.steps + log.evals + log.finals
    words = ['--edges=False'] * (experiment in SEVERAL)
    _, log, _ = run_here(experiment, '--evaluate_every=0', *words)
    assert log.steps and not log.evals + log.edges and log.mean['real'] >= 0


@several_machs
def test_central_isolated_and_real_inputs(run_here, monkeypatch, experiment):
    for words in '--k=1', '--k=2 --connected=False':
        code, log, _ = run_here(experiment, *words.split(), '--inputs=real')
        assert code == 0 and len(log.finals) == log.hparams['k'] + 1
        for final in log.finals:  # without children, both are the same
            assert final['synthetic'] == final['real']
            assert (final['staleness_max'], final['dropped']) == (0, 0)
        assert all(math.isnan(f['synthetic_loss']) for f in log.steps)
    words = ['--k=4', '--depth=2', '--inputs=real']
    if experiment in ASYNCHRONOUS:
        words.append('--deadline=1e6')  # so it ends only if all answers come
        # A MACH that waits for answers takes no turn.
        monkeypatch.setattr(conftest.load_main(experiment), 'TURNS', None)
    code, log, _ = run_here(experiment, *words)
    assert code == 0 and [f['steps'] for f in log.finals] == [6] * 5
    assert any(f['synthetic_loss'] > 0 for f in log.steps)


@asynchronous
def test_conditions(run_here, before, experiment):
    for words in '--loss_rate=1', '--latency=1e6', '--jitter=1e6':
        code, log, _ = run_here(experiment, '--k=3', words)
        assert code == 0 and [f['steps'] for f in log.finals] == [6] * 4
        assert math.isnan(log.mean['staleness'])  # no Grad has arrived
        assert all(math.isnan(f['synthetic_loss']) for f in log.steps)
        assert (log.mean['lost'] > 0) == (words == '--loss_rate=1')
    before(experiment, 'step', lambda *_: time.sleep(0.01))
    code, log, _ = run_here(experiment, '--k=3', '--slow_mach=1',
                            '--slow_factor=12', '--loss_rate=.2')
    assert code == 0 and log.mean['lost'] > 0
    assert log.finals[1]['seconds'] >= 0.6  # 5 of its 6 steps last 0.12 s


@several_machs
def test_children_of(experiment):
    main = conftest.load_main(experiment)

    def children(**names):
        return main.children_of(main.Hyperparameters(**names))

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
def test_the_seed_draws_the_networks_but_heads_are_alike(experiment):
    main, drawn = conftest.load_main(experiment), []
    for seed in (1, 1, 2):
        made = main.make_networks(main.Hyperparameters(k=3, seed=seed))
        assert len({str(one.head.state_dict()) for _, one, _ in made}) == 1
        drawn.append([str(one.local.state_dict()) for _, one, _ in made])
    assert drawn[0] == drawn[1] and len({*drawn[0], *drawn[2]}) == 6


# -------------------------------------------------------------- refused input

# What each hyperparameter may not be.
BAD_VALUES = dict(line.strip().split(maxsplit=1) for line in """
    steps many 2.5 1e3 0 1000000001 nan True; seed -1; batch_size 0 60001;
    log_every 0; evaluate_every -5; validation 9 50001; k 0 -3 three 1001;
    hidden 1 1000000000000; student_hidden 0; embedding 0; depth -1 1000000;
    dry_run maybe; edges 1; skew 0 nan; prior -0.5; alone 1.5;
    any_rows_every -1 2.5; grad_depth -1; connected 0; shards some; inputs no;
    precision bf fp8;
    learning_rate fast nan inf 1e999 -0.1 -1e-3 -.5; weight_decay nan;
    student_learning_rate -1e-3; warmup 1 -.5; dropout 1.0; label_smoothing 1.5;
    grad_weight -1; delay -1; deadline 0; share 0 1.1; latency -1; jitter nan;
    loss_rate 1.1; slow_mach -2; slow_factor 0.5; neighbours -1; resume yes;
    checkpoint_every 0 1.5; device gpu cuda:99""".split(';'))
ANY_TEXT = {'data', 'checkpoint', 'hosts', 'log_folder', 'tensorboard'}
REFUSED = [  # otherwise; and what the one line says
    ('--mailbox 64', 'no option --mailbox; --help'),
    ('--strict_data True', 'no option --strict_data; --help'),
    ('--lerning-rate=1', 'the closest is --learning_rate'),
    ('--lr=1', 'the closest is --learning_rate'),
    ('--gpu 0', 'the closest is --device'),
    ('--step 3', 'no option --step; the closest is --steps'),  # no abbreviation
    ('--seed 0 1 2', '1 belongs to no option: each one takes one value'),
    ('--steps', '--steps'),
    ('--steps=', "--steps: must be int, 1 to 1000000000, not ''"),
    ('--neighbours 3 --k 3', '--neighbours'),
    ('--slow_mach 3 --k 3', '--slow_mach'),
    ('--resume True', '--resume needs the folder --checkpoint'),
    ('--dry_run=True --batch_size=1001', 'batch_size 1001'),
    ('--k 2 --shards disjoint --batch_size 501', 'batch_size 501'),
]


def check_refused(run_here, experiment, words, *messages):
    """Exit status 2 and one line on stderr that says all of this."""
    code, out, err = run_here(experiment, *words)
    assert (code, out) == (2, ''), words
    assert err.startswith(f'{experiment}: ')
    assert err.count('\n') == 1 and err.endswith('\n')
    assert all(str(message) in err for message in messages), err


@every_experiment
def test_every_hyperparameter_has_its_limits(run_here, monkeypatch, experiment):
    make = conftest.load_main(experiment).Hyperparameters
    fields = hyperparameters(experiment)
    assert not fields.keys() - BAD_VALUES.keys() - ANY_TEXT
    for name in fields.keys() & BAD_VALUES.keys():
        said = f'--{name}: must be {fields[name].type.__name__}, '
        flag = '--' + name.replace('_', '-')
        for value in BAD_VALUES[name].split():
            if name != 'device':  # only torch knows which there are
                with pytest.raises(ValueError, match=said):
                    make(**{name: value})
            check_refused(run_here, experiment, [flag, value], said,
                          f'not {value!r}')
    # An edited default is checked, too, and so is the type of a new field.
    monkeypatch.setattr(fields['seed'], 'default', -3)
    check_refused(run_here, experiment, [], '--seed: must be int')
    monkeypatch.setattr(fields['seed'], 'type', int | None)
    check_refused(run_here, experiment, [], '--seed: cannot be a int | None')


@every_experiment
def test_refused_in_one_line(run_here, tmp_path, experiment):
    names = {f'--{name}' for name in hyperparameters(experiment)}
    for words, message in REFUSED:
        needed = {'--neighbours', '--slow_mach', '--shards'} & {*words.split()}
        if needed <= names:
            check_refused(run_here, experiment, words.split(), message)
    (tmp_path / 'file').touch()
    for name in names & {f'--{name}' for name in ANY_TEXT - {'hosts'}}:
        for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
            check_refused(run_here, experiment,
                          [f'{name}={path}', '--dry_run=True'], path)


@synchronous
def test_torchrun_is_refused_where_there_is_one_process(run_here, monkeypatch,
                                                        experiment):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    check_refused(run_here, experiment, [], 'without torchrun')


# ----------------------------------------------------------- a MACH that fails


def give_nan(trainer):
    """Its next batch is nan."""
    batches = iter([(torch.full((16, 784), torch.nan), torch.zeros(16).long())])
    together = isinstance(trainer.batches, list)
    trainer.batches = [batches] if together else batches


@pytest.mark.parametrize('inputs', ['synthetic', 'real'])
@asynchronous
def test_other_machs_finish_when_one_fails(run_here, before, experiment,
                                           inputs):

    def step(one, *_):
        if (one.index, one.steps_taken) == (1, 2):
            give_nan(one)

    before(experiment, 'step', step)
    if inputs == 'synthetic':  # no MACH waits for MACH 1
        hold(before, experiment, 3)
    code, log, err = run_here(experiment, '--k=3', f'--inputs={inputs}',
                              '--deadline=0.1', '--evaluate_every=2')
    assert code == 1 and err.count('Traceback') == 1
    assert err.startswith(f'{experiment}: mach 1 failed in step 3: Traceback')
    assert 'FloatingPointError: the target loss' in err
    assert [f['mach'] for f in log.finals] == [0, 1, 2, 'mean']
    assert [f['steps'] for f in log.finals] == [6, 2, 6, 5]
    for key in ('real', 'synthetic'):
        nan = [math.isnan(final[key]) for final in log.finals]
        assert nan == [False, True, False, True]
    # Evaluation goes on without MACH 1.
    assert log.evals[-1]['step'] == 6 and math.isnan(log.evals[-1]['real'])


@synchronous
def test_a_failure_in_lockstep_is_named(run_here, before, experiment):

    def step(trainer):
        if trainer.steps_taken == 4:
            give_nan(trainer)

    before(experiment, 'step', step)
    code, log, err = run_here(experiment)
    assert code == 1 and err.count('Traceback') == 1
    assert err.startswith(f'{experiment}: training failed in step 5: Traceback')
    assert 'FloatingPointError: the target loss' in err
    assert len(log.finals) == log.hparams.get('k', 1) + 1
    for final in log.finals:
        assert final['steps'] == 4
        assert math.isnan(final['real']) and math.isnan(final['synthetic'])


# -------------------------------------------------------------------- signals


@pytest.mark.parametrize('kind, count, number', [
    ('steps', 3, signal.SIGTERM),
    ('images', 100, signal.SIGINT),
    ('steps', 4, signal.SIGHUP),
    ('images', 200, signal.SIGTERM),
])
@every_experiment
def test_a_signal_ends_with_the_results_so_far(run_here, before, experiment,
                                               kind, count, number):
    """In a step, in an evaluation of 100 images, in the final one of 200."""
    sent = []

    def send(*now):
        if now == (kind, count) and not sent:
            sent.append(os.kill(os.getpid(), number))

    before(experiment, 'step', lambda one, *_: send('steps', one.steps_taken))
    before(experiment, 'evaluate', lambda *args: send('images', len(args[2])))
    steps = 6 if count == 200 else 1000
    code, log, err = run_here(experiment, f'--steps={steps}',
                              '--evaluate_every=3')
    assert (code, err) == (128 + number, '')
    assert 0 < log.mean['steps'] < steps + (count == 200)
    assert log.mean['real'] >= 0
    assert len(log.finals) == log.hparams.get('k', 1) + 1


@asynchronous
def test_a_signal_while_a_mach_hangs(run_here, before, experiment):

    def hang(one, *_):
        if (one.index, one.steps_taken) == (1, 2):
            os.kill(os.getpid(), signal.SIGINT)
            assert wait_until(lambda: 'mach mean' in sys.stdout.getvalue())

    before(experiment, 'step', hang)
    code, log, err = run_here(experiment, '--k=4', '--steps=3000')
    assert (code, err) == (130, '') and log.mean['steps'] < 3000
    nan = [math.isnan(final['real']) for final in log.finals]
    assert nan == [False, True, False, False, True]


@every_experiment
def test_a_library_has_no_main_thread_and_no_auto(experiment, monkeypatch,
                                                  dataset):
    main = conftest.load_main(experiment)
    assert main.Hyperparameters().precision in ('fp32', 'bf16')
    folder = main.Hyperparameters(checkpoint='~/x').checkpoint
    assert folder == os.path.expanduser('~/x') != '~/x'
    monkeypatch.setattr(mach_data, 'load', lambda *_: dataset)
    assert conftest.within(conftest.LONG, lambda: main.main(conftest.TINY)) == 0


@asynchronous
def test_logs_of_an_earlier_run_stay(run_here, tmp_path, experiment):
    (tmp_path / 'process0.txt').write_text('old')
    words = [f'--log_folder={tmp_path}']
    assert run_here(experiment, *words, '--dry_run=True')[0] == 0
    check_refused(run_here, experiment, words, 'File exists')
    assert (tmp_path / 'process0.txt').read_text() == 'old'


@every_experiment
def test_other_machs_finish_when_a_thread_cannot_start(run_here, monkeypatch,
                                                       experiment):

    def start(thread, then=threading.Thread.start):
        if thread._args and getattr(thread._args[0], 'index', 1) == 1:
            raise RuntimeError("can't start new thread")
        then(thread)

    monkeypatch.setattr(threading.Thread, 'start', start)
    code, log, err = run_here(experiment)
    lockstep = experiment in SYNCHRONOUS
    who = 'training' if lockstep else 'mach 1'
    assert err == f"{experiment}: {who} failed: can't start new thread\n"
    nan = [f['mach'] for f in log.finals if math.isnan(f['real'])]
    assert code == 1 and nan == [
        f['mach'] for f in log.finals if lockstep or f['mach'] in (1, 'mean')
    ]
