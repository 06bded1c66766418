"""Adapters through PEFT: options, fresh weights from the seed, weights in fewer bits, and folders of trained ones."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dist_reg import HyPe, UserError, regularize
from dist_reg.adapters import adapter_config, add_adapters, base_of, trained_share
from dist_reg.config import ModelConfig, load_run
from dist_reg.model import load_model, load_with_adapters, resolve_model
from tests.models import batch, build
from tests.tiny import save_tiny

CLASSES, CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"


def test_options_are_pefts_own():
    config = adapter_config({"r": 4, "lora_alpha": 8, "target_modules": ["query"]}, CLASSES)
    assert (config.r, config.lora_alpha, config.task_type) == (4, 8, "SEQ_CLS")
    assert adapter_config({"peft_type": "ia3"}, CAUSAL).peft_type == "IA3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "peft: LORA has no option 'rank'; did you mean 'rank_pattern'"),
        ({"peft_type": "LORE"}, "peft.peft_type: unknown kind 'LORE'; did you mean 'LORA'"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING puts tokens of its own before an example's"),
        ({"task_type": "CAUSAL_LM"}, "peft.task_type follows from the run"),
        ({"r": 4, "layers_to_transform": 1, "target_modules": "q.*"}, "peft: "),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(UserError, match=message):
        adapter_config(options, CLASSES)


def test_a_place_that_does_not_exist():
    config = adapter_config({"r": 4, "target_modules": ["nowhere"]}, CLASSES)
    with pytest.raises(UserError, match="peft: No modules were targeted"):
        add_adapters(build("bert"), config, 0)


def adapted(seed: int, disturb: int = 0):
    torch.manual_seed(disturb)
    return add_adapters(build("bert", dropout=0.0), adapter_config({"r": 4}, CLASSES), seed)


def test_fresh_adapters_follow_from_the_seed_alone():
    one, same, other = adapted(3), adapted(3, disturb=9), adapted(4)
    weights = [dict(model.named_parameters()) for model in (one, same, other)]
    drawn = [name for name in weights[0] if "lora_A" in name]
    assert drawn
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in drawn)
    model = build("bert")
    before = torch.random.get_rng_state()
    add_adapters(model, adapter_config({"r": 4}, CLASSES), 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "weights train" in trained_share(one)
    trained = [name for name, weight in weights[0].items() if weight.requires_grad]
    assert all("lora" in name or "classifier" in name for name in trained)


def test_the_head_of_the_task_is_trained_and_noise_acts():
    model, inputs = adapted(0), batch("bert")
    plain = model(**inputs).loss
    with regularize(model, [HyPe(sigma=0.3)]):
        noisy = model(**inputs).loss
        noisy.backward()
    assert abs(noisy - plain) > 1e-4
    assert any(p.grad is not None and "classifier" in name for name, p in model.named_parameters())
    assert all(
        p.grad is None
        for name, p in model.named_parameters()
        if "lora" not in name and "classifier" not in name
    )


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_weights_in_fewer_bits(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    build("llama", "causal", dropout=0.0, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    save_tiny(tmp_path / "tokens")
    for file in (tmp_path / "tokens").glob("token*"):
        file.rename(tmp_path / file.name)
    whole, _ = load_model(ModelConfig(name=str(tmp_path)), CAUSAL, 0)
    held, _ = load_model(ModelConfig(name=str(tmp_path), quantize=bits), CAUSAL, 0)
    assert (
        type(held.model.layers[0].self_attn.q_proj).__name__
        == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]
    )
    model = add_adapters(held, adapter_config({"r": 4, "target_modules": "all-linear"}, CAUSAL), 0).train()
    inputs = batch("llama", head="causal")
    with regularize(model, [HyPe(sigma=1e-4)], seed=1):
        loss = model(**inputs).loss
        loss.backward()
    assert loss.item() == pytest.approx(whole(**inputs).loss.item(), rel=0.05)
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(gradient.abs().sum() > 0 and gradient.dtype == torch.float32 for gradient in gradients)


def test_frozen_weights_in_16_bits_and_those_that_train_in_32(tmp_path):
    save_tiny(tmp_path / "model")
    held, _ = load_model(ModelConfig(name=str(tmp_path / "model"), dtype="bfloat16"), CLASSES, 0)
    model = add_adapters(held, adapter_config({"r": 4}, CLASSES), 0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {
        p.dtype
        for name, p in model.named_parameters()
        if not p.requires_grad and "original_module" not in name
    }
    assert frozen == {torch.bfloat16}
    outputs = model(**batch("bert"))
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.float32
    held, _ = load_model(ModelConfig(name=str(tmp_path / "model"), dtype="bfloat16"), CLASSES, 0)
    with pytest.raises(UserError, match="would train in torch.bfloat16, which rounds small steps away"):
        add_adapters(held, adapter_config({"r": 4, "bias": "all"}, CLASSES), 0)


def test_a_folder_of_trained_adapters(tmp_path):
    base = save_tiny(tmp_path / "a base", head="base")
    model, tokenizer = load_model(ModelConfig(name=str(base)), CLASSES, 0, num_labels=4)
    adapted = add_adapters(model, adapter_config({"r": 4, "init_lora_weights": False}, CLASSES), 0).eval()
    folder = tmp_path / "adapters"
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert base_of(folder) == str(base)
    loaded, _ = load_with_adapters(ModelConfig(name=str(folder)), CLASSES, 0, num_labels=4)
    assert loaded.fresh_parameters == []
    inputs = batch("bert", labels=False)
    assert torch.equal(loaded.eval()(**inputs).logits, adapted(**inputs).logits)
    again = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4).eval()
    assert torch.equal(again(**inputs).logits, adapted(**inputs).logits), "without this project"
    with pytest.raises(UserError, match="the adapters in .* do not fit the model .*size mismatch"):
        load_with_adapters(ModelConfig(name=str(folder)), CLASSES, 0, num_labels=3)
    with pytest.raises(UserError, match="holds adapters and no model; give the model that they belong to"):
        resolve_model(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not say which model the adapters belong to"):
        base_of(folder)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "model: {name: minilm, quantize: 4bit}",
            "model.quantize is for weights that adapters leave as they are; add peft",
        ),
        (
            "model: {name: minilm, dtype: bfloat16}",
            "model.dtype is for weights that adapters leave as they are",
        ),
        (
            "model: {name: minilm, quantize: 3bit}\npeft: {}",
            "model.quantize: input should be '4bit' or '8bit'",
        ),
    ],
)
def test_run_files(tmp_path, lines, message):
    (tmp_path / "run.yaml").write_text(f"{lines}\ntask: demo\n")
    with pytest.raises(UserError, match=message):
        load_run(tmp_path / "run.yaml")
