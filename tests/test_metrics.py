"""What a MACH counts, the grammar of the log, the mean, the table."""

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch

from mach import main, metrics

NAN = math.nan
# The log of a finished run, with a line of a kind that the reader skips.
# pylint: disable=line-too-long
LINES = '''run  experiment x  dataset MNIST  seed 0  commit 12e4567
hparams  k 5  rate 0.0012  loss mse  data a b  on True
shard  mach 0  images 9  classes 5,4
shard  mach 1  images 9  classes 3,6
note  a 1
step  5  mach 0  loss 2.0000  train nan
step  5  mach 1
eval  step 5  mach mean  real 90.00  seconds 9.1
final  mach 0  synthetic 90.00  real 95.00  steps 9  rate 40.0  staleness 1.00  staleness_max 5  dropped 2  seconds 60.0  lost 2
final  mach 1  synthetic 91.00  real 96.00  steps 9  rate 39.0  staleness 3.00  staleness_max 4  dropped 1  seconds 61.0  lost 2
final  mach mean  synthetic 90.50  real 95.50  steps 9  rate 39.5  staleness 2.00  staleness_max 5  dropped 3  seconds 61.0  lost 4
edge  mach 0  child 1  worth -0.50  staleness 1.50  messages 8  lost 2
edge  mach 1  child 0  worth nan  staleness nan  messages 0  lost 0
'''.splitlines()
FIRST, SECOND, MEAN = (metrics.parse_line(LINES[i])[1] for i in (8, 9, 10))


def test_tally_counts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
    tally = metrics.Tally(2)
    assert tally.rate == 0.0 and math.isnan(tally.staleness)
    now[0] += 50  # Making the networks is not training.
    tally.begin()
    logits, y = torch.eye(10)[[1, 2, 3, 4]], torch.tensor([1, 2, 3, 0])
    for loss, rows in (1.0, 4), (2.0, 4), (0.0, 2):
        now[0] += 2
        tally.step(torch.tensor(loss), logits[:rows], y[:rows])
    now[0] += 9  # This time passes after the last step.
    for count in 4, 1:
        tally.grad(count, parent=count)
        tally.lesson(torch.tensor(2.0 + count))
    tally.dropped += 7
    assert metrics.format_line('step', **tally.report()) == (
        'step  3  mach 2  loss 1.0000  train 80.00  synthetic_loss 4.5000  '
        'staleness 2.50  rate 0.5')
    now[0] += 99  # This time passes before the process is restarted.
    tally.lost_to[3] = 6
    resumed, state = metrics.Tally(2), json.dumps(tally.state_dict())
    resumed.load_state_dict(json.loads(state))
    now[0] += 6
    resumed.grad(1, parent=4)
    resumed.lost_to[3] += 1
    resumed.step(torch.tensor(8.0), logits, y)
    assert metrics.format_line('step', **resumed.report()) == (
        'step  4  mach 2  loss 8.0000  train 75.00  synthetic_loss nan  '
        'staleness 2.00  rate 0.3')
    assert metrics.format_line('final', **resumed.totals()) == (
        'final  steps 4  rate 0.3  staleness 2.00  staleness_max 4  dropped 7  '
        'seconds 12.0  lost 7  in_flight 0')
    assert resumed.grads == {4: [2, 5], 1: [1, 1]}
    assert json.dumps(tally.state_dict()) == state, 'the old one has changed'


def test_lines_are_written_as_they_are_read():
    for line in LINES:
        kind, fields = metrics.parse_line(line + '\n')
        assert metrics.format_line(kind, **fields) == line
    line = 'final  a 1  b 1.5  c -inf  d True  e x y  f 1 2'
    fields = dict(a=1, b=1.5, c=-math.inf, d=True, e='x y', f='1 2')
    assert metrics.parse_line(line) == ('final', fields)
    fields = dict(a='', b=' a  b ', c='a\nb\r\tc\x85\u2028d', steps=2999.8)
    assert metrics.format_line(
        'final', **fields) == 'final  a -  b a b  c a b c d  steps 3000'


BAD = ('final  real', 'final  real 97 ', 'step  mach 1  400', 'final  a-b 5',
       'final  real good', 'final  seed 1', 'final  real True',
       'final  rate inf', 'hparams  k few', f'hparams  k 1{"0" * 50}',
       'hparams  steps nan', 'hparams  latency -1', 'step  5  loss 1e',
       'eval  step 5  real 9', 'eval  seconds 5', 'eval  step x  seconds 5',
       'shard  mach 1  classes 5', 'shard  mach 0',
       'shard  mach 0  classes 5,x', 'edge  mach 0  child 0')


@pytest.mark.parametrize(
    'lines, number',
    [(LINES[1:], 1),
     (LINES + LINES, 14), *(([LINES[0], line], 2) for line in BAD),
     ([*LINES, 'edge  mach 1  child 2  worth 1'], 14)])
def test_what_is_no_log_is_refused_with_its_place(tmp_path, lines, number):
    path = tmp_path / 'bad.txt'
    path.write_text('\n'.join([*lines, '']), encoding='latin-1')
    with pytest.raises(ValueError, match=f'^{path}:{number}: .*$'):
        metrics.read_log(path)
    path.write_text('nohup: ignoring input\n')
    with pytest.raises(ValueError, match=f'^{path}: no run line$'):
        metrics.read_log(path)


def test_a_log_is_read_but_for_unknown_kinds_and_a_cut_line(tmp_path):
    path = tmp_path / 'a b.txt'
    path.write_text('\n'.join(LINES) + '\n')
    log = metrics.read_log(path)
    assert log.run['commit'] == '12e4567' and log.hparams['k'] == 5
    assert [step['mach'] for step in log.steps] == [0, 1]
    assert log.evals == [dict(step=5, mach='mean', real=90.0, seconds=9.1)]
    assert log.finals == [FIRST, SECOND, log.mean] and log.mean == MEAN
    assert log.skipped == 0 and log.shards == [
        dict(mach=0, images=9, classes='5,4'),
        dict(mach=1, images=9, classes='3,6')
    ]
    assert [edge['worth'] for edge in log.edges][0] == -0.5
    head, *tail = LINES  # a launcher, print() in a fork, a third stream
    path.write_text('\n'.join(['nohup: x', '', head, 'x xy', *tail, '\xff\n']),
                    encoding='latin-1')
    assert metrics.read_log(path).skipped == 4
    path.write_text('\n'.join(LINES[:-2]))
    assert metrics.read_log(path).mean is None
    for code in 'utf-8-sig', 'utf-16':  # of a shell on Windows
        path.write_text('\n'.join(LINES) + '\n', code, newline='\r\n')
        assert metrics.read_log(path).mean == MEAN


def test_what_is_said_is_a_log(capsys, monkeypatch):
    dataset = types.SimpleNamespace(name='MNIST', train_labels='abcd')
    dataset.validation_labels, dataset.test_labels = 'ab', 'abc'
    names = 'seed', 'device', 'precision'
    settings = dataclasses.make_dataclass('Settings', names)(3, 'cpu', 'bf16')
    shards, snapshots, found = torch.tensor([[5, 4], [3, 6]]), {}, []
    metrics.say_run('x', dataset, settings, shards, 2, processes=3)
    for i, fields in enumerate((FIRST, SECOND)):
        tally = metrics.Tally(i)
        tally.totals = lambda fields=fields: fields
        snapshots[i] = types.SimpleNamespace(tally=tally)
        found.append(dict(list(fields.items())[:3], worth={1 - i: NAN}))
    found[0]['worth'] = {1: -0.501}
    snapshots[0].tally.lost_to = {1: 2}
    snapshots[1].tally.grads = {0: [8, 12]}
    metrics.say_finals('x', dataset, settings, found, snapshots)
    run, hparams, *others = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        'run  experiment x  dataset MNIST  train 4  validation 2  test 3  '
        'seed 3  device cpu  precision bf16  torch 2.*  torchvision .*  '
        r'numpy .*  python 3.*  commit (none|\w{7}(-dirty)?)  threads 2  '
        r'processes 3  cpu \w+', run)
    assert hparams == 'hparams  seed 3  device cpu  precision bf16'
    head = 'final  experiment x  dataset MNIST  seed 3'
    written = LINES[2:4] + LINES[8:]
    assert others == [line.replace('final', head) for line in written]
    shown = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(shown))
    metrics.say('step', step=1)
    assert shown.getvalue() == b'step  1\n', 'the line must be shown at once'
    monkeypatch.setattr(metrics, 'OUTPUTS', [None])
    monkeypatch.setattr(metrics, 'FAILED', [])
    monkeypatch.setattr(sys, 'stdout', None)  # as after `>&-`
    for step in 1, 2:
        metrics.say('step', step=step)
    assert len(metrics.FAILED) == 1  # the caller ends the run
    assert capsys.readouterr().err == (
        'cannot write the log to stdout: it is closed; the run ends\nstep  1\nstep  2\n'
    )


def test_no_path_breaks_a_line(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(shown, 'ascii'))
    metrics.say('hparams', data='\xe9 \udcff')
    assert shown.getvalue() == b'hparams  data \\xe9 \\udcff\n'


def test_commit_says_whether_the_code_is_committed(tmp_path, monkeypatch):
    for name in ('GIT_DIR', 'GIT_INDEX_FILE', 'GIT_WORK_TREE'):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / 'mach').mkdir()
    (tmp_path / 'mach/metrics.py').write_text('1')
    monkeypatch.setattr(metrics, '__file__', str(tmp_path / 'mach/metrics.py'))
    for line in 'init', 'add .', '-c user.name=n -c user.email=e commit -m m':
        assert metrics._commit() == 'none'
        subprocess.run(['git', *line.split()], cwd=tmp_path, check=True)
    clean = metrics._commit()
    assert len(clean) == 7 and int(clean, 16) >= 0
    (tmp_path / 'run.txt').write_text('a saved log')
    assert metrics._commit() == clean
    (tmp_path / 'a "b.py').write_text('a fork')
    assert metrics._commit() == f'{clean}-dirty'
    monkeypatch.setenv('PATH', str(tmp_path))  # There is no git.
    assert metrics._commit() == 'none'


@pytest.mark.parametrize('order', [1, -1])
def test_a_failed_mach_shows_in_the_mean(order):
    for key in 'real', 'synthetic', 'steps', 'rate':
        mean = metrics.mean([FIRST, SECOND | {key: NAN}][::order])
        assert [k for k, v in mean.items() if v != v] == [key]
    mean = metrics.mean([FIRST, dict(mach=1)][::order])
    assert math.isnan(mean['real']) and mean['seconds'] == 60.0
    # A MACH without parents has no staleness, which is no failure.
    mean = metrics.mean([FIRST, SECOND | dict(staleness=NAN)][::order])
    assert mean['staleness'] == 1.0
    assert metrics.mean([dict(mach=0, real=1.0)]) == dict(mach='mean', real=1.0)


def make_log(experiment='x',
             real=98.0,
             seed=0,
             dataset='MNIST',
             run=(),
             **hparams):
    """The log of a finished run."""
    log = metrics.Log(f'{experiment}.{seed}')
    log.run = dict(run, experiment=experiment, dataset=dataset, seed=seed)
    log.hparams = dict(k=5, data=f'/{seed}', steps=9) | hparams
    log.finals = [FIRST, MEAN | dict(real=real)]
    return log


def table(*logs):
    """The rows of the comparison, as lists of cells."""
    return [re.split('  +', line) for line in main.compare(logs).split('\n')]


def test_a_row_is_one_experiment_dataset_and_settings():
    logs = [make_log(real=96 + seed, seed=seed) for seed in (1, 2, 3)]
    assert main.compare([make_log('longer_than_its_column'), *logs]) == '''\
experiment              dataset  k  n  real           synthetic      isolated  seconds
longer_than_its_column  MNIST    5  1  98.00          90.50          -         61.0
x                       MNIST    5  3  98.00 +- 1.00  90.50 +- 0.00  -         61.0 +- 0.0'''
    for other in dict(experiment='y'), dict(dataset='F'), dict(k=7), dict(d=2):
        rows = table(*logs, make_log(**other))
        assert [row[3] for row in rows] == ['n', '3', '1']
    rows = table(make_log(d=1, lr=.1), make_log(lr=.1, k=7), make_log('y', d=3))
    assert [row[8:] for row in rows] == [['differs in'], ['d 1'], ['d -'], []]
    rows = table(make_log(k=10), make_log('y', k=1), make_log(k=9))
    assert [row[2] for row in rows] == ['k', '9', '10', '1']


def test_a_row_is_one_code_and_one_machine(capsys):
    run = dict(commit='12e4567', threads=2, processes=1)
    logs = [make_log(run=run, seed=seed) for seed in (1, 2)]
    for name, value in ('commit', '12e4567-dirty'), ('threads',
                                                     1), ('processes', 5):
        others = [make_log(run=run | {name: value}, seed=s) for s in (1, 2)]
        rows = table(*logs, *others)
        assert [row[3] for row in rows] == ['n', '2', '2']
        assert [row[8] for row in rows[1:]
               ] == [f'{name} {run[name]}', f'{name} {value}']
    assert capsys.readouterr(
    ).err == 'x: 2 runs of 12e4567-dirty share a row, though their code may differ\n'


def test_isolated_runs_fill_a_column():
    on, off = dict(connected=True), dict(connected=False)
    rows = table(make_log(real=96, seed=1, **off), make_log(**on),
                 make_log(real=97, seed=2, **off), make_log('y', 90, **off),
                 make_log('z', **on, d=1), make_log('z', **off, d=2))
    assert [' '.join(row[3:5] + row[6:7]) for row in rows] == [
        'n real isolated', '1 98.00 96.50 +- 0.71 (n=2)', '1 - 90.00',
        '1 98.00 -', '1 - 98.00'
    ]


@pytest.mark.parametrize('names, pairs', [(dict(share=0.1), True),
                                          (dict(run=dict(commit='b')), True),
                                          (dict(run=dict(threads=3)), False),
                                          (dict(dropout=0.1), False)])
def test_isolated_runs_need_not_agree_about_messages(names, pairs):
    default = dict(share=0.2, dropout=0.2, run=dict(commit='a'))
    rows = table(make_log(real=96, connected=False, **default | names),
                 make_log(connected=True, **default))
    assert len(rows) == 3 - pairs and ['96.00', '-'][not pairs] in rows[-1]


def test_what_does_not_count_is_named(capsys):
    logs = [make_log(seed=seed) for seed in range(4)]
    logs[1].mean['steps'] = 4
    logs[2].mean['rate'] = NAN
    logs[3].finals.pop()
    logs[0].skipped = 2
    assert table(*logs, make_log(connected=False), logs[0])[1][3] == '2'
    assert capsys.readouterr().err == '''\
x.0: 2 lines are no log lines
x.1: 4 of 9 steps, left out
x.2: a MACH failed, left out
x.3: no final line of mach mean, left out
x.0: 2 lines are no log lines
x.0: seed 0 counts again
'''


@pytest.mark.parametrize('flags, chosen', [('avx2 bf16', 'fp32'),
                                           (None, 'fp32'),
                                           ('fma avx512_bf16', 'bf16'),
                                           ('amx_bf16 amx_tile', 'bf16')])
def test_precision_is_what_the_processor_can_do(monkeypatch, flags, chosen):
    cpuinfo = mock.mock_open(read_data=f'processor : 0\nflags : {flags}\n')
    if flags is None:  # Windows
        cpuinfo.side_effect = FileNotFoundError
    monkeypatch.setattr(metrics, 'open', cpuinfo, raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                        lambda: chosen == 'bf16')
    for device in 'cpu', 'cuda:0':
        assert metrics.choose_precision('auto', device) == chosen
        assert metrics.choose_precision('asked', device) == 'asked'
