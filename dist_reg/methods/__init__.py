"""Every method of the project; `METHODS` is the only registry."""

from dist_reg.methods.base import Method
from dist_reg.methods.hype import HyPe

METHODS: dict[str, type[Method]] = {method.name: method for method in (HyPe,)}
"""Run-file name to options class."""
