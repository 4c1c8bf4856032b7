"""Runs the experiments in turn, keeps their logs, and compares the results.

    python mach/main.py --steps 3000              all five, then the table
    python mach/main.py --only synchronous_kgraph --k 7 --isolated True
    python mach/main.py --seeds 0,1,2             mean and std over three seeds
    python mach/main.py --compare .runs/*/*.txt   the table of saved logs

stdout is what the experiments print, then the table; all else goes to stderr.
Exit code: 0 done, 1 an experiment failed, 2 a bad option, 130 Ctrl-C.
"""

import os
import sys

# The root instead of this folder, where `data` would be `mach/data.py`.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(HERE)] + [p for p in sys.path if p != HERE]

import argparse
import ast
import dataclasses
import difflib
import pathlib
import signal
import subprocess
import threading
import time

from mach import metrics

ROOT = pathlib.Path(HERE).parent
EXPERIMENTS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph', 'asynchronous_sequence',
               'asynchronous_kgraph')
STOP_SECONDS = 10  # For a child to end after Ctrl-C.
DRAIN_SECONDS = 10  # For the last of its output to arrive once it has ended.


@dataclasses.dataclass
class Job:
    """One run of one experiment.

    Attributes:
        folder: holds the main.py.
        arguments: its command line.
        log: the file its stdout is saved in.
        isolated: whether it is the run without edges.
    """
    folder: pathlib.Path
    arguments: list[str]
    log: pathlib.Path
    isolated: bool


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        """Exits with 2."""
        self.exit(2, f'mach: {message}\n')


def say(message: str):
    """One line on stderr, at once."""
    print(f'mach: {message}', file=sys.stderr, flush=True)


def hyperparameters(folder: pathlib.Path) -> list[str]:
    """Names of the annotated fields of `class Hyperparameters` in main.py.

    The file is parsed, not imported: five modules called `model` would collide.

    Raises:
        OSError, SyntaxError, ValueError: it cannot be read or is not Python.
    """
    tree = ast.parse((folder / 'main.py').read_bytes())
    return [
        field.target.id for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == 'Hyperparameters'
        for field in node.body if isinstance(field, ast.AnnAssign)
    ]


def find(name: str) -> pathlib.Path | None:
    """The folder of an experiment: under the root, or any path; else None."""
    for folder in (ROOT / name, pathlib.Path(name)):
        folder = folder.resolve()
        # This file is a main.py too, and would start itself.
        if (folder / 'main.py').is_file() and folder != pathlib.Path(HERE):
            return folder
    return None


def parse_bool(text: str) -> bool:
    """True or False; ValueError for anything else."""
    return bool(('False', 'True').index(text))


def make_parser() -> Parser:
    """The options of this file itself."""
    parser = Parser(prog='mach',
                    usage='python mach/main.py [options] [--name value ...]',
                    description=__doc__,
                    epilog='Any other --name value is a hyperparameter: it is '
                    'passed to each chosen experiment that has it.',
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument('--only',
                        nargs='+',
                        metavar='NAME',
                        default=EXPERIMENTS,
                        help='experiments to run, or folders with a main.py; '
                        'default: ' + ' '.join(EXPERIMENTS))
    parser.add_argument('--logs',
                        metavar='FOLDER',
                        help='where the logs go; default: .runs/<date-time>')
    parser.add_argument('--isolated',
                        type=parse_bool,
                        default=False,
                        metavar='True|False',
                        help='run each once more with --connected False, if it '
                        'can; default: False')
    parser.add_argument('--seeds',
                        metavar='0,1,2',
                        help='run each once for every seed')
    parser.add_argument('--compare',
                        nargs='+',
                        metavar='LOG',
                        help='run nothing, print the table of these logs')
    return parser


def split_overrides(words: list[str], parser: Parser) -> list[tuple[str, str]]:
    """(name, value) from `--name value` and `--name=value`, dashes as _."""
    overrides = []
    words = iter(words)
    for word in words:
        name, equals, value = word.partition('=')
        if name[:2] != '--' or not name[2:]:
            parser.error(f'unexpected {word!r}: options are --name value')
        if not equals:
            value = next(words, None)
            if value is None or value[:2] == '--':
                parser.error(f'{name} needs a value')
        overrides.append((name[2:].replace('-', '_'), value))
    return overrides


def choose(names: list[str], parser: Parser) -> dict[pathlib.Path, list[str]]:
    """The chosen folders, in order, and the hyperparameters each knows."""
    chosen = {}
    for name in (part for name in names for part in name.split(',') if part):
        folder = find(name)
        if folder is None:
            valid = sorted(main.parent.name
                           for main in ROOT.glob('*/main.py')
                           if find(main.parent.name)) or EXPERIMENTS
            parser.error(f'no experiment {name!r}; choose from '
                         f'{", ".join(valid)}, or a folder with a main.py')
        try:
            chosen[folder] = hyperparameters(folder)
        except (OSError, SyntaxError, ValueError) as error:
            parser.error(f'{folder / "main.py"}: {error}')
    if not chosen:
        parser.error('--only: nothing to run')
    if len({folder.name for folder in chosen}) < len(chosen):
        parser.error('two experiments of one name: their logs would collide')
    return chosen


def plan(options, words: list[str], parser: Parser) -> list[Job]:
    """All runs in order. Ends with exit code 2 on any mistake, before a run.

    Args:
        options: the parsed own options.
        words: what is left of the command line, for the experiments.
    """
    chosen = choose(options.only, parser)
    overrides = split_overrides(words, parser)
    known = {name for names in chosen.values() for name in names}
    for name, _ in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *vars(options)], 1,
                                              0)
            parser.error(f'no chosen experiment has --{name}; '
                         f'the closest is --{close[0]}')
    names = {name for name, _ in overrides}
    seeds = [None]
    if options.seeds is not None:
        try:
            seeds = [int(seed) for seed in options.seeds.split(',')]
        except ValueError:
            parser.error(f'--seeds {options.seeds}: not integers like 0,1,2')
        if len(set(seeds)) < len(seeds):
            parser.error(f'--seeds {options.seeds}: one of them twice')
        if 'seed' in names or 'seed' not in known:
            parser.error('--seeds: instead of --seed, and only where it is one')
    if options.isolated and ('connected' in names or 'connected' not in known):
        parser.error('--isolated: instead of --connected, where it is one')
    logs = pathlib.Path(options.logs or time.strftime('.runs/%Y%m%d-%H%M%S'))
    if not options.logs:  # Two may start in one second.
        stem, number = logs.name, 1
        while logs.exists():
            number += 1
            logs = logs.with_name(f'{stem}-{number}')
    jobs = []
    for folder, fields in chosen.items():
        given = [
            f'--{name}={value}' for name, value in overrides if name in fields
        ]
        for seed in seeds if 'seed' in fields else [None]:
            name = folder.name + ('' if seed is None else f'.seed{seed}')
            seeded = given + ([] if seed is None else [f'--seed={seed}'])
            jobs.append(Job(folder, seeded, logs / f'{name}.txt', False))
            if options.isolated and 'connected' in fields:
                jobs.append(
                    Job(folder, seeded + ['--connected=False'],
                        logs / f'{name}.isolated.txt', True))
    try:
        logs.mkdir(parents=True, exist_ok=True)
        for job in jobs:  # A saved log took a run to make.
            if job.log.exists() and job.log.stat().st_size:
                parser.error(f'{job.log} exists; choose another --logs')
    except OSError as error:
        parser.error(f'--logs: {error}')
    return jobs


def run(job: Job) -> int:
    """Runs one experiment; its stdout goes to ours and to its log.

    Returns:
        Its exit code, 130 if Ctrl-C ended it, 1 if its output could not be
        saved or shown.
    """
    say(f'{job.folder.name} -> {job.log}')
    # Unbuffered, so that a line is seen when it is printed. Ctrl-C reaches the
    # child by itself: it is in our process group.
    process = subprocess.Popen(
        [sys.executable, '-u',
         str(job.folder / 'main.py'), *job.arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE)
    failures = []

    def copy():
        try:
            with open(job.log, 'wb') as log:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    sys.stdout.buffer.write(line)
                    sys.stdout.buffer.flush()
        except OSError as error:  # Unread, the child would wait for ever.
            failures.append(error)
            process.kill()

    # A thread, because a child of the child may hold the pipe open after the
    # end: then only the wait for the thread is in vain, and has a deadline.
    copier = threading.Thread(target=copy, daemon=True)
    copier.start()
    try:
        code = process.wait()  # Training takes as long as it takes.
    except KeyboardInterrupt:
        code = 130
        try:
            process.wait(STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            say(f'{job.folder.name} does not stop, killed')
    finally:
        process.kill()  # Nothing happens if it has ended.
        process.wait(STOP_SECONDS)
        copier.join(DRAIN_SECONDS)
    if copier.is_alive():
        say(f'{job.folder.name} ended, but something holds its output open')
    if failures:
        say(f'{job.folder.name} stopped: {failures[0]}')
        return 1
    return 130 if code == -signal.SIGINT else code


def run_all(jobs: list[Job]) -> tuple[int, list[metrics.Log]]:
    """Runs the jobs in turn: the exit code, and the logs there are.

    A bad hyperparameter (2) or Ctrl-C (130) ends it, a failure (1) does not.
    """
    result, logs = 0, []
    for job in jobs:
        try:
            code = run(job)
        except KeyboardInterrupt:
            code = 130
        problem = f'ended with {code}' if code else ''
        try:
            log = metrics.read_log(job.log)
            if not log.mean:
                problem = problem or 'has no final line of mach mean'
            logs.append(log)
        except (OSError, ValueError) as error:
            problem += f'{", " if problem else ""}no log: {error}'
            # The table shows that it failed. Isolated, a '-' does already.
            if code not in (2, 130) and not job.isolated:
                logs.append(
                    metrics.Log(str(job.log), {'experiment': job.folder.name}))
        if problem:
            say(f'{job.folder.name} {problem}')
        if code in (2, 130):
            return code, logs
        result = 1 if code else result
    return result, logs


def main(arguments: list[str]) -> int:
    """Does what the command line says; the exit code."""
    parser = make_parser()
    options, words = parser.parse_known_args(arguments)
    if options.compare:
        given = {
            k for k, v in vars(options).items() if v != parser.get_default(k)
        }
        if words or given != {'compare'}:
            parser.error('--compare takes saved logs and no other option')
        try:
            logs = [metrics.read_log(path) for path in options.compare]
        except (OSError, ValueError) as error:
            parser.error(str(error))
        result = 0
    else:
        result, logs = run_all(plan(options, words, parser))
        if logs:
            print(flush=True)  # The table is no part of the last log.
    if logs:
        print(metrics.compare(logs), flush=True)
    return result


if __name__ == '__main__':
    # As Ctrl-C, so that an experiment does not outlive the one who started it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = main(sys.argv[1:])
    except BrokenPipeError:  # stdout was closed, as by `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
