"""torchrun with an end that can be read: exit codes, the rank to blame, stopping, one node and several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from safetensors.torch import load_file

from dist_reg.checkpoint import checkpoints, damage
from dist_reg.config import write_yaml
from dist_reg.launch.agent import added_options, after_signal
from dist_reg.launch.failure import first, follows_from_another
from dist_reg.runtime import free_port
from tests.distributed.launch import ROOT, kill
from tests.tiny import save_tiny, write_reviews

STEPS = 40


def start(*command: str, cwd: Path, **env: str) -> subprocess.Popen:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **env}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen, timeout: float = 600) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        kill(process)
    return process.returncode, out, err


def fail(how: str, tmp_path: Path, **env: str) -> tuple[int, str]:
    worker = str(Path(__file__).with_name("failing_worker.py"))
    agent = [
        sys.executable,
        "-m",
        "dist_reg.launch.agent",
        "--standalone",
        "--nproc-per-node",
        "2",
        worker,
        how,
    ]
    code, _, err = end(start(*agent, cwd=tmp_path, **env), timeout=60)
    return code, err


@pytest.mark.slow
def test_the_rank_that_failed_first_is_the_one_printed(tmp_path):
    code, err = fail("raise", tmp_path)
    assert code == 1
    assert err.count("Traceback") == 1
    assert err.startswith("failed first: rank 1 on ")
    assert "ZeroDivisionError: the cause" in err.splitlines()[0]


@pytest.mark.slow
def test_an_end_without_a_word_is_named_too(tmp_path):
    code, err = fail("exit", tmp_path)
    assert code == 1
    assert err.splitlines()[0].endswith(": ended with exit code 9")


@pytest.mark.slow
def test_a_rank_that_hangs_does_not_hold_the_others_up(tmp_path):
    begun = time.monotonic()
    code, err = fail("raise-and-hang", tmp_path)
    assert code == 1
    assert time.monotonic() - begun < 40
    assert "ZeroDivisionError: the cause" in err.splitlines()[0]


@pytest.mark.slow
def test_under_slurm_the_failure_is_kept_for_the_batch_script(tmp_path):
    code, err = fail("raise", tmp_path, DIST_REG_RECORDS=str(tmp_path / "a b" / "records"))
    assert (code, err) == (1, "")
    (path,) = (tmp_path / "a b" / "records").iterdir()
    assert path.name.startswith("failure-0-")
    assert path.name.endswith("-rank1-exit1")
    assert "ZeroDivisionError: the cause" in path.read_text()


def process(exitcode: int, timestamp: int, **data) -> SimpleNamespace:
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp, error_file_data=data)


def leave_ends(folder: Path, *ends: str) -> Path:
    folder.mkdir()
    failure = {"message": "ValueError: mine", "timestamp": 3, "follows": False, "mistake": False}
    for rank, end in enumerate(ends):
        data = {"end": end, "rank": rank, "workers": 2, **(failure if end == "failed" else {})}
        (folder / f"rank{rank}.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (("finished", "finished"), 0),
        (("finished",), 138),  # the other one was killed
        ((), 138),
        (("stopped", "stopped"), 75),
        (("stopped",), 75),  # the other one was ended while it was leaving
        (("failed", "finished"), 1),
    ],
)
def test_what_a_run_made_of_a_signal(tmp_path, capsys, ends, code):
    folder = leave_ends(tmp_path / "ends", *ends)
    (folder / "rank7.json").write_text('{"end": "fini')  # killed meanwhile
    assert after_signal(signal.SIGUSR1, folder) == code
    assert ("failed first: rank 0 on" in capsys.readouterr().err) == ("failed" in ends)


def test_causes_come_before_what_follows_from_them():
    lost = process(1, 10, message="connection closed by peer", follows=True, mistake=False)
    found = first({0: lost, 3: process(-9, 11), 2: process(-15, 9)}, "n1")
    assert (found.rank, found.follows) == (3, False)
    assert str(found).startswith("rank 3 on n1: killed by SIGKILL")
    mine = process(1, 20, message="ValueError: mine", follows=False, mistake=False)
    later = process(1, 30, message="ValueError: later", follows=False, mistake=False)
    assert first({5: later, 1: lost, 4: mine}, "n").text == "ValueError: mine"
    assert first({1: lost}, "n").follows


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1",
        "DistBackendError: NCCL error in: ..., remote process exited or there was a network error",
        "RuntimeError: Timed out waiting 1800000ms for recv operation to complete",
    ],
)
def test_a_lost_rank_is_recognised(text):
    assert follows_from_another(text)


def test_an_error_of_its_own_is_none():
    assert not follows_from_another("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")


def test_options_of_every_start():
    alone = added_options({}, ["--standalone"])
    assert any(option.startswith("--signals-to-handle=") and "SIGUSR1" in option for option in alone)
    assert any(option.startswith("--shutdown-timeout=") for option in alone)
    slurm = {"SLURM_STEP_ID": "0", "SLURM_NODEID": "3"}
    assert "--node-rank=3" in added_options(slurm, ["--nnodes=4", "--master-addr=a"])
    for options in (["--standalone"], ["--rdzv-backend", "c10d"], ["--node-rank=1"]):
        assert "--node-rank=3" not in added_options(slurm, options)


# -- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a run") / "it's here"
    folder.mkdir()
    save_tiny(folder / "model", "bert", num_labels=2)
    write_reviews(folder / "train.jsonl", 48)
    write_reviews(folder / "dev.jsonl", 16, start=48)
    return folder


def run_file(place: Path, output: str, deepspeed: str | None = "zero2", **train) -> str:
    fields = {
        "output_dir": output, "max_steps": STEPS, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no",
        "learning_rate": 1e-3, **train,
    }  # fmt: skip
    data = {"train": "train.jsonl", "dev": "dev.jsonl", "max_length": 16}
    run = {"model": "model", "task": "classification", "data": data, "methods": [{"hype": {"sigma": 0.05}}]}
    write_yaml({**run, "batch_size": 8, "deepspeed": deepspeed, "train": fields}, place / f"{output}.yaml")
    return f"{output}.yaml"


def torchrun(place: Path, output: str, *overrides: str, **env: str) -> subprocess.Popen:
    script = str(ROOT / "launch" / "torchrun.sh")
    return start(script, "train", run_file(place, output), *overrides, cwd=place, **{"NPROC": "2", **env})


def after_step(process: subprocess.Popen, step: int) -> str:
    """What the process printed until it logged `step`."""
    out = ""
    for line in process.stdout or ():
        out += line
        if line.startswith(f"step {step}/"):
            return out
    raise AssertionError(f"ended before step {step}: {out}{process.stderr.read() if process.stderr else ''}")


def weights(output: Path):
    return load_file(output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(place):
    code, _, err = end(torchrun(place, "unbroken"))
    assert code == 0, err
    return weights(place / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize("signals", ["USR1", "TERM", "USR1 TERM USR1"])
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_started_again_bit_for_bit(place, unbroken, signals, workers):
    """Every later signal comes while the first one's checkpoint is written."""
    output = f"stopped-{signals.replace(' ', '-')}-{workers}"
    loading = f"train.dataloader_num_workers={workers}"
    process = torchrun(place, output, loading)
    after_step(process, 5)
    for name in signals.split():
        os.kill(process.pid, getattr(signal, f"SIG{name}"))
        time.sleep(0.05)
    code, _, err = end(process)
    assert code == 75, err
    assert "Traceback" not in err
    (saved,) = checkpoints(place / output / "checkpoints")
    assert damage(saved) is None
    assert f"stopped after step {saved.name.removeprefix('checkpoint-')}, which is saved" in err
    code, out, err = end(torchrun(place, output, loading))
    assert code == 0, err
    assert f"resuming from {output}/checkpoints/{saved.name}" in out
    found = weights(place / output)
    assert all(found[name].equal(unbroken[name]) for name in unbroken)


@pytest.mark.slow
def test_a_mistake_is_one_sentence_and_exit_code_2(place):
    code, _, err = end(torchrun(place, "mistake", "batch_size=7"))
    assert code == 2
    assert err.count("error: batch_size 7 is not processes (2)") == 1
    assert "Traceback" not in err


@pytest.mark.slow
def test_two_nodes_with_a_rank_each(place, unbroken):
    port = str(free_port())
    static = {"NNODES": "2", "NPROC": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [torchrun(place, "static", NODE_RANK=str(rank), **static) for rank in (1, 0)]
    for node in nodes:
        code, _, err = end(node)
        assert code == 0, err
    found = weights(place / "static")
    assert all(found[name].equal(unbroken[name]) for name in unbroken)


@pytest.mark.slow
def test_elastic_start_restarts_a_killed_worker_from_its_checkpoint(place):
    run_file_options = ("deepspeed=null", "train.save_strategy=steps", "train.save_steps=5")
    elastic = {
        "NNODES": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "RDZV_ID": "mine",
        "MAX_RESTARTS": "1",
    }
    process = torchrun(place, "elastic", *run_file_options, **elastic)
    after_step(process, 12)
    family = psutil.Process(process.pid).children()
    workers = [
        child for child in family if "dist_reg" in child.cmdline() and child.environ().get("RANK") == "1"
    ]
    assert len(workers) == 1
    workers[0].kill()
    code, out, err = end(process)
    assert code == 0, err
    assert "resuming from elastic/checkpoints/checkpoint-" in out
    assert (place / "elastic" / "results.json").is_file()


@pytest.mark.parametrize(
    ("env", "missing"),
    [({"NNODES": "2", "NPROC": "1"}, "NODE_RANK"), ({"RDZV_ENDPOINT": "a:1", "NPROC": "1"}, "RDZV_ID")],
)
def test_what_a_start_on_several_nodes_lacks_is_named(tmp_path, env, missing):
    code, _, err = end(start(str(ROOT / "launch" / "torchrun.sh"), "train", "x.yaml", cwd=tmp_path, **env))
    assert code != 0
    assert missing in err
