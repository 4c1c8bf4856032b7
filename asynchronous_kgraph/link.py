"""The messages between MACHs, and the links and mailboxes that carry them.

A MACH knows a neighbour only as a link, whose `send` never waits. Here a link
ends in a mailbox of the same process. It can delay and lose messages, as a
network can.
"""
# Copied from asynchronous_sequence/link.py

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
    """A forward query: what is your answer about x?"""
    key: tuple  # (index of the asker, number), unique
    sender: int  # index of the asker
    x: torch.Tensor  # [B, 784]
    depth: int  # edges it may still travel; 0: answer on synthetic inputs


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a Spike brings back."""
    key: tuple  # of the Spike
    sender: int  # index of the MACH that answers
    value: torch.Tensor  # [B, E], a(x), computed without dropout
    version: int  # steps the sender had taken when it computed `value`
    depth: int  # of the Spike


@dataclasses.dataclass(frozen=True)
class Grad:
    """A gradient for the receiver's answer; it gets no reply."""
    key: tuple  # of the Spike about the same x
    sender: int  # index of the parent
    x: torch.Tensor  # [B, 784]
    gradient: torch.Tensor  # [B, E], dL/da(x), L the loss of a parent or beyond
    version: int  # receiver's steps at its answer, else when last heard; or -1
    depth: int  # edges it may still travel


def is_finite(message):
    """Whether its x, if it is a Spike, or its computed values are all finite.

    A row of nan makes the gradient of a whole step nan. The x of a Grad needs
    no check: with nan in it, the gradient is nan.
    """
    checked = {Spike: 'x', Answer: 'value', Grad: 'gradient'}.get(type(message))
    return not checked or math.isfinite(getattr(message, checked).sum())


class Mailbox:
    """Messages that are on their way to one MACH, or have arrived.

    Args:
        limit: most messages it holds. The oldest that has arrived makes room;
            if all are on their way, a new one finds no room.
        clock: gives seconds.
    """

    def __init__(self, limit=1024, clock=time.monotonic):
        self.limit, self.clock = limit, clock
        self.dropped = 0  # messages for which there was no room
        self._messages = []  # heap of (when due, number, message)
        self._numbers = itertools.count()  # keeps order where dues are equal
        # It guards a few pointer moves, never a computation.
        self._arrival = threading.Condition()

    def __len__(self):
        return len(self._messages)

    def put(self, message, delay=0.0):
        """Adds a message, due in `delay` seconds; never waits for the owner."""
        with self._arrival:
            now = self.clock()
            if len(self._messages) >= self.limit:
                self.dropped += 1
                # Else a full heap would lose each message on its way.
                if not self._messages or self._messages[0][0] > now:
                    return
                heapq.heappop(self._messages)
            entry = now + delay, next(self._numbers), message
            heapq.heappush(self._messages, entry)
            self._arrival.notify()

    def collect(self, timeout=0.0):
        """Takes all messages that are due, in that order.

        It waits for the first one up to `timeout` seconds, or less.
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


class Link:
    """One direction of an edge.

    Args:
        mailbox: where it ends.
        latency: seconds that every message is on its way.
        jitter: most seconds more, at random; messages may overtake each other.
        loss_rate: the share of messages that never arrive.
        seed: of what is drawn.
    """

    def __init__(self, mailbox, latency=0.0, jitter=0.0, loss_rate=0.0, seed=0):
        self._mailbox, self._random = mailbox, random.Random(seed)
        self._latency, self._jitter = latency, jitter
        self._loss_rate = loss_rate
        self.lost = self.dropped = 0  # messages, counted by the sender

    def send(self, message):
        """Takes the message and returns at once.

        Neither side ever writes to the message's tensors again.
        """
        if self._random.random() < self._loss_rate:
            self.lost += 1
            return
        delay = self._latency + self._jitter * self._random.random()
        self._mailbox.put(message, delay)
