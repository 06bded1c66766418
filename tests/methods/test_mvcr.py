"""MVCR against its formula, token by token; its draws, its two gradients, its way out of the model."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from dist_reg_kernels.bottleneck import (
    bottleneck_reference,
    drop_factor,
    inner_site,
    outer_site,
    views_of,
)
from dist_reg_kernels.philox import noise_reference
from torch import nn
from transformers import OPTConfig, OPTForSequenceClassification

from dist_reg import LNSR, MVCR, HyPe, RDrop, UserError, example_keys, regularize
from dist_reg.autoencoders import ViewDraw
from dist_reg.backbone import feed_forward_output, find_backbone
from dist_reg.config import build_method
from dist_reg.forward import inner_model
from dist_reg.methods.base import Step
from dist_reg.methods.mvcr import SITE_DROPOUT, SITE_METHOD, SITE_NOISE, SITE_VIEW
from dist_reg.noise import mix64, site_id, step_keys, token_keys
from tests.models import FAMILIES, HIDDEN, batch, build

pytestmark = pytest.mark.compat

SEED = 17
KEYS = torch.arange(4) + 3


def head_of(family):
    return "tokens" if family == "t5" else "classification"


def spans_of(mask):
    lengths = mask.sum(1)
    return torch.stack([torch.zeros_like(lengths), lengths], 1).int()


def uniform(keys, spans, tokens, channels, site):
    drawn = noise_reference(keys, spans, tokens, channels, seed=SEED, site=site, distribution="uniform")
    return (drawn + 1) / 2


def drawn(method, layer, mask, keys):
    """Views [B][T] and inner choices [B][T][M] as the method's page defines them, in loops."""
    site = site_id(SITE_METHOD, SITE_VIEW, layer)
    numbers = uniform(keys, spans_of(mask), mask.shape[1], method.autoencoders + 1, site)
    edges = torch.tensor(method.view_probabilities()).cumsum(0)
    views = [[int((u[0] >= edges[:-1]).sum()) for u in row] for row in numbers]
    inner = [[[int(v * (method.inner + 1)) for v in u[1:]] for u in row] for row in numbers]
    return views, inner


def token_by_token(method, weights, layer, hidden, mask, keys):
    """(what goes on, the reconstruction of every example) with every token in a pass of its own, twice."""
    if method.input_noise:
        site = site_id(SITE_METHOD, SITE_NOISE, layer)
        tokens, channels = hidden.shape[1:]
        noise = noise_reference(
            keys, spans_of(mask), tokens, channels, seed=SEED, site=site, distribution="normal"
        )
        hidden = hidden + method.input_noise * noise
    views, inner = drawn(method, layer, mask, keys)
    own = views_of(weights)
    one = torch.tensor([[0, 1]])
    base = site_id(SITE_METHOD, SITE_DROPOUT, layer)
    token_key = token_keys(keys, mask.shape[1], spans_of(mask))
    rows, errors = [], []
    for b in range(hidden.shape[0]):
        row, error = [], []

        def through(m, x, b, t):
            key = token_key[b, t : t + 1]

            def factor(width, site):
                if not method.dropout:
                    return None
                numbers = noise_reference(key, one, 1, width, seed=SEED, site=site, distribution="uniform")
                return drop_factor(numbers, method.dropout)[0, 0]

            width, narrow = own[m].encoder.shape[0], own[m].inner_encoder.shape[1]
            drops = factor(width, outer_site(base, m)), factor(narrow, inner_site(base, m))
            return bottleneck_reference(x, own[m], inner[b][t][m], *drops)

        for t in range(hidden.shape[1]):
            x = hidden[b, t]
            view = views[b][t]
            if not mask[b, t]:
                row.append(x)
                continue
            row.append(through(view, x, b, t) if view < method.autoencoders else x)
            apart = x.detach()
            if method.reconstruct == "all":
                parts = [
                    (through(m, apart, b, t) - apart).square().mean() for m in range(method.autoencoders)
                ]
                error.append(sum(parts) / method.autoencoders)
            elif view < method.autoencoders:
                share = method.autoencoders * method.view_probabilities()[view]
                error.append((through(view, apart, b, t) - apart).square().mean() / share)
        rows.append(torch.stack(row))
        errors.append(sum(error) / int(mask[b].sum()))
    return torch.stack(rows), torch.stack([torch.as_tensor(e) for e in errors])


def by_hand(model, method, modules, inputs):
    """(outputs, loss, reconstruction) with plain hooks of this test's own."""
    found = find_backbone(model)
    terms, hooks = [], []
    for layer, module in modules.items():
        place = found.layers[layer]
        if method.site == "ffn":
            place = feed_forward_output(place, found.hidden_size)

        def hook(_, args, output, layer=layer, module=module):
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            weights = list(module.parameters())
            new, errors = token_by_token(method, weights, layer, hidden, inputs["attention_mask"], KEYS)
            terms.append(errors.mean())
            return new if isinstance(output, torch.Tensor) else (new, *output[1:])

        hooks.append(place.register_forward_hook(hook))
    outputs = model(**inputs)
    for hook in hooks:
        hook.remove()
    return outputs, outputs.loss, method.weight * sum(terms)


def modules_of(model):
    named = dict(inner_model(model).named_children())
    return {
        int(name.rpartition("_")[2]): module
        for name, module in named.items()
        if name.startswith("dist_reg_mvcr")
    }


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare_with_loops(family, method):
    head = head_of(family)
    model, inputs = build(family, head, dropout=0.0), batch(family, head=head)
    with regularize(model, [method], seed=SEED) as handle:
        outputs = model(**inputs, example_keys=KEYS)
        outputs.loss.backward()
        got, metrics = gradients(model), handle.metrics()
        modules = modules_of(model)
    expected_outputs, task, term = by_hand(model, method, modules, inputs)
    (task + term).backward()
    torch.testing.assert_close(outputs.logits, expected_outputs.logits, rtol=1e-5, atol=1e-5)
    assert metrics["task_loss"] == pytest.approx(task.item(), rel=1e-5)
    assert metrics.get("mvcr", 0.0) == pytest.approx(float(term.detach()), rel=1e-5)
    assert outputs.loss.item() == pytest.approx((task + term).item(), rel=1e-5)
    expected = gradients(model)
    for layer, module in modules.items():
        for name, p in module.named_parameters():
            expected[f"dist_reg_mvcr_{layer}.{name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("site", ["output", "ffn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_loop_over_tokens(family, site):
    compare_with_loops(family, MVCR(site=site, reconstruct="sampled" if site == "ffn" else "all"))


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.0},
        {"reconstruct": "sampled"},
        {"reconstruct": "sampled", "probabilities": [0.5, 0.0, 0.3, 0.2], "weight": 0.3},
        {"autoencoders": 1},
        {"autoencoders": 2, "widths": [1, 32], "inner": 0},
        {"layers": "all", "inner": 3},
        {"input_noise": 0.1},
        {"weight": 0.0, "warmup_epochs": 0},
    ],
    ids=str,
)
def test_options_against_a_loop_over_tokens(options):
    compare_with_loops("bert", MVCR(**options))


@pytest.mark.parametrize("per", ["token", "position", "sequence", "batch"])
def test_padding_on_the_left_makes_the_same_draws(per):
    method, model = MVCR(per=per, layers="all"), build("llama", dropout=0.0)
    ids = torch.randint(3, 50, (2, 5))
    right = {
        "input_ids": torch.cat((ids, torch.zeros(2, 2, dtype=torch.long)), 1),
        "attention_mask": torch.tensor([[1] * 5 + [0] * 2] * 2),
    }
    left = {name: value.roll(2, 1) for name, value in right.items()}
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4]] * 2)
    with regularize(model, [method], seed=SEED) as handle:
        handle.optimizer_step = 5
        one = model(**right, labels=torch.tensor([0, 1]), example_keys=KEYS[:2]).loss
        other = model(**left, labels=torch.tensor([0, 1]), position_ids=positions, example_keys=KEYS[:2]).loss
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def step_of(batch_size, tokens, number=0, keys=None):
    keys = example_keys(torch.arange(batch_size), 0) if keys is None else keys
    return Step(SEED, keys, tokens, None, False, torch.ones(batch_size), number=number)


@pytest.mark.parametrize("per", ["token", "position", "sequence", "batch"])
@pytest.mark.parametrize("probabilities", [None, [0.1, 0.0, 0.25, 0.65]], ids=["default", "given"])
def test_views_come_as_often_as_stated(per, probabilities):
    method = MVCR(per=per, probabilities=probabilities)
    draw = ViewDraw(method.view_probabilities(), method.inner, per, site_id(SITE_METHOD, SITE_VIEW, 1))
    views, inner = [], []
    for number in range(2000 if per == "batch" else 40 if per == "position" else 4):
        keys = example_keys(torch.arange(50), number)
        one, other = draw(step_of(50, 100, number, keys))
        assert one.shape == (50, 100)
        assert other.shape == (50, 100, 3)
        where = {"token": (slice(None),), "position": (0,), "sequence": (slice(None), 0), "batch": (0, 0)}[
            per
        ]
        shared = {"token": one, "position": one[:1], "sequence": one[:, :1], "batch": one[:1, :1]}[per]
        assert torch.equal(one, shared.expand(50, 100))
        views.append(one[where].flatten())
        inner.append(other[where].reshape(-1, 3))
    views, inner = torch.cat(views), torch.cat(inner)
    number = views.numel()
    for view, p in enumerate(method.view_probabilities()):
        error = math.sqrt(p * (1 - p) / number)
        assert abs((views == view).double().mean().item() - p) <= 4 * error
    for choice in range(3):
        for m in range(3):
            error = math.sqrt(2 / 9 / number)
            assert abs((inner[:, m] == choice).double().mean().item() - 1 / 3) <= 4 * error


def test_what_the_batch_shares_follows_the_step_and_not_the_examples():
    draw = ViewDraw(MVCR().view_probabilities(), 2, "position", 5)
    one, _ = draw(step_of(3, 40, 7, torch.arange(3)))
    other, _ = draw(step_of(5, 30, 7, torch.arange(5) + 10))
    assert torch.equal(one[0, :30], other[0])
    later, _ = draw(step_of(3, 40, 8, torch.arange(3)))
    assert not torch.equal(one, later)
    assert step_keys(7, "cpu") != step_keys(8, "cpu")


def test_keys_of_tokens_are_all_different():
    keys = token_keys(mix64(torch.arange(200)), 300, None)
    assert keys.unique().numel() == keys.numel()


@pytest.mark.parametrize("reconstruct", ["all", "sampled"])
def test_the_reconstruction_sends_nothing_to_the_backbone(reconstruct):
    model, inputs = build("bert", dropout=0.0), batch("bert")
    found = []
    for weight in (0.0, 1.0, 100.0):
        method = MVCR(weight=weight, reconstruct=reconstruct, warmup_epochs=0)
        with regularize(model, [method], seed=SEED):
            model(**inputs, example_keys=KEYS).loss.backward()
            found.append(gradients(model))
    extra = {name for name in found[0] if name.startswith("dist_reg_")}
    assert extra
    for name in found[0]:
        if name in extra:
            assert not torch.equal(found[1][name], found[2][name])
        else:
            torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(found[2][name], found[0][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("probabilities", [None, [0.1, 0.3, 0.5, 0.1]], ids=["default", "given"])
def test_both_reconstructions_have_one_expectation(probabilities):
    """Over many draws of the same tokens."""
    model, inputs = build("bert", dropout=0.0), batch("bert")
    means = {}
    for kind in ("all", "sampled"):
        method = MVCR(reconstruct=kind, dropout=0.0, layers=0, probabilities=probabilities)
        with regularize(model, [method], seed=SEED) as handle, torch.no_grad():
            values = []
            for number in range(300):
                model(**inputs, example_keys=mix64(KEYS + 1000 * number))
                values.append(handle.metrics()["mvcr"])
        values = torch.tensor(values)
        means[kind] = values.mean().item(), values.std().item() / math.sqrt(300)
    (one, error), (other, other_error) = means.values()
    assert abs(one - other) <= 4 * math.hypot(error, other_error)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_eval_and_removal_leave_the_bare_model(family):
    model, inputs = build(family), batch(family)
    bare = copy.deepcopy(model).eval()
    names = list(model.state_dict())
    with regularize(model, [MVCR()], seed=SEED):
        assert len(model.state_dict()) > len(names)
        model.eval()
        assert torch.equal(model(**inputs).logits, bare(**inputs).logits)
        model.train()
        model(**inputs, example_keys=KEYS).loss.backward()
    assert list(model.state_dict()) == names
    for name, value in bare.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    model.eval()
    assert torch.equal(model(**inputs).logits, bare(**inputs).logits)


def test_every_parameter_has_a_gradient_even_where_no_token_came():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    method = MVCR(probabilities=[0.0, 0.0, 0.0, 1.0], reconstruct="sampled", warmup_epochs=0)
    with regularize(model, [method], seed=SEED):
        outputs = model(**inputs, example_keys=KEYS)
        outputs.loss.backward()
        for module in modules_of(model).values():
            for p in module.parameters():
                assert p.grad is not None
                assert not p.grad.any()
    torch.testing.assert_close(outputs.loss, model(**inputs).loss)


@pytest.mark.parametrize("per", ["token", "position"])
@pytest.mark.parametrize("site", ["output", "ffn"])
def test_activation_checkpointing_replays_the_views(site, per):
    inputs, found = batch("bert"), []
    for checkpointing in (False, True):
        model = build("bert", dropout=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with regularize(model, [HyPe(sigma=0.1, dropout="keep"), MVCR(site=site, per=per)], seed=SEED):
            loss = model(**inputs, example_keys=KEYS).loss
            second = model(**inputs, example_keys=KEYS + 100).loss  # another forward before the backward
            (loss + second).backward()
            found.append((loss.item(), gradients(model)))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("site", ["output", "ffn"])
def test_reentrant_checkpointing_would_lose_the_reconstruction(site):
    model = build("bert")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        regularize(model, [MVCR(site=site)]),
        pytest.raises(UserError, match="mvcr does not work with reentrant"),
    ):
        model(**batch("bert"), example_keys=KEYS)


@pytest.mark.parametrize("other", [LNSR(layer=1, sigma=0.1), RDrop(alpha=1.0)], ids=["lnsr", "rdrop"])
def test_a_second_stream_is_reconstructed_too(other):
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [MVCR(layers="all"), other], seed=SEED) as handle:
        outputs = model(**inputs, example_keys=KEYS)
        outputs.loss.backward()
        metrics = handle.metrics()
    assert outputs.logits.shape[0] == 4
    assert metrics["mvcr"] > 0
    assert metrics[other.name] > 0
    expected = metrics["task_loss"] + metrics["mvcr"] + metrics[other.name]
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)


def test_token_classification_with_padding_and_ignored_labels():
    model, inputs = build("bert", "tokens", dropout=0.0), batch("bert", head="tokens")
    inputs["labels"][inputs["attention_mask"] == 0] = -100
    inputs["labels"][:, 0] = -100
    with regularize(model, [MVCR(per="token")], seed=SEED) as handle:
        outputs = model(**inputs, example_keys=KEYS)
        outputs.loss.backward()
        modules, metrics = modules_of(model), handle.metrics()
    expected, task, term = by_hand(model, MVCR(per="token"), modules, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[real], expected.logits[real], rtol=1e-5, atol=1e-5)
    assert metrics["task_loss"] == pytest.approx(task.item(), rel=1e-5)
    assert metrics["mvcr"] == pytest.approx(term.item(), rel=1e-5)


def test_under_autocast_the_products_are_in_half_precision_and_the_stream_is_not_rounded():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    seen = []
    method = MVCR(probabilities=[0.0, 0.0, 0.0, 1.0], warmup_epochs=0)
    with regularize(model, [method], seed=SEED) as handle:
        model.bert.encoder.layer[1].register_forward_hook(lambda m, a, o: seen.append(o))
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs, example_keys=KEYS).loss.backward()
            assert handle.metrics()["mvcr"] > 0
        gradients(model)
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
    one, other = (o if isinstance(o, torch.Tensor) else o[0] for o in seen)
    assert torch.equal(one, other)


def test_adapters_train_beside_it():
    peft = pytest.importorskip("peft")
    model = build("bert", dropout=0.0)
    config = peft.LoraConfig(r=4, target_modules=["query", "dense"], task_type="SEQ_CLS")
    model = peft.get_peft_model(model, config)
    names = set(model.state_dict())
    with regularize(model, [MVCR(site="ffn")], seed=SEED) as handle:
        model(**batch("bert"), example_keys=KEYS).loss.backward()
        assert handle.metrics()["mvcr"] > 0
        assert len(modules_of(model)) == 2
        assert all(p.grad is not None for m in modules_of(model).values() for p in m.parameters())
    assert set(model.state_dict()) == names


def test_initial_weights_depend_on_seed_and_name_alone():
    found = []
    for seed, stir in ((1, 0), (1, 5), (2, 0)):
        model = build("bert")
        torch.rand(stir)
        with regularize(model, [MVCR()], seed=seed):
            found.append({k: v.clone() for k, v in model.state_dict().items() if k.startswith("dist_reg_")})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])
        if found[0][name].numel():
            assert not torch.equal(found[0][name], found[2][name])
    bound = 1 / math.sqrt(HIDDEN)
    widest = found[0]["dist_reg_mvcr_1.encoder_2"]
    assert widest.abs().max() <= bound
    assert widest.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_default_widths_and_places():
    assert MVCR().view_widths(768) == [128, 256, 512]
    assert MVCR(autoencoders=1).view_widths(768) == [256]
    assert MVCR().chosen_layers(12) == (1, 11)
    assert MVCR().chosen_layers(1) == (0,)
    assert MVCR().view_probabilities() == pytest.approx((0.2, 0.2, 0.2, 0.4))
    with regularize(build("bert"), [MVCR(layers=0)]) as handle:
        parameters = sum(p.numel() for p in handle.learning_rate_multiples())
    widths = MVCR().view_widths(HIDDEN)
    inner = [2 * (2 * w * (w // 2) + w // 2 + w) for w in widths]
    assert parameters == sum(2 * w * HIDDEN + w + HIDDEN + i for w, i in zip(widths, inner))


def test_the_multiplications_of_the_issue():
    assert MVCR(reconstruct="sampled").ideal_cost(6, 384) == pytest.approx(1.015, abs=1e-3)
    assert MVCR().ideal_cost(6, 384) == pytest.approx(1.076, abs=1e-3)


def test_parameter_groups_for_a_loop_of_ones_own():
    with regularize(build("bert"), [MVCR(learning_rate_multiple=10.0)]) as handle:
        plain, extra = handle.parameter_groups(1e-3)
        own = set(handle.learning_rate_multiples())
        assert (plain["lr"], extra["lr"]) == pytest.approx((1e-3, 1e-2))
        assert set(extra["params"]) == own
        assert not own & set(plain["params"])


def test_warming_up_trains_the_autoencoders_alone():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [MVCR(), LNSR(layer=1, sigma=0.1)], seed=SEED) as handle:
        handle.warming_up = True
        outputs = model(**inputs, example_keys=KEYS)
        outputs.loss.backward()
        metrics = handle.metrics()
        assert outputs.loss.item() == pytest.approx(metrics["mvcr"], rel=1e-6)
        assert metrics["task_loss"] > 0
        for name, gradient in gradients(model).items():
            assert bool(gradient.any()) == name.startswith("dist_reg_"), name


class Blocks(nn.Module):
    """Layers whose feed-forward is a choice among experts."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.experts = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])})

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Blocks.Layer() for _ in range(2)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autoencoders": 0}, "autoencoders must be from 1"),
        ({"widths": [8, 16]}, "widths has 2 numbers for autoencoders: 3"),
        ({"widths": [0, 8, 16]}, "widths must be whole numbers of at least 1; one is 0"),
        ({"widths": [8, 16, 33]}, "widths has 33, more than the hidden size 32"),
        ({"probabilities": [0.5, 0.5]}, "probabilities has 2 numbers .* needs 4"),
        ({"probabilities": [0.5, 0.5, 0.5, 0.5]}, "must sum to 1; they sum to 2"),
        ({"probabilities": [1.5, -0.5, 0.0, 0.0]}, "numbers from 0 to 1; one is 1.5"),
        ({"probabilities": [float("nan"), 0.0, 0.0, 1.0]}, "numbers from 0 to 1; one is nan"),
        ({"layers": "5"}, "out of range; the model has 3"),
        ({"inner": -1}, "inner must be at least 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"weight": float("inf")}, "weight must be at least 0 and finite"),
        ({"learning_rate_multiple": -1.0}, "learning_rate_multiple must be at least 0"),
        ({"weight": 0.0}, "weight: 0 nothing trains in the warm-up"),
        ({"learning_rate_multiple": 0.0}, "learning_rate_multiple: 0 nothing trains in the warm-up"),
        ({"warmup_epochs": 1.5}, "mvcr.*warmup_epochs"),
        ({"per": "word"}, "mvcr: per.*'word'"),
        ({"site": "input"}, "mvcr: site.*'input'"),
        ({"widths": [8, 16.5, 20]}, "widths"),
    ],
    ids=str,
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        regularize(build("bert"), [build_method("mvcr", options)])


def test_a_block_without_a_recognised_feed_forward():
    with pytest.raises(UserError, match="mvcr: Layer shows no feed-forward .*use site: output"):
        regularize(Blocks(), [MVCR(site="ffn", layers=0)], layers_path="layers")


def test_a_feed_forward_in_chunks_is_refused():
    model = build("bert", chunk_size_feed_forward=3)
    with pytest.raises(UserError, match="shows no feed-forward .*use site: output"):
        regularize(model, [MVCR(site="ffn")])


def test_a_feed_forward_over_flat_tokens_is_refused():
    config = OPTConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        word_embed_proj_dim=16,
    )
    model = OPTForSequenceClassification(config)
    inputs = {"input_ids": torch.randint(3, 50, (2, 5)), "labels": torch.tensor([0, 1])}
    with (
        regularize(model, [MVCR(site="ffn")]),
        pytest.raises(UserError, match="tokens, channels.*site: output"),
    ):
        model(**inputs)


def test_numbers_that_are_none_from_python():
    with pytest.raises(UserError, match="one is 16.5"):
        MVCR(widths=[8, 16.5, 20])
    with pytest.raises(UserError, match="one is 'a'"):
        MVCR(probabilities=["a", 0.0, 0.0, 1.0])


def test_input_noise_that_rounding_swallows_warns(caplog):
    model = build("bert", dropout=0.0).bfloat16()
    with regularize(model, [MVCR(input_noise=1e-4)], seed=SEED) as handle, caplog.at_level(logging.WARNING):
        model(**batch("bert"), example_keys=KEYS)
        assert handle.metrics()["mvcr/noise_survival"] < 0.5
    assert "mvcr: only" in caplog.text


def test_a_loop_that_never_asked_for_the_rates_is_told(caplog):
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [MVCR()], seed=SEED), caplog.at_level(logging.WARNING):
        model(**inputs, example_keys=KEYS)
        model(**inputs, example_keys=KEYS)
    assert caplog.text.count("handle.parameter_groups(rate)") == 1
    caplog.clear()
    with regularize(model, [MVCR()], seed=SEED) as handle, caplog.at_level(logging.WARNING):
        torch.optim.SGD(handle.parameter_groups(0.1))
        model(**inputs, example_keys=KEYS)
    assert not caplog.text


def test_modules_frozen_afterwards_are_told(caplog):
    peft = pytest.importorskip("peft")
    model = build("bert", dropout=0.0)
    with regularize(model, [MVCR()], seed=SEED), caplog.at_level(logging.WARNING):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        model(**batch("bert"), example_keys=KEYS)
    assert "frozen since" in caplog.text


def test_a_failed_start_leaves_nothing_behind():
    model = build("bert")
    names = list(model.state_dict())
    with pytest.raises(UserError):
        regularize(model, [MVCR(), LNSR(layer=9)])
    assert list(model.state_dict()) == names
