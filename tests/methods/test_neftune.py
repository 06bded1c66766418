"""NEFTune against its formula and against Transformers' own."""

from __future__ import annotations

import pytest
import torch
from dist_reg_kernels.philox import noise_reference
from transformers.integrations.neftune import neftune_post_forward_hook

from dist_reg import NEFTune, RDrop, UserError, regularize
from dist_reg.backbone import find_backbone
from dist_reg.config import build_method
from dist_reg.methods.neftune import SITE_METHOD
from dist_reg.noise import site_id
from tests.models import FAMILIES, HIDDEN, batch, build

pytestmark = pytest.mark.compat

SEED = 17
KEYS = torch.arange(4) + 3


def table_of(model):
    """The one that the layers read; T5 has another beside it."""
    return find_backbone(model).base.get_input_embeddings()


def embedded(model, inputs, keys=KEYS):
    """What leaves the table of word embeddings in a training forward, [B, T, D]."""
    seen = []
    hook = table_of(model).register_forward_hook(lambda module, args, output: seen.append(output))
    model(**inputs, example_keys=keys)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_formula(family, padding):
    head = "tokens" if family == "t5" else "classification"
    model, inputs = build(family, head), batch(family, head=head, padding=padding)
    mask = inputs["attention_mask"]
    with regularize(model, [NEFTune(alpha=3.0)], seed=SEED):
        got = embedded(model, inputs)
    lengths = mask.sum(1)
    first = mask.argmax(1)
    spans = torch.stack((first, first + lengths), 1)
    site = site_id(SITE_METHOD, 0, 0)
    unit = noise_reference(KEYS, spans, mask.shape[1], HIDDEN, seed=SEED, site=site, distribution="uniform")
    scale = 3.0 / (lengths * HIDDEN).sqrt()
    expected = table_of(model)(inputs["input_ids"]) + scale[:, None, None] * unit
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    clean = table_of(model)(inputs["input_ids"])
    assert torch.equal(got[mask == 0], clean[mask == 0])


def test_without_padding_it_is_as_large_as_that_of_transformers():
    """There L is the padded length, and torch's generator draws."""
    model = build("llama", "causal", dropout=0.0)
    ids = torch.randint(3, 90, (64, 40))
    table = table_of(model)
    clean = table(ids)
    with regularize(model, [NEFTune(alpha=5.0)], seed=SEED):
        ours = embedded(model, {"input_ids": ids}, torch.arange(64)) - clean
    table.neftune_noise_alpha = 5.0
    table.train()
    theirs = neftune_post_forward_hook(table, (ids,), clean) - clean
    bound = 5.0 / (40 * HIDDEN) ** 0.5
    for noise in (ours, theirs):
        assert noise.abs().max() <= bound * 1.0001
        assert noise.abs().max() >= bound * 0.999
        assert noise.mean().abs() < 4 * bound / 3**0.5 / noise.numel() ** 0.5
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.01)


def test_more_padding_and_eval_and_zero():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    bare = model(**inputs).loss
    wider = {
        name: torch.cat((value, torch.zeros(4, 5, dtype=torch.long)), 1) if value.dim() == 2 else value
        for name, value in inputs.items()
    }
    with regularize(model, [NEFTune()], seed=SEED) as handle:
        one, other = model(**inputs, example_keys=KEYS).loss, model(**wider, example_keys=KEYS).loss
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one != bare
        assert handle.metrics()["neftune/noise_survival"] > 0.99
        model.eval()
        assert torch.equal(model(**inputs).loss, bare)
        model.train()
    with regularize(model, [NEFTune(alpha=0.0)]):
        assert torch.equal(model(**inputs).loss, bare)
    assert torch.equal(model(**inputs).loss, bare)


def test_both_halves_of_rdrop_take_their_own():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [NEFTune(), RDrop(alpha=1.0)], seed=SEED) as handle:
        model(**inputs, example_keys=KEYS).loss.backward()
        assert handle.metrics()["rdrop"] > 0


def test_noise_that_rounding_swallows_is_warned_about(caplog):
    model, inputs = build("bert").to(torch.bfloat16), batch("bert")
    with torch.no_grad():
        table_of(model).weight.mul_(1000)
    with regularize(model, [NEFTune(alpha=0.01)], seed=SEED):
        model(**inputs, example_keys=KEYS)
    assert "neftune: only" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "neftune: alpha must be a finite number >= 0, for example 5; it is -1.0"),
        ({"alpha": float("inf")}, "alpha must be a finite number"),
        ({"alfa": 5}, "alpha"),
    ],
    ids=["negative", "infinite", "typo"],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        build_method("neftune", options)


def test_an_encoder_decoder_and_ready_made_embeddings_are_refused():
    with pytest.raises(UserError, match="neftune: an encoder-decoder looks up its two inputs"):
        regularize(build("t5", "classification"), [NEFTune()], layers_path="transformer.encoder.block")
    model = build("bert")
    with regularize(model, [NEFTune()]), pytest.raises(UserError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, HIDDEN))
