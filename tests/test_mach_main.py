"""mach/main.py, on experiments that only print a log."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import pytest

from mach import main, metrics

MAIN = pathlib.Path(main.__file__).resolve()

# An experiment that prints a log of the documented form, without training.
FAKE = '''
import dataclasses, os, signal, subprocess, sys, time
def hparam(default, *_):
  return default
@dataclasses.dataclass
class Hyperparameters:
  """One of two classes; this one's fields count."""
  FIELDS
  note = 'not annotated, no hyperparameter'
class Other:
  hidden: int = 1
p = dict(seed='0', k='5', connected='True', dry_run='False')
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
  print('final  mach', mach, f' synthetic {real - 1}  real {real}  seconds 1.5')
'''


@pytest.fixture
def make(tmp_path):
    """Writes an experiment and returns its folder."""

    def write(name, fields='seed: int = hparam(0); k: int = 5', body=''):
        folder = tmp_path / name
        folder.mkdir()
        text = FAKE.replace('FIELDS', fields).replace('BODY', body)
        (folder / 'main.py').write_text(text)
        return str(folder)

    return write


def command(*arguments):
    return [sys.executable, str(MAIN), *map(str, arguments)]


@pytest.fixture(autouse=True)
def buffered(monkeypatch):
    """As by default; else what is not flushed would be shown all the same."""
    monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)


def launch(tmp_path, *arguments):
    """Runs mach/main.py elsewhere than in its repository."""
    return subprocess.run(command(*arguments),
                          cwd=tmp_path,
                          capture_output=True,
                          text=True,
                          timeout=60)


def cells(text):
    """The rows of the table at the end of a stdout, without its header."""
    return [
        re.split(r'\s{2,}', row)
        for row in text.split('\n\n')[-1].strip().split('\n')[1:]
    ]


def test_runs_in_order_saves_and_compares(tmp_path, make):
    b, a = make('b'), make('a', 'lr: float = 1; log_every: int = 1')
    done = launch(tmp_path, '--only', b, a, '--k', '7', '--lr=-1e-3', '--logs',
                  'x/y', '--log-every', '2')
    assert done.returncode == 0, done.stderr
    log, text = done.stdout.split('\n\n')
    paths = [tmp_path / 'x/y/b.txt', tmp_path / 'x/y/a.txt']
    saved = [path.read_text() for path in paths]
    assert ''.join(saved) == log + '\n'
    hparams = [metrics.parse_log(text).hparams for text in saved]
    assert hparams[0]['k'] == 7 and 'lr' not in hparams[0]
    assert hparams[1]['lr'] == -.001 and hparams[1]['log_every'] == 2
    assert [row[:5] for row in cells(done.stdout)
           ] == [['b', 'MNIST', '7', '1', '97.00'],
                 ['a', 'MNIST', '5', '1', '95.00']]
    for name in 'ba':
        assert os.path.join('x', 'y', f'{name}.txt') in done.stderr
        assert f'progress of {name}' in done.stderr
    again = launch(tmp_path, '--only', b, '--logs', 'x/y')
    assert again.returncode == 2 and 'b.txt exists' in again.stderr
    assert paths[0].read_text() == saved[0]
    compared = launch(tmp_path, '--compare', *paths)
    assert (compared.returncode, compared.stdout) == (0, text)


def test_two_started_at_once_have_logs_of_their_own(tmp_path, make):
    arguments = command('--only', make('a'))
    both = [subprocess.Popen(arguments, cwd=tmp_path) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(list(tmp_path.glob('.runs/*/a.txt'))) == 2


def test_seeds_and_isolated(tmp_path, make):
    a = make('a', 'seed: int = 0; connected: bool = True')
    done = launch(tmp_path, '--only', a, make('b', 'k: int = 5'), '--logs', 'l',
                  '--seeds', '3,1', '--isolated', 'True')
    assert done.returncode == 0, done.stderr
    names = ['a.seed3', 'a.seed3.isolated', 'a.seed1', 'a.seed1.isolated', 'b']
    assert re.findall(r'l/(\S+)\.txt', done.stderr) == names
    assert sorted(os.listdir(tmp_path / 'l')) == sorted(
        f'{name}.txt' for name in names)
    assert [row[3:7] for row in cells(done.stdout)
           ] == [['2', '97.00 +- 1.41', '96.00 +- 1.41', '96.00 +- 1.41'],
                 ['1', '95.00', '94.00', '-']]


def test_each_run_has_checkpoints_of_its_own(tmp_path, make):
    a = make('a', 'seed: int = 0; checkpoint: str = 0')
    done = launch(tmp_path, '--only', a, make('b'), '--seeds', '3,1',
                  '--checkpoint', 'c')
    assert done.returncode == 0, done.stderr
    assert re.findall(r'checkpoint (\S+)',
                      done.stdout) == ['c/a.seed3', 'c/a.seed1']


MISTAKES = [
    (['--only', 'A', '--steps', '5'], '--steps; closest: --seed'),
    (['--only', 'A', '--hidden', '5'], '--hidden'),
    (['--only', 'A', '--note', '5'], '--note'),
    (['--only', 'A', '--log', 'x'], 'closest: --logs'),
    (['--only', 'A', '--k'], '--k needs a value'),
    (['--only', 'A', '--k', '--seed', '1'], '--k needs a value'),
    (['--only', 'A', '-k', '5'], "'-k'"),
    (['--only', 'nowhere'], 'nowhere; choose from synchronous_single'),
    (['--only', MAIN.parent], 'choose from'),
    (['--only', 'A', 'other/A'], 'choose another'),
    (['--only', 'A', '--seeds', '0,x'], '--seeds 0,x'),
    (['--only', 'A', '--seeds', '0,0'], '--seeds 0,0'),
    (['--only', 'A', '--seeds', '0', '--seed', '1'], '--seed is given'),
    (['--only', 'A', '--isolated', 'yes'], '--isolated'),
    (['--only', 'A', '--isolated', 'True'], '--connected'),
    (['--only', 'A', '--logs', 'file'], '--logs'),
    (['--only', 'broken'], 'main.py'),
    (['--compare', 'nowhere.txt'], 'nowhere.txt'),
    (['--compare', 'good.txt', 'nowhere.txt'], 'nowhere.txt'),
    (['--compare', 'good.txt', '--k', '5'], '--compare'),
    (['--compare', 'good.txt', '--logs', 'x'], '--compare'),
]


def test_mistakes_end_it_before_anything_runs(tmp_path, make, monkeypatch,
                                              capsys):
    # In this process: twenty starts of an interpreter would take seconds.
    a = make('A')
    (tmp_path / 'other').mkdir()
    make('other/A')
    (pathlib.Path(make('broken')) / 'main.py').write_text('def (')
    (tmp_path / 'file').write_text('not a log\n')
    (tmp_path / 'good.txt').write_text('run  experiment x  dataset y\n')
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


def test_compare_leaves_out_what_is_no_log(tmp_path):
    names = 'notes', 'good', 'empty'
    good = 'run  experiment x  dataset y\nfinal  mach mean  real 90.00\n'
    for name, text in zip(names, ('## latency\n', good, '')):
        (tmp_path / name).write_text(text)
    done = launch(tmp_path, '--compare', *names)
    assert done.returncode == 0 and cells(done.stdout)[0][:2] == ['x', 'y']
    assert re.findall(r'(\w+):1: .*left out', done.stderr) == ['notes', 'empty']
    done = launch(tmp_path, '--compare', 'notes', 'empty')
    assert done.returncode == 2 and done.stdout == ''


DRY = 'k: int = 5; seed: int = 0; connected: bool = 1; dry_run: bool = False'
# Says what it was asked to try, and refuses too large a k.
DRY_BODY = '''
if p['dry_run'] == 'True':
  print('checked', *sys.argv[1:], file=sys.stderr)
  sys.exit(2 * (int(p['k']) > 9) or 0)
'''


def test_all_are_checked_before_the_first_runs(tmp_path, make):
    folders = make('a'), make('b', DRY, DRY_BODY)
    done = launch(tmp_path, '--only', *folders, '--k', '11', '--logs', 'l')
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.endswith('mach: b cannot run, so nothing was run\n')
    assert 'checked --k=11' in done.stderr and not (tmp_path / 'l').exists()
    done = launch(tmp_path, '--only', *folders, '--k', '9', '--seeds', '1,2',
                  '--isolated', 'True', '--logs', 'l')
    assert done.returncode == 0, done.stderr
    assert len(os.listdir(tmp_path / 'l')) == 6
    checked = re.findall('checked (.*)', done.stderr)
    assert ['connected' in words for words in checked] == [False, True]
    assert len(re.findall('^run', done.stdout, re.M)) == 6  # none of a check


def test_a_failed_experiment_does_not_stop_the_others(tmp_path, make):
    folders = [
        make('a', body='raise RuntimeError("crashed")'),
        make('c', body='os._exit(3)'),
        make('quiet', body='sys.exit(0)'),
        make('silent'),
        make('b')
    ]
    (tmp_path / 'silent/main.py').write_text('raise SystemExit(1)')
    done = launch(tmp_path, '--only', *folders, '--logs', 'l')
    assert done.returncode == 1
    assert [row[0] for row in cells(done.stdout)] == ['b']
    for said in ('a ended with 1', 'crashed', 'c ended with 3',
                 'silent ended with 1', 'silent.txt:1: ', 'a.txt: no final'):
        assert said in done.stderr
    assert 'quiet.txt: no final' in done.stderr
    assert 'quiet ended' not in done.stderr


@pytest.mark.parametrize('code', [2, 130])
def test_a_bad_value_or_an_interrupt_stops_the_rest(tmp_path, make, code):
    folders = make('a'), make('b', body=f'sys.exit({code})'), make('c')
    done = launch(tmp_path, '--only', *folders, '--logs', 'l')
    assert done.returncode == code
    assert sorted(os.listdir(tmp_path / 'l')) == ['a.txt', 'b.txt']
    assert cells(done.stdout)[0][0] == 'a'  # what there is


SLEEP = 'print(f"step  1  mach {os.getpid()}"); time.sleep(60)'


def start(tmp_path, *arguments, program=()):
    """Starts mach/main.py, waits for the line of a step: it, the child's id."""
    process = subprocess.Popen([*program] or command(*arguments),
                               cwd=tmp_path,
                               stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE,
                               text=True,
                               start_new_session=True)
    for line in process.stdout:  # seen at once, or this takes a minute
        if line.startswith('step'):
            return process, int(line.split()[-1])
    raise AssertionError(process.stderr.read())


def end(process):
    """Its exit code, stderr and stdout; kills what is left."""
    try:
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def gone(child):
    """Whether the process has ended."""
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        return True
    return False


def test_ctrl_c_stops_it_and_prints_what_there_is(tmp_path, make):
    body = 'try: ' + SLEEP + '\nexcept KeyboardInterrupt: print("step  2")'
    folders = make('a'), make('b', body=body), make('c')
    process, child = start(tmp_path, '--only', *folders, '--logs', 'l')
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = end(process)
    assert code == 130 and gone(child)
    # What an experiment says at its end is not lost.
    assert len(metrics.read_log(tmp_path / 'l/b.txt').finals) == 2
    assert 'step  2' in out and [row[0] for row in cells(out)] == ['a', 'b']
    assert sorted(os.listdir(tmp_path / 'l')) == ['a.txt', 'b.txt']
    assert 'Traceback' not in err


def test_a_child_deaf_to_ctrl_c_is_killed(tmp_path, make):
    # Given 10 s by default; here less.
    program = (f'import sys; sys.path.insert(0, {str(MAIN.parents[1])!r}); '
               'from mach import main; main.STOP_SECONDS = .5; '
               'sys.exit(main.main(sys.argv[1:]))')
    deaf = make('a', body=f'signal.signal(2, signal.SIG_IGN)\n{SLEEP}')
    process, child = start(
        tmp_path,
        program=[sys.executable, '-c', program, '--only', deaf, '--logs', 'l'])
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = end(process)
    assert code == 130 and gone(child) and 'does not stop, killed' in err


def test_a_child_does_not_outlive_a_killed_parent(tmp_path, make):
    process, child = start(tmp_path, '--only', make('a', body=SLEEP))
    process.terminate()
    assert end(process)[0] == 143 and gone(child)


def test_the_last_line_before_the_end_is_shown(tmp_path, capsys):
    with open(tmp_path / 'log', 'wb') as to, open(tmp_path / 'log',
                                                  'rb') as log:

        def poll():
            to.write(b'last\n')
            to.flush()
            return 3

        process = types.SimpleNamespace(poll=poll)
        assert main.follow(process, log, float('inf')) == 3
    assert capsys.readouterr().out == 'last\n'


def test_an_orphan_that_holds_the_output_open_hangs_nothing(tmp_path, make):
    body = ('print("step  1  mach", subprocess.Popen([sys.executable, "-c", '
            '"import time; time.sleep(60)"]).pid)')
    process, orphan = start(tmp_path, '--only', make('a', body=body))
    try:
        assert process.wait(20) == 0 and not gone(orphan)
        assert '95.00' in process.stdout.read(4096)
    finally:
        os.kill(orphan, signal.SIGKILL)
        end(process)


FOREVER = 'while True: print("step  1  mach", os.getpid()); time.sleep(.01)'


def test_a_broken_stdout_stops_it(tmp_path, make):
    process, child = start(tmp_path, '--only', make('a', body=FOREVER))
    process.stdout.close()  # as of `| head -3`
    assert process.wait(20) == 1 and gone(child)
    err = process.stderr.read()
    process.stderr.close()
    assert re.fullmatch(
        r'mach: a -> \S+\nprogress of a\nmach: stopped: .*pipe\n', err)


@pytest.mark.parametrize('to, said', [('>/dev/full', 'No space'),
                                      ('>&-', 'stdout is closed')])
@pytest.mark.parametrize('compare', [False, True])
def test_a_full_or_closed_stdout_is_named(tmp_path, make, to, said, compare):
    log = tmp_path / 'log.txt'
    log.write_text('run  experiment x  dataset y\nfinal  mach mean  real 90\n')
    arguments = ['--compare', log]
    if not compare:
        arguments = ['--only', make('a', body=FOREVER)]
    done = subprocess.run(['sh', '-c', f'exec "$@" {to}', 'sh'] +
                          command(*arguments),
                          cwd=tmp_path,
                          stderr=subprocess.PIPE,
                          text=True,
                          timeout=60)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert re.search(f'mach: stopped: .*{said}', done.stderr.split('\n')[-2])


def test_help_names_every_option(tmp_path):
    done = launch(tmp_path, '--help')
    assert done.returncode == 0
    for word in ('--only', '--logs', '--isolated', '--seeds', '--compare',
                 '--name value', '130'):
        assert word in done.stdout
