"""Runs the experiments one after the other and compares their results.

    python mach/main.py --steps 3000              all five, then the table
    python mach/main.py --only synchronous_kgraph --k 7 --isolated True
    python mach/main.py --seeds 0,1,2             mean and std over three seeds
    python mach/main.py --compare .runs/*/*.txt   the table of saved logs

Any other --name value is a hyperparameter. It goes to each chosen experiment
that has it. stdout shows the logs of the experiments, then the table; all else
goes to stderr. Exit code: 0 done, 1 an experiment or stdout failed, 2 a bad
option, 130 Ctrl-C, 129 SIGHUP, 143 SIGTERM. After a signal the running
experiment ends with its results so far.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from mach import compare, metrics

EXPERIMENTS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph', 'asynchronous_sequence',
               'asynchronous_kgraph')
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
STOP_SECONDS = 20  # An experiment may take this long to end after a signal.


def say(message):
    """Prints a line on stderr at once."""
    metrics.warn(f'mach: {message}')


def stop(number, _):
    """Handles a signal like Ctrl-C, with its number as the argument."""
    raise KeyboardInterrupt(number)


def fail(message):
    """Reports a mistake on the command line and exits with status 2."""
    say(message)
    sys.exit(2)


def numbers(text):
    """[0, 1, 2] of '0,1,2'."""
    return [int(number) for number in text.split(',')]


def make_parser():
    """The parser of the options that are no hyperparameters."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add('--only',
        nargs='+',
        metavar='NAME',
        default=EXPERIMENTS,
        help='experiments, or folders with a main.py; default: all five')
    add('--seeds', type=numbers, default=[None], help='a run per seed: 0,1,2')
    add('--isolated', choices=('True', 'False'), help='run again without edges')
    # The process id keeps two folders of the same second apart.
    add('--logs',
        metavar='FOLDER',
        default=time.strftime(f'.runs/%Y%m%d-%H%M%S-{os.getpid()}'),
        help='the folder of the logs; default: .runs/<date-time>')
    add('--compare', nargs='+', metavar='LOG', help='print the table of logs')
    return parser


def find(name):
    """The main.py of an experiment and the names of its hyperparameters.

    The file is read, not imported: five modules named `model` would collide.

    Args:
        name: a folder in the root, or any path.
    """
    for folder in ROOT / name, pathlib.Path(name).resolve():
        path = folder / 'main.py'
        text = path.read_text(encoding='utf-8') if path.is_file() else ''
        names = re.findall(r'^ +(\w+): \w+ = hparam\(', text, re.M)
        if names:
            return path, names
    fail(f'no experiment {name}; choose from {", ".join(EXPERIMENTS)}, '
         'or a folder whose main.py has hyperparameters')


def read_words(words):
    """All options, and path -> hyperparameters of the chosen experiments."""
    parser = make_parser()
    options, _ = parser.parse_known_args(words)
    chosen = {} if options.compare else dict(map(find, options.only))
    for name in set().union(*chosen.values()):
        parser.add_argument(f'--{name}', f'--{name.replace("_", "-")}')
    options, unknown = parser.parse_known_args(words)
    if unknown:
        fail(metrics.explain(unknown[0], vars(options)))
    if getattr(options, 'seed', None) and options.seeds != [None]:
        fail('--seed and --seeds exclude each other')
    if options.compare and len(words) > 1 + len(options.compare):
        fail('--compare takes logs and no other option')
    return options, chosen


def plan(options, chosen):
    """Log -> command of every run, in order, if each experiment can run.

    Args:
        options: all options; an absent hyperparameter is None.
        chosen: path -> hyperparameters of the chosen experiments.
    """
    jobs, checks = {}, {}
    for path, names in chosen.items():
        repeat = options.isolated == 'True' and 'connected' in names
        for seed, isolated in itertools.product(options.seeds,
                                                range(1 + repeat)):
            name = path.parent.name
            values = {key: getattr(options, key) for key in names}
            if seed is not None:
                name += f'.seed{seed}'
                values['seed'] = seed
            if isolated:
                name += '.isolated'
                values['connected'] = False
            # In a shared folder, runs would overwrite each other's files.
            for key in ('checkpoint', 'log_folder'):
                if values.get(key):
                    values[key] += f'/{name}'
            log = pathlib.Path(options.logs, f'{name}.txt')
            if log in jobs:
                fail(f'{name} is asked for twice')
            if log.exists():
                fail(f'{log} must not exist yet; choose another --logs')
            # Without a buffer, a line is shown when it is printed.
            jobs[log] = [sys.executable, '-u', str(path)]
            jobs[log] += [
                f'--{k}={v}' for k, v in values.items() if v is not None
            ]
            checks.setdefault(path.parent.name, jobs[log])
    # The first check may download the data, so they do not run at once.
    for name, command in checks.items():
        if subprocess.run([*command, '--dry_run=True'],
                          stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL,
                          check=False).returncode:
            fail(f'{name} cannot run, so nothing was run')
    try:
        for log in jobs:
            log.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(error)
    return jobs


def follow(process, log):
    """Copies a log to stdout until its process ends; returns the exit code.

    The copy comes from the file: a pipe stays open as long as a grandchild
    lives.
    """
    code = None
    while code is None:
        time.sleep(0.05)
        # The process has ended before the last read, so nothing is missed.
        code = process.poll()
        sys.stdout.buffer.write(log.read())
        sys.stdout.buffer.flush()
    return code


def run(path, command):
    """Runs one experiment with its log at `path`.

    After a signal, or if stdout fails, the experiment gets a signal too. It
    then has STOP_SECONDS to write its results. A second signal kills it.

    Returns:
        Its exit code; 128 + the number of a signal.
    """
    say(f'{path.stem} -> {path}')
    with open(path, 'xb') as to, open(path, 'rb') as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=to)
        try:
            return follow(process, log)
        except (KeyboardInterrupt, OSError) as error:
            number = signal.SIGTERM
            if isinstance(error, KeyboardInterrupt):
                number = error.args[0] if error.args else signal.SIGINT
            process.send_signal(number)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                say(f'{path.stem} does not stop, killed')
                process.kill()
            if isinstance(error, OSError):
                raise
            with contextlib.suppress(OSError):
                follow(process, log)
            return 128 + number
        finally:
            process.kill()
            process.wait()


def main(words):
    """Does what the command line says; returns the exit code.

    Raises:
        OSError: stdout is full or closed; the running experiment is stopped.
    """
    if sys.stdout is None:  # after `>&-`
        raise OSError('stdout is closed')
    options, chosen = read_words(words)
    jobs, status, paths = plan(options, chosen), 0, options.compare or []
    for path, command in jobs.items():
        code = run(path, command)
        paths.append(path)
        if code:
            say(f'{path.stem} ended with {code}')
            ended = code == 2 or code - 128 in SIGNALS
            status = code if ended else 1
            if ended:
                break
    logs = []
    for path in paths:
        try:
            logs.append(metrics.read_log(path))
        except ValueError as error:
            say(f'{error}, left out')
            status = status or int(bool(jobs))
        except OSError as error:
            fail(error)
    if options.compare and not logs:
        fail('--compare: no log is left')
    table = compare.compare(logs)
    if '\n' in table:  # there are rows below its head
        print('\n' * bool(jobs) + table, flush=True)
    return status


if __name__ == '__main__':
    for one in SIGNALS:
        if signal.getsignal(one) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(one, stop)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + interrupt.args[0])
    except OSError as stdout_failed:
        say(f'stopped: {stdout_failed}')
        os._exit(1)  # sys.exit would flush stdout, which fails again
