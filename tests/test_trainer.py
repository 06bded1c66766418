"""`dist_reg.Trainer` where it is not `dist-reg train` that drives it."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
import transformers
from transformers import default_data_collator

from dist_reg import LNSR, HyPe, Trainer, UserError
from dist_reg.checkpoint import newest_whole
from dist_reg.trainer import EpochSampler
from tests.models import batch, build


def arguments(folder, **fields):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **fields})


def rows(ids: bool = True) -> list[dict]:
    inputs = batch("bert", batch_size=8)
    found = [{name: values[i].tolist() for name, values in inputs.items()} for i in range(8)]
    return [{**row, "example_id": 10 + i} if ids else row for i, row in enumerate(found)]


def losses(trainer) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def ours(caplog) -> list[str]:
    """Our own warnings; Transformers has some that depend on what ran before in this process."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("dist_reg")]


def draw(count: int, *_) -> None:
    torch.rand(count)


def test_the_column_of_ids_keys_the_noise_whatever_collates_the_batch(tmp_path, caplog):
    """The same batches whatever the generator has drawn before: noise that followed it would differ."""
    found = []
    for draws in (0, 5):
        model = build("bert", dropout=0.0)
        trainer = Trainer(
            model,
            arguments(tmp_path),
            methods=[HyPe(sigma=0.3)],
            train_dataset=rows(),
            data_collator=default_data_collator,
        )
        model.register_forward_pre_hook(functools.partial(draw, draws))
        found.append(losses(trainer))
        trainer.evaluate(rows())
    assert found[0] == found[1]
    assert "example_ids" not in caplog.text


def test_batches_without_ids_are_warned_about_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "dist_reg.trainer"):
        losses(Trainer(build("bert"), arguments(tmp_path), methods=[HyPe()], train_dataset=rows(ids=False)))
    (warning,) = ours(caplog)
    assert "the batches hold no example_ids" in warning


def test_plain_training_without_ids_is_not_warned_about(tmp_path, caplog):
    losses(Trainer(build("bert"), arguments(tmp_path), train_dataset=rows(ids=False)))
    assert not ours(caplog)


def test_a_trainer_that_cannot_be_built_leaves_the_model_alone(tmp_path):
    model = build("bert")
    with pytest.raises(ValueError, match="eval_dataset"):
        Trainer(model, arguments(tmp_path, eval_strategy="steps"), methods=[HyPe()], train_dataset=rows())
    assert "forward" not in vars(model)
    assert len(losses(Trainer(model, arguments(tmp_path), methods=[HyPe()], train_dataset=rows()))) == 2


def test_checkpoints_of_another_trainer_are_left_alone(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    plain = transformers.Trainer(build("bert"), arguments(tmp_path, **fields), train_dataset=rows(ids=False))
    plain.train()
    ours = Trainer(
        build("bert"), arguments(tmp_path, max_steps=4, **fields), methods=[HyPe()], train_dataset=rows()
    )
    ours.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]


def test_an_order_that_is_not_ours_is_warned_about(tmp_path, caplog):
    fields = {"train_sampling_strategy": "group_by_length"}
    losses(Trainer(build("bert"), arguments(tmp_path, **fields), train_dataset=rows()))
    assert "may depend on the number of processes" in caplog.text


class Spoil(transformers.TrainerCallback):
    """After step 2, makes one word's embedding infinite."""

    def __init__(self, word: int) -> None:
        self.word = word

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                model.bert.embeddings.word_embeddings.weight[self.word] = torch.inf


def test_a_term_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stands(tmp_path):
    examples = rows()
    word = 99
    for row in examples:
        row["input_ids"] = [5 if token == word else token for token in row["input_ids"]]
    examples[3]["input_ids"][1] = word
    trainer = Trainer(
        build("bert", dropout=0.0),
        arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=1, save_total_limit=None),
        methods=[LNSR()],
        train_dataset=examples,
        callbacks=[Spoil(word)],
    )
    # The weights are spoilt after step 2, so checkpoint-2 holds them; steps 3 and 4 see every example.
    with pytest.raises(UserError, match=r"term lnsr .* layer 0 .* examples with the ids \[13\]"):
        trainer.train()
    assert trainer.state.global_step in (2, 3)
    assert newest_whole(tmp_path) == tmp_path / f"checkpoint-{trainer.state.global_step}"


def test_a_causal_model_under_accumulation_adds_its_terms_once(tmp_path):
    """Transformers sums micro-batches of a model that counts items: losses and weights are those of whole batches."""
    inputs = batch("llama", head="causal", batch_size=8)
    examples = [
        {**{name: values[i].tolist() for name, values in inputs.items()}, "example_id": 10 + i}
        for i in range(8)
    ]
    found = []
    for micro in (4, 2, 1):
        model = build("llama", "causal", dropout=0.0)
        fields = {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": 4 // micro,
            "optim": "sgd",
        }
        trainer = Trainer(
            model,
            arguments(tmp_path, learning_rate=0.1, **fields),
            methods=[HyPe(sigma=0.1), LNSR(weight=1.0)],
            train_dataset=examples,
        )
        found.append((losses(trainer), model.lm_head.weight.detach().clone()))
    for other, weight in found[1:]:
        assert other == pytest.approx(found[0][0], rel=1e-4)
        torch.testing.assert_close(weight, found[0][1], rtol=1e-4, atol=1e-6)


def test_grouped_examples_of_a_step_are_about_as_long_as_each_other():
    lengths = torch.randint(1, 100, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    grouped, plain = EpochSampler(203, 8, 5, lengths=lengths), EpochSampler(203, 8, 5)
    for epoch in (0, 1):
        grouped.set_epoch(epoch)
        plain.set_epoch(epoch)
        order = list(grouped)
        assert sorted(order) == sorted(plain)
        steps = [[lengths[i] for i in order[start : start + 8]] for start in range(0, len(order), 8)]
        assert sum(max(step) - min(step) for step in steps) / len(steps) < 10
        means = [sum(step) / 8 for step in steps]
        assert means != sorted(means)
        assert order != sorted(order)
    assert list(grouped) == list(grouped)
