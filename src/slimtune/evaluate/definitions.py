"""Tasks that a user defines in lm-eval's YAML, over local files: read here, checked, and only then given to lm-eval.

lm-eval runs what a definition names: functions (`!function`), classes, metrics that are fetched, pickled data sets, and
templates that reach into Python. Nothing here does: such a definition is refused, the templates are filled in by
Jinja's sandbox, and the copy that lm-eval reads is what was checked. Data comes from files of this machine alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import CalibrationError, FormatError

DEFINITIONS = (".yaml", ".yml")
READERS = ("json", "csv", "parquet", "text")
"""The loaders of `datasets` that read plain local files: another name is a data set of the hub, or holds pickles."""

METRICS = (
    *("acc", "acc_norm", "acc_mutual_info", "acc_bytes", "exact_match", "f1", "mcc", "brier_score", "bleu", "chrf"),
    *("ter", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
)
"""The metrics that lm-eval computes itself: any other it loads as a script."""

RUNS_CODE = ("class", "custom_dataset", "process_docs", "process_results", "unsafe_code", "use_prompt")
GROUP = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag")


class _Loader(yaml.SafeLoader):
    """Plain values; `!function` is refused by name."""


def _refuse_function(_: yaml.SafeLoader, node: yaml.Node) -> None:
    mark = node.start_mark
    raise _runs_code(f"{mark.name}, line {mark.line + 1}", f"!function {node.value}")


_Loader.add_constructor("!function", _refuse_function)


def is_definition(name: str) -> bool:
    """Whether a task of this name is meant as a YAML file."""
    return name.endswith(DEFINITIONS)


def definitions(path: Path) -> dict[str, dict[str, Any]]:
    """The configs that a YAML file of lm-eval defines, by name: the file's own first, then those of a group's tasks.

    `include:` is merged in and data files are whole paths; a relative one is looked for in the current folder, then in
    that of `path`. The tasks of a group stand in YAML files beside it. Raises `FormatError` for a file that is no
    definition or would run code, and `CalibrationError` for data that are no local files.
    """
    found: dict[str, dict[str, Any]] = {}
    _collect(path, _merged(path), found)
    return found


@contextmanager
def included(configs: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Folders in which lm-eval finds `configs`, and its templates kept in Jinja's sandbox as long as they are there."""
    if not configs:
        yield []
        return
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    free = utils.env
    kept = SandboxedEnvironment(
        loader=free.loader, undefined=free.undefined, keep_trailing_newline=free.keep_trailing_newline
    )
    kept.filters.update(free.filters)
    with tempfile.TemporaryDirectory() as folder:
        for number, config in enumerate(configs.values()):
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
            (Path(folder) / f"{number}.yaml").write_text(text, encoding="utf-8")
        utils.env = kept
        try:
            yield [folder]
        finally:
            utils.env = free


def _collect(path: Path, config: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    """Add to `found` what `config`, read from `path`, defines."""
    name, tasks = _name(config), config.get("task")
    if not name:
        raise FormatError("a task file names no task", where=str(path), wanted="`task: a_name_of_yours`")
    if "group" not in config:
        found[name] = _checked(path, config)
        return
    if strange := ", ".join(sorted(map(str, config.keys() - set(GROUP)))):
        raise FormatError("a group's file has keys of tasks", where=str(path), got=strange, wanted=", ".join(GROUP))
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise FormatError("a group lists the names of its tasks", where=f"{path}, task", got=tasks)
    found[name] = config
    beside: dict[str, tuple[Path, dict[str, Any]]] = {}
    bad = []
    for file in sorted(file for file in path.parent.iterdir() if file.is_file() and is_definition(file.name)):
        try:
            other = _merged(file)
            beside.setdefault(_name(other), (file, other))
        except FormatError as error:
            bad.append(error)
    for task in tasks:
        if task not in beside:
            missing = "a group's tasks are defined in YAML files beside it"
            raise bad[0] if bad else FormatError(missing, where=str(path), got=task, wanted=", ".join(sorted(beside)))
        if task not in found:
            _collect(*beside[task], found)


def _name(config: Mapping[str, Any]) -> str:
    name = config.get("group", config.get("task"))
    return name if isinstance(name, str) else ""


def _merged(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a file over those it includes, as lm-eval merges them."""
    path = path.absolute()
    if path in above:
        raise FormatError("task files include each other", where=str(path))
    try:
        with path.open("rb") as file:
            config = yaml.load(file, Loader=_Loader)  # a SafeLoader that refuses one tag more clearly
    except OSError as error:
        raise FormatError("a task file cannot be read", where=str(above[-1] if above else path), got=error) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise FormatError("not valid YAML", where=str(path), got=" ".join(str(error).split())) from error
    if not isinstance(config, dict):
        raise FormatError("a task file is a mapping of keys to values", where=str(path), got=type(config).__name__)
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        merged |= _merged(path.parent / str(name), (*above, path))
    return merged | config


def _checked(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config of one task with whole paths, or an error where it would run code, or read what is not at hand."""
    if key := next((key for key in RUNS_CODE if config.get(key)), None):
        raise _runs_code(f"{path}, {key}", config[key])
    metrics = config.get("metric_list") or []
    for metric in metrics if isinstance(metrics, list) else [metrics]:
        name = metric.get("metric") if isinstance(metric, dict) else metric
        if name not in METRICS or (isinstance(metric, dict) and metric.get("hf_evaluate")):
            wanted = ", ".join(METRICS)
            raise FormatError("not a metric of lm-eval's own", where=f"{path}, metric_list", got=name, wanted=wanted)
    if (reader := config.get("dataset_path")) not in READERS:
        raise CalibrationError(
            "a task's data are local files",
            where=f"{path}, dataset_path",
            got=reader,
            wanted=f"{', '.join(READERS)}, and `dataset_kwargs: {{data_files: {{test: FILE}}}}`",
            remedy="save the rows in a file; slimtune does not fetch data for a YAML file",
        )
    kwargs = config.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    splits = files if isinstance(files, dict) else {"train": files}  # as `datasets` names them
    asked = config.get("test_split") or config.get("validation_split")
    if asked not in splits:
        raise FormatError(
            "a task asks a split that its data have not",
            where=f"{path}, test_split",
            got=asked or "none",
            wanted=", ".join(map(str, splits)),
        )
    local = {split: _files(path, value) for split, value in splits.items()}
    return {**config, "dataset_kwargs": {**(kwargs or {}), "data_files": local}}


def _files(path: Path, value: object) -> list[str]:
    """Whole paths of the files of one split."""
    names = value if isinstance(value, list) else [value]
    files = [next((f for f in (Path(str(n)), path.parent / str(n)) if n and f.is_file()), None) for n in names]
    if not names or None in files:
        got = value if not names else names[files.index(None)]
        raise CalibrationError(
            "a task's data file is not there",
            where=f"{path}, data_files",
            got=got or "none",
            wanted=f"a file in the current folder or in {path.parent}",
        )
    return [str(file.absolute()) for file in files if file]


def _runs_code(where: str, got: object) -> FormatError:
    return FormatError(
        "a task file that runs code",
        where=where,
        got=got,
        wanted="names of columns and Jinja templates",
        remedy="write the rows as they are to be asked into a file; slimtune runs no code that comes with data",
    )
