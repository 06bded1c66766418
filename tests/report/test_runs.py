"""Reading results: labels, scores, what is no result."""

from __future__ import annotations

import json

import pytest

from dist_reg.errors import UserError
from dist_reg.report.runs import Run, read_runs, unfinished
from tests.report.made import HYPE, SETTINGS, result, store


@pytest.mark.parametrize(
    ("methods", "config", "expected"),
    [
        ([], {}, "plain"),
        ([], {"hidden_dropout_prob": 0.0}, "plain, hidden_dropout_prob 0.0"),
        ([], {"num_hidden_layers": 3, "attn_pdrop": 0.0}, "plain, attn_pdrop 0.0"),
        ([{"hype": HYPE}], {}, "hype"),
        ([{"hype": {**HYPE, "sigma": 0.01}}], {}, "hype sigma 0.01"),
        ([{"hype": {**HYPE, "layers": [0, 1], "dropout": "keep"}}], {}, "hype layers [0, 1] dropout keep"),
        ([{"hype": HYPE}, {"other": {"weight": 2}}], {}, "hype + other weight 2"),
    ],
)
def test_label_says_what_is_not_default(tmp_path, methods, config, expected):
    assert Run(tmp_path, result(0.5, methods=methods, model_config=config)).label == expected


def test_settings_take_in_what_of_the_model_is_no_dropout(tmp_path):
    run = Run(tmp_path, result(0.5, model_config={"hidden_dropout_prob": 0.0, "num_hidden_layers": 3}))
    assert run.settings == {**SETTINGS, "model": {"config": {"num_hidden_layers": 3}}}
    assert Run(tmp_path, result(0.5, model_config={"hidden_dropout_prob": 0.0})).settings == SETTINGS


def test_scores_of_domains(tmp_path):
    domains = {"metric": "accuracy", "in_domain": 0.8, "out_of_domain": 0.7, "gap": 0.1}
    run = Run(tmp_path, result(0.8, metrics={"dev": {"accuracy": 0.8}}, domains=domains))
    assert run.scores == {"dev": 0.8, "in_domain": 0.8, "out_of_domain": 0.7, "gap": 0.1}
    taken = Run(tmp_path, result(0.8, metrics={"gap": {"accuracy": 0.3}}, domains=domains))
    assert taken.scores == {"gap": 0.3, "in_domain": 0.8, "out_of_domain": 0.7, "domains.gap": 0.1}


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match=r"report: no finished run \(a results.json\) below .*\.$"):
        read_runs(tmp_path)
    with pytest.raises(UserError, match="report: folder .*nowhere does not exist"):
        read_runs(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="report: folder .*file is a file"):
        read_runs(tmp_path / "file")


def test_unfinished_runs(tmp_path):
    store(tmp_path, [result(0.5)])
    (tmp_path / "run.yaml").write_text("the user's own run file, no run folder")
    for name in ("run 00", "begun", "killed"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "run.yaml").write_text("task: sst2")
        (tmp_path / name / ("log.jsonl" if name == "killed" else ".lock")).write_text("")
    assert [run.name for run in unfinished(tmp_path)] == ["begun", "killed"]
    (tmp_path / "run 00" / "results.json").unlink()
    with pytest.raises(UserError, match="no finished run .*; run folders without one: 3"):
        read_runs(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "", '{"task": ', "[]", "3", "{}", '{"task": "sst2"}', '{"metrics": {"dev": {}}}',
        json.dumps(result(0.5, metrics={})),
        json.dumps(result(0.5, metrics=[])),
        json.dumps(result(0.5, timings={})),
        json.dumps(result(0.5, methods=["hype"])),
        json.dumps(result(0.5, model_config=3)),
        json.dumps(result(0.5, domains=3)),
        json.dumps(result(0.5, seed=[0])),
        json.dumps(result(0.5, train_examples="500")),
        json.dumps(result(0.5, task=None)),
        json.dumps(result(0.5, settings=[])),
        json.dumps(result(float("nan"))),
        json.dumps(result(float("inf"))),
        json.dumps(result(0.5, metrics={"dev": {"accuracy": "0.5"}})),
        json.dumps(result(0.5, main_metric_scale="per mille")),
    ],
)  # fmt: skip
def test_broken_result_names_its_file(tmp_path, content):
    store(tmp_path, [result(0.5)])
    broken = tmp_path / "torn" / "results.json"
    broken.parent.mkdir()
    broken.write_text(content)
    with pytest.raises(UserError, match="torn/results.json"):
        read_runs(tmp_path)


def test_result_that_is_not_text_names_its_file(tmp_path):
    (tmp_path / "results.json").write_bytes(b'{"task": "\xe9"}')
    with pytest.raises(UserError, match="results.json"):
        read_runs(tmp_path)
