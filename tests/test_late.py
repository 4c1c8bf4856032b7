"""Late and lossy links, and what a MACH makes of answers that come late.

No test looks at a real clock or waits: seconds pass when the test says so.
"""

import itertools
import math
import threading
import types

import conftest
import pytest
import test_invariants as invariants
import torch
from torch.nn import functional

ASYNCHRONOUS = ('asynchronous_sequence', 'asynchronous_kgraph')
INPUTS = ('synthetic', 'late', 'both', 'real')
UNLOCKED = INPUTS[:3]
LATE = INPUTS[1:3]  # those that train on answers whenever they come
# Inputs with which a new row's Grads are sent in its first step, and no others
# with its answers. Else they wait for these, to be those at real inputs.
AT_ONCE = ('synthetic', 'both', 'real')

asynchronous = pytest.mark.parametrize('folder', ASYNCHRONOUS)


class Impatient(threading.Condition):
    """Guards as any other, but nobody is to wait at it."""

    def wait(self, timeout=None):
        raise AssertionError(f'somebody waits, up to {timeout} s')


@pytest.fixture(autouse=True)
def _nobody_waits(monkeypatch):
    """Neither links nor trainers wait, sleep, or know what time it is."""
    for folder in ASYNCHRONOUS:
        modules = conftest.load(folder)
        monkeypatch.setattr(modules.link, 'threading',
                            types.SimpleNamespace(Condition=Impatient))
        for module in (modules.link, modules.trainer):
            monkeypatch.setattr(module, 'time', None)


@pytest.fixture(name='still')
def _still(monkeypatch):
    """Optimisers that leave the parameters and let their grads add up."""
    for folder in ASYNCHRONOUS:
        monkeypatch.setattr(
            conftest.load(folder).trainer, 'Optimiser', conftest.Still)


def make_late(folder, clock, conditions=(0.0, 0.0, 0.0), seed='a', limit=9999):
    """A mailbox, and a LateLink of (latency, jitter, loss_rate) to it."""
    link = conftest.load(folder).link
    mailbox = link.Mailbox(limit, clock)
    return mailbox, link.LateLink(mailbox, *conditions, seed)


def watch_arrivals(mailbox, clock, *links):
    """Lets time pass to the last message: when each has come, in that order."""
    came = {}
    while any(len(link) for link in links):
        due = min(link.next_due() for link in links)
        clock.now = math.nextafter(due, -math.inf)
        assert not mailbox.collect(), 'before it is due'
        clock.now = due
        came |= dict.fromkeys(mailbox.collect(), due)
    return came


def forget(*networks):
    """Drops the gradients that Still optimisers let add up."""
    for network in networks:
        for parameter in network.parameters():
            parameter.grad = None


def make_answer(folder, settings, spike, child, version=0):
    """The Answer of a child of the test: random, and another for each Spike."""
    told = invariants.random_embedding(settings, 1000 * child + spike.key[1],
                                       len(spike.x))
    return conftest.load(folder).link.Answer(spike.key, child, told, version,
                                             spike.asked)


def answer_all(folder, settings, trainer, sinks, children, version=0):
    """Answers all Spikes at these Sinks: key -> child -> embedding."""
    told = {}
    for child in children:
        for spike in sinks[child].take('Spike'):
            answer = make_answer(folder, settings, spike, child, version)
            trainer.mailbox.put(answer)
            told.setdefault(spike.key, {})[child] = answer.embedding
    return told


def stack(told):
    """{child: [B, E]} -> [B, n, E]."""
    return torch.stack([told[child] for child in sorted(told)], 1)


def step(trainer):
    """One step that waits for nothing; its batch."""
    x, y, inquiry = trainer.open_step()
    trainer.close_step(x, y, inquiry)
    return x, y


# ------------------------------------------------------------ 1. late links


def send_over_two(folder, clock):
    """A mailbox, its links, and (seconds, link, message) to send."""
    mailbox, slow = make_late(folder, clock, (3.0, 0.0, 0.0))
    fast = conftest.load(folder).link.LateLink(mailbox, 1.0, 0.0, 0.0, 'b')
    return mailbox, [(0.0, slow, 'a'), (0.0, slow, 'b'), (1.75, fast, 'c'),
                     (2.5, fast, 'd'), (2.5, slow, 'e')]


@asynchronous
def test_a_message_comes_when_it_is_due_and_not_before(folder):
    clock, came = invariants.Clock(), []
    mailbox, plan = send_over_two(folder, clock)
    for quarters in range(32):
        clock.now = quarters / 4
        for seconds, link, message in plan:
            if seconds == clock.now:
                link.send(message)
        came += [(clock.now, message) for message in mailbox.collect()]
    assert came == [(2.75, 'c'), (3.0, 'a'), (3.0, 'b'), (3.5, 'd'), (5.5, 'e')]


@asynchronous
def test_what_is_due_comes_by_due_time_over_all_links(folder):
    """However late the receiver looks."""
    clock = invariants.Clock()
    mailbox, plan = send_over_two(folder, clock)
    for clock.now, link, message in plan:
        link.send(message)
    assert len(mailbox) == 0 and len(plan[0][1]) == 3 and len(plan[2][1]) == 2
    clock.now = 5.0
    assert mailbox.collect() == ['c', 'a', 'b', 'd']
    clock.now = 6.0
    assert mailbox.collect() == ['e']
    assert (mailbox.dropped, mailbox.lost) == (0, 0)


@asynchronous
def test_without_jitter_the_order_is_that_of_sending(folder):
    """Also of what is sent at once, and messages have no order of their own."""
    clock = invariants.Clock()
    mailbox, link = make_late(folder, clock, (0.3, 0.0, 0.0))
    messages = [object() for _ in range(60)]
    for i, message in enumerate(messages):
        clock.now = i // 6 * 0.1
        link.send(message)
    clock.now = 0.45  # part of them
    came = mailbox.collect()
    assert 0 < len(came) < 60
    clock.now = 10.0
    assert came + mailbox.collect() == messages


@asynchronous
def test_jitter_adds_up_to_as_much_and_changes_the_order(folder):

    def delays(seed, jitter):
        clock = invariants.Clock()
        mailbox, link = make_late(folder, clock, (2.0, jitter, 0.0), seed)
        for i in range(300):
            clock.now = i / 100
            link.send(i)
        came = watch_arrivals(mailbox, clock, link)
        assert sorted(came) == list(range(300)), 'each once'
        return list(came), [came[i] - i / 100 for i in range(300)]

    order, found = delays('a', 1.0)
    assert order != sorted(order)
    assert 2.0 - 1e-9 <= min(found) < 2.02
    assert 2.98 < max(found) <= 3.0 + 1e-9
    assert abs(sum(found) / 300 - 2.5) < 0.1
    assert delays('a', 1.0) == (order, found)
    assert delays('b', 1.0)[1] != found
    order, found = delays('a', 0.0)
    assert order == sorted(order)
    assert max(abs(delay - 2.0) for delay in found) < 1e-9


@asynchronous
def test_a_late_link_makes_no_sender_wait(folder, monkeypatch):
    """The clock stands still, and the message takes longer than a life."""
    clock = invariants.Clock()
    mailbox, link = make_late(folder, clock, (1e9, 1e9, 0.5), limit=10)

    def sleep(seconds):
        raise AssertionError(f'sleeps {seconds} s')

    monkeypatch.setattr(
        conftest.load(folder).link, 'time', types.SimpleNamespace(sleep=sleep))
    for i in range(100):
        link.send(i)
    assert mailbox.collect() == [] and len(link) == 10
    assert clock.now == 0


def record_waits(mailbox, clock, monkeypatch):
    """Lets waiting at a mailbox take as long as it may: list of the seconds."""
    waits = []

    def wait(seconds):
        waits.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(mailbox.arrival, 'wait', wait)
    return waits


@asynchronous
def test_who_waits_for_mail_wakes_when_it_is_due(folder, monkeypatch):
    clock = invariants.Clock()
    mailbox, slow = make_late(folder, clock, (3.0, 0.0, 0.0))
    fast = conftest.load(folder).link.LateLink(mailbox, 0.5, 0.0, 0.0, 'b')
    waits = record_waits(mailbox, clock, monkeypatch)
    assert mailbox.collect(7.0) == [] and waits == [7.0], 'nothing on its way'
    slow.send('a')  # due at 10
    assert mailbox.collect(1.0) == [] and waits == [7.0, 1.0]
    assert mailbox.collect() == [] and waits == [7.0, 1.0]
    fast.send('b')  # at 8: due at 8.5
    assert mailbox.collect(9.0) == ['b'] and waits == [7.0, 1.0, 0.5]
    assert mailbox.collect(9.0) == ['a'] and waits == [7.0, 1.0, 0.5, 1.5]
    slow.send('c')  # at 10
    clock.now = 20.0
    assert mailbox.collect(9.0) == ['c'], 'overdue'
    mailbox.put('d')
    slow.send('e')
    assert mailbox.collect(9.0) == ['d'], 'there is mail'
    assert waits == [7.0, 1.0, 0.5, 1.5]


@asynchronous
def test_who_waits_for_mail_is_woken_by_what_is_sent(folder, monkeypatch):
    """It could be due before what is waited for."""
    clock = invariants.Clock()
    mailbox, late = make_late(folder, clock)
    waiting = threading.Event()

    def wait(seconds):
        waiting.set()
        return threading.Condition.wait(mailbox.arrival, seconds)

    monkeypatch.setattr(mailbox.arrival, 'wait', wait)

    def send():
        waiting.wait(60)
        late.send('a')

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert conftest.within(60, lambda: mailbox.collect(1e6)) == ['a']
    assert waiting.is_set()


@asynchronous
def test_latency_is_that_of_each_way(folder):
    link, clock = conftest.load(folder).link, invariants.Clock()
    settings = conftest.make_settings()
    child, parent = conftest.make_threads(conftest.load(folder), [[], [0]],
                                          settings, clock)
    parent.connect(0, link.LateLink(child.mailbox, 2.0, 0.0, 0.0, 'a'))
    child.connect(1, link.LateLink(parent.mailbox, 3.0, 0.0, 0.0, 'b'))
    parent.step()
    before, log = conftest.snapshot(parent.student), {}
    for clock.now in (0.0, 1.5, 2.0, 3.0, 4.5, 5.0):
        child.step()
        steps = child.staleness()[0]['staleness_max']
        # Not to ask again, it but looks; what it has learned from is seen.
        parent.serve(0.0)
        log[clock.now] = (parent.seen.get(0), steps)
    assert log == {
        0.0: (None, 0),
        1.5: (None, 0),
        2.0: (None, 2),  # applied at 2 steps, what was sent at 0
        3.0: (None, 2),
        4.5: (None, 2),
        5.0: (2, 2),
    }
    parent.close_step(*parent.batches.next(), None)
    assert not conftest.same(conftest.snapshot(parent.student), before)


@asynchronous
def test_the_deadline_is_on_top_of_what_links_take(folder, still):
    """Else who waits over a slow link gives each answer up."""
    link, clock = conftest.load(folder).link, invariants.Clock()
    settings = conftest.make_settings(inputs='real',
                                      deadline=1.0,
                                      latency=4.0,
                                      jitter=1.0)
    for seconds, real in ((10.9, True), (11.1, False)):
        clock.now = 0.0
        trainer, sinks = invariants.make_lone(folder, settings, clock=clock)
        x, y, inquiry = trainer.open_step()
        spike, = sinks[0].take('Spike')
        clock.now = seconds
        trainer.serve(0.0)
        answer = make_answer(folder, settings, spike, 0)
        trainer.mailbox.put(link.Answer(spike.key, 0, answer.embedding, 3))
        trainer.serve(0.0)
        trainer.close_step(x, y, inquiry)
        inputs = trainer.student(x)
        if real:
            inputs = answer.embedding.unsqueeze(1)
        loss = conftest.target_loss(trainer.mach,
                                    trainer.mach(x, inputs.detach()), y,
                                    settings)
        conftest.assert_close(conftest.grads_of(trainer.mach),
                              conftest.gradients(loss, [trainer.mach]))


# ------------------------------------------------------------------ 2. loss


def survivors(folder, loss_rate, seed, number=2000):
    """Which of so many messages arrive."""
    mailbox, link = make_late(folder,
                              invariants.Clock(), (0.0, 0.0, loss_rate),
                              seed=seed)
    for i in range(number):
        link.send(i)
    came = mailbox.collect()
    assert mailbox.lost == number - len(came) and mailbox.dropped == 0
    assert len(link) == 0
    return came


@asynchronous
def test_links_lose_as_many_as_they_are_told(folder):
    assert survivors(folder, 1.0, 'a') == []
    assert survivors(folder, 0.0, 'a') == list(range(2000))
    some = survivors(folder, 0.3, 'a')
    assert abs(len(some) / 2000 - 0.7) < 0.03
    lost = [i not in some for i in range(2000)]
    in_a_row = sum(one and two for one, two in itertools.pairwise(lost))
    assert abs(in_a_row / 2000 - 0.09) < 0.03, 'each by itself'
    assert survivors(folder, 0.3, 'a') == some
    others = survivors(folder, 0.3, 'b')
    assert abs(len(set(some) & set(others)) / 2000 - 0.49) < 0.04


@asynchronous
def test_what_is_lost_is_counted(folder):
    """Apart from what had to go for want of room, wherever that was."""
    settings, clock = conftest.make_settings(mailbox=4), invariants.Clock()
    link = conftest.load(folder).link
    trainer, _ = invariants.make_lone(folder, settings, clock=clock)
    late = link.LateLink(trainer.mailbox, 1.0, 0.0, 1.0, 'a')
    sure = link.LateLink(trainer.mailbox, 1.0, 0.0, 0.0, 'a')
    spikes = [
        link.Spike((9, number), 9, invariants.random_x(settings, number), 0)
        for number in range(7)
    ]

    def counts():
        found = trainer.staleness()[5]
        return found['lost'], found['dropped']

    assert counts() == (0, 0)
    for spike in spikes:
        late.send(spike)
    assert counts() == (7, 0)
    for spike in spikes:
        sure.send(spike)
    assert counts() == (7, 3), 'on its way'
    trainer.mailbox.put(spikes[0])
    clock.now = 2.0
    trainer.step()
    assert counts() == (7, 4), 'on delivery'


@asynchronous
@pytest.mark.parametrize('name', [None, 'latency', 'jitter', 'loss_rate'])
def test_a_link_is_late_where_a_condition_says_so(folder, name):
    main = conftest.load_main(conftest.ROOT / folder)
    settings = main.Hyperparameters(**({name: 0.5} if name else {}))
    mailbox = main.link.Mailbox(9, invariants.Clock())
    link = main.make_link(settings, mailbox, (0, 1))
    if name is None:
        assert type(link) is main.link.MailboxLink
        link.send('a')
        assert len(mailbox) == 1, 'at once'
    else:
        assert type(link) is main.link.LateLink


@asynchronous
def test_a_late_link_has_the_conditions_of_the_hyperparameters(folder):
    main, clock = conftest.load_main(conftest.ROOT / folder), invariants.Clock()
    settings = main.Hyperparameters(latency=5.0, jitter=0.25, loss_rate=0.125)
    mailbox = main.link.Mailbox(9999, clock)
    link = main.make_link(settings, mailbox, (0, 1))
    for i in range(1000):
        link.send(i)
    delays = watch_arrivals(mailbox, clock, link).values()
    assert mailbox.lost == 1000 - len(delays)
    assert abs(mailbox.lost / 1000 - 0.125) < 0.03
    assert 5.0 <= min(delays) < 5.01 and 5.24 < max(delays) <= 5.25


@asynchronous
def test_each_edge_draws_its_own(folder):
    main = conftest.load_main(conftest.ROOT / folder)

    def draw(edge, seed=0):
        settings = main.Hyperparameters(loss_rate=0.5, seed=seed)
        mailbox = main.link.Mailbox(99, invariants.Clock())
        link = main.make_link(settings, mailbox, edge)
        for i in range(64):
            link.send(i)
        return tuple(mailbox.collect())

    edges = [(0, 1), (1, 0), (1, 2), (0, 12), (11, 2)]
    drawn = [draw(edge) for edge in edges] + [draw((0, 1), seed=1)]
    assert len(set(drawn)) == len(drawn)
    assert [draw(edge) for edge in edges] == drawn[:5]


@asynchronous
def test_every_edge_has_a_link_of_its_own_each_way(folder, monkeypatch):
    main = conftest.load_main(conftest.ROOT / folder)
    settings = main.Hyperparameters(k=3, hidden=4, embedding=2, latency=1.0)
    made, make_link = {}, main.make_link

    def record(settings, mailbox, edge):
        made[edge] = mailbox, make_link(settings, mailbox, edge)
        return made[edge][1]

    monkeypatch.setattr(main, 'make_link', record)
    trainers = list(main.make_trainers(settings, [None] * 3).values())
    down = [(parent, child)
            for parent, children in enumerate(main.children_of(settings))
            for child in children]
    assert set(made) == {(i, j) for pair in down for i, j in (pair, pair[::-1])}
    for (sender, receiver), (mailbox, link) in made.items():
        assert mailbox is trainers[receiver].mailbox
        assert trainers[sender].links[receiver] is link
        assert type(link) is main.link.LateLink


# ---------------------------------------------------------------- 3. bounds


@asynchronous
def test_a_late_link_holds_as_many_as_a_mailbox(folder):
    clock = invariants.Clock()
    mailbox, link = make_late(folder, clock, (1.0, 0.0, 0.0), limit=3)
    other = conftest.load(folder).link.LateLink(mailbox, 1.0, 0.0, 0.0, 'b')
    for i in range(8):
        clock.now = i / 16
        link.send(i)
        assert len(link) == min(3, i + 1)
        assert mailbox.dropped == max(0, i - 2)
    other.send('a')  # has room of its own
    assert (len(link), len(other), mailbox.dropped) == (3, 1, 5)
    clock.now = 1 + 6.5 / 16
    assert mailbox.collect() == [5, 6]
    clock.now = 9.0
    assert mailbox.collect() == [7, 'a'] and mailbox.dropped == 5


@asynchronous
def test_what_is_due_first_goes_first(folder):
    """With jitter that need not be what was sent first."""
    conditions, clock = (1.0, 4.0, 0.0), invariants.Clock()
    roomy, link = make_late(folder, clock, conditions)  # draws the same
    for i in range(40):
        clock.now = i / 64
        link.send(i)
    due, expected = watch_arrivals(roomy, clock, link), []
    for i in range(40):
        expected = sorted([*expected, i], key=due.get)[-5:]
    clock.now = 0.0
    mailbox, link = make_late(folder, clock, conditions, limit=5)
    for i in range(40):
        clock.now = i / 64
        link.send(i)
    assert mailbox.dropped == 35
    clock.now = 99.0
    assert mailbox.collect() == expected != list(range(35, 40))


@asynchronous
def test_what_a_full_mailbox_drops_on_delivery_is_counted(folder):
    clock = invariants.Clock()
    mailbox, link = make_late(folder, clock, (1.0, 0.0, 0.0), limit=3)
    other = conftest.load(folder).link.LateLink(mailbox, 1.5, 0.0, 0.0, 'b')
    for i in range(3):
        link.send(i)
        other.send(str(i))
    mailbox.put('here')
    assert mailbox.dropped == 0
    clock.now = 1.0
    assert mailbox.collect() == [0, 1, 2] and mailbox.dropped == 1
    for i in range(2):
        link.send(i)  # due at 2, after what is due at 1.5
    clock.now = 3.0
    assert mailbox.collect() == ['2', 0, 1] and mailbox.dropped == 3
    assert (mailbox.lost, len(mailbox), len(link)) == (0, 0, 0)


# --------------------------------- 4. a lost message leaves nothing behind


class Losing:
    """A link that loses all messages of one kind."""

    def __init__(self, link, kind):
        self.lost, self._link, self._kind = 0, link, kind

    def send(self, message):
        if type(message).__name__ == self._kind:
            self.lost += 1
        else:
            self._link.send(message)


def end(trainers, clock):
    """One step more, which nobody hears of, and then a long time."""
    for trainer in trainers:
        for neighbour in trainer.links:
            trainer.connect(neighbour, invariants.Sink())
    for _ in range(2):  # what is on its way comes, and what it brings about
        clock.now += 1e6
        for trainer in trainers:
            trainer.serve(0.0)
    for trainer in trainers:
        trainer.close_step(*trainer.batches.next(), None)
    clock.now += 1e9  # longer than any trip so far
    for trainer in trainers:
        trainer.serve(0.0)


def assert_nothing_is_held(trainers):
    for trainer in trainers:
        found = invariants.held(trainer)
        assert not any(found.values()), (trainer.index, found)


@asynchronous
@pytest.mark.parametrize('kind', ['Spike', 'Answer', 'Grad'])
@pytest.mark.parametrize('inputs', INPUTS)
def test_a_lost_message_leaves_nothing_behind(folder, inputs, kind):
    """There is room for 8, and none ever lacks it: all are given up in time."""
    settings = conftest.make_settings(inputs=inputs, deadline=3.0, mailbox=8)
    clock, links = invariants.Clock(), []

    def lose(link):
        links.append(Losing(link, kind))
        return links[-1]

    child, parent = conftest.make_threads(conftest.load(folder), [[], [0]],
                                          settings, clock, lose)
    before = conftest.snapshot(parent.student)
    for _ in range(30):
        x, y, inquiry = parent.open_step()
        child.step()
        parent.serve(0.0)
        clock.now += 1.0
        if inquiry is not None and not inquiry.answers:
            clock.now += 3.0  # who waits, waits to the deadline
        parent.close_step(x, y, inquiry)
        assert max(invariants.held(parent).values()) <= 5
    end([child, parent], clock)
    assert_nothing_is_held([child, parent])
    assert sum(link.lost for link in links) >= 28
    for trainer in (child, parent):
        counts = trainer.staleness()[trainer.index]
        assert (counts['dropped'], trainer.steps_taken) == (0, 31)
    learned = not conftest.same(conftest.snapshot(parent.student), before)
    assert learned == (kind == 'Grad'), 'no answer, no lesson'
    pulled = not math.isnan(child.staleness()[0]['staleness'])
    assert pulled == (kind != 'Grad' and inputs in AT_ONCE)


@asynchronous
@pytest.mark.parametrize('inputs', INPUTS)
def test_whatever_is_lost_leaves_nothing_behind(folder, inputs):
    """Of Spikes that go two edges, round in a circle, and what they bring."""
    link, clock = conftest.load(folder).link, invariants.Clock()
    settings = conftest.make_settings(inputs=inputs,
                                      deadline=4.0,
                                      depth=2,
                                      latency=0.25,
                                      jitter=1.0,
                                      batch_size=2)
    trainers = conftest.make_threads(conftest.load(folder), invariants.COMPLETE,
                                     settings, clock)
    links = []
    for one, other in itertools.permutations(trainers, 2):
        links.append(
            link.LateLink(other.mailbox, 0.25, 1.0, 0.3,
                          f'{one.index} {other.index}'))
        one.connect(other.index, links[-1])
    for _ in range(12):
        batches = [trainer.open_step() for trainer in trainers]
        for _ in range(3):
            clock.now += 0.5
            for trainer in trainers:
                trainer.serve(0.0)
        for trainer, batch in zip(trainers, batches):
            trainer.close_step(*batch)
    assert all(any(invariants.held(trainer).values()) for trainer in trainers)
    end(trainers, clock)
    assert_nothing_is_held(trainers)
    assert not any(len(link) for link in links)
    for trainer in trainers:
        counts = trainer.staleness()[trainer.index]
        assert counts['dropped'] == 0 and counts['lost'] > 10
        assert counts['staleness_max'] >= 1, 'many came after all'


@asynchronous
@pytest.mark.parametrize('inputs', INPUTS[1:])
@pytest.mark.parametrize('seconds, found', [(4.9, True), (5.1, False)])
def test_kept_inputs_go_at_the_deadline(folder, inputs, seconds, found, still):
    """A relayed Spike's, for the Grad that may follow, or may be lost."""
    link, clock = conftest.load(folder).link, invariants.Clock()
    settings = conftest.make_settings(inputs=inputs, deadline=5.0, depth=2)
    trainer, sinks = invariants.make_lone(folder, settings, clock=clock)
    x = invariants.random_x(settings, 1, 3)
    trainer.mailbox.put(link.Spike((9, 1), 9, x, 1))
    trainer.serve(0.0)
    told, = answer_all(folder, settings, trainer, sinks, [0]).values()
    trainer.serve(0.0)
    assert len(sinks[9].take('Answer')) == 1
    trainer.close_step(*trainer.batches.next(), None)  # the lesson
    clock.now = seconds
    trainer.serve(0.0)
    assert any(invariants.held(trainer).values()) == found
    twin, _ = invariants.make_lone(folder, settings)
    forget(trainer.mach)
    own = trainer.batches.next()
    pull = invariants.random_embedding(settings, 2, 3)
    trainer.mailbox.put(link.Grad((9, 1), 9, x, pull, 0, 1))
    for one in (trainer, twin):
        one.close_step(*own, None)
    if inputs == 'late':  # the others have asked again
        assert_nothing_is_held([trainer])
    leaf = stack(told) if found else trainer.student(x)
    extra = [
        one - two for one, two in zip(conftest.grads_of(trainer.mach),
                                      conftest.grads_of(twin.mach))
    ]
    output = trainer.mach(x, leaf.detach())
    conftest.assert_close(extra, conftest.gradients(output, [trainer.mach],
                                                    pull))
    end([trainer], clock)
    assert_nothing_is_held([trainer])


@asynchronous
@pytest.mark.parametrize('inputs', INPUTS)
def test_a_lost_answer_costs_only_its_own_rows(folder, inputs, still):
    """Of one child of two, and of one question of two."""
    clock = invariants.Clock()
    settings = conftest.make_settings(inputs=inputs, deadline=5.0)
    trainer, sinks = invariants.make_lone(folder, settings, (0, 1), clock=clock)
    for _ in range(2):
        step(trainer)
    partly, fully = sinks[0].take('Spike')
    answers = [
        make_answer(folder, settings, partly, 0),
        make_answer(folder, settings, fully, 0),
        make_answer(folder, settings, fully, 1)
    ]
    for answer in answers:
        trainer.mailbox.put(answer)
    trainer.serve(0.0)
    clock.now = 6.0
    assert all(p.grad is None for p in trainer.student.parameters())
    trainer.close_step(*trainer.batches.next(), None)
    distances = [(trainer.student(spike.x)[:, answer.sender] -
                  answer.embedding).square()
                 for spike, answer in zip((partly, fully, fully), answers)]
    loss = sum(distance.sum() for distance in distances)
    loss = loss / (2 * settings.batch_size)
    conftest.assert_close(conftest.grads_of(trainer.student),
                          conftest.gradients(loss, [trainer.student]))


# --------------------------------------------------------- 5. giving up early


@asynchronous
@pytest.mark.parametrize('inputs', INPUTS)
def test_a_question_whose_answer_is_lost_is_given_up_early(folder, inputs):
    """Not to hold up for long what the other child has answered.

    Who waits for real inputs gets them, if need be at the deadline.
    """
    clock = invariants.Clock()
    settings = conftest.make_settings(inputs=inputs, deadline=1e9, steps=99)
    trainer, sinks = invariants.make_lone(folder, settings, (0, 1), clock=clock)
    for _ in range(15):  # all answers come after 3 s
        step(trainer)
        clock.now += 3.0
        assert len(answer_all(folder, settings, trainer, sinks, (0, 1))) == 1
        trainer.serve(0.0)
    step(trainer)
    since = clock.now
    clock.now += 3.0
    answer_all(folder, settings, trainer, sinks, [0])
    learned = []
    for age in (3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 9.0, 99.0, 1e6, 9e8, 2e9):
        clock.now = since + age
        before = conftest.snapshot(trainer.student)
        trainer.close_step(*trainer.batches.next(), None)
        if not conftest.same(conftest.snapshot(trainer.student), before):
            learned.append(age)
    if inputs == 'real':
        assert learned == [2e9]
    else:
        assert len(learned) == 1 and 3.0 < learned[0] <= 6.0


@asynchronous
@pytest.mark.parametrize('trips', [[1e8], [30.0] * 15, [5.0, 1.0] * 15])
@pytest.mark.parametrize('inputs', UNLOCKED)
def test_answers_that_take_as_long_as_ever_are_not_given_up(
        folder, inputs, trips):
    """However long that is; and the more it varies, the longer."""
    clock = invariants.Clock()
    settings = conftest.make_settings(inputs=inputs, deadline=1e9, steps=99)
    trainer, sinks = invariants.make_lone(folder, settings, clock=clock)
    for trip in trips:
        step(trainer)
        spike = sinks[0].take('Spike')[-1]
        since, before = clock.now, conftest.snapshot(trainer.student)
        clock.now = since + 0.99 * trip
        trainer.serve(0.0)
        clock.now = since + trip
        trainer.mailbox.put(make_answer(folder, settings, spike, 0))
        trainer.close_step(*trainer.batches.next(), None)
        assert not conftest.same(conftest.snapshot(trainer.student), before)


# -------------------------------------- 6. a stopped child changes no step


@asynchronous
@pytest.mark.parametrize('inputs', UNLOCKED)
def test_a_stopped_child_changes_no_step_of_its_parent(folder, inputs):
    """In no bit, and nobody waits for it."""
    modules = conftest.load(folder)

    def run(state):
        settings = conftest.make_settings(inputs=inputs,
                                          depth=2,
                                          dropout=0.3,
                                          deadline=3.0)
        if state == 'full':
            settings.mailbox = 1
        clock = invariants.Clock()
        child, parent = conftest.make_threads(modules, [[], [0]], settings,
                                              clock)
        if state == 'gone':
            parent.connect(0, invariants.Sink())
        elif state == 'lost':
            parent.connect(
                0, modules.link.LateLink(child.mailbox, 0.0, 0.0, 1.0, 'a'))
        taken = []
        for _ in range(8):
            if state != 'idle':
                clock.now += 1.0
            parent.step()
            taken.append(conftest.snapshot(parent.mach))
        box = child.mailbox
        assert (len(box) + box.lost + box.dropped >= 8) == (state != 'gone')
        return taken

    expected = run('idle')
    for one, other in itertools.pairwise(expected):
        assert not conftest.same(one, other)
    for state in ('late', 'full', 'gone', 'lost'):
        for number, found in enumerate(run(state)):
            assert conftest.same(found, expected[number]), (state, number)


# ----------------------------------------------------------- 7. late inputs


def embed(mach, x, inputs, chosen=None):
    """d(x), free of dropout, of the chosen children's inputs [B, n, E]."""
    return torch.relu(mach.local_part(x) + mach.joined_part(inputs, chosen))


def target(trainer, parts):
    """The target loss of several (x, y, inputs, chosen or not) in one step.

    Each row weighs the same, however many come at once.
    """
    mach, settings = trainer.mach, trainer.settings
    return sum(
        functional.cross_entropy(mach.head(embed(mach, x, *inputs)),
                                 y,
                                 reduction='sum',
                                 label_smoothing=settings.label_smoothing)
        for x, y, *inputs in parts) / settings.batch_size


def check_step(trainer, parts):
    """That the step just taken was one on these parts, which it then forgets.

    Returns:
        The gradients at the inputs of each part.
    """
    leaves = [part[2].detach().clone().requires_grad_() for part in parts]
    loss = target(
        trainer,
        [(*part[:2], leaf, *part[3:]) for part, leaf in zip(parts, leaves)])
    conftest.assert_close(conftest.grads_of(trainer.mach),
                          conftest.gradients(loss, [trainer.mach]))
    forget(trainer.mach)
    return torch.autograd.grad(loss, leaves)


def spikes_at(sink):
    """The Spikes that lie there."""
    return [m for m in sink.messages if type(m).__name__ == 'Spike']


def check_grads(sinks, key, x, gradient, versions, depth=0):
    """That each Sink got one Grad about this question, and which; takes it."""
    for i, sink in enumerate(sinks):
        sent, = (m for m in sink.messages
                 if type(m).__name__ == 'Grad' and m.key == key)
        assert torch.equal(sent.x, x)
        assert (sent.sender, sent.depth) == (5, depth)
        assert sent.version == versions[i]
        conftest.assert_close([sent.gradient], [gradient[:, i]])
        sink.messages = [m for m in sink.messages if m is not sent]


def check_new_rows(trainer, sinks, x, gradient):
    """What is sent of rows not yet answered, just trained on; takes Grads."""
    spikes = [spikes_at(sink)[-1] for sink in sinks]
    assert all(spike.x is x for spike in spikes)
    if trainer.settings.inputs in AT_ONCE:
        versions = [trainer.seen.get(i, 0) for i in range(len(sinks))]
        check_grads(sinks, spikes[0].key, x, 3 * gradient, versions,
                    trainer.settings.depth - 1)
    check_no_grads(sinks)


def check_answered_rows(trainer, sinks, key, x, gradient, versions):
    """What is sent of rows trained on with their answers."""
    if trainer.settings.inputs not in AT_ONCE:
        check_grads(sinks, key, x, 3 * gradient, versions,
                    trainer.settings.depth - 1)
    for sink in sinks:
        assert not any(
            type(m).__name__ == 'Grad' and torch.equal(m.x, x)
            for m in sink.messages)


def check_no_grads(sinks):
    assert not [m for sink in sinks for m in sink.take('Grad')]


def make_late_inputs(folder, inputs, **overrides):
    """A MACH with children 0 and 1; its settings, Sinks and clock."""
    clock = invariants.Clock()
    settings = conftest.make_settings(inputs=inputs,
                                      label_smoothing=0.2,
                                      deadline=5.0,
                                      grad_weight=3.0,
                                      **overrides)
    trainer, sinks = invariants.make_lone(folder, settings, (0, 1), clock=clock)
    return trainer, settings, sinks, clock


@asynchronous
@pytest.mark.parametrize('depth', [1, 2])
@pytest.mark.parametrize('inputs', LATE)
def test_real_inputs_are_trained_on_when_they_have_come(folder, inputs, depth,
                                                        still):
    trainer, settings, sinks, _ = make_late_inputs(folder, inputs, depth=depth)
    children, student = (sinks[0], sinks[1]), trainer.student
    # Nothing has been answered: synthetic inputs.
    x, y = step(trainer)
    gradient, = check_step(trainer, [(x, y, student(x))])
    key = spikes_at(sinks[0])[0].key
    check_new_rows(trainer, children, x, gradient)
    told = answer_all(folder, settings, trainer, sinks, (0, 1), version=17)[key]
    link = conftest.load(folder).link
    trainer.mailbox.put(link.Answer((5, -1), 0, told[0], 23))  # another's
    # Now it has been; what is new is late again, or is trained on twice.
    new_x, new_y = step(trainer)
    parts = [(x, y, stack(told))]
    if inputs == 'both':
        parts.append((new_x, new_y, student(new_x)))
    gradient, *at_new = check_step(trainer, parts)
    if inputs == 'both':
        check_new_rows(trainer, children, new_x, *at_new)
    check_answered_rows(trainer, children, key, x, gradient, (17, 17))
    check_no_grads(children)
    # The answer has been used up.
    x, y = step(trainer)
    gradient, = check_step(trainer, [(x, y, student(x))])
    check_new_rows(trainer, children, x, gradient)


@asynchronous
@pytest.mark.parametrize('inputs', LATE)
def test_several_batches_may_have_been_answered(folder, inputs, still):
    """In one step, each with its own inputs and its own Grads."""
    trainer, settings, sinks, _ = make_late_inputs(folder, inputs)
    batches = [step(trainer) for _ in range(3)]
    forget(trainer.mach)
    keys = [spike.key for spike in spikes_at(sinks[0])]
    for sink in (sinks[0], sinks[1]):
        sink.take('Grad')
        sink.messages.reverse()  # the last is answered first
    told = answer_all(folder, settings, trainer, sinks, (0, 1), version=4)
    new_x, new_y = step(trainer)
    parts = [(x, y, stack(told[key])) for (x, y), key in zip(batches, keys)]
    if inputs == 'both':
        parts.append((new_x, new_y, trainer.student(new_x)))
    found = check_step(trainer, parts)
    for (x, _), key, gradient in zip(batches, keys, found):
        check_answered_rows(trainer, (sinks[0], sinks[1]), key, x, gradient,
                            (4, 4))


@asynchronous
@pytest.mark.parametrize('answering', [0, 1])
@pytest.mark.parametrize('inputs', LATE)
def test_half_an_answer_is_used_at_the_deadline(folder, inputs, answering,
                                                still):
    """Real inputs of the child that answered, synthetic ones of the other."""
    trainer, settings, sinks, clock = make_late_inputs(folder, inputs)
    student = trainer.student
    x, y = step(trainer)
    key, clock.now = spikes_at(sinks[0])[0].key, 4.0
    told = answer_all(folder, settings, trainer, sinks, [answering], 8)[key]
    for clock.now in (4.0, 4.9):  # the other may still answer
        forget(trainer.mach)
        new_x, new_y = step(trainer)
        check_step(trainer, [(new_x, new_y, student(new_x))])
        sinks[0].take('Grad')
        sinks[1].take('Grad')
    clock.now = 5.1
    new_x, new_y = step(trainer)
    mixed = student(x).detach()
    mixed[:, answering] = told[answering]
    parts = [(x, y, mixed)]
    if inputs == 'both':
        parts.append((new_x, new_y, student(new_x)))
    gradient, *_ = check_step(trainer, parts)
    check_answered_rows(trainer, (sinks[0], sinks[1]), key, x, gradient,
                        [8 * (child == answering) for child in (0, 1)])


@asynchronous
@pytest.mark.parametrize('inputs', ['late', 'both', 'real'])
def test_without_depth_no_inputs_are_real(folder, inputs, still):
    """And there are no Grads: only the student is to hear of the children."""
    trainer, settings, sinks, _ = make_late_inputs(folder, inputs, depth=0)
    for _ in range(4):
        x, y, inquiry = trainer.open_step()
        assert inquiry is None
        trainer.close_step(x, y, inquiry)
        check_step(trainer, [(x, y, trainer.student(x))])
        answer_all(folder, settings, trainer, sinks, (0, 1))
    check_no_grads((sinks[0], sinks[1]))


def largest(gradient, share):
    """Of which rows a gradient [B, n, E] is the largest."""
    rows = math.ceil(share * len(gradient))
    return gradient.flatten(1).norm(dim=1).topk(rows).indices


@asynchronous
def test_both_asks_about_the_largest_gradients_alone(folder, still):
    """It is they that it trains on once more; a row weighs no more for it."""
    trainer, settings, sinks, _ = make_late_inputs(folder, 'both', share=0.5)
    x, y = step(trainer)
    synthetic, = check_step(trainer, [(x, y, trainer.student(x))])
    rows = largest(synthetic, 0.5)
    assert len(rows) == 2
    spike, = spikes_at(sinks[0])
    assert torch.equal(spike.x, x[rows])
    assert spikes_at(sinks[1])[0].x is spike.x
    children, key = (sinks[0], sinks[1]), spike.key
    if 'both' in AT_ONCE:
        check_grads(children, key, x[rows], 3 * synthetic[rows], (0, 0))
    check_no_grads(children)
    told = answer_all(folder, settings, trainer, sinks, (0, 1), 6)[key]
    new_x, new_y = step(trainer)
    gradient, _ = check_step(trainer, [(x[rows], y[rows], stack(told)),
                                       (new_x, new_y, trainer.student(new_x))])
    check_answered_rows(trainer, children, key, x[rows], gradient, (6, 6))


@asynchronous
def test_late_asks_about_all_and_sends_the_largest_gradients(folder, still):
    """All rows are trained on. Those sent have a key of their own: no Spike was
    about them alone."""
    trainer, settings, sinks, _ = make_late_inputs(folder, 'late', share=0.5)
    x, y = step(trainer)
    forget(trainer.mach)
    spike, = spikes_at(sinks[0])
    assert spike.x is x
    told = answer_all(folder, settings, trainer, sinks, (0, 1), 6)[spike.key]
    step(trainer)
    at_real, = check_step(trainer, [(x, y, stack(told))])
    rows = largest(at_real, 0.5)
    for child in (0, 1):
        grad, = sinks[child].take('Grad')
        assert torch.equal(grad.x, x[rows]) and grad.version == 6
        assert grad.key not in (spike.key, spikes_at(sinks[child])[0].key)
        conftest.assert_close([grad.gradient], [3 * at_real[rows, child]])


# ------------------------------------------------------- 8. all in one forward


@asynchronous
@pytest.mark.parametrize('dtype, limit', [(torch.float64, 1e-10),
                                          (torch.float32, 1e-5)])
def test_fused_equals_each_alone(folder, dtype, limit, still):
    """Own rows new and answered, Spikes and Grads on inputs of both kinds."""
    messages = conftest.load(folder).link
    trainer, settings, sinks, _ = make_late_inputs(folder, 'both', depth=2)
    for network in (trainer.mach, trainer.student):
        network.to(dtype)
    trainer.batches = conftest.Rows(settings, 7, dtype)
    mach, student = trainer.mach, trainer.student

    def rows(make, seed, number):
        return make(settings, seed, number).to(dtype)

    def respond(version):
        found = {}
        for child in (0, 1):
            for spike in sinks[child].take('Spike'):
                told = rows(invariants.random_embedding,
                            10 * spike.key[1] + child, len(spike.x))
                found.setdefault(spike.key, []).append(told)
                trainer.mailbox.put(
                    messages.Answer(spike.key, child, told, version,
                                    spike.asked))
        return {key: torch.stack(told, 1) for key, told in found.items()}

    x, y = step(trainer)
    own_key = spikes_at(sinks[0])[0].key
    relayed = rows(invariants.random_x, 1, 2)
    trainer.mailbox.put(messages.Spike((9, 1), 9, relayed, 1))
    trainer.serve(0.0)
    relayed_key = spikes_at(sinks[0])[1].key
    told = respond(6)
    queried = rows(invariants.random_x, 2, 3)
    late = rows(invariants.random_x, 3, 5)
    pulls = [
        rows(invariants.random_embedding, 4 + i, number)
        for i, number in enumerate((2, 3, 5))
    ]
    incoming = [
        messages.Grad((9, 0), 9, late, pulls[2], 0, 1),
        messages.Spike((9, 2), 9, queried, 0),
        messages.Grad((9, 2), 9, queried, pulls[1], 0, 1),
        messages.Grad((9, 1), 9, relayed, pulls[0], 0, 1),
    ]
    for message in incoming:
        trainer.mailbox.put(message)
    forget(mach)
    for sink in sinks.values():
        sink.messages.clear()
    new_x, new_y = step(trainer)

    leaves = [
        inputs.detach().clone().requires_grad_()
        for inputs in (told[own_key], student(new_x), told[relayed_key],
                       student(queried), student(late))
    ]
    outputs = [target(trainer, [(x, y, leaves[0])])]
    outputs += [target(trainer, [(new_x, new_y, leaves[1])])]
    outputs += [
        mach(about, leaf)
        for about, leaf in zip((relayed, queried, late), leaves[2:])
    ]
    weights = [None, None, *pulls]
    alone = [
        conftest.gradients(output, [mach], weight)
        for output, weight in zip(outputs, weights)
    ]
    conftest.assert_close(conftest.grads_of(mach),
                          [sum(parts) for parts in zip(*alone)], limit)
    assert len(sinks[0].messages) == len(sinks[1].messages) == 5
    answers = {a.key: a.embedding for a in sinks[9].take('Answer')}
    assert set(answers) == {(9, 1), (9, 2)}
    conftest.assert_close([answers[9, 1], answers[9, 2]], outputs[2:4], limit)
    # What is passed on of each is as large as if it were alone, too.
    passed_on = [(2, relayed, 1), (3, queried, 1), (4, late, 1)]
    passed_on.append((1, new_x, 3) if 'both' in AT_ONCE else (0, x, 3))
    for number, about, factor in passed_on:
        expected, = torch.autograd.grad(outputs[number], leaves[number],
                                        weights[number])
        for child in (0, 1):
            sent, = (m for m in sinks[child].messages
                     if type(m).__name__ == 'Grad' and torch.equal(m.x, about))
            conftest.assert_close([sent.gradient],
                                  [factor * expected[:, child]], limit)
            assert sent.version == 6 and sent.gradient.dtype == dtype


# -------------------------------------------------- 9. some of the neighbours

TRIPLE = (0, 1, 2)
SUBSETS = {n: [*itertools.combinations(TRIPLE, n)] for n in (1, 2, 3)}


@asynchronous
@pytest.mark.parametrize('number', [1, 2, 3])
def test_the_chosen_speak_for_all(folder, number):
    """So that what all add is the mean of what the subsets add."""
    torch.manual_seed(1)
    mach = conftest.load(folder).model.Mach(3, 8, 6, conftest.PIXELS).double()
    inputs = torch.randn(5, 3, 6, dtype=torch.float64)
    found = [
        mach.joined_part(inputs[:, chosen], chosen)
        for chosen in SUBSETS[number]
    ]
    expected = mach.joined_part(inputs)
    conftest.assert_close([sum(found) / len(found)], [expected])
    assert number == 3 or not torch.allclose(found[0], expected, rtol=0.01)
    normal = functional.layer_norm(inputs, (6,))
    for chosen, joined in zip(SUBSETS[number], found):
        by_hand = sum(normal[:, i] @ mach.joiner[i].T for i in chosen)
        conftest.assert_close([joined], [by_hand * 3 / number])


@asynchronous
@pytest.mark.parametrize('number', [1, 2, 3])
def test_a_student_makes_the_chosen_slices_alone(folder, number):
    torch.manual_seed(1)
    student = conftest.load(folder).student.Student(3, 7, 6,
                                                    conftest.PIXELS).double()
    x = torch.randn(5, conftest.PIXELS, dtype=torch.float64)
    for chosen in SUBSETS[number]:
        found = student(x, chosen)
        assert found.shape == (5, number, 6)
        conftest.assert_close([found], [student(x)[:, chosen]])


def has_grad(parameters):
    """Positions of those in which a gradient has arrived."""
    return tuple(i for i, p in enumerate(parameters) if p.grad is not None)


def make_three(folder, inputs, neighbours, **overrides):
    """A MACH that asks some of its children 0, 1 and 2; settings and Sinks."""
    settings = conftest.make_settings(inputs=inputs,
                                      neighbours=neighbours,
                                      steps=99,
                                      grad_weight=3.0,
                                      **overrides)
    trainer, sinks = invariants.make_lone(folder, settings, TRIPLE)
    return trainer, settings, sinks


@asynchronous
@pytest.mark.parametrize('inputs', UNLOCKED)
@pytest.mark.parametrize('neighbours', [1, 2])
def test_a_step_takes_some_of_the_children(folder, neighbours, inputs, still):
    """It asks them and sends them Grads; nothing is done about the others."""
    trainer, settings, sinks = make_three(folder, inputs, neighbours)
    mach, student = trainer.mach, trainer.student
    heads = [head.weight for head in student.heads]
    biases = [head.bias for head in student.heads]
    answered, told_key, taken = None, None, set()
    for _ in range(30):
        forget(mach, student)
        x, y = step(trainer)
        chosen = tuple(i for i in TRIPLE if spikes_at(sinks[i]))
        taken.add(chosen)
        key, = {spikes_at(sinks[i])[0].key for i in chosen}
        assert all(len(spikes_at(sinks[i])) == 1 for i in chosen)
        parts, told_of = [], ()
        if answered is not None:  # those of the last step, asked in it
            *real, told_key, told_of = answered
            if inputs != 'synthetic':
                parts.append((*real, told_of))
        if inputs != 'late' or not parts:
            parts.append((x, y, student(x, chosen), chosen))
        involved = {i for part in parts for i in part[3]}
        assert has_grad(mach.joiner) == tuple(sorted(involved))
        assert has_grad(heads) == has_grad(biases) == told_of
        gradients = check_step(trainer, parts)
        if inputs in AT_ONCE:  # of the new rows
            about, grads_to = key, chosen
            parts, gradients = parts[::-1], gradients[::-1]
        else:  # of the answered ones, once there are any
            about, grads_to = told_key, told_of
        check_grads([sinks[i] for i in grads_to], about, parts[0][0],
                    3 * gradients[0], [0] * neighbours)
        check_no_grads(sinks.values())
        told = answer_all(folder, settings, trainer, sinks, chosen)[key]
        answered = x, y, stack(told), key, chosen
    assert taken == set(SUBSETS[neighbours])


@asynchronous
@pytest.mark.parametrize('neighbours', [1, 2])
def test_each_row_of_a_lesson_weighs_the_same(folder, neighbours, still):
    """Whoever it was about, and however many were about the others."""
    trainer, settings, sinks = make_three(folder, 'synthetic', neighbours)
    for _ in range(6):
        step(trainer)
    x, chosen = {}, {}
    for i in TRIPLE:
        for spike in spikes_at(sinks[i]):
            x[spike.key] = spike.x
            chosen[spike.key] = (*chosen.get(spike.key, ()), i)
    assert len(set(chosen.values())) == 3 and len(chosen) == 6
    told = answer_all(folder, settings, trainer, sinks, TRIPLE)
    assert len(told) == 6
    step(trainer)
    student = trainer.student
    loss = sum(
        (student(x[key])[:, chosen[key]] - stack(told[key])).square().sum()
        for key in told) / (6 * settings.batch_size)
    conftest.assert_close(conftest.grads_of(student),
                          conftest.gradients(loss, [student]))


@asynchronous
@pytest.mark.parametrize('inputs', INPUTS)
@pytest.mark.parametrize('neighbours', [0, 3, 7])
def test_all_are_asked_where_nothing_is_to_choose(folder, neighbours, inputs):
    trainer, *_, sinks = make_three(folder, inputs, neighbours)
    twin, *_, twin_sinks = make_three(folder, inputs, 0)
    for _ in range(5):
        step(trainer)
        step(twin)
        for i in TRIPLE:
            assert len(sinks[i].take('Spike')) == 1
            assert len(sinks[i].take('Grad')) == len(twin_sinks[i].take('Grad'))
    assert conftest.same(conftest.snapshot(trainer.mach),
                         conftest.snapshot(twin.mach))


@asynchronous
@pytest.mark.parametrize('neighbours', [1, 2])
def test_who_waits_waits_for_the_chosen_alone(folder, neighbours, still):
    """And its real inputs are theirs."""
    trainer, settings, sinks = make_three(folder, 'real', neighbours)
    for _ in range(6):
        told = {}

        def reply(message, child, told=told):
            sinks[child].messages.append(message)
            if type(message).__name__ == 'Spike':
                answer = make_answer(folder, settings, message, child, 2)
                told[child] = answer.embedding
                trainer.mailbox.put(answer)

        for i in TRIPLE:
            sinks[i].messages.clear()
            trainer.connect(
                i, types.SimpleNamespace(send=lambda m, i=i, r=reply: r(m, i)))
        trainer.step()  # there is mail whenever it looks, or it would wait
        x, y = trainer.batches.taken[-1]
        chosen = tuple(sorted(told))
        assert len(chosen) == neighbours
        gradient, = check_step(trainer, [(x, y, stack(told), chosen)])
        check_grads([sinks[i] for i in chosen],
                    spikes_at(sinks[chosen[0]])[0].key, x, 3 * gradient,
                    [2] * neighbours)
        assert not any(sinks[i].messages for i in TRIPLE if i not in chosen)


@asynchronous
@pytest.mark.parametrize('inputs', INPUTS[1:])
@pytest.mark.parametrize('neighbours', [1, 2])
def test_a_relayed_spike_is_answered_by_the_chosen(folder, neighbours, inputs,
                                                   still):
    """Its Grad finds them again, whoever is chosen by then."""
    link = conftest.load(folder).link
    trainer, settings, sinks = make_three(folder, inputs, neighbours, depth=2)
    mach, other = trainer.mach, 0
    for number in range(6):
        x = invariants.random_x(settings, number, 3)
        trainer.mailbox.put(link.Spike((9, number), 9, x, 1))
        trainer.serve(0.0)
        chosen = tuple(i for i in TRIPLE if spikes_at(sinks[i]))
        assert len(chosen) == neighbours
        told, = answer_all(folder, settings, trainer, sinks, chosen, 8).values()
        trainer.serve(0.0)
        leaf = stack(told).requires_grad_()
        answer, = sinks[9].take('Answer')
        conftest.assert_close([answer.embedding],
                              [embed(mach, x, leaf, chosen)])
        pull = invariants.random_embedding(settings, number, 3)
        trainer.mailbox.put(link.Grad((9, number), 9, x, pull, 0, 1))
        forget(mach)
        own_x, own_y = step(trainer)
        own = tuple(i for i in TRIPLE if spikes_at(sinks[i]))
        loss = target(trainer,
                      [(own_x, own_y, trainer.student(own_x, own), own)])
        output = embed(mach, x, leaf, chosen)
        expected = [
            one + two
            for one, two in zip(conftest.gradients(loss, [mach]),
                                conftest.gradients(output, [mach], pull))
        ]
        conftest.assert_close(conftest.grads_of(mach), expected)
        gradient, = torch.autograd.grad(output, leaf, pull)
        for i in TRIPLE:
            sent = [g for g in sinks[i].take('Grad') if g.x is x]
            assert len(sent) == (i in chosen)
            if sent:
                assert (sent[0].version, sent[0].depth) == (8, 0)
                conftest.assert_close([sent[0].gradient],
                                      [gradient[:, chosen.index(i)]])
            sinks[i].messages.clear()
        other += own != chosen
    assert other, 'else this shows nothing'


# ------------------------------------------------------------ 10. slow MACHs


@asynchronous
@pytest.mark.parametrize('words, message', [
    ('--slow_mach 4 --k 4', '--slow_mach must be < 4, not 4'),
    ('--k 4 --slow-mach=9', '--slow_mach must be < 4, not 9'),
    ('--slow_mach -2', '--slow_mach must be >= -1, not -2'),
    ('--slow_factor 0.5', '--slow_factor must be >= 1, not 0.5'),
    ('--neighbours 4 --k 4', '--neighbours must be < 4, not 4'),
    ('--neighbours 1 --k 1', '--neighbours must be < 1, not 1'),
    ('--neighbours -1', '--neighbours must be >= 0, not -1'),
    ('--loss_rate 1.5', '--loss_rate must be <= 1, not 1.5'),
    ('--loss_rate -0.1', '--loss_rate must be >= 0, not -0.1'),
    ('--latency -0.5', '--latency must be >= 0, not -0.5'),
    ('--latency inf', '--latency must be a number, not inf'),
    ('--jitter -1', '--jitter must be >= 0, not -1.0'),
    ('--inputs later', '--inputs must be in synthetic real late both, not'),
])
def test_conditions_that_cannot_be(folder, words, message, capsys):
    main = conftest.load_main(conftest.ROOT / folder)
    with pytest.raises(SystemExit) as stopped:
        main.read_hyperparameters(words.split())
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, '')
    assert err.startswith(f'{folder}: {message}')
    assert err.count('\n') == 1 and err.endswith('\n')


@asynchronous
@pytest.mark.parametrize('words', [
    '--k 4 --slow_mach 3 --slow_factor 1 --neighbours 3',
    '--slow_mach -1 --slow_factor 1e300 --neighbours 0 --k 1',
    '--loss_rate 1 --latency 0 --jitter 0 --inputs late',
    '--loss_rate 0 --latency 1e9 --jitter 1e9 --inputs both',
])
def test_conditions_at_their_limits(folder, words):
    main = conftest.load_main(conftest.ROOT / folder)
    settings, words = main.read_hyperparameters(words.split()), words.split()
    for name, value in zip(words[::2], words[1::2]):
        found = getattr(settings, name[2:])
        assert found == type(found)(value)


class Stepping:
    """A trainer whose steps take 2 s, then 3 s and so on."""

    def __init__(self, clock, index):
        self.clock, self.index, self.steps_taken = clock, index, 0
        self.worker = None

    def step(self, stopped):
        assert not stopped()
        self.steps_taken += 1
        self.clock.now += 1.0 + self.steps_taken

    def serve(self, timeout):
        """Ends the run: it has all steps behind it."""
        del timeout
        self.worker.halt.set()

    def report(self):
        return {}

    def copies(self):
        return {}


def run_worker(main, monkeypatch, index=1, **hyperparameters):
    """For how long a worker rested on its halt event after each step."""
    clock, waits = invariants.Clock(), []
    settings = main.Hyperparameters(k=3, steps=3, **hyperparameters)
    trainer = Stepping(clock, index)
    worker = main.Worker('mach', trainer, settings, main.queue.SimpleQueue())
    trainer.worker = worker
    monkeypatch.setattr(main, 'time', types.SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(worker.halt, 'wait', waits.append)
    worker.run()  # in this thread
    kinds = [worker.events.get()[0] for _ in range(worker.events.qsize())]
    assert kinds == ['done'] and trainer.steps_taken == 3
    assert clock.now == 2 + 3 + 4
    return waits


@asynchronous
def test_the_slow_mach_rests_after_each_step(folder, monkeypatch):
    """As many times its duration as make it so much slower."""
    main = conftest.load_main(conftest.ROOT / folder)
    waits = run_worker(main, monkeypatch, slow_mach=1, slow_factor=5.0)
    assert waits == [8.0, 12.0, 16.0]
    waits = run_worker(main, monkeypatch, slow_mach=1, slow_factor=1.0)
    assert not any(waits)
    waits = run_worker(main, monkeypatch, slow_mach=1, slow_factor=1e300)
    assert waits == [threading.TIMEOUT_MAX] * 3, 'no more can be waited for'


@asynchronous
def test_the_others_do_not_rest(folder, monkeypatch):
    main = conftest.load_main(conftest.ROOT / folder)
    for index, slow in ((0, 1), (2, 1), (1, -1), (2, -1)):
        assert not run_worker(main, monkeypatch, index, slow_mach=slow)


# ----------------------------------------- 11. slow is not the same as lost


def learn(folder, inputs, delays, steps=60):
    """How much each head of the student learns in the last third of its steps.

    Args:
        folder: of the experiment.
        inputs: the hyperparameter.
        delays: step -> seconds until each child answers what it asks.
        steps: of 1 s each.
    """
    link, clock = conftest.load(folder).link, invariants.Clock()
    settings = conftest.make_settings(inputs=inputs, steps=steps)
    children = tuple(range(len(delays(0))))
    trainer, sinks = invariants.make_lone(folder,
                                          settings,
                                          children,
                                          clock=clock)
    coming = []
    for number in range(steps):
        clock.now += 1.0
        for message in [m for due, m in coming if due <= clock.now]:
            trainer.mailbox.put(message)
        coming = [(due, m) for due, m in coming if due > clock.now]
        trainer.step()
        if number == steps * 2 // 3:
            before = [h.weight.detach().clone() for h in trainer.student.heads]
        for child, delay in enumerate(delays(number)):
            for spike in sinks[child].take('Spike'):
                told = invariants.random_embedding(settings, number)
                coming.append((clock.now + delay,
                               link.Answer(spike.key, child, told, 0,
                                           spike.asked)))
    return [(h.weight - b).norm().item()
            for h, b in zip(trainer.student.heads, before)]


@asynchronous
@pytest.mark.parametrize('inputs', ['synthetic', 'late', 'both'])
def test_a_child_slower_than_the_others_is_learned_from(folder, inputs):
    assert min(learn(folder, inputs, lambda step: (1.0, 10.0))) > 0


@asynchronous
@pytest.mark.parametrize('inputs', ['synthetic', 'late', 'both'])
def test_a_child_that_becomes_slower_is_learned_from(folder, inputs):
    assert min(learn(folder, inputs, lambda step: (1.0
                                                   if step < 20 else 3.0,))) > 0


@asynchronous
def test_without_depth_the_student_is_still_taught(folder):
    settings = conftest.make_settings(inputs='late', depth=0)
    trainer, sinks = invariants.make_lone(folder, settings)
    trainer.step()
    assert len(sinks[0].take('Spike')) == 1


@asynchronous
def test_who_has_finished_drops_nothing(folder):
    link = conftest.load(folder).link
    settings = conftest.make_settings(depth=2, steps=1, mailbox=4)
    trainer, sinks = invariants.make_lone(folder, settings)
    trainer.step()
    for i in range(20):
        trainer.mailbox.put(
            link.Spike((9, i), 9, invariants.random_x(settings, 1), 1))
        trainer.serve(0.0)
        spike = sinks[0].take('Spike')[-1]
        trainer.mailbox.put(
            link.Answer(spike.key, 0, invariants.random_embedding(settings, 1),
                        0))
        trainer.serve(0.0)
    assert trainer.staleness()[5]['dropped'] == 0


def test_one_link_for_an_edge():
    main = conftest.load_main(conftest.ROOT / 'asynchronous_kgraph')
    settings = main.Hyperparameters(k=3, hidden=4, embedding=2, latency=1.0)
    made, make_link = [], main.make_link
    main.make_link = lambda s, m, edge: made.append(edge) or make_link(
        s, m, edge)
    try:
        main.make_trainers(settings, [None] * 3)
    finally:
        main.make_link = make_link
    assert len(made) == len(set(made)) == 6


# ---------------------------------------------- 12. stale Grads weigh less


@asynchronous
@pytest.mark.parametrize('version, weight', [(6, 1.0), (4, 1.0), (3, 2 / 3),
                                             (1, 2 / 5)])
def test_a_grad_weighs_less_the_staler_it_is(folder, version, weight, still):
    """In inverse proportion, from `stale_after` steps on."""
    link = conftest.load(folder).link
    settings = conftest.make_settings(stale_after=2.0)
    x = invariants.random_x(settings, 1, 3)
    pull = invariants.random_embedding(settings, 2, 3)
    machs = []
    for told in (True, False):
        trainer, _ = invariants.make_lone(folder, settings)
        for _ in range(6):
            trainer.step()
        if told:
            trainer.mailbox.put(link.Grad((9, 1), 9, x, pull, version, 0))
        trainer.step()
        machs.append(trainer.mach)
        if told:
            counts = trainer.staleness()[trainer.index]
            assert counts['staleness_max'] == 6 - version
            output = trainer.mach(x, trainer.student(x).detach())
            expected = conftest.gradients(output, [trainer.mach], weight * pull)
    extra = [
        one - two for one, two in zip(conftest.grads_of(machs[0]),
                                      conftest.grads_of(machs[1]))
    ]
    conftest.assert_close(extra, expected)
