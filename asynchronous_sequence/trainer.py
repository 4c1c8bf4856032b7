"""The delayed-gradient trainer of one MACH: every method runs on its thread.

A step trains the MACH on a batch of its own and, in the same forward, answers
Spikes and applies Grads. Nobody waits for a Grad: it is sent and forgotten, and
applied by the child with the parameters it has then. How late that is, is counted
(staleness), never assumed. Three rules make it the same who is scheduled when:

1. A step uses one message of each neighbour and kind, the newest not yet used,
   however many have come; the others wait for the next steps.
2. If there is no new Grad or answer, it uses an old one again.
3. Each Grad counts `grad_weight` times as much as the gradient of the own batch,
   and none of it is used that its sender cannot mean.

Who has taken the last step learns no more, but goes on answering and, for those
children that still learn, teaching.
"""

import collections
import copy
import dataclasses
import itertools
import math
import time
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
    depth: int = 0  # of these
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
        self.file = f'mach{index}.pt'  # of its checkpoint
        self.children, self.batches, self.settings = children, batches, settings
        self.mailbox = link.Mailbox(settings.mailbox)
        self.links = {}  # neighbour's index -> Link
        self.locked = settings.inputs == 'real'  # the yardstick: exact, slow
        self.steps_taken = 0
        self.tally = metrics.Tally(index)
        # Not from 0: messages of a life before this one may still come.
        self._keys = zip(itertools.repeat(index),
                         itertools.count(time.time_ns()))
        # Their step counts when last heard of; -1: never.
        self._seen = [-1] * len(children)
        self._wanted = False  # as a teacher: a child that learns has answered
        # What has come, by kind, neighbour and depth.
        self._recent = collections.defaultdict(
            lambda: link.Recent(settings.recent))
        # Rows by key, in order of arrival. At the mailbox's limit the oldest go:
        # memory is bounded whatever is lost or never comes.
        self._asked = {}  # about which children have not all answered
        self._relayed = {}  # of others, answered with real inputs: for the Grad
        # Rows by key of the next forward: of others, and for the student.
        self._served, self._lessons = {}, {}
        self._optimiser = Optimiser(mach, settings.learning_rate,
                                    settings.weight_decay, settings)
        self._optimisers = [self._optimiser]
        if children:
            # It ends at a fiftieth of the peak and goes on like that: Grads of a
            # teacher are about the children as they have become.
            self._student_optimiser = Optimiser(student,
                                                settings.student_learning_rate,
                                                0.0,
                                                settings,
                                                final_div_factor=2)
            self._optimisers.append(self._student_optimiser)

    # ------------------------------------------------------------- the step

    def step(self, stopped=lambda: False):
        """One training step; waits for nothing unless `inputs` are `real`.

        Args:
            stopped: tells whether to give up waiting.
        """
        x, y = self.batches.next()
        own = Rows(x)
        if self.locked and self.children and self.settings.depth > 0:
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
        self._take(link.Spike, link.Grad, link.Answer)
        served, self._served = list(self._served.values()), {}
        inputs, embedding = self._embed([own] + served, len(y))
        d = embedding.detach()  # [R, E]
        leaf = d[:len(y)].requires_grad_()
        logits = self.mach.head(leaf).to(d.dtype)
        loss = functional.cross_entropy(
            logits, y, label_smoothing=self.settings.label_smoothing)
        check_finite(loss, 'target loss')
        self._answer(served, d[len(y):])
        loss.backward()  # the head; what is below it learns from Grads as well
        others = self._gather(served, d[len(y):], leaf.grad)
        embedding.backward(torch.cat([leaf.grad, others]))
        if self.finished:
            self.mach.zero_grad()  # it teaches: it stays as it is
        else:
            self._optimiser.step()
        if self.children:
            self._tell_children(own, served, inputs.grad)
            self._teach_student()
        if not self.finished:
            self.steps_taken += 1
            self.tally.step(loss, logits, y)

    @property
    def finished(self):
        """Whether it has taken its last step."""
        return self.steps_taken == self.settings.steps

    def serve(self, timeout):
        """Answers Spikes without learning; waits up to `timeout` s for mail.

        Grads are kept for the next step; after the last one they count as
        dropped. Then, at the pace of the slowest, it teaches: for each answer
        of a child that still learns it sends Grads about one more batch.
        """
        self._read_mail(timeout)
        if self.finished:
            for kind in [k for k in self._recent if k[0] is link.Grad]:
                self.tally.dropped += len(self._recent.pop(kind).new())
            self._relayed.clear()
            if self._wanted:
                self._wanted = False
                x, y = self.batches.next()
                self.learn(Rows(x), y)
        self._take(link.Spike)
        served, self._served = list(self._served.values()), {}
        if served:
            with torch.no_grad():
                self._answer(served, self._embed(served)[1])

    def copy(self, networks=True):
        """MACH -> Copy of it as it is now; of its counts alone if asked to."""
        tally = copy.copy(self.tally)
        tally.dropped += self.mailbox.dropped
        for out in self.links.values():
            tally.dropped += out.dropped
            tally.lost += out.lost
        of = (self.mach, self.student) if networks else ()
        return {self.index: Copy(tally, *copy.deepcopy(of))}

    def state(self):
        """All that its next steps depend on, messages aside; not copied."""
        tally = self.copy(networks=False)[self.index].tally
        return dict(steps_taken=self.steps_taken,
                    optimisers=[one.state() for one in self._optimisers],
                    batches=self.batches.state(),
                    tally=vars(tally))

    def restore(self, state):
        """Goes on from the state of another, of the same hyperparameters."""
        self.steps_taken = state['steps_taken']
        for one, saved in zip(self._optimisers,
                              state['optimisers'],
                              strict=True):
            one.restore(saved)
        vars(self.tally).update(state['tally'])
        self.batches.restore(state['batches'])
        self._wanted = True  # if it has finished, a child may still learn

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
        rows.key, rows.depth = next(self._keys), depth
        self._keep(self._asked, rows.key, rows)
        for child in self.children:
            self.links[child].send(
                link.Spike(rows.key, self.index, rows.x, depth))

    def _read_mail(self, timeout=0.0):
        """Sorts what has arrived, closes what has expired."""
        for message in self.mailbox.collect(timeout):
            if not link.is_finite(message):
                self.tally.dropped += 1  # a neighbour diverges: do not follow
            elif isinstance(message, link.Answer):
                self._note_answer(message)
            else:
                self._add(message, message.depth, message)
        now = self.mailbox.clock()
        for rows in [r for r in self._asked.values() if r.expires <= now]:
            self._close(rows)

    def _note_answer(self, answer):
        """One answer is one lesson, and the input of who waits for it."""
        position = self.children.index(answer.sender)
        self._wanted |= answer.version < self.settings.steps
        self._seen[position] = answer.version  # less, if it was set back
        rows = self._asked.get(answer.key)
        if rows is None or position in rows.answers:
            return  # too late
        rows.answers[position] = answer
        self._add(answer, rows.depth, (rows, position))
        if len(rows.answers) == len(self.children):
            self._close(rows)

    def _close(self, rows):
        """Nobody waits for more answers; a relayed Spike can be answered."""
        self._asked.pop(rows.key, None)
        if rows.spike is not None:
            self._served[rows.spike.key] = rows
            if self.locked:  # its Grad is to find the answer's inputs
                self._keep(self._relayed, rows.spike.key, rows)

    def _add(self, message, depth, content):
        """Keeps what a message brings until a step has use for it."""
        kind = type(message), message.sender, depth
        self.tally.dropped += self._recent[kind].add(content)

    def _take(self, *kinds):
        """Gets one of each kind, neighbour and depth ready for the next forward.

        All that there are if `locked`, as it is to be exact; and all Spikes if
        nothing else is wanted, as nobody learns.
        """
        everything = self.locked or kinds == (link.Spike,)
        for kind, recent in list(self._recent.items()):
            if kind[0] in kinds:
                again = not everything and kind[0] is not link.Spike
                for one in recent.take(everything, again):
                    self._ready(one)

    def _ready(self, message):
        """Its rows are to be served or learnt; or a Spike is sent on."""
        if isinstance(message, tuple):
            rows, position = message
            lesson = self._lessons.setdefault(rows.key, Rows(rows.x))
            lesson.answers[position] = rows.answers[position]
        elif isinstance(message, link.Grad):
            rows = self._relayed.pop(message.key, Rows(message.x))
            self._served.setdefault(message.key, rows).grad = message
        elif message.depth > 0 and self.children:
            self.ask(Rows(message.x, message), message.depth - 1, wait=True)
        else:
            rows = self._served.setdefault(message.key, Rows(message.x))
            rows.spike = message

    def _keep(self, kept, key, rows):
        """Adds Rows; if there are too many by then, the oldest go."""
        kept[key] = rows
        if len(kept) > self.settings.mailbox:
            oldest = kept.pop(next(iter(kept)))
            self.tally.dropped += 1
            if kept is self._asked:
                self._close(oldest)

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
        self._send_grads(own, first, settings.depth)
        for rows, part in zip(served, parts):
            if rows.grad:
                self._send_grads(rows, part, rows.grad.depth)

    def _send_grads(self, rows, gradient, depth):
        """Sends each child that learns its slice of gradient [B, C, E].

        If there is depth left.
        """
        key = rows.key or next(self._keys)
        for position, child in enumerate(self.children if depth > 0 else []):
            if self._seen[position] >= self.settings.steps:
                continue  # it has taken its last step
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

    def _gather(self, served, d, own):
        """What Grads say of d(x) [R, E], so that no schedule does harm.

        Each is scaled to weigh `grad_weight` times as much as the own gradient,
        by the sum of its rows' norms: neither a flood nor one out of all measure
        can outshout the own data. A Grad says which way, not how far.

        And what it says of a row's mean and of its component along d - mean(d)
        is left out. The parents' joiners normalise, so they see neither, and a
        gradient taken at the d that is there has neither. One taken at a
        student's output, or at a d of long ago, has: it would push scale and
        offset on and on, as nothing the parents see ever changes.

        Args:
            own: [B, E], of the target loss.
        """
        gradient = torch.zeros_like(d)
        for rows, part in zip(served, split(gradient, served)):
            if rows.grad:
                if rows.grad.version >= 0:  # its sender has heard of this one
                    late = self.steps_taken - rows.grad.version
                    self.tally.grad(max(0, late))  # this one may be set back
                part += rows.grad.gradient
        if self.locked or not served:
            return gradient
        measure = self.settings.grad_weight * own.norm(dim=1).sum()
        for part in split(gradient, served):
            part *= measure / part.norm(dim=1).sum().clamp_min(1e-20)
        unseen = functional.layer_norm(d, d.shape[-1:])
        gradient -= gradient.mean(1, keepdim=True)
        gradient -= unseen * (unseen * gradient).mean(1, keepdim=True)
        return gradient

    def _teach_student(self):
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


class Optimiser:
    """AdamW with one learning-rate cycle over the run; a step clears the grads.

    Weight decay is decoupled (Loshchilov & Hutter 2019, arXiv 1711.05101). The
    rate begins at a 25th of the peak and ends at a `final_div_factor`th of that;
    there it stays.
    """

    def __init__(self,
                 network,
                 peak,
                 weight_decay,
                 settings,
                 final_div_factor=1e4):
        self._network = network
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
            cycle_momentum=False,
            final_div_factor=final_div_factor)

    def step(self):
        """Applies the gradients that have been accumulated, then drops them."""
        self._adamw.step()
        if self._cycle.last_epoch < self._cycle.total_steps - 1:
            self._cycle.step()
        self._adamw.zero_grad()

    def state(self):
        """Of the network it trains too, for `restore`."""
        parts = self._network, self._adamw, self._cycle
        return [part.state_dict() for part in parts]

    def restore(self, state):
        """Goes on from the state of another."""
        parts = self._network, self._adamw, self._cycle
        for part, saved in zip(parts, state, strict=True):
            part.load_state_dict(saved)


def split(tensor, blocks):
    """tensor [R, ...] in the parts [B, ...] that belong to each of the Rows."""
    return tensor.split([len(rows.x) for rows in blocks])


# Copied from synchronous_single/trainer.py
def check_finite(loss, name):
    """Raises FloatingPointError, with its name, for a loss that is none."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f'the {name} is {loss.item()}')
