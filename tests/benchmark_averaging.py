"""What do trouble and messages cost? python tests/benchmark_averaging.py

Compares asynchronous_kgraph with parameter averaging (tests/averaging), where
everybody waits for everybody. `fedavg H` averages after every H steps. `diloco
H` has an outer optimiser besides, with its learning rate of 0.7.

The tables: seconds and accuracy under trouble, on a simulated clock that counts
waiting; bytes sent. Pairs of accuracies are real / synthetic of MACHs. Accuracy
without trouble is compared by `python mach/main.py --record k`, and `skew`.

    python tests/benchmark_averaging.py                        # half an hour
    python tests/benchmark_averaging.py --tables bytes         # 15 seconds
"""

import argparse
import dataclasses
import heapq
import itertools
import os
import pathlib
import re
import sys
import time
import types
from concurrent import futures
from statistics import fmean

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import conftest
from mach import data, metrics

AVERAGING = conftest.load_main('tests/averaging')
MAIN, MODULES = AVERAGING.kgraph, conftest.load('asynchronous_kgraph')
KINDS = 'real', 'synthetic'  # accuracies of a MACH
TROUBLES = {
    'nothing': {},
    'one is 10 times slower': dict(slow=10),
    'messages take 0.1 s': dict(latency=0.1),
    'messages take 1 s': dict(latency=1.0),
    'one dies at half': dict(dies=True),
}
OUTER_RATE = 0.7  # of DiLoCo
ODD = 0  # index of the member that is slow or dies
NOTICE = 8.0  # seconds for which an average waits, once, for a dead member
SKIPPED = 10  # first steps, which are neither timed nor counted

# ------------------------------------------------------------------ the rival


def rival_seconds(steps, every, pace, slow=1, latency=0.0, dies=False):
    """Seconds until the fast members have taken all steps, and until the end.

    A round ends when the slowest member has taken its steps, its parameters
    have travelled to the average, and the average has travelled back.
    """
    now = 0.0
    for first in range(0, steps, every):
        length = min(every, steps - first)
        fast = now + length * pace
        now += length * pace * slow + 2 * latency
        if dies and first < steps // 2 <= first + length:
            now += NOTICE
    return fast, now


# ---------------------------------------------------------------- the k-graph


def simulate(settings, dataset, pace, slow=1, latency=0.0, dies=False):
    """Trains a k-graph on a simulated clock; each MACH has a core of its own.

    A step reads the messages that are due when it begins. What it sends leaves
    when it ends. A finished MACH serves once in the time of a step.

    Returns:
        Accuracies at the end; `then`: those of the fast MACHs when they had
        taken all steps; seconds as in `rival_seconds`.
    """
    torch.set_num_threads(1)
    settings.latency = latency
    trainers = MAIN.make_trainers(settings, dataset)
    now = types.SimpleNamespace(turn=0, begin=0.0, end=0.0)
    for i, one in enumerate(trainers):
        one.exchange.mailbox.clock = lambda i=i: (now.begin
                                                  if i == now.turn else now.end)
        if latency:  # a mailbox holds messages on their way
            one.exchange.mailbox.limit = 10**6
    there = set(range(settings.k)) - ({ODD} if dies else set())
    fast = there - ({ODD} if slow > 1 else set())

    def accuracies(of):
        snapshots = {}
        for i, one in enumerate(trainers):
            snapshots |= one.snapshot(networks=i in there)
        found = MAIN.evaluate(snapshots, settings, dataset.validation_images,
                              dataset.validation_labels)
        return {kind: [found[i][kind] for i in sorted(of)] for kind in KINDS}

    ends, result = {}, {}
    due = [(i * pace / settings.k, i) for i in range(settings.k)]
    while not there <= set(ends):
        now.begin, i = heapq.heappop(due)
        one, now.turn = trainers[i], i
        now.end = now.begin + pace * (slow if i == ODD else 1)
        if one.finished:
            one.serve(0)
        else:
            one.step()
        if one.finished and i not in ends:
            ends[i] = now.end
            if i in fast and fast <= set(ends):
                result = dict(fast=now.end, then=accuracies(fast))
        if i in there or one.steps_taken < settings.steps // 2:
            heapq.heappush(due, (now.end, i))
    return accuracies(there) | result | dict(all=max(ends.values()))


def count_bytes(settings, dataset):
    """Bytes that a MACH sends in a step: pixels of x, and fp32."""
    trainers, sizes = MAIN.make_trainers(settings, dataset), []
    for way in (way for one in trainers for way in one.exchange.links.values()):

        def send(message, send=way.send):
            sizes.extend(value.numel() * (1 if name == 'x' else 4)
                         for name, value in vars(message).items()
                         if torch.is_tensor(value))
            send(message)

        way.send = send
    for step in range(settings.steps):
        if step == SKIPPED:
            sizes.clear()
        for one in trainers:
            one.step()
    return sum(sizes) / settings.k / (settings.steps - SKIPPED)


def time_steps(settings, dataset):
    """Mean processor seconds of one step: of a MACH, and of a member."""
    spent, both = ([], []), [
        make(settings, dataset)
        for make in (MAIN.make_trainers, AVERAGING.make_members)
    ]
    for _ in range(settings.steps):
        for members, seconds in zip(both, spent):
            began = time.thread_time()
            for one in members:
                one.step()
            seconds.append((time.thread_time() - began) / len(members))
    return [fmean(seconds[SKIPPED:]) for seconds in spent]


# ----------------------------------------------------------------------- runs


def one_run(job):
    """Result of one run; in a process of its own."""
    torch.set_num_threads(1)
    dataset, names = data.load(job['data'], 5000), job['names']
    if job['part'] == 'test':
        dataset = dataclasses.replace(dataset,
                                      validation_images=dataset.test_images,
                                      validation_labels=dataset.test_labels)
    if 'rule' not in job:
        settings = MAIN.Hyperparameters(**names)
        return job['what'](settings, dataset, **job['more'])
    rule, every = job['rule'].split()
    settings = AVERAGING.Hyperparameters(every=every,
                                         outer_rate=OUTER_RATE *
                                         (rule == 'diloco'),
                                         **names)
    network, _ = AVERAGING.train(settings, dataset,
                                 ODD if job['dies'] else None)
    return dict(averaged=[
        AVERAGING.evaluate(network, settings, dataset.validation_images,
                           dataset.validation_labels)
    ])


def run_all(jobs, words):
    """The results of all jobs, in their order."""
    names = dict(precision=words.precision, steps=words.steps)
    more = dict(data=words.data, part=words.part, more={})
    jobs = [more | job | dict(names=names | job['names']) for job in jobs]
    with futures.ProcessPoolExecutor(
            len(os.sched_getaffinity(0)),
            torch.multiprocessing.get_context('spawn')) as pool:
        found = []
        for result in pool.map(one_run, jobs):
            found.append(result)
            print(f'run {len(found)} of {len(jobs)}: {result}',
                  file=sys.stderr,
                  flush=True)
    return found


# --------------------------------------------------------------------- tables


def table(title, names, rows):
    """Prints a markdown table."""
    print(f'\n## {title}\n\n| {" | ".join(names)} |\n|' + ' --- |' * len(names))
    for row in rows:
        print('|', ' | '.join(map(str, row)), '|')
    print()


def show(runs, pick=fmean):
    """The accuracies of some runs as text, each picked in a run, then averaged.
    """
    kinds = [kind for kind in ('averaged', *KINDS) if kind in runs[0]]
    return ' / '.join(
        f'{fmean(pick(run[kind]) for run in runs):.2f}' for kind in kinds)


def trouble_table(words):
    """Prints seconds and accuracies, and the cost of the worst trouble."""
    timed = dict(what=time_steps, names=dict(steps=60, seed=0))
    paces, = run_all([timed], words)
    seeds = [dict(seed=seed) for seed in words.seeds]
    ours = run_all([
        dict(what=simulate, names=names, more=dict(pace=paces[0], **more))
        for more in TROUBLES.values()
        for names in seeds
    ], words)
    # Waiting changes no accuracy of the rival.
    keys = list(itertools.product(words.rules, (False, True)))
    theirs = run_all([
        dict(rule=rule, dies=dies, names=names)
        for rule, dies in keys
        for names in seeds
    ], words)
    count, rows, seen = len(seeds), [], {}

    def add(method, trouble, runs, fast, end, then='', slow=''):
        rows.append((trouble, method, f'{fast:.1f}', f'{end:.1f}', then,
                     show(runs), slow))
        real = fmean(fmean(next(iter(run.values()))) for run in runs)
        seen.setdefault(method, []).append((fast, real))

    for i, (trouble, more) in enumerate(TROUBLES.items()):
        runs = ours[i * count:(i + 1) * count]
        fast, end = (
            fmean(run[name] for run in runs) for name in ('fast', 'all'))
        slow = show(runs, lambda each: each[ODD]) if 'slow' in more else ''
        add('kgraph', trouble, runs, fast, end,
            show([run['then'] for run in runs]), slow)
        for rule in words.rules:
            j = keys.index((rule, 'dies' in more))
            add(
                rule, trouble, theirs[j * count:(j + 1) * count],
                *rival_seconds(words.steps, int(rule.split()[1]), paces[1],
                               **more))
    table(
        f'Trouble (k = 5, equal shards, {words.steps} steps, {words.part}, '
        f'seeds {words.seeds}; processor time of a step: '
        f'{1000 * paces[0]:.1f} ms, of the rival {1000 * paces[1]:.1f} ms)',
        ('trouble', 'method', 'seconds, fast members', 'seconds, all',
         'fast members then', 'all', 'slow member'), rows)
    costs = []
    for method, [(before, best), *others] in seen.items():
        times = max(fast for fast, _ in others) / before
        points = min(value for _, value in others) - best
        costs.append(
            f'{method} {times:.1f} times the seconds and {points:+.2f} points')
    print('The worst trouble costs the fast members of', '; '.join(costs) + '.')


def bytes_table(words):
    """Prints the bytes that a member sends in a step."""
    settings = MAIN.Hyperparameters()
    network = MODULES.model.Mach(0, settings.hidden, settings.embedding)
    size = 4 * sum(p.numel() for p in network.parameters())
    graphs = [(5, 1), (5, 2), (5, 4), (20, 4), (40, 4)]
    found = run_all([
        dict(what=count_bytes,
             names=dict(k=k, neighbours=degree, steps=2 * SKIPPED))
        for k, degree in graphs
    ], words)
    rows = [(f'kgraph, k = {k}, degree {degree}', round(sent))
            for (k, degree), sent in zip(graphs, found)]
    rows += [(rule, round(size / int(rule.split()[1]))) for rule in words.rules]
    table('Bytes that a member sends in a step', ('method', 'bytes'), rows)
    print(f'k = 40 over k = 5, degree 4: {found[-1] / found[2]:.2f}.')


def main():
    """Runs what is asked for and prints its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = dict(trouble=trouble_table, bytes=bytes_table)
    rules = 'fedavg 1,fedavg 10,fedavg 100,diloco 10,diloco 100'.split(',')
    add = parser.add_argument
    add('--tables', nargs='+', choices=tables, default=tables)
    add('--rules', nargs='+', default=rules, help='fedavg or diloco, and H')
    add('--seeds', nargs='+', type=int, default=[3, 4, 5])
    add('--steps', type=int, default=3000, help='of each member')
    add('--part', choices=['validation', 'test'], default='test')
    add('--precision', choices=['fp32', 'bf16', 'auto'], default='auto')
    add('--data',
        default=str(conftest.DATA or conftest.ROOT / 'data'),
        help='folder of the MNIST files')
    words = parser.parse_args()
    if not all(
            re.fullmatch(r'(fedavg|diloco) [1-9]\d*', one)
            for one in words.rules):
        parser.error('a rule is: fedavg or diloco, and H')
    words.precision = metrics.choose_precision(words.precision, 'cpu')
    for name in words.tables:
        tables[name](words)


if __name__ == '__main__':
    main()
