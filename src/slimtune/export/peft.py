"""The adapter alone, as a stock PEFT folder."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, cast

from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from slimtune.errors import FormatError, RecipeError
from slimtune.export.base import Source

REREAD = "read-back"


class PeftExporter:
    """`adapter_config.json` and `adapter_model.safetensors`, for the original 16-bit model."""

    loads_in: ClassVar[str] = (
        "A stock PEFT adapter for `{name}`.\n\n"
        "- transformers + PEFT: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{name}'), FOLDER)`\n"
        "- vLLM: `--enable-lora --lora-modules mine=FOLDER` (linear targets of the language model only)\n"
        "- it was trained on the base as quantized by the run it comes from; on the 16-bit base too\n"
    )

    def write(self, source: Source, folder: Path) -> None:
        """Write the active adapter."""
        if not isinstance(source.model, PeftModel):
            raise RecipeError("there is no adapter to export", remedy="export safetensors instead, or add a lora step")
        # Only linears are adapted. Left to itself, PEFT asks the hub whether the vocabulary has grown.
        source.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """`source`'s model with the written adapter in place of its own. Every tensor must be finite."""
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            if not bool(tensor.isfinite().all()):
                raise FormatError("the adapter has values that are not finite", where=name)
        model = cast(PeftModel, source.model)
        model.load_adapter(str(folder), REREAD, low_cpu_mem_usage=False)
        model.set_adapter(REREAD)
        return model

    def restore_(self, source: Source) -> None:
        """Make the model's own adapter the active one again."""
        model = cast(PeftModel, source.model)
        if REREAD in model.peft_config:
            model.set_adapter("default")
            model.delete_adapter(REREAD)
