"""Parameter groups of added modules, and the schedule and the moments at the end of their warm-up."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from dist_reg import MVCR, Trainer, UserError
from dist_reg.export import export_model
from dist_reg.optimizer import MULTIPLE, after_warm_up, split_groups, start_anew
from tests.models import build
from tests.test_trainer import arguments, losses, rows


def two_parts() -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(3, 3), nn.Linear(3, 3)


def optimizer_of(own: nn.Module, added: nn.Module, multiple: float = 10.0) -> torch.optim.Optimizer:
    weights = [own.weight, added.weight]
    biases = [own.bias, added.bias]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    split_groups(optimizer, dict.fromkeys(added.parameters(), multiple))
    return optimizer


def test_groups_keep_their_options_and_multiply_their_rate():
    own, added = two_parts()
    found = [
        (group["params"], group["lr"], group["weight_decay"], group.get(MULTIPLE))
        for group in optimizer_of(own, added).param_groups
    ]
    assert [parameters for parameters, *_ in found] == [
        [own.weight],
        [own.bias],
        [added.weight],
        [added.bias],
    ]
    assert [rest for _, *rest in found] == [
        [0.01, 0.1, None],
        [0.01, 0.0, None],
        [0.1, 0.1, 10.0],
        [0.1, 0.0, 10.0],
    ]


def test_an_optimizer_without_the_parameters_is_refused():
    own, added = two_parts()
    with pytest.raises(UserError, match="SGD does not hold"):
        split_groups(torch.optim.SGD(own.parameters(), lr=0.1), dict.fromkeys(added.parameters(), 2.0))


def test_the_schedule_begins_after_the_warm_up():
    own, added = two_parts()
    optimizer = optimizer_of(own, added)
    linear = transformers.get_linear_schedule_with_warmup(optimizer, 2, 6)
    scheduler = after_warm_up(linear, optimizer, 3)
    rates = []
    for _ in range(9):
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[2]["lr"]))
        optimizer.step()
        scheduler.step()
    expected = [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    assert [one for one, _ in rates] == pytest.approx([0.0] * 3 + [0.01 * e for e in expected])
    assert [other for _, other in rates] == pytest.approx([0.1] * 3 + [0.1 * e for e in expected])


def test_a_schedule_that_follows_the_loss_is_refused():
    own, added = two_parts()
    optimizer = optimizer_of(own, added)
    with pytest.raises(UserError, match="ReduceLROnPlateau cannot begin after a warm-up.*warmup_epochs: 0"):
        after_warm_up(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), optimizer, 3)


def test_adam_begins_anew_for_the_model_and_goes_on_for_what_was_added():
    own, added = two_parts()
    optimizer = optimizer_of(own, added)
    for _ in range(4):
        for parameter in own.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for parameter in added.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    start_anew(optimizer)
    assert not {own.weight, own.bias} & optimizer.state.keys()
    assert [optimizer.state[p]["step"].item() for p in (added.weight, added.bias)] == [4, 4]
    before = own.bias.detach().clone()
    own.bias.grad = torch.full_like(own.bias, 0.3)
    optimizer.step()
    torch.testing.assert_close(before - own.bias, torch.full_like(before, 0.01), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.NAdam, {}),
        (torch.optim.Rprop, {}),
        (transformers.Adafactor, {"relative_step": False, "scale_parameter": False}),
    ],
    ids=["sgd", "nadam", "rprop", "adafactor"],
)
def test_any_optimizer_goes_on_as_a_new_one(kind, options):
    (own, added), (fresh, _) = two_parts(), two_parts()
    fresh.load_state_dict(own.state_dict())
    optimizer = kind([{"params": own.parameters()}], lr=0.01, **options)
    optimizer.add_param_group({"params": added.parameters(), "lr": 0.1, MULTIPLE: 10.0})
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(4):
        for parameter in (*own.parameters(), *added.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    start_anew(optimizer)
    optimizer.param_groups[0]["lr"] = 0.01
    other = kind(fresh.parameters(), lr=0.01, **options)
    for step in range(3):
        for one, two in zip(own.parameters(), fresh.parameters()):
            one.grad = torch.full_like(one, 0.3 + step)
            two.grad = one.grad.clone()
        optimizer.step()
        other.step()
    for one, two in zip(own.parameters(), fresh.parameters()):
        torch.testing.assert_close(one, two)


def trainer_of(folder, *, model=None, methods=None, **fields) -> Trainer:
    methods = [MVCR(warmup_epochs=2)] if methods is None else methods
    fields = {"max_steps": 3, "learning_rate": 1e-3, "warmup_steps": 0, **fields}
    model = model or build("bert", dropout=0.0)
    return Trainer(
        model, arguments(folder, **fields), methods=methods, train_dataset=rows(), eval_dataset=rows()
    )


def test_the_warm_up_comes_before_the_runs_own_steps_and_freezes_the_model(tmp_path):
    model = build("bert", dropout=0.0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    args = arguments(tmp_path, max_steps=3, learning_rate=1e-3, eval_strategy="steps", eval_steps=1)
    seen = {}

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    trainer = Trainer(
        model,
        args,
        methods=[MVCR(warmup_epochs=2)],
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=[Watch()],
    )
    assert trainer.warmup_steps == 4
    found = losses(trainer)
    assert len(found) == 7
    assert args.max_steps == 3  # the caller's own arguments are left alone
    for name, value in start.items():
        assert torch.equal(seen[4][name], value), name
    assert not torch.equal(seen[6]["classifier.weight"], start["classifier.weight"])
    added = [name for name in seen[0] if name.startswith("dist_reg_")]
    assert added
    assert any(not torch.equal(seen[4][name], seen[0][name]) for name in added)
    assert found[3] < found[0]
    evaluated = [line["step"] for line in trainer.state.log_history if "eval_loss" in line]
    assert evaluated == [5, 6, 7]
    line = next(line for line in trainer.state.log_history if line["step"] == 2)
    assert line["loss"] == pytest.approx(line["mvcr"], rel=1e-4)
    assert line["task_loss"] > 0


def test_epochs_of_the_warm_up_are_added_to_those_of_the_run(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=-1, num_train_epochs=3)
    trainer.train()
    assert trainer.state.global_step == 2 * (2 + 3)


def test_the_exported_model_is_the_backbone_bit_for_bit(tmp_path):
    trainer = trainer_of(tmp_path / "run")
    trainer.train()
    trained = {
        name: value.clone()
        for name, value in trainer.model.state_dict().items()
        if not name.startswith("dist_reg_")
    }
    export_model(trainer, tmp_path / "model", RESULTS)
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert exported.keys() == trained.keys()
    for name, value in exported.items():
        assert torch.equal(value, trained[name])
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not hasattr(loaded, "dist_reg_mvcr_1")


RESULTS = {
    "task": "t", "model": "m", "methods": [], "metrics": {}, "train_examples": 8, "seed": 0, "data_seed": 0,
    "selection": "last step", "date": "2026-11-21", "versions": {},
}  # fmt: skip


def test_an_export_before_the_end_of_the_warm_up_says_so(tmp_path, caplog):
    trainer = trainer_of(tmp_path / "run")

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer.add_callback(Stop())
    trainer.train()
    with caplog.at_level(logging.WARNING):
        export_model(trainer, tmp_path / "model", RESULTS)
    assert "the warm-up of mvcr never ended" in caplog.text
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_adapters_resume_with_their_autoencoders(tmp_path):
    peft = pytest.importorskip("peft")

    def run(resume=None):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        model = peft.get_peft_model(build("bert", dropout=0.0), config)
        trainer = trainer_of(tmp_path, model=model, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    whole = run()
    saved = str(tmp_path / "checkpoint-3")
    assert run(saved)[-4:] == whole[-4:]
    (tmp_path / "checkpoint-3" / "dist_reg_modules.safetensors").unlink()
    with pytest.raises(UserError, match="holds no dist_reg_modules"):
        run(saved)


def test_a_subclass_with_an_optimizer_of_its_own_is_told(tmp_path):
    class Own(Trainer):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    trainer = Own(build("bert"), arguments(tmp_path), methods=[MVCR()], train_dataset=rows())
    with pytest.raises(UserError, match="Own.create_optimizer knows nothing"):
        trainer.train()


def test_a_trainer_that_only_evaluates_needs_no_training_set(tmp_path):
    trainer = Trainer(build("bert"), arguments(tmp_path), methods=[MVCR()], eval_dataset=rows())
    assert trainer.warmup_steps == 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_schedule_that_follows_the_loss_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="ReduceLROnPlateau cannot begin after"):
        trainer_of(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")


def test_an_optimizer_from_outside_is_refused(tmp_path):
    model = build("bert")
    with pytest.raises(UserError, match="optimizers: a method adds modules"):
        Trainer(
            model,
            arguments(tmp_path),
            methods=[MVCR()],
            train_dataset=rows(),
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
        )
    assert not any("dist_reg" in name for name in model.state_dict())


def test_a_warm_up_needs_to_know_its_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows())

    with pytest.raises(UserError, match="needs a training set with a length; set warmup_epochs: 0"):
        Trainer(build("bert"), arguments(tmp_path), methods=[MVCR()], train_dataset=Stream())
