"""A method that stays in the model: exported, loaded back, and every way in which the files may not fit."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import dist_reg
from dist_reg import HIRE, MVCR, HyPe, Trainer, UserError, regularize
from dist_reg.config import ModelConfig
from dist_reg.kept import ADDED_FILE, FILE, kept_methods
from dist_reg.model import load_model
from tests.methods.test_hire import CHEAP, stirred
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
    trained, _ = load_model(ModelConfig(name=str(folder)), "AutoModelForSequenceClassification", seed=0)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model).float(), expected, rtol=0.1, atol=0.1)


def adapted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    return peft, peft.get_peft_model(build("bert", dropout=0.0), config)


def test_beside_adapters(tmp_path):
    peft, model = adapted()
    fields = {"save_strategy": "steps", "save_steps": 1}
    trainer = Trainer(model, arguments(tmp_path / "run", **fields), methods=[METHOD], train_dataset=rows())
    stirred(model.get_base_model().dist_reg_hire)
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


def test_beside_adapters_the_best_checkpoint_is_whole(tmp_path):
    _, model = adapted()
    fields = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 3,
    }
    fields |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    trainer = Trainer(
        model,
        arguments(tmp_path, learning_rate=0.1, **fields),
        methods=[CHEAP],
        train_dataset=rows(),
        eval_dataset=rows(),
    )
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / ADDED_FILE)
    own = model.get_base_model().state_dict()
    assert all(torch.equal(own[name], value) for name, value in best.items())
    last = load_file(tmp_path / "checkpoint-3" / ADDED_FILE)
    other = "checkpoint-3" not in trainer.state.best_model_checkpoint
    assert other == any(not torch.equal(last[name], value) for name, value in best.items())
    assert other


def test_whoever_saves_the_model_saves_what_is_needed(tmp_path):
    """Not only our own trainer: save_pretrained of the model, of one loaded, of a merged one, and Transformers' trainer."""
    model = build("bert", dropout=0.0)
    regularize(model, [METHOD], seed=1).bake()
    stirred(model.dist_reg_hire)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "one")
    again = dist_reg.load(tmp_path / "one")
    assert torch.equal(logits(again), expected)
    copy.deepcopy(again).save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    assert torch.equal(logits(dist_reg.load(tmp_path / "two")), expected)
    theirs = transformers.Trainer(
        again, arguments(tmp_path / "run", save_strategy="steps", save_steps=2), train_dataset=rows(ids=False)
    )
    theirs.train()
    assert torch.equal(logits(dist_reg.load(tmp_path / "run" / "checkpoint-2")), logits(again.eval()))

    peft, wrapped = adapted()
    regularize(wrapped, [CHEAP], seed=1).bake()
    expected = logits(wrapped.eval())
    wrapped.save_pretrained(tmp_path / "three")
    fresh = peft.PeftModel.from_pretrained(build("bert", dropout=0.0), tmp_path / "three")
    assert torch.equal(logits(dist_reg.load(tmp_path / "three", model=fresh)), expected)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "four")
    torch.testing.assert_close(logits(dist_reg.load(tmp_path / "four")), expected)


def two_stacks():
    """A model in which the layers must be named."""
    model = build("bert", dropout=0.0)
    model.second = copy.deepcopy(model.bert.encoder)
    return model


def test_a_model_whose_layers_must_be_named(tmp_path):
    model = two_stacks()
    regularize(model, [CHEAP], layers_path="bert.encoder.layer").bake()
    stirred(model.dist_reg_hire)
    model.save_pretrained(tmp_path)
    found = dist_reg.load(tmp_path, model=two_stacks())
    assert torch.equal(logits(found), logits(model.eval()))


def test_a_model_that_has_it_can_be_pickled(tmp_path):
    model = build("bert", dropout=0.0)
    regularize(model, [METHOD], seed=1).bake()
    expected = logits(model.eval())
    torch.save(model, tmp_path / "model.pt")
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(found), expected)
    assert kept_methods(found)["hire"].method == METHOD


def test_removing_it_leaves_save_pretrained_as_it_was(tmp_path):
    model = build("bert")
    regularize(model, [METHOD]).remove()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
    assert "save_pretrained" not in vars(model)


def test_a_checkpoint_with_methods_that_do_not_stay_is_the_plain_model(tmp_path):
    method = MVCR(warmup_epochs=0)
    fields = {"save_strategy": "steps", "save_steps": 2}
    model = build("bert")
    Trainer(model, arguments(tmp_path, **fields), methods=[method], train_dataset=rows()).train()
    found = dist_reg.load(tmp_path / "checkpoint-2")
    assert torch.equal(logits(found), logits(model.eval()))


def change(folder, function):
    path = folder / FILE
    text = json.loads(path.read_text())
    function(text)
    path.write_text(json.dumps(text))


def only_plain_weights(folder):
    path = folder / "model.safetensors"
    own = {name: value for name, value in load_file(path).items() if not name.startswith("dist_reg_")}
    save_file(own, path, {"format": "pt"})


def spoil(folder, key):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {key: torch.ones(1)}, path, {"format": "pt"})


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
    (lambda folder: (folder / FILE).write_text("[" * 9999), r"dist_reg.json is damaged"),
    (lambda folder: change(folder, lambda text: text.update(methods=[])), r"damaged \(it lists no method\)"),
    (
        lambda folder: change(folder, lambda text: text.update(methods=[{}])),
        r"damaged \(it lists no method\)",
    ),
    (
        lambda folder: change(folder, lambda text: text.update(methods=[{"hype": {}}])),
        r"damaged \(hype does not stay in a model\)",
    ),
    (
        lambda folder: change(folder, lambda text: text["backbone"].update(layers_path=["a"])),
        r"damaged \(layers_path is no text\)",
    ),
    (
        lambda folder: change(folder, lambda text: text.update(methods=text["methods"] * 2)),
        r"dist_reg.json: methods: 'hire' is listed twice",
    ),
    (
        lambda folder: change(folder, lambda text: text["methods"][0]["hire"].update(combine="no")),
        r"dist_reg.json: methods.hire: combine",
    ),
    (
        lambda folder: spoil(folder, "dist_reg_hire.another"),
        r"of dist_reg_hire.another the weights hold \[1\], .*nothing",
    ),
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
        r"dist_reg.json: methods: unknown method 'lowrank'",
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


@pytest.mark.parametrize("kind", ["OurBert", "Trainer", "pipeline", "BertConfig", "logging"])
def test_weights_of_a_class_that_transformers_does_not_have(exported, kind):
    folder, _ = exported
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": [kind]}))
    with pytest.raises(UserError, match=rf"names no class of Transformers \({kind}\)"):
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
