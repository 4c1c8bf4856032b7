"""What a MACH counts, the grammar of the log, the mean, the table."""

import copy
import dataclasses
import io
import math
import re
import subprocess
import sys
import timeit
import types

import pytest
import torch

from mach import metrics

NAN = math.nan
# A log of a finished run, with lines of two kinds that the reader skips.
LINES = [
    'run  experiment x  dataset MNIST  seed 0  commit 12e4567',
    'hparams  k 5  rate 0.0012  loss mse  data a b  on True',
    'shard  mach 0  images 9', 'step  5  mach 0  loss 2.0000  train nan',
    'step  5  mach 1', 'eval  step 5  mach mean  real 90.00  seconds 9.1',
    'final  mach 0  real 91.00', 'edge  mach 0  child 3',
    'final  mach mean  real 92.00'
]


def test_tally_counts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
    tally = metrics.Tally(2)
    assert tally.rate == 0.0 and math.isnan(tally.staleness)
    now[0] += 50  # Making the networks is not training.
    tally.begin()
    logits, y = torch.eye(10)[[1, 2, 3, 4]], torch.tensor([1, 2, 3, 0])
    for loss in 1.0, 2.0:
        now[0] += 3
        tally.step(torch.tensor(loss, requires_grad=True), logits, y)
    tally.step(torch.tensor(0.0), logits[:2], y[:2])  # a smaller batch
    now[0] += 9  # This time passes after the last step.
    for count in 4, 1:
        tally.grad(count)
        tally.lesson(torch.tensor(2.0 + count))
    tally.dropped += 7
    assert metrics.format_line('step', **tally.report()) == (
        'step  3  mach 2  loss 1.0000  train 80.00  synthetic_loss 4.5000  '
        'staleness 2.50  rate 0.5')
    # A report opens a new window for losses and accuracy.
    assert metrics.format_line('step', **tally.report()) == (
        'step  3  mach 2  loss nan  train nan  synthetic_loss nan  '
        'staleness 2.50  rate 0.5')
    before, state, resumed = copy.copy(
        tally), tally.state_dict(), metrics.Tally(2)
    assert {type(value) for value in state.values()} <= {int, float}
    now[0] += 99  # This time passes before the process is restarted.
    resumed.load_state_dict(state)
    now[0] += 6
    for other in tally, resumed:
        other.step(torch.tensor(8.0), logits, y)
    assert resumed.report() == tally.report() | dict(rate=4 / 12)
    # A copy does not change.
    assert metrics.format_line('final', **before.totals()) == (
        'final  steps 3  rate 0.5  staleness 2.50  staleness_max 4  dropped 7  '
        'seconds 6.0  lost 0')


@pytest.mark.parametrize('line', LINES)
def test_lines_are_written_as_they_are_read(line):
    kind, fields = metrics.parse_line(line + '\n')
    assert metrics.format_line(kind, **fields) == line


def test_values_are_rounded_and_converted():
    assert metrics.format_line(
        'final', real=.21312, rate=41.17,
        steps=2999.8) == 'final  real 0.21  rate 41.2  steps 3000'
    assert metrics.parse_line(
        'final  a 1  b 1.0  c -inf  d True  e x y  f 1 2') == ('final',
                                                               dict(a=1,
                                                                    b=1.0,
                                                                    c=-math.inf,
                                                                    d=True,
                                                                    e='x y',
                                                                    f='1 2'))


@pytest.mark.parametrize('value, read', [('', '-'), (' a  b ', 'a b'),
                                         ('a\nb\r\tc\x85\u2028d', 'a b c d')])
def test_no_value_breaks_the_line(value, read):
    line = metrics.format_line('hparams', first=value, last=5)
    assert line == f'hparams  first {read}  last 5'


@pytest.mark.parametrize(
    'lines, number',
    [([], 1), (LINES[1:], 1), (LINES + LINES, 10),
     (LINES[:1] + ['Traceback (most recent call last):'], 2),
     *(([LINES[0], line], 2)
       for line in ('hello', 'final  real', 'final  real 97 ',
                    'final   real 97', ' final  real 97', 'step  mach 1  400',
                    'run  a-b 5', '{"real": 97}', 'weights\x00'))])
def test_what_is_no_log_is_refused_with_its_place(tmp_path, lines, number):
    path = tmp_path / 'bad.txt'
    path.write_text(''.join(line + '\n' for line in lines))
    with pytest.raises(ValueError, match=f'^{path}:{number}: .*$'):
        metrics.read_log(path)


def test_a_log_is_read_but_for_unknown_kinds_and_a_cut_line(tmp_path):
    path = tmp_path / 'a b.txt'
    path.write_text('\n'.join(LINES) + '\n')
    log = metrics.read_log(path)
    assert log.name == str(path)
    assert log.run['commit'] == '12e4567' and log.hparams['k'] == 5
    assert [step['mach'] for step in log.steps] == [0, 1]
    assert log.evals == [dict(step=5, mach='mean', real=90.0, seconds=9.1)]
    assert log.finals == [dict(mach=0, real=91.0), log.mean]
    path.write_text('\n'.join(LINES)[:-3])  # `real 92.00` became `real 92`.
    assert metrics.read_log(path).mean is None


@dataclasses.dataclass
class Settings:
    """Those hyperparameters that the run line repeats."""
    seed: int = 3
    device: str = 'cpu'
    precision: str = 'bf16'


def final(mach, **changes):
    """The fields of a final line; the argument tells MACHs apart."""
    fields = dict(mach=mach, synthetic=90.0 + mach, real=95.0 + mach, steps=9)
    fields |= dict(rate=40.0 - mach, staleness=1.0 + mach)
    fields |= dict(staleness_max=5 - mach, dropped=mach, seconds=60.0 + mach)
    return fields | dict(lost=2) | changes


def test_what_is_said_is_a_log(capsys, monkeypatch):
    dataset = types.SimpleNamespace(name='MNIST',
                                    train_labels=[0] * 5,
                                    validation_labels=[0] * 2,
                                    test_labels=[0] * 4)
    metrics.say_run('x', dataset, Settings())
    finals = [final(mach) for mach in range(3)]
    metrics.say_finals('x', dataset, Settings(), finals)
    out = capsys.readouterr().out
    log = metrics.parse_log(out)
    assert out.startswith(
        'run  experiment x  dataset MNIST  train 5  validation 2  test 4  seed 3  '
        f'device cpu  precision bf16  torch {torch.__version__}  torchvision ')
    assert list(log.run)[-4:] == ['torchvision', 'numpy', 'python', 'commit']
    assert log.hparams == dataclasses.asdict(Settings())
    head = dict(experiment='x', dataset='MNIST', seed=3)
    assert [list(fields.items()) for fields in log.finals] == [
        list((head | fields).items())
        for fields in (*finals, metrics.mean(finals))
    ]
    shown = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(shown))
    metrics.say('step', step=1)
    assert shown.getvalue() == b'step  1\n', 'the line must be shown at once'
    monkeypatch.setattr(sys, 'stdout', None)  # as after `>&-`
    with pytest.raises(OSError):
        metrics.say('step', step=1)


def test_commit_says_whether_the_code_is_committed(tmp_path, monkeypatch):
    for name in ('GIT_DIR', 'GIT_INDEX_FILE', 'GIT_WORK_TREE'):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / 'mach').mkdir()
    file, fork = tmp_path / 'mach/metrics.py', tmp_path / 'a "b.py'
    monkeypatch.setattr(metrics, '__file__', str(file))
    file.write_text('1')
    for line in 'init', 'add .', '-c user.name=n -c user.email=e commit -m m':
        assert metrics._commit() == 'none'
        subprocess.run(['git', *line.split()], cwd=tmp_path, check=True)
    clean = metrics._commit()
    assert len(clean) == 7 and int(clean, 16) >= 0
    (tmp_path / 'run.txt').write_text('a saved log')
    assert metrics._commit() == clean
    fork.write_text('2')
    assert metrics._commit() == f'{clean}-dirty'
    fork.unlink()
    file.write_text('3')
    assert metrics._commit() == f'{clean}-dirty'
    monkeypatch.setenv('PATH', str(tmp_path))  # There is no git.
    assert metrics._commit() == 'none'


@pytest.mark.parametrize('order', [1, -1])
def test_a_failed_mach_shows_in_the_mean(order):
    mean = metrics.mean([final(0), final(1), final(2)][::order])
    assert metrics.format_line('final', **mean) == (
        'final  mach mean  synthetic 91.00  real 96.00  steps 9  rate 39.0  '
        'staleness 2.00  staleness_max 5  dropped 3  seconds 62.0  lost 6')
    for key in 'real', 'synthetic', 'steps', 'rate':
        mean = metrics.mean([final(0), final(1, **{key: NAN})][::order])
        assert [k for k, v in mean.items() if v != v] == [key]
    mean = metrics.mean([final(0), dict(mach=1)][::order])
    assert math.isnan(mean['real']) and mean['seconds'] == 60.0
    # A MACH without parents has no staleness, which is no failure.
    mean = metrics.mean([final(0, staleness=NAN), final(1)][::order])
    assert mean['staleness'] == 2.0
    assert metrics.mean([dict(mach=0, real=1.0)]) == dict(mach='mean', real=1.0)


def make_log(experiment='x', real=98.0, seed=0, dataset='MNIST', **hparams):
    """The log of a finished run."""
    return metrics.parse_log(
        f"""run  experiment {experiment}  dataset {dataset}  seed {seed}
{metrics.format_line('hparams', **dict(k=5, data=f'/{seed}') | hparams)}
final  mach 0  real 1  synthetic 1  seconds 1  steps 100
final  mach mean  real {real}  synthetic 97  seconds 60  steps 100
""", f'{experiment}.{seed}')


def table(*logs):
    """The rows of the comparison, as lists of cells."""
    return [re.split('  +', line) for line in metrics.compare(logs).split('\n')]


def test_a_row_is_one_experiment_dataset_and_settings():
    assert metrics.compare([make_log('longer_than_its_column'),
                            make_log()]) == """\
experiment              dataset  k  n  real   synthetic  isolated  seconds
longer_than_its_column  MNIST    5  1  98.00  97.00      -         60.0
x                       MNIST    5  1  98.00  97.00      -         60.0"""
    logs = [make_log(real=96 + seed, seed=seed) for seed in (1, 2, 3)]
    common = ['97.00 +- 0.00', '-', '60.0 +- 0.0']
    assert table(*logs)[1:] == [[
        'x', 'MNIST', '5', '3', '98.00 +- 1.00', *common
    ]]
    for other in dict(experiment='y'), dict(dataset='F'), dict(k=3), dict(d=2):
        rows = table(*logs, make_log(**other))
        assert [row[3] for row in rows] == ['n', '3', '1']


def test_rows_of_one_experiment_say_what_differs():
    rows = table(make_log(depth=1, lr=.1), make_log(lr=.1, k=7),
                 make_log('y', depth=3))
    assert [row[8:] for row in rows] == [['differs in'], ['depth 1'],
                                         ['depth -'], []]


def test_isolated_runs_fill_a_column():
    on, off = dict(connected=True), dict(connected=False)
    rows = table(make_log(real=96, seed=1, **off), make_log(**on),
                 make_log(real=97, seed=2, **off), make_log('y', 90, **off),
                 make_log('z', **on, d=1), make_log('z', **off, d=2))
    assert [[*row[2:5], row[6]] for row in rows[1:]
           ] == [['5', '1', '98.00', '96.50 +- 0.71 (n=2)'],
                 ['5', '1', '-', '90.00'], ['5', '1', '98.00', '-'],
                 ['5', '1', '-', '98.00']]


def test_what_does_not_count_is_named(capsys):
    logs = [make_log(seed=seed, steps=100) for seed in range(4)]
    logs[1].mean['steps'] = 40
    logs[2].mean['rate'] = NAN
    logs[3].finals.pop()
    isolated = make_log(steps=100, connected=False)
    assert table(*logs, isolated, logs[0])[1][3] == '2'
    assert capsys.readouterr().err == """\
x.1: 40 of 100 steps, left out
x.2: a MACH failed, left out
x.3: no final line of mach mean, left out
x.0: seed 0 counts again
"""


@pytest.mark.parametrize('seconds, chosen', [(0.9, 'fp32'), (0.4, 'bf16')])
def test_precision_is_the_faster_one(monkeypatch, seconds, chosen):
    cost = {torch.bfloat16: seconds, torch.float32: 1.0}
    monkeypatch.setattr(torch.nn.functional, 'linear',
                        lambda x, _: cost[x.dtype])
    monkeypatch.setattr(timeit, 'repeat', lambda work, number: [9.0, work()])
    assert metrics.choose_precision('auto', 'cpu') == chosen
    assert metrics.choose_precision('asked', 'cpu') == 'asked'
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: seconds < 0.5)
    assert metrics.choose_precision('auto', 'cuda:0') == chosen


def test_torch_is_not_imported():
    code = 'from mach import metrics; assert "torch" not in metrics.sys.modules'
    root = metrics.__file__.rsplit('mach', 1)[0]
    subprocess.run([sys.executable, '-c', code], cwd=root, check=True)
