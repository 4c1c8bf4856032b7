"""The delayed-gradient trainer of k MACHs in lockstep, for any graph.

All MACHs take each step together, and ask each other by calls. A MACH computes
on one thread, several MACHs at once. Meanwhile no parameter changes, and Grads
are sent in a fixed order. So the seed decides everything. A Grad is applied
exactly `delay` steps after it was computed, with the parameters of that later
step. With `delay 0` it is applied before any parameter changes: that is
backpropagation through the graph unrolled to `depth`.
"""

import concurrent.futures
import copy
import dataclasses
import math
import typing

import student as students
import torch
from torch import nn
from torch.nn import functional

from mach import metrics


# Copied from synchronous_single/trainer.py
class Snapshot(typing.NamedTuple):
    """Copies of a MACH's counts and networks; they never change afterwards."""
    tally: metrics.Tally
    network: torch.nn.Module | None = None  # None: failed, gone or not begun
    student: torch.nn.Module | None = None  # None: it has no children
    ended: bool = False  # its thread has ended
    failed: bool = False  # with an error


@dataclasses.dataclass
class Block:
    """One x [B, 784] of a forward, with the Grad about it, if any."""
    x: torch.Tensor  # [B, 784]
    depth: int  # edges that the gradient of their inputs may travel
    grad: torch.Tensor | None = None  # [B, E], to apply; None for own rows
    computed: int = 0  # the step that computed the Grad
    parents: tuple = ()  # indices of the MACHs that sent it


class Trainer:
    """Trains k MACHs together: one `step` is one step of each of them.

    Args:
        networks: list of k Machs.
        student_of: list of k; None for a MACH without children.
        children: list of k lists: the MACHs that feed MACH i, in the order of
            its joiner's inputs.
        batches: list of iterators of (x [B, 784], y [B]): one that all MACHs
            share, or one for each MACH's own local dataset.
        settings: the hyperparameters of main.py.
        threads: how many compute at once; the results are the same.
    """
    file = 'machs.pt'  # of its checkpoint

    def __init__(self,
                 networks,
                 student_of,
                 children,
                 batches,
                 settings,
                 threads=1):
        self.networks = nn.ModuleList(networks)
        self.student_of, self.children = student_of, children
        self.students = nn.ModuleList(s for s in student_of if s)
        self.batches, self.settings = batches, settings
        self.tallies = [metrics.Tally(i) for i in range(len(networks))]
        self.shards = [  # of each MACH
            batches[i % len(batches)].classes for i in range(len(networks))
        ]
        self._priors = [make_prior(one, settings) for one in self.shards]
        self._grads = [[] for _ in networks]  # Blocks in flight to each MACH
        self._answers = {}  # (MACH, which x, depth) -> a(x), of this step
        self._synthetic = {}  # (MACH, which x) -> its student's output
        self._optimiser, self._schedule = make_optimiser(
            self.networks, self.students, settings)
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)

    @property
    def steps_taken(self):
        """Training steps so far, the same for all."""
        return self.tallies[0].steps

    def step(self):
        """One training step of every MACH.

        Raises:
            FloatingPointError: a loss is not finite; nothing was applied.
        """
        everyone, settings = range(len(self.networks)), self.settings
        batches = [next(batches) for batches in self.batches]
        xs, labels = zip(*[batches[i % len(batches)] for i in everyone])
        blocks = [
            [Block(xs[i], settings.depth), *self._take_due(i)] for i in everyone
        ]
        learnt = self._pool.map(self._learn, everyone, blocks, labels)
        # Students come last: they keep threads busy until all MACHs have ended.
        lessons = self._pool.map(self._teach_student, everyone, xs)
        results = []
        for i, (loss, logits, gradient) in enumerate(learnt):
            self._send_grads(i, blocks[i], gradient)
            results.append((loss, logits, labels[i]))
        while settings.delay == 0 and any(self._grads):
            blocks = [self._take_due(i) for i in everyone]
            learnt = self._pool.map(self._learn, everyone, blocks)
            for i, (*_, gradient) in enumerate(learnt):
                self._send_grads(i, blocks[i], gradient)
        list(lessons)  # waits for them
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._schedule.step()
        # The old parameters made them.
        self._answers, self._synthetic = {}, {}
        for tally, result in zip(self.tallies, results):
            tally.step(*result)

    def _learn(self, i, blocks, y=None):
        """Backpropagates the target loss of MACH i, if any, and all Grads due.

        Own rows and Grads are one batch: one forward, one backward. No
        parameter changes yet: other MACHs still ask this one.

        Args:
            i: index of the MACH.
            blocks: the own rows come first.
            y: labels [B] of own rows; None if there are none.
        Returns:
            The target loss and the logits [B, 10] of own rows, the gradient
            [R, C, E] of all inputs; None where there is none.
        """
        settings, network = self.settings, self.networks[i]
        own = 0 if y is None else len(y)
        if not blocks:
            return None, None, None
        inputs, loss, logits = None, None, None
        with make_autocast(settings):
            if self.children[i]:  # a leaf: the edge is cut here
                real = settings.inputs == 'real'
                inputs = torch.cat([
                    self._inputs(i, block.x, block.depth * real)
                    for block in blocks
                ]).detach().requires_grad_()  # [R, C, E]
            h = network.local_part(torch.cat([block.x for block in blocks]))
            # Rows of Grads have no dropout: students cannot mimic its noise.
            h = drop(h, own, settings, i, self.steps_taken)
            d = network.join(h, inputs)  # [R, E]
            roots, gradients = [], []
            if own:
                logits = network.head(d[:own]).to(d.dtype)
                loss = functional.cross_entropy(
                    logits + self._priors[i],
                    y,
                    label_smoothing=settings.label_smoothing)
                roots, gradients = [loss], [None]
            grads = [block.grad for block in blocks if block.grad is not None]
            if grads:
                roots.append(network.answer(d[own:]))
                gradients.append(torch.cat(grads))
        if own:
            check_finite(loss, f'target loss of mach {i}')
        torch.autograd.backward(roots, gradients)
        return loss, logits, None if inputs is None else inputs.grad

    def _take_due(self, i):
        """Takes the Grads that MACH i applies in this step."""
        last = self.steps_taken - self.settings.delay
        due = [block for block in self._grads[i] if block.computed <= last]
        self._grads[i] = [b for b in self._grads[i] if b.computed > last]
        for block in due:
            for parent in block.parents:
                self.tallies[i].grad(self.steps_taken - block.computed, parent)
        return due

    @torch.no_grad()
    def _answer(self, i, x, depth):
        """Answers a Spike: x [B, 784] -> a_i(x) [B, E], without dropout."""
        # Several parents may share an x. Two that ask at once compute it twice.
        key = i, id(x), depth
        if key not in self._answers:
            network = self.networks[i]
            self._answers[key] = network.answer(
                network(x, self._inputs(i, x, depth)))
        return self._answers[key]

    def _inputs(self, i, x, depth):
        """Inputs of MACH i for x [B, 784]: real if depth > 0, else synthetic.

        Returns:
            [B, C, E], with the student's graph if any; None without children.
        """
        if not self.children[i]:
            return None
        if depth > 0:
            return torch.stack([
                self._answer(child, x, depth - 1) for child in self.children[i]
            ], 1)
        if (i, id(x)) not in self._synthetic:
            with torch.enable_grad():  # an answer may ask before the lesson
                self._synthetic[i, id(x)] = self.student_of[i](x)
        return self._synthetic[i, id(x)]

    def _send_grads(self, i, blocks, gradient):
        """Puts gradient [R, C, E] of MACH i's inputs in flight to its children.

        The gradient is None without children or rows. If several parents send a
        child Grads about one x, these are added.
        """
        if gradient is None:
            return
        parts = gradient.split([len(block.x) for block in blocks])
        for block, part in zip(blocks, parts):
            weight = self.settings.grad_weight if block.grad is None else 1.0
            for position, child in enumerate(self.children[i]):
                if block.depth == 0:
                    continue
                grad = Block(block.x, block.depth - 1,
                             weight * part[:, position], self.steps_taken, (i,))
                for other in self._grads[child]:
                    if (other.x is grad.x and other.depth == grad.depth and
                            other.computed == grad.computed):
                        other.grad = other.grad + grad.grad
                        other.parents += grad.parents
                        break
                else:
                    self._grads[child].append(grad)

    def _teach_student(self, i, x):
        """Backpropagates the synthetic loss about the answers to x [B, 784]."""
        if not self.children[i]:
            return
        with make_autocast(self.settings):
            real = self._inputs(i, x, max(1, self.settings.depth))  # [B, C, E]
            loss = students.synthetic_loss(self._inputs(i, x, 0), real)
        check_finite(loss, f'synthetic loss of mach {i}')
        loss.backward()
        self.tallies[i].lesson(loss)

    def snapshot(self, networks=True, **ends):
        """index -> Snapshot of now; with counts alone unless `networks`."""
        made = {}
        for i, tally in enumerate(self.tallies):
            of = (self.networks[i], self.student_of[i]) if networks else ()
            made[i] = Snapshot(copy.deepcopy(tally), *copy.deepcopy(of), **ends)
        return made

    def _parts(self):
        named = dict(networks=self.networks,
                     students=self.students,
                     optimiser=self._optimiser,
                     schedule=self._schedule)
        named |= {f'batches {i}': one for i, one in enumerate(self.batches)}
        return named | {f'tally {i}': one for i, one in enumerate(self.tallies)}

    def state_dict(self):
        """All that the next steps depend on; not a copy."""
        named = {n: part.state_dict() for n, part in self._parts().items()}
        flying = [[vars(block) for block in blocks] for blocks in self._grads]
        return named | dict(grads=flying)

    def load_state_dict(self, state):
        """Continues from the state_dict of a Trainer with the same settings."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self._grads = [
            [Block(**block) for block in blocks] for blocks in state['grads']
        ]


def drop(h, own, settings, *seeds):
    """Dropout of the first `own` rows of h [R, E], drawn by the seeds.

    A step draws the same, whatever other MACHs and threads draw.
    """
    if not own or not settings.dropout:
        return h
    generator = torch.Generator(h.device)
    generator.manual_seed(hash((settings.seed, *seeds)))
    mask, keep = torch.ones_like(h), 1 - settings.dropout
    mask[:own].bernoulli_(keep, generator=generator).div_(keep)
    return h * mask


def make_prior(classes, settings):
    """What the target loss adds to the logits of own rows: [10].

    It is `prior` times the log of each class's share of the own images (logit
    adjustment, Menon et al. 2021, arXiv 2007.07314, equation 10). So a MACH
    does not learn that classes which it has few images of are rare.

    Args:
        classes: own images of each class, [10].
    """
    return settings.prior * (classes / classes.sum()).log().to(settings.device)


# Copied from synchronous_single/trainer.py
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


# Copied from synchronous_single/trainer.py
def make_autocast(settings):
    """The context of a forward: bfloat16 products if `precision` is bf16."""
    return torch.autocast(
        settings.device.split(':')[0],
        torch.bfloat16,
        settings.precision == 'bf16',
        cache_enabled=False)  # a cache would keep outdated parameters


# Copied from synchronous_single/trainer.py
def check_finite(loss, name):
    """Raises FloatingPointError, with `name`, if the loss is not finite."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f'the {name} is {loss.item()}')
