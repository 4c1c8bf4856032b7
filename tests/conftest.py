"""What the tests share: experiments, tiny networks, stubs, real MNIST."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
import tqdm

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # lets the tests import `mach`
from mach import data, metrics

# Products as tiny as the tests' are 20 times slower on threads of busy cores.
torch.set_num_threads(1)

PIXELS, CLASSES = 9, 10
WIDTH = 6  # of an embedding
SYNCHRONOUS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph')
ASYNCHRONOUS = ('asynchronous_sequence', 'asynchronous_kgraph')
GRAPHS = {  # the children of each MACH
    'chain': [[], [0], [1], [2]],
    'diamond': [[], [0], [0, 1], [1, 2]],
    'full': [[], [0], [0, 1], [0, 1, 2]],
    'cycle': [[1, 2], [0, 2], [0, 1]],
}
# The folder of real MNIST; None where there is none.
DATA = next((pathlib.Path(place).resolve()
             for place in (os.environ.get('MACH_DATA'), ROOT / 'data',
                           ROOT / '../shared/data')
             if place and (pathlib.Path(place) / 'MNIST' / 'raw').is_dir()),
            None)
TINY = ('--precision=fp32 --batch_size=16 --hidden=32 --student_hidden=32 '
        '--steps=6 --log_every=3').split()
LONG = 60  # seconds, after which something hangs
# No network, one thread for torch; the interpreter names modules on stderr.
ENVIRONMENT = dict.fromkeys(['http_proxy', 'https_proxy'], 'http://127.0.0.1:9')
ENVIRONMENT |= dict(no_proxy='',
                    OMP_NUM_THREADS='1',
                    PYTHONPROFILEIMPORTTIME='1')


def _import(folder, names, there=types.SimpleNamespace()):
    """Imports modules of a folder without a trace: others' names are the same.

    Args:
        there: modules that they are to find by their names.
    """
    path, handler = sys.path[:], signal.getsignal(signal.SIGINT)
    own = {file.stem for file in folder.glob('*.py')}
    hidden = {name: sys.modules.pop(name, None) for name in own}
    sys.modules.update(vars(there))
    sys.path.insert(0, str(folder))
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path[:] = path
        signal.signal(signal.SIGINT, handler)
        for name, module in hidden.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@functools.cache
def load(folder):
    """A namespace of an experiment's model, student, trainer, and link if any.

    Args:
        folder: a name under ROOT, or a path.
    """
    folder = ROOT / folder
    names = ('checkpoint', 'exchange', 'link', 'model', 'processes', 'student',
             'trainer')
    return types.SimpleNamespace(**_import(
        folder, [name for name in names if (folder / f'{name}.py').exists()]))


@functools.cache
def load_main(folder):
    """The module main of an experiment; its trainer is that of `load`."""
    return _import(ROOT / folder, ['main'], load(folder))['main']


def make_settings(**overrides):
    """Hyperparameters of a tiny experiment, as far as trainers know them."""
    values = dict(seed=3,
                  k=5,
                  alone=0.2,
                  steps=40,
                  depth=2,
                  delay=0,
                  inputs='synthetic',
                  deadline=1e9,
                  latency=0.0,
                  jitter=0.0,
                  share=1.0,
                  grad_weight=1.0,
                  grad_depth=2,
                  any_rows_every=0,
                  learning_rate=0.05,
                  student_learning_rate=0.05,
                  warmup=0.1,
                  weight_decay=0.01,
                  prior=0.5,
                  label_smoothing=0.1,
                  dropout=0.0,
                  device='cpu',
                  precision='fp32',
                  evaluate_every=5,
                  log_every=1000,
                  checkpoint='',
                  checkpoint_every=500,
                  resume=False,
                  slow_mach=-1)
    return types.SimpleNamespace(**{**values, **overrides})


class Batches:
    """Endless random batches; `taken` keeps them, `shift` changes labels."""
    classes = torch.arange(1, CLASSES + 1)  # of the whole shard

    def __init__(self, seed, rows=4):
        self.taken, self.shift, self._rows = [], 0, rows
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        return self

    def __next__(self):
        """x [B, PIXELS], y [B]."""
        x = torch.randn(self._rows,
                        PIXELS,
                        generator=self._generator,
                        dtype=torch.float64)
        y = torch.randint(CLASSES, (self._rows,), generator=self._generator)
        self.taken.append((x, (y + self.shift) % CLASSES))
        return self.taken[-1]

    def state_dict(self):
        """Decides what is drawn next."""
        return dict(generator=self._generator.get_state())

    def load_state_dict(self, state):
        """Continues at `state`."""
        self._generator.set_state(state['generator'])


class Still:
    """An optimiser or schedule that does nothing: gradients add up."""

    def step(self):
        """Changes no parameter."""

    def zero_grad(self):
        """Keeps the gradients."""


def patch_trainers(monkeypatch, name, value):
    """Replaces a name in the module `trainer` of all folders."""
    for folder in SYNCHRONOUS + ASYNCHRONOUS:
        monkeypatch.setattr(load(folder).trainer, name, value, raising=False)


@pytest.fixture(name='still')
def _still(monkeypatch):
    """All Trainers get an optimiser that does nothing."""
    patch_trainers(monkeypatch, 'make_optimiser', lambda *_: (Still(), Still()))


@pytest.fixture(autouse=True)
def _signals():
    """Fails a test that takes minutes. No signal is ignored, even under nohup.

    A process inherits which signals are ignored: here, none.
    """
    handlers = dict.fromkeys([signal.SIGTERM, signal.SIGHUP], signal.SIG_DFL)
    handlers[signal.SIGINT] = signal.default_int_handler
    handlers[signal.SIGALRM] = lambda *_: pytest.fail('it hangs')
    before = {one: signal.signal(one, handlers[one]) for one in handlers}
    signal.alarm(4 * LONG)
    yield
    signal.alarm(0)
    for one, handler in before.items():
        signal.signal(one, handler)


class Clock:
    """Seconds pass when the test says so, or while a mailbox waits."""

    def __init__(self):
        self.now, self.waits = 0.0, []

    def __call__(self):
        return self.now

    def wait(self, seconds):
        """Replaces a condition's `wait`: nothing arrives meanwhile."""
        self.waits.append(seconds)
        self.now += seconds


def never_wait(seconds):
    """Replaces a condition's `wait` where nothing may wait."""
    raise AssertionError(f'it waits, up to {seconds} s')


class Sink:
    """A link that leads to the test."""
    lost = dropped = 0

    def __init__(self):
        self.messages = []

    def send(self, message):
        """Keeps the message."""
        self.messages.append(message)

    def take(self, kind):
        """All messages of one kind, by its name, since the last call."""
        taken = [m for m in self.messages if type(m).__name__ == kind]
        self.messages = [m for m in self.messages if type(m).__name__ != kind]
        return taken


def tensors(message):
    """The tensors of a message."""
    return [value for value in vars(message).values() if torch.is_tensor(value)]


def draw(seed, rows=4, width=PIXELS):
    """A tensor [rows, width] drawn by the seed: an x, unless width differs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def make_networks(folder, children):
    """For each MACH its network and its student (None without children)."""
    modules, made = load(folder), []
    torch.manual_seed(3)
    for own in children:
        network = modules.model.Mach(len(own), 8, WIDTH, PIXELS).double()
        student = None
        if own:
            student = modules.student.Student(len(own), 7, WIDTH, PIXELS)
            student.double()
        made.append((network, student))
    return made


def make_lone(folder, children=(0,), clock=None, **names):
    """The Trainer of MACH 5, whose neighbours are the test.

    Args:
        children: each has a Sink, and so has parent 9.
        clock: a Clock; without one, time stands still and nothing may wait.
        **names: hyperparameters.
    Returns:
        The Trainer, neighbour -> Sink, and `tell(kind, *content)`, which puts a
        message into the mailbox.
    """
    modules, (networks,) = load(folder), make_networks(folder, [children])
    trainer = modules.trainer.Trainer(5, *networks, list(children), Batches(7),
                                      make_settings(**names))
    exchange, sinks = trainer.exchange, {i: Sink() for i in (*children, 9)}
    exchange.mailbox.clock = clock or Clock()
    exchange.mailbox._arrival.wait = clock.wait if clock else never_wait
    exchange.links = sinks
    return trainer, sinks, lambda kind, *content: exchange.mailbox.put(
        getattr(modules.link, kind)(*content))


def make_many(folder, children, clock=None, loss=0.0, sent=None, **names):
    """A Trainer for each MACH, with Links between them; nothing runs yet.

    Args:
        sent: list that gets each message, with copies of its tensors.
    """
    modules, settings = load(folder), make_settings(**names)
    made = [
        modules.trainer.Trainer(i, *networks, children[i], Batches(100 + i),
                                settings)
        for i, networks in enumerate(make_networks(folder, children))
    ]

    def connect(i, j):
        link = modules.link.Link(made[j].exchange.mailbox, settings.latency,
                                 settings.jitter, loss, f'{i} {j}')
        made[i].exchange.links[j], send = link, link.send

        def note(message):
            if sent is not None:
                sent.append((message, [t.clone() for t in tensors(message)]))
            send(message)

        link.send = note

    for one in made:
        one.exchange.mailbox.clock = clock or Clock()
        for child in one.exchange.children:
            connect(one.index, child)
            connect(child, one.index)
    return made


def make_all(folder, graph=None, shared=False, sent=None, **names):
    """A whole experiment: trainers, networks, students, children, batches.

    Args:
        graph: the children of each MACH.
        shared: whether all MACHs of a synchronous one get the same batches.
        sent: as in `make_many`.
    """
    graph = graph or GRAPHS['cycle' if 'kgraph' in folder else 'chain']
    if folder in ASYNCHRONOUS:
        trainers = make_many(folder, graph, sent=sent, **names)
        parts = [(one.network, one.student) for one in trainers]
        batches = [one.batches for one in trainers]
    else:
        single = folder == 'synchronous_single'
        parts = make_networks(folder, [[]] if single else graph)
        batches = [Batches(20 + i) for i in range(1 if shared else len(parts))]
        given = *map(list, zip(*parts)), graph, batches
        if single:  # its student mimics the MACH itself
            parts = [(parts[0][0], make_networks(folder, [[0]])[0][1])]
            given = *parts[0], batches[0]
        trainers = [
            load(folder).trainer.Trainer(*given, make_settings(**names))
        ]
    networks, students = map(list, zip(*parts))
    return types.SimpleNamespace(trainers=trainers,
                                 networks=networks,
                                 students=students,
                                 learners=[s for s in students if s],
                                 children=graph,
                                 batches=batches)


def take_step(one, trainers):
    """One step of a Trainer; while it waits, all others serve."""

    def stopped():
        for other in trainers * 4:
            if other is not one:
                other.serve(0.0)
        return False

    one.step(stopped)


def weights(*networks):
    """All parameters as they are now, in one vector; None counts nothing."""
    return torch.cat([
        p.detach().flatten().clone() for network in networks if network
        for p in network.parameters()
    ])


def within(seconds, work):
    """The result of work(); fails instead of hanging."""
    results, errors = [], []

    def run():
        try:
            results.append(work())
        except BaseException as error:  # pylint: disable=broad-except
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=seconds)
    assert not thread.is_alive(), 'it hangs'
    if errors:
        raise errors[0]
    return results[0]


# ------------------------------------------------ runs from the command line


def hyperparameters(experiment):
    """Name -> dataclass field."""
    fields = dataclasses.fields(load_main(experiment).Hyperparameters)
    return {field.name: field for field in fields}


def wait_until(condition, seconds=LONG):
    """Whether the condition holds in that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def two_at_a_time(work, items):
    """The list of work(item)."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, items))


@pytest.fixture(scope='session', name='dataset')
def _dataset():
    """A thousand images, each of its class's grey with noise."""
    generator, parts = torch.Generator().manual_seed(0), []
    for count in (1000, 100, 200):
        labels = torch.arange(count) % 10
        noise = torch.randint(80, (count, 784), generator=generator)
        parts += [(noise + 15 * labels[:, None]).to(torch.uint8), labels]
    return data.Dataset('greys', *parts)


@pytest.fixture(name='run_here')
def _run_here(monkeypatch, dataset):
    """Runs an experiment's main here, on `dataset` unless there is a --data=.

    Its exit status, its Log ('' without stdout) and its stderr. No thread is left.
    """

    def run_here(experiment, *words):
        main, before = load_main(experiment), threading.enumerate()
        out, err = io.StringIO(), io.StringIO()
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        handlers = [signal.getsignal(number) for number in numbers]
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'stdout', out)
            patch.setattr(sys, 'stderr', err)
            patch.setattr(tqdm.tqdm, 'monitor_interval', 0)  # no thread
            patch.setattr(metrics, 'OUTPUTS', [None])
            patch.setattr(metrics, 'FAILED', [])
            if '--data=' not in ' '.join(words):
                patch.setattr(data, 'load', lambda *_: dataset)
            try:
                code = main.main([*TINY, *words])
            except SystemExit as stopped:
                code = stopped.code
            # A notebook keeps its own.
            assert list(map(signal.getsignal, numbers)) == handlers
            for thread in set(threading.enumerate()) - set(before):
                thread.join(LONG)
                assert not thread.is_alive()
        out = out.getvalue()
        return code, out and metrics.parse_log(out), err.getvalue()

    return run_here


@pytest.fixture(name='before')
def _before(monkeypatch):
    """Has a function of main, or of Trainers, call act(*its arguments) first."""

    def before(experiment, name, act):
        owner = load_main(experiment)
        if not hasattr(owner, name):
            owner = load(experiment).trainer.Trainer

        def function(*args, then=getattr(owner, name)):
            act(*args)
            return then(*args)

        monkeypatch.setattr(owner, name, function)

    return before


@contextlib.contextmanager
def running(path, folder, *words, prefix=(), out=None):
    """A process of folder/main.py, without a network.

    Its Popen has said(), what stdout and stderr have got, and end(): (exit
    status, stdout, stderr), after a check that no process of its group is left.

    Args:
        path: a new folder for stdout and stderr.
        folder: of the experiment.
        *words: its command line.
        prefix: of the command.
        out: replaces the file of stdout.
    """
    path.mkdir()
    command = [*prefix, sys.executable, str(ROOT / folder / 'main.py'), *words]
    if '--data=' not in ' '.join(words):
        command.append(f'--data={DATA or path}')
    with open(path / 'out', 'wb') as file, open(path / 'err', 'wb') as err:
        process = subprocess.Popen(command,
                                   env=os.environ | ENVIRONMENT,
                                   stdin=subprocess.DEVNULL,
                                   stdout=out or file,
                                   stderr=err,
                                   start_new_session=True)

    def said():
        return (path / 'out').read_text() + (path / 'err').read_text()

    def end():
        code = process.wait(3 * LONG)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        lines = (path / 'err').read_text().splitlines(keepends=True)
        err = ''.join(line for line in lines if 'import time:' not in line)
        return code, (path / 'out').read_text(), err

    process.end, process.said = end, said
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
