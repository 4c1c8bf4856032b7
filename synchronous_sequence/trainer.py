"""The delayed-gradient trainer of a row of MACHs, stepped in lockstep.

Each MACH has its own optimiser and hears of the others by Grads alone. A Grad
that crosses an edge is applied `delay` steps after it was computed, with the
parameters of that later step; with `delay 0` this is plain backpropagation.
"""

import collections
import copy
import dataclasses
import math

import student as students
import torch
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Grad:
    """A backward message in flight.

    Attributes:
        x: [B, 784], normalised images.
        gradient: [B, E], dL/dd(x) with L the loss of a MACH further up.
        depth: how many edges further the gradient may travel.
        computed: the step it was computed in.
    """
    x: torch.Tensor
    gradient: torch.Tensor
    depth: int
    computed: int


class Component:
    """One MACH of the row.

    Args:
        index: of this MACH, for messages.
        mach: the network, on its device.
        student: the synthetic inputs; None for the first in the row.
        child: the Component before it; None for the first in the row.
        settings: the hyperparameters of main.py.
    """

    def __init__(self, index, mach, student, child, settings):
        self.index, self.mach, self.student = index, mach, student
        self.child, self.settings = child, settings
        self.grads = collections.deque()  # those in flight to it, oldest first
        self.steps_taken = 0
        self.staleness_total = self.staleness_max = self.grads_applied = 0
        self.window = collections.Counter()
        self._answers = {}  # (which x, depth) -> d(x), of this step
        self._generator = torch.Generator().manual_seed(settings.seed * 1009 +
                                                        index)
        self._own_optimiser = Optimiser(mach.parameters(),
                                        settings.learning_rate,
                                        settings.weight_decay, settings)
        if student is not None:
            self._student_optimiser = Optimiser(student.parameters(),
                                                settings.student_learning_rate,
                                                0.0, settings)

    @torch.no_grad()
    def answer(self, x, depth):
        """Answers a Spike: x [B, 784] -> d(x) [B, E], without graph or dropout.

        At depth 0 on synthetic inputs; else its child is asked first.
        """
        key = (id(x), depth)  # in lockstep several parents may share an x
        if key not in self._answers:
            self._answers[key] = self.mach(x, self._inputs(x, depth))
        return self._answers[key]

    def learn(self, x, y):
        """Backpropagates the losses on x [B, 784], y [B], and all Grads due.

        One forward and one backward: own rows and Grads are one batch. Applies
        nothing yet: with `delay 0` the child is still to learn from the Grads.

        Raises:
            FloatingPointError: a loss is not finite; no Grad was sent.
        """
        settings, rows = self.settings, len(x)
        due = []
        while (self.grads and
               self.grads[0].computed + settings.delay <= self.steps_taken):
            due.append(self.grads.popleft())
        with self._autocast():
            inputs = None
            if self.child is not None:
                depth = settings.depth if settings.inputs == 'real' else 0
                inputs = torch.cat([self._inputs(x, depth)] + [
                    self._inputs(grad.x, min(depth, grad.depth)) for grad in due
                ]).requires_grad_()  # [R, 1, E], a leaf: the edge is cut here
            local = self.mach.local_part(
                torch.cat([x] + [grad.x for grad in due]))  # [R, E]
            keep = self._dropout_mask(local, rows)
            embedding = torch.relu(local * keep + self.mach.joined_part(inputs))
            logits = self.mach.head(embedding[:rows]).to(embedding.dtype)
            loss = functional.cross_entropy(
                logits, y, label_smoothing=settings.label_smoothing)
        self._check(loss, 'target loss')
        torch.autograd.backward(
            [loss] + ([embedding[rows:]] if due else []), [None] +
            ([torch.cat([grad.gradient for grad in due])] if due else []))
        self.window.update(steps=1,
                           images=rows,
                           loss=loss.item(),
                           correct=(logits.argmax(1) == y).sum().item())
        for grad in due:
            self._note_staleness(grad)
        if self.child is not None:
            self._send_grads(x, due, inputs.grad.squeeze(1))
            self._teach(x)

    def update(self):
        """Applies what `learn` has accumulated."""
        self._own_optimiser.step()
        if self.student is not None:
            self._student_optimiser.step()
        self._answers.clear()  # they were made with the old parameters
        self.steps_taken += 1

    def _inputs(self, x, depth):
        """The inputs [B, 1, E] for x [B, 784], real if depth > 0; no graph."""
        if self.child is None:
            return None
        with torch.no_grad():
            if depth > 0:
                return self.child.answer(x, depth - 1).unsqueeze(1)
            return self.student(x)

    def _send_grads(self, x, due, gradient):
        """Sends gradient [R, E] to the child, in the pieces it belongs to."""
        rows = len(x)
        if self.settings.depth > 0:
            self.child.grads.append(
                Grad(x, gradient[:rows] * self.settings.grad_weight,
                     self.settings.depth - 1, self.steps_taken))
        for grad in due:
            if grad.depth > 0:
                self.child.grads.append(
                    Grad(grad.x, gradient[rows:rows + len(grad.x)],
                         grad.depth - 1, self.steps_taken))
            rows += len(grad.x)

    def _teach(self, x):
        """The student's lesson: what the child answers about x [B, 784]."""
        with self._autocast():
            real = self.child.answer(x, max(0, self.settings.depth - 1))
            loss = students.synthetic_loss(self.student(x), real.unsqueeze(1))
        self._check(loss, 'synthetic loss')
        loss.backward()
        self.window['synthetic_loss'] += loss.item()

    # Copied from asynchronous_sequence/trainer.py
    def _dropout_mask(self, local, rows):
        """A factor for local [R, E]: 0 or 1 / (1 - p) in own rows, 1 below."""
        mask = torch.ones(local.shape)
        if self.student is not None:  # else there is nothing to lean on
            keep = 1 - self.settings.dropout
            mask[:rows].bernoulli_(keep, generator=self._generator).div_(keep)
        return mask.to(local)

    def _note_staleness(self, grad):
        staleness = self.steps_taken - grad.computed
        self.staleness_total += staleness
        self.staleness_max = max(self.staleness_max, staleness)
        self.grads_applied += 1

    def _check(self, loss, name):
        check_finite(loss, f'{name} of mach {self.index}', self.steps_taken + 1)

    # Copied from synchronous_single/trainer.py
    def _autocast(self):
        """bfloat16 products where `precision` says so."""
        return torch.autocast(self.settings.device.split(':')[0],
                              torch.bfloat16,
                              enabled=self.settings.precision == 'bf16')


class Trainer:
    """Steps the MACHs of the row together.

    Args:
        components: list of k, the first in the row first.
        batches: list of those with `next() -> (x [B, 784], y [B])`: one that all
            MACHs share, or one for each MACH's own local dataset.
    """

    def __init__(self, components, batches):
        self.components, self.batches = components, batches
        self.steps_taken = 0

    def step(self):
        """One training step of every MACH.

        Parents go first, so that with `delay 0` their Grads are there when the
        child learns, and nobody's parameters change before all have learned.

        Raises:
            FloatingPointError: a loss is not finite; nothing was applied.
        """
        batches = [batches.next() for batches in self.batches]
        for component in reversed(self.components):
            x, y = batches[component.index % len(batches)]
            component.learn(x, y)
        for component in self.components:
            component.update()
        self.steps_taken += 1

    def report(self):
        """The log's `step` fields of each MACH since the last report."""
        fields = {}
        for component in self.components:
            window, component.window = component.window, collections.Counter()
            steps = max(1, window['steps'])
            fields[component.index] = {
                'loss': window['loss'] / steps,
                'train': 100.0 * window['correct'] / max(1, window['images']),
                'synthetic_loss': window['synthetic_loss'] / steps,
                'staleness': self.staleness()[component.index]['staleness'],
            }
        return fields

    def staleness(self):
        """How late each MACH's Grads were over the whole run, in steps."""
        return {
            component.index: {
                'staleness':
                    component.staleness_total / component.grads_applied
                    if component.grads_applied else math.nan,
                'staleness_max':
                    component.staleness_max,
                'dropped':
                    0,
            } for component in self.components
        }

    def copies(self):
        """MACH's index -> a copy of (MACH, student), the reader's to keep."""
        return {
            component.index: (copy.deepcopy(component.mach),
                              copy.deepcopy(component.student)
                             ) for component in self.components
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
