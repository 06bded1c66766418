"""Checkpoints that are written whole or not at all.

A checkpoint is written to `.partial/checkpoint-N`, described by a manifest of its files' sizes, and renamed to
`checkpoint-N` as the last act. A folder without a manifest, or with a file of another size, is not whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PARTIAL = ".partial"


def publish(partial: Path, final: Path, processes: int = 1) -> None:
    """Seal the checkpoint that `processes` ranks wrote to `partial` with a manifest; move it to `final` in one rename."""
    sizes = {str(file.relative_to(partial)): file.stat().st_size for file in _files(partial)}
    manifest = partial / MANIFEST
    manifest.write_text(
        json.dumps({"processes": processes, "files": sizes}, indent=1) + "\n", encoding="utf-8"
    )
    for file in [*_files(partial), partial]:
        _sync(file)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    with contextlib.suppress(OSError):
        partial.parent.rmdir()
    _sync(final.parent)


def damage(checkpoint: Path) -> str | None:
    """What keeps `checkpoint` from being whole, as a sentence's end, or None when it is."""
    try:
        sizes = dict(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def processes(checkpoint: Path) -> int:
    """How many ranks wrote the whole checkpoint `checkpoint`."""
    return int(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["processes"])


def remove_broken(folder: Path) -> None:
    """Delete sealed checkpoints in `folder` that are damaged: nothing can resume from them, and rotation counts them.

    A checkpoint without a manifest is not of our making and is left alone.
    """
    for path in checkpoints(folder):
        if (path / MANIFEST).is_file() and damage(path) is not None:
            shutil.rmtree(path, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder`, oldest step first."""
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def newest_whole(folder: Path, *, with_best: bool = False) -> Path | None:
    """The newest whole checkpoint in `folder`; a broken newer one is named in a warning and passed over.

    With `with_best` the best checkpoint that it refers to must be whole too, for a run that ends by loading that one.
    """
    for path in reversed(checkpoints(folder)):
        broken = damage(path)
        if broken is None and with_best:
            broken = _damage_of_best(path)
        if broken is None:
            return path
        logger.warning("checkpoint %s is not whole (%s); falling back to the one before it.", path, broken)
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint folder was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _damage_of_best(checkpoint: Path) -> str | None:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if not state.get("best_model_checkpoint"):
        return None
    best = checkpoint.parent / Path(state["best_model_checkpoint"]).name
    broken = damage(best)
    return broken and f"its best one, {best.name}, is damaged: {broken}"


_STEP = re.compile(r"checkpoint-(\d+)")


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
