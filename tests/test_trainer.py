"""How a MACH learns: exact gradients, lanes, rescaling, cycle, one owner."""

import collections
import itertools
import math
import queue
import random
import threading
from concurrent import futures

import conftest
import pytest
import torch
from conftest import WIDTH, draw, make_all, make_lone, weights
from torch.nn import functional

FOLDERS = conftest.SYNCHRONOUS + conftest.ASYNCHRONOUS
RATE = 0.3  # of plain gradient descent

all_folders = pytest.mark.parametrize('folder', FOLDERS)
multiple = pytest.mark.parametrize('folder', FOLDERS[1:])
asynchronous = pytest.mark.parametrize('folder', conftest.ASYNCHRONOUS)
synchronous = pytest.mark.parametrize('folder', conftest.SYNCHRONOUS[1:])
both_inputs = pytest.mark.parametrize('inputs', ['synthetic', 'real'])


@pytest.fixture(name='plain')
def _plain(monkeypatch):
    """Trainers descend plainly: parameters lose RATE times their gradients."""

    def make_optimiser(networks, students, _):
        both = torch.nn.ModuleList([*networks, *students])
        return torch.optim.SGD(both.parameters(), RATE), conftest.Still()

    conftest.patch_trainers(monkeypatch, 'make_optimiser', make_optimiser)


@pytest.fixture(name='tripled')
def _tripled(monkeypatch):
    """Dropout leaves nothing to chance: it triples its rows."""
    conftest.patch_trainers(
        monkeypatch, 'drop',
        lambda h, own, *_: torch.cat([3 * h[:own], h[own:]]))


def grads(*networks):
    """The gradients of all parameters in one vector; 0 where there is none."""
    return torch.cat([
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
        for network in networks if network for p in network.parameters()
    ])


def gradient(root, networks, pull=None):
    """Autograd's gradient of all parameters, in one vector."""
    parameters = [p for network in networks for p in network.parameters()]
    found = torch.autograd.grad(root,
                                parameters,
                                pull,
                                retain_graph=True,
                                materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def assert_close(found, expected):
    assert expected.norm() > 0
    assert (found - expected).norm() / expected.norm() < 1e-10


def entropy(network, d, y, prior=0.5):
    """The target loss; the shard has 1 image of class 0, 10 of class 9."""
    logits = network.head(d) + prior * (torch.arange(1, 11) / 55).log()
    return functional.cross_entropy(logits, y, label_smoothing=0.1)


def normal(d):
    """The answer a(x) [B, E] about the embedding d(x): its layer norm."""
    centred = d - d.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()


def alone(network, x, inputs, y=None, pull=None, dropout=False):
    """One x by itself: own rows with labels y, or rows of a Grad, its `pull`.

    Returns the gradients of network and inputs [B, C, E], and the norm at d(x).
    """
    h = network.local_part(x) * (3 if dropout else 1)
    if inputs is not None:
        inputs = inputs.detach().clone().requires_grad_()
    d = network.join(h, inputs)
    root = normal(d) if y is None else entropy(network, d, y)
    own = gradient(root, [network], pull)
    at_d, = torch.autograd.grad(root, d, pull, retain_graph=True)
    if inputs is not None:
        inputs, = torch.autograd.grad(root, inputs, pull)
    return own, inputs, at_d.norm(dim=1).sum()


def inputs_of(run, i, x, depth):
    """Inputs of MACH i, real if depth > 0, composed; None without children."""
    if not run.children[i]:
        return None
    if depth == 0:
        return run.students[i](x).detach()
    return torch.stack(
        [normal(embed(run, child, x, depth - 1)) for child in run.children[i]],
        1)


def embed(run, i, x, depth):
    """d_i(x), real down to `depth`, as one composed function."""
    return run.networks[i](x, inputs_of(run, i, x, depth))


# ------------------------------- it is backpropagation when nothing is late


def assert_backpropagation(run, depth):
    total = 0.0
    for i, network in enumerate(run.networks):
        x, y = run.batches[i % len(run.batches)].taken[0]
        total += entropy(network, embed(run, i, x, depth), y)
    assert_close(grads(*run.networks), gradient(total, run.networks))


@asynchronous
@pytest.mark.parametrize('graph', ['chain', 'diamond', 'full'])
def test_backpropagation_over_links(folder, graph, still):
    run = make_all(folder, conftest.GRAPHS[graph], inputs='real', depth=3)
    for one in reversed(run.trainers):  # parents first: no Grad is late
        conftest.take_step(one, run.trainers)
        assert one.exchange.dropped == 0
    assert_backpropagation(run, 3)


@synchronous
@pytest.mark.parametrize('graph', conftest.GRAPHS)
@pytest.mark.parametrize('depth', [1, 3])
@pytest.mark.parametrize('shared', [True, False])
def test_backpropagation_in_lockstep(folder, graph, depth, shared, still):
    """At delay 0, through cycles unrolled to `depth`."""
    run = make_all(folder,
                   conftest.GRAPHS[graph],
                   shared,
                   inputs='real',
                   depth=depth)
    run.trainers[0].step()
    assert_backpropagation(run, depth)


# ---------------------------------------------- lockstep: the delay is exact


@torch.no_grad()
def descend(network, gradients):
    for p in network.parameters():
        p -= RATE * gradients[:p.numel()].view_as(p)
        gradients = gradients[p.numel():]


def replay(run, settings, step, flying):
    """One step of all MACHs by plain descent, one message at a time."""
    batches = [next(batches) for batches in run.batches]
    due, totals = [grad for grad in flying if grad[0] == step], {}
    for i, student in enumerate(run.students):
        x, y = batches[i % len(batches)]
        due.append((step, i, x, settings.depth, y, None))
        if student:
            real = inputs_of(run, i, x, max(1, settings.depth)).detach()
            loss = (student(x) - real).square().sum() / len(x)
            totals[student] = gradient(loss, [student])
    while due:
        _, i, x, depth, y, pull = due.pop()
        inputs = inputs_of(run, i, x, depth * (settings.inputs == 'real'))
        own, sent, _ = alone(run.networks[i], x, inputs, y, pull, pull is None)
        totals[run.networks[i]] = totals.get(run.networks[i], 0.0) + own
        for position, child in enumerate(run.children[i] if depth else ()):
            weight = settings.grad_weight if pull is None else 1.0
            grad = child, x, depth - 1, None, weight * sent[:, position]
            (flying if settings.delay else due).append(
                (step + settings.delay, *grad))
    for network, gradients in totals.items():
        descend(network, gradients)


@synchronous
@both_inputs
@pytest.mark.parametrize('delay', [0, 1, 3])
@pytest.mark.parametrize('depth', [0, 2])
@pytest.mark.parametrize('shared', [True, False])
def test_each_grad_is_applied_delay_steps_later(folder, inputs, delay, depth,
                                                shared, plain, tripled):
    """It is recomputed with the parameters of that later step.

    Only own rows have dropout. `grad_weight` counts on the first edge alone.
    """
    names = dict(inputs=inputs, delay=delay, depth=depth, grad_weight=2.0)
    run, twin = (make_all(folder, shared=shared, **names) for _ in range(2))
    settings, flying = conftest.make_settings(**names), []
    for step in range(2 * delay + 2):
        run.trainers[0].step()
        replay(twin, settings, step, flying)
        assert_close(weights(*run.networks), weights(*twin.networks))
        assert_close(weights(*run.learners), weights(*twin.learners))
        parents = set(sum(run.children, [])) if depth else ()
        for i, tally in enumerate(run.trainers[0].tallies):
            late = delay if i in parents and step >= delay else math.nan
            assert tally.staleness == pytest.approx(late, nan_ok=True)
            assert tally.staleness_max == (late if late > 0 else 0)


@synchronous
@both_inputs
@pytest.mark.parametrize('shared', [True, False])
def test_a_student_sees_an_x_once_a_step(folder, inputs, shared):
    """As own rows, in answers, in its lesson, and in Grads."""
    run = make_all(folder, shared=shared, inputs=inputs, delay=1)
    seen = []  # it keeps all x, so their ids differ
    for student in run.learners:
        student.register_forward_pre_hook(lambda *call: seen.append(call))
    for _ in range(3):
        before = len(seen)
        run.trainers[0].step()
        calls = [(student, id(x)) for student, (x,) in seen[before:]]
        assert len(calls) == len(set(calls)) > 0


@pytest.mark.parametrize('delay', [0, 1, 3])
def test_single_applies_each_grad_delay_steps_later(delay, plain):
    """Its student mimics the embedding d, which its head reads."""
    trainer, = make_all('synchronous_single', delay=delay).trainers
    twin, = make_all('synchronous_single').trainers
    network, student, flying = twin.network, twin.student, []
    for step in range(7):
        trainer.step()
        x, y = trainer.batches.taken[-1]
        d = network(x).detach().requires_grad_()
        loss = entropy(network, d, y, prior=0)
        total = gradient(loss, [network])  # the head's
        flying.append((x, torch.autograd.grad(loss, d)[0]))
        if step >= delay:
            late, pull = flying[step - delay]
            total += gradient(network(late), [network], pull)
            assert trainer.tallies[0].staleness == delay
        distance = (student(x) - d.detach().unsqueeze(1)).square()
        lesson = gradient(distance.sum() / len(x), [student])
        descend(network, total)
        descend(student, lesson)
        assert_close(weights(trainer.network), weights(network))
        assert_close(weights(trainer.student), weights(student))


def run_all(folder, steps=3, **names):
    """A whole experiment after a few steps in this thread."""
    run = make_all(folder, **names)
    for _ in range(steps):
        for trainer in run.trainers:
            trainer.step()
    return run


@all_folders
@pytest.mark.parametrize('delay', [0, 1])
def test_no_gradient_leaves_its_lane(folder, delay, still, monkeypatch):
    """The target loss and Grads reach no student; its loss reaches it alone."""
    found = []
    owner = conftest.load(folder).student
    for where, name in ((None, None), (owner, 'synthetic_loss'),
                        (functional, 'cross_entropy')):
        with monkeypatch.context() as patch:
            if where:
                loss = getattr(where, name)
                larger = lambda *a, loss=loss, **b: 8 * loss(*a, **b)
                patch.setattr(where, name, larger)  # by an exact factor
            run = run_all(folder, delay=delay)
        found.append((grads(*run.networks), grads(*run.learners)))
    (target, synthetic), *scaled = found
    assert target.norm() > 0 and synthetic.norm() > 0
    for (one, other), factors in zip(scaled, ((1, 8), (8, 1))):
        assert torch.equal(one, factors[0] * target)
        assert torch.equal(other, factors[1] * synthetic)


@all_folders
def test_each_learning_rate_stays_in_its_lane(folder):
    before, run = make_all(folder), run_all(folder, learning_rate=0.0)
    assert torch.equal(weights(*run.networks), weights(*before.networks))
    assert not torch.equal(weights(*run.learners), weights(*before.learners))


@asynchronous
@pytest.mark.parametrize('children', [(), (0,), (0, 1)])
@pytest.mark.parametrize('order', [1, -1])
@pytest.mark.parametrize('turn', [0, 1])
def test_fused_equals_separate(folder, children, order, turn, still, tripled):
    """Own rows, a Spike, a Grad about its x, and another Grad: one forward.

    Only own rows have dropout. A Grad passes the layer norm of the answer. Then
    its norm is `grad_weight` times the own norm. Own rows go to the children,
    and in the next turn those of the Grad that has depth left.
    """
    trainer, sinks, tell = make_lone(folder, children, grad_weight=2.0)
    trainer._turns = itertools.count(turn)
    network, asked, late = trainer.network, draw(1, 3), draw(2, 5)
    pulls, forwards = [1e15 * draw(3, 3, WIDTH), draw(4, 5, WIDTH)], []
    network.local.register_forward_hook(lambda _, x, __: forwards.append(x[0]))
    for content in (('Spike', (9, 1), 9, asked, 0), ('Grad', (9, 1), 9, asked,
                                                     pulls[0], 0, 1),
                    ('Grad', (9, 0), 9, late, pulls[1], 0, 0))[::order]:
        tell(*content)
    trainer.step()
    assert [len(x) for x in forwards] == [4 + 3 + 5]
    (x, y), = trainer.batches.taken
    synthetic = trainer.student or (lambda x: None)
    expected, sent, norm = alone(network, x, synthetic(x), y, dropout=True)
    sent = {4: sent}
    for rows, pull in zip((asked, late), pulls):
        own, there, of_grad = alone(network, rows, synthetic(rows), pull=pull)
        factor = 2.0 * norm / of_grad
        expected = expected + factor * own
        sent[len(rows)] = factor * there if children else None
    assert_close(grads(network), expected)
    answer, = sinks[9].take('Answer')
    assert_close(answer.value,
                 normal(network(asked, synthetic(asked))).detach())
    for position, child in enumerate(children):
        grad, = sinks[child].take('Grad')
        source = [x, asked][turn]
        order = [int((source == row).all(1).nonzero()) for row in grad.x]
        assert sorted(order) == list(range(len(source)))
        assert_close(grad.gradient, sent[len(source)][order, position])


@asynchronous
@pytest.mark.parametrize('share, rows', [(1.0, 4), (0.5, 2), (0.3, 2),
                                         (0.01, 1)])
def test_rows_with_the_largest_gradients_are_sent(folder, share, rows, still):
    trainer, sinks, _ = make_lone(folder, share=share)
    trainer.step()
    (x, y), = trainer.batches.taken
    _, sent, _ = alone(trainer.network, x, trainer.student(x), y)
    largest = sent.flatten(1).norm(dim=1).topk(rows).indices.tolist()
    spike, grad = sinks[0].messages
    assert torch.equal(spike.x, grad.x)
    found = [int((x == row).all(1).nonzero()) for row in grad.x]
    assert sorted(found) == sorted(largest)
    assert_close(grad.gradient, sent[found, 0])


@asynchronous
def test_many_machs_lean_on_their_children(folder, still, monkeypatch):
    """Two of four own rows lack h and half of the inputs, which count twice."""
    drawn, owner = [], conftest.load(folder).trainer
    monkeypatch.setattr(owner,
                        'drop_parts',
                        lambda *given, then=owner.drop_parts: drawn.append(
                            then(*given)) or drawn[-1])
    trainer, sinks, tell = make_lone(folder, (0, 1), k=10, alone=1.0)
    told = draw(8, 4, WIDTH)
    tell('Grad', (9, 1), 9, draw(1), told, 0, 0)
    tell('Spike', (9, 2), 9, draw(2), 0)
    trainer.step()
    (x, y), = trainer.batches.taken
    whole = trainer.network.local_part(x), trainer.student(x)
    (h, inputs), = drawn
    assert not h[:2].any() and torch.equal(h[2:4], whole[0][2:])
    assert torch.equal(inputs[2:4], whole[1][2:])
    times = (inputs[:2] / whole[1][:2]).round(decimals=6)
    assert set(times.unique().tolist()) <= {0.0, 2.0}
    others = torch.cat([draw(2), draw(1)])  # of the Spike, of the Grad
    assert_close(h[4:], trainer.network.local_part(others))
    grad, = sinks[0].take('Grad')
    assert len(grad.x) == 3, 'it sends fewer of four rows'
    for k, share in (5, 0.0), (10, 0.1), (1000, 0.199):
        one, *_ = make_lone(folder, k=k, alone=0.2)
        assert one._alone == pytest.approx(share)


@asynchronous
@pytest.mark.parametrize('grad_depth', [1, 2])
def test_labels_count_over_two_edges(folder, grad_depth):
    """If Grads go on, the labels of MACH 2 change the child of its child."""

    def last(shift):
        run = make_all(folder, [[], [0], [1]], grad_depth=grad_depth, k=9)
        run.trainers[2].batches.shift = shift
        for trainer in 3 * run.trainers:  # 2 sends, 1 sends on, 0 applies
            trainer.step()
        return [weights(network) for network in run.networks]

    same = [torch.equal(*both) for both in zip(last(0), last(1))]
    assert same == [grad_depth == 1, False, False]


@asynchronous
@pytest.mark.parametrize('k, grad_depth, rows', [(5, 2, 10), (10, 2, 7),
                                                 (10, 1, 10), (1000, 2, 6)])
def test_with_many_machs_a_grad_that_may_go_on_has_fewer_rows(
        folder, k, grad_depth, rows):
    names = dict(k=k, grad_depth=grad_depth, share=0.25, alone=0.0)
    trainer, sinks, _ = make_lone(folder, **names)
    trainer.batches = conftest.Batches(7, 40)
    trainer.step()
    grad, = sinks[0].take('Grad')
    assert len(grad.x) == rows


@asynchronous
def test_a_finished_mach_goes_on_in_turn(folder):
    trainer, sinks, tell = make_lone(folder, steps=1)
    tell('Grad', (9, 1), 9, draw(1), draw(2, 4, WIDTH), 0, 1)
    trainer.step()
    for i in range(4):
        tell('Answer', (5, i), 0, draw(3, 4, WIDTH), 0, 1)
        trainer.serve(0.0)
    depths = [grad.depth for grad in sinks[0].take('Grad')]
    assert depths == [1, 0, 1, 0, 1]


@asynchronous
@pytest.mark.parametrize('k', [3, 4])
def test_spikes_about_any_rows(folder, k):
    """In every third step, the first too, if all others are its children."""
    trainer, sinks, tell = make_lone(folder, (0, 1), k=k, any_rows_every=3)
    tell('Grad', (9, 1), 9, draw(1), draw(8, 4, WIDTH), 0, 0)
    tell('Spike', (9, 2), 9, draw(2), 0)
    for step in range(4):
        trainer.step()
        x = trainer.batches.taken[-1][0]
        (spike,), (grad,) = sinks[0].take('Spike'), sinks[0].take('Grad')
        assert (spike.key == grad.key) == (k > 3 or step % 3 > 0)
        assert torch.equal(grad.x.sort(0).values, x.sort(0).values)
        if step == 0:
            seen = torch.cat([x, draw(1), draw(2)])
            assert all((seen == row).all(1).any() for row in spike.x)
            own = [bool((x == row).all(1).any()) for row in spike.x]
            assert all(own) == (k > 3)
    answer, = sinks[9].take('Answer')
    assert answer.key == (9, 2)


@asynchronous
def test_parts_are_dropped_by_the_seeds(folder):
    drop_parts = conftest.load(folder).trainer.drop_parts
    h, inputs = draw(1, 900), draw(2, 900, 15).view(900, 3, 5)
    _, found = drop_parts(h, inputs, 800, 3, 1, 7)
    kept = found[:800].any(2)
    assert abs(kept.double().mean() - 0.5) < 0.05
    assert torch.equal(found[:800], 2 * inputs[:800] * kept.unsqueeze(2))
    for seeds in ((3, 1, 7), (4, 1, 7), (3, 2, 7), (3, 1, 8)):
        again = drop_parts(h, inputs, 800, *seeds)[1]
        assert torch.equal(again, found) == (seeds == (3, 1, 7))


@asynchronous
def test_lessons(folder, still):
    """A student learns the slices of the children that have answered."""
    trainer, sinks, tell = make_lone(folder, (0, 1))
    trainer.step()
    tell('Spike', (9, 1), 9, draw(1), 1)
    trainer.serve(0.0)  # relays it
    own, relayed = sinks[0].take('Spike')
    told, expected = draw(2, 4, WIDTH), 0.0
    for spike, child in ((own, 0), (own, 1), (relayed, 1)):
        tell('Answer', spike.key, child, told, 0, spike.depth)
        distance = trainer.student(spike.x)[:, child] - told
        expected += distance.square().sum() / 4 / 2
    trainer.step()
    assert_close(grads(trainer.student), gradient(expected, [trainer.student]))


@asynchronous
def test_a_student_without_lessons_keeps_its_weights(folder):
    trainer, _, _ = make_lone(folder)
    before = weights(trainer.network), weights(trainer.student)
    for _ in range(3):
        trainer.step()
    assert not torch.equal(weights(trainer.network), before[0])
    assert torch.equal(weights(trainer.student), before[1])


@all_folders
@pytest.mark.parametrize('where, name', [('cross_entropy', 'target loss'),
                                         ('synthetic_loss', 'synthetic loss')])
def test_a_loss_that_is_not_finite_raises(folder, where, name, monkeypatch):
    """Nothing is applied; nothing is sent if it is the target loss."""
    sent = []
    run = make_all(folder, sent=sent, depth=1)  # no Spike to relay
    for trainer in 2 * run.trainers:
        trainer.step()
    trainer = run.trainers[len(run.trainers) // 2]  # it has a parent
    owner = functional if 'cross' in where else conftest.load(folder).student
    before, count = weights(*run.networks, *run.students), len(sent)
    loss = getattr(owner, where)
    monkeypatch.setattr(owner, where, lambda *a, **b: math.inf * loss(*a, **b))
    with pytest.raises(FloatingPointError, match=name):
        trainer.step()
    assert torch.equal(weights(*run.networks, *run.students), before)
    assert trainer.steps_taken == 2
    assert 'synthetic' in where or len(sent) == count


@all_folders
@pytest.mark.parametrize('warmup', [0.0, 0.1, 0.5, 0.999])
def test_the_learning_rates_have_one_cycle_that_ends_at_0(folder, warmup):
    for steps in (*range(1, 41), 2500):
        settings = conftest.make_settings(steps=steps, warmup=warmup)
        optimiser, schedule = conftest.load(folder).trainer.make_optimiser(
            [torch.nn.Linear(1, 1)], [torch.nn.Linear(1, 1)], settings)
        network, student = optimiser.param_groups
        rates = []
        for _ in range(steps):
            assert network['lr'] == student['lr']
            rates.append(network['lr'])
            optimiser.step()
            schedule.step()
        assert network['lr'] == student['lr'] == 0
        assert 0 < min(rates) and max(rates) <= 0.05
        if steps > 9:
            assert max(rates) > 0.045
            peak = max(1, warmup * (steps + 1) - 1)
            assert abs(rates.index(max(rates)) - peak) < 1
    assert (network['weight_decay'], student['weight_decay']) == (0.01, 0)


@asynchronous
def test_a_finished_mach_teaches_until_its_children_finish(folder):
    """No parameter of it changes, bit for bit."""
    clock = conftest.Clock()
    trainer, sinks, tell = make_lone(folder, (0, 1),
                                     clock,
                                     steps=2,
                                     deadline=4.0)
    trainer.step()
    trainer.step()
    before = weights(trainer.network, trainer.student)

    def serve(*versions):
        """The children answer; returns how many Grads each gets."""
        for child, version in enumerate(versions):
            spike = sinks[child].take('Spike')[-1]
            tell('Answer', spike.key, child, draw(1, 4, WIDTH), version, 1)
        trainer.serve(0.0)
        return [len(sinks[child].take('Grad')) for child in (0, 1)]

    assert serve() == [3, 3], 'from two steps, and then as a finished MACH'
    tell('Grad', (9, 1), 9, draw(1), draw(2, 4, WIDTH), 2, 1)
    tell('Spike', (9, 2), 9, draw(1), 0)
    assert serve(1, 2) == [1, 0]
    assert [one.version for one in sinks[9].take('Answer')] == [2]
    assert serve() == [0, 0], 'the child has not answered yet'
    clock.now += 4
    assert serve() == [1, 0], 'the answer may be lost'
    assert serve(2, 2) == [0, 0]
    clock.now += 4
    assert serve() == [0, 0] and not sinks[0].take('Spike')
    assert torch.equal(weights(trainer.network, trainer.student), before)
    assert trainer.steps_taken == 2


@multiple
def test_dropout_is_drawn_by_seed_index_and_step(folder, monkeypatch):
    drop, h, seen = conftest.load(folder).trainer.drop, draw(1, 300), []

    def dropped(seed, *more):
        settings = conftest.make_settings(seed=seed, dropout=0.4)
        return drop(h, 200, settings, *more)

    found = dropped(3, 1, 7)
    kept = found[:200] != 0
    assert torch.equal(found[200:], h[200:]), 'rows of other MACHs'
    assert torch.allclose(found[:200], kept * h[:200] / 0.6)
    assert abs(kept.double().mean() - 0.6) < 0.05
    for seeds in ((3, 1, 7), (4, 1, 7), (3, 2, 7), (3, 1, 8)):
        assert torch.equal(dropped(*seeds), found) == (seeds == (3, 1, 7))
    conftest.patch_trainers(
        monkeypatch, 'drop', lambda h, own, _, *seeds:
        (own and seen.append(seeds), h)[1])
    count = len(run_all(folder, steps=2).networks)
    assert seen == [(i, step) for step in (0, 1) for i in range(count)]


@all_folders
def test_a_step_neither_uses_nor_touches_global_random_state(folder):
    """Two threads at once take the same steps, to the bit."""
    runs = [make_all(folder, dropout=0.5) for _ in range(2)]
    before = torch.get_rng_state(), random.getstate()

    def train(run):
        for trainer in 4 * run.trainers:
            trainer.step()
        return weights(*run.networks, *run.students)

    with futures.ThreadPoolExecutor(2) as pool:
        assert torch.equal(*pool.map(train, runs))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def run_threads(folder, trainers, monkeypatch):
    """Runs `work` of main.py on threads until all have taken 10 steps."""
    main, found = conftest.load_main(folder), {}
    monkeypatch.setattr(main, 'TURNS', main.Turns(2))
    halt, events = threading.Event(), queue.Queue()
    for one in trainers:
        threading.Thread(target=main.work,
                         daemon=True,
                         args=(one, one.settings, events, halt)).start()
    while sum(one.ended for one in found.values()) < len(trainers):
        found |= events.get(timeout=60)[1]  # raises if they hang
        if sum(one.tally.steps == 10 for one in found.values()) == 3:
            halt.set()
    assert not any(one.failed for one in found.values())


@asynchronous
def test_cycles_cannot_deadlock(folder, monkeypatch):
    """Each MACH waits for the others without limit, and all answers come."""
    run = make_all(folder, conftest.GRAPHS['cycle'], inputs='real', steps=10)
    answers = []
    for one in run.trainers:
        one.learn = lambda own, y, one=one, learn=one.learn: (
            one.finished or answers.append(len(own.answers)), learn(own, y))
    run_threads(folder, run.trainers, monkeypatch)
    assert answers == 30 * [2]


@asynchronous
@both_inputs
def test_only_its_own_thread_touches_a_mach(folder, inputs, monkeypatch):
    """Its forward, its backward, its optimiser, and its snapshots."""
    run = make_all(folder, conftest.GRAPHS['cycle'], inputs=inputs, steps=10)
    threads = collections.defaultdict(set)
    for one in run.trainers:

        def note(*_, i=one.index):
            threads[i].add(threading.get_ident())

        one._optimiser.register_step_pre_hook(note)
        for module in (one.network.local, one.network.head, one.student):
            module.register_forward_pre_hook(note)
            for p in module.parameters():
                p.register_post_accumulate_grad_hook(note)
        one.snapshot = lambda *a, note=note, snapshot=one.snapshot, **b: (note(
        ), snapshot(*a, **b))[1]
    run_threads(folder, run.trainers, monkeypatch)
    assert [len(threads[i]) for i in range(3)] == [1, 1, 1]
    assert len(set.union(*threads.values(), {threading.get_ident()})) == 4


@all_folders
def test_a_snapshot_never_changes(folder):
    run, snapshots = run_all(folder, steps=1), {}
    for trainer in run.trainers:
        snapshots |= trainer.snapshot()
        for counts in trainer.snapshot(False).values():
            assert (counts.network, counts.student) == (None, None)
    assert list(snapshots) == list(range(len(run.networks)))
    _, networks, students, *_ = zip(*snapshots.values())
    before = weights(*run.networks, *run.students)
    for _ in range(2):
        assert torch.equal(weights(*networks, *students), before)
        for trainer in run.trainers:
            trainer.step()
    assert not torch.equal(weights(*run.networks, *run.students), before)
    assert all(one.tally.steps == 1 for one in snapshots.values())


class Growing(dict):
    """A dict that gets a key while it is read, as from another thread."""

    def items(self):
        for item in super().items():
            self[-len(self)] = [0, 0]
            yield item


@pytest.mark.parametrize('folder', conftest.ASYNCHRONOUS)
def test_counts_may_be_copied_while_they_change(folder):
    trainer, *_ = conftest.make_lone(folder)
    trainer.tally.grads = Growing({1: [3, 4]})
    assert trainer.snapshot(networks=False)[5].tally.grads == {1: [3, 4]}
