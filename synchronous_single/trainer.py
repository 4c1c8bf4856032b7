"""The delayed-gradient trainer of a single MACH and of its student.

The one edge here is inside the MACH: the gradient that its target head sends
back into the network below it, which is the teacher. That Grad is applied
`delay` steps after it was computed, with the parameters of that later step.
"""

import collections
import copy
import math
import typing

import student as students
import torch
from torch.nn import functional

from mach import metrics


class Copy(typing.NamedTuple):
    """What a MACH hands over of itself, the reader's to keep."""
    tally: metrics.Tally
    mach: torch.nn.Module | None = None  # None: it failed, or has not begun
    student: torch.nn.Module | None = None  # None: it has no children


class Trainer:
    """Trains one MACH by its target loss and one student by the synthetic loss.

    Args:
        mach: the teacher, a MACH without children.
        student: mimics the teacher: x [B, 784] -> [B, 1, E].
        batches: has `next() -> (x [B, 784], y [B])`.
        settings: the hyperparameters of main.py.
    """
    file = 'machs.pt'  # of its checkpoint

    def __init__(self, mach, student, batches, settings):
        self.mach, self.student = mach, student
        self.batches, self.settings = batches, settings
        self.steps_taken = 0
        self.tallies = [metrics.Tally(0)]
        self._grads = collections.deque()  # (step, x, gradient), oldest first
        self._optimisers = [
            Optimiser(mach, settings.learning_rate, settings.weight_decay,
                      settings),
            Optimiser(student, settings.student_learning_rate, 0.0, settings)
        ]

    def step(self):
        """One training step of the teacher and of the student.

        Raises:
            FloatingPointError: a loss is not finite; nothing was applied.
        """
        tally, = self.tallies
        x, y = self.batches.next()
        with torch.no_grad():
            embedding = self.mach(x)  # [B, E]
        embedding.requires_grad_()  # a leaf: the edge is cut here
        logits = self.mach.head(embedding).to(x.dtype)  # [B, 10]
        loss = functional.cross_entropy(
            logits, y, label_smoothing=self.settings.label_smoothing)
        check_finite(loss, 'target loss')
        loss.backward()  # the head's own gradients, and the Grad [B, E]
        self._grads.append((self.steps_taken, x, embedding.grad))
        if len(self._grads) > self.settings.delay:
            computed, late, gradient = self._grads.popleft()
            self.mach(late).backward(gradient)  # d(x) as it is computed now
            tally.grad(self.steps_taken - computed)
        synthetic_loss = students.synthetic_loss(self.student(x),
                                                 embedding.unsqueeze(1))
        check_finite(synthetic_loss, 'synthetic loss')
        synthetic_loss.backward()
        for optimiser in self._optimisers:
            optimiser.step()
        self.steps_taken += 1
        tally.lesson(synthetic_loss)
        tally.step(loss, logits, y)

    def copy(self, networks=True):
        """MACH -> Copy of it as it is now; of its counts alone if asked to."""
        of = (self.mach, self.student) if networks else ()
        return {0: Copy(copy.copy(self.tallies[0]), *copy.deepcopy(of))}

    def state(self):
        """All that its next steps depend on; the tensors are its own."""
        return dict(steps_taken=self.steps_taken,
                    optimisers=[one.state() for one in self._optimisers],
                    batches=self.batches.state(),
                    tallies=[dict(vars(one)) for one in self.tallies],
                    grads=list(self._grads))

    def restore(self, state):
        """Goes on from the state of another, of the same hyperparameters."""
        self.steps_taken = state['steps_taken']
        for one, saved in zip(self._optimisers,
                              state['optimisers'],
                              strict=True):
            one.restore(saved)
        for tally, saved in zip(self.tallies, state['tallies'], strict=True):
            vars(tally).update(saved)
        self.batches.restore(state['batches'])
        self._grads.extend(state['grads'])


class Optimiser:
    """AdamW with one learning-rate cycle over the run; a step clears the grads.

    Weight decay is decoupled (Loshchilov & Hutter 2019, arXiv 1711.05101).
    """

    def __init__(self, network, peak, weight_decay, settings):
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
            cycle_momentum=False)

    def step(self):
        """Applies the gradients that have been accumulated, then drops them."""
        self._adamw.step()
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


def check_finite(loss, name):
    """Raises FloatingPointError, with its name, for a loss that is none."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f'the {name} is {loss.item()}')
