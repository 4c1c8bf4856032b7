"""Exchange messages, or average? python tests/benchmark_averaging.py

Compares asynchronous_kgraph with parameter averaging, where everybody waits for
everybody. The rival's members are isolated MACHs that start alike and keep the
state of their AdamW. Every H steps they average, by one of two rules:

    fedavg H  members get the mean (McMahan et al. 2017, arXiv 1602.05629)
    diloco H  an outer SGD with Nesterov momentum follows the mean (Douillard et
              al. 2023, arXiv 2311.08105)

The tables: accuracy after equally many own steps; seconds and accuracy under
trouble, on a simulated clock that counts waiting; bytes sent. Pairs of
accuracies are real / synthetic of MACHs, averaged / members of the rival, the
members before the last average.

    python tests/benchmark_averaging.py --keep runs.jsonl         # many hours
    python tests/benchmark_averaging.py --tables bytes            # 15 seconds

Started again with the same --keep, it runs only what is not in that file. A
change of the code needs a new file. To choose --rules, --weights and --priors
of the rival, give several and compare them on --part validation.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import heapq
import itertools
import json
import os
import pathlib
import sys
import time
import types
from concurrent import futures
from statistics import fmean

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import conftest
import schedules
from mach import data, metrics

EXPERIMENT = 'asynchronous_kgraph'
MAIN, MODULES = conftest.load_main(EXPERIMENT), conftest.load(EXPERIMENT)
KINDS = 'real', 'synthetic'  # accuracies of a MACH
TROUBLES = {
    'nothing': {},
    'one is 10 times slower': dict(slow=10),
    'messages take 0.1 s': dict(latency=0.1),
    'messages take 1 s': dict(latency=1.0),
    'one dies at half': dict(dies=True),
}
ODD = 0  # index of the member that is slow or dies
NOTICE = 8.0  # seconds for which an average waits, once, for a dead member
SKIPPED = 10  # first steps, which are neither timed nor counted

# ------------------------------------------------------------------ the rival


def make_members(settings, dataset):
    """One isolated Trainer for each member; all networks start alike."""
    settings = copy.copy(settings)
    settings.connected = False
    members = MAIN.make_trainers(settings, dataset)
    for one in members[1:]:
        one.network.load_state_dict(members[0].network.state_dict())
    return members


@torch.no_grad()
def average(members, shared, outer=None, sized=False):
    """Averages the members' parameters into `shared`, then copies it to all.

    Args:
        shared: the network of the last average.
        outer: its optimiser, which takes `shared` minus the mean as gradient.
            None: `shared` becomes the mean.
        sized: whether a member counts as much as its shard has images.
    """
    sizes = [int(one.batches.classes.sum()) if sized else 1 for one in members]
    networks = [one.network.parameters() for one in members]
    for target, *parts in zip(shared.parameters(), *networks):
        mean = sum(n / sum(sizes) * part for n, part in zip(sizes, parts))
        if outer:
            target.grad = target - mean
        else:
            target.copy_(mean)
    if outer:
        outer.step()
    for one in members:
        one.network.load_state_dict(shared.state_dict())


def train_rival(settings, dataset, job):
    """Accuracies of the averaged network, and of each member before that."""
    members = make_members(settings, dataset)
    shared, outer = copy.deepcopy(members[0].network), None
    rule, every = job['method'].split()
    if rule == 'diloco':
        rate, momentum = job['outer']
        outer = torch.optim.SGD(shared.parameters(),
                                rate,
                                momentum,
                                nesterov=momentum > 0)
    for step in range(1, settings.steps + 1):
        for one in members:
            one.step()
        if job['dies'] and step == settings.steps // 2:
            del members[ODD]
        if step == settings.steps:
            own = [look(one.network, settings, dataset) for one in members]
        if step % int(every) == 0 or step == settings.steps:
            average(members, shared, outer, job['weights'] == 'size')
    return dict(averaged=[look(shared, settings, dataset)], members=own)


def look(network, settings, dataset):
    """Accuracy of a network without children."""
    snapshots = {0: MODULES.trainer.Snapshot(metrics.Tally(0), network)}
    return MAIN.evaluate(snapshots, settings, dataset.validation_images,
                         dataset.validation_labels)[0]['real']


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
        make(settings, dataset) for make in (MAIN.make_trainers, make_members)
    ]
    for _ in range(settings.steps):
        for members, seconds in zip(both, spent):
            began = time.thread_time()
            for one in members:
                one.step()
            seconds.append((time.thread_time() - began) / len(members))
    return [fmean(seconds[SKIPPED:]) for seconds in spent]


# ----------------------------------------------------------------------- runs


def one_run(job, folder):
    """Result of one run; in a process of its own."""
    torch.set_num_threads(1)
    dataset, method = data.load(folder, 5000), job['method']
    if job['part'] == 'test':
        dataset = dataclasses.replace(dataset,
                                      validation_images=dataset.test_images,
                                      validation_labels=dataset.test_labels)
    names = {name: job[name] for name in ('k', 'steps', 'seed', 'precision')}
    names |= dict(neighbours=job.get('degree', 4 if job['k'] > 5 else 0),
                  connected=method != 'isolated')
    if job['shards'] != 'equal':
        names |= dict(shards='skewed', skew=float(job['shards']))
    settings = MAIN.Hyperparameters(**names)
    if method == 'bytes':
        return count_bytes(settings, dataset)
    if method == 'time':
        return time_steps(settings, dataset)
    if 'pace' in job:
        return simulate(settings, dataset, job['pace'],
                        **TROUBLES[job['trouble']])
    if method in ('kgraph', 'isolated'):
        found = schedules.run(MAIN, 'ordered', dataset, **names).finals
        return {kind: [one[kind] for one in found] for kind in KINDS}
    settings.prior = job['prior']
    return train_rival(settings, dataset, job)


def key_of(job):
    """A job as text."""
    return json.dumps(job, sort_keys=True)


def run_all(jobs, words):
    """The results of all jobs, by key_of; runs those that --keep lacks."""
    found, file = {}, words.keep or pathlib.Path(os.devnull)
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):  # a line that was cut short
            kept = json.loads(line)
            found[key_of(kept['job'])] = kept['result']
    waiting = {key_of(job): job for job in jobs if key_of(job) not in found}
    context = torch.multiprocessing.get_context('spawn')
    with file.open('a') as out, futures.ProcessPoolExecutor(
            len(os.sched_getaffinity(0)), context) as pool:
        waiting = {
            pool.submit(one_run, job, words.data): job
            for job in waiting.values()
        }
        for done in futures.as_completed(waiting):
            job, result = waiting[done], done.result()
            found[key_of(job)] = result
            line = json.dumps(dict(job=job, result=result))
            print('\n' + line, file=out, flush=True)  # a cut line stays apart
            print(line, file=sys.stderr, flush=True)
    return found


# --------------------------------------------------------------------- tables


def plan(words):
    """All runs: (table, setting, name of the method, job without a seed)."""
    base = dict(steps=words.steps, part=words.part, precision=words.precision)
    made = []

    def add(name, setting, base, ours, trouble=''):
        made.extend((name, setting, method, base | dict(method=method) | more)
                    for method, more in ours.items())
        few = 1 if base['shards'] == 'equal' else None  # else no matter
        for rule, weights, prior in itertools.product(words.rules,
                                                      words.weights[:few],
                                                      words.priors[:few]):
            job = dict(method=rule, weights=weights, prior=prior)
            job |= dict(outer=words.outer * ('diloco' in rule),
                        dies='dies' in trouble)
            label = f'{rule}, {weights}, {prior:g}'
            made.append((name, setting, label, base | job))

    for k, shards in itertools.product(words.k, words.shards):
        add('accuracy', (k, shards), base | dict(k=k, shards=shards),
            dict(kgraph={}, isolated={}))
    base |= dict(k=5, shards='equal')
    for trouble in TROUBLES:
        ours = dict(trouble=trouble, pace=words.paces[0])
        add('trouble', trouble, base, dict(kgraph=ours), trouble)
    base |= dict(method='bytes', steps=2 * SKIPPED)
    for degree in (1, 2, 4):
        made.append(('bytes', degree, 'kgraph', base | dict(degree=degree)))
    return [one for one in made if one[0] in words.tables]


def table(title, names, rows):
    """Prints a markdown table."""
    print(f'\n## {title}\n\n| {" | ".join(names)} |\n|' + ' --- |' * len(names))
    for row in rows:
        print('|', ' | '.join(map(str, row)), '|')
    print()


def pair(runs, pick=fmean):
    """The two accuracies of some runs, each picked in a run, then averaged."""
    both = [[pick(each) for each in list(run.values())[:2]] for run in runs]
    return [fmean(each) for each in zip(*both)]


def show(values):
    """Accuracies as text."""
    return ' / '.join(f'{value:.2f}' for value in values)


def accuracy_table(words, entries):
    """Prints accuracies, and how far the k-graph is from each method."""
    rows, gains = [], collections.defaultdict(list)
    for setting, method, runs in entries:
        mean = pair(runs)
        if method == 'kgraph':
            ours = mean
        gains[method].append(ours[0] - mean[0])
        rows.append((*setting, method, show(mean), show(pair(runs, min))))
    table(f'Accuracy ({words.steps} steps, {words.part}, seeds {words.seeds})',
          ('k', 'shards', 'rule, weights, prior', 'mean', 'worst'), rows)
    del gains['kgraph']
    print(
        'The k-graph (real) has', '; '.join(
            f'{fmean(gain):+.2f} points against {method} ({min(gain):+.2f} to '
            f'{max(gain):+.2f}, n = {len(gain)})'
            for method, gain in gains.items()) + '.')


def trouble_table(words, entries):
    """Prints seconds and accuracies, and the cost of the worst trouble."""
    rows, seen = [], collections.defaultdict(list)
    for trouble, method, runs in entries:
        if method == 'kgraph':
            fast, end = (
                fmean(run[name] for run in runs) for name in ('fast', 'all'))
            then = show(pair([run['then'] for run in runs]))
        else:
            every, then = int(method.split(',')[0].split()[1]), ''
            fast, end = rival_seconds(words.steps, every, words.paces[1],
                                      **TROUBLES[trouble])
        slow = pair(runs, lambda each: each[ODD]) if 'slow' in trouble else ()
        seen[method].append((fast, pair(runs)[0]))
        rows.append((trouble, method, f'{fast:.1f}', f'{end:.1f}', then,
                     show(pair(runs)), show(slow)))
    ours, theirs = (f'{1000 * pace:.1f} ms' for pace in words.paces)
    table(
        f'Trouble (k = 5, equal shards; a step: {ours}, of the rival {theirs})',
        ('trouble', 'rule, weights, prior', 'seconds, fast members',
         'seconds, all', 'fast members then', 'all', 'slow member'), rows)
    costs = []
    for method, [(before, best), *others] in seen.items():
        times = max(fast for fast, _ in others) / before
        points = min(value for _, value in others) - best
        costs.append(
            f'{method} {times:.1f} times the seconds and {points:+.2f} points')
    print('The worst trouble costs the fast members of', '; '.join(costs) + '.')


def bytes_table(words, entries):
    """Prints the bytes that a member sends in a step."""
    settings = MAIN.Hyperparameters()
    network = MODULES.model.Mach(0, settings.hidden, settings.embedding)
    size = 4 * sum(p.numel() for p in network.parameters())
    ours = [(f'kgraph, degree {degree}', round(fmean(runs)))
            for degree, _, runs in entries]
    rivals = [(rule, round(size / int(rule.split()[1]))) for rule in words.rules
             ]
    table('Bytes that a member sends in a step', ('method', 'bytes'),
          ours + rivals)
    print(
        ours[-1][0], 'sends',
        ', '.join(f'{ours[-1][1] / theirs:.2f} times the bytes of {rule}'
                  for rule, theirs in rivals) + '.')


def main():
    """Runs what is asked for and prints its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = dict(accuracy=accuracy_table,
                  trouble=trouble_table,
                  bytes=bytes_table)
    rules = 'fedavg 1,fedavg 10,fedavg 100,diloco 10,diloco 100'.split(',')
    prior = MAIN.Hyperparameters.prior
    for name, kind, default, reason in (
        ('tables', list(tables), list(tables), 'to print'),
        ('k', int, [5, 10, 20], 'members; above 5 a MACH has 4 neighbours'),
        ('shards', str, ['equal', '0.5', '0.1'], 'equal, or a skew'),
        ('rules', str, rules, 'fedavg or diloco, and H'),
        ('weights', ['equal', 'size'], ['equal'], 'of members in an average'),
        ('priors', float, [prior], 'hyperparameter prior of the rival'),
        ('outer', float, [0.7, 0.9], 'learning rate and momentum of diloco'),
        ('seeds', int, [3, 4, 5], 'of all that is drawn'),
        ('steps', int, 2500, 'of each member'),
        ('part', ['validation', 'test'], 'validation', 'images to evaluate'),
        ('precision', ['fp32', 'bf16', 'auto'], 'auto', 'of matrix products'),
        ('keep', pathlib.Path, None, 'file of the results'),
        ('data', str, str(conftest.DATA or conftest.ROOT / 'data'), 'folder'),
    ):
        choices = kind if isinstance(kind, list) else None
        parser.add_argument(f'--{name}',
                            nargs='+' if isinstance(default, list) else None,
                            type=str if choices else kind,
                            choices=choices,
                            default=default,
                            help=f'{reason}; default {default}')
    words = parser.parse_args()
    words.precision = metrics.choose_precision(words.precision, 'cpu')
    words.paces = [0.0, 0.0]
    if 'trouble' in words.tables:
        job = dict(method='time', k=5, shards='equal', steps=60, seed=0)
        job |= dict(part='validation', precision=words.precision)
        words.paces = run_all([job], words)[key_of(job)]
    made = plan(words)
    jobs = [job | dict(seed=seed) for seed in words.seeds for *_, job in made]
    found = run_all(jobs, words)
    for name in words.tables:
        tables[name](words, [(setting, method, [
            found[key_of(job | dict(seed=seed))] for seed in words.seeds
        ]) for of, setting, method, job in made if of == name])


if __name__ == '__main__':
    main()
