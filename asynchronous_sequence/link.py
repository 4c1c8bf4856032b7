"""Messages between MACHs, the links that carry them, the mailboxes they fill.

A MACH knows a neighbour only as a link with a `send` that never waits. Here a
link ends in a mailbox of the same process, at once or as late and as lossy as a
network would be; one over processes or hosts needs the same one method.
"""

import collections
import dataclasses
import heapq
import math
import random
import threading
import time
import typing

import torch


@dataclasses.dataclass(frozen=True)
class Spike:
    """A forward query: what do you make of x?

    Attributes:
        key: (index of the asker, number), unique; the answer carries it back.
        sender: index of the MACH that asks.
        x: [B, 784], normalised images.
        depth: how many edges further the query may travel; at 0 the receiver
            answers on its synthetic inputs.
        asked: when, by the sender's clock; the answer carries it back.
    """
    key: tuple
    sender: int
    x: torch.Tensor
    depth: int
    asked: float = 0.0

    def is_finite(self):
        """False if it carries a NaN or an infinity."""
        return math.isfinite(self.x.sum())


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a Spike brings back.

    Attributes:
        key: that of the Spike.
        sender: index of the MACH that answers.
        embedding: [B, E], d(x), free of dropout and detached.
        version: training steps the sender had taken when it computed it.
        asked: that of the Spike.
    """
    key: tuple
    sender: int
    embedding: torch.Tensor
    version: int
    asked: float = 0.0

    def is_finite(self):
        """False if it carries a NaN or an infinity."""
        return math.isfinite(self.embedding.sum())


@dataclasses.dataclass(frozen=True)
class Grad:
    """A backward message, sent and forgotten.

    Attributes:
        key: that of the Spike about the same x.
        sender: index of the parent.
        x: [B, 784], normalised images.
        gradient: [B, E], dL/dd(x) with L the sender's (or its parent's) loss.
        version: the receiver's step count that the sender last saw.
        depth: how many edges further the gradient may travel.
    """
    key: tuple
    sender: int
    x: torch.Tensor
    gradient: torch.Tensor
    version: int
    depth: int

    def is_finite(self):
        """False if it carries a NaN or an infinity."""
        return math.isfinite(self.x.sum() + self.gradient.sum())


def hold(message):
    """Keeps a message's memory while this thread's CUDA stream works on it."""
    for value in vars(message).values():
        if torch.is_tensor(value):
            value.record_stream(torch.cuda.current_stream())


class Link(typing.Protocol):
    """One direction of an edge."""

    def send(self, message) -> None:
        """Takes the message away and returns at once, whatever becomes of it.

        The message's tensors are never written to afterwards, by either side.
        """


class Mailbox:
    """What has arrived at one MACH. Bounded: when full the oldest goes.

    Args:
        limit: messages held at most, here and in transit on each late link.
        clock: seconds, for late links.
    """

    def __init__(self, limit, clock=time.monotonic):
        self.limit, self.clock = limit, clock
        self.dropped = 0  # messages that had to go
        self.lost = 0  # messages that a link has lost
        # Guards a few pointer moves, never a computation: nobody trains or
        # waits for a neighbour while holding it.
        self.arrival = threading.Condition()
        self._messages = collections.deque()
        self._late_links = []

    def attach(self, link):
        """From now on `collect` asks this late link for what is due."""
        self._late_links.append(link)

    def put(self, message):
        """Adds a message; never waits for the owner."""
        with self.arrival:
            self._add(message)
            self.arrival.notify()

    def collect(self, timeout=0.0):
        """Takes all messages, oldest first; waits up to `timeout` s for one.

        It may come back earlier with none.
        """
        with self.arrival:
            self._deliver()
            if timeout > 0 and not self._messages:
                due = min((link.next_due() for link in self._late_links),
                          default=math.inf)
                self.arrival.wait(max(0.0, min(timeout, due - self.clock())))
                self._deliver()
            messages, self._messages = self._messages, collections.deque()
        return list(messages)

    def _add(self, message):
        if len(self._messages) >= self.limit:
            self._messages.popleft()
            self.dropped += 1
        self._messages.append(message)

    def _deliver(self):
        if self._late_links:
            now = self.clock()
            for _, message in sorted((arrived for link in self._late_links
                                      for arrived in link.take_due(now)),
                                     key=lambda arrived: arrived[0]):
                self._add(message)

    def __len__(self):
        return len(self._messages)


class MailboxLink:
    """The link between two threads: what is sent lands in a mailbox at once."""

    def __init__(self, mailbox):
        self._mailbox = mailbox

    def send(self, message):
        """See `Link.send`."""
        self._mailbox.put(message)


class LateLink:
    """A link as late and as lossy as a network; neither end sleeps for it.

    A message is in transit until the receiver, at a `collect`, finds it due.

    Args:
        mailbox: where it ends.
        latency: seconds that every message is on its way.
        jitter: up to so many seconds more, drawn for each message: one sent
            later may come earlier.
        loss_rate: the share of messages that never arrive.
        seed: of what is drawn.
    """

    def __init__(self, mailbox, latency, jitter, loss_rate, seed):
        self._mailbox = mailbox
        self._latency, self._jitter = latency, jitter
        self._loss_rate, self._random = loss_rate, random.Random(seed)
        self._transit = []  # heap of (due, number, message)
        self._sent = 0
        mailbox.attach(self)

    def send(self, message):
        """See `Link.send`."""
        lost = self._random.random() < self._loss_rate
        delay = self._latency + self._jitter * self._random.random()
        with self._mailbox.arrival:
            if lost:
                self._mailbox.lost += 1
                return
            self._sent += 1  # what is due at the same time keeps its order
            heapq.heappush(self._transit,
                           (self._mailbox.clock() + delay, self._sent, message))
            if len(self._transit) > self._mailbox.limit:
                heapq.heappop(self._transit)
                self._mailbox.dropped += 1
            self._mailbox.arrival.notify()

    def next_due(self):
        """When the next message is due, in seconds of the clock; may be inf."""
        return self._transit[0][0] if self._transit else math.inf

    def take_due(self, now):
        """All (due, message) that are due by `now`, by due time."""
        arrived = []
        while self._transit and self._transit[0][0] <= now:
            due, _, message = heapq.heappop(self._transit)
            arrived.append((due, message))
        return arrived

    def __len__(self):
        return len(self._transit)


class StreamLink:
    """A link between MACHs that compute on CUDA streams of their own.

    Args:
        link: that carries the messages.
    """

    def __init__(self, link):
        self._link = link

    def send(self, message):
        """See `Link.send`; waits for this MACH's own stream, for no other."""
        torch.cuda.current_stream().synchronize()
        self._link.send(message)
