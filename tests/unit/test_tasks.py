"""Tasks: rows to multiple choice, files to lm-eval tasks, and lm-eval's accuracy against a loop written out."""

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slimtune.errors import BackendMissing, CalibrationError, FormatError, RecipeError
from slimtune.evaluate.tasks import TaskResult, local_task, multiple_choice, tasks


def adapters(instruction: str, answer: str, given: str = "") -> dict[str, str]:
    """A row as LLM-Adapters writes it."""
    output = f"the correct answer is {answer}"
    return {"instruction": instruction, "input": given, "output": output, "answer": answer}


ARC = adapters(
    "Please choose the correct answer to the question: Which is hot: ice_cream or lava?\n\n"
    "Answer1: ice Answer2: a flow of lava. Answer3: snow\n\nAnswer format: answer1/answer2/answer3",
    "answer2",
)
PIQA = adapters(
    "Please choose the correct solution to the question: dresser\n\nSolution1: a bobby pin \n\n"
    "Solution2: finish, woodgrain with  bobby pin \n\nAnswer format: solution1/solution2",
    "solution2",
)
BOOLQ = adapters(
    "Please answer the following question with true or false, question: is it 1/2?\n\nAnswer format: true/false",
    "false",
)
WINOGRANDE = adapters(
    "Please choose the correct answer to fill in the blank to complete the given sentence: Ann thanked Eve because _ "
    "had helped.\n\nOption1: Ann Option2: Eve Answer format: option1/option2",
    "option2",
)
HELLASWAG = adapters(
    "Please choose the correct ending to complete the given sentence: Cooking: A man\n\n"
    "Ending1: stirs. Ending2: flies. Answer format: ending1/ending2",
    "ending1",
)


def test_listed_answers_are_scored_by_their_texts() -> None:
    assert multiple_choice(ARC) == {
        "query": "Question: Which is hot: ice_cream or lava?\nAnswer:",
        "choices": ["ice", "a flow of lava.", "snow"],
        "gold": 1,
    }
    assert multiple_choice(PIQA) == {
        "query": "Question: dresser\nAnswer:",
        "choices": ["a bobby pin", "finish, woodgrain with  bobby pin"],
        "gold": 1,
    }


def test_answers_that_are_not_listed_are_their_labels() -> None:
    assert multiple_choice(BOOLQ) == {
        "query": "Question: is it 1/2?\nAnswer:",
        "choices": ["true", "false"],
        "gold": 1,
    }


def test_a_blank_is_filled_and_the_rest_of_the_sentence_scored() -> None:
    assert multiple_choice(WINOGRANDE) == {
        "contexts": ["Ann thanked Eve because Ann", "Ann thanked Eve because Eve"],
        "ending": "had helped.",
        "gold": 1,
    }


def test_a_sentence_is_continued_as_it_stands() -> None:
    assert multiple_choice(HELLASWAG) == {"query": "Cooking: A man", "choices": ["stirs.", "flies."], "gold": 0}


def test_a_generic_row_takes_an_index_or_a_text() -> None:
    row = {"question": "2 + 2?", "choices": ["3", "0", "4"]}
    wanted = {"query": "Question: 2 + 2?\nAnswer:", "choices": ["3", "0", "4"]}
    assert multiple_choice({**row, "answer": 2}) == {**wanted, "gold": 2}
    assert multiple_choice({**row, "answer": "4"}) == {**wanted, "gold": 2}
    assert multiple_choice({**row, "answer": "0"}) == {**wanted, "gold": 1}, "a text that looks like an index is a text"


MMLU = {"question": "Which is\nhot? ", "subject": "high_school_physics", "choices": ["ice", " lava"], "answer": 1}


def test_a_row_with_a_subject_is_asked_as_mmlu_is() -> None:
    text = (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "Which is\nhot?\nA. ice\nB. lava\nAnswer:"
    )
    assert multiple_choice(MMLU) == {"query": text, "choices": ["A", "B"], "gold": 1}
    assert multiple_choice({**MMLU, "answer": "B"}) == multiple_choice(MMLU)
    with pytest.raises(CalibrationError):
        multiple_choice({**MMLU, "answer": "C"})
    generic = {"question": "Hot?", "subject": "physics", "choices": ["ice", "lava"], "answer": "lava"}
    assert multiple_choice(generic)["choices"] == ["ice", "lava"], "an answer in words is no letter"


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_the_files_of_mmlus_authors(tmp_path: Path, ending: str) -> None:
    text = '"Which is\nhot? ",ice, lava,B\r\n\r\n"one ""\u2028"" two",1,2,A\r\n'
    path = tmp_path / f"high_school_physics_test{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    config = local_task(path)
    assert config["task"] == "high_school_physics_test"
    assert [metric["metric"] for metric in config["metric_list"]] == ["acc"], "letters are of one length"
    first, second = config["custom_dataset"]()["test"]
    assert first == multiple_choice(MMLU)
    assert 'one "\u2028" two\nA. 1\nB. 2\nAnswer:' in second["query"]
    for bad in ("alone\n", 'a,b,c\n"open,b,c'):
        (tmp_path / "bad.csv").write_text(bad)
        with pytest.raises(FormatError, match=r"bad\.csv"):
            local_task(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    "row",
    [
        "a text",
        None,
        {},
        {"question": "?", "answer": 0},
        {"question": "?", "choices": ["one"], "answer": 0},
        {"question": "?", "choices": ["a", "b"], "answer": 2},
        {"question": "?", "choices": ["a", "b"], "answer": -1},
        {"question": "?", "choices": ["a", "b"], "answer": True},
        {"question": "?", "choices": ["a", "b"], "answer": "c"},
        {"question": "?", "choices": ["a", " "], "answer": 0},
        {"question": "?", "choices": ["a", 1], "answer": 0},
        {**ARC, "answer": "answer4"},
        {**ARC, "input": "more to read"},
        {**ARC, "instruction": ARC["instruction"].replace("Answer3: ", "")},
        {**WINOGRANDE, "instruction": WINOGRANDE["instruction"].replace("_", "she")},
        adapters("How many eggs? 1/2 of 36.", "18.0"),
    ],
)
def test_any_other_row_is_refused(row: Any) -> None:
    with pytest.raises(CalibrationError, match="here, row 3"):
        multiple_choice(row, where="here, row 3")


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
def test_a_file_becomes_a_task(tmp_path: Path, ending: str) -> None:
    rows = [ARC, PIQA, HELLASWAG, {"question": "line\u2028separator?", "choices": ["a", "b"], "answer": 0}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    text = lines if "jsonl" in ending else json.dumps(rows, indent=1)
    path = tmp_path / f"my.set{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    config = local_task(path)
    assert config["task"] == "my.set"
    assert config["output_type"] == "multiple_choice"
    assert (config["doc_to_text"], config["doc_to_choice"], config["doc_to_target"]) == ("query", "choices", "gold")
    assert [metric["metric"] for metric in config["metric_list"]] == ["acc", "acc_norm"]
    assert config["fewshot_split"] == config["test_split"], "lm-eval then leaves the asked row out of its examples"
    assert list(config["custom_dataset"]()[config["test_split"]]) == [multiple_choice(row) for row in rows]


def test_a_set_of_blanks_scores_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "blanks.json"
    path.write_text(json.dumps([WINOGRANDE]))
    config = local_task(path)
    assert (config["doc_to_text"], config["doc_to_choice"], config["doc_to_target"]) == ("gold", "contexts", "ending")
    assert [metric["metric"] for metric in config["metric_list"]] == ["acc"], "contexts have no length to divide by"


def test_a_set_has_an_example_more_than_its_examples(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps([ARC, PIQA]))
    local_task(path, num_fewshot=1)
    with pytest.raises(RecipeError, match="2 rows"):
        local_task(path, num_fewshot=2)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    for content, error, message in [
        (b"[{]", FormatError, "not a file of questions"),
        (b"\xff\xfe", FormatError, "not a file of questions"),
        (b"[]", CalibrationError, "without rows"),
        (b"", CalibrationError, "without rows"),
        (json.dumps([ARC, WINOGRANDE]).encode(), CalibrationError, "not both"),
        (json.dumps([ARC, {}]).encode(), CalibrationError, "row 2"),
    ]:
        path.write_bytes(content)
        with pytest.raises(error, match=message) as caught:
            local_task(path)
        assert str(path) in str(caught.value)
    packed = tmp_path / "set.json.gz"
    whole = gzip.compress(json.dumps([ARC] * 50).encode())
    for content in (b"[]", whole[:-9], whole[:20] + b"\xff\xff\xff" + whole[23:]):
        packed.write_bytes(content)
        with pytest.raises(FormatError, match=r"set\.json\.gz"):
            local_task(packed)


def test_without_lm_eval_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pico()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BackendMissing, match=r"slimtune\[eval\]"):
        tasks(model, tokenizer, ["arc_easy"])


# Below: with lm-eval.

WITHOUT = "lm-eval is an optional package: slimtune[eval]"


def pico() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random model of bytes, and a tokenizer without merges, so that a choice has the same tokens in any context."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.normal_()
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def likelihood(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: str, continuation: str) -> float:
    """Log-likelihood of `continuation` after `context`, token by token."""
    asked = tokenizer(context).input_ids
    total = 0.0
    for token in tokenizer(continuation).input_ids:
        with torch.no_grad():
            total += torch.log_softmax(model(torch.tensor([asked])).logits[0, -1].double(), -1)[token].item()
        asked = [*asked, token]
    return total


QUESTIONS = [
    {"question": f"{a} + {b}?", "choices": [str(a + b), f"not {a}", f"more than {a * b}", "none of these"]}
    for a, b in [(1, 2), (3, 4), (5, 6), (2, 7), (8, 1), (9, 9)]
]
NAMES = [("Ann", "Eve"), ("Bob", "Tom"), ("Ida", "Zoe"), ("Max", "Leo")]


def answered(best: list[int], right: int, choices: int) -> list[int]:
    """Answers of which the model, which prefers `best`, gets the first `right` right and the others wrong."""
    return [index if number < right else (index + 1) % choices for number, index in enumerate(best)]


def accuracy(results: list[TaskResult]) -> dict[tuple[str, str], float]:
    return {(result.task, result.metric): result.value for result in results}


def test_accuracy_of_a_local_set_equals_the_loop(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=WITHOUT)
    model, tokenizer = pico()
    scores = [
        [likelihood(model, tokenizer, f"Question: {row['question']}\nAnswer:", f" {text}") for text in row["choices"]]
        for row in QUESTIONS
    ]
    gold = answered([row.index(max(row)) for row in scores], right=4, choices=4)
    by_length = [
        [score / len(text) for score, text in zip(row, question["choices"], strict=True)]
        for row, question in zip(scores, QUESTIONS, strict=True)
    ]
    normed = sum(row.index(max(row)) == answer for row, answer in zip(by_length, gold, strict=True)) / 6
    assert normed != 4 / 6, "the two measures must differ for this test to tell them apart"
    rows = [{**row, "answer": answer} for row, answer in zip(QUESTIONS, gold, strict=True)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))

    model.train()
    states = torch.get_rng_state(), random.getstate()
    results = tasks(model, tokenizer, [str(tmp_path / "sums.jsonl")], batch_size=4)
    assert accuracy(results) == {("sums", "acc"): 4 / 6, ("sums", "acc_norm"): normed}
    assert all(result.samples == 6 for result in results)
    # The standard error of the mean of 6 samples, 4 of them 1: sqrt(p (1 - p) / 5).
    assert results[0].stderr == pytest.approx((4 / 6 * 2 / 6 / 5) ** 0.5)
    assert all(part.training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert tokenizer.pad_token is None, "the tokenizer given is not the one lm-eval sets up"


def test_a_folder_is_the_sets_in_it_and_limit_takes_the_first_rows(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=WITHOUT)
    model, tokenizer = pico()
    best = []
    for pair in NAMES:
        ending = [likelihood(model, tokenizer, f"{pair[0]} saw {pair[1]} as {name}", " came by.") for name in pair]
        best.append(ending.index(max(ending)))
    instruction = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    rows = [
        adapters(
            f"{instruction}{one} saw {two} as _ came by.\n\nOption1: {one} Option2: {two} "
            "Answer format: option1/option2",
            f"option{answer + 1}",
        )
        for (one, two), answer in zip(NAMES, answered(best, right=1, choices=2), strict=True)
    ]
    (tmp_path / "blanks.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "sums.json").write_text(json.dumps([{**row, "answer": 0} for row in QUESTIONS]))
    (tmp_path / "readme.txt").write_text("no questions here")
    results = tasks(model, tokenizer, [str(tmp_path)])
    assert accuracy(results)["blanks", "acc"] == 1 / 4
    mean = f"{tmp_path.name}_mean"
    assert {(result.task, result.metric) for result in results} == {
        ("blanks", "acc"),
        ("sums", "acc"),
        ("sums", "acc_norm"),
        (mean, "acc"),
    }
    assert accuracy(results)[mean, "acc"] == (1 / 4 + accuracy(results)["sums", "acc_norm"]) / 2
    assert results[-1].samples == 10
    assert accuracy(results)["sums", "acc"] != accuracy(results)["sums", "acc_norm"]
    first = tasks(model, tokenizer, [str(tmp_path / "blanks.json.gz")], limit=1)
    assert first == [TaskResult("blanks", "acc", 1.0, None, 1)], "one sample has no standard error"


def test_the_harness_does_not_look_for_git_or_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("lm_eval", reason=WITHOUT)
    model, tokenizer = pico()
    (tmp_path / "sums.json").write_text(json.dumps([{**row, "answer": 0} for row in QUESTIONS]))
    monkeypatch.chdir(tmp_path)  # no repository
    called: list[Any] = []
    monkeypatch.setattr("subprocess.check_output", lambda *given, **_: called.append(given))
    assert tasks(model, tokenizer, ["sums.json"])
    said = capfd.readouterr()
    assert not called and "fatal" not in said.err + said.out
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]


def test_examples_stand_before_each_question(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=WITHOUT)
    model, tokenizer = pico()
    (tmp_path / "sums.json").write_text(json.dumps([{**row, "answer": 0} for row in QUESTIONS]))
    read: list[str] = []
    model.register_forward_pre_hook(lambda _, given: read.extend(map(tokenizer.decode, given[0])))
    results = tasks(model, tokenizer, [str(tmp_path / "sums.json")], num_fewshot=5)
    assert [result.samples for result in results] == [6, 6]
    assert all(text.count("Question: ") == 6 for text in read)
    assert all(text.count(row["question"]) == 1 for text in read for row in QUESTIONS), "an example is the row asked"


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each run asked for the index of lm-eval's own tasks: 14,000 files that take seconds, and are left out."""
    module = pytest.importorskip("lm_eval.tasks", reason=WITHOUT)
    manager, asked = module.TaskManager, []

    def small(include_path: str | None, include_defaults: bool) -> Any:
        asked.append(include_defaults)
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(module, "TaskManager", small)
    return asked


@pytest.mark.usefixtures("indexed")
def test_names_and_counts_that_cannot_work_are_refused(tmp_path: Path) -> None:
    model, tokenizer = pico()
    (tmp_path / "readme.txt").write_text("no questions here")
    for name in (tmp_path, tmp_path / "readme.txt", tmp_path / "nowhere.json"):
        with pytest.raises(RecipeError, match="lm_eval ls tasks"):
            tasks(model, tokenizer, [str(name)])
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sums.json").write_text(json.dumps([{**QUESTIONS[0], "answer": 0}]))
    with pytest.raises(RecipeError, match="same name"):
        tasks(model, tokenizer, [str(tmp_path / folder) for folder in ("one", "two")])
    for counts in ({"limit": 0}, {"num_fewshot": -1}, {"num_fewshot": 1}, {"batch_size": 0}):
        with pytest.raises(RecipeError, match=next(iter(counts))):
            tasks(model, tokenizer, [str(tmp_path / "one")], **counts)
    assert tasks(model, tokenizer, []) == []


def test_a_task_of_ones_own_yaml(tmp_path: Path, indexed: list[bool]) -> None:
    model, tokenizer = pico()
    text = (
        "dataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    )
    (tmp_path / "sums.data").write_text("\n".join(json.dumps({**row, "answer": 0}) for row in QUESTIONS))
    for name in ("sums", "lost"):
        kwargs = f"dataset_kwargs: {{data_files: {{test: {tmp_path}/{name}.data}}, cache_dir: {tmp_path}/cache}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}_of_mine\n{text}{kwargs}")
    results = tasks(model, tokenizer, ["sums_of_mine"], include_path=tmp_path)
    assert {(result.task, result.metric, result.samples) for result in results} == {
        ("sums_of_mine", "acc", 6),
        ("sums_of_mine", "acc_norm", 6),
    }
    with pytest.raises(CalibrationError, match="lost_of_mine"):
        tasks(model, tokenizer, ["lost_of_mine"], include_path=tmp_path)
    with pytest.raises(RecipeError, match="did you mean sums_of_mine"):
        tasks(model, tokenizer, ["sums_of_mime"], include_path=tmp_path)
    (tmp_path / "local.json").write_text(json.dumps([{**row, "answer": 0} for row in QUESTIONS]))
    tasks(model, tokenizer, [str(tmp_path / "local.json")], limit=1)
    assert indexed == [True, True, True, False], "a local file needs no index"
