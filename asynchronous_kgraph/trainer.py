"""The delayed-gradient trainer of one MACH; methods run on that MACH's thread.

A step trains the MACH on a batch of its own. In the same forward it answers
Spikes, and in the same backward it applies Grads, with its current parameters.
The staleness of a Grad is the number of steps by which it is late.

Each Grad is rescaled to `grad_weight` times the norm of the own gradient. So
no Grad outweighs the own data, however large it is, on any schedule.

Where a MACH's children are not all other MACHs, it passes Grads on to them. So
labels far away count too. The more MACHs, the smaller the shards. Beyond 5
MACHs, a MACH learns some own rows from its children's answers alone.

A finished MACH has a learning rate of 0. It goes on answering Spikes, and sends
Grads while a child still learns.
"""
# Copied from asynchronous_sequence/trainer.py

import copy
import itertools
import math
import typing

import student as students
import torch
from exchange import Block, Exchange, choose_rows, draw_rows, split
from torch import nn
from torch.linalg import vector_norm
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


class Trainer:
    """One MACH: its networks, its exchange with neighbours and its own data.

    Args:
        index: of the MACH.
        network: a Mach.
        student: the synthetic inputs; None for a MACH without children.
        children: indices of the MACHs that feed it, in the joiner's order.
        batches: iterator of (x [B, 784], y [B]), the local dataset.
        settings: the hyperparameters of main.py.
    """

    def __init__(self, index, network, student, children, batches, settings):
        self.index, self.network, self.student = index, network, student
        self.file = f'mach{index}.pt'  # of its checkpoint
        self.batches, self.settings = batches, settings
        self.exchange = Exchange(index, children, settings)
        self.tally = metrics.Tally(index)
        self._optimiser, self._schedule = make_optimiser(
            [network], [student] if student else [], settings)
        self._prior = make_prior(batches.classes, settings)
        many = max(0.0, 1 - 5 / settings.k)  # 0 up to 5 MACHs, below 1
        self._alone = settings.alone * many  # share of own rows
        self._edges = settings.grad_depth  # that a Grad may travel
        if self.exchange.locked:
            self._edges = settings.depth  # then gradients are exact
        elif len(children) == settings.k - 1:  # one edge reaches all
            self._edges = min(1, settings.grad_depth)
        # Where Grads go on, Spikes are about rows of others too, and a step
        # takes more Grads. So each has fewer rows, if MACHs are many.
        self._any_rows_every = settings.any_rows_every * (self._edges < 2)
        self._share = settings.share / (1 + many * (self._edges > 1))
        self._turns = itertools.count()  # also when it has finished

    @property
    def steps_taken(self):
        """Training steps so far."""
        return self.tally.steps

    @property
    def finished(self):
        """Whether it has taken its last step. Then its learning rate is 0."""
        return self.steps_taken >= self.settings.steps

    def step(self, stopped=lambda: False):
        """One training step; waits for nothing unless `inputs` are `real`.

        Args:
            stopped: tells whether to give up waiting.
        """
        x, y = next(self.batches)
        own, exchange = Block(x), self.exchange
        if exchange.locked and exchange.children and self.settings.depth > 0:
            own = exchange.ask(x, self.settings.depth - 1, waits=True)
            # In a cycle its children may wait for it. So it serves them.
            while own.key in exchange.pending and not stopped():
                self.serve(min(0.1, own.expires - exchange.mailbox.clock()))
        self.learn(own, y)

    def learn(self, own, y):
        """Trains on the Block `own`, labels y [B], and the messages of a step.

        Raises:
            FloatingPointError: a loss is not finite. Nothing was applied. If it
                is the target loss, no Answer and no Grad was sent.
        """
        # The messages of this step.
        self.exchange.receive()
        served, lessons = self.exchange.take()
        # Forward: own rows and those of Spikes and Grads, R in all. Rows with no
        # Grad need no backward, but a forward of their own would cost more.
        with make_autocast(self.settings):
            inputs, embedding = self._embed([own, *served], len(y))
            d = embedding.detach().requires_grad_()  # [R, E]
            logits = self.network.head(d[:len(y)]).to(d.dtype)  # [B, 10]
            answers = self.network.answer(d[len(y):])  # [R - B, E]
            loss = functional.cross_entropy(
                logits + self._prior,
                y,
                label_smoothing=self.settings.label_smoothing)
        check_finite(loss, 'target loss')
        self.exchange.answer(served, answers.detach(), self.steps_taken)
        # Backward: down to d, where Grads are rescaled, then on.
        torch.autograd.backward([loss, answers],
                                [None, self._collect(served, answers)])
        if not self.exchange.locked:
            self._rescale(d.grad, [own, *served])
        embedding.backward(d.grad)
        if lessons:
            self._teach_student(lessons)
        # Optimise.
        self._optimiser.step()
        self._optimiser.zero_grad()
        # Tell the neighbours.
        if self.exchange.children:
            self._tell_children(own, served, inputs.grad)
        if not self.finished:
            self._schedule.step()
            self.tally.step(loss, logits, y)

    def serve(self, timeout):
        """Answers all Spikes; waits up to `timeout` seconds for a message.

        A finished MACH also sends Grads about one more batch, if a child still
        learns. The child's answers then set the pace.
        """
        self.exchange.receive(timeout)
        if self.finished and self.exchange.child_learns():
            x, y = next(self.batches)
            self.learn(Block(x), y)
        asked, _ = self.exchange.take(learning=False)
        if asked:
            with torch.no_grad(), make_autocast(self.settings):
                values = self.network.answer(self._embed(asked, 0)[1])
            self.exchange.answer(asked, values, self.steps_taken)

    # ----------------------------------------------------- parts of the step

    def _embed(self, blocks, own):
        """One forward of all Blocks; the first `own` rows have dropout.

        Rows of other MACHs have none, because students cannot mimic its noise
        (their relative error is 25% with it, 2.6% without).

        Returns:
            inputs [R, C, E], None without children; d(x) [R, E]. The inputs are
            a leaf: their gradient becomes Grads and never reaches the student.
        """
        x, inputs = torch.cat([block.x for block in blocks]), None  # [R, 784]
        h = self.network.local_part(x)  # [R, E]
        seeds = self.settings.seed, self.index, self.steps_taken
        h = drop(h, own, self.settings, *seeds[1:])
        if self.exchange.children:
            with torch.no_grad():
                inputs = self.student(x)
            self._fill_in(inputs, blocks)
            inputs.requires_grad_()
            if own and self._alone:
                rows = math.ceil(self._alone * own)
                parts = drop_parts(h, inputs, rows, *seeds)
                return inputs, self.network.join(*parts)
        return inputs, self.network.join(h, inputs)

    def _fill_in(self, inputs, blocks):
        """Puts the Blocks' answers into inputs [R, C, E], in place."""
        for block, part in zip(blocks, split(inputs, blocks)):
            for child, answer in block.answers.items():
                part[:, self.exchange.children.index(child)] = answer.value

    def _collect(self, served, answers):
        """Grads about answers [R - B, E], in that shape; 0 without a Grad."""
        gradient = torch.zeros_like(answers)
        for part, block in zip(split(gradient, served), served):
            if block.grad:
                part += block.grad.gradient
                if block.grad.version >= 0 and not self.finished:
                    # After a resume, a Grad can be about a later step.
                    self.tally.grad(
                        max(0, self.steps_taken - block.grad.version),
                        block.grad.sender)
        return gradient

    def _rescale(self, gradient, blocks):
        """Scales each Grad to `grad_weight` times the own gradient, in place.

        The norm of several rows is the sum of their norms.

        Args:
            gradient: [R, E], of the Blocks' embeddings; own rows come first.
        """
        own, *norms = [
            norm.sum() for norm in split(vector_norm(gradient, dim=1), blocks)
        ]
        for part, norm in zip(split(gradient, blocks)[1:], norms):
            part *= self.settings.grad_weight * own / norm.clamp_min(1e-20)

    def _teach_student(self, lessons):
        """Backpropagates the synthetic loss about answers that have come."""
        with make_autocast(self.settings):
            synthetic = self.student(torch.cat([block.x for block in lessons]))
            real = synthetic.detach().clone()  # [B, C, E]; loss 0 if no answer
            self._fill_in(real, lessons)
            loss = students.synthetic_loss(synthetic, real)
        check_finite(loss, 'synthetic loss')
        loss.backward()
        self.tally.lesson(loss)

    def _tell_children(self, own, served, gradient):
        """Sends each child a Grad, and a Spike about the same rows.

        In turn these are own rows, rows of Grads that have travelled one edge,
        two edges, and so on; without such Grads, own rows. Children answer such
        a Spike at no cost. Where no Grads go on, every fourth Spike
        (`any_rows_every`) is about any rows of the step instead. A student
        needs no labels (Beyer et al. 2021, arXiv 2106.05237, section 3). So it
        learns about images of other MACHs.

        A locked MACH sends all gradients on at once, so that they are exact.

        Args:
            served: all Blocks of this step, but the own.
            gradient: [R, C, E], of the Blocks' inputs; own rows come first.
        """
        parts = split(gradient, [own, *served])
        sent = [(own, parts[0], self._edges)]
        sent += [(block, part, block.grad.depth)
                 for block, part in zip(served, parts[1:])
                 if block.grad]
        depth = max(0, self.settings.depth - 1)  # of a Spike
        if self.exchange.locked:
            own.key = own.key or self.exchange.ask(own.x, depth).key
            for one in sent:
                self.exchange.send_grads(*one)
            return
        turn, every = next(self._turns), self._any_rows_every
        rows = math.ceil(self._share * len(own.x))
        left = self._edges - turn % max(1, self._edges)
        block, *part = choose_rows(sent, left, rows)
        if every and turn % every == 0:
            seeds = self.settings.seed, self.index, self.steps_taken, 2
            self.exchange.ask(draw_rows([own, *served], rows, seeds), depth)
        else:
            block = self.exchange.ask(block.x, depth)
        self.exchange.send_grads(block, *part)

    # ------------------------------------------------- snapshots, checkpoints

    def snapshot(self, networks=True, **ends):
        """index -> Snapshot of now; with counts alone unless `networks`."""
        tally = self.tally.copy()
        self.exchange.count(tally)
        of = (self.network, self.student) if networks else ()
        return {self.index: Snapshot(tally, *copy.deepcopy(of), **ends)}

    def _parts(self):
        named = dict(network=self.network,
                     optimiser=self._optimiser,
                     schedule=self._schedule,
                     batches=self.batches,
                     tally=self.tally)
        return named | (dict(student=self.student) if self.student else {})

    def state_dict(self):
        """All that the next steps depend on, except messages; not a copy."""
        named = {n: part.state_dict() for n, part in self._parts().items()}
        counted = self.snapshot(networks=False)[self.index].tally
        return named | dict(tally=counted.state_dict())

    def load_state_dict(self, state):
        """Continues from the state_dict of a Trainer with the same settings."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


# Copied from synchronous_sequence/trainer.py
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


def drop_parts(h, inputs, rows, *seeds):
    """h [R, E] and inputs [R, C, E] without parts of the first `rows` rows.

    These rows have no h, and on average half of their inputs, which count
    twice. So the Grads about them tell each child what the labels are, even
    when the own h already fits them. The seeds draw the inputs.
    """
    generator = torch.Generator(h.device)
    generator.manual_seed(hash((*seeds, 1)))  # else as in drop
    keep, mask = torch.ones_like(h[:, :1]), torch.ones_like(inputs[:, :, :1])
    keep[:rows] = 0
    mask[:rows].bernoulli_(0.5, generator=generator).mul_(2)
    return h * keep, inputs * mask


# Copied from synchronous_sequence/trainer.py
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
