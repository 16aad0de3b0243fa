"""Rows come out the same from every kind of file, and what is wrong with a file is named with its place."""

import gzip
import json
import os
import subprocess
import sys
import types
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from slimtune.calib.rows import DataSource, read_rows, read_text
from slimtune.errors import BackendMissing, CalibrationError, RecipeError

ROWS = [{"instruction": "add", "output": 'a "2"'}, {"instruction": "né\u2028 b", "output": "x, y\ttwo"}]
PLAIN_ROWS = [{"instruction": "add", "output": 'a "2"'}, {"instruction": "né b", "output": "x, y"}]


def csv_text(rows):
    quoted = [['"' + field.replace('"', '""') + '"' for field in row.values()] for row in rows]
    return "\n".join(",".join(fields) for fields in [list(rows[0]), *quoted]) + "\n"


def tsv_text(rows):
    return "\n".join("\t".join(fields) for fields in [list(rows[0]), *(row.values() for row in rows)]) + "\n"


def parquet_bytes(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    ".jsonl": ("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(), ROWS),
    ".json": (json.dumps(ROWS, indent=1).encode(), ROWS),
    ".csv": (csv_text(ROWS).encode(), ROWS),
    ".tsv": (tsv_text(PLAIN_ROWS).encode(), PLAIN_ROWS),
    ".parquet": (parquet_bytes(ROWS), ROWS),
    ".txt": ("one\r\n\ntwo é\n".encode(), [{"text": "one\r\n\ntwo é\n"}]),
    ".raw": (b" \n = A = \n", [{"text": " \n = A = \n"}]),
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: zstandard.ZstdCompressor().compress(data)}


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows_of(path):
    return read_rows(DataSource(path=path))


def message(path):
    with pytest.raises(CalibrationError) as caught:
        rows_of(path)
    return str(caught.value)


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_kind_and_compression(tmp_path, kind, packing):
    content, wanted = CONTENTS[kind]
    assert rows_of(written(tmp_path, "a" + kind + packing, PACKERS[packing](content))) == wanted


def test_json_may_be_lines_and_names_may_be_upper_case(tmp_path):
    assert rows_of(written(tmp_path, "A.JSON", CONTENTS[".jsonl"][0])) == ROWS


def test_byte_order_mark_is_dropped(tmp_path):
    assert rows_of(written(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + CONTENTS[".jsonl"][0])) == ROWS
    assert read_text(written(tmp_path, "a.txt", b"\xef\xbb\xbfx\n")) == "x\n"


def test_zstd_file_of_two_frames(tmp_path):
    frames = PACKERS[".zst"](b'{"text": "a"}\n') + PACKERS[".zst"](b'{"text": "b"}\n')
    assert rows_of(written(tmp_path, "a.jsonl.zst", frames)) == [{"text": "a"}, {"text": "b"}]


def test_parquet_rows_are_plain_python(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}], "n": 1}]
    [row] = rows_of(written(tmp_path, "a.parquet", parquet_bytes(rows)))
    assert row == rows[0]
    assert type(row) is dict
    assert type(row["messages"]) is list
    assert type(row["messages"][0]) is dict


def test_folder_gives_its_files_sorted(tmp_path):
    written(tmp_path, "b.jsonl", '{"text": "2"}')
    written(tmp_path, "a.csv", "text\n1\n")
    written(tmp_path, "README.md", "not data")
    assert [row["text"] for row in rows_of(str(tmp_path))] == ["1", "2"]


def test_folder_of_texts_and_rows_is_refused(tmp_path):
    written(tmp_path, "data.jsonl", '{"text": "2"}')
    written(tmp_path, "SOURCE.txt", "where it is from")
    assert "SOURCE.txt" in message(str(tmp_path))


def test_folder_without_data(tmp_path):
    assert ".parquet" in message(str(tmp_path))


def test_text_is_as_it_stands(tmp_path):
    assert read_text(written(tmp_path, "a.raw.gz", gzip.compress(b" \r\n x \n\n"))) == " \r\n x \n\n"
    with pytest.raises(CalibrationError, match=r"a file of rows is not a text[\s\S]*a\.jsonl"):
        read_text(written(tmp_path, "a.jsonl", "{}"))


def test_missing_file_names_the_nearest(tmp_path):
    written(tmp_path, "alpaca.jsonl.gz", b"")
    assert "did you mean 'alpaca.jsonl.gz'?" in message(str(tmp_path / "alpca.jsonl.gz"))
    assert "does not exist either" in message(str(tmp_path / "no" / "a.jsonl"))


def test_unknown_extension_lists_the_known(tmp_path):
    text = message(written(tmp_path, "a.xml.gz", gzip.compress(b"<a/>")))
    assert "a.xml.gz" in text
    assert all(kind in text for kind in CONTENTS)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "a,b\n"), ("a.txt", " \n")])
def test_empty_file(tmp_path, name, content):
    text = message(written(tmp_path, name, content))
    assert name in text
    assert "at least one row" in text


def test_empty_parquet(tmp_path):
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "without rows" in message(str(tmp_path / "a.parquet"))


def test_malformed_json_has_its_line(tmp_path):
    assert "a.jsonl, line 3, column 1" in message(written(tmp_path, "a.jsonl", '{"a": 1}\n\noops\n{"a": 2}'))
    assert "b.json, line 2, column 7" in message(written(tmp_path, "b.json", '[{"a": 1},\n {"a" 2}]'))
    assert "c.jsonl, line 2" in message(written(tmp_path, "c.jsonl", '{"a": 1}\n' + '{"a":' * 200_000))


def test_row_that_is_no_object_has_its_number(tmp_path):
    text = message(written(tmp_path, "a.jsonl", '{"a": 1}\n[1, 2]\n'))
    assert "a.jsonl, row 2" in text
    assert "list: [1, 2]" in text


def test_csv_row_of_another_width_has_its_number(tmp_path):
    text = message(written(tmp_path, "a.csv", 'a,b\n"1\n1",2\n3\n'))
    assert "a.csv, row 2 (line 4)" in text


def test_malformed_csv_has_its_line(tmp_path):
    assert "a.csv, line 2" in message(written(tmp_path, "a.csv", 'a,b\n"1,2\n'))


def test_csv_field_longer_than_the_modules_limit(tmp_path):
    long = "x" * 200_000
    assert rows_of(written(tmp_path, "a.csv", f"text\n{long}\n")) == [{"text": long}]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b"\0\0" + data])
def test_damaged_compression(tmp_path, packing, spoil):
    name = "a.jsonl" + packing
    packed = PACKERS[packing](b"\n".join(b'{"text": "%d"}' % (i * i) for i in range(500)))
    text = message(written(tmp_path, name, spoil(packed)))
    assert "damaged or truncated" in text
    assert name in text


def test_malformed_parquet(tmp_path):
    assert "a.parquet" in message(written(tmp_path, "a.parquet", parquet_bytes(ROWS)[:-9]))


def test_file_that_is_not_utf8(tmp_path):
    assert "a.txt, byte 2" in message(written(tmp_path, "a.txt", b"ab\xff"))


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")])
def test_missing_package_is_named(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendMissing, match=f"pip install {package}"):
        rows_of(written(tmp_path, name, b"PAR1"))


def fake_hub(monkeypatch, rows):
    class DatasetsError(Exception):
        pass

    def load_dataset(name, split):
        if split == "nosplit":
            raise ValueError('Unknown split "nosplit"')
        return [{**row, "from": (name, split)} for row in rows]

    hub = types.ModuleType("datasets")
    hub.load_dataset = load_dataset
    hub.exceptions = types.SimpleNamespace(DatasetsError=DatasetsError)
    monkeypatch.setitem(sys.modules, "datasets", hub)


def test_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, [{"text": "x"}])
    assert read_rows(DataSource(path="owner/name", split="test")) == [{"text": "x", "from": ("owner/name", "test")}]
    with pytest.raises(CalibrationError, match=r"owner/name[\s\S]*Unknown split"):
        read_rows(DataSource(path="owner/name", split="nosplit"))


def test_hub_set_without_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, [])
    with pytest.raises(CalibrationError, match="without rows"):
        read_rows(DataSource(path="owner/name"))


def test_what_ends_like_a_file_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, [{"text": "x"}])
    assert "no such data file" in message("owner/name.jsonl.gz")


def test_an_existing_path_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, [{"text": "hub"}])
    (tmp_path / "owner" / "name").mkdir(parents=True)
    written(tmp_path / "owner" / "name", "a.jsonl", '{"text": "local"}')
    assert rows_of("owner/name") == [{"text": "local"}]


def test_split_of_a_local_file_is_refused(tmp_path):
    path = written(tmp_path, "a.jsonl", '{"text": "x"}')
    with pytest.raises(CalibrationError, match="no splits"):
        read_rows(DataSource(path=path, split="test"))


def test_source_is_path_or_builtin():
    with pytest.raises(CalibrationError, match="did you mean 'pydocs'"):
        DataSource(builtin="pydoc")
    for fields in ({}, {"path": "a.jsonl", "builtin": "pydocs"}):
        with pytest.raises(RecipeError, match="either a path or a built-in"):
            DataSource(**fields)
    for fields in ({"samples": 0}, {"length": 1}):
        with pytest.raises(RecipeError, match="at least one sample"):
            DataSource(path="a.jsonl", **fields)


def test_import_loads_no_backend():
    code = "import sys, slimtune.calib.rows; print({'datasets', 'pyarrow', 'zstandard'} & {*sys.modules})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "set()"


def test_columns_are_made_of_others(tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_text('{"id": 7, "dialogue": "A: hi {x}", "summary": "A greets."}\n')
    source = DataSource(
        path=str(file), columns={"prompt": "Sum up {{it}}:\n{dialogue}", "completion": "{id}: {summary}"}
    )
    assert read_rows(source) == [{"prompt": "Sum up {it}:\nA: hi {x}", "completion": "7: A greets."}]
    with pytest.raises(CalibrationError, match=r"(?s)row 1.*summari.*did you mean 'summary'"):
        read_rows(replace(source, columns={"completion": "{summari}"}))
    for text in ("summary", "{", "{}", "{0}", "{a.b}", "{a!r}", "{a:3}", "{a} {b"):
        with pytest.raises(RecipeError, match="braces"):
            replace(source, columns={"completion": text})
