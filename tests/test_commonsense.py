"""The script that averages commonsense tasks: which scores count, and a whole run where lm-eval is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from pico import save_pico
from slimtune.evaluate.tasks import TaskResult


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("commonsense")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two test sets, and a training set that is not to be asked."""
    folder = tmp_path / "data"
    folder.mkdir()
    questions = [{"question": f"What is {n}?", "choices": [str(n), "x", "y", "z"], "answer": 0} for n in range(6)]
    blanks = [
        {
            "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: "
            f"Ann has {n} of _ left.\n\nOption1: it Option2: them Answer format: option1/option2",
            "input": "",
            "output": "the correct answer is option2",
            "answer": "option2",
        }
        for n in range(6)
    ]
    for name, rows in {"arc.test": questions, "winogrande.test": blanks, "arc.train": questions}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_normalised_score_counts_where_there_is_one(
    script: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered(_: object, __: object, names: list[str], *, limit: int | None) -> list[TaskResult]:
        assert [Path(name).name for name in names] == ["arc.test.jsonl", "winogrande.test.jsonl"] and limit == 4
        rows = [("arc.test", "acc", 0.25), ("arc.test", "acc_norm", 0.75), ("winogrande.test", "acc", 0.5)]
        return [TaskResult(*row, stderr=0.1, samples=4) for row in rows]

    monkeypatch.setattr(script, "tasks", answered)
    folder, out = save_pico(tmp_path / "pico"), tmp_path / "out.json"
    script.main([str(folder), f"again={folder}", "--data", str(data), "--limit", "4", "--output", str(out)])
    facts = json.loads(out.read_text())
    assert [row["name"] for row in facts["rows"]] == ["pico", "again"]
    assert facts["rows"][0]["average"] == 0.625 and facts["chance"] == 0.375
    assert facts["rows"][0]["tasks"]["winogrande"] == {"samples": 4, "acc": 0.5, "acc_stderr": 0.1}


def test_a_folder_without_tests_is_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no test sets"):
        script.main(["m", "--data", str(tmp_path), "--output", str(tmp_path / "out.json")])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
def test_a_whole_run(script: ModuleType, data: Path, tmp_path: Path) -> None:
    folder, out = save_pico(tmp_path / "pico"), tmp_path / "out.json"
    script.main([str(folder), "--data", str(data), "--limit", "4", "--output", str(out)])
    [row] = json.loads(out.read_text())["rows"]
    assert row["tasks"].keys() == {"arc", "winogrande"} and 0 <= row["average"] <= 1
