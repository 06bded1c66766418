"""Whole runs through the command line: what they leave, how they go on, what every mistake says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from dist_reg.checkpoint import checkpoints, damage
from dist_reg.cli import run_command
from dist_reg.config import read_yaml, write_yaml
from tests.distributed.launch import ROOT, kill, run, start
from tests.tiny import save_tiny, write_reviews

pytestmark = pytest.mark.slow

RUN: dict[str, Any] = {
    "model": "model",
    "task": "classification",
    "data": {"train": "train.jsonl", "dev": "dev.jsonl", "max_length": 16},
    "methods": [{"hype": {"sigma": 0.05}}],
    "batch_size": 8,
    "train": {
        "output_dir": "out",
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "seed": 3,
    },
}


@dataclass
class Called:
    """What one command gave."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that starts with `error:`; anything else on stderr is a library's warning."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        assert "Traceback" not in self.err
        return lines[0]


def call(*arguments: str, cwd: Path) -> Called:
    """One command in this process, run in `cwd`."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["dist-reg", *arguments]),
        mock.patch.dict(os.environ),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = run_command()
    return Called(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder, with a space and a quote in its path, that holds a model, data and `run.yaml`."""
    root = tmp_path_factory.mktemp("it's a folder")
    save_tiny(root / "model", "bert", num_labels=2)
    write_reviews(root / "train.jsonl", 64)
    write_reviews(root / "dev.jsonl", 24, start=64)
    write_yaml(RUN, root / "run.yaml")
    return root


@pytest.fixture(scope="module")
def first(inputs, tmp_path_factory) -> tuple[Path, Called]:
    """The folder with a finished run in `out`, and what the command gave. Copy it before changing it."""
    root = tmp_path_factory.mktemp("finished") / "here"
    shutil.copytree(inputs, root)
    return root, call("train", "run.yaml", cwd=root)


@pytest.fixture
def finished(first, tmp_path) -> Path:
    """A copy of the folder with a finished run."""
    return shutil.copytree(first[0], tmp_path / "a copy")


@pytest.fixture
def fresh(inputs, tmp_path) -> Path:
    """A copy of the folder without a run."""
    return shutil.copytree(inputs, tmp_path / "a copy")


def unfinish(root: Path, *, keep: tuple[int, ...]) -> None:
    """Make the finished run in `root` one that was killed after its checkpoints `keep`."""
    (root / "out" / "results.json").unlink()
    shutil.rmtree(root / "out" / "model")
    for path in checkpoints(root / "out" / "checkpoints"):
        if int(path.name.rpartition("-")[2]) not in keep:
            shutil.rmtree(path)


def results(root: Path, out: str = "out") -> dict[str, Any]:
    return json.loads((root / out / "results.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def steps(root: Path) -> list[int]:
    return [path.name for path in checkpoints(root / "out" / "checkpoints")]


# -- a whole run


def test_run_directory(first):
    root, called = first
    assert called.code == 0, called.err
    assert sorted(entry.name for entry in (root / "out").iterdir()) == [
        "checkpoints", "log.jsonl", "model", "progress.json", "results.json", "run.yaml",
    ]  # fmt: skip
    assert steps(root) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert all(damage(path) is None for path in checkpoints(root / "out" / "checkpoints"))
    assert "classification: 64 examples, model, hype; batch 8 = 1 processes x 8 x 1" in called.out
    assert "no deepspeed, gradients clipped at 1.0" in called.out
    resolved = read_yaml(root / "out" / "run.yaml")
    assert resolved["train"] == RUN["train"]
    assert resolved["methods"][0]["hype"]["sigma"] == 0.05
    assert resolved["methods"][0]["hype"]["layers"] == "all"
    assert resolved["data"]["seed"] == 0
    assert not (root / "runs").exists()


def test_log_holds_every_step(first):
    root, _ = first
    lines = [json.loads(line) for line in (root / "out" / "log.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    for line in training:
        assert {"task_loss", "grad_norm", "learning_rate", "hype/noise_survival", "epoch"} <= line.keys()
        assert line["task_loss"] == pytest.approx(line["loss"])
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [2, 4, 6]


def test_results(first):
    root, called = first
    found = results(root)
    assert found["task"] == "classification"
    assert found["methods"] == read_yaml(root / "out" / "run.yaml")["methods"]
    assert (found["seed"], found["data_seed"], found["train_examples"]) == (3, 0, 64)
    assert found["main_metric"] == "accuracy"
    assert found["selection"] == "best dev checkpoint by accuracy"
    dev = found["metrics"]["dev"]
    assert dev.keys() == {"accuracy", "macro_f1", "loss"}
    assert f"dev: accuracy {dev['accuracy']:.4f}" in called.out
    timings = found["timings"]
    assert timings["steps"] == 6
    assert timings["resumed"] is False
    assert timings["seconds_per_step"] == pytest.approx(timings["train_seconds"] / 6)
    assert found["terms"].keys() == {"task_loss", "hype/noise_survival"}
    assert found["topology"] == {
        "processes": 1, "deepspeed": None, "micro_batch": 8, "accumulation": 1, "gradient_clipping": 1.0,
    }  # fmt: skip
    assert {"python", "torch", "transformers", "deepspeed"} <= found["versions"].keys()
    assert found["versions"]["torch"] == torch.__version__
    assert "git_commit" in found
    assert found["hardware"]["cpu_cores"] == os.cpu_count()
    assert found["date"].endswith("+00:00")


LOAD = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dist_reg", "dist_reg_kernels"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Absent())
try:
    import dist_reg
except ImportError:
    pass
else:
    raise AssertionError
import torch, transformers
torch.set_num_threads(1)
folder, texts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
batch = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
with torch.no_grad():
    torch.save(model(**batch).logits, out)
assert "dist_reg" not in sys.modules
"""


def dev_rows(root: Path) -> tuple[list[str], list[int]]:
    rows = [json.loads(line) for line in (root / "dev.jsonl").read_text().splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def test_exported_model_needs_transformers_alone(first, tmp_path):
    root, _ = first
    texts, labels = dev_rows(root)
    model = root / "out" / "model"
    done = run(["-c", LOAD, str(model), json.dumps(texts), str(tmp_path / "logits.pt")], timeout=120)
    assert done.returncode == 0, done.stderr
    logits = torch.load(tmp_path / "logits.pt")
    right = (logits.argmax(-1) == torch.tensor(labels)).float().mean().item()
    assert right == pytest.approx(results(root)["metrics"]["dev"]["accuracy"])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    assert loss == pytest.approx(results(root)["metrics"]["dev"]["loss"], rel=1e-6)
    config = json.loads((model / "config.json").read_text())
    assert config["hidden_dropout_prob"] == 0.1  # what HyPe switched off is on again in what is exported
    assert config["id2label"] == {"0": "0", "1": "1"}
    assert not any(name for name in weights(model) if "hype" in name or "dist_reg" in name)
    assert sorted(path.name for path in model.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_exported_weights_are_those_of_the_best_checkpoint(first):
    root, _ = first
    lines = [json.loads(line) for line in (root / "out" / "log.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}
    best = max(scores, key=lambda step: (scores[step], -step))
    checkpoint = root / "out" / "checkpoints" / f"checkpoint-{best}"
    assert same(weights(root / "out" / "model"), weights(checkpoint))
    assert results(root)["metrics"]["dev"]["accuracy"] == scores[best]


@pytest.mark.parametrize("target", ["out", "out/model"])
def test_eval_gives_the_scores_of_the_run(finished, target):
    called = call("eval", target, "--out", "scores.json", cwd=finished)
    assert called.code == 0, called.err
    assert json.loads((finished / "scores.json").read_text()) == results(finished)["metrics"]
    assert "dev: accuracy" in called.out


def test_eval_of_an_unfinished_run(finished):
    unfinish(finished, keep=(2,))
    called = call("eval", "out", cwd=finished)
    assert called.code == 2
    assert "the run in out is not finished" in called.error


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_second_call_reports_and_trains_nothing(finished):
    before = snapshot(finished)
    called = call("train", "run.yaml", cwd=finished)
    assert called.code == 0, called.err
    assert "out holds this run, finished" in called.out
    assert f"accuracy {results(finished)['metrics']['dev']['accuracy']:.4f}" in called.out
    assert "step 1/6" not in called.out
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.max_steps=8", "train.max_steps"),
        ("methods.hype.sigma=0.1", "methods"),
        ("methods=[]", "methods"),
        ("data.max_length=12", "data.max_length"),
        ("model.config.hidden_dropout_prob=0.0", "model.config.hidden_dropout_prob"),
        ("deepspeed=zero2", "deepspeed"),
        ("train.weight_decay=0.5", "train.weight_decay"),
    ],
)
def test_another_run_on_the_same_folder_is_refused(finished, override, key):
    before = snapshot(finished)
    called = call("train", "run.yaml", override, cwd=finished)
    assert called.code == 2
    assert f"out holds a different run ({key}" in called.error
    assert snapshot(finished) == before


def test_difference_in_a_method_names_the_option(finished):
    called = call("train", "run.yaml", "methods.hype.sigma=0.1", cwd=finished)
    assert "sigma" in called.error
    assert "distribution" not in called.error


def test_folder_with_foreign_files_is_left_alone(fresh):
    (fresh / "out").mkdir()
    (fresh / "out" / "notes.txt").write_text("mine")
    called = call("train", "run.yaml", cwd=fresh)
    assert called.code == 2
    assert "out holds files but no run.yaml; choose an empty or a new folder" in called.error
    assert [path.name for path in (fresh / "out").iterdir()] == ["notes.txt"]


def test_empty_folder_is_used(fresh):
    (fresh / "out").mkdir()
    called = call("train", "run.yaml", "train.max_steps=2", cwd=fresh)
    assert called.code == 0, called.err


def test_early_stopping_exports_the_best_checkpoint(fresh):
    # so small a learning rate changes the weights, but no prediction: the first evaluation stays the best
    changes = [
        "train.learning_rate=1e-7",
        "train.warmup_steps=0",
        "train.max_steps=20",
        "early_stopping.patience=1",
    ]
    called = call("train", "run.yaml", *changes, cwd=fresh)
    assert called.code == 0, called.err
    assert results(fresh)["timings"]["steps"] == 4
    assert results(fresh)["selection"] == "best dev checkpoint by accuracy"
    assert steps(fresh) == ["checkpoint-2", "checkpoint-4"]
    best, last = (weights(fresh / "out" / "checkpoints" / name) for name in steps(fresh))
    assert not same(best, last)
    assert same(weights(fresh / "out" / "model"), best)


def test_run_without_evaluations_exports_the_last_step(fresh):
    changes = ["train.eval_strategy=no", "train.max_steps=4"]
    called = call("train", "run.yaml", *changes, cwd=fresh)
    assert called.code == 0, called.err
    assert results(fresh)["selection"] == "last step"
    assert same(weights(fresh / "out" / "model"), weights(fresh / "out" / "checkpoints" / "checkpoint-4"))


# -- going on


def test_truncated_checkpoint_falls_back_to_the_one_before(first, finished, caplog):
    unfinish(finished, keep=(2, 4, 6))
    newest = finished / "out" / "checkpoints" / "checkpoint-6" / "model.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    called = call("train", "run.yaml", cwd=finished)
    assert called.code == 0, called.err
    assert "resuming from out/checkpoints/checkpoint-4" in called.out
    warned = caplog.text + called.err
    assert "checkpoint-6 is not whole (model.safetensors has" in warned
    assert "step 5/6" in called.out
    assert "step 4/6 epoch 0.50  loss" not in called.out
    assert all(damage(path) is None for path in checkpoints(finished / "out" / "checkpoints"))
    original = first[0]
    assert results(finished)["metrics"] == results(original)["metrics"]
    assert results(finished)["timings"]["resumed"] is True
    assert same(weights(finished / "out" / "model"), weights(original / "out" / "model"))
    assert same(weights(newest.parent), weights(original / "out" / "checkpoints" / "checkpoint-6"))


def test_damaged_best_checkpoint_is_not_passed_off_as_the_best(first, finished, caplog):
    """The newest is whole, the best one it would export at the end is not: back to where that one was written."""
    unfinish(finished, keep=(2, 4, 6))
    folder = finished / "out" / "checkpoints"
    state = folder / "checkpoint-6" / "trainer_state.json"
    best = Path(json.loads(state.read_text())["best_model_checkpoint"]).name
    spoilt = folder / best / "model.safetensors"
    os.truncate(spoilt, spoilt.stat().st_size // 2)
    called = call("train", "run.yaml", cwd=finished)
    assert called.code == 0, called.err
    assert best in caplog.text + called.err
    assert results(finished)["metrics"] == results(first[0])["metrics"]
    assert same(weights(finished / "out" / "model"), weights(first[0] / "out" / "model"))


def test_run_without_a_whole_checkpoint_starts_anew(first, finished, caplog):
    unfinish(finished, keep=(2,))
    (finished / "out" / "checkpoints" / "checkpoint-2" / "manifest.json").unlink()
    called = call("train", "run.yaml", cwd=finished)
    assert called.code == 0, called.err
    assert "resuming" not in called.out
    assert "manifest.json is missing" in caplog.text + called.err
    assert same(weights(finished / "out" / "model"), weights(first[0] / "out" / "model"))


LIMITED = """
import os, resource, sys
os.chdir(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
sys.argv[0] = "dist-reg"
from dist_reg.cli import main
main()
"""


@pytest.mark.parametrize("full", ["model.safetensors", "optimizer.pt"])
def test_disk_full_while_saving(finished, full):
    unfinish(finished, keep=(2,))
    folder = finished / "out" / "checkpoints"
    sizes = {
        name: (folder / "checkpoint-2" / name).stat().st_size
        for name in ("model.safetensors", "optimizer.pt")
    }
    assert sizes["optimizer.pt"] > 1.5 * sizes["model.safetensors"]
    limit = (
        sizes["model.safetensors"] // 2
        if full == "model.safetensors"
        else int(1.2 * sizes["model.safetensors"])
    )
    done = run(["-c", LIMITED, str(finished), str(limit), "train", "run.yaml"], timeout=200)
    called = Called(done.returncode, done.stdout, done.stderr)
    assert called.code == 2, called.err
    assert "checkpoint-4 could not be written (" in called.error
    assert "checkpoint-2 is the last whole one" in called.error
    assert steps(finished) == ["checkpoint-2"]
    assert damage(folder / "checkpoint-2") is None
    assert not [path for path in (finished / "out").rglob("*") if ".partial" in str(path) and path.is_file()]
    assert not (finished / "out" / "results.json").exists()
    assert not (finished / "out" / "model").exists()
    resumed = call("train", "run.yaml", cwd=finished)
    assert resumed.code == 0, resumed.err
    assert "resuming from out/checkpoints/checkpoint-2" in resumed.out


def test_disk_full_while_exporting(finished):
    """The last checkpoint is there, the model is not yet: the run is unfinished and says so."""
    unfinish(finished, keep=(2, 4, 6))
    size = (finished / "out" / "checkpoints" / "checkpoint-6" / "model.safetensors").stat().st_size
    done = run(["-c", LIMITED, str(finished), str(size // 2), "train", "run.yaml"], timeout=200)
    called = Called(done.returncode, done.stdout, done.stderr)
    assert called.code == 2, called.err
    assert "model" in called.error
    assert not (finished / "out" / "results.json").exists()
    assert not [
        path for path in (finished / "out").iterdir() if "partial" in path.name or path.name == "model"
    ]


def family(process: subprocess.Popen) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def long_run(root: Path) -> list[str]:
    """Overrides that make `run.yaml` a run without end, in any working directory."""
    absolute = [f"model={root / 'model'}", f"data.data_dir={root}", f"train.output_dir={root / 'out'}"]
    return [*absolute, "train.max_steps=100000", "train.eval_strategy=no", "train.save_strategy=no"]


@contextlib.contextmanager
def training(root: Path, processes: int = 1, *overrides: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A long run as processes of their own, past its first steps, and its output's file."""
    log = root / "screen.log"
    arguments = ["-m", "dist_reg", "train", str(root / "run.yaml"), *long_run(root), *overrides]
    process = start(arguments, processes, log=log)
    try:
        deadline = time.monotonic() + 200
        while not (root / "out" / "log.jsonl").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        yield process, log
    finally:
        kill(process)


def test_interrupt_during_training(fresh):
    with training(fresh) as (process, log):
        alive = family(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        _, left = psutil.wait_procs(alive, timeout=10)
    text = log.read_text()
    assert not left
    assert "Traceback" not in text
    assert text.splitlines()[-1] == "interrupted"
    assert not (fresh / "out" / "results.json").exists()


def test_interrupt_of_two_processes_under_torchrun(fresh):
    """Ctrl-C reaches the whole foreground group: launcher and workers."""
    with training(fresh, 2, "deepspeed=zero2") as (process, log):
        alive = family(process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=90) != 0
        _, left = psutil.wait_procs(alive, timeout=20)
    text = log.read_text()
    assert not left, text
    assert not (fresh / "out" / "results.json").exists()
    assert "dist_reg/" not in text, text  # the launcher may trace itself; no worker does


# -- mistakes


BAD: dict[str, tuple[list[str], str]] = {
    "unknown key": (["metods=[]"], "unknown key 'metods'; did you mean 'methods'?"),
    "unknown data key": (["data.trian=x"], "unknown key 'data.trian'; did you mean 'data.train'?"),
    "unknown training field": (["train.lerning_rate=1"], "did you mean 'learning_rate'?"),
    "renamed training field": (["train.warmup_ratio=0.1"], "use warmup_steps"),
    "unknown method": (["methods=[hyppe]"], "unknown method 'hyppe'; did you mean 'hype'?"),
    "unknown task": (["task=clasification"], "did you mean 'classification'?"),
    "no layer": (["methods.hype.layers=7-9"], "'7-9' is out of range; the model has 3 layer(s)"),
    "negative sigma": (["methods.hype.sigma=-1"], "sigma must be a finite number >= 0"),
    "sigma nan": (["methods.hype.sigma=.nan"], "sigma must be a finite number >= 0"),
    "missing data": (["data.train=trian.jsonl"], "trian.jsonl does not exist; did you mean 'train.jsonl'?"),
    "data is a folder": (["data.train=model"], "model"),
    "absent column": (["data.label=lable"], "no column 'lable'; did you mean 'label'?"),
    "empty label": (["data.train=empty label.jsonl"], "empty label.jsonl, line 2: the label (column 'label') is empty"),
    "unseen label": (["data.dev=unseen label.jsonl"], "has the label '7', which training does not know"),
    "empty data": (["data.train=empty.jsonl"], "empty.jsonl is empty (0 bytes)"),
    "torn row": (["data.train=torn.jsonl"], "torn.jsonl, line 3: not valid JSON"),
    "too many samples": (["data.train_samples=65"], "train.jsonl holds 64 rows, fewer than the 65"),
    "missing model": (["model=./modle"], "folder ./modle does not exist; did you mean 'model'?"),
    "hub model offline": (["model=google-bert/bert-base-uncased"], "(offline)"),
    "model is a file": (["model=train.jsonl"], "train.jsonl"),
    "unknown configuration": (["model.config.hidden_dropout=0"], "did you mean 'hidden_dropout_prob'?"),
    "wrong configuration": (["model.config.hidden_dropout_prob=x"], "hidden_dropout_prob"),
    "other sizes": (["model.config.hidden_size=64"], "model"),
    "labels of the task": (["model.config.num_labels=5"], "num_labels"),
    "layers path": (["model.layers_path=foo.bar"], "bert.encoder.layer"),
    "longer than the model": (["data.max_length=1000"], "max_length"),
    "optimizer under ZeRO": (["deepspeed=zero3", "train.optim=adafactor"], "ZeRO-3 cannot shard 'adafactor'"),
    "unknown deepspeed": (["deepspeed=zero9"], "unknown configuration 'zero9'; did you mean 'zero"),
    "missing deepspeed": (["deepspeed=./zero2.json"], "./zero2.json does not exist"),
    "batch": (["train.gradient_accumulation_steps=3"], "batch_size 8 is not"),
    "micro-batch 0": (["train.per_device_train_batch_size=0"], "batch"),
    "seed text": (["train.seed=x"], "seed"),
    "seed negative": (["train.seed=-1"], "seed"),
    "learning rate text": (["train.learning_rate=fast"], "learning_rate"),
    "learning rate negative": (["train.learning_rate=-1"], "learning_rate"),
    "steps text": (["train.max_steps=many"], "max_steps"),
    "clipping text": (["train.max_grad_norm=x"], "max_grad_norm"),
    "evaluation batch 0": (["train.per_device_eval_batch_size=0"], "per_device_eval_batch_size"),
    "unknown metric": (["train.metric_for_best_model=acuracy"], "metric_for_best_model"),
    "stopping without evaluation": (["early_stopping.patience=2", "train.eval_strategy=no"], "early_stopping"),
    "patience negative": (["early_stopping.patience=-1"], "patience"),
    "scheduler options": (["train.lr_scheduler_kwargs=3"], "lr_scheduler_kwargs"),
    "upload while offline": (["train.push_to_hub=true"], "error: train.push_to_hub"),
    "empty name of a file": (["data.train=''"], "data.train"),
    "0 steps": (["train.max_steps=0"], "max_steps"),
    "0 epochs": (["train.max_steps=-1", "train.num_train_epochs=0"], "num_train_epochs"),
    "misspelt required key": (["early_stopping.patence=1"], "unknown key 'early_stopping.patence'; did you mean"),
    "unknown scheduler option": (["train.lr_scheduler_kwargs={foo: 3}"], "foo"),
    "unknown logger": (["train.report_to=foo"], "foo"),
    "unknown log level": (["train.log_level=foo"], "foo"),
    "adam beta": (["train.adam_beta1=2"], "beta"),
    "fsdp": (["train.fsdp=full_shard"], "train.fsdp"),
    "loader workers": (["train.dataloader_num_workers=-1"], "dataloader_num_workers"),
    "metrics by batch": (["train.batch_eval_metrics=true"], "batch_eval_metrics"),
    "missing logger": (["train.report_to=wandb"], "wandb"),
    "missing optimizer": (["train.optim=lomo"], "lomo"),
    "output a list": (["train.output_dir=[a]"], "output_dir"),
    "output nothing": (["train.output_dir="], "output_dir"),
    "output below a file": (["train.output_dir=dev.jsonl/run"], "output_dir"),
    "output a file": (["train.output_dir=dev.jsonl"], "dev.jsonl is a file; give a folder"),
    "output cannot be created": (["train.output_dir=/proc/run"], "output_dir"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_inputs(inputs, tmp_path_factory) -> Path:
    root = shutil.copytree(inputs, tmp_path_factory.mktemp("bad") / "inputs")
    rows = (root / "train.jsonl").read_text().splitlines()
    (root / "empty.jsonl").write_text("")
    (root / "empty label.jsonl").write_text(
        "\n".join([rows[0], '{"text": "x", "label": ""}', rows[1]]) + "\n"
    )
    (root / "unseen label.jsonl").write_text("\n".join([rows[0], '{"text": "x", "label": 7}']) + "\n")
    (root / "torn.jsonl").write_text("\n".join([*rows[:2], rows[2][:20], *rows[3:]]) + "\n")
    return root


@pytest.mark.parametrize("name", BAD)
def test_mistake_is_one_sentence_and_leaves_nothing(bad_inputs, name):
    overrides, expected = BAD[name]
    before = {path for path in bad_inputs.rglob("*") if path.is_file()}
    try:
        called = call("train", "run.yaml", *overrides, cwd=bad_inputs)
        left = sorted(str(path) for path in bad_inputs.iterdir() if path.name in ("out", "runs"))
    finally:
        for folder in ("out", "runs"):
            shutil.rmtree(bad_inputs / folder, ignore_errors=True)
    assert called.code == 2
    assert expected in called.error
    assert not left
    assert {path for path in bad_inputs.rglob("*") if path.is_file()} == before


def test_missing_run_file(bad_inputs):
    called = call("train", "runn.yaml", cwd=bad_inputs)
    assert called.code == 2
    assert "run file runn.yaml does not exist; did you mean 'run.yaml'?" in called.error


def test_run_file_is_a_folder(bad_inputs):
    called = call("train", "model", cwd=bad_inputs)
    assert called.code == 2
    assert "model" in called.error


def test_mistake_in_a_process_of_its_own(bad_inputs):
    """The same through a real process: nothing but the sentence on stderr, libraries' warnings apart."""
    code = "import os, sys; os.chdir(sys.argv.pop(1)); from dist_reg.cli import main; main()"
    done = run(["-c", code, str(bad_inputs), "train", "run.yaml", "methods.hype.layers=7-9"], timeout=120)
    called = Called(done.returncode, done.stdout, done.stderr)
    assert called.code == 2
    assert "'7-9' is out of range" in called.error
    assert not (bad_inputs / "out").exists()
    assert str(ROOT) not in called.err


def test_a_run_killed_after_its_last_checkpoint_takes_no_further_step(finished):
    """7 steps are no whole number of epochs; the resumed run evaluates and exports what the checkpoint holds."""
    results = finished / "out" / "results.json"
    before = json.loads(results.read_text())
    results.unlink()
    called = call("train", "run.yaml", cwd=finished)
    assert called.code == 0, called.err
    after = json.loads(results.read_text())
    assert after["timings"]["steps"] == before["timings"]["steps"]
    assert after["metrics"] == before["metrics"]


def test_another_number_of_processes_is_refused_under_deepspeed(finished):
    (finished / "out" / "results.json").unlink()
    for path in (finished / "out" / "checkpoints").glob("checkpoint-*/manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, "processes": 3}))
    saved = read_yaml(finished / "out" / "run.yaml")
    write_yaml({**saved, "deepspeed": "zero2"}, finished / "out" / "run.yaml")
    called = call("train", "run.yaml", "deepspeed=zero2", cwd=finished)
    assert called.code == 2
    assert "was written by 3 processes and this run has 1" in called.error


def test_eval_of_a_model_without_a_trained_head_is_refused(finished, tmp_path):
    save_tiny(tmp_path / "bare", "bert", head="base")
    called = call("eval", str(tmp_path / "bare"), "--run", "run.yaml", cwd=finished)
    assert called.code == 2
    assert "holds no trained classifier" in called.error


def test_scores_for_a_folder_that_is_not_there(finished):
    called = call("eval", "out", "--out", "nowhere/scores.json", cwd=finished)
    assert called.code == 2
    assert "nowhere/scores.json" in called.error


def test_disk_full_while_logging(fresh):
    """The resolved run file still fits, the log does not."""
    longer = ["train.save_strategy=no", "train.max_steps=30"]
    done = run(["-c", LIMITED, str(fresh), "1500", "train", "run.yaml", *longer], timeout=120)
    called = Called(done.returncode, done.stdout, done.stderr)
    assert called.code == 2, called.err
    assert "log.jsonl" in called.error


def test_disk_full_at_the_very_start_does_not_block_the_folder(fresh):
    done = run(["-c", LIMITED, str(fresh), "300", "train", "run.yaml"], timeout=120)
    called = Called(done.returncode, done.stdout, done.stderr)
    assert called.code == 2, called.err
    assert "out cannot be written: File too large" in called.error
    assert call("train", "run.yaml", cwd=fresh).code == 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rte=1", "unknown key 'learning_rte'"),
        ("deepspeed=zero9", "unknown configuration 'zero9'"),
        ("task=clasification", "did you mean 'classification'?"),
        ("data.train=trian.jsonl", "trian.jsonl does not exist"),
    ],
)
def test_a_typo_in_a_folder_with_a_run_is_named_as_such(finished, override, expected):
    called = call("train", "run.yaml", override, cwd=finished)
    assert called.code == 2
    assert expected in called.error


def test_a_run_that_failed_before_its_first_step_does_not_keep_the_folder(fresh, monkeypatch):
    def broken(*_):
        raise RuntimeError("no step was taken")

    with monkeypatch.context() as patch:
        patch.setattr("dist_reg.run.train_in", broken)
        with pytest.raises(RuntimeError, match="no step was taken"):
            call("train", "run.yaml", "train.learning_rate=1e-5", cwd=fresh)
    assert call("train", "run.yaml", cwd=fresh).code == 0


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"metrics": 3}'])
def test_damaged_results_are_named(finished, content):
    (finished / "out" / "results.json").write_text(content)
    called = call("train", "run.yaml", cwd=finished)
    assert called.code == 2
    assert "results.json is damaged; remove it" in called.error


@pytest.mark.parametrize("override", ["train.learning_rate=1", "model=nope", "methods.hype.sigma=3"])
def test_eval_refuses_overrides_that_it_would_ignore(finished, override):
    called = call("eval", "out", override, cwd=finished)
    assert called.code == 2
    assert f"{override.partition('=')[0]} has no effect on an evaluation" in called.error


def test_eval_of_inputs_longer_than_the_model(finished):
    called = call("eval", "out", "data.max_length=1000", cwd=finished)
    assert called.code == 2
    assert "data.max_length is 1000, but the model takes at most" in called.error


def test_home_folders_are_understood(fresh, monkeypatch):
    monkeypatch.setenv("HOME", str(fresh))
    called = call("train", "run.yaml", "train.output_dir=~/mine", "data.train=~/train.jsonl", cwd=fresh)
    assert called.code == 0, called.err
    assert (fresh / "mine" / "results.json").is_file()
    assert not (fresh / "~").exists()


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(fresh):
    with training(fresh) as (process, log):
        second = run(["-m", "dist_reg", "train", str(fresh / "run.yaml"), *long_run(fresh)], timeout=60)
        called = Called(second.returncode, second.stdout, second.stderr)
        assert called.code == 2
        assert "another process" in called.error
        assert process.poll() is None, log.read_text()
        logged = (fresh / "out" / "log.jsonl").stat().st_size
        time.sleep(1)
        assert (fresh / "out" / "log.jsonl").stat().st_size > logged


HIRE_RUN = ("methods=[hire]", "train.output_dir=hire", "train.max_steps=3")


def test_a_run_whose_method_stays_in_the_model(fresh):
    """Trained, exported, evaluated to the digit, reported with its gates, and gone on with from the export."""
    done = call("train", "run.yaml", *HIRE_RUN, cwd=fresh)
    assert done.code == 0, done.err
    scores = results(fresh, "hire")["metrics"]
    for target in ("hire", "hire/model"):
        evaluated = call("eval", target, "--out", "scores.json", cwd=fresh)
        assert evaluated.code == 0, evaluated.err
        assert json.loads((fresh / "scores.json").read_text()) == scores
    assert "dist_reg.load" in (fresh / "hire" / "model" / "README.md").read_text()

    reported = call("report", "hire", cwd=fresh)
    assert reported.code == 0
    assert (fresh / "hire" / "report.layers.png").is_file()

    on = ("model=hire/model", "train.output_dir=on", "train.max_steps=2")
    silent = call("train", "run.yaml", *on, cwd=fresh)
    assert silent.code != 0
    assert "methods: hire/model has hire, which stays in it; list it" in silent.err
    other = call("train", "run.yaml", *on, "methods=[{hire: {combine: difference}}]", cwd=fresh)
    assert other.code != 0
    assert "this model has hire with combine: sum, and combine: difference is asked for" in other.err
    assert not (fresh / "on").exists()
    again = call("train", "run.yaml", *on, "methods=[hire, hype]", cwd=fresh)
    assert again.code == 0, again.err


def test_eval_of_an_export_without_its_description(fresh):
    assert call("train", "run.yaml", *HIRE_RUN, cwd=fresh).code == 0
    (fresh / "hire" / "model" / "dist_reg.json").unlink()
    done = call("eval", "hire", cwd=fresh)
    assert done.code != 0
    assert "holds weights of a method" in done.err
    assert "no dist_reg.json" in done.err
    assert "Traceback" not in done.err
