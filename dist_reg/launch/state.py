"""What there is to say of the runs below a folder: finished, running, queued, failed, and how far."""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_reg.launch.submission import Submitted, queue, submissions
from dist_reg.rundir import LOCK, PROGRESS, RESULTS, RUN_FILE


@dataclass(frozen=True)
class RunState:
    """One run directory."""

    folder: Path
    state: str
    """finished, running, queued, saved, failed, ended or new."""
    job: str
    progress: dict[str, Any]
    """What dist_reg.progress wrote last; empty where no step was logged."""
    failure: str
    """Why it failed, where it did."""
    log: Path | None

    @property
    def age(self) -> float | None:
        """Seconds since it was last heard of."""
        return time.time() - self.progress["time"] if "time" in self.progress else None


def run_states(root: Path) -> list[RunState]:
    """Every run at or below `root`, trained or only submitted, by folder."""
    submitted = submissions(root)
    last = {run.folder: run for run in submitted}
    waiting = queue(run.job for run in submitted)
    trained = {path.parent.absolute() for path in root.rglob(RUN_FILE) if _is_run(path.parent)}
    folders = sorted(trained | last.keys())
    return [_state(folder, last.get(folder), waiting) for folder in folders]


def _is_run(folder: Path) -> bool:
    """Whether a run began in `folder`, which may merely hold a run file."""
    return any((folder / name).exists() for name in (RESULTS, PROGRESS, LOCK))


def _state(folder: Path, run: Submitted | None, waiting: dict[str, str]) -> RunState:
    queued = waiting.get(run.job) if run is not None else None
    failure = ""
    if (folder / RESULTS).is_file():
        state = "finished"
    elif queued is not None:
        state = {"PENDING": "queued"}.get(queued, queued.lower())
    elif _is_locked(folder):
        state = "running"
    elif run is not None and run.failure:
        state, failure = "failed", run.failure
    elif run is not None and run.stopped:
        state = "saved"
    else:
        state = "ended" if (folder / PROGRESS).is_file() or (run is not None and run.log.is_file()) else "new"
    return RunState(
        folder, state, run.job if run else "", _progress(folder), failure, run.log if run else None
    )


def _progress(folder: Path) -> dict[str, Any]:
    try:
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return progress if isinstance(progress, dict) and {"step", "max_steps", "time"} <= progress.keys() else {}


def _is_locked(folder: Path) -> bool:
    """Whether a process trains in `folder`; on file systems that lock across nodes, anywhere."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
