"""A method that stays in the model: exported, loaded back, and every way in which the files may not fit."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import dist_reg
from dist_reg import HIRE, HyPe, Trainer, UserError, regularize
from dist_reg.config import ModelConfig
from dist_reg.kept import FILE, kept_methods
from dist_reg.model import load_model
from dist_reg.trainer import ADDED_FILE
from tests.methods.test_hire import stirred
from tests.models import batch, build
from tests.test_trainer import arguments, rows
from tests.tiny import tokenizer

pytestmark = pytest.mark.compat

METHOD = HIRE(include_embeddings=True)


@pytest.fixture
def exported(tmp_path):
    """A folder with a trained model that has HIRE, and the logits it gives for one batch."""
    model = build("bert")
    trainer = Trainer(
        model, arguments(tmp_path / "run"), methods=[HyPe(sigma=0.1), METHOD], processing_class=tokenizer()
    )
    stirred(model.dist_reg_hire)
    folder = tmp_path / "exported model"
    trainer.handle.bake()
    trainer.save_model(str(folder))
    with torch.no_grad():
        return folder, model.eval()(**batch("bert", labels=False)).logits


def logits(model):
    with torch.no_grad():
        return model(**batch("bert", labels=False)).logits


def test_load_gives_the_working_model_back(exported):
    folder, expected = exported
    model = dist_reg.load(folder)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert not model.training
    assert torch.equal(logits(model), expected)
    assert kept_methods(model)["hire"].method == METHOD
    assert json.loads((folder / FILE).read_text())["methods"][0]["hire"]["extractor"] == "gru"


def test_a_loaded_model_trains_on_and_is_saved_again(exported, tmp_path):
    folder, expected = exported
    model = dist_reg.load(folder)
    trainer = Trainer(
        model,
        arguments(tmp_path / "on", save_strategy="steps", save_steps=2),
        methods=[METHOD],
        train_dataset=rows(),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "again"))
    again = dist_reg.load(tmp_path / "again")
    assert not torch.equal(logits(again), expected)
    assert torch.equal(logits(again), logits(model.eval()))
    sealed = dist_reg.load(tmp_path / "on" / "checkpoint-2")
    assert torch.equal(logits(sealed), logits(again))


AUTO = """
import sys
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
assert "dist_reg" not in sys.modules
"""


def test_transformers_alone_says_that_something_is_missing(exported):
    folder, expected = exported
    done = subprocess.run([sys.executable, "-c", AUTO, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "load_this_model_with_dist_reg_load" in done.stdout + done.stderr
    bare = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert not torch.equal(logits(bare), expected)


def test_an_export_without_such_methods_is_the_plain_model(tmp_path):
    model = build("bert").eval()
    model.save_pretrained(tmp_path)
    found = dist_reg.load(tmp_path)
    assert torch.equal(logits(found), logits(model))
    assert not kept_methods(found)


def test_a_run_that_begins_from_it_has_it(exported):
    folder, expected = exported
    model, _ = load_model(ModelConfig(name=str(folder)), "AutoModelForSequenceClassification", seed=5)
    assert torch.equal(logits(model.eval()), expected)


def test_weights_in_half_precision(exported):
    folder, expected = exported
    path = folder / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    model = dist_reg.load(folder)
    assert model.dist_reg_hire.fusion_weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(model).float(), expected, rtol=0.1, atol=0.1)


def adapted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    return peft, peft.get_peft_model(build("bert", dropout=0.0), config)


def test_beside_adapters(tmp_path):
    peft, model = adapted()
    fields = {"save_strategy": "steps", "save_steps": 1}
    trainer = Trainer(model, arguments(tmp_path / "run", **fields), methods=[METHOD], train_dataset=rows())
    stirred(model.dist_reg_hire)
    trainer.train()
    trainer.handle.bake()
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / ADDED_FILE).is_file()
    fresh = peft.PeftModel.from_pretrained(build("bert", dropout=0.0), tmp_path / "adapter")
    found = dist_reg.load(tmp_path / "adapter", model=fresh)
    assert torch.equal(logits(found), logits(model.eval()))
    with pytest.raises(
        UserError, match="holds adapters; load them with PEFT and hand the model over as model="
    ):
        dist_reg.load(tmp_path / "adapter")


def change(folder, function):
    path = folder / FILE
    text = json.loads(path.read_text())
    function(text)
    path.write_text(json.dumps(text))


def only_plain_weights(folder):
    path = folder / "model.safetensors"
    own = {name: value for name, value in load_file(path).items() if not name.startswith("dist_reg_")}
    save_file(own, path, {"format": "pt"})


def without(folder, key):
    path = folder / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if name != key}, path, {"format": "pt"})


BROKEN = [
    (
        lambda folder: (folder / FILE).unlink(),
        r"holds weights of a method \(dist_reg_hire\..*but no dist_reg.json",
    ),
    (lambda folder: (folder / FILE).write_text("{"), r"dist_reg.json is damaged"),
    (lambda folder: (folder / FILE).write_text("[]"), r"dist_reg.json is damaged"),
    (
        lambda folder: change(folder, lambda text: text["backbone"].update(layers=12, hidden_size=768)),
        r"was trained as BertForSequenceClassification with 12 layers of 768 channels; the model is "
        r"BertForSequenceClassification with 3 layers of 32 channels",
    ),
    (
        lambda folder: change(
            folder, lambda text: text.update(dist_reg="7.0") or text["methods"][0]["hire"].update(depth=3)
        ),
        rf"was written by dist-reg 7.0 and this is dist-reg {dist_reg.__version__}: .*depth",
    ),
    (
        lambda folder: change(folder, lambda text: text.update(methods=[{"lowrank": {}}])),
        r"was written by dist-reg .*unknown method 'lowrank'",
    ),
    (
        lambda folder: change(folder, lambda text: text["methods"][0]["hire"].update(extractor="attention")),
        r"of dist_reg_hire.gate_weight|of dist_reg_hire.gru",
    ),
    (
        only_plain_weights,
        r"of dist_reg_hire.fusion_bias the weights hold nothing, and the options .* ask for \[32\]",
    ),
    (
        lambda folder: without(folder, "dist_reg_hire.gru.bias_hh_l1"),
        r"of dist_reg_hire.gru.bias_hh_l1 the weights hold nothing, and the options in dist_reg.json ask for \[48\]",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message[:30] for _, message in BROKEN])
def test_files_that_do_not_fit_are_named(exported, damage, message):
    folder, _ = exported
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        dist_reg.load(folder)
    assert str(folder) in str(error.value)
    with pytest.raises(UserError, match=message):
        load_model(ModelConfig(name=str(folder)), "AutoModelForSequenceClassification", seed=0)


def test_another_backbone_under_the_same_folder(exported, tmp_path):
    folder, _ = exported
    other = build("roberta")
    names = list(other.state_dict())
    with pytest.raises(
        UserError, match="was trained as Bert.*; the model is RobertaForSequenceClassification"
    ):
        dist_reg.load(folder, model=other)
    assert list(other.state_dict()) == names


def test_a_failed_load_leaves_the_model_as_it_was(exported):
    folder, _ = exported
    without(folder, "dist_reg_hire.gru.bias_hh_l1")
    model = build("bert")
    names = list(model.state_dict())
    with pytest.raises(UserError):
        dist_reg.load(folder, model=model)
    assert list(model.state_dict()) == names
    assert not kept_methods(model)
    with regularize(model, [HyPe()]):
        pass


def test_a_folder_that_is_not_there():
    with pytest.raises(UserError, match="folder ./nowhere/model does not exist"):
        dist_reg.load("./nowhere/model")


def test_weights_of_a_class_that_transformers_does_not_have(exported):
    folder, _ = exported
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": ["OurBert"]}))
    with pytest.raises(UserError, match=r"names no class of Transformers \(OurBert\)"):
        dist_reg.load(folder)


def test_training_only_methods_leave_no_description(tmp_path):
    trainer = Trainer(build("bert"), arguments(tmp_path / "run"), methods=[HyPe()])
    trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out" / FILE).exists()


def test_an_optimizer_that_does_not_hold_the_modules_is_refused(tmp_path):
    model = build("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(UserError, match=r"the optimizer does not hold .*dist_reg_hire"):
        Trainer(model, arguments(tmp_path), methods=[HIRE()], optimizers=(optimizer, None))
    assert not hasattr(model, "dist_reg_hire")


def test_nothing_is_logged_about_a_fresh_head(exported, caplog):
    folder, _ = exported
    with caplog.at_level(logging.WARNING):
        dist_reg.load(folder)
    assert not [record for record in caplog.records if record.name.startswith("dist_reg")]
