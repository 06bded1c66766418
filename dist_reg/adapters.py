"""Adapters through PEFT: train a few added weights in place of the model's own, which may be held in 4 or 8 bits."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from dist_reg.errors import UserError, nearest, reason

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"
TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForCausalLM": "CAUSAL_LM",
}
"""PEFT's names of the tasks; it then trains and saves their heads too."""
OURS = ("task_type", "base_model_name_or_path", "inference_mode")
"""Fields of PEFT's configurations that follow from the run."""


def adapter_config(options: Mapping[str, Any], model_class: str) -> Any:
    """PEFT's configuration from `options`, its fields by their own names; `peft_type` chooses the kind, LORA if not given.

    Raises:
        UserError: PEFT is not installed, or an option that it does not have or take.
    """
    peft = _peft()
    kinds = {kind.value: config for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    wanted = str(options.get("peft_type", "LORA")).upper()
    if wanted not in kinds:
        raise UserError(
            f"peft.peft_type: unknown kind {wanted!r}; {nearest(wanted, [str(kind) for kind in kinds])}"
        )
    if issubclass(kinds[wanted], peft.PromptLearningConfig):
        raise UserError(
            f"peft.peft_type: {wanted} puts tokens of its own before an example's, where noise would land on the wrong ones; "
            "use LORA"
        )
    known = [item.name for item in dataclasses.fields(kinds[wanted]) if item.init]
    for name in options:
        if name in OURS:
            raise UserError(f"peft.{name} follows from the run; leave it out")
        if name != "peft_type" and name not in known:
            raise UserError(f"peft: {wanted} has no option {name!r}; {nearest(name, known)}")
    rest = {name: value for name, value in options.items() if name != "peft_type"}
    try:
        return kinds[wanted](task_type=TASK_TYPES[model_class], **rest)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"peft: {reason(error)}") from None


def add_adapters(model: transformers.PreTrainedModel, config: Any, seed: int) -> Any:
    """`model` with fresh adapters, drawn from `seed`: the same at every ZeRO stage and world size.

    Raises:
        UserError: PEFT finds no place for them.
    """
    peft = _peft()
    quantized = getattr(model, "is_quantized", False)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)  # what loading drew before this depends on the ZeRO stage
    try:
        if quantized:
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
        raise UserError(f"peft: {reason(error)}") from None
    finally:
        torch.random.set_rng_state(state)
    _train_in_float32(adapted)
    return adapted


def _train_in_float32(model: Any) -> None:
    """Every weight that trains in float32, in which small steps are not rounded away: PEFT casts its adapters, not a new head.

    Raises:
        UserError: a weight that trains is a part of a layer of another dtype.
    """
    for module in model.modules():
        copies = getattr(module, "modules_to_save", None)
        for part in copies.values() if isinstance(copies, torch.nn.ModuleDict) else ():
            if any(weight.dtype != torch.float32 for weight in part.parameters()):
                part.float()
                part.register_forward_pre_hook(_in_float32)
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype != torch.float32:
            raise UserError(
                f"peft: {name} would train in {weight.dtype}, which rounds small steps away; leave model.dtype at float32."
            )


def _in_float32(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.float() if torch.is_tensor(value) and value.is_floating_point() else value for value in args
    )


def trained_share(model: Any) -> str:
    """How many weights train, in words."""
    trained, whole = model.get_nb_trainable_parameters()
    return f"{trained:,} of {whole:,} weights train ({100 * trained / whole:.2f} %)"


def quantization(bits: str) -> Any:
    """How Transformers holds linear layers in 4 bits (NF4 with quantised scales, as QLoRA does, arXiv 2305.14314) or 8.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            "model.quantize needs bitsandbytes, which is not installed; run pip install 'dist-reg[adapters]'."
        ) from None
    if bits == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    half = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half,
    )


def base_of(folder: Path) -> str:
    """The model that the adapters in `folder` were trained on. Raises UserError where the file does not say it."""
    path = folder / ADAPTER_FILE
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}).") from None
    if not isinstance(base, str) or not base:
        raise UserError(f"{path} does not say which model the adapters belong to (base_model_name_or_path).")
    return base


def saved_names(folder: Path) -> set[str]:
    """Names of the weights that the adapters in `folder` hold."""
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}).") from None


def load_adapters(model: transformers.PreTrainedModel, folder: Path) -> Any:
    """`model` with the trained adapters in `folder`. Raises UserError where they do not fit it."""
    peft = _peft()
    try:
        return peft.PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"model: the adapters in {folder} do not fit the model ({said}).") from None


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("peft: PEFT is not installed; run pip install 'dist-reg[adapters]'.") from None
    return peft
