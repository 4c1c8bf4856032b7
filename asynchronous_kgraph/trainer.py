"""The delayed-gradient trainer of one MACH: every method runs on its thread.

A step trains the MACH on a batch of its own and, in the same forward, answers
the Spikes and applies the Grads that have come in the meantime. Nobody waits for
a Grad: it is sent and forgotten, and applied by the child with the parameters it
has when it comes. How late that is, is counted (staleness), never assumed.
"""
# Copied from asynchronous_sequence/trainer.py

import copy
import dataclasses
import itertools
import math
import typing

import link
import student as students
import torch
from torch.nn import functional

from mach import metrics


# Copied from synchronous_single/trainer.py
class Copy(typing.NamedTuple):
    """What a MACH hands over of itself, the reader's to keep."""
    tally: metrics.Tally
    mach: torch.nn.Module | None = None  # None: it failed, or has not begun
    student: torch.nn.Module | None = None  # None: it has no children


@dataclasses.dataclass
class Rows:
    """One x, and what is due on it: rows that belong together in a forward."""
    x: torch.Tensor  # [B, 784]
    spike: link.Spike | None = None  # to answer
    grad: link.Grad | None = None  # to apply
    key: tuple | None = None  # of own Spikes, once the children are asked
    expires: float = math.inf  # clock seconds; then answers come too late
    answers: dict = dataclasses.field(default_factory=dict)  # by child position


class Trainer:
    """One MACH with its mailbox, its links, its optimisers and its own data.

    Args:
        index: of this MACH.
        mach: the network.
        student: the synthetic inputs; None for a MACH without children.
        children: indices of the MACHs that feed this one, in the order of the
            joiner's inputs.
        batches: has `next() -> (x [B, 784], y [B])`, the local dataset.
        settings: the hyperparameters of main.py.
    """

    def __init__(self, index, mach, student, children, batches, settings):
        self.index, self.mach, self.student = index, mach, student
        self.children, self.batches, self.settings = children, batches, settings
        self.mailbox = link.Mailbox(settings.mailbox)
        self.links = {}  # neighbour's index -> Link
        self.steps_taken = 0
        self.tally = metrics.Tally(index)
        self._keys = zip(itertools.repeat(index), itertools.count())
        self._seen = [0] * len(children)  # their step counts when last heard of
        # Rows by key, in order of arrival. At the mailbox's limit the oldest go:
        # memory is bounded whatever is lost or never comes.
        self._asked = {}  # about which children have not all answered
        self._lessons = {}  # with the answers that the student is yet to learn
        self._served = {}  # of others, for the next forward
        self._relayed = {}  # of others, answered with real inputs: for the Grad
        self._optimiser = Optimiser(mach, settings.learning_rate,
                                    settings.weight_decay, settings)
        if children:
            self._student_optimiser = Optimiser(student,
                                                settings.student_learning_rate,
                                                0.0, settings)

    # ------------------------------------------------------------- the step

    def step(self, stopped=lambda: False):
        """One training step; waits for nothing unless `inputs` are `real`.

        Args:
            stopped: tells whether to give up waiting.
        """
        x, y = self.batches.next()
        own = Rows(x)
        if (self.settings.inputs == 'real' and self.children and
                self.settings.depth > 0):
            self.ask(own, self.settings.depth - 1, wait=True)
            # A k-graph is all cycles: who waits must go on answering others.
            while own.key in self._asked and not stopped():
                self.serve(min(0.1, own.expires - self.mailbox.clock()))
        self.learn(own, y)

    def learn(self, own, y):
        """Trains on the Rows `own`, labels y [B], and on all that has arrived.

        One forward, one backward and one optimiser step: own rows, Spikes and
        Grads are one batch; a Spike and a Grad about the same x share rows.

        Raises:
            FloatingPointError: a loss is not finite. Where it is the target
                loss, no Answer and no Grad was sent.
        """
        self._read_mail()
        served, self._served = list(self._served.values()), {}
        inputs, embedding = self._embed([own] + served, len(y))
        logits = self.mach.head(embedding[:len(y)]).to(embedding.dtype)
        loss = functional.cross_entropy(
            logits, y, label_smoothing=self.settings.label_smoothing)
        check_finite(loss, 'target loss')
        embedding = embedding[len(y):]  # [R - B, E], of others' rows
        self._answer(served, embedding.detach())
        torch.autograd.backward([loss, embedding],
                                [None, self._gather(served, embedding)])
        self._optimiser.step()
        if self.children:
            self._tell_children(own, served, inputs.grad)
            self._teach()
        self.steps_taken += 1
        self.tally.step(loss, logits, y)

    def serve(self, timeout):
        """Answers Spikes without training; waits up to `timeout` s for mail.

        Grads are kept for the next step. After the last one they come too late:
        its learning rate has come down to nothing. They count as dropped.
        """
        self._read_mail(timeout)
        spiked = [rows for rows in self._served.values() if rows.spike]
        if spiked:
            with torch.no_grad():
                self._answer(spiked, self._embed(spiked)[1])
        self._served = {k: r for k, r in self._served.items() if r.grad}
        if self.steps_taken == self.settings.steps:
            self.tally.dropped += len(self._served)
            for kept in (self._lessons, self._served, self._relayed):
                kept.clear()

    def copy(self, networks=True):
        """MACH -> Copy of it as it is now; of its counts alone if asked to."""
        tally = copy.copy(self.tally)
        tally.dropped += self.mailbox.dropped
        tally.lost = sum(out.lost for out in self.links.values())
        of = (self.mach, self.student) if networks else ()
        return {self.index: Copy(tally, *copy.deepcopy(of))}

    # ------------------------------------------------------------- messages

    def ask(self, rows, depth, wait=False):
        """Spikes the children about rows.x, which will hold the answers.

        Args:
            rows: about which nobody was asked before.
            depth: of the Spikes.
            wait: whether somebody does, up to the deadline. Half-way down half
                of it is left, so that what is made up there is still in time up
                here. What links take comes on top. As lessons answers are good
                for ten times as long.
        """
        settings, hops = self.settings, depth + 1
        patience = 10 * settings.deadline
        if wait:
            patience = settings.deadline / max(hops, settings.depth)
        rows.expires = self.mailbox.clock() + hops * (
            patience + 2 * (settings.latency + settings.jitter))
        rows.key = next(self._keys)
        self._keep(self._asked, rows.key, rows)
        for child in self.children:
            self.links[child].send(
                link.Spike(rows.key, self.index, rows.x, depth))

    def _read_mail(self, timeout=0.0):
        """Sorts what has arrived; sends Spikes on that have depth left."""
        for message in self.mailbox.collect(timeout):
            if not link.is_finite(message):
                self.tally.dropped += 1  # a neighbour diverges: do not follow
            elif isinstance(message, link.Answer):
                self._note_answer(message)
            elif isinstance(message, link.Grad):
                rows = self._relayed.pop(message.key, Rows(message.x))
                self._keep(self._served, message.key, rows).grad = message
            elif message.depth > 0 and self.children:
                self.ask(Rows(message.x, message), message.depth - 1, wait=True)
            else:
                rows = self._keep(self._served, message.key, Rows(message.x))
                rows.spike = message
        now = self.mailbox.clock()
        for rows in [r for r in self._asked.values() if r.expires <= now]:
            self._close(rows)

    def _note_answer(self, answer):
        """One answer is one lesson, and the input of who waits for it."""
        position = self.children.index(answer.sender)
        self._seen[position] = max(answer.version, self._seen[position])
        rows = self._asked.get(answer.key)
        if rows is None or position in rows.answers:
            return  # too late
        rows.answers[position] = answer
        lesson = self._keep(self._lessons, rows.key, Rows(rows.x))
        lesson.answers[position] = answer
        if len(rows.answers) == len(self.children):
            self._close(rows)

    def _close(self, rows):
        """Nobody waits for more answers; a relayed Spike can be answered."""
        self._asked.pop(rows.key, None)
        if rows.spike is not None:
            key = rows.spike.key
            if key in self._served:  # its Grad was faster
                rows.grad = self._served.pop(key).grad
            self._keep(self._served, key, rows)
            if self.settings.inputs == 'real' and rows.grad is None:
                # It is to find the inputs that the answer was made from.
                self._keep(self._relayed, key, rows)

    def _keep(self, kept, key, rows):
        """Adds Rows unless there are some of this key; returns what is there."""
        rows = kept.setdefault(key, rows)
        if len(kept) > self.settings.mailbox:
            oldest = kept.pop(next(iter(kept)))
            self.tally.dropped += 1
            if kept is self._asked:
                self._close(oldest)
        return rows

    def _answer(self, blocks, embedding):
        """Answers the Spikes of Rows with their part of embedding [R, E]."""
        for rows, part in zip(blocks, split(embedding, blocks)):
            if rows.spike:
                self.links[rows.spike.sender].send(
                    link.Answer(rows.spike.key, self.index, part,
                                self.steps_taken))
                rows.spike = None

    def _tell_children(self, own, served, gradient):
        """Sends Grads as far as there is depth left, and Spikes about new rows.

        Those own rows go whose gradients are the largest (`share`). The others
        would cost the children as much and teach them little.

        Args:
            own, served: Rows of the step.
            gradient: [R, C, E], of their inputs.
        """
        settings = self.settings
        first, *parts = split(gradient, [own] + served)
        if own.key is None:
            rows = math.ceil(settings.share * len(own.x))
            largest = first.flatten(1).norm(dim=1).topk(rows).indices
            own, first = Rows(own.x[largest]), first[largest]
            self.ask(own, max(0, settings.depth - 1))
        self._send_grads(own, first * settings.grad_weight, settings.depth)
        for rows, part in zip(served, parts):
            if rows.grad:
                self._send_grads(rows, part, rows.grad.depth)

    def _send_grads(self, rows, gradient, depth):
        """Sends each child its slice of gradient [B, C, E] if there is depth."""
        key = rows.key or next(self._keys)
        for position, child in enumerate(self.children if depth > 0 else []):
            answer = rows.answers.get(position)
            self.links[child].send(
                link.Grad(key, self.index, rows.x, gradient[:, position],
                          answer.version if answer else self._seen[position],
                          depth - 1))

    # ------------------------------------------------------------- learning

    def _embed(self, blocks, own=0):
        """One forward of all Rows, the first `own` rows of them with dropout.

        Others' rows have none: parents' students would chase its noise (25%
        relative error instead of 2.6%).

        Returns:
            inputs [R, C, E] (None without children), a leaf: its gradient
            travels on as Grads, none leads into the student; and d(x) [R, E].
        """
        x, inputs = torch.cat([rows.x for rows in blocks]), None  # [R, 784]
        local = self.mach.local_part(x)
        if self.settings.dropout:
            dropped = functional.dropout(local[:own], self.settings.dropout)
            local = torch.cat([dropped, local[own:]])
        if self.children:
            with torch.no_grad():
                inputs = self.student(x)
            for rows, part in zip(blocks, split(inputs, blocks)):
                for position, answer in rows.answers.items():
                    part[:, position] = answer.embedding
            inputs.requires_grad_()
        return inputs, torch.relu(local + self.mach.joined_part(inputs))

    def _gather(self, served, embedding):
        """What Grads say of embedding [R, E], so that late ones do no harm.

        The staler, the less they weigh: in inverse proportion, from
        `stale_after` steps on (Zhang et al. 2016, arXiv 1511.05950).

        And what they say of a row's mean and of its component along d - mean(d)
        is left out. The parents' joiners normalise, so they see neither, and a
        gradient taken at the d that is there has neither. One taken at a
        student's output, or at a d of long ago, has: it would push scale and
        offset on and on, as nothing the parents see ever changes.
        """
        gradient, after = torch.zeros_like(embedding), self.settings.stale_after
        for rows, part in zip(served, split(gradient, served)):
            if rows.grad:
                staleness = self.steps_taken - rows.grad.version
                part += rows.grad.gradient * (after / max(after, staleness))
                self.tally.grad(staleness)
        if self.settings.inputs == 'synthetic':
            unseen = embedding.detach()
            unseen = functional.layer_norm(unseen, unseen.shape[-1:])
            gradient -= gradient.mean(1, keepdim=True)
            gradient -= unseen * (unseen * gradient).mean(1, keepdim=True)
        return gradient

    def _teach(self):
        """Trains the student on the answers that have come."""
        lessons, self._lessons = list(self._lessons.values()), {}
        if not lessons:
            return
        synthetic = self.student(torch.cat([rows.x for rows in lessons]))
        real = synthetic.detach().clone()  # [B, C, E]; no answer, no loss
        for rows, part in zip(lessons, split(real, lessons)):
            for position, answer in rows.answers.items():
                part[:, position] = answer.embedding
        loss = students.synthetic_loss(synthetic, real)
        check_finite(loss, 'synthetic loss')
        loss.backward()
        self._student_optimiser.step()
        self.tally.lesson(loss)


# Copied from synchronous_single/trainer.py
class Optimiser:
    """AdamW with one learning-rate cycle over the run; a step clears the grads.

    Weight decay is decoupled (Loshchilov & Hutter 2019, arXiv 1711.05101).
    """

    def __init__(self, network, peak, weight_decay, settings):
        self._adamw = torch.optim.AdamW(network.parameters(),
                                        peak,
                                        weight_decay=weight_decay,
                                        fused=True)
        total = settings.steps + 1
        self._cycle = torch.optim.lr_scheduler.OneCycleLR(
            self._adamw,
            peak,
            total,
            pct_start=max(settings.warmup, 2 / total),  # a step at least
            cycle_momentum=False)

    def step(self):
        """Applies the gradients that have been accumulated, then drops them."""
        self._adamw.step()
        self._cycle.step()
        self._adamw.zero_grad()


def split(tensor, blocks):
    """tensor [R, ...] in the parts [B, ...] that belong to each of the Rows."""
    return tensor.split([len(rows.x) for rows in blocks])


# Copied from synchronous_single/trainer.py
def check_finite(loss, name):
    """Raises FloatingPointError, with its name, for a loss that is none."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f'the {name} is {loss.item()}')
