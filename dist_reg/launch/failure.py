"""How a worker ended that did not finish: recorded where torchrun looks, and told as text to whoever reads the log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_reg.runtime import rank

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of torchrun's: where a worker says why it failed."""
ENDS = "DIST_REG_ENDS"
"""Environment variable: folder of `dist_reg.launch.agent`, in which every worker says how it ended."""

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"

_OF_ANOTHER_RANK = re.compile(
    r"closed by peer|reset by peer|broken pipe|socket timeout|timed out waiting|wait timeout|"
    r"remote process exited|ncclRemoteError|ncclSystemError|NCCL communicator was aborted|failed to recv|"
    r"DistNetworkError|DistBackendError",
    re.IGNORECASE,
)


def follows_from_another(text: str) -> bool:
    """Whether the error `text` only says that another rank is gone."""
    return _OF_ANOTHER_RANK.search(text) is not None


def record(error: BaseException, *, sentence: str | None = None) -> None:
    """Write why this worker fails to where torchrun and our agent look; without them nothing.

    `sentence` replaces the traceback where the error is a user's mistake.
    """
    text = sentence or f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"
    data = {
        "message": text.rstrip(),
        "timestamp": int(time.time()),
        "mistake": sentence is not None,
        "follows": follows_from_another(f"{type(error).__name__}: {error}"),
        "errorCode": 0,
    }
    record_end(FAILED, **data)
    if ERROR_FILE in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ[ERROR_FILE]).parent.mkdir(parents=True, exist_ok=True)
            Path(os.environ[ERROR_FILE]).write_text(json.dumps(data), encoding="utf-8")


def record_end(end: str, **data: Any) -> None:
    """Tell the agent, if there is one, how this worker ends: FINISHED, STOPPED or FAILED."""
    if ENDS in os.environ:
        with contextlib.suppress(OSError):
            path = Path(os.environ[ENDS]) / f"rank{rank()}.json"
            workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            data = {"end": end, "rank": rank(), "workers": workers, **data}
            path.write_text(json.dumps(data), encoding="utf-8")


def is_reported() -> bool:
    """Whether an agent prints this worker's error, so that it must not."""
    return ENDS in os.environ


def read_ends(folder: Path) -> list[dict[str, Any]]:
    """What the workers of one node left in `folder`; one that was killed while it wrote left nothing."""
    ends = []
    for path in sorted(folder.glob("rank*.json")):
        with contextlib.suppress(OSError, ValueError):
            ends.append(json.loads(path.read_text(encoding="utf-8")))
    return ends


@dataclass(frozen=True)
class Failure:
    """Why one rank failed."""

    rank: int
    node: str
    text: str
    follows: bool
    """Whether it only followed from another rank's end."""
    mistake: bool = False
    """Whether `text` is the sentence on a user's mistake."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}: {self.text}"


def first(failures: dict[int, Any], node: str) -> Failure:
    """The failure behind torchrun's `failures` of one node (rank to ProcessFailure): a cause before what follows from it,
    then the earliest."""
    return earliest(
        [(_failure(rank, process, node), process.timestamp) for rank, process in failures.items()]
    )


def first_of_ends(ends: list[dict[str, Any]], node: str) -> Failure | None:
    """The same from what the workers left, where a signal ended torchrun and it says nothing of them."""
    failures = [
        (_from_record(end["rank"], end, node), end["timestamp"]) for end in ends if end["end"] == FAILED
    ]
    return earliest(failures) if failures else None


def earliest(failures: list[tuple[Failure, float]]) -> Failure:
    """The one to blame of failures with their times."""
    return min(failures, key=lambda failure: (failure[0].follows, failure[1], failure[0].rank))[0]


def _from_record(rank: int, data: dict[str, Any], node: str) -> Failure:
    return Failure(rank, node, str(data["message"]), bool(data["follows"]), bool(data["mistake"]))


def _failure(rank: int, process: Any, node: str) -> Failure:
    if "follows" in process.error_file_data:
        return _from_record(rank, process.error_file_data, node)
    if process.exitcode < 0:
        number = -process.exitcode
        name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
        cause = "; where nobody did that, the node ran out of memory" if number == signal.SIGKILL else ""
        return Failure(rank, node, f"killed by {name}{cause}", number == signal.SIGTERM)
    ended_by_agent = process.exitcode == 128 + signal.SIGTERM
    return Failure(rank, node, f"ended with exit code {process.exitcode}", ended_by_agent)
