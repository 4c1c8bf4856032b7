"""Accuracy depends on no schedule: drawn orders, bursts, floods, one thread."""

import collections
import functools
import itertools
import math

import benchmark_schedules
import conftest
import pytest
import schedules

from mach import data

SMALL = dict(k=3, hidden=64, embedding=32, student_hidden=64, batch_size=64)
SMALL |= dict(steps=150, precision='fp32')

asynchronous = pytest.mark.parametrize('experiment', conftest.ASYNCHRONOUS)


def first(count, schedule, k=5, steps=90, seed=0):
    return list(
        itertools.islice(schedules.turns(schedule, k, steps, seed), count))


@pytest.mark.parametrize('schedule', schedules.SCHEDULES)
def test_turns_are_drawn_by_the_seed(schedule):
    found = first(2000, schedule)
    assert found == first(2000, schedule)
    assert set(found) == set(range(5))
    if schedule not in ('ordered', 'late'):
        others = [first(2000, schedule, seed=seed) for seed in range(1, 5)]
        assert any(other != found for other in others)


def test_ordered_late_and_early():
    assert first(11, 'ordered') == first(
        11, 'late') == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    one = schedules.draw_ranks('early 10', 5)[0]
    assert first(14, 'early 10') == [one] * 10 + [0, 1, 2, 3]


@pytest.mark.parametrize('length', [1, 5, 20])
def test_bursts(length):
    found = first(60 * length, 'random' if length == 1 else f'bursts {length}')
    for i in range(0, len(found), length):
        assert len(set(found[i:i + length])) == 1
    assert min(collections.Counter(found).values()) > 3 * length


@pytest.mark.parametrize('k, speeds', [(5, [1, 2, 4, 8, 16]), (3, [1, 4, 16])])
def test_unequal_speeds(k, speeds):
    found = collections.Counter(first(100 * sum(speeds), 'unequal', k))
    order = schedules.draw_ranks('unequal', k)
    assert [found[i] for i in order
           ] == pytest.approx([100 * speed for speed in speeds], abs=2)


def test_nap_and_leaver():
    one = schedules.draw_ranks('nap', 5)[0]
    found = first(30 * 5 + 30 * 4 + 50, 'nap')
    assert found[:150].count(one) == 30 and found[150:270].count(one) == 0
    assert found[270:] == [0, 1, 2, 3, 4] * 10
    one = schedules.draw_ranks('leaver', 5)[0]
    found = first(45 * 5 + 400, 'leaver')
    assert found[:225].count(one) == 45 and found[225:].count(one) == 0


@pytest.mark.parametrize('schedule', ['bursts', 'nap 3', 'none', ''])
def test_a_schedule_that_is_none(schedule):
    with pytest.raises(ValueError, match='no schedule'):
        first(20, schedule)


@functools.cache
def dataset():
    if conftest.DATA:
        return data.load(conftest.DATA, 5000, True)
    images, labels, *test = data.draw_digits(15000, 5000)
    return data.Dataset('drawn-digits', images, labels, *test, *test)


@functools.cache
def train(experiment, schedule, disturb=None, **names):
    return schedules.run(conftest.load_main(experiment),
                         schedule,
                         dataset(),
                         disturb=disturb,
                         **SMALL | names)


@asynchronous
def test_the_same_seed_gives_the_same_run(experiment):
    found = [
        schedules.run(conftest.load_main(experiment), 'bursts 5', dataset(),
                      **SMALL | dict(steps=20, seed=seed)).finals
        for seed in (1, 1, 2)
    ]
    for final in itertools.chain(*found):
        del final['seconds'], final['rate']
    assert str(found[0]) == str(found[1]) != str(found[2])


@asynchronous
@pytest.mark.parametrize('schedule', schedules.SCHEDULES)
def test_no_schedule_does_harm(experiment, schedule):
    """Every MACH takes its steps and learns as well as in order, or nearly."""
    result = train(experiment, schedule)
    left = schedules.draw_ranks(schedule, 3)[0] if schedule == 'leaver' else -1
    for final in result.finals:
        whole = final['mach'] != left
        assert math.isnan(final['real']) != whole
        assert (final['steps'] == 150) == whole
    ordered = train(experiment, 'ordered')
    for key in ('real', 'synthetic'):
        best = schedules.mean(ordered.own, key)
        assert 85 < best < 100
        assert schedules.mean(result.own, key) > best - 2


def flood(trainers, turn):
    benchmark_schedules.flood(trainers, turn, 3, 150)


@asynchronous
@pytest.mark.parametrize('disturb', [flood, benchmark_schedules.loud])
def test_nobody_is_outshouted(experiment, disturb):
    """500 Grads at a time, 50 steps before the end; Grads 1,000 times larger."""
    names = dict(until=125)
    calm = train(experiment, 'ordered', **names)
    disturbed = train(experiment, 'ordered', disturb=disturb, **names)
    assert str(calm.finals) != str(disturbed.finals)
    for key in ('real', 'synthetic'):
        assert abs(
            schedules.mean(calm.finals, key) -
            schedules.mean(disturbed.finals, key)) < 2
