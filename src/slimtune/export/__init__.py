"""The ways out: one exporter per format, each written whole, read back and compared before the step says done."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from slimtune.arch.weights import require_logits
from slimtune.errors import RecipeError, nearest
from slimtune.export.base import Exporter, Manifest, Source, Written, basis_note, largest_difference, probe_logits
from slimtune.export.compressed_tensors import CompressedTensorsExporter
from slimtune.export.decilm import DecilmExporter
from slimtune.export.gguf import ADAPTER_FILE, MODEL_FILE, GgufDeciExporter, GgufExporter, GgufLoraExporter
from slimtune.export.gptq import GptqExporter
from slimtune.export.peft import PeftExporter
from slimtune.export.safetensors import SafetensorsExporter
from slimtune.export.vllm import VllmExporter
from slimtune.files import whole_folder
from slimtune.rotate.options import FOLDED
from slimtune.rotate.record import rotation_of
from slimtune.tables import Table

EXPORTERS: Table[type[Exporter]] = Table(
    "slimtune.exporters",
    {
        "compressed-tensors": CompressedTensorsExporter,
        "decilm": DecilmExporter,
        "gguf": GgufExporter,
        "gguf-deci": GgufDeciExporter,
        "gguf-lora": GgufLoraExporter,
        "gptq": GptqExporter,
        "peft": PeftExporter,
        "safetensors": SafetensorsExporter,
        "vllm": VllmExporter,
    },
)
"""Every export format by its recipe name."""


ADAPTERS = ("peft", "gguf-lora")
"""Formats of the adapter alone, which leaves the basis of a rotated model on its way."""


def exporter_of(format: str, quantization: str = "", rank: int = 0) -> Exporter:
    """The exporter called `format`, with the type of number it writes and the rank it cuts to, where it has a choice.

    Raises `RecipeError` for an unknown format, a type that it does not write, or a choice that it does not have.
    """
    kind: Any = EXPORTERS[format]
    hints = get_type_hints(kind) if is_dataclass(kind) else {}
    chosen = {key: value for key, value in (("quantization", quantization), ("rank", rank)) if value}
    for key, value in chosen.items():
        if key not in hints:
            raise RecipeError(f"{format} takes no {key}", where=key, got=value)
    choices = get_args(hints.get("quantization"))
    if quantization and quantization not in choices:
        raise RecipeError(
            f"{format} has no such type", where="quantization", got=quantization, remedy=nearest(quantization, choices)
        )
    return cast(Exporter, kind(**chosen))


def require_free(output: Path, source: str, overwrite: bool, *, mark: str = "README.md") -> None:
    """Raise `RecipeError` for a folder that must not be replaced, since what is there is lost with it: one that is not
    empty and, by its file `mark`, not of slimtune's making; the `source`'s own; and any other without `overwrite`."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    names = ("config.json", "adapter_config.json", MODEL_FILE, ADAPTER_FILE)
    if not (output / mark).is_file() or not any((output / name).is_file() for name in names):
        raise RecipeError("the output is not empty and not an export", where=str(output), remedy="choose another one")
    if source and Path(source).expanduser().resolve().is_relative_to(output.resolve()):
        raise RecipeError("an export cannot replace its source", where=str(output), remedy="choose another output")
    if not overwrite:
        remedy = "--overwrite replaces it (in Python overwrite=True)"
        raise RecipeError("the output folder is not empty", where=str(output), remedy=remedy)


def export(source: Source, format: str, folder: Path, quantization: str = "", rank: int = 0) -> Manifest:
    """Write `source` as `format` into `folder` (replaced whole, or not at all), read it back and compare.

    Raises `RecipeError` for an unknown format or one that does not fit the model (with online transforms that weights
    undo, all but the adapter's and `vllm`: no other engine runs them), `FormatError` when what was read back computes
    something else.
    """
    exporter = exporter_of(format, quantization, rank)
    basis = rotation_of(source.model)
    folded = FOLDED.intersection(basis.rotation.online) if basis is not None else set()
    if format not in (*ADAPTERS, "vllm") and folded:
        raise RecipeError(
            "no other engine runs the model's online transforms: it would load another model",
            where=format,
            got=", ".join(sorted(folded)),
            remedy="rotate with online: [], or export the adapter with format: peft; r4 in blocks can leave as vllm",
        )
    wanted = probe_logits(source.model)
    require_logits(source.model, wanted)
    with whole_folder(folder) as partial:
        written = exporter.write(source, partial) or Written(dtype=source.dtype)
        try:
            got = probe_logits(exporter.read_back(source, partial))
        finally:
            exporter.restore_(source)
        difference = largest_difference(got, wanted, written.dtype, str(folder))
        notes = written.note.format(difference=difference)
        turned = basis_note(source.model, source.name, adapter=format in ADAPTERS)
        readme = exporter.loads_in.format(name=source.name) + turned + source.note + notes
        (partial / "README.md").write_text(readme, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Manifest(
        format=format,
        path=str(folder),
        files=tuple(str(path.relative_to(folder)) for path in files),
        bytes=sum(path.stat().st_size for path in files),
        max_logit_difference=difference,
        facts=written.facts,
    )


__all__ = ["EXPORTERS", "Exporter", "Manifest", "Source", "Written", "export", "exporter_of", "require_free"]
