"""Checkpoints that are written whole or not at all.

A checkpoint is written to `.partial/checkpoint-N`, described by a manifest of its files' sizes and SHA-256, and renamed to
`checkpoint-N` as the last act. A folder without a manifest, or with a file of another size, is not whole; before a run
resumes from one its contents are read too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dist_reg.errors import reason

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PARTIAL = ".partial"


def publish(partial: Path, final: Path, processes: int = 1) -> None:
    """Seal the checkpoint that `processes` ranks wrote to `partial` with a manifest; move it to `final` in one rename."""
    sizes = {str(file.relative_to(partial)): file.stat().st_size for file in _files(partial)}
    content = {"processes": processes, "files": sizes, "sha256": digests(partial, sizes)}
    (partial / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for file in [*_files(partial), partial]:
        _sync(file)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    with contextlib.suppress(OSError):
        partial.parent.rmdir()
    _sync(final.parent)


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files `names` of `folder`, read by several threads: a sharded checkpoint has many large ones."""

    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(digest, names)))


def damage(checkpoint: Path, *, contents: bool = False) -> str | None:
    """What keeps `checkpoint` from being whole, as a sentence's end, or None when it is.

    With `contents` every file is read and compared with its SHA-256.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        sizes, expected = dict(manifest["files"]), dict(manifest.get("sha256", {}))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    if contents:
        try:
            found = digests(checkpoint, expected)
        except OSError as error:
            return f"its files cannot be read ({reason(error)})"
        for name, digest in found.items():
            if digest != expected[name]:
                return f"{name} is not what was written"
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


def newest_whole(folder: Path, *, with_best: bool = False, contents: bool = False) -> Path | None:
    """The newest whole checkpoint in `folder`; a broken newer one is named in a warning and passed over.

    `contents` is `damage`'s.
    With `with_best` the best checkpoint that it refers to must be whole too, for a run that ends by loading that one.
    """
    for path in reversed(checkpoints(folder)):
        broken = damage(path, contents=contents)
        if broken is None and with_best:
            broken = _damage_of_best(path, contents=contents)
        if broken is None:
            return path
        logger.warning("checkpoint %s is not whole (%s); falling back to the one before it.", path, broken)
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint folder was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _damage_of_best(checkpoint: Path, *, contents: bool) -> str | None:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if not state.get("best_model_checkpoint"):
        return None
    best = checkpoint.parent / Path(state["best_model_checkpoint"]).name
    broken = damage(best, contents=contents)
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
