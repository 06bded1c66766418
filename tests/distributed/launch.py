"""Start real processes for a test and make sure none survives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from dist_reg.runtime import free_port

ROOT = Path(__file__).resolve().parents[2]


def command(arguments: Sequence[str], processes: int = 1) -> list[str]:
    """`python ARGUMENTS`, under torchrun when `processes` is above 1."""
    if processes == 1:
        return [sys.executable, *arguments]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [sys.executable, *torchrun, *arguments]


def start(
    arguments: Sequence[str], processes: int = 1, log: Path | None = None, **env: str
) -> subprocess.Popen:
    """Start in a session of its own; output goes to `log` or to pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    # The installed transformers of `make test-compat` must stay in front.
    environment["PYTHONPATH"] = os.pathsep.join([p for p in (paths[2], paths[0], paths[1]) if p])
    sink = log.open("w") if log is not None else subprocess.PIPE
    return subprocess.Popen(
        command(arguments, processes),
        stdout=sink,
        stderr=subprocess.STDOUT if log is not None else subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=_hear_ctrl_c,
    )


def _hear_ctrl_c() -> None:
    """As in a terminal, whatever a script in the background handed down."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(
    arguments: Sequence[str], processes: int = 1, timeout: float = 600, **env: str
) -> subprocess.CompletedProcess:
    """Run to the end; everything it started is killed when it takes too long."""
    process = start(arguments, processes, **env)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        kill(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL the process and all its descendants at once, as a node failure would."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()
