"""What a task is: its rows, how they become model inputs, the head and loss they need, and the metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from dist_reg.errors import UserError
from dist_reg.tasks.cache import every_core, kept
from dist_reg.tasks.metrics import compute

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from dist_reg.data.config import DataConfig
    from dist_reg.data.stream import Source
    from dist_reg.data.table import Table
    from dist_reg.tasks.collator import Collator
    from dist_reg.tasks.stream import Stream

EXAMPLE_ID = "example_id"
"""Column (int64) with the row's index in the set it was sampled from; it keys the noise of the example."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Base of all tasks; each sort (sequences, tokens, question answering, causal LM) is a subclass.

    Every data set has the column `example_id` (int64): the row's index in the set it was sampled from, so
    that the noise of an example is the same in any subset.
    """

    name: str
    kind: str
    """`classification`, `regression`, `ner`, `pos`, `qa` or `lm`; decides loss, label dtype and metrics."""
    train: Dataset
    dev: Dataset
    eval_sets: Mapping[str, Dataset] = field(default_factory=dict)
    """Further evaluation sets by name."""
    source: Source | None = None
    """Where training rows are streamed from; `train` is then empty."""
    domains: Mapping[str, str] = field(default_factory=dict)
    """`in` or `out` by further evaluation set, of the training set's domain or not; `out` where it says nothing."""
    metrics: tuple[str, ...]
    """Names of the task's metrics; the first one is the main metric."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What `count` says of every tokenized set, by name."""

    model_class: ClassVar[str]
    """The `transformers` auto class whose `from_pretrained` builds the model with the right head."""
    single_words: ClassVar[bool] = False
    """Whether the tokenizer is given words one by one."""
    default_length: ClassVar[int] = 128
    """Longest input in tokens where neither the run file nor the model says less."""

    @property
    def main_metric(self) -> str:
        """The metric by which runs and checkpoints are compared."""
        return self.metrics[0]

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger main metric is better."""
        return True

    @property
    def percent(self) -> bool:
        """Whether the main metric is a share, to be shown in percent."""
        return True

    def try_out(self, model: Any, inner: Any, device: Any) -> None:  # noqa: B027
        """Run `model`, as it will be trained, on rows that show whether it can do what the task needs; `inner` is the
        Hugging Face model in it.

        Raises:
            UserError: it cannot.
        """

    @property
    def evaluation_sets(self) -> dict[str, Dataset]:
        """`dev` and the further evaluation sets, by name."""
        return {"dev": self.dev, **self.eval_sets}

    def encoding(self) -> Any:
        """What `encode` follows from beside rows, tokenizer and length, as plain data."""
        return None

    def name_of(self, rows: Dataset) -> str | None:
        """The name of the evaluation set that `rows` are, the very object."""
        return next((name for name, own in self.evaluation_sets.items() if own is rows), None)

    def by_domain(self, metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
        """Means of the main metric over the sets in and out of domain, and how much the former is more; None without the latter.

        In domain are the sets that say so, such as a test set; `dev` only where there is no other.
        """
        out = [name for name in self.eval_sets if self.domains.get(name, "out") == "out"]
        inside = [name for name in self.eval_sets if name not in out] or ["dev"]
        if not out:
            return None
        mean_in, mean_out = (
            sum(metrics[name][self.main_metric] for name in names) / len(names) for names in (inside, out)
        )
        return {
            "metric": self.main_metric,
            "in_domain": mean_in,
            "out_of_domain": mean_out,
            "gap": mean_in - mean_out,
            "sets": {"in": inside, "out": out},
        }

    @property
    def examples(self) -> int:
        """How many rows of the training set (tokenized) are learnt from, in as many parts as they may be."""
        counts = self.counts["train"]
        return counts["rows"] - counts["rows_left_out"]

    def length(self, asked: int | None, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> int:
        """Longest input in tokens: `asked`, or the default, or less where the model has fewer positions.

        Raises:
            UserError: more is asked for than the model, or its tokenizer, takes.
        """
        limit = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
        if asked is not None and asked > limit:
            raise UserError(f"data.max_length is {asked}, but the model takes at most {limit} tokens")
        return asked if asked is not None else min(self.default_length, limit)

    @abstractmethod
    def model_kwargs(self) -> dict[str, Any]:
        """Arguments for `from_pretrained` of `model_class`: what fixes head and loss."""

    @abstractmethod
    def encode(self, rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
        """Model inputs and labels of some rows (columns as lists in, columns as lists out).

        What makes several rows of one, or leaves some out, returns `example_id` as well.
        """

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """What makes a batch of tokenized rows."""

    def check_model(self, model: Any, name: str) -> None:
        """That the trained `model`, called `name`, is one of this task's.

        Raises:
            UserError: it has another number of labels, or others.
        """
        wanted = self.model_kwargs()
        if model.config.num_labels != wanted["num_labels"]:
            raise UserError(
                f"{name} was trained for {model.config.num_labels} labels, task {self.name} has {wanted['num_labels']}."
            )
        own, labels = model.config.id2label or {}, wanted.get("id2label")
        if (
            labels is not None
            and own != labels
            and not all(text.startswith("LABEL_") for text in own.values())
        ):
            raise UserError(f"{name} was trained for the labels {own}, task {self.name} has {labels}.")

    def reduce(self, logits: Any, labels: Any) -> Any:
        """What an evaluation keeps of a batch's logits (a tensor, or several); all of them, if a task needs no less."""
        return logits

    def compute_metrics(self, predictions: Any, labels: Any, rows: Dataset) -> dict[str, float]:
        """The task's metrics from what `reduce` kept of `rows` (tokenized); see `dist_reg.tasks.metrics.compute`."""
        return compute(self.metrics, predictions, labels)

    def trainable(self, encoded: Dataset) -> Dataset:
        """The rows of the tokenized training set that a model can learn from; all of them, in most tasks."""
        return encoded

    def count(self, name: str, encoded: Dataset) -> dict[str, int]:
        """How many rows the tokenized set `name` has, and what of them did not fit."""
        return {"rows": len(encoded)}

    def packer(self, max_length: int) -> Any:
        """What makes packed rows of some streamed ones, where the options ask for it."""
        return None

    def stream(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, seed: int, buffer: int
    ) -> Stream:
        """The training rows of `source`, tokenized; its counts become those of the training set."""
        from dist_reg.tasks.stream import Stream

        assert self.source is not None
        encode = partial(self.encode, tokenizer=tokenizer, max_length=max_length)
        found = Stream(
            self.source,
            encode,
            self.is_trainable,
            self.tally,
            seed=seed,
            buffer=buffer,
            pack=self.packer(max_length),
        )
        counts: Any = self.counts
        counts["train"] = found.counts
        return found

    def tally(self, row: Mapping[str, Any]) -> dict[str, int]:
        """What a streamed row adds to the counts of the training set, beside itself."""
        return {}

    def is_trainable(self, row: Mapping[str, Any]) -> bool:
        """Whether a model can learn from a tokenized row; from all of them, in most tasks."""
        return True

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Task:
        """The same task with tokenized data sets: model inputs, `label` and `example_id`."""
        how = [type(self).__name__, self.name, self.encoding(), max_length]
        sets = {
            name: kept(rows, tokenizer, how, partial(_encode_all, self, rows, tokenizer, max_length))
            for name, rows in {"train": self.train, **self.evaluation_sets}.items()
            if name != "train" or self.source is None
        }
        counts = {name: self.count(name, encoded) for name, encoded in sets.items()}
        if self.source is not None:
            return replace(self, dev=sets.pop("dev"), eval_sets=sets, counts=counts)
        encoded = sets.pop("train")
        train = self.trainable(encoded)
        counts["train"]["rows_left_out"] = len(encoded) - len(train)
        return replace(self, train=train, dev=sets.pop("dev"), eval_sets=sets, counts=counts)


def add_eval_files(
    task: str, tables: dict[str, Table], config: DataConfig, read: Callable[..., Table], why: str
) -> None:
    """Add to `tables` the further evaluation sets of a task whose rows have no columns to name and no labels.

    Args:
        read: maps (file, folder, whether fields may be quoted) to rows.
        why: such options have no use, for the message.

    Raises:
        UserError: a set that is no file, has the name of another one, or an option without a use.
    """
    for name, eval_set in config.eval.items():
        if name in tables:
            raise UserError(f"data.eval.{name} has the name of a set of task {task}; rename it")
        if eval_set.file is None:
            raise UserError(f"data.eval.{name} needs `file` with task {task}, not `task`")
        for option in ("text", "text_pair", "label", "label_map", "prediction_map"):
            if getattr(eval_set, option) is not None:
                raise UserError(f"data.eval.{name}.{option} has no use with task {task}: {why}")
        quoting = config.quoting if eval_set.quoting is None else eval_set.quoting
        tables[name] = read(eval_set.file, eval_set.data_dir or config.data_dir, quoting)


def domains_of(config: DataConfig) -> dict[str, str]:
    """The domains of the evaluation sets that a run file names."""
    return {name: eval_set.domain for name, eval_set in config.eval.items()}


_ROWS_AT_ONCE = 10_000


def _encode_all(task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    # not Dataset.map: it pickles and hashes the tokenizer and draws a progress bar per rank
    from datasets import Dataset, concatenate_datasets

    parts = []
    with every_core():
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            encoded = task.encode(part, tokenizer, max_length)
            parts.append(Dataset.from_dict({EXAMPLE_ID: part[EXAMPLE_ID], **encoded}))
    return concatenate_datasets(parts)
