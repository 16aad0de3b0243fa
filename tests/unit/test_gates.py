"""Rules about the text of this repository that neither ruff, mypy nor import-linter can state.

Each rule is a function or a row of data, judged on the repository and, so that it cannot rot, on a sample that breaks
it. The samples are joined from pieces: this file obeys the rules too.
"""

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "slimtune"

# Lines in all of src. A change that needs more raises the number in its own commit, and says there what it bought.
BUDGET = 28_800
FILE_LINES = 500
FUNCTION_LINES = 60
SHAPELESS = {"utils", "helpers", "common", "misc", "core"}  # a name that says nothing collects everything


def modules(folder: Path = SOURCE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def long_functions(source: str) -> Iterator[str]:
    """`name (lines)` of every function over the limit, counted from `def` to its end without the docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{node.name} ({lines} lines)"


def test_files_are_short() -> None:
    assert modules()
    assert {p.name: lines_of(p) for p in modules() if lines_of(p) > FILE_LINES} == {}


def test_functions_are_short() -> None:
    found = {str(p.relative_to(SOURCE)): list(long_functions(p.read_text(encoding="utf-8"))) for p in modules()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(("body", "found"), [(59, []), (60, ["f (61 lines)"])])
def test_length_of_a_function_leaves_its_docstring_out(body: int, found: list[str]) -> None:
    source = 'def f():\n    """One.\n\n    Two.\n    """\n' + "    x = 1\n" * body
    assert list(long_functions(source)) == found


def test_source_stays_in_its_budget() -> None:
    assert sum(map(lines_of, modules())) <= BUDGET


def test_every_module_has_a_telling_name() -> None:
    assert [p for p in SOURCE.rglob("*") if p.stem in SHAPELESS] == []


class Rule(NamedTuple):
    """A pattern that no line of some files may match, and a line that does."""

    name: str
    pattern: str
    where: str  # a regular expression for the path, relative to the root
    sample: str
    excuse: str = r"$^"  # a line that matches this may


PROJECTIONS = (
    "|".join(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", "qkv", "gate_up", "out")) + "|fc[12]"
)
PYTHON = r"^(src|tests|benchmarks)/.*\.py$"
CODE = r"^src/.*\.py$"

RULES = [
    Rule(
        "only arch names projections",
        rf"""["'][\w.*]*\b({PROJECTIONS})\b""",
        r"^src/slimtune/(?!arch/).*\.py$",
        "x = 'self_attn.q" + "_proj'",
    ),
    Rule(
        "no stubs",
        "NotImplemented" + r"Error|\bTO" + r"DO\b|\bFIX" + r"ME\b|\bXX" + r"X\b",
        PYTHON,
        "raise NotImplemented" + "Error",
        r"# reason: \w",
    ),
    Rule(
        "no blind handlers",
        r"except( Base| )Exc" + r"eption\b|except\s*:",
        PYTHON,
        "except Exc" + "eption:",
        r"# reason: \w",
    ),
    Rule(
        "code from a hub runs only when the user says so",
        r"trust_remote" + r"""_code["']?\s*[=:]\s*True""",
        CODE,
        "f(trust_remote" + "_code=True)",
    ),
    Rule(
        "no pickles",
        r"\btorch\.lo" + r"ad\(|^\s*(import|from)\s+(pickle|dill|cloudpickle|joblib)\b",
        CODE,
        "torch.lo" + "ad(path)",
    ),
    Rule(
        "no path of one machine",
        "|".join(f"/{folder}/" for folder in ("wo" + "rk", "tm" + "p", "ro" + "ot")),
        "",
        "cd /tm" + "p/x",
    ),
    Rule(
        "no host of a registry",
        r"files\.python" + r"hosted|pypi\.org" + r"/simple|registry\.npm" + "js",
        "",
        "https://pypi.org" + "/simple/slimtune",
    ),
]
NAMES = [rule.name for rule in RULES]


@functools.cache
def texts() -> list[tuple[str, str]]:
    """Path relative to the root and text of each file that is, or would be, committed."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    else:
        made = re.compile(r"^(\.(?!ci/)|(runs|build|dist)/)")
        paths = [p for p in ROOT.rglob("*") if not made.search(p.relative_to(ROOT).as_posix())]
    data = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted(paths) if path.is_file()}
    return [(path, text.decode("utf-8", errors="replace")) for path, text in data.items() if b"\0" not in text]


def offences(rule: Rule, path: str, text: str) -> list[str]:
    """`path:line: text` of every line that breaks the rule."""
    if not re.search(rule.where, path):
        return []
    return [
        f"{path}:{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(rule.pattern, line) and not re.search(rule.excuse, line)
    ]


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_repository_obeys(rule: Rule) -> None:
    files = [path for path, _ in texts() if re.search(rule.where, path)]
    assert files
    assert [line for path, text in texts() for line in offences(rule, path, text)] == []


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_rule_finds_what_breaks_it(rule: Rule) -> None:
    path = "src/slimtune/quant/sample.py"
    assert offences(rule, path, f"first = 1\n{rule.sample}\n") == [f"{path}:2: {rule.sample}"]


def test_arch_may_name_projections_and_a_reason_excuses() -> None:
    names, _, blind = RULES[:3]
    assert offences(names, "src/slimtune/arch/families.py", names.sample) == []
    assert offences(blind, "src/slimtune/files.py", f"{blind.sample}  # reason: it is raised again") == []
    assert offences(blind, "src/slimtune/files.py", f"{blind.sample}  # reason:") != []


def python(script: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


HEAVY = (
    "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
)


def test_importing_slimtune_imports_nothing_heavy() -> None:
    ran = python(f"import sys, slimtune\n{HEAVY}")
    assert ran.returncode == 0, ran.stderr


def test_help_imports_nothing_heavy() -> None:
    ran = python(f"""
import runpy, sys
sys.argv = ["slimtune", "--help"]
try:
    runpy.run_module("slimtune.cli", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
{HEAVY}
""")
    assert ran.returncode == 0, ran.stderr
    assert "plan" in ran.stdout


def test_importing_every_module_touches_no_device_and_warns_of_nothing() -> None:
    ran = python("""
import importlib, importlib.util, pkgutil, slimtune
names = {m.name for m in pkgutil.walk_packages(slimtune.__path__, "slimtune.")}
if not importlib.util.find_spec("triton"):
    names.remove("slimtune.kernels.triton")
for name in names:
    importlib.import_module(name)
import torch
assert len(names) > 5, names
assert not torch.cuda.is_initialized()
assert torch.get_default_dtype() is torch.float32
assert torch.is_grad_enabled()
""")
    assert ran.returncode == 0, ran.stderr
    assert (ran.stdout, ran.stderr) == ("", "")
