"""`dist-reg bench step`: its rows, its straightforward peers, its memory, its mistakes."""

from __future__ import annotations

import json
import os

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForSequenceClassification

from dist_reg import HIRE, LNSR, MVCR, RDrop, UserError, regularize
from dist_reg.bench.peers import PEERS
from dist_reg.cli.bench.step import step
from tests.methods.test_hire import stirred
from tests.methods.test_lnsr import KEYS, SEED, unit_noise
from tests.models import batch, build
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny bert", num_labels=2)


def run(*arguments):
    return CliRunner().invoke(step, [str(a) for a in arguments], catch_exceptions=False)


SIZES = ["--batch-size", 2, "--length", 8, "--steps", 3]


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(folder, tmp_path):
    held = bytearray(os.urandom(1) * 2**30)  # what this process holds is not the others'
    done = run("--model", folder, "--methods", "rdrop", *SIZES, "--memory", "--out", tmp_path)
    assert done.exit_code == 0
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert all(100 < row["peak_memory_mib"] < 1200 for row in rows)
    assert len(held) == 2**30


def test_every_variant_has_its_ratios_and_ideal(folder, tmp_path):
    methods = "hype, lnsr, lnsr: {layer: 1}, rdrop, r3f, mvcr: {reconstruct: sampled}, hire, neftune"
    done = run("--model", folder, "--methods", methods, *SIZES, "--peers", "--out", tmp_path)
    assert done.exit_code == 0
    record = json.loads((tmp_path / "step.json").read_text())
    rows = {row["variant"]: row for row in record["rows"]}
    assert list(rows) == [
        "plain",
        "plain, no dropout",
        "hype, no dropout",
        "hype",
        "hype, straightforward",
        "lnsr",
        "lnsr, straightforward",
        "lnsr {'layer': 1}",
        "lnsr {'layer': 1}, straightforward",
        "rdrop",
        "rdrop, straightforward",
        "r3f",
        "r3f, straightforward",
        "mvcr {'reconstruct': 'sampled'}",
        "mvcr {'reconstruct': 'sampled'}, straightforward",
        "hire",
        "hire, straightforward",
        "neftune",
        "neftune, straightforward",
    ]
    assert rows["plain"]["ratio_ideal"] == 1.0
    assert rows["lnsr"]["ideal"] == 2.0
    assert rows["lnsr {'layer': 1}"]["ideal"] == pytest.approx(5 / 3)
    assert all(row["median_ms"] > 0 and row["peak_memory_mib"] is None for row in rows.values())


@pytest.mark.parametrize("reconstruct", ["all", "sampled"])
def test_the_straightforward_mvcr_is_the_same_mathematics(reconstruct):
    """With one view that every token takes, where nothing is left to draw."""
    model, inputs = build("bert", dropout=0.0), batch("bert")
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    method = MVCR(
        autoencoders=1,
        probabilities=[1.0, 0.0],
        inner=0,
        dropout=0.0,
        reconstruct=reconstruct,
        warmup_epochs=0,
    )
    with regularize(model, [method], seed=SEED):
        ours = model(**inputs, example_keys=KEYS).loss
        points = [model.dist_reg_mvcr_1, model.dist_reg_mvcr_2]
    peer = PEERS["mvcr"](model, method)
    with torch.no_grad():
        for (view,), own in zip(peer.points, points):
            for part in ("encoder", "decoder"):
                getattr(view, part).weight.copy_(getattr(own, f"{part}_0"))
                getattr(view, part).bias.copy_(getattr(own, f"{part}_bias_0"))
    assert peer(**inputs).loss.item() == pytest.approx(ours.item(), rel=1e-5)


@pytest.mark.parametrize(
    "method", [HIRE(), HIRE(extractor="attention", fusion_rnn=False, combine="difference")]
)
def test_the_straightforward_hire_is_the_same_mathematics(method):
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [method], seed=SEED):
        module = stirred(model.dist_reg_hire)
        ours = model(**inputs).loss
    peer = PEERS["hire"](model, method)
    with torch.no_grad():
        peer.gate.weight.copy_(module.gate_weight[None])
        peer.gate.bias.copy_(module.gate_bias)
        peer.fusion.weight.copy_(module.fusion_weight)
        peer.fusion.bias.copy_(module.fusion_bias)
        if method.extractor == "gru":
            peer.extractor.load_state_dict(module.gru.state_dict())
            peer.fusion_gru.load_state_dict(module.fusion_gru.state_dict())
        else:
            peer.extractor.weight.copy_(module.query[None])
    assert peer(**inputs).loss.item() == pytest.approx(ours.item(), rel=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_straightforward_lnsr_is_the_same_mathematics(layer, monkeypatch):
    model, inputs, method = build("bert", dropout=0.0), batch("bert"), LNSR(sigma=0.1, layer=layer)
    with regularize(model, [method], seed=SEED):
        ours = model(**inputs, example_keys=KEYS).loss
    noise = unit_noise(torch.empty(4, 9, 32), inputs["attention_mask"], layer)
    # Padding has no noise of ours; it is masked there, and a norm of 0 would divide by it.
    noise = noise + (1 - inputs["attention_mask"][..., None].float())
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    assert PEERS["lnsr"](model, method)(**inputs).loss.item() == pytest.approx(ours.item(), rel=1e-5)


def test_the_straightforward_rdrop_is_the_same_mathematics():
    model, inputs, method = build("bert", dropout=0.3), batch("bert"), RDrop(alpha=0.7)
    model.eval()
    plain = model(**inputs).loss
    assert PEERS["rdrop"](model, method)(**inputs).loss.item() == pytest.approx(plain.item(), rel=1e-5)


def test_shapes_without_weights():
    from dist_reg.bench.step import SHAPES

    for family, sizes in SHAPES.values():
        config = AutoConfig.for_model(family, num_labels=2, pad_token_id=0, **sizes)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        assert 3e8 < sum(parameter.numel() for parameter in model.parameters()) < 1.3e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", ""], "name at least one method"),
        (["--methods", "lnrs"], "unknown method 'lnrs'; did you mean 'lnsr'"),
        (["--methods", "lnsr: {layer: 9}"], "layer is 9, but the model's layers are numbered 0 to 2"),
        (["--methods", "lnsr: {noise: secant}", "--peers"], "the straightforward form of lnsr has no noise"),
        (["--length", "65"], "--length is 65, but the model takes at most 64"),
    ],
)
def test_mistakes(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        run("--model", folder, *SIZES, *arguments)
