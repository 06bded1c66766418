"""Fine-tuning of causal language models: the next token of texts, completions, or what an assistant says."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dist_reg.data.lm import CHAT, COMPLETION, TEXT, LMOptions
from dist_reg.data.sampling import sample_rows
from dist_reg.data.table import Table
from dist_reg.errors import UserError
from dist_reg.streams import IGNORED
from dist_reg.tasks.base import EXAMPLE_ID, Task
from dist_reg.tasks.chats import spoken, template_of
from dist_reg.tasks.collator import Collator
from dist_reg.tasks.packing import PackedCollator, pack, pack_rows, try_model

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BLOCK = 32
"""Block b of a text has the example id text + (b << 32)."""


@dataclass(frozen=True, kw_only=True)
class LMTask(Task):
    """A task of kind `lm`.

    Data sets have the columns of their form (see `dist_reg.data.lm.examples_of`) and `example_id`; tokenized ones `input_ids`,
    `label` (the token itself where it counts in the loss, -100 elsewhere), `cut` (whether `max_length` cut something that
    counts) and `turns_left_out`. A text longer than `max_length` is several rows, each beginning with the last token of the one
    before, so that every token but the text's first is predicted once.
    """

    form: str
    """TEXT, COMPLETION or CHAT."""
    options: LMOptions
    packed: bool = False
    """Whether `train` (tokenized) has several examples in a row."""

    model_class: ClassVar[str] = "AutoModelForCausalLM"
    default_length: ClassVar[int] = 1024

    @property
    def greater_is_better(self) -> bool:
        """No: the main metric is the perplexity."""
        return False

    @property
    def percent(self) -> bool:
        """No: a perplexity is a number."""
        return False

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the head is the model's own."""
        return {}

    def check_model(self, model: Any, name: str) -> None:
        """Nothing to check: any causal language model predicts tokens."""

    def try_out(self, model: Any, inner: Any, device: Any) -> None:
        """That no token sees those behind it, nor, in packed rows, another example."""
        try_model(model, inner.get_input_embeddings().num_embeddings, device, packed=self.packed)

    def encoding(self) -> Any:
        path = self.options.chat_template
        template = Path(path).expanduser() if path is not None else None
        text = (
            template.read_text(encoding="utf-8", errors="replace")
            if template and template.is_file()
            else None
        )
        return self.form, text

    def encode(
        self, rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list[Any]]:
        """Token ids and labels; an end-of-text token closes what is to be learnt, where the tokenizer has one."""
        if max_length < 2:
            raise UserError(
                "data.max_length must be 2 or more: a language model predicts a token from one before it."
            )
        if self.form == TEXT:
            return _encode_texts(rows, tokenizer, max_length)
        if self.form == COMPLETION:
            found = _encode_completions(rows, tokenizer)
        else:
            found = _encode_chats(rows, tokenizer, self.options.chat_template)
        columns: dict[str, list[Any]] = {"input_ids": [], "label": [], "cut": [], "turns_left_out": []}
        for ids, labels, left_out in found:
            labels = [IGNORED, *labels[1:]]
            columns["input_ids"].append(ids[:max_length])
            columns["label"].append(labels[:max_length])
            columns["cut"].append(int(any(label != IGNORED for label in labels[max_length:])))
            columns["turns_left_out"].append(left_out)
        return columns

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """A `Collator` that pads on the right, for packed rows too."""
        plain = Collator(tokenizer=tokenizer, padding_side="right")
        return _Either(plain, PackedCollator(tokenizer=tokenizer)) if self.packed else plain

    def count(self, name: str, encoded: Dataset) -> dict[str, int]:
        """Rows, tokens, those that count in the loss, and what did not fit."""
        predicted = [sum(label != IGNORED for label in own) for own in encoded["label"]]
        cut, turns = sum(encoded["cut"]), sum(encoded["turns_left_out"])
        if cut:
            logger.warning(
                "%s: %d of %d rows are longer than data.max_length and lose a part of what is to be learnt.",
                name,
                cut,
                len(encoded),
            )
        if turns:
            logger.warning(
                "%s: %d turns of the assistant do not count, because the chat template rewrites them once others follow.",
                name,
                turns,
            )
        return {
            "rows": len(encoded),
            "tokens": sum(map(len, encoded["input_ids"])),
            "tokens_predicted": sum(predicted),
            "rows_cut": cut,
            "turns_left_out": turns,
            "rows_without_loss": sum(count == 0 for count in predicted),
        }

    def trainable(self, encoded: Dataset) -> Dataset:
        """Without rows of which no token counts.

        Raises:
            UserError: none is left.
        """
        kept = [row for row, own in enumerate(encoded["label"]) if self.is_trainable({"label": own})]
        if not kept:
            raise UserError(
                "no token of the training set counts in the loss within data.max_length; raise it."
            )
        if len(kept) < len(encoded):
            logger.warning(
                "train: %d of %d rows are left out, because nothing that is to be learnt fits into data.max_length.",
                len(encoded) - len(kept),
                len(encoded),
            )
        left: Any = encoded.select(kept)
        return left

    def is_trainable(self, row: Mapping[str, Any]) -> bool:
        return any(label != IGNORED for label in row["label"])

    def tally(self, row: Mapping[str, Any]) -> dict[str, int]:
        return {
            "tokens": len(row["input_ids"]),
            "tokens_predicted": sum(label != IGNORED for label in row["label"]),
            "rows_cut": row["cut"],
            "turns_left_out": row["turns_left_out"],
        }

    def packer(self, max_length: int) -> Any:
        return partial(pack_rows, capacity=max_length) if self.options.packing else None

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Task:
        """As every task, and the training set packed where the options say so."""
        done: Any = super().tokenize(tokenizer, max_length)
        if not self.options.packing:
            return done
        if self.source is not None:
            return replace(done, packed=True)
        packed = pack(done.train, max_length)
        tokens = sum(map(len, packed["input_ids"]))
        wasted = 1 - tokens / (max_length * len(packed))
        logger.info(
            "%d examples in %d rows, %.1f %% of them padding", len(done.train), len(packed), 100 * wasted
        )
        train = {**done.counts["train"], "packed_rows": len(packed), "packed_tokens": tokens}
        return replace(done, train=packed, packed=True, counts={**done.counts, "train": train})

    def reduce(self, logits: Any, labels: Any) -> Any:
        """fp32 [B, 3]: sum of the negative log likelihoods of every row's labels, how many there are, how many are the likeliest."""
        own = logits[0] if isinstance(logits, tuple) else logits
        return _likelihoods(own, labels)

    def compute_metrics(self, predictions: Any, labels: Any, rows: Dataset) -> dict[str, float]:
        """Perplexity, token accuracy and loss over all tokens that count, from what `reduce` kept of them [N, 3]."""
        lost, count, right = np.asarray(predictions, dtype=np.float64).sum(0)
        if count == 0:
            raise UserError("no token of the evaluation set counts in the loss: no metric is defined")
        if not math.isfinite(lost):
            raise UserError(
                "the loss of the evaluation set is not a finite number: the training diverged; lower the learning rate or the "
                "noise, or use bf16 in place of fp16"
            )
        loss = lost / count
        return {
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": right / count,
            "loss": loss,
        }


@dataclass(frozen=True)
class _Either:
    """Training rows are packed, those of evaluation sets are not."""

    plain: Collator
    packed: PackedCollator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        return (self.packed if "position_ids" in features[0] else self.plain)(features)


def _likelihoods(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    import torch
    import torch.nn.functional as F

    found = torch.zeros(len(labels), 3, device=logits.device)
    for row, (own, wanted) in enumerate(
        zip(logits, labels)
    ):  # a row at a time: a vocabulary in fp32 is large
        counted = wanted[1:] != IGNORED
        own, wanted = own[:-1][counted].float(), wanted[1:][counted]
        found[row, 0] = F.cross_entropy(own, wanted, reduction="sum")
        found[row, 1] = counted.sum()
        found[row, 2] = (own.argmax(-1) == wanted).sum()
    return found


def _encode_texts(rows: dict[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
    names = ("input_ids", "label", "cut", "turns_left_out", EXAMPLE_ID)
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for text, ids in zip(rows[EXAMPLE_ID], tokenizer(rows["text"], verbose=False)["input_ids"], strict=True):
        ids = _closed(ids, tokenizer)
        for block, start in enumerate(range(0, max(1, len(ids) - 1), max_length - 1)):
            own = ids[start : start + max_length]
            values = own, [IGNORED, *own[1:]], 0, 0, text + (block << BLOCK)
            for name, value in zip(names, values, strict=True):
                columns[name].append(value)
    return columns


def _encode_completions(rows: dict[str, list[Any]], tokenizer: Any) -> list[tuple[list[int], list[int], int]]:
    """(ids, labels, 0) of every row: the prompt as it is at inference, the completion as it is to be generated."""
    prompts = tokenizer(rows["prompt"], verbose=False)["input_ids"]
    completions = tokenizer(rows["completion"], add_special_tokens=False, verbose=False)["input_ids"]
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
        completion = _closed(completion, tokenizer)
        found.append((prompt + completion, [IGNORED] * len(prompt) + completion, 0))
    return found


def _encode_chats(
    rows: dict[str, list[Any]], tokenizer: Any, template: str | None
) -> list[tuple[list[int], list[int], int]]:
    """(ids, labels, turns left out) of every chat."""
    if not tokenizer.is_fast:
        raise UserError(
            f"chats need a fast tokenizer, which knows the characters of every token; {type(tokenizer).__name__} does not."
        )
    own_template = template_of(tokenizer, template)
    if "strftime_now" in (own_template or str(tokenizer.chat_template)):
        logger.warning(
            "the chat template writes today's date, so a run that is resumed on another day differs; a template without it can be "
            "given as data.lm.chat_template."
        )
    chats = [
        spoken(tokenizer, json.loads(chat), json.loads(tools), own_template, place)
        for chat, tools, place in zip(rows["messages"], rows["tools"], rows["place"], strict=True)
    ]
    encoded = tokenizer(
        [text for text, _, _ in chats], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    found = []
    for (_, spans, left_out), ids, offsets in zip(chats, encoded["input_ids"], encoded["offset_mapping"]):
        labels = [
            token if any(first <= start < last for first, last in spans) else IGNORED
            for token, (start, _) in zip(ids, offsets)
        ]
        found.append((ids, labels, left_out))
    return found


def _closed(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """`ids` with the end-of-text token behind them, once."""
    end = tokenizer.eos_token_id
    return list(ids) if end is None or (ids and ids[-1] == end) else [*ids, end]


def make_dataset(table: Table, form: str, *, samples: int | None = None, seed: int = 0) -> Dataset:
    """The data set of a language-model task from its examples, or a sample of them.

    Raises:
        UserError: a sample that cannot be drawn.
    """
    from datasets import Dataset

    rows: Sequence[int] = range(len(table))
    if samples is not None:
        rows = sample_rows([0] * len(table), samples, seed=seed, name=table.source)
    columns = {name: [values[row] for row in rows] for name, values in table.columns.items()}
    return Dataset.from_dict({**columns, EXAMPLE_ID: list(rows)})


FORMS = {TEXT: "texts", COMPLETION: "prompts with completions", CHAT: "chats"}
"""What a user calls them."""
