"""One file for llama.cpp and everything made of it: the merged model, or the adapter alone.

Linears that are packed and have no adapter keep their weights to the last bit where a type of ggml can say them
(`slimtune.export.ggml`), whatever type is asked for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import gguf
import torch
from gguf import GGUFReader, GGUFWriter
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from slimtune.errors import FormatError, RecipeError
from slimtune.export.base import Source, Written, own_state, refuse_rounding
from slimtune.export.ggml import BLOCK, Array, decode, encode, packed, slack
from slimtune.export.gguf_facts import ROPE_FREQUENCIES, Naming, add_facts, rope_frequencies
from slimtune.export.gguf_file import read_header
from slimtune.export.gguf_vocab import add_vocabulary
from slimtune.export.gguf_widths import own_widths
from slimtune.export.load import empty_model
from slimtune.lora.attach import base_of, has_adapter, plain
from slimtune.lora.cut import Cut, Update, cut_all, require_rank, updates
from slimtune.lora.merge import merged_weight
from slimtune.quant.blackbox import FROZEN
from slimtune.quant.linear import QuantLinear

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "BF16": 32}
"""How GGUF counts the commonest type of a file."""


@dataclass(frozen=True)
class GgufExporter:
    """`model.gguf`: merged weights, configuration and tokenizer in one file."""

    loads_in: ClassVar[str] = (
        "A GGUF file made from `{name}`: weights, configuration and tokenizer.\n\n"
        "- llama.cpp: `llama-cli -m model.gguf`, `llama-server -m model.gguf`\n"
        "- llama-cpp-python: `Llama('model.gguf')`\n"
        "- Ollama: `ollama create mine -f Modelfile`, with the line `FROM ./model.gguf` in `Modelfile`\n"
        "- LM Studio, koboldcpp, and others built on llama.cpp: open the file\n"
        "- transformers: `AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file='model.gguf')`; weights are decoded\n"
    )

    quantization: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"] = field(
        default="f16", metadata={"help": "type of the weights that are not packed already"}
    )

    def write(self, source: Source, folder: Path) -> Written:
        """Write one tensor after the other; `source.model` is not changed."""
        refuse_rounding(source.model, "gguf")
        naming = self._naming(source.model)
        kinds: Counter[str] = Counter()
        with _writer(folder / MODEL_FILE, naming, source, "model") as writer:
            add_facts(writer, naming)
            add_vocabulary(writer, source.tokenizer, naming.config.vocab_size, _stops(source.model))
            for tensor, value, layer in _weights(source.model, naming):
                kind, data = self._stored(naming, tensor, value, layer)
                writer.add_tensor(naming.name(tensor), data, raw_dtype=gguf.GGMLQuantizationType[kind])
                kinds[kind] += 1
            if (frequencies := rope_frequencies(naming.config)) is not None:
                writer.add_tensor(ROPE_FREQUENCIES, frequencies.numpy())
            writer.add_file_type(FILE_TYPES[max(kinds, key=lambda kind: (kind != "F32", kinds[kind]))])
        exact = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
        own = naming.widths
        blocks = {} if own is None else {"heads": own.heads, "kv_heads": own.kv_heads, "ffn": own.ffn}
        facts = {"quantization": self.quantization, "types": dict(kinds), **blocks}
        return Written(facts, exact.get(self.quantization))

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """The model in `model.gguf`. Raises `FormatError` where a weight is not what rounding to its type explains.

        llama.cpp itself is not asked: `benchmarks/peers/llama_cpp_reads_slimtune.py` does that.
        """
        naming = self._naming(source.model)
        read = _tensors(folder / MODEL_FILE)
        state: dict[str, Tensor] = {}
        for tensor, value, _ in _weights(source.model, naming):
            kind, data = read[naming.name(tensor)]
            wanted = naming.stored(tensor, value)
            found = decode(data, kind).reshape(wanted.shape)
            if not bool(((found - wanted).abs() <= slack(wanted, kind)).all()):
                raise FormatError("an exported weight does not read back", where=tensor, got=kind)
            state[tensor] = naming.restored(tensor, found, value.shape)
        config = naming.config.__class__.from_dict(
            {key: value for key, value in naming.config.to_dict().items() if key != "quantization_config"}
        )
        model = empty_model(config)
        left_out = {n: t for n, t in model.state_dict().items() if n not in {*state, *model.all_tied_weights_keys}}
        state |= {name: torch.zeros(tensor.shape) for name, tensor in left_out.items()}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        return model.eval()

    def restore_(self, source: Source) -> None:
        """Nothing was done to the source."""

    def _naming(self, model: nn.Module) -> Naming:
        return Naming(model)

    def _stored(self, naming: Naming, tensor: str, value: Tensor, layer: QuantLinear | None) -> tuple[str, Array]:
        """The type and the data of one tensor."""
        kept = packed(layer) if layer is not None else None
        if kept is not None and not naming.cuts_columns(tensor, value.shape[-1]):
            kind, data = kept
            if not torch.equal(decode(data, kind), value):
                raise FormatError("a packed weight does not decode to itself", where=tensor, got=kind)
            order = naming.order(tensor, len(value))
            return kind, data if order is None else data[order.numpy()]
        stored = naming.stored(tensor, value)
        # Columns that go take blocks apart: of few bits become 8.
        kind = self._kind(naming.name(tensor), stored, "Q8_0" if kept is not None else self.quantization.upper())
        data = encode(stored, kind)
        if not bool(decode(data, kind).isfinite().all()):
            raise FormatError(
                f"a weight that {kind} cannot hold", where=tensor, got=f"up to {float(value.abs().max()):g}"
            )
        return kind, data

    def _kind(self, name: str, value: Tensor, kind: str) -> str:
        if value.ndim == 1:
            return "F32"
        if kind.startswith("Q") and value.shape[-1] % BLOCK:
            return "F16"
        embeds = name.split(".")[0] in ("token_embd", "output")
        return "Q8_0" if embeds and kind.startswith("Q4") else kind  # as llama.cpp does: they suffer most


@dataclass(frozen=True)
class GgufDeciExporter(GgufExporter):
    """`model.gguf` without the zeros that stand for pruned units: blocks of different widths, for llama.cpp."""

    loads_in: ClassVar[str] = (
        "A GGUF file made from `{name}`: weights, configuration and tokenizer. Its blocks have as many heads and"
        " channels as pruning left each, in llama.cpp's architecture `deci`. An adapter of the run does not fit it.\n\n"
        "- llama.cpp: `llama-cli -m model.gguf`, `llama-server -m model.gguf`\n"
        "- llama-cpp-python: `Llama('model.gguf')`\n"
        "- Ollama: `ollama create mine -f Modelfile`, with the line `FROM ./model.gguf` in `Modelfile`\n"
        "- not transformers, nor vLLM: export `decilm`, or `safetensors`, zeros included\n"
    )

    def _naming(self, model: nn.Module) -> Naming:
        return Naming(model, own_widths(model))


@dataclass(frozen=True)
class GgufLoraExporter:
    """`adapter.gguf`: the adapter alone, for a GGUF file of its base."""

    loads_in: ClassVar[str] = (
        "A LoRA adapter in GGUF for `{name}`. It needs a GGUF file of that model: `slimtune export RUN/model --format"
        " gguf` writes the base it was trained on.\n\n"
        "- llama.cpp: `llama-cli -m model.gguf --lora adapter.gguf`, `llama-server -m model.gguf --lora adapter.gguf`\n"
        "- llama-cpp-python: `Llama('model.gguf', lora_path='adapter.gguf')`\n"
        "- Ollama: the lines `FROM ./model.gguf` and `ADAPTER ./adapter.gguf` in `Modelfile`\n"
    )

    rank: int = field(default=0, metadata={"help": "cut every update to this rank; 0: do not"})

    def write(self, source: Source, folder: Path) -> Written:
        """Write the factors in float32, with the scale that PEFT gives them; those of a rotated model in the basis of
        the original one."""
        naming = Naming(source.model)
        factors, lost = self._factors(source.model)
        alphas = {update.scaling * len(update.a) for update in factors}
        alpha = alphas.pop() if len(alphas) == 1 else 0.0  # 0: llama.cpp leaves the scale to the factors
        with _writer(folder / ADAPTER_FILE, naming, source, "adapter") as writer:
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", alpha)
            for name, a, b, scale in factors:
                tensor = naming.name(f"{name}.weight")
                b = naming.stored(f"{name}.weight", b if alpha else scale * b)
                writer.add_tensor(f"{tensor}.lora_a", a.numpy())
                writer.add_tensor(f"{tensor}.lora_b", b.numpy())
        facts = {"alpha": alpha, "layers": len(factors)} | (lost.to_dict() if lost is not None else {})
        return Written(facts, source.dtype, lost.note if lost is not None else "")

    def read_back(self, source: Source, folder: Path) -> nn.Module:
        """`source`'s model, whose factors (in the original basis, and cut) those in the file must be."""
        naming = Naming(source.model)
        read = {name: decode(data, kind) for name, (kind, data) in _tensors(folder / ADAPTER_FILE).items()}
        alpha = float(read_header(folder / ADAPTER_FILE).values["adapter.lora.alpha"])
        for name, a, b, scale in self._factors(source.model)[0]:
            tensor = naming.name(f"{name}.weight")
            found = naming.restored(f"{name}.weight", read[f"{tensor}.lora_b"], b.shape)
            if not torch.equal(read[f"{tensor}.lora_a"], a) or not torch.equal(found, b if alpha else scale * b):
                raise FormatError("an exported factor does not read back", where=name)
        return source.model

    def restore_(self, source: Source) -> None:
        """Nothing was done to the source."""

    def _factors(self, model: nn.Module) -> tuple[list[Update], Cut | None]:
        if not has_adapter(model):
            raise RecipeError("there is no adapter to export", remedy="export gguf instead, or add a lora step")
        found = updates(model)
        require_rank(found, self.rank)
        return cut_all(found, self.rank) if self.rank else (found, None)


@contextmanager
def _writer(path: Path, naming: Naming, source: Source, kind: str) -> Iterator[GGUFWriter]:
    """A writer that keeps tensors on disk until the header can be written, and writes all when the block ends."""
    writer = GGUFWriter(path, naming.architecture.name, use_temp_file=True)
    writer.add_type(kind)
    writer.add_name(source.name.rstrip("/").rpartition("/")[2])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        if writer.temp_file is not None:
            writer.temp_file.close()
        writer.close()


def _tensors(path: Path) -> dict[str, tuple[str, Array]]:
    """Type and data of every tensor in a checked file, mapped and not yet read."""
    read_header(path)
    return {tensor.name: (tensor.tensor_type.name, tensor.data) for tensor in GGUFReader(path).tensors}


def _stops(model: nn.Module) -> tuple[int, ...]:
    ends: Any = cast(Any, base_of(model)).generation_config.eos_token_id
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


@torch.no_grad()
def _weights(model: nn.Module, naming: Naming) -> Iterator[tuple[str, Tensor, QuantLinear | None]]:
    """Every tensor of the merged model that the file has, float32, by its name; and the packed layer that it is the
    weight of."""
    base = base_of(model)
    tied = cast(Any, base).all_tied_weights_keys
    for name, layer in plain(model).items():
        module = base.get_submodule(name)
        adapted = isinstance(module, BaseTunerLayer)
        tensors = own_state(layer)
        if isinstance(layer, FROZEN):
            tensors = {leaf: tensor for leaf, tensor in tensors.items() if leaf not in layer.names}
        if isinstance(layer, FROZEN) or adapted:
            tensors["weight"] = merged_weight(module, layer)
        for leaf, tensor in tensors.items():
            if (full := f"{name}.{leaf}") not in tied and naming.holds(full):
                own = leaf == "weight" and isinstance(layer, QuantLinear) and not adapted
                yield full, tensor.float(), cast(QuantLinear, layer) if own else None
