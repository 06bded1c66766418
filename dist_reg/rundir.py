"""The run directory: what belongs to one run, written whole or not at all.

run.yaml       the resolved run file; what tells this run from another
log.jsonl      every log line as data
checkpoints/   sealed checkpoints (dist_reg.checkpoint)
model/         the exported model with its card, loadable without this project
slurm/         what was submitted, with the jobs' logs (dist_reg.launch.submission)
progress.json  how far the run is (dist_reg.progress)
.lock          held while a process trains here
results.json   metrics, timings, versions, commit, hardware; its presence means the run is finished
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_reg.config import RunConfig, read_yaml, write_yaml
from dist_reg.errors import UserError, reason

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
RESULTS = "results.json"
LOCK = ".lock"
SUBMISSIONS = "slurm"
PROGRESS = "progress.json"


class RunDirectory:
    """The folder of one run. Creating the object touches nothing on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_file = path / RUN_FILE
        self.results_file = path / RESULTS
        self.log_file = path / "log.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"

    def check(self, run: RunConfig) -> None:
        """Raise UserError when the folder holds a different run, or files that are no run of ours."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"train.output_dir: {self.path} is a file; give a folder.")
        if not self.run_file.is_file():
            ours = {f".{RUN_FILE}", LOCK, SUBMISSIONS}  # what a job or a start that failed may have left
            if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
                ours.add(self.checkpoints.name)
            if any(entry.name not in ours for entry in self.path.iterdir()):
                raise UserError(
                    f"train.output_dir: {self.path} holds files but no {RUN_FILE}; choose an empty or a new folder."
                )
            return
        difference = first_difference(read_yaml(self.run_file), plain(run.as_dict()))
        if difference is not None:
            key, there, here = difference
            raise UserError(
                f"train.output_dir: {self.path} holds a different run ({key} is {there!r} there and {here!r} here); "
                "choose another folder."
            )

    def results(self) -> dict[str, Any] | None:
        """The results of a finished run, or None."""
        if not self.results_file.is_file():
            return None
        try:
            results = json.loads(self.results_file.read_text(encoding="utf-8"))
            return {**results, "metrics": dict(results["metrics"])}
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{self.results_file} is damaged; remove it, and the same command evaluates and writes it again."
            ) from None

    @contextlib.contextmanager
    def begin(self, run: RunConfig) -> Iterator[None]:
        """Create the folder, write the resolved run file, and keep other processes out until the block ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("w")
        except OSError as error:
            raise UserError(f"train.output_dir: {self.path} cannot be written: {reason(error)}.") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"train.output_dir: another process is training in {self.path}.") from None
            except OSError as error:  # some network file systems are mounted without locks
                logger.warning(
                    "%s cannot be locked (%s); start this run only once.", self.path, reason(error)
                )
            self.check(run)
            fresh = not self.run_file.exists()
            self._write_run_file(run)
            try:
                yield
            except BaseException:
                if fresh and not self._trained():
                    self.run_file.unlink(missing_ok=True)
                raise
            (self.path / LOCK).unlink(missing_ok=True)

    def _trained(self) -> bool:
        """Whether a run has left anything here that its next start would go on from."""
        return self.log_file.exists() or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    def _write_run_file(self, run: RunConfig) -> None:
        try:
            partial = self.path / f".{RUN_FILE}"
            write_yaml(plain(run.as_dict()), partial)
            os.replace(partial, self.run_file)
        except OSError as error:
            raise UserError(
                f"train.output_dir: {self.path} cannot be written: {os.strerror(error.errno or 0)}."
            ) from None

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results; the run is finished from here on."""
        partial = self.path / f".{RESULTS}"
        try:
            partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, self.results_file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"{self.results_file} cannot be written: {os.strerror(error.errno or 0)}."
            ) from None


def plain(data: Any) -> Any:
    """`data` as YAML gives it back: paths as text, tuples as lists."""
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    return str(data) if isinstance(data, Path) else data


def first_difference(there: Any, here: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key at which two nested mappings differ, with both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() | here.keys()):
            found = first_difference(there.get(name), here.get(name), f"{key}.{name}" if key else name)
            if found is not None:
                return found
        return None
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for old, new in zip(there, here):
            found = first_difference(old, new, key)
            if found is not None:
                return found
    return None if there == here else (key, there, here)
