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
def test_the_seed_draws_the_turns(schedule):
    found = first(2000, schedule)
    assert found == first(2000, schedule)
    assert set(found) == set(range(5))
    others = [first(2000, schedule, seed=seed) for seed in range(1, 5)]
    assert (others == 4 * [found]) == (schedule in ('ordered', 'late'))


def test_what_each_schedule_does():
    assert first(7, 'ordered') == first(7, 'late') == [0, 1, 2, 3, 4, 0, 1]
    one = schedules.draw_ranks('early 10', 5)[0]
    assert first(14, 'early 10') == [one] * 10 + [0, 1, 2, 3]
    one = schedules.draw_ranks('nap', 5)[0]
    found = first(30 * 5 + 30 * 4 + 50, 'nap')
    assert found[:150].count(one) == 30 and found[150:270].count(one) == 0
    assert found[270:] == [0, 1, 2, 3, 4] * 10
    one = schedules.draw_ranks('leaver', 5)[0]
    found = first(45 * 5 + 400, 'leaver')
    assert found[:225].count(one) == 45 and found[225:].count(one) == 0
    found = first(60 * 20, 'bursts 20')
    assert all(found[i] == found[i - i % 20] for i in range(1200))
    assert min(collections.Counter(found).values()) > 3 * 20
    found = collections.Counter(first(3100, 'unequal'))
    speeds = [found[i] / 100 for i in schedules.draw_ranks('unequal', 5)]
    assert speeds == pytest.approx([1, 2, 4, 8, 16], abs=0.02)
    with pytest.raises(ValueError, match='no schedule'):
        first(20, 'nap 3')


@functools.cache
def dataset():
    """Real MNIST where there is any, else drawn digits."""
    if conftest.DATA:
        return data.load(conftest.DATA, 5000)
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
        train.__wrapped__(experiment, 'bursts 5', steps=20, seed=seed).finals
        for seed in (1, 1, 2)
    ]
    for final in itertools.chain(*found):
        del final['seconds'], final['rate']
    assert str(found[0]) == str(found[1]) != str(found[2])


@asynchronous
@pytest.mark.parametrize('schedule', schedules.SCHEDULES)
def test_no_schedule_does_harm(experiment, schedule):
    """Every MACH takes its steps and learns nearly as well as in order."""
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


flood = functools.partial(benchmark_schedules.flood, k=3, steps=150)


@asynchronous
@pytest.mark.parametrize('disturb', [flood, benchmark_schedules.loud])
def test_no_mach_outweighs_the_others(experiment, disturb):
    """500 Grads at once, 50 steps before the end; Grads 1,000 times larger."""
    calm = train(experiment, 'ordered', until=125)
    disturbed = train(experiment, 'ordered', disturb=disturb, until=125)
    assert str(calm.finals) != str(disturbed.finals)
    for key in ('real', 'synthetic'):
        assert abs(
            schedules.mean(calm.finals, key) -
            schedules.mean(disturbed.finals, key)) < 2
