"""What must hold of the trainers: the invariants, whatever the timing.

No test looks at a real clock: seconds pass when the test says so.
"""

import collections
import math
import queue
import signal
import threading
import types

import conftest
import pytest
import torch
from torch.nn import functional

from mach import metrics

FOLDERS = conftest.SYNCHRONOUS + conftest.ASYNCHRONOUS
GRAPHS = {  # the children of each MACH
    'chain': [[], [0], [1], [2]],
    'diamond': [[], [0], [0, 1], [1, 2]],
    'full': [[], [0], [0, 1], [0, 1, 2]],
    'cycle': [[1, 2], [0, 2], [0, 1]],
}
COMPLETE = GRAPHS['cycle']
E = 6  # width of an embedding
RATES = dict(learning_rate=0.3, student_learning_rate=0.3)

all_folders = pytest.mark.parametrize('folder', FOLDERS)
asynchronous = pytest.mark.parametrize('folder', conftest.ASYNCHRONOUS)
synchronous = pytest.mark.parametrize('folder', conftest.SYNCHRONOUS[1:])
both_inputs = pytest.mark.parametrize('inputs', ['synthetic', 'real'])


@pytest.fixture(autouse=True)
def _no_test_hangs():
    """Whoever waits for ever where nobody should wait at all fails."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail('it hangs'))
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(name='still')
def _still(monkeypatch):
    """Optimisers that leave the parameters and let their grads add up."""
    for folder in FOLDERS:
        monkeypatch.setattr(
            conftest.load(folder).trainer, 'Optimiser', conftest.Still)


@pytest.fixture(name='tripled')
def _tripled(monkeypatch):
    """Dropout of 0.5 that leaves nothing to chance: it triples its rows."""
    monkeypatch.setattr(functional, 'dropout', lambda rows, p:
                        (1 + 4 * p) * rows)


class Descend:
    """Plain gradient descent."""

    def __init__(self, network, peak, *_, **__):
        self._parameters, self._rate = list(network.parameters()), peak

    @torch.no_grad()
    def step(self):
        """Applies the gradients, then drops them."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter -= self._rate * parameter.grad
                parameter.grad = None


class Clock:
    """Seconds that pass when the test says so, or while somebody waits."""
    now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        """In place of a condition's: takes as long as it may."""
        self.now += seconds


def never_wait(seconds):
    """In place of a condition's."""
    raise AssertionError(f'it waits, up to {seconds} s')


class Sink:
    """A link that leads to the test."""
    lost = dropped = 0

    def __init__(self):
        self.messages = []

    def send(self, message):
        self.messages.append(message)

    def take(self, kind):
        """All messages of one kind, by its name, since the last call."""
        taken = [m for m in self.messages if type(m).__name__ == kind]
        self.messages = [m for m in self.messages if type(m).__name__ != kind]
        return taken


def tensors(message):
    return [value for value in vars(message).values() if torch.is_tensor(value)]


def record(link, sent):
    """Has a link keep each message and what it said when it was sent."""
    send = link.send
    link.send = lambda message: (sent.append(
        (message, [t.clone() for t in tensors(message)])), send(message))
    return link


def random(seed, rows, width):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def random_x(seed, rows=4):
    return random(seed, rows, conftest.PIXELS)


def random_d(seed, rows=4):
    return random(seed, rows, E)


def make_networks(folder, children):
    """Of each MACH its network and its student (None without children)."""
    modules, made = conftest.load(folder), []
    torch.manual_seed(3)
    for own in children:
        mach = modules.model.Mach(len(own), 8, E, conftest.PIXELS).double()
        student = None
        if own:
            student = modules.student.Student(len(own), 7, E,
                                              conftest.PIXELS).double()
        made.append((mach, student))
    return made


def make_lone(folder, children=(0,), clock=lambda: 0.0, **names):
    """MACH 5, whose neighbours are the test: its trainer, each one's Sink.

    Its `tell(kind, *content)` puts a message into its mailbox.
    """
    modules = conftest.load(folder)
    (mach, student), = make_networks(folder, [children])
    trainer = modules.trainer.Trainer(5, mach, student, list(children),
                                      conftest.Batches(7),
                                      conftest.make_settings(**names))
    trainer.mailbox.clock = clock
    trainer.links = {i: Sink() for i in (*children, 9)}
    trainer.tell = lambda kind, *content: trainer.mailbox.put(
        getattr(modules.link, kind)(*content))
    return trainer, trainer.links


def make_many(folder,
              children,
              clock=lambda: 0.0,
              loss=0.0,
              sent=None,
              **names):
    """One trainer for each MACH, connected; nothing runs yet."""
    modules, settings = conftest.load(folder), conftest.make_settings(**names)
    made = [
        modules.trainer.Trainer(i, *networks, children[i],
                                conftest.Batches(100 + i), settings)
        for i, networks in enumerate(make_networks(folder, children))
    ]
    for one in made:
        one.mailbox.clock = clock
        for child in one.children:
            for i, j in ((one.index, child), (child, one.index)):
                out = modules.link.Link(made[j].mailbox, settings.latency,
                                        settings.jitter, loss, f'{i} {j}')
                made[i].links[j] = record(out, [] if sent is None else sent)
    return made


def make_all(folder, graph=None, shared=False, **names):
    """A whole experiment: trainers, machs, students, children and batches."""
    children = graph or (COMPLETE if 'kgraph' in folder else GRAPHS['chain'])
    if folder in conftest.ASYNCHRONOUS:
        trainers = make_many(folder, children, **names)
        networks = [(one.mach, one.student) for one in trainers]
        batches = [one.batches for one in trainers]
    else:
        single = folder == 'synchronous_single'
        networks = make_networks(folder, [[]] if single else children)
        batches = [
            conftest.Batches(20 + i)
            for i in range(1 if shared else len(networks))
        ]
        machs, students = map(list, zip(*networks))
        given = machs, students, children, batches
        if single:  # its student is of the MACH itself
            networks = [(machs[0], make_networks(folder, [[0]])[0][1])]
            given = *networks[0], batches[0]
        trainers = [
            conftest.load(folder).trainer.Trainer(
                *given, conftest.make_settings(**names))
        ]
    machs, students = zip(*networks)
    return types.SimpleNamespace(trainers=trainers,
                                 machs=machs,
                                 students=students,
                                 learners=[s for s in students if s],
                                 children=children,
                                 batches=batches)


def take_step(one, trainers):
    """One step of it; whenever it waits, the others serve."""

    def serve():
        for _ in range(2):
            for other in reversed(trainers):
                if other is not one:
                    other.serve(0.0)

    one.step(serve)


def held(trainer):
    """Name of each container of a trainer -> how much it holds."""
    sizes = {
        name: len(value)
        for name, value in vars(trainer).items()
        if isinstance(value, dict) and name not in ('links', '_recent')
    }
    assert {'_asked', '_lessons', '_served', '_relayed'} <= set(sizes)
    for (kind, *where), recent in trainer._recent.items():
        sizes[kind.__name__, *where] = len(recent.new())
    return sizes | {'mailbox': len(trainer.mailbox._messages)}


def snapshot(*networks):
    """All parameters as they are now, in one vector."""
    return torch.cat([
        p.detach().flatten().clone() for network in networks if network
        for p in network.parameters()
    ])


def grads(*networks):
    """What has arrived in `grad` of all parameters; zeros where nothing has."""
    return torch.cat([
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
        for network in networks if network for p in network.parameters()
    ])


def assert_close(found, expected):
    assert expected.norm() > 0
    assert (found - expected).norm() / expected.norm() < 1e-10


def entropy(mach, d, y):
    return functional.cross_entropy(mach.head(d), y, label_smoothing=0.1)


def gradient(root, networks, pull=None):
    """Autograd's gradient of all parameters, in one vector."""
    parameters = [p for network in networks for p in network.parameters()]
    found = torch.autograd.grad(root,
                                parameters,
                                pull,
                                retain_graph=True,
                                allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                      for p, g in zip(parameters, found)])


def alone(mach, x, inputs, y=None, pull=None, dropout=False):
    """One x by itself: d(x), the gradients of the MACH and of its inputs."""
    local = mach.local_part(x) * (3 if dropout else 1)
    if inputs is not None:
        inputs = inputs.detach().clone().requires_grad_()
    d = torch.relu(local + mach.joined_part(inputs))
    root = d if y is None else entropy(mach, d, y)
    sent = None
    if inputs is not None:
        sent, = torch.autograd.grad(root, inputs, pull, retain_graph=True)
    return d.detach(), gradient(root, [mach], pull), sent


def weighed(trainer, own_x, y, pull, dropout=False):
    """A Grad as its receiver scales it, by the norms of its rows."""
    inputs = trainer.student and trainer.student(own_x).detach()
    local = trainer.mach.local_part(own_x) * (3 if dropout else 1)
    d = torch.relu(local + trainer.mach.joined_part(inputs)).detach()
    own, = torch.autograd.grad(entropy(trainer.mach, d.requires_grad_(), y), d)
    size = lambda rows: rows.norm(dim=1).sum()
    return trainer.settings.grad_weight * size(own) / size(pull) * pull


def visible(d, pull):
    """Of a pull at d(x) what parents can mean: they see no scale, no offset."""
    basis, _ = torch.linalg.qr(torch.stack([torch.ones_like(d), d], -1))
    return pull - (basis @ (basis.mT @ pull.unsqueeze(-1))).squeeze(-1)


def inputs_of(run, i, x, depth):
    """Those of MACH i, real if depth > 0, composed; None without children."""
    if not run.children[i]:
        return None
    if depth == 0:
        return run.students[i](x).detach()
    return torch.stack(
        [embed(run, child, x, depth - 1) for child in run.children[i]], 1)


def embed(run, i, x, depth):
    """d_i(x), real down to `depth`, as one composed function."""
    return run.machs[i](x, inputs_of(run, i, x, depth))


# ------------------------------- it is backpropagation when nothing is late


def assert_backpropagation(run, depth):
    total = 0.0
    for i, mach in enumerate(run.machs):
        x, y = run.batches[i % len(run.batches)].taken[0]
        total += entropy(mach, embed(run, i, x, depth), y)
    assert_close(grads(*run.machs), gradient(total, run.machs))


@asynchronous
@pytest.mark.parametrize('graph', ['chain', 'diamond', 'full'])
def test_backpropagation_over_links(folder, graph, still):
    run = make_all(folder, GRAPHS[graph], inputs='real', depth=3)
    for one in reversed(run.trainers):  # parents first: no Grad is late
        take_step(one, run.trainers)
        assert one.tally.dropped == 0
    assert_backpropagation(run, 3)


@synchronous
@pytest.mark.parametrize('graph', GRAPHS)
@pytest.mark.parametrize('depth', [1, 3])
@pytest.mark.parametrize('shared', [True, False])
def test_backpropagation_in_lockstep(folder, graph, depth, shared, still):
    """At delay 0, through cycles unrolled to `depth`."""
    run = make_all(folder, GRAPHS[graph], shared, inputs='real', depth=depth)
    run.trainers[0].step()
    assert_backpropagation(run, depth)


# ---------------------------------------------- lockstep: the delay is exact


@torch.no_grad()
def descend(network, gradients):
    for p in network.parameters():
        p -= 0.3 * gradients[:p.numel()].view_as(p)
        gradients = gradients[p.numel():]


def replay(run, settings, step, flying):
    """One step of MACHs by plain descent, one message at a time."""
    batches = [batches.next() for batches in run.batches]
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
        _, own, sent = alone(run.machs[i], x, inputs, y, pull, pull is None)
        totals[run.machs[i]] = totals.get(run.machs[i], 0.0) + own
        for position, child in enumerate(run.children[i] if depth else ()):
            grad = sent[:, position]
            if pull is None:
                grad = settings.grad_weight * grad
            (flying if settings.delay else due).append(
                (step + settings.delay, child, x, depth - 1, None, grad))
    for network, gradients in totals.items():
        descend(network, gradients)


@synchronous
@both_inputs
@pytest.mark.parametrize('delay', [0, 1, 3])
@pytest.mark.parametrize('depth', [0, 2])
@pytest.mark.parametrize('shared', [True, False])
def test_each_grad_is_applied_delay_steps_later(folder, inputs, delay, depth,
                                                shared, monkeypatch, tripled):
    """With the parameters of that later step, as are its inputs.

    Own rows alone have dropout; `grad_weight` is of the first edge alone.
    """
    monkeypatch.setattr(conftest.load(folder).trainer, 'Optimiser', Descend)
    names = dict(inputs=inputs, delay=delay, depth=depth, dropout=0.5)
    names |= RATES | dict(grad_weight=2.0)
    run, twin = (make_all(folder, shared=shared, **names) for _ in range(2))
    settings, flying = conftest.make_settings(**names), []
    for step in range(2 * delay + 2):
        run.trainers[0].step()
        replay(twin, settings, step, flying)
        assert_close(snapshot(*run.machs), snapshot(*twin.machs))
        assert_close(snapshot(*run.students), snapshot(*twin.students))
        parents = set(sum(run.children, [])) if depth else ()
        for i, tally in enumerate(run.trainers[0].tallies):
            late = delay if i in parents and step >= delay else math.nan
            assert tally.staleness == pytest.approx(late, nan_ok=True)
            assert tally.staleness_max == (late if late > 0 else 0)


@pytest.mark.parametrize('delay', [0, 1, 3])
def test_single_applies_each_grad_delay_steps_later(delay, monkeypatch):
    folder = 'synchronous_single'
    monkeypatch.setattr(conftest.load(folder).trainer, 'Optimiser', Descend)
    run = make_all(folder, delay=delay, **RATES)
    twin = make_all(folder)
    mach, student = twin.machs[0], twin.students[0]
    flying, trainer = [], run.trainers[0]
    for step in range(7):
        trainer.step()
        x, y = run.batches[0].taken[-1]
        d = mach(x).detach().requires_grad_()
        loss = entropy(mach, d, y)
        total = gradient(loss, [mach])  # the head's
        flying.append((x, torch.autograd.grad(loss, d)[0]))
        if step >= delay:
            late, pull = flying[step - delay]
            total += gradient(mach(late), [mach], pull)
            assert trainer.tallies[0].staleness == delay
        distance = (student(x) - d.detach().unsqueeze(1)).square()
        lesson = gradient(distance.sum() / len(x), [student])
        descend(mach, total)
        descend(student, lesson)
        assert_close(snapshot(*run.machs), snapshot(mach))
        assert_close(snapshot(*run.students), snapshot(student))


@synchronous
@pytest.mark.parametrize('shared, flying', [(True, 1), (False, 2)])
def test_grads_of_several_parents_about_one_x_are_one(folder, shared, flying):
    trainer, = make_all(folder, COMPLETE, shared, delay=1).trainers
    trainer.step()
    assert [len(rows) for rows in trainer._grads] == [flying] * 3


@pytest.mark.parametrize('folder', conftest.SYNCHRONOUS)
def test_the_same_seed_gives_the_same_bits(folder):
    found = []
    for seed in (5, 5, 6):
        run = make_all(folder, delay=2, dropout=0.5)
        torch.manual_seed(seed)
        for _ in range(5):
            run.trainers[0].step()
        found.append(snapshot(*run.machs, *run.students))
    assert torch.equal(found[0], found[1])
    if folder != 'synchronous_single':  # it has no dropout
        assert not torch.equal(found[0], found[2])


# ------------------------------------------------------- losses in their lane


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
        found.append((grads(*run.machs), grads(*run.learners)))
    (target, synthetic), *scaled = found
    assert target.norm() > 0 and synthetic.norm() > 0
    for (one, other), factors in zip(scaled, ((1, 8), (8, 1))):
        assert torch.equal(one, factors[0] * target)
        assert torch.equal(other, factors[1] * synthetic)


@all_folders
@pytest.mark.parametrize('still_one', ['machs', 'learners'])
def test_no_optimiser_leaves_its_lane(folder, still_one):
    rate = dict(machs='learning_rate', learners='student_learning_rate')
    before = run_all(folder, steps=0)
    run = run_all(folder, **{rate[still_one]: 0.0})
    for name in rate:
        same = torch.equal(snapshot(*getattr(before, name)),
                           snapshot(*getattr(run, name)))
        assert same == (name == still_one)


@pytest.mark.parametrize('folder', FOLDERS[1:])
@pytest.mark.parametrize('depth', [0, 1])
def test_labels_of_others_reach_a_mach_by_grads_alone(folder, depth, still):
    found = []
    for change in (0, 1):
        run = make_all(folder, depth=depth)
        last = run.batches[-1]
        drawn = [last.next() for _ in range(2)]
        last.next = iter([(x, (y + change) % 10) for x, y in drawn]).__next__
        for trainer in 2 * run.trainers:
            trainer.step()
        found.append([grads(mach) for mach in run.machs])
    changed = {
        i for i, (one, other) in enumerate(zip(*found))
        if not torch.equal(one, other)
    }
    last = len(run.machs) - 1
    assert changed == {last, *(run.children[-1] if depth else ())}


# ------------------------------------------------------ fused equals separate


@asynchronous
@pytest.mark.parametrize('children', [(), (0,), (0, 1)])
@pytest.mark.parametrize('order', [1, -1])
def test_fused_equals_separate(folder, children, order, still, tripled):
    """Own rows, a Spike, a Grad about its x, and one about another: one pass.

    Own rows alone have dropout, whether or not there are children.
    """
    trainer, sinks = make_lone(folder, children, dropout=0.5, grad_weight=2.0)
    mach, asked, late = trainer.mach, random_x(1, 3), random_x(2, 5)
    synthetic = trainer.student or (lambda x: None)
    pulls, forwards = [
        visible(mach(x, synthetic(x)).detach(), random_d(3, len(x)))
        for x in (asked, late)
    ], []
    mach.local.register_forward_hook(lambda _, x, __: forwards.append(x[0]))
    for content in (('Spike', (9, 1), 9, asked, 0), ('Grad', (9, 1), 9, asked,
                                                     pulls[0], 0, 1),
                    ('Grad', (9, 0), 9, late, pulls[1], 0, 0))[::order]:
        trainer.tell(*content)
    trainer.step()
    assert [len(x) for x in forwards] == [4 + 3 + 5]
    x, y = trainer.batches.taken[0]
    pulls = [weighed(trainer, x, y, pull, True) for pull in pulls]
    parts = [
        alone(mach, x, synthetic(x), y, dropout=True),
        alone(mach, asked, synthetic(asked), pull=pulls[0]),
        alone(mach, late, synthetic(late), pull=pulls[1])
    ]
    assert_close(grads(mach), sum(own for _, own, _ in parts))
    answer, = sinks[9].take('Answer')
    assert_close(answer.embedding, parts[1][0])
    for position, child in enumerate(children):
        sent = {len(grad.x): grad for grad in sinks[child].take('Grad')}
        assert set(sent) == {4, 3}, 'own and the one with depth left go on'
        order = [int((x == row).all(1).nonzero()) for row in sent[4].x]
        assert sorted(order) == [0, 1, 2, 3]
        assert_close(sent[4].gradient, parts[0][2][order, position])
        assert_close(sent[3].gradient, parts[1][2][:, position])


# ---------------------------------------------------------------- nobody waits


@asynchronous
def test_an_unlocked_parent_never_waits(folder):
    """Its steps are the same in every bit whatever becomes of its child."""
    found = {}
    for state in ('stopped', 'dead', 'full', 'far'):
        latency = 1.0 if state == 'far' else 0.0
        child, parent = make_many(folder, [[], [0]], latency=latency)
        if state == 'dead':
            parent.links[0] = Sink()
        if state == 'full':
            child.mailbox.limit = 1
        parent.mailbox._arrival.wait = never_wait
        found[state] = []
        for _ in range(6):
            parent.step()
            found[state].append(snapshot(parent.mach, parent.student))
            if state == 'far':
                child.step()
        assert parent.steps_taken == 6
    assert not torch.equal(found['stopped'][0], found['stopped'][1])
    for steps in found.values():
        assert all(map(torch.equal, steps, found['stopped']))


@asynchronous
def test_an_unlocked_relay_never_waits(folder):
    """A Spike with depth left stays open while the child is silent."""
    trainer, sinks = make_lone(folder)
    trainer.mailbox._arrival.wait = never_wait
    trainer.tell('Spike', (9, 1), 9, random_x(1), 1)
    trainer.step()
    trainer.serve(0.0)
    assert not sinks[9].messages and trainer.steps_taken == 1


@asynchronous
@pytest.mark.parametrize('answering', [(), (0,), (1,)])
def test_a_locked_parent_goes_on_at_the_deadline(folder, answering, still):
    """With synthetic inputs for those that are missing."""
    clock, told = Clock(), random_d(1)
    trainer, sinks = make_lone(folder, (0, 1),
                               clock,
                               inputs='real',
                               deadline=3.55)
    trainer.mailbox._arrival.wait = clock.wait

    def answer():
        for child in answering:
            for spike in sinks[child].take('Spike'):
                trainer.tell('Answer', spike.key, child, told, 2)
                trainer.tell('Answer', (5, -1), child, told,
                             3)  # seen, not used

    trainer.step(answer)
    assert clock.now == pytest.approx(3.55)
    x, y = trainer.batches.taken[0]
    inputs = trainer.student(x).detach()
    for child in answering:
        inputs[:, child] = told
    _, own, sent = alone(trainer.mach, x, inputs, y)
    assert_close(grads(trainer.mach), own)
    for child in (0, 1):
        grad, = sinks[child].take('Grad')
        assert_close(grad.gradient, sent[:, child])
        assert grad.version == (2 if child in answering else -1)


@asynchronous
@pytest.mark.parametrize('children, depth', [((), 1), ((0,), 0)])
def test_who_has_nothing_to_wait_for_does_not(folder, children, depth):
    trainer, _ = make_lone(folder, children, inputs='real', depth=depth)
    trainer.mailbox._arrival.wait = never_wait
    trainer.step(lambda: pytest.fail('it is about to wait'))


def run_threads(folder, trainers, monkeypatch, turns=1):
    """Runs `work` on threads that take turns, for ever if need be; the events."""
    main = conftest.load_main(folder)
    turns, halt, events = main.Turns(turns), threading.Event(), queue.Queue()
    patient = turns._change.wait_for
    turns._change.wait_for = lambda condition, _: patient(condition)
    monkeypatch.setattr(main, 'TURNS', turns)
    threads = [
        threading.Thread(target=main.work,
                         daemon=True,
                         args=(one, one.settings, events, halt))
        for one in trainers
    ]
    for thread in threads:
        thread.start()
    found, copies = [], len(trainers) * (trainers[0].settings.steps // 5)
    while len(found) < copies + len(trainers):
        found.append(events.get(timeout=60))  # raises if they hang
        assert found[-1][0] != 'failed', found[-1]
        if len(found) == copies:
            halt.set()
    for thread in threads:
        thread.join(60)
    return found


@asynchronous
@pytest.mark.parametrize('depth', [1, 2])
def test_cycles_cannot_deadlock(folder, depth, monkeypatch):
    """All wait for each other for ever, and all answers come."""
    trainers = make_many(folder, COMPLETE, inputs='real', depth=depth, steps=5)
    answered = []
    for one in trainers:
        one.learn = lambda own, y, one=one, learn=one.learn: (
            one.finished or answered.append(sorted(own.answers)), learn(own, y))
    run_threads(folder, trainers, monkeypatch)
    assert answered == 15 * [[0, 1]]


# ------------------------------------------------------------------- one owner


@asynchronous
@both_inputs
def test_only_its_own_thread_touches_a_mach(folder, inputs, monkeypatch):
    trainers = make_many(folder,
                         COMPLETE,
                         inputs=inputs,
                         steps=10,
                         mailbox=9999)
    touched, owners = collections.defaultdict(set), {}

    def note(kind, index):
        touched[kind, index].add(threading.get_ident())

    def note_forward(module, _):
        if id(module) in owners:  # a copy has the hook, but is another
            note('forward', owners[id(module)])

    for one in trainers:
        for owner in (one._optimiser, one._student_optimiser):
            owner.step = lambda step=owner.step, i=one.index: (note('step', i),
                                                               step())
        for network in (one.mach, one.student):
            for module in network.modules():
                owners[id(module)] = one.index
                module.register_forward_pre_hook(note_forward)
            for p in network.parameters():
                p.register_post_accumulate_grad_hook(
                    lambda _, i=one.index: note('backward', i))
        one.copy = lambda networks=True, i=one.index, copy=one.copy: (note(
            'copy', i), copy(networks))[1]
    for kind, content in run_threads(folder, trainers, monkeypatch, turns=2):
        assert kind in ('copy', 'ended')
        for copy in content.values():
            copy.mach(random_x(1), copy.student(random_x(1)))
    kinds = ('forward', 'backward', 'step', 'copy')
    threads = [
        set.union(*(touched[kind, i] for kind in kinds)) for i in range(3)
    ]
    assert [len(own) for own in threads] == [1, 1, 1] and len(touched) == 12
    assert len(set.union(*threads, {threading.get_ident()})) == 4


@all_folders
def test_a_copy_is_the_readers_to_keep(folder):
    run = run_all(folder, steps=1)
    networks = [*run.machs, *run.learners]
    copies = {}
    for trainer in run.trainers:
        copies |= trainer.copy()
        assert not any(
            c.mach or c.student for c in trainer.copy(False).values())
    assert list(copies) == list(range(len(run.machs)))
    tallies, machs, students = zip(*copies.values())
    copied = [*machs, *(student for student in students if student)]
    before = snapshot(*networks)
    assert torch.equal(snapshot(*copied), before)
    for trainer in run.trainers:
        trainer.step()
    assert not torch.equal(snapshot(*networks), before)
    assert torch.equal(snapshot(*copied), before)
    assert [tally.steps for tally in tallies] == [1] * len(machs)
    before = snapshot(*networks)
    for network in copied:
        for p in network.parameters():
            p.data.zero_()
    assert torch.equal(snapshot(*networks), before)


# ----------------------------------------- messages never change, once sent


@asynchronous
@both_inputs
def test_a_message_never_changes_after_it_is_sent(folder, inputs):
    sent = []
    names = dict(inputs=inputs, dropout=0.2, share=0.5)
    trainers = make_many(folder, COMPLETE, sent=sent, **names)
    for _ in range(6):
        for one in trainers:
            take_step(one, trainers)
    assert {type(m).__name__ for m, _ in sent} == {'Spike', 'Answer', 'Grad'}
    live = {
        p.data_ptr()
        for one in trainers
        for network in (one.mach, one.student)
        for p in network.parameters()
    }
    for message, before in sent:
        assert all(map(torch.equal, tensors(message), before)), message
        for tensor in tensors(message):
            assert not tensor.requires_grad and tensor.data_ptr() not in live
        with pytest.raises(AttributeError):
            message.key = None


# ---------------------------------------------------------- memory is bounded


@asynchronous
@both_inputs
@pytest.mark.parametrize('kind, answered, dropped', [('Spike', 12, 0),
                                                     ('Relay', 8, 8),
                                                     ('Grad', 0, 8),
                                                     ('Answer', 0, 0)])
def test_a_flood_does_not_fill_the_memory(folder, inputs, kind, answered,
                                          dropped):
    """What goes is counted; Spikes that get no room are answered early."""
    x, d = random_x(1), random_d(2)
    trainer, sinks = make_lone(folder, mailbox=4, recent=4, inputs=inputs)

    def tell(i):
        trainer.tell(*dict(Spike=('Spike', (9, i), 9, x, 0),
                           Relay=('Spike', (9, i), 9, x, 2),
                           Grad=('Grad', (9, i), 9, x, d, 0, 1),
                           Answer=('Answer', (5, -i), 0, d, 0))[kind])

    for i in range(12):  # one at a time: none is lost on the way
        tell(i)
        trainer.serve(0.0)
        assert max(held(trainer).values()) <= 4
    if (kind, inputs) == ('Relay', 'real'):
        dropped += 4  # inputs kept for Grads that did not come
    assert trainer.tally.dropped == dropped
    assert len(sinks[9].take('Answer')) == answered
    for i in range(20):
        for j in range(6):
            tell(100 + 6 * i + j)
        trainer.learn(
            conftest.load(folder).trainer.Rows(x),
            trainer.batches.next()[1])
        sizes = held(trainer)
        assert max(sizes.values()) <= 4
    assert trainer.copy()[5].tally.dropped >= dropped + 40  # mailbox's own


@asynchronous
def test_own_questions_that_get_no_answer_do_not_pile_up(folder):
    trainer, sinks = make_lone(folder, mailbox=4)
    for _ in range(12):
        trainer.step()
        assert max(held(trainer).values()) <= 4
    assert trainer.tally.dropped == 8
    trainer.mailbox.clock = lambda: 3e10  # nobody wants an answer any more
    trainer.serve(0.0)
    trainer.tell('Answer', sinks[0].messages[-1].key, 0, random_d(1), 0)
    trainer.serve(0.0)
    assert max(held(trainer).values()) == 0 and trainer.tally.dropped == 8


@asynchronous
@both_inputs
def test_whatever_is_lost_leaves_nothing_behind(folder, inputs):
    clock = Clock()
    names = dict(inputs=inputs, deadline=4.0, latency=0.25, jitter=1.0)
    trainers = make_many(folder, COMPLETE, clock, 0.3, **names)
    rows = conftest.load(folder).trainer.Rows

    def serve(times, seconds):
        for _ in range(times):
            clock.now += seconds
            for one in trainers:
                one.serve(0.0)

    for _ in range(12):
        owns = [rows(random_x(one.index)) for one in trainers]
        for one, own in zip(trainers, owns):
            if inputs == 'real':
                one.ask(own, 1, wait=True)
        serve(3, 0.5)
        for one, own in zip(trainers, owns):
            one.learn(own, one.batches.next()[1])
    assert all(sum(held(one).values()) > 4 for one in trainers)
    for one in trainers:
        tally = one.copy()[one.index].tally
        assert tally.dropped == 0 and tally.lost > 10 and tally.steps == 12
        assert tally.staleness_max >= 1, 'many came after all'
        one.links = {i: Sink() for i in one.links}
    serve(3, 1e6)
    for _ in range(20):  # what has come is used, one by one
        for one in trainers:
            one.learn(rows(random_x(1)), one.batches.next()[1])
    serve(1, 1e6)
    for one in trainers:
        kept = held(one).pop('_relayed')
        assert kept <= (64 if inputs == 'real' else 0)
        assert sum(held(one).values()) == kept


@asynchronous
@pytest.mark.parametrize('late', [False, True])
def test_a_grad_finds_the_inputs_that_its_answer_was_made_from(
        folder, late, still):
    """Also if it is faster than these; then nothing is left behind."""
    trainer, sinks = make_lone(folder, inputs='real')
    x, told, pull = random_x(1, 3), random_d(2, 3), random_d(3, 3)
    grad = 'Grad', (9, 1), 9, x, pull, 0, 1
    trainer.tell('Spike', (9, 1), 9, x, 1)
    trainer.serve(0.0)
    spike, = sinks[0].take('Spike')
    assert torch.equal(spike.x, x) and not sinks[9].messages
    if late:
        trainer.tell(*grad)
        trainer.serve(0.0)
    trainer.tell('Answer', spike.key, 0, told, 17)
    trainer.serve(0.0)
    if not late:
        assert held(trainer)['_relayed'] == 1
        trainer.tell(*grad)
    x_own, y = trainer.batches.next()
    trainer.learn(conftest.load(folder).trainer.Rows(x_own, key=(5, 99)), y)
    parts = [
        alone(trainer.mach, x_own, trainer.student(x_own), y),
        alone(trainer.mach, x, told.unsqueeze(1), pull=pull)
    ]
    assert_close(grads(trainer.mach), parts[0][1] + parts[1][1])
    answer, = sinks[9].take('Answer')
    assert answer.key == (9, 1)
    assert_close(answer.embedding, parts[1][0])
    sent, = (grad for grad in sinks[0].take('Grad') if len(grad.x) == 3)
    assert (sent.key, sent.version, sent.depth) == (spike.key, 17, 0)
    assert_close(sent.gradient, parts[1][2][:, 0])
    assert max(held(trainer).values()) == 0


# ----------------------------------------------------------- depth, deadlines


@asynchronous
@pytest.mark.parametrize('depth', [0, 1, 3])
def test_spikes_go_as_deep_as_they_say(folder, depth, tripled):
    """And are answered without dropout."""
    trainer, sinks = make_lone(folder, (0, 1), depth=4, dropout=0.5)
    x, told = random_x(1), random_d(3)
    trainer.tell('Spike', (9, 1), 9, x, depth)
    trainer.serve(0.0)
    for child in (0, 1):
        spikes = sinks[child].take('Spike')
        assert [s.depth for s in spikes] == ([depth - 1] if depth else [])
        if depth:
            assert spikes[0].x is x and spikes[0].sender == 5
            assert not sinks[9].messages
            trainer.tell('Answer', spikes[0].key, child, told, 0)
            trainer.serve(0.0)
    answer, = sinks[9].take('Answer')
    inputs = torch.stack([told, told], 1) if depth else trainer.student(x)
    assert (answer.key, answer.sender, answer.version) == ((9, 1), 5, 0)
    assert_close(answer.embedding, trainer.mach(x, inputs).detach())


@asynchronous
@both_inputs
@pytest.mark.parametrize('depth', [0, 1, 3])
def test_own_messages_go_as_deep_as_the_experiment_says(folder, depth, inputs):
    trainer, sinks = make_lone(folder, (0, 1), depth=depth, inputs=inputs)
    trainer.step(lambda: True)
    for child in (0, 1):
        spike, = sinks[child].take('Spike')
        assert spike.depth == max(0, depth - 1)
        sent = sinks[child].take('Grad')
        assert [g.depth for g in sent] == ([depth - 1] if depth else [])
        assert all(g.key == spike.key and torch.equal(g.x, spike.x)
                   for g in sent), 'they share a forward'


@asynchronous
@pytest.mark.parametrize('depth', [0, 1, 3])
def test_grads_go_as_deep_as_they_say(folder, depth):
    """Those of one neighbour that have different ways to go, side by side."""
    trainer, sinks = make_lone(folder, (0, 1), depth=1)
    for i, left in ((1, depth), (2, depth + 1)):
        rows = 2 + 4 * i
        x, pull = random_x(i, rows), random_d(i, rows)
        trainer.tell('Grad', (9, i), 9, x, pull, 0, left)
    trainer.step()
    for child in (0, 1):
        own, *sent = sinks[child].take('Grad')
        assert len(own.x) == 4 and own.depth == 0
        assert [(len(g.x), g.depth) for g in sent] == [(6, depth - 1),
                                                       (10, depth)][depth == 0:]
        assert len({g.key for g in (own, *sent)}) == 1 + len(sent)


@asynchronous
@pytest.mark.parametrize('asked, seconds', [('own', 21.0), ('relayed', 10.5)])
def test_the_deadline_is_on_top_of_what_links_take(folder, asked, seconds):
    """What is made up half-way down is still in time further up."""
    names = dict(inputs='real', deadline=1.0, latency=4.0, jitter=1.0)
    for early in (True, False):
        clock, told = Clock(), random_d(1)
        trainer, sinks = make_lone(folder, clock=clock, **names)
        own = conftest.load(folder).trainer.Rows(random_x(1))
        if asked == 'own':
            trainer.ask(own, 1, wait=True)
        else:
            trainer.tell('Spike', (9, 1), 9, own.x, 1)
            trainer.serve(0.0)
        spike, = sinks[0].take('Spike')
        clock.now = seconds + (-0.1 if early else 0.1)
        trainer.serve(0.0)
        assert len(trainer._asked) == len(own.answers) + early
        trainer.tell('Answer', spike.key, 0, told, 0)
        trainer.serve(0.0)
        if asked == 'own':
            assert list(own.answers) == [0] * early
        else:
            answer, = sinks[9].take('Answer')
            inputs = told.unsqueeze(1) if early else trainer.student(own.x)
            assert_close(answer.embedding, trainer.mach(own.x, inputs).detach())


# ------------------------------------- staleness, lessons, what is worth sending


@asynchronous
def test_staleness_is_counted_in_steps_of_the_receiver(folder):
    child, parent = make_many(folder, [[], [0]])

    def late():
        return child.tally.staleness, child.tally.staleness_max

    assert math.isnan(late()[0])  # no Grad has come
    parent.step()  # has not heard of the child: nobody knows how late it is
    child.step()  # at 0, applies it; answers at 0
    child.step()  # at 1, applies it again
    child.step()  # and again
    assert math.isnan(late()[0]) and late()[1] == 0
    parent.step()  # has seen 0
    child.step()  # at 3: 3 late; answers at 3
    assert late() == (3 / 1, 3)
    parent.step()  # has seen 3
    parent.step()  # the same: the child has not answered yet
    child.serve(0.0)  # at 4: answers; Grads are kept for the next steps
    assert late() == (3 / 1, 3)
    child.step()  # at 4: the newest, 1 late
    assert late() == (4 / 2, 3)
    child.step()  # at 5: the other, 2 late
    assert late() == (6 / 3, 3)
    parent.step()  # has seen 4
    child.step()  # at 6: 2 late
    assert late() == (8 / 4, 3)
    parent.step()  # has seen 6
    child.steps_taken = 2  # set back: the Grad is from its future
    child.step()
    assert late() == (8 / 5, 3)


@asynchronous
def test_a_child_that_was_set_back_is_taught_again(folder):
    trainer, sinks = make_lone(folder, steps=9)
    versions = []
    for version in (None, 9, 4):
        if version:
            key = sinks[0].take('Spike')[-1].key
            trainer.tell('Answer', key, 0, random_d(1), version)
            trainer.serve(0.0)
        trainer.step()
        versions.append([grad.version for grad in sinks[0].take('Grad')])
    assert versions == [[-1], [], [4]]


@asynchronous
def test_no_key_of_an_earlier_life_comes_again(folder):
    keys = []
    for _ in range(3):
        trainer, sinks = make_lone(folder)
        for _ in range(20):
            trainer.step()
        keys += [spike.key for spike in sinks[0].take('Spike')]
    assert len({*keys}) == len(keys) == 60


@asynchronous
@pytest.mark.parametrize('size', [1e-3, 1, 1000, 1e15])
@pytest.mark.parametrize('version', [-1, 0, 2])
def test_a_grad_says_which_way_and_not_how_far(folder, size, version, still):
    """It weighs so many times the own gradient, large or small, late or not."""
    x, found = random_x(1, 3), []
    for told in (True, False):
        trainer, _ = make_lone(folder, grad_weight=0.7)
        d = trainer.mach(x, trainer.student(x)).detach()
        pull = visible(d, random_d(2, 3))
        for step in range(3):
            if told and step == 2:
                trainer.tell('Grad', (9, 1), 9, x, size * pull, version, 0)
            trainer.step()
        found.append(grads(trainer.mach))
        late = [0, 2 - version][told and version >= 0]
        assert trainer.tally.staleness_max == late
    pull = weighed(trainer, *trainer.batches.taken[2], pull)
    _, expected, _ = alone(trainer.mach, x, trainer.student(x), pull=pull)
    assert_close(found[0] - found[1], expected)


@asynchronous
def test_a_flood_of_grads_weighs_no_more_than_one(folder, still):
    """Of each neighbour; they are taken one a step."""
    pulls = {}
    for count in (1, 500):
        trainer, _ = make_lone(folder, recent=500)
        x, pull = random_x(1, 3), 1e3 * random_d(2, 3)
        for i in range(count):
            trainer.tell('Grad', (9, i), 9, x, pull, 0, 0)
        trainer.step()
        pulls[count] = grads(trainer.mach)
    assert torch.equal(pulls[1], pulls[500])


@asynchronous
def test_each_step_takes_one_grad_the_newest_and_then_old_ones(folder):
    """So floods are spread and droughts are bridged; Spikes are taken once."""
    trainer, sinks = make_lone(folder, recent=3)
    trainer.steps_taken, used = 10, []  # no version is of the future
    trainer.tally.grad = lambda staleness: used.append(
        trainer.steps_taken - staleness)  # tells one from another

    def step(*versions):
        used.clear()
        for version in versions:
            x = random_x(version)
            trainer.tell('Spike', (9, version), 9, x, 0)
            trainer.tell('Grad', (9, version), 9, x, random_d(1), version, 0)
        trainer.step()
        return list(used), [a.key[1] for a in sinks[9].take('Answer')]

    assert step() == ([], [])
    assert step(1, 2) == ([2], [2])
    assert step() == ([1], [1])
    assert step() == ([2], []), 'again, that which was used longest ago'
    assert step() == ([1], [])
    assert step(3, 4, 5, 6) == ([6], [6])
    assert trainer.tally.dropped == 2, 'a Spike and a Grad, the oldest'
    assert step() == ([5], [5])
    assert step(7) == ([7], [7])
    assert trainer.tally.dropped == 4, 'the next ones, too old by now'
    assert [step() for _ in range(4)] == [([v], []) for v in (6, 5, 7, 6)]


@asynchronous
def test_each_neighbour_has_its_turn_in_every_step(folder):
    trainer, _ = make_lone(folder, (0, 1))
    for sender, count in ((9, 5), (0, 1)):
        for i in range(count):
            trainer.tell('Grad', (sender, i), sender, random_x(i), random_d(i),
                         0, 0)
    before = trainer.tally.staleness
    assert math.isnan(before)
    calls = []
    trainer.tally.grad = calls.append
    trainer.step()
    assert len(calls) == 2
    trainer.step()
    assert len(calls) == 4


@asynchronous
@both_inputs
def test_grads_that_push_scale_and_offset_do_so_in_vain(folder, inputs, still):
    """With synthetic inputs; with real ones there are none, and all is exact."""
    trainer, _ = make_lone(folder, (), inputs=inputs)
    x = random_x(1, 3)
    d = trainer.mach(x).detach()
    pull = 2 + 3 * d
    trainer.tell('Grad', (9, 1), 9, x, pull, 0, 0)
    trainer.step()
    own_x, y = trainer.batches.taken[0]
    own = alone(trainer.mach, own_x, None, y)[1]
    pushed = alone(trainer.mach, x, None, pull=pull)[1]
    rest = ((grads(trainer.mach) - own).norm() / pushed.norm()).item()
    assert rest == pytest.approx(1 if inputs == 'real' else 0, abs=1e-2)


@asynchronous
def test_lessons(folder, still):
    """One of each child in a step: its slice alone, of its rows' share."""
    trainer, sinks = make_lone(folder, (0, 1))
    trainer.step()
    trainer.step()
    first, second = sinks[0].take('Spike')
    told = {}

    def tell(spike, child, version):
        told[spike.key, child] = random_d(version)
        for d in (told[spike.key, child], random_d(99)):  # only once
            trainer.tell('Answer', spike.key, child, d, version)

    def learn(*lessons):
        trainer.student.zero_grad()
        rows, expected = {spike.key for spike, _ in lessons}, 0.0
        for spike, child in lessons:
            distance = (trainer.student(spike.x)[:, child] -
                        told[spike.key, child])
            expected += distance.square().sum() / 4 / len(rows)
        trainer.step()
        assert_close(grads(trainer.student),
                     gradient(expected, [trainer.student]))

    tell(first, 1, 7)
    learn((first, 1))
    assert trainer._seen == [-1, 7]
    tell(first, 0, 5)
    tell(second, 0, 6)
    tell(second, 1, 8)
    learn((second, 0), (second, 1))
    assert trainer._seen == [6, 8]
    learn((first, 0), (first, 1))  # the last one again
    third = sinks[0].take('Spike')[-1]
    trainer.mailbox.clock = lambda: 1.9e10  # 9.5 times the deadline, an edge
    trainer.serve(0.0)
    tell(third, 0, 3)
    learn((third, 0), (second, 1))
    assert trainer._seen == [3, 8], 'set back'


@asynchronous
@both_inputs
@pytest.mark.parametrize('share, rows', [(1.0, 8), (0.5, 4), (0.3, 3),
                                         (0.01, 1)])
def test_rows_with_the_largest_gradients_are_sent(folder, inputs, share, rows,
                                                  still):
    """Who has asked about all rows sends the Grads of all."""
    names = dict(inputs=inputs, share=share)
    trainer, sinks = make_lone(folder, **names)
    trainer.batches = conftest.Batches(7, 8)
    trainer.step(lambda: True)
    x, y = trainer.batches.taken[0]
    _, _, sent = alone(trainer.mach, x, trainer.student(x), y)
    rows = 8 if inputs == 'real' else rows
    largest = sent.flatten(1).norm(dim=1).topk(rows).indices.tolist()
    spike, grad = sinks[0].messages
    assert torch.equal(spike.x, grad.x)
    found = [int((x == row).all(1).nonzero()) for row in grad.x]
    assert set(found) == set(largest) and len(found) == rows
    assert_close(grad.gradient, sent[found, 0])


@asynchronous
@pytest.mark.parametrize('kind', ['Spike', 'Grad x', 'Grad', 'Answer'])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_dropped(folder, kind, value):
    trainer, sinks = make_lone(folder)
    trainer.step()
    spike, _ = sinks[0].messages
    x, d, bad_x, bad_d = random_x(1), random_d(2), random_x(1), random_d(2)
    bad_x[1, 2] = bad_d[1, 2] = value
    trainer.tell(
        *{
            'Spike': ('Spike', (9, 1), 9, bad_x, 0),
            'Grad x': ('Grad', (9, 1), 9, bad_x, d, 0, 0),
            'Grad': ('Grad', (9, 1), 9, x, bad_d, 0, 0),
            'Answer': ('Answer', spike.key, 0, bad_d, 0),
        }[kind])
    trainer.step()
    trainer.step()
    assert trainer.tally.dropped == 1 and not sinks[9].messages
    assert snapshot(trainer.mach, trainer.student).isfinite().all()


@all_folders
@pytest.mark.parametrize('where, name', [('cross_entropy', 'target loss'),
                                         ('synthetic_loss', 'synthetic loss')])
def test_a_loss_that_is_not_finite_ends_it(folder, where, name, monkeypatch):
    """Nothing of it is applied; where it is the target's, nothing is sent."""
    sent = []
    names = dict(sent=sent) if folder in conftest.ASYNCHRONOUS else {}
    run = make_all(folder, depth=1, **names)  # no Spike to send on
    for trainer in 2 * run.trainers + run.trainers[:-1]:
        trainer.step()
    trainer = run.trainers[-1]
    owner = functional if 'cross' in where else conftest.load(folder).student
    before, count = [snapshot(*run.machs), snapshot(*run.students)], len(sent)
    loss = getattr(owner, where)
    monkeypatch.setattr(owner, where, lambda *a, **b: math.inf * loss(*a, **b))
    with pytest.raises(FloatingPointError, match=name):
        trainer.step()
    after = [snapshot(*run.machs), snapshot(*run.students)]
    assert torch.equal(before[1], after[1]) and trainer.steps_taken == 2
    if 'cross' in where or not sent:
        assert torch.equal(before[0], after[0]) and len(sent) == count


# ------------------------------------------------- who has finished, optimisers


@asynchronous
@both_inputs
def test_a_finished_mach_drops_grads_and_answers_on(folder, inputs):
    trainer, sinks = make_lone(folder, (0, 1), steps=3, inputs=inputs)
    x = random_x(1)
    for i in range(3):
        trainer.tell('Grad', (9, i), 9, x, random_d(i), 0, 0)
    trainer.learn(
        conftest.load(folder).trainer.Rows(x),
        trainer.batches.next()[1])
    assert trainer.tally.dropped == 0
    for _ in range(2):
        trainer.learn(
            conftest.load(folder).trainer.Rows(x),
            trainer.batches.next()[1])
    assert trainer.finished and trainer.tally.steps == 3
    for i in (3, 4):
        trainer.tell('Grad', (9, i), 9, x, random_d(i), 0, 0)
    before = snapshot(trainer.mach)
    trainer.tell('Spike', (9, 5), 9, x, 0)
    trainer.serve(0.0)
    assert trainer.tally.dropped == 2
    assert [a.version for a in sinks[9].take('Answer')] == [3]
    assert torch.equal(snapshot(trainer.mach), before)


@asynchronous
def test_a_finished_mach_teaches_a_child_that_learns(folder):
    """One Grad for each answer, to it alone; nothing else of it changes."""
    trainer, sinks = make_lone(folder, (0, 1), steps=2)
    trainer.step()
    trainer.step()
    spikes = {child: sinks[child].take('Spike')[-1] for child in (0, 1)}
    for child in (0, 1):
        sinks[child].take('Grad')
    before, taught = snapshot(trainer.mach), snapshot(trainer.student)
    for child, version in ((0, 1), (1, 2)):  # of two steps
        trainer.tell('Answer', spikes[child].key, child, random_d(1), version)
    for _ in range(3):
        trainer.serve(0.0)
    assert [len(sinks[c].take('Grad')) for c in (0, 1)] == [1, 0]
    assert torch.equal(snapshot(trainer.mach), before)
    assert not torch.equal(snapshot(trainer.student), taught), 'it goes on'
    for _ in range(5):  # to the end of its cycle, and beyond
        trainer._student_optimiser.step()
    rate = trainer._student_optimiser._adamw.param_groups[0]['lr']
    assert rate == pytest.approx(0.05 / 50)
    assert (trainer.steps_taken, trainer.tally.steps) == (2, 2)
    spike, = sinks[0].take('Spike')
    trainer.tell('Answer', spike.key, 0, random_d(1), 2)
    trainer.serve(0.0)
    assert not sinks[0].take('Grad') and not sinks[0].take('Spike'), 'all over'


@asynchronous
def test_a_finished_mach_teaches_in_its_second_life(folder):
    """It asks, as all messages of the first may be lost."""
    first, _ = make_lone(folder, steps=2)
    first.step()
    first.step()
    trainer, sinks = make_lone(folder, steps=2)
    trainer.restore(first.state())
    before = snapshot(trainer.mach)
    for version in (1, 1, 2):  # of the child's two steps
        trainer.serve(0.0)
        spike = sinks[0].take('Spike')[-1]
        assert len(sinks[0].take('Grad')) == 1
        trainer.tell('Answer', spike.key, 0, random_d(1), version)
    trainer.serve(0.0)
    assert not sinks[0].messages, 'all over'
    assert torch.equal(snapshot(trainer.mach), before)


@asynchronous
@both_inputs
def test_whoever_is_ahead_all_reach_the_end(folder, inputs):
    """Every Spike is answered; no Grad goes to who has no use for it."""
    sent = []
    names = dict(inputs=inputs, steps=6, mailbox=9999)
    trainers = make_many(folder, COMPLETE, sent=sent, **names)
    for steps in (1, 3, 6):  # of the first, which is ahead
        while trainers[0].steps_taken < steps:
            take_step(trainers[0], trainers)
        for one in trainers[1:]:
            take_step(one, trainers)
    for one in trainers[1:]:
        while one.steps_taken < 6:
            take_step(one, trainers)
            trainers[0].serve(0.0)
    for _ in range(9):
        for one in trainers:
            one.serve(0.0)
    total = collections.Counter(type(message).__name__ for message, _ in sent)
    assert total['Spike'] == total['Answer'], 'and nobody asks any more'
    assert all(one.tally.steps == 6 for one in trainers)
    assert not any(
        type(m).__name__ == 'Grad' and m.version >= 6 for m, _ in sent)
    for one in trainers:
        sizes = held(one)
        assert not any(n for name, n in sizes.items() if 'Answer' not in name)


@all_folders
@pytest.mark.parametrize('warmup', [0.0, 0.05, 0.1, 0.5, 0.999])
def test_the_learning_rate_has_one_cycle(folder, warmup):
    trainer = conftest.load(folder).trainer
    for steps in range(1, 41):
        optimiser = trainer.Optimiser(
            torch.nn.Linear(1, 1), 0.5, 0.0,
            conftest.make_settings(steps=steps, warmup=warmup))
        rates = []
        for _ in range(steps):
            rates.append(optimiser._adamw.param_groups[0]['lr'])
            optimiser.step()
        assert 0 < min(rates) and max(rates) <= 0.5
        if steps > 9:
            assert max(rates) > 0.45
            peak = rates.index(max(rates))
            assert abs(peak - max(1, warmup * (steps + 1) - 1)) < 1
        if steps > 1:
            assert optimiser._adamw.param_groups[0]['lr'] < 1e-4


# ----------------------------------------------------------------- the networks


@all_folders
def test_a_parent_does_not_see_scale_and_offset_of_an_embedding(folder):
    """So no Grad can push a child's embedding to grow or to shift."""
    torch.manual_seed(0)
    mach = conftest.load(folder).model.Mach(2, 8, E).double()
    x, inputs = random(1, 5, 784), random(2, 10, E).view(5, 2, E)
    inputs.requires_grad_()
    d = mach(x, inputs)
    scale, offset = torch.tensor([[3.0], [0.5]]), torch.tensor([[7.0], [-1.0]])
    assert torch.allclose(d, mach(x, inputs * scale + offset), atol=1e-3)
    assert not torch.allclose(d, mach(x, inputs.flip(1)), atol=1e-3)
    found, = torch.autograd.grad(d.square().sum(), inputs)
    assert found.abs().max() > 1e-3
    assert found.sum(-1).abs().max() < 1e-9
    assert (found * inputs).sum(-1).abs().max() < 1e-3


@pytest.mark.parametrize('folder', FOLDERS[1:])
def test_heads_start_alike_and_networks_do_not(folder):
    main = conftest.load_main(folder)
    settings = main.Hyperparameters(k=3, hidden=8, embedding=4)
    (_, first, _), *others = main.make_networks(settings)
    for _, mach, _ in others:
        assert torch.equal(mach.head.weight, first.head.weight)
        assert mach.head.weight is not first.head.weight
        assert not torch.equal(mach.local[0].weight, first.local[0].weight)
