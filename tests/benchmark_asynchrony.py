"""Benchmarks of what asynchrony is for: python tests/benchmark_asynchrony.py

Names as arguments (latency accuracy stragglers growth limit plain memory) run
these alone; all together take under 15 minutes on two cores. `--data` is the
folder of the MNIST files. Each prints a table and ends with its ratios beside
their floors; exit status 1 says that a floor was missed.

What is compared is measured in one run. Where conditions are compared (latency,
stragglers), the networks that suffer them train at the same time on the same
cores, so that whatever else the machine does befalls all of them alike: rates
are then those of a share of the machine, and only their ratios mean anything.
"""

import argparse
import collections
import gc
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import threading
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
import conftest
from mach import data, metrics

SEQUENCE, KGRAPH = 'asynchronous_sequence', 'asynchronous_kgraph'
CORES = len(os.sched_getaffinity(0))
ENDLESS = 10**6  # steps; nothing here ends by itself


class Network:
    """The MACHs of one experiment on their threads, without its main thread.

    Args:
        folder: of the experiment.
        dataset: of mach.data.
        stopped: indices of MACHs that never take a step nor read their mail.
        **overrides: hyperparameters.
    """

    def __init__(self, folder, dataset, stopped=(), **overrides):
        torch.set_num_threads(CORES)  # as in a process of its own
        self.main = conftest.load_main(ROOT / folder)
        values = dict(steps=ENDLESS, log_every=ENDLESS, precision='fp32')
        self.settings = self.main.Hyperparameters(**{**values, **overrides})
        load, self.main.data.load = self.main.data.load, lambda *_: dataset
        try:
            _, batches = self.main.load_data(self.settings)
        finally:
            self.main.data.load = load
        trainers = self.main.make_trainers(self.settings, batches)
        self.events = queue.SimpleQueue()
        self.workers = [
            self.main.Worker(name, trainer, self.settings, self.events)
            for name, trainer in trainers.items()
        ]
        self.running = [
            w for i, w in enumerate(self.workers) if i not in stopped
        ]

    def start(self):
        """Starts the threads of all MACHs that are not stopped."""
        for worker in self.running:
            worker.start()

    def stop(self):
        """Ends the threads; raises RuntimeError if one has failed."""
        for worker in self.running:
            worker.halt.set()
        for worker in self.running:
            worker.join(30)
        while not self.events.empty():
            kind, worker, content = self.events.get()
            if kind == 'failed':
                raise RuntimeError(f'{worker.name} failed: {content}')

    def rest(self, resting):
        """Makes all threads rest after their step, or go on."""
        for worker in self.running:
            (worker.rest.set if resting else worker.rest.clear)()
        if resting:
            handed = 0
            while handed < len(self.running):
                handed += self.events.get(timeout=60)[0] == 'copy'

    def steps(self):
        """Steps taken by each MACH."""
        return [worker.trainer.steps_taken for worker in self.workers]


def measure(networks, warm_up, window, begin=lambda: None):
    """Training steps a second of each MACH of each network, side by side.

    Args:
        networks: they train at the same time.
        warm_up, window: seconds before and while it is measured.
        begin: called when the warm-up is over.
    Returns:
        A list of rates for each network.
    """
    if len(networks) > 1:
        # Turns give all the same number of steps, whatever they cost; let the
        # scheduler give all the same time instead.
        for network in networks:
            network.main.TURNS = network.main.Turns(ENDLESS)
    try:
        for network in networks:
            network.start()
        time.sleep(warm_up)
        begin()
        before, started = [n.steps() for n in networks], time.perf_counter()
        time.sleep(window)
        after, seconds = [n.steps() for n in networks], time.perf_counter()
        seconds -= started
    finally:
        for network in networks:
            for worker in network.running:
                worker.halt.set()
    for network in networks:
        network.stop()
    return [[(b - a) / seconds
             for a, b in zip(*counts)]
            for counts in zip(before, after)]


class Counter:
    """Counts matrix products, with their shapes, while it is entered."""

    def __init__(self):
        self.counts = collections.Counter()  # (M, K, N, dW, dX) -> calls

    def __enter__(self):
        self._linear = linear = torch.nn.functional.linear

        def counting(x, weight, bias=None):
            grad = torch.is_grad_enabled()
            self.counts[(x.numel() // x.shape[-1], x.shape[-1], weight.shape[0],
                         grad and weight.requires_grad, grad and
                         x.requires_grad)] += 1
            return linear(x, weight, bias)

        torch.nn.functional.linear = counting
        return self

    def __exit__(self, *_):
        torch.nn.functional.linear = self._linear

    def flops(self):
        """Floating-point operations of the products counted."""
        return sum(calls * 2 * m * k * n * (1 + of_weight + of_x)
                   for (m, k, n, of_weight,
                        of_x), calls in list(self.counts.items()))


def table(rows):
    """Prints rows of cells, the first being the heads, as Markdown."""
    rows = [[f'{c:.2f}' if isinstance(c, float) else str(c)
             for c in row]
            for row in rows]
    rows.insert(1, ['---'] * len(rows[0]))
    for row in rows:
        print(f'| {" | ".join(row)} |')
    print(flush=True)


class Bench:
    """What a benchmark works on, and the ratios that it ends with.

    Args:
        folder: of the MNIST files.
    Raises:
        DataError: they cannot be read.
    """

    def __init__(self, folder):
        self.folder = folder
        self.dataset = data.load(folder, 5000, True)
        self.missed = 0  # floors

    def check(self, what, value, floor, highest=False):
        """Prints one figure beside its floor (or, `highest`, its ceiling)."""
        met = value <= floor if highest else value >= floor
        self.missed += not met
        print(
            f'{what}: {value:.3f} ({"at most" if highest else "at least"} '
            f'{floor}: {"met" if met else "MISSED"})',
            flush=True)


# -------------------------------------------------------------------- latency


def latency(bench):
    """Rate of a MACH against seconds a hop, locked and unlocked."""
    hops_late = (0.0, 0.01, 0.1, 1.0)
    rows = [[
        'graph', 'k', 'inputs', *(f'{late:g} s' for late in hops_late),
        'predicted', '1 s / 0'
    ]]
    worst = 1e9
    for folder, k in ((SEQUENCE, 2), (SEQUENCE, 4), (SEQUENCE, 8), (KGRAPH, 3),
                      (KGRAPH, 5)):
        for inputs, warm_up, window in (('synthetic', 3, 7), ('real', 2, 8)):
            networks = [
                Network(folder,
                        bench.dataset,
                        k=k,
                        inputs=inputs,
                        latency=late,
                        deadline=60.0) for late in hops_late
            ]
            fed = [
                bool(children) for children in networks[0].main.children_of(
                    networks[0].settings)
            ]
            rates = measure(networks, warm_up, window)
            rates = [[r for r, f in zip(of, fed) if f] for of in rates]
            depth = networks[0].settings.depth
            # A MACH of a row asks no further than the row goes.
            hops = [
                min(depth, i) if folder == SEQUENCE else depth
                for i, f in enumerate(fed)
                if f
            ]
            predicted = [
                statistics.fmean(1 / (1 / r + 2 * late * h)
                                 for r, h in zip(rates[0], hops))
                for late in hops_late[1:]
            ]
            means = [statistics.fmean(of) for of in rates]
            if inputs == 'synthetic':
                worst = min(worst, means[-1] / means[0])
            rows.append([
                folder.split('_')[1], k, {
                    'synthetic': 'unlocked',
                    'real': 'locked'
                }[inputs], *means, ' / '.join(
                    f'{p:.2f}' for p in predicted) if inputs == 'real' else '',
                means[-1] / means[0]
            ])
    print('Training steps a second of a MACH that has children; the four '
          'latencies of a line at the same time.')
    table(rows)
    bench.check('unlocked, rate at 1 s / rate at 0, worst', worst, 0.95)


# ------------------------------------------------------------------- accuracy


def run_experiment(folder, *words):
    """The parsed log of `python <folder>/main.py <words>`."""
    found = subprocess.run(
        [sys.executable, str(ROOT / folder / 'main.py'), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        check=False)
    if found.returncode:
        raise RuntimeError(f'{folder} {" ".join(words)}: {found.stderr}')
    return metrics.parse_log(found.stdout)


def accuracy(bench, steps=500, seeds=(0, 1)):
    """Accuracy against latency and loss, at the same number of steps."""
    conditions = {
        'none': (),
        '10 ms a hop': ('--latency', '0.01'),
        '100 ms a hop': ('--latency', '0.1'),
        'a tenth lost': ('--loss_rate', '0.1'),
        'three tenths lost': ('--loss_rate', '0.3')
    }
    rows = [['condition', 'real', 'synthetic', 'staleness', 'rate']]
    means = {}
    for name, words in conditions.items():
        finals = [
            run_experiment(KGRAPH, '--data', bench.folder, '--steps',
                           str(steps), '--evaluate_every', '0', '--seed',
                           str(seed), *words).mean for seed in seeds
        ]
        means[name] = {
            key: statistics.fmean(final[key] for final in finals)
            for key in ('real', 'synthetic', 'staleness', 'rate')
        }
        rows.append([name, *means[name].values()])
    print(f'{KGRAPH}, {steps} steps, mean of seeds {seeds}, test set.')
    table(rows)
    for name, floor in (('100 ms a hop', 0.3), ('a tenth lost', 0.3),
                        ('three tenths lost', 0.5)):
        for key in ('real', 'synthetic'):
            bench.check(f'points of {key} that "{name}" costs',
                        means['none'][key] - means[name][key],
                        floor,
                        highest=True)


# ----------------------------------------------------------------- stragglers


def stragglers(bench):
    """What a slow and a stopped MACH do to the rate of the others."""
    rows = [[
        'graph', 'inputs', 'all well', 'one 10 times slower', 'one stopped',
        'slow / well', 'stopped / well'
    ]]
    worst = 1e9
    for folder in (SEQUENCE, KGRAPH):
        for inputs in ('synthetic', 'both', 'real'):
            networks = [
                Network(folder, bench.dataset, inputs=inputs),
                Network(folder, bench.dataset, inputs=inputs, slow_mach=0),
                Network(folder, bench.dataset, inputs=inputs, stopped=(0,))
            ]
            rates = measure(networks, 3, 8)
            well, slow, stopped = [statistics.fmean(of[1:]) for of in rates]
            if inputs != 'real':
                worst = min(worst, slow / well, stopped / well)
            rows.append([
                folder.split('_')[1],
                inputs + (' (locked)' if inputs == 'real' else ''), well, slow,
                stopped, slow / well, stopped / well
            ])
    print('Training steps a second of a MACH other than the straggler, MACH 0; '
          'the three cases of a line at the same time.')
    table(rows)
    bench.check('unlocked, rate of the others / without it, worst', worst, 0.95)


# --------------------------------------------------------------------- growth


def growth(bench, rounds=2):
    """Steps a second of all MACHs together against their number."""
    sizes = (2, 4, 8, 16, 32)
    rows = [['graph', '', *(f'k = {k}' for k in sizes), '32 / 2', '32 / 4']]
    for folder, overrides in ((SEQUENCE, {}), (KGRAPH, dict(neighbours=2))):
        steps, work = {k: [] for k in sizes}, {k: [] for k in sizes}
        for _ in range(rounds):
            for k in sizes:
                some = dict(overrides)
                if k <= 2:
                    some.pop('neighbours', None)  # there is but one
                network = Network(folder, bench.dataset, k=k, **some)
                with Counter() as counter:
                    rates = measure([network], 3, 3, counter.counts.clear)
                    steps[k].append(sum(rates[0]))
                    work[k].append(counter.flops() / 3e9)
        name = folder.split('_')[1] + (', neighbours 2' if overrides else '')
        for what, found in (('steps', steps), ('GFLOP', work)):
            medians = [statistics.median(found[k]) for k in sizes]
            rows.append([
                name, what, *medians, medians[-1] / medians[0],
                medians[-1] / medians[1]
            ])
    print('All MACHs together, a second: training steps, and billions of '
          f'floating-point operations in products; median of {rounds} rounds. '
          'In a pair both MACHs have at most one neighbour to ask and to '
          'serve, in larger graphs they have two.')
    table(rows)
    for row in rows[1::2]:
        bench.check(f'{row[0]}, steps, k = 32 / k = 2', row[-2], 0.9)


# ---------------------------------------------------------------------- limit


def product_seconds(shapes, dtype):
    """Seconds of one call of each shape on one core, all cores being busy.

    Args:
        shapes: (M, K, N, dW, dX): x [M, K] times weight [N, K], and what
            follows backward.
        dtype: of all matrices.
    """
    found = [{} for _ in range(CORES)]

    def work(seconds):
        for shape in shapes:
            m, k, n, of_weight, of_x = shape
            x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            gradient = torch.randn(m, n).to(dtype)

            def once():
                torch.nn.functional.linear(x, weight)
                if of_weight:
                    torch.mm(gradient.t(), x)
                if of_x:
                    torch.mm(gradient, weight)

            once()
            calls, started = 0, time.perf_counter()
            while calls < 3 or time.perf_counter() - started < 0.01:
                once()
                calls += 1
            seconds[shape] = (time.perf_counter() - started) / calls

    threads = [threading.Thread(target=work, args=(of,)) for of in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        shape: statistics.fmean(of[shape] for of in found) for shape in shapes
    }


def limit(bench, rounds=3):
    """Floating-point operations a second against the matrix-product rate."""
    rows = [[
        'experiment', 'precision', 'GFLOP/s', 'products alone, GFLOP/s', 'share'
    ]]
    for folder, precision, floor in (('synchronous_single', 'fp32',
                                      0.7), (SEQUENCE, 'fp32', 0.65),
                                     (KGRAPH, 'fp32', 0.65), (KGRAPH, 'bf16',
                                                              0.45)):
        network = Network(folder, bench.dataset, precision=precision)
        dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[precision]
        rates = []
        with Counter() as counter:
            network.start()
            time.sleep(3)
            for _ in range(rounds):
                counter.counts.clear()
                started = time.perf_counter()
                time.sleep(4)
                seconds = time.perf_counter() - started
                counts, flops = dict(counter.counts), counter.flops()
                network.rest(True)
                alone = product_seconds(list(counts), dtype)
                network.rest(False)
                time.sleep(0.5)
                ideal = sum(n * alone[s] for s, n in counts.items()) / CORES
                rates.append((ideal / seconds, flops / seconds / 1e9,
                              flops / ideal / 1e9))
            network.stop()
        share, reached, possible = sorted(rates)[rounds // 2]
        rows.append([folder, precision, reached, possible, share])
        bench.check(f'{folder} {precision}, share', share, floor)
    print('Median round of each; products alone: of the same shapes, one a '
          'core, all cores busy.')
    table(rows)


# ---------------------------------------------------------------------- plain


def plain_script(folder, accuracy_wanted=98.0):
    """The script most people would write; seconds to an accuracy on the test.

    Same network as one MACH. What is not training is left out of the seconds.
    """
    import torchvision  # pylint: disable=import-outside-toplevel
    torch.manual_seed(0)
    to_tensor = torchvision.transforms.ToTensor()
    train, test = [
        torchvision.datasets.MNIST(folder, train=of, transform=to_tensor)
        for of in (True, False)
    ]
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
    test_x = test.data.flatten(1) / 255.0
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 512),
                                  torch.nn.ReLU(), torch.nn.Linear(512, 256),
                                  torch.nn.ReLU(), torch.nn.Linear(256, 64),
                                  torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    watch, step = metrics.Stopwatch(), 0
    for epoch in range(20):
        watch.start()
        for x, y in loader:
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(x), y).backward()
            optimiser.step()
            step += 1
            if step % 100 == 0:
                watch.pause()
                with torch.no_grad():
                    reached = metrics.accuracy(network(test_x), test.targets)
                if reached >= accuracy_wanted:
                    return watch.seconds, epoch + 1
                watch.start()
    return float('inf'), 20


def plain(bench):
    """Seconds to 98.0% on the test set, against the plain script."""
    torch.set_num_threads(CORES)
    alone, epochs = plain_script(bench.folder)
    torch.set_num_threads(1)
    rows = [['script', 'seconds to 98.0', 'times faster'],
            [f'plain ({epochs} epochs)', alone, 1.0]]
    ratios = {}
    for folder, steps, key in (('synchronous_single', 1500, 'real'),
                               (KGRAPH, 1500, 'real')):
        log = run_experiment(folder, '--data', bench.folder, '--validation',
                             '0', '--evaluate_every', '50', '--steps',
                             str(steps))
        seconds = next(
            (line['seconds'] for line in log.evals if line[key] >= 98.0),
            float('inf'))
        ratios[folder] = alone / seconds
        rows.append([f'{folder} --steps {steps}', seconds, ratios[folder]])
    table(rows)
    bench.check('synchronous_single, times faster',
                ratios['synchronous_single'], 3.0)
    print(f'{KGRAPH}, mean of 5, real, times faster: {ratios[KGRAPH]:.3f}')


# --------------------------------------------------------------------- memory


def resident():
    """Resident memory of this process, in MB."""
    gc.collect()
    with open('/proc/self/status', encoding='ascii') as file:
        line = next(l for l in file if l.startswith('VmRSS'))
    return int(line.split()[1]) / 1024


def memory(bench):
    """Resident memory after 1,000 and 10,000 steps of each MACH."""
    network = Network(KGRAPH,
                      bench.dataset,
                      k=2,
                      batch_size=8,
                      latency=0.01,
                      loss_rate=0.1)
    network.start()
    found = []
    for steps in (1000, 10000):
        while min(network.steps()) < steps and network.events.empty():
            time.sleep(0.02)
        found.append(resident())
    network.stop()
    print(f'{KGRAPH}, 2 MACHs, batches of 8, 10 ms a hop, a tenth lost.')
    table([['after 1,000 steps, MB', 'after 10,000'], found])
    bench.check('growth', found[1] / found[0] - 1, 0.03, highest=True)


BENCHMARKS = dict(latency=latency,
                  accuracy=accuracy,
                  stragglers=stragglers,
                  growth=growth,
                  limit=limit,
                  plain=plain,
                  memory=memory)


def main(words):
    """Runs the benchmarks named, or all; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names',
                        nargs='*',
                        metavar='name',
                        help=f'of {", ".join(BENCHMARKS)}')
    parser.add_argument('--data', default='data', help='folder of MNIST')
    arguments = parser.parse_args(words)
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f'there is no benchmark {unknown.pop()}; there are '
                     f'{", ".join(BENCHMARKS)}')
    names = arguments.names or list(BENCHMARKS)
    if len(names) > 1:  # each in a process of its own
        started = time.perf_counter()
        missed = [
            name for name in names if subprocess.run(
                [sys.executable, __file__, name, '--data', arguments.data],
                check=False).returncode
        ]
        print(f'{len(names)} benchmarks in '
              f'{time.perf_counter() - started:.0f} s; with a floor missed: '
              f'{", ".join(missed) or "none"}')
        return int(bool(missed))
    try:
        bench = Bench(arguments.data)
    except data.DataError as error:
        parser.error(str(error))
    started = time.perf_counter()
    print(f'## {names[0]}\n')
    BENCHMARKS[names[0]](bench)
    print(
        f'({time.perf_counter() - started:.0f} s, {CORES} cores, torch '
        f'{torch.__version__}, {time.strftime("%Y-%m-%d")})\n',
        flush=True)
    return int(bench.missed > 0)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
