"""Every method of the project; `METHODS` is the only registry."""

from dist_reg.methods.base import Method
from dist_reg.methods.hire import HIRE
from dist_reg.methods.hype import HyPe
from dist_reg.methods.lnsr import LNSR
from dist_reg.methods.mvcr import MVCR
from dist_reg.methods.neftune import NEFTune
from dist_reg.methods.r3f import R3F
from dist_reg.methods.rdrop import RDrop

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (HyPe, LNSR, MVCR, HIRE, RDrop, R3F, NEFTune)
}
"""Run-file name to options class."""
