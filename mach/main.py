"""Runs the experiments one after the other and compares their results.

    python mach/main.py --steps 3000              all five, then the table
    python mach/main.py --only synchronous_kgraph --k 7 --isolated True
    python mach/main.py --seeds 0,1,2             mean and std over three seeds
    python mach/main.py --k 5,10 --only asynchronous_kgraph       a run for each
    python mach/main.py --compare .runs/*/*.txt   the table of saved logs
    python mach/main.py --compare LOG... --plot a.svg --panels steps rate
    python mach/main.py --record k                the runs of a figure

Any other --name value is a hyperparameter. It goes to each chosen experiment
that has it. --plot also draws the logs of runs. --record keeps its logs in
.results/<figure>; when repeated, it runs only what is missing there. stdout
shows the logs of the experiments, then the table; all else goes to stderr. Exit
code: 0 done, 1 an experiment or stdout failed, 2 a bad option or no log counts,
130 Ctrl-C, 129 SIGHUP, 143 SIGTERM. After a signal the running experiment ends
with its results so far.
"""

import argparse
import contextlib
import itertools
import json
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
from mach import metrics, plot

EXPERIMENTS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph', 'asynchronous_sequence',
               'asynchronous_kgraph')
# The runs of each --record. READMEs may show more seeds. A later word overrides
# an earlier one. An experiment ignores hyperparameters that it lacks.
RIVALS = ('--only asynchronous_kgraph tests/averaging --isolated True '
          '--seeds 0,1,2,3,4')
LATE = ('--only asynchronous_sequence asynchronous_kgraph --seeds 0,1,2 '
        '--latency 0,0.01,0.1,1 --evaluate_every 0')
FIGURES = dict(
    experiments='--seeds 0,1,2',
    isolated=('--only asynchronous_sequence asynchronous_kgraph --seeds 0,1,2 '
              '--connected False'),
    # One MACH with all the data, and as many steps as five together.
    central=('--only asynchronous_kgraph --seeds 0,1,2 --k 1 --steps 15000 '
             '--dropout 0.4'),
    delay='--only synchronous_single --delay 0 --seeds 0,1,2',
    k=f'{RIVALS} --k 5,10,20,40 --neighbours 4',
    skew=f'{RIVALS} --shards skewed --skew 0.1,0.5,5',
    # A locked MACH takes seconds for a step. The steps of an unlocked one are
    # so many that most of them come after the first message.
    latency=f'{LATE} --inputs real --deadline 10 --steps 50',
    unlocked=f'{LATE} --inputs synthetic --steps 500',
    seconds=('--only synchronous_single asynchronous_kgraph tests/plain '
             '--seeds 0,1,2 --steps 1500 --evaluate_every 100'),
)
# Checks the runs of the experiment in a folder, in one process: to import torch
# and to load the data takes seconds. That folder may have another `mach`.
CHECK = '''import functools, json, signal, sys
if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import
runs, sys.path[0] = json.load(sys.stdin), sys.argv.pop()
import main
if 'mach.data' in sys.modules:
    data = sys.modules['mach.data']
    data.load = functools.cache(data.load)
for words in runs:
    try:
        sys.exit(main.main([*words, '--dry_run=True']))
    except SystemExit as end:
        if end.code:
            raise
'''
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
    add('--seeds', help='a run per seed: 0,1,2')
    add('--isolated', choices=('True', 'False'), help='run again without edges')
    add('--logs',
        metavar='FOLDER',
        help='the folder of the logs; default: .runs/<date-time>')
    add('--record', choices=FIGURES, help='run what is missing of a figure')
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
    fail(f'no experiment {name}; choose from {", ".join(EXPERIMENTS)}, '
         'or a folder whose main.py has hyperparameters')


def read_words(words):
    """Options, path -> hyperparameters of an experiment, those given."""
    parser = make_parser()
    options, _ = parser.parse_known_args(words)
    if options.record:
        words = FIGURES[options.record].split() + words
        options, _ = parser.parse_known_args(words)
    chosen = {} if options.compare else dict(
        map(find, options.only or EXPERIMENTS))
    names = set().union(*chosen.values())
    names |= set(re.findall(r'--(\w+)', FIGURES.get(options.record, '')))
    names -= vars(options).keys()
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
    if not re.fullmatch(r'\d+(,\d+)*', options.seeds or '0'):
        fail(f'--seeds takes numbers such as 0,1,2, not {options.seeds}')
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


def list_runs(options, chosen, given):
    """Yields (path of main.py, name, hyperparameters) of every run, in order.

    The name has what differs; with --record it has all that is given.

    Args:
        options, chosen, given: as from `read_words`.
    """
    plain = metrics.BOOKKEEPING  # such values may have commas
    values = {k: [v] if k in plain else v.split(',') for k, v in given.items()}
    shown = {k for k, each in values.items() if options.record or each[1:]}
    if options.seeds:
        values['seed'] = options.seeds.split(',')
    if options.isolated == 'True':
        values['connected'] = ['True', 'False']
    for path, names in chosen.items():
        own = {key: values[key] for key in values if key in names}
        for combination in itertools.product(*own.values()):
            run, parts = dict(zip(own, combination)), [path.parent.name]
            parts += ['isolated'] * (run.get('connected') == 'False')
            for key in own:
                if key in shown - {*plain, 'connected'}:
                    parts.append(f'{key}_{run[key]}')
            parts += [f'seed{run["seed"]}'] if options.seeds else []
            yield path, '.'.join(parts), run


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
    for path, name, run_values in list_runs(options, chosen, given):
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
            checks.setdefault(path.parent, []).append(jobs[log][3:])
    # The first check may download the data, so they do not run at once.
    for folder, runs in checks.items():
        if subprocess.run([sys.executable, '-c', CHECK, folder],
                          input=json.dumps(runs).encode(),
                          stdout=subprocess.DEVNULL,
                          check=False).returncode:
            fail(f'{folder.name} cannot run, so nothing was run')
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
            with contextlib.suppress(ValueError):  # Windows sends no SIGINT
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
        return not metrics.flaw(metrics.read_log(path))
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
    accuracy of the runs with `connected False`. They may be of another commit,
    and hyperparameters of messages mean nothing to them. The last column names
    the settings in which the rows of an experiment differ. Rows of an
    experiment are in order of k, else as given. Runs that stopped early or have
    a failed MACH are left out with a warning on stderr. A second run of a seed
    counts, with a warning; so do several runs of uncommitted code.
    """
    for log in logs:
        if log.skipped:
            metrics.warn(f'{log.name}: {log.skipped} lines are no log lines')
        if metrics.flaw(log):
            metrics.warn(f'{log.name}: {metrics.flaw(log)}, left out')
    counted = [log for log in logs if not metrics.flaw(log)]
    names = [log.run.get('experiment') for log in counted]
    counted.sort(key=lambda log: (names.index(log.run.get('experiment')),
                                  log.hparams.get('k', 0)))
    found = [[*same, *metrics.without_edges(same[0], counted)]
             for same in metrics.group(counted)
             if not metrics.isolated(same[0])]
    paired = [log for same in found for log in same]
    found += metrics.group([log for log in counted if log not in paired])
    found.sort(key=lambda same: min(map(counted.index, same)))
    rows = [('experiment', 'dataset', 'k', 'n', 'real', 'synthetic', 'isolated',
             'seconds', 'differs in')]
    for same in found:
        experiment, seen = same[0].run.get('experiment'), set()
        for log in same:
            run = log.hparams.get('connected'), log.run.get('seed')
            if run in seen:
                metrics.warn(f'{log.name}: seed {run[-1]} counts again')
            seen.add(run)
        isolated = [run for run in same if metrics.isolated(run)]
        connected = [run for run in same if run not in isolated]
        runs = connected or isolated
        alone = cell(isolated, 'real')
        if isolated and len(isolated) != len(runs):
            alone += f' (n={len(isolated)})'
        row = [experiment, same[0].run.get('dataset')]
        row += [same[0].hparams.get('k', '-'), len(runs)]
        row += [cell(connected, 'real'), cell(connected, 'synthetic'), alone]
        row += [cell(runs, 'seconds', 1)]
        row += [metrics.differs(same[0], found, ('connected', 'dataset', 'k'))]
        commits = [str(log.run.get('commit')) for log in same]
        dirty = [commit for commit in commits if commit.endswith('-dirty')]
        if len(dirty) > 1:
            metrics.warn(
                f'{experiment}: {len(dirty)} runs of {dirty[0]} share a row, '
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
            ended = code == 2 or code - 128 in metrics.SIGNALS
            status = code if ended else 1
            if ended:
                break
    logs = []
    for path in paths:
        try:
            logs.append(metrics.read_log(path))
        except (OSError, ValueError) as error:
            say(f'{error}, left out')
            status = status or int(bool(jobs))
    table = compare(logs)
    if '\n' in table:  # there are rows below its head
        print('\n' * bool(jobs) + table, flush=True)
    elif options.compare:
        fail('--compare: no log is left')
    if options.plot:
        counted = [log for log in logs if not metrics.flaw(log)]
        try:
            plot.draw(options.plot, counted, options.panels)
        except (ValueError, OSError) as error:
            say(f'--plot: {error}')
            status = status or 2
    return status


if __name__ == '__main__':
    for one in metrics.SIGNALS:
        if signal.getsignal(one) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(one, stop)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + interrupt.args[0])
    except OSError as stdout_failed:
        say(f'stopped: {stdout_failed}')
        metrics.leave(1)  # sys.exit would flush stdout, which fails again
