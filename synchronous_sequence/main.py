"""k MACHs in a row, in lockstep: synthetic inputs and late Grads, controlled.

Each MACH but the first has a student that mimics the MACH before it. The
student's output feeds the MACH beside x. Each MACH has its own target loss. The
MACH before it applies its Grad `delay` steps later and passes a Grad on.
Differs from synchronous_single: several MACHs, with edges between them.

    python synchronous_sequence/main.py

Expect, mean of 3 MACHs, real 98.61 ± 0.03, synthetic 98.50 ± 0.01 (mean and
deviation over 3 seeds) in 44 s on two cores, bf16. Same seed, same log.
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
    shards: str = hparam('full', 'images of a MACH', 'disjoint', 'skewed',
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
    depth: int = hparam(2, 'edges a Spike or Grad may travel', 0, 100)
    delay: int = hparam(1, 'steps a Grad is late; 0: no delay', 0, 10000)
    inputs: str = hparam('synthetic', 'of training steps', 'synthetic', 'real')
    grad_weight: float = hparam(1.0, 'factor on Grads of own rows', 0, 1e6)
    # Networks.
    embedding: int = hparam(64, 'units of an embedding', 1, 16384)
    hidden: int = hparam(512, 'units of layer 1; layer 2: half', 2, 16384)
    student_hidden: int = hparam(256, 'units of its two layers', 1, 16384)
    # Optimisation: AdamW, one learning-rate cycle over the run.
    learning_rate: float = hparam(0.002, 'peak, of the network', 0, 1e6)
    student_learning_rate: float = hparam(0.002, 'peak', 0, 1e6)
    warmup: float = hparam(0.1, 'share of steps up to the peak', 0, 0.999)
    weight_decay: float = hparam(0.05, 'of the network', 0, 1e6)
    prior: float = hparam(0.4, 'factor of log class frequencies', 0, 10)
    label_smoothing: float = hparam(0.1, 'of the target loss', 0, 0.999)
    dropout: float = hparam(0.0, 'of h, so that inputs matter', 0, 0.999)

    # Copied from synchronous_single/main.py
    def __post_init__(self):
        for field in dataclasses.fields(self):
            setattr(self, field.name, read(field, getattr(self, field.name)))
        if not self.resume:  # else the checkpoint decides
            self.precision = metrics.choose_precision(self.precision,
                                                      self.device)
        if self.resume and not self.checkpoint:
            raise ValueError('--resume needs the folder --checkpoint')


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
from model import Mach
from student import Student
from trainer import Trainer

CORES = torch.get_num_threads()
torch.set_num_threads(1)  # a product on one: no result depends on CORES

# ---------------------------------------------------------------------- MACHs


def children_of(settings):
    """For each MACH the list of its children: the MACH before it."""
    if not settings.connected:
        return [[] for _ in range(settings.k)]
    return [[i - 1] if i > 0 else [] for i in range(settings.k)]


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


def make_trainer(settings, dataset):
    """The Trainer of all MACHs in lockstep.

    Raises:
        data.DataError: the shards or the batch size cannot be.
    """
    batches = data.deal(dataset, settings.k, settings.shards,
                        settings.batch_size, settings.seed, settings.device,
                        settings.skew)
    if settings.shards == 'full':  # in lockstep one batch serves all
        batches = batches[:1]
    children, networks, students = zip(*make_networks(settings))
    return Trainer(networks, students, children, batches, settings, CORES)


# -------------------------------------------------------------------- threads


# Copied from synchronous_single/main.py
def work(trainer, settings, events, halt):
    """The training thread: it steps until `halt` is set.

    An event for the main thread is a list of fields of `step` lines and a dict
    of Snapshots. They are made between steps: no other thread touches a MACH.
    """
    every = settings.evaluate_every or settings.steps
    for tally in trainer.tallies:
        tally.begin()
    try:
        if trainer.steps_taken:  # resumed
            events.put(([], trainer.snapshot()))
        while trainer.steps_taken < settings.steps and not halt.is_set():
            trainer.step()
            if trainer.steps_taken % settings.log_every == 0:
                lines = [tally.report() for tally in trainer.tallies]
                events.put((lines, {}))
            if trainer.steps_taken % every == 0:
                events.put(([], trainer.snapshot()))
            if trainer.steps_taken % settings.checkpoint_every == 0:
                checkpoint.save(trainer, settings.checkpoint)
        checkpoint.save(trainer, settings.checkpoint)
        events.put(([], trainer.snapshot(ended=True)))
    except BaseException:  # pylint: disable=broad-except
        metrics.warn(
            f'{EXPERIMENT}: training failed in step '
            f'{trainer.steps_taken + 1}: {traceback.format_exc().rstrip()}')
        events.put(([], trainer.snapshot(False, ended=True, failed=True)))


# Copied from synchronous_single/main.py
def train(trainer, settings, dataset, signals):
    """Runs the thread and prints what it reports, until it has ended.

    Training does not pause for an evaluation: the main thread evaluates each
    Snapshot beside it.

    Args:
        signals: numbers of signals that came; the thread ends after its step.
    Returns:
        index -> the last Snapshot of each MACH. It has no networks if training
        failed, or was interrupted before there were any.
    """
    # Bounded: if evaluations fall far behind, training waits for them.
    events, halt = queue.Queue(4), threading.Event()
    thread = threading.Thread(target=work,
                              args=(trainer, settings, events, halt),
                              daemon=True)
    snapshots, evaluated, deadline = trainer.snapshot(False), 0, math.inf
    if not metrics.start(thread, f'{EXPERIMENT}: training'):
        return trainer.snapshot(False, ended=True, failed=True)
    bar = metrics.tqdm.tqdm(total=settings.steps, disable=None)
    while not snapshots[0].ended and time.monotonic() < deadline:
        bar.update(trainer.steps_taken - bar.n)
        if (signals or metrics.FAILED) and not halt.is_set():
            halt.set()
            deadline = time.monotonic() + 2  # seconds: a step may last longer
        try:
            lines, news = events.get(timeout=0.1)
        except queue.Empty:
            continue
        for fields in lines:
            metrics.say('step', **fields)
        snapshots |= news
        before, evaluated = evaluated, snapshots[0].tally.steps
        if before < evaluated and settings.evaluate_every and not signals:
            say_eval(evaluated, snapshots, settings, dataset)
    bar.close()
    thread.join(0.1)
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
    settings, signals = read_hyperparameters(words), []
    with contextlib.ExitStack() as stack:
        try:
            if os.environ.get('TORCHELASTIC_RUN_ID'):
                raise data.DataError('it is one process: run it without '
                                     'torchrun')
            dataset = data.load(settings.data, settings.validation)
            trainer = make_trainer(settings, dataset)
            checkpoint.begin([trainer], settings, stack)
            metrics.OUTPUTS[1:] = metrics.boards(EXPERIMENT, settings)
        except (data.DataError, OSError) as error:
            metrics.warn(f'{EXPERIMENT}: {error}')
            return 2
        metrics.say_run(EXPERIMENT, dataset, settings, trainer.shards, CORES)
        if settings.dry_run or metrics.FAILED:
            return int(bool(metrics.FAILED))
        # There are results to save from now on.
        stack.enter_context(metrics.catch_signals(signals.append))
        snapshots = train(trainer, settings, dataset, signals)
        found = evaluate(snapshots, settings, dataset.test_images,
                         dataset.test_labels, settings.edges and not signals)
        metrics.say_finals(EXPERIMENT, dataset, settings, found, snapshots)
    if signals:
        return 128 + signals[0]
    failed = any(one.failed for one in snapshots.values())
    return int(failed or bool(metrics.FAILED))


if __name__ == '__main__':
    try:
        status = main(sys.argv[1:])
    except Exception:  # pylint: disable=broad-except
        metrics.warn(traceback.format_exc())
        status = 1
    if status:  # else all threads have ended
        metrics.leave(status)
