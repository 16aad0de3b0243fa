"""The closed vocabulary of what can go wrong.

Every error a user can cause is one of these classes and carries one message that says what is wrong, where, what was
found, what was wanted and what to do about it. The command line prints the message without a traceback and exits 2
(1 for `TrainingDiverged`, which is not the input's fault).

Example:
    >>> from slimtune.errors import RecipeError
    >>> print(RecipeError("unknown key", where="steps[0].quantize", got="bit", remedy="did you mean 'bits'?"))
    unknown key
      where:  steps[0].quantize
      got:    bit
      remedy: did you mean 'bits'?
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

_Error = TypeVar("_Error", bound="SlimtuneError")


class SlimtuneError(Exception):
    """Base of the vocabulary: one message made of the facts a reader needs to fix it."""

    exit_status = 2

    def __init__(self, what: str, *, where: str = "", got: object = "", wanted: object = "", remedy: str = "") -> None:
        self.what = what
        self.facts: dict[str, Any] = {"where": where, "got": got, "wanted": wanted, "remedy": remedy}
        shown = {key: str(fact) for key, fact in self.facts.items()}
        super().__init__("\n".join([what, *(f"  {k + ':':8}{v}" for k, v in shown.items() if v)]))

    def within(self: _Error, place: str) -> _Error:
        """The same error, told from further out: its `where` lies within `place`.

        >>> print(RecipeError("bits out of range", where="bits", got=5).within("steps[0].quantize"))
        bits out of range
          where:  steps[0].quantize, bits
          got:    5
        """
        where = self.facts["where"]
        inside = where and where != place.rpartition(".")[2]
        where = ", ".join(filter(None, (place, where))) if inside else place
        return type(self)(self.what, **{**self.facts, "where": where})


class RecipeError(SlimtuneError):
    """A recipe, a command line or a run folder asks for something that cannot be done."""


class UnknownArchitecture(SlimtuneError):
    """A model that the architecture map does not describe, or describes wrongly."""


class ShapeError(SlimtuneError):
    """Tensors whose sizes do not fit what is asked of them."""


class CalibrationError(SlimtuneError):
    """Training or calibration data that is missing, empty or malformed, or statistics that are not usable."""


class BackendMissing(SlimtuneError):
    """An optional package or device is needed and absent."""


class FormatError(SlimtuneError):
    """A file or folder that is not what it claims to be."""


class TrainingDiverged(SlimtuneError):
    """The loss stopped being a finite number."""

    exit_status = 1


def nearest(name: str, valid: Iterable[str]) -> str:
    """A remedy for a misspelt name: the nearest valid one, or the list of all.

    >>> nearest("group_siz", ["bits", "group_size"])
    "did you mean 'group_size'?"
    >>> nearest("zzz", ["bits", "group_size"])
    'use one of: bits, group_size'
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"use one of: {', '.join(valid)}"
