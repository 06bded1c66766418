"""What the `data` section of a run file may say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from dist_reg.data.lm import LMOptions
from dist_reg.data.squad import QAOptions
from dist_reg.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """One further evaluation set, for example out of domain: a local file, or a split of a task."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "coerce_numbers_to_str": True}

    file: str | None = None
    """A csv, tsv, jsonl or parquet file; a relative path starts at `data_dir`."""
    task: str | None = None
    """A task (`demo` or a GLUE task) whose split this is, instead of a file."""
    split: str | None = None
    """The split of `task`: `dev` if not given; `mismatched` for MNLI, `ood` for demo, `train` for all."""
    data_dir: str | None = None
    """As in `DataConfig`, which it defaults to."""
    text: str | None = None
    """Columns of the file, as in `DataConfig`; they default to those of the training set."""
    text_pair: str | None = None
    label: str | None = None
    label_map: dict[str, str] | None = None
    """From the labels of this set to those of training, where this set has more or calls them otherwise, e.g. three-way to
    two-way."""
    prediction_map: dict[str, str] | None = None
    """From every label of training to one of this set, where training has more of them: what the model predicts is scored as
    that, e.g. both `neutral` and `contradiction` as `not_entailment`."""
    domain: Literal["in", "out"] = "out"
    """Whether the rows are of the training set's domain, as those of a test set are, or of another."""
    quoting: bool | None = None
    """As in `DataConfig`, which it defaults to."""
    samples: int | None = None
    """Evaluate on a sample of this many rows."""

    def __post_init__(self) -> None:
        if (self.file is None) == (self.task is None):
            raise UserError("an evaluation set under data.eval needs either `file` or `task`")
        if self.file is not None and self.split is not None:
            raise UserError(
                f"data.eval has split {self.split!r} beside file {self.file!r}; a split belongs to `task`"
            )
        for name in ("text", "text_pair", "label", "quoting"):
            if self.task is not None and getattr(self, name) is not None:
                raise UserError(f"data.eval has {name} beside task {self.task!r}, whose layout is known")
        _check_positive(samples=self.samples)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the rows of a task come from and how many of them are used.

    Raises:
        UserError: a sample or length that is not positive, or contradicting sources.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "coerce_numbers_to_str": True}

    data_dir: str | None = None
    """The folder with the task's files; for GLUE the one that holds `SST-2/` and the like. Relative paths of
    `train`, `dev` and evaluation files start here (else in the working directory)."""
    hub: str | None = None
    """For tasks on files of your own: a data set of the Hugging Face hub instead of local files;
    `train` and `dev` then name its splits (default `train` and `validation`)."""
    hub_config: str | None = None
    """The configuration (subset) of the hub data set."""
    train: str | None = None
    """Path of the training file, csv, tsv, jsonl or parquet, for `ner` and `pos` also CoNLL; a GLUE task knows its own."""
    dev: str | None = None
    """Path of the development file."""
    dev_fraction: float | None = None
    """In place of `dev`, for tasks on files of your own: the share of the training rows that is held out for it."""
    text: str | None = None
    """Column with the sentence, or the first of a pair; `text` if not given. With `ner` and `pos` its tokens; `tokens` if not."""
    text_pair: str | None = None
    """Column with the second sentence of a pair."""
    label: str | None = None
    """Column with the label; `label` if not given. With `ner` and `pos` the tags; of a CoNLL file the column's number."""
    quoting: bool | None = None
    """Whether fields of a csv or tsv file may stand in double quotes; csv yes, tsv no (as GLUE has
    it) if not given."""
    eval: dict[str, EvalSet] = field(default_factory=dict)
    """Further evaluation sets by name; metrics are logged under that name."""
    train_samples: int | None = None
    """Low-resource training: a stratified sample of this many rows."""
    dev_samples: int | None = None
    """Development on a stratified sample of this many rows."""
    seed: int = 0
    """Of the samples; independent of the run's seed, so that runs with several seeds see the same rows."""
    max_length: int | None = None
    """Longest input in tokens; longer ones are cut, contexts of questions into windows. 128 if not given, 384 for questions, 1024
    for language models, or what the model takes where that is less."""
    group_by_length: bool = False
    """Let rows of about one length share a batch, which saves padding; the order stays the same at every topology."""
    streaming: bool = False
    """Read the training rows while they are needed, for sets larger than memory (classification, regression, lm). `train` may then
    name many files, such as `part-*.jsonl`."""
    shuffle_buffer: int | None = None
    """Streamed rows among which the next one is drawn; 10,000 if not given."""
    qa: QAOptions | None = None
    """Options of question answering."""
    lm: LMOptions | None = None
    """Options of causal language models."""

    def __post_init__(self) -> None:
        _check_positive(
            train_samples=self.train_samples,
            dev_samples=self.dev_samples,
            max_length=self.max_length,
            shuffle_buffer=self.shuffle_buffer,
        )
        if self.shuffle_buffer is not None and not self.streaming:
            raise UserError("data.shuffle_buffer has no use without data.streaming: all rows are shuffled")
        for name in ("train_samples", "dev_fraction", "group_by_length"):
            if self.streaming and getattr(self, name):
                raise UserError(
                    f"data.{name} needs all rows at once, which data.streaming does not have; leave out either"
                )
        for name in ("data_dir", "train", "dev", "text", "text_pair", "label"):
            if getattr(self, name) == "":
                raise UserError(f"data.{name} is empty; name it, or leave it out")
        if self.dev_fraction is not None and not 0 < self.dev_fraction < 1:
            raise UserError(f"data.dev_fraction is {self.dev_fraction}, must lie between 0 and 1")
        if self.dev_fraction is not None and self.dev is not None:
            raise UserError(
                f"data.dev {self.dev!r} and data.dev_fraction {self.dev_fraction} are both given; keep one"
            )
        if self.hub is not None and self.data_dir is not None:
            raise UserError(
                f"data.hub {self.hub!r} and data.data_dir {self.data_dir!r} are both given; keep one"
            )
        if self.hub_config is not None and self.hub is None:
            raise UserError(f"data.hub_config {self.hub_config!r} is given without data.hub")
        for name in self.eval:
            if name in ("train", "dev", "eval"):
                raise UserError(
                    f"data.eval holds a set named {name!r}, which is taken; call it {name}_2 or the like"
                )


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"data.{name} is {value}, must be 1 or more")
