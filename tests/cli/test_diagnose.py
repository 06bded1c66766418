"""`dist-reg diagnose`: its curves against a loop written out, its files, its mistakes."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from click.testing import CliRunner

from dist_reg.cli.diagnose import command
from dist_reg.diagnosis import stability_curves
from dist_reg.errors import UserError
from tests.models import batch, build
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("a model") / "tiny bert")


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_curves_start_at_the_size_and_equal_two_forwards(family):
    model, inputs = build(family, dropout=0.1), batch(family, labels=False)
    curves = stability_curves(model, [inputs], 0.05)
    assert curves.shape == (3, 4)
    for layer in range(3):
        assert curves[layer, layer].item() == pytest.approx(0.05, rel=1e-4)
        assert curves[layer, :layer].isnan().all()
        assert (curves[layer, layer:] > 0).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_errors_of_a_linear_stack_are_those_of_its_matrices():
    """Layers that only scale leave the relative error as it was."""
    from tests.methods.test_lnsr import Linear

    layers = [torch.nn.Linear(6, 6, bias=False) for _ in range(3)]
    for layer in layers:
        torch.nn.init.eye_(layer.weight).data.mul_(3.0)
    model = Linear(layers, 6)
    ids = torch.randint(0, 10, (4, 5))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    curves = stability_curves(model, batches, 0.2, layers_path="layers")
    expected = torch.full((3, 4), 0.2, dtype=torch.float64)
    above = torch.ones(3, 4).triu().bool()
    torch.testing.assert_close(curves[above], expected[above], rtol=1e-4, atol=0)


def test_the_cut_into_batches_and_padding_do_not_matter():
    model, inputs = build("bert", dropout=0.0), batch("bert", labels=False)
    whole = stability_curves(model, [inputs], 0.05)
    wider = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in inputs.items()}
    parts = [{name: value[rows] for name, value in wider.items()} for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(
        stability_curves(model, parts, 0.05), whole, rtol=1e-4, atol=1e-6, equal_nan=True
    )


def test_before_and_after_as_table_csv_json_and_plot(folder, tmp_path):
    out = tmp_path / "out dir"
    text = tmp_path / "some text.txt"
    text.write_text("the film was good .\n\nthe book was dull and slow .\n", encoding="utf-8")
    done = run(folder, "--before", folder, "--data", text, "--out", out)
    assert done.exit_code == 0
    assert "before enters" in done.output
    assert "after enters" in done.output
    assert "2 examples" in " ".join(done.output.split())
    record = json.loads((out / "stability.json").read_text())
    assert record["relative_error"]["before"] == record["relative_error"]["after"]
    assert record["relative_error"]["before"][1][0] is None
    assert {"date", "git_commit", "versions", "hardware", "size"} <= record.keys()
    with (out / "stability.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (4 + 3 + 2)
    assert (out / "stability.png").stat().st_size > 10_000


def test_a_task_names_the_data(folder):
    done = run(folder, "--data", "demo", "--examples", 4)
    assert done.exit_code == 0
    assert "layer 2" in done.output


def test_long_sentences_are_cut_to_the_models_positions_and_a_stack_can_be_named(folder, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("the film was good . " * 40 + "\n")
    assert run(folder, "--data", text, "--layers-path", "encoder.layer").exit_code == 0
    with pytest.raises(UserError, match="layers_path"):
        run(folder, "--data", text, "--layers-path", "encoder.layers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is missing"),
        (["--data", "dem"], "unknown task 'dem'"),
        (["--data", "demo", "--size", "nan"], "--size must be a finite number above 0"),
        (["--data", "demo", "task=sst2"], "task has no effect here"),
        (["--data", "demo", "--before", "/no/such/folder"], "does not exist"),
    ],
)
def test_mistakes(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        run(folder, *arguments)


def test_an_empty_text_file_is_named(folder, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(UserError, match="holds no sentence"):
        run(folder, "--data", empty)
