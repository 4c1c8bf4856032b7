"""k MACHs in a row, each on its own thread, its own data and its own optimiser.

A MACH exchanges Spikes, Answers and Grads with the MACHs beside it. It waits
for no message, unless `inputs` is `real`. The delay of a Grad is counted, not
set. Differs from synchronous_sequence: threads, disjoint shards, links.

    python asynchronous_sequence/main.py
    torchrun --nproc-per-node 3 asynchronous_sequence/main.py

Expect, mean of 3 MACHs, real 98.44 ± 0.09, synthetic 98.13 ± 0.07 (mean and
deviation over 5 seeds; isolated 97.88) in 36 s of training on two cores, bf16.
"""

import os
import signal
import sys

if __name__ == '__main__':  # the imports take seconds

    def end(number, _):
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        sys.exit(128 + number)

    for name in 'SIGINT', 'SIGTERM', 'SIGHUP':  # Windows lacks the last
        signum = getattr(signal, name, signal.SIGINT)
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, end)

import argparse
import collections
import contextlib
import dataclasses
import math
import pathlib
import queue
import re
import threading
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent
ROOTS = [up for up in HERE.parents if (up / 'mach/metrics.py').is_file()]
if not ROOTS:
    sys.exit(f'{HERE}: needs the folder mach beside it, or further up')
sys.path[:0] = [str(HERE), str(ROOTS[0])]
from mach import metrics

EXPERIMENT = HERE.name

# ------------------------------------------------------------ hyperparameters


# Copied from synchronous_single/main.py
def hparam(default, reason, *limits):
    """A hyperparameter: default, unit or reason, least and most, or choices."""
    return dataclasses.field(default=default,
                             metadata=dict(reason=reason, limits=limits))


@dataclasses.dataclass
class Hyperparameters:
    """Edit the defaults in place, or override one for a run: --name value."""
    # Data.
    data: str = hparam('data', 'folder of the MNIST files')
    validation: int = hparam(5000, 'held-out images, for eval lines', 10, 50000)
    shards: str = hparam('disjoint', 'images of a MACH', 'disjoint', 'skewed',
                         'full')
    skew: float = hparam(0.5, 'of a Dirichlet; less: more uneven', 0.01, 1e6)
    # Run.
    seed: int = hparam(0, 'draws weights, shards, batches', 0, 10**9)
    steps: int = hparam(2500, 'training steps of each MACH', 1, 10**9)
    batch_size: int = hparam(128, 'own images in one step', 1, 60000)
    log_every: int = hparam(200, 'steps between `step` lines', 1, 10**9)
    evaluate_every: int = hparam(1000, 'steps; 0: no eval lines', 0, 10**9)
    device: str = hparam('cpu', 'of networks: cpu or, untested, cuda:0')
    precision: str = hparam('auto', 'of products', 'fp32', 'bf16', 'auto')
    edges: bool = hparam(True, 'print the worth of each edge', 'False', 'True')
    dry_run: bool = hparam(False, 'check all, train nothing', 'False', 'True')
    checkpoint: str = hparam('', 'folder of checkpoints; empty: none')
    checkpoint_every: int = hparam(500, 'steps between checkpoints', 1, 10**9)
    resume: bool = hparam(False, 'from the checkpoints', 'False', 'True')
    tensorboard: str = hparam('', 'folder of curves; empty: none')
    # Graph and messages.
    k: int = hparam(3, 'MACHs; 1: one MACH on all the data', 1, 1000)
    connected: bool = hparam(True, 'False: no edges', 'False', 'True')
    depth: int = hparam(2, 'edges that a Spike may travel', 0, 100)
    grad_depth: int = hparam(2, 'edges of a Grad; all are children: 1', 0, 100)
    any_rows_every: int = hparam(4, 'steps per Spike about any rows', 0, 10**9)
    inputs: str = hparam('synthetic', 'of training steps', 'synthetic', 'real')
    deadline: float = hparam(1.0, 'seconds to wait for real inputs', 0.001, 1e6)
    share: float = hparam(0.25, 'share of a batch in a Grad', 0.001, 1)
    grad_weight: float = hparam(0.25, 'norm of a Grad over the own', 0, 1e6)
    # Processes; torchrun says how many.
    hosts: str = hparam('', 'a,b: hosts of the processes; empty: this one')
    log_folder: str = hparam('', 'folder of a log per process; empty: none')
    # Conditions that links and MACHs are put under.
    latency: float = hparam(0.0, 'seconds that a message travels', 0, 1e6)
    jitter: float = hparam(0.0, 'seconds more, at most, at random', 0, 1e6)
    loss_rate: float = hparam(0.0, 'share of messages lost', 0, 1)
    slow_mach: int = hparam(-1, 'index of a slow MACH; -1: none', -1, 999)
    slow_factor: float = hparam(10.0, 'its steps take times as long', 1, 1e6)
    # Networks.
    embedding: int = hparam(64, 'units of an embedding', 1, 16384)
    hidden: int = hparam(512, 'units of layer 1; layer 2: half', 2, 16384)
    student_hidden: int = hparam(128, 'units of its two layers', 1, 16384)
    # Optimisation: AdamW, one learning-rate cycle over the run.
    learning_rate: float = hparam(0.003, 'peak, of the network', 0, 1e6)
    student_learning_rate: float = hparam(0.003, 'peak', 0, 1e6)
    warmup: float = hparam(0.1, 'share of steps up to the peak', 0, 0.999)
    weight_decay: float = hparam(0.05, 'of the network', 0, 1e6)
    prior: float = hparam(0.4, 'factor of log class frequencies', 0, 10)
    label_smoothing: float = hparam(0.1, 'of the target loss', 0, 0.999)
    dropout: float = hparam(0.3, 'of h, so that inputs matter', 0, 0.999)
    alone: float = hparam(0.2, 'of own rows lack h, x (1 - 5 / k)', 0, 1)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            setattr(self, field.name, read(field, getattr(self, field.name)))
        if not self.resume:  # else the checkpoint decides
            self.precision = metrics.choose_precision(self.precision,
                                                      self.device)
        if self.resume and not self.checkpoint:
            raise ValueError('--resume needs the folder --checkpoint')
        if self.slow_mach >= self.k:
            raise ValueError('--slow_mach must be below --k')


# Copied from synchronous_single/main.py
def describe(kind, limits):
    """'1 to 1000', or 'fp32, bf16 or auto'; '' if there are no limits."""
    words = list(map(str, limits or ()))
    if kind in (int, float):
        return ' to '.join(words)
    return ' or '.join(filter(None, [', '.join(words[:-1]), *words[-1:]]))


# Copied from synchronous_single/main.py
def read(field, value):
    """The value of a hyperparameter, given as itself or as text.

    Raises:
        ValueError: it is beyond its limits; the message names it.
    """
    kind, limits = field.type, field.metadata.get('limits')
    if kind not in (int, float, bool, str):
        raise ValueError(f'--{field.name}: cannot be a {kind}')
    limits = limits or ('False', 'True') * (kind is bool)
    text = str(value).strip()
    with contextlib.suppress(ValueError):
        if kind in (int, float):
            if not limits or limits[0] <= kind(text) <= limits[1]:
                return kind(text)
        elif not limits or text in limits:
            return text == 'True' if kind is bool else os.path.expanduser(text)
    raise ValueError(f'--{field.name}: must be {kind.__name__}, '
                     f'{describe(kind, limits)}, not {text!r}')


# Copied from synchronous_single/main.py
def read_hyperparameters(words):
    """The defaults above, overridden by `words`: ['--k', '3', '--depth=0'].

    Bad input ends the run with one line and exit status 2.
    """
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda message: parser.exit(2, f'{EXPERIMENT}: {message}\n')
    for field in dataclasses.fields(Hyperparameters):
        names = f'--{field.name}', f'--{field.name.replace("_", "-")}'
        reason, limits = map(field.metadata.get, ('reason', 'limits'))
        known = [reason, describe(field.type, limits)]
        known = filter(None, [*known, f'default {field.default!r}'])
        parser.add_argument(*dict.fromkeys(names),
                            dest=field.name,
                            default=field.default,
                            metavar=getattr(field.type, '__name__', 'value'),
                            help='; '.join(known).replace('%', '%%'))
    # A space keeps argparse from taking a number such as -1e-3 for an option.
    words = [f' {w}' if re.match(r'-[\d.]', w) else w for w in words]
    values, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(metrics.explain(unknown[0].strip(), vars(values)))
    try:
        return Hyperparameters(**vars(values))
    except ValueError as error:
        parser.error(str(error))


if __name__ == '__main__':  # bad input ends it before imports that take seconds
    read_hyperparameters(sys.argv[1:])
from mach import data
import checkpoint
import torch
import processes
from link import Link
from model import Mach
from student import Student
from trainer import Snapshot, Trainer

CORES = torch.get_num_threads()
torch.set_num_threads(1)  # a MACH is one thread, within its products too

# ---------------------------------------------------------------------- MACHs


# Copied from synchronous_sequence/main.py
def children_of(settings):
    """For each MACH the list of its children: the MACH before it."""
    if not settings.connected:
        return [[] for _ in range(settings.k)]
    return [[i - 1] if i > 0 else [] for i in range(settings.k)]


# Copied from synchronous_sequence/main.py
def make_networks(settings):
    """For each MACH its children, its network, and its student or None."""
    torch.manual_seed(settings.seed)
    made = []
    for children in children_of(settings):
        count, student = len(children), None
        with torch.device(settings.device):
            network = Mach(count, settings.hidden, settings.embedding)
            if children:
                student = Student(count, settings.student_hidden,
                                  settings.embedding)
        if made:  # all heads start alike: a direction means the same class
            network.head.load_state_dict(made[0][1].head.state_dict())
        made.append((children, network, student))
    return made


def make_trainers(settings, dataset):
    """One Trainer for each MACH, with Links between neighbours.

    Raises:
        data.DataError: the shards or the batch size cannot be.
    """
    batches = data.deal(dataset, settings.k, settings.shards,
                        settings.batch_size, settings.seed, settings.device,
                        settings.skew)
    trainers = [
        Trainer(i, network, student, children, batches[i], settings)
        for i, (children, network,
                student) in enumerate(make_networks(settings))
    ]
    for one in trainers:
        for child in one.exchange.children:
            for i, j in ((one.index, child), (child, one.index)):
                trainers[i].exchange.links[j] = Link(
                    trainers[j].exchange.mailbox, settings.latency,
                    settings.jitter, settings.loss_rate,
                    f'{settings.seed} {i} {j}')
    return trainers


# -------------------------------------------------------------------- threads


class Turns:
    """Lets `count` MACHs compute at once, in the order in which they asked.

    A MACH waits here for a core, as any thread does, never for a message.
    Without turns many threads compete for Python's one lock in the midst of a
    step.
    """

    def __init__(self, count):
        self._free, self._waiting = count, collections.deque()
        self._lock = threading.Lock()

    def __enter__(self):
        turn = threading.Event()
        with self._lock:
            self._free -= 1
            if self._free >= 0:
                return
            self._waiting.append(turn)
        turn.wait(10)  # seconds at most; then it goes on without a turn

    def __exit__(self, *_):
        with self._lock:
            self._free += 1
            if self._waiting:
                self._waiting.popleft().set()


TURNS = Turns(CORES + 1)  # one more, while another waits for Python's lock


def work(trainer, settings, events, halt):
    """A MACH's thread: it trains, then serves until `halt` is set.

    An event for the main thread is a list of fields of `step` lines and a dict
    of Snapshots. They are made here: no other thread touches a MACH.
    """
    turns = TURNS
    if settings.inputs == 'real':  # it would keep its turn while it waits
        turns = contextlib.nullcontext()
    every = settings.evaluate_every or settings.steps
    trainer.tally.begin()
    try:
        if trainer.steps_taken:  # resumed
            events.put(([], trainer.snapshot()))
        while not trainer.finished and not halt.is_set():
            began = time.perf_counter()
            with turns:
                if halt.is_set():  # it came while the MACH waited for its turn
                    break
                trainer.step(halt.is_set)
            if trainer.index == settings.slow_mach:
                spent = time.perf_counter() - began
                halt.wait(spent * (settings.slow_factor - 1))
            if trainer.steps_taken % settings.log_every == 0:
                events.put(([trainer.tally.report()], {}))
            if trainer.steps_taken % every == 0 or trainer.finished:
                events.put(([], trainer.snapshot()))
            if trainer.steps_taken % settings.checkpoint_every == 0:
                checkpoint.save(trainer, settings.checkpoint)
        while not halt.is_set():
            trainer.serve(0.05)
        checkpoint.save(trainer, settings.checkpoint)
        events.put(([], trainer.snapshot(ended=True)))
    except BaseException:  # pylint: disable=broad-except
        metrics.warn(
            f'{EXPERIMENT}: mach {trainer.index} failed in step '
            f'{trainer.steps_taken + 1}: {traceback.format_exc().rstrip()}')
        events.put(([], trainer.snapshot(False, ended=True, failed=True)))


def train(trainers, settings, dataset, node):
    """Runs the threads and prints what all MACHs report, until all have ended.

    Training does not pause for an evaluation: whenever the slowest MACH has
    reported, the main thread evaluates the newest Snapshots. It skips a MACH
    whose process is gone.

    Args:
        trainers: of this process.
        node: this process; after a signal each thread ends after its step.
    Returns:
        index -> the last Snapshot of each MACH. It has no networks if the MACH
        failed, is gone, or was interrupted before its first Snapshot with them.
    """
    # Bounded: if evaluations fall far behind, training waits for them.
    events, halt = queue.Queue(4 * len(trainers)), threading.Event()
    snapshots = {i: Snapshot(metrics.Tally(i)) for i in range(settings.k)}
    threads, evaluated, deadline, running = [], 0, math.inf, True
    for one in trainers:
        thread = threading.Thread(target=work,
                                  args=(one, settings, events, halt),
                                  daemon=True)
        if metrics.start(thread, f'{EXPERIMENT}: mach {one.index}'):
            threads.append(thread)
        else:
            events.put(([], one.snapshot(False, ended=True, failed=True)))
    bar = metrics.tqdm.tqdm(total=settings.steps * len(trainers),
                            disable=node.rank > 0 or None)
    while running and time.monotonic() < deadline:
        bar.update(sum(one.steps_taken for one in trainers) - bar.n)
        stopped = node.signal or metrics.FAILED
        if stopped or evaluated == settings.steps:
            halt.set()
            seconds = 2 if stopped else 60  # a step may last longer
            deadline = min(deadline, time.monotonic() + seconds)
        lines, news = node.news()
        with contextlib.suppress(queue.Empty):
            own_lines, own_news = events.get(timeout=0.1)
            node.tell(own_lines, own_news)
            lines, news = lines + own_lines, news | own_news
        for fields in lines:
            metrics.say('step', **fields)
        snapshots |= news
        here = [
            one for i, one in snapshots.items()
            if not one.failed and (one.ended or node.hears(i))
        ]
        running = not all(one.ended for one in here)
        slowest = min([one.tally.steps for one in here] or [0])
        if slowest > evaluated and not stopped:
            evaluated = slowest
            if settings.evaluate_every and metrics.OUTPUTS:
                say_eval(evaluated, snapshots, settings, dataset)
    halt.set()
    bar.close()
    for thread in threads:
        thread.join(0.1)
    snapshots |= node.news()[1]  # from a process that has just ended
    for i, one in snapshots.items():
        if not one.ended and not node.hears(i):
            snapshots[i] = Snapshot(node.tally(i))
    return snapshots


# ----------------------------------------------------------------- evaluation


# Copied from synchronous_single/main.py
def say_eval(step, snapshots, settings, dataset):
    """Prints the `eval` line of a step: the mean on the validation images."""
    mean = metrics.mean(
        evaluate(snapshots, settings, dataset.validation_images,
                 dataset.validation_labels))
    seconds = max(one.tally.seconds for one in snapshots.values())
    metrics.say('eval', step=step, **mean, seconds=seconds)


# Copied from synchronous_sequence/main.py
@torch.inference_mode()
def evaluate(snapshots, settings, images, labels, edges=False):
    """Accuracies of all MACHs, in percent; NaN for a MACH without networks.

    `synthetic`: the inputs of the MACH are its student's output. `real`: they
    are its children's answers, with real inputs of their own up to `depth`. A
    child without networks is replaced by its synthetic input.

    Args:
        snapshots: index -> Snapshot.
        images: uint8 [N, 784]; labels: [N].
        edges: whether to find what each edge is worth.
    Returns:
        A list of dict(mach, synthetic, real, worth), in order. worth: child ->
        points of `real` that the MACH loses if zeros replace its answer.
    """
    there, found = {i: one for i, one in snapshots.items() if one.network}, {}
    ways = []  # edges between MACHs that are there
    for i, children in enumerate(children_of(settings)):
        start = 0.0 if i in there else math.nan
        found[i] = dict(mach=i, synthetic=start, real=start, worth={})
        for position, child in enumerate(children):
            both = i in there and child in there
            ways += [(i, position, child)] if both else []
            if edges:
                found[i]['worth'][child] = 0.0 if both else math.nan
    for chunk, y in zip(images.split(1000), labels.split(1000)):
        x = data.normalise(chunk.to(settings.device))  # [B, 784]

        def points(one, d, y=y):  # d [B, E]
            right = one.network.head(d).argmax(1).cpu() == y
            return 100 * right.sum().item() / len(labels)

        inputs = {i: one.student and one.student(x) for i, one in there.items()}
        h = {i: one.network.local_part(x) for i, one in there.items()}
        answers, scores = {}, {}  # MACH -> [B, E]; MACH -> points
        for depth in range(settings.depth + 1):
            for i, position, child in ways if answers else ():
                inputs[i][:, position] = answers[child]  # of [B, C, E]
            d = {i: there[i].network.join(h[i], inputs[i]) for i in there}
            answers = {i: there[i].network.answer(d[i]) for i in there}
            for i, one in there.items():
                scores[i] = points(one, d[i])
                found[i]['synthetic'] += scores[i] * (depth == 0)
                found[i]['real'] += scores[i] * (depth == settings.depth)
        for i, position, child in ways if edges else ():
            one, without = there[i], inputs[i].clone()
            without[:, position] = 0
            found[i]['worth'][child] += scores[i] - points(
                one, one.network.join(h[i], without))
    return list(found.values())


# -------------------------------------------------------------------- summary


def main(words):
    """Runs the experiment and prints its log; returns the exit status."""
    settings = read_hyperparameters(words)
    with contextlib.ExitStack() as stack:
        try:
            dataset = data.load(settings.data, settings.validation)
            node = processes.Node(settings, dataset.name)
            trainers = make_trainers(settings, dataset)
            shards = [one.batches.classes for one in trainers]
            trainers = node.adopt(trainers)
            checkpoint.begin(trainers, settings, stack, node.restarted)
            checkpoint.prepare(settings.log_folder)
            boards = [] if node.rank else metrics.boards(EXPERIMENT, settings)
            stack.enter_context(metrics.catch_signals(node.interrupt))
            metrics.OUTPUTS[:] = node.open() + boards
            if not node.restarted:  # else the log has these lines
                metrics.say_run(EXPERIMENT, dataset, settings, shards, CORES,
                                node.size)
            if settings.dry_run or metrics.FAILED:
                return int(bool(metrics.FAILED))
            node.begin()
        except (data.DataError, OSError) as error:
            metrics.warn(f'{EXPERIMENT}: {error}')
            return 2
        snapshots = train(trainers, settings, dataset, node)
        if metrics.OUTPUTS:
            found = evaluate(snapshots, settings, dataset.test_images,
                             dataset.test_labels, settings.edges and
                             not node.signal)
            metrics.say_finals(EXPERIMENT, dataset, settings, found, snapshots)
        node.leave()
    if node.signal:
        return 128 + node.signal
    failed = any(one.network is None for one in snapshots.values())
    return int(failed or bool(metrics.FAILED))


if __name__ == '__main__':
    processes.supervise()
    # After a fork the thread that first needs torch's pool makes it anew. A
    # second thread at that time fails: "Invalid thread pool!"
    torch.set_num_threads(1)
    try:
        status = main(sys.argv[1:])
    except Exception:  # pylint: disable=broad-except
        metrics.warn(traceback.format_exc())
        status = 1
    if status or threading.active_count() > 1:
        metrics.leave(status)
