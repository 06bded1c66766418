"""From the `data` section of a run file to the task `lm`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dist_reg.data.config import DataConfig
from dist_reg.data.hub import read_hub
from dist_reg.data.lm import LMOptions, examples_of, form_of, read_rows
from dist_reg.data.sampling import hold_out
from dist_reg.data.stream import Source
from dist_reg.data.table import Table
from dist_reg.errors import UserError
from dist_reg.tasks.base import Task, add_eval_files, domains_of
from dist_reg.tasks.lm import FORMS, LMTask, make_dataset
from dist_reg.tasks.streaming import training_stream


def own_lm(config: DataConfig) -> Task:
    """The task `lm` on the files or the hub's data set that `config` names."""
    options = config.lm or LMOptions()
    for option in ("text_pair", "label"):
        if getattr(config, option) is not None:
            raise UserError(f"data.{option} has no use with task lm; see data.text and data.lm")
    if config.text is not None and (options.prompt is not None or options.messages is not None):
        other = "prompt" if options.prompt is not None else "messages"
        raise UserError(f"data.text is given beside data.lm.{other}; a row is either a text or that")
    if options.packing and config.group_by_length:
        raise UserError(
            "data.group_by_length has no use with data.lm.packing, whose rows are all about as long; keep one"
        )
    tables = _tables(config)
    read, name = training_stream(config) if config.streaming else (None, "")
    if read is not None:
        first = next(read(), None)
        if first is None:
            raise UserError(f"{name} holds no rows")
        tables["train"] = Table(
            source=name, columns={column: [value] for column, value in first.items()}, lines=[1]
        )
    add_eval_files("lm", tables, config, _read, "its rows are of the form of the training set's")
    form = form_of(tables["train"], options, config.text)
    if options.chat_template is not None and form != "chat":
        raise UserError(f"data.lm.chat_template has no use with {FORMS[form]}")
    source = None
    if read is not None:
        source = Source(name, read, lambda table: examples_of(table, form, options, config.text).columns)
    tables = {own: examples_of(table, form, options, config.text) for own, table in tables.items()}
    if "dev" not in tables:
        tables["train"], tables["dev"] = _split(tables["train"], config)
    samples = {name: eval_set.samples for name, eval_set in config.eval.items()}
    samples |= {"train": config.train_samples, "dev": config.dev_samples}
    datasets = {
        name: make_dataset(table, form, samples=samples.get(name), seed=config.seed)
        for name, table in tables.items()
    }
    return LMTask(
        name="lm",
        kind="lm",
        form=form,
        options=options,
        source=source,
        train=datasets.pop("train"),
        dev=datasets.pop("dev"),
        eval_sets=datasets,
        domains=domains_of(config),
        metrics=("perplexity", "token_accuracy"),
    )


def _tables(config: DataConfig) -> dict[str, Table]:
    """The rows of `train` and, where the run file names it, of `dev`."""
    tables = {}
    for split, hub_split in (("train", "train"), ("dev", "validation")):
        value = getattr(config, split)
        if (split == "dev" and config.dev_fraction is not None) or (split == "train" and config.streaming):
            continue
        if config.hub is not None:
            instead = "give local files under data.train and data.dev"
            tables[split] = read_hub(config.hub, config.hub_config, value or hub_split, instead=instead)
        elif value is None:
            rest = ", or data.dev_fraction" if split == "dev" else ""
            raise UserError(
                f"task lm needs data.{split}, the path of a txt, csv, tsv, jsonl or parquet file{rest}"
            )
        else:
            tables[split] = _read(value, config.data_dir, config.quoting)
    return tables


def _read(file: str, data_dir: str | None, quoting: bool | None) -> Table:
    return read_rows(Path(data_dir or "").expanduser() / Path(file).expanduser(), quoting=quoting)


def _split(table: Table, config: DataConfig) -> tuple[Table, Table]:
    """`table` without the held-out part, and that part: of one text its end."""
    fraction = config.dev_fraction or 0.0
    if len(table) > 1 or "text" not in table.columns:
        return hold_out(table, fraction)
    text = table.columns["text"][0]
    end = len(text) - max(1, round(fraction * len(text)))
    if not (text[:end].strip() and text[end:].strip()):
        raise UserError(f"{table.source} is too short to hold out data.dev_fraction {fraction} of it")
    return replace(table, columns={"text": [text[:end]]}), replace(table, columns={"text": [text[end:]]})
