"""What a MACH counts, the log's grammar, the mean over MACHs, the table."""

import copy
import dataclasses
import io
import math
import re
import statistics
import subprocess
import sys
import types

import pytest
import torch

from mach import metrics

NAN = math.nan


@pytest.mark.filterwarnings('error')
def test_tally_counts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
    tally = metrics.Tally(2)
    assert tally.rate == 0.0 and math.isnan(tally.staleness)
    now[0] += 50  # making the networks is no training
    tally.begin()
    logits, y = torch.eye(10)[[1, 2, 3, 4]], torch.tensor([1, 2, 3, 0])
    for loss in torch.tensor(1.0, requires_grad=True), 2.0:
        now[0] += 2
        tally.step(loss, logits, y)
    tally.step(0.0, logits[:2], y[:2])  # images count, not batches
    now[0] += 9  # after the last step
    for staleness in 4, 1:
        tally.grad(staleness)
    tally.lesson(torch.tensor(3.0))
    tally.lesson(5.0)
    tally.dropped += 7
    before = copy.copy(tally)
    window = dict(step=3, mach=2, loss=1.0, train=80.0, synthetic_loss=4.0)
    assert tally.report() == window | dict(staleness=2.5, rate=0.75)
    report = tally.report()  # a new window
    assert list(report) == list(window) + ['staleness', 'rate']
    assert all(math.isnan(report[key]) for key in list(window)[2:])
    assert [report[key] for key in ('step', 'staleness', 'rate')
           ] == [3, 2.5, 0.75]
    tally.grad(9)
    tally.begin()  # resumed: it goes on from the last step, at 4 s
    now[0] += 3
    tally.step(8.0, logits, y)
    assert tally.seconds == 7.0
    assert tally.report()['loss'] == 8.0
    assert tally.report()['staleness'] == pytest.approx(14 / 3)
    totals = before.totals()  # a snapshot, untouched by what came after
    assert list(totals.items()) == [('steps', 3), ('rate', 0.75),
                                    ('staleness', 2.5), ('staleness_max', 4),
                                    ('dropped', 7), ('seconds', 4.0),
                                    ('lost', 0)]


SPOKEN = dict(step=400, mach=2, loss=.21312, train=97.4088, synthetic_loss=NAN)
EVAL = dict(step=1000, mach='mean', real=96.0, seconds=9.06)
FINAL = dict(real=100.0, rate=41.17, staleness=1.0, steps=2999.8, dropped=0)
# The same names are no measurement here: nothing may be rounded away.
HPARAMS = dict(rate=.0012, loss='mse', on=True, data='a b', steps=3000)


@pytest.mark.parametrize('fields, line', [
    (SPOKEN, 'step  400  mach 2  loss 0.2131  train 97.41  synthetic_loss nan'),
    (EVAL, 'eval  step 1000  mach mean  real 96.00  seconds 9.1'),
    (FINAL, 'final  real 100.00  rate 41.2  staleness 1.00  steps 3000  '
     'dropped 0'),
    (HPARAMS, 'hparams  rate 0.0012  loss mse  on True  data a b  steps 3000'),
    (dict(test=10, commit='12e4567'), 'run  test 10  commit 12e4567'),
    (dict(commit='1234567'), 'run  commit 1234567'),
    ({}, 'hparams'),
])
def test_format_is_the_documented_one(fields, line):
    kind = line.split()[0]
    assert metrics.format_line(kind, **fields) == line
    parsed_kind, parsed = metrics.parse_line(line + '\n')
    assert (parsed_kind, list(parsed)) == (kind, list(fields))
    for key, value in fields.items():
        if not isinstance(value, str):
            value = pytest.approx(value, rel=.01, nan_ok=True)
        assert parsed[key] == value


@pytest.mark.parametrize('value, read', [
    ('', '-'),
    (' a  b ', 'a b'),
    ('a\nb\r\tc\x0b\x85\u2028d', 'a b c d'),
    ('100%', '100%'),
    (None, 'None'),
    ('日本', '日本'),
    (False, False),
    (-7, -7),
    (1 / 3, 1 / 3),
    (1e-300, 1e-300),
    (-math.inf, -math.inf),
])
def test_awkward_values_do_not_break_the_line(value, read):
    line = metrics.format_line('hparams', first=value, last=5)
    assert line.splitlines() == [line] and line == line.strip()
    assert metrics.parse_line(line) == ('hparams', dict(first=read, last=5))


@pytest.mark.parametrize('line', [
    '', 'hello', 'Epoch 1: loss 0.3', 'final real 97', 'final  real',
    'final  real  97', 'final  real 97 ', 'final   real 97', ' final  real 97',
    'final  97', 'step  4a  mach 1', 'step  mach 1  400', 'finals  real 97',
    'run  a-b 5', 'final\treal 97', '{"real": 97}', 'final  real good'
])
def test_garbage_is_refused_by_name(line):
    with pytest.raises(ValueError) as caught:
        metrics.parse_line(line)
    assert repr(line) in str(caught.value) and '\n' not in str(caught.value)


def test_no_line_is_made_that_could_not_be_read():
    with pytest.raises(ValueError):
        metrics.format_line('stop', a=1)


RUN = 'run  experiment x  dataset MNIST  seed 0'
LINES = [
    RUN, 'hparams  k 5', 'step  5  mach 0  loss 2.0', 'step  5  mach 1',
    'eval  step 5  mach mean  real 90.00', 'final  mach 0  real 91.00',
    'final  mach mean  real 92.00'
]


def test_a_log_is_read_whole_and_a_cut_one_as_far_as_it_is(tmp_path):
    path = tmp_path / 'a b.txt'
    path.write_text('\n'.join(LINES) + '\n')
    for log in metrics.read_log(path), metrics.parse_log('\n'.join(LINES)):
        assert log.run == dict(experiment='x', dataset='MNIST', seed=0)
        assert log.hparams == dict(k=5)
        assert [step['mach'] for step in log.steps] == [0, 1]
        assert log.evals == [dict(step=5, mach='mean', real=90.0)]
        assert len(log.finals) == 2 and log.mean['real'] == 92
    assert metrics.read_log(path).name == str(path)
    path.write_text('\n'.join(LINES)[:-3])  # `real 92.00` became `real 92`
    log = metrics.read_log(path)
    assert log.mean is None and len(log.finals) == 1


@pytest.mark.parametrize('lines, number', [
    ([], 1),
    (['hello'], 1),
    (LINES[1:], 1),
    (LINES + LINES, 8),
    (LINES + ['Traceback (most recent call last):'], 8),
    ([RUN, '', 'final  real'], 3),
    (['run  experiment x'], 1),
    (['weights\x00\x01'], 1),
])
def test_what_is_no_log_is_refused_with_its_place(tmp_path, lines, number):
    path = tmp_path / 'bad.txt'
    path.write_text(''.join(line + '\n' for line in lines))
    with pytest.raises(ValueError) as caught:
        metrics.read_log(path)
    message = str(caught.value)
    assert message.startswith(f'{path}:{number}: ') and '\n' not in message


@dataclasses.dataclass
class Settings:
    """As an experiment's hyperparameters."""
    seed: int = 3
    device: str = 'cpu'
    precision: str = 'bf16'


DATASET = types.SimpleNamespace(name='MNIST',
                                train_labels=[0] * 5,
                                validation_labels=[0] * 2,
                                test_labels=[0] * 4)


def test_what_is_said_is_a_log(capsys, monkeypatch):
    metrics.say_run('x', DATASET, Settings())
    metrics.say('step', step=4, mach=0, loss=.5)
    finals = [final(mach) for mach in range(3)]
    metrics.say_finals('x', DATASET, Settings(), finals)
    out, err = capsys.readouterr()
    log = metrics.parse_log(out)
    assert list(log.run) == ('experiment dataset train validation test seed '
                             'device precision torch torchvision numpy python '
                             'commit').split()
    assert [*log.run.values()][:9] == [
        'x', 'MNIST', 5, 2, 4, 3, 'cpu', 'bf16', torch.__version__
    ]
    assert log.hparams == dataclasses.asdict(Settings())
    head = dict(experiment='x', dataset='MNIST', seed=3)
    assert log.finals == [head | line for line in finals + [log.mean]]
    assert [list(line) for line in log.finals] == [list(head | finals[0])] * 4
    assert out.split('\n')[2] == 'step  4  mach 0  loss 0.5000' and err == ''
    shown = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(shown))
    metrics.say('step', step=1)
    assert shown.getvalue() == b'step  1\n'  # at once
    monkeypatch.setattr(sys, 'stdout', None)  # as after `>&-`
    with pytest.raises(OSError):
        metrics.say('step', step=1)


def git(folder, *arguments):
    identity = ('-c', 'user.name=n', '-c', 'user.email=e@example.org')
    subprocess.run(('git', *identity, *arguments),
                   cwd=folder,
                   check=True,
                   capture_output=True,
                   timeout=20)


def test_commit_says_whether_the_code_is_committed(tmp_path, monkeypatch,
                                                   capsys):

    def commit():
        metrics.say_run('x', DATASET, Settings())
        return metrics.parse_log(capsys.readouterr().out).run['commit']

    for name in ('GIT_DIR', 'GIT_INDEX_FILE', 'GIT_WORK_TREE'):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / 'metrics.py'
    file.write_text('1')
    monkeypatch.setattr(metrics, '__file__', str(file))
    assert commit() == 'none'
    git(tmp_path, 'init')
    assert commit() == 'none'
    git(tmp_path, 'add', '.')
    git(tmp_path, 'commit', '-m', 'm')
    monkeypatch.setenv('GIT_DIR', '/nowhere')  # as inside a hook of another
    clean = commit()
    assert len(clean) == 7 and int(clean, 16) >= 0
    (tmp_path / 'run.txt').write_text('a saved log')
    assert commit() == clean
    (tmp_path / 'fork').mkdir()
    (tmp_path / 'fork' / 'a "b.py').write_text('2')
    assert commit() == f'{clean}-dirty'
    (tmp_path / 'fork' / 'a "b.py').unlink()
    file.write_text('3')
    assert commit() == f'{clean}-dirty'
    monkeypatch.setenv('PATH', str(tmp_path))
    assert commit() == 'none'


def final(mach, **changes):
    fields = dict(synthetic=90.0 + mach, real=95.0 + mach, steps=3000)
    fields |= dict(rate=40.0 - mach, staleness=1.0 + mach)
    fields |= dict(staleness_max=5 - mach, dropped=mach, seconds=60.0 + mach)
    return dict(mach=mach) | fields | dict(lost=2) | changes


def test_mean():
    mean = metrics.mean([final(0), final(1), final(2)])
    assert list(mean) == list(final(0))
    assert list(
        mean.values()) == ['mean', 91.0, 96.0, 3000, 39.0, 2.0, 5, 3, 62.0, 6]
    evals = [dict(mach=0, real=1.0), dict(mach=1, real=2.0)]
    assert metrics.mean(evals) == dict(mach='mean', real=1.5)


@pytest.mark.parametrize('order', [1, -1])
def test_a_failed_mach_does_not_flatter_the_mean(order):
    for key in 'real', 'synthetic', 'steps', 'rate':
        mean = metrics.mean([final(0), final(1, **{key: NAN})][::order])
        assert [k for k, v in mean.items() if v != v] == [key]
    mean = metrics.mean([final(0), dict(mach=1)][::order])  # nothing is known
    assert math.isnan(mean['real']) and mean['seconds'] == 60.0
    # Without parents there is no staleness, which is no failure.
    mean = metrics.mean([final(0, staleness=NAN), final(1)][::order])
    assert mean['staleness'] == 2.0
    assert math.isnan(metrics.mean([final(0, staleness=NAN)])['staleness'])


def make_log(experiment='x', real=98.0, seed=0, dataset='MNIST', **hparams):
    """A finished run's log; without a real accuracy, an interrupted one."""
    run = dict(experiment=experiment, dataset=dataset, seed=seed)
    log = metrics.Log(f'{experiment}.{seed}.txt', run,
                      dict(k=5, seed=seed) | hparams)
    if real is not None:
        log.finals = [
            dict(mach=0, real=1.0, synthetic=1.0, seconds=1.0),
            dict(mach='mean', real=real, synthetic=real - 1, seconds=60.0)
        ]
    return log


def table(logs):
    """The rows of the comparison, each {column: cell}."""
    lines = metrics.compare(logs).split('\n')
    assert all(line == line.rstrip() for line in lines)
    starts = [match.start() for match in re.finditer(r'\S+( \S+)*', lines[0])]
    slices = [slice(*ends) for ends in zip(starts, starts[1:] + [None])]
    header, *rows = [[line[s].strip() for s in slices] for line in lines]
    return [dict(zip(header, row)) for row in rows]


def test_one_row_of_one_run():
    [row] = table([make_log('a_name_longer_than_its_column')])
    assert list(row.items()) == [('experiment',
                                  'a_name_longer_than_its_column'),
                                 ('dataset', 'MNIST'), ('k', '5'), ('n', '1'),
                                 ('real', '98.00'), ('synthetic', '97.00'),
                                 ('isolated', '-'), ('seconds', '60.0')]


def test_seeds_are_grouped_and_nothing_else():
    reals = [97.0, 98.0, 98.5]
    logs = [
        make_log(real=r, seed=s, data=f'/{s}', log_every=s, dry_run=s > 0)
        for s, r in enumerate(reals)
    ]
    [row] = table(logs)
    assert row['n'] == '3' and row['seconds'] == '60.0 +- 0.0'
    mean, std = statistics.mean(reals), statistics.stdev(reals)
    assert row['real'] == f'{mean:.2f} +- {std:.2f}'
    for other in (make_log('y'), make_log(dataset='FashionMNIST'),
                  make_log(k=3), make_log(depth=2), make_log(device='cuda:0')):
        assert [row['n'] for row in table(logs + [other])] == ['3', '1']


def test_rows_of_one_experiment_say_what_differs():
    rows = table([
        make_log(depth=1, lr=.1),
        make_log(depth=2, lr=.1, k=7),
        make_log('y', depth=3)
    ])
    assert [row['differs in'] for row in rows] == ['depth 1', 'depth 2', '']
    assert 'differs in' not in table([make_log(k=3), make_log(k=7)])[0]
    rows = table([make_log(depth=1), make_log()])
    assert [row['differs in'] for row in rows] == ['depth 1', 'depth -']


def test_isolated_runs_fill_a_column():
    on, off = dict(connected=True), dict(connected=False)
    rows = table([
        make_log(real=97.0, **off),
        make_log(**on),
        make_log('y', real=90.0, **off)
    ])
    assert [[row[c]
             for c in ('experiment', 'n', 'real', 'isolated')]
            for row in rows] == [['x', '1', '98.00', '97.00'],
                                 ['y', '1', '-', '90.00']]
    [row] = table([
        make_log(**on),
        make_log(real=96.0, seed=1, **off),
        make_log(real=97.0, seed=2, **off)
    ])
    assert row['isolated'] == '96.50 +- 0.71 (n=2)'
    rows = table([make_log(depth=1, **on), make_log(depth=2, **off)])
    assert [row['isolated'] for row in rows] == ['-', '98.00']


def test_what_does_not_count_is_left_out_and_named(capsys):
    logs = [make_log(seed=seed, steps=100) for seed in range(5)]
    logs += [make_log('dead', real=None)]
    for log, steps in zip(logs, (100, 100, 40, NAN, 100)):
        log.mean['steps'] = steps
    logs[4].mean['real'] = NAN
    [row] = table(logs)
    assert row['n'] == '2' and row['real'] == '98.00 +- 0.00'
    assert capsys.readouterr().err.split('\n') == [
        'x.2.txt: 40 of 100 steps, left out',
        'x.3.txt: a MACH failed, left out', 'x.4.txt: a MACH failed, left out',
        'dead.0.txt: no final line of mach mean, left out', ''
    ]


def test_a_repeated_seed_counts_with_a_warning(capsys):
    assert table([make_log(seed=4), make_log(seed=4)])[0]['n'] == '2'
    assert capsys.readouterr().err == 'x.4.txt: seed 4 counts again\n'
    table([make_log(), make_log(connected=False), make_log('y')])
    assert capsys.readouterr().err == ''


def test_precision_is_the_faster_one(monkeypatch):
    assert metrics.choose_precision('bf16', 'cpu') == 'bf16'
    for seconds, chosen in ((0.9, 'fp32'), (0.4, 'bf16')):
        now = [0.0]

        def linear(rows, _, seconds=seconds, now=now):
            now[0] += seconds if rows.dtype is torch.bfloat16 else 1.0

        monkeypatch.setattr(torch.nn.functional, 'linear', linear)
        monkeypatch.setattr(metrics.time,
                            'perf_counter',
                            lambda now=now: now[0])
        assert metrics.choose_precision('auto', 'cpu') == chosen
    for known, chosen in ((True, 'bf16'), (False, 'fp32')):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda k=known: k)
        assert metrics.choose_precision('auto', 'cuda:0') == chosen


def test_torch_is_not_imported():
    code = 'from mach import metrics; assert "torch" not in metrics.sys.modules'
    root = metrics.__file__.rsplit('mach', 1)[0]
    subprocess.run([sys.executable, '-c', code],
                   cwd=root,
                   check=True,
                   timeout=60)
