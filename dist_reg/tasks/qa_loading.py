"""From the `data` section of a run file to a task of question answering: `qa`, `squad` and `squad_v2`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from dist_reg.data.config import DataConfig
from dist_reg.data.hub import read_hub
from dist_reg.data.sampling import hold_out
from dist_reg.data.squad import QAOptions, questions_of, read_questions
from dist_reg.data.table import Table
from dist_reg.errors import UserError
from dist_reg.tasks.base import Task, add_eval_files, domains_of
from dist_reg.tasks.qa import QATask, make_dataset

SQUAD = {
    "squad": ("rajpurkar/squad", {"train": "train-v1.1.json", "dev": "dev-v1.1.json"}),
    "squad_v2": ("rajpurkar/squad_v2", {"train": "train-v2.0.json", "dev": "dev-v2.0.json"}),
}
"""The hub's name of each version, and its files."""
METRICS = ("f1", "exact_match")
METRICS_WITHOUT_ANSWERS = ("no_answer_f1", "has_answer_f1", "has_answer_exact_match")
"""Of sets in which some question has no answer, beside the others."""


def own_qa(config: DataConfig) -> Task:
    """The task `qa` on the files or the hub's data set that `config` names."""
    tables = {}
    for split, hub_split in (("train", "train"), ("dev", "validation")):
        value = getattr(config, split)
        if split == "dev" and config.dev_fraction is not None:
            train = tables["train"]
            tables["train"], tables["dev"] = hold_out(train, config.dev_fraction, train.columns["context"])
        elif config.hub is not None:
            instead = "give local files under data.train and data.dev"
            tables[split] = questions_of(
                read_hub(config.hub, config.hub_config, value or hub_split, instead=instead)
            )
        elif value is None:
            raise UserError(
                f"task qa needs data.{split}, the path of SQuAD's json, or of a csv, jsonl or parquet file"
                + (", or data.dev_fraction" if split == "dev" else "")
            )
        else:
            tables[split] = _read(value, config.data_dir, config.quoting)
    return _build("qa", tables, config)


def squad(name: str, config: DataConfig) -> Task:
    """A version of SQuAD, from its json files in `data_dir` or from the hub."""
    if config.hub is not None:
        raise UserError(
            f"data.hub has no use with task {name}, which knows its own; use task qa for other sets"
        )
    hub, files = SQUAD[name]
    tables = {}
    for split, hub_split in (("train", "train"), ("dev", "validation")):
        given = getattr(config, split)
        if config.data_dir is None and given is None:
            instead = f"give data.data_dir, the folder that holds {files[split]}"
            tables[split] = questions_of(read_hub(hub, None, hub_split, instead=instead))
        else:
            tables[split] = _read(given or files[split], config.data_dir, config.quoting)
    return _build(name, tables, config)


QA: dict[str, Callable[[DataConfig], Task]] = {"qa": own_qa, **{name: partial(squad, name) for name in SQUAD}}
"""Every task of question answering by name, with what loads it."""


def _read(file: str, data_dir: str | None, quoting: bool | None) -> Table:
    return read_questions(Path(data_dir or "").expanduser() / Path(file).expanduser(), quoting=quoting)


def _build(name: str, tables: dict[str, Table], config: DataConfig) -> Task:
    if config.group_by_length:
        raise UserError(
            f"data.group_by_length has no use with task {name}, whose batches are padded to the longest window"
        )
    for option in ("text", "text_pair", "label"):
        if getattr(config, option) is not None:
            raise UserError(
                f"data.{option} has no use with task {name}: its columns are question, context and answers"
            )
    add_eval_files(name, tables, config, _read, "questions have no labels")
    samples = {set_name: eval_set.samples for set_name, eval_set in config.eval.items()}
    samples |= {"train": config.train_samples, "dev": config.dev_samples}
    some_without = any(not all(table.columns["answers"]) for table in tables.values())
    datasets = {
        set_name: make_dataset(table, samples=samples.get(set_name), seed=config.seed)
        for set_name, table in tables.items()
    }
    return QATask(
        name=name,
        kind="qa",
        unanswerable=not all(datasets["train"]["answers"]),
        train=datasets.pop("train"),
        dev=datasets.pop("dev"),
        eval_sets=datasets,
        domains=domains_of(config),
        metrics=(*METRICS, *(METRICS_WITHOUT_ANSWERS if some_without else ())),
        options=config.qa or QAOptions(),
    )
