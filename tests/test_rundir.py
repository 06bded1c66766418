"""The run directory's lock."""

from __future__ import annotations

import errno
import fcntl

import pytest

from dist_reg.config import ModelConfig, RunConfig
from dist_reg.errors import UserError
from dist_reg.rundir import RunDirectory


def run(folder, batch_size=8):
    return RunConfig(model=ModelConfig(name="-"), batch_size=batch_size, train={"output_dir": str(folder)})


def test_one_process_at_a_time(tmp_path):
    folder = RunDirectory(tmp_path / "out")
    with folder.begin(run(folder.path)):
        with pytest.raises(UserError, match="another process is training in"):
            folder.begin(run(folder.path)).__enter__()
        assert (folder.path / "run.yaml").is_file()


def test_a_run_that_came_in_between_is_not_overwritten(tmp_path):
    """The folder was empty when it was checked; another run began and ended in it before this one took the lock."""
    mine, other = RunDirectory(tmp_path / "out"), RunDirectory(tmp_path / "out")
    mine.check(run(mine.path))
    with other.begin(run(other.path, batch_size=16)):
        pass
    before = other.run_file.read_bytes()
    with pytest.raises(UserError, match="holds a different run"):
        mine.begin(run(mine.path)).__enter__()
    assert other.run_file.read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog, code):
    def no_locks(*_):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = RunDirectory(tmp_path / "out")
    with folder.begin(run(folder.path)):
        assert folder.run_file.is_file()
    assert "cannot be locked" in caplog.text
