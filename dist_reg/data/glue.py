"""The nine GLUE tasks (Wang et al., 2019), from local files in the official layouts or from the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dist_reg.data.files import read_table
from dist_reg.data.hub import read_hub
from dist_reg.data.table import Table
from dist_reg.errors import UserError, nearest

_HUB = "nyu-mll/glue"


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """Layout, labels and metrics of one GLUE task."""

    folder: str
    """Official folder name, `SST-2`."""
    hub: str
    """Configuration of the hub data set, `sst2`."""
    text: str
    """Column of the only or the first sentence in the local files."""
    text_pair: str | None = None
    label: str = "label"
    hub_text: str = "sentence"
    hub_text_pair: str | None = None
    label_names: tuple[str, ...] = ()
    """In the order of the hub's class ids; none for regression. Files may give a name or its id."""
    metrics: tuple[str, ...] = ("accuracy",)
    """As GLUE reports; the first one is the main metric."""
    header: tuple[str, ...] | None = None
    """Column names where the file has no header line."""
    train: tuple[str, ...] = ("train.tsv",)
    """Names the training file goes by; the first that is there is read."""
    dev: tuple[str, ...] = ("dev.tsv",)
    mismatched: tuple[str, ...] = ()
    skip_bad_rows: bool = False

    @property
    def kind(self) -> str:
        """`classification` or `regression`."""
        return "classification" if self.label_names else "regression"


_PAIR = {"hub_text": "sentence1", "hub_text_pair": "sentence2"}
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(
        folder="CoLA",
        hub="cola",
        text="sentence",
        label_names=("unacceptable", "acceptable"),
        metrics=("mcc",),
        header=("source", "label", "note", "sentence"),
    ),
    "sst2": GlueTask(folder="SST-2", hub="sst2", text="sentence", label_names=("negative", "positive")),
    "mrpc": GlueTask(
        folder="MRPC",
        hub="mrpc",
        text="#1 String",
        text_pair="#2 String",
        label="Quality",
        label_names=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        # the original corpus has no development file; GLUE's split of it needs a download script
        train=("train.tsv", "msr_paraphrase_train.txt"),
        dev=("dev.tsv", "msr_paraphrase_test.txt"),
        **_PAIR,
    ),
    "stsb": GlueTask(
        folder="STS-B",
        hub="stsb",
        text="sentence1",
        text_pair="sentence2",
        label="score",
        metrics=("pearson", "spearman"),
        **_PAIR,
    ),
    "qqp": GlueTask(
        folder="QQP",
        hub="qqp",
        text="question1",
        text_pair="question2",
        label="is_duplicate",
        hub_text="question1",
        hub_text_pair="question2",
        label_names=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        skip_bad_rows=True,  # the official train.tsv has torn rows, which readers of GLUE leave out
    ),
    "mnli": GlueTask(
        folder="MNLI",
        hub="mnli",
        text="sentence1",
        text_pair="sentence2",
        label="gold_label",
        hub_text="premise",
        hub_text_pair="hypothesis",
        label_names=("entailment", "neutral", "contradiction"),
        dev=("dev_matched.tsv",),
        mismatched=("dev_mismatched.tsv",),
    ),
    "qnli": GlueTask(
        folder="QNLI",
        hub="qnli",
        text="question",
        text_pair="sentence",
        hub_text="question",
        hub_text_pair="sentence",
        label_names=_ENTAILMENT,
    ),
    "rte": GlueTask(
        folder="RTE", hub="rte", text="sentence1", text_pair="sentence2", label_names=_ENTAILMENT, **_PAIR
    ),
    "wnli": GlueTask(
        folder="WNLI",
        hub="wnli",
        text="sentence1",
        text_pair="sentence2",
        label_names=("not_entailment", "entailment"),
        **_PAIR,
    ),
}


def plain_name(name: str) -> str:
    """A task name in the registry's spelling: `SST-2`, `sst_2` and `sst2` are one."""
    return re.sub(r"[-_ ]", "", name).lower()


def read_glue(name: str, split: str, data_dir: str | None, file: str | None = None) -> Table:
    """One split of a GLUE task with the columns `text`, `text_pair` (for pairs) and `label`.

    Args:
        name: key of `GLUE`.
        split: `train`, `dev`, or `mismatched` (MNLI).
        data_dir: the folder that holds the task's folder; None: from the hub.
        file: read this file, in the task's layout, instead of the split's own.

    Raises:
        UserError: no such split, folder, file or column; or the hub cannot be reached.
    """
    task = GLUE[name]
    files = {"train": task.train, "dev": task.dev, "mismatched": task.mismatched}
    known = [key for key, value in files.items() if value]
    if split not in known:
        raise UserError(f"task {name} has no split {split!r}; {nearest(split, known)}")
    if file is not None or data_dir is not None:
        path = (
            Path(file).expanduser()
            if file is not None
            else _find(task, Path(data_dir or ".").expanduser(), files[split])
        )
        table = read_table(
            path,
            quoting=False,
            header=task.header,
            file_format=".tsv",
            skip_bad_rows=task.skip_bad_rows,
        )
        return table.select(task.text, task.text_pair, task.label)
    dev = "validation_matched" if task.mismatched else "validation"
    hub_split = {"train": "train", "dev": dev, "mismatched": "validation_mismatched"}[split]
    instead = f"give data.data_dir, the folder that holds {task.folder}/ with GLUE's tsv files"
    table = read_hub(_HUB, task.hub, hub_split, instead=instead)
    return table.select(task.hub_text, task.hub_text_pair, "label")


def _find(task: GlueTask, data_dir: Path, names: tuple[str, ...]) -> Path:
    if not data_dir.is_dir():
        raise UserError(f"data.data_dir {data_dir} is not a folder")
    folders = sorted(entry.name for entry in data_dir.iterdir() if entry.is_dir())
    same = [folder for folder in folders if plain_name(folder) == plain_name(task.folder)]
    if not same:
        if plain_name(data_dir.resolve().name) == plain_name(task.folder):
            raise UserError(
                f"data.data_dir {data_dir} is the task's own folder; give its parent {data_dir.resolve().parent}"
            )
        hint = nearest(task.folder, folders) if folders else "it has no folders at all"
        raise UserError(f"data.data_dir {data_dir} has no folder {task.folder}; {hint}")
    folder = data_dir / same[0]
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])
