"""Tables of methods: plain dict literals that third parties extend through entry points.

A table is written where its methods live, e.g. `QUANTIZERS = Table("slimtune.quantizers", {"rtn": Rtn})`. A package
that declares an entry point in the group `slimtune.quantizers` adds a row without touching slimtune; its code is
imported only when that row is looked up.

Example:
    >>> colours = Table("example.colours", {"red": 1, "blue": 2})
    >>> colours["red"], sorted(colours)
    (1, ['blue', 'red'])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from slimtune.errors import RecipeError, nearest

T = TypeVar("T")


class Table(Mapping[str, T], Generic[T]):
    """A read-only mapping from a method's name to the method: built-in rows first, then installed plug-ins.

    An entry point may not take the name of a built-in row: the built-in row stays.
    """

    def __init__(self, group: str, rows: dict[str, T]) -> None:
        self.group = group
        self._rows = rows

    def __getitem__(self, name: str) -> T:
        if name in self._rows:
            return self._rows[name]
        for point in entry_points(group=self.group):
            if point.name == name:
                row: T = point.load()
                return row
        raise RecipeError(f"no {self.noun} named '{name}'", got=name, remedy=nearest(name, self))

    def __iter__(self) -> Iterator[str]:
        yield from self._rows
        yield from (point.name for point in entry_points(group=self.group) if point.name not in self._rows)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == row for row in self)

    @property
    def noun(self) -> str:
        """What a row is called in messages: `slimtune.quantizers` -> `quantizer`."""
        plural = self.group.rsplit(".", 1)[-1]
        return plural[:-3] + "y" if plural.endswith("ies") else plural.removesuffix("s")
