"""k MACHs, all neighbours of all others, each on its own thread and data.

The flagship: synthetic inputs and delayed gradients throughout. A MACH sees the
labels of its own fifth of MNIST only; what it knows of the rest it has from the
Grads of the others. Differs from asynchronous_sequence: the children of a MACH
are all others, so Spikes and Grads go round in cycles, cut off by `depth`.

    python asynchronous_kgraph/main.py

Expect, mean of 5 MACHs, real 98.55 ± 0.12, synthetic 98.07 ± 0.08 (mean and
deviation over 3 seeds; isolated 97.38) in 102 s of training on two cores, fp32.
"""

import signal
import sys

# Ctrl-C during the imports, which take seconds, must not print a traceback.
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import argparse
import collections
import contextlib
import dataclasses
import difflib
import math
import operator
import pathlib
import queue
import threading
import time
import traceback

import torch
import tqdm

sys.path.insert(1, str(pathlib.Path(__file__).resolve().parent.parent))
from mach import data, metrics
import link
import model
import student
import trainer

EXPERIMENT = pathlib.Path(__file__).resolve().parent.name
CORES = torch.get_num_threads()
torch.set_num_threads(1)  # a MACH is one thread, within its products too

# ------------------------------------------------------------ hyperparameters


# Copied from synchronous_single/main.py
def hparam(default, reason, *limits):
    """A hyperparameter: default, unit or reason, and limits such as '>= 0'."""
    return dataclasses.field(default=default,
                             metadata=dict(reason=reason, limits=limits))


@dataclasses.dataclass
class Hyperparameters:
    """Edit the defaults in place, or override one for a run: --name value."""
    # Data.
    data: str = hparam('data', 'folder of the MNIST files')
    strict_data: bool = hparam(False, 'no drawn digits in its place')
    validation: int = hparam(5000, 'images held out, for eval lines', '>= 0')
    shards: str = hparam('disjoint', 'the images each MACH has',
                         'in disjoint full')
    # Run.
    seed: int = hparam(0, 'of weights, shards, shuffles', '>= 0', '< 1e9')
    steps: int = hparam(2500, 'training steps of each MACH', '>= 1')
    batch_size: int = hparam(128, 'own images in a step', '>= 1')
    log_every: int = hparam(200, 'steps', '>= 1')
    evaluate_every: int = hparam(1000, 'steps, 0 for never', '>= 0')
    device: str = hparam('cpu', 'cpu, cuda or cuda:N')
    precision: str = hparam('auto', 'auto: the faster', 'in fp32 bf16 auto')
    # Graph and messages.
    k: int = hparam(5, 'MACHs; 1 is central, one on all the data', '>= 1')
    connected: bool = hparam(True, 'False: isolated, each on its shard')
    depth: int = hparam(1, 'edges that Spikes and Grads travel', '>= 0')
    neighbours: int = hparam(0, 'children asked in a step, 0 for all', '>= 0',
                             '< k')
    inputs: str = hparam('synthetic', 'in training',
                         'in synthetic real late both')
    deadline: float = hparam(1.0, 'seconds, for answers and Grads', '> 0')
    mailbox: int = hparam(256, 'messages; when full the oldest goes', '>= 1')
    share: float = hparam(0.25, 'of own rows sent: largest Grads', '> 0',
                          '<= 1')
    grad_weight: float = hparam(4.0, 'factor on the Grads it sends', '>= 0')
    stale_after: float = hparam(2.0, 'steps; staler Grads weigh less', '> 0')
    # Conditions: what links and MACHs are made to suffer.
    latency: float = hparam(0.0, 'seconds on an edge, each way', '>= 0')
    jitter: float = hparam(0.0, 'seconds more at most, at random', '>= 0')
    loss_rate: float = hparam(0.0, 'of messages, lost', '>= 0', '<= 1')
    slow_mach: int = hparam(-1, 'the MACH that is slow, -1 for none', '>= -1',
                            '< k')
    slow_factor: float = hparam(10.0, 'times longer, its steps', '>= 1')
    # Networks.
    embedding: int = hparam(64, 'units that a MACH answers with', '>= 1')
    hidden: int = hparam(512, 'units, then half as many', '>= 2')
    student_hidden: int = hparam(128, 'units in each of two layers', '>= 1')
    # Optimisation: AdamW, one learning-rate cycle over the run.
    learning_rate: float = hparam(0.003, 'peak', '>= 0')
    student_learning_rate: float = hparam(0.003, 'peak', '>= 0')
    warmup: float = hparam(0.1, 'share of steps to the peak', '> 0', '< 1')
    weight_decay: float = hparam(0.05, 'not of the student', '>= 0')
    label_smoothing: float = hparam(0.1, 'regularises', '>= 0', '< 1')
    dropout: float = hparam(0.3, 'of h, to lean on children', '>= 0', '< 1')


# Copied from synchronous_single/main.py
def convert(field, value, others):
    """One hyperparameter's value, from text or as edited in place.

    Args:
        field: its field of Hyperparameters.
        value: to be read.
        others: has those that come before it; a limit may name one.
    Raises:
        ArgumentTypeError: the wrong type, or outside of its limits.
    """
    kind = {bool: 'True or False', int: 'a whole number', float: 'a number'}
    read = {bool: {'True': True, 'False': False}.__getitem__}
    try:  # by way of text, so that what is edited in place is as strict
        value = read.get(field.type, field.type)(str(value))
        if field.type is float and not math.isfinite(value):
            raise ValueError
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f'must be {kind[field.type]}, not {value!r}') from None
    compare = {'>=': operator.ge, '>': operator.gt}
    compare |= {'<=': operator.le, '<': operator.lt}
    for limit in field.metadata['limits']:
        sign, bound = limit.split(' ', 1)
        if sign == 'in':
            allowed = value in bound.split(' ')
        else:
            bound = getattr(others, bound, bound)
            allowed = compare[sign](value, float(bound))
            limit = f'{sign} {bound}'
        if not allowed:
            raise argparse.ArgumentTypeError(f'must be {limit}, not {value!r}')
    return value


# Copied from synchronous_single/main.py
class Parser(argparse.ArgumentParser):
    """Refuses bad input with one line and exit status 2."""

    def error(self, message):
        self.exit(2, f'{EXPERIMENT}: {message}\n')


# Copied from synchronous_single/main.py
def read_hyperparameters(words):
    """The defaults above with what the command line overrides.

    Args:
        words: such as ['--k', '3', '--weight-decay=0'].
    """
    parser = Parser(description=__doc__,
                    allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = dataclasses.fields(Hyperparameters)
    for field in fields:
        names = (f'--{field.name}', f'--{field.name.replace("_", "-")}')
        reason = ', '.join(
            (field.metadata['reason'], *field.metadata['limits']))
        parser.add_argument(*dict.fromkeys(names),
                            dest=field.name,
                            default=field.default,
                            metavar=field.type.__name__,
                            help=f'{reason}; default {field.default}')
    words = list(words)
    for i in reversed(range(len(words) - 1)):  # join, so that -1e-3 is a value
        if words[i].startswith('--') and not words[i + 1].startswith('--'):
            if '=' not in words[i]:
                words[i:i + 2] = [f'{words[i]}={words[i + 1]}']
    values, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].split('=')[0]
        near = difflib.get_close_matches(
            name.lstrip('-').replace('-', '_'), vars(values), 1, 0.5)
        hint = f'did you mean --{near[0]}?' if near else 'see --help'
        parser.error(f'there is no hyperparameter {name}; {hint}')
    for field in fields:
        try:
            value = convert(field, getattr(values, field.name), values)
        except argparse.ArgumentTypeError as error:
            parser.error(f'--{field.name} {error}')
        setattr(values, field.name, value)
    here = ['cpu'] + [f'cuda:{i}' for i in range(torch.cuda.device_count())]
    if values.device not in here + ['cuda'][:len(here) - 1]:
        parser.error(f'--device must be one of {" ".join(here)} on this '
                     f'machine, not {values.device!r}')
    return Hyperparameters(**vars(values))


# ----------------------------------------------------------------------- data


# Copied from asynchronous_sequence/main.py
def load_data(settings):
    """The dataset, and the endless batches of each MACH's local dataset.

    Raises:
        data.DataError: the folder, split, shards or batch size cannot be.
    """
    dataset = data.load(settings.data, settings.validation,
                        settings.strict_data)
    shards = data.make_shards(dataset.train_labels, settings.k, settings.shards,
                              settings.seed)
    images = data.normalise(dataset.train_images)  # once, for all MACHs
    return dataset, [
        data.Batches(images, dataset.train_labels, shard, settings.batch_size,
                     settings.seed * 1009 + i, settings.device)
        for i, shard in enumerate(shards)
    ]


# ---------------------------------------------------------------------- MACHs


# Copied from synchronous_kgraph/main.py
def children_of(settings):
    """For each MACH the list of those that feed it: all others."""
    if not settings.connected:
        return [[] for _ in range(settings.k)]
    return [[j for j in range(settings.k) if j != i] for i in range(settings.k)]


# Copied from synchronous_sequence/main.py
def make_networks(settings):
    """Of each MACH its network, and its student (None without children)."""
    torch.manual_seed(settings.seed)
    networks = []
    for children in children_of(settings):
        mach, learner = model.Mach(len(children), settings.hidden,
                                   settings.embedding), None
        if networks:  # all heads start alike: a direction means the same class
            mach.head.load_state_dict(networks[0][0].head.state_dict())
        if children:
            learner = student.Student(len(children), settings.student_hidden,
                                      settings.embedding).to(settings.device)
        networks.append((mach.to(settings.device), learner))
    return networks


# Copied from asynchronous_sequence/main.py
def make_link(settings, mailbox, edge):
    """A link to a mailbox, under the conditions of the hyperparameters.

    Args:
        settings: the hyperparameters.
        mailbox: where it ends.
        edge: (sender, receiver).
    """
    found = link.MailboxLink(mailbox)
    if settings.latency or settings.jitter or settings.loss_rate:
        found = link.LateLink(mailbox, settings.latency, settings.jitter,
                              settings.loss_rate, f'{settings.seed} {edge}')
    if settings.device != 'cpu':
        found = link.StreamLink(found)
    return found


# Copied from asynchronous_sequence/main.py
def make_trainers(settings, batches):
    """One thread for each MACH, and links between those that exchange."""
    children = children_of(settings)
    trainers = [
        trainer.Trainer(i, mach, learner, children[i], batches[i], settings)
        for i, (mach, learner) in enumerate(make_networks(settings))
    ]
    edges = {(i, j) for i, of in enumerate(children) for j in of}
    for i, j in sorted(edges | {(j, i) for i, j in edges}):
        trainers[i].connect(j, make_link(settings, trainers[j].mailbox, (i, j)))
    return {f'mach {i}': trainer for i, trainer in enumerate(trainers)}


# -------------------------------------------------------------------- threads


# Copied from asynchronous_sequence/main.py
class Turns:
    """Lets as many MACHs compute at once as there are cores, in the order asked.

    Nobody waits for a message here, only for a core, as any thread does. Left
    to the scheduler, all threads fight for Python's one lock in the midst of
    their steps (at k = 32 500 switches a step in place of 35, and 95 steps a
    second of all together in place of 165).

    Args:
        count: of steps at a time.
    """

    def __init__(self, count):
        self._free, self._queue = count, collections.deque()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def take(self, seconds=1.0):
        """Waits for its turn; who has waited so long goes on without one."""
        with self._lock:
            turn = None
            if self._free:
                self._free -= 1
            else:
                turn = threading.Event()
                self._queue.append(turn)
        taken = turn is None or turn.wait(seconds)
        if not taken:
            with self._lock:
                taken = turn.is_set()  # just now
                if not taken:
                    self._queue.remove(turn)
        try:
            yield
        finally:
            if taken:
                with self._lock:
                    if self._queue:
                        self._queue.popleft().set()
                    else:
                        self._free += 1


# One more than cores, for while another waits for Python's lock.
TURNS = Turns(CORES + 1)


# Copied from asynchronous_sequence/main.py
class Worker(threading.Thread):
    """Loops over the step of one trainer, which no other thread touches.

    Args:
        name: for messages.
        trainer: has `step`, `report`, `staleness`, `copies`, `steps_taken`.
        settings: the hyperparameters.
        events: queue to the main thread, of (kind, worker, content).
    """

    def __init__(self, name, trainer, settings, events):
        super().__init__(name=name, daemon=True)
        self.trainer, self.settings, self.events = trainer, settings, events
        self.halt = threading.Event()  # set: stop after this step
        self.rest = threading.Event()  # set: hand over a copy, rest until clear
        self.watch = metrics.Stopwatch()

    @property
    def rate(self):
        """Training steps a second so far."""
        return self.trainer.steps_taken / max(self.watch.seconds, 1e-9)

    def run(self):
        """The thread's body; whatever happens ends in an event."""
        stream = contextlib.nullcontext()
        if self.settings.device != 'cpu':  # own, so that kernels overlap
            torch.cuda.synchronize()  # what the main thread made is there
            stream = torch.cuda.stream(torch.cuda.Stream(self.settings.device))
        try:
            with stream:
                self._train()
        except FloatingPointError as error:  # a loss that is not finite
            self.events.put(('failed', self, str(error)))
        except Exception:  # pylint: disable=broad-except
            self.events.put(('failed', self, traceback.format_exc().rstrip()))

    def _train(self):
        slow = self.trainer.index == self.settings.slow_mach
        self.watch.start()
        while (self.trainer.steps_taken < self.settings.steps and
               not self.halt.is_set()):
            started = time.monotonic()
            if self.settings.inputs == 'real':  # waits for others in its step
                self.trainer.step(self.halt.is_set)
            else:
                with TURNS.take():
                    self.trainer.step(self.halt.is_set)
            if slow:
                spent = time.monotonic() - started
                extra = spent * (self.settings.slow_factor - 1)
                self.halt.wait(min(extra, threading.TIMEOUT_MAX))
            if self.trainer.steps_taken % self.settings.log_every == 0:
                lines = self.trainer.steps_taken, self.trainer.report()
                self.events.put(('step', self, lines))
            if self.rest.is_set():
                self._rest()
        self.watch.pause()
        self._hand_over('done')
        while not self.halt.is_set():  # others may still ask
            self.trainer.serve(0.02)
            if self.rest.is_set():
                self._rest()

    def _hand_over(self, kind):
        copies = self.trainer.copies()
        if self.settings.device != 'cpu':  # the reader's stream is another
            torch.cuda.current_stream().synchronize()
        self.events.put((kind, self, copies))

    def _rest(self):
        """Lets the main thread evaluate a copy while the clock stands still."""
        self.watch.pause()
        self._hand_over('copy')
        while self.rest.is_set() and not self.halt.is_set():
            self.trainer.serve(0.005)
        if self.trainer.steps_taken < self.settings.steps:
            self.watch.start()


# Copied from synchronous_single/main.py
class Run:
    """What the main thread does meanwhile: progress, log lines, evaluation.

    Args:
        settings: the hyperparameters.
        dataset: to evaluate on.
        trainers: name of each thread -> its trainer.
    """

    def __init__(self, settings, dataset, trainers):
        self.settings, self.dataset = settings, dataset
        self.events = queue.SimpleQueue()
        self.workers = [
            Worker(name, trainer, settings, self.events)
            for name, trainer in trainers.items()
        ]
        self.copies = {}  # MACH -> (MACH, student) as last handed over
        self.ended, self.failed = set(), set()  # workers
        self._waiting = set()  # workers asked for a copy
        self._next_evaluation = settings.evaluate_every or math.inf
        self._bar = tqdm.tqdm(total=settings.steps * len(trainers),
                              unit='step',
                              disable=None)

    def train(self):
        """Trains to the end; KeyboardInterrupt ends it early, with copies."""
        for worker in self.workers:
            worker.start()
        try:
            while len(self.ended) < len(self.workers):
                self._handle_event(timeout=0.1)
                if self._mean_steps() >= self._next_evaluation:
                    self._evaluate()
        finally:
            for worker in self.workers:
                worker.halt.set()
            deadline = time.monotonic() + 2
            while (len(self.ended) < len(self.workers) and
                   time.monotonic() < deadline):
                self._handle_event(timeout=0.05)
            for worker in self.workers:
                worker.join(max(0.0, deadline - time.monotonic()))
            self._bar.close()

    def _mean_steps(self):
        steps = sum(worker.trainer.steps_taken for worker in self.workers)
        self._bar.update(steps - self._bar.n)
        return steps / len(self.workers)

    def _handle_event(self, timeout):
        try:
            kind, worker, content = self.events.get(timeout=timeout)
        except queue.Empty:
            return
        if kind == 'step':
            step, report = content
            for i, fields in report.items():
                self._print('step', step, i, dict(fields, rate=worker.rate))
            return
        self._waiting.discard(worker)
        if kind == 'failed':
            self.failed.add(worker)
            for i in worker.trainer.staleness():
                self.copies.pop(i, None)
            step = worker.trainer.steps_taken + 1
            print(
                f'{EXPERIMENT}: {worker.name} failed in step {step}: '
                f'{content}',
                file=sys.stderr)
        else:
            self.copies.update(content)
        if kind != 'copy':
            self.ended.add(worker)

    def _evaluate(self):
        """Prints an eval line while the workers rest, each after its step."""
        step = self._next_evaluation
        self._next_evaluation += self.settings.evaluate_every
        if step >= self.settings.steps:
            self._next_evaluation = math.inf
        running = [w for w in self.workers if w not in self.ended]
        self._waiting = set(running)
        for worker in running:
            worker.rest.set()
        deadline = time.monotonic() + 5  # who is slower is shown as it was
        while self._waiting and time.monotonic() < deadline:
            self._handle_event(timeout=0.1)
        images, labels = self.dataset.test_images, self.dataset.test_labels
        if self.settings.validation:
            images = self.dataset.validation_images
            labels = self.dataset.validation_labels
        found = evaluate(self.copies, self.settings, images, labels)
        for worker in running:
            worker.rest.clear()
        if found:
            mean = metrics.mean_final(list(found.values()))
            mean['seconds'] = max(w.watch.seconds for w in self.workers)
            self._print('eval', step, 'mean', mean)

    def finals(self):
        """The `final` fields of each MACH there is a copy of: test accuracy."""
        found = evaluate(self.copies, self.settings, self.dataset.test_images,
                         self.dataset.test_labels)
        return [
            dict(mach=i,
                 **found[i],
                 steps=worker.trainer.steps_taken,
                 rate=worker.rate,
                 staleness=math.nan,
                 staleness_max=0,
                 dropped=0,
                 seconds=worker.watch.seconds) | counts  # new keys go last
            for worker in self.workers
            for i, counts in worker.trainer.staleness().items()
            if i in found
        ]

    def _print(self, kind, step, mach, fields):
        fields = dict(dict(step=step, mach=mach), **fields)
        self._bar.clear()
        print(metrics.format_line(kind, **fields), flush=True)


# ----------------------------------------------------------------- evaluation


# Copied from synchronous_sequence/main.py
@torch.no_grad()
def evaluate(copies, settings, images, labels):
    """Accuracies, in percent, of each MACH there is a copy of.

    `synthetic`: it answers alone, on its student's inputs. `real`: its children
    answer, and theirs, to the experiment's depth, each with the parameters of
    the copy; where there is no copy of a child, the synthetic input stays.

    Args:
        copies: MACH -> (MACH, student), handed over by their threads.
        settings: the hyperparameters.
        images: uint8 [N, 784]; labels: [N].
    """
    children = children_of(settings)
    logits = {i: {'synthetic': [], 'real': []} for i in copies}
    for chunk in images.split(1000):
        x = data.normalise(chunk.to(settings.device))  # [B, 784]
        local = {i: mach.local_part(x) for i, (mach, _) in copies.items()}
        synthetic = {
            i: learner(x) if learner is not None else None
            for i, (_, learner) in copies.items()
        }
        inputs = dict(synthetic)  # at depth 0
        for depth in range(settings.depth + 1):
            answers = {}
            for i, (mach, _) in copies.items():
                answers[i] = torch.relu(local[i] + mach.joined_part(inputs[i]))
                for name, at in (('synthetic', 0), ('real', settings.depth)):
                    if depth == at:
                        logits[i][name].append(mach.head(answers[i]))
            for i in copies:
                if children[i]:
                    inputs[i] = synthetic[i].clone()  # [B, C, E]
                    for position, child in enumerate(children[i]):
                        if child in answers:
                            inputs[i][:, position] = answers[child]
    return {
        i: {
            name: metrics.accuracy(torch.cat(parts).cpu(), labels)
            for name, parts in of_mach.items()
        } for i, of_mach in logits.items()
    }


# -------------------------------------------------------------------- summary


# Copied from synchronous_single/main.py
def main(words):
    """Runs the experiment and prints its log; returns the exit status."""
    settings = read_hyperparameters(words)
    try:
        dataset, batches = load_data(settings)
    except data.DataError as error:
        print(f'{EXPERIMENT}: {error}', file=sys.stderr)
        return 2
    settings.precision = metrics.choose_precision(settings.precision,
                                                  settings.device)
    print(
        metrics.format_line('run',
                            experiment=EXPERIMENT,
                            dataset=dataset.name,
                            train=len(dataset.train_labels),
                            validation=len(dataset.validation_labels),
                            test=len(dataset.test_labels),
                            seed=settings.seed,
                            device=settings.device,
                            precision=settings.precision,
                            **metrics.run_fields()))
    print(metrics.format_line('hparams', **dataclasses.asdict(settings)),
          flush=True)
    run, status = Run(settings, dataset, make_trainers(settings, batches)), 0
    try:
        run.train()
    except KeyboardInterrupt:
        status = 130
    if run.failed and status == 0:
        status = 1
    finals = run.finals()
    if finals:
        finals.append(dict(metrics.mean_final(finals), mach='mean'))
    for final in finals:
        print(metrics.format_line(
            'final',
            **dict(
                dict(experiment=EXPERIMENT,
                     dataset=dataset.name,
                     seed=settings.seed,
                     mach=final['mach']), **final)),
              flush=True)
    return status


# Copied from synchronous_single/main.py
def interrupt(*_):
    """Ends the run, once: a second Ctrl-C must not cut the results off."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rest has deadlines
    raise KeyboardInterrupt


if __name__ == '__main__':
    signal.signal(signal.SIGINT, interrupt)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
