"""Keeps one process's death from ending all. Torch is not imported here."""

import contextlib
import ctypes
import os
import signal
import sys


def supervise():
    """Returns in a child; the parent waits for it and hides a violent death.

    torchrun ends all processes as soon as one fails. So the MACHs live in a
    child of the one it watches: where the child is killed, torchrun sees nothing
    but a process that ends well, and up to `--max-restarts` times the child is
    started again. To be called before torch is imported: the parent stays small
    (12 MB), and a fork copies no thread but one. Does nothing without torchrun.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return
    if int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)):
        os._exit(1)  # one has ended with a failure: no reason to start all anew
    restarts = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0))
    numbers = signal.SIGINT, signal.SIGTERM
    for attempt in range(restarts + 1):
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # none is missed
        child = os.fork()

        def pass_on(number, _, child=child):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

        for number in numbers:
            signal.signal(number, pass_on if child else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        if not child:
            with contextlib.suppress(AttributeError):  # Linux: ends with it
                ctypes.CDLL(None).prctl(1, signal.SIGTERM)
            os.environ['MACH_ATTEMPT'] = str(attempt)
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if -status in numbers:  # it was still importing
            status = 128 - status
        if status >= 0:
            os._exit(status)
        print(
            f'process {os.environ["RANK"]} was killed by signal {-status}; the '
            f'others go on, {restarts - attempt} restarts are left',
            file=sys.stderr,
            flush=True)
    os._exit(0)
