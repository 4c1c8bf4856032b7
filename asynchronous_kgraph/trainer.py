"""The delayed-gradient trainer of one MACH: every method runs on its thread.

A step trains the MACH on a batch of its own and, in the same forward, answers
the Spikes and applies the Grads that have come in the meantime. Nobody waits for
a Grad: it is sent and forgotten, and applied by the child with the parameters it
has when it comes. How late that is, is counted (staleness), never assumed.
"""
# Copied from asynchronous_sequence/trainer.py

import collections
import copy
import dataclasses
import itertools
import math
import random
import statistics
import time

import link as links
import student as students
import torch
from torch.nn import functional


@dataclasses.dataclass
class Inquiry:
    """A question to children about one x, and what has come back of it.

    Attributes:
        key: that of its Spikes.
        x: [B, 784].
        chosen: positions of the n children that were asked.
        asked: when, in seconds of the clock.
        expires: when no answer is waited for any longer.
        spike: the Spike that it is relayed for; None for own rows.
        y: [B], labels to train on once it is answered; None if it is not to.
        answers: child's index -> its Answer, of those that came in time.
        missing: indices of the children that have not answered.
        used: nobody waits any longer; an Answer is still a lesson.
    """
    key: tuple
    x: torch.Tensor
    chosen: tuple
    asked: float
    expires: float
    spike: links.Spike | None = None
    y: torch.Tensor | None = None
    answers: dict = dataclasses.field(default_factory=dict)
    missing: set = dataclasses.field(default_factory=set)
    used: bool = False

    def is_complete(self):
        """Whether all that were asked have answered."""
        return len(self.answers) == len(self.chosen)


@dataclasses.dataclass
class Block:
    """Rows of one forward that belong together: one x and what is due on it.

    Attributes:
        x: [B, 784].
        chosen: positions of the n children whose inputs join.
        y: [B], for own rows.
        inquiry: whose answers are the real inputs; None for synthetic ones.
        spike: the Spike to answer, if any.
        grad: the Grad to apply, if any.
        leaf: inputs [R, n, E] of this Block and of others; `rows` are its own.
    """
    x: torch.Tensor
    chosen: tuple
    y: torch.Tensor | None = None
    inquiry: Inquiry | None = None
    spike: links.Spike | None = None
    grad: links.Grad | None = None
    leaf: torch.Tensor | None = None
    rows: slice | None = None

    def gradient(self):
        """What has been backpropagated to its inputs, [B, n, E]."""
        return self.leaf.grad[self.rows]


class Trainer:
    """One MACH with its mailbox, its links, its optimisers and its own data.

    Args:
        index: of this MACH.
        mach: the network, on its device.
        student: the synthetic inputs; None for a MACH without children.
        children: indices of the MACHs that feed this one, in the order of the
            joiner's inputs.
        batches: has `next() -> (x [B, 784], y [B])`, the local dataset.
        settings: the hyperparameters of main.py.
        clock: seconds, for the deadlines.
    """

    def __init__(self,
                 index,
                 mach,
                 student,
                 children,
                 batches,
                 settings,
                 clock=time.monotonic):
        self.index, self.mach, self.student = index, mach, student
        self.children, self.batches, self.settings = children, batches, settings
        self.mailbox = links.Mailbox(settings.mailbox, clock)
        self.links = {}  # neighbour's index -> Link, filled by `connect`
        self.steps_taken = 0
        self.seen = {}  # child -> its step count in its last answer
        self._clock = clock
        self._keys = 0
        # All bounded by the mailbox's limit; what does not fit is dropped.
        self._inquiries = collections.OrderedDict()  # key -> Inquiry, open
        self._relayed = collections.OrderedDict()  # key of a Spike -> Inquiry
        self._spikes = collections.deque(
        )  # (Spike, Inquiry or None), to answer
        self._grads = collections.deque()  # to apply
        self._lessons = collections.deque()  # Inquiries, for the student
        self._answered = collections.deque()  # Inquiries, to train on
        self._dropped = 0
        self._trips = {}  # child -> mean and deviation of its round trip, s
        seed = settings.seed * 1009 + index
        self._generator = torch.Generator().manual_seed(seed)
        self._random = random.Random(seed)
        self._chosen = self._choose()
        self._own_optimiser = Optimiser(mach.parameters(),
                                        settings.learning_rate,
                                        settings.weight_decay, settings)
        if student is not None:
            self._student_optimiser = Optimiser(student.parameters(),
                                                settings.student_learning_rate,
                                                0.0, settings)
        self._staleness_max = 0
        self._staleness_total = self._grads_applied = 0
        self._window = collections.Counter()

    def connect(self, neighbour, link):
        """Names the link that carries messages to a neighbour."""
        self.links[neighbour] = link

    # ------------------------------------------------------------- the step

    def step(self, stopped=lambda: False):
        """One training step; waits for nothing unless `inputs` is `real`.

        Args:
            stopped: tells whether to give up waiting.
        """
        x, y, inquiry = self.open_step()
        while inquiry is not None and not inquiry.used and not stopped():
            # A k-graph is all cycles: who waits must go on answering others.
            self.serve(min(0.1, max(0.0, inquiry.expires - self._clock())))
        self.close_step(x, y, inquiry)

    def open_step(self):
        """Takes a batch; asks about it where `inputs` are `real` or `late`.

        Returns:
            x [B, 784], y [B] and the open Inquiry, None if nothing is awaited.
        """
        x, y = self.batches.next()
        self._chosen, settings = self._choose(), self.settings
        if self.children and settings.depth > 0:
            if settings.inputs == 'real':
                return x, y, self._ask(x, settings.depth - 1, self._chosen)
            if settings.inputs == 'late':
                self._ask(x, settings.depth - 1, self._chosen, y=y)
        return x, y, None

    def close_step(self, x, y, inquiry):
        """Trains on x [B, 784], y [B], and on all that has arrived by now.

        One forward, one backward and one optimiser step: own rows, Spikes and
        Grads are one batch; a Spike and a Grad about the same x share rows.

        Raises:
            FloatingPointError: a loss is not finite; where it is the target
                loss, no answer and no Grad was sent.
        """
        self._read_mail(0.0)
        own = self._take_own(x, y, inquiry)
        served = self._take_served()
        x = torch.cat([block.x for block in own + served])  # [R, 784]
        y = torch.cat([block.y for block in own])  # [O], O <= R own rows
        with self._autocast():
            joined = self._join(own + served, x)  # [R, E]
            local = self.mach.local_part(x)  # [R, E]
            # Own rows alone have dropout. Parents' students would chase its
            # noise (25% relative error instead of 2.6%).
            keep = self._dropout_mask(local, len(y))
            embedding = torch.relu(local * keep + joined)
            logits = self.mach.head(embedding[:len(y)]).to(x.dtype)
            # Each row weighs the same, however many have come late.
            loss = functional.cross_entropy(
                logits,
                y,
                reduction='sum',
                label_smoothing=self.settings.label_smoothing)
            loss = loss / self.settings.batch_size
            embedding = embedding[len(y):]  # [R - O, E]
        check_finite(loss, 'target loss', self.steps_taken + 1)
        self._answer(served, embedding.detach())
        self._apply(loss, served, embedding)
        if self.children:
            self._tell_children(own, served)
        self._teach()
        self.steps_taken += 1
        self._window.update(images=len(y),
                            batches=len(y) / self.settings.batch_size,
                            loss=loss.item(),
                            correct=(logits.argmax(1) == y).sum().item())

    def serve(self, timeout):
        """Answers Spikes without training; waits up to `timeout` s for mail.

        Grads are kept for the next step; after the last one they come too late.
        """
        self._read_mail(timeout)
        if self.steps_taken >= self.settings.steps:
            self._grads.clear()
            self._relayed.clear()
            self._answered.clear()
            self._lessons.clear()
        blocks = [self._served(s.x, inquiry, s) for s, inquiry in self._spikes]
        self._spikes.clear()
        if blocks:
            with torch.no_grad(), self._autocast():
                x = torch.cat([block.x for block in blocks])  # [R, 784]
                embedding = torch.relu(
                    self.mach.local_part(x) + self._join(blocks, x))
            self._answer(blocks, embedding)

    # ------------------------------------------------------------- incoming

    def _read_mail(self, timeout):
        """Sorts what has arrived; sends Spikes on that have depth left."""
        for message in self.mailbox.collect(timeout):
            if self.settings.device != 'cpu':  # used on this stream from now on
                links.hold(message)
            if not message.is_finite():
                self._dropped += 1  # a neighbour diverges: do not follow it
            elif isinstance(message, links.Answer):
                self._note_answer(message)
            elif isinstance(message, links.Grad):
                self._keep(self._grads, message)
            elif message.depth > 0 and self.children:
                self._ask(message.x, message.depth - 1, self._choose(), message)
            else:
                self._keep(self._spikes, (message, None))
        now, patience = self._clock(), self._patience()
        for inquiry in list(self._inquiries.values()):
            if not inquiry.used and now - inquiry.asked > patience:
                self._use(inquiry)
            if self._is_over(inquiry, now):
                self._close(inquiry)
        for key, inquiry in list(self._relayed.items()):
            if inquiry.expires <= now:  # its Grad was lost
                del self._relayed[key]

    def _note_answer(self, answer):
        child = answer.sender
        self.seen[child] = max(answer.version, self.seen.get(child, 0))
        # The mean and the deviation of a round trip as TCP keeps them (RFC
        # 6298), of late ones too: the answer brings back when it was asked for.
        trip = self._clock() - answer.asked
        mean, deviation = self._trips.get(child, (trip, trip / 2))
        deviation += (abs(trip - mean) - deviation) / 4
        self._trips[child] = mean + (trip - mean) / 8, deviation
        inquiry = self._inquiries.get(answer.key)
        if inquiry is None or child not in inquiry.missing:
            return  # too late: it has been given up
        inquiry.missing.remove(child)
        if inquiry.used:  # too late to be an input, not to be a lesson
            late = dataclasses.replace(inquiry, answers={child: answer})
            self._keep(self._lessons, late)
        else:
            inquiry.answers[child] = answer
        if not inquiry.missing:
            self._close(inquiry)

    def _patience(self):
        """After how many seconds the usual child has answered or never will.

        So that one lost answer does not hold up the lessons of all others to
        the deadline, and one slow child never does. Who is to have real inputs
        waits to the deadline.
        """
        if not self._trips or self.settings.inputs == 'real':
            return math.inf
        return statistics.median_low(
            [mean + 4 * deviation for mean, deviation in self._trips.values()])

    def _is_over(self, inquiry, now):
        """Whether no answer is expected any more, be it for a lesson."""
        if now < inquiry.expires:
            return False
        if inquiry.spike is not None or self.settings.inputs == 'real':
            return True
        trips = [self._trips.get(child, (0, 0)) for child in inquiry.missing]
        return now - inquiry.asked > max(
            mean + 4 * deviation for mean, deviation in trips)

    def _close(self, inquiry):
        """The end of an inquiry."""
        del self._inquiries[inquiry.key]
        if not inquiry.used:
            self._use(inquiry)

    def _use(self, inquiry):
        """What has come is put to use; nobody waits for more."""
        inquiry.used = True
        if inquiry.answers:
            self._keep(self._lessons, inquiry)
            if inquiry.y is not None:
                self._keep(self._answered, inquiry)
        if inquiry.spike is not None:
            self._keep(self._spikes, (inquiry.spike, inquiry))
            if self.settings.inputs != 'synthetic':
                # Its Grad is to find the inputs that the answer was made from.
                self._relayed[inquiry.spike.key] = dataclasses.replace(
                    inquiry, expires=self._deadline(inquiry.spike.depth))
                if len(self._relayed) > self.settings.mailbox:
                    self._relayed.popitem(last=False)

    def _keep(self, queue, item):
        if len(queue) >= self.settings.mailbox:
            queue.popleft()
            self._dropped += 1
        queue.append(item)

    def _deadline(self, depth):
        """When to give up on what Spikes of this depth bring about.

        Half-way down half of the deadline is left, so that an answer made up
        with synthetic inputs down there is still in time up here. What a late
        link takes comes on top.
        """
        settings, hops = self.settings, depth + 1
        share = min(1.0, hops / max(1, settings.depth))
        trip = 2 * (settings.latency + settings.jitter)
        return self._clock() + settings.deadline * share + trip * hops

    # ------------------------------------------------------------- outgoing

    def _choose(self):
        """Positions of the children that take part: `neighbours`, or all."""
        everyone = range(len(self.children))
        if not 0 < self.settings.neighbours < len(everyone):
            return tuple(everyone)
        return tuple(
            sorted(self._random.sample(everyone, self.settings.neighbours)))

    def _ask(self, x, depth, chosen, spike=None, y=None):
        """Spikes the chosen children; returns the open Inquiry.

        Args:
            x: [B, 784].
            depth: of the Spikes sent.
            chosen: positions of the children.
            spike: the Spike this is relayed for; None for own rows.
            y: [B], to train on x once it is answered; None not to.
        """
        self._keys += 1
        children = [self.children[position] for position in chosen]
        inquiry = Inquiry((self.index, self._keys),
                          x,
                          chosen,
                          self._clock(),
                          self._deadline(depth),
                          spike,
                          y,
                          missing=set(children))
        self._inquiries[inquiry.key] = inquiry
        if len(self._inquiries) > self.settings.mailbox:
            self._dropped += 1
            self._close(next(iter(self._inquiries.values())))
        for child in children:
            self.links[child].send(
                links.Spike(inquiry.key, self.index, x, depth, inquiry.asked))
        return inquiry

    def _answer(self, served, embedding):
        """Sends each Spike's rows of embedding [R, E] (detached) to its sender."""
        first = 0
        for block in served:
            last = first + len(block.x)
            if block.spike is not None:
                self.links[block.spike.sender].send(
                    links.Answer(block.spike.key, self.index,
                                 embedding[first:last], self.steps_taken,
                                 block.spike.asked))
            first = last

    def _tell_children(self, own, served):
        """Sends Spikes about new rows, and Grads as far as there is depth left.

        Those rows go whose gradients are the largest (`share`). The others would
        cost the children as much and teach them little. With `both`, children
        have had their Grads about rows that are trained on again with answers.
        """
        settings = self.settings
        for block in own:
            x, y, inquiry = block.x, block.y, block.inquiry
            if inquiry is None and settings.inputs == 'late' and settings.depth:
                continue  # has been asked about; its Grads are to be real ones
            if inquiry is not None and settings.inputs == 'both':
                continue
            grads = block.gradient() * settings.grad_weight  # [B, n, E]
            if settings.share < 1 and (inquiry is None or
                                       settings.inputs == 'late'):
                rows = math.ceil(settings.share * len(x))
                largest = grads.flatten(1).norm(dim=1).topk(rows).indices
                x, y, grads = x[largest], y[largest], grads[largest]
                if inquiry is not None:  # the Spikes were about more rows
                    inquiry = dataclasses.replace(inquiry, key=None)
            if inquiry is None:
                if settings.inputs != 'both' or settings.depth == 0:
                    y = None
                inquiry = self._ask(x,
                                    max(0, settings.depth - 1),
                                    block.chosen,
                                    y=y)
            if settings.depth > 0:
                self._send_grads(inquiry, x, grads, settings.depth - 1)
        for block in served:
            if block.grad is not None and block.grad.depth > 0:
                inquiry = block.inquiry
                if inquiry is None:  # the children were never asked about x
                    inquiry = Inquiry(None, block.x, block.chosen, 0.0, 0.0)
                self._send_grads(inquiry, block.x, block.gradient(),
                                 block.grad.depth - 1)

    def _send_grads(self, inquiry, x, gradient, depth):
        """Sends each child asked its Grad: x [B, 784], slice of [B, n, E]."""
        key = inquiry.key
        if key is None:  # no Spike was about these very rows
            self._keys += 1
            key = self.index, self._keys
        for i, position in enumerate(inquiry.chosen):
            child = self.children[position]
            version = self.seen.get(child, 0)
            if child in inquiry.answers:
                version = inquiry.answers[child].version
            self.links[child].send(
                links.Grad(key, self.index, x, gradient[:, i], version, depth))

    # ------------------------------------------------------------- learning

    def _take_own(self, x, y, inquiry):
        """Blocks of own rows: those answered by now, and the new batch.

        Args:
            x: [B, 784], y: [B], the new batch.
            inquiry: with the answers about it where they were waited for.
        """
        blocks = [Block(i.x, i.chosen, i.y, i) for i in self._answered]
        self._answered.clear()
        if self.settings.inputs != 'late' or not blocks:
            blocks.append(Block(x, self._chosen, y, inquiry))
        return blocks

    def _take_served(self):
        """What is to be done on others' rows: a list of Blocks, by key."""
        blocks = {
            spike.key: self._served(spike.x, inquiry, spike)
            for spike, inquiry in self._spikes
        }
        for grad in self._grads:
            inquiry = self._relayed.pop(grad.key, None)
            blocks.setdefault(grad.key, self._served(grad.x,
                                                     inquiry)).grad = grad
        self._spikes.clear()
        self._grads.clear()
        return list(blocks.values())

    def _served(self, x, inquiry, spike=None):
        chosen = self._chosen if inquiry is None else inquiry.chosen
        return Block(x, chosen, inquiry=inquiry, spike=spike)

    def _join(self, blocks, x):
        """What the children's inputs add to the rows of all blocks, [R, E].

        Synthetic ones, and real ones where answers have come. Inputs are leaves
        that require grad: the gradient ends there, and travels on as Grads. No
        graph leads into the student.

        Args:
            blocks: of which x [R, 784] has the rows.
        """
        if not self.children:
            return 0.0
        joined, start = [], 0
        for chosen, run in itertools.groupby(blocks, lambda b: b.chosen):
            run, first = list(run), 0
            for block in run:
                block.rows = slice(first, first + len(block.x))
                first += len(block.x)
            with torch.no_grad():
                leaf = self._make_inputs(run, x[start:start + first], chosen)
            start += first
            leaf.requires_grad_()  # [., n, E]
            for block in run:
                block.leaf = leaf
            joined.append(self.mach.joined_part(leaf, chosen))
        return joined[0] if len(joined) == 1 else torch.cat(joined)

    def _make_inputs(self, blocks, x, chosen):
        """Inputs [R, n, E] of the chosen children for the rows x [R, 784]."""
        real = [block for block in blocks if block.inquiry]
        if not real:
            return self.student(x, chosen)
        lacking = [
            block for block in blocks
            if not block.inquiry or not block.inquiry.is_complete()
        ]
        inputs = x.new_empty(len(x), len(chosen), self.settings.embedding)
        if lacking:
            synthetic = self.student(torch.cat([block.x for block in lacking]),
                                     chosen)
            parts = synthetic.split([len(block.x) for block in lacking])
            for block, part in zip(lacking, parts):
                inputs[block.rows] = part
        for block in real:
            for i, position in enumerate(chosen):
                answer = block.inquiry.answers.get(self.children[position])
                if answer is not None:
                    inputs[block.rows, i] = answer.embedding
        return inputs

    def _apply(self, loss, served, embedding):
        """Backpropagates the loss and all Grads at once; takes one step."""
        roots, gradients = [loss], [None]
        if any(block.grad is not None for block in served):
            gradients.append(
                torch.cat([
                    torch.zeros_like(embedding[:len(block.x)])
                    if block.grad is None else self._weigh(block.grad)
                    for block in served
                ]))  # [R - O, E]
            roots.append(embedding)
        torch.autograd.backward(roots, gradients)
        self._own_optimiser.step()

    def _weigh(self, grad):
        """A Grad's gradient [B, E]; the staler it is, the less it weighs.

        In inverse proportion, from `stale_after` steps on (Zhang et al. 2016,
        arXiv 1511.05950): fresh ones weigh much, and would make the
        loop of MACHs unstable if they came late.
        """
        staleness = self.steps_taken - grad.version
        self._staleness_total += staleness
        self._staleness_max = max(self._staleness_max, staleness)
        self._grads_applied += 1
        if staleness <= self.settings.stale_after:
            return grad.gradient
        return grad.gradient * (self.settings.stale_after / staleness)

    def _teach(self):
        """Trains the student on the answers that have come."""
        if not self._lessons:
            return
        total = sum(len(lesson.x) for lesson in self._lessons)
        groups = {}
        for lesson in self._lessons:
            groups.setdefault(lesson.chosen, []).append(lesson)
        self._lessons.clear()
        loss = 0.0
        for chosen, lessons in groups.items():
            x = torch.cat([lesson.x for lesson in lessons])  # [B, 784]
            real, answered = self._lesson(lessons, x, chosen)
            with self._autocast():
                loss = loss + students.synthetic_loss(self.student(
                    x, chosen), real, answered) * (len(x) / total)
        check_finite(loss, 'synthetic loss', self.steps_taken + 1)
        loss.backward()
        self._student_optimiser.step()
        self._window.update(lessons=1, synthetic_loss=loss.item())

    def _lesson(self, lessons, x, chosen):
        """What the chosen children said of x [B, 784].

        Returns:
            Embeddings [B, n, E]; 1 where there are any and 0 elsewhere [B, n],
            None where there are all.
        """
        children = [self.children[position] for position in chosen]
        if all(lesson.is_complete() for lesson in lessons):
            return torch.stack([
                torch.cat([lesson.answers[c].embedding
                           for lesson in lessons])
                for c in children
            ], 1), None
        real = x.new_zeros(len(x), len(chosen), self.settings.embedding)
        answered = x.new_zeros(len(x), len(chosen))
        first = 0
        for lesson in lessons:
            last = first + len(lesson.x)
            for i, child in enumerate(children):
                if child in lesson.answers:
                    real[first:last, i] = lesson.answers[child].embedding
                    answered[first:last, i] = 1
            first = last
        return real, answered

    def _dropout_mask(self, local, rows):
        """A factor for local [R, E]: 0 or 1 / (1 - p) in own rows, 1 below."""
        mask = torch.ones(local.shape)
        if self.student is not None:  # else there is nothing to lean on
            keep = 1 - self.settings.dropout
            mask[:rows].bernoulli_(keep, generator=self._generator).div_(keep)
        return mask.to(local)

    def _autocast(self):
        """bfloat16 products where `precision` says so."""
        return torch.autocast(self.settings.device.split(':')[0],
                              torch.bfloat16,
                              enabled=self.settings.precision == 'bf16')

    # -------------------------------------------------------------- results

    def report(self):
        """The log's `step` fields of this MACH since the last report."""
        window, self._window = self._window, collections.Counter()
        batches, lessons = max(1, window['batches']), max(1, window['lessons'])
        return {
            self.index: {
                'loss': window['loss'] / batches,
                'train': 100.0 * window['correct'] / max(1, window['images']),
                'synthetic_loss': window['synthetic_loss'] / lessons,
                'staleness': self.staleness()[self.index]['staleness'],
            }
        }

    def staleness(self):
        """How late this MACH's Grads were over the whole run, in its steps."""
        return {
            self.index: {
                'staleness':
                    self._staleness_total /
                    self._grads_applied if self._grads_applied else math.nan,
                'staleness_max':
                    self._staleness_max,
                'dropped':
                    self.mailbox.dropped + self._dropped,
                'lost':
                    self.mailbox.lost,
            }
        }

    def copies(self):
        """This MACH's index -> a copy of (MACH, student), the reader's to keep."""
        return {
            self.index: (copy.deepcopy(self.mach), copy.deepcopy(self.student))
        }


# Copied from synchronous_single/trainer.py
class Optimiser:
    """AdamW with one learning-rate cycle over the run; a step clears the grads.

    Args:
        parameters: those it owns.
        learning_rate: at the peak of the cycle.
        weight_decay: decoupled (Loshchilov & Hutter 2019, arXiv 1711.05101).
        settings: has `steps`, the length of the cycle, and `warmup`, the share
            of it before the peak.
    """

    def __init__(self, parameters, learning_rate, weight_decay, settings):
        self._adamw = torch.optim.AdamW(parameters,
                                        lr=learning_rate,
                                        weight_decay=weight_decay,
                                        fused=True)
        self._cycle = torch.optim.lr_scheduler.OneCycleLR(
            self._adamw,
            max_lr=learning_rate,
            total_steps=settings.steps + 1,
            pct_start=settings.warmup,
            cycle_momentum=False)

    def step(self):
        """Applies the gradients that have been accumulated, then drops them."""
        self._adamw.step()
        self._cycle.step()
        self._adamw.zero_grad(set_to_none=True)


# Copied from synchronous_single/trainer.py
def check_finite(loss, name, step):
    """Raises FloatingPointError, with its name and step, for a loss gone NaN."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f'the {name} is {loss.item()} in step {step}')
