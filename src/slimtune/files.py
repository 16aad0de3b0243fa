"""Writing files and folders so that a reader never sees half of one.

Everything is written beside its destination and renamed into place; what stood there before stays until the new one is
whole. A full disk is reported as one message, and what was half written is removed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimtune.errors import RecipeError


def cache_folder() -> Path:
    """Where models that were converted and loops that were compiled are kept: `$SLIMTUNE_CACHE`, or `slimtune` in the
    user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SLIMTUNE_CACHE") or Path(root) / "slimtune").expanduser()


def require_place(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Raise `RecipeError` where no file (or `folder`) can be written at `path`: to be asked before the work, too."""
    path = Path(path)
    above = next((place for place in path.absolute().parents if os.path.exists(place)), path)
    faults = {
        f"{above} is a file": not above.is_dir(),
        f"{path} is a {'file' if folder else 'folder'}": path.is_file() if folder else path.is_dir(),
        f"{above} may not be written to": not os.access(above, os.W_OK),
        f"{path} is the folder you are in, or above it": folder and _around_here(path.resolve()),
    }
    for fault in (fault for fault, found in faults.items() if found):
        raise RecipeError("the output cannot be made", where=str(path), got=fault, remedy="choose another --output")


def _around_here(path: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(path)
    except FileNotFoundError:  # it was taken away: nothing more can happen to it
        return False


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder, written beside `path` and renamed to it when the block ends without an error.

    An existing folder is replaced only at that moment. On any error the half-written folder is removed and the old one
    stays. Raises `RecipeError` where the disk is full, and what `require_place` raises (no process can go on in a
    folder that was replaced: it is not the current one).
    """
    path = Path(path)
    require_place(path, folder=True)
    path = path.resolve()  # what a link leads to, not the link, is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():  # a kill between the two renames below: the old folder is the last whole one
        old.rename(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with naming_full_disk(path):
            yield partial
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file path to write to; renamed to `path` when the block ends without an error, removed otherwise."""
    path = Path(path)
    require_place(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming_full_disk(path):
            yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON (no NaN: a non-finite number is an error) to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn whatever a full disk raises while `path` is written into one `RecipeError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise disk_full(path) from error
    except Exception as error:  # reason: safetensors and pyarrow wrap the OS error in classes of their own; re-raised
        if "No space left on device" not in str(error):
            raise
        raise disk_full(path) from error


def disk_full(path: Path) -> RecipeError:
    """The message for a write that found no space."""
    return RecipeError(
        "the disk is full",
        where=str(path),
        remedy="free some space or choose another --output, then run the same command with --resume",
    )
