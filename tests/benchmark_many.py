"""A hundred or a thousand MACHs? python tests/benchmark_many.py

Runs k-graphs of small MACHs in one thread, each MACH in turn, with four
neighbours each. Prints test accuracy beside that of isolated MACHs, and the
processor time of a step. MNIST is dealt to all MACHs: of a thousand, each has
55 images.

    python tests/benchmark_many.py --k 1000 --steps 400       # an hour
    python tests/benchmark_many.py --k 100 --steps 300        # 3 minutes
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import sys
import time
from concurrent import futures

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import conftest
import schedules
from mach import data

MAIN = conftest.load_main('asynchronous_kgraph')
SMALL = dict(hidden=128, embedding=32, student_hidden=64, neighbours=4)
SMALL |= dict(share=0.25)  # an eighth of a small batch is few rows
ROUNDS = 15  # steps of each MACH before the clock starts: messages fill up
FLOORS = dict(gain=7.0, ratio=1.1)  # points over isolated; step of most / least


def one_run(job, folder):
    """Means of `real` and `synthetic`; in a process of its own."""
    dataset = data.load(folder)
    dataset = dataclasses.replace(dataset,
                                  validation_images=dataset.test_images,
                                  validation_labels=dataset.test_labels)
    found = schedules.run(MAIN, 'ordered', dataset, **SMALL, **job).finals
    return [schedules.mean(found, key) for key in ('real', 'synthetic')]


def time_steps(ks, batch_size, folder):
    """Median processor milliseconds of a step for each k, in turn, paired."""
    torch.set_num_threads(1)
    dataset, spent = data.load(folder), {k: [] for k in ks}
    graphs = {}
    for k in ks:
        settings = MAIN.Hyperparameters(k=k, batch_size=batch_size, **SMALL)
        graphs[k] = MAIN.make_trainers(settings, dataset)
    for number in range(2 * ROUNDS):
        for k, trainers in graphs.items():
            began = time.thread_time()
            for one in trainers:
                one.step()
            seconds = (time.thread_time() - began) / k
            if number >= ROUNDS:
                spent[k].append(1000 * seconds)
    return {k: statistics.median(times) for k, times in spent.items()}


def check(what, value, bound, least):
    """Prints one figure beside its floor; whether it is met."""
    met = value >= bound if least else value <= bound
    print(f'- {what}: {value:.2f} (at {"least" if least else "most"} {bound}: '
          f'{"met" if met else "MISSED"})')
    return met


def main():
    """Runs what is asked for; exit status 1 if a floor was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--k', type=int, nargs='+', default=[100, 1000])
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--grad_depth', type=int, nargs='+', default=[2])
    parser.add_argument('--data',
                        default=str(conftest.DATA or conftest.ROOT / 'data'),
                        help='folder of the MNIST files')
    words = parser.parse_args()
    times = time_steps(words.k, words.batch_size, words.data)
    runs = [('isolated', dict(connected=False))]
    runs += [(f'Grads over {edges} edges', dict(grad_depth=edges))
             for edges in words.grad_depth]
    jobs = {
        (k, name, seed):
            dict(k=k, steps=words.steps, batch_size=words.batch_size) |
            dict(seed=seed) | names
        for k in words.k for name, names in runs for seed in words.seeds
    }
    found = {}
    with futures.ProcessPoolExecutor(
            len(os.sched_getaffinity(0)),
            torch.multiprocessing.get_context('spawn')) as pool:
        waiting = {
            pool.submit(one_run, job, words.data): key
            for key, job in jobs.items()
        }
        for done in futures.as_completed(waiting):
            found[waiting[done]] = done.result()
            print(*waiting[done],
                  *(f'{value:.2f}' for value in done.result()),
                  file=sys.stderr,
                  flush=True)
    print(f'{words.steps} steps of {words.batch_size} images, test, seeds '
          f'{words.seeds}\n\n| k | run | real, % | synthetic, % |\n' +
          '| --- ' * 4 + '|')
    means, met = {}, []
    for k in words.k:
        for name, _ in runs:
            both = [found[k, name, seed] for seed in words.seeds]
            means[k, name] = [statistics.fmean(one) for one in zip(*both)]
            print(f'| {k} | {name} | ' +
                  ' | '.join(f'{value:.2f}' for value in means[k, name]) + ' |')
    print()
    for (k, name), (real, _) in means.items():
        if name != 'isolated':
            gain = real - means[k, 'isolated'][0]
            met.append(
                check(f'k = {k}, {name}: points over isolated', gain,
                      FLOORS['gain'], True))
    print('- processor ms of a step:',
          ', '.join(f'{ms:.2f} (k = {k})' for k, ms in times.items()))
    if len(times) > 1:
        ratio = times[max(words.k)] / times[min(words.k)]
        met.append(
            check('a step of the most MACHs over one of the fewest', ratio,
                  FLOORS['ratio'], False))
    return int(not all(met))


if __name__ == '__main__':
    sys.exit(main())
