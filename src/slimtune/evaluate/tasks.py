"""Accuracy on tasks through EleutherAI's lm-evaluation-harness, in process; its own tasks, local files, and YAML files.

A local file needs no network: it is read, each row is turned into one form (`multiple_choice`), and the set becomes an
ordinary lm-eval multiple-choice task. Three kinds of row are read:

- `{question, choices, answer}`: `choices` a list of texts, `answer` an index into it or one of its texts;
- `{question, subject, choices, answer}`, and the lines of a .csv file, question, choices, letter: MMLU (Hendrycks et
  al. 2021, arXiv:2009.03300), as the hub has it and as its authors do, where the file is named after the subject;
- `{instruction, input, output, answer}`: the commonsense sets of LLM-Adapters (Hu et al. 2023, arXiv:2304.01933).

Scoring is the field's, by log-likelihood: each candidate *text* is a continuation of the question, and the most likely
one is the answer (`acc`; `acc_norm` divides by the candidate's length in characters first). LLM-Adapters instead lets
a fine-tuned model write "the correct answer is answer3"; a small or base model cannot follow that form, and would be
scored on the form and not on the knowledge. Contexts are those of lm-eval's tasks of the same name: "Question: ...
Answer:" for ARC, PIQA and the like; for a sentence with a blank (WinoGrande), the candidates stand in the blank and
what is scored is the rest of the sentence (Trinh & Le 2018, arXiv:1806.02847), so only `acc` means anything there.
Two differences: OpenBookQA's context is the bare question in lm-eval, and the BoolQ rows of LLM-Adapters have no
passage. MMLU's questions list their choices, and what is scored is the letter, as in lm-eval; the line that names the
subject stands there once before the examples, here with each of them.
"""

from __future__ import annotations

import copy
import csv
import difflib
import gzip
import importlib.util
import io
import json
import logging
import math
import os
import random
import re
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy
import torch

from slimtune.errors import BackendMissing, CalibrationError, FormatError, RecipeError
from slimtune.evaluate.definitions import DEFINITIONS, definitions, included, is_definition
from slimtune.evaluate.inference import running

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".csv.gz")
FORMS = "{question, choices, answer}, MMLU's with a subject, or LLM-Adapters' {instruction, input, output, answer}"
LETTERS = "ABCDEFGHIJ"


def require_harness() -> None:
    """Raise `BackendMissing` without lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise BackendMissing("evaluation on tasks needs lm-eval", where="tasks", remedy='pip install "slimtune[eval]"')


def require_tasks(names: Sequence[str]) -> None:
    """Raise what `tasks` raises of a name that is none, before anything is run (lm-eval's index takes seconds)."""
    require_harness()
    others = [name for name in names if not (_files(Path(name)) or _defined(name))]
    for name in others:
        if name.endswith(SUFFIXES + DEFINITIONS) or "/" in name:
            _registered(name, ())
    if others:
        from lm_eval.tasks import TaskManager

        valid = TaskManager().all_tasks
        for name in others:
            _registered(name, valid)


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task over `samples` rows; `stderr` is None where lm-eval gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


def tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | os.PathLike[str] | None = None,
) -> list[TaskResult]:
    """Run `names` and return every metric of each, in lm-eval's order (a group's own rows come after its tasks').

    A name is a local file of questions, a folder of such files, a YAML file that defines a task or group over local
    files without code (`slimtune.evaluate.definitions`), or a task, group or tag of lm-eval or of the YAML files under
    `include_path`. After all others stands the mean score of each folder, whose sets count alike. `limit` takes the
    first rows of each task; `num_fewshot` is lm-eval's, and a local set draws its examples from itself
    without the row asked. The model, the tokenizer and the random states of Python, numpy and torch (CPU) are left as
    they were.

    Raises `BackendMissing` without lm-eval, `RecipeError` for an unknown or repeated name or a count too small,
    `FormatError` and `CalibrationError` for a bad file, and `CalibrationError` where a task's data cannot be had.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    _require_counts(limit=(limit, 1), num_fewshot=(num_fewshot, 0), batch_size=(batch_size, 1))
    shots = num_fewshot or 0
    local: dict[str, list[Any]] = {n: [local_task(file, num_fewshot=shots) for file in _files(Path(n))] for n in names}
    defined = {name: _defined(name) for name in names if not local[name]}
    configs = {key: config for own in defined.values() for key, config in own.items()}
    with included(configs) as paths:
        paths = [str(path) for path in (include_path,) if path is not None] + paths
        whole = not all(local[name] or defined[name] for name in names)
        manager = TaskManager(include_path=paths or None, include_defaults=whole)  # lm-eval's own take seconds
        specs = [
            spec
            for name in names
            for spec in local[name] or list(defined[name])[:1] or [_registered(name, manager.all_tasks)]
        ]
        inner = [key for own in defined.values() for key in list(own)[1:]]
        folders = [name for name in names if len(local[name]) > 1]
        called = [spec if isinstance(spec, str) else spec["task"] for spec in specs]
        _require_distinct(called + inner + [_mean_name(name) for name in folders])
        if not specs:
            return []
        with running(model), _random_states_kept(), _told(names), _quiet():
            harness = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            results = simple_evaluate(
                model=harness,
                tasks=specs,
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                log_samples=False,
            )
    found = [row for name, metrics in results["results"].items() for row in _results(name, metrics)]
    return found + [_mean(name, [spec["task"] for spec in local[name]], found) for name in folders]


def local_task(path: str | os.PathLike[str], *, num_fewshot: int = 0) -> dict[str, Any]:
    """The multiple-choice set in a .json, .jsonl or .csv file, or in one compressed by gzip, as an lm-eval task config.

    The task is called like the file, without its ending. Raises `FormatError` for a file that is not JSON;
    `CalibrationError` for one without rows, with a row that is no multiple-choice question, or with questions and
    sentences to fill in mixed; `RecipeError` where it has not `num_fewshot` rows beside the one asked.
    """
    path = Path(path)
    rows = [multiple_choice(row, where=f"{path}, row {number}") for number, row in enumerate(_read(path), 1)]
    if len({frozenset(row) for row in rows}) != 1:
        raise CalibrationError(
            "a task set holds questions, or sentences to fill in, and not both" if rows else "a task set without rows",
            where=str(path),
            wanted=FORMS,
        )
    if len(rows) <= num_fewshot:
        raise RecipeError(
            "a task set has too few rows for its examples",
            where=str(path),
            got=f"{len(rows)} rows",
            wanted=f"more than num_fewshot, {num_fewshot}",
        )
    fill_in = "ending" in rows[0]
    lettered = all(row.get("choices") == list(LETTERS[: len(row["choices"])]) for row in rows) if not fill_in else False
    fields = ("gold", "contexts", "ending") if fill_in else ("query", "choices", "gold")

    def dataset(**_: object) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return {
        "task": path.name.removesuffix(".gz").rsplit(".", 1)[0],
        "custom_dataset": dataset,
        "test_split": "test",
        "fewshot_split": "test",  # the split asked: lm-eval then leaves out the row it is asking
        "output_type": "multiple_choice",
        **dict(zip(("doc_to_text", "doc_to_choice", "doc_to_target"), fields, strict=True)),
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in (["acc"] if fill_in or lettered else ["acc", "acc_norm"])
        ],
    }


def multiple_choice(row: object, *, where: str = "") -> dict[str, Any]:
    """One row as `{query, choices, gold}`, or as `{contexts, ending, gold}` for a sentence with a blank `_`.

    `gold` is the index of the right choice or context. Raises `CalibrationError`, naming `where`, for any other row.

    >>> multiple_choice({"question": "What is 2 + 2?", "choices": ["3", "4"], "answer": "4"})
    {'query': 'Question: What is 2 + 2?\\nAnswer:', 'choices': ['3', '4'], 'gold': 1}
    """
    lead, question, choices, labels, answer = _parts(row)
    subject = _subject(row)
    fill_in = "fill in the blank" in lead
    whole = not fill_in or "_" in question
    gold = answer if type(answer) is int else labels.index(answer) if answer in labels else -1
    texts = all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not (texts and whole and 2 <= len(choices) == len(labels) and 0 <= gold < len(choices)):
        got = textwrap.shorten(repr(row), 200)
        raise CalibrationError("a row is not a multiple-choice question", where=where, got=got, wanted=FORMS)
    choices = [choice.strip() for choice in choices]
    if fill_in:
        before, _, after = question.partition("_")
        return {"contexts": [before + choice for choice in choices], "ending": after.strip(), "gold": gold}
    if subject:
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        query = f"{about}\n\n{question.strip()}\n{listed}\nAnswer:"
        return {"query": query, "choices": list(LETTERS[: len(choices)]), "gold": gold}
    sentence = "complete the given sentence" in lead
    return {"query": question if sentence else f"Question: {question}\nAnswer:", "choices": choices, "gold": gold}


def _subject(row: object) -> str:
    """The subject of a row of MMLU, whose answer is an index or a letter; "" for other rows."""
    match row:
        case {"subject": str(subject), "choices": list(choices), "answer": answer}:
            return subject if type(answer) is int or answer in list(LETTERS[: len(choices)]) else ""
    return ""


def _parts(row: object) -> tuple[str, str, list[Any], list[Any], Any]:
    """What a row asks for, the question, the candidates, their labels, and the label or index of the right one.

    LLM-Adapters writes all but the last into the instruction: "Please choose the correct answer to the question: Why?
    Answer1: this Answer2: that Answer format: answer1/answer2", or with the labels alone: "... true/false".
    """
    match row:
        case {"question": str(question), "choices": list(choices), "answer": answer} if _subject(row):
            return "", question, choices, list(LETTERS[: len(choices)]), answer
        case {"question": str(question), "choices": list(choices), "answer": answer}:
            return "", question, choices, choices, answer
        case {"instruction": str(instruction), "answer": str(answer), **rest} if not rest.get("input"):
            body, _, form = instruction.rpartition("Answer format:")
            lead, _, body = body.partition(": ")
            labels = form.strip().split("/")
            question, *listed = re.split("|".join(re.escape(label.capitalize() + ":") for label in labels), body)
            return lead, question.strip(), listed or labels, labels, answer
    return "", "", [], [], None


def _read(path: Path) -> list[Any]:
    """The rows of a JSON list, of JSON lines, or of MMLU's own files."""
    opener = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="" if name.endswith(".csv") else None) as file:
            text = file.read()
        if name.endswith(".csv"):
            subject = re.sub(r"_(test|dev|val)$", "", name.removesuffix(".csv"))
            lines = filter(None, csv.reader(io.StringIO(text, newline=""), strict=True))
            return [{"question": q, "subject": subject, "choices": c, "answer": a} for q, *c, a in lines]
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:  # ValueError: no UTF-8, no JSON
        raise FormatError(
            "not a file of questions", where=str(path), got=error, wanted=f"a JSON list or JSON lines of {FORMS}"
        ) from error


def _files(path: Path) -> list[Path]:
    """The files of questions that a name stands for: itself, those in a folder, or none."""
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    return [file for file in files if file.name.endswith(SUFFIXES)]


def _defined(name: str) -> dict[str, dict[str, Any]]:
    """What the YAML file of that name defines; nothing where there is none."""
    return definitions(Path(name)) if is_definition(name) and Path(name).is_file() else {}


def _registered(name: str, valid: Sequence[str]) -> str:
    if name in valid:
        return name
    near = difflib.get_close_matches(name, valid, n=3)
    raise RecipeError(
        f"no task, file or folder of questions named '{name}'",
        where="tasks",
        got=name,
        wanted=f"a task of lm-eval, or a file ending in {', '.join(SUFFIXES + DEFINITIONS)}",
        remedy=f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists lm-eval's tasks",
    )


def _require_counts(**counts: tuple[int | None, int]) -> None:
    """Each a count (None: not given) and the least it may be."""
    for name, (count, least) in counts.items():
        if count is not None and count < least:
            raise RecipeError("a count too small", where=f"tasks: {name}", got=count, wanted=f"{least} or more")


def _require_distinct(names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise RecipeError(
            "two tasks of the same name", where="tasks", got=", ".join(repeated), remedy="rename one of the files"
        )


def _results(task: str, metrics: dict[str, Any]) -> Iterator[TaskResult]:
    """The rows of one entry of lm-eval's results: keys are "metric,filter" and "metric_stderr,filter"."""
    for key, value in metrics.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = metrics.get(f"{metric}_stderr,{chosen}")  # "N/A" where there is none
        yield TaskResult(
            task=task,
            metric=metric if chosen == "none" else key,
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, (int, float)) and math.isfinite(stderr) else None,
            samples=int(metrics["sample_len"]),
        )


def _mean_name(folder: str) -> str:
    return f"{Path(folder).resolve().name}_mean"


def _mean(folder: str, sets: Sequence[str], found: Sequence[TaskResult]) -> TaskResult:
    """The mean score of a folder's sets: of each its `acc_norm` where it has one, as RoLoRA and QuaRot average."""
    scores = {(row.task, row.metric): row for row in found}
    rows = [scores.get((name, "acc_norm"), scores[name, "acc"]) for name in sets]
    value, samples = sum(row.value for row in rows) / len(rows), sum(row.samples for row in rows)
    return TaskResult(_mean_name(folder), "acc", value, None, samples)


@contextmanager
def _told(names: Sequence[str]) -> Iterator[None]:
    """Data that `datasets` cannot get or read, and templates that cannot be filled in, in slimtune's words."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    where = ", ".join(names)
    try:
        yield
    except TemplateError as error:  # a template that reaches into Python among them
        raise FormatError("a task's template cannot be filled in", where=where, got=error) from error
    except (ConnectionError, FileNotFoundError, DatasetsError) as error:
        raise CalibrationError(
            "a task's data could not be loaded",
            where=where,
            got=error,
            remedy="run once with the hub reachable (HF_HUB_OFFLINE unset), or name a local file of questions",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of a model that was loaded before, and has git, pip and others tell of the machine, which takes
    seconds, prints, and is read by nothing here."""
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with patch.object(evaluator, "get_git_commit_hash"), patch.object(evaluator, "add_env_info"):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """lm-eval seeds the global generators, so that a task that shuffles does so alike; put them back afterwards."""
    python, arrays = random.getstate(), numpy.random.get_state()  # noqa: NPY002 (the one lm-eval seeds)
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)  # noqa: NPY002
