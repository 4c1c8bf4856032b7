"""Messages between MACHs, the links that carry them, the mailboxes they fill.

A MACH knows a neighbour only as a link with a `send` that never waits. Here a
link ends in a mailbox of the same process; one over processes or hosts needs
the same one method.
"""
# Copied from asynchronous_sequence/link.py

import collections
import dataclasses
import math
import threading
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
    """
    key: tuple
    sender: int
    x: torch.Tensor
    depth: int

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
    """
    key: tuple
    sender: int
    embedding: torch.Tensor
    version: int

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


class Link(typing.Protocol):
    """One direction of an edge."""

    def send(self, message) -> None:
        """Takes the message away and returns at once, whatever becomes of it.

        The message's tensors are never written to afterwards, by either side.
        """


class Mailbox:
    """What has arrived at one MACH. Bounded: when full the oldest goes.

    Args:
        limit: messages held at most.
    """

    def __init__(self, limit):
        self.dropped = 0  # messages that had to go
        self._messages = collections.deque()
        self._limit = limit
        # Guards a few pointer moves, never a computation: nobody trains or
        # waits for a neighbour while holding it.
        self._arrival = threading.Condition()

    def put(self, message):
        """Adds a message; never waits for the owner."""
        with self._arrival:
            if len(self._messages) >= self._limit:
                self._messages.popleft()
                self.dropped += 1
            self._messages.append(message)
            self._arrival.notify()

    def collect(self, timeout=0.0):
        """Takes all messages, oldest first; waits up to `timeout` s for one."""
        with self._arrival:
            if timeout > 0 and not self._messages:
                self._arrival.wait(timeout)
            messages, self._messages = self._messages, collections.deque()
        return list(messages)

    def __len__(self):
        return len(self._messages)


class MailboxLink:
    """The link between two threads: what is sent lands in a mailbox at once."""

    def __init__(self, mailbox):
        self._mailbox = mailbox

    def send(self, message):
        """See `Link.send`."""
        self._mailbox.put(message)
