"""Language models through the command line: packed rows and adapters on two processes against one, and real data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.distributed.launch import run
from tests.distributed.task_run import train
from tests.models import build
from tests.tasks.test_lm import GSM8K, decoder_tokenizer

pytestmark = pytest.mark.slow


def write_pairs(path: Path, count: int, start: int = 0) -> None:
    """Prompts whose completions follow from them, of 3 to 14 words."""
    nouns, words = ("film", "book", "meal"), ("good", "bad", "slow")
    lines = []
    for index in range(start, start + count):
        noun = index % 3
        prompt = "the " * (1 + 5 * index % 7) + nouns[noun]
        lines.append({"prompt": prompt, "completion": f"is {words[noun]}" + " and very" * (index % 4) + " ."})
    path.write_text("\n".join(json.dumps(line) for line in lines))


def run_file(folder: Path, **changes) -> dict:
    return {
        "model": str(folder / "model"),
        "task": "lm",
        "data": {
            "data_dir": str(folder),
            "train": "train.jsonl",
            "dev": "dev.jsonl",
            "max_length": 32,
            "lm": {"packing": True},
        },
        "methods": [{"hype": {"sigma": 0.05}}, {"lnsr": {"layer": 1, "sigma": 0.1}}],
        "batch_size": 8,
        "train": {"max_steps": 20, "learning_rate": 1e-2, "eval_strategy": "no"},
        **changes,
    }


@pytest.mark.parametrize("adapters", [None, {"r": 4, "target_modules": "all-linear"}], ids=["whole", "lora"])
def test_the_same_run_on_one_process_and_two(tmp_path, adapters):
    build("llama", "causal", dropout=0.0).save_pretrained(tmp_path / "model")
    decoder_tokenizer().save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "train.jsonl", 80)
    write_pairs(tmp_path / "dev.jsonl", 13, 80)
    file = run_file(tmp_path, peft=adapters)
    one = train(tmp_path, "one", 1, file, None)
    assert one["counts"]["train"]["packed_rows"] < 45
    assert one["train_examples"] == 80
    scores = one["metrics"]["dev"]
    assert scores["perplexity"] == pytest.approx(2.718281828 ** scores["loss"], rel=1e-3)
    assert one["losses"][-1] < (0.8 if adapters is None else 0.97) * one["losses"][0]
    assert (one["main_metric_scale"], one["greater_is_better"]) == ("number", False)
    cut = {**file, "train": {**file["train"], "gradient_accumulation_steps": 4}}
    assert train(tmp_path, "cut", 1, cut, None)["losses"] == pytest.approx(one["losses"], rel=5e-4)
    for stage in ("zero2", "zero3"):
        two = train(tmp_path, stage, 2, file, stage)
        assert two["losses"] == pytest.approx(one["losses"], rel=5e-4), stage
        assert two["metrics"]["dev"]["perplexity"] == pytest.approx(scores["perplexity"], rel=1e-3)
    folder = tmp_path / "zero3" / "model"
    if adapters is None:
        AutoModelForCausalLM.from_pretrained(folder)
        return
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert any(weight.abs().sum() > 0 for name, weight in loaded.named_parameters() if "lora_B" in name)
    done = run(["-m", "dist_reg", "eval", str(tmp_path / "zero3"), "--out", str(tmp_path / "scores.json")])
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads((tmp_path / "scores.json").read_text())["dev"]
    assert again["perplexity"] == pytest.approx(two["metrics"]["dev"]["perplexity"], rel=1e-4)


def byte_pairs(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `size` pieces, learnt from `texts`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["[PAD]", "[END]"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[END]")


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not at {GSM8K}")
@pytest.mark.parametrize(
    ("family", "stage", "method", "adapters"),
    [
        ("llama", "zero2", {"lnsr": {"layer": 1}}, None),
        ("qwen3", "zero3", "rdrop", {"r": 8, "lora_alpha": 16}),
        ("llama", "zero3", "neftune", {"r": 8, "target_modules": "all-linear"}),
    ],
)
def test_real_data(tmp_path, family, stage, method, adapters):
    texts = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    options = {"vocab_size": 800, "max_position_embeddings": 512}
    build(family, "causal", dropout=0.0, **options).save_pretrained(tmp_path / "model")
    byte_pairs([row["question"] + row["answer"] for row in texts], 800).save_pretrained(tmp_path / "model")
    file = run_file(
        tmp_path,
        data={
            "train": str(GSM8K),
            "dev_fraction": 0.05,
            "dev_samples": 20,
            "train_samples": 100,
            "max_length": 512,
            "lm": {"prompt": "Question: {question}\nAnswer: ", "completion": "{answer}", "packing": True},
        },
        methods=["hype", method],
        peft=adapters,
        train={"max_steps": 6, "learning_rate": 1e-2, "eval_strategy": "no"},
    )
    results = train(tmp_path, stage, 2, file, stage)
    assert results["losses"][-1] < results["losses"][0]
    assert results["metrics"]["dev"]["perplexity"] < 800
    name = method if isinstance(method, str) else "lnsr"
    assert any(term.startswith(name) for term in results["terms"]), results["terms"]
