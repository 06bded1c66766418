"""The nine GLUE tasks in their official layouts, and the real files where they are at hand."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import datasets
import pytest

from dist_reg.data.config import DataConfig, EvalSet
from dist_reg.data.glue import GLUE, plain_name, read_glue
from dist_reg.errors import UserError
from dist_reg.tasks import load_task

DATA = Path(os.environ.get("DIST_REG_DATA", Path(__file__).parents[3] / "shared" / "data"))

MNLI = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse"
MNLI += "\tsentence2_parse\tsentence1\tsentence2\t"
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"

OFFICIAL: dict[str, tuple[str, str, str, list[tuple]]] = {
    "cola": (
        "CoLA",
        "train.tsv dev.tsv",
        'gj04\t0\t*\tA "cat.\nbc01\t1\t\tB.\n',
        [('A "cat.', 0), ("B.", 1)],
    ),
    "sst2": ("SST-2", "train.tsv dev.tsv", "sentence\tlabel\na \t1\nb \t0\n", [("a ", 1), ("b ", 0)]),
    "mrpc": (
        "MRPC",
        "train.tsv dev.tsv",
        MRPC + '1\t7\t8\ta "x\tb\n0\t9\t10\tc\td\n',
        [('a "x', "b", 1), ("c", "d", 0)],
    ),
    "stsb": (
        "STS-B",
        "train.tsv dev.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tm\tf\t2012test\t1\tnone\tnone\ta\tb\t5.000\n1\tm\tf\t2012test\t4\tnone\tnone\tc\td\t3.800\n",
        [("a", "b", 5.0), ("c", "d", pytest.approx(3.8))],
    ),
    "qqp": (
        "QQP",
        "train.tsv dev.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\ta\tb\t0\n4\t5\ttorn row\n4\t5\t6\tc\t\t1\n",
        [("a", "b", 0), ("c", "", 1)],
    ),
    "mnli": (
        "MNLI",
        "train.tsv dev_matched.tsv dev_mismatched.tsv",
        MNLI + "label1\tgold_label\n" + "0" + "\tx" * 7 + "\ta\tb\tneutral\tneutral\n"
        "1" + "\tx" * 7 + "\tc\td\tentailment\tentailment\n",
        [("a", "b", 1), ("c", "d", 0)],
    ),
    "qnli": (
        "QNLI",
        "train.tsv dev.tsv",
        "index\tquestion\tsentence\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n",
        [("a", "b", 1), ("c", "d", 0)],
    ),
    "rte": (
        "RTE",
        "train.tsv dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n",
        [("a", "b", 1), ("c", "d", 0)],
    ),
    "wnli": (
        "WNLI",
        "train.tsv dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n1\tc\td\t0\n",
        [("a", "b", 1), ("c", "d", 0)],
    ),
}


def write_official(folder: Path, name: str) -> None:
    task_folder, files, content, _ = OFFICIAL[name]
    (folder / task_folder).mkdir(parents=True)
    for file in files.split():
        (folder / task_folder / file).write_text(content, encoding="utf-8")


def rows_of(dataset) -> list[tuple]:
    return [tuple(row[key] for key in ("text", "text_pair", "label") if key in row) for row in dataset]


def test_all_nine_are_here():
    assert set(GLUE) == set(OFFICIAL)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_layout(tmp_path, name):
    write_official(tmp_path, name)
    task = load_task(GLUE[name].folder, DataConfig(data_dir=str(tmp_path)))
    for dataset in task.evaluation_sets.values():
        assert rows_of(dataset) == OFFICIAL[name][3]
    assert rows_of(task.train) == OFFICIAL[name][3]
    assert set(task.evaluation_sets) == ({"dev", "mismatched"} if name == "mnli" else {"dev"})
    assert task.train["example_id"][:] == [0, 1]
    assert task.kind == ("regression" if name == "stsb" else "classification")


def test_rte_labels_may_be_ids(tmp_path):
    (tmp_path / "rte").mkdir()
    for file in ("train.tsv", "dev.tsv"):
        text = "sentence1\tsentence2\tlabel\tidx\na\tb\t1\t0\nc\td\t0\t1\n"
        (tmp_path / "rte" / file).write_text(text)
    task = load_task("RTE", DataConfig(data_dir=str(tmp_path)))
    assert rows_of(task.train) == [("a", "b", 1), ("c", "d", 0)]
    assert task.model_kwargs()["id2label"] == {0: "entailment", 1: "not_entailment"}


def test_original_paraphrase_corpus(tmp_path):
    (tmp_path / "MRPC").mkdir()
    for file in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"):
        text = OFFICIAL["mrpc"][2].replace("\n", "\r\n")
        (tmp_path / "MRPC" / file).write_bytes(text.encode())
    task = load_task("mrpc", DataConfig(data_dir=str(tmp_path)))
    assert rows_of(task.dev) == OFFICIAL["mrpc"][3]


def test_own_file_in_a_task_layout(tmp_path):
    write_official(tmp_path, "sst2")
    (tmp_path / "small.tsv").write_text("sentence\tlabel\nmine\t1\n")
    task = load_task("sst2", DataConfig(data_dir=str(tmp_path), dev="small.tsv"))
    assert rows_of(task.dev) == [("mine", 1)]


@pytest.mark.parametrize("spelling", ["SST-2", "sst2", "sst_2", "Sst-2"])
def test_spellings(spelling):
    assert plain_name(spelling) == "sst2"


def test_where_data_dir_is_wrong(tmp_path):
    write_official(tmp_path, "sst2")
    folder = str(tmp_path)
    with pytest.raises(UserError, match="has no folder STS-B; did you mean 'SST-2'"):
        read_glue("stsb", "train", folder)
    with pytest.raises(UserError, match="is the task's own folder; give its parent"):
        read_glue("sst2", "train", f"{folder}/SST-2")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        read_glue("sst2", "train", f"{folder}/nowhere")
    (tmp_path / "SST-2" / "dev.tsv").unlink()
    with pytest.raises(UserError, match="dev.tsv does not exist; known: train.tsv|did you mean"):
        read_glue("sst2", "dev", folder)
    with pytest.raises(UserError, match="task sst2 has no split 'test'; known: dev, train"):
        read_glue("sst2", "test", folder)


def test_wrong_label_and_layout(tmp_path):
    write_official(tmp_path, "sst2")
    (tmp_path / "SST-2" / "dev.tsv").write_text("sentence\tlabel\na\t1\nb\t2\n")
    with pytest.raises(
        UserError, match=r"set 'dev' \(.*dev.tsv, line 3\) has the label '2'.*negative, positive"
    ):
        load_task("sst2", DataConfig(data_dir=str(tmp_path)))
    (tmp_path / "SST-2" / "dev.tsv").write_text("sentences\tlabel\na\t1\n")
    with pytest.raises(UserError, match="has no column 'sentence'; did you mean 'sentences'"):
        load_task("sst2", DataConfig(data_dir=str(tmp_path)))


def test_options_without_use():
    with pytest.raises(UserError, match="data.text has no use with task sst2: its layout is known"):
        load_task("sst2", DataConfig(text="review"))


def test_hub_columns_and_class_names(monkeypatch):
    names = ["entailment", "neutral", "contradiction"]
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=names),
        }
    )
    rows = {"premise": ["a", "c"], "hypothesis": ["b", "d"], "label": [2, 0]}
    split = datasets.Dataset.from_dict(rows, features=features)
    asked = []

    def load(name, config):
        asked.append((name, config))
        return {"train": split, "validation_matched": split, "validation_mismatched": split}

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = load_task("mnli", DataConfig())
    assert set(asked) == {("nyu-mll/glue", "mnli")}
    assert rows_of(task.eval_sets["mismatched"]) == [("a", "b", 2), ("c", "d", 0)]


def test_offline_hub_says_what_to_give(monkeypatch):
    def load(name, config):
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UserError, match=r"nyu-mll/glue \(sst2\) cannot be loaded: .*give data.data_dir, the folder"
    ):
        load_task("sst2", DataConfig())


SIZES = {"rte": (2490, 277), "cola": (8551, 1043), "stsb": (5749, 1500), "sst2": (67349, 872)}


@pytest.mark.skipif(not (DATA / "glue").is_dir(), reason="no data sets at DIST_REG_DATA or ../shared/data")
class TestRealData:
    @pytest.mark.parametrize("name", SIZES)
    def test_whole_task(self, name):
        task = load_task(name, DataConfig(data_dir=str(DATA / "glue")))
        assert (len(task.train), len(task.dev)) == SIZES[name]
        if name == "stsb":
            assert 0 <= min(task.dev["label"]) < max(task.dev["label"]) == 5
        else:
            assert set(task.dev["label"]) == {0, 1}
        if name == "rte":
            assert Counter(task.dev["label"]) == {0: 146, 1: 131}

    def test_reviews_are_out_of_domain_for_sst2(self):
        books = EvalSet(file=str(DATA / "blitzer" / "books" / "test-labeled.tsv"), quoting=True, samples=500)
        config = DataConfig(data_dir=str(DATA / "glue"), train_samples=500, eval={"books": books})
        task = load_task("sst2", config)
        assert Counter(task.eval_sets["books"]["label"]) == {0: 250, 1: 250}
        assert len(task.train) == 500
        assert max(task.train["example_id"]) > 10_000

    def test_reviews_read_without_quoting_are_refused(self):
        books = EvalSet(file=str(DATA / "blitzer" / "books" / "test-labeled.tsv"))
        config = DataConfig(data_dir=str(DATA / "glue"), eval={"books": books})
        with pytest.raises(UserError, match=r"line \d+: too (few|many) fields.*set data.quoting to true"):
            load_task("sst2", config)
