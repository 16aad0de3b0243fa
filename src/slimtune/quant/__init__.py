"""Weights in few bits: quantizers make them, layouts store them, `QuantLinear` computes and trains with them."""

from slimtune.quant.base import QTensor, Quantizer
from slimtune.quant.fp8 import Fp8
from slimtune.quant.hqq import Hqq
from slimtune.quant.linear import QuantLinear
from slimtune.quant.nf4 import Nf4
from slimtune.quant.optq import Optq
from slimtune.quant.quip import Quip
from slimtune.quant.rtn import Rtn
from slimtune.quant.trellis import Trellis
from slimtune.tables import Table

QUANTIZERS: Table[type[Quantizer]] = Table(
    "slimtune.quantizers",
    {"rtn": Rtn, "optq": Optq, "hqq": Hqq, "nf4": Nf4, "fp8": Fp8, "quip": Quip, "trellis": Trellis},
)
"""Every quantizer by its recipe name. Adding one: a file in this folder, and a row here."""

__all__ = ["QUANTIZERS", "QTensor", "QuantLinear", "Quantizer"]
