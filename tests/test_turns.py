"""Turns: no more steps at a time than cores, in order, and nobody hangs."""

import threading
import time

import conftest
import pytest

FOLDERS = ('asynchronous_sequence', 'asynchronous_kgraph')
asynchronous = pytest.mark.parametrize('folder', FOLDERS)


def make_turns(folder, count):
    """Turns of one experiment."""
    return conftest.load_main(conftest.ROOT / folder).Turns(count)


def wait_for(condition):
    """Waits until it holds; fails instead of hanging."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, 'it hangs'
        time.sleep(0.001)


@asynchronous
def test_no_more_at_a_time_than_there_are(folder):
    turns, lock = make_turns(folder, 2), threading.Lock()
    inside, most, done = [0], [0], []

    def work():
        for _ in range(20):
            with turns.take(30):
                with lock:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0)
                with lock:
                    inside[0] -= 1
        done.append(1)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(done) == 6)
    assert most[0] <= 2
    assert turns._free == 2, 'all are given back'  # pylint: disable=protected-access


@asynchronous
def test_turns_come_in_the_order_asked(folder):
    """Who gives one back and asks again is behind those who wait."""
    turns, order = make_turns(folder, 1), []
    threads = []
    with turns.take():
        for i in range(5):

            def work(i=i):
                with turns.take(30):
                    order.append(i)

            threads.append(threading.Thread(target=work, daemon=True))
            threads[-1].start()
            wait_for(lambda i=i: len(turns._queue) == i + 1)  # pylint: disable=protected-access
    with turns.take(30):
        order.append('again')
    for thread in threads:
        thread.join(30)
    assert order == [0, 1, 2, 3, 4, 'again']


@asynchronous
def test_who_has_waited_long_enough_goes_on_without_a_turn(folder):
    """A step that never ends costs the others a core, not their lives."""
    turns = make_turns(folder, 1)
    with turns.take():
        for _ in range(3):
            with turns.take(0.0):
                pass
    with turns.take(0.0):  # what nobody had is not given back
        assert turns._free == 0  # pylint: disable=protected-access
    assert turns._free == 1  # pylint: disable=protected-access


@asynchronous
def test_a_step_that_raises_gives_its_turn_back(folder):
    turns = make_turns(folder, 1)
    with pytest.raises(ValueError):
        with turns.take():
            raise ValueError
    assert turns._free == 1  # pylint: disable=protected-access
