"""Saves a Trainer to a file, and has another Trainer continue from that file.

A file is written whole or not at all. It is read as tensors, numbers and names,
never as code.
"""
# Copied from synchronous_single/checkpoint.py

import contextlib
import io
import os
import pathlib
import tempfile
import zipfile

import torch

from mach import data, metrics

# Hyperparameters that may differ from the file's, or between processes.
FREE = {*metrics.BOOKKEEPING, 'device', 'precision'} - {'seed'}


def prepare(folder):
    """Makes `folder`, unless that is ''; OSError if it cannot be written."""
    if folder:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def save(trainer, folder):
    """Writes a Trainer's file into `folder`; does nothing if that is ''.

    If the disk fails, it prints a warning instead, and the run continues.
    """
    if not folder:
        return
    path, content = pathlib.Path(folder, trainer.file), io.BytesIO()
    staged = path.with_suffix(f'.{os.getpid()}.new')  # of this run alone
    torch.save(
        dict(hyperparameters=dict(vars(trainer.settings)),
             trainer=trainer.state_dict()), content)
    try:
        with open(staged, 'wb') as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            staged.unlink()
        step = trainer.steps_taken
        metrics.warn(f'warning: no checkpoint of step {step}: {error}')


def resume(trainer, folder):
    """Has a Trainer continue from its file in `folder`.

    Raises:
        data.DataError: the file is damaged, or of other code or settings.
    """
    path, here = pathlib.Path(folder, trainer.file), vars(trainer.settings)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not check the sums
                raise zipfile.BadZipFile
        state = torch.load(path, trainer.settings.device, weights_only=True)
        there, parts = state['hyperparameters'], state['trainer']
    except OSError as error:
        raise data.DataError(f'cannot resume: {error}') from error
    except Exception as error:  # pylint: disable=broad-except
        raise data.DataError(f'{path} is damaged or cannot be read '
                             f'({type(error).__name__})') from error
    try:
        for name in there | here:
            if name not in FREE and there.get(name) != here.get(name):
                raise data.DataError(f'{name} was {there.get(name)}, '
                                     f'now it is {here.get(name)}')
        trainer.load_state_dict(parts)
    except Exception as error:  # pylint: disable=broad-except
        # A fork may have other networks. torch then names each, one a line.
        why = str(error).split('\n\t')[:2][-1]
        why = f'{why} is missing' if isinstance(error, KeyError) else why
        raise data.DataError(f'cannot resume from {path}: {why}') from error
