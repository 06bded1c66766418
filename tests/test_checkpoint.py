"""A checkpoint is whole or absent: sealing, detecting damage, falling back."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest

from dist_reg.checkpoint import MANIFEST, PARTIAL, checkpoints, damage, newest_whole, publish, remove_broken

CONTENT = {"model.safetensors": b"w" * 1000, "trainer_state.json": b"{}", "deep/rank 0/optimizer.pt": b"o" * 77, "empty": b""}  # fmt: skip


def fill(folder: Path) -> Path:
    for name, content in CONTENT.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def seal(root: Path, step: int | str) -> Path:
    """A whole checkpoint, made as the trainer makes it."""
    name = f"checkpoint-{step}"
    publish(fill(root / PARTIAL / name), root / name)
    return root / name


def test_published_checkpoint_is_whole_and_complete(tmp_path):
    path = seal(tmp_path, 5)
    assert damage(path) is None
    assert newest_whole(tmp_path) == path
    assert not list(tmp_path.glob(f"{PARTIAL}/*"))
    for name, content in CONTENT.items():
        assert (path / name).read_bytes() == content
    sizes = json.loads((path / MANIFEST).read_text())["files"]
    assert sizes == {name: len(content) for name, content in CONTENT.items()}
    found = json.loads((path / MANIFEST).read_text())["sha256"]
    assert found == {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


def test_a_changed_byte_shows_when_contents_are_read(tmp_path, caplog):
    older, newer = seal(tmp_path, 10), seal(tmp_path, 20)
    (newer / "model.safetensors").write_bytes(b"w" * 999 + b"x")
    assert damage(newer) is None
    assert damage(newer, contents=True) == "model.safetensors is not what was written"
    assert newest_whole(tmp_path, contents=True) == older
    assert f"{newer} is not whole (model.safetensors is not what was written)" in caplog.text


def test_a_checkpoint_from_before_digests_is_whole(tmp_path):
    path = seal(tmp_path, 5)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert damage(path, contents=True) is None


def test_publishing_again_replaces_the_whole_folder(tmp_path):
    path = seal(tmp_path, 5)
    (path / "stale.bin").write_bytes(b"x")
    (path / "model.safetensors").write_bytes(b"short")
    assert seal(tmp_path, 5) == path
    assert damage(path) is None
    assert not (path / "stale.bin").exists()


def truncate(path: Path) -> str:
    (path / "model.safetensors").write_bytes(b"w" * 10)
    return "model.safetensors has 10 bytes instead of 1000"


def lengthen(path: Path) -> str:
    (path / "empty").write_bytes(b"x")
    return "empty has 1 bytes instead of 0"


def remove(path: Path) -> str:
    (path / "deep" / "rank 0" / "optimizer.pt").unlink()
    return "deep/rank 0/optimizer.pt is missing"


def replace_by_folder(path: Path) -> str:
    (path / "empty").unlink()
    (path / "empty").mkdir()
    return "empty is missing"


def remove_manifest(path: Path) -> str:
    (path / MANIFEST).unlink()
    return f"{MANIFEST} is missing"


def manifest_with(text: str):
    def spoil(path: Path) -> str:
        (path / MANIFEST).write_text(text)
        return f"{MANIFEST} cannot be read"

    return spoil


SPOIL = {
    "truncated file": truncate,
    "longer file": lengthen,
    "missing file": remove,
    "folder in place of a file": replace_by_folder,
    "missing manifest": remove_manifest,
    "empty manifest": manifest_with(""),
    "torn manifest": manifest_with('{"files": {"model.saf'),
    "manifest of another kind": manifest_with('{"sizes": {}}'),
    "manifest a list": manifest_with("[]"),
    "manifest a number": manifest_with("3"),
    "manifest with a list of digests": manifest_with('{"files": {}, "sha256": [3]}'),
    "manifest with a list of files": manifest_with('{"files": ["model.safetensors"]}'),
}


@pytest.mark.parametrize("name", SPOIL)
def test_damage_is_named_and_passed_over(tmp_path, caplog, name):
    older, newer = seal(tmp_path, 10), seal(tmp_path, 20)
    with caplog.at_level(logging.WARNING, "dist_reg.checkpoint"):
        assert newest_whole(tmp_path) == newer
        assert not caplog.records
        expected = SPOIL[name](newer)
        assert damage(newer) == expected
        assert newest_whole(tmp_path) == older
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    for part in (str(newer), expected, "falling back"):
        assert part in caplog.text
    assert newer.is_dir()  # evidence is not deleted


def test_every_broken_one_is_named_and_none_may_be_left(tmp_path, caplog):
    paths = [seal(tmp_path, step) for step in (1, 2, 3)]
    for path in paths[1:]:
        truncate(path)
    assert newest_whole(tmp_path) == paths[0]
    assert [str(path) in record.getMessage() for path, record in zip(paths[:0:-1], caplog.records)] == [
        True,
        True,
    ]
    caplog.clear()
    remove_manifest(paths[0])
    assert newest_whole(tmp_path) is None
    assert len(caplog.records) == 3


def test_steps_are_numbers_and_other_folders_are_ignored(tmp_path):
    nine, ten = seal(tmp_path, 9), seal(tmp_path, 10)
    hundred = seal(tmp_path, 100)
    for other in ("checkpoint-abc", "checkpoint-", "checkpoint-5-old", "my checkpoint-200", "checkpoint--3"):
        fill(tmp_path / other)
    assert checkpoints(tmp_path) == [nine, ten, hundred]
    truncate(hundred)
    assert newest_whole(tmp_path) == ten
    truncate(ten)
    assert newest_whole(tmp_path) == nine


def test_unsealed_checkpoints_are_ignored_without_a_word(tmp_path, caplog):
    older = seal(tmp_path, 1)
    fill(tmp_path / PARTIAL / "checkpoint-2")
    assert checkpoints(tmp_path) == [older]
    assert newest_whole(tmp_path) == older
    assert not caplog.records


def test_no_checkpoint_at_all(tmp_path):
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "nowhere") is None
    assert damage(tmp_path / "nowhere") == f"{MANIFEST} is missing"
    (tmp_path / "checkpoint-7").write_text("a file")
    assert newest_whole(tmp_path) is None


def test_failed_publish_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    older = seal(tmp_path, 1)
    partial = fill(tmp_path / PARTIAL / "checkpoint-2")

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dist_reg.checkpoint._sync", no_space)
    with pytest.raises(OSError, match="No space"):
        publish(partial, tmp_path / "checkpoint-2")
    assert checkpoints(tmp_path) == [older]
    assert damage(older) is None


def test_only_damaged_checkpoints_of_ours_are_removed(tmp_path):
    whole, broken = seal(tmp_path, 1), seal(tmp_path, 2)
    truncate(broken)
    foreign = fill(tmp_path / "checkpoint-3")
    remove_broken(tmp_path)
    assert checkpoints(tmp_path) == [whole, foreign]


def test_a_checkpoint_whose_best_one_is_damaged_is_passed_over(tmp_path, caplog):
    def seal_with_best(step, best):
        partial = fill(tmp_path / PARTIAL / f"checkpoint-{step}")
        state = {"best_model_checkpoint": best and f"elsewhere/checkpoint-{best}"}
        (partial / "trainer_state.json").write_text(json.dumps(state))
        publish(partial, tmp_path / f"checkpoint-{step}")
        return tmp_path / f"checkpoint-{step}"

    first, second, third = seal_with_best(1, None), seal_with_best(2, 2), seal_with_best(3, 2)
    assert newest_whole(tmp_path, with_best=True) == third
    truncate(second)
    assert newest_whole(tmp_path) == third
    assert newest_whole(tmp_path, with_best=True) == first
    assert "its best one, checkpoint-2, is damaged" in caplog.text
