"""Runs an asynchronous experiment in one thread, its MACHs in a drawn order.

On threads the operating system decides which MACH takes a step when. Here a
schedule decides, by the seed, so every run can be repeated to the bit. Time is
counted in turns, so no clock has an effect.
"""

import itertools
import math
import random
import re
import typing

import torch

SCHEDULES = ('ordered', 'random', 'bursts 5', 'bursts 20', 'unequal', 'nap',
             'late', 'leaver', 'early 10', 'early 50')
FASTEST = 16  # times as fast as the slowest MACH, in `unequal`
LATE = 50  # turns of its receiver that a message of `late` takes at most
SECOND = 30  # turns: about as many as a MACH takes in a second on threads


def draw_ranks(schedule, k, seed=0):
    """The MACHs in an order drawn by the seed.

    The first naps, leaves or is early. In `unequal` they go from slow to fast.
    """
    return random.Random(f'{schedule} {seed}').sample(range(k), k)


def turns(schedule, k, steps, seed=0):
    """Yields without end the MACH that has the next turn: 0 to k - 1.

    Args:
        schedule: one of
            'ordered', 'late': all in turn;
            'random': each turn is drawn;
            'bursts n': n turns in a row of a MACH that is drawn;
            'unequal': as often as their speeds say, from 1 to FASTEST;
            'nap': in turn, but one MACH has none in the middle third of a run;
            'leaver': in turn, but one MACH has none after half of its steps;
            'early n': in turn, after n turns of one MACH.
    Raises:
        ValueError: there is no such schedule.
    """
    name, _, count = schedule.partition(' ')
    known = schedule in SCHEDULES
    if not known and not re.fullmatch('(bursts|early) [0-9]+', schedule):
        raise ValueError(f'no schedule {schedule!r}; there are {SCHEDULES}')
    draw, everybody = random.Random(f'turns {schedule} {seed}'), list(range(k))
    ranks = draw_ranks(schedule, k, seed)
    if name in ('random', 'bursts'):
        while True:
            yield from [draw.choice(everybody)] * int(count or 1)
    if name == 'unequal':
        due = [0.0] * k
        while True:
            for rank, i in enumerate(ranks):
                due[i] += FASTEST**(rank / max(1, k - 1) - 1)
                if due[i] > 1 - 1e-9:
                    due[i] -= 1
                    yield i
    if name == 'early':
        yield from ranks[:1] * int(count)
    if name == 'nap':
        yield from everybody * (steps // 3) + ranks[1:] * (steps // 3)
    if name == 'leaver':
        yield from everybody * (steps // 2)
        everybody = ranks[1:]
    yield from itertools.cycle(everybody)


class Result(typing.NamedTuple):
    """Results of a run: for each MACH a dict of mach, synthetic, real, totals.

    Accuracies are in percent, NaN for a MACH that left.
    """
    finals: list  # at the end of the run
    own: list  # when the MACH had just taken its last step
    trainers: list


def run(main, schedule, dataset, until=None, disturb=None, **overrides):
    """Trains all MACHs of an experiment in one thread, and returns a Result.

    Args:
        main: the module of its main.py.
        schedule: as in `turns`.
        dataset: its validation images are evaluated.
        until: steps at which a MACH stops; None for its last.
        disturb: called with the trainers and the number of turns before each.
        **overrides: hyperparameters.
    """
    torch.set_num_threads(1)
    settings = main.Hyperparameters(**overrides)
    settings.deadline *= SECOND
    settings.jitter = LATE if schedule == 'late' else 0.0
    trainers = main.make_trainers(settings, dataset)
    steps, taken = until or settings.steps, [0] * settings.k
    for i, one in enumerate(trainers):
        one.exchange.mailbox.clock = lambda i=i: (taken[i] if schedule == 'late'
                                                  else sum(taken) / settings.k)

    def look(there):
        snapshots = {}
        for i, one in enumerate(trainers):
            snapshots |= one.snapshot(networks=i in there)
        found = main.evaluate(snapshots, settings, dataset.validation_images,
                              dataset.validation_labels)
        return [one | snapshots[one['mach']].tally.totals() for one in found]

    there, own = set(range(settings.k)), {}
    if schedule == 'leaver':
        there.discard(draw_ranks(schedule, settings.k, settings.seed)[0])
    order = turns(schedule, settings.k, steps, settings.seed)
    while not there <= set(own):
        if disturb:
            disturb(trainers, sum(taken))
        i = next(order)
        taken[i] += 1
        if trainers[i].steps_taken < steps:
            trainers[i].step()
            if trainers[i].steps_taken == steps:
                own[i] = look(there)[i] if schedule == 'unequal' else None
        else:
            trainers[i].serve(0)
    finals = look(there)
    own = [own.get(i) or finals[i] for i in range(settings.k)]
    return Result(finals, own, trainers)


def mean(accuracies, key='real'):
    """Mean of one key over the MACHs that did not leave; NaN if all left."""
    values = [a[key] for a in accuracies if not math.isnan(a[key])]
    return sum(values) / len(values) if values else math.nan
