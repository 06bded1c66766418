"""Exceptions that the command line turns into a sentence: a user's mistake into exit code 2, a run that was stopped into 75."""

import os
from pathlib import Path


class UserError(ValueError):
    """Something the user asked for cannot be done.

    The message is one sentence that says what was wrong, where, and the nearest right thing.
    """


class Stopped(Exception):
    """A run was asked to stop and has saved what it needs to go on.

    Every rank raises it after the same step; the command line ends with `STOPPED`.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}, which is saved; the same command goes on from there")
        self.step = step


STOPPED = os.EX_TEMPFAIL
"""Exit code of a run that stopped on request: start it again."""


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """`name` suggestions as text: the closest of `known`, or all of them when none is close."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(sorted(known))


def reason(error: BaseException) -> str:
    """Why something failed, in a few words: the system's own for a system error, else the message's first line."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def make_folder(folder: Path, option: str) -> None:
    """Create `folder`, or raise UserError naming the option that asked for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: folder {folder} cannot be created: {reason(error)}.") from None
