"""Does it matter who is scheduled when? python tests/benchmark_schedules.py

Runs both asynchronous experiments in one thread on schedules of
tests/schedules.py, beside isolated MACHs, and prints a table of each: validation
accuracy, mean of three seeds that no hyperparameter was chosen on. Ends with the
ratios beside their floors; exit status 1 says that a floor was missed.

Shards are skewed and runs are whole, because equal shards hide what a schedule
costs, and 400 steps show costs and gains that 3,000 steps do not have.

    python tests/benchmark_schedules.py          # half an hour
    python tests/benchmark_schedules.py --skew 0 --steps 400 --schedules all
"""

import argparse
import collections
import os
import pathlib
import sys
from concurrent import futures
from statistics import fmean

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import conftest
import schedules
from mach import data

ISOLATED = 'isolated'
KINDS = 'real', 'synthetic'
# Within so many points of `ordered`; None: not below isolated is all.
MARGINS = dict.fromkeys(schedules.SCHEDULES, 0.3)
MARGINS |= dict(ordered=None, leaver=None)
WORST = 0.5  # the same for each rank of `unequal`
FLOOD = 500  # Grads that one MACH finds in its mailbox at one time
LOUD = 1000.0  # times too large, the Grads of one MACH
DISTURBED = 'flood', 'loud'  # `ordered`, up to 50 steps after half
# The default: what has differed from `ordered` on skewed shards.
TELLING = 'random', 'bursts 20', 'late', 'unequal'
MISSED = []


def flood(trainers, turn, k, steps):
    """At half of the run MACH 0 gets its last FLOOD Grads again, at one time.

    The oldest come last, so that they are what it takes first.
    """
    mailbox = trainers[0].exchange.mailbox
    if not turn:
        mailbox.grads, put = [], mailbox.put

        def note(message, delay=0.0):
            if hasattr(message, 'gradient'):
                mailbox.grads.append(message)
            put(message, delay)

        mailbox.put = note
    if turn == k * (steps // 2):
        grads = mailbox.grads[-FLOOD:]
        for i in range(FLOOD):
            mailbox.put(grads[-1 - i % len(grads)])


def loud(trainers, turn):
    """From the first turn on all Grads of the last MACH are out of measure."""
    if turn:
        return
    for out in trainers[-1].exchange.links.values():
        send = out.send

        def send_loud(message, send=send):
            if hasattr(message, 'gradient'):
                fields = vars(message) | dict(gradient=LOUD * message.gradient)
                message = type(message)(**fields)
            send(message)

        out.send = send_loud


def one_run(job):
    """Result of one run without its trainers; in a process of its own."""
    experiment, schedule, seed, steps, skew, folder = job
    main, dataset = conftest.load_main(experiment), data.load(folder, 5000)
    names = dict(seed=seed, steps=steps)
    if skew:
        names |= dict(shards='skewed', skew=skew)
    if schedule == ISOLATED:
        names |= dict(connected=False)
    if schedule in ('undisturbed', *DISTURBED):
        k = main.Hyperparameters.k
        disturb = dict(loud=loud,
                       flood=lambda *now: flood(*now, k, steps)).get(schedule)
        result = schedules.run(main,
                               'ordered',
                               dataset,
                               until=min(steps, steps // 2 + 50),
                               disturb=disturb,
                               **names)
    else:
        name = 'ordered' if schedule == ISOLATED else schedule
        result = schedules.run(main, name, dataset, **names)
    return job, result[:2]


def check(what, value, bound, least):
    """Prints one figure beside its bound."""
    met = value >= bound if least else value <= bound
    MISSED.extend([what] * (not met))
    print(f'- {what}: {value:.2f} (at {"least" if least else "most"} {bound}: '
          f'{"met" if met else "MISSED"})')


def table(experiment, found, seeds, names):
    """Prints the table of one experiment and what it says of the floors."""
    print('\n| schedule | real | synthetic | worst MACH | '
          'least gain | staleness, mean / max | dropped |\n' + '| --- ' * 7 +
          '|')
    means, least = {}, {}
    for name in names:
        runs = [found[experiment, name, seed][0] for seed in seeds]
        own = [found[experiment, name, seed][1] for seed in seeds]
        means[name] = [
            fmean(schedules.mean(run, key) for run in own) for key in KINDS
        ]
        alone = [found[experiment, ISOLATED, seed][0] for seed in seeds]
        gains = [
            mine['real'] - its['real']
            for run, bare in zip(own, alone)
            for mine, its in zip(run, bare)
            if mine['real'] == mine['real']
        ]
        least[name] = min(gains)
        worst = [
            min(a[key]
                for run in own
                for a in run
                if a[key] == a[key])
            for key in KINDS
        ]
        late = fmean(schedules.mean(run, 'staleness') for run in runs)
        latest = max(a['staleness_max'] for run in runs for a in run)
        dropped = fmean(sum(a['dropped'] for a in run) for run in runs)
        print(f'| {name} | {means[name][0]:.2f} | {means[name][1]:.2f} | '
              f'{worst[0]:.2f} / {worst[1]:.2f} | {min(gains):+.2f} | '
              f'{late:.1f} / {latest} | {dropped:.0f} |')
    print()
    ranks = collections.defaultdict(list)
    for seed in seeds if 'unequal' in names else ():
        finals, own = found[experiment, 'unequal', seed]
        ordered, _ = found[experiment, 'ordered', seed]
        order = schedules.draw_ranks('unequal', len(own), seed)
        for rank, i in enumerate(order):
            ranks[rank].append([
                one[i][key] for one in (own, finals, ordered) for key in KINDS
            ])
    if ranks:
        print(
            'unequal, from the slowest to the fastest, real / synthetic at '
            'its own end (at the end of the run; the same MACHs if ordered): ' +
            ', '.join(
                '{:.2f} / {:.2f} ({:.2f} / {:.2f}; {:.2f} / {:.2f})'.format(
                    *map(fmean, zip(*ranks[rank])))
                for rank in sorted(ranks)) + '\n')
    for name in names:
        bound = MARGINS.get(name)
        if name in DISTURBED:
            check(f'{name}: points below undisturbed, 50 steps after half',
                  means['undisturbed'][0] - means[name][0], 1.0, False)
        elif bound:
            for key, kind in enumerate(KINDS):
                check(f'{name}: points of {kind} below ordered',
                      means['ordered'][key] - means[name][key], bound, False)
    for key, kind in enumerate(KINDS if ranks else ()):
        worst = max(fmean(r[key + 4] - r[key] for r in ranks[i]) for i in ranks)
        check(f'unequal: points of {kind} below itself ordered, worst rank',
              worst, WORST, False)
    for name in names:
        if name in schedules.SCHEDULES:
            check(f'{name}: least gain of a MACH over isolated', least[name], 0,
                  True)


def main():
    """Runs what is asked for; exit status 1 if a floor was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, help='default: of the experiment')
    parser.add_argument('--seeds', type=int, nargs='+', default=[3, 4, 5])
    parser.add_argument('--skew',
                        type=float,
                        default=0.5,
                        help='of shards; 0: equal shards')
    parser.add_argument('--experiments',
                        nargs='+',
                        default=conftest.ASYNCHRONOUS,
                        choices=conftest.ASYNCHRONOUS)
    parser.add_argument('--schedules',
                        nargs='+',
                        default=TELLING,
                        choices=('all', *schedules.SCHEDULES, *DISTURBED))
    parser.add_argument('--data',
                        default=conftest.DATA or conftest.ROOT / 'data',
                        help='folder of the MNIST files')
    words = parser.parse_args()
    names = ['ordered', ISOLATED, *words.schedules]
    if 'all' in names:
        names = ['ordered', ISOLATED, *schedules.SCHEDULES, *DISTURBED]
    if set(DISTURBED) & set(names):
        names.append('undisturbed')
    names = list(dict.fromkeys(names))
    steps = {
        experiment:
            words.steps or conftest.load_main(experiment).Hyperparameters.steps
        for experiment in words.experiments
    }
    jobs = [(experiment, name, seed, steps[experiment], words.skew,
             str(words.data))
            for name in names
            for seed in words.seeds
            for experiment in words.experiments]
    cores, found = len(os.sched_getaffinity(0)), {}
    with futures.ProcessPoolExecutor(
            cores, torch.multiprocessing.get_context('spawn')) as pool:
        for done in futures.as_completed(
            [pool.submit(one_run, job) for job in jobs]):
            job, result = done.result()
            found[job[:3]] = result
            print(*job[:4],
                  *(f'{schedules.mean(result[1], key):.2f}' for key in KINDS),
                  file=sys.stderr,
                  flush=True)
    shards = f'skew {words.skew}' if words.skew else 'equal shards'
    print(f'{shards}, validation, mean of seeds {words.seeds}; each MACH at '
          'its own end')
    for experiment in words.experiments:
        print(f'\n## {experiment}, {steps[experiment]} steps')
        table(experiment, found, words.seeds, names)
    return int(bool(MISSED))


if __name__ == '__main__':
    sys.exit(main())
