"""A model's own forward, wrapped in place: what it is called with, and how its loss is divided."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def wrap_forward(model: Any, handle: Any) -> Callable[[], None]:
    """Let `model.forward` run through `handle.run_forward(call, args, kwargs, example_keys, row_spans)` while it trains.

    The signature stays what it was: Transformers' Trainer drops columns by it. Returns what undoes the wrapping.
    """
    original = model.forward
    previous = model.__dict__.get("forward")
    signature = inspect.signature(original)

    # A bound method that reaches everything through its module, so that a deep copy of the model is whole.
    def regularised(
        module: Any,
        *args: Any,
        example_keys: Tensor | None = None,
        row_spans: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        call = functools.partial(type(module).forward, module) if previous is None else previous
        handle = getattr(module, "_dist_reg_handle", None)
        if handle is None or not module.training:
            return call(*args, **kwargs)
        return handle.run_forward(call, args, kwargs, example_keys, row_spans)

    forward: Any = functools.update_wrapper(regularised, original)
    del forward.__wrapped__
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
    bound = types.MethodType(forward, model)

    model.forward = bound
    model._dist_reg_handle = handle
    # A partial and no closure: a deep copy of the handle then restores its own model.
    return functools.partial(_restore, model, bound, previous)


def _restore(model: Any, bound: Any, previous: Any) -> None:
    restore_forward(model, bound, previous)
    model.__dict__.pop("_dist_reg_handle", None)


def restore_forward(module: Any, ours: Any, previous: Any) -> None:
    """Put back `previous`, or the class's own forward, unless somebody has wrapped `ours` since."""
    if module.__dict__.get("forward") is not ours:
        return
    if previous is None:
        del module.forward
    else:
        module.forward = previous


def inner_model(model: Any) -> Any:
    """The Hugging Face model, inside PEFT's where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hands_arguments_to_its_loss(model: nn.Module) -> bool:
    """Whether the model's forward calls `self.loss_function(..., **kwargs)`, and `num_items_in_batch` gets there."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(model).forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(
        isinstance(call.func, ast.Attribute)
        and call.func.attr == "loss_function"
        and any(keyword.arg is None for keyword in call.keywords)
        for call in calls
    )


def parameter_names(model: Any) -> list[str]:
    """Names of the forward's positional parameters; PEFT's own forward may take *args for those of the model inside."""
    names = list(inspect.signature(model.forward).parameters)
    if names == ["args", "kwargs"] and hasattr(model, "get_base_model"):
        names = list(inspect.signature(model.get_base_model().forward).parameters)
    return names
