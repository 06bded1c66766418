"""A second stream sends nothing that plain fine-tuning does not: collectives counted under ZeRO-3."""

from __future__ import annotations

import json

import pytest

from tests.distributed.launch import run

pytestmark = pytest.mark.slow


def test_every_method_sends_what_plain_fine_tuning_sends():
    done = run(["-m", "dist_reg.bench.wire", "--tiny"], 2)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    traffic = found["traffic"]
    plain = traffic["plain"]
    assert found["processes"] == 2
    assert plain["all_gather_into_tensor"][1] > 0
    ours = [name for name in traffic if not name.endswith("straightforward")]
    assert len(ours) == 6
    for name in ours:
        assert traffic[name] == plain, name
    for name in ("lnsr layer 0", "rdrop", "r3f"):
        two_pass = traffic[f"{name}, straightforward"]
        assert two_pass["all_gather_into_tensor"][1] > 1.5 * plain["all_gather_into_tensor"][1], name
