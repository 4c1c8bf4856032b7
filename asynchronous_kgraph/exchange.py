"""What one MACH asks, answers, relays and keeps: its side of every message.

Two structures hold messages. `_arrived` keeps the newest of each kind, sender
and depth. `pending` keeps each question to the children, until they have
answered or its time is over.

A step takes one message of each kind, sender and depth. Of Spikes and Grads it
is the newest unused one. Of Answers, and without a new Grad, it is one drawn
from all that are kept. So a student learns from many moments of its children at
once, on any schedule.
"""
# Copied from asynchronous_sequence/exchange.py

import collections
import dataclasses
import itertools
import math
import random
import time

import torch
from link import Answer, Grad, Mailbox, Spike, is_finite
from torch.linalg import vector_norm

# Most messages of a kind, sender and depth; then the oldest goes.
KEPT = {Spike: 32, Grad: 32, Answer: 128}
PENDING = 1024  # most open questions; then the oldest is discarded
LESSON = 10  # deadlines per edge for a question that only the student needs


@dataclasses.dataclass
class Block:
    """One x [B, 784] of a forward, with the messages about it."""
    x: torch.Tensor  # [B, 784]
    key: tuple | None = None  # of the Spikes about x; None: children not asked
    expires: float = math.inf  # clock seconds; later answers are ignored
    spike: Spike | None = None  # to be answered
    grad: Grad | None = None  # to be applied
    answers: dict = dataclasses.field(default_factory=dict)  # child -> Answer


class Exchange:
    """The messages of one MACH. Its methods run on that MACH's thread.

    Args:
        index: of the MACH.
        children: indices of the MACHs that feed it, in the joiner's order.
        settings: the hyperparameters of main.py.
    """

    def __init__(self, index, children, settings):
        self.index, self.children, self.settings = index, children, settings
        self.locked = settings.inputs == 'real'  # it waits for real inputs
        self.mailbox, self.links = Mailbox(), {}  # neighbour's index -> Link
        self.dropped = 0  # messages that were never used
        self.versions = dict.fromkeys(children, -1)  # last heard; -1: never
        self._quiet_until = -math.inf  # see `child_learns`
        # Key of the awaited messages -> Block, oldest first. A Block that
        # awaits Answers is under its own key. A locked MACH also keeps each
        # answered relay, under the key of its Grad, to reuse the same inputs.
        self.pending = {}
        # (kind, sender, depth) -> [message, its Block, whether it is new], oldest
        # first. Only an Answer has a Block. It is new to a locked MACH alone.
        self._arrived = {}
        self._random = random.Random(f'{settings.seed} {index}')
        # A resumed MACH may get answers to Spikes from before. Keys that start
        # at the clock are new, so it ignores those answers.
        self._numbers = itertools.count(time.time_ns())

    def ask(self, x, depth, spike=None, waits=False):
        """Spikes the children about x [B, 784]; returns the Block of answers.

        Args:
            depth: of the Spikes.
            spike: the Spike that this question relays.
            waits: whether a step or a relay waits for the answers. Then a relay
                gets deadline * edges left / depth, so that its answer still
                arrives in time. The time on links comes on top.
        """
        settings, edges = self.settings, depth + 1
        seconds = LESSON * settings.deadline
        if waits:
            seconds = settings.deadline / max(edges, settings.depth)
        seconds += 2 * (settings.latency + settings.jitter)
        block = Block(x, (self.index, next(self._numbers)),
                      self.mailbox.clock() + edges * seconds, spike)
        self.pending[block.key] = block
        for child in self.children:
            self.links[child].send(Spike(block.key, self.index, x, depth))
        return block

    def receive(self, timeout=0.0):
        """Sorts new messages; waits up to `timeout` seconds for the first."""
        for message in self.mailbox.collect(timeout):
            block = None
            if not is_finite(message):  # the sender diverges: do not follow it
                self.dropped += 1
                continue
            if isinstance(message, Answer):
                self.versions[message.sender] = message.version
                if message.version < self.settings.steps:
                    self._quiet_until = -math.inf
                block = self.pending.get(message.key)
                if block is None or message.sender in block.answers:
                    continue
                block.answers[message.sender] = message
            kind = type(message)
            ring = self._arrived.setdefault(
                (kind, message.sender, message.depth),
                collections.deque(maxlen=KEPT[kind]))
            self.dropped += len(ring) == KEPT[kind] and ring[0][-1]
            ring.append([message, block, kind is not Answer or self.locked])

    def take(self, learning=True):
        """Chooses the messages of one forward.

        A locked MACH takes all messages, so that its gradients are exact.

        Args:
            learning: if False, Spikes alone are taken, and all of them.
        Returns:
            The Blocks to serve, each with a Spike or a Grad or both. The Blocks
            of the student's lesson, each with answers.
        """
        served, lessons, grads = {}, {}, []
        for (kind, *_), ring in list(self._arrived.items()):
            if kind is not Spike and not learning:
                continue
            most = 1 if learning and not self.locked else None
            new = (entry for entry in reversed(ring) if entry[-1])
            chosen = list(itertools.islice(new, most))
            if most and kind is not Spike and not chosen:
                chosen = [self._random.choice(ring)]
            for entry in chosen:
                message, block, entry[-1] = *entry[:2], False
                if kind is Answer:
                    lesson = lessons.setdefault(message.key, Block(block.x))
                    lesson.answers[message.sender] = message
                elif kind is Grad:
                    grads.append(message)
                elif message.depth > 0 and self.children:
                    self.ask(message.x, message.depth - 1, message, waits=True)
                else:
                    block = served.setdefault(message.key, Block(message.x))
                    block.spike = message
        served |= {block.spike.key: block for block in self._close()}
        for grad in grads:  # a Spike and a Grad about the same x share rows
            block = self.pending.pop(grad.key, None) or Block(grad.x)
            served.setdefault(grad.key, block).grad = grad
        return list(served.values()), list(lessons.values())

    def _close(self):
        """Ends questions that get no more answers; returns those relays."""
        relays, now = [], self.mailbox.clock()
        excess = len(self.pending) - PENDING
        for number, (key, block) in enumerate(list(self.pending.items())):
            complete = len(block.answers) == len(self.children)
            over = key == block.key and (complete or block.expires <= now)
            if over or number < excess:
                self.dropped += not over
                del self.pending[key]
                relays += [block] if block.spike else []
        return relays

    def answer(self, served, values, version):
        """Answers the Spikes of Blocks with their parts of values [R, E].

        Args:
            version: steps that the MACH has taken.
        """
        for block, value in zip(served, split(values, served)):
            spike, block.spike = block.spike, None
            if spike:
                self.links[spike.sender].send(
                    Answer(spike.key, self.index, value, version, spike.depth))
                if self.locked and block.key and not block.grad:
                    self.pending[spike.key] = block

    def send_grads(self, block, gradient, depth):
        """Sends each child that still learns its slice of gradient [B, C, E].

        Args:
            block: the rows that the gradient is about.
            depth: edges that it may travel.
        """
        # Without Spikes about x the key is new. Grads that arrived with one key
        # may go on to one child, so the old key would not be unique.
        key = block.key or (self.index, next(self._numbers))
        for position, child in enumerate(self.children if depth > 0 else ()):
            answer, version = block.answers.get(child), self.versions[child]
            if version < self.settings.steps:
                version = answer.version if answer else version
                self.links[child].send(
                    Grad(key, self.index, block.x, gradient[:, position],
                         version, depth - 1))

    def child_learns(self):
        """Whether a finished MACH sends Grads now: a child still learns.

        It sends them once for each Answer of such a child. After `deadline`
        seconds without one it sends again: messages may be lost.
        """
        now = self.mailbox.clock()
        if now < self._quiet_until or all(
                version >= self.settings.steps
                for version in self.versions.values()):
            return False
        self._quiet_until = now + self.settings.deadline
        return True

    def count(self, tally):
        """Adds messages dropped or lost to a Tally; sets in_flight."""
        tally.in_flight = len(self.mailbox)
        tally.dropped += self.dropped + self.mailbox.dropped
        for i, way in self.links.items():
            tally.dropped += way.dropped
            tally.lost_to[i] = tally.lost_to.get(i, 0) + way.lost


def choose_rows(sent, depth, rows):
    """The Block [N, 784], gradient [N, C, E] and depth of a Grad.

    It is about the rows with the largest gradients. The rest would cost the
    children as much and teach them little.

    Args:
        sent: (Block [B, 784], gradient [B, C, E], depth) of all rows.
        depth: of the rows to choose from; if there are none, of the first.
        rows: most rows of the Grad.
    """
    if all(left != depth for *_, left in sent):
        depth = sent[0][2]
    chosen = [(block.x, part) for block, part, left in sent if left == depth]
    (x, gradient), *more = chosen
    if more:  # else no copy is needed
        x, gradient = map(torch.cat, zip(*chosen))
    norms = vector_norm(gradient.flatten(1), dim=1)
    largest = norms.topk(min(rows, len(x))).indices
    return Block(x[largest]), gradient[largest], depth


def draw_rows(blocks, rows, seeds):
    """x [rows, 784]: rows of any Blocks, drawn by the seeds."""
    x, generator = torch.cat([block.x for block in blocks]), torch.Generator()
    generator.manual_seed(hash(seeds))
    return x[torch.randperm(len(x), generator=generator)[:rows]]


def split(tensor, blocks):
    """tensor [R, ...] in parts [B, ...], one for each Block."""
    return tensor.split([len(block.x) for block in blocks])
