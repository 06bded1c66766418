"""Methods that stay in a model: what an export says of them, and how they are put back.

The weights lie among the model's own, under names that begin with `dist_reg_` (beside adapters, in a file of their own);
`dist_reg.json` says which methods they belong to, with which options, on which backbone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_reg.errors import UserError, reason

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from dist_reg.methods.base import Method

FILE = "dist_reg.json"
ATTRIBUTE = "_dist_reg_kept"


class Kept(NamedTuple):
    """A method that stays in a model."""

    method: Method
    layers_path: str | None


def keep(model: nn.Module, method: Method, layers_path: str | None) -> Callable[[], None]:
    """Note that `method` is a part of `model`; returns what undoes it."""
    own: Any = model
    kept = vars(own).setdefault(ATTRIBUTE, {})
    kept[method.name] = Kept(method, layers_path)
    return functools.partial(_forget, own, method.name)


def _forget(model: Any, name: str) -> None:
    kept = kept_methods(model)
    kept.pop(name, None)
    if not kept:
        vars(model).pop(ATTRIBUTE, None)


def kept_methods(model: nn.Module) -> dict[str, Kept]:
    """The methods that are a part of `model`, by name."""
    return vars(model).get(ATTRIBUTE, {})


def is_kept(model: nn.Module, method: Method) -> bool:
    """Whether `method` is a part of `model` already. Raises UserError where it is, with other options."""
    found = kept_methods(model).get(method.name)
    if found is None:
        return False
    for option in fields(method):
        there, here = getattr(found.method, option.name), getattr(method, option.name)
        if there != here:
            raise UserError(
                f"methods: this model has {method.name} with {option.name}: {there}, and {option.name}: {here} is asked "
                "for; take the model's, or begin from one without it."
            )
    return True


def write_description(model: nn.Module, folder: Path) -> None:
    """Write FILE to `folder` where methods stay in `model`; nothing otherwise."""
    from dist_reg import __version__

    kept = kept_methods(model)
    if kept:
        text = {
            "dist_reg": __version__,
            "backbone": backbone_of(model, next(iter(kept.values())).layers_path),
            "methods": [{name: asdict(one.method)} for name, one in kept.items()],
        }
        (folder / FILE).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def backbone_of(model: nn.Module, layers_path: str | None) -> dict[str, Any]:
    """What the methods' weights fit to."""
    from dist_reg.backbone import find_backbone
    from dist_reg.forward import inner_model

    found = find_backbone(model, layers_path)
    return {
        "class": type(inner_model(model)).__name__,
        "layers": len(found.layers),
        "hidden_size": found.hidden_size,
        "layers_path": layers_path,
    }


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The exported model at `path`, a folder or a name on the hub, in eval mode, with every method that stays in it.

    Of the class that its configuration names. `model` is for weights that Transformers cannot load by that name, such as
    adapters: the model as their own library loads it, to which the methods are then attached. An export without such methods
    is the plain model. Raises UserError where weights, `dist_reg.json` and model do not fit each other.
    """
    from dist_reg.model import load_plain, resolve_model

    source = str(path)
    if (Path(path) / "adapter_config.json").is_file():
        if model is None:
            raise UserError(f"{path} holds adapters; load them with PEFT and hand the model over as model=.")
    else:
        source = resolve_model(source)
    if model is None:
        model = load_plain(source, revision=revision, trust_remote_code=trust_remote_code)
    restore(model, local_folder(source, revision))
    found: Any = model
    return found.eval()


def local_folder(source: str, revision: str | None = None) -> Path:
    """`source`, or where the hub's copy of it lies on this machine."""
    if Path(source).is_dir():
        return Path(source)
    import huggingface_hub

    patterns = ["*.safetensors", FILE]
    try:
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise UserError(f"model: {source!r} cannot be read from the hub ({reason(error)}).") from None


def restore(model: nn.Module, folder: Path) -> None:
    """Attach to `model` the methods that the export in `folder` has, with their weights; a plain export has none.

    Raises UserError naming both sides where they do not fit, and where the weights or their description are missing.
    """
    from dist_reg.attach import regularize

    weights, methods, layers_path = read(folder, model)
    if not methods:
        return
    handle = regularize(model, methods, layers_path=layers_path)
    try:
        _fill(model, weights, folder)
    except BaseException:
        handle.remove()
        raise
    handle.bake()


def read(folder: Path, model: nn.Module) -> tuple[dict[str, Tensor], list[Method], str | None]:
    """The methods' weights by name, the methods, and the path of the layers, from the export in `folder`."""
    from dist_reg import __version__
    from dist_reg.config import build_method

    weights, path = saved_weights(folder), folder / FILE
    if not path.is_file():
        if weights:
            raise UserError(
                f"{folder} holds weights of a method ({next(iter(weights))}) but no {FILE}, which says how it was built; copy it "
                "from where the model was exported."
            )
        return {}, [], None
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        version, backbone, entries = text["dist_reg"], dict(text["backbone"]), list(text["methods"])
        named = [(name, dict(options)) for entry in entries for name, options in entry.items()]
        there = {key: backbone[key] for key in ("class", "layers", "hidden_size", "layers_path")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({reason(error)}); copy it from where the model was exported."
        ) from None
    try:
        methods = [build_method(name, options) for name, options in named]
    except UserError as error:
        raise UserError(
            f"{path} was written by dist-reg {version} and this is dist-reg {__version__}: {error}"
        ) from None
    here = backbone_of(model, there["layers_path"])
    if here != there:
        raise UserError(f"{folder} was trained as {_words(there)}; the model is {_words(here)}.")
    return weights, methods, there["layers_path"]


def _words(backbone: dict[str, Any]) -> str:
    return f"{backbone['class']} with {backbone['layers']} layers of {backbone['hidden_size']} channels"


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of methods in the safetensors files of `folder`, by name."""
    from safetensors import SafetensorError, safe_open

    from dist_reg.backbone import EXTRA

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names: list[str] = list(file.keys())
                found |= {name: file.get_tensor(name) for name in names if name.startswith(EXTRA)}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({reason(error)}).") from None
    return found


def _fill(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Copy `weights` into the modules that were attached to `model`."""
    from dist_reg.backbone import EXTRA

    for name, module in model.named_children():
        if not name.startswith(EXTRA):
            continue
        own = {
            key.removeprefix(f"{name}."): value
            for key, value in weights.items()
            if key.startswith(f"{name}.")
        }
        expected = {key: value.shape for key, value in module.state_dict().items()}
        for key in sorted({*own, *expected}):
            here = list(expected[key]) if key in expected else "nothing"
            there = list(own[key].shape) if key in own else "nothing"
            if here != there:
                raise UserError(
                    f"{folder}: of {name}.{key} the weights hold {there}, and the options in {FILE} ask for {here}."
                )
        module.to(next(iter(own.values())).dtype)
        module.load_state_dict(own)
