"""Token classification: sentences from every kind of file, labels at first pieces, scores over whole sentences."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas
import pytest
import seqeval.metrics
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_reg.data.config import DataConfig, EvalSet
from dist_reg.errors import UserError
from dist_reg.tasks import load_task
from dist_reg.tasks.tokens import entity_scores
from tests.data.test_files import write

TRAIN = "Anna\tB-person\nSmith\tI-person\nsings\tO\n\nin\tO\nRome\tB-place\n"
DEV = "Rome\tB-place\nwaits\tO\n"
WNUT17 = Path(__file__).resolve().parents[3] / "shared" / "data" / "wnut17"
NAMES = ("O", "B-person", "I-person", "B-place", "I-place")


def files(folder: Path, train: str = TRAIN, dev: str = DEV, **fields) -> DataConfig:
    write(folder / "train.conll", train)
    write(folder / "dev.conll", dev)
    return DataConfig(data_dir=str(folder), train="train.conll", dev="dev.conll", **fields)


def pieces() -> PreTrainedTokenizerFast:
    """A word piece tokenizer that cuts `Rome` in three and knows nothing of `?`."""
    words = ["[PAD]", "[UNK]", "Anna", "Smith", "sings", "in", "R", "##o", "##me", "waits"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("?", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def test_conll_files(tmp_path):
    task = load_task("ner", files(tmp_path))
    assert task.model_class == "AutoModelForTokenClassification"
    assert task.label_names == NAMES
    assert task.model_kwargs()["id2label"] == dict(enumerate(NAMES))
    assert task.metrics == ("f1", "precision", "recall", "accuracy")
    assert task.train.to_dict() == {
        "tokens": [["Anna", "Smith", "sings"], ["in", "Rome"]],
        "tags": [[1, 2, 0], [0, 3]],
        "example_id": [0, 1],
    }


def test_jsonl_csv_and_parquet_hold_lists(tmp_path):
    rows = [{"words": ["Anna", "Smith", "sings"], "ner": ["B-person", "I-person", "O"]}] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    as_text = {
        "words": ["Anna Smith sings", '["Anna", "Smith", "sings"]'],
        "ner": ["B-person I-person O"] * 2,
    }
    pandas.DataFrame(as_text).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame(rows).to_csv(tmp_path / "b.csv", index=False)
    for name in ("a.jsonl", "a.parquet", "a.csv", "b.csv"):
        config = DataConfig(data_dir=str(tmp_path), train=name, dev=name, text="words", label="ner")
        task = load_task("ner", config)
        assert task.train["tokens"] == [["Anna", "Smith", "sings"]] * 2, name
        assert task.train["tags"] == [[1, 2, 0]] * 2, name


def test_lists_in_csv_are_read_as_json_first(tmp_path):
    """Whose escapes Python reads otherwise; a sentence in brackets is no list."""
    cells = {"tokens": ['["\\ud83d\\ude00", "a\\/b"]', "[ sic ]"], "tags": ["O B-x", "O O O"]}
    pandas.DataFrame(cells).to_csv(tmp_path / "a.csv", index=False)
    task = load_task("ner", DataConfig(data_dir=str(tmp_path), train="a.csv", dev="a.csv"))
    assert task.train["tokens"] == [["\U0001f600", "a/b"], ["[", "sic", "]"]]
    cells = {"tokens": ['["a", null]'], "tags": ["O O"]}
    pandas.DataFrame(cells).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(UserError, match="token 2 is None, no text"):
        load_task("ner", DataConfig(data_dir=str(tmp_path), train="a.csv", dev="a.csv"))


def test_parts_of_speech(tmp_path):
    config = files(tmp_path, "he PRP O\nran VBD O\n", "he PRP O\n", label="2")
    task = load_task("pos", config)
    assert task.label_names == ("PRP", "VBD")
    assert task.metrics == ("accuracy",)


def test_the_first_piece_of_a_word_carries_its_tag(tmp_path):
    task = load_task("ner", files(tmp_path)).tokenize(pieces(), 16)
    assert task.train["input_ids"][1] == [5, 6, 7, 8]
    assert task.train["label"] == [[1, 2, 0], [0, 3, -100, -100]]
    assert task.train["words"] == [[0, 1, 2], [0, 1]]
    assert task.counts["train"] == {"rows": 2, "words": 5, "words_cut": 0, "rows_left_out": 0}


def test_labels_are_padded_where_the_tokenizer_pads(tmp_path):
    for side, expected in (
        ("right", [[1, 2, 0, -100], [0, 3, -100, -100]]),
        ("left", [[-100, 1, 2, 0], [0, 3, -100, -100]]),
    ):
        tokenizer = pieces()
        tokenizer.padding_side = side
        task = load_task("ner", files(tmp_path)).tokenize(tokenizer, 16)
        rows = [
            {name: task.train[name][i] for name in ("input_ids", "attention_mask", "label", "example_id")}
            for i in (0, 1)
        ]
        batch = task.collator(tokenizer)(rows)
        assert batch["labels"].tolist() == expected
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def predictions_of(task, tags: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """What an evaluation of `task.dev` gathers where every word that the model saw got the tag in `tags`."""
    labels = np.full((len(tags), width), -100)
    predicted = np.full((len(tags), width), -100)
    for row, (label, words) in enumerate(zip(task.dev["label"], task.dev["words"])):
        labels[row, : len(label)] = label
        predicted[row, : len(label)] = 4  # at later pieces anything may stand
        places = [place for place, tag in enumerate(label) if tag != -100]
        for place, word in zip(places, words):
            predicted[row, place] = tags[row][word]
    return (predicted, np.ones(len(tags))), labels


def test_scores_are_those_of_seqeval(tmp_path):
    dev = TRAIN + "\nRome\tB-place\nRome\tI-place\nwaits\tO\n\nsings\tO\n"
    task = load_task("ner", files(tmp_path, dev=dev)).tokenize(pieces(), 16)
    tags = [
        [1, 0, 0],
        [0, 3],
        [3, 3, 0],
        [4],
    ]  # cut short, right, one entity taken for two, one out of nothing
    scores = task.compute_metrics(*predictions_of(task, tags, 9), task.dev)
    gold = [["B-person", "I-person", "O"], ["O", "B-place"], ["B-place", "I-place", "O"], ["O"]]
    found = [[NAMES[tag] for tag in row] for row in tags]
    assert scores["f1"] == seqeval.metrics.f1_score(gold, found)
    assert scores["precision"] == seqeval.metrics.precision_score(gold, found) == 1 / 5
    assert scores["recall"] == seqeval.metrics.recall_score(gold, found) == 1 / 3
    assert scores["accuracy"] == 6 / 9


NASTY = [
    ([["O", "O"]], [["O", "O"]], (0.0, 0.0, 0.0)),
    ([["O", "O"]], [["B-a", "O"]], (0.0, 0.0, 0.0)),
    ([["B-a", "I-a"]], [["O", "O"]], (0.0, 0.0, 0.0)),
    ([["B-a", "B-a"]], [["B-a", "I-a"]], (0.0, 0.0, 0.0)),
    ([["B-a", "I-a"]], [["I-a", "I-a"]], (1.0, 1.0, 1.0)),
    ([["B-a", "O", "B-a"]], [["B-a", "O", "B-b"]], (0.5, 0.5, 0.5)),
    ([["B-a"], ["B-a"], ["O"]], [["B-a"], ["O"], ["B-a"]], (0.5, 0.5, 0.5)),
]


@pytest.mark.parametrize(("gold", "found", "expected"), NASTY, ids=range(len(NASTY)))
@pytest.mark.filterwarnings("error")
def test_scores_of_nasty_cases(gold, found, expected):
    scores = entity_scores(gold, found)
    assert (scores["f1"], scores["precision"], scores["recall"]) == expected


def test_words_the_model_did_not_see_count_as_not_found(tmp_path, caplog):
    dev = "waits\tO\nRome\tB-place\n\n?\tB-place\nAnna\tB-person\n"
    with caplog.at_level(logging.WARNING):
        task = load_task("ner", files(tmp_path, dev=dev)).tokenize(pieces(), 1)
    assert task.counts["dev"] == {"rows": 2, "words": 4, "words_cut": 2}
    assert "dev: 2 of 4 words lie beyond data.max_length" in caplog.text
    assert task.dev["words"] == [[0], [1]]
    scores = task.compute_metrics(*predictions_of(task, [[0, 3], [3, 1]], 1), task.dev)
    assert (scores["precision"], scores["recall"]) == (1.0, 1 / 3)
    assert scores["accuracy"] == 2 / 4


def test_parts_of_speech_that_the_model_did_not_see_are_wrong(tmp_path):
    task = load_task("pos", files(tmp_path, "Anna N\nwaits V\n", "Anna N\nwaits V\n")).tokenize(pieces(), 1)
    predictions, labels = predictions_of(task, [[0, 1]], 1)
    assert task.compute_metrics(predictions, labels, task.dev) == {"accuracy": 0.5, "loss": 1.0}
    with pytest.raises(ValueError, match="1 rows of predictions, but 2 rows"):
        task.compute_metrics(predictions, labels, task.dev.select([0, 0]))


def test_an_evaluation_set_is_read_as_training_is(tmp_path):
    both = "Anna\tB-PER\tO\nRome\tB-LOC\tO\nUni\tB-LOC\tB-PER\n"
    write(tmp_path / "other.conll", both)
    config = files(tmp_path, both, both, label="2", eval={"t": EvalSet(file="other.conll")})
    task = load_task("ner", config)
    assert task.eval_sets["t"]["tags"] == task.dev["tags"] == [[3, 1, 1]]
    (tmp_path / "other.jsonl").write_text('{"tokens": ["Anna"], "tags": ["B-PER"]}')
    config = files(tmp_path, both, both, label="2", eval={"t": EvalSet(file="other.jsonl")})
    assert load_task("ner", config).eval_sets["t"]["tags"] == [[3]]


@pytest.mark.parametrize("kind", ["ner", "pos"])
def test_the_column_of_the_task_is_taken(tmp_path, kind):
    (tmp_path / "a.jsonl").write_text(
        '{"tokens": ["he", "Al"], "ner_tags": ["O", "B-x"], "pos_tags": ["PRP", "NN"]}'
    )
    task = load_task(kind, DataConfig(data_dir=str(tmp_path), train="a.jsonl", dev="a.jsonl"))
    assert task.label_names == {"ner": ("O", "B-x", "I-x"), "pos": ("NN", "PRP")}[kind]


def test_training_sentences_without_a_word_are_left_out_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        task = load_task("ner", files(tmp_path, TRAIN + "\n?\tO\n")).tokenize(pieces(), 16)
    assert len(task.train) == 2
    assert task.counts["train"] == {"rows": 3, "words": 6, "words_cut": 1, "rows_left_out": 1}
    assert "train: 1 of 3 sentences are left out" in caplog.text
    with pytest.raises(UserError, match="no word of the training set fits into data.max_length"):
        load_task("ner", files(tmp_path, "?\tO\n?\tB-place\n")).tokenize(pieces(), 16)


def test_the_batch_holds_model_inputs_alone(tmp_path):
    task = load_task("ner", files(tmp_path)).tokenize(pieces(), 16)
    batch = task.collator(pieces())([task.train[0], task.train[1]])
    assert set(batch) <= {"input_ids", "attention_mask", "token_type_ids", "labels", "example_ids"}


def test_an_evaluation_keeps_tags_and_refuses_nan(tmp_path):
    task = load_task("ner", files(tmp_path))
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, 4], [-100, -100, 2]])
    tags, losses = task.reduce(logits, labels)
    assert torch.equal(tags, logits.argmax(-1))
    logs = logits.log_softmax(-1)
    assert losses.tolist() == pytest.approx([-(logs[0, 0, 1] + logs[0, 2, 4]).item(), -logs[1, 2, 2].item()])
    logits[1, 2, 0] = float("nan")
    with pytest.raises(UserError, match="NaN logits in 1 of 2"):
        task.reduce(logits, labels)


def test_the_loss_of_an_evaluation_is_the_mean_over_its_words(tmp_path):
    dev = "waits\tO\n\nRome\tB-place\nwaits\tO\n"
    task = load_task("ner", files(tmp_path, dev=dev)).tokenize(pieces(), 16)
    (tags, _), labels = predictions_of(task, [[0], [3, 0]], 4)
    assert task.compute_metrics((tags, np.array([3.0, 1.0])), labels, task.dev)["loss"] == pytest.approx(
        4 / 3
    )


def test_further_sets_with_other_names(tmp_path):
    write(tmp_path / "other.conll", "Oslo\tB-LOC\nwaits\tO\n\nIBM\tB-ORG\n")
    label_map = {"LOC": "place", "ORG": "O"}
    config = files(tmp_path, eval={"news": EvalSet(file="other.conll", label_map=label_map)})
    assert load_task("ner", config).eval_sets["news"]["tags"] == [[3, 0], [0]]
    config = files(tmp_path, eval={"news": EvalSet(file="other.conll", label_map={"LOC": "place"})})
    with pytest.raises(
        UserError, match="set 'news' .*line 4.* has the tag 'B-ORG', which training does not know"
    ):
        load_task("ner", config)
    config = files(tmp_path, eval={"news": EvalSet(file="other.conll", label_map={"LOK": "place"})})
    with pytest.raises(UserError, match="label_map names 'LOK', no tag of that set; did you mean 'LOC'"):
        load_task("ner", config)
    config = files(tmp_path, eval={"news": EvalSet(file="other.conll", label_map={"LOC": "plaice"})})
    with pytest.raises(UserError, match="maps 'LOC' to 'plaice', no type of training; did you mean 'place'"):
        load_task("ner", config)
    config = files(tmp_path, eval={"news": EvalSet(file="other.conll", label_map={"LOC": "B-place"})})
    with pytest.raises(UserError, match="maps 'LOC' to 'B-place', no type of training"):
        load_task("ner", config)
    write(tmp_path / "long.conll", "New\tB-LOC\nYork\tI-LOC\n")
    config = files(
        tmp_path, eval={"news": EvalSet(file="long.conll", label_map={"B-LOC": "O", "LOC": "place"})}
    )
    with pytest.raises(UserError, match=r"token 2 \('York'\): I-place follows O"):
        load_task("ner", config)


def test_samples_have_entities_as_often_as_the_whole(tmp_path):
    train = "\n".join(["Rome\tB-place\n"] * 10 + ["waits\tO\n"] * 30)
    task = load_task("ner", files(tmp_path, train, train_samples=8))
    assert sorted(tags == [1] for tags in task.train["tags"]) == [False] * 6 + [True] * 2
    smaller = load_task("ner", files(tmp_path, train, train_samples=4))
    assert set(smaller.train["example_id"]) < set(task.train["example_id"])


BAD = [
    ("Anna\tperson\n", r"line 1, token 1 \('Anna'\): 'person' is no tag of the BIO scheme"),
    (
        "Anna\tO\nSmith\tI-person\n",
        r"token 2 \('Smith'\): I-person follows O, but an entity begins with B-person",
    ),
    ("Anna\tB-place\nSmith\tI-person\n", r"I-person follows B-place"),
    ("Anna\tO\n", r"no token is part of an entity"),
    ("Anna\tB-\n", r"'B-' is no tag of the BIO scheme"),
]


@pytest.mark.parametrize(("train", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_tags_name_file_and_token(tmp_path, train, message):
    with pytest.raises(UserError, match=message):
        load_task("ner", files(tmp_path, train))


ROWS = [
    ({"tokens": ["a", "b"], "tags": ["O"]}, r"line 1: 2 tokens, but 1 tags"),
    ({"tokens": [], "tags": []}, r"line 1: the sentence holds no token"),
    ({"tokens": ["a", 3], "tags": ["O", "O"]}, r"line 1: token 2 is 3, no text"),
    ({"tokens": 3, "tags": ["O"]}, r"line 1: the tokens are 3, which is no list"),
    ({"words": ["a"], "tags": ["O"]}, r"has no column 'tokens'"),
    ({"tokens": ["a"], "tags": [None]}, r"line 1, token 1 \('a'\): its tag is None, no text"),
    ({"tokens": ["a"], "tags": [["O"]]}, r"its tag is \['O'\], no text"),
    ({"tokens": ["a"], "tags": [-1]}, r"its tag is -1, no text"),
    ({"tokens": ["a"], "tags": [3]}, r"the tag is the number 3; task ner needs names such as B-person"),
]


@pytest.mark.parametrize(("row", "message"), ROWS, ids=[message[:25] for _, message in ROWS])
def test_bad_rows_name_their_line(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=message):
        load_task("ner", DataConfig(data_dir=str(tmp_path), train="a.jsonl", dev="a.jsonl"))


OPTIONS = [
    ({"train": None}, "task ner needs data.train"),
    ({"text": "words"}, "data.text has no use with .*: the tokens are the first column"),
    ({"label": "tags"}, "data.label is 'tags'; for a CoNLL file .* a column's number"),
    ({"text_pair": "b"}, "data.text_pair has no use with task ner"),
    ({"eval": {"ood": EvalSet(task="demo")}}, "data.eval.ood needs `file` with task ner"),
    ({"train": "train.conllu"}, "CoNLL-U numbers its words"),
    ({"dev": "dev.json"}, "write a JSON object a line and call it .jsonl"),
    ({"train_samples": 500}, "holds 2 rows, fewer than the 500 samples"),
]


@pytest.mark.parametrize(("fields", "message"), OPTIONS, ids=[message[:30] for _, message in OPTIONS])
def test_options_without_use(tmp_path, fields, message):
    config = files(tmp_path)
    with pytest.raises(UserError, match=message):
        load_task("ner", DataConfig(**{**vars(config), **fields}))


def test_a_slow_tokenizer_is_refused(tmp_path):
    class Slow:
        is_fast, model_max_length = False, 512

    with pytest.raises(UserError, match="task ner needs a fast tokenizer"):
        load_task("ner", files(tmp_path)).tokenize(Slow(), 16)


@pytest.mark.skipif(not WNUT17.is_dir(), reason="needs the WNUT 2017 files")
def test_wnut17():
    task = load_task("wnut17", DataConfig(data_dir=str(WNUT17), train_samples=500))
    sizes = {name: len(rows) for name, rows in task.evaluation_sets.items()}
    assert (len(task.train), sizes) == (500, {"dev": 1009, "test": 1287})
    assert len(task.label_names) == 13
    with pytest.raises(UserError, match="task wnut17 needs data.data_dir"):
        load_task("wnut17", DataConfig())
