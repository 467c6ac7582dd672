"""The process that loader workers are forked from. Light to import: it is started before torch is."""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker

_WORKERS_MODULE = "dist_transformer.data.loader"
"""What the server imports once for all workers; torch is not among it."""
SHIELDED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
"""Signals that workers do not see."""


def start_fork_server() -> None:
    """Start the process that workers are forked from, if it does not run yet.

    Started first thing, it imports what workers need while this process imports torch.

    Schedulers send their signals to every process of a job step, and Ctrl-C to the whole foreground. The main
    process answers them (it finishes the step and saves), so its workers must live on until it lets them go:
    the server and its children inherit a mask that blocks these signals. None is lost for the main process:
    those that arrive meanwhile are delivered after. Workers still end with their parent: the server ends when
    its pipe closes, and they notice.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    try:
        # Started by the server's start, it would let SIGINT and SIGTERM through again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
        multiprocessing.get_context("forkserver").set_forkserver_preload([_WORKERS_MODULE])
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
