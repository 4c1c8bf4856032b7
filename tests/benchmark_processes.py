"""What does it cost to lose a process? python tests/benchmark_processes.py

Runs asynchronous_kgraph under torchrun, as five processes of one MACH each, and
does to them what may happen: they are killed, stopped, late, on two hosts,
bothered by strangers. Prints what was seen beside its floor; exit status 1 says
that a floor was missed. Accuracies are of the test set; `points below` is the
worse of real and synthetic.

    python tests/benchmark_processes.py                      # about 15 minutes
    python tests/benchmark_processes.py --only kill --times 10
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


def row(what, seen, floor=None, least=False):
    """Prints a line of the table; its floor is that at least, or at most."""
    met = floor is None or (seen >= floor if least else seen <= floor)
    MISSED.extend([what] * (not met))
    bound = '' if floor is None else f'at {"least" if least else "most"} {floor}'
    seen = f'{seen:.2f}' if isinstance(seen, float) else seen
    verdict = bound and ('met' if met else 'MISSED')
    print(f'| {what} | {bound} | {seen} | {verdict} |', flush=True)


def read(path):
    """The text of a file; nothing if there is none."""
    with contextlib.suppress(OSError):
        return pathlib.Path(path).read_text(encoding='utf-8', errors='replace')
    return ''


def held(number, key):
    """MB that a process holds ('VmRSS'), or has held at most ('VmHWM')."""
    found = re.search(rf'{key}:\s+(\d+)', read(f'/proc/{number}/status'))
    return int(found[1]) / 1024 if found else 0.0


def free_port():
    """A port that is free, as are those after it."""
    while True:
        port = random.randrange(20000, 30000)
        with contextlib.suppress(OSError):
            for following in range(port, port + 20):
                socket.create_server(('127.0.0.1', following)).close()
            return port


class Run(contextlib.ExitStack):
    """One run; whatever of it is left ends with the `with`.

    Args:
        words: for main.py, beside those that all runs have.
        count: processes that torchrun starts; 0: threads of one process
            instead; None: nothing, `start` is called for each.
        launcher: words for torchrun.
    """

    def __init__(self, words='', count=K, launcher=''):
        super().__init__()
        self.folder = pathlib.Path(OPTIONS.keep) / f'run{next(NUMBERS)}'
        self.folder.mkdir(parents=True)
        self._mark, self.port = f'MARK={self.folder}', free_port()
        self._words = ['--data', OPTIONS.data, '--seed', OPTIONS.seed]
        self._words += ['--steps', OPTIONS.steps, '--log_every', 10]
        self._words += ['--log_folder', self.folder, *words.split()]
        self.started, self.most = [], dict(child=0.0, watched=0.0)
        self.callback(self._kill)
        if count is not None:
            torchrun = (f'-m torch.distributed.run --nproc-per-node {count} '
                        f'--master-port {self.port} {launcher}')
            self._start(torchrun.split() if count else [])

    def _start(self, before, prefix=(), **environment):
        command = [*prefix, sys.executable, *before, MAIN, *self._words]
        with open(self.folder / 'out', 'ab') as out, \
                open(self.folder / 'errors', 'ab') as errors:
            self.started.append(
                subprocess.Popen(list(map(str, command)),
                                 stdout=out,
                                 stderr=errors,
                                 env=os.environ | environment |
                                 dict(MARK=str(self.folder)),
                                 start_new_session=True))

    def start(self, rank, prefix=(), **environment):
        """Starts one process as torchrun would, but without it."""
        words = f'RANK={rank} LOCAL_RANK={rank} WORLD_SIZE={K} ' \
            f'MASTER_PORT={self.port} OMP_NUM_THREADS=1'
        values = dict(word.split('=') for word in words.split())
        self._start([], prefix, **values, **environment)

    def _kill(self):
        for number, _ in self._living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for process in self.started:
            process.wait(20)

    def _living(self):
        for folder in pathlib.Path('/proc').glob('[0-9]*'):
            words = read(folder / 'environ').split('\0')
            if self._mark in words:
                yield int(folder.name), words

    def find(self, kind='child'):
        """Rank -> id of the process that trains, or of the 'watched' one."""
        found, parents = {}, [one.pid for one in self.started]
        for number, words in self._living():
            rank = [word[5:] for word in words if word.startswith('RANK=')]
            parent = re.search(r'PPid:\s+(\d+)',
                               read(f'/proc/{number}/status'))
            watched = parent and int(parent[1]) in parents
            if rank and watched == (kind == 'watched'):
                found[int(rank[0])] = number
        return found

    def errors(self):
        """What it has written on stderr."""
        return read(self.folder / 'errors')

    def log(self, rank=0):
        """The log of one process so far; of None what is on stdout."""
        return read(self.folder /
                    ('out' if rank is None else f'process{rank}.txt'))

    def finals(self, rank=0):
        """MACH -> fields of its final line, as one process says them."""
        log = metrics.parse_log(self.log(rank), f'{self.folder} {rank}')
        return {one['mach']: one for one in log.finals if one != log.mean}

    def said(self, ranks):
        """Whether all these processes have said their finals."""
        return all(
            re.search('^final .* mach mean', self.log(rank), re.M)
            for rank in ranks)

    def gone(self, rank=0):
        """The MACHs without a final accuracy, as one process says."""
        return [
            mach for mach, final in self.finals(rank).items()
            if math.isnan(final['real'] + final['synthetic'])
        ]

    def wait(self, what, condition):
        """Until condition() is true; returns the seconds that took."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() > began + DEADLINE:
                raise TimeoutError(f'{what}: {self.errors()[-3000:]}')
            time.sleep(0.1)
        return time.monotonic() - began

    def train(self, steps):
        """Until a MACH has taken so many steps, as process 0 says."""
        self.wait(
            f'step {steps}', lambda: any(
                int(step) >= steps
                for step in re.findall(r'^step  (\d+)', self.log(), re.M)))

    def end(self):
        """Until all its processes have ended; returns the Run."""
        self.wait('end', lambda: all(one.poll() is not None
                                     for one in self.started))
        return self


@functools.cache
def plain(words='', count=K):
    """A Run that nothing happens to; it has ended."""
    with Run(words, count) as run:
        run.train(10)
        ids = {kind: run.find(kind).values() for kind in run.most}

        def over():
            for kind, numbers in ids.items():
                for number in numbers:
                    run.most[kind] = max(run.most[kind], held(number, 'VmHWM'))
            return all(one.poll() is not None for one in run.started)

        run.wait('end', over)
    return run


def mean(run, key, without=None, rank=0):
    """Of the finals that a process says, but not that of one MACH."""
    finals = run.finals(rank).items()
    return fmean(final[key] for mach, final in finals if mach != without)


def below(run, without=None, rank=0):
    """Points that the mean is below that of the undisturbed run."""
    return max(
        mean(plain(), key) - mean(run, key, without, rank)
        for key in ('real', 'synthetic'))


def behind(run, mach, rank=0):
    """Points that one MACH is below the mean of all others."""
    return max(
        mean(run, key, mach, rank) - run.finals(rank)[mach][key]
        for key in ('real', 'synthetic'))


def gain(run, without=None, rank=0):
    """Least real accuracy of a MACH, in points above the same one isolated."""
    alone = plain('--connected False', 0).finals()
    return min(final['real'] - alone[mach]['real']
               for mach, final in run.finals(rank).items()
               if mach != without)


def faster(run, without=None):
    """Mean rate in parts of that of the same MACHs in the undisturbed run."""
    return mean(run, 'rate', without) / mean(plain(), 'rate', without)


def sides():
    """Threads and processes side by side, and what one process holds."""
    runs = dict(threads=plain(count=0), processes=plain())
    for key in 'real', 'synthetic':
        seen = [mean(run, key) for run in runs.values()]
        row(f'{key}, threads / processes', '{:.2f} / {:.2f}'.format(*seen))
        row(f'{key}: points apart', abs(seen[0] - seen[1]), 0.3)
    for what, run in runs.items():
        row(f'{what}: least gain of a MACH over isolated', gain(run), 0, True)
        row(f'{what}: rate of a MACH', mean(run, 'rate'))
        row(f'{what}: seconds',
            max(final['seconds'] for final in run.finals().values()))
    row('MB of a process that trains, at most', plain().most['child'], 600)
    row('MB of the one that torchrun watches, at most',
        plain().most['watched'], 30)


def kill():
    """kill -9 of a process that trains, at a third of the run."""
    ended = 0
    for rank in (i % K for i in range(OPTIONS.times)):
        others = [i for i in range(K) if i != rank]
        with Run() as run:
            run.train(OPTIONS.steps // 3)
            os.kill(run.find()[rank], signal.SIGKILL)
            run.end()
        ended += all(run.gone(other) == [rank] for other in others)
        what, here = f'process {rank} killed', (rank, others[0])
        row(f'{what}: points below', below(run, *here), 0.5)
        row(f'{what}: least gain over isolated', gain(run, *here), 0, True)
    row('killed: runs that all others end', ended, OPTIONS.times, True)


def restart():
    """The same with --max-restarts: it goes on from its checkpoint."""
    ended = 0
    for rank in (i % K for i in range(OPTIONS.times)):
        folder = tempfile.mkdtemp(dir=OPTIONS.keep)
        with Run(f'--checkpoint {folder} --checkpoint_every 25',
                 launcher='--max-restarts 1') as run:
            run.train(OPTIONS.steps // 3)
            before = run.errors()
            os.kill(run.find()[rank], signal.SIGKILL)
            what, text = f'process {rank} restarted', f'process {rank} is here'
            row(
                f'{what}: seconds until it is heard',
                run.wait(text, lambda old=before.count(text), text=text: run.
                         errors().count(text) > old), 15)
            run.end()
        # Whoever was killed, stdout is one log.
        ended += run.gone(None) == []
        row(f'{what}: its MACH, points below the others',
            behind(run, rank, None), 0.5)
    row('restarted: runs that end with all MACHs', ended, OPTIONS.times, True)


def stop():
    """SIGSTOP: a process hangs, for good or for 30 seconds."""
    with Run() as run:
        run.train(OPTIONS.steps // 3)
        number = run.find()[1]
        os.kill(number, signal.SIGSTOP)
        run.wait('others end', lambda: run.said([0, 2, 3, 4]))
        os.kill(number, signal.SIGKILL)
        run.end()
    row('stopped for good: points below', below(run, 1), 0.5)
    row('stopped for good: rate of others', faster(run, 1), 0.95, True)
    # The others are to train for longer than it rests.
    slowest = min(final['rate'] for final in plain().finals().values())
    with Run(f'--steps {45 * slowest:.0f}') as run:
        run.train(50)
        number = run.find()[1]
        os.kill(number, signal.SIGSTOP)
        time.sleep(30)
        os.kill(number, signal.SIGCONT)
        run.end()
    row('stopped for 30 s: its MACH, points below the others', behind(run, 1),
        0.5)
    row('stopped for 30 s: rate of others', faster(run, 1), 0.95, True)


def late():
    """A process that never starts, and one that starts a minute late."""
    others = [0, 1, 3, 4]
    with Run('--patience 5', None) as run:
        for rank in others:
            run.start(rank)
        run.end()
    row('never started: processes that say so',
        run.errors().count('begins without process [2]'), 1, True)
    row('never started: others that end without it',
        sum(run.gone(rank) == [2] for rank in others), K - 1, True)
    row('never started: points below', below(run, 2), 0.5)
    steps = 80 * mean(plain(), 'rate')  # more than a minute
    with Run(f'--patience 5 --steps {steps:.0f}', None) as run:
        for rank in others:
            run.start(rank)
        time.sleep(60)
        run.start(2)
        run.end()
    row('60 s late: its MACH, points below the others', behind(run, 2), 0.5)


def signals():
    """SIGINT and SIGTERM, to one of three processes."""
    ways = itertools.product(('torchrun', 'watched', 'child'),
                             (signal.SIGINT, signal.SIGTERM))
    numbers, wrong = range(max(6, OPTIONS.times)), 0
    for number, (whom, sent) in zip(numbers, itertools.cycle(ways)):
        with Run() as run:
            run.train(50)
            ids = run.find(whom) or {0: run.started[0].pid}
            os.kill(ids[number % len(ids)], sent)
            seconds = run.wait('finals', lambda: run.said(range(K)))
            status = run.end().started[0].returncode
            wrong += len([*run.find(), *run.find('watched')])
        wrong += sum(len(run.gone(rank)) for rank in range(K))
        codes = re.findall(r'exitcode +: (-?\d+)', run.errors())
        wrong += sum(int(code) != 128 + sent for code in codes)
        what = f'{sent.name} to {whom}'
        row(f'{what}: seconds until all have said their finals', seconds, 5)
        row(f'{what}: exit status of torchrun; of processes, as it tells',
            f'{status}; {" ".join(codes)}')
    row('signals: processes left, finals nan, other exit statuses', wrong, 0)


def make_hosts(stack):
    """Two hosts until the stack ends: addresses, and words before a command."""

    def call(words):
        subprocess.run(words.split(),
                       check=True,
                       capture_output=True,
                       timeout=20)

    names = [f'mach{os.getpid()}{end}' for end in 'ab']
    try:
        for name in names:
            call(f'ip netns add {name}')
            stack.callback(call, f'ip netns delete {name}')
        call(f'ip link add mach netns {names[0]} type veth '
             f'peer name mach netns {names[1]}')
        for number, name in enumerate(names, start=1):
            call(f'ip -n {name} address add 10.77.0.{number}/24 dev mach')
            for device in 'lo', 'mach':
                call(f'ip -n {name} link set {device} up')
    except (OSError, subprocess.SubprocessError) as error:
        print(f'no network namespaces ({error}): two addresses', flush=True)
        return ['127.0.1.1', '127.0.1.2'], [(), ()]
    return ['10.77.0.1', '10.77.0.2'
           ], [('ip', 'netns', 'exec', name) for name in names]


def hosts():
    """Two hosts, near each other and far apart."""
    for what, words in (('two hosts', ''),
                        ("two hosts, the experiment's own latency and loss",
                         '--latency 0.05 --loss_rate 0.01')):
        with contextlib.ExitStack() as stack:
            addresses, before = make_hosts(stack)
            run = stack.enter_context(
                Run(f'--hosts {",".join(addresses)} {words}', None))
            for rank in range(K):
                run.start(rank, before[rank * 2 // K], MACH_KEY='secret')
            run.end()
        row(f'{what}: points below one host', below(run), 0.3)
        row(f'{what}: rate, of that of one host', faster(run), 0.95, True)


def strangers():
    """Connections that do not know the key, and what they try."""
    with Run() as run:
        run.train(OPTIONS.steps // 3)
        address, number = ('127.0.0.1', run.port + 1), run.find()[0]
        before, most = held(number, 'VmRSS'), 0.0
        with contextlib.suppress(OSError, EOFError,
                                 connection.AuthenticationError):
            connection.Client(address, authkey=b'wrong').close()
        tried = os.urandom(10**6), struct.pack('!iQ', -1, 2**60) + bytes(10**6)
        tried += struct.pack('!i', 20) + b'half', *[b''] * 1000
        for content in tried:  # they stay until the run has ended
            with contextlib.suppress(OSError):
                sock = socket.create_connection(address, 5)
                run.enter_context(sock).sendall(content)
        for _ in range(60):
            most = max(most, held(number, 'VmRSS'))
            time.sleep(0.1)
        run.end()
    row('strangers: connections that process 0 has refused',
        ''.join(re.findall(r'process 0 has refused (\d+)', run.errors())))
    row('strangers: MB that process 0 grows', most - before, 50)
    row('strangers: points below', below(run), 0.5)


def many():
    """16 MACHs, as threads and as processes."""
    words = '--k 16 --neighbours 2 --steps 100 --patience 120'
    for what, count in ('threads', 0), ('processes', 16):
        for key in 'real', 'synthetic', 'rate', 'seconds':
            row(f'16 {what}: {key}', mean(plain(words, count), key))


def main():
    """Runs what is asked for; exit status 1 if a floor was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    scenarios = (sides, kill, restart, stop, late, signals, hosts, strangers,
                 many)
    names = {scenario.__name__: scenario for scenario in scenarios}
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--times', type=int, default=5, help='runs of a kind')
    parser.add_argument('--seed', type=int, default=3)
    parser.add_argument('--data', default=conftest.DATA)
    parser.add_argument('--only', nargs='+', default=names, choices=names)
    parser.parse_args(namespace=OPTIONS)
    print('| what | floor | seen | met |\n' + '| --- ' * 4 + '|')
    with tempfile.TemporaryDirectory() as OPTIONS.keep:
        for name in OPTIONS.only:
            began = time.monotonic()
            try:
                names[name]()
            except Exception:  # pylint: disable=broad-except
                traceback.print_exc()
                row(f'{name}: ends', 'no, see stderr', 'yes')
            row(f'{name}: seconds in all', time.monotonic() - began)
    return int(bool(MISSED))


if __name__ == '__main__':
    sys.exit(main())
