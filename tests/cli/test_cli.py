"""The command line itself: help without waiting, unknown words, the screens of `methods` and `doctor`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from unittest import mock

import pytest

from dist_reg import __version__
from dist_reg.cli import COMMANDS, run_command
from dist_reg.methods import METHODS
from tests.distributed.launch import run
from tests.tiny import save_tiny

IMPORTED = """
import json, sys
from dist_reg.cli import main
sys.argv[0] = "dist-reg"
try:
    main()
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]))
"""


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["dist-reg", *arguments]),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = run_command()
    return code, out.getvalue(), err.getvalue()


def words(text: str) -> str:
    """`text` with its line breaks and columns' padding made single spaces."""
    return " ".join(text.split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["methods"], ["methods", "hype"], ["train", "--help"]]
)
def test_answers_without_importing_torch(arguments):
    done = run(["-c", IMPORTED, *arguments], timeout=120)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    for heavy in ("torch", "transformers", "numpy", "deepspeed", "numba", "datasets", "matplotlib"):
        assert heavy not in modules


def test_mistakes_in_a_run_file_do_not_wait_for_torch(tmp_path):
    (tmp_path / "run.yaml").write_text("model: bert\nmetods: []\n")
    code = f"import sys; sys.argv = ['dist-reg', 'train', {str(tmp_path / 'run.yaml')!r}]\n" + IMPORTED
    done = run(["-c", code], timeout=120)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 2
    assert "did you mean 'methods'?" in done.stderr
    assert "torch" not in modules


def test_help_names_every_command():
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for name, summary in COMMANDS.items():
        assert f"{name} " in out
        assert summary in words(out)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert "Usage" in out
    assert len(words(out)) > 80


def test_version():
    code, out, _ = call("--version")
    assert code == 0
    assert __version__ in out


MISTAKES = {
    "unknown command": (["tran"], "unknown command 'tran'; did you mean 'train'?"),
    "far from every command": (["xyzzy"], "unknown command 'xyzzy'; known: bench, demo"),
    "unknown option": (["--nope"], "--nope"),
    "unknown option of a command": (["train", "run.yaml", "--lr", "3"], "--lr"),
    "no run file": (["train"], "RUN.yaml"),
    "unknown method": (["methods", "hyppe"], "unknown method 'hyppe'; did you mean 'hype'?"),
    "two methods": (["methods", "hype", "other"], "other"),
    "unknown benchmark": (["bench", "stepp"], "did you mean 'step'?"),
    "missing report folder": (["report", "nowhere"], "report: folder nowhere does not exist"),
    "missing model": (["eval", "nowhere"], "nowhere does not exist"),
    "processes 0": (["demo", "--processes", "0"], "processes"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, expected = MISTAKES[name]
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert expected in err
    assert not list(tmp_path.iterdir())


def test_folder_for_the_demo_that_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    code, _, err = call("demo", "--out", "taken")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert "taken" in err
    assert (tmp_path / "taken").read_text() == "mine"


def test_methods_lists_every_method():
    code, out, _ = call("methods")
    assert code == 0
    for name, method in METHODS.items():
        assert name in out
        assert method.summary in words(out)
        assert method.source in words(out)


@pytest.mark.parametrize("name", METHODS)
def test_options_of_a_method_come_with_default_and_meaning(name):
    from dist_reg.cli.methods import field_docs

    code, out, _ = call("methods", name)
    assert code == 0
    assert METHODS[name].source in words(out)
    docs = field_docs(METHODS[name])
    for option in dataclasses.fields(METHODS[name]):
        line = next(line for line in out.splitlines() if line.startswith(f"{option.name} "))
        assert str(option.default) in line
        assert len(docs[option.name]) > 10
        assert docs[option.name] in words(out)


def test_doctor_speaks_of_every_topic():
    code, out, err = call("doctor")
    assert code in (0, 1)
    assert "Traceback" not in out + err
    topics = (
        "versions", "accelerator", "noise kernels", "DeepSpeed", "communication", "SLURM", "memory", "hub", "minilm",
    )  # fmt: skip
    for topic in topics:
        assert any(line.startswith(f"{topic} ") for line in out.splitlines()), topic
    assert code == (1 if "missing" in out else 0)


def test_doctor_says_what_to_install(monkeypatch):
    import importlib.metadata

    original = importlib.metadata.version

    def version(name):
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    code, out, _ = call("doctor")
    assert code == 1
    assert "pip install deepspeed" in words(out)


@pytest.mark.parametrize("arguments", [[], ["bench"]], ids=["dist-reg", "bench"])
def test_without_a_command_the_help_is_readable(arguments):
    code, _, err = call(*arguments)
    assert code == 2
    assert err.splitlines()[0].startswith("Usage: ")
    assert "Commands:" in err.splitlines()


def test_methods_of_the_step_benchmark_take_options_by_name():
    code, _, err = call("bench", "step", "--methods", "hype: 3")
    assert code == 2
    assert "methods.hype takes options by name" in err


def test_step_benchmark_of_more_tokens_than_the_model_has(tmp_path):
    save_tiny(tmp_path / "model", num_labels=2)
    code, _, err = call("bench", "step", "--model", str(tmp_path / "model"), "--length", "1000")
    assert code == 2
    assert "--length is 1000, but the model takes at most" in err


def test_step_benchmark_to_its_table(tmp_path):
    save_tiny(tmp_path / "model", num_labels=2)
    options = ["--model", str(tmp_path / "model"), "--length", "8", "--batch-size", "2", "--steps", "3"]
    code, out, err = call("bench", "step", *options, "--out", str(tmp_path / "out"))
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / "step.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["plain", "plain, no dropout", "hype, no dropout", "hype"]
    for row in rows:
        assert row["variant"] in out
        assert row["quartile_low_ms"] <= row["median_ms"] <= row["quartile_high_ms"]


def test_demo_needs_processes_that_divide_its_batch(tmp_path):
    code, _, err = call("demo", "--processes", "3", "--out", str(tmp_path / "demo"))
    assert code == 2
    assert "--processes must divide the batch of 32 examples; it is 3" in err
    assert not (tmp_path / "demo").exists()
