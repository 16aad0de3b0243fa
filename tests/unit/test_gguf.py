"""GGUF: what is written is what transformers and llama.cpp's own package read, and what is damaged is refused.

That llama.cpp computes the same is in `benchmarks/results/gguf.json`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pico import VOCAB_SIZE, logits, pico_inputs, pico_model, pico_tokenizer, silence_
from slimtune.arch import bind
from slimtune.errors import FormatError, RecipeError, SlimtuneError, UnknownArchitecture
from slimtune.export import Source, export
from slimtune.export.ggml import decode, encode, packed, slack
from slimtune.export.gguf_facts import Naming, rope_frequencies
from slimtune.export.gguf_file import read_header
from slimtune.export.gguf_vocab import vocabulary
from slimtune.export.load import load, model_config
from slimtune.lora.attach import add_lora
from slimtune.quant.activation import Activations
from slimtune.quant.apply import all_linear, quantize_
from slimtune.quant.fp8 import Fp8
from slimtune.quant.linear import QuantLinear
from slimtune.quant.rtn import Rtn
from slimtune.recipe.shell import export_model, generate_text

FAMILIES = ["llama", "llama-tied", "llama-biased", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
NAME = "owner/base"


def tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """The pico tokenizer with one merge; `changes` go to its JSON."""
    pico = pico_tokenizer()
    facts = json.loads(pico.backend_tokenizer.to_str())
    facts["model"]["vocab"]["ab"] = VOCAB_SIZE
    facts["model"]["merges"] = [["a", "b"]]
    facts.update(changes)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = pico.chat_template
    return fast


def model_of(family: str, **overrides: Any) -> Any:
    """A pico model that llama.cpp can compute: it wants heads that make up the width in some families."""
    width = {"head_dim": 8} if family in ("qwen2", "phi3") else {}
    return pico_model(family, vocab_size=VOCAB_SIZE + 1, **{**width, **overrides})


def of(model: nn.Module) -> Source:
    return Source(model, tokenizer(), NAME)


def adapted(model: Any) -> Any:
    wrapped = add_lora(model, r=2, base_name=NAME)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def read(folder: Path, config: Any) -> Any:
    """The model as transformers reads the file."""
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", config=config, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mistral"])
def test_transformers_reads_the_same_tensors(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    manifest = export(of(model), "gguf", tmp_path / "out", "f32")
    assert manifest.max_logit_difference <= 1e-5 and manifest.to_dict()["types"].keys() == {"F32"}
    other, own = read(tmp_path / "out", model.config).state_dict(), model.state_dict()
    assert other.keys() == own.keys()
    largest = max(float((other[name] - own[name]).abs().max()) for name in own)
    assert largest <= (2e-7 if family.startswith("gemma") else 0)  # 1 + w is rounded once


def test_mistral_is_a_llama_within_its_window(tmp_path: Path) -> None:
    model = model_of("mistral", sliding_window=6)
    export(of(model), "gguf", tmp_path / "out", "f32")
    header = read_header(tmp_path / "out" / "model.gguf")
    assert (header.architecture, header.values["llama.context_length"]) == ("llama", 6)
    loaded = load(str(tmp_path / "out" / "model.gguf")).model
    inputs = pico_inputs(model, length=6)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_every_type_reads_back_within_its_rounding(family: str, kind: str, tmp_path: Path) -> None:
    model = model_of(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    manifest = export(of(model), "gguf", tmp_path / "out", kind)
    assert manifest.facts["quantization"] == kind
    wide = {name for name, tensor in before.items() if tensor.ndim == 2}
    tied = set(model.all_tied_weights_keys)
    types = manifest.facts["types"]
    assert sum(types.values()) == len(before.keys() - tied)
    narrow = sum(before[name].shape[1] % 32 != 0 for name in wide - tied)
    assert (types.get("F16", 0) if kind != "f16" else narrow) == (
        narrow if kind.startswith("q") or kind == "f16" else 0
    )
    assert [name for name in before if not torch.equal(model.state_dict()[name], before[name])] == []


def test_adapter_is_merged_into_the_model(tmp_path: Path) -> None:
    model = adapted(model_of("llama"))
    inputs = pico_inputs(model.get_base_model())
    manifest = export(of(model), "gguf", tmp_path / "out", "f32")
    assert manifest.max_logit_difference < 1e-4
    merged = read(tmp_path / "out", model.get_base_model().config)
    torch.testing.assert_close(logits(merged, inputs), logits(model, inputs), rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert float((logits(merged, inputs) - logits(model, inputs)).abs().max()) > 0.01


SILENT = {  # silent heads and channels by block; heads, groups and channels in the file
    "nothing": ({}, {}, (4, 4), (2, 2), (44, 44)),
    "a group and channels": ({1: [0, 1]}, {0: [3, 43], 1: [0]}, (4, 2), (2, 1), (42, 43)),
    "a head of each group": ({0: [1, 2]}, {}, (2, 4), (2, 2), (44, 44)),
    "a head of one group stays": ({0: [1]}, {}, (4, 4), (2, 2), (44, 44)),
    "a group and a head of the other": ({1: [0, 1, 3]}, {}, (4, 1), (2, 1), (44, 44)),
    "sub-layers": ({1: [0, 1, 2, 3]}, {0: list(range(44))}, (4, 0), (2, 0), (1, 44)),
    "the last block": ({1: [0, 1, 2, 3]}, {1: list(range(44))}, (4, 0), (2, 0), (44, 1)),
    "the first attention": ({0: [0, 1, 2, 3]}, {}, (1, 4), (1, 2), (44, 44)),
}


@pytest.mark.parametrize("family", ["llama", "mistral", "llama-biased"])
@pytest.mark.parametrize("case", SILENT)
def test_blocks_of_different_widths(family: str, case: str, tmp_path: Path) -> None:
    heads, channels, *wanted = SILENT[case]
    model = model_of(family, num_attention_heads=4, num_key_value_heads=2, intermediate_size=44)
    silence_(model, heads, channels)
    manifest = export(of(model), "gguf-deci", tmp_path / "out", "f32")
    found = [manifest.facts[name] for name in ("heads", "kv_heads", "ffn")]
    if family == "llama-biased":  # what a sub-layer adds at all events keeps it
        wanted = [tuple(max(width, 1) for width in widths) for widths in wanted]
    assert found == wanted and manifest.max_logit_difference <= 1e-5
    assert read_header(tmp_path / "out" / "model.gguf").architecture == "deci"
    keys = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert [tuple(reader.fields[f"deci.{key}"].contents()) for key in keys] == wanted
    shapes = {t.name: tuple(map(int, t.shape[::-1])) for t in reader.tensors}
    hidden, width = model.config.hidden_size, model.config.head_dim
    for block in range(2):
        for name, size in (("attn_q", found[0]), ("attn_k", found[1]), ("ffn_up", found[2])):
            rows = size[block] * (1 if name == "ffn_up" else width)
            assert shapes.get(f"blk.{block}.{name}.weight", (0, hidden)) == (rows, hidden)
        assert (f"blk.{block}.attn_norm.weight" in shapes) == (found[0][block] > 0)
        assert f"blk.{block}.ffn_norm.weight" in shapes


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("lost", [12, 64])
def test_narrower_blocks_in_every_type(kind: str, lost: int, tmp_path: Path) -> None:
    model = model_of("llama", hidden_size=64, head_dim=16, num_attention_heads=4, intermediate_size=128)
    silence_(model, {1: [0, 1]}, {0: list(range(1, 2 * lost, 2))})
    manifest = export(of(model), "gguf-deci", tmp_path / "out", kind)
    assert manifest.facts["ffn"] == (128 - lost, 128)
    assert (manifest.facts["types"].get("F16", 0) > 0) == (kind == "f16" or lost % 32 > 0)


def test_narrower_blocks_stay_packed(tmp_path: Path) -> None:
    model = model_of("llama", hidden_size=64, head_dim=16, num_attention_heads=4, intermediate_size=128)
    silence_(model, {1: [0, 1]}, {0: list(range(96))})
    quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=32, sym=True)))
    whole = export(of(model), "gguf", tmp_path / "whole").facts["types"]
    manifest = export(of(model), "gguf-deci", tmp_path / "out")
    assert manifest.facts["ffn"] == (32, 128) and manifest.facts["heads"] == (4, 2)
    # Rows are taken as they are; of the two layers whose columns went, codes are widened.
    assert manifest.facts["types"] == {**whole, "Q4_0": whole["Q4_0"] - 2, "Q8_0": 2}
    assert (tmp_path / "out" / "model.gguf").stat().st_size < (tmp_path / "whole" / "model.gguf").stat().st_size


def test_other_kinds_of_models_have_blocks_alike(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitecture, match="all blocks of this kind of model alike"):
        export(of(model_of("qwen3")), "gguf-deci", tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_adapter_alone_is_that_of_peft_in_the_order_of_llama_cpp(family: str, tmp_path: Path) -> None:
    model = adapted(model_of(family))
    manifest = export(of(model), "gguf-lora", tmp_path / "out")
    assert manifest.facts == {"alpha": 32.0, "layers": 2 * (4 if family == "phi3" else 7)}
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 32.0)
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert len(found) == 2 * manifest.facts["layers"]
    export(of(model), "gguf", tmp_path / "merged", "f32")
    base = pico_base(model)
    export(of(base), "gguf", tmp_path / "base", "f32")
    whole, plain = (tensors_of(tmp_path / name / "model.gguf") for name in ("merged", "base"))
    for name in {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in found}:  # as llama.cpp adds them
        update = 16 * found[f"{name}.lora_b"] @ found[f"{name}.lora_a"]
        torch.testing.assert_close(plain[name] + update, whole[name], rtol=0, atol=1e-5)


def pico_base(model: Any) -> Any:
    """The model without its adapter, on its own."""
    return model.unload()


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {t.name: decode(t.data, t.tensor_type.name) for t in gguf.GGUFReader(path).tensors}


def test_factors_of_layers_that_differ_in_scale_carry_it_themselves(tmp_path: Path) -> None:
    model = adapted(model_of("llama"))
    layer = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    layer.scaling["default"] = 3.0
    assert export(of(model), "gguf-lora", tmp_path / "out").facts["alpha"] == 0.0
    found = tensors_of(tmp_path / "out" / "adapter.gguf")
    wanted = 3.0 * layer.lora_B["default"].weight.detach()
    assert torch.equal(found["blk.0.ffn_up.weight.lora_b"], wanted)


# --- packed weights ---


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"bits": 4, "group_size": 32, "sym": True}, "Q4_0"),
        ({"bits": 3, "group_size": 64}, "Q4_0"),
        ({"bits": 2, "group_size": -1}, "Q4_0"),
        ({"bits": 4, "group_size": 32}, "Q5_0"),
        ({"bits": 8, "group_size": 32, "sym": True}, "Q8_0"),
    ],
)
def test_packed_weights_are_kept_to_the_last_bit(fields: dict[str, Any], kind: str) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) - 0.2
    layer = QuantLinear.from_linear(nn.Linear(128, 64), Rtn(**fields)(weight, {}))
    found = packed(layer)
    assert found is not None and found[0] == kind
    assert torch.equal(decode(found[1], kind), layer.dequantize(torch.float32))


def test_zero_points_whose_products_float16_holds_are_q4_1() -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 3), Rtn(bits=4, group_size=32)(torch.randn(3, 64), {}))
    layer.qtensor.tensors["scale"].fill_(2**-6)
    layer.qtensor.tensors["zero"].fill_(4)
    found = packed(layer)
    assert found is not None and found[0] == "Q4_1"
    assert torch.equal(decode(found[1], "Q4_1"), layer.dequantize(torch.float32))


@pytest.mark.parametrize(
    ("fields", "shape"),
    [({"bits": 4, "group_size": 16}, (4, 64)), ({"bits": 4, "group_size": -1}, (4, 40))],
)
def test_groups_that_are_not_whole_blocks_are_rounded_instead(fields: dict[str, Any], shape: tuple[int, int]) -> None:
    assert packed(QuantLinear.from_linear(nn.Linear(*shape[::-1]), Rtn(**fields)(torch.randn(shape), {}))) is None


def test_scales_that_float16_lacks_are_rounded_instead() -> None:
    layer = QuantLinear.from_linear(nn.Linear(64, 3), Rtn(bits=4, group_size=32)(torch.randn(3, 64), {}))
    layer.qtensor.tensors["scale"].fill_(1e-30)
    assert packed(layer) is None


@pytest.mark.parametrize(
    ("fields", "kind"),
    [({"bits": 3}, "Q4_0"), ({"bits": 4}, "Q5_0"), ({"bits": 8, "sym": True}, "Q8_0")],
)
def test_packed_model_is_written_as_it_is(fields: dict[str, Any], kind: str, tmp_path: Path) -> None:
    model = model_of("llama")
    with torch.no_grad():
        for port in bind(model).linears:
            model.get_submodule(port.name).weight.add_(-0.03)  # so that zero points are off the middle
    method = Rtn(group_size=32, **fields)
    quantize_(model, bind(model), all_linear(method, ignore=("*o_proj", "*down_proj")))
    manifest = export(of(model), "gguf", tmp_path / "out", "f32")
    types = manifest.facts["types"]
    assert types["F32"] == 11 and kind in types and types.keys() <= {"F32", "Q4_1", kind}
    assert manifest.max_logit_difference <= 1e-5
    wanted = {name: m.dequantize(torch.float32) for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    other = read(tmp_path / "out", type(model.config)(**model_of("llama").config.to_dict())).state_dict()
    assert len(wanted) == 10
    assert [name for name in wanted if not torch.equal(other[f"{name}.weight"], wanted[name])] == []


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_slack_is_kept_and_is_not_loose(kind: str) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)) + 0.1
    error = (decode(encode(weight, kind), kind) - weight).abs()
    assert bool((error <= slack(weight, kind)).all())
    assert float((error / slack(weight, kind)).max()) > 0.45


# --- what llama.cpp would compute differently is refused ---


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("qwen2", {"head_dim": 12}, "heads of 12"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar 7"),
        ("gemma2", {"attn_logit_softcapping": None}, "not capped"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "every 6th"),
        ("qwen3", {"attention_bias": True}, "a bias that it does not add: model.layers.0.self_attn.q_proj.bias and"),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    family: str, overrides: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=reason):
        export(of(model_of(family, **overrides)), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_families_that_llama_cpp_is_not_told_of_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownArchitecture, match="opt"):
        export(of(model_of("opt")), "gguf", tmp_path / "out")


def test_weights_beyond_float16_are_refused_by_name(tmp_path: Path) -> None:
    model = model_of("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = 1e6
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj"):
        export(of(model), "gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("format", "kind", "message"),
    [("gguf", "q4", "no such type"), ("gguf-lora", "q8_0", "takes no"), ("safetensors", "f16", "takes no")],
)
def test_types_that_a_format_lacks_are_refused(format: str, kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        export(of(model_of("llama")), format, tmp_path / "out", kind)


def test_adapter_export_needs_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no adapter"):
        export(of(model_of("llama")), "gguf-lora", tmp_path / "out")


# --- rotary embeddings ---

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_frequencies_of_llama_3_are_those_of_transformers() -> None:
    model = model_of("llama", rope_parameters=LLAMA3, head_dim=64)
    factors = rope_frequencies(model.config)
    assert factors is not None
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    assert float(factors.min()) == 1 and float(factors.max()) == 32


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}])
def test_scaled_rotary_embeddings_survive_the_way_out_and_in(rope: dict[str, Any], tmp_path: Path) -> None:
    model = model_of("llama", rope_parameters=rope, head_dim=16)
    export(of(model), "gguf", tmp_path / "out", "f32")
    loaded = load(str(tmp_path / "out" / "model.gguf")).model
    inputs = pico_inputs(model)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert {key: loaded.config.rope_parameters[key] for key in rope} == pytest.approx(rope)


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_float8_is_decoded_and_rounded_to_what_was_asked(kind: str, tmp_path: Path) -> None:
    model = model_of("llama")
    quantize_(model, bind(model), all_linear(Fp8()))
    types = export(of(model), "gguf", tmp_path / "out", kind).facts["types"]
    assert kind.upper() in types
    other = read(tmp_path / "out", type(model.config)(**model_of("llama").config.to_dict())).state_dict()
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight, got = module.dequantize(torch.float32), other[f"{name}.weight"]
            stored = kind.upper() if kind != "q8_0" or weight.shape[1] % 32 == 0 else "F16"
            assert bool(((got - weight).abs() <= slack(weight, stored)).all())


def test_rounded_inputs_are_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    rounds = Activations(bits=8)
    quantize_(model, bind(model), all_linear(Rtn(bits=8, group_size=32)), activations=lambda _: rounds)
    with pytest.raises(FormatError, match="gguf cannot say that inputs are rounded"):
        export(of(model), "gguf", tmp_path / "out")


def test_files_of_one_name_size_and_second_are_told_apart(tmp_path: Path) -> None:
    loaded = []
    for seed in (0, 1):
        model = model_of("llama", seed=seed)
        export(of(model), "gguf", tmp_path / str(seed), "f32")
        file = tmp_path / str(seed) / "model.gguf"
        os.utime(file, (1e9, 1e9))
        loaded.append((load(str(file)).model, model))
    for found, model in loaded:
        inputs = pico_inputs(model)
        torch.testing.assert_close(logits(found, inputs), logits(model, inputs), rtol=0, atol=1e-5)


# --- the tokenizer ---


def test_vocabulary_is_the_tokenizers() -> None:
    words = vocabulary(tokenizer(), VOCAB_SIZE + 3)
    assert (words.model, words.pre, words.merges, words.scores) == ("gpt2", "gpt-2", ["a b"], [])
    assert words.tokens[VOCAB_SIZE - 1 :] == [
        tokenizer().convert_ids_to_tokens(VOCAB_SIZE - 1),
        "ab",
        "[PAD263]",
        "[PAD264]",
    ]
    assert [int(kind) for kind in words.kinds[:6]] == [3] * 6  # control
    assert [int(kind) for kind in words.kinds[VOCAB_SIZE:]] == [1, 5, 5]  # a word, and two that are unused


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        ([{"type": "Digits", "individual_digits": True}], "smollm"),
        (
            [
                {
                    "type": "Split",
                    "pattern": {
                        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                    },
                    "behavior": "Isolated",
                    "invert": False,
                }
            ],
            "qwen2",
        ),
    ],
)
def test_ways_of_splitting_have_their_names(pre: list[dict[str, Any]], name: str) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": name == "smollm"}
    made = tokenizer(pre_tokenizer={"type": "Sequence", "pretokenizers": [*pre, byte_level]})
    assert vocabulary(made, VOCAB_SIZE + 1).pre == name


def test_unknown_ways_of_splitting_are_refused() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    with pytest.raises(FormatError, match="no known name"):
        vocabulary(tokenizer(pre_tokenizer=byte_level), VOCAB_SIZE + 1)


def test_more_tokens_than_embeddings_are_refused() -> None:
    with pytest.raises(FormatError, match="more tokens"):
        vocabulary(tokenizer(), VOCAB_SIZE)


def test_sentencepiece_kind_gets_scores_from_its_merges() -> None:
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", "\u2581", "a", "b", "ab", "\u2581ab"]
    facts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {word: number for number, word in enumerate(words)},
            "merges": [["a", "b"], ["\u2581", "ab"]],
        },
    }
    made = vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(facts))), len(words))
    assert (made.model, made.pre, made.space_prefix, made.merges) == ("llama", "default", True, [])
    assert made.scores[-2:] == [0.0, -1.0] and made.scores[256] < -1e5
    assert [int(kind) for kind in (made.kinds[0], made.kinds[256], made.kinds[257])] == [6, 2, 1]


def test_file_speaks_of_the_tokenizer_and_loads_as_one(tmp_path: Path) -> None:
    export(of(model_of("llama")), "gguf", tmp_path / "out")
    values = read_header(tmp_path / "out" / "model.gguf").values
    assert values["tokenizer.ggml.bos_token_id"] == 1 and values["tokenizer.ggml.eos_token_id"] == 2
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert "generation %}" not in str(values["tokenizer.chat_template"])
    text = "abba cab, 12!"
    assert load(str(tmp_path / "out" / "model.gguf")).tokenizer(text).input_ids == tokenizer()(text).input_ids


# --- files that are not what they claim ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    export(of(model_of("llama")), "gguf", folder / "out", "q8_0")
    return (folder / "out" / "model.gguf").read_bytes()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def header(*pairs: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs)) + b"".join(pairs)


def words(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "no magic": b"PK\3\4" + bytes(64),
    "a version of the future": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "endless pairs": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
    "endless tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0),
    "an endless array": header(pair("a", 9, struct.pack("<IQ", 0, 2**62))),
    "an endless array of text": header(pair("a", 9, struct.pack("<IQ", 8, 2**62))),
    "arrays in arrays": header(pair("a", 9, struct.pack("<IQ", 9, 2**62) * 50)),
    "a long name": header(struct.pack("<Q", 2**63)),
    "an unknown type": header(pair("a", 77, b"")),
    "no architecture": header(pair("general.name", 8, words("x"))),
    "names that are no text": header(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 8) + words("x")),
    "data beyond the end": header(pair("general.architecture", 8, words("llama")), tensors=1)
    + words("output.weight")
    + struct.pack("<IQQIQ", 2, 2**40, 2**20, 0, 0),
    "a tensor of unknown type": header(pair("general.architecture", 8, words("llama")), tensors=1)
    + words("output.weight")
    + struct.pack("<IQIQ", 1, 32, 999, 0),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("act", [load, model_config], ids=["load", "plan"])
def test_hostile_file_is_refused(name: str, act: Callable[[str], Any], tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(FormatError):
        act(str(path))


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.5, 0.999])
def test_truncated_file_is_refused(share: float, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FormatError, match="GGUF"):
        load(str(path))


def test_unknown_architecture_is_named(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(whole.replace(b"llama", b"zzzzz"))
    with pytest.raises(UnknownArchitecture, match="zzzzz"):
        load(str(path))


def test_adapter_is_no_model_and_a_missing_file_is_none(tmp_path: Path) -> None:
    export(of(adapted(model_of("llama"))), "gguf-lora", tmp_path / "out")
    with pytest.raises(FormatError, match="holds no model"):
        load(str(tmp_path / "out" / "adapter.gguf"))
    with pytest.raises(SlimtuneError, match="no such model"):
        load(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_files_of_every_type_are_bases(kind: str, tmp_path: Path) -> None:
    model = model_of("llama", head_dim=16, intermediate_size=64)
    export(of(model), "gguf", tmp_path / "out", kind)
    loaded = load(str(tmp_path / "out" / "model.gguf")).model
    naming = Naming(model)
    found = tensors_of(tmp_path / "out" / "model.gguf")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, naming.restored(name, found[naming.name(name)], tensor.shape))


def test_verbs_write_a_file_and_take_it_as_a_model(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    manifest = export_model(str(tmp_path / "base"), "gguf", tmp_path / "out", quantization="q8_0")
    assert set(manifest.files) == {"README.md", "model.gguf"} and manifest.facts["types"]["Q8_0"] > 0
    assert "llama-cli" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(RecipeError, match="--overwrite replaces it"):
        export_model(str(tmp_path / "base"), "gguf", tmp_path / "out")
    export_model(str(tmp_path / "base"), "gguf", tmp_path / "out", overwrite=True)
    written: list[str] = []
    pace = generate_text(str(tmp_path / "out" / "model.gguf"), "abc", max_new_tokens=3, write=written.append)
    assert pace.new_tokens == len(written)
