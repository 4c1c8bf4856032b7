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


def status(number, key):
    """A number of the status of a process, such as VmHWM, most kB; 0: ended."""
    found = re.search(rf'{key}:\s+(\d+)', read(f'/proc/{number}/status'))
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
        launcher: words for torchrun.

    Attributes:
        most: MB at most, of those that train and of those torchrun watches.
    """

    def __init__(self, words='', count=K, launcher=''):
        super().__init__()
        self.folder, self.port = tempfile.mkdtemp(dir=OPTIONS.keep), free_port()
        self._words = ['--data', OPTIONS.data, '--seed', OPTIONS.seed]
        self._words += ['--steps', OPTIONS.steps, '--log_every', 10]
        self._words += ['--log_folder', self.folder, *words.split()]
        self.started, self.most = [], (0.0, 0.0)
        self.callback(self._kill)
        if count is not None:
            torchrun = (f'-m torch.distributed.run --nproc-per-node {count} '
                        f'--master-port {self.port} {launcher}')
            self._start(torchrun if count else '')

    def _start(self, before, prefix='', **environment):
        command = [*prefix.split(), sys.executable, *before.split(), MAIN]
        environment = os.environ | environment | dict(MARK=self.folder)
        with open(f'{self.folder}/stdout',
                  'ab') as out, open(f'{self.folder}/stderr', 'ab') as errors:
            self.started.append(
                subprocess.Popen(list(map(str, command + self._words)),
                                 stdout=out,
                                 stderr=errors,
                                 env=environment,
                                 start_new_session=True))

    def start(self, rank, prefix='', **environment):
        """Starts one process as torchrun would, but without it."""
        words = (f'RANK={rank} LOCAL_RANK={rank} WORLD_SIZE={K} '
                 f'MASTER_PORT={self.port} OMP_NUM_THREADS=1')
        environment |= dict(word.split('=') for word in words.split())
        self._start('', prefix, **environment)

    def _kill(self):
        for number in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for process in self.started:
            process.wait(20)

    def living(self):
        """The id of each of its processes -> the words of its environment."""
        found = {
            int(folder.name): read(folder / 'environ').split('\0')
            for folder in pathlib.Path('/proc').glob('[0-9]*')
        }
        mark = f'MARK={self.folder}'
        return {
            number: words for number, words in found.items() if mark in words
        }

    def find(self):
        """Rank -> id of the process that trains; torchrun watches its parent."""
        return {
            int(word[5:]): number for number, words in self.living().items()
            for word in words
            if word.startswith('RANK=') and
            status(number, 'PPid') not in [one.pid for one in self.started]
        }

    def log(self, name='process0.txt'):
        """What it has written so far: a process's log, 'stdout' or 'stderr'."""
        return read(f'{self.folder}/{name}')

    def finals(self, name='process0.txt'):
        """MACH -> fields of its final line in a log."""
        log = metrics.parse_log(self.log(name), name)
        return {one['mach']: one for one in log.finals if one != log.mean}

    def gone(self, ranks):
        """The MACHs whose final accuracy is nan, as each process says."""
        return [[
            i
            for i, final in self.finals(f'process{rank}.txt').items()
            if math.isnan(final['real'] + final['synthetic'])
        ]
                for rank in ranks]

    def wait(self, condition):
        """Until condition() is true; returns the seconds that took."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() > began + DEADLINE:
                raise TimeoutError(self.log('stderr')[-3000:])
            time.sleep(0.1)
        return time.monotonic() - began

    def train(self, steps):
        """Until a MACH has taken so many steps; see `find` for what it gives."""
        self.wait(lambda: steps <= max(
            map(int, re.findall(r'^step  (\d+)', self.log(), re.M)), default=0))
        return self.find()

    def tell(self, ranks):
        """Until all these processes have said their finals; the seconds."""
        return self.wait(lambda: all(
            re.search('^final .* mach mean', self.log(f'process{rank}.txt'), re.
                      M) for rank in ranks))

    def end(self):
        """Until all processes have ended."""
        numbers = list(self.find().values())
        numbers = numbers, [status(number, 'PPid') for number in numbers]

        def over():
            seen = [max(status(i, 'VmHWM') for i in [0, *n]) for n in numbers]
            self.most = [max(m, s / 1024) for m, s in zip(self.most, seen)]
            return all(one.poll() is not None for one in self.started)

        self.wait(over)


@functools.cache
def plain(words='', count=K):
    """A Run that nothing happens to; it has ended."""
    with Run(words, count) as run:
        run.train(10)
        run.end()
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
    for key in 'real', 'synthetic', 'rate', 'seconds':
        seen = [mean(found, key) for found in runs]
        row(f'{key}, threads / processes', '{:.2f} / {:.2f}'.format(*seen))
        if key in ('real', 'synthetic'):
            row(f'{key}: points apart', abs(seen[0] - seen[1]), 0.3)
    for what, found in zip(('threads', 'processes'), runs):
        row(f'{what}: least gain over isolated', gain(found), 0, True)
    row('MB of a process that trains', plain().most[0], 600)
    row('MB of a process that torchrun watches', plain().most[1], 30)


def kill():
    """kill -9 of a process that trains, at a third of the run."""
    ended = 0
    for rank in (i % K for i in range(OPTIONS.times)):
        others = [i for i in range(K) if i != rank]
        with Run() as run:
            os.kill(run.train(OPTIONS.steps // 3)[rank], signal.SIGKILL)
            run.end()
        ended += run.gone(others) == [[rank]] * len(others)
        found = run.finals(f'process{others[0]}.txt')
        row(f'process {rank} killed: points below', below(found, rank), 0.5)
        row(f'process {rank} killed: least gain over isolated',
            gain(found, rank), 0, True)
    row('killed: runs that all others end', ended, OPTIONS.times, True)


def restart():
    """The same with --max-restarts: it goes on from its checkpoint."""
    for rank in (i % K for i in range(OPTIONS.times)):
        folder = tempfile.mkdtemp(dir=OPTIONS.keep)
        words = f'--checkpoint {folder} --checkpoint_every 25'
        with Run(words, launcher='--max-restarts 1') as run:
            numbers, before = run.train(OPTIONS.steps // 3), run.log('stderr')
            os.kill(numbers[rank], signal.SIGKILL)
            what = f'process {rank} is here'
            seconds = run.wait(
                lambda: run.log('stderr').count(what) > before.count(what))
            run.end()
        row(f'{what} again, seconds after kill -9', seconds, 15)
        found = run.finals('stdout')  # one log, whoever was killed
        row(f'{what}: its MACH, points below the others', behind(found, rank),
            0.5)


def stop():
    """SIGSTOP: a process hangs, for good or for 30 seconds."""
    with Run() as run:
        number = run.train(OPTIONS.steps // 3)[1]
        os.kill(number, signal.SIGSTOP)
        run.tell([0, 2, 3, 4])
        os.kill(number, signal.SIGKILL)
        run.end()
    found = run.finals()
    row('stopped for good: points below', below(found, 1), 0.5)
    row('stopped for good: rate of others', faster(found, 1), 0.95, True)
    # The others are to train for longer than it rests.
    slowest = min(final['rate'] for final in plain().finals().values())
    with Run(f'--steps {45 * slowest:.0f}') as run:
        number = run.train(50)[1]
        os.kill(number, signal.SIGSTOP)
        time.sleep(30)
        os.kill(number, signal.SIGCONT)
        run.end()
    found = run.finals()
    row('stopped for 30 s: its MACH, points below the others', behind(found, 1),
        0.5)
    row('stopped for 30 s: rate of others', faster(found, 1), 0.95, True)


def late():
    """A process that never starts, and one that starts a minute late."""
    for never in True, False:
        # Long enough for the others to train for more than a minute.
        steps = OPTIONS.steps if never else 80 * mean(plain().finals(), 'rate')
        with Run(f'--patience 5 --steps {steps:.0f}', None) as run:
            for rank in 0, 1, 3, 4:
                run.start(rank)
            if not never:
                time.sleep(60)
                run.start(2)
            run.end()
        if never:
            said = run.log('stderr').count('begins without process [2]')
            row('never started: processes that say so', said, 1, True)
            row('never started: others that end without it',
                run.gone([0, 1, 3, 4]).count([2]), 4, True)
            row('never started: points below', below(run.finals(), 2), 0.5)
        else:
            row('60 s late: its MACH, points below the others',
                behind(run.finals(), 2), 0.5)


def signals():
    """SIGINT and SIGTERM, to one of three processes."""
    ways = itertools.product(('torchrun', 'watched', 'child'),
                             (signal.SIGINT, signal.SIGTERM))
    numbers, wrong = range(max(6, OPTIONS.times)), 0
    for number, (whom, sent) in zip(numbers, itertools.cycle(ways)):
        with Run() as run:
            child = run.train(50)[number % K]
            watched = status(child, 'PPid')
            os.kill(
                dict(child=child, watched=watched).get(whom,
                                                       status(watched, 'PPid')),
                sent)
            seconds = run.tell(range(K))
            run.end()
            wrong += len(run.living()) + (run.gone(range(K)) != [[]] * K)
        codes = re.findall(r'exitcode +: (-?\d+)', run.log('stderr'))
        wrong += sum(int(code) != 128 + sent for code in codes)
        what = f'{sent.name} to {whom}'
        row(f'{what}: seconds until all have said their finals', seconds, 5)
        row(f'{what}: exit status of torchrun; of processes, as it tells',
            f'{run.started[0].returncode}; {" ".join(codes)}')
    row('signals: processes left, finals nan, other exit statuses', wrong, 0)


def make_hosts(stack):
    """Of two hosts, until the stack ends: address, words before a command."""
    names = [f'mach{os.getpid()}{end}' for end in 'ab']
    script = 'set -e; ip netns add {0}; ip netns add {1}; ip link add mach ' \
        'netns {0} type veth peer name mach netns {1}; '
    for i in 0, 1:
        script += f'ip -n {{{i}}} address add 10.77.0.{i + 1}/24 dev mach; '
        script += f'ip -n {{{i}}} link set lo up; '
        script += f'ip -n {{{i}}} link set mach up; '
        stack.callback(os.system, f'ip netns delete {names[i]} 2> /dev/null')
    if os.system(f'({script.format(*names)}) 2> /dev/null'):
        print('no network namespaces here: two addresses', flush=True)
        return [('127.0.1.1', ''), ('127.0.1.2', '')]
    return [(f'10.77.0.{i}', f'ip netns exec {name}')
            for i, name in enumerate(names, start=1)]


def hosts():
    """Two hosts, near each other and far apart."""
    for what, words in (('two hosts', ''),
                        ("two hosts, the experiment's own latency and loss",
                         '--latency 0.05 --loss_rate 0.01')):
        with contextlib.ExitStack() as stack:
            places = make_hosts(stack)
            words += ' --hosts ' + ','.join(address for address, _ in places)
            run = stack.enter_context(Run(words, None))
            for rank in range(K):
                run.start(rank, places[rank * 2 // K][1], MACH_KEY='secret')
            run.end()
        row(f'{what}: points below one host', below(run.finals()), 0.3)
        row(f'{what}: rate, of that of one host', faster(run.finals()), 0.95,
            True)


def strangers():
    """Connections that do not know the key, and what they try."""
    tried = [os.urandom(10**6), struct.pack('!iQ', -1, 2**60) + bytes(10**6)]
    tried += [struct.pack('!i', 20) + b'half'] + [b''] * 1000
    with Run() as run:
        number = run.train(OPTIONS.steps // 3)[0]
        address, before = ('127.0.0.1', run.port + 1), status(number, 'VmHWM')
        with contextlib.suppress(*FAULTS):
            connection.Client(address, authkey=b'wrong').close()
        for content in tried:  # they stay until the run has ended
            with contextlib.suppress(*FAULTS):
                sock = socket.create_connection(address, 5)
                run.enter_context(sock).sendall(content)
        time.sleep(5)
        grown = (status(number, 'VmHWM') - before) / 1024
        run.end()
    row('strangers: connections that process 0 has refused',
        ''.join(re.findall(r'process 0 has refused (\d+)', run.log('stderr'))))
    row('strangers: MB that process 0 grows', grown, 50)
    row('strangers: points below', below(run.finals()), 0.5)


def many():
    """16 MACHs, as threads and as processes."""
    words = '--k 16 --neighbours 2 --steps 100 --patience 120'
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
