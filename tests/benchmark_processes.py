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
FAULTS = OSError, EOFError, connection.AuthenticationError
OPTIONS = argparse.Namespace()  # see main()
MISSED = []


def row(what, seen, floor=None, least=False):
    """Prints a line of the table; its floor is that at most, or at least."""
    bound = met = ''
    if floor is not None:
        bound = f'at {"least" if least else "most"} {floor}'
        met = 'met' if (seen >= floor if least else seen <= floor) else 'MISSED'
    MISSED.extend([what] * (met == 'MISSED'))
    seen = f'{seen:.2f}' if isinstance(seen, float) else seen
    print(f'| {what} | {bound} | {seen} | {met} |', flush=True)


def read(path):
    """The text of a file; nothing if there is none."""
    with contextlib.suppress(OSError):
        return pathlib.Path(path).read_text(encoding='utf-8', errors='replace')
    return ''


def status(number, key, file='status'):
    """A number of the status of a process, such as VmHWM, most kB; 0: ended."""
    found = re.search(rf'{key}:\s+(\d+)', read(f'/proc/{number}/{file}'))
    return int(found[1]) if found else 0


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
        torchrun: more words for it.

    Attributes:
        started: the Popen of each process that was started here.
    """

    def __init__(self, words='', count=K, torchrun=''):
        super().__init__()
        self.folder, self.port = tempfile.mkdtemp(dir=OPTIONS.keep), free_port()
        self._words = ['--data', OPTIONS.data, '--seed', OPTIONS.seed]
        self._words += ['--steps', OPTIONS.steps, '--log_every', 10]
        self._words += ['--evaluate_every', 0]  # it takes time from training
        self._words += ['--log_folder', self.folder, *words.split()]
        self._files = [
            self.enter_context(open(f'{self.folder}/{name}', 'ab'))
            for name in ('stdout', 'stderr')
        ]
        self.started = []
        self.callback(self._kill)
        if count is not None:
            launcher = (f'-m torch.distributed.run --nproc-per-node {count} '
                        f'--master-port {self.port} {torchrun}')
            self._start(launcher=launcher if count else '')

    def _start(self, before='', launcher=''):
        command = [*before.split(), sys.executable, *launcher.split(), MAIN]
        self.started.append(
            subprocess.Popen(list(map(str, command + self._words)),
                             stdout=self._files[0],
                             stderr=self._files[1],
                             env=os.environ | dict(MARK=self.folder),
                             start_new_session=True))

    def start(self, rank, before=''):
        """Starts one process as torchrun would, but without it."""
        self._start(f'{before} env RANK={rank} LOCAL_RANK={rank} '
                    f'WORLD_SIZE={K} MASTER_PORT={self.port} '
                    'OMP_NUM_THREADS=1 MACH_KEY=secret')

    def _kill(self):
        for number in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for process in self.started:
            process.wait(20)

    def living(self):
        """The id of each of its processes -> the words of its environment."""
        found = {}
        for folder in pathlib.Path('/proc').glob('[0-9]*'):
            words = read(folder / 'environ').split('\0')
            if f'MARK={self.folder}' in words:
                found[int(folder.name)] = words
        return found

    def find(self):
        """Rank -> id of what trains; torchrun watches the parent of that."""
        found, parents = {}, [one.pid for one in self.started]
        for number, words in self.living().items():
            rank = [word[5:] for word in words if word.startswith('RANK=')]
            if rank and status(number, 'PPid') not in parents:
                found[int(rank[0])] = number
        return found

    def log(self, name=0):
        """What it has written so far: log of a process, 'stdout', 'stderr'."""
        name = name if isinstance(name, str) else f'process{name}.txt'
        return read(f'{self.folder}/{name}')

    def finals(self, name=0):
        """MACH -> fields of its final line in a log."""
        log = metrics.parse_log(self.log(name), f'{name}')
        return {one['mach']: one for one in log.finals if one != log.mean}

    def gone(self, name=0):
        """The MACHs whose final accuracy is nan in a log."""
        finals = self.finals(name).items()
        return [i for i, final in finals if math.isnan(final['real'])]

    def wait(self, condition):
        """Until condition() is true; returns the seconds that took."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() > began + DEADLINE:
                raise TimeoutError(self.log('stderr')[-3000:])
            time.sleep(0.1)
        return time.monotonic() - began

    def train(self, steps):
        """Until a MACH has taken so many steps; gives what `find` does."""
        step = re.compile(r'^step  (\d+)', re.M)
        self.wait(lambda: any(
            int(taken) >= steps for taken in step.findall(self.log())))
        return self.find()

    def tell(self, ranks):
        """Until all these processes have said their finals; the seconds."""
        return self.wait(
            lambda: all(self.log(rank).count('\nfinal') > K for rank in ranks))

    def hear(self, text, name='stderr'):
        """Until it writes this, from now on; the seconds."""
        said = len(self.log(name))
        return self.wait(lambda: self.log(name).find(text, said) >= 0)

    def end(self):
        """Until all processes have ended."""
        self.wait(lambda: None not in [one.poll() for one in self.started])


@functools.cache
def plain(words='', count=K):
    """A Run that nothing happens to; it has ended.

    Its `most` are the kB that a process that trains has held at most, in all
    and without what is shared, such as libraries; `shares`: what it and its
    parent have of the memory after 40 steps, each page counted once.
    """
    with Run(words, count) as run:
        numbers, run.most = run.train(10).values(), dict(VmHWM=0, RssAnon=0)
        run.train(min(OPTIONS.steps // 2, 40))
        run.shares = [(status(i, 'Pss', 'smaps_rollup'),
                       status(status(i, 'PPid'), 'Pss', 'smaps_rollup'))
                      for i in numbers]

        def over():
            for key, most in run.most.items():
                seen = [status(number, key) for number in numbers]
                run.most[key] = max([most, *seen])
            return run.started[0].poll() is not None

        run.wait(over)
    return run


def mean(found, key, without=None):
    """Of the finals, but not that of one MACH."""
    return fmean(final[key] for i, final in found.items() if i != without)


def below(found, without=None):
    """Points that the mean is below that of the undisturbed run."""
    base = plain().finals()
    return max(
        mean(base, key) - mean(found, key, without)
        for key in ('real', 'synthetic'))


def behind(found, mach):
    """Points that one MACH is below the mean of all others."""
    return max(
        mean(found, key, mach) - found[mach][key]
        for key in ('real', 'synthetic'))


def gain(found, without=None):
    """Least real accuracy of a MACH, in points above the same one isolated."""
    alone = plain('--connected False', 0).finals()
    return min(final['real'] - alone[i]['real']
               for i, final in found.items()
               if i != without)


def faster(found, without=None):
    """Mean rate in parts of that of the same MACHs in the undisturbed run."""
    return mean(found, 'rate', without) / mean(plain().finals(), 'rate',
                                               without)


def sides():
    """Threads and processes side by side, and what one process holds."""
    runs = plain(count=0).finals(), plain().finals()
    for key in 'real', 'synthetic', 'rate':
        seen = [mean(found, key) for found in runs]
        row(f'{key}, threads / processes', '{:.2f} / {:.2f}'.format(*seen))
        if key != 'rate':
            row(f'{key}: points apart', abs(seen[0] - seen[1]), 0.3)
    for what, found in zip(('threads', 'processes'), runs):
        row(f'{what}: least gain over isolated', gain(found), 0, True)
        row(f'{what}: seconds, of the slowest MACH',
            max(final['seconds'] for final in found.values()))
    most = plain().most
    row('MB of a process that trains', most['VmHWM'] / 1024, 600)
    row('MB of these that are not shared', most['RssAnon'] / 1024)
    row(
        'MB of one and of its parent, each page counted once',
        '{:.0f} / {:.0f}'.format(
            *[max(shares) / 1024 for shares in zip(*plain().shares)]))


def kill():
    """kill -9 of a process that trains, at a third of the run."""
    ended, gains = 0, []
    for rank in (i % K for i in range(OPTIONS.times)):
        others = [i for i in range(K) if i != rank]
        with Run() as run:
            os.kill(run.train(OPTIONS.steps // 3)[rank], signal.SIGKILL)
            run.end()
        ended += all(run.gone(other) == [rank] for other in others)
        found = run.finals(others[0])
        gains.append(gain(found, rank))
        row(f'process {rank} killed: points below', below(found, rank), 0.5)
    row('killed: least gain over isolated', min(gains), 0, True)
    row('killed: runs that all others end', ended, OPTIONS.times, True)


def restart():
    """The same with --max-restarts: it goes on from its checkpoint.

    The others are to train for longer than a process takes to start.
    """
    steps = 5 * OPTIONS.steps // 2
    for rank in (i % K for i in range(OPTIONS.times)):
        folder = tempfile.mkdtemp(dir=OPTIONS.keep)
        words = (f'--steps {steps} --checkpoint {folder} '
                 '--checkpoint_every 25')
        with Run(words, torchrun='--max-restarts 1') as run:
            os.kill(run.train(steps // 3)[rank], signal.SIGKILL)
            # Of process 0 others say nothing: it is back when it prints again.
            seconds = (run.hear(f'process {rank} is here')
                       if rank else run.hear('step', 'stdout'))
            run.end()
        row(f'process {rank} restarted: seconds until it is heard', seconds, 15)
        row(f'process {rank} restarted: points of its MACH below others',
            behind(run.finals('stdout'), rank), 0.5)  # whole, whoever it was


def stop():
    """SIGSTOP: a process hangs, for good or for 30 seconds."""
    with Run() as run:
        number = run.train(OPTIONS.steps // 3)[1]
        os.kill(number, signal.SIGSTOP)
        run.tell([0, 2, 3, 4])
        os.kill(number, signal.SIGKILL)
        run.end()
    row('stopped for good: points below', below(run.finals(), 1), 0.5)
    row('stopped for good: rate of others', faster(run.finals(), 1), 0.95, True)
    steps = 10 * OPTIONS.steps  # so that half a minute is a part of the run
    with Run(f'--steps {steps}') as run:
        number = run.train(steps // 3)[1]
        os.kill(number, signal.SIGSTOP)
        time.sleep(30)
        os.kill(number, signal.SIGCONT)
        run.end()
    row('stopped for 30 s: points of its MACH below others',
        behind(run.finals(), 1), 0.5)
    row('stopped for 30 s: rate of others', faster(run.finals(), 1), 0.95, True)


def late():
    """A process that never starts, and one that starts late."""
    others = 0, 1, 3, 4
    with Run(count=None) as run:
        for rank in others:
            run.start(rank)
        run.end()
    row('never started: processes that say so',
        run.log('stderr').count('begins without process [2]'), 1, True)
    row('never started: processes that end without it',
        [run.gone(rank) for rank in others].count([2]), 4, True)
    row('never started: points below', below(run.finals(), 2), 0.5)
    # The others, faster by a fourth without it, are to train when it comes.
    steps = int(mean(plain().finals(), 'rate') * 5 / 4 * (OPTIONS.late + 20))
    with Run(f'--steps {steps}', None) as run:
        for rank in others:
            run.start(rank)
        time.sleep(OPTIONS.late)
        run.start(2)
        run.end()
    row(f'{OPTIONS.late} s late: steps of its MACH',
        run.finals()[2]['steps'], steps, True)
    row(f'{OPTIONS.late} s late: points of its MACH below others',
        behind(run.finals(), 2))


def signals():
    """SIGINT and SIGTERM, to one of three processes."""
    ways = itertools.product(('torchrun', 'watched', 'child'),
                             (signal.SIGINT, signal.SIGTERM))
    numbers, wrong = range(max(6, OPTIONS.times)), 0
    for number, (whom, sent) in zip(numbers, itertools.cycle(ways)):
        with Run() as run:
            ids = dict(child=run.train(50)[number % K])
            ids['watched'] = status(ids['child'], 'PPid')
            ids['torchrun'] = status(ids['watched'], 'PPid')
            os.kill(ids[whom], sent)
            seconds = run.tell(range(K))
            run.end()
            wrong += len(run.living())
        wrong += sum(len(run.gone(rank)) for rank in range(K))
        codes = re.findall(r'exitcode +: (-?\d+)', run.log('stderr'))
        wrong += sum(int(code) != 128 + sent for code in codes)
        row(f'{sent.name} to {whom}: seconds until all finals', seconds, 5)
        row(f'{sent.name} to {whom}: status of torchrun; of others it tells',
            f'{run.started[0].returncode}; {" ".join(codes)}')
    row('signals: processes left, finals nan, other statuses', wrong, 0)


def make_hosts(stack):
    """Of two hosts, until the stack ends: address, words before a command."""
    names = [f'mach{os.getpid()}{end}' for end in 'ab']
    calls = [f'netns add {name}' for name in names]
    calls.append(f'link add mach netns {names[0]} type veth '
                 f'peer name mach netns {names[1]}')
    for i, name in enumerate(names, start=1):
        calls.append(f'-n {name} address add 10.77.0.{i}/24 dev mach')
        calls += [f'-n {name} link set {end} up' for end in ('lo', 'mach')]
        stack.callback(os.system, f'ip netns delete {name} 2> /dev/null')
    if any(os.system(f'ip {call} 2> /dev/null') for call in calls):
        print('no network namespaces here: two addresses', flush=True)
        return [('127.0.1.1', ''), ('127.0.1.2', '')]
    return [(f'10.77.0.{i}', f'ip netns exec {name}')
            for i, name in enumerate(names, start=1)]


def hosts():
    """Two hosts, near each other and far apart, as main.py plays it."""
    for what, words in (('two hosts', ''),
                        ("two hosts, main.py's own latency and loss",
                         '--latency 0.05 --loss_rate 0.01')):
        with contextlib.ExitStack() as stack:
            places = make_hosts(stack)
            words += ' --hosts ' + ','.join(address for address, _ in places)
            run = stack.enter_context(Run(words, None))
            for rank in range(K):
                run.start(rank, places[rank * 2 // K][1])
            run.end()
        row(f'{what}: points below one', below(run.finals()), 0.3)
        row(f'{what}: rate of one', faster(run.finals()), 0.95, True)


def strangers():
    """Connections that do not know the key, and what they try."""
    tried = [os.urandom(10**6), struct.pack('!iQ', -1, 2**60) + bytes(10**6)]
    tried += [struct.pack('!i', 20) + b'half'] + [b''] * 1000
    steps = 3 * OPTIONS.steps  # no evaluation takes memory meanwhile
    with Run(f'--steps {steps}') as run:
        number = run.train(steps // 3)[0]
        address, most = ('127.0.0.1', run.port + 1), []
        most.append(status(number, 'VmHWM'))
        time.sleep(5)
        most.append(status(number, 'VmHWM'))
        with contextlib.suppress(*FAULTS):
            connection.Client(address, authkey=b'wrong').close()
        for content in tried:  # they stay until the run has ended
            with contextlib.suppress(*FAULTS):
                sock = socket.create_connection(address, 5)
                run.enter_context(sock).sendall(content)
        time.sleep(5)
        most.append(status(number, 'VmHWM'))
        run.end()
    refused = run.log('stderr').count('process 0 refuses a connection')
    row('strangers: lines about connections refused', refused, 1)
    row('strangers: MB that process 0 has grown by in 5 s before',
        (most[1] - most[0]) / 1024)
    row('strangers: MB that it grows by with them', (most[2] - most[1]) / 1024,
        50)
    row('strangers: runs that end', len(run.finals()) == K, 1, True)


def many():
    """16 MACHs, as threads and as processes."""
    words = '--k 16 --neighbours 2 --steps 60'
    for what, count in ('threads', 0), ('processes', 16):
        for key in 'real', 'synthetic', 'rate', 'seconds':
            row(f'16 {what}: {key}', mean(plain(words, count).finals(), key))


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
    parser.add_argument('--late', type=int, default=60, help='seconds')
    parser.add_argument('--seed', type=int, default=3)
    parser.add_argument('--data', default=conftest.DATA)
    parser.add_argument('--only', nargs='+', default=names, choices=names)
    parser.parse_args(namespace=OPTIONS)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print('| what | floor | seen | met |\n' + '| --- ' * 4 + '|')
    with tempfile.TemporaryDirectory() as OPTIONS.keep:
        for name in OPTIONS.only:
            began = time.monotonic()
            try:
                names[name]()
            except Exception:  # pylint: disable=broad-except
                traceback.print_exc()
                row(f'{name}: scenarios that fail, see stderr', 1, 0)
            row(f'{name}: seconds in all', time.monotonic() - began)
    return int(bool(MISSED))


if __name__ == '__main__':
    sys.exit(main())
