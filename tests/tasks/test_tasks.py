"""Tasks from the demo, local files and hub sets: rows, labels, heads, tokens, evaluation sets, bad input."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from dist_reg.data.config import DataConfig, EvalSet
from dist_reg.errors import UserError
from dist_reg.tasks import TASKS, load_task
from tests.tiny import tokenizer

READ = TypeAdapter(DataConfig).validate_python


def write(folder: Path, **files: str) -> DataConfig:
    """A configuration whose train and dev are files of `folder`; `files` maps a stem to its content."""
    for name, content in files.items():
        (folder / f"{name}.csv").write_text(content)
    return DataConfig(data_dir=str(folder), train="train.csv", dev="dev.csv")


def change(config: DataConfig, **fields) -> DataConfig:
    return DataConfig(**{**vars(config), **fields})


@pytest.fixture
def three_way(tmp_path) -> DataConfig:
    rows = "text,label\na,maybe\nb,no\nc,yes\nd,no\n"
    return write(tmp_path, train=rows, dev="text,label\ne,yes\n")


def test_registry():
    glue = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
    assert set(TASKS) - glue == {
        "demo", "classification", "regression", "ner", "pos", "wnut17", "qa", "squad", "squad_v2", "lm",
    }  # fmt: skip
    with pytest.raises(UserError, match="unknown task 'sst3'; did you mean 'sst2'"):
        load_task("sst3", DataConfig())


def test_demo():
    task = load_task("demo", DataConfig())
    assert {name: len(rows) for name, rows in task.evaluation_sets.items()} == {"dev": 300, "ood": 300}
    assert task.train.column_names == ["text", "label", "example_id"]
    assert task.model_class == "AutoModelForSequenceClassification"
    assert task.model_kwargs() == {
        "num_labels": 2,
        "problem_type": "single_label_classification",
        "id2label": {0: "negative", 1: "positive"},
        "label2id": {"negative": 0, "positive": 1},
    }
    assert (task.main_metric, task.greater_is_better, task.metrics) == ("accuracy", True, ("accuracy",))
    with pytest.raises(UserError, match="data.train has no use with task demo"):
        load_task("demo", DataConfig(train="x.csv"))


def test_a_sample_keeps_example_ids_and_label_shares():
    whole, part = (load_task("demo", DataConfig(train_samples=n)).train for n in (None, 100))
    assert sum(part["label"]) == 50
    for row in part:
        assert whole[row["example_id"]] == row
    other = load_task("demo", DataConfig(train_samples=100, seed=1)).train
    assert part["example_id"] != other["example_id"]
    with pytest.raises(UserError, match="demo train holds 600 rows, fewer than the 601 samples"):
        load_task("demo", DataConfig(train_samples=601))


def test_labels_of_own_files_are_sorted(three_way, tmp_path):
    task = load_task(None, three_way)
    assert task.label_names == ("maybe", "no", "yes")
    assert list(task.train["label"]) == [0, 1, 2, 1]
    assert task.metrics == ("accuracy", "macro_f1")
    numbers = write(tmp_path, train="text,label\na,10\nb,9\nc,-1\n", dev="text,label\nd,9\n")
    assert load_task("classification", numbers).label_names == ("-1", "9", "10")


def test_pairs_and_own_column_names_in_jsonl(tmp_path):
    content = '{"q": "a", "p": "b", "gold": 1}\n{"q": "c", "p": "d", "gold": 0}\n'
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text(content)
    config = DataConfig(
        train=str(tmp_path / "train.jsonl"),
        dev=str(tmp_path / "dev.jsonl"),
        text="q",
        text_pair="p",
        label="gold",
    )
    task = load_task("classification", config)
    assert task.train[0] == {"text": "a", "text_pair": "b", "label": 1, "example_id": 0}


def test_regression(tmp_path):
    config = write(tmp_path, train="text,label\na,1\nb,2.5\n", dev="text,label\na,0\n")
    task = load_task("regression", config)
    assert list(task.train["label"]) == [1.0, 2.5]
    assert task.model_kwargs()["problem_type"] == "regression"
    assert task.model_kwargs()["num_labels"] == 1
    assert task.metrics == ("pearson", "spearman")
    many = "text,label\n" + "".join(f"t{i},{i}\n" for i in range(100))
    sample = load_task("regression", change(write(tmp_path, train=many), train_samples=10)).train
    assert sum(label < 20 for label in sample["label"]) == 2, "two of ten from each fifth of the scores"


def test_hub_set(monkeypatch):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["spam", "ham"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {"train": rows, "test": rows})
    task = load_task("classification", DataConfig(hub="some/set", dev="test"))
    assert task.label_names == ("ham", "spam")
    assert list(task.dev["label"]) == [1, 0]
    with pytest.raises(UserError, match="some/set has no split 'validation'; known: test, train"):
        load_task("classification", DataConfig(hub="some/set"))


def test_tokens():
    task = load_task("demo", DataConfig(train_samples=10, dev_samples=10)).tokenize(tokenizer(), 6)
    for rows in (task.train, *task.evaluation_sets.values()):
        assert {"input_ids", "attention_mask", "label", "example_id"} <= set(rows.column_names)
        assert "text" not in rows.column_names
        assert max(map(len, rows["input_ids"])) <= 6
    limited = tokenizer()
    limited.model_max_length = 32
    with pytest.raises(UserError, match="data.max_length is 64, but the model takes at most 32 tokens"):
        task.length(64, limited, None)
    assert [task.length(None, limited, most) for most in (None, 16)] == [32, 16]
    assert task.length(None, tokenizer(), 512) == 128


def test_tokens_of_pairs_hold_both_sentences(tmp_path):
    rows = "text,other,label\nthe film,a book,0\nthe book,a film,1\n"
    config = change(write(tmp_path, train=rows, dev=rows), text_pair="other")
    task = load_task("classification", config).tokenize(tokenizer(), 16)
    assert tokenizer().decode(task.train[0]["input_ids"]) == "[CLS] the film [SEP] a book [SEP]"


def test_evaluation_file_with_label_map_and_own_columns(three_way, tmp_path):
    (tmp_path / "other.csv").write_text("review,stars\nx,1\ny,5\nz,no\n")
    stars = EvalSet(file="other.csv", text="review", label="stars", label_map={"1": "no", "5": "yes"})
    task = load_task(None, change(three_way, eval={"stars": stars}))
    assert list(task.eval_sets["stars"]["label"]) == [1, 2, 1]
    assert list(task.eval_sets) == ["stars"]


def test_evaluation_on_another_task(tmp_path):
    config = write(tmp_path, train="text,label\na,0\nb,1\n", dev="text,label\na,0\n")
    names = {"negative": "0", "positive": "1"}
    sets = {"gadgets": EvalSet(task="demo", split="ood", label_map=names, samples=20)}
    task = load_task(None, change(config, eval=sets))
    assert sum(task.eval_sets["gadgets"]["label"]) == 10
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "dev.tsv").write_text("sentence\tlabel\ngood\t1\n")
    task = load_task("demo", DataConfig(eval={"films": EvalSet(task="SST-2", data_dir=str(tmp_path))}))
    assert list(task.eval_sets["films"]["label"]) == [1]


def test_unknown_label_in_another_set(three_way, tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\ne,yes\nf,perhaps\n")
    message = r"set 'dev' \(.*dev\.csv, line 3\) has the label 'perhaps'.*known: maybe, no, yes"
    with pytest.raises(UserError, match=message):
        load_task(None, three_way)
    (tmp_path / "dev.csv").write_text("text,label\ne,yes\n")
    (tmp_path / "other.csv").write_text("text,label\ne,2\n")
    with pytest.raises(UserError, match="set 'other' .* has the label '2'"):
        load_task(None, change(three_way, eval={"other": EvalSet(file="other.csv")}))


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ({"yess": "no"}, "data.eval.other.label_map names 'yess', no label of that set; did you mean 'yes'"),
        ({"yes": "non"}, "maps 'yes' to 'non', no label of training; did you mean 'no'"),
    ],
)
def test_wrong_label_map(three_way, label_map, message):
    with pytest.raises(UserError, match=message):
        load_task(None, change(three_way, eval={"other": EvalSet(file="dev.csv", label_map=label_map)}))


@pytest.mark.parametrize(
    ("task", "train", "message"),
    [
        (
            "classification",
            "text,label\na,1\nb,\n",
            r"train\.csv, line 3: the label \(column 'label'\) is empty",
        ),
        ("classification", "text,lable\na,1\n", r"no column 'label'; did you mean 'lable'"),
        (
            "classification",
            "text,label\na,1\nb,1\n",
            "every row has the label '1'; training needs two or more",
        ),
        (
            "classification",
            "text,label\n" + "".join(f"a,{i}.5\n" for i in range(30)),
            "30 different labels in 30 rows; for scores use task regression",
        ),
        ("regression", "text,label\na,1\nb,high\n", r"train\.csv, line 3: the label 'high' is no number"),
        ("regression", "text,label\na,1\nb,nan\n", r"train\.csv, line 3: the label 'nan' is no number"),
    ],
)
def test_wrong_training_labels(tmp_path, task, train, message):
    with pytest.raises(UserError, match=message):
        load_task(task, write(tmp_path, train=train, dev="text,label\na,1\n"))


def test_wrong_options(three_way):
    with pytest.raises(UserError, match="task classification needs data.train, the path of a csv"):
        load_task(None, DataConfig())
    with pytest.raises(UserError, match="task regression needs data.dev"):
        load_task("regression", change(three_way, dev=None))
    with pytest.raises(UserError, match="unknown task 'mrcp' under data.eval; did you mean 'mrpc'"):
        load_task("demo", DataConfig(eval={"x": EvalSet(task="mrcp")}))
    with pytest.raises(UserError, match="task demo has no split 'oood'; did you mean 'ood'"):
        load_task("demo", DataConfig(eval={"x": EvalSet(task="demo", split="oood")}))
    with pytest.raises(UserError, match="data.eval.ood has the name of a set of task demo"):
        load_task("demo", DataConfig(eval={"ood": EvalSet(task="demo")}))
    pairs = change(three_way, text_pair="label")
    with pytest.raises(UserError, match="data.eval.x holds single sentences, the training set pairs"):
        load_task(None, change(pairs, eval={"x": EvalSet(task="demo")}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train_samples": 0}, "data.train_samples is 0, must be 1 or more"),
        ({"eval": {"dev": {"file": "x.csv"}}}, "a set named 'dev', which is taken"),
        ({"eval": {"x": {}}}, "needs either `file` or `task`"),
        ({"eval": {"x": {"file": "x.csv", "split": "dev"}}}, "a split belongs to `task`"),
        (
            {"eval": {"x": {"task": "demo", "text": "y"}}},
            "has text beside task 'demo', whose layout is known",
        ),
        ({"hub": "a/b", "data_dir": "c"}, "are both given; keep one"),
        ({"hub_config": "b"}, "is given without data.hub"),
        ({"tarin": "x.csv"}, "tarin"),
        ({"eval": {"x": {"file": "x.csv", "labelmap": {}}}}, "labelmap"),
    ],
)
def test_wrong_data_section(data, message):
    with pytest.raises(ValidationError, match=message):
        READ(data)


def test_data_section_from_a_run_file():
    config = READ({"train_samples": 100, "eval": {"x": {"file": "x.csv", "label_map": {0: "no", 1: "yes"}}}})
    assert config.eval["x"].label_map == {"0": "no", "1": "yes"}


THREE_TO_TWO = {"yes": "yes", "no": "not yes", "maybe": "not yes"}


def test_predictions_of_three_classes_are_scored_as_two(three_way, tmp_path):
    (tmp_path / "two.csv").write_text("text,label\na,yes\nb,not yes\nc,not yes\nd,1\n")
    two = EvalSet(file="two.csv", prediction_map=THREE_TO_TWO, label_map={"1": "yes"})
    task = load_task("classification", change(three_way, eval={"two": two})).tokenize(tokenizer(), 8)
    assert task.label_names == ("maybe", "no", "yes")
    rows = task.eval_sets["two"]
    assert rows["label"] == [2, 0, 0, 2]  # "not yes" is stood for by the first class that counts as it
    logits = np.log([[0.3, 0.3, 0.4], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.1, 0.1, 0.8]])
    scores = task.compute_metrics(logits, np.array(rows["label"]), rows)
    assert (
        scores["accuracy"] == 0.75
    )  # the likeliest class counts, and not that both others together are likelier
    assert scores["loss"] == pytest.approx(-np.log([0.4, 0.9, 0.4, 0.8]).mean())
    dev = task.compute_metrics(logits[:1], np.array([2]), task.dev)
    assert dev == {"accuracy": 1.0, "macro_f1": 1.0}
    with pytest.raises(UserError, match="NaN logits in 4 of 4"):
        task.compute_metrics(logits * np.nan, np.array(rows["label"]), rows)


def test_prediction_maps_that_do_not_fit(three_way, tmp_path):
    (tmp_path / "two.csv").write_text("text,label\na,yes\nb,not yes\n")
    for changes, message in (
        (
            {"prediction_map": {"yes": "yes", "no": "no"}},
            "prediction_map leaves out 'maybe'; it needs every label",
        ),
        (
            {"prediction_map": {**THREE_TO_TWO, "nope": "a"}},
            "names 'nope', no label of training; did you mean 'no'",
        ),
        (
            {"prediction_map": dict.fromkeys(THREE_TO_TWO, "yes")},
            "line 3.* has the label 'not yes', to which",
        ),
        (
            {"prediction_map": THREE_TO_TWO, "label_map": {"x": "yes"}},
            "label_map names 'x', no label of that set",
        ),
    ):
        config = change(three_way, eval={"two": EvalSet(file="two.csv", **changes)})
        with pytest.raises(UserError, match=message):
            load_task("classification", config)
    for name in ("ner", "qa", "lm"):
        with pytest.raises(UserError, match="prediction_map has no use with task"):
            load_task(
                name,
                change(
                    mapped_config(name, tmp_path), eval={"two": EvalSet(file="two.csv", prediction_map={})}
                ),
            )


def mapped_config(name: str, folder: Path) -> DataConfig:
    files = {
        "ner": ("a.conll", "a B-x\n"),
        "qa": ("a.json", '{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": 1, "question": "b", "answers": [{"text": "a", "answer_start": 0}]}]}]}]}'),
        "lm": ("a.txt", "a"),
    }  # fmt: skip
    file, content = files[name]
    (folder / file).write_text(content)
    return DataConfig(data_dir=str(folder), train=file, dev=file)


def test_means_in_and_out_of_domain(three_way, tmp_path):
    for name in ("test", "news", "mail"):
        (tmp_path / f"{name}.csv").write_text("text,label\na,yes\n")
    sets = {name: EvalSet(file=f"{name}.csv") for name in ("news", "mail")}
    metrics = {
        name: {"accuracy": score}
        for name, score in zip(("dev", "test", "news", "mail"), (0.9, 0.8, 0.5, 0.7))
    }
    task = load_task("classification", change(three_way, eval=sets))
    assert task.by_domain(metrics) == {
        "metric": "accuracy",
        "in_domain": 0.9,
        "out_of_domain": pytest.approx(0.6),
        "gap": pytest.approx(0.3),
        "sets": {"in": ["dev"], "out": ["news", "mail"]},
    }
    sets["test"] = EvalSet(file="test.csv", domain="in")
    found = load_task("classification", change(three_way, eval=sets)).by_domain(metrics)
    assert found["in_domain"] == 0.8
    assert found["sets"]["in"] == ["test"]
    assert load_task("classification", three_way).by_domain(metrics) is None
    assert (
        load_task("demo", DataConfig()).by_domain({"dev": metrics["dev"], "ood": metrics["news"]})["gap"]
        == 0.4
    )


def test_rows_held_out(three_way, tmp_path):
    (tmp_path / "train.csv").write_text(
        "text,label\n" + "".join(f"word {i},{'ab'[i % 2]}\n" for i in range(40))
    )
    config = change(three_way, dev=None, dev_fraction=0.25)
    task = load_task("classification", config)
    assert (len(task.train), len(task.dev)) == (30, 10)
    assert not set(task.train["text"]) & set(task.dev["text"])
    again = load_task("classification", change(config, seed=5, train_samples=10))
    assert again.dev["text"] == task.dev["text"]
    assert set(again.train["text"]) < set(task.train["text"])
    with pytest.raises(UserError, match="has too few rows .40. to hold out data.dev_fraction 0.999"):
        load_task("classification", change(config, dev_fraction=0.999))
    with pytest.raises(UserError, match="data.dev_fraction has no use with task sst2"):
        load_task("sst2", DataConfig(dev_fraction=0.5))
    with pytest.raises(UserError, match="data.dev_fraction is 1.5, must lie between 0 and 1"):
        DataConfig(dev_fraction=1.5)
    with pytest.raises(UserError, match="are both given; keep one"):
        DataConfig(dev_fraction=0.5, dev="dev.csv")
