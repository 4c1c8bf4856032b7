"""The table of runs, and mach/main.py on experiments that only print a log."""

import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest

from mach import main, metrics

MAIN = pathlib.Path(main.__file__).resolve()


def make_log(experiment='x', real=98.0, seed=0, dataset='MNIST', **hparams):
    """A finished run's log; without a real accuracy, an interrupted one."""
    run = dict(experiment=experiment, dataset=dataset, seed=seed)
    log = metrics.Log(f'{experiment}.{seed}', run,
                      dict(k=5, seed=seed) | hparams)
    if real is not None:
        log.finals = [
            run | dict(mach=0, real=1.0, synthetic=1.0, seconds=1.0),
            run | dict(mach='mean', real=real, synthetic=real - 1, seconds=60.0)
        ]
    return log


def table(logs):
    """The rows of the comparison, each {column: cell}."""
    header, *rows = metrics.compare(logs).split('\n')
    columns = list(re.finditer(r'\S+( \S+)*', header))
    ends = [column.start() for column in columns[1:]] + [None]
    return [{
        column[0]: row[column.start():end].strip()
        for column, end in zip(columns, ends)
    }
            for row in rows]


def test_one_row_of_one_run():
    assert table([make_log()]) == [
        dict(experiment='x',
             dataset='MNIST',
             k='5',
             n='1',
             real='98.00',
             synthetic='97.00',
             isolated='-',
             seconds='60.0')
    ]


def test_seeds_are_grouped_and_nothing_else():
    reals = [97.0, 98.0, 98.5]
    logs = [
        make_log(real=r, seed=s, data=f'/{s}', log_every=s)
        for s, r in enumerate(reals)
    ]
    [row] = table(logs)
    assert row['n'] == '3' and row['seconds'] == '60.0 +- 0.0'
    mean, std = statistics.mean(reals), statistics.stdev(reals)
    assert row['real'] == f'{mean:.2f} +- {std:.2f}'
    for other in (make_log('y'), make_log(dataset='FashionMNIST'),
                  make_log(k=3), make_log(depth=2)):
        assert [row['n'] for row in table(logs + [other])] == ['3', '1']
    for key in 'device', 'precision':
        other = make_log(seed=9)
        other.run[key] = 'another'
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
    assert [row['experiment'] for row in rows] == ['x', 'y']
    assert [row['n'] for row in rows] == ['1', '1']
    assert [row['real'] for row in rows] == ['98.00', '-']
    assert [row['synthetic'] for row in rows] == ['97.00', '-']
    assert [row['isolated'] for row in rows] == ['97.00', '90.00']
    [row] = table([
        make_log(**on),
        make_log(real=96.0, seed=1, **off),
        make_log(real=97.0, seed=2, **off)
    ])
    assert row['isolated'] == '96.50 +- 0.71 (n=2)'
    rows = table([make_log(depth=1, **on), make_log(depth=2, **off)])
    assert [row['isolated'] for row in rows] == ['-', '98.00']


def test_missing_and_bad_numbers():
    rows = table([
        make_log(real=None),
        make_log('y', seed=1),
        make_log('y', real=None, seed=2),
        make_log('z', real=float('nan')),
        make_log('z', seed=1),
        metrics.Log('e', {'experiment': 'e'})
    ])
    assert [row['n'] for row in rows] == ['0', '1', '2', '0']
    assert [row['real'] for row in rows] == ['-', '98.00', 'nan +- nan', '-']
    assert rows[3]['dataset'] == rows[3]['k'] == rows[3]['seconds'] == '-'


def test_a_repeated_seed_counts_with_a_warning(capsys):
    logs = [make_log(seed=4), make_log(seed=4, real=97.0)]
    assert table(logs)[0]['n'] == '2'
    assert 'seed 4 counts 2 times' in capsys.readouterr().err
    table([
        make_log(seed=4),
        make_log(seed=4, real=None),
        make_log(seed=4, connected=False),
        make_log('y', seed=4)
    ])
    assert capsys.readouterr().err == ''


def test_a_run_that_stopped_early_is_not_averaged_in(capsys):
    logs = [make_log(seed=seed, steps=100) for seed in range(3)]
    for log, steps in zip(logs, (100, 100, 40)):
        log.mean['steps'] = steps
    rows = table(logs)
    assert [row['n'] for row in rows] == ['2', '1']
    assert [row['differs in'] for row in rows] == ['steps 100', 'steps 40']
    assert capsys.readouterr().err == 'x.2: 40 of 100 steps\n'


def test_columns_are_aligned():
    text = metrics.compare(
        [make_log('a_very_long_experiment_name'),
         make_log()])
    lines = text.split('\n')
    assert all(line == line.rstrip() for line in lines)
    assert len({line.index('MNIST') for line in lines[1:]}) == 1
    assert lines[0].index('dataset') == lines[1].index('MNIST')


# An experiment that prints a log of the documented form, without training.
FAKE = '''
import dataclasses, os, signal, sys, time
@dataclasses.dataclass
class Hyperparameters:
  """One of two classes; this one's fields count."""
  FIELDS
  note = 'not annotated, no hyperparameter'
class Other:
  hidden: int = 1
p = dict(seed='0', k='5', connected='True')
for word in sys.argv[1:]:
  name, value = word.removeprefix('--').split('=', 1)
  assert name in Hyperparameters.__annotations__, name
  p[name] = value
name = os.path.basename(os.path.dirname(os.path.abspath(__file__)))
print('run  experiment', name, ' dataset MNIST  seed', p['seed'])
print('hparams ', '  '.join(f'{key} {value}' for key, value in p.items()))
print(f'progress of {name}', file=sys.stderr)
BODY
real = 90 + int(p['k']) + int(p['seed']) - (p['connected'] == 'False')
for mach in 0, 'mean':
  print('final  experiment', name, ' dataset MNIST  seed', p['seed'], ' mach',
        mach, f' synthetic {real - 1}.00  real {real}.00  seconds 1.5')
'''


@pytest.fixture
def make(tmp_path):
    """Writes an experiment and returns its folder."""

    def write(name, fields='seed: int = 0; k: int = 5', body=''):
        folder = tmp_path / name
        folder.mkdir()
        text = FAKE.replace('FIELDS', fields).replace('BODY', body)
        (folder / 'main.py').write_text(text)
        return str(folder)

    return write


def command(*arguments):
    return [sys.executable, str(MAIN), *map(str, arguments)]


def launch(tmp_path, *arguments):
    """Runs mach/main.py elsewhere than in its repository."""
    return subprocess.run(command(*arguments),
                          cwd=tmp_path,
                          capture_output=True,
                          text=True,
                          timeout=60)


def kinds(stdout):
    return [line.split(' ')[0] for line in stdout.split('\n\n')[0].split('\n')]


def test_runs_in_order_saves_and_compares(tmp_path, make):
    b, a = make('b'), make('a', 'lr: float = 1; depth: int = 1; seed: int = 0')
    done = launch(tmp_path, '--only', b, a, '--k', '7', '--lr=-1e-3', '--logs',
                  'x/y', '--depth', '2')
    assert done.returncode == 0, done.stderr
    assert kinds(done.stdout) == ['run', 'hparams', 'final', 'final'] * 2
    log, text = done.stdout.split('\n\n')
    saved = [(tmp_path / 'x/y' / f'{name}.txt').read_text() for name in 'ba']
    assert ''.join(saved) == log + '\n'
    assert 'k 7' in saved[0] and 'lr' not in saved[0]
    assert metrics.parse_log(saved[1]).hparams['lr'] == -.001
    assert metrics.parse_log(saved[1]).hparams['depth'] == 2
    assert [row.split()[:5] for row in text.split('\n')
           ] == [['experiment', 'dataset', 'k', 'n', 'real'],
                 ['b', 'MNIST', '7', '1', '97.00'],
                 ['a', 'MNIST', '5', '1', '95.00'], []]
    for name in 'ba':
        assert os.path.join('x', 'y', f'{name}.txt') in done.stderr
        assert f'progress of {name}' in done.stderr
    again = launch(tmp_path, '--only', b, '--logs', 'x/y')
    assert again.returncode == 2 and 'b.txt exists' in again.stderr
    assert (tmp_path / 'x/y/b.txt').read_text() == saved[0]
    compared = launch(tmp_path, '--compare', 'x/y/b.txt', 'x/y/a.txt')
    assert (compared.returncode, compared.stdout) == (0, text)


def test_logs_get_a_folder_of_their_own(tmp_path, make):
    a = make('a')
    for n in 1, 2:
        assert launch(tmp_path, '--only', a).returncode == 0
        assert len(list(tmp_path.glob('.runs/*/a.txt'))) == n


def test_seeds_and_isolated(tmp_path, make):
    a = make('a', 'seed: int = 0; connected: bool = True')
    done = launch(tmp_path, f'--only={a},{make("b", "k: int = 5")}', '--logs',
                  'l', '--seeds', '3,1', '--isolated', 'True')
    assert done.returncode == 0, done.stderr
    names = ['a.seed3', 'a.seed3.isolated', 'a.seed1', 'a.seed1.isolated', 'b']
    assert re.findall(r'l/(\S+)\.txt', done.stderr) == names
    assert sorted(os.listdir(tmp_path / 'l')) == sorted(
        f'{name}.txt' for name in names)
    rows = [re.split(r'\s{2,}', row) for row in done.stdout.split('\n')[-4:-1]]
    assert rows[0][4:7] == ['real', 'synthetic', 'isolated']
    assert rows[1][3:7] == [
        '2', '97.00 +- 1.41', '96.00 +- 1.41', '96.00 +- 1.41'
    ]
    assert rows[2][3:7] == ['1', '95.00', '94.00', '-']


MISTAKES = [
    (['--only', 'A', '--steps', '5'], '--steps; the closest is --seed'),
    (['--only', 'A', '--hidden', '5'], '--hidden'),
    (['--only', 'A', '--note', '5'], '--note'),
    (['--only', 'A', '--lr', '5'], '--lr'),
    (['--only', 'A', '--log', 'x'], '--logs'),
    (['--only', 'A', '--k'], '--k needs a value'),
    (['--only', 'A', '-k', '5'], "'-k'"),
    (['--only', 'nowhere'], 'nowhere'),
    (['--only', MAIN.parent], 'choose from'),
    (['--only', ','], 'nothing to run'),
    (['--only', 'A', '--seeds', '0,x'], '--seeds 0,x'),
    (['--only', 'A', '--seeds', '0,0'], '--seeds 0,0'),
    (['--only', 'A', '--seeds', '0', '--seed', '1'], '--seed'),
    (['--only', 'A', '--isolated', 'yes'], '--isolated'),
    (['--only', 'A', '--isolated', 'True'], '--connected'),
    (['--only', 'A', '--logs', 'file'], '--logs'),
    (['--only', 'broken'], 'main.py'),
    (['--compare', 'nowhere.txt'], 'nowhere.txt'),
    (['--compare', 'file'], 'file:1: '),
    (['--compare', 'file', '--k', '5'], '--compare'),
    (['--compare', 'file', '--logs', 'x'], '--compare'),
]


def test_mistakes_end_it_before_anything_runs(tmp_path, make, monkeypatch,
                                              capsys):
    # In this process: twenty starts of an interpreter would take seconds.
    a = make('A')
    broken = pathlib.Path(make('broken'))
    (broken / 'main.py').write_text('def (')
    (tmp_path / 'file').write_text('not a log\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, 'run', lambda job: pytest.fail(f'ran {job}'))
    for arguments, said in MISTAKES:
        arguments = [a if word == 'A' else str(word) for word in arguments]
        with pytest.raises(SystemExit) as caught:
            main.main(arguments)
        out, err = capsys.readouterr()
        assert caught.value.code == 2, arguments
        assert said in err and err.count('\n') == 1, (arguments, err)
        assert out == '', arguments
    assert not (tmp_path / '.runs').exists()


def test_a_failed_experiment_does_not_stop_the_others(tmp_path, make):
    a = make('a', body='raise RuntimeError("crashed")')
    c = make('c', body='sys.stdout.flush(); os._exit(3)')
    silent = make('silent')
    (pathlib.Path(silent) / 'main.py').write_text('raise SystemExit(1)')
    done = launch(tmp_path, '--only', a, c, silent, make('b'), '--logs', 'l')
    assert done.returncode == 1
    rows = [row.split() for row in done.stdout.split('\n\n')[-1].split('\n')]
    assert [row[0] for row in rows[1:5]] == ['a', 'c', 'silent', 'b']
    assert [row[3:5] for row in rows[1:5]
           ] == [['0', '-']] * 3 + [['1', '95.00']]
    assert 'a ended with 1' in done.stderr and 'crashed' in done.stderr
    assert 'c ended with 3' in done.stderr
    assert 'silent ended with 1, no log' in done.stderr


def test_a_log_without_a_mean_is_reported(tmp_path, make):
    done = launch(tmp_path, '--only', make('a', body='sys.exit(0)'))
    assert done.returncode == 0
    assert 'a has no final line' in done.stderr
    assert done.stdout.split('\n')[-2].split()[3:5] == ['0', '-']


@pytest.mark.parametrize('code', [2, 130])
def test_a_bad_value_or_an_interrupt_stops_the_rest(tmp_path, make, code):
    folders = make('a'), make('b', body=f'sys.exit({code})'), make('c')
    done = launch(tmp_path, '--only', *folders, '--logs', 'l')
    assert done.returncode == code
    assert sorted(os.listdir(tmp_path / 'l')) == ['a.txt', 'b.txt']
    assert '95.00' in done.stdout.split('\n\n')[-1]  # What there is.


SLEEP = 'print("step  1  mach 0"); time.sleep(60)'


def interrupt(tmp_path, *arguments, send):
    """Starts mach/main.py, waits for the line of a step, sends a signal."""
    process = subprocess.Popen(command(*arguments),
                               cwd=tmp_path,
                               stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE,
                               text=True,
                               start_new_session=True)
    try:
        for line in process.stdout:  # Seen at once, or this takes a minute.
            if line.startswith('step'):
                break
        start = time.monotonic()
        send(process.pid)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err, time.monotonic() - start
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def test_ctrl_c_stops_it_and_prints_what_there_is(tmp_path, make):
    folders = make('a'), make('b', body=SLEEP), make('c')
    code, out, err, seconds = interrupt(
        tmp_path,
        '--only',
        *folders,
        '--logs',
        'l',
        send=lambda pid: os.killpg(pid, signal.SIGINT))
    assert code == 130 and seconds < 9
    rows = [row.split() for row in out.strip().split('\n')[1:3]]
    assert [row[:1] + row[3:5] for row in rows] == [['a', '1', '95.00'],
                                                    ['b', '0', '-']]
    assert sorted(os.listdir(tmp_path / 'l')) == ['a.txt', 'b.txt']
    assert 'mach/main.py' not in err  # No traceback of ours.


def test_a_child_deaf_to_ctrl_c_is_killed(tmp_path, make, monkeypatch):
    # Given 10 s by default; a patched start gives it one.
    deaf = make('a',
                body='signal.signal(signal.SIGINT, signal.SIG_IGN)\n' +
                SLEEP.replace('mach 0', 'mach {os.getpid()}').replace(
                    'print("', 'print(f"'))
    start = (f'import sys; sys.path.insert(0, {str(MAIN.parents[1])!r}); '
             'from mach import main; main.STOP_SECONDS = 1; '
             'sys.exit(main.main(sys.argv[1:]))')
    monkeypatch.setitem(
        globals(), 'command',
        lambda *arguments: [sys.executable, '-c', start, *arguments])
    code, _, err, seconds = interrupt(
        tmp_path,
        '--only',
        deaf,
        '--logs',
        'l',
        send=lambda pid: os.killpg(pid, signal.SIGINT))
    assert code == 130 and .9 < seconds < 9 and 'killed' in err
    child = metrics.read_log(tmp_path / 'l/a.txt').steps[0]['mach']
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_child_does_not_outlive_a_killed_parent(tmp_path, make):
    pid = SLEEP.replace('mach 0', 'mach {os.getpid()}')
    code, *_ = interrupt(tmp_path,
                         '--only',
                         make('a', body=pid.replace('print("', 'print(f"')),
                         '--logs',
                         'l',
                         send=lambda pid: os.kill(pid, signal.SIGTERM))
    assert code == 143
    child = metrics.read_log(tmp_path / 'l/a.txt').steps[0]['mach']
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_an_orphan_that_holds_the_output_open_hangs_nothing(
        tmp_path, make, monkeypatch, capsys):
    body = ('import subprocess; subprocess.Popen([sys.executable, "-c", '
            '"import time; time.sleep(20)"])')
    monkeypatch.setattr(main, 'DRAIN_SECONDS', .5)
    start = time.monotonic()
    code = main.main(
        ['--only',
         make('a', body=body), '--logs',
         str(tmp_path / 'l')])
    assert code == 0 and time.monotonic() - start < 10
    out, err = capsys.readouterr()
    assert '95.00' in out and 'holds its output open' in err


def test_a_closed_stdout_stops_it(tmp_path, make):
    body = 'while True: print("step  1  mach 0"); time.sleep(.01)'
    process = subprocess.Popen(command('--only', make('a', body=body)),
                               cwd=tmp_path,
                               stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE,
                               text=True)
    process.stdout.readline()
    process.stdout.close()
    try:
        assert process.wait(20) == 1
        err = process.stderr.read()
        assert 'Traceback' not in err and 'a stopped: ' in err
    finally:
        process.kill()
        process.stderr.close()


def test_help_names_every_option(tmp_path):
    done = launch(tmp_path, '--help')
    assert done.returncode == 0
    for word in ('--only', '--logs', '--isolated', '--seeds', '--compare',
                 '--name value', '130', *main.EXPERIMENTS):
        assert word in done.stdout


def test_own_modules_shadow_nothing(tmp_path):
    # What `python mach/main.py` starts with, and has made of it afterwards.
    program = (f'import runpy, sys; sys.path[0] = {str(MAIN.parent)!r}; '
               f'runpy.run_path({str(MAIN)!r}, run_name="m"); '
               'print(*sys.path, sep="\\n")')
    done = subprocess.run([sys.executable, '-c', program],
                          cwd=tmp_path,
                          capture_output=True,
                          text=True,
                          timeout=20)
    path = done.stdout.splitlines()
    assert path[0] == str(MAIN.parents[1]), done.stderr
    assert str(MAIN.parent) not in path
