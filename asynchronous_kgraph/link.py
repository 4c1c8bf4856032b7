"""Messages between MACHs, the links that carry them, the mailboxes they fill.

A MACH knows a neighbour only as a link with a `send` that never waits. Here a
link ends in a mailbox of the same process, at once or as late and as lossy as a
network would be; one over processes or hosts needs the same one method.
"""
# Copied from asynchronous_sequence/link.py

import collections
import dataclasses
import heapq
import itertools
import math
import random
import threading
import time

import torch


@dataclasses.dataclass(frozen=True)
class Spike:
    """A forward query: what do you make of x?"""
    key: tuple  # (index of the asker, number), unique
    sender: int  # index of the MACH that asks
    x: torch.Tensor  # [B, 784]
    depth: int  # edges it may still travel; 0: answer on synthetic inputs


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a Spike brings back."""
    key: tuple  # that of the Spike
    sender: int  # index of the MACH that answers
    embedding: torch.Tensor  # [B, E], d(x), free of dropout
    version: int  # steps the sender had taken when it computed it


@dataclasses.dataclass(frozen=True)
class Grad:
    """A backward message, sent and forgotten."""
    key: tuple  # that of the Spike about the same x
    sender: int  # index of the parent
    x: torch.Tensor  # [B, 784]
    gradient: torch.Tensor  # [B, E], dL/dd(x), L the loss of a MACH further up
    version: int  # the receiver's step count that the sender last saw; or -1
    depth: int  # edges it may still travel


def is_finite(message):
    """False if one of its tensors has a NaN or an infinity."""
    return all(
        math.isfinite(value.sum())
        for value in vars(message).values()
        if torch.is_tensor(value))


class Mailbox:
    """What has arrived at one MACH, or is on its way. Bounded: the oldest goes.

    Args:
        limit: messages held at most.
        clock: gives seconds.
    """

    def __init__(self, limit, clock=time.monotonic):
        self.limit, self.clock = limit, clock
        self.dropped = 0  # messages that had to go
        self._messages = []  # heap of (when due, number, message)
        self._numbers = itertools.count()  # keeps order where dues are equal
        # Guards a few pointer moves, never a computation.
        self._arrival = threading.Condition()

    def put(self, message, delay=0.0):
        """Adds a message, due in `delay` seconds; never waits for the owner."""
        with self._arrival:
            entry = self.clock() + delay, next(self._numbers), message
            heapq.heappush(self._messages, entry)
            if len(self._messages) > self.limit:
                heapq.heappop(self._messages)
                self.dropped += 1
            self._arrival.notify()

    def collect(self, timeout=0.0):
        """Takes all that are due, in that order; waits up to `timeout` s.

        It may come back earlier with none.
        """
        with self._arrival:
            first = self._messages[0][0] if self._messages else math.inf
            wait = min(timeout, first - self.clock())
            if wait > 0:
                self._arrival.wait(wait)
            now, due = self.clock(), []
            while self._messages and self._messages[0][0] <= now:
                due.append(heapq.heappop(self._messages)[-1])
        return due


class Recent:
    """The last messages of one kind from one neighbour, as a MACH's steps use them.

    A flood is spread over the steps after it and a drought bridged: a step finds
    as much to learn from, whoever is scheduled when.

    Args:
        limit: messages kept.
    """

    def __init__(self, limit):
        self._kept = collections.deque(maxlen=limit)  # [message, its last use]
        self._uses = itertools.count(1)

    def add(self, message):
        """Returns how many had to go that were never used."""
        full = len(self._kept) == self._kept.maxlen
        lost = int(full and not self._kept[0][1])
        self._kept.append([message, 0])
        return lost

    def new(self):
        """Those not yet used, the newest first, each with its last use: 0."""
        return [entry for entry in reversed(self._kept) if not entry[1]]

    def take(self, everything, again):
        """A list of the newest not yet used; of all of them if `everything`.

        If there are none, `again` gives the one whose last use is longest ago.
        """
        taken = self.new()[:None if everything else 1]
        if again and not taken and self._kept:
            taken = [min(self._kept, key=lambda entry: entry[1])]
        for entry in taken:
            entry[1] = next(self._uses)
        return [message for message, _ in taken]


class Link:
    """One direction of an edge.

    Args:
        mailbox: where it ends.
        latency: seconds that every message is on its way.
        jitter: up to so many seconds more: one sent later may come earlier.
        loss_rate: the share of messages that never arrive.
        seed: of what is drawn.
    """

    def __init__(self, mailbox, latency=0.0, jitter=0.0, loss_rate=0.0, seed=0):
        self._mailbox, self._random = mailbox, random.Random(seed)
        self._latency, self._jitter = latency, jitter
        self._loss_rate = loss_rate
        self.lost = self.dropped = 0  # messages, counted by who sends

    def send(self, message):
        """Takes the message away and returns at once, whatever becomes of it.

        Its tensors are never written to afterwards, by either side.
        """
        if self._random.random() < self._loss_rate:
            self.lost += 1
            return
        delay = self._latency + self._jitter * self._random.random()
        self._mailbox.put(message, delay)
