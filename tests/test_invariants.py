"""What must hold of the asynchronous experiments, whatever the timing."""

import math
import queue
import signal
import threading

import conftest
import pytest
import torch

SYNCHRONOUS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph')
ASYNCHRONOUS = ('asynchronous_sequence', 'asynchronous_kgraph')
# No cycles in these: MACH 0 has no children, MACH 3 no parents.
ACYCLIC = {
    'chain': [[], [0], [1], [2]],
    'diamond': [[], [0], [0, 1], [1, 2]],
    'full': [[], [0], [0, 1], [0, 1, 2]],
}
ACYCLIC_GRAPHS = [('asynchronous_sequence', 'chain'),
                  ('asynchronous_kgraph', 'chain'),
                  ('asynchronous_kgraph', 'diamond'),
                  ('asynchronous_kgraph', 'full')]
COMPLETE = [[1, 2], [0, 2], [0, 1]]

asynchronous = pytest.mark.parametrize('folder', ASYNCHRONOUS)


@pytest.fixture(autouse=True)
def _no_test_hangs():
    """Whoever waits for ever where nobody should wait at all fails."""

    def fail(*_):
        raise TimeoutError('it hangs')

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 90)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(name='still')
def _still(monkeypatch):
    """Optimisers that leave the parameters and let their grads add up."""
    for folder in SYNCHRONOUS + ASYNCHRONOUS:
        monkeypatch.setattr(
            conftest.load(folder).trainer, 'Optimiser', conftest.Still)


class Sink:
    """A link that leads to the test."""

    def __init__(self):
        self.messages = []

    def send(self, message):
        self.messages.append(message)

    def take(self, kind):
        """All messages of one kind, by its name, since the last call."""
        taken = [m for m in self.messages if type(m).__name__ == kind]
        self.messages = [m for m in self.messages if type(m).__name__ != kind]
        return taken


class Clock:
    """Seconds that pass when the test says so, and `tick` at each look."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def make_lone(folder, settings, children=(0,), parents=(9,), clock=lambda: 0.0):
    """MACH 5, whose neighbours are the test.

    Returns:
        Its trainer, and the Sink of each neighbour.
    """
    modules, children = conftest.load(folder), list(children)
    mach, student = conftest.make_networks(modules, [children], settings)[0]
    trainer = modules.trainer.Trainer(5,
                                      mach,
                                      student,
                                      children,
                                      conftest.Rows(settings, 7),
                                      settings,
                                      clock=clock)
    sinks = {neighbour: Sink() for neighbour in [*children, *parents]}
    for neighbour, sink in sinks.items():
        trainer.connect(neighbour, sink)
    return trainer, sinks


def random_x(settings, seed, rows=None):
    """[B, PIXELS]."""
    return torch.randn(rows or settings.batch_size,
                       conftest.PIXELS,
                       dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed))


def random_embedding(settings, seed, rows=None):
    """[B, E]."""
    return torch.randn(rows or settings.batch_size,
                       settings.embedding,
                       dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed))


def held(trainer):
    """Name of each container of a trainer -> how much it holds."""
    sizes = {'mailbox': len(trainer.mailbox)}
    for name, value in vars(trainer).items():
        if (hasattr(value, '__len__') and
                name not in ('links', 'children', 'seen', '_window', '_chosen',
                             '_trips', 'mach', 'student')):
            sizes[name] = len(value)
    return sizes


# ---------------------------- 1. it is backpropagation when nothing is late


@pytest.mark.parametrize('folder, graph', ACYCLIC_GRAPHS)
def test_real_inputs_at_full_depth_are_backpropagation(folder, graph, still):
    modules, children = conftest.load(folder), ACYCLIC[graph]
    settings = conftest.make_settings(inputs='real', depth=3)
    trainers = conftest.make_threads(modules, children, settings)
    for trainer in reversed(trainers):  # no Grad is due later than this step
        x, y, inquiry = trainer.open_step()
        for _ in range(20):
            for other in trainers:
                other.serve(0.0)
        if trainer.children:
            assert len(inquiry.answers) == len(trainer.children)
        trainer.close_step(x, y, inquiry)
    machs = [trainer.mach for trainer in trainers]

    def embed(i, x):
        if not children[i]:
            return machs[i](x)
        return machs[i](x,
                        torch.stack([embed(child, x) for child in children[i]],
                                    1))

    total = sum(
        conftest.target_loss(machs[i], embed(i, trainer.batches.taken[0][0]),
                             trainer.batches.taken[0][1], settings)
        for i, trainer in enumerate(trainers))
    for mach in machs:
        expected = conftest.gradients(total, [mach])
        conftest.assert_close(conftest.grads_of(mach), expected)


@pytest.mark.parametrize('folder, graph', ACYCLIC_GRAPHS)
def test_unlocked_gradients_travel_to_full_depth(folder, graph, still):
    """Each MACH's inputs are synthetic; Grads go on all the same."""
    modules, children = conftest.load(folder), ACYCLIC[graph]
    settings = conftest.make_settings(depth=3, grad_weight=2.0)
    trainers = conftest.make_threads(modules, children, settings)
    for trainer in reversed(trainers):
        trainer.step()
    expected = [[torch.zeros_like(p)
                 for p in trainer.mach.parameters()]
                for trainer in trainers]

    def spread(i, x, make_roots, depth):
        """Adds gradients of MACH i's roots, and what follows further down."""
        trainer, inputs = trainers[i], None
        if children[i]:
            inputs = trainer.student(x).detach().requires_grad_()
        output, weight = make_roots(trainer.mach(x, inputs))
        grads = conftest.gradients(output, [trainer.mach], weight)
        if children[i] and depth > 0:
            output, weight = make_roots(trainer.mach(x, inputs))
            sent, = torch.autograd.grad(output, inputs, weight)
            for position, child in enumerate(children[i]):
                factor = settings.grad_weight if weight is None else 1.0
                gradient = factor * sent[:, position]
                spread(child, x, lambda d, g=gradient: (d, g), depth - 1)
        expected[i] = [one + two for one, two in zip(expected[i], grads)]

    for i, trainer in enumerate(trainers):
        x, y = trainer.batches.taken[0]
        spread(i,
               x,
               lambda d, i=i, y=y:
               (conftest.target_loss(trainers[i].mach, d, y, settings), None),
               settings.depth)
    for i, trainer in enumerate(trainers):
        conftest.assert_close(conftest.grads_of(trainer.mach), expected[i])


@asynchronous
@pytest.mark.parametrize('order', ['Spike', 'Grad'])
def test_fused_equals_separate(folder, order, still):
    """Own rows, a Spike, a Grad for it and one for another x: one forward."""
    settings = conftest.make_settings(depth=2)
    messages = conftest.load(folder).link
    asked, late = random_x(settings, 1, 3), random_x(settings, 2, 5)
    pulls = random_embedding(settings, 3, 3), random_embedding(settings, 4, 5)
    trainer, sinks = make_lone(folder, settings)
    incoming = [
        messages.Spike((9, 1), 9, asked, 0),
        messages.Grad((9, 1), 9, asked, pulls[0], 0, 1),
        messages.Grad((9, 0), 9, late, pulls[1], 0, 0),
    ]
    for message in incoming if order == 'Spike' else reversed(incoming):
        trainer.mailbox.put(message)
    x, y, inquiry = trainer.open_step()
    trainer.close_step(x, y, inquiry)

    mach, leaves = trainer.mach, {}
    for name, rows in (('own', x), ('asked', asked), ('late', late)):
        leaves[name] = trainer.student(rows).detach().requires_grad_()
    outputs = [
        conftest.target_loss(mach, mach(x, leaves['own']), y, settings),
        mach(asked, leaves['asked']),
        mach(late, leaves['late'])
    ]
    weights = [torch.ones_like(outputs[0]), *pulls]
    expected = [
        conftest.gradients(output, [mach], weight)
        for output, weight in zip(outputs, weights)
    ]
    conftest.assert_close(conftest.grads_of(mach),
                          [sum(parts) for parts in zip(*expected)])
    answer, = sinks[9].take('Answer')
    conftest.assert_close([answer.embedding], [outputs[1]])
    outputs[1] = mach(asked, leaves['asked'])
    outputs[0] = conftest.target_loss(mach, mach(x, leaves['own']), y, settings)
    sent = {len(grad.x): grad for grad in sinks[0].take('Grad')}
    assert set(sent) == {4, 3}, 'own and the one with depth left go on'
    for name, output, weight in (('own', outputs[0], weights[0]),
                                 ('asked', outputs[1], weights[1])):
        wanted, = torch.autograd.grad(output, leaves[name], weight)
        conftest.assert_close([sent[len(wanted)].gradient], [wanted[:, 0]])


@asynchronous
def test_a_grad_finds_the_inputs_that_its_answer_was_made_from(folder, still):
    settings = conftest.make_settings(depth=2, inputs='real')
    messages = conftest.load(folder).link
    trainer, sinks = make_lone(folder, settings)
    x, told = random_x(settings, 1, 3), random_embedding(settings, 2, 3)
    trainer.mailbox.put(messages.Spike((9, 1), 9, x, 1))
    trainer.serve(0.0)
    spike, = sinks[0].take('Spike')
    assert torch.equal(spike.x, x)
    trainer.mailbox.put(messages.Answer(spike.key, 0, told, 17))
    trainer.serve(0.0)
    leaf = told.unsqueeze(1).clone().requires_grad_()
    output = trainer.mach(x, leaf)
    answer, = sinks[9].take('Answer')
    assert answer.key == (9, 1)
    conftest.assert_close([answer.embedding], [output])
    # By now the child says something else, and the student is no better.
    pull = random_embedding(settings, 3, 3)
    own = conftest.Rows(settings, 8).next()
    twin, twin_sinks = make_lone(folder, settings)
    twin.close_step(*own, None)
    trainer.mailbox.put(messages.Grad((9, 1), 9, x, pull, 0, 1))
    trainer.close_step(*own, None)
    extra = [
        one - two for one, two in zip(conftest.grads_of(trainer.mach),
                                      conftest.grads_of(twin.mach))
    ]
    expected = conftest.gradients(output, [trainer.mach], pull)
    conftest.assert_close(extra, expected)
    output = trainer.mach(x, leaf)
    gradient, = torch.autograd.grad(output, leaf, pull)
    sent = [grad for grad in sinks[0].take('Grad') if len(grad.x) == 3]
    assert len(sent) == 1
    assert (sent[0].key, sent[0].version, sent[0].depth) == (spike.key, 17, 0)
    conftest.assert_close([sent[0].gradient], [gradient[:, 0]])


@asynchronous
def test_dropout_is_of_own_rows_alone(folder, still):
    settings = conftest.make_settings(dropout=0.5)
    messages = conftest.load(folder).link
    x, pull = random_x(settings, 1, 3), random_embedding(settings, 2, 3)
    machs = []
    for busy in (True, False):  # the same own rows, the same dropout
        trainer, sinks = make_lone(folder, settings)
        if busy:
            trainer.mailbox.put(messages.Grad((9, 1), 9, x, pull, 0, 0))
            trainer.mailbox.put(messages.Spike((9, 1), 9, x, 0))
        trainer.step()
        machs.append(trainer.mach)
        if busy:
            answer, = sinks[9].take('Answer')
            output = trainer.mach(x, trainer.student(x).detach())
            conftest.assert_close([answer.embedding], [output])
            expected = conftest.gradients(output, [trainer.mach], pull)
    extra = [
        one - two for one, two in zip(conftest.grads_of(machs[0]),
                                      conftest.grads_of(machs[1]))
    ]
    conftest.assert_close(extra, expected)
    settings.dropout = 0.0
    plain, _ = make_lone(folder, settings)
    plain.step()
    assert not conftest.same(conftest.grads_of(plain.mach),
                             conftest.grads_of(machs[1])), 'there is dropout'


# --------------------------------------------- 2. losses stay in their lane


def make_alone(folder, settings):
    """A whole experiment, to be stepped in this thread, always the same.

    Returns:
        Its trainers, the MACHs and the students.
    """
    if folder in SYNCHRONOUS:
        run = conftest.make_synchronous(folder, settings)
        trainers, machs, students = [run.trainer], run.machs, run.students
    else:
        children = COMPLETE if 'kgraph' in folder else ACYCLIC['chain']
        trainers = conftest.make_threads(conftest.load(folder), children,
                                         settings)
        machs = [trainer.mach for trainer in trainers]
        students = [trainer.student for trainer in trainers]
    return trainers, machs, [s for s in students if s is not None]


def run_alone(folder, settings, steps=3):
    """The MACHs and the students after a few steps in this thread."""
    trainers, machs, students = make_alone(folder, settings)
    for _ in range(steps):
        for trainer in trainers:
            trainer.step()
    return machs, students


@pytest.mark.parametrize('folder', SYNCHRONOUS + ASYNCHRONOUS)
@pytest.mark.parametrize('delay', [0, 1])
def test_no_gradient_leaves_its_lane(folder, delay, still, monkeypatch):
    modules = conftest.load(folder)
    settings = conftest.make_settings(delay=delay, dropout=0.3)
    machs, students = run_alone(folder, settings)
    target, synthetic = conftest.grads_of(*machs), conftest.grads_of(*students)
    assert all(g.norm() > 0 for g in synthetic[::2])

    with monkeypatch.context() as patch:  # 8 scales exactly
        original = modules.student.synthetic_loss
        patch.setattr(modules.student, 'synthetic_loss',
                      lambda *args: 8 * original(*args))
        machs, students = run_alone(folder, settings)
    assert conftest.same(conftest.grads_of(*machs), target)
    assert conftest.same(conftest.grads_of(*students),
                         [8 * g for g in synthetic])

    with monkeypatch.context() as patch:
        entropy = torch.nn.functional.cross_entropy
        patch.setattr(torch.nn.functional, 'cross_entropy',
                      lambda *args, **names: 8 * entropy(*args, **names))
        machs, students = run_alone(folder, settings)
    assert conftest.same(conftest.grads_of(*machs), [8 * g for g in target])
    assert conftest.same(conftest.grads_of(*students), synthetic)


@pytest.mark.parametrize('folder', SYNCHRONOUS + ASYNCHRONOUS)
def test_no_optimiser_leaves_its_lane(folder):
    before = run_alone(folder, conftest.make_settings(), steps=0)
    settings = conftest.make_settings(learning_rate=0.0)
    machs, students = run_alone(folder, settings)
    assert conftest.same(conftest.snapshot(*machs),
                         conftest.snapshot(*before[0]))
    assert not conftest.same(conftest.snapshot(*students),
                             conftest.snapshot(*before[1]))
    settings = conftest.make_settings(student_learning_rate=0.0)
    machs, students = run_alone(folder, settings)
    assert conftest.same(conftest.snapshot(*students),
                         conftest.snapshot(*before[1]))
    assert not conftest.same(conftest.snapshot(*machs),
                             conftest.snapshot(*before[0]))


@asynchronous
def test_own_loss_and_grads_leave_the_student_alone(folder, still):
    settings = conftest.make_settings()
    messages = conftest.load(folder).link
    trainer, sinks = make_lone(folder, settings)
    before = conftest.snapshot(trainer.student)
    x = random_x(settings, 1)
    trainer.mailbox.put(messages.Spike((9, 1), 9, x, 0))
    trainer.mailbox.put(
        messages.Grad((9, 1), 9, x, random_embedding(settings, 2), 0, 1))
    trainer.step()
    assert all(p.grad is None for p in trainer.student.parameters())
    assert all(p.grad is not None for p in trainer.mach.parameters())
    assert conftest.same(conftest.snapshot(trainer.student), before)
    spike, = sinks[0].take('Spike')
    twin, _ = make_lone(folder, settings)
    for other in (trainer, twin):
        for p in other.mach.parameters():
            p.grad = None
    trainer.mailbox.put(
        messages.Answer(spike.key, 0, random_embedding(settings, 3), 0))
    own = conftest.Rows(settings, 8).next()
    trainer.close_step(*own, None)
    twin.close_step(*own, None)
    assert all(p.grad is not None for p in trainer.student.parameters())
    assert conftest.same(conftest.grads_of(trainer.mach),
                         conftest.grads_of(twin.mach))


# ------------------------------------------------------------ 3. nobody waits


@asynchronous
def test_an_unlocked_parent_never_waits(folder):
    """Its steps are the same in every bit whatever becomes of its child."""
    modules = conftest.load(folder)

    class Late:
        """A link that is slow."""

        def __init__(self, mailbox):
            self.messages, self._mailbox = [], mailbox

        def send(self, message):
            self.messages.append(message)

        def release(self):
            for message in self.messages:
                self._mailbox.put(message)

    def run(state):
        settings = conftest.make_settings(depth=2)
        if state == 'full':
            settings.mailbox = 1
        child, parent = conftest.make_threads(modules, [[], [0]], settings)
        late = Late(parent.mailbox)
        child.connect(1, late)
        if state == 'gone':
            parent.connect(0, Sink())
        taken = []
        for _ in range(6):
            parent.step()
            taken.append(conftest.snapshot(parent.mach, parent.student))
            if state == 'late':
                child.step()
        if state == 'late':
            assert len(late.messages) == 6
            before = conftest.snapshot(parent.student)
            late.release()
            parent.step()  # lessons are good however late
            assert not conftest.same(conftest.snapshot(parent.student), before)
        return taken

    expected = conftest.within(60, lambda: run('idle'))
    assert not conftest.same(expected[0], expected[1])
    for state in ('full', 'gone', 'late'):
        found = conftest.within(60, lambda s=state: run(s))
        for step, (one, other) in enumerate(zip(found, expected)):
            assert conftest.same(one, other), (state, step)


@asynchronous
def test_an_unlocked_relay_never_waits(folder):
    """A Spike with depth left stays open while the child is silent."""
    settings = conftest.make_settings(depth=2)
    messages = conftest.load(folder).link
    trainer, sinks = make_lone(folder, settings)
    trainer.mailbox.put(messages.Spike((9, 1), 9, random_x(settings, 1), 1))
    conftest.within(60, trainer.step)
    conftest.within(60, lambda: trainer.serve(0.0))
    assert trainer.steps_taken == 1
    assert not sinks[9].take('Answer')


@asynchronous
@pytest.mark.parametrize('answering', [(), (0,), (1,)])
def test_a_locked_parent_goes_on_at_the_deadline(folder, answering, still):
    settings = conftest.make_settings(inputs='real', deadline=3.5, depth=2)
    messages = conftest.load(folder).link
    clock = Clock(tick=1.0)
    trainer, sinks = make_lone(folder, settings, children=(0, 1), clock=clock)
    told = random_embedding(settings, 1)

    class Answering(Sink):
        """A child that answers at once."""

        def __init__(self, index):
            super().__init__()
            self.index = index

        def send(self, message):
            super().send(message)
            if isinstance(message, messages.Spike):
                trainer.mailbox.put(
                    messages.Answer(message.key, self.index, told, 2))

    for child in answering:
        sinks[child] = Answering(child)
        trainer.connect(child, sinks[child])
    conftest.within(60, trainer.step)
    assert trainer.steps_taken == 1 and clock.now > 3.5
    x, y = trainer.batches.taken[0]
    inputs = trainer.student(x).detach()
    for child in answering:
        inputs[:, child] = told
    inputs.requires_grad_()
    mach = trainer.mach

    def loss():
        return conftest.target_loss(mach, mach(x, inputs), y, settings)

    expected = conftest.gradients(loss(), [mach])
    conftest.assert_close(conftest.grads_of(mach), expected)
    gradient, = torch.autograd.grad(loss(), inputs)
    for child in (0, 1):
        sent, = sinks[child].take('Grad')
        conftest.assert_close([sent.gradient], [gradient[:, child]])


@asynchronous
def test_a_locked_mach_without_children_waits_for_nothing(folder):
    settings = conftest.make_settings(inputs='real')
    trainer, _ = make_lone(folder, settings, children=())
    waits = []

    def stopped():
        waits.append(1)
        return True

    conftest.within(60, lambda: trainer.step(stopped))
    assert not waits


@asynchronous
def test_a_full_mailbox_makes_nobody_wait(folder):
    link = conftest.load(folder).link
    mailbox = link.Mailbox(2)
    conftest.within(
        60, lambda: [link.MailboxLink(mailbox).send(i) for i in range(5)])
    assert mailbox.collect() == [3, 4]


# --------------------------------------------------------------- 4. one owner


@asynchronous
@pytest.mark.parametrize('inputs', ['synthetic', 'real'])
def test_only_its_own_thread_touches_a_mach(folder, inputs, monkeypatch):
    modules = conftest.load(folder)
    touched = set()  # (what of which MACH, thread)
    owner_of, owner_of_parameter = {}, {}

    class Watched(modules.trainer.Optimiser):
        """Notes who steps."""

        def __init__(self, parameters, *rest):
            parameters = list(parameters)
            super().__init__(parameters, *rest)
            self._first = parameters[0]

        def step(self):
            i = owner_of_parameter[id(self._first)]
            touched.add(('step', i, threading.get_ident()))
            super().step()

    monkeypatch.setattr(modules.trainer, 'Optimiser', Watched)
    settings = conftest.make_settings(inputs=inputs, depth=2)
    trainers = conftest.make_threads(modules, COMPLETE, settings)

    def note_forward(module, _):
        if id(module) in owner_of:  # a copy has the hook, but is another
            touched.add(
                ('forward', owner_of[id(module)], threading.get_ident()))

    for trainer in trainers:
        for network in (trainer.mach, trainer.student):
            for module in network.modules():
                owner_of[id(module)] = trainer.index
                module.register_forward_pre_hook(note_forward)
            for parameter in network.parameters():
                owner_of_parameter[id(parameter)] = trainer.index
                parameter.register_post_accumulate_grad_hook(
                    lambda _, i=trainer.index: touched.add(
                        ('backward', i, threading.get_ident())))
    copies, threads = queue.SimpleQueue(), {}

    def hand_over(trainer):
        threads[trainer.index] = threading.get_ident()
        copies.put(trainer.copies())

    conftest.run_threads(trainers, 5, hand_over)
    x = random_x(settings, 1)
    for _ in range(15):
        for mach, student in copies.get(timeout=5).values():
            mach(x, student(x))
    assert len(set(threads.values())) == 3
    assert touched == {(what, i, threads[i])
                       for what in ('forward', 'backward', 'step')
                       for i in range(3)}


@pytest.mark.parametrize('folder', SYNCHRONOUS + ASYNCHRONOUS)
def test_a_copy_is_the_readers_to_keep(folder):
    settings = conftest.make_settings()
    trainers, machs, students = make_alone(folder, settings)
    for trainer in trainers:
        trainer.step()
    copies = {}
    for trainer in trainers:
        copies.update(trainer.copies())
    assert sorted(copies) == list(range(len(machs)))
    copied = [network for pair in copies.values() for network in pair]
    live = {p.data_ptr() for n in machs + students for p in n.parameters()}
    before = conftest.snapshot(*copied)
    assert sum(
        len(list(n.parameters())) for n in machs + students) == len(before)
    assert live.isdisjoint(p.data_ptr() for n in copied if n is not None
                           for p in n.parameters())
    assert conftest.same(conftest.snapshot(*[copies[i][0] for i in copies]),
                         conftest.snapshot(*machs))
    moved = conftest.snapshot(*machs, *students)
    for trainer in trainers:
        trainer.step()
    assert not conftest.same(conftest.snapshot(*machs, *students), moved)
    assert conftest.same(conftest.snapshot(*copied), before)


# ----------------------------- 5. a message never changes after it is sent


@asynchronous
@pytest.mark.parametrize('inputs', ['synthetic', 'real'])
def test_a_message_never_changes_after_it_is_sent(folder, inputs):
    modules, sent = conftest.load(folder), []

    def tensors(message):
        return [v for v in vars(message).values() if torch.is_tensor(v)]

    class Recording:
        """Keeps each message and what it said when it was sent."""

        def __init__(self, link):
            self._link = link

        def send(self, message):
            sent.append((message, [t.clone() for t in tensors(message)]))
            self._link.send(message)

    settings = conftest.make_settings(inputs=inputs, depth=2, dropout=0.2)
    trainers = conftest.make_threads(modules,
                                     COMPLETE,
                                     settings,
                                     wrap=Recording)
    conftest.run_threads(trainers, 6)
    kinds = {type(message).__name__ for message, _ in sent}
    assert kinds == {'Spike', 'Answer', 'Grad'}
    live = {
        p.data_ptr()
        for trainer in trainers
        for network in (trainer.mach, trainer.student)
        for p in network.parameters()
    }
    for message, before in sent:
        assert conftest.same(tensors(message), before), message
        for tensor in tensors(message):
            assert not tensor.requires_grad and tensor.grad_fn is None
            assert tensor.data_ptr() not in live
        with pytest.raises(AttributeError):
            message.key = None


# ------------------------------------------------------- 6. memory is bounded


@asynchronous
def test_a_mailbox_keeps_order_and_drops_the_oldest(folder):
    link = conftest.load(folder).link
    mailbox = link.Mailbox(3)
    assert mailbox.collect() == [] and len(mailbox) == 0
    for i in range(3):
        link.MailboxLink(mailbox).send(i)
    assert (len(mailbox), mailbox.dropped) == (3, 0)
    assert mailbox.collect(1e9) == [0, 1, 2]  # there is mail: no waiting
    assert len(mailbox) == 0
    for i in range(10):
        mailbox.put(i)
        assert len(mailbox) <= 3
    assert (mailbox.collect(), mailbox.dropped) == ([7, 8, 9], 7)
    assert mailbox.collect() == []


@asynchronous
@pytest.mark.parametrize('inputs', ['synthetic', 'real'])
@pytest.mark.parametrize('kind', ['Spike', 'Relay', 'Grad', 'Answer', 'all'])
def test_a_flood_does_not_fill_the_memory(folder, inputs, kind):
    settings = conftest.make_settings(mailbox=4, depth=2, inputs=inputs)
    link = conftest.load(folder).link
    trainer, sinks = make_lone(folder, settings)
    x, e = random_x(settings, 1), random_embedding(settings, 2)
    makers = {
        'Spike': lambda i: link.Spike((9, 'a', i), 9, x, 0),
        'Relay': lambda i: link.Spike((9, 'b', i), 9, x, 2),
        'Grad': lambda i: link.Grad((9, 'c', i), 9, x, e, 0, 1),
        'Answer': lambda i: link.Answer((5, -i), 0, e, 0),
    }
    names = list(makers) if kind == 'all' else [kind]

    def check():
        too_large = {n: s for n, s in held(trainer).items() if s > 4}
        assert not too_large

    for i in range(12):  # one at a time: none is lost on the way
        for name in names:
            trainer.mailbox.put(makers[name](i))
            trainer.serve(0.0)
            check()
    dropped = trainer.staleness()[5]['dropped']
    assert dropped == {
        'Spike': 0,
        'Relay': 8,
        'Grad': 8,
        'Answer': 0
    }.get(kind, 16)
    answers = len(sinks[9].take('Answer'))
    # Spikes that get no room are answered early, without the children.
    assert answers >= {
        'Spike': 12,
        'Relay': 7,
        'Grad': 0,
        'Answer': 0
    }.get(kind, 19)
    for i in range(30):  # more than a mailbox holds in each step
        for j in range(3):
            for name in names:
                trainer.mailbox.put(makers[name](100 + 3 * i + j))
        trainer.close_step(*trainer.batches.next(), None)
        check()
    if kind != 'Answer':
        for j in range(6):
            trainer.mailbox.put(makers[names[0]](1000 + j))
        assert trainer.staleness()[5]['dropped'] >= dropped + 2


@asynchronous
def test_own_questions_that_get_no_answer_do_not_pile_up(folder):
    settings = conftest.make_settings(mailbox=4)
    trainer, _ = make_lone(folder, settings)
    for _ in range(12):
        trainer.step()
        assert max(held(trainer).values()) <= 4
    assert trainer.staleness()[5]['dropped'] == 8


@asynchronous
@pytest.mark.parametrize('asked', ['own', 'relayed'])
def test_a_lost_answer_leaves_nothing_behind(folder, asked):
    settings = conftest.make_settings(inputs='real', deadline=5.0, depth=2)
    link, clock = conftest.load(folder).link, Clock()
    trainer, sinks = make_lone(folder, settings, clock=clock)
    x, e = random_x(settings, 1), random_embedding(settings, 2)
    own = None
    if asked == 'own':
        *batch, own = trainer.open_step()
    else:
        batch = trainer.batches.next()
        trainer.mailbox.put(link.Spike((9, 1), 9, x, 1))
        trainer.serve(0.0)
    spikes = sinks[0].take('Spike')
    assert len(spikes) == 1 and max(held(trainer).values()) == 1
    clock.now = 6.0
    trainer.serve(0.0)
    if asked == 'relayed':
        answer, = sinks[9].take('Answer')
        expected = trainer.mach(x, trainer.student(x))
        conftest.assert_close([answer.embedding], [expected])
        trainer.mailbox.put(link.Grad((9, 1), 9, x, e, 0, 1))
    # It comes after all: nobody wants it any more.
    trainer.mailbox.put(link.Answer(spikes[0].key, 0, e, 0))
    student = conftest.snapshot(trainer.student)
    if asked == 'own':
        trainer.close_step(*batch, own)
    else:
        *batch, own = trainer.open_step()
        spikes = sinks[0].take('Spike')
        trainer.mailbox.put(link.Answer(spikes[0].key, 0, e, 0))
        trainer.close_step(*batch, own)
    assert max(held(trainer).values()) == 0, held(trainer)
    assert conftest.same(conftest.snapshot(trainer.student),
                         student) == (asked == 'own')


@asynchronous
def test_a_grad_that_overtakes_its_answer_leaves_nothing_behind(folder):
    """Its sender gave up before the Spike was answered."""
    settings = conftest.make_settings(inputs='real', deadline=5.0, depth=2)
    link, clock = conftest.load(folder).link, Clock()
    trainer, _ = make_lone(folder, settings, clock=clock)
    x, e = random_x(settings, 1), random_embedding(settings, 2)
    trainer.mailbox.put(link.Spike((9, 1), 9, x, 1))
    trainer.serve(0.0)
    clock.now = 6.0
    trainer.mailbox.put(link.Grad((9, 1), 9, x, e, 0, 0))
    trainer.close_step(*trainer.batches.next(), None)
    clock.now = 100.0
    trainer.serve(0.0)
    left = held(trainer)
    assert max(left.values()) == 0, left


# ------------------------------------------------- 7. cycles cannot deadlock


@asynchronous
def test_cycles_cannot_deadlock(folder):
    """All are locked, and all wait for each other: every answer comes."""
    modules = conftest.load(folder)
    settings = conftest.make_settings(inputs='real', depth=2)
    trainers = conftest.make_threads(modules, COMPLETE, settings)
    complete = []
    for trainer in trainers:

        def close(x, y, inquiry, close=trainer.close_step):
            complete.append(sorted(inquiry.answers))
            close(x, y, inquiry)

        trainer.close_step = close
    conftest.run_threads(trainers, 5)
    assert sorted(complete) == sorted(COMPLETE * 5)
    for trainer in trainers:
        assert trainer.staleness()[trainer.index]['dropped'] == 0


# ------------------------------------------------------ depth and staleness


@asynchronous
@pytest.mark.parametrize('depth', [0, 1, 3])
def test_spikes_go_as_deep_as_they_say(folder, depth, still):
    settings = conftest.make_settings(depth=4)
    link = conftest.load(folder).link
    trainer, sinks = make_lone(folder, settings, children=(0, 1))
    x = random_x(settings, 1)
    trainer.mailbox.put(link.Spike((9, 1), 9, x, depth))
    trainer.serve(0.0)
    for child in (0, 1):
        spikes = sinks[child].take('Spike')
        assert [s.depth for s in spikes] == ([depth - 1] if depth else [])
        assert all(s.x is x and s.sender == 5 for s in spikes)
        if depth:
            assert not sinks[9].messages
            trainer.mailbox.put(
                link.Answer(spikes[0].key, child, random_embedding(settings, 3),
                            0))
            trainer.serve(0.0)
    answer, = sinks[9].take('Answer')
    inputs = trainer.student(x)
    if depth:
        inputs = random_embedding(settings, 3).unsqueeze(1).expand(-1, 2, -1)
    expected = trainer.mach(x, inputs)
    assert (answer.key, answer.sender, answer.version) == ((9, 1), 5, 0)
    conftest.assert_close([answer.embedding], [expected])


@asynchronous
@pytest.mark.parametrize('inputs', ['synthetic', 'real'])
@pytest.mark.parametrize('depth', [0, 1, 3])
def test_own_messages_go_as_deep_as_the_experiment_says(folder, depth, inputs,
                                                        still):
    settings = conftest.make_settings(depth=depth, inputs=inputs)
    trainer, sinks = make_lone(folder, settings, children=(0, 1))
    x, y, inquiry = trainer.open_step()
    assert (inquiry is not None) == (inputs == 'real' and depth > 0)
    trainer.close_step(x, y, inquiry)
    for child in (0, 1):
        spike, = sinks[child].take('Spike')
        assert spike.depth == max(0, depth - 1) and spike.x is x
        grads = sinks[child].take('Grad')
        assert [g.depth for g in grads] == ([depth - 1] if depth else [])
        assert all(g.key == spike.key for g in grads), 'they share a forward'


@asynchronous
@pytest.mark.parametrize('depth', [0, 1, 3])
def test_grads_go_as_deep_as_they_say(folder, depth, still):
    settings = conftest.make_settings(depth=1)
    link = conftest.load(folder).link
    trainer, sinks = make_lone(folder, settings, children=(0, 1))
    for number in (1, 2):
        trainer.mailbox.put(
            link.Grad((9, number), 9, random_x(settings, number, 2 + number),
                      random_embedding(settings, 5, 2 + number), 0, depth))
    x, y, inquiry = trainer.open_step()
    trainer.close_step(x, y, inquiry)
    for child in (0, 1):
        grads = sinks[child].take('Grad')
        assert grads[0].x is x and grads[0].depth == 0
        assert [g.depth for g in grads[1:]
               ] == ([depth - 1] * 2 if depth else [])
        assert len({g.key for g in grads}) == len(grads), 'one key, one x'


@asynchronous
def test_staleness_is_counted(folder):
    modules = conftest.load(folder)
    settings = conftest.make_settings()
    child, parent = conftest.make_threads(modules, [[], [0]], settings)

    def late():
        found = child.staleness()[0]
        return found['staleness'], found['staleness_max']

    assert math.isnan(late()[0])  # no Grad has come
    parent.step()  # nothing seen of the child: it is at 0
    child.step()  # at 0, applies it: 0 late; answers at 0
    assert late() == (0, 0)
    child.step()
    child.step()
    parent.step()  # has seen 0
    child.step()  # at 3: 3 late; answers at 3
    assert late() == (3 / 2, 3)
    parent.step()  # has seen 3
    parent.step()  # the same: the child has not answered yet
    child.serve(0.0)  # at 4: answers; Grads are kept for the next step
    assert late() == (3 / 2, 3)
    child.step()  # at 4: twice 1 late
    assert late() == (5 / 4, 3)
    parent.step()  # has seen 4
    child.step()  # at 5: 1 late
    assert late() == (6 / 5, 3)
    assert child.report()[0]['staleness'] == 6 / 5
    assert math.isnan(parent.staleness()[1]['staleness'])


@asynchronous
def test_staleness_is_that_of_the_answer_used(folder):
    """Whatever else the parent has seen in the meantime."""
    settings = conftest.make_settings(inputs='real')
    link = conftest.load(folder).link
    trainer, sinks = make_lone(folder, settings)
    x, y, inquiry = trainer.open_step()
    spike, = sinks[0].take('Spike')
    e = random_embedding(settings, 1)
    trainer.mailbox.put(link.Answer(spike.key, 0, e, 11))
    trainer.mailbox.put(link.Answer((5, -1), 0, e, 13))
    trainer.serve(0.0)
    trainer.close_step(x, y, inquiry)
    grad, = sinks[0].take('Grad')
    assert grad.version == 11
