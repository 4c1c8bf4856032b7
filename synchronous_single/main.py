"""One MACH and its student: the two ideas at their smallest.

A teacher (the MACH) learns MNIST by its target loss, from its own gradient
applied `delay` steps late. A student learns to mimic the teacher's embedding.
Both answer through the same target head: `real` is the teacher's test accuracy,
`synthetic` the student's. One step of delay costs nothing, and a student comes
within half a point of what it mimics.

    python synchronous_single/main.py

Expect real 98.63 ± 0.05, synthetic 98.34 ± 0.04 (mean and deviation over 3
seeds) in 50 s of training on two cores, fp32. Same seed, same log.
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
import model
import student
import trainer

EXPERIMENT = pathlib.Path(__file__).resolve().parent.name
CORES = torch.get_num_threads()
torch.set_num_threads(1)  # the training thread is to have them all

# ------------------------------------------------------------ hyperparameters


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
    # Run.
    seed: int = hparam(0, 'of weights, shards, shuffles', 0, 10**9)
    steps: int = hparam(5000, 'training steps', 1, 10**9)
    batch_size: int = hparam(128, 'own images in a step', 1, 60000)
    log_every: int = hparam(200, 'steps', 1, 10**9)
    evaluate_every: int = hparam(1000, 'steps, 0 for never', 0, 10**9)
    device: str = hparam('cpu', 'cpu, or cuda:N (written, never run)')
    precision: str = hparam('auto', 'auto: the faster', 'fp32', 'bf16', 'auto')
    dry_run: bool = hparam(False, 'check all, train nothing', 'False', 'True')
    checkpoint: str = hparam('', 'folder that keeps MACHs; none if empty')
    checkpoint_every: int = hparam(500, 'steps from one to the next', 1, 10**9)
    resume: bool = hparam(False, 'go on from `checkpoint`', 'False', 'True')
    # Messages.
    delay: int = hparam(1, 'steps a Grad is late; 0 is backprop', 0, 10000)
    # Networks.
    embedding: int = hparam(64, 'units that a MACH answers with', 1, 16384)
    hidden: int = hparam(512, 'units, then half as many', 2, 16384)
    student_hidden: int = hparam(512, 'units in each of two layers', 1, 16384)
    # Optimisation: AdamW, one learning-rate cycle over the run.
    learning_rate: float = hparam(0.001, 'peak', 0, 1e6)
    student_learning_rate: float = hparam(0.001, 'peak', 0, 1e6)
    warmup: float = hparam(0.1, 'share of steps to the peak', 0, 0.999)
    weight_decay: float = hparam(0.05, 'not of the student', 0, 1e6)
    label_smoothing: float = hparam(0.1, 'regularises', 0, 0.999)

    def __post_init__(self):
        if self.resume and not self.checkpoint:
            raise ValueError('--resume needs the folder --checkpoint')


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


def make_trainers(settings, dataset):
    """One trainer: of a MACH without children, and of a student of that MACH.

    Raises:
        data.DataError: the batch size cannot be.
    """
    batches, = data.deal(dataset, 1, 'full', settings.batch_size, settings.seed,
                         settings.device)
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        teacher = model.Mach(0, settings.hidden, settings.embedding)
        learner = student.Student(1, settings.student_hidden,
                                  settings.embedding)
    return [trainer.Trainer(teacher, learner, batches, settings)]


# -------------------------------------------------------------------- threads


def work(one, settings, events, halt):
    """The training thread: it steps until `halt` is set.

    Events to the main thread are (kind, content): 'step' with lists of fields;
    'copy' and, at the end, 'ended' with what `copy()` gives, made here as no
    other thread touches a MACH; 'failed' with its last counts and the reason.

    Args:
        one: the trainer of all MACHs.
    """
    torch.set_num_threads(CORES)
    autocast = torch.autocast(settings.device.split(':')[0],
                              torch.bfloat16,
                              settings.precision == 'bf16',
                              cache_enabled=False)  # weights change each step
    every = settings.evaluate_every or settings.steps
    for tally in one.tallies:
        tally.begin()
    try:
        with autocast:
            if one.steps_taken:  # resumed; who has finished takes no step more
                events.put(('copy', one.copy()))
            while one.steps_taken < settings.steps and not halt.is_set():
                one.step()
                if one.steps_taken % settings.log_every == 0:
                    lines = [tally.report() for tally in one.tallies]
                    events.put(('step', lines))
                if (one.steps_taken % every == 0 or
                        one.steps_taken == settings.steps):
                    events.put(('copy', one.copy()))
                if (one.steps_taken % settings.checkpoint_every == 0 or
                        one.steps_taken == settings.steps):
                    checkpoint.save(one, settings.checkpoint)
        if one.steps_taken < settings.steps:
            checkpoint.save(one, settings.checkpoint)
        events.put(('ended', one.copy()))
    except Exception:  # pylint: disable=broad-except
        reason = (f'training failed in step {one.steps_taken + 1}: '
                  f'{traceback.format_exc()}')
        events.put(('failed', (one.copy(networks=False), reason)))


def train(trainers, settings, dataset, interrupted):
    """Runs the threads and prints what they tell, until all have ended.

    Nobody rests for an evaluation: whenever the slowest MACH has handed over a
    copy, the main thread evaluates all the last ones, while they train on.

    Args:
        trainers: one for each thread.
        interrupted: an event; once it is set, each thread ends after its step.
    Returns:
        A Copy of each MACH, without networks if it failed or, interrupted, is
        too late to give some; and the set of those that failed.
    """
    # Bounded, as memory is: evaluations that fall far behind hold training up.
    events, halt = queue.Queue(4 * len(trainers)), threading.Event()
    threads = [
        threading.Thread(target=work,
                         args=(one, settings, events, halt),
                         daemon=True) for one in trainers
    ]
    copies = {}  # MACH -> its last Copy
    for one in trainers:
        copies |= one.copy(networks=False)
    for thread in threads:
        thread.start()
    failed, ended, slowest, deadline = set(), 0, 0, math.inf
    bar = tqdm.tqdm(total=settings.steps * len(trainers), disable=None)
    while ended < len(trainers) and time.monotonic() < deadline:
        bar.update(sum(one.steps_taken for one in trainers) - bar.n)
        if interrupted.is_set() or slowest == settings.steps:
            halt.set()
            patience = 2 if interrupted.is_set() else 60  # seconds
            deadline = min(deadline, time.monotonic() + patience)
        try:
            kind, content = events.get(timeout=0.1)
        except queue.Empty:
            continue
        if kind == 'step':
            for fields in content:
                metrics.say('step', **fields)
            continue
        ended += kind != 'copy'
        if kind == 'failed':
            content, reason = content
            failed |= set(content)
            print(f'{EXPERIMENT}: {reason.rstrip()}', file=sys.stderr)
        copies |= content
        before, slowest = slowest, min(
            [copies[i].tally.steps for i in copies if i not in failed] or
            [slowest])
        if (kind != 'ended' and slowest > before and settings.evaluate_every and
                not interrupted.is_set()):
            mean = metrics.mean(
                evaluate(copies, settings, dataset.validation_images,
                         dataset.validation_labels))
            seconds = max(copy.tally.seconds for copy in copies.values())
            metrics.say('eval', step=slowest, **mean, seconds=seconds)
    halt.set()
    for thread in threads:
        thread.join(0.1)
    bar.close()
    return copies, failed


# ----------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(copies, settings, images, labels):
    """Accuracies in percent: the teacher's is `real`, its student's `synthetic`.

    Args:
        copies: 0 -> Copy.
        images: uint8 [N, 784]; labels: [N].
    Returns:
        A list of one dict(mach, synthetic, real); NaN without networks.
    """
    _, mach, learner = copies[0]
    if not mach:
        return [dict(mach=0, synthetic=math.nan, real=math.nan)]
    found = dict(mach=0, synthetic=0.0, real=0.0)
    for chunk, y in zip(images.split(1000), labels.split(1000)):
        x = data.normalise(chunk.to(settings.device))  # [B, 784]
        for name, d in (('synthetic', learner(x)[:, 0]), ('real', mach(x))):
            right = (mach.head(d).cpu().argmax(1) == y).sum().item()
            found[name] += right * 100 / len(labels)
    return [found]


# -------------------------------------------------------------------- summary


def main(words):
    """Runs the experiment and prints its log; returns the exit status."""
    settings = read_hyperparameters(words)
    try:
        dataset = data.load(settings.data, settings.validation,
                            settings.strict_data)
        trainers = make_trainers(settings, dataset)
        settings.precision = metrics.choose_precision(settings.precision,
                                                      settings.device)
        if settings.checkpoint:
            pathlib.Path(settings.checkpoint).mkdir(parents=True, exist_ok=True)
        for one in trainers if settings.resume else ():
            checkpoint.resume(one, settings.checkpoint)
    except (data.DataError, OSError) as error:
        print(f'{EXPERIMENT}: {error}', file=sys.stderr)
        return 2
    metrics.say_run(EXPERIMENT, dataset, settings)
    if settings.dry_run:
        return 0
    interrupted = threading.Event()  # from here on Ctrl-C has results to save
    signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    copies, failed = train(trainers, settings, dataset, interrupted)
    torch.set_num_threads(CORES)
    metrics.say_finals(EXPERIMENT, dataset, settings, [
        found | copies[found['mach']].tally.totals() for found in evaluate(
            copies, settings, dataset.test_images, dataset.test_labels)
    ])
    return 130 if interrupted.is_set() else int(bool(failed))


if __name__ == '__main__':
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    except OSError as error:  # stdout is closed or full
        print(f'{EXPERIMENT}: {error}', file=sys.stderr)
        status = 1
    os._exit(status)  # not held up by a thread in the midst of a step
