"""Runs the experiments in turn, keeps their logs, and compares the results.

    python mach/main.py --steps 3000              all five, then the table
    python mach/main.py --only synchronous_kgraph --k 7 --isolated True
    python mach/main.py --seeds 0,1,2             mean and std over three seeds
    python mach/main.py --compare .runs/*/*.txt   the table of saved logs

Any other --name value is a hyperparameter, passed to each chosen experiment
that has it. stdout is what the experiments print, then the table; all else goes
to stderr. Exit code: 0 done, 1 an experiment failed or stdout did, 2 a bad
option, 130 Ctrl-C.
"""

import argparse
import ast
import dataclasses
import difflib
import itertools
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from mach import metrics

EXPERIMENTS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph', 'asynchronous_sequence',
               'asynchronous_kgraph')
STOP_SECONDS = 10  # for an experiment to end after Ctrl-C


@dataclasses.dataclass
class Job:
    """One run of an experiment: its name, what starts it, its stdout's file."""
    name: str
    command: list[str]
    log: pathlib.Path


def say(message):
    """One line on stderr, at once."""
    print(f'mach: {message}', file=sys.stderr, flush=True)


def make_parser():
    """The options of this file itself; a bad one ends it with a line and 2."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        usage='python mach/main.py [options] [--name value ...]',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f'mach: {message}\n')
    add = parser.add_argument
    add('--only',
        nargs='+',
        metavar='NAME',
        default=EXPERIMENTS,
        help='experiments, or folders with a main.py; default: all five')
    add('--seeds', metavar='0,1,2', default='', help='run each once for each')
    add('--isolated',
        choices=('True', 'False'),
        default='False',
        help='run each once more with --connected False, if it can')
    # With the process's number, as two may start in one second.
    add('--logs',
        metavar='FOLDER',
        default=time.strftime(f'.runs/%Y%m%d-%H%M%S-{os.getpid()}'),
        help='where the logs go; default: .runs/<date-time>')
    add('--compare',
        nargs='+',
        metavar='LOG',
        help='run nothing, print the table of these logs')
    return parser


def read_overrides(words, parser):
    """Name -> value of `--name value` and `--name=value`, dashes as _."""
    overrides, words = {}, iter(words)
    for word in words:
        name, equals, value = word.partition('=')
        if not name.startswith('--'):
            parser.error(f'unexpected {word!r}: options are --name value')
        if not equals:
            value = next(words, '--')
            if value.startswith('--'):
                parser.error(f'{name} needs a value')
        overrides[name[2:].replace('-', '_')] = value
    return overrides


def find(name, parser):
    """The main.py of an experiment, and the names of its hyperparameters.

    It is read, not imported: five modules `model` would collide.

    Args:
        name: of a folder in the root, or any path.
    """
    folders = ROOT / name, pathlib.Path(name)
    paths = [folder.resolve() / 'main.py' for folder in folders]
    # This file is a main.py too, and would start itself.
    paths = [p for p in paths if p.is_file() and not p.samefile(__file__)]
    if not paths:
        parser.error(f'no experiment {name}; choose from '
                     f'{", ".join(EXPERIMENTS)}, or a folder with a main.py')
    try:
        tree = ast.parse(paths[0].read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        parser.error(f'{paths[0]}: {error}')
    return paths[0], [
        field.target.id for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == 'Hyperparameters'
        for field in node.body if isinstance(field, ast.AnnAssign)
    ]


def plan(options, words, parser):
    """All runs in order. Ends with 2 on a mistake, before the first of them.

    Args:
        options: the parsed own options.
        words: what is left of the command line, for the experiments.
    """
    overrides = read_overrides(words, parser)
    chosen = dict(find(name, parser) for name in options.only)
    known = {name for names in chosen.values() for name in names}
    for name in sorted(overrides.keys() - known):
        valid = [*known, *vars(options)]
        closest, = difflib.get_close_matches(name, valid, n=1, cutoff=0)
        parser.error(f'no chosen experiment has --{name}; closest: --{closest}')
    seeds = options.seeds.split(',') if options.seeds else []
    if not all(map(str.isdigit, seeds)) or len(set(seeds)) < len(seeds):
        parser.error(f'--seeds {options.seeds}: not numbers such as 0,1,2')
    isolated = options.isolated == 'True'
    for given, name in (seeds, 'seed'), (isolated, 'connected'):
        if given and (name in overrides or name not in known):
            parser.error(f'--{name} is given, or no experiment has it, which '
                         '--seeds or --isolated would set')
    jobs, checks, folder = [], [], pathlib.Path(options.logs)
    for path, names in chosen.items():
        # Unbuffered, so that a line is seen when it is printed.
        command = [sys.executable, '-u', str(path)]
        command += [f'--{n}={v}' for n, v in overrides.items() if n in names]
        repeats, ways = [('', [])], [('', [])]
        if seeds and 'seed' in names:
            repeats = [(f'.seed{seed}', [f'--seed={seed}']) for seed in seeds]
        if isolated and 'connected' in names:
            ways.append(('.isolated', ['--connected=False']))
        for (repeat, seed), (way, edges) in itertools.product(repeats, ways):
            name = path.parent.name
            # Runs that shared one of these folders would overwrite each other.
            own = [
                f'--{n}={overrides[n]}/{name}{repeat}{way}'
                for n in ('checkpoint', 'log_folder')
                if overrides.get(n) and n in names
            ]
            jobs.append(
                Job(name, command + seed + edges + own,
                    folder / f'{name}{repeat}{way}.txt'))
            if 'dry_run' in names and repeat == repeats[0][0]:
                checks.append(jobs[-1])
    logs = [job.log for job in jobs]
    for log in logs:
        if log.exists() or logs.count(log) > 1:  # it takes a run to make one
            parser.error(f'{log} exists, or would twice; choose another --logs')
    for job in checks:  # in turn, as the first may have to fetch the data
        if subprocess.run([*job.command, '--dry_run=True'],
                          stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL,
                          check=False).returncode:
            parser.error(f'{job.name} cannot run, so nothing was run')
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f'--logs: {error}')
    return jobs


def follow(process, log, deadline):
    """Copies a log to stdout while it is written; the writer's exit code.

    It is read from the file: a pipe may be held open, by what the experiment
    has started, long after the experiment has ended.
    """
    code = None
    while code is None and time.monotonic() < deadline:
        time.sleep(0.05)
        code = process.poll()  # before the last look at what it wrote
        sys.stdout.buffer.write(log.read())
        sys.stdout.buffer.flush()
    return code


def run(job):
    """Runs one experiment; its exit code, 130 if Ctrl-C ended it."""
    say(f'{job.name} -> {job.log}')
    with open(job.log, 'xb') as to, open(job.log, 'rb') as log:
        process = subprocess.Popen(job.command,
                                   stdin=subprocess.DEVNULL,
                                   stdout=to)
        try:
            code = follow(process, log, math.inf)
        except KeyboardInterrupt:  # which the experiment has got as well
            code = 130
            if follow(process, log, time.monotonic() + STOP_SECONDS) is None:
                say(f'{job.name} does not stop, killed')
        finally:
            process.kill()  # nothing happens if it has ended
            process.wait()
    return 130 if code == -signal.SIGINT else code


def main(words):
    """Does what the command line says; the exit code.

    Raises:
        OSError: stdout is closed or full; what ran has been stopped.
    """
    if sys.stdout is None:  # as after `>&-`
        raise OSError('stdout is closed')
    parser = make_parser()
    options, words = parser.parse_known_args(words)
    status, paths, logs, jobs = 0, options.compare or [], [], []
    if not options.compare:
        jobs = plan(options, words, parser)
    elif words or vars(options) | dict(compare=None) != vars(
            parser.parse_args([])):
        parser.error('--compare takes saved logs and no other option')
    for job in jobs:
        code = run(job)
        paths.append(job.log)
        if code:
            say(f'{job.name} ended with {code}')
            status = code if code in (2, 130) else 1
        if status in (2, 130):
            break
    for path in paths:
        try:
            logs.append(metrics.read_log(path))
        except ValueError as error:
            say(f'{error}, left out')
        except OSError as error:
            parser.error(str(error))
    if options.compare and not logs:
        parser.error('--compare: no log is left')
    if logs:
        print('\n' * bool(jobs) + metrics.compare(logs), flush=True)
    return status


if __name__ == '__main__':
    # As Ctrl-C, so that an experiment does not outlive the one who started it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        exit_code = main(sys.argv[1:])
    except KeyboardInterrupt:
        exit_code = 130
    except OSError as error:  # most likely of stdout: closed, or full
        # Nothing is left to fail at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        say(f'stopped: {error}')
        exit_code = 1
    sys.exit(exit_code)
