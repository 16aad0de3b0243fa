"""The ways out: one exporter per format, each written whole, read back and compared before the step says done."""

from __future__ import annotations

from pathlib import Path

from slimtune.errors import RecipeError
from slimtune.export.base import Exporter, Manifest, Source, largest_difference, probe_logits
from slimtune.export.compressed_tensors import CompressedTensorsExporter
from slimtune.export.gptq import GptqExporter
from slimtune.export.peft import PeftExporter
from slimtune.export.safetensors import SafetensorsExporter
from slimtune.files import whole_folder
from slimtune.rotate.record import rotation_of
from slimtune.tables import Table

EXPORTERS: Table[type[Exporter]] = Table(
    "slimtune.exporters",
    {
        "compressed-tensors": CompressedTensorsExporter,
        "gptq": GptqExporter,
        "peft": PeftExporter,
        "safetensors": SafetensorsExporter,
    },
)
"""Every export format by its recipe name."""


def export(source: Source, format: str, folder: Path) -> Manifest:
    """Write `source` as `format` into `folder` (replaced whole, or not at all), read it back and compare.

    Raises `RecipeError` for an unknown format or one that does not fit the model (with online transforms, all but the
    adapter's: no other engine runs them), `FormatError` when what was read back
    computes something else.
    """
    exporter = EXPORTERS[format]()
    basis = rotation_of(source.model)
    if format != "peft" and basis is not None and basis.rotation.online:
        raise RecipeError(
            "no other engine runs the model's online transforms: it would load another model",
            where=format,
            got=", ".join(basis.rotation.online),
            remedy="rotate with online: [], or export the adapter with format: peft",
        )
    wanted = probe_logits(source.model)
    with whole_folder(folder) as partial:
        exporter.write(source, partial)
        (partial / "README.md").write_text(exporter.loads_in.format(name=source.name), encoding="utf-8")
        try:
            got = probe_logits(exporter.read_back(source, partial))
        finally:
            exporter.restore_(source)
        difference = largest_difference(got, wanted, source.dtype, str(folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Manifest(
        format=format,
        path=str(folder),
        files=tuple(str(path.relative_to(folder)) for path in files),
        bytes=sum(path.stat().st_size for path in files),
        max_logit_difference=difference,
    )


__all__ = ["EXPORTERS", "Exporter", "Manifest", "Source", "export"]
