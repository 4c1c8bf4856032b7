"""What the tests share: experiments, tiny networks, stubs, real MNIST."""

import functools
import importlib
import os
import pathlib
import signal
import sys
import threading
import types

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # lets the tests import `mach`

# Products as tiny as the tests' are 20 times slower on threads of busy cores.
torch.set_num_threads(1)

PIXELS, CLASSES = 9, 10
SYNCHRONOUS = ('synchronous_single', 'synchronous_sequence',
               'synchronous_kgraph')
ASYNCHRONOUS = ('asynchronous_sequence', 'asynchronous_kgraph')
# The folder of real MNIST; None where there is none.
DATA = next((pathlib.Path(place).resolve()
             for place in (os.environ.get('MACH_DATA'), ROOT / 'data',
                           ROOT / '../shared/data')
             if place and (pathlib.Path(place) / 'MNIST' / 'raw').is_dir()),
            None)


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
                  steps=40,
                  depth=2,
                  delay=0,
                  inputs='synthetic',
                  deadline=1e9,
                  mailbox=64,
                  recent=64,
                  latency=0.0,
                  jitter=0.0,
                  share=1.0,
                  grad_weight=1.0,
                  learning_rate=0.05,
                  student_learning_rate=0.05,
                  warmup=0.1,
                  weight_decay=0.01,
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
    """Endless random batches; `taken` keeps them."""

    def __init__(self, seed, rows=4):
        self.taken, self._rows = [], rows
        self._generator = torch.Generator().manual_seed(seed)

    def next(self):
        """x [B, PIXELS], y [B]."""
        x = torch.randn(self._rows,
                        PIXELS,
                        generator=self._generator,
                        dtype=torch.float64)
        y = torch.randint(CLASSES, (self._rows,), generator=self._generator)
        self.taken.append((x, y))
        return x, y

    def state(self):
        """What is drawn next."""
        return self._generator.get_state()

    def restore(self, state):
        """Draws that next."""
        self._generator.set_state(state)


class Still:
    """An optimiser that leaves the parameters and lets their grads add up."""

    def __init__(self, *_, **__):
        pass

    def step(self):
        """Does nothing."""


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
