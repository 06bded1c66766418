"""The files of a report: whole or not there, and readable by what reads such files."""

from __future__ import annotations

import csv

import pytest
from matplotlib.image import imread

from dist_reg.errors import UserError
from dist_reg.report import plots, read_runs, summarise, write
from dist_reg.report.rows import rows
from tests.report.made import HYPE, log, result, scored, store

NAMES = ["report.csv", "report.md", "report.tex", "report.png"]
METHOD = {"methods": [{"hype": HYPE}]}


def drawn(path):
    picture = imread(path)
    assert picture.ndim == 3
    assert min(picture.shape[:2]) > 100
    assert picture[..., :3].std() > 0.01  # something is drawn on it


@pytest.fixture
def folder(tmp_path):
    return store(tmp_path / "two words", [*scored([0.8, 0.81]), *scored([0.84, 0.86, 0.9], **METHOD)])


def test_written_files(folder):
    summary = summarise(read_runs(folder))
    paths = write(summary, folder)
    assert [path.name for path in paths] == NAMES
    assert all(path.parent == folder for path in paths)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(NAMES)

    with paths[0].open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    for row, expected in zip(found, rows(summary), strict=True):
        assert list(row)[-1] == "train_seconds"
        for key, value in expected.items():
            text = row[key]
            assert text == "" if value is None else text == str(value)
            assert not isinstance(value, float) or float(text) == value
    assert paths[1].read_text(encoding="utf-8").startswith("**sst2, bert-base, 500 examples")
    assert r"\toprule" in paths[2].read_text(encoding="utf-8")
    drawn(paths[3])


def test_a_report_is_not_read_as_a_result_and_can_be_written_again(folder):
    for _ in range(2):
        runs = read_runs(folder)
        assert len(runs) == 5
        write(summarise(runs), folder)


def test_learning_curves(tmp_path):
    logs = {
        at: log([{"step": step, "loss": 1 / step, "eval_accuracy": 0.7} for step in (1, 2, 3)])
        for at in (0, 1)
    }
    store(tmp_path, scored([0.8, 0.81]), logs)
    paths = write(summarise(read_runs(tmp_path)), tmp_path)
    assert [path.name for path in paths[4:]] == ["report.curves.csv", "report.curves.png"]
    with paths[4].open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 6
    assert found[2] == {
        "task": "sst2", "model": "bert-base", "examples": "500", "methods": "plain", "quantity": "training loss",
        "step": "3", "runs": "2", "mean": str(1 / 3), "std": "0.0",
    }  # fmt: skip
    drawn(paths[5])


def test_what_runs_logged_for_every_layer_is_drawn(tmp_path):
    gates = [{"hire/gate_1": 0.2 + seed, "hire/gate_2": 0.4, "task_loss": 0.3} for seed in (0, 1)]
    runs = [result(0.8, seed=seed, methods=[{"hire": {}}], terms=terms) for seed, terms in enumerate(gates)]
    broken = result(0.8, seed=3, methods=[{"hire": {}}], terms={"hire/gate_1": float("nan")})
    store(tmp_path, [*runs, broken, result(0.7)])
    summary = summarise(read_runs(tmp_path))
    curves = plots.by_layer([table.block for table in summary.tables])
    assert curves == {"hire/gate": {"hire, sst2, bert-base, 500 examples": {1: [0.2, 1.2], 2: [0.4, 0.4]}}}
    paths = write(summary, tmp_path)
    assert [path.name for path in paths][-1] == "report.layers.png"
    drawn(paths[-1])


def test_scores_by_the_number_of_examples(tmp_path):
    runs = [
        *scored([0.5, 0.6], train_examples=100),
        *scored([0.8, 0.9], train_examples=1000),
        *scored([0.7], task="cola"),
    ]
    runs += scored([0.4, 0.6], train_examples=100, **METHOD)
    store(tmp_path, runs)
    summary = summarise(read_runs(tmp_path))
    (figure,) = plots.example_figures([table.block for table in summary.tables])
    (axis,) = figure.get_axes()
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("training examples", "dev: accuracy, %")
    curves = {drawn.get_label(): drawn[0].get_xydata().tolist() for drawn in axis.containers}
    assert curves == {
        "plain": [[100, pytest.approx(55)], [1000, pytest.approx(85)]],
        "hype": [[100, pytest.approx(50)]],
    }
    paths = write(summary, tmp_path)
    assert [path.name for path in paths] == [*NAMES, "report.examples.png"]
    drawn(paths[-1])


def test_every_point_lies_in_its_panel(tmp_path):
    mcc = {"main_metric": "mcc", "task": "cola"}
    number = {"main_metric": "perplexity", "main_metric_scale": "number", "greater_is_better": False}
    store(tmp_path, [*scored([-0.4, -0.3], **mcc), *scored([3000.0, 12.5], **number), result(0.8)])
    blocks = [table.block for table in summarise(read_runs(tmp_path)).tables]
    axes = [
        axis for figure in plots.score_figures(blocks) for axis in figure.get_axes() if axis.get_visible()
    ]
    limits = {axis.get_xlabel(): axis.get_xlim() for axis in axes}
    assert set(limits) == {"dev: mcc, %", "dev: perplexity", "dev: accuracy, %", "ood: accuracy, %"}
    for name, (least, most) in {"dev: mcc, %": (-40, -30), "dev: perplexity": (12.5, 3000)}.items():
        assert limits[name][0] <= least
        assert limits[name][1] >= most


def test_a_label_of_mathematics_and_many_tables_are_drawn(tmp_path):
    runs = [result(0.8, task=f"task {number}", methods=[{r"$\frac$ _^": {}}]) for number in range(8)]
    logs = {number: log([{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan")}]) for number in range(2)}
    store(tmp_path, runs, logs)
    for path in write(summarise(read_runs(tmp_path)), tmp_path):
        if path.suffix == ".png":
            drawn(path)


@pytest.mark.parametrize("name", [*NAMES])
def test_a_file_that_cannot_be_written(folder, name):
    (folder / name).mkdir()
    (folder / name / "mine").write_text("kept")
    with pytest.raises(UserError, match=f"report: .*{name} cannot be written: Is a directory; --out"):
        write(summarise(read_runs(folder)), folder)
    assert (folder / name / "mine").read_text() == "kept"
    assert not list(folder.glob(".report*"))


def test_an_interrupted_report_leaves_the_old_one(folder, monkeypatch):
    write(summarise(read_runs(folder)), folder)
    before = {name: (folder / name).read_bytes() for name in NAMES}

    def interrupted(summary):
        raise KeyboardInterrupt

    monkeypatch.setattr("dist_reg.report.text.markdown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(summarise(read_runs(folder)), folder)
    assert {name: (folder / name).read_bytes() for name in NAMES} == before
    assert not list(folder.glob(".report*"))
