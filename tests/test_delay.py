"""The synchronous experiments: backpropagation at delay 0, else late Grads."""

import math
import conftest
import pytest
import torch

CHILDREN = conftest.SYNCHRONOUS_CHILDREN
FOLDERS = ('synchronous_single', *CHILDREN)

graphs = pytest.mark.parametrize('folder', CHILDREN)


def make_run(folder, settings, optimiser, monkeypatch, batches=1):
    """One experiment with another optimiser, see `make_synchronous`."""
    monkeypatch.setattr(conftest.load(folder).trainer, 'Optimiser', optimiser)
    return conftest.make_synchronous(folder, settings, batches)


def batch_of(run, i, step=-1):
    """The x, y of MACH i in one step, the last by default."""
    return run.rows[i % len(run.rows)].taken[step]


def embed(run, i, x, depth):
    """d_i(x) [B, E], real down to `depth`, as one composed function."""
    inputs = None
    if run.children[i]:
        inputs = run.students[i](x).detach()
        if depth > 0:
            inputs = torch.stack(
                [embed(run, child, x, depth - 1) for child in run.children[i]],
                1)
    return run.machs[i](x, inputs)


# ----------------------------------------------- delay 0 is backpropagation


def test_single_at_delay_0_is_backpropagation(monkeypatch):
    settings = conftest.make_settings()
    run = make_run('synchronous_single', settings, conftest.Still, monkeypatch)
    run.trainer.step()
    (x, y), mach = batch_of(run, 0), run.machs[0]
    loss = conftest.target_loss(mach, mach(x), y, settings)
    conftest.assert_close(conftest.grads_of(mach),
                          conftest.gradients(loss, [mach]))
    distance = (run.students[0](x) - mach(x).detach().unsqueeze(1)).square()
    loss = distance.sum() / len(x)
    conftest.assert_close(conftest.grads_of(run.students[0]),
                          conftest.gradients(loss, [run.students[0]]))


@pytest.mark.parametrize('folder, depth, batches', [
    ('synchronous_sequence', 3, 1),
    ('synchronous_sequence', 3, 4),
    ('synchronous_sequence', 2, 1),
    ('synchronous_sequence', 1, 1),
    ('synchronous_kgraph', 1, 1),
    ('synchronous_kgraph', 1, 3),
    ('synchronous_kgraph', 2, 1),
    ('synchronous_kgraph', 2, 3),
])
def test_real_inputs_at_delay_0_are_backpropagation(folder, depth, batches,
                                                    monkeypatch):
    """In a row at full depth and less; in a k-graph unrolled to `depth`."""
    settings = conftest.make_settings(inputs='real', depth=depth)
    run = make_run(folder, settings, conftest.Still, monkeypatch, batches)
    run.trainer.step()
    total = 0.0
    for i, mach in enumerate(run.machs):
        x, y = batch_of(run, i)
        total = total + conftest.target_loss(mach, embed(run, i, x, depth), y,
                                             settings)
    for mach in run.machs:
        conftest.assert_close(conftest.grads_of(mach),
                              conftest.gradients(total, [mach]))


@graphs
@pytest.mark.parametrize('depth', [0, 1, 2])
@pytest.mark.parametrize('weight', [1.0, 3.0])
def test_synthetic_inputs_at_delay_0_pass_on_real_gradients(
        folder, depth, weight, monkeypatch):
    """The value on an edge is synthetic, its gradient the real embedding's."""
    settings = conftest.make_settings(depth=depth, grad_weight=weight)
    run = make_run(folder, settings, conftest.Still, monkeypatch)
    run.trainer.step()
    expected = [
        [torch.zeros_like(p) for p in mach.parameters()] for mach in run.machs
    ]

    def spread(i, x, outputs_of, depth, weight):
        """Adds one MACH's gradients, and those of all that hear of it."""
        mach, inputs = run.machs[i], None
        if run.children[i]:
            inputs = run.students[i](x).detach().requires_grad_()
        output, pull = outputs_of(mach(x, inputs))
        expected[i] = [
            one + two for one, two in zip(
                expected[i], conftest.gradients(output, [mach], pull))
        ]
        if not run.children[i] or depth == 0:
            return
        sent, = torch.autograd.grad(output, inputs, pull)
        for position, child in enumerate(run.children[i]):
            gradient = weight * sent[:, position]
            spread(child, x, lambda d, g=gradient: (d, g), depth - 1, 1.0)

    for i, mach in enumerate(run.machs):
        x, y = batch_of(run, i)
        spread(i,
               x,
               lambda d, mach=mach, y=y:
               (conftest.target_loss(mach, d, y, settings), None),
               depth,
               weight)
    for mach, gradients in zip(run.machs, expected):
        conftest.assert_close(conftest.grads_of(mach), gradients)


# --------------------------------------------------------- delay d is exact


@pytest.mark.parametrize('delay', [0, 1, 3])
def test_single_applies_each_grad_delay_steps_later(delay, monkeypatch):
    settings = conftest.make_settings(delay=delay, learning_rate=0.3)
    run = make_run('synchronous_single', settings, conftest.Descend,
                   monkeypatch)
    mach = conftest.make_networks(conftest.load('synchronous_single'), [[]],
                                  settings)[0][0]
    in_flight = []
    for step in range(7):
        run.trainer.step()
        x, y = batch_of(run, 0)
        embedding = mach(x).detach().requires_grad_()
        loss = conftest.target_loss(mach, embedding, y, settings)
        grads = conftest.gradients(loss, [mach])  # the head's
        in_flight.append((x, torch.autograd.grad(loss, embedding)[0]))
        if step >= delay:
            x, pull = in_flight[step - delay]
            late = conftest.gradients(mach(x), [mach], pull)
            grads = [one + two for one, two in zip(grads, late)]
        with torch.no_grad():
            for parameter, grad in zip(mach.parameters(), grads):
                parameter -= settings.learning_rate * grad
        conftest.assert_close(conftest.snapshot(run.machs[0]),
                              conftest.snapshot(mach))


class Replay:
    """The MACHs of a row or of a k-graph, trained one message at a time."""

    def __init__(self, run, settings, machs):
        self.run, self.settings, self.machs = run, settings, machs
        self.flying = []  # (arrives, child, x, gradient, depth)
        self.steps = 0

    def answer(self, i, x, depth):
        """d_i(x), with the parameters of this step."""
        with torch.no_grad():
            return self.machs[i](x, self.inputs(i, x, depth))

    def inputs(self, i, x, depth):
        """What MACH i takes from its children about x: a leaf, or None."""
        children = self.run.children[i]
        if not children:
            return None
        if self.settings.inputs == 'real' and depth > 0:
            inputs = torch.stack(
                [self.answer(child, x, depth - 1) for child in children], 1)
        else:
            inputs = self.run.students[i](x)
        return inputs.detach().requires_grad_()

    def step(self):
        """One step of all; everything is computed before anything moves."""
        settings = self.settings
        due = [m for m in self.flying if m[0] == self.steps]
        self.flying = [m for m in self.flying if m[0] != self.steps]
        work = [(i, *batch_of(self.run, i), settings.depth, True)
                for i in range(len(self.machs))]
        work += [
            (i, x, gradient, depth, False) for _, i, x, gradient, depth in due
        ]
        totals = [[torch.zeros_like(p)
                   for p in mach.parameters()]
                  for mach in self.machs]
        for i, x, said, depth, own in work:
            mach, inputs = self.machs[i], self.inputs(i, x, depth)
            output, pull = mach(x, inputs), said
            if own:
                output = conftest.target_loss(mach, output, said, settings)
                pull = None
            grads = conftest.gradients(output, [mach], pull)
            totals[i] = [one + two for one, two in zip(totals[i], grads)]
            if inputs is None or depth == 0:
                continue
            sent, = torch.autograd.grad(output, inputs, pull)
            for position, child in enumerate(self.run.children[i]):
                weight = settings.grad_weight if own else 1.0
                self.flying.append((self.steps + settings.delay, child, x,
                                    weight * sent[:, position], depth - 1))
        with torch.no_grad():
            for mach, grads in zip(self.machs, totals):
                for parameter, grad in zip(mach.parameters(), grads):
                    parameter -= settings.learning_rate * grad
        self.steps += 1


@graphs
@pytest.mark.parametrize('delay', [1, 3])
@pytest.mark.parametrize('inputs, depth', [('real', 1), ('real', 2),
                                           ('synthetic', 2)])
@pytest.mark.parametrize('shards', [False, True])
def test_each_grad_is_applied_delay_steps_later(folder, delay, inputs, depth,
                                                shards, monkeypatch):
    settings = conftest.make_settings(delay=delay,
                                      inputs=inputs,
                                      depth=depth,
                                      learning_rate=0.3,
                                      student_learning_rate=0.0,
                                      grad_weight=2.0)
    batches = len(CHILDREN[folder]) if shards else 1
    run = make_run(folder, settings, conftest.Descend, monkeypatch, batches)
    networks = conftest.make_networks(conftest.load(folder), run.children,
                                      settings)
    replay = Replay(run, settings, [mach for mach, _ in networks])
    for _ in range(2 * delay + 3):
        run.trainer.step()
        replay.step()
        conftest.assert_close(conftest.snapshot(*run.machs),
                              conftest.snapshot(*replay.machs))


@pytest.mark.parametrize('folder', FOLDERS)
@pytest.mark.parametrize('delay', [0, 1, 3])
def test_staleness_is_the_delay(folder, delay, monkeypatch):
    settings = conftest.make_settings(delay=delay, depth=2)
    run = make_run(folder, settings, conftest.Still, monkeypatch)
    for step in range(2 * delay + 2):
        run.trainer.step()
        report = run.trainer.report()
        for i, counts in run.trainer.staleness().items():
            heard = step >= delay  # else no Grad has come yet
            if folder == 'synchronous_sequence' and i == 3:
                heard = False  # it has no parent
            assert (counts['staleness_max'],
                    counts['dropped']) == (delay * heard, 0)
            for staleness in counts['staleness'], report[i]['staleness']:
                if heard:
                    assert staleness == delay
                else:
                    assert math.isnan(staleness)
    assert sorted(report) == list(range(len(run.machs)))


# ------------------------------------------------------------ shards and seed


@graphs
@pytest.mark.parametrize('delay', [0, 2])
@pytest.mark.parametrize('inputs', ['synthetic', 'real'])
def test_each_mach_is_judged_on_its_own_rows(folder, delay, inputs,
                                             monkeypatch):
    settings = conftest.make_settings(delay=delay, inputs=inputs)
    run = make_run(folder, settings, conftest.Still, monkeypatch,
                   len(CHILDREN[folder]))
    for _ in range(delay + 2):
        run.trainer.step()
        report = run.trainer.report()
        for i, mach in enumerate(run.machs):
            x, y = batch_of(run, i)
            embedding = embed(run, i, x, settings.depth * (inputs == 'real'))
            loss = conftest.target_loss(mach, embedding, y, settings).item()
            assert abs(report[i]['loss'] - loss) < 1e-10 * loss
            right = (mach.head(embedding).argmax(1) == y).sum().item()
            assert abs(report[i]['train'] - 100.0 * right / len(y)) < 1e-10


@graphs
@pytest.mark.parametrize('delay', [0, 1])
def test_labels_of_others_reach_a_mach_by_grads_alone(folder, delay,
                                                      monkeypatch):
    """At depth 0 there are none, so others' labels change nothing."""
    settings = conftest.make_settings(delay=delay, depth=0)
    found = []
    for change in (False, True):
        run = make_run(folder, settings, conftest.Still, monkeypatch,
                       len(CHILDREN[folder]))
        if change:
            original = run.rows[0].next

            def other_labels(original=original):
                x, y = original()
                return x, (y + 1) % conftest.CLASSES

            run.rows[0].next = other_labels
        for _ in range(2):
            run.trainer.step()
        found.append([conftest.grads_of(mach) for mach in run.machs])
    same = [conftest.same(one, other) for one, other in zip(*found)]
    assert same == [False] + [True] * (len(same) - 1)


@pytest.mark.parametrize('folder', FOLDERS)
@pytest.mark.parametrize('delay', [0, 2])
def test_the_same_seed_gives_the_same_bits(folder, delay, monkeypatch):
    optimiser = conftest.load(folder).trainer.Optimiser
    found = []
    for seed in (3, 3, 4):
        settings = conftest.make_settings(delay=delay,
                                          depth=2,
                                          seed=seed,
                                          dropout=0.5)
        run = make_run(folder, settings, optimiser, monkeypatch)
        torch.manual_seed(len(found))  # what others draw is not their affair
        for _ in range(5):
            run.trainer.step()
        found.append(conftest.snapshot(*run.machs, *run.students))
    assert conftest.same(found[0], found[1])
    assert not conftest.same(found[0], found[2])


@graphs
def test_dropout_follows_the_seed(folder, monkeypatch):
    found = []
    start = make_run(folder, conftest.make_settings(), conftest.Still,
                     monkeypatch)
    for seed in (3, 3, 4):
        run = make_run(folder, conftest.make_settings(seed=seed, dropout=0.5),
                       conftest.Still, monkeypatch)
        for mach, student, *states in zip(run.machs, run.students, start.machs,
                                          start.students):
            mach.load_state_dict(states[0].state_dict())
            if student is not None:
                student.load_state_dict(states[1].state_dict())
        run.trainer.step()
        found.append(conftest.grads_of(*run.machs))
    assert conftest.same(found[0], found[1])
    assert not conftest.same(found[0], found[2])
