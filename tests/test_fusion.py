"""Noise added by the norm beside a layer: the same run as noise added alone, and only where that is safe."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dist_reg import HyPe, Method, UserError, fusion, layer_noise, regularize
from dist_reg.backbone import closing_norms, find_backbone, opening_norms
from tests.models import batch, build
from tests.test_attach import gradients, loss_of, state

pytestmark = pytest.mark.compat

CLOSING = ("bert", "roberta", "xlm-roberta", "electra", "deberta-v2")
OPENING = ("llama", "qwen3", "mistral")
NEITHER = ("gpt2", "distilbert", "modernbert", "t5")
OPERATIONS = ("perturb", "layer_norm_perturb", "perturb_rms_norm")
KEYS = torch.arange(4) + 9


@pytest.fixture
def calls(monkeypatch):
    """How often each operation was called."""
    counted = Counter()

    def counting(name, operation):
        def call(*args, **kwargs):
            counted[name] += 1
            return operation(*args, **kwargs)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(layer_noise, name, counting(name, getattr(layer_noise, name)))
    return counted


@pytest.fixture
def both(monkeypatch):
    """Runs a function with noise never fused and with noise always fused: two results."""

    def run(function):
        results = []
        for choice in ("never", "always"):
            monkeypatch.setenv("DIST_REG_FUSE", choice)
            results.append(function())
        return results

    return run


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setenv("DIST_REG_FUSE", "always")


@dataclass(frozen=True, kw_only=True)
class Reader(Method):
    """A method that reads what layers return, and nothing else."""

    name: ClassVar[str] = "reader"

    def attach(self, host):
        host.reads_outputs()


@dataclass(frozen=True, kw_only=True)
class Watcher(Method):
    """A method with a transform of its own where the noise enters layer 1."""

    name: ClassVar[str] = "watcher"

    def attach(self, host):
        host.transform_input(1, lambda hidden_states, step: 2 * hidden_states)


def trained(model, inputs, keys=KEYS):
    """The loss, and every gradient by name."""
    loss = loss_of(model, inputs, example_keys=keys)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        options = tolerance or {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found[name], expected[name], **options, msg=lambda m, n=name: f"{n}: {m}")


def padding_of(family):
    return "left" if family in OPENING else "right"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", CLOSING + OPENING)
def test_loss_and_gradients_are_the_same(family, checkpointing, both, calls):
    def run():
        model, inputs = build(family), batch(family, padding=padding_of(family))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with regularize(model, [HyPe(sigma=0.1, dropout="keep")], seed=5) as handle:
            handle.measure = False
            calls.clear()
            return trained(model, inputs), dict(calls)

    (expected, alone), (found, fused) = both(run)
    assert_same(found, expected)
    assert alone.keys() == {"perturb"}
    if family in CLOSING:
        # The embeddings' noise is added alone; a recomputation adds each layer's once more.
        assert fused["layer_norm_perturb"] == (4 if checkpointing else 2)
        assert fused["perturb"] <= 2
    elif checkpointing:
        assert fused.keys() == {"perturb"}
    else:
        assert fused == {"perturb_rms_norm": 3}


@pytest.mark.parametrize("scale", ["absolute", "relative"])
@pytest.mark.parametrize("distribution", ["normal", "uniform", "uniform_released"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_kind_of_noise_is_the_same(family, distribution, scale, both):
    def run():
        model, inputs = build(family, dropout=0.0), batch(family)
        with regularize(model, [HyPe(sigma=0.1, distribution=distribution, scale=scale)], seed=5):
            return trained(model, inputs)

    expected, found = both(run)
    assert_same(found, expected)


@pytest.mark.parametrize("layers", ["last:1", [0, 2], "all"])
@pytest.mark.parametrize("site", ["input", "both"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_chosen_layers_and_noise_within_as_well(family, site, layers, both):
    def run():
        model, inputs = build(family), batch(family)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with regularize(model, [HyPe(sigma=0.1, layers=layers, site=site, dropout="keep")], seed=5):
            return trained(model, inputs)

    expected, found = both(run)
    assert_same(found, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "llama"])
def test_forwards_before_one_backward_keep_their_own_noise(family, checkpointing, both):
    def run():
        model = build(family, dropout=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with regularize(model, [HyPe(sigma=0.3)], seed=5):
            one = model(**batch(family, seed=1), example_keys=KEYS).loss
            two = model(**batch(family, seed=2), example_keys=KEYS + 50).loss
            model.eval()
            with torch.no_grad():
                model(**batch(family, seed=2))
            model.train()
            (one + two).backward()
            return gradients(model)

    expected, found = both(run)
    assert_same(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_reentrant_checkpointing_adds_the_noise_once(family, both):
    def run():
        model, inputs = build(family), batch(family)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with regularize(model, [HyPe(sigma=0.1, dropout="keep")], seed=5):
            return trained(model, inputs)

    expected, found = both(run)
    assert_same(found, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("bert", ["query", "dense"]),
        ("deberta-v2", ["query_proj", "dense"]),
        ("llama", ["q_proj", "down_proj"]),
    ],
)
def test_lora_on_top(family, targets, checkpointing, both, calls):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets, init_lora_weights=False)

    def run():
        torch.manual_seed(0)
        model, inputs = peft.get_peft_model(build(family), config), batch(family)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with regularize(model.train(), [HyPe(sigma=0.1, dropout="keep")], seed=5):
            calls.clear()
            return trained(model, inputs), set(calls)

    (expected, _), (found, used) = both(run)
    assert_same(found, expected)
    assert used & set(OPERATIONS[1:]) or (family == "llama" and checkpointing)


@pytest.mark.parametrize("asked", ["argument", "configuration"])
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "llama"])
def test_requested_hidden_states_are_clean(family, asked, both, calls):
    def run():
        model, inputs = build(family, dropout=0.0), batch(family)
        options = {"output_hidden_states": True} if asked == "argument" else {}
        with regularize(model, [HyPe(sigma=0.1)], seed=5):
            without = model(**inputs, example_keys=KEYS).loss
            calls.clear()
            if asked == "configuration":
                model.config.output_hidden_states = True
            outputs = model(**inputs, example_keys=KEYS, **options)
            assert "layer_norm_perturb" not in calls
            model.config.output_hidden_states = False
            again = model(**inputs, example_keys=KEYS).loss
        torch.testing.assert_close(outputs.loss, without)
        assert torch.equal(again, without)
        return {str(i): h for i, h in enumerate(outputs.hidden_states)} | {"loss": outputs.loss}

    expected, found = both(run)
    assert_same(found, expected)


def test_a_method_that_reads_outputs_gets_clean_ones(always, calls):
    for family, fused in (("bert", None), ("llama", "perturb_rms_norm")):
        calls.clear()
        model = build(family)
        with regularize(model, [HyPe(sigma=0.1), Reader()]):
            model(**batch(family))
        assert "layer_norm_perturb" not in calls
        assert fused is None or fused in calls


def test_a_transform_beside_the_noise_keeps_its_turn(both):
    for methods in ([HyPe(sigma=0.1), Watcher()], [Watcher(), HyPe(sigma=0.1)]):

        def run(methods=methods):
            model = build("bert")
            with regularize(model, methods, seed=5):
                return trained(model, batch("bert"))

        expected, found = both(run)
        assert_same(found, expected)


@pytest.mark.parametrize("family", NEITHER)
def test_a_family_without_a_known_norm_is_as_before(family, both):
    head = "tokens" if family == "t5" else "classification"

    def run():
        model = build(family, head)
        backbone = find_backbone(model)
        assert not closing_norms(backbone)
        assert not opening_norms(backbone)
        with regularize(model, [HyPe(sigma=0.1)], seed=5):
            return trained(model, batch(family, head=head))

    expected, found = both(run)
    assert_same(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", CLOSING + OPENING)
def test_the_norms_found_are_the_layers_own(family):
    backbone = find_backbone(build(family))
    closing, opening = closing_norms(backbone), opening_norms(backbone)
    if family in CLOSING:
        assert not opening
        assert closing == {i: layer.output.LayerNorm for i, layer in enumerate(backbone.layers)}
    else:
        assert not closing
        assert opening == {i: layer.input_layernorm for i, layer in enumerate(backbone.layers)}


def test_where_the_structure_differs_nothing_is_fused():
    assert not closing_norms(find_backbone(build("bert", chunk_size_feed_forward=3)))
    # DeBERTa's convolution acts between the first layer and the second.
    assert not closing_norms(find_backbone(build("deberta-v2", conv_kernel_size=3)))
    assert not closing_norms(find_backbone(build("bert", intermediate_size=32)))
    patched = build("llama")
    norm = patched.model.layers[0].input_layernorm
    norm.forward = lambda hidden_states: hidden_states
    assert list(opening_norms(find_backbone(patched))) == [1, 2]


@pytest.mark.parametrize(("model_type", "plain"), [("gemma", False), ("olmo2", False), ("granite", True)])
def test_only_the_plain_rms_norm_is_taken(model_type, plain):
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes, **heads))
    assert bool(opening_norms(find_backbone(model))) == plain


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_remove_restores_the_norms(family, always):
    model, inputs = build(family), batch(family)
    before, loss = state(model), loss_of(model, inputs)
    modules = {name: sorted(vars(module)) for name, module in model.named_modules()}
    names = list(model.state_dict())
    handle = regularize(model, [HyPe(sigma=0.1)])
    loss_of(model, inputs).backward()
    assert list(model.state_dict()) == names
    handle.remove()
    model.zero_grad()
    assert {k: v for k, v in state(model).items() if k != "weights"} == {
        k: v for k, v in before.items() if k != "weights"
    }
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == modules
    assert torch.equal(loss_of(model, inputs), loss)


def test_a_norm_wrapped_since_is_left_inert(always):
    model, inputs = build("bert", dropout=0.0), batch("bert")
    plain = model(**inputs).loss
    handle = regularize(model, [HyPe(sigma=0.1)])
    norm = model.bert.encoder.layer[0].output.LayerNorm
    ours = norm.forward
    norm.forward = lambda hidden_states: ours(hidden_states)
    assert not torch.equal(model(**inputs).loss, plain)
    handle.remove()
    assert torch.equal(model(**inputs).loss, plain)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_deep_copy_has_norms_of_its_own(family, always, calls):
    model, inputs = build(family, dropout=0.0), batch(family)
    with regularize(model, [HyPe(sigma=0.1)], seed=1):
        loss = model(**inputs, example_keys=KEYS).loss
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs, example_keys=KEYS).loss, loss)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if "norm" in name.lower():
                    parameter.mul_(3)
        calls.clear()
        assert not torch.equal(twin(**inputs, example_keys=KEYS).loss, loss)
        assert set(calls) & set(OPERATIONS[1:])
        assert torch.equal(model(**inputs, example_keys=KEYS).loss, loss)


@pytest.mark.parametrize("change", ["clone", "in place"])
def test_noise_that_does_not_arrive_is_an_error(change, always):
    model, inputs = build("bert"), batch("bert")

    def changed(module, args, output):
        return output.clone() if change == "clone" else output.mul_(2)

    with regularize(model, [HyPe(sigma=0.1)]):
        model.bert.encoder.layer[0].register_forward_hook(changed)
        with pytest.raises(UserError, match="DIST_REG_FUSE=never"):
            model(**inputs)


@pytest.mark.parametrize("compiled", [0, 1, 2])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_compiled_layer_between_others_has_its_noise_once(family, compiled, both):
    def run():
        model, inputs = build(family, dropout=0.0), batch(family)
        torch._dynamo.reset()
        find_backbone(model).layers[compiled].compile(backend="eager")
        with regularize(model, [HyPe(sigma=0.1)], seed=5):
            return trained(model, inputs)

    expected, found = both(run)
    assert_same(found, expected)


def test_an_unknown_choice_is_an_error(monkeypatch):
    monkeypatch.setenv("DIST_REG_FUSE", "alway")
    with pytest.raises(UserError, match="DIST_REG_FUSE='alway'; did you mean 'always'|did you mean 'always'"):
        regularize(build("bert"), [HyPe()])


def test_measuring_changes_nothing(both):
    for family in ("bert", "llama"):
        for measure in (True, False):

            def run(family=family, measure=measure):
                model = build(family).to(torch.bfloat16)
                with regularize(model, [HyPe(sigma=0.01)], seed=5) as handle:
                    handle.measure = measure
                    return trained(model, batch(family)), handle.metrics()

            _, (found, metrics) = both(run)
            assert ("hype/noise_survival" in metrics) == measure
            if measure:
                expected = found
        assert_same(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_survival_in_bf16_says_what_rounding_left(family, both):
    """A closing norm rounds norm and noise together, so that a little of what is too small alone is left."""

    def run(sigma):
        model = build(family, dropout=0.0).to(torch.bfloat16)
        with regularize(model, [HyPe(sigma=sigma)], seed=5) as handle:
            handle.measure = True
            model(**batch(family), example_keys=KEYS)
            return handle.metrics()["hype/noise_survival"]

    for sigma, low, high in ((1e-5, 0.0, 0.15), (1e-1, 0.9, 1.0)):
        alone, fused = both(lambda sigma=sigma: run(sigma))
        assert low <= alone <= high
        assert low <= fused <= high


@pytest.mark.parametrize(("family", "sigma"), [("bert", 1e-7), ("llama", 1e-9)])
def test_survival_of_a_float32_stream_is_that_of_noise_alone(family, sigma, both):
    def run():
        model = build(family, dropout=0.0)
        with regularize(model, [HyPe(sigma=sigma)], seed=5) as handle:
            handle.measure = True
            model(**batch(family, padding=padding_of(family)), example_keys=KEYS)
            return handle.metrics()["hype/noise_survival"]

    alone, fused = both(run)
    assert 0.05 < alone < 0.95
    assert fused == pytest.approx(alone, abs=0.1)


def test_on_a_cpu_auto_fuses_what_gains_there(monkeypatch, calls):
    monkeypatch.delenv("DIST_REG_FUSE", raising=False)
    for kind, family, operation in (
        ("layer_norm", "bert", "layer_norm_perturb"),
        ("rms_norm", "llama", "perturb_rms_norm"),
    ):
        for faster in (False, True):
            monkeypatch.setitem(fusion.FASTER_ON_CPU, kind, faster)
            calls.clear()
            model = build(family)
            with regularize(model, [HyPe()]) as handle:
                handle.measure = False
                model(**batch(family))
            assert (operation in calls) == faster
