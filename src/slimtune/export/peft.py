"""The adapter alone, as a stock PEFT folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, cast

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from slimtune.arch import bind
from slimtune.errors import FormatError, RecipeError
from slimtune.export.base import Source
from slimtune.lora.attach import save_adapter
from slimtune.lora.basis import converted
from slimtune.rotate.record import JSON, rotation_of

REREAD = "read-back"
TENSORS = "adapter_model.safetensors"


class PeftExporter:
    """`adapter_config.json` and `adapter_model.safetensors`, for the original 16-bit model."""

    loads_in: ClassVar[str] = (
        "A stock PEFT adapter for `{name}`.\n\n"
        "- transformers + PEFT: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{name}'), FOLDER)`\n"
        "- vLLM: `--enable-lora --lora-modules mine=FOLDER` (linear targets of the language model only)\n"
        "- it was trained on the base as quantized by the run it comes from; on the 16-bit base too\n"
    )

    def write(self, source: Source, folder: Path) -> None:
        """Write the active adapter; that of a rotated model in the basis of the original one."""
        if not isinstance(source.model, PeftModel):
            raise RecipeError("there is no adapter to export", remedy="export safetensors instead, or add a lora step")
        save_adapter(source.model, folder)
        if rotation_of(source.model) is not None:
            (folder / JSON).unlink()
            _convert_(folder, source, inverse=True)

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """`source`'s model with the written adapter in place of its own. Every tensor must be finite."""
        for name, tensor in load_file(folder / TENSORS).items():
            if not bool(tensor.isfinite().all()):
                raise FormatError("the adapter has values that are not finite", where=name)
        model = cast(PeftModel, source.model)
        with TemporaryDirectory() as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            if rotation_of(model) is not None:
                _convert_(Path(copy), source, inverse=False)
            model.load_adapter(copy, REREAD, low_cpu_mem_usage=False)
        model.set_adapter(REREAD)
        return model

    def restore_(self, source: Source) -> None:
        """Make the model's own adapter the active one again."""
        model = cast(PeftModel, source.model)
        if REREAD in model.peft_config:
            model.set_adapter("default")
            model.delete_adapter(REREAD)


def _convert_(folder: Path, source: Source, *, inverse: bool) -> None:
    """Bring the adapter in `folder` to the basis of `source`'s rotated model, or with `inverse` to the original one."""
    basis = rotation_of(source.model)
    assert basis is not None, "the caller has asked"
    tensors = converted(load_file(folder / TENSORS), bind(source.model), basis, inverse=inverse)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
