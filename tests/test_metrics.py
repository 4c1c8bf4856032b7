"""The log's grammar, the clock, and the mean over MACHs."""

import math
import random
import subprocess

import numpy as np
import pytest
import torch

from mach import metrics

RUN = 'run  experiment x  dataset MNIST  seed 0'


@pytest.mark.parametrize(
    'line, fields',
    [
        ('step  400  mach 2  loss 0.2131  train 97.41',
         dict(step=400, mach=2, loss=0.21312, train=97.4088)),
        ('eval  step 1000  mach mean  synthetic 96.10  real 96.93  seconds 9.1',
         dict(
             step=1000, mach='mean', synthetic=96.1, real=96.9333,
             seconds=9.06)),
        ('final  real 100.00  synthetic_loss 0.0187  rate 41.2  staleness 1.00',
         dict(real=100.0, synthetic_loss=0.01871, rate=41.17, staleness=1.0)),
        ('final  steps 3000  dropped 0', dict(steps=3000, dropped=0)),
        # The same names are no measurement here: nothing may be rounded away.
        ('hparams  rate 0.0012  loss mse  on True',
         dict(rate=.0012, loss='mse', on=True)),
        ('run  train 60000  test 10000', dict(train=60000, test=10000)),
        ('hparams', {}),
    ])
def test_format_is_the_documented_one(line, fields):
    kind = line.split()[0]
    assert metrics.format_line(kind, **fields) == line
    parsed_kind, parsed = metrics.parse_line(line)
    assert (parsed_kind, list(parsed)) == (kind, list(fields))


def awkward_values():
    yield from ('', ' ', '  ', ' a', 'a ', 'a b', 'a  b', 'a   b', '\n', 'a\nb')
    yield from ('\r', '\t', '\v\f\x1c', '\x85', '\u2028', '\xa0', '\x00', '%')
    yield from ('%20', '100%', '%%', '% ', 'é', '日本', '\udce9', '"', 'key v')
    yield from ('True', 'False', 'None', '5', '-5', '+5', '1.5', '1e5', 'nan')
    yield from ('inf', '-inf', '1_0', '0x10', '12e4567', '٣', 'final', '=')
    yield from (0, -7, 10**20, True, False, 0.1, 1e-300, 1e22, -0.0, 1 / 3)
    yield from (math.inf, -math.inf, 3.0)
    pick = random.Random(0)
    for _ in range(500):
        yield ''.join(pick.choices(' %\n\r\t5.e-a20', k=pick.randint(0, 6)))


def test_awkward_values_survive():
    for value in awkward_values():
        line = metrics.format_line('hparams', first=value, commit=str(value))
        assert line.splitlines() == [line] and line == line.strip(), value
        kind, fields = metrics.parse_line(line + '\n')
        assert kind == 'hparams' and fields['commit'] == str(value), value
        assert type(fields['first']) is type(value), value
        assert fields['first'] == value, value
        assert list(fields) == ['first', 'commit'], value


@pytest.mark.parametrize('commit', ['1234567', '12e4567', '1a2b3c4-dirty'])
def test_a_commit_is_no_number(commit):
    line = metrics.format_line('run', commit=commit)
    assert line == f'run  commit {commit}'
    assert metrics.parse_line(line) == ('run', dict(commit=commit))


def test_numbers_of_libraries_are_numbers():
    line = metrics.format_line('final',
                               real=torch.tensor(97.125),
                               synthetic=np.float32(96.5),
                               dropped=np.int64(3),
                               loss=math.nan)
    assert line == 'final  real 97.12  synthetic 96.50  dropped 3  loss nan'


@pytest.mark.parametrize('line', [
    'hello', 'Epoch 1: loss 0.3', 'final real 97', 'final  real',
    'final  real  97', 'final  real 97 ', 'final   real 97', ' final  real 97',
    'final  real 97  real 98', 'final  97', 'step  4.5  mach 1',
    'step  mach 1  400', 'finals  real 97', 'run  note 95% done', 'run  ré 5',
    'run  a-b 5', 'final\treal 97', '{"real": 97}'
])
def test_garbage_is_refused_by_name(line):
    with pytest.raises(ValueError, match='not a log line') as caught:
        metrics.parse_line(line)
    assert repr(line) in str(caught.value)
    assert '\n' not in str(caught.value)


def test_empty_lines_are_no_lines():
    assert metrics.parse_line('') is metrics.parse_line(' \r\n') is None


@pytest.mark.parametrize('kind, key', [('stop', 'a'), ('run', 'a b'),
                                       ('run', ''), ('run', 'a\n'), ('', 'a')])
def test_no_line_is_made_that_could_not_be_read(kind, key):
    with pytest.raises(ValueError):
        metrics.format_line(kind, **{key: 1})


LINES = [
    RUN, 'hparams  k 5', 'step  5  mach 0  loss 2.0', 'step  5  mach 1',
    'eval  step 5  mach mean  real 90.00', 'final  mach 0  real 91.00',
    'final  mach mean  real 92.00'
]


def test_a_log_is_read_whole(tmp_path):
    path = tmp_path / 'a b.txt'
    path.write_text('\n'.join(LINES) + '\n', encoding='utf-8')
    for log in (metrics.read_log(path), metrics.parse_log('\n'.join(LINES)),
                metrics.parse_log(line + '\r\n' for line in LINES)):
        assert log.run == dict(experiment='x', dataset='MNIST', seed=0)
        assert log.hparams == dict(k=5)
        assert [step['mach'] for step in log.steps] == [0, 1]
        assert log.evals == [dict(step=5, mach='mean', real=90.0)]
        assert len(log.finals) == 2 and log.mean['real'] == 92
    assert metrics.read_log(path).name == str(path)


def test_an_interrupted_log_is_read(tmp_path, capsys):
    for n in range(1, 6):
        log = metrics.parse_log(LINES[:n])
        assert log.finals == [] and log.mean is None
    path = tmp_path / 'cut.txt'
    path.write_text('\n'.join(LINES)[:-3])  # `real 92.00` became `real 92`.
    assert metrics.read_log(path).mean is None
    assert 'cut.txt' in capsys.readouterr().err


@pytest.mark.parametrize('lines, number', [
    ([], 1),
    (['hello'], 1),
    (LINES[1:], 1),
    (LINES + LINES, 8),
    (LINES[:2] + ['hparams  k 6'], 3),
    (LINES + ['Traceback (most recent call last):'], 8),
    ([RUN, '', 'final  real 91.00'], 3),
    (['run  experiment x'], 1),
])
def test_what_is_no_log_is_refused_with_its_place(tmp_path, lines, number):
    path = tmp_path / 'bad.txt'
    path.write_text(''.join(line + '\n' for line in lines))
    with pytest.raises(ValueError) as caught:
        metrics.read_log(path)
    message = str(caught.value)
    assert message.startswith(f'{path}:{number}: ') and '\n' not in message


def test_binary_is_no_log_either(tmp_path):
    path = tmp_path / 'weights.pt'
    path.write_bytes(bytes(range(256)) * 9)
    with pytest.raises(ValueError, match='weights.pt:1: '):
        metrics.read_log(path)


def git(folder, *arguments):
    identity = ('-c', 'user.name=n', '-c', 'user.email=e@example.org')
    subprocess.run(('git', *identity, *arguments),
                   cwd=folder,
                   check=True,
                   capture_output=True,
                   timeout=20)


def test_commit_says_whether_the_code_is_committed(tmp_path, monkeypatch):
    for name in ('GIT_DIR', 'GIT_INDEX_FILE', 'GIT_WORK_TREE'):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / 'metrics.py'
    file.write_text('1')
    monkeypatch.setattr(metrics, '__file__', str(file))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert metrics.run_fields()['commit'] == 'none'
    git(tmp_path, 'init')
    assert metrics.run_fields()['commit'] == 'none'
    git(tmp_path, 'add', '.')
    git(tmp_path, 'commit', '-m', 'm')
    monkeypatch.setenv('GIT_DIR', '/nowhere')  # As inside a hook of another.
    commit = metrics.run_fields()['commit']
    assert 7 <= len(commit) <= 12 and int(commit, 16) >= 0
    (tmp_path / 'run.txt').write_text('a saved log')
    assert metrics.run_fields()['commit'] == commit
    (tmp_path / 'fork.py').write_text('2')
    assert metrics.run_fields()['commit'] == f'{commit}-dirty'
    (tmp_path / 'fork.py').unlink()
    file.write_text('3')
    assert metrics.run_fields()['commit'] == f'{commit}-dirty'
    monkeypatch.setenv('PATH', str(tmp_path))
    assert metrics.run_fields()['commit'] == 'none'


def test_versions_are_those_in_use(monkeypatch):
    fields = metrics.run_fields()
    assert list(fields) == ['torch', 'torchvision', 'numpy', 'python', 'commit']
    assert fields['torch'] == torch.__version__
    assert all(type(value) is str for value in fields.values())
    assert metrics.parse_line(metrics.format_line('run', **fields))[1] == fields


def test_accuracy():
    logits = torch.eye(10)[[1, 2, 3, 4]]
    assert metrics.accuracy(logits, torch.tensor([1, 2, 3, 5])) == 75.0
    assert type(metrics.accuracy(logits, torch.tensor([0] * 4))) is float
    for labels in (torch.ones(4, 1), torch.ones(1), torch.tensor(1)):
        with pytest.raises(ValueError):
            metrics.accuracy(logits, labels)
    with pytest.raises(ValueError):
        metrics.accuracy(logits[:0], torch.ones(0))


def test_stopwatch_counts_training_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
    watch = metrics.Stopwatch()

    def after(seconds):
        now[0] += seconds
        return watch.seconds

    assert after(5) == 0
    watch.start()
    assert after(2) == 2
    watch.start()  # Twice: the two seconds are not lost.
    assert after(1) == 3
    watch.pause()
    assert after(50) == 3
    watch.pause()
    watch.start()
    assert after(4) == 7


def final(mach, **changes):
    return dict(experiment='x',
                dataset='MNIST',
                seed=3,
                mach=mach,
                synthetic=90.0 + mach,
                real=95.005 + mach,
                steps=3000,
                rate=40.0 - mach,
                staleness=1.0 + mach,
                staleness_max=5 - mach,
                dropped=mach,
                seconds=60.0 + mach) | changes


def test_mean_final():
    mean = metrics.mean_final([final(0), final(1), final(2)])
    assert mean == dict(experiment='x',
                        dataset='MNIST',
                        seed=3,
                        mach='mean',
                        synthetic=91.0,
                        real=pytest.approx(96.005, abs=1e-9),
                        steps=3000,
                        rate=39.0,
                        staleness=2.0,
                        staleness_max=5,
                        dropped=3,
                        seconds=62.0)
    assert list(mean) == list(final(0)) and type(mean['steps']) is int
    assert metrics.format_line('final', **mean).startswith(
        'final  experiment x  dataset MNIST  seed 3  mach mean  synthetic 91.00'
    )
    uneven = metrics.mean_final([final(0), final(1, steps=3001)])
    assert uneven['steps'] == 3000.5


@pytest.mark.parametrize('key', ['real', 'synthetic', 'rate', 'seconds'])
def test_a_failed_mach_does_not_flatter_the_mean(key):
    for order in (0, 1), (1, 0):
        finals = [final(0), final(1, **{key: math.nan})]
        mean = metrics.mean_final([finals[i] for i in order])
        assert math.isnan(mean[key])


def test_a_mach_without_grads_has_no_staleness():
    none = dict(staleness=math.nan, staleness_max=math.nan)
    for finals in ([final(0, **none), final(1)], [final(1), final(0, **none)]):
        mean = metrics.mean_final(finals)
        assert mean['staleness'] == 2 and mean['staleness_max'] == 4
    alone = metrics.mean_final([final(0, **none)])
    assert math.isnan(alone['staleness']) and math.isnan(alone['staleness_max'])


def test_mean_final_refuses_what_has_no_mean():
    short = final(1)
    del short['real']
    for finals in ([], [final(0), final(1) | dict(mach='mean')],
                   [final(0), final(1, seed=4)], [final(0), short]):
        with pytest.raises(ValueError):
            metrics.mean_final(finals)
    assert 'real' not in metrics.mean_final([short])
