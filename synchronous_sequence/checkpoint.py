"""One file for each trainer, from which another goes on: written whole or not.

A file is loaded as tensors, numbers and names alone, never as code.
"""
# Copied from synchronous_single/checkpoint.py

import contextlib
import io
import os
import pathlib
import sys
import zipfile

import torch

from mach import data, metrics

# Hyperparameters that may be others than before.
FREE = {*metrics.BOOKKEEPING, 'device', 'precision'} - {'seed'}


def generator_of(device):
    """What dropout draws from."""
    if device == 'cpu':
        return torch.default_generator
    return torch.cuda.default_generators[torch.device(device).index]


def save(one, folder):
    """Writes a Trainer's file in `folder`, unless that is ''.

    A disk that fails costs a checkpoint and a line on stderr, never the run.
    """
    if not folder:
        return
    path, content = pathlib.Path(folder, one.file), io.BytesIO()
    staged = path.with_suffix('.new')
    torch.save(
        dict(hyperparameters=dict(vars(one.settings)),
             random=generator_of(one.settings.device).get_state(),
             trainer=one.state()), content)
    try:
        with open(staged, 'wb') as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            staged.unlink()
        with contextlib.suppress(OSError):  # stderr may be on the same disk
            print(f'warning: no checkpoint of step {one.steps_taken}: {error}',
                  file=sys.stderr)


def resume(one, folder):
    """Has a Trainer go on from its file in `folder`; without one it begins.

    Raises:
        data.DataError: the file is damaged, or of other hyperparameters.
    """
    path, here = pathlib.Path(folder, one.file), vars(one.settings)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the sums
                raise zipfile.BadZipFile
        state = torch.load(path, one.settings.device, weights_only=True)
        there = state['hyperparameters']
        for name in there | here:
            if name not in FREE and there.get(name) != here.get(name):
                raise data.DataError(f'{name} was {there.get(name)}, '
                                     f'now it is {here.get(name)}')
        one.restore(state['trainer'])
        if there['device'] == here['device']:
            generator_of(here['device']).set_state(state['random'].cpu())
    except FileNotFoundError:
        print(f'warning: no {path}: from the beginning', file=sys.stderr)
    except data.DataError as error:
        raise data.DataError(f'cannot resume from {path}: {error}') from error
    except Exception as error:  # pylint: disable=broad-except
        raise data.DataError(f'{path} is damaged or cannot be read '
                             f'({type(error).__name__})') from error
