"""The built-in data set: questions about the Python standard library, answered by its own docstrings.

It is made from the sources of the running Python, so it needs no network and ships no foreign text, and there is enough
of it (some thousand pairs) for a first fine-tuning run to show its effect. Sources are parsed, never imported. Another
Python version gives slightly other rows; the same version always gives the same ones, in the same order.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimtune.errors import CalibrationError, nearest

SPLITS = ("train", "test")
HELD_OUT = 15  # percent of the top-level modules, by hash, whose rows are the split `test`
SHORTEST, LONGEST = 60, 400  # characters of an answer
LONGEST_SIGNATURE = 80  # characters
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "pydoc_data"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef

QUESTIONS = {
    "module": (
        "What is the Python module `{}` for?",
        "Describe the standard library module `{}`.",
        "I found `import {}` in some Python code. What does that module provide?",
    ),
    "class": (
        "What is the class `{}` in Python?",
        "In Python's standard library, what is `{}` used for?",
        "Explain the Python class `{}`.",
    ),
    "function": (
        "In Python, what does `{}` do?",
        "Explain the function `{}` of the Python standard library.",
        "What happens when I call `{}` in Python?",
    ),
}


def pydocs_rows(split: str) -> list[dict[str, Any]]:
    """The rows of `split` ("train" or "test"), `{"messages": [user, assistant]}`, sorted by source file.

    A top-level module is in one split only, and no answer appears twice. Raises `CalibrationError` for another split's
    name, or for a Python whose standard library has no readable sources.
    """
    if split not in SPLITS:
        raise CalibrationError("no such split", where="pydocs", got=split, remedy=nearest(split, SPLITS))
    root = Path(sysconfig.get_path("stdlib"))
    answers: dict[str, str] = {}  # answer -> question: the first to give an answer keeps it
    for path in _sources(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if (split == "test") == _held_out(module.split(".")[0]):
            for kind, name, docstring in _documented(path, module):
                answers.setdefault(_answer(docstring), _question(kind, name))
    answers.pop("", None)
    if not answers:
        raise CalibrationError("this Python has no sources of its standard library", where=str(root))
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for answer, question in answers.items()
    ]


def _held_out(module: str) -> bool:
    return zlib.crc32(module.encode()) % 100 < HELD_OUT


def _sources(root: Path) -> list[Path]:
    """The source files of public modules, sorted by their place in the library."""

    def public(parts: tuple[str, ...]) -> bool:
        return not any(part in SKIPPED or (part.startswith("_") and part != "__init__.py") for part in parts)

    return sorted(path for path in root.rglob("*.py") if public(path.relative_to(root).parts))


def _documented(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    """(kind, name or signature, docstring) of a module and of the public names in it; nothing if it does not parse."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    if docstring := ast.get_docstring(tree, clean=False):
        yield "module", module, docstring
    yield from _members(tree, module)


def _members(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str, str]]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | Definition) or node.name.startswith("_"):
            continue
        name, docstring = f"{prefix}.{node.name}", ast.get_docstring(node, clean=False)
        if isinstance(node, ast.ClassDef):
            if docstring:
                yield "class", name, docstring
            yield from _members(node, name)
        elif docstring:
            yield "function", name + _signature(node), docstring


def _signature(node: Definition) -> str:
    arguments = ast.unparse(node.args)
    arguments = re.sub(r"^(self|cls)\b(, /)?(, )?", "", arguments)
    return f"({arguments})" if len(arguments) < LONGEST_SIGNATURE else "(...)"


def _question(kind: str, name: str) -> str:
    templates = QUESTIONS[kind]
    return templates[zlib.crc32(name.encode()) % len(templates)].format(name)


def _answer(docstring: str) -> str:
    """The first paragraphs of a docstring that fit `LONGEST`, or the first sentences of its first one.

    Empty where less than `SHORTEST` is left. Whatever follows an interactive example is left out.

    >>> _answer("Do it.\\n\\n    Nothing else is done by this function, as long as it runs.\\n\\n    >>> 1\\n    1")
    'Do it.\\n\\nNothing else is done by this function, as long as it runs.'
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring).split(">>>")[0].strip())
    answer = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(answer) + len(paragraph) + 2 > LONGEST:
            break
        answer += "\n\n" + paragraph
    if len(answer) > LONGEST:
        ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", answer[:LONGEST])]
        answer = answer[: ends[-1]] if ends else ""
    return answer.rstrip() if len(answer.rstrip()) >= SHORTEST else ""
