"""What does it cost to lose a process? python tests/benchmark_processes.py

Runs asynchronous_kgraph under torchrun, as five processes of one MACH each, and
does to them what may happen: they are killed, stopped, started late, put on two
hosts, bothered by strangers. Prints a table of what was seen beside its floor;
exit status 1 says that a floor was missed. Accuracies are those of the test set;
`points below` is the worse of real and synthetic.

    python tests/benchmark_processes.py                    # about 14 minutes
    python tests/benchmark_processes.py --only kill stop --times 10
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing import connection
from statistics import fmean

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import conftest
from mach import metrics

MAIN = conftest.ROOT / 'asynchronous_kgraph' / 'main.py'
K = 5
DEADLINE = 240  # seconds, for whatever is waited for
OPTIONS = argparse.Namespace()  # see main()
MISSED = []
NUMBERS = itertools.count()


def row(what, seen, floor=None, least=False, decimals=2):
    """Prints one line of the table; a floor that is least, or else most."""
    met, bound = '', '-'
    if floor is not None:
        met = seen >= floor if least else seen <= floor
        bound = f'at {"least" if least else "most"} {floor}'
        MISSED.extend([what] * (not met))
        met = 'met' if met else 'MISSED'
    seen = f'{seen:.{decimals}f}' if isinstance(seen, float) else seen
    print(f'| {what} | {bound} | {seen} | {met} |', flush=True)


def read(path):
    """The text of a file; nothing if there is none."""
    with contextlib.suppress(OSError):
        return pathlib.Path(path).read_text(encoding='utf-8', errors='replace')
    return ''


def free_port():
    """A port that is free, as are those after it; not one that is lent."""
    while True:
        port = random.randrange(20000, 30000)
        with contextlib.suppress(OSError):
            for following in range(port, port + 20):
                socket.create_server(('127.0.0.1', following)).close()
            return port


class Run:
    """One run of the experiment; whatever of it is left ends with the `with`.

    Args:
        words: for main.py, beside those that all runs have.
        count: processes that torchrun starts; 0: one without torchrun, as many
            as MACHs are asked for; None: none, `start` is called for each.
        launcher: words for torchrun.

    Attributes:
        most: 'child' (trains) and 'watched' (its parent, which torchrun
            started) -> MB that the largest process has held.
    """

    def __init__(self, *words, count=K, launcher=()):
        self._folder = OPTIONS.keep / f'run{next(NUMBERS)}'
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._mark, self.port = f'{os.getpid()} {self._folder}', free_port()
        self._words = ('--data', OPTIONS.data, '--seed', OPTIONS.seed,
                       '--log_every', 10, '--log_folder', self._folder, '--k',
                       count or K, '--steps', OPTIONS.steps, *words)
        self.started, self.most = [], dict(child=0.0, watched=0.0)
        if count == 0:
            self._start([])
        elif count:
            self._start([
                '-m', 'torch.distributed.run', '--nproc-per-node', count,
                '--master-port', self.port, *launcher
            ])

    def _start(self, before, prefix=(), **environment):
        command = [*prefix, sys.executable, *before, MAIN, *self._words]
        with open(self._folder / 'out',
                  'ab') as out, open(self._folder / 'errors', 'ab') as errors:
            self.started.append(
                subprocess.Popen(list(map(str, command)),
                                 stdin=subprocess.DEVNULL,
                                 stdout=out,
                                 stderr=errors,
                                 env=os.environ | environment |
                                 dict(MARK=self._mark),
                                 start_new_session=True))

    def start(self, rank, *prefix, local=None, **environment):
        """Starts one process as torchrun would, without it."""
        self._start([],
                    prefix,
                    RANK=str(rank),
                    WORLD_SIZE=str(K),
                    LOCAL_RANK=str(rank if local is None else local),
                    MASTER_ADDR='127.0.0.1',
                    MASTER_PORT=str(self.port),
                    OMP_NUM_THREADS='1',
                    **environment)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        for process in self.started:
            process.kill()
            process.wait(20)

    def _living(self):
        return [
            process for process in pathlib.Path('/proc').iterdir()
            if process.name.isdigit() and
            f'MARK={self._mark}' in read(process / 'environ').split('\0')
        ]

    def find(self, kind='child'):
        """Rank -> id of the process that trains, or of the 'watched' one."""
        found = {}
        for process in self._living():
            ranks = [
                int(word[5:])
                for word in read(process / 'environ').split('\0')
                if word.startswith('RANK=')
            ]
            stat = read(process / 'stat').rpartition(')')[2].split()
            if ranks and stat and 'main.py' in read(process / 'cmdline'):
                parents = [one.pid for one in self.started]
                watched = int(stat[1]) in parents
                if watched == (kind == 'watched'):
                    found[ranks[0]] = int(process.name)
        return found

    def held(self, number, key='VmHWM'):
        """MB that a process has held at most, or holds now: 'VmRSS'."""
        words = read(f'/proc/{number}/status').split()
        return int(words[words.index(f'{key}:') + 1]) / 1024 if (
            f'{key}:' in words) else 0.0

    def errors(self):
        """What it has written on stderr."""
        return read(self._folder / 'errors')

    def said(self, rank=0):
        """The log of one process so far; of None what is on stdout."""
        return read(self._folder /
                    ('out' if rank is None else f'process{rank}.txt'))

    def finals(self, rank=0):
        """MACH -> fields of its final line, as one process says them."""
        log = metrics.parse_log(self.said(rank))
        return {final['mach']: final for final in log.finals}

    def wait(self, what, condition, seconds=DEADLINE):
        """Until condition() is true; returns the seconds that took.

        Raises:
            TimeoutError: it took too long.
        """
        began = time.monotonic()
        while not condition():
            if time.monotonic() > began + seconds:
                raise TimeoutError(f'{what}: not within {seconds} s; '
                                   f'{self._folder}:\n{self.errors()[-3000:]}')
            time.sleep(0.1)
        return time.monotonic() - began

    def train(self, steps):
        """Until a MACH of process 0 has taken so many steps."""
        self.wait(
            f'step {steps}', lambda: any(
                int(step) >= steps
                for step in re.findall(r'^step  (\d+)', self.said(), re.M)))

    def end(self, seconds=DEADLINE):
        """Until all processes have; sees what they hold meanwhile."""
        ids = {kind: self.find(kind).values() for kind in self.most}

        def ended():
            for kind, numbers in ids.items():
                self.most[kind] = max(self.most[kind], *map(self.held, numbers),
                                      0)
            return all(one.poll() is not None for one in self.started)

        self.wait('end', ended, seconds)
        return self


@functools.cache
def plain(*words, count=K):
    """A Run that nothing happens to; it has ended."""
    with Run(*words, count=count) as run:
        run.train(10)
        return run.end()


def mean(found, key, without=()):
    """Of the finals, but not those of some MACHs."""
    return fmean(final[key]
                 for mach, final in found.items()
                 if mach not in ('mean', *without))


def below(found, without=(), base=None):
    """Points that the mean of some MACHs is below that of an undisturbed run."""
    base = base or plain().finals()
    return max(
        mean(base, key) - mean(found, key, without)
        for key in ('real', 'synthetic'))


def behind(found, mach):
    """Points that one MACH is below the mean of all others."""
    return max(
        mean(found, key, [mach]) - found[mach][key]
        for key in ('real', 'synthetic'))


def gain(found, without=()):
    """Least real accuracy of a MACH, in points above the same one isolated."""
    alone = plain('--connected', False, count=0).finals()
    return min(found[i]['real'] - alone[i]['real']
               for i in range(K)
               if i not in without)


def sides():
    """Threads and processes side by side."""
    threads, processes = plain(count=0).finals(), plain().finals()
    for key in 'real', 'synthetic':
        row(f'{key} of threads', mean(threads, key))
        row(f'{key} of processes', mean(processes, key))
        row(f'{key}: points apart',
            abs(mean(threads, key) - mean(processes, key)), 0.3)
    for what, found in ('threads', threads), ('processes', processes):
        row(f'rate of a MACH, {what}', mean(found, 'rate'), decimals=1)
        row(f'seconds of training, {what}',
            max(final['seconds'] for final in found.values()),
            decimals=1)
        row(f'least gain over isolated, {what}', gain(found), 0, True)


def memory():
    """What one process holds."""
    row('MB of a process that trains, the most', plain().most['child'], 600)
    row('MB of its parent, the most', plain().most['watched'], 30)


def nans(run, rank):
    """The MACHs that one process says to be gone."""
    finals = run.finals(rank)
    return [i for i in range(K) if math.isnan(finals[i]['real'])]


def kill():
    """kill -9 of a process that trains, at a third of the run."""
    gains, well = [], 0
    for rank in (i % K for i in range(OPTIONS.times)):
        others = [i for i in range(K) if i != rank]
        with Run() as run:
            run.train(OPTIONS.steps // 3)
            os.kill(run.find()[rank], signal.SIGKILL)
            found = run.end().finals(others[0])
        well += all(nans(run, other) == [rank] for other in others)
        gains.append(gain(found, [rank]))
        row(f'process {rank} killed: points below', below(found, [rank]), 0.5)
    row('killed: least gain of another over isolated', min(gains), 0, True)
    row('killed: runs that all others end, that MACH nan', well, OPTIONS.times,
        True)


def restart():
    """The same with --max-restarts: it goes on from its checkpoint."""
    well = 0
    for rank in (i % K for i in range(OPTIONS.times)):
        with tempfile.TemporaryDirectory() as folder, Run(
                '--checkpoint',
                folder,
                '--checkpoint_every',
                25,
                launcher=('--max-restarts', 1)) as run:
            run.train(OPTIONS.steps // 3)
            before = len(run.errors())
            os.kill(run.find()[rank], signal.SIGKILL)
            seconds = run.wait('it comes back',
                               lambda text=f'process {rank} is here': text in
                               run.errors()[before:])
            found = run.end().finals(None)  # one log, whoever was killed
        well += not nans(run, None)
        row(f'process {rank} restarted: seconds until it is heard', seconds, 15)
        row(f'process {rank} restarted: its MACH, points below the others',
            behind(found, rank), 0.5)
    row('restarted: runs that end with all MACHs', well, OPTIONS.times, True)


def stop():
    """SIGSTOP: a process hangs, for some time or for good."""
    base, others = plain().finals(), [i for i in range(K) if i != 1]
    with Run() as run:
        run.train(OPTIONS.steps // 3)
        number = run.find()[1]
        os.kill(number, signal.SIGSTOP)
        run.wait('others end',
                 lambda: all('mach mean' in run.said(i) for i in others))
        os.kill(number, signal.SIGKILL)
        found = run.end().finals()
    row('stopped for good: points below', below(found, [1]), 0.5)
    row('stopped for good: rate of others, times undisturbed',
        mean(found, 'rate', [1]) / mean(base, 'rate', [1]), 0.95, True)
    steps = int(45 * min(final['rate'] for final in base.values()))
    with Run('--steps', steps) as run:
        run.train(50)
        number = run.find()[1]
        os.kill(number, signal.SIGSTOP)
        time.sleep(30)
        os.kill(number, signal.SIGCONT)
        found = run.end().finals()
    row(f'stopped for 30 s of {steps} steps: its MACH, points below the others',
        behind(found, 1), 0.5)
    row('stopped for 30 s: rate of others, times undisturbed',
        mean(found, 'rate', [1]) / mean(base, 'rate', [1]), 0.95, True)


def late():
    """A process that never starts, and one that starts a minute late."""
    others = [i for i in range(K) if i != 2]
    with Run('--patience', 5, count=None) as run:
        for rank in others:
            run.start(rank)
        found = run.end().finals()
    said = run.errors().count('begins without process [2]')
    row('never started: processes that say so', said, 1, True)
    row('never started: others end, without that MACH',
        sum(nans(run, other) == [2] for other in others), K - 1, True)
    row('never started: points below', below(found, [2]), 0.5)
    # Others are to train for more than a minute.
    steps = int(80 * mean(plain().finals(), 'rate'))
    with Run('--patience', 5, '--steps', steps, count=None) as run:
        for rank in others:
            run.start(rank)
        time.sleep(60)
        run.start(2)
        found = run.end().finals()
    row(f'60 s late for {steps} steps: its MACH, points below the others',
        behind(found, 2), 0.5)


def signals():
    """SIGINT and SIGTERM, to one of three processes."""
    ways = itertools.product(('torchrun', 'watched', 'child'),
                             (signal.SIGINT, signal.SIGTERM))
    for count, (whom, sent) in zip(range(max(6, OPTIONS.times)),
                                   itertools.cycle(ways)):
        with Run() as run:
            run.train(50)
            target = run.started[0].pid
            if whom != 'torchrun':
                target = run.find(whom)[count % K]
            os.kill(target, sent)
            seconds = run.wait(
                'finals',
                lambda: all('mach mean' in run.said(i) for i in range(K)))
            status = run.end().started[0].returncode
            left = len(run.find()) + len(run.find('watched'))
        what = f'{sent.name} to {whom}'
        row(f'{what}: seconds until all have said their finals', seconds, 5)
        row(f'{what}: MACHs without a final accuracy',
            sum(len(nans(run, i)) for i in range(K)), 0)
        row(f'{what}: processes left', left, 0)
        statuses = re.findall(r'exitcode +: (-?\d+)', run.errors())
        row(f'{what}: exit status of torchrun; as it tells, of processes',
            f'{status}; {" ".join(statuses) or "-"}')
        if whom != 'torchrun':
            row(f'{what}: processes that do not exit with {128 + sent}',
                sum(int(one) != 128 + sent for one in statuses), 0)


def make_hosts(stack):
    """Two hosts: of each its address, and the words before a command.

    Args:
        stack: an ExitStack, whose end is theirs.
    """

    def ip(*words):
        subprocess.run(['ip', *words],
                       check=True,
                       capture_output=True,
                       timeout=20)

    names = [f'mach{os.getpid()}{end}' for end in 'ab']
    try:
        for name in names:
            ip('netns', 'add', name)
            stack.callback(ip, 'netns', 'delete', name)
        ip('link', 'add', 'mach', 'netns', names[0], 'type', 'veth', 'peer',
           'name', 'mach', 'netns', names[1])
        for number, name in enumerate(names, start=1):
            ip('-n', name, 'address', 'add', f'10.77.0.{number}/24', 'dev',
               'mach')
            ip('-n', name, 'link', 'set', 'lo', 'up')
            ip('-n', name, 'link', 'set', 'mach', 'up')
        return [(f'10.77.0.{number}', ('ip', 'netns', 'exec', name))
                for number, name in enumerate(names, start=1)]
    except (OSError, subprocess.SubprocessError) as error:
        print(f'no network namespaces ({error}); two addresses', flush=True)
        return [('127.0.1.1', ()), ('127.0.1.2', ())]


def hosts():
    """Two hosts, near each other and far apart."""
    base = plain().finals()
    far = '--latency', 0.05, '--loss_rate', 0.01
    for what, words in ('two hosts', ()), ('two hosts far apart', far):
        with contextlib.ExitStack() as stack:
            places = make_hosts(stack)
            names = ','.join(address for address, _ in places)
            run = stack.enter_context(Run('--hosts', names, *words, count=None))
            for rank in range(K):
                run.start(rank, *places[rank * 2 // K][1], MACH_KEY='secret')
            found = run.end().finals()
        row(f'{what}: points below', below(found), 0.3)
        row(f'{what}: rate, times that of one host',
            mean(found, 'rate') / mean(base, 'rate'), 0.95, True)
    print('(far apart: latency and loss are the experiment\'s own)', flush=True)


def bother(address, stack):
    """A stranger that tries all it can; its connections last until the end."""
    with contextlib.suppress(OSError, EOFError, connection.AuthenticationError):
        connection.Client(address, authkey=b'wrong').close()
    long = struct.pack('!iQ', -1, 2**60) + bytes(10**6)
    half = struct.pack('!i', 20) + b'half'
    for content in (os.urandom(10**6), long, half, *[b''] * 1000):
        with contextlib.suppress(OSError):
            sock = socket.create_connection(address, 5)
            stack.enter_context(sock)
            sock.sendall(content)


def strangers():
    """Connections that do not know the key."""
    with Run() as run, contextlib.ExitStack() as stack:
        run.train(OPTIONS.steps // 3)
        number = run.find()[0]
        before = run.held(number, 'VmRSS')
        bother(('127.0.0.1', run.port + 1), stack)
        most, end = 0.0, time.monotonic() + 6
        while time.monotonic() < end:
            most = max(most, run.held(number, 'VmRSS'))
            time.sleep(0.1)
        found = run.end().finals()
    refused = re.findall(r'refused (\d+)', run.errors())
    row('strangers: connections refused', ' '.join(refused) or '-')
    row('strangers: MB that process 0 grows', most - before, 50)
    row('strangers: points below', below(found), 0.5)


def many():
    """16 MACHs, as threads and as processes."""
    words = '--k', 16, '--neighbours', 2, '--steps', 100, '--patience', 120
    for what, count in ('threads', 0), ('processes', 16):
        found = plain(*words, count=count).finals()
        for key in 'real', 'synthetic', 'rate':
            row(f'k = 16, {what}: {key}', mean(found, key))


SCENARIOS = (sides, memory, kill, restart, stop, late, signals, hosts,
             strangers, many)


def main():
    """Runs what is asked for; exit status 1 if a floor was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {scenario.__name__: scenario for scenario in SCENARIOS}
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--times',
                        type=int,
                        default=5,
                        help='runs of kill, of restart, of signals')
    parser.add_argument('--seed', type=int, default=3)
    parser.add_argument('--data',
                        default=conftest.DATA or conftest.ROOT / 'data',
                        help='folder of the MNIST files')
    parser.add_argument('--only', nargs='+', default=names, choices=names)
    parser.add_argument('--keep', help='folder that keeps all logs')
    parser.parse_args(namespace=OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        OPTIONS.keep = pathlib.Path(OPTIONS.keep or folder)
        print('| what | floor | seen | met |\n' + '| --- ' * 4 + '|')
        for name in OPTIONS.only:
            began = time.monotonic()
            try:
                names[name]()
            except Exception:  # pylint: disable=broad-except
                MISSED.append(name)
                print(f'| {name} | ends | {traceback.format_exc()!r:.300} | '
                      'MISSED |')
                traceback.print_exc()
            row(f'{name}: seconds of all', time.monotonic() - began, decimals=0)
    return int(bool(MISSED))


if __name__ == '__main__':
    sys.exit(main())
