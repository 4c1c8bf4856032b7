"""How MACHs talk: what they ask, answer, relay, keep and drop; links, turns."""

import collections
import itertools
import math
import queue
import threading
import types
from unittest import mock

import conftest
import pytest
import torch
from conftest import WIDTH, Clock, Sink, draw, make_lone, make_many

both_inputs = pytest.mark.parametrize('inputs', ['synthetic', 'real'])


@pytest.fixture(name='folder', params=conftest.ASYNCHRONOUS)
def _folder(request):
    """Each test runs for both asynchronous experiments."""
    return request.param


def test_an_unlocked_parent_never_waits(folder):
    """Its steps are the same in every bit, whatever state its child is in."""
    found = {}
    for state in ('stopped', 'dead', 'full', 'far'):
        latency = 1.0 if state == 'far' else 0.0
        child, parent = make_many(folder, [[], [0]], latency=latency)
        if state == 'dead':
            parent.exchange.links[0] = Sink()
        if state == 'full':
            child.exchange.mailbox.limit = 1
        parent.exchange.mailbox._arrival.wait = conftest.never_wait
        found[state] = []
        for _ in range(6):
            parent.step()
            found[state].append(conftest.weights(parent.network))
            if state == 'far':
                child.step()
    assert not torch.equal(*found['stopped'][:2])
    for steps in found.values():
        assert all(map(torch.equal, steps, found['stopped']))


@pytest.mark.parametrize('children, depth', [((), 1), ((0,), 0)])
def test_a_locked_mach_without_questions_does_not_wait(folder, children, depth):
    trainer, _, _ = make_lone(folder, children, inputs='real', depth=depth)
    trainer.step(lambda: pytest.fail('it is about to wait'))


def test_a_locked_mach_goes_on_at_the_deadline(folder, still):
    """A synthetic input replaces the answer that is missing."""
    clock, told, inputs = Clock(), draw(1, 4, WIDTH), []
    names = dict(inputs='real', deadline=3.55)
    trainer, sinks, tell = make_lone(folder, (0, 1), clock, **names)
    trainer.network.joiner.register_forward_pre_hook(
        lambda _, given: inputs.append(given[0].detach().clone()))

    def answer():
        for spike in sinks[1].take('Spike'):
            tell('Answer', spike.key, 1, told, 2, spike.depth)
            tell('Answer', (5, -1), 1, told, 3, 1)  # to no question

    trainer.step(answer)
    assert clock.now == pytest.approx(3.55)
    (x, _), = trainer.batches.taken
    expected = torch.stack([trainer.student(x)[:, 0], told], 1)
    assert torch.equal(inputs[-1], expected.flatten(1))
    for child, version in ((0, -1), (1, 2)):
        grad, = sinks[child].take('Grad')
        assert torch.equal(grad.x, x) and grad.version == version


@pytest.mark.parametrize('asked, seconds', [('own', 21.0), ('relay', 10.5),
                                            ('lesson', 40.0)])
@pytest.mark.parametrize('late', [-0.1, 0.1])
def test_deadlines_come_on_top_of_the_time_on_links(folder, asked, seconds,
                                                    late):
    """A relay's is earlier, so that its answer still arrives in time."""
    clock, x, told = Clock(), draw(1), draw(2, 4, WIDTH)
    names = dict(deadline=1.0, latency=4.0, jitter=1.0)
    trainer, sinks, tell = make_lone(folder, clock=clock, **names)
    exchange = trainer.exchange
    if asked == 'relay':
        tell('Spike', (9, 1), 9, x, 1)
        trainer.serve(0.0)
    else:
        exchange.ask(x, 1, waits=asked == 'own')
    own, = exchange.pending.values()
    spike, = sinks[0].take('Spike')
    clock.now = seconds + late
    trainer.serve(0.0)
    tell('Answer', spike.key, 0, told, 0, spike.depth)
    trainer.serve(0.0)
    assert list(own.answers) == [0] * (late < 0) and not exchange.pending
    assert len(sinks[9].take('Answer')) == (asked == 'relay')


@pytest.mark.parametrize('depth', [0, 1, 3])
def test_spikes_go_as_deep_as_they_say(folder, depth):
    """They are answered without dropout, with the number of steps taken."""
    trainer, sinks, tell = make_lone(folder, (0, 1), depth=0, dropout=0.5)
    trainer.step()
    x, told = draw(1), draw(3, 4, WIDTH)
    tell('Spike', (9, 1), 9, x, depth)
    trainer.serve(0.0)
    for child in (0, 1):
        _, *spikes = sinks[child].take('Spike')
        assert [s.depth for s in spikes] == ([depth - 1] if depth else [])
        if depth:
            assert spikes[0].x is x and spikes[0].sender == 5
            assert not sinks[9].messages
            tell('Answer', spikes[0].key, child, told, 0, depth - 1)
            trainer.serve(0.0)
    answer, = sinks[9].take('Answer')
    inputs = torch.stack([told, told], 1) if depth else trainer.student(x)
    assert (answer.key, answer.sender) == ((9, 1), 5)
    assert (answer.version, answer.depth) == (1, depth)
    expected = trainer.network.answer(trainer.network(x, inputs))
    assert torch.allclose(answer.value, expected)


@pytest.mark.parametrize('depth', [1, 3])
@pytest.mark.parametrize('finished', [False, True])
def test_a_locked_mach_sends_all_gradients_on_at_once(folder, depth, finished):
    trainer, sinks, tell = make_lone(folder, (0, 1), depth=depth, inputs='real')
    if finished:
        trainer.settings.steps = 0
    for left in (depth - 1, depth):
        rows = 6 + left
        tell('Grad', (9, left), 9, draw(1, rows), draw(2, rows, WIDTH), 0, left)
    trainer.serve(0.0) if finished else trainer.step(lambda: True)
    expected = {4: depth - 1, 6 + depth: depth - 1}  # rows -> depth
    if depth > 1:
        expected |= {5 + depth: depth - 2}
    for child in (0, 1):
        spike, = sinks[child].take('Spike')
        assert spike.depth == depth - 1
        sent = {len(grad.x): grad for grad in sinks[child].take('Grad')}
        assert {rows: grad.depth for rows, grad in sent.items()} == expected
        keys = {grad.key for grad in sent.values() if grad.key[0] == 5}
        assert len(keys) == len(expected), 'each has a new key'
        assert spike.key == sent[4].key and torch.equal(spike.x, sent[4].x)


@pytest.mark.parametrize('k, grad_depth, edges',
                         [(5, 0, 0), (5, 1, 1), (5, 3, 3), (3, 0, 0),
                          (3, 3, 1)])
def test_grads_take_turns_by_the_edges_behind_them(folder, k, grad_depth,
                                                   edges):
    """One about own rows, then about others'; one edge if k - 1 are children.

    A Spike is about the same rows, so they share a forward.
    """
    trainer, sinks, tell = make_lone(folder, (0, 1), k=k, grad_depth=grad_depth)
    others = {left: draw(left, 9 + left) for left in range(edges)}
    for left, x in others.items():
        tell('Grad', (9, left), 9, x, draw(9, len(x), WIDTH), 0, left)
    for step in range(2 * max(1, edges)):
        trainer.step()
        left = edges - step % max(1, edges)
        source = others.get(left, trainer.batches.taken[-1][0])
        for child in (0, 1):
            spike, = sinks[child].take('Spike')
            assert len(spike.x) == 4 and spike.depth == 1
            assert all((source == row).all(1).any() for row in spike.x)
            grads = sinks[child].take('Grad')
            found = [(one.key, one.depth) for one in grads]
            assert found == [(spike.key, left - 1)] * (edges > 0)
            assert all(torch.equal(one.x, spike.x) for one in grads)


# ------------------------------------------------------ what a step may take


def take(exchange):
    """The numbers of all Spikes, Grads and Answers that a step takes."""
    exchange.receive()
    served, lessons = exchange.take()
    return (sorted(block.spike.key[1] for block in served if block.spike),
            sorted(block.grad.key[1] for block in served if block.grad),
            sorted(
                int(answer.value[0, 0])
                for block in lessons
                for answer in block.answers.values()))


def test_a_step_takes_one_message_of_each_kind_sender_and_depth(folder):
    """The newest unused Spike and Grad. A second Answer to a Spike is ignored."""
    trainer, sinks, tell = make_lone(folder, (0, 1))
    exchange, d = trainer.exchange, draw(1, 4, WIDTH)
    for i, sender, depth in itertools.product((1, 2, 3), (0, 1), (0, 1)):
        number = 100 * sender + 10 * depth + i
        tell('Grad', (sender, number), sender, draw(i), d, 0, depth)
        tell('Spike', (sender, number), sender, draw(i), depth)
        key = exchange.ask(draw(i), depth).key
        for value in (number, 99):
            tell('Answer', key, sender, torch.full_like(d, value), 0, depth)
    for i in (3, 2, 1):
        sinks[0].messages.clear()
        spikes, grads, answers = take(exchange)
        assert spikes == [i, 100 + i]
        assert grads == [i, 10 + i, 100 + i, 110 + i]
        assert [n - n % 10 for n in answers] == [0, 10, 100, 110]
        assert len(sinks[0].messages) == 2, 'Spikes that it relays'


def keep(folder, most, monkeypatch):
    """Has an Exchange keep fewer messages of a kind, sender and depth."""
    module = conftest.load(folder).exchange
    monkeypatch.setattr(module, 'KEPT', dict.fromkeys(module.KEPT, most))


def test_a_student_learns_from_any_of_the_last_answers(folder, monkeypatch):
    """Each child's is drawn by itself, new or not. None counts as dropped."""
    keep(folder, 3, monkeypatch)
    trainer, _, tell = make_lone(folder, (0, 1))
    exchange, d = trainer.exchange, draw(1, 4, WIDTH)
    for i in range(5):
        key = exchange.ask(draw(i), 0).key
        for child in 0, 1:
            value = torch.full_like(d, 10 * child + i)
            tell('Answer', key, child, value, 0, 0)
    drawn = collections.Counter(tuple(take(exchange)[2]) for _ in range(300))
    last = itertools.product((2, 3, 4), (12, 13, 14))
    assert set(drawn) == set(last) and min(drawn.values()) > 10
    assert exchange.dropped == 0


def test_a_step_without_a_new_grad_reuses_an_old_one(folder, monkeypatch):
    """It is drawn from the last KEPT. A Spike is answered once."""
    keep(folder, 3, monkeypatch)
    trainer, _, tell = make_lone(folder)
    exchange = trainer.exchange

    def step(*numbers):
        for number in numbers:
            tell('Spike', (9, number), 9, draw(number), 0)
            tell('Grad', (9, number), 9, draw(number), draw(1, 4, WIDTH), 0, 0)
        return take(exchange)[:2]

    assert step() == ([], [])
    assert step(1, 2) == ([2], [2])
    assert step() == ([1], [1])
    assert {str(step()) for _ in range(30)} == {'([], [1])', '([], [2])'}
    assert step(3, 4, 5, 6) == ([6], [6])
    assert exchange.dropped == 2, 'a Spike and a Grad that were never used'
    assert step() == ([5], [5])
    assert step(7) == ([7], [7])
    assert exchange.dropped == 4
    found = {str(step()) for _ in range(60)}
    assert found == {'([], [5])', '([], [6])', '([], [7])'}


def test_staleness_counts_steps_of_the_receiver(folder):
    child, parent = make_many(folder, [[], [0]])
    tally = child.tally
    parent.step()  # it has not heard of the child: nobody knows how late
    for _ in range(3):  # the child answers at 0, and reuses the Grad
        child.step()
    assert math.isnan(tally.staleness)
    parent.step()  # it has seen 0
    child.step()  # at 3: 3 late; it answers at 3
    parent.step()  # it has seen 3
    parent.step()  # the same, as the child has not answered yet
    child.step()  # at 4: the newest Grad, 1 late
    child.step()  # at 5: the other Grad, 2 late
    assert (tally.staleness, tally.staleness_max) == ((3 + 1 + 2) / 3, 3)
    parent.step()  # it has seen 4
    tally.steps = 2  # resumed: the Grad is about a later step
    child.step()
    assert (tally.staleness, tally.staleness_max) == (6 / 4, 3)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_message_that_is_not_finite_is_dropped(folder, value):
    trainer, _, tell = make_lone(folder)
    exchange = trainer.exchange
    x, bad = draw(1), draw(2, 4, WIDTH)
    bad[1, 2] = value
    tell('Grad', (9, 1), 9, x, bad, 0, 0)
    tell('Answer', exchange.ask(x, 0).key, 0, bad, 0, 0)
    tell('Spike', (9, 2), 9, value * x, 0)  # its row would spoil the gradient
    assert take(exchange) == ([], [], []) and exchange.dropped == 3


def test_keys_never_repeat(folder):
    """Not even those of an earlier process of the same MACH."""
    keys = []
    for _ in range(3):
        trainer, sinks, _ = make_lone(folder)
        for _ in range(20):
            trainer.step()
        keys += [spike.key for spike in sinks[0].take('Spike')]
    assert len({*keys}) == len(keys) == 60


@both_inputs
def test_a_message_never_changes_after_it_is_sent(folder, inputs):
    sent, names = [], dict(inputs=inputs, dropout=0.2, share=0.5)
    trainers = make_many(folder, conftest.GRAPHS['cycle'], sent=sent, **names)
    for one in 6 * trainers:
        conftest.take_step(one, trainers)
    assert {type(m).__name__ for m, _ in sent} == {'Spike', 'Answer', 'Grad'}
    networks = [n for one in trainers for n in (one.network, one.student)]
    live = {p.data_ptr() for n in networks for p in n.parameters()}
    for message, before in sent:
        assert all(map(torch.equal, conftest.tensors(message), before)), message
        for tensor in conftest.tensors(message):
            assert not tensor.requires_grad and tensor.data_ptr() not in live
        with pytest.raises(AttributeError):
            message.key = None


# ---------------------------------------------------------- memory is bounded


@pytest.mark.parametrize('kind, inputs, answered, dropped',
                         [('Spike', 'synthetic', 12, 0),
                          ('Relay', 'synthetic', 8, 8),
                          ('Relay', 'real', 10, 17),
                          ('Grad', 'synthetic', 0, 8),
                          ('Answer', 'synthetic', 0, 0),
                          ('Question', 'synthetic', 0, 8)])
def test_a_flood_does_not_fill_the_memory(folder, kind, inputs, answered,
                                          dropped, monkeypatch):
    """What makes room is counted. A Spike that makes room is answered early."""
    keep(folder, 4, monkeypatch)
    monkeypatch.setattr(conftest.load(folder).exchange, 'PENDING', 4)
    trainer, sinks, tell = make_lone(folder, inputs=inputs)
    x, d = draw(1), draw(2, 4, WIDTH)
    exchange = trainer.exchange
    flood = dict(Spike=lambda i: tell('Spike', (9, i), 9, x, 0),
                 Relay=lambda i: tell('Spike', (9, i), 9, x, 2),
                 Grad=lambda i: tell('Grad', (9, i), 9, x, d, 0, 1),
                 Answer=lambda i: tell('Answer', (5, -i), 0, d, 0, 1),
                 Question=lambda _: exchange.ask(x, 1))
    for i in range(12):
        flood[kind](i)
        trainer.serve(0.0)
        assert all(len(ring) <= 4 for ring in exchange._arrived.values())
        # A locked relay that made room is kept for its Grad.
        assert len(exchange.pending) <= (8 if inputs == 'real' else 4)
    assert exchange.dropped == dropped
    assert len(sinks[9].take('Answer')) == answered


def test_dropped_and_lost_messages_are_counted(folder):
    """A full mailbox drops the oldest. `serve` answers all Spikes left."""
    trainer, sinks, tell = make_lone(folder)
    trainer.exchange.mailbox.limit = 4
    for i in range(6):
        tell('Spike', (9, i), 9, draw(1), 0)
    sinks[0].dropped, sinks[0].lost, trainer.exchange.dropped = 10, 20, 30
    trainer.tally.lost_to[0] = 5  # before a restart
    tally = trainer.snapshot()[5].tally
    assert tally.dropped == 2 + 10 + 30
    assert tally.lost_to == {0: 25, 9: 0} and tally.lost == 25
    assert trainer.tally.lost_to == {0: 5}
    trainer.serve(0.0)
    assert {a.key[1] for a in sinks[9].take('Answer')} == {2, 3, 4, 5}


@pytest.mark.parametrize('order', [1, -1])
def test_a_locked_relay_is_kept_for_its_grad(folder, order, still):
    """The Grad meets the same inputs, also if it comes before the answer."""
    trainer, sinks, tell = make_lone(folder, inputs='real')
    x, told, pull = draw(1, 3), draw(2, 3, WIDTH), draw(3, 3, WIDTH)
    tell('Spike', (9, 1), 9, x, 1)
    trainer.serve(0.0)
    spike, = sinks[0].take('Spike')
    first, last = [('Answer', spike.key, 0, told, 17, 0),
                   ('Grad', (9, 1), 9, x, pull, 0, 1)][::order]
    tell(*first)
    trainer.serve(0.0)
    tell(*last)
    assert len(trainer.exchange.pending) == 1
    own = conftest.load(folder).exchange.Block(draw(4), key=(5, 99))
    trainer.learn(own, torch.arange(4))
    answer, = sinks[9].take('Answer')
    inputs = told.unsqueeze(1).requires_grad_()
    expected = trainer.network.answer(trainer.network(x, inputs))
    assert answer.key == (9, 1) and torch.allclose(answer.value, expected)
    sent, = (grad for grad in sinks[0].take('Grad') if len(grad.x) == 3)
    assert (sent.key, sent.version, sent.depth) == (spike.key, 17, 0)
    expected, = torch.autograd.grad(expected, inputs, pull)
    assert torch.allclose(sent.gradient, expected[:, 0])
    assert not trainer.exchange.pending


# ----------------------------------------------------------- links, mailboxes


def connect(folder, *conditions, seed='a'):
    """A clock, a mailbox, and a Link of (latency, jitter, loss_rate) to it."""
    link, clock = conftest.load(folder).link, Clock()
    mailbox = link.Mailbox(9999, clock)
    mailbox._arrival.wait = clock.wait
    return clock, mailbox, link.Link(mailbox, *conditions, seed=seed)


def test_messages_come_when_they_are_due_and_in_that_order(folder):
    """Messages that are due at once come in the order of sending."""
    clock, mailbox, slow = connect(folder, 3.0)
    fast = conftest.load(folder).link.Link(mailbox, 1.0)
    one, two, three, four = [object() for _ in range(4)]  # they have no order
    slow.send(one)
    slow.send(two)
    clock.now = 2.5
    fast.send(three)
    slow.send(four)
    came = []
    for clock.now in (2.75, 3.0, 3.25, 3.5, 5.25, 5.5):
        came.append(mailbox.collect())
    assert came == [[], [one, two], [], [three], [], [four]]


def test_links_delay_and_lose_messages_at_random(folder):

    def draw_all(seed, jitter, loss_rate):
        _, mailbox, link = connect(folder, 2.0, jitter, loss_rate, seed=seed)
        for i in range(2000):
            link.send(i)
        assert link.lost == 2000 - len(mailbox._messages)
        return sorted((i, due) for due, _, i in mailbox._messages)

    assert draw_all('a', 0.0, 0.0) == [(i, 2.0) for i in range(2000)]
    assert draw_all('a', 0.0, 1.0) == []
    found = draw_all('a', 1.0, 0.3)
    assert draw_all('a', 1.0, 0.3) == found != draw_all('b', 1.0, 0.3)
    assert 1340 < len(found) < 1460
    delays = [due for _, due in found]
    assert 2.0 <= min(delays) < 2.02 and 2.98 < max(delays) <= 3.0
    assert abs(sum(delays) / len(delays) - 2.5) < 0.05


def test_a_full_mailbox_still_delivers(folder):
    """It drops the oldest that has come, but none of those on their way."""
    clock, mailbox, far = connect(folder, 10.0)
    mailbox.limit = 3
    for i in range(5):
        clock.now = i
        far.send(i)
    assert mailbox.dropped == 2
    clock.now = 11.5
    far.send(5)  # 0 and 1 have come, 2 is on its way
    assert mailbox.dropped == 3 and mailbox.collect() == [1]
    clock.now = 21.5
    assert mailbox.collect() == [2, 5]


def test_a_mailbox_waits_until_the_first_message_is_due(folder):
    clock, mailbox, slow = connect(folder, 3.0)
    fast = conftest.load(folder).link.Link(mailbox, 0.5)
    assert mailbox.collect(7.0) == []
    slow.send('a')  # due at 10
    assert mailbox.collect(1.0) == mailbox.collect() == []
    fast.send('b')  # at 8: due at 8.5
    assert mailbox.collect(9.0) == ['b'] and mailbox.collect(9.0) == ['a']
    assert clock.waits == [7.0, 1.0, 0.5, 1.5]


@pytest.mark.parametrize('messages', [(), ('far',)])
def test_a_new_message_wakes_the_owner_of_a_mailbox(folder, messages):
    """It may be due before the message that the owner waits for."""
    link = conftest.load(folder).link
    mailbox, waiting = link.Mailbox(9, clock=lambda: 0.0), threading.Event()
    wait = mailbox._arrival.wait
    mailbox._arrival.wait = lambda timeout: (waiting.set(), wait(timeout))
    for message in messages:
        mailbox.put(message, 1e6)

    def send():
        waiting.wait(60)
        link.Link(mailbox).send('a')

    threading.Thread(target=send, daemon=True).start()
    assert conftest.within(60, lambda: mailbox.collect(1e5)) == ['a']


def test_every_edge_has_two_links_that_draw_by_themselves(folder, monkeypatch):
    main, links = conftest.load_main(folder), {}
    monkeypatch.setattr(main.data, 'deal',
                        lambda *_: [conftest.Batches(i) for i in range(3)])
    monkeypatch.setattr(main, 'Link', lambda *given: given)
    settings = main.Hyperparameters(k=3, latency=5, jitter=2, loss_rate=0.5)
    trainers = main.make_trainers(settings, None)
    for one in trainers:
        for other, (mailbox, *given, seed) in one.exchange.links.items():
            assert mailbox is trainers[other].exchange.mailbox
            assert given == [5, 2, 0.5]
            links[one.index, other] = seed
    for i, children in enumerate(main.children_of(settings)):
        for j in children:
            assert {(i, j), (j, i)} <= set(links)
    assert len(set(links.values())) == len(links), 'all seeds differ'


def test_turns(folder, monkeypatch):
    """Two MACHs compute at once. The others wait in order, 10 s at most."""
    main, waited, woken = conftest.load_main(folder), [], []

    class Event:

        def wait(self, seconds):
            waited.append((self, seconds))

        def set(self):
            woken.append(self)

    stub = types.SimpleNamespace(Event=Event, Lock=threading.Lock)
    monkeypatch.setattr(main, 'threading', stub)
    turns = main.Turns(2)
    for _ in range(5):
        turns.__enter__()
    events, seconds = zip(*waited)
    assert seconds == (10, 10, 10)
    for count in (1, 2, 3, 3, 3):
        turns.__exit__(None, None, None)
        assert woken == list(events[:count])
    for _ in range(2):
        with pytest.raises(ValueError), turns, turns:
            raise ValueError
    assert len(waited) == 3, 'all turns were given back'


def test_a_mach_that_waits_for_its_turn_takes_no_step_after_a_signal(
        monkeypatch, folder):
    main, halt = conftest.load_main(folder), threading.Event()
    turns, trainer = main.Turns(1), mock.MagicMock(steps_taken=0,
                                                   finished=False)
    monkeypatch.setattr(main, 'TURNS', turns)
    thread = threading.Thread(target=main.work,
                              args=(trainer, main.Hyperparameters(),
                                    queue.Queue(), halt))
    with turns:
        thread.start()
        assert conftest.wait_until(lambda: turns._waiting)
        halt.set()
    thread.join(10)
    assert not thread.is_alive() and not trainer.step.called
