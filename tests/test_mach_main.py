"""mach/main.py, on experiments that only print a log."""

import dataclasses
import gzip
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

import conftest
from mach import main

MAIN = str(conftest.ROOT / 'mach' / 'main.py')
# An experiment that prints a log without training. It refuses a seed above 9.
FAKE = '''
import os, signal, subprocess, sys, time
hparam = print
print('import', file=sys.stderr)
class Hyperparameters:
  k: int = hparam(end='')
  seed: int = hparam(end='')
  connected: bool = hparam(end='')
  checkpoint: str = hparam(end='')
  tensorboard: str = hparam(end='')
  log_every: float = hparam(end='')
  dry_run: bool = hparam(end='')
  note: str = 'no hyperparameter'
def main(words):
  p = dict(k='5', seed='0', connected='True')
  p |= (word[2:].split('=') for word in words)
  name = os.path.basename(os.path.dirname(os.path.abspath(__file__)))
  print(f'progress of {name}', *words, file=sys.stderr)
  if 'dry_run' in p:
    sys.exit(2 if int(p['seed']) > 9 else 0)
  print('run  experiment', name, ' seed', p['seed'])
  print('hparams ', '  '.join(f'{key} {value}' for key, value in p.items()))
  BODY
  real = 90 + int(p['k']) + int(p['seed']) - (p['connected'] == 'False')
  for mach in 0, 'mean':
    print(f'final  mach {mach}  real {real}  synthetic {real - 1}  seconds 1.5')
if __name__ == '__main__':
  main(sys.argv[1:])
'''
# Both end before long even if a test fails.
SLEEP = 'print(f"step  1  mach {os.getpid()}"); time.sleep(20)'
PRINT = 'for _ in range(99): print("step  1  pid", os.getpid()); time.sleep(.1)'


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, with buffered output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)


def make(name, body='', lacks='nothing'):
    """Writes an experiment that lacks a hyperparameter; returns its name."""
    pathlib.Path(name).mkdir(parents=True)
    text = FAKE.replace('BODY', body.replace('\n', '\n  '))
    text = text.replace(f'{lacks}:', '#')
    pathlib.Path(name, 'main.py').write_text(text)
    return name


def launch(*words, stdout=subprocess.PIPE):
    """Runs mach/main.py; its exit code, stdout and stderr."""
    done = subprocess.run([sys.executable, MAIN, *words],
                          stdout=stdout,
                          stderr=subprocess.PIPE,
                          check=False,
                          text=True,
                          timeout=60)
    return done.returncode, done.stdout, done.stderr


def table(out):
    """The rows of the table at the end of a stdout, without its header."""
    rows = out.split('\n\n')[-1].strip().split('\n')[1:]
    return [re.split(r'\s{2,}', row) for row in rows]


def disturb(body, act):
    """Runs two experiments and calls `act` after a step line of the first.

    Returns:
        The exit code, the rest of stdout, and stderr.
    """
    words = ['--logs', 'l', '--only', make('a', body), make('after')]
    process = subprocess.Popen([sys.executable, MAIN, *words],
                               stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE,
                               text=True,
                               start_new_session=True)
    steps = (line for line in process.stdout if line.startswith('step'))
    child = int(next(steps).split()[-1])
    act(process)
    out, err = process.communicate(timeout=15)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)  # The experiment has ended.
    return process.returncode, out, err


def test_hyperparameters_are_found_in_the_text():
    for name in main.EXPERIMENTS:
        settings = conftest.load_main(name).Hyperparameters
        names = [field.name for field in dataclasses.fields(settings)]
        assert main.find(name) == (conftest.ROOT / name / 'main.py', names)


def test_runs_in_order_saves_and_compares(tmp_path):
    words = '--k 7 --log-every=-1e-3 --logs l/m --only'.split()
    words += [make('x/b'), make('a', lacks='k')]
    code, out, err = launch(*words)
    assert code == 0, err
    text, rows = out.split('\n\n')
    logs = ['l/m/b.txt', 'l/m/a.txt']
    assert ''.join((tmp_path / log).read_text() for log in logs) == text + '\n'
    assert re.findall('hparams  k (.)', text) == ['7', '5']
    assert text.count('log_every -1e-3') == 2
    assert [row[4] for row in table(out)] == ['97.00', '95.00']
    assert 'l/m/b.txt' in err and 'progress of b' in err
    code, _, err = launch(*words)
    assert code == 2 and 'l/m/b.txt must not exist' in err
    (tmp_path / 'gz').write_bytes(gzip.compress(b'notes'))
    code, out, err = launch('--compare', 'gz', 'l', 'nowhere', *logs)
    assert (code, out) == (0, rows)
    named = re.findall('mach: .*(gz|l|nowhere)\\b.*, left out', err)
    assert named == ['gz', 'l', 'nowhere']


def test_a_figure_runs_what_is_missing_alone(tmp_path):
    words = '--record k --k 3 --seeds 1,2 --logs l --only'.split() + [make('a')]
    _, out, err = launch(*words)
    runs = 'k_3.seed1 isolated.k_3.seed1 k_3.seed2 isolated.k_3.seed2'.split()
    assert re.findall(r'-> l/a\.(\S+)\.txt', err) == runs
    (tmp_path / 'l/a.k_3.seed2.txt').write_text('run  experiment a  seed 2\n')
    _, again, err = launch(*words)
    assert re.findall(r'-> l/a\.(\S+)\.txt', err) == ['k_3.seed2']
    assert table(again) == table(out)
    _, _, err = launch(*words, '--connected', 'False')
    assert '-> l/' not in err  # there already


@pytest.mark.parametrize('figure', main.FIGURES)
def test_figures_consist_of_hyperparameters_that_exist(figure):
    _, chosen, given = main.read_words(['--record', figure])
    assert set(given) <= set().union(*chosen.values())


def test_seeds_and_isolated_have_files_of_their_own():
    names = make('a'), make('b', lacks='connected')
    words = '--seeds 3,1 --isolated True --checkpoint c --tensorboard t'.split()
    code, out, err = launch(*words, '--logs', 'l', '--only', *names)
    runs = ('a.seed3 a.isolated.seed3 a.seed1 a.isolated.seed1 b.seed3 '
            'b.seed1').split()
    assert re.findall(r'-> l/(\S+)\.txt', err) == runs
    assert re.findall(r'checkpoint c/(\S+)', out) == runs
    assert re.findall(r'tensorboard t/(\S+)', out) == runs
    checks = ['import', *['of a'] * 4, 'import', *['of b'] * 2]
    assert re.findall('import|of .', err.split('->')[0]) == checks
    assert [row[3:7] for row in table(out)
           ] == [['2', '97.00 +- 1.41', '96.00 +- 1.41', '96.00 +- 1.41'],
                 ['2', '97.00 +- 1.41', '96.00 +- 1.41', '-']]


@pytest.mark.parametrize('words, said', [
    ('--only a --see 5', 'no option --see; the closest is --seed'),
    ('--only a --note 5', 'no option --note; --help'),
    ('--only a --seed 1 --seeds 1,2', '--seed and --seeds'),
    ('--compare bad.txt --seeds 1', '--compare takes'),
    ('--only a --seeds 0,11', 'a cannot run'),
    ('--only nowhere', 'nowhere; choose from synchronous_single'),
    ('--only mach', 'no experiment mach'),
    ('--only a other/a', 'a is asked for twice'),
    ('--only a --seeds 0,x', '--seeds'),
    ('--only a --seeds 0,0', 'a.seed0 is asked for twice'),
    ('--only a --logs bad.txt', 'bad.txt'),
    ('--compare bad.txt nowhere.txt', 'nowhere.txt'),
    ('--compare bad.txt failed.txt', 'no log is left'),
    ('--compare bad.txt --k 5', '--k'),
])
def test_a_mistake_ends_it_before_anything_runs(tmp_path, monkeypatch, capsys,
                                                words, said):
    make('a'), make('other/a')
    (tmp_path / 'bad.txt').write_text('no log\n')
    failed = 'run  experiment a\nfinal  mach mean  seconds nan\n'
    (tmp_path / 'failed.txt').write_text(failed)
    monkeypatch.setattr(main, 'run', lambda *job: pytest.fail(f'ran {job}'))
    with pytest.raises(SystemExit) as caught:
        main.main(words.split())
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == '' and 'usage' not in err
    assert said in err and not (tmp_path / '.runs').exists()


@pytest.mark.parametrize('name', ['asynchronous_kgraph', 'tests/averaging'])
def test_values_are_checked_with_data_that_are_loaded_once(
        monkeypatch, capfd, name):
    for pair in conftest.ENVIRONMENT.items():  # no network
        monkeypatch.setenv(*pair)
    words = f'--only {name} --data . --learning_rate 0.003,0.001,abc'
    with pytest.raises(SystemExit):
        main.main(words.split())
    err = capfd.readouterr().err
    assert err.count('cannot get MNIST') == 1
    assert re.search(f'{pathlib.Path(name).name}: --learning_rate: .*abc', err)


@pytest.mark.parametrize('code, status, shown', [(3, 1, 'ac'), (0, 0, 'ac'),
                                                 (2, 2, 'a'), (130, 130, 'a')])
def test_a_bad_value_or_an_interrupt_stops_the_rest(code, status, shown):
    names = make('a'), make('b', f'sys.exit({code})'), make('c')
    ended, out, err = launch('--only', *names)
    assert ended == status and ''.join(row[0] for row in table(out)) == shown
    assert f'b ended with {code}' in err or not code
    assert 'b.txt: no final' in err and ('c.txt' in err) == ('c' in shown)


def test_ctrl_c_stops_it_and_prints_what_there_is():
    # mach/main.py passes the signal on, so it may come twice.
    body = ('def end(*_):\n signal.signal(2, signal.SIG_IGN)\n'
            f' raise KeyboardInterrupt\nsignal.signal(2, end)\ntry: {SLEEP}\n'
            'except KeyboardInterrupt: print("step  2  mach 0")')
    code, out, err = disturb(body, lambda p: os.killpg(p.pid, signal.SIGINT))
    assert 'step  2' in out and [row[0] for row in table(out)] == ['a']
    assert code == 130 and os.listdir('l') == ['a.txt'] and 'Trace' not in err


def test_an_experiment_that_ignores_ctrl_c_is_killed(monkeypatch, tmp_path,
                                                     capsys):
    monkeypatch.setattr(main, 'STOP_SECONDS', .2)
    text = ('import os, signal, time; signal.signal(2, signal.SIG_IGN); '
            'os.kill(os.getppid(), 2); time.sleep(60)')
    assert main.run(tmp_path / 'log', [sys.executable, '-c', text]) == 130
    assert 'log does not stop, killed' in capsys.readouterr().err


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_it_too(number):
    body = ('signal.signal(NUMBER, lambda *_: sys.exit(print("step  2  mach 0"'
            f'))); {SLEEP}').replace('NUMBER', str(int(number)))
    code, out, err = disturb(body, lambda p: p.send_signal(number))
    assert code == 128 + number and 'step  2' in out and 'Trace' not in err


def test_a_closed_pipe_stops_it():
    code, _, err = disturb(PRINT, lambda process: process.stdout.close())
    assert code == 1 and 'Traceback' not in err
    assert re.search('mach: stopped: .*pipe\n$', err)


def test_a_grandchild_that_keeps_the_output_open_is_not_waited_for():
    body = ('print("step  1  mach", os.getpid()); subprocess.Popen(["sleep", '
            '"20"], stderr=subprocess.DEVNULL)')
    assert disturb(body, lambda process: None)[0] == 0


@pytest.mark.parametrize('option', ['--only', '--compare'])
def test_a_full_stdout_is_named(tmp_path, option):
    (tmp_path / 'log').write_text('run  a b\nfinal  mach mean  real 90\n')
    name = 'log' if option == '--compare' else make('a', PRINT)
    with open('/dev/full', 'wb') as full:
        code, _, err = launch(option, name, stdout=full)
    assert code == 1 and 'Traceback' not in err
    assert re.search('mach: stopped: .*No space.*\n$', err)
