"""The delayed-gradient trainer of one MACH: every method runs on its thread.

A step trains the MACH on a batch of its own and, in the same forward, answers
the Spikes and applies the Grads that have come in the meantime. Nobody waits for
a Grad: it is sent and forgotten, and applied by the child with the parameters it
has when it comes. How late that is, is counted (staleness), never assumed.
"""

import collections
import copy
import dataclasses
import math
import time

import link as links
import student as students
import torch
from torch.nn import functional


@dataclasses.dataclass
class Inquiry:
    """A question to the children about one x, and what has come back of it.

    Attributes:
        key: that of its Spikes.
        x: [B, 784].
        expires: when those who wait for it give up, in seconds of the clock.
        spike: the Spike that it is relayed for; None for an own batch.
        answers: child's index -> its Answer.
    """
    key: tuple
    x: torch.Tensor
    expires: float
    spike: links.Spike | None = None
    answers: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Block:
    """Rows of one forward that belong together: one x and what is due on it.

    Attributes:
        x: [B, 784].
        inquiry: whose answers are the real inputs; None for synthetic ones.
        spike: the Spike to answer, if any.
        grad: the Grad to apply, if any.
    """
    x: torch.Tensor
    inquiry: Inquiry | None = None
    spike: links.Spike | None = None
    grad: links.Grad | None = None


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
        self.mailbox = links.Mailbox(settings.mailbox)
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
        self._dropped = 0
        self._generator = torch.Generator().manual_seed(settings.seed * 1009 +
                                                        index)
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
        while (inquiry is not None and inquiry.key in self._inquiries and
               not stopped()):
            # A k-graph is all cycles: who waits must go on answering others.
            self.serve(min(0.1, max(0.0, inquiry.expires - self._clock())))
        self.close_step(x, y, inquiry)

    def open_step(self):
        """Takes a batch; asks the children about it if their inputs are real.

        Returns:
            x [B, 784], y [B] and the open Inquiry, None if nothing is awaited.
        """
        x, y = self.batches.next()
        inquiry, settings = None, self.settings
        if settings.inputs == 'real' and settings.depth > 0 and self.children:
            inquiry = self._ask(x, settings.depth - 1)
        return x, y, inquiry

    def close_step(self, x, y, inquiry):
        """Trains on x [B, 784], y [B], and on all that has arrived by now.

        One forward, one backward and one optimiser step: own rows, Spikes and
        Grads are one batch; a Spike and a Grad about the same x share rows.

        Raises:
            FloatingPointError: a loss is not finite; where it is the target
                loss, no answer and no Grad was sent.
        """
        self._read_mail(0.0)
        own = Block(x, inquiry)
        served = self._take_served()
        rows = len(x)
        with self._autocast():
            inputs = self._inputs([own] + served)  # [R, C, E]
            local = self.mach.local_part(
                torch.cat([x] + [block.x for block in served]))  # [R, E]
            # Own rows alone have dropout. Parents' students would chase its
            # noise (25% relative error instead of 2.6%).
            keep = self._dropout_mask(local, rows)
            embedding = torch.relu(local * keep + self.mach.joined_part(inputs))
            logits = self.mach.head(embedding[:rows]).to(x.dtype)
            loss = functional.cross_entropy(
                logits, y, label_smoothing=self.settings.label_smoothing)
            embedding = embedding[rows:]  # [R - B, E]
        check_finite(loss, 'target loss', self.steps_taken + 1)
        self._answer(served, embedding.detach())
        self._apply(loss, served, embedding)
        if self.children:
            self._tell_children(own, served, inputs.grad)
        self._teach()
        self.steps_taken += 1
        self._window.update(steps=1,
                            images=rows,
                            loss=loss.item(),
                            correct=(logits.argmax(1) == y).sum().item())

    def serve(self, timeout):
        """Answers Spikes without training; waits up to `timeout` s for mail.

        Grads are kept for the next step; after the last one they come too late.
        """
        self._read_mail(timeout)
        if self.steps_taken >= self.settings.steps:
            self._grads.clear()
        blocks = [Block(s.x, inquiry, spike=s) for s, inquiry in self._spikes]
        self._spikes.clear()
        if blocks:
            with torch.no_grad(), self._autocast():
                inputs = self._inputs(blocks)
                embedding = self.mach(torch.cat([block.x for block in blocks]),
                                      inputs)
            self._answer(blocks, embedding)

    # ------------------------------------------------------------- incoming

    def _read_mail(self, timeout):
        """Sorts what has arrived; sends Spikes on that have depth left."""
        for message in self.mailbox.collect(timeout):
            if not message.is_finite():
                self._dropped += 1  # a neighbour diverges: do not follow it
            elif isinstance(message, links.Answer):
                self._note_answer(message)
            elif isinstance(message, links.Grad):
                self._keep(self._grads, message)
            elif message.depth > 0 and self.children:
                self._ask(message.x, message.depth - 1, message)
            else:
                self._keep(self._spikes, (message, None))
        now = self._clock()
        for inquiry in list(self._inquiries.values()):
            # The student can wait for its lesson; whoever wants to go on cannot.
            if inquiry.expires <= now:
                self._settle(inquiry)

    def _note_answer(self, answer):
        self.seen[answer.sender] = max(answer.version,
                                       self.seen.get(answer.sender, 0))
        inquiry = self._inquiries.get(answer.key)
        if inquiry is None:
            return  # too late: the asker went on without it
        inquiry.answers[answer.sender] = answer
        if len(inquiry.answers) == len(self.children):
            self._settle(inquiry)

    def _settle(self, inquiry):
        """No more answers are waited for; what has come is put to use."""
        del self._inquiries[inquiry.key]
        if inquiry.answers:
            self._keep(self._lessons, inquiry)
        if inquiry.spike is not None:
            self._keep(self._spikes, (inquiry.spike, inquiry))
            if self.settings.inputs == 'real':
                # Its Grad is to find the inputs that the answer was made from.
                self._relayed[inquiry.spike.key] = inquiry
                if len(self._relayed) > self.settings.mailbox:
                    self._relayed.popitem(last=False)

    def _keep(self, queue, item):
        if len(queue) >= self.settings.mailbox:
            queue.popleft()
            self._dropped += 1
        queue.append(item)

    # ------------------------------------------------------------- outgoing

    def _ask(self, x, depth, spike=None):
        """Spikes all children about x [B, 784]; returns the open Inquiry.

        Args:
            x: [B, 784].
            depth: of the Spikes sent.
            spike: the Spike this is relayed for; None for an own batch.
        """
        self._keys += 1
        # An own batch that nobody waits for is a lesson, good however late. Who
        # waits does so a hop's share of the deadline, so that an answer made up
        # with synthetic inputs down there is still in time up here.
        expires = math.inf
        if spike is not None or self.settings.inputs == 'real':
            share = (depth + 1) / max(1, self.settings.depth)
            expires = self._clock() + self.settings.deadline * min(1.0, share)
        inquiry = Inquiry((self.index, self._keys), x, expires, spike)
        self._inquiries[inquiry.key] = inquiry
        if len(self._inquiries) > self.settings.mailbox:
            self._dropped += 1
            self._settle(next(iter(self._inquiries.values())))
        for child in self.children:
            self.links[child].send(
                links.Spike(inquiry.key, self.index, x, depth))
        return inquiry

    def _answer(self, served, embedding):
        """Sends each Spike's rows of embedding [R, E] (detached) to its sender."""
        first = 0
        for block in served:
            last = first + len(block.x)
            if block.spike is not None:
                self.links[block.spike.sender].send(
                    links.Answer(block.spike.key, self.index,
                                 embedding[first:last], self.steps_taken))
            first = last

    def _tell_children(self, own, served, gradient):
        """Sends gradient [R, C, E] on, of own rows and of Grads with depth left.

        Of own rows that have not been asked about, those go, as a Spike and a
        Grad, whose gradients are the largest. The others would cost the children
        as much and teach them little.
        """
        first, x, inquiry = len(own.x), own.x, own.inquiry
        grads = gradient[:first]
        if inquiry is None:
            if self.settings.share < 1:
                rows = math.ceil(self.settings.share * first)
                chosen = grads.flatten(1).norm(dim=1).topk(rows).indices
                x, grads = x[chosen], grads[chosen]
            inquiry = self._ask(x, max(0, self.settings.depth - 1))
        if self.settings.depth > 0:
            self._send_grads(inquiry, x, grads * self.settings.grad_weight,
                             self.settings.depth - 1)
        for block in served:
            last = first + len(block.x)
            if block.grad is not None and block.grad.depth > 0:
                self._send_grads(block.inquiry, block.x, gradient[first:last],
                                 block.grad.depth - 1)
            first = last

    def _send_grads(self, inquiry, x, gradient, depth):
        """Sends each child its Grad: x [B, 784] and a slice of [B, C, E]."""
        if inquiry is None:  # the children were never asked about this x
            self._keys += 1
            inquiry = Inquiry((self.index, self._keys), x, 0.0)
        for position, child in enumerate(self.children):
            version = self.seen.get(child, 0)
            if child in inquiry.answers:
                version = inquiry.answers[child].version
            self.links[child].send(
                links.Grad(inquiry.key, self.index, x, gradient[:, position],
                           version, depth))

    # ------------------------------------------------------------- learning

    def _take_served(self):
        """What is to be done on others' rows: a list of Blocks, by key."""
        blocks = {
            spike.key: Block(spike.x, inquiry, spike=spike)
            for spike, inquiry in self._spikes
        }
        for grad in self._grads:
            inquiry = self._relayed.pop(grad.key, None)
            blocks.setdefault(grad.key, Block(grad.x, inquiry)).grad = grad
        self._spikes.clear()
        self._grads.clear()
        return list(blocks.values())

    def _inputs(self, blocks):
        """The children's inputs [R, C, E] for the rows of all blocks.

        Synthetic ones, and the real ones where answers have come. A leaf that
        requires grad: the gradient ends here, and travels on as Grads. No graph
        leads into the student.
        """
        if not self.children:
            return None
        with torch.no_grad():
            inputs = self.student(torch.cat([block.x for block in blocks]))
            first = 0
            for block in blocks:
                last = first + len(block.x)
                answers = block.inquiry.answers if block.inquiry else {}
                for position, child in enumerate(self.children):
                    if child in answers:
                        inputs[first:last, position] = answers[child].embedding
                first = last
        return inputs.requires_grad_()

    def _apply(self, loss, served, embedding):
        """Backpropagates the loss and all Grads at once; takes one step."""
        roots, gradients = [loss], [None]
        if any(block.grad is not None for block in served):
            gradients.append(
                torch.cat([
                    torch.zeros_like(embedding[:len(block.x)])
                    if block.grad is None else block.grad.gradient
                    for block in served
                ]))  # [R - B, E]
            roots.append(embedding)
        torch.autograd.backward(roots, gradients)
        self._own_optimiser.step()
        for block in served:
            if block.grad is not None:
                staleness = self.steps_taken - block.grad.version
                self._staleness_total += staleness
                self._staleness_max = max(self._staleness_max, staleness)
                self._grads_applied += 1

    def _teach(self):
        """Trains the student on the answers that have come."""
        if not self._lessons:
            return
        x = torch.cat([lesson.x for lesson in self._lessons])
        real = x.new_zeros(len(x), len(self.children),
                           self.settings.embedding)  # [B, C, E]
        answered = x.new_zeros(len(x), len(self.children))  # [B, C]
        first = 0
        for lesson in self._lessons:
            last = first + len(lesson.x)
            for position, child in enumerate(self.children):
                if child in lesson.answers:
                    real[first:last, position] = lesson.answers[child].embedding
                    answered[first:last, position] = 1
            first = last
        self._lessons.clear()
        with self._autocast():
            loss = students.synthetic_loss(self.student(x), real, answered)
        check_finite(loss, 'synthetic loss', self.steps_taken + 1)
        loss.backward()
        self._student_optimiser.step()
        self._window.update(lessons=1, synthetic_loss=loss.item())

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
        steps, lessons = max(1, window['steps']), max(1, window['lessons'])
        return {
            self.index: {
                'loss': window['loss'] / steps,
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
