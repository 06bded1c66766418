"""HIRE against its formula, example by example and layer by layer; where it acts, and where it refuses to."""

from __future__ import annotations

import copy
import gc
import logging
import sys
import threading
import weakref

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaForCausalLM

from dist_reg import HIRE, LNSR, MVCR, HyPe, RDrop, UserError, regularize
from dist_reg.attach import MEASURE_EVERY
from dist_reg.backbone import find_backbone
from dist_reg.config import build_method
from dist_reg.extractor import pack
from dist_reg.kept import kept_methods
from tests.models import FAMILIES, HIDDEN, PAD, batch, build

pytestmark = pytest.mark.compat

SEED = 17
KEYS = torch.arange(4) + 3
CHEAP = HIRE(extractor="attention", fusion_rnn=False)
ENDS = {
    "modernbert": "final_norm",
    "distilbert": "transformer",
    "llama": "norm",
    "qwen3": "norm",
    "mistral": "norm",
    "gpt2": "ln_f",
    "t5": "final_layer_norm",
}
"""The part of the base model whose output the head, or the pooler before it, reads; else its encoder."""


def head_of(family):
    return "tokens" if family == "t5" else "classification"


def stirred(module):
    """`module` with weights that make every part count: as it begins, the gates are closed to what they read."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.5 if name == "gate_weight" else 0.2
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        module.gate_bias.fill_(0.3)
    return module


def summary(module, method, states):
    """u of one layer and one example from its real tokens [t, D]."""
    if method.extractor == "gru":
        plain = nn.GRU(states.shape[1], module.gru.hidden_size, 2, bidirectional=True)
        _, last = torch.func.functional_call(plain, dict(module.gru.named_parameters()), (states[:, None],))
        return torch.cat((last[2, 0], last[3, 0]))
    shares = (states @ module.query / states.shape[1] ** 0.5).softmax(0)
    return (shares[:, None] * states).sum(0)


def by_the_formula(module, method, hidden_states, mask):
    """(M [B, T, D] with zeros at padding, gates [L][B]) in loops over examples and layers, with stacks and nn.GRU."""
    hidden_states = hidden_states if method.include_embeddings else hidden_states[1:]
    rows, gates = [], []
    for b in range(mask.shape[0]):
        real = mask[b].bool()
        states = torch.stack([state[b, real] for state in hidden_states])
        logits = [
            summary(module, method, state) @ module.gate_weight + module.gate_bias[0] for state in states
        ]
        logits = torch.stack(logits)
        own = logits.softmax(0) if method.normalisation == "softmax" else logits.relu()
        last, mixed = states[-1], (own[:, None, None] * states).sum(0)
        third = last + mixed if method.combine == "sum" else last - mixed
        four = torch.cat((last, mixed, third, last * mixed), 1)
        fused = (four @ module.fusion_weight.T + module.fusion_bias).relu()
        if method.fusion_rnn:
            plain = nn.GRU(fused.shape[1], module.fusion_gru.hidden_size, 2, bidirectional=True)
            parameters = dict(module.fusion_gru.named_parameters())
            fused = torch.func.functional_call(plain, parameters, (fused[:, None],))[0][:, 0]
        row = torch.zeros(mask.shape[1], fused.shape[1])
        row[real] = fused
        rows.append(row)
        gates.append(own)
    return torch.stack(rows), torch.stack(gates, 1)


def by_hand(model, family, method, module, inputs):
    """(outputs, gates) of the bare model, whose head is given what the formula makes of `output_hidden_states`."""
    reading = {name: value for name, value in inputs.items() if name not in ("labels",)}
    base = find_backbone(model).base
    hidden_states = base(**reading, output_hidden_states=True).hidden_states
    fused, gates = by_the_formula(module, method, hidden_states, inputs["attention_mask"])

    def hook(_, args, output):
        if isinstance(output, torch.Tensor):
            return fused
        output.last_hidden_state = fused
        if output.get("hidden_states") is not None:
            output.hidden_states = (*output.hidden_states[:-1], fused)
        return output

    registered = base.get_submodule(ENDS.get(family, "encoder")).register_forward_hook(hook)
    outputs = model(**inputs)
    registered.remove()
    return outputs, gates


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare_with_loops(family, method, head=None, padding="right"):
    head = head or head_of(family)
    model, inputs = build(family, head, dropout=0.0), batch(family, head=head, padding=padding)
    inputs = {name: value[[2, 0, 3, 1]] for name, value in inputs.items()}  # not the longest first
    with regularize(model, [method], seed=SEED) as handle:
        module = stirred(model.dist_reg_hire)
        outputs = model(**inputs, example_keys=KEYS)
        outputs.loss.backward()
        got, metrics = gradients(model), handle.metrics()
    expected_outputs, gates = by_hand(model, family, method, module, inputs)
    expected_outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(expected_outputs.loss.item(), rel=1e-5)
    expected = gradients(model) | {
        f"dist_reg_hire.{name}": p.grad for name, p in module.named_parameters() if p.grad is not None
    }
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
    first = 0 if method.include_embeddings else 1
    for number, gate in enumerate(gates.mean(1), start=first):
        assert metrics[f"hire/gate_{number}"] == pytest.approx(gate.item(), rel=1e-4, abs=1e-6)
    assert f"hire/gate_{first + len(gates)}" not in metrics


@pytest.mark.parametrize("method", [HIRE(), CHEAP], ids=["gru", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_loops_and_stacks(family, method):
    compare_with_loops(family, method)


@pytest.mark.parametrize("head", ["tokens", "qa"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_head_reads_it(family, head):
    compare_with_loops(family, HIRE(), head)


def test_regression_reads_it():
    method = HIRE()
    model, inputs = build("bert", dropout=0.0, num_labels=1), batch("bert")
    inputs["labels"] = torch.tensor([0.5, 1.5, -1.0, 2.0])
    with regularize(model, [method], seed=SEED):
        module = stirred(model.dist_reg_hire)
        loss = model(**inputs).loss
    expected, _ = by_hand(model, "bert", method, module, inputs)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"gru_hidden": 5, "fusion_rnn": False},
        {"fusion_rnn": False},
        {"include_embeddings": True},
        {"combine": "difference"},
        {"normalisation": "softmax"},
        {"extractor": "attention"},
        {
            "extractor": "attention",
            "include_embeddings": True,
            "combine": "difference",
            "normalisation": "softmax",
        },
    ],
    ids=str,
)
def test_options_against_loops(options):
    compare_with_loops("bert", HIRE(**options))


@pytest.mark.parametrize("method", [HIRE(), CHEAP], ids=["gru", "attention"])
def test_padding_on_the_left_against_loops(method):
    compare_with_loops("llama", method, padding="left")


@pytest.mark.parametrize("method", [HIRE(), CHEAP], ids=["gru", "attention"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_more_padding_changes_nothing(family, method):
    model, inputs = build(family).eval(), batch(family, labels=False)
    wider = {
        name: torch.cat((value, torch.full((4, 7), PAD if name == "input_ids" else 0)), 1)
        for name, value in inputs.items()
    }
    with regularize(model, [method], seed=SEED):
        stirred(model.dist_reg_hire)
        one, other = model(**inputs).logits, model(**wider).logits
        alone = model(**{name: value[2:3, :5] for name, value in inputs.items()}).logits
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one[2:3], alone, rtol=1e-5, atol=1e-6)


def test_no_mask_is_a_mask_of_ones():
    model, inputs = build("bert").eval(), batch("bert", labels=False)
    ones = torch.ones_like(inputs["input_ids"])
    with regularize(model, [HIRE()], seed=SEED):
        one = model(inputs["input_ids"]).logits
        other = model(inputs["input_ids"], attention_mask=ones).logits
    torch.testing.assert_close(one, other)


def test_a_masked_token_between_real_ones_is_not_read():
    model, inputs = build("bert").eval(), batch("bert", labels=False)
    inputs["attention_mask"][:, 1] = 0
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, 1] = 7
    for method in (HIRE(), CHEAP):
        with regularize(model, [method], seed=SEED):
            stirred(model.dist_reg_hire)
            assert torch.equal(model(**inputs).logits, model(**other).logits)


def test_a_mask_that_does_not_say_the_real_tokens_is_refused():
    model, inputs = build("llama").eval(), batch("llama", labels=False)
    causal = torch.zeros(4, 1, 9, 9)
    with (
        regularize(model, [HIRE()]),
        pytest.raises(
            UserError,
            match=r"hire needs an attention_mask \[batch, tokens\] = \[4, 9\], .*; it is \[4, 1, 9, 9\]",
        ),
    ):
        model(inputs["input_ids"], attention_mask=causal)


def test_an_example_without_a_real_token_is_no_nan():
    model, inputs = build("bert"), batch("bert")
    inputs["attention_mask"][1] = 0
    for method in (HIRE(), CHEAP):
        with regularize(model, [method], seed=SEED):
            loss = model(**inputs).loss
            loss.backward()
            assert torch.isfinite(loss)
            assert all(torch.isfinite(p.grad).all() for p in model.parameters())
            model.zero_grad()


def test_packing_is_that_of_pytorch():
    real = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0], [1] * 7]).bool()
    values = torch.arange(4 * 7).view(4, 7)
    packing = pack(real)
    sequences = [values[row][real[row]] for row in range(4)]
    expected = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    assert torch.equal(packing.counts, expected.batch_sizes)
    assert packing.order.tolist() == [3, 1, 0, 2]
    by_order = [sequences[i] for i in packing.order.tolist()]
    expected = nn.utils.rnn.pack_sequence(by_order, enforce_sorted=True)
    assert torch.equal(values.flatten()[packing.rows], expected.data)


def test_as_it_begins_the_gates_are_equal_and_the_head_reads_what_it_read():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [HIRE()], seed=SEED) as handle:
        model(**inputs)
        metrics = handle.metrics()
        module = model.dist_reg_hire
        assert [metrics[f"hire/gate_{number}"] for number in (1, 2, 3)] == pytest.approx([1 / 3] * 3)
        first = module.fusion_weight[:, :HIDDEN] - torch.eye(HIDDEN)
        assert first.std() < 0.03
        assert module.fusion_weight[:, HIDDEN:].std() < 0.03


def test_initial_weights_depend_on_seed_and_name_alone():
    found = []
    for seed, draws in ((1, 0), (1, 7), (2, 0)):
        torch.manual_seed(draws)
        model = build("bert")
        regularize(model, [HIRE()], seed=seed)
        found.append(dict(model.dist_reg_hire.named_parameters()))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name
    for name in ("gru.weight_hh_l1_reverse", "fusion_gru.weight_ih_l0", "fusion_weight"):
        assert not torch.equal(found[0][name], found[2][name])
    assert not torch.equal(found[0]["gru.weight_hh_l0"], found[0]["fusion_gru.weight_hh_l0"])


@pytest.mark.parametrize("family", ["bert", "llama", "deberta-v2"])
def test_it_acts_in_eval_and_comes_off(family):
    model, inputs = build(family, dropout=0.0), batch(family)
    bare = copy.deepcopy(model)
    names = list(model.state_dict())
    with regularize(model, [HIRE()], seed=SEED) as handle:
        stirred(model.dist_reg_hire)
        trained = model(**inputs).logits
        model.eval()
        torch.testing.assert_close(model(**inputs).logits, trained)
        assert not torch.equal(trained, bare(**inputs).logits)
        assert handle.metrics()
    assert list(model.state_dict()) == names
    assert not kept_methods(model)
    assert torch.equal(model(**inputs).logits, bare.eval()(**inputs).logits)


def test_baking_leaves_it_in_the_model():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    handle = regularize(model, [HyPe(sigma=0.1), HIRE()], seed=SEED)
    stirred(model.dist_reg_hire)
    expected = model.eval()(**inputs).logits
    handle.bake()
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model.train()(**inputs).logits, model(**inputs).logits)  # no noise any more
    assert kept_methods(model)["hire"].method == HIRE()
    handle.remove()  # nothing is left to take off: it is the model's own now
    assert torch.equal(model.eval()(**inputs).logits, expected)
    with regularize(build("bert"), [HIRE()]) as inside:
        inside.bake()
    assert hasattr(inside.model, "dist_reg_hire")


def test_a_model_that_has_it_can_be_regularised_again():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    regularize(model, [HIRE()], seed=SEED).bake()
    stirred(model.dist_reg_hire)
    expected = model(**inputs).logits
    with regularize(model, [HIRE(), HyPe(sigma=0.1)], seed=SEED + 1) as handle:
        assert not torch.equal(model(**inputs, example_keys=KEYS).logits, expected)
        assert "hire/gate_3" in handle.metrics()
    assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(
        UserError, match=r"this model has hire with extractor: gru, and extractor: attention is"
    ):
        regularize(model, [HIRE(extractor="attention")])
    assert torch.equal(model(**inputs).logits, expected)


def test_a_copy_of_the_model_follows_its_own_weights():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    regularize(model, [HIRE()], seed=SEED)
    stirred(model.dist_reg_hire)
    twin = copy.deepcopy(model)
    expected = model(**inputs).logits
    assert torch.equal(twin(**inputs).logits, expected)
    with torch.no_grad():
        twin.dist_reg_hire.fusion_weight.zero_()
    assert torch.equal(model(**inputs).logits, expected)
    assert not torch.equal(twin(**inputs).logits, expected)


def test_threads_do_not_mix_their_batches():
    model = build("bert").eval()
    regularize(model, [CHEAP], seed=SEED)
    stirred(model.dist_reg_hire)
    batches = [batch("bert", seed=seed, tokens=5 + seed, labels=False) for seed in range(4)]
    with torch.no_grad():
        expected = [model(**inputs).logits for inputs in batches]
    right = []

    def serve(number):
        with torch.no_grad():
            for _ in range(20):
                right.append(torch.equal(model(**batches[number]).logits, expected[number]))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert right == [True] * 80


def test_nothing_is_kept_of_a_forward_that_is_over():
    model, inputs = build("bert").eval(), batch("bert", labels=False)
    regularize(model, [CHEAP], seed=SEED)
    kept = []
    model.dist_reg_hire.register_forward_pre_hook(lambda module, args: kept.extend(map(weakref.ref, args[0])))
    with torch.no_grad():
        model(**inputs)
    gc.collect()
    assert len(kept) == 3
    assert not any(state() is not None for state in kept)

    def fail(module, args):
        raise RuntimeError("out of memory")

    hook = model.bert.encoder.layer[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**inputs)
    hook.remove()
    with pytest.raises(UserError, match="call the whole model"):
        model.bert.encoder(torch.zeros(1, 3, HIDDEN))


def test_gates_are_measured_where_the_run_measures():
    model, inputs = build("bert"), batch("bert")
    with regularize(model, [HIRE()]) as handle:
        handle.measure = False
        model(**inputs)
        assert list(handle.metrics()) == ["task_loss"]
        handle.measure = True
        model(**inputs)
        assert "hire/gate_1" in handle.metrics()
    assert MEASURE_EVERY > 1


@pytest.mark.parametrize("before", [False, True], ids=["attached now", "there before"])
@pytest.mark.parametrize("fuse", ["always", "never"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_reads_the_states_without_noise(family, fuse, before, monkeypatch):
    """Noise enters a layer behind the place where its input is read."""
    monkeypatch.setenv("DIST_REG_FUSE", fuse)
    model, inputs = build(family, dropout=0.0), batch(family)
    if before:
        regularize(model, [HIRE()], seed=SEED).bake()
    with regularize(model, [HIRE(), HyPe(sigma=0.3, dropout="keep")], seed=SEED):
        layers, seen, left = find_backbone(model).layers, [], []
        model.dist_reg_hire.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for layer in layers:
            layer.register_forward_hook(lambda module, args, output: left.append(output))
        model(**inputs, example_keys=KEYS)
    outputs = [output if isinstance(output, torch.Tensor) else output[0] for output in left]
    for state, output in zip(seen[0][:-1], outputs[:-1], strict=True):
        assert torch.equal(state, output)
        if family == "bert":  # what a LayerNorm returns has deviation 1, and noise would add to it
            torch.testing.assert_close(state.std(-1, correction=0), torch.ones(4, 9), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", [HIRE(), CHEAP], ids=["gru", "attention"])
def test_beside_lnsr_it_reads_the_clean_half(family, method):
    model, inputs = build(family, dropout=0.0), batch(family)
    with regularize(model, [method], seed=SEED):
        stirred(model.dist_reg_hire)
        alone = model(**inputs).loss
        alone.backward()
        expected = gradients(model)
    with regularize(model, [LNSR(layer=1, sigma=0.1, weight=0.0), method], seed=SEED) as handle:
        stirred(model.dist_reg_hire)
        loss = model(**inputs, example_keys=KEYS).loss
        loss.backward()
        got, metrics = gradients(model), handle.metrics()
    assert metrics["task_loss"] == pytest.approx(alone.item(), rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_beside_rdrop_both_halves_are_read():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [HIRE()], seed=SEED):
        stirred(model.dist_reg_hire)
        expected = model(**inputs)
    with regularize(model, [HIRE(), RDrop(alpha=1.0)], seed=SEED) as handle:
        stirred(model.dist_reg_hire)
        outputs = model(**inputs, example_keys=KEYS)
        metrics = handle.metrics()
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-5, atol=1e-6)
    assert metrics["rdrop"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["task_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)


def test_beside_mvcr_it_reads_what_the_autoencoders_return():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    seen = []
    method = MVCR(layers="all", warmup_epochs=0, learning_rate_multiple=1.0)
    with regularize(model, [method, HIRE()], seed=SEED) as handle:
        model.dist_reg_hire.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        made = []
        for name, module in model.named_children():
            if name.startswith("dist_reg_mvcr"):
                module.register_forward_hook(lambda module, args, output: made.append(output[0]))
        model(**inputs, example_keys=KEYS).loss.backward()
        assert handle.metrics()["mvcr"] > 0
    for state, output in zip(seen[0], made, strict=True):
        assert torch.equal(state, output)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_activation_checkpointing_changes_nothing(family):
    inputs, found = batch(family), []
    for checkpointing in (False, True):
        model = build(family, dropout=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with regularize(model, [HyPe(sigma=0.1, dropout="keep"), HIRE()], seed=SEED):
            stirred(model.dist_reg_hire)
            loss = model(**inputs, example_keys=KEYS).loss
            second = model(**inputs, example_keys=KEYS + 100).loss  # another forward before the backward
            (loss + second).backward()
            found.append((loss.item(), gradients(model)))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_checkpointing_the_whole_model_changes_nothing():
    inputs, found = batch("bert", labels=False), []
    for checkpointing in (False, True):
        model = build("bert", dropout=0.0)
        regularize(model, [HIRE()], seed=SEED).bake()
        stirred(model.dist_reg_hire)

        def run(ids, mask, model=model):
            return model(ids, attention_mask=mask).logits

        arguments = (inputs["input_ids"], inputs["attention_mask"])
        logits = checkpoint(run, *arguments, use_reentrant=False) if checkpointing else run(*arguments)
        logits.square().sum().backward()
        found.append(gradients(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_reentrant_checkpointing_would_lose_gradients():
    model = build("bert")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with regularize(model, [HIRE()]), pytest.raises(UserError, match="hire does not work with reentrant"):
        model(**batch("bert"))


@pytest.mark.parametrize("method", [HIRE(), CHEAP], ids=["gru", "attention"])
def test_half_precision(method):
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [method], seed=SEED):
        stirred(model.dist_reg_hire)
        expected = model(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**inputs)
            outputs.loss.backward()
        torch.testing.assert_close(outputs.logits.float(), expected, rtol=0.1, atol=0.1)
        assert all(p.grad is not None for p in model.dist_reg_hire.parameters())
        model.zero_grad()
        model.to(torch.bfloat16)
        half = model(**inputs)
        half.loss.backward()
        torch.testing.assert_close(half.logits.float(), expected, rtol=0.2, atol=0.2)


def test_modules_of_another_dtype_than_the_model():
    model, inputs = build("bert", dropout=0.0).to(torch.bfloat16), batch("bert")
    with regularize(model, [HIRE()], seed=SEED):
        assert model.dist_reg_hire.fusion_weight.dtype == torch.float32
        outputs = model(**inputs)
        outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert torch.isfinite(outputs.loss)


def test_adapters_train_beside_it():
    peft = pytest.importorskip("peft")
    model = build("bert", dropout=0.0)
    config = peft.LoraConfig(r=4, target_modules=["query", "dense"], task_type="SEQ_CLS")
    model = peft.get_peft_model(model, config)
    with regularize(model, [HIRE()], seed=SEED) as handle:
        model(**batch("bert")).loss.backward()
        assert "hire/gate_1" in handle.metrics()
        assert all(p.grad is not None for p in model.get_base_model().dist_reg_hire.parameters())


def test_adapters_around_a_model_that_has_it(caplog):
    peft = pytest.importorskip("peft")
    model, inputs = build("bert", dropout=0.0), batch("bert")
    regularize(model, [CHEAP], seed=SEED).bake()
    stirred(model.dist_reg_hire)
    expected = model(**inputs).logits
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    wrapped = peft.get_peft_model(model, config).train()
    with caplog.at_level(logging.WARNING), regularize(wrapped, [CHEAP]) as handle:
        torch.testing.assert_close(wrapped(**inputs).logits, expected)
        assert "hire/gate_1" in handle.metrics()
    assert "hire added modules whose parameters have been frozen since" in caplog.text
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected)
    assert kept_methods(merged)["hire"].method == CHEAP
    assert any(name.startswith("dist_reg_hire") for name in merged.state_dict())


def test_adapters_that_train_a_copy_of_its_module():
    peft = pytest.importorskip("peft")
    model = build("bert", dropout=0.0)
    regularize(model, [CHEAP], seed=SEED).bake()
    config = peft.LoraConfig(
        r=4, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["dist_reg_hire"]
    )
    wrapped = peft.get_peft_model(model, config).train()
    wrapped(**batch("bert")).loss.backward()
    grown = [name for name, p in wrapped.named_parameters() if "dist_reg_hire" in name and p.grad is not None]
    assert any("modules_to_save" in name and "fusion_weight" in name for name in grown)


def test_the_head_is_the_models_own():
    model = build("bert")
    regularize(model, [HIRE()]).bake()
    assert find_backbone(model).head is model.classifier


def test_the_model_compiles():
    model, inputs = build("bert", dropout=0.0).eval(), batch("bert", labels=False)
    with regularize(model, [CHEAP], seed=SEED), torch.no_grad():
        stirred(model.dist_reg_hire)
        expected = model(**inputs).logits
        compiled = torch.compile(model, backend="aot_eager")
        if Version(transformers.__version__) < Version("5.23"):
            # Compiled layers then run without their hooks: said, not silently another model.
            with pytest.raises(UserError, match="hire reads 3 layers and 1 ran"):
                compiled(**inputs)
            return
        got = compiled(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_outputs_as_a_tuple():
    model, inputs = build("bert").eval(), batch("bert")
    with regularize(model, [HIRE()], seed=SEED):
        expected = model(**inputs)
        loss, logits = model(**inputs, return_dict=False)[:2]
    assert torch.equal(logits, expected.logits)
    assert torch.equal(loss, expected.loss)


class Own(LlamaForCausalLM):
    """A class that Transformers does not know."""


REFUSED = [
    (lambda: build("bert", "base"), "hire: BertModel has no head that reads hidden states"),
    (lambda: build("llama", "causal"), "hire: LlamaForCausalLM predicts the next token"),
    (lambda: build("gpt2", "causal"), "hire: GPT2LMHeadModel predicts the next token"),
    (lambda: Own(build("llama", "causal").config), "hire: Own predicts the next token"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=["no head", "llama", "gpt2", "own"])
def test_models_it_cannot_help_are_refused_with_the_reason(make, message):
    model = make()
    names = list(model.state_dict())
    with pytest.raises(UserError, match=message):
        regularize(model, [HIRE()])
    assert list(model.state_dict()) == names


def test_an_encoder_decoder_is_refused():
    with pytest.raises(UserError, match="T5ForSequenceClassification is an encoder-decoder"):
        regularize(build("t5", "classification"), [HIRE()], layers_path="transformer.encoder.block")


def test_a_cache_is_refused():
    model = build("llama").eval()
    ids = torch.full((1, 4), 7)
    cache = model.model(ids, use_cache=True).past_key_values
    with (
        regularize(model, [HIRE()]),
        pytest.raises(UserError, match="call the model without past_key_values"),
    ):
        model(ids, past_key_values=cache)


def test_calling_a_part_of_the_model_alone_is_refused():
    model = build("bert").eval()
    with regularize(model, [HIRE()]), pytest.raises(UserError, match="call the whole model"):
        model.bert.encoder(torch.zeros(1, 3, HIDDEN))


MISTAKES = [
    ({"extractor": "lstm"}, "hire: extractor: input should be 'gru' or 'attention'; it is 'lstm'"),
    ({"combine": "product"}, "hire: combine: input should be 'sum' or 'difference'; it is 'product'"),
    ({"gru_hidden": 0}, "hire: gru_hidden must be a whole number of at least 1; it is 0"),
    (
        {"gru_hidden": 8, "extractor": "attention", "fusion_rnn": False},
        "gru_hidden has no effect without a GRU",
    ),
    ({"gru_hiden": 8}, "gru_hidden"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        build_method("hire", options)
    if "gru_hiden" not in options:
        with pytest.raises(UserError):
            HIRE(**options)


def test_a_width_that_the_head_cannot_read_is_refused():
    with pytest.raises(
        UserError, match=r"returns 2 x 5 channels where the head reads 32; set gru_hidden: 16, or"
    ):
        regularize(build("bert"), [HIRE(gru_hidden=5)])
    config = BertConfig(
        vocab_size=50, hidden_size=15, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
    )
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(
        UserError, match=r"returns 2 x 7 channels where the head reads 15; set fusion_rnn: false"
    ):
        regularize(model, [HIRE()])
    with regularize(model, [HIRE(fusion_rnn=False)]):
        model(torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()


def test_ideal_cost_counts_multiplications():
    assert HIRE(extractor="attention", fusion_rnn=False).ideal_cost(6, 384) == pytest.approx(1 + 3 / 72)
    assert HIRE(fusion_rnn=False).ideal_cost(6, 384) == pytest.approx(1 + (3 + 6 * 9) / 72)
    assert HIRE().ideal_cost(6, 384) == pytest.approx(1 + (3 + 7 * 9) / 72)


def test_no_warning_about_rates_of_its_own(caplog):
    with caplog.at_level(logging.WARNING), regularize(build("bert"), [HIRE()]) as handle:
        handle.model(**batch("bert"))
        assert not handle.learning_rate_multiples()
    assert "rate of their own" not in caplog.text
