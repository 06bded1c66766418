"""HyPe against its formula, its options and its warning."""

from __future__ import annotations

import logging

import pytest
import torch
from dist_reg_kernels.philox import noise_reference

from dist_reg import HyPe, UserError, regularize
from dist_reg.config import build_method
from dist_reg.methods.hype import SITE_INPUT, SITE_METHOD, SITE_WITHIN
from dist_reg.noise import noise_survival, site_id
from tests.models import batch, build

SEED, SIGMA = 17, 0.05


def noise(hidden, mask, layer, *, distribution="normal", point=SITE_INPUT):
    """eps of the reference generator for right-padded inputs, at unit sigma."""
    lengths = mask.sum(1)
    spans = torch.stack([torch.zeros_like(lengths), lengths], 1).int()
    keys = torch.arange(hidden.shape[0])
    site = site_id(SITE_METHOD, point, layer)
    return noise_reference(
        keys, spans, hidden.shape[1], hidden.shape[2], seed=SEED, site=site, distribution=distribution
    )


def by_hand(model, inputs, perturb_input=None, perturb_within=None):
    """BERT written out layer by layer, h^l = g_l(h^{l-1} + eps_l)."""
    mask = inputs["attention_mask"]
    extended = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
    hidden = model.bert.embeddings(input_ids=inputs["input_ids"])
    for index, layer in enumerate(model.bert.encoder.layer):
        if perturb_input is not None:
            hidden = perturb_input(hidden, mask, index)
        attended = layer.attention(hidden, attention_mask=extended)[0]
        if perturb_within is not None:
            attended = perturb_within(attended, mask, index)
        hidden = layer.output(layer.intermediate(attended), attended)
    logits = model.classifier(model.dropout(model.bert.pooler(hidden)))
    return torch.nn.functional.cross_entropy(logits, inputs["labels"])


@pytest.fixture
def bert():
    return build("bert", dropout=0.0, attn_implementation="eager"), batch("bert")


@pytest.mark.parametrize("distribution", ["normal", "uniform", "uniform_released"])
def test_equals_the_formula(bert, distribution):
    model, inputs = bert
    expected = by_hand(model, inputs, lambda h, m, l: h + SIGMA * noise(h, m, l, distribution=distribution))
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with regularize(model, [HyPe(sigma=SIGMA, distribution=distribution)], seed=SEED):
        loss = model(**inputs, example_keys=torch.arange(4)).loss
        loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7, msg=name)


def test_relative_scale_is_the_root_mean_square_of_the_token(bert):
    model, inputs = bert
    expected = by_hand(
        model, inputs, lambda h, m, l: h + SIGMA * h.square().mean(-1, keepdim=True).sqrt() * noise(h, m, l)
    )
    with regularize(model, [HyPe(sigma=SIGMA, scale="relative")], seed=SEED):
        loss = model(**inputs, example_keys=torch.arange(4)).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_within_perturbs_between_attention_and_feed_forward(bert):
    model, inputs = bert
    within = lambda h, m, l: h + SIGMA * noise(h, m, l, point=SITE_WITHIN)  # noqa: E731
    entering = lambda h, m, l: h + SIGMA * noise(h, m, l)  # noqa: E731
    for site, arguments in (("within", (None, within)), ("both", (entering, within))):
        expected = by_hand(model, inputs, *arguments)
        with regularize(model, [HyPe(sigma=SIGMA, site=site)], seed=SEED):
            loss = model(**inputs, example_keys=torch.arange(4)).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_layers_choose_where(bert):
    model, inputs = bert
    expected = by_hand(model, inputs, lambda h, m, l: h + SIGMA * noise(h, m, l) if l == 2 else h)
    with regularize(model, [HyPe(sigma=SIGMA, layers="last:1")], seed=SEED):
        loss = model(**inputs, example_keys=torch.arange(4)).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_an_example_keeps_its_noise_in_any_batch_and_padding():
    model, inputs = build("bert", dropout=0.0), batch("bert", tokens=9)
    keys = torch.tensor([5, 6, 7, 8])
    with regularize(model, [HyPe(sigma=0.2)], seed=SEED):
        whole = model(**inputs, example_keys=keys).logits
        wider = {
            name: torch.nn.functional.pad(inputs[name], (0, 6)) for name in ("input_ids", "attention_mask")
        }
        order = torch.tensor([2, 0, 3, 1])
        shuffled = model(**{k: v[order] for k, v in wider.items()}, example_keys=keys[order]).logits
        alone = model(**{k: v[1:2] for k, v in wider.items()}, example_keys=keys[1:2]).logits
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-4, atol=1e-5)


def test_left_padding_does_not_change_a_decoders_noise():
    model = build("llama", dropout=0.0)
    right, left = batch("llama", seed=3), batch("llama", seed=3)
    for row in range(4):
        shift = int((right["attention_mask"][row] == 0).sum())
        left["input_ids"][row] = right["input_ids"][row].roll(shift)
        left["attention_mask"][row] = right["attention_mask"][row].roll(shift)
    with regularize(model, [HyPe(sigma=0.2)], seed=SEED):
        a = model(**right, example_keys=torch.arange(4)).logits
        positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        b = model(**left, position_ids=positions, example_keys=torch.arange(4)).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hidden_dropout_is_off_and_attention_dropout_stays():
    model = build("bert", dropout=0.1)
    with regularize(model, [HyPe()]):
        rates = {
            name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)
        }
    attention = {name for name in rates if name.endswith("attention.self.dropout")}
    assert len(attention) == 3
    assert all(rates[name] == (0.1 if name in attention else 0.0) for name in rates)
    with regularize(model, [HyPe(dropout="keep")]):
        assert all(m.p == 0.1 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_noise_that_rounding_swallows_is_reported(caplog):
    model, inputs = build("bert", dropout=0.0).to(torch.bfloat16), batch("bert")
    with regularize(model, [HyPe(sigma=1e-5)]) as handle, caplog.at_level(logging.WARNING):
        model(**inputs)
        assert handle.metrics()["hype/noise_survival"] < 0.5
    (record,) = caplog.records
    assert "scale: relative" in record.message
    assert "larger sigma" in record.message


def test_noise_that_survives_is_measured_without_a_warning(caplog):
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [HyPe(sigma=0.1)]) as handle, caplog.at_level(logging.WARNING):
        model(**inputs)
        assert handle.metrics()["hype/noise_survival"] > 0.99
    assert not caplog.records


def test_survival_counts_real_tokens_of_the_first_example():
    before = torch.zeros(2, 4, 2)
    after = before.clone()
    after[0, 1] = 1.0
    after[0, 2, 0] = 1.0
    after[0, 0] = 9.0
    assert noise_survival(before, after, torch.tensor([[1, 3], [0, 4]])) == pytest.approx(0.75)


@pytest.mark.parametrize("sigma", [-1e-5, float("nan"), float("inf")])
def test_bad_sigma_is_refused(sigma):
    with pytest.raises(UserError, match="sigma must be a finite number >= 0"):
        HyPe(sigma=sigma)
    with pytest.raises(UserError, match="sigma must be a finite number >= 0"):
        build_method("hype", {"sigma": sigma})


def test_options_are_checked_as_a_run_file_gives_them():
    with pytest.raises(UserError, match="unknown key 'sigmaa'; did you mean 'sigma'"):
        build_method("hype", {"sigmaa": 1})
    with pytest.raises(UserError, match="distribution"):
        build_method("hype", {"distribution": "gaussian"})
    with pytest.raises(UserError, match="unknown method 'hipe'; did you mean 'hype'"):
        build_method("hipe", {})


@pytest.mark.parametrize(
    ("option", "value", "meant"),
    [
        ("site", "inputs", "input"),
        ("dropout", "of", "off"),
        ("scale", "relativ", "relative"),
        ("distribution", "nomal", "normal"),
    ],
)
def test_a_misspelt_choice_is_an_error_from_python_too(option, value, meant):
    with pytest.raises(UserError, match=f"hype: {option} cannot be '{value}'; did you mean '{meant}'"):
        HyPe(**{option: value})
