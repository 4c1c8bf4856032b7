"""The delayed-gradient trainer of a k-graph: one autograd graph, one backward.

With `delay 0` gradients flow through the edges of that graph: plain
backpropagation. Otherwise the edges are cut: a Grad that crosses one is applied
`delay` steps after it was computed, with the parameters of that later step.
"""

import collections
import copy
import dataclasses
import math

import student as students
import torch
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Grads:
    """All backward messages of one step about one x.

    Attributes:
        x: [R, 784], normalised images.
        depth: how many edges further they may travel.
        gradients: list of k, [R, E]: the sum of what all parents say to MACH i.
        computed: the step they were computed in.
    """
    x: torch.Tensor
    depth: int
    gradients: list | None = None
    computed: int = 0


class Trainer:
    """Trains k MACHs together: one `step` is one step of each of them.

    Args:
        machs: list of k networks, on their device.
        student_of: list of k; None for a MACH without children.
        children: list of k lists: the MACHs that feed MACH i, in the order of
            its joiner's inputs.
        batches: list of those with `next() -> (x [B, 784], y [B])`: one that all
            MACHs share, or one for each MACH's own local dataset.
        settings: the hyperparameters of main.py.
    """

    def __init__(self, machs, student_of, children, batches, settings):
        self.machs, self.student_of, self.children = machs, student_of, children
        self.batches, self.settings = batches, settings
        self.steps_taken = 0
        self._grads = collections.deque()  # in flight, oldest first
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._mach_optimiser = Optimiser(
            [p for mach in machs for p in mach.parameters()],
            settings.learning_rate, settings.weight_decay, settings)
        learners = [student for student in student_of if student is not None]
        self._student_optimiser = None
        if learners:
            self._student_optimiser = Optimiser(
                [p for student in learners for p in student.parameters()],
                settings.student_learning_rate, 0.0, settings)
        self._staleness = collections.Counter()
        self._windows = [collections.Counter() for _ in machs]

    def step(self):
        """One training step of every MACH.

        Raises:
            FloatingPointError: a loss is not finite; nothing was applied.
        """
        x, y, owned = self._batch()
        blocks = [Grads(x, self.settings.depth)]  # the new rows, then Grads due
        while (self._grads and self._grads[0].computed + self.settings.delay
               <= self.steps_taken):
            blocks.append(self._grads.popleft())
        rows = torch.cat([block.x for block in blocks])
        with self._autocast():
            local = [mach.local_part(rows) for mach in self.machs]
            synthetic, learning = self._synthesise(rows, len(x))
            levels = self._levels(local, synthetic)
            losses, leaves, roots = [], [], []
            for i in range(len(self.machs)):
                if self.settings.delay == 0:
                    inputs = self._uncut_inputs(i, local, synthetic)
                else:
                    inputs = self._cut_inputs(i, blocks, synthetic, levels)
                leaves.append(inputs)
                keep = self._dropout_mask(i, local[i], len(x))
                embedding = torch.relu(local[i] * keep +
                                       self.machs[i].joined_part(inputs))
                losses.append(
                    self._target_loss(i, embedding[:len(x)], y, owned[i]))
                roots.append(embedding[len(x):])
            losses += self._synthetic_losses(learning, levels, owned)
        self._backward(sum(losses), blocks[1:], roots)
        if self.settings.delay == 0:
            self._staleness['grads'] += any(self.children)  # none was late
        elif any(self.children):
            self._send_grads(blocks, leaves)
        self._mach_optimiser.step()
        if self._student_optimiser is not None:
            self._student_optimiser.step()
        self.steps_taken += 1

    def _batch(self):
        """The new rows of one step.

        Returns:
            x [R, 784], y [R] and owned [k, R]: whether row r trains MACH i. With
            one shared batch R = B and all own it; else R = k * B.
        """
        batches = [batches.next() for batches in self.batches]
        x = torch.cat([x for x, _ in batches])
        y = torch.cat([y for _, y in batches])
        owner = torch.arange(len(x), device=x.device) // len(batches[0][0])
        machs = torch.arange(len(self.machs), device=x.device).unsqueeze(1)
        return x, y, (machs == owner) | (len(batches) == 1)

    def _synthesise(self, rows, fresh):
        """Synthetic inputs of each MACH for rows [R, 784].

        Returns:
            Two lists of k, None for a MACH without children: the inputs
            [R, C, E] without a graph, and those of the `fresh` new rows with
            one, from which the student learns.
        """
        values, learning = [], []
        for student in self.student_of:
            value = learner = None
            if student is not None:
                learner = student(rows[:fresh])
                value = learner.detach()
                if len(rows) > fresh:
                    with torch.no_grad():
                        value = torch.cat([value, student(rows[fresh:])])
            values.append(value)
            learning.append(learner)
        return values, learning

    @torch.no_grad()
    def _levels(self, local, synthetic):
        """What each MACH answers at each depth, without graph or dropout.

        Args:
            local: list of k, [R, E]: h of each MACH.
            synthetic: list of k, [R, C, E] or None.
        Returns:
            levels[n][i] [R, E]: d_i at depth n, for n = 0 .. depth - 1, and at
            least 0, which the students learn from.
        """
        levels = []
        for depth in range(max(1, self.settings.depth)):
            levels.append([
                torch.relu(local[i] + mach.joined_part(
                    self._pick(i, levels[-1]) if depth else synthetic[i]))
                for i, mach in enumerate(self.machs)
            ])
        return levels

    def _pick(self, i, embeddings):
        """The inputs [R, C, E] of MACH i out of all MACHs' [R, E]."""
        if not self.children[i]:
            return None
        return torch.stack([embeddings[child] for child in self.children[i]], 1)

    def _cut_inputs(self, i, blocks, synthetic, levels):
        """Inputs [R, C, E] of MACH i, a leaf: its gradient becomes Grads."""
        if not self.children[i]:
            return None
        inputs, first = [], 0
        for block in blocks:
            source = synthetic[i]
            if self.settings.inputs == 'real' and block.depth > 0:
                source = self._pick(i, levels[block.depth - 1])
            inputs.append(source[first:first + len(block.x)])
            first += len(block.x)
        return torch.cat(inputs).requires_grad_()

    def _uncut_inputs(self, i, local, synthetic):
        """Inputs [R, C, E] of MACH i that lead on into its children's graph.

        Their values are synthetic or real, as `inputs` says; their gradient is
        the real embeddings' either way, as it is when a Grad brings it.
        """
        embeddings = [None] * len(self.machs)  # d_j at ever greater depth
        for depth in range(self.settings.depth + 1):
            inputs = list(synthetic)
            if depth > 0:
                inputs = [
                    self._edge(synthetic[j], self._pick(j, embeddings))
                    for j in range(len(self.machs))
                ]
            if depth == self.settings.depth:
                break
            embeddings = [
                torch.relu(local[j] + mach.joined_part(inputs[j]))
                for j, mach in enumerate(self.machs)
            ]
        if inputs[i] is None or self.settings.depth == 0:
            return inputs[i]
        weight = self.settings.grad_weight  # on the first edge alone
        return inputs[i].detach() + weight * (inputs[i] - inputs[i].detach())

    def _edge(self, synthetic, real):
        """The value that `inputs` names, with the gradient of the real one."""
        if real is None or self.settings.inputs == 'real':
            return real
        return synthetic + (real - real.detach())

    def _target_loss(self, i, embedding, y, owned):
        """Target loss of MACH i on those rows of embedding [R, E] it owns."""
        logits = self.machs[i].head(embedding[owned]).to(embedding.dtype)
        loss = functional.cross_entropy(
            logits, y[owned], label_smoothing=self.settings.label_smoothing)
        check_finite(loss, f'target loss of mach {i}', self.steps_taken + 1)
        self._windows[i].update(
            steps=1,
            images=len(logits),
            loss=loss.item(),
            correct=(logits.argmax(1) == y[owned]).sum().item())
        return loss

    def _synthetic_losses(self, learning, levels, owned):
        """The students' lessons: what the children answer on each one's rows."""
        losses = []
        for i, learner in enumerate(learning):
            if learner is not None:
                real = self._pick(i, levels[-1])[:len(learner)]
                losses.append(
                    students.synthetic_loss(learner[owned[i]], real[owned[i]]))
                check_finite(losses[-1], f'synthetic loss of mach {i}',
                             self.steps_taken + 1)
                self._windows[i]['synthetic_loss'] += losses[-1].item()
        return losses

    def _backward(self, loss, due, roots):
        """One backward for all: the losses, and the Grads due on their rows."""
        starts, gradients = [loss], [None]
        if due:
            for i, root in enumerate(roots):  # [R - B, E]
                starts.append(root)
                gradients.append(torch.cat([g.gradients[i] for g in due]))
        torch.autograd.backward(starts, gradients)
        for grads in due:
            staleness = self.steps_taken - grads.computed
            self._staleness.update(total=staleness, grads=1)
            self._staleness['max'] = max(self._staleness['max'], staleness)

    def _send_grads(self, blocks, leaves):
        """Puts the gradient of each block's inputs in flight to the children."""
        first = 0
        for block in blocks:
            last = first + len(block.x)
            if block.depth > 0:
                gradients = [
                    block.x.new_zeros(len(block.x), self.settings.embedding)
                    for _ in self.machs
                ]
                weight = self.settings.grad_weight if first == 0 else 1.0
                for i, leaf in enumerate(leaves):
                    for position, child in enumerate(self.children[i]):
                        gradients[child] = (
                            gradients[child] +
                            weight * leaf.grad[first:last, position])
                self._grads.append(
                    Grads(block.x, block.depth - 1, gradients,
                          self.steps_taken))
            first = last

    def _dropout_mask(self, i, local, rows):
        """A factor for local [R, E]: 0 or 1 / (1 - p) in new rows, 1 below."""
        mask = torch.ones(local.shape)
        if self.children[i]:  # else there is nothing to lean on
            keep = 1 - self.settings.dropout
            mask[:rows].bernoulli_(keep, generator=self._generator).div_(keep)
        return mask.to(local)

    # Copied from synchronous_single/trainer.py
    def _autocast(self):
        """bfloat16 products where `precision` says so."""
        return torch.autocast(self.settings.device.split(':')[0],
                              torch.bfloat16,
                              enabled=self.settings.precision == 'bf16')

    def report(self):
        """The log's `step` fields of each MACH since the last report."""
        fields = {}
        for i, window in enumerate(self._windows):
            steps = max(1, window['steps'])
            fields[i] = {
                'loss': window['loss'] / steps,
                'train': 100.0 * window['correct'] / max(1, window['images']),
                'synthetic_loss': window['synthetic_loss'] / steps,
                'staleness': self.staleness()[i]['staleness'],
            }
        self._windows = [collections.Counter() for _ in self.machs]
        return fields

    def staleness(self):
        """How late each MACH's Grads were over the whole run, in steps."""
        counts = self._staleness
        return {
            i: {
                'staleness':
                    counts['total'] /
                    counts['grads'] if counts['grads'] else math.nan,
                'staleness_max':
                    counts['max'],
                'dropped':
                    0,
            } for i in range(len(self.machs))
        }

    def copies(self):
        """MACH's index -> a copy of (MACH, student), the reader's to keep."""
        return {
            i: (copy.deepcopy(mach), copy.deepcopy(student))
            for i, (mach,
                    student) in enumerate(zip(self.machs, self.student_of))
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
