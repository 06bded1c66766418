"""The run file: short forms, overrides, and the one sentence that every mistake gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dist_reg.config import EarlyStopping, ModelConfig, load_run, write_yaml
from dist_reg.data.config import EvalSet
from dist_reg.errors import UserError
from dist_reg.methods import HyPe
from dist_reg.rundir import first_difference, plain

FULL = """\
model:
  name: somewhere/bert
  config: {hidden_dropout_prob: 0.0}
  layers_path: bert.encoder.layer
task: classification
data:
  train: my data/train.csv
  dev: my data/dev.csv
  eval:
    domain: {file: other.csv, label_map: {"1": "yes"}}
  train_samples: 500
methods:
  - hype: {sigma: 1e-4, layers: [0, "2-3", -1], distribution: uniform}
batch_size: 32
train:
  learning_rate: 3e-5
  warmup_steps: 0.06
  lr_scheduler_kwargs: {power: 2.0}
early_stopping: {patience: 3}
deepspeed: zero2
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def sentence(path: Path, *overrides: str) -> str:
    """The message of the error that loading `path` gives: one line."""
    with pytest.raises(UserError) as error:
        load_run(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


# -- what a run file may say


def test_short_forms_are_the_long_forms(tmp_path):
    short = load_run(write(tmp_path, "model: bert\nmethods: [hype]\ndata:\ntrain:\n"))
    long = load_run(write(tmp_path, "model: {name: bert}\nmethods: [{hype: {}}]\ndata: {}\ntrain: {}\n"))
    bare = load_run(write(tmp_path, "model: bert\nmethods:\n- hype:\n"))
    assert short == long == bare
    assert short.model == ModelConfig(name="bert")
    assert short.build_methods() == [HyPe()]
    assert load_run(write(tmp_path, "model: bert\nmethods:\n")).build_methods() == []


def test_output_folder_defaults_to_the_name_of_the_run_file(tmp_path):
    assert load_run(write(tmp_path, "model: bert", "first try.yaml")).output_dir == Path("runs/first try")
    named = load_run(write(tmp_path, "model: bert\ntrain: {output_dir: here/there}"))
    assert named.output_dir == Path("here/there")


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    text = "model: bert\nmethods: [hype: {sigma: 1e-5}]\ntrain: {learning_rate: 2E-5, adam_epsilon: 1e-08}\n"
    run = load_run(write(tmp_path, text))
    assert run.build_methods() == [HyPe(sigma=1e-5)]
    assert run.train["learning_rate"] == 2e-5
    assert isinstance(run.train["adam_epsilon"], float)
    # `off`, `no` and `yes` are words, not booleans
    run = load_run(
        write(tmp_path, "model: bert\nmethods: [hype: {dropout: off}]\ntrain: {eval_strategy: no}\n")
    )
    assert run.build_methods() == [HyPe(dropout="off")]
    assert run.train["eval_strategy"] == "no"


def test_full_run_file(tmp_path):
    run = load_run(write(tmp_path, FULL))
    assert run.model.config == {"hidden_dropout_prob": 0.0}
    assert run.data.train == "my data/train.csv"
    assert run.data.eval == {"domain": EvalSet(file="other.csv", label_map={"1": "yes"})}
    assert run.build_methods() == [HyPe(sigma=1e-4, layers=[0, "2-3", -1], distribution="uniform")]
    assert run.early_stopping == EarlyStopping(patience=3)
    assert (run.batch_size, run.deepspeed) == (32, "zero2")


def test_the_resolved_run_written_and_read_is_the_same_run(tmp_path):
    run = load_run(write(tmp_path, FULL))
    resolved = tmp_path / "resolved.yaml"
    write_yaml(plain(run.as_dict()), resolved)
    again = load_run(resolved)
    assert first_difference(plain(again.as_dict()), plain(run.as_dict())) is None
    assert again.build_methods() == run.build_methods()
    # `methods` holds every default spelt out; everything else is equal as it stands
    assert replace(again, methods=[]) == replace(run, methods=[])
    assert again.methods[0]["hype"]["site"] == "input"


# -- overrides


@pytest.mark.parametrize(
    "methods", ["", "methods:\n", "methods: []\n", "methods: [hype]\n", "methods: [hype: {sigma: 2}]\n"]
)
def test_override_reaches_an_option_of_a_method(tmp_path, methods):
    path = write(tmp_path, f"model: bert\n{methods}")
    assert load_run(path, ["methods.hype.sigma=1e-4"]).build_methods() == [HyPe(sigma=1e-4)]


def test_override_keeps_the_other_options(tmp_path):
    path = write(tmp_path, "model: bert\nmethods: [hype: {sigma: 0.5, scale: relative}]\n")
    run = load_run(path, ["methods.hype.sigma=1e-4", "methods.hype.layers=[0, last:2]"])
    assert run.build_methods() == [HyPe(sigma=1e-4, scale="relative", layers=[0, "last:2"])]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-5", "learning_rate", 1e-5),
        ("train.eval_strategy=no", "eval_strategy", "no"),
        ("train.max_steps=-1", "max_steps", -1),
        ("train.bf16=true", "bf16", True),
        ("train.run_name=null", "run_name", None),
        ("train.run_name=", "run_name", None),
        ("train.run_name=a=b", "run_name", "a=b"),
        ("train.report_to=[a, b]", "report_to", ["a", "b"]),
        ("train.lr_scheduler_kwargs={power: 2}", "lr_scheduler_kwargs", {"power": 2}),
        ("train.lr_scheduler_kwargs.power=2", "lr_scheduler_kwargs", {"power": 2}),
        ("train.output_dir=a folder/it's here", "output_dir", "a folder/it's here"),
    ],
)
def test_override_values(tmp_path, override, key, value):
    for text in (
        "model: bert",
        "model: bert\ntrain:\n",
        "model: bert\ntrain: {run_name: x, output_dir: y}\n",
    ):
        found = load_run(write(tmp_path, text), [override]).train[key]
        assert found == value
        assert type(found) is type(value)


def test_override_of_whole_sections_and_short_forms(tmp_path):
    path = write(tmp_path, "model: bert\nmethods: [hype]\ndata: {train: a.csv}\ndeepspeed: zero2\n")
    assert load_run(path, ["methods=[]"]).build_methods() == []
    assert load_run(path, ["methods=[hype: {sigma: 3}]"]).build_methods() == [HyPe(sigma=3.0)]
    assert load_run(path, ["deepspeed=null"]).deepspeed is None
    assert load_run(path, ["model=other"]).model == ModelConfig(name="other")
    changed = load_run(path, ["model.config.hidden_dropout_prob=0.0"]).model
    assert changed == ModelConfig(name="bert", config={"hidden_dropout_prob": 0.0})
    assert load_run(path, ["data.train=my data/a b.csv"]).data.train == "my data/a b.csv"
    assert load_run(path, ["data.eval.ood.file=b.csv"]).data.eval == {"ood": EvalSet(file="b.csv")}
    assert load_run(path, ["early_stopping.patience=2"]).early_stopping == EarlyStopping(patience=2)
    assert load_run(path, ["batch_size=4", "batch_size=8"]).batch_size == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bogus", "override 'bogus' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
        ("", "override '' is not of the form key=value"),
        ("methods.hype=3", "override methods.hype: name the option too, such as methods.hype.sigma=1e-5"),
        ("task.name=cola", "override task.name: task is a value and has no keys below it"),
        ("methods.hype.sigma.x=1", "methods.hype.sigma is a value and has no keys below it"),
        ("methods.hype.layers=[1", "override methods.hype.layers line 1 is not valid YAML"),
        ("methods.hipe.sigma=1", "unknown method 'hipe'; did you mean 'hype'?"),
        ("methods.hype.sigmas=1", "methods.hype: unknown key 'sigmas'; did you mean 'sigma'?"),
        ("bach_size=3", "unknown key 'bach_size'; did you mean 'batch_size'?"),
        ("data.trian=x", "unknown key 'data.trian'; did you mean 'data.train'?"),
        ("a..b=1", "unknown key 'a'"),
        ("model.nam=x", "unknown key 'model.nam'; did you mean 'model.name'?"),
        ("seed=1", "train.seed"),  # beside data.seed, which is another thing
        ("train.output_dir=[1]", "train.output_dir"),
        ("train.output_dir=", "train.output_dir"),
        ("train.output_dir=3", "train.output_dir"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    path = write(tmp_path, "model: bert\ntask: cola\nmethods: [hype: {sigma: 1e-5}]\n")
    assert message in sentence(path, override)


def test_key_that_is_like_no_other_gets_a_list_that_can_be_read(tmp_path):
    message = sentence(write(tmp_path, "model: bert\n"), "zzzz=1")
    assert "unknown key 'zzzz'" in message
    for key in ("model", "task", "data", "methods", "train", "deepspeed"):
        assert key in message
    assert len(message) < 1000 + len(str(tmp_path))


# -- mistakes


MISTAKES = {
    "unknown key": ("model: bert\nmetods: []\n", "unknown key 'metods'; did you mean 'methods'?"),
    "unknown data key": (
        "model: bert\ndata: {train_sample: 5}\n",
        "unknown key 'data.train_sample'; did you mean 'data.train_samples'?",
    ),
    "data key at the top": (
        "model: bert\ndata_dir: glue\n",
        "unknown key 'data_dir'; did you mean 'data.data_dir'?",
    ),
    "key of an evaluation set": (
        "model: bert\ndata: {eval: {ood: {fil: x.csv}}}\n",
        "unknown key 'data.eval.ood.fil'; did you mean 'data.eval.ood.file'?",
    ),
    "training field at the top": (
        "model: bert\nlearning_rate: 1e-4\n",
        "unknown key 'learning_rate'; did you mean 'train.learning_rate'?",
    ),
    "unknown method": ("model: bert\nmethods: [hyppe]\n", "unknown method 'hyppe'; did you mean 'hype'?"),
    "unknown option": (
        "model: bert\nmethods: [hype: {sgma: 1}]\n",
        "methods.hype: unknown key 'sgma'; did you mean 'sigma'?",
    ),
    "method twice": ("model: bert\nmethods: [hype, hype: {sigma: 1}]\n", "methods lists 'hype' twice"),
    "two methods in one entry": (
        "model: bert\nmethods: [{hype: {}, other: {}}]\n",
        "each entry of methods is one name with its options",
    ),
    "methods no list": ("model: bert\nmethods: hype\n", "methods must be a list, such as [hype]"),
    "methods a mapping": ("model: bert\nmethods: {hype: {sigma: 1}}\n", "methods must be a list"),
    "options no mapping": ("model: bert\nmethods: [hype: [1]]\n", "hype: input should be a valid dictionary"),
    "no model": ("task: cola\n", "model is missing"),
    "model without name": ("model: {config: {}}\n", "model.name is missing"),
    "model a number": ("model: 5\n", "model: input should be"),
    "train no mapping": ("model: bert\ntrain: fast\n", "train: input should be a valid dictionary"),
    "data no mapping": ("model: bert\ndata: here\n", "data: input should be"),
    "task no text": ("model: bert\ntask: 3\n", "task: input should be a valid string; it is 3"),
    "batch size 0": ("model: bert\nbatch_size: 0\n", "batch_size must be at least 1; it is 0"),
    "batch size text": ("model: bert\nbatch_size: many\n", "batch_size: input should be a valid integer"),
    "batch size a fraction": ("model: bert\nbatch_size: 1.5\n", "batch_size: input should be a valid integer"),
    "sigma text": ("model: bert\nmethods: [hype: {sigma: tiny}]\n", "methods.hype: sigma: input should be"),
    "sigma negative": ("model: bert\nmethods: [hype: {sigma: -1}]\n", "sigma must be a finite number >= 0"),
    "sigma nan": ("model: bert\nmethods: [hype: {sigma: .nan}]\n", "sigma must be a finite number >= 0"),
    "distribution": (
        "model: bert\nmethods: [hype: {distribution: gauss}]\n",
        "distribution: input should be 'normal', 'uniform' or 'uniform_released'; it is 'gauss'",
    ),
    "patience text": (
        "model: bert\nearly_stopping: {patience: x}\n",
        "early_stopping.patience: input should be a valid integer",
    ),
    "patience 0": ("model: bert\nearly_stopping: {patience: 0}\n", "patience"),
    "patience negative": ("model: bert\nearly_stopping: {patience: -1}\n", "patience"),
    "no patience": ("model: bert\nearly_stopping: {}\n", "early_stopping.patience is missing"),
    "length 0": ("model: bert\ndata: {max_length: 0}\n", "data.max_length is 0, must be 1 or more"),
    "empty": ("", "holds keys such as model, task and methods; this one holds none"),
    "comment only": ("# nothing\n", "this one holds none"),
    "a list": ("- model: bert\n", "this one holds none"),
    "a tab": ("model: bert\ntrain:\n\tseed: 1\n", "line 3 is not valid YAML"),
    "open bracket": ("model: bert\nmethods: [hype\ntask: cola\n", "line 3 is not valid YAML"),
    "key twice": ("model: bert\ntask: cola\nmodel: other\n", "line 3 is not valid YAML"),
    "two documents": ("model: bert\n---\nmodel: other\n", "is not valid YAML"),
    "foreign tag": ("model: !!python/object:os.system x\n", "is not valid YAML"),
    "a number as key": ("model: bert\n1: 2\n", "1: keys should be strings"),
    "a number as method": ("model: bert\nmethods: [1: 2]\n", "methods"),
    "a number as option": ("model: bert\nmethods: [hype: {1: 2}]\n", "hype.1"),
    "a number as training field": ("model: bert\ntrain: {1: 2}\n", "train"),
    "output folder a list": ("model: bert\ntrain: {output_dir: [a]}\n", "train.output_dir"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_gets_one_sentence(tmp_path, name):
    text, expected = MISTAKES[name]
    assert expected in sentence(write(tmp_path, text))


@pytest.mark.parametrize(
    "name", ["unknown key", "unknown data key", "batch size 0", "empty", "a tab", "no model"]
)
def test_mistake_names_the_file(tmp_path, name):
    path = write(tmp_path, MISTAKES[name][0])
    assert sentence(path).startswith(str(path))


def test_run_file_that_cannot_be_read(tmp_path):
    write(tmp_path, "model: bert", "hype.yaml")
    assert "does not exist; did you mean 'hype.yaml'?" in sentence(tmp_path / "hyppe.yaml")
    assert f"there is no run file in {tmp_path / 'nowhere'}" in sentence(tmp_path / "nowhere" / "hype.yaml")
    assert str(tmp_path) in sentence(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"model: caf\xe9\n")
    assert "cannot be read" in sentence(latin)
