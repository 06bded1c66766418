"""From a task's name and the `data` section of a run file to the task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dist_reg.data.config import DataConfig, EvalSet
from dist_reg.data.demo_task import LABEL_NAMES as DEMO_LABELS
from dist_reg.data.demo_task import SPLITS as DEMO_SPLITS
from dist_reg.data.demo_task import demo_rows
from dist_reg.data.files import read_table
from dist_reg.data.glue import GLUE, plain_name, read_glue
from dist_reg.data.hub import read_hub
from dist_reg.data.sampling import hold_out
from dist_reg.data.stream import Source
from dist_reg.data.table import Table
from dist_reg.errors import UserError, nearest
from dist_reg.tasks.base import Task, domains_of
from dist_reg.tasks.labels import class_ids, find_label_names, merged_ids, scores
from dist_reg.tasks.lm_loading import own_lm
from dist_reg.tasks.qa_loading import QA
from dist_reg.tasks.sequence import SequenceTask, make_dataset
from dist_reg.tasks.streaming import STREAMED, training_stream
from dist_reg.tasks.tagging import TAGGING


def load_task(name: str | None, config: DataConfig) -> Task:
    """Load the task `name` (a key of `TASKS` in any spelling: `SST-2` is `sst2`) as `config` says.

    Without a name it is `classification` of the files or hub data set that `config` names.

    Raises:
        UserError: an unknown task, data that is missing or wrong, or an option that the task has no use for.
    """
    key = plain_name(name) if name is not None else "classification"
    if key not in TASKS:
        raise UserError(f"unknown task {name!r}; {nearest(key, list(TASKS))}")
    if config.qa is not None and key not in QA:
        raise UserError(f"data.qa has no use with task {key}; it is for {', '.join(QA)}")
    if config.streaming and key not in STREAMED:
        raise UserError(f"data.streaming has no use with task {key}; it is for {', '.join(STREAMED)}")
    if config.lm is not None and key != "lm":
        raise UserError(f"data.lm has no use with task {key}; it is for lm")
    if config.dev_fraction is not None and key not in OWN_FILES:
        raise UserError(f"data.dev_fraction has no use with task {key}, which has a development set")
    return TASKS[key](config)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Tables of a sequence task (columns `text`, `text_pair`, `label`) and what its labels are."""

    name: str
    kind: str
    train: Table
    dev: Table
    extra: dict[str, Table] = field(default_factory=dict)
    """Evaluation sets that belong to the task, out of domain."""
    label_names: tuple[str, ...]
    ids_allowed: bool = False
    metrics: tuple[str, ...]
    text: str = "text"
    """Column names in the task's files, the default for evaluation files."""
    text_pair: str | None = None
    label: str = "label"


def _demo(config: DataConfig) -> Task:
    unused = ("data_dir", "hub", "train", "dev", "text", "text_pair", "label", "quoting")
    _refuse(config, "demo", unused, "the demo brings its own rows")
    source = _Source(
        name="demo",
        kind="classification",
        train=_demo_table("train"),
        dev=_demo_table("dev"),
        extra={"ood": _demo_table("ood")},
        label_names=DEMO_LABELS,
        metrics=("accuracy",),
    )
    return _build(source, config)


def _glue(name: str, config: DataConfig) -> Task:
    unused = ("hub", "text", "text_pair", "label", "quoting")
    _refuse(
        config, name, unused, "its layout is known; use task classification or regression for other files"
    )
    task = GLUE[name]
    extra = {}
    if task.mismatched and config.dev is None:
        extra["mismatched"] = read_glue(name, "mismatched", config.data_dir)
    source = _Source(
        name=name,
        kind=task.kind,
        train=read_glue(name, "train", config.data_dir, _path(config.train, config.data_dir)),
        dev=read_glue(name, "dev", config.data_dir, _path(config.dev, config.data_dir)),
        extra=extra,
        label_names=task.label_names or ("score",),
        ids_allowed=True,
        metrics=task.metrics,
        text=task.text,
        text_pair=task.text_pair,
        label=task.label,
    )
    return _build(source, config)


def _own(kind: str, config: DataConfig) -> Task:
    if config.streaming:
        return _streamed(kind, config)
    text, label = config.text or "text", config.label or "label"
    train = _own_table(kind, "train", config.train, "train", config).select(text, config.text_pair, label)
    if config.dev_fraction is not None:
        train, dev = hold_out(train, config.dev_fraction)
    else:
        dev = _own_table(kind, "dev", config.dev, "validation", config).select(text, config.text_pair, label)
    classes = kind == "classification"
    source = _Source(
        name=kind,
        kind=kind,
        train=train,
        dev=dev,
        label_names=find_label_names(train) if classes else ("score",),
        metrics=("accuracy", "macro_f1") if classes else ("pearson", "spearman"),
        text=text,
        text_pair=config.text_pair,
        label=label,
    )
    return _build(source, config)


def _streamed(kind: str, config: DataConfig) -> Task:
    """As `_own`, with training rows that are read as they are needed: the development set says which classes there are."""
    text, label = config.text or "text", config.label or "label"
    dev = _own_table(kind, "dev", config.dev, "validation", config).select(text, config.text_pair, label)
    classes = kind == "classification"
    names = find_label_names(dev) if classes else ("score",)
    read, name = training_stream(config)

    def prepare(table: Table) -> dict[str, list[Any]]:
        own = table.select(text, config.text_pair, label)
        labels: Any = class_ids(own, names, set_name="train") if classes else scores(own)
        return {**own.columns, "label": labels}

    source = _Source(
        name=kind,
        kind=kind,
        train=dev.take([]),
        dev=dev,
        label_names=names,
        metrics=("accuracy", "macro_f1") if classes else ("pearson", "spearman"),
        text=text,
        text_pair=config.text_pair,
        label=label,
    )
    return replace(_build(source, config), source=Source(name, read, prepare))


TASKS: dict[str, Callable[[DataConfig], Task]] = {
    "demo": _demo,
    **{name: partial(_glue, name) for name in GLUE},
    "classification": partial(_own, "classification"),
    "regression": partial(_own, "regression"),
    **TAGGING,
    **QA,
    "lm": own_lm,
}
"""Every task by name, with what loads it."""

OWN_FILES = ("classification", "regression", "ner", "pos", "qa", "lm")
"""Tasks on files of the user's own."""


def _build(source: _Source, config: DataConfig) -> Task:
    tables = {"train": source.train, "dev": source.dev} | source.extra
    for name, eval_set in config.eval.items():
        if name in tables:
            raise UserError(f"data.eval.{name} has the name of a set of task {source.name}; rename it")
        tables[name] = _read_eval_set(name, eval_set, config, source)
    samples = {name: eval_set.samples for name, eval_set in config.eval.items()}
    samples |= {"train": config.train_samples, "dev": config.dev_samples}
    datasets, merged = {}, {}
    for name, table in tables.items():
        label_map = config.eval[name].label_map if name in config.eval else None
        prediction_map = config.eval[name].prediction_map if name in config.eval else None
        labels: list[int] | list[float]
        if source.kind == "regression":
            labels = scores(table)
        elif prediction_map is not None:
            labels, merged[name] = merged_ids(
                table, source.label_names, prediction_map, set_name=name, label_map=label_map
            )
        else:
            labels = class_ids(
                table,
                source.label_names,
                set_name=name,
                ids_allowed=source.ids_allowed,
                label_map=label_map,
            )
        datasets[name] = make_dataset(table, labels, source.kind, samples=samples.get(name), seed=config.seed)
    return SequenceTask(
        name=source.name,
        kind=source.kind,
        train=datasets.pop("train"),
        dev=datasets.pop("dev"),
        eval_sets=datasets,
        label_names=source.label_names,
        metrics=source.metrics,
        merged=merged,
        domains=domains_of(config),
    )


def _read_eval_set(name: str, eval_set: EvalSet, config: DataConfig, source: _Source) -> Table:
    for option in ("label_map", "prediction_map"):
        if source.kind == "regression" and getattr(eval_set, option) is not None:
            raise UserError(f"data.eval.{name} has a {option}, which a regression task has no use for")
    data_dir = eval_set.data_dir or config.data_dir
    if eval_set.file is not None:
        quoting = config.quoting if eval_set.quoting is None else eval_set.quoting
        table = read_table(_path(eval_set.file, data_dir) or "", quoting=quoting).select(
            eval_set.text or source.text,
            eval_set.text_pair or source.text_pair,
            eval_set.label or source.label,
        )
    else:
        table = _task_table(eval_set, data_dir)
    pairs = "text_pair" in table.columns
    if pairs != ("text_pair" in source.train.columns):
        raise UserError(
            f"data.eval.{name} holds {'pairs' if pairs else 'single sentences'}, the training set "
            f"{'single sentences' if pairs else 'pairs'}; set text_pair of either"
        )
    return table


def _task_table(eval_set: EvalSet, data_dir: str | None) -> Table:
    name = eval_set.task or ""
    key = plain_name(name)
    if key == "demo":
        return _demo_table(eval_set.split or "dev")
    if key not in GLUE:
        raise UserError(f"unknown task {name!r} under data.eval; {nearest(key, ['demo', *GLUE])}")
    table = read_glue(key, eval_set.split or "dev", data_dir)
    # by name, for the classes of the training task may have other ids
    by_id = {str(i): label for i, label in enumerate(GLUE[key].label_names)}
    labels = [by_id.get(str(label).strip(), label) for label in table.columns["label"]]
    return replace(table, columns={**table.columns, "label": labels})


def _demo_table(split: str) -> Table:
    if split not in DEMO_SPLITS:
        raise UserError(f"task demo has no split {split!r}; {nearest(split, list(DEMO_SPLITS))}")
    text, label = (list(column) for column in zip(*demo_rows()[split]))
    columns = {"text": text, "label": label}
    return Table(source=f"demo {split}", columns=columns, lines=range(1, len(text) + 1))


def _own_table(kind: str, split: str, value: str | None, hub_split: str, config: DataConfig) -> Table:
    if config.hub is not None:
        instead = "give local files under data.train and data.dev"
        return read_hub(config.hub, config.hub_config, value or hub_split, instead=instead)
    if value is None:
        rest = ", or data.dev_fraction" if split == "dev" else ""
        raise UserError(
            f"task {kind} needs data.{split}, the path of a csv, tsv, jsonl or parquet file{rest}"
        )
    return read_table(_path(value, config.data_dir) or value, quoting=config.quoting)


def _path(file: str | None, data_dir: str | None) -> str | None:
    if file is None:
        return None
    return str(Path(data_dir or "").expanduser() / Path(file).expanduser())


def _refuse(config: DataConfig, task: str, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if getattr(config, name) is not None:
            raise UserError(f"data.{name} has no use with task {task}: {reason}")
