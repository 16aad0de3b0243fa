"""Tables of methods, and the rows that other packages add."""

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from slimtune import tables
from slimtune.errors import RecipeError
from slimtune.tables import Table


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> "Table[object]":
    points = EntryPoints(
        [
            EntryPoint("green", "collections:OrderedDict", "example.colours"),
            EntryPoint("red", "collections:Counter", "example.colours"),
            EntryPoint("broken", "no_such_package:thing", "example.colours"),
        ]
    )
    monkeypatch.setattr(tables, "entry_points", lambda group: points.select(group=group))
    return Table("example.colours", {"red": 1, "blue": 2})


def test_plug_ins_follow_the_built_in_rows_and_take_none_of_their_names(colours: "Table[object]") -> None:
    from collections import OrderedDict

    assert list(colours) == ["red", "blue", "green", "broken"]
    assert len(colours) == 4
    assert colours["red"] == 1
    assert colours["green"] is OrderedDict


def test_a_plug_in_is_imported_only_when_it_is_looked_up(colours: "Table[object]") -> None:
    assert "broken" in colours and "zzz" not in colours
    with pytest.raises(ModuleNotFoundError):
        colours["broken"]


def test_an_unknown_row_names_the_nearest_plug_ins_included(colours: "Table[object]") -> None:
    with pytest.raises(RecipeError, match=r"no colour named 'gren'(.|\n)*did you mean 'green'"):
        colours["gren"]


def test_a_table_of_another_group_does_not_see_them() -> None:
    assert list(Table("example.shapes", {"square": 1})) == ["square"]
