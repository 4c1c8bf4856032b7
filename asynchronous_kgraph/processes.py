"""MACHs in several processes, on one host or on many.

A Node is this process, a Peer each other one. All know all addresses from the
start: no directory and no leader can die. Each connects to each other, and again
whenever that fails, to talk; it listens on the connections that it accepts. The
wire is `multiprocessing.connection`: its frames and its mutual HMAC challenge,
never its pickling, so nothing a peer sends is code. Messages go into the
mailboxes that threads use. All else is state, told again to who connects again.
"""
# Copied from asynchronous_sequence/processes.py

import collections
import contextlib
import copy
import ctypes
import dataclasses
import json
import math
import os
import queue
import signal
import socket
import struct
import sys
import threading
import time
from multiprocessing import connection

import link
import torch
import trainer
from torch.nn import utils

from mach import data, metrics

SILENCE = 8  # seconds without a word, after which a process counts as gone
PERIOD = 0.5  # seconds from one sign of life to the next
STRANGERS = 16  # connections at once that have not shown the key yet
FAULTS = OSError, EOFError, connection.AuthenticationError
DTYPES = dict(uint8=torch.uint8, fp16=torch.float16)
DTYPES |= dict(bf16=torch.bfloat16, fp32=torch.float32)
# Hyperparameters that may be another process's own.
OWN = metrics.BOOKKEEPING + ('device', 'precision')
LONGEST = 2**28  # bytes of a frame; of a longer one no more is read


@dataclasses.dataclass(frozen=True)
class News:
    """What the main threads of others are to know of a MACH of this process."""
    kind: str  # 'count', or as in main.py: 'step', 'copy', 'ended', 'failed'
    mach: int
    fields: dict  # of the line of a step; else of its Tally
    begun: bool  # whether this process has begun
    signal: int  # that ends the run; 0: none
    parameters: torch.Tensor | None  # [n], of the MACH, then of its student


KINDS = {k.__name__: k for k in (link.Spike, link.Answer, link.Grad, News)}


def pack(receiver, message, precision):
    """A frame: the head's length, the head in JSON, the bytes of tensors.

    x travels as its pixels' bytes where that is exact, as it is for images, else
    as fp16; embeddings and gradients with the `precision` asked for.
    """
    plain, layout, parts = {}, {}, []
    for name, value in vars(message).items():
        if not torch.is_tensor(value):
            plain[name] = value
            continue
        kind = 'fp32' if name == 'parameters' else precision
        if name == 'x':
            pixels = data.denormalise(value)
            exact = torch.equal(data.normalise(pixels), value)
            kind, value = ('uint8', pixels) if exact else ('fp16', value)
        layout[name] = kind, *value.shape
        value = value.detach().to('cpu', DTYPES[kind]).contiguous()
        parts.append(value.view(torch.uint8).numpy().data)
    head = json.dumps([receiver, type(message).__name__, plain, layout])
    return b''.join([struct.pack('<I', len(head)), head.encode(), *parts])


def unpack(frame, device='cpu'):
    """(receiver, message) of a frame; ValueError if it is none."""
    try:
        start = 4 + int.from_bytes(frame[:4], 'little')
        receiver, kind, fields, layout = json.loads(frame[4:start])
        for name, (dtype, *shape) in layout.items():
            end = start + math.prod(shape) * DTYPES[dtype].itemsize
            part = bytearray(frame[start:end])
            value = torch.frombuffer(part, dtype=DTYPES[dtype]).view(shape)
            value = data.normalise(value) if dtype == 'uint8' else value.float()
            fields[name] = value.to(device)
            start = end
        if start != len(frame):
            raise ValueError(f'{len(frame)} bytes in place of {start}')
        if 'key' in fields:
            fields['key'] = tuple(fields['key'])
        return receiver, KINDS[kind](**fields)
    except Exception as error:  # whatever the bytes bring about
        raise ValueError(f'no frame: {error!r:.100}') from None


def wire_of(sock):
    """A Connection that raises OSError where the other end is silent or stuck."""
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    limit = struct.pack('ll', SILENCE, 0)
    for option in socket.SO_RCVTIMEO, socket.SO_SNDTIMEO:
        sock.setsockopt(socket.SOL_SOCKET, option, limit)
    return connection.Connection(sock.detach())


def parameters_of(networks):
    """All their parameters, in order; of None none."""
    return [p for network in networks if network for p in network.parameters()]


def supervise():
    """Returns in a child; the parent waits for it and hides a violent death.

    torchrun ends all processes as soon as one fails. So the MACHs live in a
    child of the one it watches: where the child is killed, torchrun sees nothing
    but a process that ends well, and up to `--max-restarts` times the child is
    forked again, with all that is imported: that takes longest. To be called
    while there is one thread. Does nothing without torchrun.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return
    if int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)):
        os._exit(1)  # one has ended with a failure: no reason to start all anew
    restarts = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0))
    numbers = signal.SIGINT, signal.SIGTERM
    for attempt in range(restarts + 1):
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # none is missed
        child = os.fork()

        def pass_on(number, _, child=child):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

        for number in numbers:
            signal.signal(number, pass_on if child else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        if not child:
            with contextlib.suppress(AttributeError):  # Linux: ends with it
                ctypes.CDLL(None).prctl(1, signal.SIGTERM)
            os.environ['MACH_ATTEMPT'] = str(attempt)
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if -status in numbers:  # before it could handle them
            status = 128 - status
        if status >= 0:
            os._exit(status)
        print(
            f'process {os.environ["RANK"]} was killed by signal {-status}; the '
            f'others go on, {restarts - attempt} restarts are left',
            file=sys.stderr,
            flush=True)
    os._exit(0)


class Link:
    """The way to a MACH of another process, as link.Link is to one of this."""

    def __init__(self, peer, receiver, limit):
        self._peer, self.receiver = peer, receiver
        self.lost = self.dropped = 0  # unconnected; overtaken by newer ones
        peer.limit += limit

    def send(self, message):
        """See link.Link: never waits."""
        self._peer.send(self, message)


class Peer(threading.Thread):
    """Another process; the thread carries there what is to be sent.

    Attributes:
        wire: the connection on which it is heard; None: it is gone.
        begun, ended: whether it has, as far as is known.
        limit: messages that wait to be sent at most.
    """

    def __init__(self, node, rank):
        super().__init__(name=f'to process {rank}', daemon=True)
        self.rank, self.wire, self.limit = rank, None, 0
        self.begun = self.ended = False
        self.seen = {}  # of the state of this process, what has been sent
        self.lines = collections.deque(maxlen=10**4)  # frames, of the log
        self._node, self._wake = node, threading.Condition()
        self.connected = False
        self._mail = collections.deque()  # (Link, message)

    def send(self, way, message):
        """Unconnected it is lost; where too many wait the oldest is dropped."""
        with self._wake:
            if not self.connected:
                way.lost += 1
                return
            if len(self._mail) >= self.limit:
                self._mail.popleft()[0].dropped += 1
            self._mail.append((way, message))
            self._wake.notify()

    def run(self):
        """Connects, carries, and when that fails connects again."""
        while True:
            try:
                with self._node.connect(self.rank) as wire:
                    self.connected = True
                    self._carry(wire)
            except FAULTS:
                pass
            with self._wake:
                self.connected = False
                while self._mail:
                    self._mail.popleft()[0].lost += 1
            time.sleep(0.2)

    def _carry(self, wire):
        self.seen, last = {}, -math.inf
        while True:
            if time.monotonic() - last >= PERIOD:
                last = time.monotonic()
                for frame in self._node.counts():
                    wire.send_bytes(frame)
            for mach, frame in list(self._node.state.items()):
                if self.seen.get(mach) is not frame:
                    wire.send_bytes(frame)
                    self.seen[mach] = frame
            while self.lines:
                wire.send_bytes(self.lines[0])
                self.lines.popleft()
            with self._wake:
                if not self._mail:
                    self._wake.wait(PERIOD / 10)
                way, message = self._mail.popleft() if self._mail else (None, 0)
            if way:
                wire.send_bytes(self._node.pack(way.receiver, message))


class Node:
    """This process: MACH i lives in process i mod WORLD_SIZE.

    It reads what torchrun sets, and MACH_KEY. Without these it is the only one.

    Args:
        settings: the hyperparameters of main.py, the same for all.
        dataset: name of the data, the same for all.
    Raises:
        data.DataError: the variables and hyperparameters do not go together.

    Attributes:
        rank: its number; 0 prints the log.
        restarted: it goes on where one that was killed has stopped.
        events: queue of (kind, content) as in `work` of main.py, of all MACHs.
        heard: MACH elsewhere -> Copy with its last counts, without networks.
        signal: the number of the one that ends the run; 0: none has come.
        state: own MACH -> the frame of its last News but counts.
        refused: connections that did not show the key, or sent no frame.
    """

    def __init__(self, settings, dataset):
        get, self._settings = os.environ.get, settings
        self.rank, self._size = int(get('RANK', 0)), int(get('WORLD_SIZE', 1))
        self.restarted = int(get('MACH_ATTEMPT', 0)) > 0
        hosts, secret = settings.hosts.split(','), get('MACH_KEY', '')
        if not 0 <= self.rank < self._size <= settings.k:
            raise data.DataError(f'{self._size} processes need as many MACHs: '
                                 f'--k {self._size}')
        if not settings.hosts and int(get('LOCAL_RANK',
                                          self.rank)) != self.rank:
            raise data.DataError('processes on several hosts need --hosts')
        if settings.hosts and not secret:
            raise data.DataError('--hosts needs a secret that all processes '
                                 'have in their environment: MACH_KEY')
        port = int(get('MASTER_PORT', 29500)) + 1  # that one is torchrun's
        self._addresses = [(hosts[r * len(hosts) // self._size] or
                            '127.0.0.1', port + r) for r in range(self._size)]
        # Who has other hyperparameters has another key.
        same = dataclasses.asdict(settings) | dict.fromkeys(OWN)
        self._key = repr((secret, same, settings.seed, dataset)).encode()
        self._begun, self.signal, self.refused = False, 0, 0
        self.events = queue.Queue(4 * settings.k)  # bounded, as memory is
        self._own, self.state, self.heard = [], {}, {}
        self._networks, self._ways = {}, {}  # of MACHs elsewhere; from them
        self._strangers = threading.Semaphore(STRANGERS)
        self._peers = {
            rank: Peer(self, rank)
            for rank in range(self._size)
            if rank != self.rank
        }

    # ----------------------------------------------------- for the main thread

    def adopt(self, trainers):
        """Returns those of MACHs that live here; they get links to others."""
        self._own = trainers[self.rank::self._size]
        limit = 3 * self._settings.recent  # as many as the receiver would keep
        for one in trainers:
            if one in self._own:
                continue
            self._networks[one.index] = one.mach, one.student
            for here in self._own:
                if here.index in one.links:
                    # It ends here and delays or loses what comes, if asked to.
                    self._ways[one.index, here.index] = one.links[here.index]
                    peer = self._peers[one.index % self._size]
                    here.links[one.index] = Link(peer, one.index, limit)
        return self._own

    def open(self):
        """Listens and talks from now on.

        Returns:
            The places where the log goes: files; None is stdout.
        Raises:
            OSError: the address or the folder cannot be used.
        """
        outputs = [] if self.rank else [None]
        if self._settings.log_folder:
            os.makedirs(self._settings.log_folder, exist_ok=True)
            outputs.append(
                open(f'{self._settings.log_folder}/process{self.rank}.txt',
                     'a' if self.restarted else 'w',
                     encoding='utf-8'))
        if self._peers:
            server = socket.create_server(self._addresses[self.rank],
                                          backlog=128)
            threading.Thread(target=self._accept, args=(server,),
                             daemon=True).start()
        for peer in self._peers.values():
            peer.start()
        return outputs

    def begin(self):
        """Waits for all others, up to `patience`; who comes late begins alone."""
        end = time.monotonic() + self._settings.patience
        gone = list(self._peers.values())
        while gone and time.monotonic() < end and not self.signal:
            time.sleep(0.02)
            gone = [p for p in gone if not (p.wire and p.connected)]
            if any(peer.begun for peer in self._peers.values()):
                end = min(end, time.monotonic() + 1)
        if gone and not self.signal:
            self._say(f'begins without process {[peer.rank for peer in gone]}')
        self._begun = True

    def put(self, event):
        """Takes an event of a MACH that lives here, for all main threads."""
        kind, content = event
        if kind == 'step':
            for fields in content if self.rank else ():
                news = self._news(kind, fields['mach'], fields)
                self._peers[0].lines.append(self.pack(-1, news))
        else:
            copies = content[0] if kind == 'failed' else content
            for i, (tally, *networks) in copies.items():
                news = self._news(kind, i, vars(tally), networks)
                self.state[i] = pack(-1, news, 'fp32')
        self.events.put(event)

    def hears(self, mach):
        """Whether the process of a MACH is there."""
        rank = mach % self._size
        return rank == self.rank or self._peers[rank].wire is not None

    def interrupt(self, number, _):
        """Handles a signal: the run is to end, in all processes."""
        self.signal = self.signal or int(number)

    def leave(self):
        """Waits until all is told and process 0 has written its log."""
        end = time.monotonic() + SILENCE
        while time.monotonic() < end and any(
                peer.wire and
            (rank == 0 or peer.lines or peer.seen != self.state)
                for rank, peer in self._peers.items()):
            time.sleep(0.02)
        if self.refused:
            self._say(f'has refused {self.refused} connections')

    # --------------------------------------------------------- for its threads

    def connect(self, rank):
        """A Connection to another process, on which this one talks."""
        sock = socket.create_connection(self._addresses[rank], SILENCE)
        wire = wire_of(sock)
        connection.answer_challenge(wire, self._key)
        connection.deliver_challenge(wire, self._key)
        return wire

    def pack(self, receiver, message):
        """The frame of a message to another process."""
        return pack(receiver, message, self._settings.wire_precision)

    def counts(self):
        """A frame for each MACH that lives here: also the sign of life."""
        for one in self._own:
            tally = one.copy(networks=False)[one.index].tally
            yield self.pack(-1, self._news('count', one.index, vars(tally)))

    def _news(self, kind, mach, fields, networks=()):
        parts = [p.detach().flatten() for p in parameters_of(networks)]
        return News(kind, mach, fields, self._begun, self.signal,
                    torch.cat(parts) if parts else None)

    def _accept(self, server):
        while True:
            try:
                sock, _ = server.accept()
            except OSError:  # too many open files: others may be closed soon
                time.sleep(0.1)
                continue
            if self._strangers.acquire(blocking=False):
                threading.Thread(target=self._hear, args=(sock,),
                                 daemon=True).start()
            else:
                sock.close()
                self._refuse('too many at once')

    def _hear(self, sock):
        peer, wire = None, wire_of(sock)
        try:
            try:
                connection.deliver_challenge(wire, self._key)
                connection.answer_challenge(wire, self._key)
            finally:
                self._strangers.release()
            while True:
                frame = wire.recv_bytes(LONGEST)
                receiver, message = unpack(frame, self._settings.device)
                sender = message.mach if receiver < 0 else message.sender
                peer = self._peers[sender % self._size]
                self._deliver(peer, receiver, message)
                if peer.wire is not wire:
                    peer.wire = wire
                    if self._begun:
                        self._announce(peer, 'is here')
        except FAULTS as error:
            if not peer:  # has another key, or other hyperparameters
                self._refuse(repr(error))
        except (ValueError, TypeError, LookupError, AttributeError,
                RuntimeError) as error:
            self._refuse(repr(error))
        finally:
            wire.close()
            if peer and peer.wire is wire:
                peer.wire = None
                if not peer.ended:
                    self._announce(peer, 'is gone')

    def _deliver(self, peer, receiver, message):
        if receiver >= 0:
            self._ways[message.sender, receiver].send(message)
            return
        kind, i = message.kind, message.mach
        self.signal = self.signal or message.signal
        peer.begun = message.begun
        peer.ended |= kind in ('ended', 'failed')
        content = [message.fields]
        if kind != 'step':
            tally, networks = metrics.Tally(i), (None, None)
            vars(tally).update(message.fields)
            if message.parameters is not None:
                networks = copy.deepcopy(self._networks[i])
                utils.vector_to_parameters(message.parameters,
                                           parameters_of(networks))
            self.heard[i] = trainer.Copy(tally)
            content = {i: trainer.Copy(tally, *networks)}
        if kind != 'count':
            self.events.put(
                (kind, (content, '') if kind == 'failed' else content))

    def _refuse(self, why):
        self.refused += 1
        if self.refused == 1:
            self._say(f'refuses a connection ({why}); others are only counted')

    def _announce(self, peer, what):
        lower = [self._peers[rank] for rank in range(self.rank)]
        if not any(one.wire for one in lower if one is not peer):
            self._say(f'says: process {peer.rank} {what}')

    def _say(self, text):
        print(f'process {self.rank} {text}', file=sys.stderr, flush=True)
