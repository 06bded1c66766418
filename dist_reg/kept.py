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

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dist_reg.backbone import EXTRA, find_backbone
from dist_reg.errors import UserError, reason
from dist_reg.forward import inner_model
from dist_reg.methods import METHODS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from dist_reg.methods.base import Method
    from dist_reg.readout import Readout

FILE = "dist_reg.json"
INDEX = "model.safetensors.index.json"
ADDED_FILE = "dist_reg_modules.safetensors"
"""Beside adapters, which are saved without the model, what methods added to it."""
ATTRIBUTE = "_dist_reg_kept"


class Kept(NamedTuple):
    """A method that stays in a model."""

    method: Method
    layers_path: str | None
    readout: Readout | None
    """What acts for it before the head."""


def keep(
    model: nn.Module, method: Method, layers_path: str | None, readout: Readout | None
) -> Callable[[], None]:
    """Note that `method` is a part of `model`; returns what undoes it.

    The note is on the Hugging Face model itself, so that it is there with adapters around it, and when they are merged.
    """
    own: Any = inner_model(model)
    vars(own).setdefault(ATTRIBUTE, {})[method.name] = Kept(method, layers_path, readout)
    for one in (own, model):
        save_what_is_kept(one)
    return functools.partial(_forget, model, method.name)


def _forget(model: Any, name: str) -> None:
    own: Any = inner_model(model)
    kept = vars(own).get(ATTRIBUTE, {})
    kept.pop(name, None)
    if not kept:
        vars(own).pop(ATTRIBUTE, None)
        for one in (own, model):
            vars(one).pop("save_pretrained", None)


def kept_methods(model: nn.Module) -> dict[str, Kept]:
    """The methods that are a part of `model`, by name."""
    return vars(inner_model(model)).get(ATTRIBUTE, {})


def save_what_is_kept(model: Any) -> None:
    """Let `model.save_pretrained` write what describes the methods that stay, whoever calls it."""
    if hasattr(model, "save_pretrained") and "save_pretrained" not in vars(model):
        # A partial and no closure: it can be copied and pickled with the model.
        model.save_pretrained = functools.partial(_save_pretrained, model)


def _save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    saved = type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True) and kept_methods(model):
        write_description(model, Path(save_directory))
        if hasattr(model, "peft_config"):
            save_file(added_tensors(model, kwargs.get("state_dict")), Path(save_directory) / ADDED_FILE)
    return saved


def added_tensors(model: nn.Module, state_dict: Any = None) -> dict[str, Tensor]:
    """What methods added to `model`, from its (gathered) state dict, by the names it has without adapters."""
    whole = model.state_dict() if state_dict is None else state_dict
    return {
        name[name.index(EXTRA) :]: value.contiguous()
        for name, value in whole.items()
        if any(part.startswith(EXTRA) for part in name.split("."))
    }


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
    """Write FILE to `folder`: the methods that stay in `model`, and what their weights fit to."""
    from dist_reg import __version__

    kept = kept_methods(model)
    text = {
        "dist_reg": __version__,
        "backbone": backbone_of(model, next(iter(kept.values())).layers_path),
        "methods": [{name: asdict(one.method)} for name, one in kept.items()],
    }
    (folder / FILE).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def backbone_of(model: nn.Module, layers_path: str | None) -> dict[str, Any]:
    """What the methods' weights fit to."""
    found = find_backbone(model, layers_path)
    return {
        "class": type(inner_model(model)).__name__,
        "layers": len(found.layers),
        "hidden_size": found.hidden_size,
        "adapters": hasattr(model, "peft_config"),
        "layers_path": layers_path,
    }


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """The exported model at `path`, a folder or a name on the hub, in eval mode, with every method that stays in it.

    Of the class that its configuration names. `model` is for weights that Transformers cannot load by that name, such as
    adapters or a class of the model's own: the model as it is loaded elsewhere, to which the methods are then attached.
    An export without such methods is the plain model. Raises UserError where weights, `dist_reg.json` and model do not fit
    each other.
    """
    from dist_reg.model import load_plain, resolve_model

    source = str(path)
    if (Path(path) / "adapter_config.json").is_file():
        if model is None:
            raise UserError(f"{path} holds adapters; load them with PEFT and hand the model over as model=.")
    else:
        source = resolve_model(source)
    if model is None:
        model = load_plain(source, revision=revision)
    restore(model, local_folder(source, revision))
    found: Any = model
    return found.eval()


def local_folder(source: str, revision: str | None = None) -> Path:
    """`source`, or where the hub's copy of it lies on this machine."""
    if Path(source).is_dir():
        return Path(source)
    import huggingface_hub

    patterns = ["model*.safetensors", INDEX, FILE, ADDED_FILE, "adapter_config.json"]
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
    try:
        handle = regularize(model, methods, layers_path=layers_path)
    except UserError as error:
        raise UserError(f"{folder / FILE}: {error}") from None
    try:
        _fill(model, weights, folder, layers_path)
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
    damaged = f"{path} is damaged (%s); copy it from where the model was exported."
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        version, backbone, entries = str(text["dist_reg"]), dict(text["backbone"]), list(text["methods"])
        named = [(str(name), dict(options)) for entry in entries for name, options in entry.items()]
        there = {key: backbone[key] for key in ("class", "layers", "hidden_size", "adapters", "layers_path")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(damaged % reason(error)) from None
    if not named or not isinstance(there["layers_path"], (str, type(None))):
        raise UserError(damaged % ("it lists no method" if not named else "layers_path is no text"))
    try:
        methods = [build_method(name, options) for name, options in named]
    except UserError as error:
        versions = f" was written by dist-reg {version} and this is dist-reg {__version__}"
        raise UserError(f"{path}{versions if version != __version__ else ''}: {error}") from None
    temporary = [method.name for method in methods if not method.kept]
    if temporary:
        raise UserError(damaged % f"{temporary[0]} does not stay in a model")
    here = backbone_of(model, there["layers_path"])
    if here != there:
        raise UserError(f"{folder} was trained as {_words(there)}; the model is {_words(here)}.")
    return weights, methods, there["layers_path"]


def _words(backbone: dict[str, Any]) -> str:
    adapters = " and adapters" if backbone["adapters"] else ""
    return f"{backbone['class']} with {backbone['layers']} layers of {backbone['hidden_size']} channels{adapters}"


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of methods that stay, in the files that hold the weights of the export in `folder`, by name."""
    files = {"model.safetensors", ADDED_FILE}
    if (folder / INDEX).is_file():
        try:
            files |= set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} cannot be read ({reason(error)}).") from None
    found: dict[str, Tensor] = {}
    for path in sorted(folder / name for name in files):
        if not path.is_file():
            continue
        try:
            with safe_open(path, framework="pt") as file:
                names: list[str] = list(file.keys())
                found |= {name: file.get_tensor(name) for name in names if _stays(name)}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({reason(error)}).") from None
    return found


def _stays(name: str) -> bool:
    """Whether a tensor is of a method that stays, as far as this version knows; checkpoints have others too."""
    if not name.startswith(EXTRA):
        return False
    owner = name.removeprefix(EXTRA).partition(".")[0].partition("_")[0]
    return owner not in METHODS or METHODS[owner].kept


def _fill(model: nn.Module, weights: dict[str, Tensor], folder: Path, layers_path: str | None) -> None:
    """Copy `weights` into the modules that were attached to `model`, in the dtype of its layers."""
    own: Any = inner_model(model)
    modules = {EXTRA + name: getattr(own, EXTRA + name) for name in kept_methods(model)}
    expected = {
        f"{name}.{key}": list(value.shape)
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    for key in sorted({*weights, *expected}):
        here = expected.get(key, "nothing")
        there = list(weights[key].shape) if key in weights else "nothing"
        if here != there:
            raise UserError(
                f"{folder}: of {key} the weights hold {there}, and the options in {FILE} ask for {here}."
            )
    for name, module in modules.items():
        module.load_state_dict({key: weights[f"{name}.{key}"] for key in module.state_dict()})
        module.to(next(find_backbone(model, layers_path).layers[0].parameters()).dtype)
