"""Fine-tune pretrained transformers with hidden-representation regularisers, on DeepSpeed ZeRO.

Public names are imported on first use, so that `dist-reg --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Handle": "dist_reg.attach",
    "regularize": "dist_reg.attach",
    "find_backbone": "dist_reg.backbone",
    "UserError": "dist_reg.errors",
    "METHODS": "dist_reg.methods",
    "HIRE": "dist_reg.methods.hire",
    "HyPe": "dist_reg.methods.hype",
    "LNSR": "dist_reg.methods.lnsr",
    "MVCR": "dist_reg.methods.mvcr",
    "NEFTune": "dist_reg.methods.neftune",
    "R3F": "dist_reg.methods.r3f",
    "RDrop": "dist_reg.methods.rdrop",
    "Method": "dist_reg.methods.base",
    "example_keys": "dist_reg.noise",
    "load": "dist_reg.kept",
    "Trainer": "dist_reg.trainer",
}

__all__ = [
    "HIRE",
    "LNSR",
    "METHODS",
    "MVCR",
    "R3F",
    "Handle",
    "HyPe",
    "Method",
    "NEFTune",
    "RDrop",
    "Trainer",
    "UserError",
    "__version__",
    "example_keys",
    "find_backbone",
    "load",
    "regularize",
]

if TYPE_CHECKING:
    from dist_reg.attach import Handle, regularize
    from dist_reg.backbone import find_backbone
    from dist_reg.errors import UserError
    from dist_reg.kept import load
    from dist_reg.methods import METHODS
    from dist_reg.methods.base import Method
    from dist_reg.methods.hire import HIRE
    from dist_reg.methods.hype import HyPe
    from dist_reg.methods.lnsr import LNSR
    from dist_reg.methods.mvcr import MVCR
    from dist_reg.methods.neftune import NEFTune
    from dist_reg.methods.r3f import R3F
    from dist_reg.methods.rdrop import RDrop
    from dist_reg.noise import example_keys
    from dist_reg.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dist_reg' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
