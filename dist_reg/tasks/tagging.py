"""From the `data` section of a run file to a task of token classification: `ner`, `pos` and `wnut17`."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dist_reg.data.config import DataConfig, EvalSet
from dist_reg.data.conll import read_conll
from dist_reg.data.files import FORMATS, read_table
from dist_reg.data.hub import read_hub
from dist_reg.data.sampling import hold_out
from dist_reg.data.table import Table
from dist_reg.errors import UserError
from dist_reg.tasks.base import Task, domains_of
from dist_reg.tasks.tags import check_sentences, find_tag_names, tag_ids
from dist_reg.tasks.tokens import TokenTask, make_dataset

METRICS = {"ner": ("f1", "precision", "recall", "accuracy"), "pos": ("accuracy",)}
WNUT17 = {"train": "wnut17train.conll", "dev": "emerging.dev.conll", "test": "emerging.test.annotated"}
"""The files of the WNUT 2017 shared task on emerging entities."""
UNREADABLE = {
    ".conllu": "CoNLL-U numbers its words and joins some of them; write a token and its tag a line.",
    ".json": "write a JSON object a line and call it .jsonl.",
}
"""Extensions that are neither tables nor CoNLL files, and what to do about it."""


def own_tagging(kind: str, config: DataConfig) -> Task:
    """A task `ner` or `pos` on the files or the hub's data set that `config` names."""
    tables = {}
    for split, hub_split in (("train", "train"), ("dev", "validation")):
        value = getattr(config, split)
        if split == "dev" and config.dev_fraction is not None:
            tables["train"], tables["dev"] = hold_out(tables["train"], config.dev_fraction)
            continue
        if config.hub is not None:
            instead = "give local files under data.train and data.dev"
            table = read_hub(config.hub, config.hub_config, value or hub_split, instead=instead)
            tables[split] = _sentences(table, config.text, config.label, kind)
        elif value is None:
            raise UserError(
                f"task {kind} needs data.{split}, the path of a CoNLL, csv, tsv, jsonl or parquet file"
                + (", or data.dev_fraction" if split == "dev" else "")
            )
        else:
            tables[split] = read_sentences(value, config.data_dir, config, kind)
    return _build(kind, kind, tables, config)


def wnut17(config: DataConfig) -> Task:
    """Emerging entities, with the shared task's test set as a further evaluation set."""
    for name in ("hub", "text", "text_pair", "label", "quoting"):
        if getattr(config, name) is not None:
            raise UserError(
                f"data.{name} has no use with task wnut17: its layout is known; use task ner for other files"
            )
    if config.data_dir is None:
        raise UserError(f"task wnut17 needs data.data_dir, the folder that holds {WNUT17['train']}")
    files = {**WNUT17, **{split: given for split in ("train", "dev") if (given := getattr(config, split))}}
    tables = {split: read_sentences(file, config.data_dir, config, "ner") for split, file in files.items()}
    return _build("wnut17", "ner", tables, config)


TAGGING: dict[str, Callable[[DataConfig], Task]] = {
    "ner": partial(own_tagging, "ner"),
    "pos": partial(own_tagging, "pos"),
    "wnut17": wnut17,
}
"""Every task of token classification by name, with what loads it."""


def read_sentences(file: str, data_dir: str | None, columns: Any, kind: str) -> Table:
    """The sentences of a file: `tokens` and `tags`. `columns` says `text`, `label` and `quoting`, as `DataConfig` does.

    Any extension but csv, tsv, jsonl and parquet is CoNLL, whose tags are in the column of number `label`.
    """
    path = Path(data_dir or "").expanduser() / Path(file).expanduser()
    if path.suffix.lower() in FORMATS:
        return _sentences(read_table(path, quoting=columns.quoting), columns.text, columns.label, kind)
    if path.suffix.lower() in UNREADABLE:
        raise UserError(f"{path} is no CoNLL file of tokens and tags: {UNREADABLE[path.suffix.lower()]}")
    if columns.text is not None:
        raise UserError(f"data.text has no use with {path}: the tokens are the first column of a CoNLL file")
    if columns.label is not None and not columns.label.isdecimal():
        raise UserError(
            f"data.label is {columns.label!r}; for a CoNLL file such as {path} it is a column's number"
        )
    return read_conll(path, None if columns.label is None else int(columns.label))


def _columns_of(eval_set: EvalSet, config: DataConfig) -> Any:
    """What an evaluation set leaves out is as in training, where both are CoNLL files or both tables."""
    alike = _is_table(eval_set.file) == (config.hub is not None or _is_table(config.train))
    return replace(
        eval_set,
        text=eval_set.text or (config.text if alike else None),
        label=eval_set.label or (config.label if alike else None),
        quoting=config.quoting if eval_set.quoting is None else eval_set.quoting,
    )


def _is_table(file: str | None) -> bool:
    return file is not None and Path(file).suffix.lower() in FORMATS


def _sentences(table: Table, tokens: str | None, tags: str | None, kind: str) -> Table:
    """The columns `tokens` and `tags` of a table, under the names they have there."""
    if tags is None:
        tags = next((name for name in ("tags", f"{kind}_tags") if name in table.columns), "tags")
    own = {"tokens": table.column(tokens or "tokens"), "tags": table.column(tags)}
    return replace(
        table,
        columns={
            name: [_as_list(table, row, name, cell) for row, cell in enumerate(cells)]
            for name, cells in own.items()
        },
    )


def _as_list(table: Table, row: int, name: str, cell: Any) -> list[Any]:
    """A list as it is; a text, as csv has it, is a list as JSON or Python writes it, or words with spaces between them."""
    if isinstance(cell, str):
        if not (cell.strip().startswith("[") and cell.strip().endswith("]")):
            return cell.split()
        cell = _parsed(cell.strip())
    if not isinstance(cell, list):
        raise UserError(f"{table.where(row)}: the {name} are {cell!r}, which is no list")
    number = name == "tags"
    return [str(item) if number and type(item) is int and item >= 0 else item for item in cell]


def _parsed(cell: str) -> list[Any]:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(cell)
        except (ValueError, SyntaxError):
            continue
    return cell.split()  # a sentence may stand in brackets


def _build(name: str, kind: str, tables: dict[str, Table], config: DataConfig) -> Task:
    own_domains = dict.fromkeys((split for split in tables if split not in ("train", "dev")), "in")
    entities = kind == "ner"
    for set_name, eval_set in config.eval.items():
        if set_name in tables:
            raise UserError(f"data.eval.{set_name} has the name of a set of task {name}; rename it")
        if eval_set.file is None:
            raise UserError(f"data.eval.{set_name} needs `file` with task {name}, not `task`")
        for option, why in (
            ("text_pair", "a sentence has no pair"),
            ("prediction_map", "tags are mapped by label_map"),
        ):
            if getattr(eval_set, option) is not None:
                raise UserError(f"data.eval.{set_name}.{option} has no use with task {name}: {why}")
        folder = eval_set.data_dir or config.data_dir
        tables[set_name] = read_sentences(eval_set.file, folder, _columns_of(eval_set, config), kind)
    if config.text_pair is not None:
        raise UserError(f"data.text_pair has no use with task {name}: a sentence has no pair")
    for table in tables.values():
        check_sentences(table, entities=entities)
    names = find_tag_names(tables["train"], entities=entities)
    samples = {set_name: eval_set.samples for set_name, eval_set in config.eval.items()}
    samples |= {"train": config.train_samples, "dev": config.dev_samples}
    datasets = {}
    for set_name, table in tables.items():
        label_map = config.eval[set_name].label_map if set_name in config.eval else None
        tags = tag_ids(table, names, set_name=set_name, label_map=label_map)
        datasets[set_name] = make_dataset(table, tags, samples=samples.get(set_name), seed=config.seed)
    return TokenTask(
        name=name,
        kind=kind,
        train=datasets.pop("train"),
        dev=datasets.pop("dev"),
        eval_sets=datasets,
        domains={**own_domains, **domains_of(config)},
        label_names=names,
        metrics=METRICS[kind],
    )
