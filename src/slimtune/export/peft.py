"""The adapter alone, as a stock PEFT folder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, cast

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import pad

from slimtune.arch import bind
from slimtune.errors import FormatError, RecipeError
from slimtune.export.base import Source, Written
from slimtune.files import whole_folder, write_json
from slimtune.lora.attach import LIVE, adapted, save_adapter
from slimtune.lora.basis import FACTOR_A, FACTOR_B, PREFIX, converted
from slimtune.lora.cut import Update, cut_all, require_rank, updates
from slimtune.quant.blackbox import FROZEN
from slimtune.rotate.basis import Basis
from slimtune.rotate.record import JSON, read_hash, rotation_of, write_hash

REREAD = "read-back"
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SERVED = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that every version of vLLM takes for `--max-lora-rank`."""
QUANTIZED = "- it was trained on this base as quantized by the run it comes from, and is for the 16-bit one too\n"


@dataclass(frozen=True)
class PeftExporter:
    """`adapter_config.json` and `adapter_model.safetensors`, for the base that the source names."""

    loads_in: ClassVar[str] = (
        "A stock PEFT adapter for `{name}`.\n\n"
        "- transformers + PEFT: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{name}'), FOLDER)`\n"
        "- vLLM: `--enable-lora --lora-modules mine=FOLDER` (linear targets of the language model only)\n"
    )

    rank: int = field(default=0, metadata={"help": "cut every update to this rank; 0: do not"})

    def write(self, source: Source, folder: Path) -> Written:
        """Write the active adapter; that of a rotated model in the basis of the original one."""
        if not isinstance(source.model, PeftModel):
            raise RecipeError("there is no adapter to export", remedy="export safetensors instead, or add a lora step")
        rank = write_even(source.model, folder, source.name)
        if (basis := rotation_of(source.model)) is not None:
            (folder / JSON).unlink()
            _convert_(folder, source.model, basis, inverse=True)
        note = QUANTIZED if any(isinstance(module, FROZEN) for module in source.model.modules()) else ""
        if not self.rank:
            return Written(dtype=source.dtype, note=served(rank) + note)
        found = updates(source.model)
        require_rank(found, self.rank)
        kept, lost = cut_all(found, self.rank)
        _replace(folder, kept, self.rank)
        (folder / LIVE).unlink(missing_ok=True)
        moved = "\nOn a short text, logits are up to {difference:.3g} away from those of the whole adapter.\n"
        return Written(lost.to_dict(), note=served(self.rank) + note + lost.note + moved)

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """`source`'s model with the written adapter in place of its own. Every tensor must be finite, and one that was
        cut be what it was cut to."""
        for name, tensor in load_file(folder / TENSORS).items():
            if not bool(tensor.isfinite().all()):
                raise FormatError("the adapter has values that are not finite", where=name)
        model = cast(PeftModel, source.model)
        with TemporaryDirectory() as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            if (basis := rotation_of(model)) is not None:
                _convert_(Path(copy), model, basis, inverse=False)
            exact = cut_all(updates(model), self.rank)[0] if self.rank else []
            model.load_adapter(copy, REREAD, low_cpu_mem_usage=False)
        model.set_adapter(REREAD)
        for wanted, found in zip(exact, updates(model) if exact else [], strict=True):
            if wanted.minus(found).size > 1e-4 * wanted.size:
                raise FormatError("an adapter that was cut does not read back", where=wanted.name)
        return model

    def restore_(self, source: Source) -> None:
        """Make the model's own adapter the active one again."""
        model = cast(PeftModel, source.model)
        if REREAD in model.peft_config:
            model.set_adapter("default")
            model.delete_adapter(REREAD)


def rotate_adapter(model: nn.Module, adapter: Path, output: Path) -> None:
    """Write the PEFT adapter in the folder `adapter`, trained on the original model, for the rotated `model` to the
    folder `output` (whole, or not at all).

    Raises `RecipeError` where `model` is not rotated, `FormatError` where the folder has no adapter, one that does not
    fit, or one of a rotated model.
    """
    basis = rotation_of(model)
    if basis is None:
        raise RecipeError("the model is not rotated", remedy="load the adapter on it as it is")
    if not (adapter / CONFIG).is_file() or not (adapter / TENSORS).is_file():
        raise FormatError("not an adapter folder", where=str(adapter), wanted=f"{CONFIG} and {TENSORS}")
    if (held := read_hash(adapter)) is not None:
        what, remedy = "the adapter is in the basis of a rotated model already", "export it from there: format: peft"
        raise FormatError(what, where=str(adapter), got=f"rotation {held[:12]}", wanted="no rotation", remedy=remedy)
    with whole_folder(output) as partial:
        for name in (CONFIG, TENSORS, LIVE):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, partial / name)
        _convert_(partial, model, basis, inverse=False)
        write_hash(basis, partial)


def _convert_(folder: Path, model: nn.Module, basis: Basis, *, inverse: bool) -> None:
    """Bring the adapter in `folder` to the `basis` of the rotated `model`, or with `inverse` to the original one."""
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError("the adapter's file is damaged", where=str(folder), got=str(error)[:200]) from error
    tensors = converted(tensors, bind(model), basis, inverse=inverse)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def write_even(model: PeftModel, folder: Path, base_name: str = "") -> int:
    """`save_adapter` for engines that know one rank and one scaling (vLLM drops `rank_pattern` and `alpha_pattern`, and
    multiplies every layer by `lora_alpha / r`): PEFT computes the same from what is written. Returns the rank."""
    save_adapter(model, folder, base_name)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not config["rank_pattern"] and not config["alpha_pattern"]:
        return int(config["r"])
    tensors, own = load_file(folder / TENSORS), []
    for name, layer in adapted(model).items():
        a, b = (tensors.get(PREFIX + name + leaf) for leaf in (FACTOR_A, FACTOR_B))
        if a is None or b is None:
            raise FormatError("only plain LoRA factors can be written so", where=name)
        own.append(Update(name, a, b, float(layer.scaling[model.active_adapters[0]])))
    rank = max(len(update.a) for update in own)
    _replace(folder, own, rank)
    return rank


def served(rank: int, whose: str = "its") -> str:
    """What a README says of an adapter of `rank`: the option that a vLLM server needs for it."""
    enough = next((value for value in SERVED if value >= rank), 0)
    if not enough:
        return (
            f"- {whose} rank is {rank}: vLLM serves none above {SERVED[-1]}; export it with a lower `rank` for that\n"
        )
    return f"- {whose} rank is {rank}: vLLM needs `--max-lora-rank {enough}` for it, or more (its default is 16)\n"


def _replace(folder: Path, kept: Sequence[Update], rank: int) -> None:
    """Put the updates `kept` in place of the factors in `folder`, all with zeros up to `rank` and under the scaling of
    the most: what another one had is in B."""
    tensors, config = load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    common = Counter(update.scaling for update in kept).most_common(1)[0][0]
    for update in kept:
        missing = rank - len(update.a)
        tensors[PREFIX + update.name + FACTOR_A] = pad(update.a, (0, 0, 0, missing))
        tensors[PREFIX + update.name + FACTOR_B] = pad(update.scaling / common * update.b, (0, missing))
    alpha = common * rank ** (0.5 if config["use_rslora"] else 1.0)
    config |= {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}
    write_json(folder / CONFIG, config)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
