"""`regularize`: what it changes, what it leaves alone, and where it works."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dist_reg import MVCR, HyPe, Method, UserError, regularize
from tests.models import FAMILIES, batch, build

pytestmark = pytest.mark.compat


@dataclass(frozen=True, kw_only=True)
class Doubled(Method):
    """A method with terms of its own: the mean squares of two layers' inputs, an example at a time, by name."""

    name: ClassVar[str] = "doubled"
    weight: float = 2.0

    def attach(self, host):
        for layer in (0, 1):
            host.transform_input(layer, self._watch(layer))

    def _watch(self, layer):
        def watch(hidden_states, step):
            term = self.weight * hidden_states.square().mean((1, 2))
            step.add_term(f"doubled_{layer}", layer, term)
            return hidden_states

        return watch


def loss_of(model, inputs, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model(**inputs, **kwargs).loss


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def state(model):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "dropout": [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "attributes": sorted(vars(model)),
    }


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "t5"])
def test_every_family_is_perturbed_in_training_and_untouched_in_eval(family):
    model, inputs = build(family, dropout=0.0), batch(family)
    plain_train, plain_eval = model(**inputs).logits, model.eval()(**inputs).logits
    with regularize(model.train(), [HyPe(sigma=0.1)], seed=1):
        keys = torch.arange(4)
        noisy = model(**inputs, example_keys=keys)
        again = model(**inputs, example_keys=keys)
        assert torch.isfinite(noisy.loss)
        assert not torch.allclose(noisy.logits, plain_train, atol=1e-4)
        assert torch.equal(noisy.logits, again.logits)
        assert torch.equal(model.eval()(**inputs).logits, plain_eval)
    assert torch.equal(model.train()(**inputs).logits, plain_train)


def test_t5_encoder_is_perturbed():
    model, inputs = build("t5", "tokens", dropout=0.0), batch("t5", head="tokens")
    plain = model(**inputs).logits
    with regularize(model, [HyPe(sigma=0.1)]):
        assert not torch.allclose(model(**inputs).logits, plain, atol=1e-4)
    assert torch.equal(model(**inputs).logits, plain)


def test_sigma_zero_with_dropout_kept_is_plain_fine_tuning_bit_for_bit():
    model, inputs = build("bert"), batch("bert")
    plain = loss_of(model, inputs)
    plain.backward()
    expected = gradients(model)
    with regularize(model, [HyPe(sigma=0.0, dropout="keep")]):
        loss = loss_of(model, inputs, example_keys=torch.arange(4))
        loss.backward()
        assert torch.equal(loss, plain)
        for name, gradient in gradients(model).items():
            assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_remove_restores_the_model(family):
    model, inputs = build(family), batch(family)
    before, loss = state(model), loss_of(model, inputs)
    handle = regularize(model, [HyPe(sigma=0.1, site="both")])
    assert state(model)["hooks"] > before["hooks"]
    loss_of(model, inputs)
    handle.remove()
    handle.remove()
    after = state(model)
    assert {k: v for k, v in after.items() if k != "weights"} == {
        k: v for k, v in before.items() if k != "weights"
    }
    assert all(torch.equal(after["weights"][name], value) for name, value in before["weights"].items())
    assert torch.equal(loss_of(model, inputs), loss)


def test_remove_after_somebody_else_wrapped_the_forward_leaves_it_inert():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    plain = model(**inputs).loss
    handle = regularize(model, [HyPe(sigma=0.1)])
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    handle.remove()
    assert torch.equal(model(**inputs).loss, plain)


def test_nothing_of_ours_is_in_the_state_dict():
    model = build("bert")
    names = list(model.state_dict())
    with regularize(model, [HyPe()]):
        assert list(model.state_dict()) == names


def test_signature_is_unchanged():
    model = build("bert")
    before = inspect.signature(model.forward)
    with regularize(model, [HyPe()]):
        assert inspect.signature(model.forward) == before


def test_terms_are_added_to_the_loss_and_reported():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    plain = model(**inputs).loss
    states = []
    hook = model.bert.encoder.layer[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    hook2 = model.bert.encoder.layer[1].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model(**inputs)
    hook.remove()
    hook2.remove()
    terms = [2.0 * state.square().mean() for state in states]
    with regularize(model, [Doubled()]) as handle:
        loss = model(**inputs).loss
        assert loss.item() == pytest.approx((plain + sum(terms)).item(), rel=1e-6)
        from_tuple = model(**inputs, return_dict=False)[0]
        assert torch.equal(from_tuple, loss)
        metrics = handle.metrics()
        assert metrics["task_loss"] == pytest.approx(plain.item(), rel=1e-6)
        assert metrics["doubled_0"] == pytest.approx(terms[0].item(), rel=1e-6)
        assert metrics["doubled_1"] == pytest.approx(terms[1].item(), rel=1e-6)
        assert handle.metrics() == {}


@pytest.mark.parametrize("site", ["input", "within", "both"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "deberta-v2"])
def test_activation_checkpointing_gives_the_same_gradients(family, site):
    model, inputs = build(family, dropout=0.1), batch(family)
    with regularize(model, [HyPe(sigma=0.1, site=site, dropout="keep")], seed=5):
        keys = torch.arange(4) + 9
        loss_of(model, inputs, example_keys=keys).backward()
        expected = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model, inputs, example_keys=keys).backward()
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("site", ["input", "within", "both"])
@pytest.mark.parametrize("family", ["bert", "llama", "distilbert", "gpt2"])
def test_forwards_before_one_backward_keep_their_own_noise_under_checkpointing(family, site):
    model = build(family, dropout=0.0)
    first, second = batch(family, seed=1), batch(family, seed=2)
    with regularize(model, [HyPe(sigma=0.3, site=site)], seed=5):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            one = model(**first, example_keys=torch.arange(4)).loss
            two = model(**second, example_keys=torch.arange(4) + 50).loss
            model.eval()
            with torch.no_grad():
                model(**second)
            model.train()
            (one + two).backward()
            found = gradients(model)
            if not checkpointing:
                expected = found
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_without_keys_the_noise_follows_torch_generator():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [HyPe(sigma=0.1)]):
        assert torch.equal(loss_of(model, inputs, seed=3), loss_of(model, inputs, seed=3))
        assert not torch.equal(loss_of(model, inputs, seed=3), loss_of(model, inputs, seed=4))


@pytest.mark.parametrize("after", ["nothing", "a forward", "a forward that failed"])
def test_calling_the_backbone_directly_is_not_silent(after):
    model, inputs = build("bert"), batch("bert", labels=False)
    with regularize(model, [HyPe(sigma=0.1)]):
        if after == "a forward":
            model(**batch("bert"))
        elif after == "a forward that failed":
            with pytest.raises(ValueError, match="batch_size"):
                model(**inputs, labels=torch.zeros(3, dtype=torch.long))
        with pytest.warns(UserWarning, match=r"BertForSequenceClassification\.forward"):
            model.bert(**inputs)


def test_lora_model_is_perturbed_and_its_loss_returned():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model, inputs = peft.get_peft_model(build("bert", dropout=0.0), config), batch("bert")
    model.train()
    plain = model(**inputs).loss
    with regularize(model, [HyPe(sigma=0.3)]) as handle:
        noisy = model(**inputs, example_keys=torch.arange(4)).loss
        assert (noisy - plain).abs() > 1e-5
        noisy.backward()
        assert handle.metrics()["task_loss"] == pytest.approx(noisy.item())
        assert model.get_base_model().accepts_loss_kwargs is False
    assert torch.equal(model(**inputs).loss, plain)


@pytest.mark.parametrize(
    ("family", "head", "ignored"),
    [
        ("bert", "classification", True),
        ("llama", "classification", True),
        ("bert", "tokens", True),
        ("llama", "causal", False),
        ("gpt2", "causal", False),
    ],
)
def test_only_losses_that_ignore_num_items_are_declared_so(family, head, ignored):
    model, inputs = build(family, head, dropout=0.0), batch(family, head=head)
    counted = model(**inputs, num_items_in_batch=1000).loss
    assert torch.equal(counted, model(**inputs).loss) == ignored
    with regularize(model, []):
        assert (vars(model).get("accepts_loss_kwargs") is False) == ignored
    assert "accepts_loss_kwargs" not in vars(model)


def test_attaching_twice_is_refused():
    model = build("bert")
    with regularize(model, [HyPe()]), pytest.raises(UserError, match=r"regularised already \(hype\)"):
        regularize(model, [])
    with pytest.raises(UserError, match="'hype' is listed twice"):
        regularize(model, [HyPe(), HyPe(sigma=1.0)])


def test_a_failed_attach_leaves_nothing():
    model = build("bert")
    before = state(model)
    with pytest.raises(UserError, match=r"3 layer"):
        regularize(model, [HyPe(layers="7-9")])
    after = state(model)
    assert after["hooks"] == before["hooks"]
    assert after["dropout"] == before["dropout"]
    assert after["attributes"] == before["attributes"]


def test_no_warning_in_an_ordinary_step():
    model, inputs = build("bert"), batch("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with regularize(model, [HyPe(sigma=0.1)]):
            model(**inputs).loss.backward()


def test_a_deep_copy_is_a_regularised_model_of_its_own():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [HyPe(sigma=0.1)], seed=1):
        keys = torch.arange(4)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs, example_keys=keys).loss, model(**inputs, example_keys=keys).loss)
        with torch.no_grad():
            twin.classifier.weight.zero_()
            twin.classifier.bias.zero_()
        assert twin(**inputs, example_keys=keys).logits.abs().max() == 0
        assert model(**inputs, example_keys=keys).logits.abs().max() > 0


def test_a_deep_copy_trains_the_modules_of_its_own():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    with regularize(model, [MVCR()], seed=1):
        twin = copy.deepcopy(model)
        twin(**inputs, example_keys=torch.arange(4)).loss.backward()
        assert all(parameter.grad is not None for parameter in twin.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())
        twin._dist_reg_handle.remove()
        assert not any("dist_reg" in name for name in twin.state_dict())
        assert any("dist_reg" in name for name in model.state_dict())


def test_removing_a_deep_copys_handle_leaves_the_original_alone():
    model, inputs = build("bert", dropout=0.0), batch("bert")
    handle = regularize(model, [HyPe(sigma=0.3)], seed=1)
    keys = torch.arange(4)
    noisy = model(**inputs, example_keys=keys).loss
    other = copy.deepcopy(model)
    other._dist_reg_handle.remove()
    assert "forward" not in vars(other)
    assert not torch.equal(other(**inputs).loss, noisy)
    assert torch.equal(model(**inputs, example_keys=keys).loss, noisy)
    handle.remove()
    assert torch.equal(model(**inputs).loss, other(**inputs).loss)


def test_off_without_keys_leaves_the_generator_to_dropout():
    model, inputs = build("bert", dropout=0.1), batch("bert")
    plain = loss_of(model, inputs)
    with regularize(model, [HyPe(sigma=0.0, dropout="keep")]):
        assert torch.equal(loss_of(model, inputs), plain)


def test_positional_inputs_reach_the_noise_through_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        build("bert", dropout=0.0), peft.LoraConfig(r=4, target_modules=["query", "value"])
    ).train()
    inputs = batch("bert", labels=False)
    plain = model(inputs["input_ids"], inputs["attention_mask"]).logits
    with regularize(model, [HyPe(sigma=0.3)]):
        assert not torch.allclose(
            model(inputs["input_ids"], inputs["attention_mask"]).logits, plain, atol=1e-3
        )


def test_prompt_tuning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = peft.get_peft_model(build("bert", dropout=0.0), config).train()
    with (
        regularize(model, [HyPe(sigma=0.3)]),
        pytest.raises(UserError, match="13 tokens where the model was given 9"),
    ):
        model(**batch("bert"))


def test_a_term_without_a_loss_to_add_it_to_is_an_error():
    model = build("bert")
    with regularize(model, [Doubled()]), pytest.raises(UserError, match="returned no loss to add doubled_0"):
        model(**batch("bert", labels=False))
