"""Which runs are taken together, which stand beside each other, which are refused."""

from __future__ import annotations

import pytest

from dist_reg.errors import UserError
from dist_reg.report.blocks import arrange
from dist_reg.report.runs import read_runs
from tests.report.made import HYPE, SETTINGS, result, scored, store


def arranged(folder, results, **options):
    return arrange(read_runs(store(folder, results)), **options)


def with_rate(rate):
    return {**SETTINGS, "train": {**SETTINGS["train"], "learning_rate": rate}}


def test_only_runs_that_differ_in_their_seed_are_taken_together(tmp_path):
    hype = [{"hype": {**HYPE, "sigma": 1e-4}}]
    runs = [result(0.8), result(0.9, seed=1), result(0.7, train_examples=100), result(0.6, task="cola"), result(0.5, model="roberta"), result(0.4, methods=hype), result(0.3, methods=[{"hype": HYPE}])]  # fmt: skip
    blocks, notes = arranged(tmp_path, runs)
    assert sorted(len(group.runs) for block in blocks for group in block.groups) == [1, 1, 1, 1, 1, 2]
    assert len(blocks) == 4
    assert notes == []


def test_plain_comes_first(tmp_path):
    runs = [result(0.8, methods=[{"hype": HYPE}]), result(0.7, model_config={"dropout": 0.0}), result(0.6)]
    (block,), _ = arranged(tmp_path, runs)
    assert [group.label for group in block.groups] == ["plain", "plain, dropout 0.0", "hype"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settings": with_rate(1e-4)}, "train.learning_rate is 5e-05 in {0} and 0.0001 in {1}"),
        ({"settings": {**SETTINGS, "batch_size": 32}}, "batch_size is 16 in {0} and 32 in {1}"),
        (
            {"settings": {**SETTINGS, "early_stopping": {"patience": 2}}},
            "early_stopping.patience is not given in {0} and 2 in {1}",
        ),
        (
            {"settings": {**SETTINGS, "data": {"eval": {"news": {"file": "a.csv"}}, "max_length": 128}}},
            "data.eval.news.file is not given in {0} and 'a.csv' in {1}",
        ),
        (
            {"model_config": {"num_hidden_layers": 3}},
            "model.config.num_hidden_layers is not given in {0} and 3 in {1}",
        ),
    ],
)
@pytest.mark.parametrize("methods", [[], [{"hype": HYPE}]])
def test_settings_that_differ_are_refused(tmp_path, changes, told, methods):
    with pytest.raises(UserError) as raised:
        arranged(tmp_path, [result(0.8), result(0.7, seed=1, methods=methods, **changes)])
    message = str(raised.value)
    assert told.format(tmp_path / "run 00", tmp_path / "run 01") in message
    assert "--mix" in message
    assert "sub-folder" in message
    assert "\n" not in message


def test_what_is_empty_or_null_is_as_if_not_given(tmp_path):
    written = {**SETTINGS, "data": {**SETTINGS["data"], "eval": {}, "samples": None}}
    (block,), _ = arranged(tmp_path, [result(0.8), result(0.7, seed=1, settings=written)])
    assert [len(group.runs) for group in block.groups] == [2]


def test_dropout_is_part_of_what_was_done(tmp_path):
    runs = [result(0.8), result(0.7, model_config={"hidden_dropout_prob": 0.0, "attention_dropout": 0.2})]
    (block,), _ = arranged(tmp_path, runs)
    assert len(block.groups) == 2


def test_settings_of_other_tasks_may_differ(tmp_path):
    blocks, _ = arranged(tmp_path, [result(0.8), result(0.7, task="cola", settings=with_rate(1e-4))])
    assert len(blocks) == 2


def test_mixed_runs_are_groups_whose_labels_say_the_difference(tmp_path):
    other = {**with_rate(1e-4), "batch_size": 32}
    runs = [result(0.8), result(0.7, settings=other), result(0.9, settings=other, methods=[{"hype": HYPE}])]
    (block,), _ = arranged(tmp_path, runs, mix=True)
    assert [group.label for group in block.groups] == [
        "plain, batch_size 16, train.learning_rate 5e-05",
        "plain, batch_size 32, train.learning_rate 0.0001",
        "hype, batch_size 32, train.learning_rate 0.0001",
    ]


def test_results_of_an_older_version_are_taken_and_named(tmp_path):
    old = {key: value for key, value in result(0.7, seed=1).items() if key != "settings"}
    (block,), notes = arranged(tmp_path, [result(0.8), old])
    assert [len(group.runs) for group in block.groups] == [2]
    (note,) = notes
    assert f"results of an older version, without settings: 1 ({tmp_path / 'run 01'});" in note
    others = [result(0.8), result(0.9, settings=with_rate(1e-4)), old]
    (block,), _ = arranged(tmp_path, others, mix=True)
    assert [group.label for group in block.groups] == [
        "plain, settings not recorded",
        "plain, train.learning_rate 0.0001",
        "plain, train.learning_rate 5e-05",
    ]


def test_models_whose_folders_share_a_name_are_not_averaged(tmp_path):
    blocks, _ = arranged(tmp_path, [result(0.8, model="one/model"), result(0.6, model="two/model", seed=1)])
    assert [(block.model, len(block.groups[0].runs)) for block in blocks] == [
        ("one/model", 1),
        ("two/model", 1),
    ]


def test_the_same_seeds_twice_are_one_run(tmp_path):
    runs = [result(0.8), result(0.8), result(0.7, data_seed=1), result(0.6, seed=1)]
    (block,), (note,) = arranged(tmp_path, runs)
    assert list(block.groups[0].scores("dev").values()) == [0.8, 0.7, 0.6]
    assert "plain of sst2 with data seed 0 and seed 0 is there more than once" in note
    assert f"{tmp_path / 'run 00'} counts, {tmp_path / 'run 01'} does not" in note


def test_other_software_or_another_device_is_told_once(tmp_path):
    places = [("2.12.0", "A100", "a" * 40), ("2.13.0", "A100", "a" * 40), ("2.13.0", "H100", "b" * 40 + "+")]
    runs = [
        result(
            0.8,
            seed=seed,
            versions={"torch": torch, "numpy": "2.4.6"},
            hardware={"devices": [device, device]},
            git_commit=commit,
        )
        for seed, (torch, device, commit) in enumerate(places)
    ]
    _, (note,) = arranged(tmp_path, runs)
    assert note.startswith("warning: ")
    assert note.endswith("commit aaaaaaaa, bbbbbbbb+; device A100, H100; torch 2.12.0, 2.13.0.")
    alone = [
        result(0.8, versions={"torch": "2.12.0"}),
        result(0.8, task="cola", versions={"torch": "2.13.0"}),
    ]
    assert arranged(tmp_path / "tasks", alone)[1] == []


def test_one_task_under_two_metrics_makes_two_blocks(tmp_path):
    number = {"main_metric": "perplexity", "main_metric_scale": "number", "greater_is_better": False}
    blocks, _ = arranged(tmp_path, [*scored([0.5]), *scored([12.0], **number)])
    assert [(block.metric, block.scale, block.greater_is_better) for block in blocks] == [
        ("accuracy", "percent", True),
        ("perplexity", "number", False),
    ]
