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
import contextlib
import functools
import itertools
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from concurrent import futures
from statistics import fmean, median

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import conftest
from mach import data, metrics

SINGLE, SEQUENCE = 'synchronous_single', 'asynchronous_sequence'
KGRAPH = 'asynchronous_kgraph'
PLAIN = conftest.load_main('tests/plain')
CORES = len(os.sched_getaffinity(0))
MISSED = []  # floors
# Products: (M, K, N, dW, dX) -> calls with x [M, K] and weight [N, K], and
# whether they are followed by the products of either's gradient.
COUNTS = collections.Counter()
LINEAR = torch.nn.functional.linear


@functools.cache
def load(folder):
    """MNIST from a folder; nearly all of it is trained on, as `plain` does."""
    return data.load(folder, 10)


class Network:
    """The MACHs of one experiment on their threads, without its main thread.

    Args:
        experiment: its name.
        folder: of the MNIST files.
        stopped: indices of MACHs that never take a step nor read their mail.
        **overrides: hyperparameters.
    """

    def __init__(self, experiment, folder, stopped=(), **overrides):
        torch.set_num_threads(CORES)  # for main.CORES, as in its own process
        self.main = conftest.load_main(experiment)
        values = dict(steps=10**6, log_every=10**6, evaluate_every=0)
        values |= dict(precision='fp32') | overrides
        self.settings = self.main.Hyperparameters(**values)
        if experiment == SINGLE:
            self.trainers = [
                self.main.make_trainer(self.settings, load(folder))
            ]
        else:
            self.trainers = self.main.make_trainers(self.settings, load(folder))
        self.halt, self._open = threading.Event(), threading.Event()
        self._events = queue.SimpleQueue()
        self._locks = [threading.Lock() for _ in self.trainers]
        for one, lock in zip(self.trainers, self._locks):
            one.step = functools.partial(self._step, lock, one.step)
        shared = self.settings, self._events, self.halt
        self._threads = [
            threading.Thread(target=self.main.work, args=(one, *shared))
            for i, one in enumerate(self.trainers)
            if i not in stopped
        ]

    def _step(self, lock, step, *stopped):
        self._open.wait()
        with lock:
            step(*stopped)

    @contextlib.contextmanager
    def held(self):
        """Meanwhile all MACHs wait between two steps."""
        self._open.clear()
        with contextlib.ExitStack() as stack:
            for lock in self._locks:
                stack.enter_context(lock)
            yield
        self._open.set()

    def start(self):
        """Starts the threads of all MACHs that are not stopped."""
        torch.set_num_threads(1)  # what a new thread begins with
        self._open.set()
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def steps(self):
        """Steps taken by each MACH; RuntimeError if one has failed."""
        while not self._events.empty():
            _, snapshots = self._events.get()
            if any(one.failed for one in snapshots.values()):
                raise RuntimeError('a MACH failed; its traceback is on stderr')
        return [one.steps_taken for one in self.trainers]

    def reach(self, step):
        """Waits until each MACH has taken so many."""
        while min(self.steps()) < step:
            time.sleep(0.005)

    def stop(self):
        """Ends the threads; RuntimeError if one has failed."""
        self.halt.set()
        for thread in self._threads:
            thread.join(30)
        self.steps()


def measure(networks, warm_up, window):
    """Trains networks side by side, and counts.

    Args:
        networks: not yet started; they are stopped afterwards.
        warm_up, window: seconds before and while it is measured.
    Returns:
        For each network a list of each MACH's training steps a second; and
        floating-point operations a second, if `counting_linear` counts.
    """
    for network in networks:
        if len(networks) > 1:
            # Turns give all the same number of steps, whatever they cost; let
            # the scheduler give all the same time instead.
            network.main.TURNS = contextlib.nullcontext()
        network.start()
    time.sleep(warm_up)
    COUNTS.clear()
    before, started = [n.steps() for n in networks], time.perf_counter()
    time.sleep(window)
    after, counts = [n.steps() for n in networks], dict(COUNTS)
    seconds = time.perf_counter() - started
    for network in networks:
        network.halt.set()
    for network in networks:
        network.stop()
    return [[(b - a) / seconds
             for a, b in zip(*pair)]
            for pair in zip(before, after)], operations(counts) / seconds


def counting_linear(x, weight, bias=None):
    """Stands in for torch.nn.functional.linear."""
    grad = torch.is_grad_enabled()
    COUNTS[(x.numel() // x.shape[-1], *weight.shape[::-1], grad and
            weight.requires_grad, grad and x.requires_grad)] += 1
    return LINEAR(x, weight, bias)


def operations(counts):
    """Floating-point operations of such counts."""
    return sum(calls * 2 * m * k * n * (1 + of_weight + of_x)
               for (m, k, n, of_weight, of_x), calls in counts.items())


def table(heads, *rows):
    """Prints rows of cells as Markdown."""
    for row in (heads, ['---'] * len(heads), *rows):
        cells = [f'{c:.2f}' if isinstance(c, float) else str(c) for c in row]
        print(f'| {" | ".join(cells)} |')
    print()


def check(what, value, bound, highest=False):
    """Prints one figure beside its floor (or, `highest`, its ceiling)."""
    met = value <= bound if highest else value >= bound
    MISSED.extend([what] * (not met))
    print(f'{what}: {value:.3f} (at {"most" if highest else "least"} {bound}: '
          f'{"met" if met else "MISSED"})')


def latency(folder):
    """Rate of a MACH against seconds a hop, locked and unlocked."""
    latencies, rows, worst = (0.0, 0.01, 0.1, 1.0), [], 1e9
    graphs = [(SEQUENCE, k) for k in (2, 4, 8)] + [(KGRAPH, 3), (KGRAPH, 5)]
    for (graph, k), inputs in itertools.product(graphs, ('synthetic', 'real')):
        networks = [
            Network(graph, folder, k=k, inputs=inputs, latency=s, deadline=60.0)
            for s in latencies
        ]
        rates, _ = measure(networks, 3, 8)
        if graph == SEQUENCE:  # its first has no children
            rates = [of[1:] for of in rates]
        means = [fmean(of) for of in rates]
        name, predicted = 'unlocked', []
        if inputs == 'real':
            name, depth = 'locked', networks[0].settings.depth
            for late in latencies[1:]:  # a row may be shorter than the depth
                waits = [2 * late * min(i, depth) for i in range(1, k + 1)]
                mean = fmean(1 / (1 / r + w) for r, w in zip(rates[0], waits))
                predicted.append(f'{mean:.2f}')
        else:
            worst = min(worst, means[-1] / means[0])
        rows.append((graph, k, name, *means, ' / '.join(predicted),
                     means[-1] / means[0]))
    print('Training steps a second of a MACH that has children; the four '
          'latencies of a line at the same time.')
    table(('graph', 'k', 'inputs', *(f'{s:g} s' for s in latencies),
           'predicted', '1 s / 0'), *rows)
    check('unlocked, rate at 1 s / rate at 0, worst', worst, 0.95)


def accuracy(folder, steps=500, seeds=(0, 1)):
    """Accuracy in % against latency and loss, at the same number of steps."""
    keys = ('real', 'synthetic', 'staleness', 'rate')
    conditions = (('none', '', None), ('10 ms a hop', '--latency 0.01', None),
                  ('100 ms a hop', '--latency 0.1',
                   0.3), ('a tenth lost', '--loss_rate 0.1',
                          0.3), ('three tenths lost', '--loss_rate 0.3', 0.5))
    means = {}
    for name, words, _ in conditions:
        finals = []
        for seed in seeds:
            text = f'--steps {steps} --evaluate_every 0 --seed {seed} {words}'
            command = [sys.executable, conftest.ROOT / KGRAPH / 'main.py']
            command += ['--data', folder, *text.split()]
            log = subprocess.check_output(command, text=True)
            finals.append(metrics.parse_log(log).mean)
        means[name] = {key: fmean(f[key] for f in finals) for key in keys}
    print(f'{KGRAPH}, {steps} steps, mean of seeds {seeds}, test set.')
    table(('condition', *keys),
          *([name, *found.values()] for name, found in means.items()))
    for (name, _, most), key in itertools.product(conditions[2:], keys[:2]):
        cost = means['none'][key] - means[name][key]
        check(f'points of {key} that "{name}" costs', cost, most, highest=True)


def stragglers(folder):
    """What a slow and a stopped MACH do to the rate of the others."""
    rows = []
    for inputs in ('synthetic', 'real'):
        for graph in (SEQUENCE, KGRAPH):
            networks = [
                Network(graph, folder, inputs=inputs, **overrides)
                for overrides in ({}, dict(slow_mach=0), dict(stopped=(0,)))
            ]
            rates, _ = measure(networks, 3, 8)
            well, slow, stopped = (fmean(of[1:]) for of in rates)
            rows.append((graph, inputs, well, slow, stopped, slow / well,
                         stopped / well))
    print('Training steps a second of a MACH other than the straggler, MACH 0; '
          'the three cases of a line at the same time.')
    table(('graph', 'inputs', 'all well', 'one 10 times slower', 'one stopped',
           'slow / well', 'stopped / well'), *rows)
    worst = min(min(row[-2:]) for row in rows if row[1] == 'synthetic')
    check('unlocked, rate of the others / without it, worst', worst, 0.95)


def growth(folder, rounds=2):
    """Steps a second of all MACHs together against their number."""
    torch.nn.functional.linear = counting_linear
    sizes, rows = (2, 4, 8, 16, 32), []
    for graph, overrides in ((SEQUENCE, {}), (KGRAPH, dict(neighbours=2))):
        found = {k: [] for k in sizes}
        for k in sizes * rounds:
            some = overrides if k > 2 else {}  # in a pair there is but one
            network = Network(graph, folder, k=k, **some)
            (rates,), work = measure([network], 3, 3)
            found[k].append((sum(rates), work / 1e9))
        for i, what in enumerate(('steps', 'GFLOP')):
            medians = [median(of[i] for of in found[k]) for k in sizes]
            rows.append((graph, what, *medians, medians[-1] / medians[1]))
    print('All MACHs together, a second: training steps, and billions of '
          f'floating-point operations in products; median of {rounds} rounds. '
          'In the k-graph each has two children, in a pair one.')
    table(('graph', '', *(f'k = {k}' for k in sizes), '32 / 4'), *rows)
    for graph, _, *_, ratio in rows[::2]:
        check(f'{graph}, steps, k = 32 / k = 4', ratio, 0.9)


def product_seconds(shapes, dtype):
    """Seconds of a call of each shape of `COUNTS` on one core, all busy."""

    def work(_):
        torch.set_num_threads(1)
        found = []
        for m, k, n, of_weight, of_x in shapes:
            x, weight, grad = (torch.randn(size).to(dtype)
                               for size in ((m, k), (n, k), (m, n)))
            for calls in itertools.count():
                if calls == 1:  # the first is slow
                    started = time.perf_counter()
                if calls > 3 and time.perf_counter() - started > 0.01:
                    break
                LINEAR(x, weight)
                if of_weight:
                    torch.mm(grad.t(), x)
                if of_x:
                    torch.mm(grad, weight)
            found.append((time.perf_counter() - started) / (calls - 1))
        return found

    with futures.ThreadPoolExecutor(CORES) as pool:
        return dict(zip(shapes, map(fmean, zip(*pool.map(work, range(CORES))))))


def limit(folder, rounds=3):
    """Floating-point operations a second against the matrix-product rate."""
    torch.nn.functional.linear = counting_linear
    rows = []
    floors = ((SINGLE, 'fp32', 0.7), (SEQUENCE, 'fp32', 0.65),
              (KGRAPH, 'fp32', 0.65), (KGRAPH, 'bf16', 0.45))
    for experiment, precision, _ in floors:
        network = Network(experiment, folder, precision=precision)
        dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[precision]
        network.start()
        time.sleep(3)
        found = []
        for _ in range(rounds):
            time.sleep(0.5)
            COUNTS.clear()
            started = time.perf_counter()
            time.sleep(4)
            seconds, counts = time.perf_counter() - started, dict(COUNTS)
            with network.held():
                alone = product_seconds(counts, dtype)
            ideal = sum(n * alone[s] for s, n in counts.items()) / CORES
            work = operations(counts) / 1e9
            found.append((ideal / seconds, work / seconds, work / ideal))
        network.stop()
        share, reached, possible = sorted(found)[rounds // 2]
        rows.append((experiment, precision, reached, possible, share))
    print('Median round of each; products alone: of the same shapes, one a '
          'core, all cores busy.')
    table(('experiment', 'precision', 'GFLOP/s', 'products alone, GFLOP/s',
           'share'), *rows)
    for (experiment, precision, floor), row in zip(floors, rows):
        check(f'{experiment} {precision}, share', row[-1], floor)


def plain_script(folder, wanted):
    """Seconds and epochs until the test accuracy of tests/plain is `wanted` %.
    """
    dataset, tally = load(folder), metrics.Tally(0)
    settings = PLAIN.Hyperparameters(data=str(folder), steps=20000)

    def look(step, network):
        return step % 100 == 0 and PLAIN.evaluate(network, dataset.test_images,
                                                  dataset.test_labels) >= wanted

    network = PLAIN.train(settings, dataset, tally, look)
    reached = PLAIN.evaluate(network, dataset.test_images,
                             dataset.test_labels) >= wanted
    epochs = tally.steps * settings.batch_size / len(dataset.train_labels)
    return tally.seconds if reached else float('inf'), epochs


def seconds_to(network, folder, wanted, every=50):
    """Seconds of a started network until its real test accuracy is `wanted` %.

    It looks each so many steps, while training is held. To choose a moment by
    the test set is wrong but where speed alone is compared, as here.
    """
    dataset, seconds = load(folder), 0.0
    for step in range(every, network.settings.steps + 1, every):
        started = time.perf_counter()
        network.reach(step)
        with network.held():
            seconds += time.perf_counter() - started
            snapshots = {}
            for one in network.trainers:
                snapshots |= one.snapshot()
            found = network.main.evaluate(snapshots, network.settings,
                                          dataset.test_images,
                                          dataset.test_labels)
        if metrics.mean(found)['real'] >= wanted:
            return seconds
    return float('inf')


def plain(folder, wanted=98.0):
    """Seconds to an accuracy in % on the test set, against the plain script.

    The validation images have chosen the steps of both experiments, and the
    learning rate of synchronous_single. Of the k-graph, the mean of the MACHs
    with real inputs counts.
    """
    torch.set_num_threads(CORES)
    alone, epochs = plain_script(folder, wanted)
    rows = [(f'plain ({epochs:.1f} epochs)', alone, 1.0)]
    precision = metrics.choose_precision('auto', 'cpu')
    runs = ((SINGLE, dict(steps=1250, learning_rate=0.003), 3.0),
            (KGRAPH, dict(steps=800), 1.5))
    for experiment, names, _ in runs:
        network = Network(experiment, folder, precision=precision, **names)
        network.start()
        seconds = seconds_to(network, folder, wanted)
        network.stop()
        words = ' '.join(f'--{key} {value}' for key, value in names.items())
        rows.append((f'{experiment} {words}', seconds, alone / seconds))
    table(('script', f'seconds to {wanted}', 'times faster'), *rows)
    for (experiment, _, floor), row in zip(runs, rows[1:]):
        check(f'{experiment}, times faster', row[-1], floor)


def memory(folder, counts=(1000, 10000)):
    """Resident memory after so many steps of each MACH."""
    overrides = dict(k=2, batch_size=8, latency=0.01, loss_rate=0.1)
    network = Network(KGRAPH, folder, **overrides)
    network.start()
    found = []  # MB
    for step in counts:
        network.reach(step)
        status = pathlib.Path('/proc/self/status').read_text('ascii')
        found.append(int(status.split('VmRSS:')[1].split()[0]) / 1024)
    network.stop()
    print(f'{KGRAPH}, 2 MACHs, batches of 8, 10 ms a hop, a tenth lost.')
    table([f'after {step:,} steps, MB' for step in counts], found)
    check('growth', found[1] / found[0] - 1, 0.03, highest=True)


BENCHMARKS = {
    one.__name__: one
    for one in (latency, accuracy, stragglers, growth, limit, plain, memory)
}


def main(words):
    """Runs the benchmarks named, or all; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help=f'of {", ".join(BENCHMARKS)}')
    parser.add_argument('--data', default='data', help='folder of MNIST')
    arguments = parser.parse_args(words)
    names, folder = arguments.names or list(BENCHMARKS), arguments.data
    if not set(names) <= set(BENCHMARKS):
        parser.error(f'the benchmarks are {", ".join(BENCHMARKS)}')
    started = time.perf_counter()
    if len(names) > 1:  # each in a process of its own
        for name in names:
            command = [sys.executable, __file__, name, '--data', folder]
            if subprocess.run(command, check=False).returncode:
                MISSED.append(name)
    else:
        try:
            load(folder)
        except data.DataError as error:
            parser.error(str(error))
        print(f'## {names[0]}\n', flush=True)
        BENCHMARKS[names[0]](folder)
    print(f'({time.perf_counter() - started:.0f} s, {CORES} cores, torch '
          f'{torch.__version__}, {time.strftime("%Y-%m-%d")}; missed: '
          f'{"; ".join(MISSED) or "none"})\n')
    return int(bool(MISSED))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
