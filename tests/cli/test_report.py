"""`dist-reg report` as a user calls it."""

from __future__ import annotations

import io

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from dist_reg.cli.report import WIDTH, command, show
from dist_reg.errors import UserError
from dist_reg.report.comparison import TESTS
from tests.report.made import HYPE, SETTINGS, log, result, scored, store

METHOD = {"methods": [{"hype": {**HYPE, "layers": [0, 1], "sigma": 0.01}}]}


def report(*arguments) -> str:
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.fixture
def folder(tmp_path):
    runs = [*scored([0.8, 0.82, 0.78]), *scored([0.81, 0.84, 0.8], **METHOD)]
    return store(tmp_path / "two words", runs, {0: log([{"step": 10, "loss": 0.5}])})


def test_the_table_and_the_files(folder):
    out = report(folder)
    lines = out.splitlines()
    assert lines[0] == "sst2, bert-base, 500 examples: accuracy, %"
    assert "hype sigma 0.01 layers [0, 1]" in " ".join(out.split())
    assert "+1.7 [+0.2, +3.1]  0.038*" in out
    assert "p: two-sided paired t-test, not corrected; * p < 0.05" in " ".join(out.split())
    assert max(map(len, lines[:-1])) <= WIDTH
    for path in (
        "report.csv",
        "report.md",
        "report.tex",
        "report.png",
        "report.curves.csv",
        "report.curves.png",
    ):
        assert path in lines[-1]
        assert (folder / path).is_file()
    assert str(folder) in lines[-1]


def test_long_labels_of_many_sets_fit_the_screen(tmp_path):
    sets = {name: {"accuracy": 0.8} for name in ("dev", "mismatched", "out_of_domain_news")}
    methods = [
        {"hype": {**HYPE, "layers": [0, 1, 2, 3], "sigma": 0.001}},
        {"lnsr": {"layer": 3, "weight": 0.25}},
    ]
    runs = [*scored([0.8, 0.82]), *scored([0.81, 0.84], methods=methods, metrics=sets)]
    lines = report(store(tmp_path, runs)).splitlines()
    assert max(map(len, lines[:-1])) <= WIDTH
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_figure_is_cut_on_a_narrow_screen(folder, monkeypatch, width):
    screen = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    monkeypatch.setattr("dist_reg.cli.report.Console", lambda: screen)
    show(folder)
    lines = screen.file.getvalue().splitlines()
    table = " ".join(" ".join(lines[: lines.index("")]).split())
    for text in ("hype", "81.7", "84.0", "+1.7", "[+0.2,", "+3.1]", "0.038*", "10"):
        assert text in table
    assert max(map(len, lines[: lines.index("")])) <= width


def test_another_folder_for_the_files(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    out = tmp_path / "new folder" / "report"
    assert f"written to {out}: report.csv" in report(folder, "--out", out)
    assert sorted(folder.rglob("*")) == before
    assert (out / "report.tex").is_file()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--out: folder .*file cannot be created"):
        report(folder, "--out", tmp_path / "file")


@pytest.mark.parametrize("test", [*TESTS, "none"])
def test_tests(folder, test):
    out = report(folder, "--test", test)
    assert ("difference [95 %]" in out) == (test != "none")
    assert ("paired bootstrap" in out) == (test == "bootstrap")


def test_the_tests_that_can_be_chosen_are_those_there_are():
    (option,) = (option for option in command.params if option.name == "test")
    assert isinstance(option.type, click.Choice)
    assert set(option.type.choices) == {*TESTS, "none"}


def test_options_that_contradict_or_do_not_exist(folder):
    with pytest.raises(UserError, match="--baseline hype is for a comparison, and --test none asks for none"):
        report(folder, "--test", "none", "--baseline", "hype")
    with pytest.raises(UserError, match="no group is called 'plane'; did you mean 'plain'?"):
        report(folder, "--baseline", "plane")
    with pytest.raises(UserError, match="no group is called ''; known: hype"):
        report(folder, "--baseline", "")
    assert "'t-test', 'bootstrap', 'none'" in report(folder, "--test", "u-test")
    assert not (folder / "report.csv").exists()


def test_settings_that_differ_are_refused_unless_told(tmp_path):
    store(tmp_path, [result(0.8), result(0.7, settings={**SETTINGS, "batch_size": 8}, **METHOD)])
    with pytest.raises(UserError, match="batch_size is 16 in .*run 00 and 8 in .*run 01"):
        report(tmp_path)
    assert not (tmp_path / "report.csv").exists()
    assert "plain, batch_size 16" in report(tmp_path, "--mix")


def test_unfinished_runs_are_counted(folder):
    (folder / "killed").mkdir()
    for name in ("run.yaml", "log.jsonl"):
        (folder / "killed" / name).write_text("")
    assert "run folders without results, passed over: 1." in report(folder)
