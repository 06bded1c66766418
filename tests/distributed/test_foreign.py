"""`regularize` in loops that are not ours: Transformers' Trainer, Accelerate, a bare deepspeed.initialize."""

from __future__ import annotations

import json

import pytest

from tests.distributed.foreign_worker import LOOPS
from tests.distributed.launch import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.compat]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    out = tmp_path_factory.mktemp("foreign") / "losses.json"
    done = run([str(ROOT / "tests" / "distributed" / "foreign_worker.py"), str(out)])
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("loop", [name for name in LOOPS if name != "by hand"])
def test_the_losses_are_those_of_a_loop_by_hand(losses, loop):
    assert losses[loop] == pytest.approx(losses["by hand"], rel=1e-5)
    assert len(set(losses[loop])) == len(losses[loop])
