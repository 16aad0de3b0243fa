"""Tasks in lm-eval's YAML: the same score as the same rows in a file of questions, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pico import pico_model, pico_tokenizer, save_pico
from slimtune import evaluate
from slimtune.errors import CalibrationError, FormatError, RecipeError, SlimtuneError
from slimtune.evaluate.definitions import definitions
from slimtune.evaluate.tasks import TaskResult, require_tasks, tasks
from slimtune.recipe.document import read_recipe
from slimtune.recipe.plan import plan
from slimtune.recipe.shell import evaluate_model

WITHOUT = "lm-eval is an optional package: slimtune[eval]"
ROWS = [{"question": f"{a} + {a}?", "choices": [str(2 * a), "a lot", "x"], "answer": a % 3} for a in range(7)]
TASK = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.data"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a YAML file beside `rows.data`; what is None in the facts is left out."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.data").write_text("\n".join(map(json.dumps, ROWS)))

    def written(name: str = "my.yaml", whole: object = None, **facts: Any) -> str:
        config = whole or {key: value for key, value in {**TASK, **facts}.items() if value is not None}
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return str(path)

    return written


@pytest.fixture
def local(tmp_path: Path) -> str:
    (tmp_path / "local.json").write_text(json.dumps(ROWS))
    return str(tmp_path / "local.json")


def scores(found: list[TaskResult], task: str) -> dict[str, tuple[float, float | None, int]]:
    return {row.metric: (row.value, row.stderr, row.samples) for row in found if row.task == task}


def test_a_yaml_file_scores_as_its_rows_do(write: Callable[..., str], local: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=WITHOUT)
    from lm_eval import utils

    before = utils.env
    model, tokenizer = pico_model("llama"), pico_tokenizer()
    write("base/template", {key: value for key, value in TASK.items() if key != "task"} | {"doc_to_text": "Q"})
    path = write(whole={"include": "base/template", "task": "mine", "doc_to_text": TASK["doc_to_text"]})
    found = tasks(model, tokenizer, [path, local])
    assert scores(found, "mine") == scores(found, "local")
    assert {"acc", "acc_norm"} == scores(found, "mine").keys() and scores(found, "mine")["acc"][2] == 7
    assert utils.env is before, "templates of others are theirs again"
    short = tasks(model, tokenizer, [path], limit=2)
    assert [row.samples for row in short] == [2, 2]
    with pytest.raises(RecipeError, match="same name"):
        tasks(model, tokenizer, [path, write("again.yml")])


def test_a_group_is_its_tasks_and_their_mean(write: Callable[..., str], local: str) -> None:
    pytest.importorskip("lm_eval", reason=WITHOUT)
    write("one.yaml", task="one", metric_list=[{"metric": "acc"}])
    write("two.yaml", task="two", doc_to_text="question", metric_list=[{"metric": "acc"}])
    write("other.yaml", "task: !function other.code")
    means = [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}]
    group = write("all.yaml", {"group": "both", "task": ["one", "two"], "aggregate_metric_list": means})
    found = tasks(pico_model("llama"), pico_tokenizer(), [group])
    one, two, both = (scores(found, name)["acc"][0] for name in ("one", "two", "both"))
    assert one == scores(tasks(pico_model("llama"), pico_tokenizer(), [local]), "local")["acc"][0]
    assert both == pytest.approx((one + two) / 2)


def test_recipes_and_the_command_line_name_yaml_files(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason=WITHOUT)
    path, base = write("sub/my.yaml"), save_pico(tmp_path / "pico")
    (tmp_path / "sub" / "recipe.yaml").write_text(f"model: {base}\nsteps:\n- evaluate: {{tasks: [my.yaml]}}\n")
    with pytest.raises(CalibrationError, match=r"(?s)data file is not there.*steps\[0\]\.evaluate.*rows\.data"):
        plan(read_recipe(tmp_path / "sub" / "recipe.yaml"))
    (tmp_path / "rows.data").rename(tmp_path / "sub" / "rows.data")
    recipe = read_recipe(tmp_path / "sub" / "recipe.yaml")
    assert recipe.steps[0].tasks == (path,), "it lies beside the recipe"
    plan(recipe)
    metrics = evaluate_model(str(base), tasks=[path])["metrics"]
    monkeypatch.chdir(tmp_path / "sub")
    again = evaluate(pico_model("llama"), pico_tokenizer(), tasks=["my.yaml"])
    assert {fact["name"] for fact in again} >= {"mine_acc", "mine_acc_norm"}
    assert [fact["name"] for fact in metrics] == [fact["name"] for fact in again]


CODE: dict[str, Any] = {
    "task: t\ndoc_to_text: !function code.text\n": "line 2",
    "task: t\nfewshot_config: {samples: !function code.rows}\n": "!function code.rows",
    "include: base.yaml\ntask: t\n": "base.yaml, line 1",
    "class: !function code.Task\ntask: t\n": "!function",
}


@pytest.mark.parametrize("text", CODE)
def test_code_is_refused(write: Callable[..., str], tmp_path: Path, text: str) -> None:
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ntext = rows = Task = list\n")
    write("base.yaml", "process_docs: !function code.rows\n")
    with pytest.raises(FormatError, match=r"(?s)runs code.*" + CODE[text].replace(".", r"\.")):
        definitions(Path(write(whole=text)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("facts", "error", "message"),
    [
        ({"whole": "task: [\n"}, FormatError, "not valid YAML"),
        ({"whole": "task: t\nwhen: !!python/name:os.system\n"}, FormatError, "not valid YAML"),
        ({"whole": b"\xff\xfe\x00".decode("latin1")}, FormatError, "mapping|YAML"),
        ({"whole": "- a\n"}, FormatError, "a mapping"),
        ({"task": None}, FormatError, "names no task"),
        ({"task": 3}, FormatError, "names no task"),
        ({"include": "nowhere"}, FormatError, "(?s)cannot be read.*nowhere"),
        ({"include": "my.yaml"}, FormatError, "include each other"),
        ({"unsafe_code": True}, FormatError, "runs code"),
        ({"metric_list": [{"metric": "someones/metric"}]}, FormatError, "not a metric of lm-eval"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, FormatError, "not a metric of lm-eval"),
        ({"dataset_path": "allenai/ai2_arc"}, CalibrationError, "(?s)local files.*ai2_arc"),
        ({"dataset_path": "pandas"}, CalibrationError, "local files"),
        ({"dataset_path": None}, CalibrationError, "local files"),
        ({"dataset_kwargs": None}, FormatError, "split"),
        ({"test_split": "tset"}, FormatError, "(?s)split.*got:.*tset.*wanted:.*test"),
        ({"dataset_kwargs": {"data_files": {"test": "lost.data"}}}, CalibrationError, r"(?s)not there.*lost\.data"),
        ({"dataset_kwargs": {"data_files": {"test": []}}}, CalibrationError, "not there"),
        ({"dataset_kwargs": {"data_files": {"test": "https://host/rows.json"}}}, CalibrationError, "not there"),
        ({"whole": {"group": "all", "task": "mine"}}, FormatError, "lists the names"),
        ({"whole": {"group": "all", "task": ["mine"]}}, FormatError, "(?s)beside it.*got:.*mine"),
        ({"whole": {"group": "all", "task": ["t"], "num_fewshot": 1}}, FormatError, "(?s)a group.*num_fewshot"),
    ],
)
def test_bad_files_have_one_message(
    write: Callable[..., str], facts: dict[str, Any], error: type[SlimtuneError], message: str
) -> None:
    path = write(**facts)
    with pytest.raises(error, match=message) as caught:
        definitions(Path(path))
    assert path in str(caught.value)


def test_a_name_that_is_no_file_and_a_file_that_is_bad_are_known_to_the_plan(
    write: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason=WITHOUT)
    require_tasks([write()])
    with pytest.raises(RecipeError, match=r"(?s)named '.*nowhere\.yaml'.*\.yaml"):
        require_tasks([str(tmp_path / "nowhere.yaml")])
    with pytest.raises(FormatError, match="runs code"):
        require_tasks([write("code.yaml", "task: !function code.name")])


def test_templates_stay_in_the_sandbox(write: Callable[..., str]) -> None:
    pytest.importorskip("lm_eval", reason=WITHOUT)
    escape = "{{ ''['__cl' ~ 'ass__'].mro() }} {{ question }}"
    with pytest.raises(FormatError, match=r"(?s)template cannot be filled in.*unsafe"):
        tasks(pico_model("llama"), pico_tokenizer(), [write(doc_to_text=escape)])
    with pytest.raises(FormatError, match="template cannot be filled in"):
        tasks(pico_model("llama"), pico_tokenizer(), [write(doc_to_text="{{ question ")])


def test_rows_that_cannot_be_read_are_told(write: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=WITHOUT)
    (tmp_path / "rows.data").write_text("no rows")
    with pytest.raises(CalibrationError, match="could not be loaded"):
        tasks(pico_model("llama"), pico_tokenizer(), [write()])
