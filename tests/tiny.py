"""Folders that look like small pretrained models: tiny random weights and a word-level tokenizer."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.models import VOCABULARY, build

WORDS = [
    "[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "a", "film", "book", "meal", "is", "was", "very", "not", "good",
    "bad", "fine", "poor", "great", "dull", "kind", "slow", "and", "but", ".",
]  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, BERT's special tokens, ids below the tiny models' vocabulary."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    assert len(vocabulary) <= VOCABULARY
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def save_tiny(folder: Path, family: str = "bert", *, head: str = "classification", **options) -> Path:
    """Write a tiny pretrained model to `folder`; `head="base"` leaves the classifier to be drawn afresh."""
    build(family, head, **options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_reviews(path: Path, rows: int, *, start: int = 0) -> Path:
    """A jsonl file of `rows` small reviews with a learnable label in columns `text` and `label`."""
    nouns, good, bad = (
        ("film", "book", "meal"),
        ("good", "great", "fine", "kind"),
        ("bad", "poor", "dull", "slow"),
    )
    lines = []
    for index in range(start, start + rows):
        positive, negated = index % 2, (index // 2) % 2
        word = (good if positive else bad)[(index // 4) % 4]
        noun, tail = nouns[(index // 16) % 3], " and very" * ((index // 48) % 7)
        text = f"the {noun} was {'not ' if negated else ''}{word}{tail} ."
        lines.append(f'{{"text": "{text}", "label": {int(positive != negated)}}}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
