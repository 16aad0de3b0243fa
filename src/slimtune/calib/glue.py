"""GLUE rows as text to text, in T5's words (arXiv 1910.10683, appendix D): `cola sentence: ...` and `acceptable`."""

from __future__ import annotations

from typing import NamedTuple


class Task(NamedTuple):
    """The columns a task is recognised by, its prompt over them, the column of its label, and the labels in words."""

    columns: tuple[str, ...]
    prompt: str
    label: str
    words: dict[str, str]


# Those with more columns first: CoLA's rows have SST-2's too. RTE's files have MNLI's columns, and get its words.
TASKS = {
    "cola": Task(
        ("sentence", "label", "star"), "cola sentence: {sentence}", "label", {"0": "unacceptable", "1": "acceptable"}
    ),
    "mrpc": Task(
        ("Quality", "#1 String", "#2 String"),
        "mrpc sentence1: {#1 String} sentence2: {#2 String}",
        "Quality",
        {"0": "not_equivalent", "1": "equivalent"},
    ),
    "qnli": Task(("question", "sentence", "label"), "qnli question: {question} sentence: {sentence}", "label", {}),
    "mnli": Task(("premise", "hypothesis", "label"), "mnli premise: {premise} hypothesis: {hypothesis}", "label", {}),
    "sst2": Task(("sentence", "label"), "sst2 sentence: {sentence}", "label", {"0": "negative", "1": "positive"}),
}
"""By name; a task without words has its labels in words already."""
