"""MACHs in processes: the wire, lost and late processes, strangers, torchrun.

Most tests make Nodes in this one process. A few start torchrun.
"""

import contextlib
import inspect
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from multiprocessing import connection

import conftest
import pytest
import torch

from mach import data, metrics

# pylint: disable=protected-access
EXPERIMENT = 'asynchronous_kgraph'
KGRAPH = conftest.load(EXPERIMENT)
link, processes = KGRAPH.link, KGRAPH.processes
wait_until = conftest.wait_until
PORTS = itertools.count(21000 + os.getpid() % 10000, 20)


def pixels(rows=3):
    """x [rows, 784], as from images."""
    return data.normalise(torch.randint(256, (rows, 784), dtype=torch.uint8))


def spike(sender, x=None):
    """A Spike about x."""
    return link.Spike((sender, 2**62), sender, pixels() if x is None else x, 1)


@pytest.fixture(name='nodes')
def fixture_nodes(monkeypatch, dataset):
    """Makes Nodes of one run, each with one MACH, as if in processes."""
    port, main = next(PORTS), conftest.load_main(EXPERIMENT)

    def make(rank, size=2, key='', name='greys', **settings):
        for variable in 'RANK', 'LOCAL_RANK':
            monkeypatch.setenv(variable, str(rank))
        monkeypatch.setenv('WORLD_SIZE', str(size))
        monkeypatch.setenv('MASTER_PORT', str(port))
        monkeypatch.setenv('MACH_KEY', key)
        settings = main.Hyperparameters(k=size, hidden=8, **settings)
        node = processes.Node(settings, name)
        node.trainer, = node.adopt(main.make_trainers(settings, dataset))
        node.exchange = node.trainer.exchange
        node.open()
        return node

    return make


def pair(nodes, size=2, **settings):
    """Nodes that hear each other, and send to each other."""
    made = [nodes(rank, size, **settings) for rank in range(size)]
    assert wait_until(lambda: joined(made))
    return made


def joined(made):
    """Whether all these Nodes hear all."""
    return all(peer.wire and peer.connected
               for node in made
               for peer in node._peers.values())


# --------------------------------------------------------------------- the wire


def carried(message):
    """What arrives of a message, and how many bytes were sent."""
    frames, wire = [], types.SimpleNamespace()
    wire.send_bytes = lambda frame: frames.append(bytes(frame))
    processes.send(wire, 4, message)
    size = sum(map(len, frames))
    near, far = connection.Pipe()
    threading.Thread(
        target=lambda: [near.send_bytes(frame) for frame in frames]).start()
    receiver, arrived = processes.receive(far)
    assert receiver == 4 and isinstance(arrived, type(message))
    return arrived, size


@pytest.mark.parametrize('noise, size', [(0, 1), (0.01, 4)])
def test_messages_arrive_as_they_were_and_images_as_bytes(noise, size):
    x = pixels(32)
    x += noise * torch.rand_like(x)
    values, small = torch.randn(64, 32).T, 32 * 64 * 4  # not contiguous
    answer = link.Answer((2, 5), 1, values, 7, 0)
    grad = link.Grad((1, 6), 1, x, values, -1, 0)
    large = 32 * 784 * size
    for message, least in (spike(1, x), large), (answer,
                                                 small), (grad, large + small):
        arrived, sent = carried(message)
        assert least < sent < least + 512
        for one, other in zip(vars(message).values(), vars(arrived).values()):
            assert type(other) is type(one)
            if torch.is_tensor(one):
                assert torch.equal(one, other) and other.dtype == one.dtype
            else:
                assert one == other


def test_links_deliver_both_ways_and_the_sender_counts_losses(nodes):
    two = pair(nodes, loss_rate=0.5)
    for sender, receiver in two, two[::-1]:
        come, box = [], receiver.exchange.mailbox
        departure = sender.exchange.links[receiver.rank]
        for _ in range(50):
            departure.send(spike(sender.rank))
        assert 5 < departure.lost < 45
        assert wait_until(lambda: come.extend(box.collect()) or departure.lost +
                          len(come) == 50)
        assert come[0].key == (sender.rank, 2**62)


def test_sending_never_waits_and_counts_what_is_lost(nodes, monkeypatch):
    monkeypatch.setattr(processes.Peer, 'run', lambda _: None)
    node = nodes(0)
    way, peer, began = node.exchange.links[1], node._peers[1], time.monotonic()
    for peer.connected in False, True:  # to a process that reads nothing
        for _ in range(1000):
            way.send(spike(0))
    assert (way.lost, way.dropped) == (1000, 1000 - processes.QUEUE)
    assert len(peer.mail.collect()) == processes.QUEUE
    assert time.monotonic() - began < 2


# ------------------------------------------------------------ what others know


def test_all_is_told_again_on_a_new_connection(nodes):
    first = nodes(0)
    told, = first.trainer.snapshot().values()
    first.tell([], {0: told})
    second = nodes(1)
    for _ in range(2):
        assert wait_until(lambda: second._snapshots)
        lines, news = second.news()
        assert lines == [] and news[0].tally.steps == 0 and not news[0].ended
        for name in 'network', 'student':
            one, other = getattr(told, name), getattr(news[0], name)
            for p, q in zip(one.parameters(), other.parameters(), strict=True):
                assert torch.equal(p, q) and p is not q
        second._peers[0].wire.close()  # it is cut, and made again
    first.trainer.tally.steps = 7  # counts go as a sign of life, twice a second
    assert wait_until(lambda: second.tally(0).steps == 7)
    second.tell([dict(step=1, mach=1), dict(step=2, mach=1)], {})
    first.tell([], first.trainer.snapshot(False, ended=True, failed=True))
    second.tell([dict(step=3, mach=1)], second.trainer.snapshot(ended=True))
    first.leave()
    assert wait_until(lambda: 1 in first._snapshots and 0 in second._snapshots)
    assert second.news()[1][0].failed
    lines, news = first.news()
    assert [line['step'] for line in lines] == [1, 2, 3]
    assert news[1].ended and news[1].network and first.news() == ([], {})


def test_a_flood_of_news_is_bounded(nodes, monkeypatch):
    monkeypatch.setattr(processes, 'LINES', 100)
    first, second = pair(nodes)
    for step in range(300):  # the main thread of `first` takes nothing
        second.trainer.tally.steps = step
        second.tell([dict(step=step, mach=1)], second.trainer.snapshot())
        time.sleep(0.002)
    assert wait_until(lambda: first._lines and first._lines[-1]['step'] == 299,
                      10)
    assert wait_until(lambda: first._snapshots[1].tally.steps == 299)
    assert len(first._lines) <= 100 and len(first._snapshots) == 1
    second.exchange.links[0].send(spike(1))  # it goes on hearing
    assert wait_until(first.exchange.mailbox.collect)


def test_all_begin_together_and_a_late_one_alone(nodes, capsys, monkeypatch):
    monkeypatch.setattr(processes, 'PATIENCE', 0.5)
    first, began = nodes(0, size=3), time.monotonic()
    first.begin()
    assert 0.5 <= time.monotonic() - began < 8
    assert capsys.readouterr(
    ).err == 'process 0 begins without process [1, 2]\n'
    monkeypatch.setattr(processes, 'PATIENCE', 60)
    second, began = nodes(1, size=3), time.monotonic()
    second.begin()  # the first has begun
    assert 1 <= time.monotonic() - began < 10
    assert wait_until(lambda: first.hears(1) and second.hears(0))
    assert not first.hears(2) and first.hears(0)
    assert capsys.readouterr().err == ('process 0 says: process 1 is here\n'
                                       'process 1 begins without process [2]\n')


def test_a_signal_goes_round_and_some_hyperparameters_may_differ(nodes):
    two = first, second = nodes(0), nodes(1, log_every=5, precision='fp32')
    assert wait_until(lambda: joined(two))
    second.interrupt(signal.SIGINT)
    assert wait_until(lambda: first.signal == signal.SIGINT)
    first.interrupt(signal.SIGTERM)
    assert first.signal == signal.SIGINT  # the first counts


def test_silence_is_said_once_by_the_lowest(nodes, monkeypatch, capsys):
    monkeypatch.setattr(processes, 'SILENCE', 1)
    first, second, third = pair(nodes, size=3)
    for peer in third._peers.values():  # it is as if this process were stopped
        peer._tell = lambda *_: None
    assert wait_until(lambda: not first.hears(2) and not second.hears(2))
    time.sleep(2)
    gone = re.findall('.*is gone', capsys.readouterr().err)
    assert gone == ['process 0 says: process 2 is gone']


# ------------------------------------------------------------------- strangers


@pytest.mark.parametrize('other, whys', [
    (dict(key='another'), ['a connection: it has another MACH_KEY'] * 2),
    (dict(seed=1), [
        'process 1: seed is 1 there, 0 here',
        'process 0: seed is 0 there, 1 here'
    ]),
    (dict(learning_rate=0.1), [
        'process 1: learning_rate is 0.1 there, 0.003 here',
        'process 0: learning_rate is 0.003 there, 0.1 here'
    ]),
    (dict(name='reds'), [
        'process 1: dataset is reds there, greys here',
        'process 0: dataset is greys there, reds here'
    ]),
])
def test_a_process_that_differs_is_refused_once(nodes, capsys, other, whys):
    two = nodes(0), nodes(1, **other)
    time.sleep(1.5)
    assert not any(node.hears(1 - node.rank) for node in two)
    for rank, (line, why) in enumerate(
            zip(sorted(capsys.readouterr().err.splitlines()), whys,
                strict=True)):
        assert line.startswith(f'process {rank} refuses {why}')
    if 'key' not in other:  # process 0 has the hyperparameters that count
        with pytest.raises(data.DataError) as refused:
            two[1].begin()
        _, hint = whys[1].split(': ')
        assert str(refused.value) == f'process 0 differs: {hint}'


def test_strangers_are_harmless(nodes, monkeypatch, capsys):
    monkeypatch.setattr(processes, 'SILENCE', 1)
    first, second = pair(nodes)
    address, before = first._addresses[0], threading.active_count()
    assert address[0] == '127.0.0.1'  # nothing listens elsewhere
    contents = os.urandom(100), b'\xff' * 12, b'\0\0\0\x20half', b''
    socks = [socket.create_connection(address) for _ in range(400)]
    for sock, content in zip(socks, itertools.cycle(contents)):
        with contextlib.suppress(OSError):
            sock.sendall(content)
    assert threading.active_count() <= before + processes.STRANGERS
    with pytest.raises((OSError, EOFError, connection.AuthenticationError)):
        connection.Client(address, authkey=b'a guess')
    second.exchange.links[0].send(spike(1))
    assert wait_until(first.exchange.mailbox.collect)
    assert wait_until(lambda: threading.active_count() <= before)
    second._peers[0].wire.close()  # a process comes back after them
    assert wait_until(lambda: joined([first, second]))
    for sock in socks:
        sock.close()
    assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('names, hosts, message', [
    (dict(WORLD_SIZE='4'), '', '4 processes need as many MACHs: --k 4'),
    (dict(RANK='5', WORLD_SIZE='2'), '', 'RANK=5 must be 0 to 1'),
    (dict(WORLD_SIZE='-1'), '', 'WORLD_SIZE=-1'),
    (dict(WORLD_SIZE='2', MASTER_PORT='tcp://10.0.0.1:80'), '', 'MASTER_PORT'),
    (dict(WORLD_SIZE='2', MASTER_PORT='65535'), '', 'MASTER_PORT=.*65533'),
    (dict(WORLD_SIZE='2', LOCAL_RANK=''), '', 'LOCAL_RANK'),
    (dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='0'), '', 'need --hosts'),
    (dict(WORLD_SIZE='2'), '10.0.0.1,10.0.0.2', 'MACH_KEY'),
])
def test_an_environment_that_does_not_fit(monkeypatch, names, hosts, message):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    main = conftest.load_main(EXPERIMENT)
    with pytest.raises(data.DataError, match=message):
        processes.Node(main.Hyperparameters(k=3, hosts=hosts), 'greys')


def test_a_run_of_one_process_reads_no_variable(monkeypatch):
    for name in 'RANK', 'LOCAL_RANK', 'MASTER_PORT', 'MASTER_ADDR':
        monkeypatch.setenv(name, 'tcp://10.0.0.1:80')
    settings = conftest.load_main(EXPERIMENT).Hyperparameters()
    node = processes.Node(settings, 'greys')
    assert (node.rank, node.size, node.restarted) == (0, 1, False)


# ------------------------------------------------------------------- supervise

# The function alone: no test here waits for torch to be imported.
SUPERVISED = f'''import contextlib, ctypes, os, signal, sys, time
sys.path.insert(0, {str(conftest.ROOT)!r})
from mach import metrics
'''
SUPERVISED += inspect.getsource(processes.supervise) + '''
supervise()
print('attempt', os.environ.get('MACH_ATTEMPT'), os.getpid(), flush=True)
'''


def supervised(then, prefix=(), **names):
    """A process that runs `then` in the child of a supervisor."""
    names = dict(RANK='3', TORCHELASTIC_MAX_RESTARTS='2') | names
    return subprocess.Popen([*prefix, sys.executable, '-c', SUPERVISED + then],
                            env=os.environ | names,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            text=True)


@pytest.mark.parametrize(
    'then, code, attempts',
    [
        ('os.kill(os.getpid(), 9)', 1, '012'),
        ('os._exit(130)', 130, '0'),
        # A job of a script: its shell ignores SIGINT, and so does all that it starts.
        ('os.kill(os.getppid(), 2); os.kill(os.getpid(), 2); os._exit(7)', 7,
         '0'),
        ('sys.exit(2)', 2, '0'),
        ('', 0, '0'),
    ])
def test_a_killed_child_alone_is_started_again(then, code, attempts):
    job = 'sh', '-c', 'trap "" INT; exec "$@"', 'sh'
    process = supervised(then, prefix=job, TORCHELASTIC_RUN_ID='none')
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert re.findall(r'attempt (\d)', out) == list(attempts)
    assert len(set(re.findall(r'\d (\d+)', out))) == len(attempts)
    killed = re.findall(r'signal 9; (\d) restarts', err)
    assert killed == (['2', '1', '0'] if len(attempts) > 1 else [])


@pytest.mark.parametrize('again', ['os.kill(os.getpid(), 9)', 'os._exit(2)'])
def test_a_process_that_is_lost_waits_for_the_others(again):
    """Else torchrun would end them, or return 0 without a result."""
    lost = f'{again} if os.environ["MACH_ATTEMPT"] > "0" else os.abort()'
    names = dict(TORCHELASTIC_RUN_ID='none', TORCHELASTIC_MAX_RESTARTS='1')
    other = supervised('time.sleep(2)', **names)
    other.stdout.readline()
    process, began = supervised(lost, **names), time.monotonic()
    assert process.wait(30) == 1 and time.monotonic() > began + 1
    assert other.wait(30) == 0
    for one in other, process:
        one.communicate()


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130),
                                          (signal.SIGTERM, 143),
                                          (signal.SIGHUP, 129),
                                          (signal.SIGKILL, -9)])
def test_signals_reach_the_child_which_ends_with_its_parent(number, code):
    process = supervised('time.sleep(60)', TORCHELASTIC_RUN_ID='none')
    child = int(process.stdout.readline().split()[-1])
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert wait_until(lambda: not os.path.exists(f'/proc/{child}'))


# -------------------------------------------------------------------- torchrun


@contextlib.contextmanager
def torchrun(path, *words, experiment=EXPERIMENT, count=3, restarts=0):
    """A run in processes, as conftest.running gives it.

    Its find(rank) gives the processes of this rank, or of any, oldest first.
    """
    port = next(PORTS)
    prefix = f'{sys.executable} -m torch.distributed.run --no-python'.split()
    prefix += f'--nproc-per-node={count} --max-restarts={restarts}'.split()
    prefix.append(f'--master-port={port}')

    def find(rank=''):
        found = []
        for folder in filter(str.isdigit, os.listdir('/proc')):
            with contextlib.suppress(OSError):
                with open(f'/proc/{folder}/environ', encoding='utf-8') as file:
                    names = f'\0{file.read()}'
                wanted = f'\0MASTER_PORT={port}\0', f'\0RANK={rank}'
                with open(f'/proc/{folder}/stat', encoding='utf-8') as file:
                    started = int(file.read().rsplit(')')[-1].split()[19])
                if all(name in names for name in wanted):
                    found.append((started, int(folder)))
        return [number for _, number in sorted(found)]  # numbers start again

    words = [*conftest.TINY[:3], '--log_every=5', '--k=3', *words]
    with conftest.running(path, experiment, *words, prefix=prefix) as process:
        process.find = find
        try:
            yield process
        finally:
            for number in find():
                with contextlib.suppress(OSError):
                    os.kill(number, signal.SIGKILL)


def test_a_run_in_processes(tmp_path):
    folder = tmp_path / 'logs'
    with torchrun(tmp_path / 'run',
                  '--steps=200',
                  f'--log_folder={folder}',
                  experiment='asynchronous_sequence',
                  count=2) as process:
        code, out, err = process.end()
        assert not process.find()
    assert code == 0 and 'gone' not in err, out[-600:] + err
    log = metrics.parse_log(out)
    assert [f['mach'] for f in log.finals] == [0, 1, 2, 'mean']
    assert log.mean['steps'] == 200 and 80 < log.mean['real'] < 100
    assert sorted((f['mach'], f['step']) for f in log.steps) == [
        (i, step) for i in range(3) for step in range(5, 201, 5)
    ]
    for rank, here in (0, {0, 1, 2}), (1, {1}):
        own = metrics.read_log(folder / f'process{rank}.txt')
        assert {f['mach'] for f in own.steps} == here
        assert own.mean['real'] == log.mean['real']


@pytest.mark.parametrize('restarts, every', [(0, 5), (1, 5), (1, 10**9)])
def test_a_process_is_killed(tmp_path, restarts, every):
    """With `every` 10**9, it has only the checkpoint of a foreign run."""
    steps, folder = 120, tmp_path / 'machs'  # it can come back: one is slow
    words = f'--checkpoint={folder}', f'--checkpoint_every={every}'
    words += f'--steps={steps}', '--slow_mach=2', '--slow_factor=8'
    with torchrun(tmp_path / 'run', *words, restarts=restarts) as process:
        assert wait_until(lambda: 'step  10  mach 1' in process.said())
        if every > steps:
            torch.save(dict(hyperparameters={}, trainer={}),
                       folder / 'mach1.pt')
        os.kill(process.find(1)[-1], signal.SIGKILL)
        code, out, err = process.end()
        assert not process.find()
    assert 'process 1 was killed by signal 9' in err
    assert err.count('process 0 says: process 1 is gone') == 1
    log = metrics.parse_log(out)
    assert [f['mach'] for f in log.finals] == [0, 1, 2, 'mean']
    lost = [f['mach'] for f in log.finals if f['real'] != f['real']]
    ends = [f['steps'] for f in log.finals]
    anew = err.count('after the restart a MACH starts anew: cannot resume')
    assert anew == (every > steps)
    if restarts:
        assert 'process 1 is here' in err
        assert code == 0 and not lost and ends == [steps] * 4
    else:
        assert code == 1 and lost == [1, 'mean']
        assert ends[0] == ends[2] == steps > ends[1]


def test_no_process_is_left(tmp_path):
    with torchrun(tmp_path / 'run', '--steps=1000000', count=2) as process:
        assert wait_until(lambda: 'step  10 ' in process.said())
        for rank in 0, 1:
            os.kill(process.find(rank)[-1], signal.SIGKILL)
        code, out, _ = process.end()
    assert code == 1 and 'final' not in out


def test_processes_count_what_is_lost_and_in_flight_as_threads_do(
        tmp_path, run_here):
    words = '--steps=60', '--k=4', '--loss_rate=0.5', '--latency=1000'
    with torchrun(tmp_path / 'run', *words, count=2) as process:
        code, out, _ = process.end()
    log, threads = metrics.parse_log(out), run_here(EXPERIMENT, *words)[1]
    assert code == 0
    for key in 'lost', 'in_flight':
        for here, there in zip(log.finals, threads.finals, strict=True):
            assert here[key] == pytest.approx(there[key], rel=0.4), key


def test_a_signal_ends_all(tmp_path):
    with torchrun(tmp_path / 'run', '--steps=1000000', count=2) as process:
        assert wait_until(lambda: 'step  10 ' in process.said())
        os.kill(process.find(1)[-1], signal.SIGINT)
        assert wait_until(lambda: 'mach mean' in process.said())
        _, out, err = process.end()
        assert not process.find()
    assert metrics.parse_log(out).mean['real'] > 0
    assert set(re.findall(r'exitcode *: (\d+)', err)) == {'130'}
