"""Saves a Trainer to a file, and has another Trainer continue from that file.

A file is written whole or not at all. It is read as tensors, numbers and names,
never as code. A run replaces no file of another run, unless it resumes.
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


def begin(trainers, settings, stack, restarted=False):
    """Locks the files of this process; its Trainers resume if they are to.

    A restarted process continues from what its own run has saved. Where that
    cannot be, its MACH starts anew, with a warning: a restart ends no run.

    Args:
        trainers: of this process.
        stack: an ExitStack; its end unlocks the files.
        restarted: whether this process replaces one that was killed.
    Raises:
        data.DataError: the files are in use, of an earlier run, or damaged.
        OSError: the folder cannot be written.
    """
    folder = settings.checkpoint
    if folder and (os.path.isdir(folder) or not settings.resume):
        prepare(folder)
        _lock(pathlib.Path(folder, trainers[0].file), stack)
    there = [one for one in trainers if pathlib.Path(folder, one.file).exists()]
    if folder and there and not settings.resume and not restarted:
        raise data.DataError(f'{folder} has {there[0].file} of an earlier run: '
                             '--resume True continues it; else choose another '
                             'folder')
    for one in trainers if settings.resume or restarted else ():
        try:
            if not folder:
                raise data.DataError('there is no --checkpoint')
            resume(one, folder, own=not settings.resume)
        except data.DataError as error:
            if not restarted:
                raise
            metrics.warn(f'after the restart a MACH starts anew: {error}')
    settings.precision = metrics.choose_precision(settings.precision,
                                                  settings.device)


def _lock(path, stack):
    """Locks a file beside `path` until the end of `stack` or of the process."""
    path = path.with_name(f'.{path.stem}.lock')
    file = stack.enter_context(path.open('ab'))
    try:
        import fcntl  # pylint: disable=import-outside-toplevel
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stack.callback(path.unlink, missing_ok=True)
    except BlockingIOError:
        raise data.DataError(f'another run writes to {path.parent}') from None
    except (ImportError, OSError):
        pass  # Windows and some file systems: two runs at once go unnoticed


def save(trainer, folder):
    """Writes a Trainer's file into `folder`; does nothing if that is ''.

    If the disk fails, it prints a warning instead, and the run continues.
    """
    if not folder:
        return
    path, content = pathlib.Path(folder, trainer.file), io.BytesIO()
    staged = path.with_suffix(f'.{os.getpid()}.new')  # of this run alone
    torch.save(
        dict(run=os.environ.get('MACH_RUN'),
             hyperparameters=dict(vars(trainer.settings)),
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


def resume(trainer, folder, own=False):
    """Has a Trainer continue from its file in `folder`.

    The precision `auto` becomes that of the file.

    Args:
        own: whether the file must be of this very run.
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
        if own and state.get('run') != os.environ.get('MACH_RUN'):
            raise data.DataError('it is of another run')
        for name in there | here:
            if name not in FREE and there.get(name) != here.get(name):
                raise data.DataError(f'{name} was {there.get(name)}, '
                                     f'now it is {here.get(name)}')
        trainer.load_state_dict(parts)
        if trainer.settings.precision == 'auto':
            trainer.settings.precision = there['precision']
    except Exception as error:  # pylint: disable=broad-except
        # A fork may have other networks. torch then names each, one a line.
        why = str(error).split('\n\t')[:2][-1]
        why = f'{why} is missing' if isinstance(error, KeyError) else why
        raise data.DataError(f'cannot resume from {path}: {why}') from error
