"""What the tests share: experiments, tiny MACHs, stub optimisers, threads."""

import functools
import importlib
import pathlib
import signal
import sys
import threading
import types

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # lets the tests import `mach`

PIXELS, CLASSES = 9, 10
SYNCHRONOUS_CHILDREN = {
    'synchronous_sequence': [[], [0], [1], [2]],
    'synchronous_kgraph': [[1, 2], [0, 2], [0, 1]],
}

# Products as tiny as the tests' are 20 times slower on threads of busy cores.
torch.set_num_threads(1)


@functools.lru_cache(None)
def load(folder):
    """The modules of one experiment; all experiments' have the same names.

    Returns:
        A namespace with model, student, trainer, and link where there is one.
    """
    names = [
        name for name in ('link', 'model', 'student', 'trainer')
        if (ROOT / folder / f'{name}.py').exists()
    ]
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(ROOT / folder))
    try:
        return types.SimpleNamespace(
            **{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(ROOT / folder))
        for name in names:
            sys.modules.pop(name, None)
            if before[name] is not None:
                sys.modules[name] = before[name]


@functools.cache
def load_main(folder):
    """The module main of an experiment, without a trace of its import."""
    path, handler = sys.path[:], signal.getsignal(signal.SIGINT)
    names = {file.stem for file in folder.glob('*.py')}
    hidden = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module('main')
    finally:
        sys.path[:] = path
        signal.signal(signal.SIGINT, handler)
        for name, module in hidden.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def make_settings(**overrides):
    """Hyperparameters of a tiny experiment."""
    values = dict(seed=3,
                  steps=40,
                  batch_size=4,
                  depth=1,
                  delay=0,
                  inputs='synthetic',
                  deadline=1e9,
                  mailbox=64,
                  neighbours=0,
                  stale_after=1e9,
                  latency=0.0,
                  jitter=0.0,
                  share=1.0,
                  grad_weight=1.0,
                  embedding=6,
                  hidden=8,
                  student_hidden=7,
                  learning_rate=0.05,
                  student_learning_rate=0.05,
                  warmup=0.1,
                  weight_decay=0.01,
                  label_smoothing=0.1,
                  dropout=0.0,
                  device='cpu',
                  precision='fp32')
    return types.SimpleNamespace(**{**values, **overrides})


class Rows:
    """Endless random batches, one row of it per image; `taken` keeps them."""

    def __init__(self, settings, seed, dtype=torch.float64):
        self.taken, self._rows, self._dtype = [], settings.batch_size, dtype
        self._generator = torch.Generator().manual_seed(seed)

    def next(self):
        """x [B, PIXELS], y [B]."""
        x = torch.randn(self._rows,
                        PIXELS,
                        generator=self._generator,
                        dtype=self._dtype)
        y = torch.randint(CLASSES, (self._rows,), generator=self._generator)
        self.taken.append((x, y))
        return x, y


class Still:
    """An optimiser that leaves the parameters and lets their grads add up."""

    def __init__(self, parameters, learning_rate, weight_decay, settings):
        pass

    def step(self):
        """Does nothing."""


class Descend:
    """Plain gradient descent."""

    def __init__(self, parameters, learning_rate, weight_decay, settings):
        self._parameters, self._rate = list(parameters), learning_rate

    @torch.no_grad()
    def step(self):
        """Applies the gradients, then drops them."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter -= self._rate * parameter.grad
                parameter.grad = None


def make_networks(modules, children, settings, dtype=torch.float64):
    """Of each MACH its network and its student (None without children)."""
    torch.manual_seed(settings.seed)
    networks = []
    for fed_by in children:
        mach = modules.model.Mach(len(fed_by), settings.hidden,
                                  settings.embedding, PIXELS, CLASSES)
        student = None
        if fed_by:
            student = modules.student.Student(len(fed_by),
                                              settings.student_hidden,
                                              settings.embedding,
                                              PIXELS).to(dtype)
        networks.append((mach.to(dtype), student))
    return networks


def make_synchronous(folder, settings, batches=1):
    """One synchronous experiment, to be stepped by hand.

    Args:
        folder: of the experiment.
        settings: the hyperparameters.
        batches: 1, shared by all MACHs, or one for each.
    Returns:
        A namespace with its trainer, machs, students, children and rows.
    """
    modules = load(folder)
    children = SYNCHRONOUS_CHILDREN.get(folder, [[]])
    machs, students = zip(*make_networks(modules, children, settings))
    rows = [Rows(settings, 20 + i) for i in range(batches)]
    if folder == 'synchronous_single':  # its student is of the MACH itself
        students = [make_networks(modules, [[0]], settings)[0][1]]
        trainer = modules.trainer.Trainer(machs[0], students[0], rows[0],
                                          settings)
    elif folder == 'synchronous_sequence':
        row = []
        for i, (mach, student) in enumerate(zip(machs, students)):
            row.append(
                modules.trainer.Component(i, mach, student,
                                          row[-1] if row else None, settings))
        trainer = modules.trainer.Trainer(row, rows)
    else:
        trainer = modules.trainer.Trainer(machs, students, children, rows,
                                          settings)
    return types.SimpleNamespace(trainer=trainer,
                                 machs=list(machs),
                                 students=list(students),
                                 children=children,
                                 rows=rows)


def make_threads(modules, children, settings, clock=lambda: 0.0, wrap=None):
    """One asynchronous trainer for each MACH, connected; nothing runs yet.

    Args:
        modules: of an asynchronous experiment.
        children: list of k lists.
        settings: the hyperparameters.
        clock: as it stands still by default, nothing ever expires.
        wrap: makes of each link the one that is used.
    """
    trainers = [
        modules.trainer.Trainer(i,
                                mach,
                                student,
                                children[i],
                                Rows(settings, 100 + i),
                                settings,
                                clock=clock)
        for i, (
            mach,
            student) in enumerate(make_networks(modules, children, settings))
    ]
    wrap = wrap or (lambda link: link)
    for parent in trainers:
        for child in children[parent.index]:
            parent.connect(
                child, wrap(modules.link.MailboxLink(trainers[child].mailbox)))
            trainers[child].connect(
                parent.index, wrap(modules.link.MailboxLink(parent.mailbox)))
    return trainers


def run_threads(trainers, steps, after_step=lambda trainer: None, timeout=60):
    """Steps each trainer in a thread of its own, as an experiment does.

    Fails instead of hanging.
    """
    halt, errors = threading.Event(), []
    finished = threading.Semaphore(0)

    def work(trainer):
        try:
            while trainer.steps_taken < steps and not halt.is_set():
                trainer.step(halt.is_set)
                after_step(trainer)
            finished.release()
            while not halt.is_set():  # others may still ask
                trainer.serve(0.01)
        except BaseException as error:  # pylint: disable=broad-except
            errors.append(error)
            finished.release()

    threads = [
        threading.Thread(target=work, args=(trainer,), daemon=True)
        for trainer in trainers
    ]
    for thread in threads:
        thread.start()
    done = [finished.acquire(timeout=timeout) for _ in threads[:1]]
    # Only the first may use all of the time: who waits in a circle waits with
    # all the others.
    done += [finished.acquire(timeout=timeout / 4) for _ in threads[1:]]
    halt.set()
    for thread in threads:
        thread.join(timeout=5)
    if errors:
        raise errors[0]
    assert all(done), f'{done.count(False)} of {len(threads)} hang'
    assert [trainer.steps_taken for trainer in trainers
           ] == [steps] * len(trainers)


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


def snapshot(*networks):
    """A copy of all parameters, as they are now."""
    return [
        parameter.detach().clone() for network in networks
        if network is not None for parameter in network.parameters()
    ]


def same(some, others):
    """Whether two lists of tensors are equal in every bit."""
    return len(some) == len(others) and all(
        torch.equal(one, other) for one, other in zip(some, others))


def grads_of(*networks):
    """What has arrived in `grad` of each parameter; zeros where nothing has."""
    return [
        torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for network in networks if network is not None
        for p in network.parameters()
    ]


def assert_close(found, expected, limit=1e-10):
    """|found - expected| / |expected|, over all tensors of two lists."""
    assert len(found) == len(expected)
    found = torch.cat([tensor.flatten() for tensor in found])
    expected = torch.cat([tensor.flatten() for tensor in expected])
    assert expected.norm() > 0
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < limit


def target_loss(mach, embedding, y, settings):
    """The target loss of embedding [B, E], y [B]."""
    return torch.nn.functional.cross_entropy(
        mach.head(embedding), y, label_smoothing=settings.label_smoothing)


def gradients(outputs, networks, weights=None):
    """Autograd's gradients of all parameters; zeros for those not involved."""
    parameters = [p for network in networks for p in network.parameters()]
    found = torch.autograd.grad(outputs,
                                parameters,
                                weights,
                                retain_graph=True,
                                allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(parameters, found)
    ]
