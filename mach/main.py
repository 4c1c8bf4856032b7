"""Runs the experiments one after the other and compares their results.

    python mach/main.py --steps 3000              all five, then the table
    python mach/main.py --only synchronous_kgraph --k 7 --isolated True
    python mach/main.py --seeds 0,1,2             mean and std over three seeds
    python mach/main.py --compare .runs/*/*.txt   the table of saved logs
    python mach/main.py --compare LOG... --plot a.svg --panels steps rate
    python mach/main.py --record k                the runs of a figure

Any other --name value is a hyperparameter. It goes to each chosen experiment
that has it. --plot also draws the logs of runs. --record keeps its logs in
.results/<figure>; when repeated, it runs only what is missing there. stdout
shows the logs of the experiments, then the table; all else goes to stderr. Exit
code: 0 done, 1 an experiment or stdout failed, 2 a bad option, 130 Ctrl-C, 129
SIGHUP, 143 SIGTERM. After a signal the running experiment ends with its results
so far.
"""

import argparse
import contextlib
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from mach import figures, groups, metrics, plot

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
        help='experiments, or folders with a main.py; default: all five')
    add('--seeds', type=numbers, help='a run per seed: 0,1,2')
    add('--isolated', choices=('True', 'False'), help='run again without edges')
    add('--logs',
        metavar='FOLDER',
        help='the folder of the logs; default: .runs/<date-time>')
    add('--record',
        choices=figures.FIGURES,
        help='run what is missing of a figure')
    add('--compare', nargs='+', metavar='LOG', help='print the table of logs')
    add('--plot', metavar='PICTURE', help='.png, .svg or .pdf; see plot.py')
    add('--panels',
        nargs='+',
        choices=plot.PANELS,
        help='what to draw; default: all that apply to the logs')
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
    fail(f'no experiment {name}; choose from {", ".join(figures.EXPERIMENTS)}, '
         'or a folder whose main.py has hyperparameters')


def read_words(words):
    """All options, path -> hyperparameters of the chosen experiments, and the
    hyperparameters that are given.
    """
    parser = make_parser()
    options, _ = parser.parse_known_args(words)
    only = options.only or figures.EXPERIMENTS
    if options.record and not options.only:
        only, _ = figures.FIGURES[options.record]
    chosen = {} if options.compare else dict(map(find, only))
    names = set().union(*chosen.values())
    for name in sorted(names):  # the order of words in the names of logs
        parser.add_argument(f'--{name}', f'--{name.replace("_", "-")}')
    found, unknown = parser.parse_known_args(words)
    if unknown:
        fail(metrics.explain(unknown[0], vars(found)))
    given = {
        key: value
        for key, value in vars(found).items()
        if key in names and value is not None
    }
    if options.record and given.get('dry_run') == 'True':
        fail('--record and --dry_run exclude each other')
    if 'seed' in given and options.seeds:
        fail('--seed and --seeds exclude each other')
    used = {k for k, v in vars(options).items() if v is not None}
    if options.compare and used - {'compare', 'plot', 'panels'}:
        fail('--compare takes logs, --plot, --panels and no other option')
    if options.panels and not options.plot:
        fail('--panels needs --plot')
    if options.plot is not None and plot.obstacle(options.plot):
        fail(f'--plot: {plot.obstacle(options.plot)}')
    return options, chosen, given


def plan(options, chosen, given):
    """Log -> command of every run, in order, if each experiment can run.

    The command is None if --record has the log already.

    Args:
        options, chosen, given: as from `read_words`.
    """
    jobs, checks = {}, {}
    # The process id keeps two folders of the same second apart.
    folder = time.strftime(f'.runs/%Y%m%d-%H%M%S-{os.getpid()}')
    if options.record:
        folder = ROOT / '.results' / options.record
    for path, name, run_values in figures.list_runs(options, chosen, given):
        # In a shared folder, runs would overwrite each other's files.
        for key in ('checkpoint', 'log_folder', 'tensorboard'):
            if run_values.get(key):
                run_values[key] += f'/{name}'
        log = pathlib.Path(options.logs or folder, f'{name}.txt').expanduser()
        if log in jobs:
            fail(f'{name} is asked for twice')
        if log.exists() and not options.record:
            fail(f'{log} must not exist yet; choose another --logs')
        jobs[log] = None
        if not is_complete(log):
            # Without a buffer, a line is shown when it is printed.
            jobs[log] = [sys.executable, '-u', str(path)]
            jobs[log] += [f'--{k}={v}' for k, v in run_values.items()]
            checks.setdefault((path.parent.name, run_values.get('k')),
                              jobs[log])
    # The first check may download the data, so they do not run at once.
    for (name, _), command in checks.items():
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
    path.unlink(missing_ok=True)  # a log that is not complete
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


def is_complete(path):
    """Whether a file is the log of a run that counts."""
    try:
        return not groups.flaw(metrics.read_log(path))
    except (OSError, ValueError):
        return False


def cell(logs, key, decimals=2):
    """'mean +- std' of a field; std is that of a sample (n - 1)."""
    values = [log.mean[key] for log in logs if key in log.mean]
    if not values:
        return '-'
    text = f'{statistics.fmean(values):.{decimals}f}'
    if len(values) > 1:
        text += f' +- {statistics.stdev(values):.{decimals}f}'
    return text


def compare(logs):
    """The table: a row per experiment, dataset, hyperparameters and SOURCE.

    A cell is mean +- std over the n runs that differ in `BOOKKEEPING` alone:
    accuracies in %, seconds of training. The column isolated shows the real
    accuracy of the runs with `connected False`. The last column names the
    settings in which the rows of an experiment differ. Runs that stopped early
    or have a failed MACH are left out with a warning on stderr. A second run of
    a seed counts, with a warning; so do several runs of uncommitted code.
    """
    for log in logs:
        if log.skipped:
            metrics.warn(f'{log.name}: {log.skipped} lines are no log lines')
        if groups.flaw(log):
            metrics.warn(f'{log.name}: {groups.flaw(log)}, left out')
    counted = [log for log in logs if not groups.flaw(log)]
    found = groups.group(counted, ['connected'])
    columns = 'connected', 'dataset', 'k'
    rows = [('experiment', 'dataset', 'k', 'n', 'real', 'synthetic', 'isolated',
             'seconds', 'differs in')]
    for same in found:
        experiment, seen = same[0].run.get('experiment'), set()
        for log in same:
            run = log.hparams.get('connected'), log.run.get('seed')
            if run in seen:
                metrics.warn(f'{log.name}: seed {run[-1]} counts again')
            seen.add(run)
        connected = [run for run in same if run.hparams.get('connected', True)]
        isolated = [run for run in same if run not in connected]
        runs = connected or isolated
        alone = cell(isolated, 'real')
        if isolated and len(isolated) != len(runs):
            alone += f' (n={len(isolated)})'
        row = [experiment, same[0].run.get('dataset')]
        row += [same[0].hparams.get('k', '-'), len(runs)]
        row += [cell(connected, 'real'), cell(connected, 'synthetic'), alone]
        row += [cell(runs, 'seconds', 1)]
        row += [groups.differs(same[0], found, columns)]
        commit = str(same[0].run.get('commit'))
        if commit.endswith('-dirty') and len(same) > 1:
            metrics.warn(
                f'{experiment}: {len(same)} runs of {commit} share a row, '
                'though their code may differ')
        rows.append([str(cell) for cell in row])
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(words):
    """Does what the command line says; returns the exit code.

    Raises:
        OSError: stdout is full or closed; the running experiment is stopped.
    """
    if sys.stdout is None:  # after `>&-`
        raise OSError('stdout is closed')
    options, chosen, given = read_words(words)
    jobs, status, paths = plan(options, chosen, given), 0, options.compare or []
    for path, command in jobs.items():
        code = run(path, command) if command else 0
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
    table = compare(logs)
    if '\n' in table:  # there are rows below its head
        print('\n' * bool(jobs) + table, flush=True)
    if options.plot:
        counted = [log for log in logs if not groups.flaw(log)]
        try:
            plot.draw(options.plot, counted, options.panels)
        except (ValueError, OSError) as error:
            say(f'--plot: {error}')
            status = status or 2
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
