"""The delayed-gradient trainer of k MACHs in lockstep, whatever their graph.

All take each step together, on one thread, and ask each other by calls, so that
nothing is left to chance. A Grad is applied exactly `delay` steps after it was
computed, with the parameters of that later step. With `delay 0` that is before
anybody's parameters change: backpropagation, through the graph unrolled to
`depth`.
"""

import copy
import dataclasses
import math
import typing

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
    depth: int  # edges that the gradient of their inputs may travel
    grad: torch.Tensor | None = None  # [B, E], a Grad to apply; None: own rows
    computed: int = 0  # the step that the Grad was computed in


class Trainer:
    """Trains k MACHs together: one `step` is one step of each of them.

    Args:
        machs: list of k networks.
        student_of: list of k; None for a MACH without children.
        children: list of k lists: the MACHs that feed MACH i, in the order of
            its joiner's inputs.
        batches: list of those with `next() -> (x [B, 784], y [B])`: one that all
            MACHs share, or one for each MACH's own local dataset.
        settings: the hyperparameters of main.py.
    """
    file = 'machs.pt'  # of its checkpoint

    def __init__(self, machs, student_of, children, batches, settings):
        self.machs, self.student_of, self.children = machs, student_of, children
        self.batches, self.settings = batches, settings
        self.steps_taken = 0
        self.tallies = [metrics.Tally(i) for i in range(len(machs))]
        self._grads = [[] for _ in machs]  # Rows in flight to each MACH
        self._answers = {}  # (MACH, which x, depth) -> d(x), of this step
        self._optimisers = [
            Optimiser(mach, settings.learning_rate, settings.weight_decay,
                      settings) for mach in machs
        ] + [
            Optimiser(student, settings.student_learning_rate, 0.0, settings)
            for student in student_of
            if student
        ]

    def step(self):
        """One training step of every MACH.

        Raises:
            FloatingPointError: a loss is not finite; nothing was applied.
        """
        batches = [batches.next() for batches in self.batches]
        results = []
        for i in range(len(self.machs)):
            x, y = batches[i % len(batches)]
            results.append((*self._learn(i, x, y), y))
        while self.settings.delay == 0 and any(self._grads):
            for i in range(len(self.machs)):
                self._learn(i)
        for optimiser in self._optimisers:
            optimiser.step()
        self._answers.clear()  # they were made with the old parameters
        self.steps_taken += 1
        for tally, result in zip(self.tallies, results):
            tally.step(*result)

    def copy(self, networks=True):
        """MACH -> Copy of it as it is now; of its counts alone if asked to."""
        copies = {}
        for i, tally in enumerate(self.tallies):
            of = self.machs[i], self.student_of[i]
            copies[i] = Copy(copy.copy(tally),
                             *(copy.deepcopy(of) if networks else ()))
        return copies

    def state(self):
        """All that its next steps depend on; the tensors are its own."""
        return dict(
            steps_taken=self.steps_taken,
            optimisers=[one.state() for one in self._optimisers],
            batches=[one.state() for one in self.batches],
            tallies=[dict(vars(one)) for one in self.tallies],
            grads=[[vars(rows) for rows in flying] for flying in self._grads])

    def restore(self, state):
        """Goes on from the state of another, of the same hyperparameters."""
        self.steps_taken = state['steps_taken']
        for one, saved in zip(self._optimisers,
                              state['optimisers'],
                              strict=True):
            one.restore(saved)
        for tally, saved in zip(self.tallies, state['tallies'], strict=True):
            vars(tally).update(saved)
        for one, saved in zip(self.batches, state['batches'], strict=True):
            one.restore(saved)
        self._grads = [
            [Rows(**saved) for saved in flying] for flying in state['grads']
        ]

    def _learn(self, i, x=None, y=None):
        """Backpropagates the target loss of MACH i, if any, and all Grads due.

        One forward, one backward: own rows and Grads are one batch. Nothing is
        applied yet: others are still to answer, and to hear of it by Grads.

        Args:
            i: the MACH.
            x: [B, 784], own rows, with labels y [B]; None without.
        Returns:
            The target loss and the logits [B, 10] of own rows; None without.
        """
        settings, mach = self.settings, self.machs[i]
        own = 0 if x is None else len(x)
        blocks = [] if x is None else [Rows(x, settings.depth)]
        blocks += self._take_due(i)
        if not blocks:
            return None
        inputs = None
        if self.children[i]:  # a leaf: the edge is cut here
            inputs = torch.cat([
                self._inputs(i, rows.x,
                             rows.depth * (settings.inputs == 'real'))
                for rows in blocks
            ]).requires_grad_()  # [R, C, E]
        local = mach.local_part(torch.cat([rows.x for rows in blocks
                                          ]))  # [R, E]
        # Others' rows have no dropout: students would chase its noise.
        dropped = functional.dropout(local[:own], settings.dropout)
        local = torch.cat([dropped, local[own:]])
        embedding = torch.relu(local + mach.joined_part(inputs))
        roots, gradients, loss, logits = [], [], None, None
        if own:
            logits = mach.head(embedding[:own]).to(embedding.dtype)
            loss = functional.cross_entropy(
                logits, y, label_smoothing=settings.label_smoothing)
            check_finite(loss, f'target loss of mach {i}')
            roots, gradients = [loss], [None]
        grads = [rows.grad for rows in blocks if rows.grad is not None]
        if grads:
            roots.append(embedding[own:])
            gradients.append(torch.cat(grads))
        torch.autograd.backward(roots, gradients)
        if self.children[i]:
            self._send_grads(i, blocks, inputs.grad)
            if own:
                self._teach(i, x)
        return loss, logits

    def _take_due(self, i):
        """Takes the Grads that are to be applied by MACH i in this step."""
        last = self.steps_taken - self.settings.delay
        due = [rows for rows in self._grads[i] if rows.computed <= last]
        self._grads[i] = [r for r in self._grads[i] if r.computed > last]
        for rows in due:
            self.tallies[i].grad(self.steps_taken - rows.computed)
        return due

    @torch.no_grad()
    def _answer(self, i, x, depth):
        """Answers a Spike: x [B, 784] -> d_i(x) [B, E], free of dropout."""
        key = i, id(x), depth  # several parents may share an x
        if key not in self._answers:
            self._answers[key] = self.machs[i](x, self._inputs(i, x, depth))
        return self._answers[key]

    @torch.no_grad()
    def _inputs(self, i, x, depth):
        """Inputs of MACH i for x [B, 784]: real if depth > 0, else synthetic.

        Returns:
            [B, C, E], without a graph; None without children.
        """
        if not self.children[i]:
            return None
        if depth == 0:
            return self.student_of[i](x)
        return torch.stack(
            [self._answer(child, x, depth - 1) for child in self.children[i]],
            1)

    def _send_grads(self, i, blocks, gradient):
        """Puts gradient [R, C, E] of MACH i's inputs in flight to its children.

        What several parents say to a child about one x is one Grad, their sum.
        """
        parts = gradient.split([len(rows.x) for rows in blocks])
        for rows, part in zip(blocks, parts):
            weight = 1.0 if rows.grad is not None else self.settings.grad_weight
            for position, child in enumerate(self.children[i]):
                if rows.depth == 0:
                    continue
                grad = Rows(rows.x, rows.depth - 1, weight * part[:, position],
                            self.steps_taken)
                for other in self._grads[child]:
                    if (other.x is grad.x and other.depth == grad.depth and
                            other.computed == grad.computed):
                        other.grad = other.grad + grad.grad
                        break
                else:
                    self._grads[child].append(grad)

    def _teach(self, i, x):
        """The student's lesson: what the children answer about x [B, 784]."""
        real = self._inputs(i, x, max(1, self.settings.depth))  # [B, C, E]
        loss = students.synthetic_loss(self.student_of[i](x), real)
        check_finite(loss, f'synthetic loss of mach {i}')
        loss.backward()
        self.tallies[i].lesson(loss)


# Copied from synchronous_single/trainer.py
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


# Copied from synchronous_single/trainer.py
def check_finite(loss, name):
    """Raises FloatingPointError, with its name, for a loss that is none."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f'the {name} is {loss.item()}')
