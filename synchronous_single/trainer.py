"""The delayed-gradient trainer of a single MACH and of its student.

The one edge here is inside the MACH: the gradient that its target head sends
back into the network below it, which is the teacher. That Grad is applied
`delay` steps after it was computed, with the parameters of that later step.
"""

import collections
import copy
import math

import student as students
import torch
from torch.nn import functional


class Trainer:
    """Trains one MACH by its target loss and one student by the synthetic loss.

    Args:
        mach: the teacher, a MACH without children.
        student: mimics the teacher: x [B, 784] -> [B, 1, E].
        batches: has `next() -> (x [B, 784], y [B])`.
        settings: the hyperparameters of main.py.
    """

    def __init__(self, mach, student, batches, settings):
        self.mach, self.student = mach, student
        self.batches, self.settings = batches, settings
        self.steps_taken = 0
        self._grads = collections.deque()  # (step, x, gradient), oldest first
        self._mach_optimiser = Optimiser(mach.parameters(),
                                         settings.learning_rate,
                                         settings.weight_decay, settings)
        self._student_optimiser = Optimiser(student.parameters(),
                                            settings.student_learning_rate, 0.0,
                                            settings)
        self._staleness_total = self._grads_applied = self._staleness_max = 0
        self._window = collections.Counter()

    def step(self):
        """One training step of the teacher and of the student.

        Raises:
            FloatingPointError: the loss is not finite; nothing was applied.
        """
        x, y = self.batches.next()
        with self._autocast():
            with torch.no_grad():
                embedding = self.mach(x)  # [B, E]
            embedding.requires_grad_()  # a leaf: the edge is cut here
            logits = self.mach.head(embedding).to(embedding.dtype)  # [B, 10]
            loss = functional.cross_entropy(
                logits, y, label_smoothing=self.settings.label_smoothing)
        check_finite(loss, 'target loss', self.steps_taken + 1)
        loss.backward()  # the head's own gradients, and the Grad [B, E]
        self._grads.append((self.steps_taken, x, embedding.grad))
        if len(self._grads) > self.settings.delay:
            self._apply_grad(*self._grads.popleft())
        with self._autocast():
            synthetic_loss = students.synthetic_loss(self.student(x),
                                                     embedding.unsqueeze(1))
        check_finite(synthetic_loss, 'synthetic loss', self.steps_taken + 1)
        synthetic_loss.backward()
        self._mach_optimiser.step()
        self._student_optimiser.step()
        self.steps_taken += 1
        self._window.update(steps=1,
                            images=len(x),
                            loss=loss.item(),
                            synthetic_loss=synthetic_loss.item(),
                            correct=(logits.argmax(1) == y).sum().item())

    def _apply_grad(self, computed, x, gradient):
        """Backpropagates gradient [B, E] into d(x) as it is computed now."""
        with self._autocast():
            embedding = self.mach(x)
        embedding.backward(gradient)
        staleness = self.steps_taken - computed
        self._staleness_total += staleness
        self._staleness_max = max(self._staleness_max, staleness)
        self._grads_applied += 1

    def _autocast(self):
        """bfloat16 products where `precision` says so."""
        return torch.autocast(self.settings.device.split(':')[0],
                              torch.bfloat16,
                              enabled=self.settings.precision == 'bf16')

    def report(self):
        """The log's `step` fields of each MACH since the last report."""
        window, self._window = self._window, collections.Counter()
        steps = max(1, window['steps'])
        return {
            0: {
                'loss': window['loss'] / steps,
                'train': 100.0 * window['correct'] / max(1, window['images']),
                'synthetic_loss': window['synthetic_loss'] / steps,
                'staleness': self.staleness()[0]['staleness'],
            }
        }

    def staleness(self):
        """How late each MACH's Grads were over the whole run, in steps."""
        return {
            0: {
                'staleness':
                    self._staleness_total /
                    self._grads_applied if self._grads_applied else math.nan,
                'staleness_max':
                    self._staleness_max,
                'dropped':
                    0,
            }
        }

    def copies(self):
        """MACH's index -> a copy of (MACH, student), the reader's to keep."""
        return {0: (copy.deepcopy(self.mach), copy.deepcopy(self.student))}


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


def check_finite(loss, name, step):
    """Raises FloatingPointError, with its name and step, for a loss gone NaN."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f'the {name} is {loss.item()} in step {step}')
