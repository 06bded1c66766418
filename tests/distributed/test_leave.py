"""The end of a distributed process is clean, whatever the communication's threads still do."""

from pathlib import Path

import pytest

from tests.distributed.launch import run


@pytest.mark.slow
def test_leaving_during_a_collective_does_not_abort():
    done = run([str(Path(__file__).with_name("leaving_worker.py"))], processes=2, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "leaving\n"
