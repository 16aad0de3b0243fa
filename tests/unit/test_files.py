"""Whole or not at all: what a reader sees when writing stops half-way."""

import errno
from pathlib import Path

import pytest

from slimtune.errors import RecipeError
from slimtune.files import naming_full_disk, whole_file, whole_folder, write_json, write_text


class Killed(BaseException):
    """Stands for anything that ends a process."""


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def half_written(folder: Path, error: BaseException) -> None:
    with whole_folder(folder) as partial:
        (partial / "a").write_text("half")
        raise error


def half_written_file(path: Path, error: BaseException) -> None:
    with whole_file(path) as partial:
        partial.write_text("half")
        raise error


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with whole_folder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert tree(tmp_path) == {"deep/out/a": "1"}


def test_a_folder_is_replaced_at_the_end_without_leftovers(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with whole_folder(tmp_path / "out") as partial:
            (partial / text).write_text(text)
    assert tree(tmp_path) == {"out/new": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("end", [Killed, ValueError, KeyboardInterrupt])
def test_the_old_folder_stays_when_writing_stops(tmp_path: Path, end: type[BaseException]) -> None:
    write_text(tmp_path / "out" / "a", "old")
    with pytest.raises(end):
        half_written(tmp_path / "out", end())
    assert tree(tmp_path) == {"out/a": "old"}


def test_leftovers_of_a_killed_process_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("half")
    with whole_folder(tmp_path / "out") as partial:
        assert not list(partial.iterdir())
        (partial / "a").write_text("1")
    assert tree(tmp_path) == {"out/a": "1"}


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("old")
    with pytest.raises(Killed), whole_folder(tmp_path / "out"):
        raise Killed
    assert tree(tmp_path) == {"out/a": "old"}


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "sub" / "f", "old")
    with pytest.raises(Killed):
        half_written_file(tmp_path / "sub" / "f", Killed())
    assert tree(tmp_path) == {"sub/f": "old"}


def test_json_without_numbers_that_json_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "f.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


class SafetensorError(Exception):
    """Stands for the libraries that wrap the system's error in one of their own."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_message_and_leaves_no_half(tmp_path: Path, error: Exception) -> None:
    write_text(tmp_path / "out" / "a", "old")
    with pytest.raises(RecipeError, match=r"the disk is full\n  where:  .*out\n  remedy: .*--resume"):
        half_written(tmp_path / "out", error)
    assert tree(tmp_path) == {"out/a": "old"}


def test_another_error_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), naming_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk")
    for text in ("one", "two"):
        with whole_folder(link) as partial:
            (partial / "a").write_text(text)
        assert link.is_symlink() and tree(tmp_path / "disk") == {"a": text}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_the_folder_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    for here, output in ((tmp_path, "."), (tmp_path / "inside", tmp_path)):
        monkeypatch.chdir(here)
        with pytest.raises(RecipeError, match="the folder you are in"), whole_folder(output):
            raise AssertionError("not reached")
