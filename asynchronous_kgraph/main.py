"""k MACHs, all neighbours of all others, each on its own thread and data.

The flagship: synthetic inputs and delayed gradients throughout. A MACH sees the
labels of its own fifth of MNIST only; what it knows of the rest it has from the
Grads of the others. Differs from asynchronous_sequence: the children of a MACH
are all others, so Spikes and Grads go round in cycles, cut off by `depth`.

    python asynchronous_kgraph/main.py
    torchrun --nproc-per-node 5 asynchronous_kgraph/main.py

Expect, mean of 5 MACHs, real 98.59 ± 0.03, synthetic 98.09 ± 0.02 (mean and
deviation over 3 seeds; isolated 97.42) in 113 s of training on two cores, fp32.
"""

import os
import signal

# Ctrl-C during the imports, which take seconds: an exception could be swallowed.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import dataclasses
import difflib
import math
import pathlib
import queue
import random
import re
import sys
import threading
import time
import traceback

import torch
import tqdm

sys.path.insert(1, str(pathlib.Path(__file__).resolve().parent.parent))
from mach import data, metrics
import checkpoint
import link
import model
import processes
import student
import trainer

EXPERIMENT = pathlib.Path(__file__).resolve().parent.name
CORES = torch.get_num_threads()
torch.set_num_threads(1)  # a MACH is one thread, within its products too

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
    strict_data: bool = hparam(False, 'no drawn digits', 'False', 'True')
    validation: int = hparam(5000, 'images held out, for eval lines', 10, 50000)
    shards: str = hparam('disjoint', 'images of a MACH', 'disjoint', 'full')
    # Run.
    seed: int = hparam(0, 'of weights, shards, shuffles', 0, 10**9)
    steps: int = hparam(3000, 'training steps of each MACH', 1, 10**9)
    batch_size: int = hparam(128, 'own images in a step', 1, 60000)
    log_every: int = hparam(200, 'steps', 1, 10**9)
    evaluate_every: int = hparam(1000, 'steps, 0 for never', 0, 10**9)
    device: str = hparam('cpu', 'cpu, or cuda:N (written, never run)')
    precision: str = hparam('auto', 'auto: the faster', 'fp32', 'bf16', 'auto')
    dry_run: bool = hparam(False, 'check all, train nothing', 'False', 'True')
    checkpoint: str = hparam('', 'folder that keeps MACHs; none if empty')
    checkpoint_every: int = hparam(500, 'steps from one to the next', 1, 10**9)
    resume: bool = hparam(False, 'go on from `checkpoint`', 'False', 'True')
    # Graph and messages.
    k: int = hparam(5, 'MACHs; 1 is central, one on all the data', 1, 1000)
    connected: bool = hparam(True, 'or isolated', 'False', 'True')
    neighbours: int = hparam(0, 'children of a MACH, 0 for all', 0, 999)
    depth: int = hparam(1, 'edges that Spikes and Grads travel', 0, 100)
    inputs: str = hparam('synthetic', 'in training', 'synthetic', 'real')
    deadline: float = hparam(1.0, 'seconds, for answers waited for', 0.001, 1e6)
    mailbox: int = hparam(1024, 'messages; full, the oldest goes', 1, 10**6)
    share: float = hparam(0.25, 'of own rows sent: largest Grads', 0.001, 1)
    grad_weight: float = hparam(0.5, 'of a Grad, in own gradients', 0, 1e6)
    recent: int = hparam(32, 'messages of a kind kept of each other', 1, 10**6)
    # Processes: as many as torchrun starts.
    hosts: str = hparam('', 'a,b: of equally many processes; empty: this one')
    patience: float = hparam(30.0, 'seconds, for others to begin', 0, 1e6)
    wire_precision: str = hparam('bf16', 'of embeddings, Grads', 'fp32', 'bf16')
    log_folder: str = hparam('', "folder for each process's log; empty: none")
    # Conditions: what links and MACHs are made to suffer.
    latency: float = hparam(0.0, 'seconds on an edge, each way', 0, 1e6)
    jitter: float = hparam(0.0, 'seconds more at most, at random', 0, 1e6)
    loss_rate: float = hparam(0.0, 'of messages, lost', 0, 1)
    slow_mach: int = hparam(-1, 'the MACH that is slow, -1 for none', -1, 999)
    slow_factor: float = hparam(10.0, 'times longer, its steps', 1, 1e6)
    # Networks.
    embedding: int = hparam(64, 'units that a MACH answers with', 1, 16384)
    hidden: int = hparam(512, 'units, then half as many', 2, 16384)
    student_hidden: int = hparam(128, 'units in each of two layers', 1, 16384)
    # Optimisation: AdamW, one learning-rate cycle over the run.
    learning_rate: float = hparam(0.003, 'peak', 0, 1e6)
    student_learning_rate: float = hparam(0.001, 'peak', 0, 1e6)
    warmup: float = hparam(0.1, 'share of steps to the peak', 0, 0.999)
    weight_decay: float = hparam(0.05, 'not of the student', 0, 1e6)
    label_smoothing: float = hparam(0.1, 'regularises', 0, 0.999)
    dropout: float = hparam(0.3, 'of h, to lean on children', 0, 0.999)

    def __post_init__(self):
        if self.resume and not self.checkpoint:
            raise ValueError('--resume needs the folder --checkpoint')
        if max(self.neighbours, self.slow_mach) >= self.k:
            raise ValueError('--neighbours and --slow_mach must be below --k')


# Copied from synchronous_single/main.py
def reader(field):
    """What reads one hyperparameter's text; argparse adds its name to errors."""
    kind, limits = field.type, field.metadata['limits']
    number = kind in (int, float)

    def read(text):
        text = text.strip()
        with contextlib.suppress(ValueError):
            value = kind(text) if number else text
            if not limits or (limits[0] <= value <= limits[1]
                              if number else value in limits):
                return text == 'True' if kind is bool else value
        wanted = (' to ' if number else ' or ').join(map(str, limits))
        raise argparse.ArgumentTypeError(
            f'must be {kind.__name__}, {wanted}, not {text!r}')

    return read


# Copied from synchronous_single/main.py
def read_hyperparameters(words):
    """The defaults above with what `words` override: ['--k', '3', '--depth=0'].

    Bad input ends the run with one line and exit status 2.
    """
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda message: parser.exit(2, f'{EXPERIMENT}: {message}\n')
    for field in dataclasses.fields(Hyperparameters):
        limits, default = field.metadata['limits'], field.default
        names = f'--{field.name}', f'--{field.name.replace("_", "-")}'
        parser.add_argument(
            *dict.fromkeys(names),
            dest=field.name,
            type=reader(field),
            default=str(default),  # as text, so that an edit is checked too
            metavar=field.type.__name__,
            help=f'{field.metadata["reason"]} {limits}; default {default}')
    # A space keeps argparse from taking a number such as -1e-3 for an option.
    words = [f' {w}' if re.match(r'-[\d.]', w) else w for w in words]
    values, unknown = parser.parse_known_args(words)
    if unknown:
        near, = difflib.get_close_matches(unknown[0], vars(values), 1, 0)
        parser.error(f'unknown: {unknown[0]}; the closest is --{near}')
    devices = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
    if values.device not in devices:
        parser.error(f'--device must be {" or ".join(devices)}')
    try:
        return Hyperparameters(**vars(values))
    except ValueError as error:
        parser.error(str(error))


# ---------------------------------------------------------------------- MACHs


# Copied from synchronous_kgraph/main.py
def children_of(settings):
    """For each MACH the list of those that feed it: all others, or a few.

    A few are those at some distances round a ring, drawn by the seed and the
    same for all, so that everybody has as many parents as children.
    """
    k, count = settings.k, settings.neighbours or settings.k - 1
    distances = random.Random(settings.seed).sample(range(1, k), count)
    if not settings.connected:
        distances = []
    return [sorted((i + d) % k for d in distances) for i in range(k)]


# Copied from synchronous_sequence/main.py
def make_networks(settings):
    """Of each MACH its children, its network and its student (None without)."""
    torch.manual_seed(settings.seed)
    made = []
    for own in children_of(settings):
        with torch.device(settings.device):
            mach = model.Mach(len(own), settings.hidden, settings.embedding)
            learner = student.Student(len(own), settings.student_hidden,
                                      settings.embedding) if own else None
        if made:  # all heads start alike: a direction means the same class
            mach.head.load_state_dict(made[0][1].head.state_dict())
        made.append((own, mach, learner))
    return made


# Copied from asynchronous_sequence/main.py
def make_trainers(settings, dataset):
    """One trainer for each MACH, and links between those that exchange.

    Raises:
        data.DataError: the shards or the batch size cannot be.
    """
    batches = data.deal(dataset, settings.k, settings.shards,
                        settings.batch_size, settings.seed, settings.device)
    trainers = [
        trainer.Trainer(i, mach, learner, own, batches[i], settings)
        for i, (own, mach, learner) in enumerate(make_networks(settings))
    ]
    for one in trainers:
        for child in one.children:
            for i, j in ((one.index, child), (child, one.index)):
                trainers[i].links[j] = link.Link(trainers[j].mailbox,
                                                 settings.latency,
                                                 settings.jitter,
                                                 settings.loss_rate,
                                                 f'{settings.seed} {i} {j}')
    return trainers


# -------------------------------------------------------------------- threads


# Copied from asynchronous_sequence/main.py
class Turns:
    """Lets so many MACHs compute at once, in the order asked: tickets.

    Nobody waits for a message here, only for a core, as any thread does. Left
    to the scheduler, all fight for Python's one lock in the midst of a step.
    """

    def __init__(self, count):
        self._drawn, self._called, self._skipped = 0, count, False
        self._change = threading.Condition()

    def __enter__(self):
        with self._change:
            ticket, self._drawn = self._drawn, self._drawn + 1
            # Who has waited 10 s goes on without: a step may take longer.
            self._skipped |= not self._change.wait_for(
                lambda: ticket < self._called, 10)

    def __exit__(self, *_):
        with self._change:
            self._called += 1
            # They wait in the order of their tickets, until one is skipped.
            self._change.notify(self._drawn if self._skipped else 1)


TURNS = Turns(CORES + 1)  # one more, for while another waits for Python's lock


# Copied from asynchronous_sequence/main.py
def work(mach, settings, events, halt):
    """A MACH's thread: it steps, then serves and teaches until `halt` is set.

    Events to the main thread are (kind, content): 'step' with lists of fields;
    'copy' and, at the end, 'ended' with what `copy()` gives, made here as no
    other thread touches a MACH; 'failed' with its last counts and the reason.

    Args:
        mach: its trainer.
    """
    turn = TURNS
    if settings.inputs == 'real':  # who waits in a step must not hold a turn
        turn = contextlib.nullcontext()
    autocast = torch.autocast(settings.device.split(':')[0],
                              torch.bfloat16,
                              settings.precision == 'bf16',
                              cache_enabled=False)  # weights change each step
    every = settings.evaluate_every or settings.steps
    mach.tally.begin()
    try:
        with autocast:
            if mach.steps_taken:  # resumed; who has finished takes no step more
                events.put(('copy', mach.copy()))
            while mach.steps_taken < settings.steps and not halt.is_set():
                began = time.perf_counter()
                with turn:
                    mach.step(halt.is_set)
                if mach.index == settings.slow_mach:
                    spent = time.perf_counter() - began
                    halt.wait(spent * (settings.slow_factor - 1))
                if mach.steps_taken % settings.log_every == 0:
                    events.put(('step', [mach.tally.report()]))
                if (mach.steps_taken % every == 0 or
                        mach.steps_taken == settings.steps):
                    events.put(('copy', mach.copy()))
                if (mach.steps_taken % settings.checkpoint_every == 0 or
                        mach.steps_taken == settings.steps):
                    checkpoint.save(mach, settings.checkpoint)
            while not halt.is_set():
                mach.serve(0.05)
            mach.serve(0)
        checkpoint.save(mach, settings.checkpoint)  # its student has learnt on
        events.put(('ended', mach.copy()))
    except Exception:  # pylint: disable=broad-except
        reason = (f'mach {mach.index} failed in step {mach.steps_taken + 1}: '
                  f'{traceback.format_exc()}')
        events.put(('failed', (mach.copy(networks=False), reason)))


# Copied from asynchronous_sequence/main.py
def train(trainers, settings, dataset, node):
    """Runs the threads and prints what all MACHs tell, until all have ended.

    Nobody rests for an evaluation: whenever the slowest MACH has handed over a
    copy, the main thread evaluates all the last ones, while they train on. A
    MACH whose process is gone is not waited for, until it is back.

    Args:
        trainers: one for each thread.
        node: this process; once it has a signal, each thread ends after its
            step.
    Returns:
        A Copy of each MACH, without networks if it failed, is gone or,
        interrupted, is too late to give some; and the set of the former two.
    """
    halt = threading.Event()
    threads = [
        threading.Thread(target=work,
                         args=(one, settings, node, halt),
                         daemon=True) for one in trainers
    ]
    copies = {i: trainer.Copy(metrics.Tally(i)) for i in range(settings.k)}
    node.begin()
    for thread in threads:
        thread.start()
    failed, ended, there, slowest, deadline = set(), set(), None, 0, math.inf
    bar = tqdm.tqdm(total=settings.steps * len(trainers),
                    disable=node.rank > 0 or None)
    while (there != ended or
           not node.events.empty()) and time.monotonic() < deadline:
        bar.update(sum(one.steps_taken for one in trainers) - bar.n)
        if node.signal or slowest == settings.steps:
            halt.set()
            patience = 2 if node.signal else 60  # seconds
            deadline = min(deadline, time.monotonic() + patience)
        try:
            kind, content = node.events.get(timeout=0.1)
        except queue.Empty:
            kind, content = '', {}
        if kind == 'step':
            for fields in content:
                metrics.say('step', **fields)
            continue
        if kind == 'failed':
            content, reason = content
            failed |= set(content)
            if reason:  # else another process says it
                print(f'{EXPERIMENT}: {reason.rstrip()}', file=sys.stderr)
        copies |= content
        ended |= set(content) if kind == 'ended' else set()
        there = {i for i in copies if i in ended or node.hears(i)} - failed
        before, slowest = slowest, max(
            min([copies[i].tally.steps for i in there] or [0]), slowest)
        if (slowest > before and settings.evaluate_every and metrics.OUTPUTS and
                not node.signal):
            mean = metrics.mean(
                evaluate(copies, settings, dataset.validation_images,
                         dataset.validation_labels))
            seconds = max(copy.tally.seconds for copy in copies.values())
            metrics.say('eval', step=slowest, **mean, seconds=seconds)
    halt.set()
    for thread in threads:
        thread.join(0.1)
    bar.close()
    for i in set(copies) - there - failed:  # gone: its last counts alone
        copies[i] = node.heard.get(i, trainer.Copy(metrics.Tally(i)))
    return copies, set(copies) - there


# ----------------------------------------------------------------- evaluation


# Copied from synchronous_sequence/main.py
@torch.no_grad()
def evaluate(copies, settings, images, labels):
    """Accuracies of all MACHs, in percent; NaN where there are no networks.

    `synthetic`: it answers alone, on its student's inputs. `real`: its children
    answer, and theirs, to the experiment's depth; where a child has no networks,
    the synthetic input stays.

    Args:
        copies: MACH -> Copy.
        images: uint8 [N, 784]; labels: [N].
    Returns:
        A list of dict(mach, synthetic, real), in order.
    """
    children, found = children_of(settings), {}
    there = {i: copy for i, copy in copies.items() if copy.mach}
    for i in sorted(copies):
        start = 0.0 if i in there else math.nan
        found[i] = dict(mach=i, synthetic=start, real=start)
    for chunk, y in zip(images.split(1000), labels.split(1000)):
        x = data.normalise(chunk.to(settings.device))  # [B, 784]
        local = {i: copy.mach.local_part(x) for i, copy in there.items()}
        inputs = {i: c.student and c.student(x) for i, c in there.items()}
        for depth in range(settings.depth + 1):
            d = {}  # MACH -> [B, E]
            for i, copy in there.items():
                d[i] = torch.relu(local[i] + copy.mach.joined_part(inputs[i]))
                right = (copy.mach.head(d[i]).cpu().argmax(1) == y).sum().item()
                right *= 100 / len(labels)
                found[i]['synthetic'] += right * (depth == 0)
                found[i]['real'] += right * (depth == settings.depth)
            for i in there:
                for position, child in enumerate(children[i]):
                    if child in there:  # inputs [B, C, E]
                        inputs[i][:, position] = d[child]
    return list(found.values())


# -------------------------------------------------------------------- summary


# Copied from asynchronous_sequence/main.py
def main(words):
    """Runs the experiment and prints its log; returns the exit status."""
    settings = read_hyperparameters(words)
    try:
        dataset = data.load(settings.data, settings.validation,
                            settings.strict_data)
        node = processes.Node(settings, dataset.name)
        trainers = node.adopt(make_trainers(settings, dataset))
        settings.precision = metrics.choose_precision(settings.precision,
                                                      settings.device)
        if settings.checkpoint:
            pathlib.Path(settings.checkpoint).mkdir(parents=True, exist_ok=True)
            settings.resume |= node.restarted
        for one in trainers if settings.resume else ():
            checkpoint.resume(one, settings.checkpoint)
        for number in signal.SIGINT, signal.SIGTERM:  # from here on there are
            signal.signal(number, node.interrupt)  # results to save
        metrics.OUTPUTS[:] = node.open()
    except (data.DataError, OSError) as error:
        print(f'{EXPERIMENT}: {error}', file=sys.stderr)
        return 2
    if not node.restarted:  # else these lines are there
        metrics.say_run(EXPERIMENT, dataset, settings)
    if settings.dry_run:
        return 0
    copies, failed = train(trainers, settings, dataset, node)
    torch.set_num_threads(CORES)
    if metrics.OUTPUTS:
        metrics.say_finals(EXPERIMENT, dataset, settings, [
            found | copies[found['mach']].tally.totals() for found in evaluate(
                copies, settings, dataset.test_images, dataset.test_labels)
        ])
    node.leave()
    return 128 + node.signal if node.signal else int(bool(failed))


if __name__ == '__main__':
    processes.supervise()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    except OSError as error:  # stdout is closed or full
        print(f'{EXPERIMENT}: {error}', file=sys.stderr)
        status = 1
    os._exit(status)  # not held up by a thread in the midst of a step
