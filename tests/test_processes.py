"""MACHs in processes: the wire, who is there and who is gone, torchrun.

Nodes of one process stand for processes where that is enough; else torchrun
starts some. Each is ended by its id.
"""

import contextlib
import dataclasses
import inspect
import itertools
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import connection

import conftest
import pytest
import test_main
import torch

from mach import data, metrics

EXPERIMENT = 'asynchronous_kgraph'
KGRAPH = conftest.load(EXPERIMENT)
link, processes = KGRAPH.link, KGRAPH.processes
wait_until = test_main.wait_until
PORTS = itertools.count(21000 + os.getpid() % 10000, 20)
TINY = ('--precision=fp32 --batch_size=16 --hidden=32 --student_hidden=32 '
        '--log_every=5 --patience=60').split()
fixture_dataset, fixture_run_here = (test_main.fixture_dataset,
                                     test_main.fixture_run_here)


def pixels(rows=3):
    """x [rows, 784] as it comes from images."""
    generator = torch.Generator().manual_seed(rows)
    return data.normalise(
        torch.randint(256, (rows, 784), generator=generator).to(torch.uint8))


def messages(x):
    """One of each kind."""
    values = torch.randn(len(x), 64)
    return [
        link.Spike((1, 2**62), 1, x, 1),
        link.Answer((2, 5), 1, values, 7),
        link.Grad((1, 6), 1, x, values, -1, 0)
    ]


@pytest.fixture(name='nodes')
def fixture_nodes(monkeypatch, dataset):
    """Gives Nodes of one run, each with a MACH, as if in processes.

    They are never started twice on one port; threads that still try to connect
    find nobody.
    """
    port = next(PORTS)

    def make(rank, size=2, secret='', begin=True, adopt=True, **names):
        monkeypatch.setenv('RANK', str(rank))
        monkeypatch.setenv('LOCAL_RANK', str(rank))
        monkeypatch.setenv('WORLD_SIZE', str(size))
        monkeypatch.setenv('MASTER_PORT', str(port))
        monkeypatch.setenv('MACH_KEY', secret)
        main = conftest.load_main(EXPERIMENT)
        names = dict(k=size, batch_size=16, hidden=8, patience=20.0) | names
        settings = main.Hyperparameters(**names)
        node = processes.Node(settings, 'greys')
        node.trainer = None
        if adopt:
            node.trainer, = node.adopt(main.make_trainers(settings, dataset))
        node.open()
        if begin:
            node.begin()
        return node

    return make


def pair(nodes, **names):
    """Two Nodes that hear each other."""
    found = [nodes(rank, begin=False, **names) for rank in (0, 1)]
    assert wait_until(lambda: found[0].hears(1) and found[1].hears(0), 10)
    return found


# ----------------------------------------------------------------------- frames


@pytest.mark.parametrize('precision, error', [('fp32', 0), ('bf16', 2**-8)])
def test_messages_arrive_as_they_were(precision, error):
    for message in messages(pixels()):
        frame = processes.pack(4, message, precision)
        receiver, again = processes.unpack(frame)
        assert receiver == 4 and isinstance(again, type(message))
        for name, value in vars(message).items():
            other = getattr(again, name)
            if name == 'x':
                assert torch.equal(value, other)  # to the bit
            elif torch.is_tensor(value):
                assert ((value - other).abs() <= error * value.abs()).all()
                assert other.dtype == torch.float32
            else:
                assert value == other


def test_an_image_travels_as_its_bytes_and_other_x_as_half():
    x = pixels(32)
    sizes = [len(processes.pack(0, m, 'bf16')) for m in messages(x)]
    floats = 2 * 32 * 64
    for size, least in zip(sizes, (32 * 784, floats, 32 * 784 + floats)):
        assert least < size < least + 256
    odd = x + torch.rand_like(x) / 100
    _, spike = processes.unpack(processes.pack(0, messages(odd)[0], 'fp32'))
    assert (spike.x - odd).abs().max() < 2e-3
    assert data.denormalise(pixels()).dtype == torch.uint8
    every = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(data.denormalise(data.normalise(every)), every)


def test_what_is_no_frame_is_a_value_error():
    draw, frames = random.Random(0), [b'', b'abc', b'\xff' * 64, bytes(99)]
    good = [
        processes.pack(0, message, 'fp32') for message in messages(pixels())
    ]
    frames += [frame[:-1] for frame in good] + [frame + b'x' for frame in good]
    frames += [
        pickle.dumps(good[0]), good[0].replace(b'Spike', b'Evil!'),
        good[0].replace(b'[3, 784]', b'').replace(b'uint8', b'int64')
    ]
    for frame in frames:
        with pytest.raises(ValueError):
            processes.unpack(frame)
    for _ in range(2000):  # nothing else, whatever the bytes are
        frame = bytearray(draw.choice(good))
        for _ in range(draw.randint(1, 4)):
            frame[draw.randrange(120)] = draw.randrange(256)
        with contextlib.suppress(ValueError):
            processes.unpack(bytes(frame))


# ------------------------------------------------------------------------ nodes


def test_messages_go_both_ways_into_mailboxes(nodes):
    first, second = pair(nodes)
    for sender, receiver in (first, second), (second, first):
        x = pixels(4)
        sent = link.Spike((0, 1), sender.rank, x, 0)
        sender.trainer.links[receiver.rank].send(sent)
        come = []
        assert wait_until(
            lambda: come.extend(receiver.trainer.mailbox.collect()) or come, 5)
        assert come[0].key == (0, 1) and torch.equal(come[0].x, x)


def test_links_have_the_conditions_asked_for(nodes):
    first, second = pair(nodes, loss_rate=1.0)
    first.trainer.links[1].send(link.Spike((0, 1), 0, pixels(), 0))
    way = second.trainer  # its own link back is of the other process
    assert wait_until(
        lambda: second._ways[0, 1].lost == 1,  # pylint: disable=W0212
        5)
    assert not way.mailbox.collect()


# pylint: disable=protected-access
def test_sending_never_waits_and_nothing_is_uncounted(nodes):
    node = nodes(0, begin=False)  # nobody is there
    out, spike = node.trainer.links[1], link.Spike((0, 1), 0, pixels(), 0)
    began = time.monotonic()
    for _ in range(1000):
        out.send(spike)
    assert out.lost == 1000
    peer = node._peers[1]  # as if it were connected and took nothing
    peer.connected = True
    for _ in range(1000):
        out.send(spike)
    assert (out.lost, out.dropped) == (1000, 1000 - peer.limit)
    assert peer.limit == 3 * 32 and time.monotonic() - began < 1


def test_state_is_told_again_to_who_connects_again(nodes):
    first = nodes(0, begin=False)
    first.put(('copy', first.trainer.copy()))
    second = nodes(1, begin=False)
    for _ in range(2):
        kind, content = second.events.get(timeout=10)
        copied = content[0]
        assert kind == 'copy' and copied.tally.mach == 0
        for name in 'mach', 'student':
            one, other = getattr(first.trainer, name), getattr(copied, name)
            for p, q in zip(one.parameters(), other.parameters(), strict=True):
                assert torch.equal(p, q) and p is not q
        second._peers[0].wire.close()  # it is cut, and tried again
    first.put(('ended', first.trainer.copy()))
    kinds = iter(lambda: second.events.get(timeout=10)[0], 'ended')
    assert set(kinds) <= {'copy'}
    assert second.heard[0].tally.mach == 0
    first.leave()


def test_all_begin_together_and_late_ones_alone(nodes, capsys):
    began = time.monotonic()
    first = nodes(0, size=3, patience=0.5)
    assert 0.5 <= time.monotonic() - began < 8
    assert capsys.readouterr(
    ).err == 'process 0 begins without process [1, 2]\n'
    began = time.monotonic()
    second = nodes(1, size=3)  # hears that the first has begun
    assert 1 <= time.monotonic() - began < 10
    assert wait_until(lambda: first.hears(1) and second.hears(0), 10)
    assert not first.hears(2) and first.hears(0)
    assert capsys.readouterr().err == ('process 0 says: process 1 is here\n'
                                       'process 1 begins without process [2]\n')


def test_a_signal_goes_round(nodes):
    first, second = pair(nodes)
    second.interrupt(signal.SIGINT, None)
    assert wait_until(lambda: first.signal == signal.SIGINT, 5)
    first.interrupt(signal.SIGTERM, None)
    assert first.signal == signal.SIGINT  # the first counts


@pytest.mark.parametrize('other', [
    dict(secret='another'),
    dict(learning_rate=0.1),
    dict(seed=1),
])
def test_who_has_another_key_is_refused(nodes, capsys, other):
    first = nodes(0, begin=False, adopt=False)
    second = nodes(1, begin=False, adopt=False, **other)
    assert wait_until(lambda: first.refused > 1 and second.refused > 1, 10)
    assert not first.hears(1) and not second.hears(0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # once each
    assert all('refuses a connection' in line for line in lines)


def test_what_each_may_have_for_itself_is_no_other_key(nodes):
    pair(nodes)
    assert {'data', 'log_every', 'resume', 'device'} <= set(processes.OWN)


def test_strangers(nodes, monkeypatch, capsys):
    monkeypatch.setattr(processes, 'SILENCE', 1)
    first, second = pair(nodes)
    address = first._addresses[0]  # pylint: disable=protected-access
    socks = [socket.create_connection(address) for _ in range(1000)]
    said = [
        random.Random(0).randbytes(100),
        b'\xff\xff\xff\xff' + (2**60).to_bytes(8, 'big'), b'\0\0\0\x20half'
    ]
    for sock, content in zip(socks, itertools.cycle(said)):
        with contextlib.suppress(OSError):
            sock.sendall(content)
    assert wait_until(lambda: first.refused >= 1000, 15)
    with pytest.raises((OSError, EOFError, connection.AuthenticationError)):
        connection.Client(address, authkey=b'a guess')
    assert first.hears(1) and second.hears(0)
    second.trainer.links[0].send(link.Spike((1, 1), 1, pixels(), 0))
    assert wait_until(first.trainer.mailbox.collect, 5)
    for sock in socks:
        sock.close()
    assert capsys.readouterr().err.count('\n') == 1


def test_a_frame_that_is_none_ends_the_connection_alone(nodes):
    first, second = pair(nodes)
    unknown = processes.pack(5, messages(pixels())[0], 'fp32')
    for refused, frame in enumerate((b'no frame', unknown), start=1):
        wire = second.connect(0)
        wire.send_bytes(frame)
        assert wait_until(lambda n=refused: first.refused == n, 5)
    assert wait_until(lambda: first.hears(1), 5)


def test_silence_is_noticed_and_said_once(nodes, monkeypatch, capsys):
    monkeypatch.setattr(processes, 'SILENCE', 1)
    first, second = pair(nodes)
    capsys.readouterr()
    monkeypatch.setattr(second, 'counts', lambda: [])  # as if stopped
    assert wait_until(lambda: not first.hears(1), 10)
    time.sleep(2)
    assert capsys.readouterr().err.count('process 1 is gone') == 1


@pytest.mark.parametrize('names, words, message', [
    (dict(WORLD_SIZE='4'), '--k=3', '4 processes need as many MACHs: --k 4'),
    (dict(RANK='2'), '--k=2', 'need as many'),
    (dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='0'), '--k=3', 'need --hosts'),
    (dict(WORLD_SIZE='2'), '--hosts=10.0.0.1,10.0.0.2', 'MACH_KEY'),
])
def test_refused_in_one_line(run_here, monkeypatch, names, words, message):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    test_main.check_refused(run_here, EXPERIMENT, [words], message)


def test_nothing_listens_beyond_loopback_unless_asked(nodes):
    node = nodes(0, adopt=False, begin=False)
    assert {
        host for host, _ in node._addresses  # pylint: disable=W0212
    } == {'127.0.0.1'}


# ------------------------------------------------------------------- supervise

# The function alone: nothing waits for torch to be imported.
SUPERVISED = 'import contextlib, ctypes, os, signal, sys, time\n'
SUPERVISED += inspect.getsource(processes.supervise) + '''
supervise()
print('attempt', os.environ.get('MACH_ATTEMPT'), os.getpid(), flush=True)
'''


def supervised(then, restarts=0, torchrun=True):
    """A process that runs `then` in the child of a supervisor."""
    code = SUPERVISED + then
    names = dict(RANK='3', TORCHELASTIC_MAX_RESTARTS=str(restarts))
    if torchrun:
        names['TORCHELASTIC_RUN_ID'] = 'none'
    return subprocess.Popen([sys.executable, '-c', code],
                            env=os.environ | names,
                            stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE,
                            text=True)


def test_a_killed_child_is_started_again_and_then_hidden():
    process = supervised('os.kill(os.getpid(), 9)', restarts=2)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert re.findall(r'attempt (\d)', out) == ['0', '1', '2']
    assert len(set(re.findall(r'attempt \d (\d+)', out))) == 3
    assert re.findall(r'signal 9; .* (\d) restarts', err) == ['2', '1', '0']


@pytest.mark.parametrize('then, code', [('sys.exit(2)', 2), ('', 0),
                                        ('os._exit(130)', 130)])
def test_other_ends_are_passed_on(then, code):
    process = supervised(then, restarts=2)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (code, '')
    assert out.count('attempt') == 1


def test_without_torchrun_nothing_is_forked():
    process = supervised('', torchrun=False)
    out, _ = process.communicate(timeout=30)
    assert out == f'attempt None {process.pid}\n' and process.returncode == 0


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_child_which_ends_with_its_parent(number):
    process = supervised('time.sleep(60)')
    child = int(process.stdout.readline().split()[-1])
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    process = supervised('time.sleep(60)')
    child = int(process.stdout.readline().split()[-1])
    process.kill()
    process.communicate(timeout=30)
    assert wait_until(lambda: not os.path.exists(f'/proc/{child}'), 10)


# -------------------------------------------------------------------- torchrun


@contextlib.contextmanager
def torchrun(tmp_path, *words, experiment=EXPERIMENT, count=3, restarts=0):
    """A run in processes; all are ended at the end.

    Yields:
        The Popen; its methods said(stream); find(rank), the process that trains;
        and end() -> (code, stdout, stderr).
    """
    mark = f'MACH_TEST={tmp_path} {time.time_ns()}'
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node',
        count, '--master-port',
        next(PORTS), '--max-restarts', restarts,
        conftest.ROOT / experiment / 'main.py', '--data', conftest.DATA or
        tmp_path / 'data', *TINY, '--k', count, *words
    ]
    paths = {name: tmp_path / name for name in ('stdout', 'stderr')}
    with open(paths['stdout'], 'wb') as out, open(paths['stderr'], 'wb') as err:
        name, value = mark.split('=', 1)
        process = subprocess.Popen(list(map(str, command)),
                                   env={
                                       **os.environ,
                                       **test_main.ENVIRONMENT, name: value
                                   },
                                   stdin=subprocess.DEVNULL,
                                   stdout=out,
                                   stderr=err)

    def find(rank=None):
        """Ids of the processes with this rank, oldest first; of all those."""
        found = []
        for folder in os.listdir('/proc'):
            with contextlib.suppress(OSError):
                path = f'/proc/{folder}/environ'
                with open(path, encoding='utf-8', errors='replace') as file:
                    names = file.read().split('\0')
                if mark in names and (rank is None or f'RANK={rank}' in names):
                    found.append(int(folder))
        return sorted(found)

    process.find = find
    process.said = lambda name: paths[name].read_text(encoding='utf-8')
    process.end = lambda: (process.wait(90), *map(process.said, paths))
    try:
        yield process
    finally:
        for number in find():
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        process.wait(10)


needs_proc = pytest.mark.skipif(not os.path.isdir('/proc/self'),
                                reason='processes are found by /proc')


@needs_proc
@pytest.mark.parametrize('experiment, count', [(EXPERIMENT, 2),
                                               ('asynchronous_sequence', 3)])
def test_a_run_in_processes(tmp_path, experiment, count):
    folder = tmp_path / 'logs'
    words = '--steps=200', '--k=3', f'--log_folder={folder}'
    with torchrun(tmp_path, *words, experiment=experiment, count=count) as run:
        code, out, err = run.end()
        assert not run.find()
    assert code == 0 and 'gone' not in err
    log = metrics.parse_log(out)
    assert [f['mach'] for f in log.finals] == [0, 1, 2, 'mean']
    assert log.mean['steps'] == 200 and 80 < log.mean['real'] < 100
    assert {f['mach'] for f in log.steps} == {0, 1, 2}
    assert len(log.steps) == 3 * 40
    names = [f'process{rank}.txt' for rank in range(count)]
    assert sorted(path.name for path in folder.iterdir()) == names
    for rank, name in enumerate(names):
        own, here = metrics.read_log(folder /
                                     name), {rank} if rank else {0, 1, 2}
        assert {f['mach'] for f in own.steps} == here
        assert [f['real'] for f in own.finals
               ] == [f['real'] for f in log.finals]


@needs_proc
@pytest.mark.parametrize('restarts', [0, 1])
def test_a_process_is_killed(tmp_path, restarts):
    words = f'--checkpoint={tmp_path / "machs"}', '--checkpoint_every=5'
    words += '--steps=300', '--slow_mach=2', '--slow_factor=8'
    with torchrun(tmp_path, *words, restarts=restarts) as run:
        assert wait_until(lambda: 'step  100  mach 1' in run.said('stdout'))
        os.kill(run.find(1)[-1], signal.SIGKILL)
        code, out, err = run.end()
        assert not run.find()
    assert 'process 1 was killed by signal 9' in err
    assert 'process 0 says: process 1 is gone' in err
    log = metrics.parse_log(out)
    assert [f['mach'] for f in log.finals] == [0, 1, 2, 'mean']
    lost = [f['mach'] for f in log.finals if f['real'] != f['real']]
    ends = [f['steps'] for f in log.finals]
    if restarts:
        assert 'process 1 is here' in err
        assert code == 0 and not lost and ends == [300] * 4
    else:
        assert code == 1 and lost == [1, 'mean']
        # What was last told of it, half a second or more before the end.
        assert ends[0] == ends[2] == 300 and ends[1] < 300


@needs_proc
@pytest.mark.parametrize('number, who', [(signal.SIGINT, 1),
                                         (signal.SIGTERM, None)])
def test_a_signal_ends_all(tmp_path, number, who):
    with torchrun(tmp_path, '--steps=1000000') as run:
        assert wait_until(lambda: 'step  10 ' in run.said('stdout'))
        os.kill(run.pid if who is None else run.find(who)[-1], number)
        assert wait_until(lambda: 'mach mean' in run.said('stdout'), 5)
        _, out, err = run.end()
        assert not run.find()
    assert metrics.parse_log(out).mean['real'] > 0
    codes = re.findall(r'exitcode *: (\d+)', err)
    assert who is None or set(codes) == {str(128 + number)}
