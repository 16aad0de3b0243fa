"""From a data source to rows: plain dicts, whatever the file, its compression or the place it comes from.

A source is a local file, a folder of files, a data set of the hub or a built-in one. What a file's name ends in says
how it is read; what is wrong with a file is one `CalibrationError` that names the file and the line or row. A file is
held in memory whole: fine-tuning and calibration sets are small next to the models they are for.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from types import ModuleType
from typing import Any

from slimtune.calib.pydocs import pydocs_rows
from slimtune.errors import BackendMissing, CalibrationError, RecipeError, nearest

Row = dict[str, Any]


@dataclass(frozen=True)
class DataSource:
    """Where rows come from: exactly one of `path` (a file, a folder or a hub id) and `builtin` (a name in `BUILTINS`).

    `split` chooses a part of a hub or built-in data set; a local file has no parts. `samples` and `length` are the
    windows of a calibration set (`slimtune.calib.data.calibration_tokens`); `read_rows` reads every row.

    `columns` makes the columns of a known format out of others: each is a text with the row's own columns in braces,
    as in `{"prompt": "Summarize:\\n{dialogue}", "completion": "{summary}"}`. A row then has these columns alone.

    >>> str(DataSource(path="alpaca.jsonl.gz")), str(DataSource(builtin="pydocs", split="test"))
    ('alpaca.jsonl.gz', 'pydocs[test]')
    """

    path: str = ""
    builtin: str = ""
    split: str = "train"
    samples: int | None = None
    length: int = 512
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for column, text in self.columns.items():
            _require_template(text, f"columns.{column}")
        if bool(self.path) == bool(self.builtin):
            raise RecipeError(
                "a data source is either a path or a built-in data set",
                got=f"path: {self.path}, builtin: {self.builtin}" if self.path else "neither",
                remedy=f"give one: path: FILE_OR_HUB_ID, or builtin: {' | '.join(BUILTINS)}",
            )
        if self.builtin and self.builtin not in BUILTINS:
            raise CalibrationError(
                "no such built-in data set", got=self.builtin, remedy=nearest(self.builtin, BUILTINS)
            )
        if self.length < 2 or (self.samples is not None and self.samples < 1):
            raise RecipeError(
                "a data source needs at least one sample of two tokens",
                where=str(self),
                got=f"samples: {self.samples}, length: {self.length}",
            )

    def __str__(self) -> str:
        return f"{self.builtin}[{self.split}]" if self.builtin else self.path


def read_rows(source: DataSource) -> list[Row]:
    """Every row of `source`, in order, as plain dicts.

    A folder gives the rows of all its data files, sorted by name. Raises `CalibrationError` for a source that is
    missing, empty or malformed, or lacks a column that `source.columns` reads, and `BackendMissing` where its format
    needs a package that is not installed.
    """
    rows = _source_rows(source)
    if not source.columns:
        return rows
    return [_renamed(row, source.columns, f"{source}, row {number}") for number, row in enumerate(rows, 1)]


def _source_rows(source: DataSource) -> list[Row]:
    if source.builtin:
        return BUILTINS[source.builtin](source.split)
    path = Path(source.path).expanduser()
    if not path.exists() and _is_hub_id(source.path):
        return _hub_rows(source.path, source.split)
    if source.split != "train":
        raise CalibrationError(
            "a local file has no splits",
            where=source.path,
            got=source.split,
            remedy="give the path of the split's file",
        )
    return [row for file in _data_files(path) for row in _file_rows(file)]


def _renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    try:
        return {name: text.format_map(row) for name, text in columns.items()}
    except KeyError as error:
        raise CalibrationError(
            "a row lacks a column that `columns` reads",
            where=where,
            got=f"columns {', '.join(map(str, row))}",
            wanted=str(error.args[0]),
            remedy=nearest(str(error.args[0]), [str(name) for name in row]),
        ) from error


def _require_template(text: str, where: str) -> None:
    """Raise `RecipeError` unless `text` has plain `{names}` and no other braces than doubled ones."""
    try:
        names = [name for _, name, form, as_ in Formatter().parse(text) if name is not None and not (form or as_)]
        whole = len(names) == sum(name is not None for _, name, _, _ in Formatter().parse(text))
    except ValueError:
        names, whole = [], False
    if not whole or not names or not all(name.isidentifier() for name in names):
        raise RecipeError(
            "a column is a text with the names of others in braces", where=where, got=text, wanted="such as {question}"
        )


def read_text(path: str) -> str:
    """The text of a (compressed) text file exactly as it stands, line ends included, without a byte order mark.

    Raises `CalibrationError` for a file of rows: its text is its markup.
    """
    file = Path(path).expanduser()
    _require_exists(file)
    if _kind(file) in ROW_FILES:
        raise CalibrationError(
            "a file of rows is not a text", where=path, got=_kind(file), wanted=f"one of {' '.join(TEXT_FILES)}"
        )
    return _text(file)


def is_text(path: str) -> bool:
    """Whether a file of this name is one text rather than rows.

    >>> is_text("wiki.test.raw.gz"), is_text("alpaca.jsonl")
    (True, False)
    """
    return _kind(Path(path)) in TEXT_FILES


def _data_files(path: Path) -> list[Path]:
    _require_exists(path)
    if path.is_file():
        _require_known(path)
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and _kind(file) in FILES)
    if not files:
        raise CalibrationError("a folder without data files", where=str(path), wanted=f"files ending in {_known()}")
    texts = [file.name for file in files if _kind(file) in TEXT_FILES]
    if texts and len(texts) < len(files):
        raise CalibrationError(
            "a folder mixes texts with files of rows",
            where=str(path),
            got=f"texts: {', '.join(texts)}",
            remedy="give the path of one file, or keep data of one kind in the folder",
        )
    return files


def _require_exists(path: Path) -> None:
    if path.exists():
        return
    folder = path.parent
    if not folder.is_dir():
        remedy = f"the folder {folder} does not exist either"
    else:
        names = [file.name for file in folder.iterdir() if file.is_dir() or _kind(file) in FILES]
        remedy = nearest(path.name, names) if names else f"the folder {folder} has no data files"
    raise CalibrationError("no such data file", where=str(path), remedy=remedy)


def _require_known(path: Path) -> None:
    if _kind(path) not in FILES:
        raise CalibrationError(
            "a data file of an unknown kind", where=str(path), got=_kind(path) or "no extension", wanted=_known()
        )


def _known() -> str:
    return f"{' '.join(FILES)}, each also with .gz or .zst"


def _kind(path: Path) -> str:
    """What a file's name ends in, below its compression: `a.jsonl.gz` -> `.jsonl`."""
    plain = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    return plain.suffix.lower()


def _file_rows(path: Path) -> list[Row]:
    rows = FILES[_kind(path)](path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise CalibrationError(
                "a row is not an object", where=f"{path}, row {number}", got=f"{type(row).__name__}: {row!r:.80}"
            )
    if not rows:
        raise CalibrationError("a data file without rows", where=str(path), got="no rows", wanted="at least one row")
    return rows


# Bytes and compression


def _content(path: Path) -> bytes:
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise CalibrationError("a data file cannot be read", where=str(path), got=error.strerror) from error
    if path.suffix.lower() == ".gz":
        try:
            return gzip.decompress(packed)
        except (EOFError, OSError, zlib.error) as error:
            raise _damaged(path, "gzip", error) from error
    return _unpacked_zstd(packed, path) if path.suffix.lower() == ".zst" else packed


def _unpacked_zstd(packed: bytes, path: Path) -> bytes:
    zstandard = _backend("zstandard", path)
    parts = []
    while packed:  # a file may hold several frames, one after another
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(packed))
        except zstandard.ZstdError as error:
            raise _damaged(path, "zstd", error) from error
        if not frame.eof:
            raise _damaged(path, "zstd", "the file ends in the middle of a frame")
        packed = frame.unused_data
    return b"".join(parts)


def _damaged(path: Path, kind: str, error: object) -> CalibrationError:
    return CalibrationError(
        f"a damaged or truncated {kind} file", where=str(path), got=error, remedy="download or compress the file again"
    )


def _backend(name: str, where: object) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise BackendMissing(
            f"reading this data needs the package {package}", where=str(where), remedy=f"pip install {package}"
        ) from error


def _text(path: Path) -> str:
    content = _content(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError("a data file is not UTF-8 text", where=f"{path}, byte {error.start}") from error
    if not text.strip():
        raise CalibrationError("an empty data file", where=str(path), wanted="at least one row or one line of text")
    return text


# One function per kind of file


def _text_rows(path: Path) -> list[Any]:
    return [{"text": _text(path)}]


def _json_rows(path: Path) -> list[Any]:
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _json_lines(path)
    with _json_named(path, 0):
        rows: list[Any] = json.loads(text)
    return rows


def _json_lines(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_text(path).split("\n")):  # not splitlines: U+2028 may stand inside a JSON string
        if line.strip():
            with _json_named(path, number):
                rows.append(json.loads(line))
    return rows


@contextmanager
def _json_named(path: Path, lines_before: int) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise CalibrationError(
            "malformed JSON", where=f"{path}, line {lines_before + 1}", got="endless nesting"
        ) from error
    except json.JSONDecodeError as error:
        raise CalibrationError(
            "malformed JSON",
            where=f"{path}, line {lines_before + error.lineno}, column {error.colno}",
            got=error.msg,
            wanted="one JSON object per line (or, in a .json file, one list of objects)",
        ) from error


def _csv_rows(path: Path) -> list[Any]:
    return _table_rows(path, csv.excel)


def _tsv_rows(path: Path) -> list[Any]:
    return _table_rows(path, _Tsv)


class _Tsv(csv.Dialect):
    """Tabs between the fields and no quoting: a quotation mark in a .tsv file is a quotation mark."""

    delimiter = "\t"
    quoting = csv.QUOTE_NONE
    lineterminator = "\n"


def _table_rows(path: Path, dialect: type[csv.Dialect]) -> list[Any]:
    lines = csv.reader(io.StringIO(_text(path), newline=""), dialect, strict=True)
    rows: list[Any] = []
    limit = csv.field_size_limit(2**31 - 1)  # the process's own is 128 kB: a document may be longer
    try:
        names = next(lines)
        for fields in lines:
            if len(fields) != len(names) and fields:
                raise CalibrationError(
                    "a row has another number of fields than the header",
                    where=f"{path}, row {len(rows) + 1} (line {lines.line_num})",
                    got=len(fields),
                    wanted=f"{len(names)}: {', '.join(names)}",
                )
            if fields:
                rows.append(dict(zip(names, fields, strict=True)))
    except csv.Error as error:
        raise CalibrationError("a malformed table", where=f"{path}, line {lines.line_num}", got=error) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _parquet_rows(path: Path) -> list[Any]:
    arrow, parquet = _backend("pyarrow", path), _backend("pyarrow.parquet", path)
    content = _content(path)
    try:
        rows: list[Any] = parquet.read_table(arrow.BufferReader(content)).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise CalibrationError("a malformed parquet file", where=str(path), got=error) from error
    return rows


# The hub


def _is_hub_id(name: str) -> bool:
    """Whether `name` reads as `owner/name`; `data/alpaca.jsonl` does not: what ends like a data file is a file."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and _kind(Path(name)) not in FILES


def _hub_rows(name: str, split: str) -> list[Row]:
    datasets = _backend("datasets", name)
    try:
        rows: list[Row] = [dict(row) for row in datasets.load_dataset(name, split=split)]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationError(
            "no such file, and the hub data set cannot be loaded",
            where=name,
            got=f"{type(error).__name__}: {error}",
            remedy="check the name, the split and the network, or give the path of a local file",
        ) from error
    if not rows:
        raise CalibrationError("a data set without rows", where=f"{name}[{split}]")
    return rows


TEXT_FILES: dict[str, Callable[[Path], list[Any]]] = {".txt": _text_rows, ".raw": _text_rows, ".tokens": _text_rows}
"""Files read as one row, `{"text": the whole file}`."""

ROW_FILES: dict[str, Callable[[Path], list[Any]]] = {
    ".json": _json_rows,
    ".jsonl": _json_lines,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
}
"""Files of many rows."""

FILES = ROW_FILES | TEXT_FILES

BUILTINS: dict[str, Callable[[str], list[Row]]] = {"pydocs": pydocs_rows}
"""Data sets that need no file: each is a function from a split's name to rows."""
