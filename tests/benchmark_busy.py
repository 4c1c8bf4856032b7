"""Training rates on a quiet machine and beside two busy loops, side by side.

    python tests/benchmark_busy.py --before ../before    # 6 minutes

Each candidate is a process that trains without end. All but one are stopped at
any time, so that rates are of the same minutes: the turns are short and rotate.
Ends with exit status 1 if a floor is missed.
"""

import argparse
import mmap
import os
import pathlib
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENTS = 'synchronous_single', 'synchronous_sequence', 'synchronous_kgraph'
QUIET, BUSY = 0.95, 0.7  # floors: over `before`; over `before` on one thread
# Trains, and counts its steps in a file that this process maps.
CHILD = '''
import mmap, struct, sys, threading
folder, file, data = sys.argv[1:]
sys.path.insert(0, folder)
import main
words = ['--data', data, '--steps', '1000000', '--precision', 'bf16']
settings = main.read_hyperparameters(words)
trainer = main.make_trainer(settings, main.data.load(data))
with open(file, 'r+b') as opened:
    counted = mmap.mmap(opened.fileno(), 8)
class Events:
    def put(self, event):
        counted[:8] = struct.pack('q', trainer.steps_taken)
settings.log_every, settings.evaluate_every = 1, 0
main.work(trainer, settings, Events(), threading.Event())
'''


def start(folder, data, **names):
    """A stopped process that trains, and a function that gives its steps."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8))
        file.flush()
        process = subprocess.Popen(
            [sys.executable, '-c', CHILD,
             str(folder), file.name, data],
            env=os.environ | names,
            stderr=subprocess.DEVNULL)
        counted = mmap.mmap(file.fileno(), 8)

        def steps():
            return struct.unpack('q', counted[:8])[0]

        while steps() < 20:
            assert process.poll() is None, f'{folder} ended'
            time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    return process, steps


def measure(candidates, seconds, rounds):
    """name -> steps a second in each round, of which each has its turn."""
    rates = {name: [] for name in candidates}
    for number in range(rounds):
        order = list(candidates)[::-1 if number % 2 else 1]
        for name in order[number % len(order):] + order[:number % len(order)]:
            process, steps = candidates[name]
            process.send_signal(signal.SIGCONT)
            time.sleep(0.3)
            first, began = steps(), time.perf_counter()
            time.sleep(seconds)
            rates[name].append(
                (steps() - first) / (time.perf_counter() - began))
            process.send_signal(signal.SIGSTOP)
    return rates


def main():
    """Prints the table; returns whether a floor was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--before', help='another checkout', required=True)
    parser.add_argument('--data', default='data', help='folder of MNIST')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--only', nargs='+', default=EXPERIMENTS)
    options, missed = parser.parse_args(), False
    print('| experiment | busy loops | before | before, one thread | now | '
          'now over before | now over one thread |\n' + '|---' * 7 + '|')
    for experiment in options.only:
        before = pathlib.Path(options.before) / experiment
        candidates = dict(before=start(before, options.data),
                          one=start(before, options.data, OMP_NUM_THREADS='1'),
                          now=start(ROOT / experiment, options.data))
        for busy in 0, 2:
            loops = [
                subprocess.Popen([sys.executable, '-c', 'while True: pass'])
                for _ in range(busy)
            ]
            rates = measure(candidates, 2.0, options.rounds)
            for loop in loops:
                loop.kill()
            mean = {name: statistics.fmean(of) for name, of in rates.items()}
            ratio = mean['now'] / mean['before'], mean['now'] / mean['one']
            missed |= ratio[0] < QUIET if busy == 0 else ratio[1] < BUSY
            print(
                f'| {experiment} | {busy} | {mean["before"]:.1f} | '
                f'{mean["one"]:.1f} | {mean["now"]:.1f} | {ratio[0]:.2f} | '
                f'{ratio[1]:.2f} |',
                flush=True)
        for process, _ in candidates.values():
            process.kill()
    print(f'Steps a second, mean of {options.rounds} turns of 2 s. Floors: '
          f'{QUIET} over before if quiet, {BUSY} over one thread if busy.')
    return missed


if __name__ == '__main__':
    sys.exit(main())
