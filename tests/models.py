"""Tiny random models of every supported family, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PreTrainedModel,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
)

VOCABULARY = 100
HIDDEN = 32
PAD, START, END = 0, 1, 2
LABELS = 3

_AUTO = {
    "base": AutoModel,
    "classification": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "qa": AutoModelForQuestionAnswering,
    "masked": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
}
ENCODER_HEADS = ("base", "classification", "tokens", "qa", "masked")
DECODER_HEADS = ("base", "classification", "tokens", "qa", "causal")


@dataclass(frozen=True)
class Family:
    """How to configure a family: `fields` maps (layers, dropout) to the fields of its configuration."""

    config: type
    fields: Callable[[int, float], dict[str, Any]]
    heads: tuple[str, ...]


def _common(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }


def _bert(layers: int, dropout: float) -> dict[str, Any]:
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    rates = dict.fromkeys(names, dropout)
    return _common(layers) | rates


def _electra(layers: int, dropout: float) -> dict[str, Any]:
    return _bert(layers, dropout) | {"embedding_size": HIDDEN}


def _deberta(layers: int, dropout: float) -> dict[str, Any]:
    # As in DeBERTa-v3: disentangled attention with shared keys and a norm on the relative embeddings.
    rates = {"pooler_dropout": dropout, "cls_dropout": dropout}
    attention = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
        "pooler_hidden_size": HIDDEN,
    }
    return _bert(layers, dropout) | rates | attention


def _modernbert(layers: int, dropout: float) -> dict[str, Any]:
    rates = {f"{name}_dropout": dropout for name in ("embedding", "attention", "mlp", "classifier")}
    attention = {"local_attention": 8, "global_attn_every_n_layers": 2}
    return _common(layers) | rates | attention | {"cls_token_id": START, "sep_token_id": END}


def _distilbert(layers: int, dropout: float) -> dict[str, Any]:
    rates = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"), dropout)
    sizes = {"dim": HIDDEN, "n_layers": layers, "n_heads": 4, "hidden_dim": 48}
    return {"vocab_size": VOCABULARY, "max_position_embeddings": 64} | sizes | rates


def _llama(layers: int, dropout: float) -> dict[str, Any]:
    rates = {"attention_dropout": dropout, "classifier_dropout": dropout}
    return _common(layers) | rates | {"num_key_value_heads": 2, "head_dim": 8}


def _gpt2(layers: int, dropout: float) -> dict[str, Any]:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"), dropout)
    sizes = {"n_embd": HIDDEN, "n_layer": layers, "n_head": 4, "n_inner": 48, "n_positions": 64}
    return {"vocab_size": VOCABULARY} | sizes | rates


def _t5(layers: int, dropout: float) -> dict[str, Any]:
    rates = {"dropout_rate": dropout, "classifier_dropout": dropout}
    sizes = {"d_model": HIDDEN, "num_layers": layers, "num_heads": 4, "d_kv": 8, "d_ff": 48}
    return {"vocab_size": VOCABULARY, "decoder_start_token_id": PAD} | sizes | rates


FAMILIES: dict[str, Family] = {
    "bert": Family(BertConfig, _bert, ENCODER_HEADS),
    "roberta": Family(RobertaConfig, _bert, ENCODER_HEADS),
    "xlm-roberta": Family(XLMRobertaConfig, _bert, ENCODER_HEADS),
    "electra": Family(ElectraConfig, _electra, ENCODER_HEADS),
    "deberta-v2": Family(DebertaV2Config, _deberta, ENCODER_HEADS),
    "modernbert": Family(ModernBertConfig, _modernbert, ENCODER_HEADS),
    "distilbert": Family(DistilBertConfig, _distilbert, ENCODER_HEADS),
    "llama": Family(LlamaConfig, _llama, DECODER_HEADS),
    "qwen3": Family(Qwen3Config, _llama, DECODER_HEADS),
    "mistral": Family(MistralConfig, _llama, DECODER_HEADS),
    "gpt2": Family(GPT2Config, _gpt2, DECODER_HEADS),
    # "classification" is an encoder-decoder (find_backbone then needs layers_path); the others are encoders.
    "t5": Family(T5Config, _t5, ("base", "tokens", "classification")),
}


def build(
    family: str,
    head: str = "classification",
    *,
    layers: int = 3,
    dropout: float = 0.1,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model of `family` in training mode, the same for the same seed.

    `overrides` are fields of its configuration; `dropout` is the rate of every dropout that
    the family has, on hidden states and on attention probabilities.
    """
    entry = FAMILIES[family]
    if head not in entry.heads:
        raise KeyError(f"{family} has the heads {entry.heads}, not {head!r}")
    tokens = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    labels = {} if head == "qa" else {"num_labels": LABELS}
    config = entry.config(**entry.fields(layers, dropout) | tokens | labels | overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if (family, head) == ("t5", "base"):
            return T5EncoderModel(config).train()
        return _AUTO[head].from_config(config).train()


def batch(
    family: str,
    *,
    head: str = "classification",
    batch_size: int = 4,
    tokens: int = 9,
    seed: int = 0,
    labels: bool = True,
    padding: str = "right",
) -> dict[str, Tensor]:
    """Inputs of different lengths, [batch_size, tokens], the first row full; labels as `head` reads them."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(END + 1, VOCABULARY, (batch_size, tokens), generator=generator)
    lengths = torch.tensor([max(2, tokens - 2 * (row % 4)) for row in range(batch_size)])
    positions = torch.arange(tokens).expand(batch_size, tokens)
    if padding == "left":
        positions = positions.flip(1)
    attention_mask = (positions < lengths[:, None]).long()
    if family == "t5":
        # T5ForSequenceClassification reads the state at the end-of-sequence token: one per row.
        last = torch.full_like(lengths, tokens - 1) if padding == "left" else lengths - 1
        input_ids[torch.arange(batch_size), last] = END
    input_ids = input_ids.masked_fill(attention_mask == 0, PAD)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if not labels or head == "base":
        return inputs
    if head == "classification":
        return inputs | {"labels": torch.randint(0, LABELS, (batch_size,), generator=generator)}
    if head == "qa":
        first = attention_mask.argmax(1)
        return inputs | {"start_positions": first, "end_positions": first + 1}
    words = torch.randint(0, LABELS, input_ids.shape, generator=generator) if head == "tokens" else input_ids
    return inputs | {"labels": words.masked_fill(attention_mask == 0, -100)}
