"""R-Drop and R3F against two separate forwards, for every kind of head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dist_reg_kernels.philox import noise_reference

from dist_reg import R3F, HyPe, RDrop, UserError, regularize
from dist_reg.methods.r3f import SITE_METHOD
from dist_reg.noise import site_id
from tests.models import batch, build

pytestmark = pytest.mark.compat

SEED, KEYS = 17, torch.arange(4) + 3
KINDS = {
    "bert classification": ("bert", "classification", {}),
    "roberta classification": ("roberta", "classification", {}),
    "llama classification": ("llama", "classification", {}),
    "bert regression": ("bert", "classification", {"num_labels": 1}),
    "deberta-v2 regression": ("deberta-v2", "classification", {"num_labels": 1}),
    "bert tokens": ("bert", "tokens", {}),
    "llama causal": ("llama", "causal", {}),
    "gpt2 causal": ("gpt2", "causal", {}),
    "bert masked": ("bert", "masked", {}),
    "bert qa": ("bert", "qa", {}),
    "llama qa": ("llama", "qa", {}),
}


def make(kind, dropout=0.0):
    family, head, options = KINDS[kind]
    model = build(family, head, dropout=dropout, **options)
    inputs = batch(family, head=head)
    if options:
        inputs["labels"] = torch.tensor([0.5, -1.0, 2.0, 0.1])
    return model, inputs


def both_directions(p_logits, q_logits):
    p, q = F.log_softmax(p_logits, -1), F.log_softmax(q_logits, -1)
    return (p.exp() * (p - q)).sum() + (q.exp() * (q - p)).sum()


def apart(kind, one_pass, other_pass, inputs):
    """The mean over examples of how far two passes' predictions lie apart, example by example, token by token."""
    if kind.endswith("qa"):
        ends = [(one_pass[name], other_pass[name]) for name in ("start_logits", "end_logits")]
        return sum(both_directions(p[b], q[b]) for p, q in ends for b in range(4)) / 8
    one, other, labels = one_pass.logits, other_pass.logits, inputs["labels"]
    total = 0.0
    for b in range(len(labels)):
        if kind.endswith("regression"):
            total = total + (one[b] - other[b]).square().mean()
        elif kind.endswith("classification"):
            total = total + both_directions(one[b], other[b])
        else:
            shift = int(kind.endswith("causal"))
            counted = [t for t in range(labels.shape[1] - shift) if labels[b, t + shift] != -100]
            total = total + sum(both_directions(one[b, t], other[b, t]) for t in counted) / len(counted)
    return total / len(labels)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(model, methods, inputs, expected_loss, **tolerance):
    """`model` with `methods` has `expected_loss` and its gradients."""
    expected_loss.backward()
    expected = gradients(model)
    with regularize(model, methods, seed=SEED):
        outputs = model(**inputs, example_keys=KEYS)
        outputs.loss.backward()
    assert outputs[1].shape[0] == 4
    assert outputs.loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    found = gradients(model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [name for name in KINDS if "roberta" not in name and "deberta" not in name])
def test_rdrop_equals_two_forwards(kind, monkeypatch):
    """With dropout that multiplies by fixed masks, one for each half, the two passes can be run apart."""
    model, inputs = make(kind, dropout=0.3)

    def fixed(half):
        def dropout(hidden, p=0.5, training=True, inplace=False):
            generator = torch.Generator().manual_seed(hidden[0].numel() + half)
            return hidden * (torch.rand(hidden.shape[1:], generator=generator) > p) / (1 - p)

        return dropout

    def halves(hidden, p=0.5, training=True, inplace=False):
        one, other = hidden.chunk(2)
        return torch.cat((fixed(0)(one, p), fixed(1)(other, p)))

    model.config._attn_implementation = "eager"
    outputs = []
    for half in (0, 1):
        monkeypatch.setattr(F, "dropout", fixed(half))
        outputs.append(model(**inputs))
    one, other = outputs
    scale = 0.7 if kind.endswith("regression") else 0.7 / 2
    expected = (one.loss + other.loss) / 2 + scale * apart(kind, one, other, inputs)
    monkeypatch.setattr(F, "dropout", halves)
    assert_same(model, [RDrop(alpha=0.7)], inputs, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_r3f_equals_two_forwards(kind, distribution):
    model, inputs = make(kind)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    spans = torch.stack((torch.zeros(4, dtype=torch.long), mask.sum(1)), 1).int()
    table = model.get_input_embeddings()
    noise = noise_reference(
        KEYS,
        spans,
        ids.shape[1],
        table.embedding_dim,
        seed=SEED,
        site=site_id(SITE_METHOD, 0, 0),
        distribution=distribution,
    )
    clean = model(**inputs)
    hook = table.register_forward_hook(lambda _, args, out: out + 0.3 * noise)
    noisy = model(**inputs)
    hook.remove()
    expected = clean.loss + 0.8 * apart(kind, clean, noisy, inputs)
    assert_same(model, [R3F(sigma=0.3, weight=0.8, distribution=distribution)], inputs, expected)


@pytest.mark.parametrize("method", [RDrop(alpha=0.0), R3F(weight=0.0), R3F(sigma=0.0)])
def test_off_is_plain_fine_tuning_bit_for_bit(method):
    model, inputs = make("bert classification", dropout=0.1)
    losses = []
    for methods in ([], [method]):
        torch.manual_seed(0)
        with regularize(model, methods, seed=SEED):
            losses.append(model(**inputs, example_keys=KEYS).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("method", [RDrop(alpha=1.0), R3F(sigma=0.3)])
@pytest.mark.parametrize("kind", ["llama causal", "gpt2 causal"])
def test_micro_batches_that_count_items_sum_to_the_whole(kind, method):
    model, inputs = make(kind)
    items = (inputs["labels"] != -100).sum()
    with regularize(model, [HyPe(sigma=0.1), method], seed=SEED):
        whole = model(**inputs, num_items_in_batch=items, example_keys=KEYS).loss
        parts = [
            model(
                **{name: value[rows] for name, value in inputs.items()},
                num_items_in_batch=items,
                example_keys=KEYS[rows],
            ).loss
            for rows in (slice(0, 1), slice(1, 4))
        ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("method", [RDrop(), R3F(sigma=0.2)])
def test_activation_checkpointing_and_hype_together(family, method):
    model, inputs = build(family, dropout=0.1), batch(family)
    with regularize(model, [HyPe(sigma=0.1, dropout="keep", site="both"), method], seed=5):
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(1)
            model(**inputs, example_keys=KEYS).loss.backward()
            found.append(gradients(model))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_logits_and_hidden_states_are_the_first_half():
    model, inputs = make("bert classification")
    plain = model(**inputs, output_hidden_states=True)
    with regularize(model, [R3F(sigma=0.3)]):
        found = model(**inputs, output_hidden_states=True)
        as_tuple = model(**inputs, return_dict=False)
    torch.testing.assert_close(found.logits, plain.logits)
    torch.testing.assert_close(as_tuple[1], plain.logits)
    for one, other in zip(plain.hidden_states, found.hidden_states):
        torch.testing.assert_close(one, other)


def test_spectral_norm_is_in_force_in_eval_and_in_the_baked_weights():
    model, inputs = make("roberta classification")
    head = model.classifier.out_proj
    before = head.weight.detach().clone()
    expected = model.classifier(model.roberta(**{k: v for k, v in inputs.items() if k != "labels"})[0])
    assert not torch.allclose(before / torch.linalg.svdvals(before)[0], before)
    with torch.no_grad():
        head.weight.div_(torch.linalg.svdvals(before)[0])
    expected = model.eval()(**inputs).logits
    with torch.no_grad():
        head.weight.copy_(before)
    handle = regularize(model.train(), [R3F(spectral_norm=True)])
    torch.testing.assert_close(model.eval()(**inputs).logits, expected)
    loss = model.train()(**inputs, example_keys=KEYS).loss
    loss.backward()
    assert torch.equal(head.weight, before)
    handle.bake()
    torch.testing.assert_close(model.eval()(**inputs).logits, expected)
    assert "forward" not in vars(head)
    assert torch.linalg.svdvals(head.weight)[0].item() == pytest.approx(1.0, rel=1e-5)


def test_noise_that_rounding_swallows_is_reported(caplog):
    model, inputs = build("bert", dropout=0.0).to(torch.bfloat16), batch("bert")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(100)
    with regularize(model, [R3F(sigma=1e-5)]) as handle:
        model(**inputs)
        assert handle.metrics()["r3f/noise_survival"] < 0.5
    assert "r3f: only" in caplog.text


@pytest.mark.parametrize("method", [RDrop(), R3F()])
def test_refusals(method):
    model, inputs = build("bert"), batch("bert", labels=False)
    with (
        regularize(model, [method]),
        pytest.raises(UserError, match=f"{method.name} compares .* needs the labels"),
    ):
        model(**inputs)
    model = build("bert", problem_type="multi_label_classification")
    several = {**batch("bert"), "labels": torch.ones(4, 3)}
    with regularize(model, [method]), pytest.raises(UserError, match="several labels"):
        model(**several)


@pytest.mark.parametrize("method", [RDrop(alpha=1.0), R3F(sigma=0.3)])
def test_whole_numbers_are_regression_where_there_is_one_output(method):
    model, inputs = make("bert regression", dropout=0.1)
    inputs["labels"] = torch.tensor([0, 5, 2, 3])
    plain = build("bert", num_labels=1, dropout=0.0)(**inputs).loss
    with regularize(model, [method], seed=SEED) as handle:
        model(**inputs, example_keys=KEYS).loss.backward()
        metrics = handle.metrics()
    assert metrics["task_loss"] == pytest.approx(plain.item(), rel=0.1)
    assert metrics[method.name] > 0


@pytest.mark.parametrize("method", [RDrop(), R3F()])
def test_soft_labels_are_refused(method):
    model, inputs = build("deberta-v2"), batch("deberta-v2")
    inputs["labels"] = torch.softmax(torch.randn(4, 3), -1)
    with regularize(model, [method]), pytest.raises(UserError, match="several labels"):
        model(**inputs)


def test_r3f_is_not_for_encoder_decoders():
    with pytest.raises(UserError, match="r3f leaves the second half without labels"):
        regularize(build("t5", "classification"), [R3F()], layers_path="transformer.encoder.block")


def test_hype_differs_between_the_two_draws_of_rdrop():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [HyPe(sigma=0.3), RDrop()], seed=SEED) as handle:
        model(**inputs, example_keys=KEYS)
        assert handle.metrics()["rdrop"] > 1e-6


def test_a_tied_head_is_not_divided_and_a_removed_handle_bakes_nothing():
    with pytest.raises(UserError, match="tied to the word embeddings"):
        regularize(build("bert", "masked"), [R3F(spectral_norm=True)])
    model = build("bert")
    before = model.classifier.weight.detach().clone()
    handle = regularize(model, [R3F(spectral_norm=True)])
    handle.remove()
    handle.bake()
    assert torch.equal(model.classifier.weight, before)


def test_r3f_needs_ids():
    model, inputs = build("bert"), batch("bert")
    given = {**inputs, "inputs_embeds": torch.randn(4, 9, 32)}
    del given["input_ids"]
    with regularize(model, [R3F()]), pytest.raises(UserError, match="needs input_ids"):
        model(**given)
    with regularize(model, [RDrop()]):
        assert torch.isfinite(model(**given).loss)


def test_two_second_streams_are_a_conflict_that_names_both():
    from dist_reg import LNSR

    with pytest.raises(UserError, match="lnsr and rdrop both run a second stream"):
        regularize(build("bert"), [LNSR(), RDrop()])


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: RDrop(alpha=-1.0), "alpha must be a finite number >= 0"),
        (lambda: R3F(weight=math.nan), "weight must be a finite number >= 0"),
        (lambda: R3F(distribution="gaussian"), "distribution cannot be 'gaussian'"),
    ],
)
def test_bad_options(make_it, message):
    with pytest.raises(UserError, match=message):
        make_it()


def test_spectral_norm_is_for_classification_heads():
    with pytest.raises(UserError, match="classification head"):
        regularize(build("bert", "base"), [R3F(spectral_norm=True)])
