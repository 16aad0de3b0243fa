"""Recipes as files: overrides, paths, numbers, broken YAML, and the way back."""

from pathlib import Path
from typing import Any

import pytest

from slimtune.calib.rows import DataSource
from slimtune.errors import RecipeError
from slimtune.recipe.document import parse, parse_for, read_recipe, write_recipe
from slimtune.recipe.schema import Evaluate, Lora, Merge, Quantize, Train

SHORT = "model: m\nsteps:\n  - evaluate: {speed: true}\n"
LONG = """\
model: owner/name
seed: 7
dtype: bfloat16
data:
  train: {path: alpaca.jsonl.gz}
  eval: {builtin: pydocs, split: test, samples: 64}
  calibration: c4.jsonl.gz
steps:
  - quantize: {method: optq, bits: 3, group_size: 64, ignore: [lm_head, "*.down_proj"]}
  - lora: {r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj]}
  - train: {max_steps: 200, learning_rate: 2e-4, max_grad_norm: .5}
  - merge
  - evaluate: {perplexity: {wikitext2: wiki.test.raw.gz}, tasks: [arc_easy]}
  - quantize: {method: rtn, bits: 8}
  - export: {format: compressed-tensors}
"""


def written(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [SHORT, LONG])
def test_a_written_recipe_is_read_back_as_the_same(tmp_path: Path, text: str) -> None:
    recipe = read_recipe(written(tmp_path, text))
    again = read_recipe(written(tmp_path, write_recipe(recipe), "other.yaml"))
    assert again == recipe
    assert again.name == "r"
    assert write_recipe(again) == write_recipe(recipe)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.0e-4", 2e-4),
        ("-1E3", -1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("12", 12),
        ("1e4x", "1e4x"),
        ("1.2.3", "1.2.3"),
        ("e-4", "e-4"),
        ("true", True),
        ("[a, 3]", ["a", 3]),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: Any) -> None:
    assert parse(text) == value
    assert type(parse(text)) is type(value)


def test_overrides_reach_every_kind_of_place(tmp_path: Path) -> None:
    recipe = read_recipe(
        written(tmp_path, LONG),
        ["seed=1", "quantize.bits=4", "steps.0.quantize.bits=2", "data.train.path=x.jsonl", "train.learning_rate=1e-5",
         "data.eval={path: held.jsonl}", "steps.4.evaluate.perplexity.more=y.txt", "name=mine"],
    )  # fmt: skip
    first, lora, train, merge, evaluate, second, _ = recipe.steps
    assert (recipe.seed, recipe.name) == (1, "mine")
    assert isinstance(first, Quantize) and first.options["bits"] == 2
    assert isinstance(second, Quantize) and second.options["bits"] == 4
    assert isinstance(lora, Lora) and isinstance(merge, Merge)
    assert isinstance(train, Train) and train.learning_rate == 1e-5
    assert recipe.data.train == DataSource(path="x.jsonl")
    assert recipe.data.eval == DataSource(path="held.jsonl")
    assert isinstance(evaluate, Evaluate) and set(evaluate.perplexity) == {"wikitext2", "more"}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("quantize.ignore=*down_proj", "quantize.ignore", "*down_proj"),
        ("steps.0.quantize.ignore=&x", "quantize.ignore", "&x"),
        ("quantize.ignore=[lm_head, '*.0.*']", "quantize.ignore", ["lm_head", "*.0.*"]),
        ("quantize.ignore='*down_proj'", "quantize.ignore", "*down_proj"),
        ("quantize.layers={q_proj: {bits: 8}}", "quantize.layers", {"q_proj": {"bits": 8}}),
        ("quantize.bits=3", "quantize.bits", 3),
        ("data.train=run #2.jsonl", "data.train", "run #2.jsonl"),
        ("data.train=set: a.jsonl", "data.train", "set: a.jsonl"),
        ("data.train=2024", "data.train", "2024"),
        ("data.train=[draft].jsonl", "data.train", "[draft].jsonl"),
        ("data.train={path: a.csv, samples: 3}", "data.train", {"path": "a.csv", "samples": 3}),
        ("data.train=null", "data.train", None),
        ("data.train.path=@a", "data.train.path", "@a"),
        ("data.train.columns.prompt=Q: {question}", "data.train.columns.prompt", "Q: {question}"),
        ("evaluate.perplexity.wiki=w #1.txt", "evaluate.perplexity.wiki", "w #1.txt"),
        ("evaluate.perplexity={w: a.txt}", "evaluate.perplexity", {"w": "a.txt"}),
        ("lora.target_modules=*", "lora.target_modules", "*"),
        ("lora.init=lora-ga", "lora.init", "lora-ga"),
        ("lora.r=8", "lora.r", 8),
        ("train.fake_quant={weights: 4}", "train.fake_quant", {"weights": 4}),
        ("train.fake_quant.weights=4", "train.fake_quant.weights", 4),
        ("model=123", "model", "123"),
        ("seed=123", "seed", 123),
        ("steps=[merge]", "steps", ["merge"]),
    ],
)
def test_a_text_of_the_shell_is_read_as_its_field_wants_it(override: str, key: str, value: object) -> None:
    name, _, text = override.partition("=")
    assert name.endswith(key)
    got = parse_for(name.split("."), text, override)
    assert (got, type(got)) == (value, type(value))


def test_an_override_gives_keys_to_a_step_without_any(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, "model: m\nsteps: [{quantize: }]\n"), ["quantize.bits=3"])
    assert recipe.steps == (Quantize(options={"bits": 3}),)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "an override is key=value"),
        ("=1", "an override is key=value"),
        ("sed=1", "did you mean 'seed'"),
        ("quantise.bits=3", "did you mean 'quantize'"),
        ("prune.ratio=3", "an unknown key or step"),
        ("steps.9.quantize.bits=3", "no such step"),
        ("steps.x.quantize.bits=3", "no such step"),
        ("steps.0=3", "has no keys"),
        ("model.name=3", "has no keys"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_an_override_that_goes_nowhere_is_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_recipe(written(tmp_path, LONG), [override])


def test_paths_lead_to_the_recipes_folder_where_the_current_one_lacks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for folder, names in ((there, ("a.jsonl", "b.txt", "c.jsonl", "q.jsonl")), (here, ("c.jsonl",))):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    (there / "base").mkdir()
    text = """\
model: base
data: {train: a.jsonl, eval: {path: c.jsonl}, calibration: {path: nowhere.jsonl}}
steps: [{evaluate: {perplexity: {b: b.txt}, tasks: [q.jsonl, arc_easy]}}]
"""
    monkeypatch.chdir(here)
    recipe = read_recipe(written(there, text))
    evaluate = recipe.steps[0]
    assert recipe.model == str(there / "base")
    assert recipe.data.train == DataSource(path=str(there / "a.jsonl"))
    assert recipe.data.eval == DataSource(path="c.jsonl")
    assert recipe.data.calibration == DataSource(path="nowhere.jsonl")
    assert isinstance(evaluate, Evaluate)
    assert evaluate.perplexity["b"].path == str(there / "b.txt")
    assert evaluate.tasks == (str(there / "q.jsonl"), "arc_easy")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model: m\nsteps: [\nseed: {1\n", "line 4"),
        ("model: m\n\tseed: 1\n", "line 2"),
        ("model: m\nseed: !!python/object/apply:os.getcwd []\n", "line 2"),
        ("model: 'm\n", "line 2"),
    ],
)
def test_broken_yaml_names_the_file_and_the_line(tmp_path: Path, text: str, place: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError, match="not valid YAML") as caught:
        read_recipe(path)
    assert caught.value.facts["where"].startswith(f"{path}, {place}")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml, line 4, column 1(.|\n)*a second key 'model'"):
        read_recipe(written(tmp_path, f"{SHORT}model: n\n"))
    with pytest.raises(RecipeError, match=r"a second key 'bits'"):
        read_recipe(written(tmp_path, "model: m\nsteps: [{quantize: {bits: 3, bits: 4}}]\n"))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"model: \x00\n", b"caf\xe9: 1\n"])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=str(path)):
        read_recipe(path)


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n", "3\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="a mapping of keys to values"):
        read_recipe(written(tmp_path, text))


@pytest.mark.parametrize("steps", ["3", "text", "{quantize: {}}", "[3]", "[[a]]"])
def test_steps_of_any_shape_are_refused_and_not_tripped_over(tmp_path: Path, steps: str) -> None:
    with pytest.raises(RecipeError, match="steps"):
        read_recipe(written(tmp_path, f"model: m\ndata: []\nsteps: {steps}\n"), ["seed=1"])


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no such recipe(.|\n)*nowhere\.yaml"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_a_merged_mapping_may_be_named_twice() -> None:
    text = "w: {d: {e: &b {<<: &c {a: 1}, a: 2}}}\nx: {<<: *b}"
    assert parse(text) == {"w": {"d": {"e": {"a": 2}}}, "x": {"a": 2}}
    with pytest.raises(RecipeError, match="a second key 'a'"):
        parse("x: {a: 1, a: 2}")


@pytest.mark.parametrize("key", ["r", "rank"])  # PyYAML 6.0.4 tells texts apart by where they lie
def test_of_merged_mappings_the_first_counts(key: str) -> None:
    text = f"a: &a {{{key}: 1}}\nb: &b {{{key}: 2, c: 3}}\nboth: {{<<: [*a, *b]}}\nown: {{<<: [*b, *a], {key}: 4}}\n"
    found = parse(text)
    assert found["both"] == {key: 1, "c": 3} and found["own"] == {key: 4, "c": 3}
    with pytest.raises(RecipeError, match=r"line 1(.|\n)*takes other mappings"):
        parse("x: {<<: [1]}")
    with pytest.raises(RecipeError, match=r"line 1(.|\n)*takes other mappings"):
        parse("x: &a {<<: &b {<<: *a, b: 1}}")
    assert parse("a: &a {1: x}\nb: {<<: *a, '1': y}")["b"] == {1: "x", "1": "y"}
    with pytest.raises(RecipeError, match="unhashable"):
        parse("x: {[1, 2]: 3}")


def test_overrides_reach_a_step_that_is_its_name_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: {train: {builtin: pydocs}}\nsteps: [lora, train]\n")
    step = read_recipe(path, ["train.max_steps=3"]).steps[1]
    assert isinstance(step, Train) and step.max_steps == 3


def test_a_sketch_is_written_beside_the_recipe_and_read_from_where_data_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    text = "model: m\ndata: {train: d.jsonl}\nsteps:\n  - lora: {init: lora-ga, init_sketch: kept/g.safetensors}\n"
    path = written(home, text)
    (home / "d.jsonl").touch()

    def found(path: Path) -> Path:
        recipe = read_recipe(path)
        assert isinstance(recipe.steps[0], Lora) and recipe.data.train is not None
        assert Path(str(recipe.data.train.path)).parent.resolve() == home
        return Path(recipe.steps[0].init_sketch)

    monkeypatch.chdir(other)
    assert found(path) == home / "kept" / "g.safetensors"
    assert found(Path("../home/r.yaml")).resolve() == home / "kept" / "g.safetensors"
    (other / "kept").mkdir()
    (other / "kept" / "g.safetensors").touch()  # one that lies in the current folder comes first, as of data
    assert found(path) == Path("kept/g.safetensors")
    absolute = str(tmp_path / "g.safetensors")
    assert found(written(home, text.replace("kept/g.safetensors", absolute))) == Path(absolute)


@pytest.mark.parametrize("tasks", ["q.jsonl", "[q.jsonl]"])
def test_tasks_beside_the_recipe_are_found(tasks: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("{}")
    (tmp_path / "r.yaml").write_text(f"model: m\nsteps:\n  - evaluate: {{tasks: {tasks}}}\n")
    step = read_recipe(tmp_path / "r.yaml").steps[0]
    assert isinstance(step, Evaluate) and step.tasks == (str(tmp_path / "q.jsonl"),)
