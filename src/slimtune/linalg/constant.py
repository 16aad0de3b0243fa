"""Tables that are made once, and that `torch.compile` takes as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast

P = ParamSpec("P")
T_co = TypeVar("T_co", covariant=True)

KEPT = 256
"""Results of a function that are kept."""


class Constant(Protocol[P, T_co]):
    """A function that looks up what it made before."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """The result for these arguments."""

    def cache_clear(self) -> None:
        """Forget all results."""


def constant(make: Callable[P, T_co]) -> Constant[P, T_co]:
    """`make`, whose results (tensors, for hashable arguments) are kept, and are constants of a compiled graph.

    A compiler would go through the code that makes a table, cache or not, and fail at what is plain Python in it.

    >>> import torch
    >>> ones = constant(lambda n: torch.ones(n))
    >>> ones(3) is ones(3)
    True
    """
    kept = lru_cache(maxsize=KEPT)(make)

    @wraps(make)
    def known(*args: P.args, **kwargs: P.kwargs) -> T_co:
        return cast(Any, kept)(*args, **kwargs)  # type: ignore[no-any-return]

    found = cast(Any, known)
    found._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result, which is slow to import
    found.cache_clear = kept.cache_clear
    return cast("Constant[P, T_co]", found)
