"""torchrun whose end says what happened: `python -m dist_reg.launch.agent TORCHRUN-OPTIONS -m dist_reg train RUN.yaml`.

What every start needs is added to its options. SIGUSR1 reaches the workers, which would else be orphaned, and they have
`PATIENCE` seconds to save. Where a worker fails the agent prints that worker's error alone, and under SLURM it ends the
step on all nodes: ranks elsewhere may wait in a collective until its timeout of half an hour.

Exit codes: 0, 75 when the run stopped on request and is saved, 2 for a user's mistake, 1 for any other failure.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_reg.errors import STOPPED as EXIT_STOPPED
from dist_reg.launch.failure import ENDS, FINISHED, STOPPED, Failure, first, first_of_ends, read_ends

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
PATIENCE = 600
RECORDS = "DIST_REG_RECORDS"
"""Environment variable: folder that all nodes see, for the end of the batch script to read."""
FOLLOWER_WAITS = 5.0
"""Seconds that a node whose ranks merely lost another leaves the node with the cause to say it."""


def main() -> None:
    """Run torchrun with the command line's options and end with the exit code described above."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until torchrun hands it on
    with tempfile.TemporaryDirectory(prefix="dist-reg-") as ends:
        os.environ[ENDS] = ends
        code = run([*added_options(os.environ, sys.argv[1:]), *sys.argv[1:]], Path(ends))
    sys.exit(code)


def added_options(environment: Mapping[str, str], options: list[str]) -> list[str]:
    """Options for every start, and this node's rank where SLURM starts one task a node."""
    added = [f"--signals-to-handle={SIGNALS}", f"--shutdown-timeout={PATIENCE}"]
    given = any(
        option.startswith(("--node-rank", "--node_rank", "--rdzv", "--standalone")) for option in options
    )
    if "SLURM_STEP_ID" in environment and not given:
        added.append(f"--node-rank={environment['SLURM_NODEID']}")
    return added


def run(options: list[str], ends: Path) -> int:
    """The exit code of torchrun with `options`; workers say how they end in the folder `ends`."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # They log every worker that is ended, as errors, in front of the one that matters.
    for name in [
        name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")
    ]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hear_once(api)
    try:
        torchrun.run(torchrun.parse_args(options))
    except ChildFailedError as error:
        return stopped() if was_stopped(ends) else failed(first(dict(error.failures), node()))
    except api.SignalException as error:
        return after_signal(error.sigval, ends)
    return 0


def after_signal(number: int, ends: Path) -> int:
    """The exit code after a signal that torchrun passed on to the workers, of whose ends it says nothing."""
    found = read_ends(ends)
    failure = first_of_ends(found, node())
    if was_stopped(ends):
        return stopped()
    if failure is not None:
        return failed(failure)
    finished = [end for end in found if end["end"] == FINISHED]  # past its last step when it was asked
    return 0 if finished and len(finished) == finished[0]["workers"] else 128 + number


def was_stopped(ends: Path) -> bool:
    """Whether a worker stopped on request, which it does when all ranks have saved."""
    return any(end["end"] == STOPPED for end in read_ends(ends))


def node() -> str:
    """The name of this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def hear_once(api: Any) -> None:
    """Let torchrun pass on the first signal alone: a third would end it before its workers have saved.

    Ctrl-C always counts. `api` is torch.distributed.elastic.multiprocessing.api, whose handler raises.
    """
    raises = api._terminate_process_handler

    def handler(number: int, frame: Any) -> None:
        for later in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
            signal.signal(later, signal.SIG_IGN)
        raises(number, frame)

    api._terminate_process_handler = handler


def stopped() -> int:
    """Note for the batch script that the run stopped on request."""
    note("stopped", "")
    return EXIT_STOPPED


def failed(failure: Failure) -> int:
    """Say which rank failed first, end the other nodes, and return the exit code."""
    code = 2 if failure.mistake else 1
    # Causes sort before what follows from them, then by time.
    name = f"failure-{int(failure.follows)}-{time.time():.3f}-rank{failure.rank}-exit{code}"
    if not note(name, f"{failure}\n"):
        print(message(failure), file=sys.stderr, flush=True)
    end_step(failure)
    return code


def message(failure: Failure) -> str:
    """What to print of a failure; a mistake that every rank sees needs no rank."""
    return failure.text if failure.mistake and failure.rank == 0 else f"failed first: {failure}"


def note(name: str, text: str) -> bool:
    """Write `text` to the records of this job, if it keeps any."""
    folder = os.environ.get(RECORDS)
    if folder is None:
        return False
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        partial = Path(folder) / f".{name}-{socket.gethostname()}-{os.getpid()}"
        partial.write_text(text, encoding="utf-8")
        partial.rename(Path(folder) / name)
    except OSError:
        return False
    return True


def end_step(failure: Failure) -> None:
    """SIGKILL every process of this SLURM step on all nodes; srun ends it more slowly where scancel is missing."""
    step = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"
    if (
        "SLURM_STEP_ID" not in os.environ
        or os.environ.get("SLURM_NNODES") == "1"
        or not shutil.which("scancel")
    ):
        return
    if failure.follows:
        time.sleep(FOLLOWER_WAITS)
    subprocess.run(["scancel", "--signal=KILL", step], check=False)


if __name__ == "__main__":
    main()
