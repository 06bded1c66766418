"""Token classification: entities by their BIO tags, and part-of-speech tags."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dist_reg.data.sampling import sample_rows
from dist_reg.data.table import Table
from dist_reg.errors import UserError
from dist_reg.streams import IGNORED
from dist_reg.tasks.base import EXAMPLE_ID, Task
from dist_reg.tasks.collator import Collator
from dist_reg.tasks.metrics import check_finite

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenTask(Task):
    """A task of kind `ner` or `pos`.

    Data sets have the columns `tokens` (words as the file has them), `tags` (their ids) and `example_id`; tokenized ones
    also `label` (the tag of a word at its first piece, -100 elsewhere) and `words` (the words that have one, in order).
    """

    label_names: tuple[str, ...]
    """Tags in the order of their ids."""

    model_class: ClassVar[str] = "AutoModelForTokenClassification"
    single_words: ClassVar[bool] = True

    def model_kwargs(self) -> dict[str, Any]:
        """`num_labels`, `id2label`, `label2id`."""
        return {
            "num_labels": len(self.label_names),
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: i for i, name in enumerate(self.label_names)},
        }

    def encode(
        self, rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> dict[str, list[Any]]:
        """Token ids and mask; the first piece of each word carries its tag.

        Raises:
            UserError: the tokenizer cannot tell which word a piece belongs to.
        """
        if not tokenizer.is_fast:
            raise UserError(
                f"task {self.kind} needs a fast tokenizer, which knows the word of every piece; "
                f"{type(tokenizer).__name__} does not."
            )
        try:
            encoded = tokenizer(
                rows["tokens"], is_split_into_words=True, truncation=True, max_length=max_length
            )
        except (AssertionError, ValueError) as error:  # GPT-2's asks for add_prefix_space
            raise UserError(f"the tokenizer does not take single words: {error}") from None
        labels, words = [], []
        for row, tags in enumerate(rows["tags"]):
            label, own, before = [], [], None
            for word in encoded.word_ids(row):
                first = word is not None and word != before
                label.append(tags[word] if first else IGNORED)
                own += [word] if first else []
                before = word
            labels.append(label)
            words.append(own)
        return {**encoded, "label": labels, "words": words, "tags": rows["tags"]}

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """A `Collator` that pads labels with -100."""
        return Collator(tokenizer=tokenizer)

    def count(self, name: str, encoded: Dataset) -> dict[str, int]:
        """Sentences and words, and the words that `max_length` cut off or that became no piece."""
        words = sum(len(tags) for tags in encoded["tags"])
        cut = words - sum(len(own) for own in encoded["words"])
        if cut:
            logger.warning(
                "%s: %d of %d words lie beyond data.max_length or are nothing to the tokenizer; training does not see them, and "
                "evaluation counts them as not found.",
                name,
                cut,
                words,
            )
        return {"rows": len(encoded), "words": words, "words_cut": cut}

    def reduce(self, logits: Any, labels: Any) -> Any:
        """The predicted tag of every token [B, T] and each row's summed loss [B], from logits [B, T, tags] and labels [B, T]: all
        that an evaluation keeps."""
        import torch.nn.functional as F

        own = logits[0] if isinstance(logits, tuple) else logits
        check_finite(own)
        losses = F.cross_entropy(own.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return own.argmax(-1), losses.sum(1)

    def trainable(self, encoded: Dataset) -> Dataset:
        """Without rows of which no word has a label: the mean over none is not a number.

        Raises:
            UserError: none is left.
        """
        kept = [row for row, words in enumerate(encoded["words"]) if words]
        if not kept:
            raise UserError("no word of the training set fits into data.max_length; raise it.")
        if len(kept) < len(encoded):
            logger.warning(
                "train: %d of %d sentences are left out, because the model would see none of their words.",
                len(encoded) - len(kept),
                len(encoded),
            )
        left: Any = encoded.select(kept)
        return left

    def compute_metrics(self, predictions: Any, labels: np.ndarray, rows: Dataset) -> dict[str, float]:
        """Scores over all words of `rows` (tokenized), and the loss over those that have a label, from what `reduce` kept of them
        ([N, T], [N]) and labels [N, T]."""
        predictions, losses = predictions
        if len(predictions) == 0:
            raise UserError("the evaluation set is empty: no metric is defined")
        if not len(predictions) == len(labels) == len(rows):
            raise ValueError(f"{len(predictions)} rows of predictions, but {len(rows)} rows")
        gold = [[self.label_names[tag] for tag in tags] for tags in rows["tags"]]
        found = self._by_word(predictions, labels, rows)
        scores = entity_scores(gold, found) if self.kind == "ner" else {}
        right = [
            one == other
            for own, wanted in zip(found, gold, strict=True)
            for one, other in zip(own, wanted, strict=True)
        ]
        scores["accuracy"] = float(np.mean(right))
        known = {name: scores[name] for name in self.metrics}
        labelled = int((labels != IGNORED).sum())
        return {**known, "loss": float(losses.sum() / labelled)} if labelled else known

    def _by_word(self, predictions: np.ndarray, labels: np.ndarray, rows: Dataset) -> list[list[Any]]:
        """A tag for every word; one that has no piece gets O, or None where there is no O."""
        names, missing = self.label_names, "O" if self.kind == "ner" else None
        found: list[list[Any]] = []
        for predicted, label, words, tags in zip(predictions, labels, rows["words"], rows["tags"]):
            own = [missing] * len(tags)
            for word, tag in zip(words, predicted[label != IGNORED], strict=True):
                own[word] = names[int(tag)]
            found.append(own)
        return found


def entity_scores(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro-averaged F1, precision and recall of entities as seqeval (and conlleval) counts them; 0 where undefined."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    scores: Any = precision_recall_fscore_support(
        [list(own) for own in gold],
        [list(own) for own in found],
        average="micro",
        warn_for=(),
    )
    precision, recall, f1, _ = scores
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall)}


def make_dataset(
    table: Table, tags: Sequence[Sequence[int]], *, samples: int | None = None, seed: int = 0
) -> Dataset:
    """The data set of a token task from its sentences and the ids of their tags, or a sample of it.

    A sample is stratified by whether anything but the most frequent tag is in the sentence, as an entity is.

    Raises:
        UserError: a sample that cannot be drawn.
    """
    from datasets import Dataset, Features, List, Value

    rows: Sequence[int] = range(len(table))
    if samples is not None:
        counts: dict[int, int] = {}
        for tag in (tag for own in tags for tag in own):
            counts[tag] = counts.get(tag, 0) + 1
        usual = max(counts, key=lambda tag: counts[tag])
        strata = [any(tag != usual for tag in own) for own in tags]
        rows = sample_rows(strata, samples, seed=seed, name=table.source)
    columns: dict[str, list[Any]] = {
        "tokens": [table.columns["tokens"][row] for row in rows],
        "tags": [list(tags[row]) for row in rows],
        EXAMPLE_ID: list(rows),
    }
    features = Features(
        {"tokens": List(Value("string")), "tags": List(Value("int64")), EXAMPLE_ID: Value("int64")}
    )
    return Dataset.from_dict(columns, features=features)
