"""The delayed-gradient trainer of a single MACH and of its student.

The MACH is the teacher. The one edge here is inside it, between its target head
and the network below. The gradient that the head sends down is the Grad. It is
applied `delay` steps after it was computed, with the parameters of that later
step.

The student learns on a thread of its own, beside the teacher. They share no
parameters, so the result is the same as one after the other.
"""

import collections
import concurrent.futures
import copy
import math
import typing

import student as students
import torch
from torch import nn
from torch.nn import functional

from mach import metrics


class Snapshot(typing.NamedTuple):
    """Copies of a MACH's counts and networks; they never change afterwards."""
    tally: metrics.Tally
    network: torch.nn.Module | None = None  # None: failed, gone or not begun
    student: torch.nn.Module | None = None  # None: it has no children
    ended: bool = False  # its thread has ended
    failed: bool = False  # with an error


class Trainer:
    """Trains one MACH by its target loss and one student by the synthetic loss.

    Args:
        network: the teacher, a Mach without children.
        student: mimics the teacher: x [B, 784] -> [B, 1, E].
        batches: iterator of (x [B, 784], y [B]).
        settings: the hyperparameters of main.py.
    """
    file = 'machs.pt'  # of its checkpoint

    def __init__(self, network, student, batches, settings):
        self.network, self.student = network, student
        self.batches, self.settings = batches, settings
        self.tallies, self.shards = [metrics.Tally(0)], [batches.classes]
        self._grads = collections.deque()  # (step, x, gradient), oldest first
        self._optimiser, self._schedule = make_optimiser([network], [],
                                                         settings)
        # The student's, for its thread.
        self._student_optimiser, self._student_schedule = make_optimiser(
            [], [student], settings)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    @property
    def steps_taken(self):
        """Training steps so far."""
        return self.tallies[0].steps

    def step(self):
        """One training step of the teacher and of the student.

        Raises:
            FloatingPointError: a loss is not finite; nothing was applied.
        """
        tally, = self.tallies
        x, y = next(self.batches)
        synthetic = self._thread.submit(self._mimic, x)
        with make_autocast(self.settings):
            with torch.no_grad():
                d = self.network(x)  # [B, E]
            d.requires_grad_()  # a leaf: the edge is cut here
            logits = self.network.head(d).to(x.dtype)  # [B, 10]
            loss = functional.cross_entropy(
                logits, y, label_smoothing=self.settings.label_smoothing)
        check_finite(loss, 'target loss')
        lesson = self._thread.submit(self._teach_student, synthetic, d.detach())
        loss.backward()  # the head's own gradients, and the Grad [B, E]
        self._grads.append((self.steps_taken, x, d.grad))
        if len(self._grads) > self.settings.delay:
            computed, late, gradient = self._grads.popleft()
            with make_autocast(self.settings):
                d = self.network(late)  # with the parameters of now
            d.backward(gradient)
            tally.grad(self.steps_taken - computed, 0)
        tally.lesson(lesson.result())
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._schedule.step()
        tally.step(loss, logits, y)

    # These two run on the student's thread, one after the other.
    def _mimic(self, x):
        """x [B, 784] -> the student's output [B, 1, E]."""
        with make_autocast(self.settings):
            return self.student(x)

    def _teach_student(self, synthetic, d):
        """Trains the student to mimic d [B, E]; returns the synthetic loss.

        Args:
            synthetic: Future of the student's output.
        """
        loss = students.synthetic_loss(synthetic.result(), d.unsqueeze(1))
        check_finite(loss, 'synthetic loss')
        loss.backward()
        self._student_optimiser.step()
        self._student_optimiser.zero_grad()
        self._student_schedule.step()
        return loss

    def snapshot(self, networks=True, **ends):
        """0 -> Snapshot of now; with counts alone unless `networks`."""
        of = (self.network, self.student) if networks else ()
        tally = copy.deepcopy(self.tallies[0])
        return {0: Snapshot(tally, *copy.deepcopy(of), **ends)}

    def _parts(self):
        return dict(network=self.network,
                    student=self.student,
                    optimiser=self._optimiser,
                    schedule=self._schedule,
                    student_optimiser=self._student_optimiser,
                    student_schedule=self._student_schedule,
                    batches=self.batches,
                    tally=self.tallies[0])

    def state_dict(self):
        """All that the next steps depend on; not a copy."""
        named = {n: part.state_dict() for n, part in self._parts().items()}
        return named | dict(grads=list(self._grads))

    def load_state_dict(self, state):
        """Continues from the state_dict of a Trainer with the same settings."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self._grads = collections.deque(state['grads'])


def make_optimiser(networks, students_of, settings):
    """AdamW for networks and students, and its learning-rate schedule.

    Weight decay is decoupled (Loshchilov & Hutter 2019, arXiv 1711.05101). The
    learning rate ends at exactly 0; a step with rate 0 changes no parameter.
    AdamW skips a network without gradients.
    """
    rates = [settings.learning_rate, settings.student_learning_rate]
    undecayed = dict(params=nn.ModuleList(students_of).parameters(),
                     weight_decay=0.0)
    optimiser = torch.optim.AdamW(
        [dict(params=nn.ModuleList(networks).parameters()), undecayed],
        weight_decay=settings.weight_decay,
        fused=True)
    steps = settings.steps + 1
    warmup = max(settings.warmup, min(2 / steps, 0.75))  # a step at least
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        rates,
        steps,
        pct_start=warmup,
        cycle_momentum=False,
        final_div_factor=math.inf)


def make_autocast(settings):
    """The context of a forward: bfloat16 products if `precision` is bf16."""
    return torch.autocast(
        settings.device.split(':')[0],
        torch.bfloat16,
        settings.precision == 'bf16',
        cache_enabled=False)  # a cache would keep outdated parameters


def check_finite(loss, name):
    """Raises FloatingPointError, with `name`, if the loss is not finite."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f'the {name} is {loss.item()}')
