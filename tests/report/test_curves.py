"""Learning curves against logs written by hand."""

from __future__ import annotations

import pytest

from dist_reg.report import read_runs, summarise
from dist_reg.report.curves import Point
from tests.report.made import HYPE, log, result, scored, store


def lines(losses, **more):
    found = [{"step": 10 * (1 + at), "loss": loss, "epoch": 1.0, **more} for at, loss in enumerate(losses)]
    return [*found, {"step": 99, "train_loss": 0.1, "train_runtime": 3.0}, {"step": 99, "dev_accuracy": 0.7}]


def curves(folder, results, logs):
    summary = summarise(read_runs(store(folder, results, logs)))
    return {(p.methods, p.quantity, p.step): (p.runs, p.mean, p.std) for p in summary.curves}, summary


def test_mean_and_deviation_over_seeds(tmp_path):
    logs = {0: log(lines([0.5, 0.25])), 1: log(lines([0.75, 0.75, 0.125]))}
    found, summary = curves(tmp_path, scored([0.8, 0.9]), logs)
    # of two values the standard deviation is their distance over the root of 2
    assert found == {
        ("plain", "training loss", 10): (2, 0.625, pytest.approx(0.25 / 2**0.5)),
        ("plain", "training loss", 20): (2, 0.5, pytest.approx(0.5 / 2**0.5)),
        ("plain", "training loss", 30): (1, 0.125, None),
    }
    assert summary.curves[0] == Point(
        "sst2", "bert-base", 500, "plain", "training loss", 10, 2, 0.625, pytest.approx(0.25 / 2**0.5)
    )
    assert not any("learning curves" in note for note in summary.notes)


def test_development_metrics_while_training(tmp_path):
    evaluated = [{"step": 20, "eval_accuracy": 0.5, "eval_loss": 0.7, "eval_runtime": 3.0, "epoch": 1.0}]
    found, _ = curves(tmp_path, [result(0.8)], {0: log([*evaluated, *lines([0.5])])})
    assert found == {
        ("plain", "training loss", 10): (1, 0.5, None),
        ("plain", "dev accuracy", 20): (1, 0.5, None),
        ("plain", "dev loss", 20): (1, 0.7, None),
    }


def test_the_task_loss_is_shown_where_it_is_not_the_whole_loss(tmp_path):
    methods = [{"hype": HYPE}]
    runs = [result(0.8), result(0.8, methods=methods)]
    same, _ = curves(tmp_path / "same", runs, {0: log([{"step": 10, "loss": 0.5, "task_loss": 0.5}])})
    assert set(same) == {("plain", "training loss", 10)}
    logs = {0: log([{"step": 10, "loss": 0.5, "task_loss": 0.5}]), 1: log([{"step": 10, "loss": 0.6, "task_loss": 0.5}])}  # fmt: skip
    found, _ = curves(tmp_path / "more", runs, logs)
    assert found["hype", "training task loss", 10] == (1, 0.5, None)
    assert ("plain", "training task loss", 10) in found


def test_a_step_done_again_after_a_resume_counts_once(tmp_path):
    text = log([{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.4}, {"step": 20, "loss": 0.3}])
    found, _ = curves(tmp_path, [result(0.8)], {0: text})
    assert found["plain", "training loss", 20] == (1, 0.3, None)


TORN = {
    "torn": (log(lines([0.5])) + '{"step": 10, "lo', "log.jsonl, line 4 is damaged"),
    "no step": ('{"loss": 0.5}\n', "log.jsonl, line 1 is damaged"),
    "no mapping": ("[3]\n", "log.jsonl, line 1 is damaged"),
    "no number": ('{"step": 10, "loss": "small"}\n', "log.jsonl, line 1 is damaged"),
    "empty": ("", "log.jsonl holds nothing to draw"),
    "absent": (None, "no log.jsonl"),
}


@pytest.mark.parametrize("name", TORN)
def test_a_run_whose_log_cannot_be_used_is_named_and_left_out(tmp_path, name):
    text, told = TORN[name]
    logs = {0: log(lines([0.5])), **({} if text is None else {1: text})}
    found, summary = curves(tmp_path, scored([0.8, 0.9]), logs)
    assert found == {("plain", "training loss", 10): (1, 0.5, None)}
    assert f"not in the learning curves: {tmp_path / 'run 01'} ({told})." in summary.notes
    assert len(summary.tables[0].block.groups[0].runs) == 2


def test_what_is_not_drawn_need_not_be_a_number(tmp_path):
    found, _ = curves(
        tmp_path, [result(0.8)], {0: log([{"step": 10, "loss": 0.5, "note": "mine", "x": None}])}
    )
    assert found == {("plain", "training loss", 10): (1, 0.5, None)}


def test_a_log_that_is_no_text(tmp_path):
    store(tmp_path, [result(0.8)])
    (tmp_path / "run 00" / "log.jsonl").write_bytes(b"\xff\xfe\x00")
    summary = summarise(read_runs(tmp_path))
    assert summary.curves == ()
    assert "log.jsonl is no text" in " ".join(summary.notes)


def test_a_loss_that_diverged_is_no_damage(tmp_path):
    found, summary = curves(
        tmp_path, scored([0.8, 0.9]), {at: log(lines([0.5, float("nan")])) for at in (0, 1)}
    )
    assert found["plain", "training loss", 10] == (2, 0.5, 0.0)
    assert str(found["plain", "training loss", 20]) == "(2, nan, None)"
    assert not any("curves" in note for note in summary.notes)
