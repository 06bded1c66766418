"""Summaries of runs, against results written by hand."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
from matplotlib.image import imread

from dist_reg import report
from dist_reg.errors import UserError

HYPE = {"sigma": 1e-5, "distribution": "normal", "scale": "absolute", "layers": "all", "site": "input", "dropout": "off"}  # fmt: skip


def result(score: float, *, seed: int = 0, seconds: float = 10.0, **changes) -> dict:
    return {
        "task": "sst2",
        "model": "models/bert-base",
        "model_config": {},
        "methods": [],
        "seed": seed,
        "train_examples": 500,
        "main_metric": "accuracy",
        "metrics": {"dev": {"accuracy": score, "loss": 0.5}, "ood": {"accuracy": score - 0.1, "loss": 0.6}},
        "timings": {"train_seconds": seconds},
        **changes,
    }


def store(folder: Path, results: list[dict]) -> Path:
    for index, content in enumerate(results):
        path = folder / f"run {index}" / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


SCORES = {"plain": [0.80, 0.81, 0.85], "hype": [0.84, 0.86], "no dropout": [0.7]}


@pytest.fixture
def folder(tmp_path):
    runs = [result(s, seed=i, seconds=20 + i, methods=[{"hype": HYPE}]) for i, s in enumerate(SCORES["hype"])]
    runs += [result(s, seed=i, seconds=10 + i) for i, s in enumerate(SCORES["plain"])]
    runs += [result(s, model_config={"hidden_dropout_prob": 0.0}) for s in SCORES["no dropout"]]
    return store(tmp_path / "runs", runs)


def test_means_and_deviations(folder):
    groups = report.group(report.read_results(folder))
    assert [entry.label for entry in groups] == ["plain", "plain, hidden_dropout_prob 0.0", "hype"]
    rows = report.rows(groups)
    for row, name in zip(rows, ("plain", "no dropout", "hype")):
        scores = SCORES[name]
        assert row["seeds"] == len(scores)
        assert row["dev_mean"] == pytest.approx(sum(scores) / len(scores))
        assert row["ood_mean"] == pytest.approx(sum(scores) / len(scores) - 0.1)
        if len(scores) > 1:
            assert row["dev_std"] == pytest.approx(statistics.stdev(scores))
        else:
            assert row["dev_std"] is None
        assert row["metric"] == "accuracy"
        assert (row["task"], row["model"], row["examples"]) == ("sst2", "bert-base", 500)
    # by hand: (0.80 + 0.81 + 0.85) / 3, and sqrt((0.02^2 + 0.01^2 + 0.03^2) / 2)
    assert rows[0]["dev_mean"] == pytest.approx(0.82)
    assert rows[0]["dev_std"] == pytest.approx(0.0264575, rel=1e-5)
    assert rows[0]["train_seconds"] == pytest.approx(11.0)
    assert rows[2]["train_seconds"] == pytest.approx(20.5)


def test_only_runs_that_differ_in_their_seed_are_taken_together(tmp_path):
    runs = [result(0.8), result(0.9, seed=1), result(0.7, train_examples=100), result(0.6, task="cola"), result(0.5, model="roberta"), result(0.4, methods=[{"hype": {**HYPE, "sigma": 1e-4}}]), result(0.3, methods=[{"hype": HYPE}])]  # fmt: skip
    groups = report.group(report.read_results(store(tmp_path, runs)))
    assert sorted(len(entry.runs) for entry in groups) == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("methods", "config", "expected"),
    [
        ([], {}, "plain"),
        ([], {"hidden_dropout_prob": 0.0}, "plain, hidden_dropout_prob 0.0"),
        ([{"hype": HYPE}], {}, "hype"),
        ([{"hype": {**HYPE, "sigma": 0.01}}], {}, "hype sigma 0.01"),
        ([{"hype": {**HYPE, "layers": [0, 1], "dropout": "keep"}}], {}, "hype layers [0, 1] dropout keep"),
        ([{"hype": HYPE}, {"other": {"weight": 2}}], {}, "hype + other weight 2"),
    ],
)
def test_label_says_what_is_not_default(methods, config, expected):
    assert report.label(result(0.5, methods=methods, model_config=config)) == expected


def test_cells_for_people(folder):
    header, cells = report.texts(report.rows(report.group(report.read_results(folder))))
    assert header == ["task", "model", "examples", "methods", "seeds", "dev", "ood", "train s"]
    assert cells[0] == ["sst2", "bert-base", "500", "plain", "3", "82.0 (2.6)", "72.0 (2.6)", "11"]
    assert cells[1][3:7] == ["plain, hidden_dropout_prob 0.0", "1", "70.0", "60.0"]


def test_groups_with_different_evaluation_sets(tmp_path):
    runs = [result(0.8), result(0.7, task="cola", metrics={"dev": {"accuracy": 0.7}})]
    table = report.rows(report.group(report.read_results(store(tmp_path, runs))))
    header, cells = report.texts(table)
    assert header[5:-1] == ["dev", "ood"]
    assert [line[5:7] for line in cells] == [["70.0", ""], ["80.0", "70.0"]]


def test_written_files(folder):
    groups = report.group(report.read_results(folder))
    table = report.rows(groups)
    paths = report.write(folder, table, groups)
    assert [path.name for path in paths] == ["report.csv", "report.md", "report.png"]
    assert all(path.parent == folder for path in paths)

    with paths[0].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["methods"] for row in rows] == [row["methods"] for row in table]
    for row, expected in zip(rows, table):
        assert float(row["dev_mean"]) == expected["dev_mean"]
        assert row["dev_std"] == ("" if expected["dev_std"] is None else str(expected["dev_std"]))

    lines = paths[1].read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| task | model | examples | methods | seeds | dev | ood | train s |")
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "| sst2 | bert-base | 500 | plain | 3 | 82.0 (2.6) | 72.0 (2.6) | 11 |" in lines
    assert "accuracy" in lines[-1]

    picture = imread(paths[2])
    assert picture.ndim == 3
    assert min(picture.shape[:2]) > 100
    assert picture[..., :3].std() > 0.01  # something is drawn on it


def test_a_report_is_not_read_as_a_result_and_can_be_written_again(folder):
    for _ in range(2):
        results = report.read_results(folder)
        assert len(results) == 6
        groups = report.group(results)
        report.write(folder, report.rows(groups), groups)


def test_two_tasks_with_two_metrics_each_get_their_name(tmp_path):
    other = result(0.5, task="cola", main_metric="mcc", metrics={"dev": {"mcc": 0.5}})
    groups = report.group(report.read_results(store(tmp_path, [result(0.8), other])))
    note = report.write(tmp_path, report.rows(groups), groups)[1].read_text().splitlines()[-1]
    assert "accuracy" in note
    assert "mcc" in note


def test_models_whose_folders_share_a_name_are_not_averaged(tmp_path):
    runs = [result(0.8, model="one/model"), result(0.6, model="two/model", seed=1)]
    groups = report.group(report.read_results(store(tmp_path, runs)))
    assert [(entry.model, len(entry.runs)) for entry in groups] == [("one/model", 1), ("two/model", 1)]


def test_the_same_seeds_twice_are_one_run(tmp_path, caplog):
    runs = [result(0.8), result(0.8), result(0.7, data_seed=1), result(0.6, seed=1)]
    (entry,) = report.group(report.read_results(store(tmp_path, runs)))
    assert entry.scores("dev") == [0.8, 0.7, 0.6]
    assert "plain of sst2 with seed 0 and data seed None is there more than once" in caplog.text


def test_negative_scores_can_be_drawn(tmp_path):
    runs = [
        result(-0.2, seed=seed, task="cola", main_metric="mcc", metrics={"dev": {"mcc": value}})
        for seed, value in enumerate((-0.4, -0.3))
    ]
    groups = report.group(report.read_results(store(tmp_path, runs)))
    assert report.rows(groups)[0]["dev_mean"] == pytest.approx(-0.35)
    path = report.write(tmp_path, report.rows(groups), groups)[2]
    from matplotlib.figure import Figure

    limits = []
    original = Figure.savefig
    try:
        Figure.savefig = lambda self, *a, **k: limits.append(self.axes[0].get_xlim())
        report.plot(groups, path)
    finally:
        Figure.savefig = original
    low, high = limits[0]
    assert low <= -40
    assert high >= -30


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match=r"report: no finished run \(a results.json\) below"):
        report.read_results(tmp_path)
    with pytest.raises(UserError, match="report: folder .*nowhere does not exist"):
        report.read_results(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content", ["", '{"task": ', "[]", "3", "{}", '{"task": "sst2"}', '{"metrics": {"dev": {}}}']
)
def test_broken_result_names_its_file(tmp_path, content):
    store(tmp_path, [result(0.5)])
    broken = tmp_path / "torn" / "results.json"
    broken.parent.mkdir()
    broken.write_text(content)
    with pytest.raises(UserError, match="torn/results.json"):
        report.rows(report.group(report.read_results(tmp_path)))


def test_result_that_is_not_text_names_its_file(tmp_path):
    (tmp_path / "results.json").write_bytes(b'{"task": "\xe9"}')
    with pytest.raises(UserError, match="results.json"):
        report.read_results(tmp_path)


def test_what_runs_logged_for_every_layer_is_drawn(tmp_path):
    gates = [{"hire/gate_1": 0.2 + seed, "hire/gate_2": 0.4, "task_loss": 0.3} for seed in (0, 1)]
    runs = [result(0.8, seed=seed, methods=[{"hire": {}}], terms=terms) for seed, terms in enumerate(gates)]
    store(tmp_path, [*runs, result(0.7)])
    groups = report.group(report.read_results(tmp_path))
    curves = report.by_layer(groups)
    assert curves == {"hire/gate": {"hire, sst2, 500": {1: [0.2, 1.2], 2: [0.4, 0.4]}}}
    paths = report.write(tmp_path, report.rows(groups), groups)
    assert [path.name for path in paths][-1] == "report.layers.png"
    assert imread(paths[-1]).std() > 0
    plain = store(tmp_path / "plain", [result(0.7)])
    groups = report.group(report.read_results(plain))
    assert len(report.write(plain, report.rows(groups), groups)) == 3
