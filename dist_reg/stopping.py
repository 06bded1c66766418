"""Stopping a run from outside: on SIGUSR1 or SIGTERM every rank saves after the same step and ends with exit code 75.

A batch system sends SIGUSR1 some time before the time limit, and SIGTERM when it takes the nodes away. Here is what a
process hears, from before its long imports on; `dist_reg.stop_callback` is what training does about it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.agreed = False
        """Whether all ranks are stopping; from then on they leave one after the other."""

    def __call__(self, *_: Any) -> None:
        self.asked = True


_requests: list[StopRequest] = []


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Take SIGUSR1 and SIGTERM as requests to stop, as often as they come, until the block ends."""
    request = StopRequest()
    _requests.append(request)
    before = {number: signal.signal(number, request) for number in SIGNALS}
    watched = "TORCHELASTIC_RUN_ID" in os.environ
    if watched:
        _watch_siblings(request)
    try:
        yield request
    finally:
        _requests.remove(request)
        for number, handler in before.items():
            signal.signal(number, handler)
        if watched:
            os.close(signal.set_wakeup_fd(-1))


def current_request() -> StopRequest:
    """What the process has been asked since `listening` began; outside of it nothing ever."""
    return _requests[-1] if _requests else StopRequest()


def _block_in_child() -> None:
    """Workers of a data loader get the signals too, and would die of them before the step is saved."""
    if _requests:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


os.register_at_fork(after_in_child=_block_in_child)


def _watch_siblings(request: StopRequest) -> None:
    """End this process at a SIGTERM that torchrun sends because another of its workers is dead.

    A thread does it: the main one may be in a collective that waits for the dead worker and never reaches a handler.
    """
    import psutil

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    launcher, workers = psutil.Process(os.getppid()), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def alive() -> int:
        return sum(child.status() != psutil.STATUS_ZOMBIE for child in launcher.children())

    def watch() -> None:
        with open(reading, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] != signal.SIGTERM or request.agreed:
                    continue
                with contextlib.suppress(psutil.Error):
                    if alive() < workers and not request.agreed:
                        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="watch-siblings", daemon=True).start()
