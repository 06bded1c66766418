"""The run file: what it may hold, how overrides change it, and the sentence a mistake in it gets.

A run file is YAML 1.2 with the keys of `RunConfig`. Relative paths in it are taken from the working directory.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dist_reg.data.config import DataConfig, EvalSet
from dist_reg.data.lm import LMOptions
from dist_reg.data.squad import QAOptions
from dist_reg.errors import UserError, nearest
from dist_reg.methods import METHODS, Method

FORBID_UNKNOWN = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pretrained model."""

    __pydantic_config__ = FORBID_UNKNOWN

    name: str
    """A folder, a hub name, or `minilm`, the encoder inside the package of the `demo` extra."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's own configuration to change, such as {hidden_dropout_prob: 0.0}."""
    layers_path: str | None = None
    """Dotted path of the transformer layers, for a model whose structure is not recognised."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless asked for."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights, where adapters train and these do not; those that train are float32, with or without train.bf16."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Hold the linear layers, which adapters leave as they are, in so many bits (bitsandbytes; 4bit is NF4, as in QLoRA)."""


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Stop when the main metric has not improved for a number of evaluations."""

    __pydantic_config__ = FORBID_UNKNOWN

    patience: int
    """Evaluations without improvement before the run ends."""
    threshold: float = 0.0
    """Smallest change that counts as an improvement."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise UserError(f"early_stopping.patience must be at least 1; it is {self.patience}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, as one run file describes it."""

    __pydantic_config__ = FORBID_UNKNOWN

    model: ModelConfig
    task: str | None = None
    """A task's name: `demo`, a GLUE task, `wnut17`, `squad`, `squad_v2`; on files of your own `classification`, `regression`, `ner`,
    `pos`, `qa` or `lm`."""
    data: DataConfig = field(default_factory=DataConfig)
    methods: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    """Methods in the order they act, each `name: {option: value}`; a bare name takes the defaults."""
    peft: dict[str, Any] | None = None
    """Train adapters in place of the model: any field of PEFT's LoraConfig, such as {r: 16}; `peft_type` for another kind."""
    batch_size: int = 16
    """Examples per optimizer step over all processes; the same run on any number of processes."""
    train: dict[str, Any] = field(default_factory=dict)
    """Any field of transformers.TrainingArguments by its own name."""
    early_stopping: EarlyStopping | None = None
    deepspeed: str | None = None
    """A shipped configuration (zero1, zero2, zero3, zero3_offload, zero3_hpz) or a JSON file's path."""

    def build_methods(self) -> list[Method]:
        """The method objects of `methods`, checked."""
        return [build_method(name, options) for entry in self.methods for name, options in entry.items()]

    @property
    def output_dir(self) -> Path:
        """The run directory, `train.output_dir`."""
        return Path(self.train["output_dir"]).expanduser()

    def as_dict(self) -> dict[str, Any]:
        """Plain data that gives the same run when written to a run file; every default of ours is spelt out."""
        plain = dataclasses.asdict(self)
        plain["methods"] = [{method.name: dataclasses.asdict(method)} for method in self.build_methods()]
        return plain


def build_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method `name` with `options`, as a run file gives them. Raises UserError."""
    if name not in METHODS:
        raise UserError(f"methods: unknown method {name!r}; {nearest(name, list(METHODS))}")
    if not isinstance(options, Mapping):
        raise UserError(f"methods.{name} takes options by name, such as {{sigma: 1e-4}}; it is {options!r}.")
    return validate(METHODS[name], dict(options), where=f"methods.{name}")


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run file at `path`, apply `key=value` overrides, check everything.

    Raises UserError naming the file and the key.
    """
    path = Path(path)
    raw = read_yaml(path)
    if not isinstance(raw, dict) or not raw:
        raise UserError(
            f"{path}: a run file holds keys such as model, task and methods; this one holds none."
        )
    raw = normalise(raw, str(path))
    for override in overrides:
        apply_override(raw, override)
    raw = normalise(raw, str(path))
    train = raw.setdefault("train", {})
    if isinstance(train, dict):
        train.setdefault("output_dir", str(Path("runs") / path.stem))
    run = validate(RunConfig, raw, where=str(path))
    names = [name for entry in run.methods for name in entry]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{path}: methods lists {name!r} twice; both would act at the same places, so keep one."
            )
    run.build_methods()
    if not isinstance(run.train["output_dir"], str) or not run.train["output_dir"].strip():
        raise UserError(f"{path}: train.output_dir must name a folder; it is {run.train['output_dir']!r}.")
    for key, default in (("dtype", "float32"), ("quantize", None)):
        if getattr(run.model, key) != default and run.peft is None:
            raise UserError(
                f"{path}: model.{key} is for weights that adapters leave as they are; add peft, such as peft: {{r: 16}}."
            )
    if run.batch_size < 1:
        raise UserError(f"{path}: batch_size must be at least 1; it is {run.batch_size}.")
    return run


def read_yaml(path: Path) -> Any:
    """The data in the YAML file at `path`; UserError when it is missing or does not parse."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else f"there is no run file in {path.parent}."
        raise UserError(f"run file {path} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"run file {path} cannot be read: {error}.") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """YAML 1.2 data in `text`, where 1e-5 is a number."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line} is not valid YAML: {problem}.") from None


def write_yaml(data: Any, path: Path) -> None:
    """Write plain data as block YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(data, file)


def normalise(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Spell out the short forms: `model: NAME`, a method's bare name, absent mappings."""
    raw = {
        key: value
        for key, value in raw.items()
        if value is not None or key not in ("data", "train", "methods")
    }
    if isinstance(raw.get("model"), str):
        raw["model"] = {"name": raw["model"]}
    methods = raw.get("methods", [])
    if not isinstance(methods, list):
        raise UserError(f"{where}: methods must be a list, such as [hype] or - hype: {{sigma: 1e-5}}.")
    entries = []
    for entry in methods:
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise UserError(f"{where}: each entry of methods is one name with its options; {entry!r} is not.")
        entries.append({name: options if options is not None else {} for name, options in entry.items()})
    if "methods" in raw:
        raw["methods"] = entries
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in `raw`; the value is YAML. `methods.NAME.OPTION` reaches into the list."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(
            f"override {override!r} is not of the form key=value, such as data.train_samples=500."
        )
    value = parse_yaml(text, f"override {key}") if text.strip() else None
    *parents, last = key.split(".")
    node: Any = raw
    for depth, parent in enumerate(parents):
        if isinstance(node, list):
            names = [name for entry in node for name in entry]
            if parent not in names:
                node.append({parent: {}})
            node = next(entry for entry in node if parent in entry)
        if node.get(parent) is None:
            node[parent] = [] if parent == "methods" and depth == 0 else {}
        if parent == "model" and isinstance(node[parent], str):
            node[parent] = {"name": node[parent]}
        node = node[parent]
        if not isinstance(node, (dict, list)):
            raise UserError(
                f"override {key}: {'.'.join(parents[: depth + 1])} is a value and has no keys below it."
            )
    if isinstance(node, list):
        raise UserError(f"override {key}: name the option too, such as methods.{last}.sigma=1e-5.")
    node[last] = value


def validate(cls: type, raw: Mapping[str, Any], where: str) -> Any:
    """An instance of the dataclass `cls` from plain data, or UserError in one sentence."""
    try:
        return _adapter(cls).validate_python(raw)
    except ValidationError as error:
        raise UserError(_sentence(error, cls, where)) from None


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def _sentence(error: ValidationError, cls: type, where: str) -> str:
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    # A misspelt key makes the right one missing; the misspelling is what to say.
    first = next((found for found in error.errors() if found["type"] in unknown), error.errors()[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] in unknown:
        return f"{where}: unknown key {key!r}; {_nearest_key(key, cls)}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing."
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return f"{where}: {cause}" if not where.startswith("methods.") else str(cause)
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: {key}: {message}; it is {first['input']!r}."


def _nearest_key(key: str, cls: type) -> str:
    known = list(known_keys(cls))
    parent, _, last = key.rpartition(".")
    if parent.startswith("data.eval."):
        known = [f"{parent}.{item.name}" for item in dataclasses.fields(EvalSet)]
    elif cls is RunConfig and not parent:
        known += [f"train.{name}" for name in training_fields()]
    same = [repr(name) for name in known if name.rpartition(".")[2] == last]
    if same:
        return f"did you mean {' or '.join(same)}?"
    hint = nearest(key, known)
    return (
        hint
        if hint.startswith("did you mean")
        else nearest(key, [item.name for item in dataclasses.fields(cls)])
    )


def training_fields() -> list[str]:
    """Names of TrainingArguments' fields, read from its source: a misspelt run file does not wait for torch."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return []
    source = Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8")
    return re.findall(r"^    (\w+): .+=", source.partition("class TrainingArguments")[2], re.MULTILINE)


NESTED = {
    "model": ModelConfig,
    "data": DataConfig,
    "early_stopping": EarlyStopping,
    "qa": QAOptions,
    "lm": LMOptions,
}
"""Sections of a run file that are dataclasses of their own."""


def known_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of every option of the dataclass `cls` and the dataclasses inside it."""
    for item in dataclasses.fields(cls):
        name = prefix + item.name
        yield name
        nested = NESTED.get(item.name)
        if nested is not None:
            yield from known_keys(nested, name + ".")
