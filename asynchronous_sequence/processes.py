"""MACHs in several processes, on one host or on many.

A Node is this process, a Peer is another process. There is no leader: all know
all addresses from the start. Each process opens a connection to each other
process and sends on it. If the connection breaks, the process reconnects.
`multiprocessing.connection` frames messages and checks the key, without pickle.
"""

import collections
import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import struct
import threading
import time
from multiprocessing import connection

import link
import torch
from checkpoint import FREE
from trainer import Snapshot

from mach import data, metrics

SILENCE = 8  # seconds without data, after which a process counts as gone
PERIOD = 0.5  # seconds between heartbeats
PATIENCE = 30  # seconds that a process waits for others before it trains
STRANGERS = 16  # most open connections that have not proved the key
QUEUE = 96  # unsent messages to a Peer for each Link; the oldest is discarded
LINES = 10**4  # most unsent log lines; the oldest is discarded


@dataclasses.dataclass(frozen=True)
class Status:
    """What a process tells others of one of its MACHs and of itself."""
    index: int
    snapshot: Snapshot  # arrives as a list with state_dicts
    lines: list  # fields of step lines, for process 0
    begun: bool  # whether the process trains
    signal: int  # that ends the run; 0: none


KINDS = {k.__name__: k for k in (link.Spike, link.Answer, link.Grad, Status)}


def send(wire, receiver, message):
    """Sends a head in JSON, then the bytes of each tensor in it.

    Networks and Tallies go as state_dicts, x as its pixels if that is exact.
    """
    fields, tensors = dict(vars(message)), []
    if 'x' in fields:
        pixels = data.denormalise(fields['x'])
        if torch.equal(data.normalise(pixels), fields['x']):
            fields['x'] = pixels

    def describe(value):
        if not torch.is_tensor(value):
            return value.state_dict()
        tensors.append(value.detach().cpu().flatten().view(torch.uint8))
        return dict(dtype=str(value.dtype)[6:], shape=value.shape)

    head = [receiver, type(message).__name__, fields]
    wire.send_bytes(json.dumps(head, default=describe).encode())
    for tensor in tensors:
        wire.send_bytes(tensor.numpy())


def receive(wire, device='cpu'):
    """The next (receiver, message)."""

    def read(found):
        if found.keys() != {'dtype', 'shape'}:
            return found
        dtype = getattr(torch, found['dtype'])
        value = torch.empty(found['shape'], dtype=dtype)
        wire.recv_bytes_into(value.flatten().view(torch.uint8).numpy())
        return value.to(device)

    head = wire.recv_bytes()
    receiver, kind, fields = json.loads(head, object_hook=read)
    if kind != 'Status':
        fields['key'] = tuple(fields['key'])
        if 'x' in fields and fields['x'].dtype == torch.uint8:
            fields['x'] = data.normalise(fields['x'])
    return receiver, KINDS[kind](**fields)


def wire_of(sock):
    """A Connection; OSError if the other end is silent or reads nothing."""
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    limit = struct.pack('ll', SILENCE, 0)
    for option in socket.SO_RCVTIMEO, socket.SO_SNDTIMEO:
        sock.setsockopt(socket.SOL_SOCKET, option, limit)
    return connection.Connection(sock.detach())


def supervise():
    """Returns in a forked child. If that is killed, the parent forks again.

    torchrun ends all processes as soon as one fails. So it watches the parent,
    and the MACHs live in the child. A killed child is replaced up to
    `--max-restarts` times, without importing again. If no child is left, the
    parent waits for the other processes of its host, then returns 1. So it does
    if a child that was started again cannot use its files.
    Call this while there is one thread. Without torchrun it does nothing.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ or not hasattr(os, 'fork'):
        return
    if os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0':
        os._exit(1)  # a process failed: torchrun is not to start all anew
    import fcntl  # pylint: disable=import-outside-toplevel
    files = os.path.dirname(os.environ.get('TORCHELASTIC_ERROR_FILE', ''))
    alive = os.open(os.path.dirname(files) or '.', os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_SH)  # of all processes of this host
    restarts = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0))
    os.environ['MACH_RUN'] = os.urandom(8).hex()  # names this run in its files
    handlers = {number: signal.getsignal(number) for number in metrics.SIGNALS}
    for attempt in range(restarts + 1):
        signal.pthread_sigmask(signal.SIG_BLOCK, handlers)  # none is missed
        child = os.fork()

        def pass_on(number, _, child=child):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

        for number, handler in handlers.items():
            if handler != signal.SIG_IGN:  # else it stays ignored
                signal.signal(number, pass_on if child else handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)
        if not child:
            with contextlib.suppress(AttributeError):  # Linux: ends with it
                ctypes.CDLL(None).prctl(1, signal.SIGTERM)
            os.environ['MACH_ATTEMPT'] = str(attempt)
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if -status in handlers:  # before the child could handle it
            status = 128 - status
        if attempt and status == 2:
            break
        if status >= 0:
            os._exit(status)
        metrics.warn(f'process {os.environ["RANK"]} was killed by signal '
                     f'{-status}; {restarts - attempt} restarts are left')
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    fcntl.flock(alive, fcntl.LOCK_EX)  # waits until the others have ended
    os._exit(1)


def variable(name, least, most, default):
    """The whole number of an environment variable; else raises DataError."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise data.DataError(f'{name}={text} must be {least} to {most}')
    return int(text)


class Link(link.Link):
    """A link to a MACH of another process; link.Link stays within a process.

    It loses messages here, where the sender counts them. They are late there.
    """

    def __init__(self, peer, receiver, loss_rate, seed):
        super().__init__(self, loss_rate=loss_rate, seed=seed)
        self._peer, self.receiver = peer, receiver
        peer.mail.limit += QUEUE

    def put(self, message, _):
        """Takes a message that is not lost, and returns at once."""
        mail, before = self._peer.mail, self._peer.mail.dropped
        if self._peer.connected:
            mail.put((self, message))
            self.dropped += mail.dropped - before
        else:
            self.lost += 1


class Peer(threading.Thread):
    """Another process, and the thread that sends to it.

    Attributes:
        wire: the connection on which it sends to this one; None: it is gone.
        connected: whether this process can send to it.
        begun, ended: whether it trains; whether a MACH of it has ended.
        told: index -> own Snapshot sent last on this connection.
        lines: fields of step lines to send; mail: (Link, message) to send.
    """

    def __init__(self, node, rank):
        super().__init__(daemon=True)
        self._node, self.rank, self.wire = node, rank, None
        self.connected = self.begun = self.ended = False
        self.told, self.lines = {}, collections.deque(maxlen=LINES)
        self.mail = link.Mailbox(0)

    def run(self):
        """Connects and sends, again and again."""
        while True:
            mail = []
            with contextlib.suppress(OSError, EOFError,
                                     connection.AuthenticationError):
                with self._node.connect(self.rank) as wire:
                    self.told, self.connected, due = {}, True, 0
                    while True:
                        now = time.monotonic()
                        self._tell(wire, now >= due)
                        due = now + PERIOD if now >= due else due
                        mail = self.mail.collect(PERIOD / 10)
                        for way, message in mail:
                            send(wire, way.receiver, message)
            self.connected = False
            for way, _ in mail + self.mail.collect():
                way.lost += 1
            time.sleep(0.2)

    def _tell(self, wire, due):
        """Sends new Snapshots and lines; counts, if a sign of life is due."""
        node = self._node
        for one in node.own:
            i, lines = one.index, list(self.lines)
            newest = snapshot = node.newest[i]
            if self.told.get(i) is newest:
                if not due and not lines:
                    continue
                snapshot = one.snapshot(networks=False)[i]
            send(wire, -1, Status(i, snapshot, lines, node.begun, node.signal))
            self.told[i] = newest
            for _ in lines:
                self.lines.popleft()


class Node:
    """This process. MACH i lives in process i mod WORLD_SIZE.

    It reads torchrun's variables and MACH_KEY, unless it runs alone.

    Args:
        settings: the hyperparameters of main.py.
        dataset: its name. A process with another dataset is refused. So is one
            with other hyperparameters; those in checkpoint.FREE may differ.
    Raises:
        data.DataError: the environment does not fit the hyperparameters.

    Attributes:
        rank: its number; process 0 prints the log. size: how many there are.
        restarted: whether it replaces a process that was killed.
        begun: whether it trains.
        signal: number of the signal that ends the run; 0: none.
        own: the Trainers of its MACHs; newest: index -> Snapshot of each.
    """

    def __init__(self, settings, dataset):
        self.size = size = variable('WORLD_SIZE', 1, 1000, 1)
        self._settings, self.rank, port = settings, 0, 0
        hosts = settings.hosts.split(',')
        self._key = os.fsencode(os.environ.get('MACH_KEY', ''))
        if size > 1 and not hasattr(os, 'fork'):
            raise data.DataError('several processes need Linux or macOS; '
                                 'threads need nothing')
        if size > settings.k:
            raise data.DataError(f'{size} processes need as many MACHs: '
                                 f'--k {size}')
        if settings.hosts and not self._key:
            raise data.DataError('--hosts needs a secret that all processes '
                                 'have in their environment: MACH_KEY')
        if size > 1:
            self.rank = variable('RANK', 0, size - 1, 0)
            port = variable('MASTER_PORT', 1, 65535 - size, 29500) + 1
            local = variable('LOCAL_RANK', 0, size - 1, self.rank)
            if not settings.hosts and self.rank != local:
                raise data.DataError('processes on several hosts need --hosts')
        self.restarted = os.environ.get('MACH_ATTEMPT', '0') != '0'
        self._addresses = [(hosts[r * len(hosts) // size] or
                            '127.0.0.1', port + r) for r in range(size)]
        self._same = dict(vars(settings), dataset=dataset, processes=size)
        for name in FREE:
            self._same.pop(name, None)
        self.begun, self.signal, self.own, self.newest = False, 0, [], {}
        self._elsewhere, self._ways = {}, {}  # Trainers; Links from there
        self._snapshots, self._lines = {}, collections.deque(maxlen=LINES)
        self._refused, self._differs = set(), None  # why, from process 0
        self._strangers = threading.Semaphore(STRANGERS)
        self._peers = {r: Peer(self, r) for r in range(size) if r != self.rank}

    # ----------------------------------------------------- for the main thread

    def adopt(self, trainers):
        """Returns the Trainers of this process, with Links to all others."""
        self.own = trainers[self.rank::self.size]
        for here in self.own:
            self.newest |= here.snapshot(networks=False)
        self._elsewhere = {
            one.index: one for one in trainers if one.index not in self.newest
        }
        settings = self._settings
        for here in self.own:
            for i in here.exchange.links.keys() & self._elsewhere.keys():
                way = f'{settings.seed} {here.index} {i}'
                here.exchange.links[i] = Link(self._peers[i % self.size], i,
                                              settings.loss_rate, way)
                self._ways[i, here.index] = link.Link(here.exchange.mailbox,
                                                      settings.latency,
                                                      settings.jitter,
                                                      seed=way)
        return self.own

    def open(self):
        """Listens and connects from now on.

        Returns:
            The files that the log goes to; None is stdout.
        Raises:
            OSError: the address or the folder cannot be used.
        """
        outputs, settings = [] if self.rank else [None], self._settings
        if settings.log_folder and not settings.dry_run:
            path = f'{settings.log_folder}/process{self.rank}.txt'
            # A log of an earlier run is an error, unless this one continues it.
            mode = 'a' if self.restarted else 'w' if settings.resume else 'x'
            outputs.append(open(path, mode, encoding='utf-8'))
        if self._peers:
            server = socket.create_server(self._addresses[self.rank],
                                          backlog=128)
            threading.Thread(target=self._accept, args=(server,),
                             daemon=True).start()
        for peer in self._peers.values():
            peer.start()
        return outputs

    def begin(self):
        """Waits for the others up to PATIENCE; a second once one has begun.

        Raises:
            data.DataError: process 0 has other hyperparameters or data.
        """
        gone, end = [0], time.monotonic() + PATIENCE
        while gone and time.monotonic() < end and not self.signal:
            time.sleep(0.02)
            if self._differs:
                raise data.DataError(f'process 0 differs: {self._differs}')
            gone = [
                rank for rank, peer in self._peers.items()
                if not (peer.wire and peer.connected)
            ]
            if any(peer.begun for peer in self._peers.values()):
                end = min(end, time.monotonic() + 1)
        if gone and not self.signal:
            self._say(f'begins without process {gone}')
        self.begun = True

    def tell(self, lines, snapshots):
        """Takes what own MACHs report, for the other processes."""
        self.newest |= snapshots
        if self.rank:
            self._peers[0].lines.extend(lines)

    def news(self):
        """(lines, newest Snapshots) of other processes since the last call."""
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        count = len(self._snapshots)
        return lines, dict(self._snapshots.popitem() for _ in range(count))

    def hears(self, index):
        """Whether the process of a MACH is there."""
        rank = index % self.size
        return rank == self.rank or self._peers[rank].wire is not None

    def tally(self, index):
        """The newest counts of a MACH elsewhere."""
        return self._elsewhere[index].tally

    def interrupt(self, number):
        """Handles a signal: it ends the run, in all processes."""
        self.signal = self.signal or int(number)

    def leave(self):
        """Waits until the others know all and process 0 has ended."""
        end = time.monotonic() + SILENCE
        while time.monotonic() < end and any(
                peer.wire and
            (rank == 0 or peer.lines or peer.told != self.newest)
                for rank, peer in self._peers.items()):
            time.sleep(0.02)

    # --------------------------------------------------------- for its threads

    def connect(self, rank):
        """Opens the connection on which this process sends to another."""
        address = self._addresses[rank]
        wire = wire_of(socket.create_connection(address, SILENCE))
        connection.answer_challenge(wire, self._key)
        connection.deliver_challenge(wire, self._key)
        wire.send_bytes(json.dumps([self.rank, self._same]).encode())
        wire.recv_bytes()  # EOFError if that process refuses
        return wire

    def _accept(self, server):
        while True:
            time.sleep(0.001)  # no busy loop if too many files are open
            with contextlib.suppress(OSError):
                wire = wire_of(server.accept()[0])
                if self._strangers.acquire(blocking=False):
                    threading.Thread(target=self._hear,
                                     args=(wire,),
                                     daemon=True).start()
                else:
                    wire.close()

    def _hear(self, wire):
        peer, who = None, 'a connection'
        try:
            try:
                connection.deliver_challenge(wire, self._key)
                connection.answer_challenge(wire, self._key)
            except connection.AuthenticationError:
                raise ValueError('it has another MACH_KEY') from None
            finally:
                self._strangers.release()
            rank, there = json.loads(wire.recv_bytes())
            who = f'process {rank}'
            for name, here in self._same.items():
                if there.get(name) != here:
                    why = f'{name} is {there.get(name)} there, {here} here'
                    self._differs = self._differs or rank == 0 and why
                    raise ValueError(why)
            peer = self._peers[rank]
            wire.send_bytes(b'agreed')
            while True:
                if peer.wire is not wire:
                    peer.wire = wire
                    if self.begun:
                        self._announce(peer, 'is here')
                self._take(peer, *receive(wire, self._settings.device))
        except Exception as error:  # pylint: disable=broad-except
            lost = peer and isinstance(error, (OSError, EOFError))
            if not lost and who not in self._refused:
                self._refused.add(who)
                why = error if isinstance(error, ValueError) else repr(error)
                self._say(f'refuses {who}: {why}')
        finally:
            wire.close()
            if peer and peer.wire is wire:
                peer.wire = None
                if not peer.ended:
                    self._announce(peer, 'is gone')

    def _take(self, peer, receiver, message):
        if not isinstance(message, Status):
            self._ways[message.sender, receiver].send(message)
            return
        self.signal = self.signal or message.signal
        counts, network, student, ended, failed = message.snapshot
        peer.begun, peer.ended = message.begun, peer.ended or ended
        self._lines.extend(message.lines)
        one = self._elsewhere[message.index]
        one.tally.load_state_dict(counts)
        for part, state in (one.network, network), (one.student, student):
            if state:
                part.load_state_dict(state)
        if network or ended:
            told = one.snapshot(bool(network), ended=ended, failed=failed)
            # Its own process has counted what is lost and in flight.
            self._snapshots[message.index] = told[message.index]._replace(
                tally=one.tally.copy())

    def _announce(self, peer, what):
        lower = [p for r, p in self._peers.items() if r < self.rank]
        if not any(one.wire for one in lower if one is not peer):
            self._say(f'says: process {peer.rank} {what}')

    def _say(self, text):
        metrics.warn(f'process {self.rank} {text}')
