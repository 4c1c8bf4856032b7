"""Links, mailboxes and turns; seconds pass when the test says so."""

import itertools
import threading
import time
import types

import conftest
import pytest

asynchronous = pytest.mark.parametrize('folder', conftest.ASYNCHRONOUS)


class Clock:
    """Seconds that pass when the test says so, or while somebody waits."""

    def __init__(self):
        self.now, self.waits = 0.0, []

    def __call__(self):
        return self.now

    def wait(self, seconds):
        """In place of a condition's: takes as long as it may."""
        self.waits.append(seconds)
        self.now += seconds


def make(folder, *conditions, limit=9999, seed='a'):
    """A clock, a mailbox, and a Link of (latency, jitter, loss_rate) to it."""
    link, clock = conftest.load(folder).link, Clock()
    mailbox = link.Mailbox(limit, clock)
    mailbox._arrival.wait = clock.wait
    return clock, mailbox, link.Link(mailbox, *conditions, seed=seed)


# ----------------------------------------------------------- links, mailboxes


@asynchronous
def test_messages_come_in_the_order_they_are_due_and_not_before(folder):
    """Over all links; those due at once in the order of sending."""
    clock, mailbox, slow = make(folder, 3.0)
    fast = conftest.load(folder).link.Link(mailbox, 1.0)
    plan = [(0.0, slow, 'a'), (0.0, slow, 'b'), (1.75, fast, 'c'),
            (2.5, fast, 'd'), (2.5, slow, 'e')]
    due = [(2.75, 'c'), (3.0, 'a'), (3.0, 'b'), (3.5, 'd'), (5.5, 'e')]
    came = []
    for quarters in range(32):
        clock.now = quarters / 4
        for seconds, link, message in plan:
            if seconds == clock.now:
                link.send(message)
        came += [(clock.now, message) for message in mailbox.collect()]
    assert came == due
    for clock.now, link, message in plan:  # however late the receiver looks
        link.send(message)
    clock.now = 9.0
    assert mailbox.collect() == [message for _, message in due]
    messages = [object() for _ in range(60)]  # these have no order
    for message in messages:
        slow.send(message)
    clock.now = 12.0
    assert mailbox.collect() == messages and not clock.waits


@asynchronous
def test_jitter_adds_up_to_as_much_and_changes_the_order(folder):

    def delays(seed, jitter):
        clock, mailbox, link = make(folder, 2.0, jitter, seed=seed)
        for i in range(300):
            clock.now = i / 100
            link.send(i)
        came = {}
        for due, _, i in sorted(mailbox._messages):
            clock.now = due
            assert mailbox.collect() == [i]
            came[i] = due
        return list(came), [came[i] - i / 100 for i in range(300)]

    order, found = delays('a', 1.0)
    assert order != sorted(order) == list(range(300))
    assert 2.0 - 1e-9 <= min(found) < 2.02 and 2.98 < max(found) <= 3.0 + 1e-9
    assert abs(sum(found) / 300 - 2.5) < 0.1
    assert delays('a', 1.0) == (order, found)
    assert delays('b', 1.0)[1] != found
    order, found = delays('a', 0.0)
    assert order == sorted(order)
    assert max(abs(delay - 2.0) for delay in found) < 1e-9


@asynchronous
def test_links_lose_as_many_as_they_are_told_and_count_them(folder):

    def survivors(loss_rate, seed='a'):
        _, mailbox, link = make(folder, 0.0, 0.0, loss_rate, seed=seed)
        for i in range(2000):
            link.send(i)
        came = mailbox.collect()
        assert (link.lost, mailbox.dropped) == (2000 - len(came), 0)
        return came

    assert survivors(1.0) == [] and survivors(0.0) == list(range(2000))
    some = survivors(0.3)
    assert abs(len(some) / 2000 - 0.7) < 0.03
    lost = [i not in set(some) for i in range(2000)]
    in_a_row = sum(one and two for one, two in itertools.pairwise(lost))
    assert abs(in_a_row / 2000 - 0.09) < 0.03, 'each by itself'
    assert survivors(0.3) == some != survivors(0.3, 'b')


@asynchronous
def test_a_full_mailbox_drops_the_oldest_and_nobody_waits(folder):
    """What is on its way counts; the sender never learns of it."""
    clock, mailbox, late = make(folder, 1e9, limit=3)
    near = conftest.load(folder).link.Link(mailbox)
    for i in range(8):
        clock.now = i
        late.send(i)
        assert mailbox.dropped == max(0, i - 2)
    assert mailbox.collect() == [] and clock.now == 7
    clock.now = 1e9 + 9
    assert mailbox.collect() == [5, 6, 7]
    for i in range(10):
        near.send(i)
    assert (mailbox.collect(), mailbox.dropped) == ([7, 8, 9], 12)
    assert mailbox.collect() == [] and not clock.waits and late.lost == 0


@asynchronous
def test_who_waits_for_mail_wakes_when_it_is_due(folder):
    clock, mailbox, slow = make(folder, 3.0)
    fast = conftest.load(folder).link.Link(mailbox, 0.5)
    assert mailbox.collect(7.0) == [] and clock.waits == [7.0]
    slow.send('a')  # due at 10
    assert mailbox.collect(1.0) == [] and clock.waits == [7.0, 1.0]
    assert mailbox.collect() == mailbox.collect(-1.0) == []
    fast.send('b')  # at 8: due at 8.5
    assert mailbox.collect(9.0) == ['b'] and mailbox.collect(9.0) == ['a']
    assert clock.waits == [7.0, 1.0, 0.5, 1.5]
    slow.send('c')  # at 10
    clock.now = 20.0
    assert mailbox.collect(9.0) == ['c'], 'overdue'
    assert len(clock.waits) == 4


@asynchronous
@pytest.mark.parametrize('messages', [(), ('far',)])
def test_who_waits_for_mail_is_woken_by_what_is_sent(folder, messages):
    """It could be due before what is waited for."""
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


@asynchronous
def test_every_edge_has_a_link_of_its_own_each_way(folder, monkeypatch):
    """With the conditions of the hyperparameters; each draws its own."""
    main = conftest.load_main(folder)
    monkeypatch.setattr(main.data, 'deal', lambda *_: [None] * 3)
    settings = main.Hyperparameters(k=3,
                                    hidden=4,
                                    embedding=2,
                                    mailbox=9999,
                                    latency=5.0,
                                    jitter=0.25,
                                    loss_rate=0.5)

    def draw(seed):
        settings.seed, drawn = seed, {}
        trainers = main.make_trainers(settings, None)
        for sender in trainers:
            for receiver, link in sender.links.items():
                mailbox = trainers[receiver].mailbox
                mailbox.clock = lambda: 0.0
                for i in range(64):
                    link.send(i)
                drawn[sender.index, receiver] = sorted(
                    (i, due) for due, _, i in mailbox._messages)
                mailbox._messages.clear()
                assert link.lost == 64 - len(drawn[sender.index, receiver])
        edges = [(i, j)
                 for i, own in enumerate(main.children_of(settings))
                 for j in own]
        assert set(drawn) == {*edges, *(edge[::-1] for edge in edges)}
        return drawn

    drawn = [*draw(0).values(), *draw(1).values()]
    assert all(one != other for one, other in itertools.combinations(drawn, 2))
    assert drawn == [*draw(0).values(), *draw(1).values()]
    delays = [due for one in drawn for _, due in one]
    assert 5.0 <= min(delays) < 5.05 and 5.2 < max(delays) <= 5.25
    assert 0.4 < len(delays) / 64 / len(drawn) < 0.6


# ----------------------------------------------------------------------- turns


def make_turns(folder, count, patient=True):
    """Turns of one experiment, for which one waits for ever or not at all."""
    turns = conftest.load_main(folder).Turns(count)
    turns.limit = None if patient else 0.0
    wait_for = turns._change.wait_for
    turns._change.wait_for = lambda condition, _: wait_for(
        condition, turns.limit)
    return turns


def wait_until(condition):
    """Fails instead of hanging."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, 'it hangs'
        time.sleep(0.001)


def queue_up(turns, i, order, leave=None):
    """A thread that waits for its turn, as the last of all."""

    def work():
        with turns:
            order.append(i)
            if leave:
                leave.wait(60)

    thread = threading.Thread(target=work, daemon=True)
    before = turns._drawn
    thread.start()
    wait_until(lambda: turns._drawn == before + 1)
    with turns._change:  # by now it waits, or is inside
        return thread


@asynchronous
def test_no_more_at_a_time_than_there_are_turns(folder):
    turns, inside, most, done = make_turns(folder, 2), [], [], []

    def work():
        for _ in range(20):
            with turns:
                inside.append(1)
                most.append(len(inside))
                time.sleep(0)
                inside.pop()
        done.append(1)

    for _ in range(6):
        threading.Thread(target=work, daemon=True).start()
    wait_until(lambda: len(done) == 6)
    assert max(most) == 2 and turns._called - turns._drawn == 2


@asynchronous
def test_turns_come_in_the_order_asked(folder):
    """Who gives one back and asks again is behind those who wait."""
    turns, order = make_turns(folder, 1), []
    with turns:
        threads = [queue_up(turns, i, order) for i in range(5)]
        assert not order
    with turns:
        order.append('again')
    for thread in threads:
        thread.join(30)
    assert order == [0, 1, 2, 3, 4, 'again']


@asynchronous
def test_a_step_that_raises_gives_its_turn_back(folder):
    turns = make_turns(folder, 1)
    with pytest.raises(ValueError), turns:
        raise ValueError
    conftest.within(60, lambda: turns.__enter__())


@asynchronous
def test_who_has_waited_long_enough_goes_on_without_a_turn(folder):
    """A step that never ends costs the others a core, not their lives."""
    turns, limits = conftest.load_main(folder).Turns(1), []
    turns._change.wait_for = lambda _, limit: limits.append(limit)
    with turns, turns, turns:
        pass
    assert limits == [10, 10, 10]


@asynchronous
def test_all_are_woken_after_somebody_went_on_without_a_turn(folder):
    turns, order, leave = make_turns(folder, 1), [], threading.Event()
    with turns:
        turns.limit = 0.0  # for the next one
        impatient = queue_up(turns, 'impatient', order, leave)
        wait_until(lambda: order)
        turns.limit = None
        threads = [queue_up(turns, i, order) for i in range(2)]
        leave.set()
        impatient.join(30)
        time.sleep(0.05)  # whoever was woken in vain waits again
    for i, thread in enumerate(threads):
        thread.join(10)
        assert i in order, 'it was never woken'
    assert order == ['impatient', 0, 1]
