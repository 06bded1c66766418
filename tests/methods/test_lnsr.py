"""LNSR against its formula: two separate forwards, exact oracles, its noise, its options."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from dist_reg_kernels.philox import noise_reference
from torch import nn
from transformers import OPTConfig, OPTForSequenceClassification

from dist_reg import LNSR, HyPe, UserError, regularize
from dist_reg.backbone import find_backbone
from dist_reg.config import build_method
from dist_reg.methods.lnsr import SITE_METHOD, SITE_NOISE
from dist_reg.noise import site_id
from tests.models import FAMILIES, batch, build

pytestmark = pytest.mark.compat

SEED, SIGMA = 17, 0.1
KEYS = torch.arange(4) + 3


def head_of(family):
    return "tokens" if family == "t5" else "classification"


def spans_of(mask):
    lengths = mask.sum(1)
    return torch.stack([torch.zeros_like(lengths), lengths], 1).int()


def unit_noise(hidden, mask, layer):
    site = site_id(SITE_METHOD, SITE_NOISE, layer)
    return noise_reference(
        KEYS, spans_of(mask), hidden.shape[1], hidden.shape[2], seed=SEED, site=site, distribution="normal"
    )


def relative(noise, hidden, size):
    """Token by token: `noise` with `size` times the token's norm."""
    out = torch.zeros_like(hidden)
    for b in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            if noise[b, t].norm() > 0:
                out[b, t] = noise[b, t] * (size * hidden[b, t].norm() / noise[b, t].norm())
    return out.detach()


def states_of(model, inputs, layer=None, change=None):
    """(loss, [h^0 .. h^L]) of one forward of its own; `change` maps the states entering `layer`."""
    layers, states, hooks = find_backbone(model).layers, [], []

    def enter(index, module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == layer:
            hidden = change(hidden)
            args, kwargs = (
                ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
            )
        states.append(hidden)
        return args, kwargs

    def leave(module, args, output):
        states.append(output if isinstance(output, torch.Tensor) else output[0])

    for index, module in enumerate(layers):
        hooks.append(
            module.register_forward_pre_hook(lambda m, a, k, i=index: enter(i, m, a, k), with_kwargs=True)
        )
    hooks.append(layers[-1].register_forward_hook(leave))
    loss = model(**inputs).loss
    for hook in hooks:
        hook.remove()
    return loss, states


def two_passes(model, inputs, layer, noise_of, weights, detach_clean=False):
    """Task loss and R from two forwards, every example, token and layer in a loop of its own."""
    mask = inputs["attention_mask"]
    task, clean = states_of(model, inputs)
    _, noisy = states_of(model, inputs, layer, lambda hidden: hidden + noise_of(hidden.detach(), mask))
    total = 0.0
    for state, weight in weights.items():
        for b in range(mask.shape[0]):
            real = [t for t in range(mask.shape[1]) if mask[b, t]]
            one = clean[state].detach() if detach_clean else clean[state]
            distances = [(noisy[state][b, t] - one[b, t]).square().sum() for t in real]
            total = total + weight * sum(distances) / len(real) / mask.shape[0]
    return task, total


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare_with_two_passes(family, method, noise_of, weights, detach_clean=False, **inputs_options):
    head = head_of(family)
    model = build(family, head, dropout=0.0)
    inputs = batch(family, head=head, **inputs_options)
    task, term = two_passes(model, inputs, method.layer, noise_of, weights, detach_clean)
    (task + term).backward()
    expected = gradients(model)
    with regularize(model, [method], seed=SEED) as handle:
        outputs = model(**inputs, example_keys=KEYS)
        outputs.loss.backward()
        metrics = handle.metrics()
    assert outputs.logits.shape[0] == 4
    assert metrics["task_loss"] == pytest.approx(task.item(), rel=1e-5)
    assert metrics["lnsr"] == pytest.approx(term.item(), rel=1e-5)
    assert outputs.loss.item() == pytest.approx((task + term).item(), rel=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_two_forwards(family, layer):
    weights = dict.fromkeys(range(layer + 1, 4), 0.5)
    compare_with_two_passes(
        family,
        LNSR(sigma=SIGMA, layer=layer, weight=0.5),
        lambda hidden, mask: relative(unit_noise(hidden, mask, layer), hidden, SIGMA),
        weights,
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"layer_weights": "linear"}, {1: 1 / 3, 2: 2 / 3, 3: 1.0}),
        ({"layer_weights": [0.0, 2.0, 1.0]}, {2: 2.0, 3: 1.0}),
        ({"layers": "last:2"}, {2: 1.0, 3: 1.0}),
        ({"layers": "0", "weight": 3.0}, {1: 3.0}),
        ({"detach_clean": True}, {1: 1.0, 2: 1.0, 3: 1.0}),
    ],
)
def test_compared_layers_and_weights(family, options, weights):
    compare_with_two_passes(
        family,
        LNSR(**{"sigma": SIGMA, "weight": 1.0, **options}),
        lambda hidden, mask: relative(unit_noise(hidden, mask, 0), hidden, SIGMA),
        weights,
        detach_clean=options.get("detach_clean", False),
    )


@pytest.mark.parametrize("batch_size", [1, 4, 9, 18])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_batch_size_beside_nine_tokens(family, batch_size):
    head = head_of(family)
    model = build(family, head, dropout=0.0)
    inputs, keys = batch(family, head=head, batch_size=batch_size), torch.arange(batch_size)
    total = 0.0
    with regularize(model, [LNSR(sigma=SIGMA, layer=1)], seed=SEED) as handle:
        model(**inputs, example_keys=keys)
        whole = handle.metrics()
        for rows in (slice(0, 1), slice(1, batch_size)):
            part = {name: value[rows] for name, value in inputs.items()}
            if len(keys[rows]):
                model(**part, example_keys=keys[rows])
                total += len(keys[rows]) * handle.metrics()["lnsr"]
        assert total / batch_size == pytest.approx(whole["lnsr"], rel=1e-4)
    assert whole["task_loss"] == pytest.approx(model(**inputs).loss.item(), rel=1e-5)


def test_absolute_noise_has_the_standard_deviation_sigma():
    compare_with_two_passes(
        "bert",
        LNSR(sigma=SIGMA, scale="absolute", layer=1, weight=1.0),
        lambda hidden, mask: SIGMA * unit_noise(hidden, mask, 1),
        {2: 1.0, 3: 1.0},
    )


def secant_by_hand(hidden, mask):
    out = torch.zeros_like(hidden)
    for b in range(hidden.shape[0]):
        partner = b + 1 if b % 2 == 0 else b - 1
        length = int(mask[partner].sum())
        for t in range(int(mask[b].sum())):
            out[b, t] = hidden[partner, t % length] - hidden[b, t]
    return relative(out, hidden, SIGMA)


def test_secant_points_to_the_neighbour_in_the_batch():
    compare_with_two_passes(
        "bert", LNSR(sigma=SIGMA, noise="secant", weight=1.0), secant_by_hand, {1: 1.0, 2: 1.0, 3: 1.0}
    )


def test_secant_does_not_depend_on_the_side_of_the_padding():
    from dist_reg.directions import secant

    hidden = torch.randn(4, 6, 5)
    spans = torch.tensor([[0, 6], [0, 3], [0, 2], [0, 4]], dtype=torch.int32)
    right = secant(hidden, spans)
    shifted = torch.zeros_like(hidden)
    for b, (_, length) in enumerate(spans.tolist()):
        shifted[b, 6 - length :] = hidden[b, :length]
    left = secant(shifted, torch.stack((6 - spans[:, 1], torch.full((4,), 6)), 1).int())
    for b, (_, length) in enumerate(spans.tolist()):
        assert torch.equal(left[b, 6 - length :], right[b, :length])
        assert left[b, : 6 - length].abs().max() == 0 if length < 6 else True


def test_tangent_lies_in_the_examples_main_directions():
    from dist_reg.directions import tangent

    hidden, noise = torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    spans = torch.tensor([[0, 7], [2, 6]], dtype=torch.int32)
    found = tangent(noise, hidden, spans, 3)
    for b, (first, end) in enumerate(spans.tolist()):
        states = hidden[b, first:end]
        _, _, v = torch.linalg.svd(states - states.mean(0), full_matrices=False)
        kept = v[: min(3, end - first - 1)]
        torch.testing.assert_close(
            found[b, first:end], noise[b, first:end] @ kept.T @ kept, rtol=1e-3, atol=1e-4
        )
        outside = torch.ones(7, dtype=torch.bool)
        outside[first:end] = False
        assert not found[b, outside].any()


def test_neighbour_points_to_one_of_the_nearest_words():
    from dist_reg.directions import neighbour
    from dist_reg.methods.base import Step

    table, ids = torch.randn(50, 8), torch.randint(0, 50, (3, 40))
    step = Step(1, torch.arange(3), 40, None, False, torch.ones(3))
    found = neighbour(ids, table, 4, step, site=5)
    chosen = set()
    for b in range(3):
        for t in range(40):
            order = (table - table[ids[b, t]]).norm(dim=1).argsort().tolist()
            target = (table[ids[b, t]] + found[b, t] - table).norm(dim=1).argmin().item()
            assert target in order[1:5]
            chosen.add(order.index(target))
    assert chosen == {1, 2, 3, 4}


def test_neighbour_noise_moves_the_embedding_output():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [LNSR(noise="neighbour", sigma=0.05)], seed=SEED) as handle:
        model(**inputs, example_keys=KEYS).loss.backward()
        assert handle.metrics()["lnsr"] > 0
        given = {**inputs, "inputs_embeds": model.bert.embeddings.word_embeddings.weight[inputs["input_ids"]]}
        del given["input_ids"]
        with pytest.raises(UserError, match="input_ids"):
            model(**given)


@pytest.mark.parametrize("noise", ["gaussian", "secant", "neighbour", "tangent"])
def test_every_kind_has_the_norm_of_its_token(noise):
    model, inputs = build("bert", dropout=0.0), batch("bert")
    seen = []
    with regularize(model, [LNSR(noise=noise, sigma=0.2)], seed=SEED):
        hook = model.bert.encoder.layer[0].attention.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
        model(**inputs, example_keys=KEYS)
        hook.remove()
    clean, noisy = seen[0].chunk(2)
    ratio = (noisy - clean).norm(dim=-1) / clean.norm(dim=-1)
    real = inputs["attention_mask"].bool()
    moved = ratio[real][ratio[real] > 0]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.2), rtol=1e-4, atol=0)
    assert moved.numel() >= real.sum() - 4
    assert not ratio[~real].any()


class Linear(nn.Module):
    """h^r = W_r ... W_1 x: embeddings, layers with nothing but a matrix, and a loss that is zero."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.layers = nn.ModuleList(layers)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return {"loss": 0.0 * hidden.sum(), "logits": hidden}


def terms_of(model, method, examples=4000):
    """R of many examples of one token each: their mean and its standard error."""
    ids = torch.zeros(examples, 1, dtype=torch.long)
    found = []
    with regularize(model.train(), [method], seed=SEED, layers_path="layers") as handle:
        finish = handle._finish
        handle._finish = lambda outputs, step: (
            found.append(sum(step.terms.values()).detach()) or finish(outputs, step)
        )
        model(ids, example_keys=torch.arange(examples))
    return found[0].mean().item(), (found[0].std() / math.sqrt(examples)).item()


def test_a_linear_network_gives_sigma_squared_times_the_squared_norms():
    torch.manual_seed(1)
    layers = [nn.Linear(6, 6, bias=False) for _ in range(3)]
    model = Linear(layers, 6)
    product, expected = torch.eye(6), 0.0
    for layer in layers:
        product = layer.weight @ product
        expected += 0.3**2 * product.square().sum().item()
    mean, error = terms_of(model, LNSR(sigma=0.3, scale="absolute", weight=1.0))
    assert abs(mean - expected) < 3 * error


class Quadratic(nn.Module):
    """f_k(x) = x_k + x^T A_k x / 2."""

    def __init__(self, width):
        super().__init__()
        a = torch.randn(width, width, width)
        self.hessians = nn.Parameter((a + a.transpose(1, 2)) / 2)

    def forward(self, hidden):
        return hidden + 0.5 * torch.einsum("bti,kij,btj->btk", hidden, self.hessians, hidden)


def test_a_quadratic_layer_gives_the_exact_expansion():
    """E||f(x + e) - f(x)||^2 = s^2 ||J||^2 + s^4 / 4 sum_k [(tr H_k)^2 + 2 ||H_k||^2], through a linear layer first."""
    torch.manual_seed(2)
    sigma, first, second = 0.4, nn.Linear(4, 4, bias=False), Quadratic(4)
    model = Linear([first, second], 4)
    x = model.embedding.weight[0]
    jacobian = torch.autograd.functional.jacobian(lambda v: second(first(v)[None, None])[0, 0], x)
    hessians = torch.stack([first.weight.T @ h @ first.weight for h in second.hessians])
    traces = hessians.diagonal(dim1=1, dim2=2).sum(1)
    expected = (
        sigma**2 * jacobian.square().sum()
        + sigma**4 / 4 * (traces.square() + 2 * hessians.square().sum((1, 2))).sum()
    )
    method = LNSR(sigma=sigma, scale="absolute", layers=[1], weight=1.0)
    mean, error = terms_of(model, method, examples=20000)
    assert abs(mean - expected.item()) < 3 * error


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"weight": 0.0}])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_off_is_plain_fine_tuning_bit_for_bit(family, options):
    model, inputs = build(family, dropout=0.1), batch(family)
    results = []
    for methods in ([], [LNSR(**options)]):
        torch.manual_seed(0)
        with regularize(model, methods, seed=SEED):
            loss = model(**inputs, example_keys=KEYS).loss
            loss.backward()
        results.append((loss, gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deberta-v2"])
def test_with_the_same_dropout_the_clean_stream_is_the_plain_one(family, implementation):
    head = head_of(family)
    model = build(family, head, dropout=0.2, attn_implementation=implementation)
    check_same_dropout(model, batch(family, head=head))


def test_deberta_shares_dropout_too():
    check_same_dropout(build("deberta-v2", dropout=0.2), batch("deberta-v2"))


def check_same_dropout(model, inputs):
    """The task loss is that of a plain forward from the same generator, and noise next to nothing gives next to nothing."""
    torch.manual_seed(5)
    plain = model(**inputs).loss
    with regularize(model, [LNSR(sigma=1e-6, weight=1.0)], seed=SEED) as handle:
        torch.manual_seed(5)
        model(**inputs, example_keys=KEYS)
        metrics = handle.metrics()
    assert metrics["task_loss"] == pytest.approx(plain.item(), rel=1e-5)
    assert metrics["lnsr"] < 1e-8
    with regularize(model, [LNSR(sigma=1e-6, weight=1.0, same_dropout=False)], seed=SEED) as handle:
        model(**inputs, example_keys=KEYS)
        assert handle.metrics()["lnsr"] > 1e-4


@pytest.mark.parametrize("same_dropout", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "deberta-v2"])
def test_activation_checkpointing_gives_the_same_gradients(family, same_dropout):
    model, inputs = build(family, dropout=0.1), batch(family)
    method = LNSR(sigma=0.2, same_dropout=same_dropout, layer=1)
    with regularize(model, [HyPe(sigma=0.1, dropout="keep", site="both"), method], seed=5):
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(1)
            one = model(**inputs, example_keys=KEYS).loss
            two = model(**batch(family, seed=7), example_keys=KEYS + 40).loss
            (one + two).backward()
            found.append((one + two, gradients(model)))
    assert found[1][0].item() == pytest.approx(found[0][0].item(), rel=1e-6)
    for name, expected in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_neighbour_noise_survives_checkpointing():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [LNSR(noise="neighbour")], seed=5):
        model(**inputs, example_keys=KEYS).loss.backward()
        expected = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, example_keys=KEYS).loss.backward()
        for name, value in gradients(model).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_reentrant_checkpointing_is_refused():
    model, inputs = build("bert"), batch("bert")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with regularize(model, [LNSR()]), pytest.raises(UserError, match="reentrant"):
        model(**inputs)


def test_with_hype_the_noise_of_both_streams_is_the_same():
    """HyPe shifts clean and noisy states alike, so a linear network's R does not see it."""
    torch.manual_seed(1)
    model = Linear([nn.Linear(6, 6, bias=False) for _ in range(3)], 6)
    ids, keys = torch.zeros(8, 1, dtype=torch.long), torch.arange(8)
    found = []
    for methods in ([LNSR(sigma=0.3)], [LNSR(sigma=0.3), HyPe(sigma=0.5, layers="last:2", dropout="keep")]):
        with regularize(model.train(), methods, seed=SEED, layers_path="layers") as handle:
            model(ids, example_keys=keys)
            found.append(handle.metrics()["lnsr"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_an_example_keeps_its_term_in_any_batch_and_padding():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [LNSR(sigma=0.2)], seed=SEED) as handle:
        model(**inputs, example_keys=KEYS)
        whole = handle.metrics()["lnsr"]
        wider = {
            name: torch.nn.functional.pad(inputs[name], (0, 6)) for name in ("input_ids", "attention_mask")
        }
        for row in range(4):
            one = {name: value[row : row + 1] for name, value in wider.items()}
            model(**one, labels=inputs["labels"][row : row + 1], example_keys=KEYS[row : row + 1])
        assert handle.metrics()["lnsr"] == pytest.approx(whole, rel=1e-4)


def test_a_causal_model_that_counts_items_weighs_examples_by_their_labels():
    """Micro-batches that are summed, each with num_items_in_batch of the whole, give the whole batch's loss."""
    model, inputs = build("llama", "causal", dropout=0.0), batch("llama", head="causal")
    items = (inputs["labels"] != -100).sum()
    with regularize(model, [LNSR(sigma=0.2)], seed=SEED):
        whole = model(**inputs, num_items_in_batch=items, example_keys=KEYS).loss
        parts = sum(
            model(
                **{name: value[rows] for name, value in inputs.items()},
                num_items_in_batch=items,
                example_keys=KEYS[rows],
            ).loss
            for rows in (slice(0, 1), slice(1, 4))
        )
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)


def test_eval_is_the_bare_model_and_remove_restores_it():
    model, inputs = build("bert", dropout=0.1), batch("bert")
    plain = model.eval()(**inputs).logits
    before = [sorted(vars(module)) for module in model.modules()]
    handle = regularize(model.train(), [LNSR()])
    model(**inputs).loss.backward()
    assert torch.equal(model.eval()(**inputs).logits, plain)
    handle.remove()
    assert [sorted(vars(module)) for module in model.modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_deep_copy_shares_dropout_of_its_own():
    model, inputs = build("bert", dropout=0.1), batch("bert")
    with regularize(model, [LNSR(sigma=0.2)], seed=1):
        twin = copy.deepcopy(model)
        losses = []
        for one in (model, twin):
            torch.manual_seed(3)
            losses.append(one(**inputs, example_keys=KEYS).loss)
        assert torch.equal(*losses)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        torch.manual_seed(3)
        assert torch.equal(model(**inputs, example_keys=KEYS).loss, losses[0])


def test_hidden_states_and_attentions_are_those_of_the_clean_stream():
    model, inputs = build("bert", dropout=0.0, attn_implementation="eager"), batch("bert")
    plain = model(**inputs, output_hidden_states=True, output_attentions=True)
    with regularize(model, [LNSR(layer=1, sigma=0.2)]):
        found = model(**inputs, output_hidden_states=True, output_attentions=True)
    for one, other in zip(plain.hidden_states + plain.attentions, found.hidden_states + found.attentions):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_autocast_and_half_precision():
    model, inputs = build("bert", dropout=0.1), batch("bert")
    with regularize(model, [LNSR(sigma=0.2)], seed=SEED) as handle:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs, example_keys=KEYS).loss.backward()
        mixed = handle.metrics()["lnsr"]
        model.to(torch.bfloat16)(**inputs, example_keys=KEYS).loss.backward()
        half = handle.metrics()["lnsr"]
        model.float()(**inputs, example_keys=KEYS)
        exact = handle.metrics()["lnsr"]
    assert mixed == pytest.approx(exact, rel=0.1)
    assert half == pytest.approx(exact, rel=0.1)


def test_dropout_that_cannot_be_shared(caplog):
    model = build("bert", dropout=0.1)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="inside its kernel"):
        regularize(model, [LNSR()])
    regularize(model, [LNSR(same_dropout=False)]).remove()
    config = OPTConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=32,
    )
    with regularize(OPTForSequenceClassification(config), [LNSR()]):
        assert "OPTDecoderLayer applies dropout in its own forward" in caplog.text


def test_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.1, target_modules=["query", "value"])
    model, inputs = peft.get_peft_model(build("bert", dropout=0.1), config).train(), batch("bert")
    check_same_dropout(model, inputs)
    with regularize(model, [LNSR(sigma=0.2)]) as handle:
        model(**inputs).loss.backward()
        assert handle.metrics()["lnsr"] > 0


@pytest.mark.parametrize(
    ("family", "head", "task", "targets"),
    [
        ("llama", "classification", "SEQ_CLS", ["q_proj", "v_proj"]),
        ("qwen3", "causal", "CAUSAL_LM", ["q_proj", "v_proj"]),
        ("gpt2", "causal", "CAUSAL_LM", ["c_attn"]),
    ],
)
def test_lora_on_decoders(family, head, task, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type=task, r=4, target_modules=targets)
    model = peft.get_peft_model(build(family, head, dropout=0.0), config).train()
    inputs = batch(family, head=head)
    plain = model(**inputs).loss
    with regularize(model, [LNSR(sigma=0.2)]) as handle:
        outputs = model(**inputs)
        outputs.loss.backward()
        metrics = handle.metrics()
    assert metrics["task_loss"] == pytest.approx(plain.item(), rel=1e-5)
    assert metrics["lnsr"] > 0
    assert outputs.past_key_values is None


def test_a_layer_in_eval_mode_ends_no_stream_silently():
    model, inputs = build("bert"), batch("bert")
    with regularize(model, [LNSR()]):
        model.bert.encoder.layer[1].eval()
        with pytest.raises(UserError, match="layer 1 is in eval mode"):
            model(**inputs)


def test_a_module_between_layers_is_refused_at_the_embedding_output():
    model, inputs = build("deberta-v2", conv_kernel_size=3, conv_act="gelu"), batch("deberta-v2")
    with pytest.raises(UserError, match="conv joins the first layer's input with its output"):
        regularize(model, [LNSR()])
    with regularize(model, [LNSR(layer=1)]) as handle:
        model(**inputs)
        assert handle.metrics()["lnsr"] > 0


def test_noise_at_the_fork_is_added_once_where_norms_add_it(monkeypatch):
    model, inputs = build("bert", dropout=0.0), batch("bert")
    found = []
    for fuse in ("never", "always"):
        monkeypatch.setenv("DIST_REG_FUSE", fuse)
        with regularize(model, [HyPe(sigma=0.3), LNSR(layer=1)], seed=SEED):
            found.append(model(**inputs, example_keys=KEYS).logits)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_torch_compile_gives_the_same_numbers(family):
    model, inputs = build(family, dropout=0.0), batch(family)
    with regularize(model, [LNSR(sigma=0.2, layer=1)], seed=SEED):
        loss = model(**inputs, example_keys=KEYS).loss
        loss.backward()
        expected = gradients(model)
        compiled = torch.compile(model, backend="aot_eager")
        found = compiled(**inputs, example_keys=KEYS).loss
        found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "layer is 3, but the model's layers are numbered 0 to 2"),
        ({"layer_weights": [1.0, 2.0]}, "2 numbers for 3 compared layers"),
        ({"layer": 1, "layers": "0-2"}, "below layer: 1"),
        ({"layers": "5"}, "out of range"),
        ({"layer_weights": [0.0, 0.0, 0.0]}, "layer_weights are all 0"),
    ],
)
def test_options_that_do_not_fit_the_model(options, message):
    with pytest.raises(UserError, match=message):
        regularize(build("bert"), [LNSR(**options)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be a finite number >= 0; it is -1.0"),
        ({"sigma": math.nan}, "sigma must be a finite number"),
        ({"layer": -1}, "layer must be a finite number >= 0"),
        ({"noise": "neighbour", "layer": 2}, "layer must be 0; it is 2"),
        ({"noise": "secant", "scale": "absolute"}, "secant needs scale: relative"),
        ({"noise": "gausian"}, "did you mean 'gaussian'"),
        ({"layer_weights": [1.0, -1.0]}, "layer_weights must be finite numbers >= 0; one is -1.0"),
        ({"layer_weights": "quadratic"}, "constant, linear or a list"),
        ({"neighbours": 0}, "neighbours must be a finite number >= 1"),
        ({"layer_weights": ["a"]}, "layer_weights must be finite numbers"),
        ({"layer": 1.5}, "layer must be a whole number; it is 1.5"),
        ({"weight": "a"}, "weight must be a number; it is 'a'"),
        ({"sigma": None}, "sigma must be a number; it is None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LNSR(**options)
    with pytest.raises(UserError):
        build_method("lnsr", options)


def test_secant_needs_a_pair():
    model, inputs = build("bert"), batch("bert", batch_size=1)
    with regularize(model, [LNSR(noise="secant")]), pytest.raises(UserError, match="needs two examples"):
        model(**inputs)


def test_a_term_that_is_not_finite_names_itself_and_the_examples():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    spoiled = 7
    inputs["input_ids"][inputs["input_ids"] == spoiled] = 8
    inputs["input_ids"][2, 1] = spoiled
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[spoiled] = math.inf
    with regularize(model, [LNSR()]), pytest.raises(UserError, match=r"term lnsr .* layer 0 .* \[2\]"):
        model(**inputs)
