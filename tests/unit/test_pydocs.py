"""The built-in data set is made from the running Python: enough of it, the same every time, and never imported."""

import sys

import pytest

from slimtune.calib import pydocs
from slimtune.calib.formats import detect_format, normalise
from slimtune.calib.rows import DataSource, read_rows
from slimtune.errors import CalibrationError


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of our own, empty at first: a function that writes a module into it."""
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(pydocs, "_held_out", lambda module: module == "held")

    def write(name, source):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source if isinstance(source, bytes) else source.encode())

    return write


def doc(word):
    return f"{word} is a thing that is described here at some length, so that it counts."


def asked(split="train"):
    rows = pydocs.pydocs_rows(split)
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def test_this_pythons_library_is_enough():
    rows = read_rows(DataSource(builtin="pydocs", split="test"))  # the split that is quick to make
    assert len(rows) > 200
    assert detect_format(rows) == "messages"
    answers = [conversation.messages[1]["content"] for conversation in normalise(rows)]
    assert len(set(answers)) == len(answers)
    assert all(pydocs.SHORTEST <= len(answer) <= pydocs.LONGEST for answer in answers)


def test_question_has_the_signature_and_the_class(library):
    library("pkg/__init__.py", f'"""{doc("Pkg")}"""')
    library(
        "pkg/mod.py",
        f'class Thing:\n    """{doc("Thing")}"""\n'
        f'    def act(self, n: int = 3, *, fast=True):\n        """{doc("Act")}"""\n'
        f'async def run(path, /):\n    """{doc("Run")}"""\ndef wide({", ".join(f"argument_{i}" for i in range(9))}):\n'
        f'    """{doc("Wide")}"""\n',
    )
    questions, answers = zip(*asked(), strict=True)
    assert answers == tuple(map(doc, ("Pkg", "Thing", "Act", "Run", "Wide")))
    names = (
        "pkg",
        "pkg.mod.Thing",
        "pkg.mod.Thing.act(n: int=3, *, fast=True)",
        "pkg.mod.run(path, /)",
        "pkg.mod.wide(...)",
    )
    assert all(name in question for name, question in zip(names, questions, strict=True))


def test_split_is_by_top_level_module(library):
    library("held/a.py", f'"""{doc("Held")}"""')
    library("kept.py", f'"""{doc("Kept")}"""')
    assert [answer for _, answer in asked("test")] == [doc("Held")]
    assert [answer for _, answer in asked("train")] == [doc("Kept")]


def test_hash_of_a_module_never_changes():
    held = [name for name in ("json", "asyncio", "os", "email", "re", "tkinter", "typing") if pydocs._held_out(name)]
    assert held == ["json", "asyncio", "os", "email"]


def test_what_is_left_out(library):
    library(
        "good.py", f'"""{doc("Good")}"""\ndef _private():\n    """{doc("Private")}"""\ndef short():\n    """Short."""\n'
    )
    library("copy.py", f'"""{doc("Good")}"""')
    for path in ("test/a.py", "idlelib/a.py", "site-packages/a.py", "_secret.py", "pkg/_hidden/a.py", "pkg/tests/a.py"):
        library(path, f'"""{doc(path)}"""')
    assert [answer for _, answer in asked()] == [doc("Good")]


def test_odd_files_are_passed_over(library):
    library("broken.py", "def (")
    library("bytes.py", b'"""\xff\xfe"""')
    library("nul.py", b"\0")
    library("escape.py", f'"""{doc("Escape")}"""\nx = "\\d"\n')
    library("danger.py", f'"""{doc("Danger")}"""\nraise SystemExit\n')
    assert [answer for _, answer in asked()] == [doc("Danger"), doc("Escape")]
    assert asked() == asked()
    assert "danger" not in sys.modules


def test_answer_ends_with_a_sentence_or_paragraph():
    sentence = "This sentence has forty-nine characters, no more. "
    assert pydocs._answer(sentence * 20) == (sentence * 8).strip()
    assert pydocs._answer(f"{sentence * 2}\n\n{sentence * 5}") == f"{sentence * 2}\n\n{sentence * 5}".strip()
    assert pydocs._answer(f"{sentence * 2}\n\n{sentence * 7}") == (sentence * 2).strip()
    assert pydocs._answer("word " * 100) == ""


def test_errors(library):
    with pytest.raises(CalibrationError, match="did you mean 'train'"):
        pydocs.pydocs_rows("trian")
    with pytest.raises(CalibrationError, match="no sources"):
        pydocs.pydocs_rows("train")
