"""The architecture map, checked against the models themselves: their modules, weights and forward passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from pico import AUTO, PICO, VOCAB_SIZE, logits, pico_config, pico_inputs, pico_model, pico_tokenizer, save_pico
from slimtune.arch import FAMILIES, ModelMap, NormSpec, PortSpec, Space, bind
from slimtune.arch.weights import require_finite
from slimtune.errors import FormatError, ShapeError, UnknownArchitecture

every_pico = pytest.mark.parametrize("name", PICO)
TIED = {
    "llama-tied": {"lm_head": "model.embed_tokens"},
    "gemma2": {"lm_head": "model.embed_tokens"},
    "gemma3": {"lm_head": "model.embed_tokens"},
    "opt": {"lm_head": "model.decoder.embed_tokens"},
    "opt-proj": {"lm_head": "model.decoder.embed_tokens"},
    "opt-post": {"lm_head": "model.decoder.embed_tokens"},
    "t5": dict.fromkeys(("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"), "shared"),
    "t5-gated": dict.fromkeys(("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"), "shared"),
}


class Replaced(nn.Module):
    """What a quantized linear looks like from outside: sizes, a bias, and no weight (nor any other parameter)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("codes", torch.zeros(linear.out_features, 1))


def trace(model: nn.Module, modelmap: ModelMap) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """One forward pass: the order in which ports and norms run, the input of each and its output."""
    order: list[str] = []
    inputs: dict[str, Tensor] = {}
    results: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            order.append(name)
            inputs[name], results[name] = args[0], output

        return keep

    named = [*modelmap.ports, *modelmap.norms]
    handles = [model.get_submodule(x.name).register_forward_hook(hook(x.name)) for x in named]
    logits(model, pico_inputs(model))
    for handle in handles:
        handle.remove()
    return order, inputs, results


def direction(x: Tensor) -> Tensor:
    return (x / x.norm()).reshape(-1)


def test_every_family_has_a_pico_model() -> None:
    bound = {bind(pico_model(name)).family for name in PICO}
    assert bound == set(FAMILIES) == {row.name for row in FAMILIES.values()}


@every_pico
def test_every_linear_and_embedding_is_claimed_once(name: str) -> None:
    model = pico_model(name)
    kinds = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    ports = bind(model).ports
    assert sorted(port.name for port in ports) == sorted(kinds)
    for port in ports:
        assert port.kind == ("embedding" if isinstance(kinds[port.name], nn.Embedding) else "linear")


@every_pico
def test_sizes_are_those_of_the_weights(name: str) -> None:
    model = pico_model(name)
    modelmap = bind(model)
    for port in modelmap.ports:
        module = model.get_submodule(port.name)
        shape = (port.in_features, port.out_features)
        assert shape == tuple(module.weight.shape if port.kind == "embedding" else module.weight.T.shape)
        assert port.bias == (port.kind == "linear" and module.bias is not None)
        if Space.FOREIGN not in (port.reads, *port.writes):
            assert shape == (modelmap.sizes[port.reads], sum(modelmap.sizes[space] for space in port.writes))
    sizes = {Space.RESIDUAL: 32, Space.FFN: 40, Space.VOCAB: VOCAB_SIZE}
    assert modelmap.sizes | sizes == modelmap.sizes
    width = 8 if name.startswith("opt") else 12
    grouped = not name.startswith(("opt", "t5"))
    assert (modelmap.heads, modelmap.kv_heads, modelmap.head_dim) == (4, 2 if grouped else 4, width)


@every_pico
def test_stages_are_the_order_of_a_forward_pass(name: str) -> None:
    model = pico_model(name)
    modelmap = bind(model)
    order, inputs, _ = trace(model, modelmap)
    place = {name: i for i, name in enumerate(order)}
    for block in modelmap.blocks:
        assert [port for stage in block.stages for port in stage] == list(block.ports)
        assert block.ports == tuple(port for port in modelmap.ports if port.block == block.index)
        assert all(port.name.startswith(f"{block.name}.") for port in block.ports)
        assert [stage[0].stage for stage in block.stages] == list(range(len(block.stages)))
        for stage, following in zip(block.stages, block.stages[1:], strict=False):
            assert max(place[p.name] for p in stage) < min(place[p.name] for p in following)
            first, after = inputs[stage[0].name], inputs[following[0].name]
            assert first.shape != after.shape or not torch.equal(first, after)
        for stage in block.stages:
            assert all(inputs[port.name] is inputs[stage[0].name] for port in stage)
    starts = [place[block.ports[0].name] for block in modelmap.blocks]
    assert starts == sorted(starts)
    assert {port.block for port in modelmap.ports} == {None, *range(len(modelmap.blocks))}
    assert modelmap.linears == tuple(port for port in modelmap.ports if port.block is not None)


@every_pico
def test_norms_stand_where_the_map_says(name: str) -> None:
    model = pico_model(name)
    modelmap = bind(model)
    _, inputs, results = trace(model, modelmap)
    for norm in modelmap.norms:
        for name, given in inputs.items() if norm.feeds else ():
            x, y = direction(results[norm.name]), direction(given.float())  # T5 scales its outputs before the head
            same = x.shape == y.shape and torch.allclose(x, y, atol=1e-6)
            assert same == (name in norm.feeds), (norm.name, name)
        if norm.follows:
            assert inputs[norm.name].data_ptr() == results[norm.follows].data_ptr()
            assert not norm.feeds


@every_pico
def test_every_residual_reader_is_fed_by_one_norm(name: str) -> None:
    modelmap = bind(pico_model(name))
    fed = sorted(port for norm in modelmap.norms for port in norm.feeds)
    readers = sorted(port.name for port in modelmap.ports if port.reads is Space.RESIDUAL)
    if name == "opt-post":
        assert not fed  # it normalises the stream itself
    elif name == "opt-proj":
        assert "model.decoder.project_out" in fed
        assert fed == readers
    else:
        assert fed == readers


@every_pico
def test_norm_kinds_are_what_the_modules_compute(name: str) -> None:
    model = pico_model(name)
    modelmap = bind(model)
    _, inputs, results = trace(model, modelmap)
    for norm in modelmap.norms:
        x, module = inputs[norm.name], model.get_submodule(norm.name)
        centred = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
        gain = module.weight + 1 if norm.kind == "rms_plus_one" else module.weight
        wanted = centred / centred.square().mean(-1, keepdim=True).add(1e-6).sqrt() * gain
        wanted = wanted + module.bias if norm.kind == "layer" else wanted
        torch.testing.assert_close(results[norm.name], wanted, atol=1e-3, rtol=1e-3)


@every_pico
def test_ties_are_known(name: str) -> None:
    assert {p.name: p.tied_to for p in bind(pico_model(name)).ports if p.tied_to} == TIED.get(name, {})


def test_ties_are_those_of_the_weights_not_of_the_configuration() -> None:
    untied = pico_model("llama-tied")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.clone())
    assert untied.config.tie_word_embeddings
    assert bind(untied)["lm_head"].tied_to is None
    tied = pico_model("llama")
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert not tied.config.tie_word_embeddings
    assert bind(tied)["lm_head"].tied_to == "model.embed_tokens"


def test_one_module_in_several_places_is_a_port_in_each() -> None:
    model = pico_model("t5")
    plain = bind(model)
    model.set_input_embeddings(model.shared)
    assert model.encoder.embed_tokens is model.decoder.embed_tokens is model.shared
    assert bind(model) == plain


@every_pico
def test_scaled_embeddings(name: str) -> None:
    model = pico_model(name)
    embedding = model.get_input_embeddings()
    tokens = torch.arange(10, 20)
    scaled = not torch.equal(embedding(tokens), embedding.weight[tokens])
    assert bind(model).scaled_embeddings == scaled


def test_a_vision_tower_is_foreign_and_its_projector_writes_the_stream() -> None:
    modelmap = bind(pico_model("llava"))
    foreign = {port.name for port in modelmap.ports if port.writes == (Space.FOREIGN,)}
    tower = {port.name for port in modelmap.ports if port.name.startswith("model.vision_tower.")}
    assert foreign == tower | {"model.multi_modal_projector.linear_1"}
    assert len(tower) == 1 + 2 * 6
    assert modelmap["model.multi_modal_projector.linear_2"].writes == (Space.RESIDUAL,)
    assert {block.stack for block in modelmap.blocks} == {"model.language_model.layers"}


def test_a_projected_embedding_has_a_space_of_its_own() -> None:
    wide, projected = bind(pico_model("opt")), bind(pico_model("opt-proj"))
    assert wide["lm_head"].reads is Space.RESIDUAL
    assert projected["lm_head"].reads is Space.WORD
    assert projected["model.decoder.project_in"].writes == (Space.RESIDUAL,)
    assert projected.sizes[Space.WORD] == 24


def test_a_fused_port_is_sliced_by_what_it_writes() -> None:
    modelmap = bind(pico_model("phi3"))
    fused = modelmap.blocks[1].ports[0]
    assert modelmap.slices(fused) == (
        (Space.HEAD, slice(0, 48)),
        (Space.KV_HEAD, slice(48, 72)),
        (Space.KV_HEAD, slice(72, 96)),
    )
    plain = modelmap.blocks[1].ports[1]
    assert modelmap.slices(plain) == ((Space.RESIDUAL, slice(0, 32)),)


def test_an_encoder_decoder_has_two_stacks() -> None:
    modelmap = bind(pico_model("t5"))
    assert [block.stack for block in modelmap.blocks] == ["encoder.block"] * 2 + ["decoder.block"] * 2
    assert [len(block.stages) for block in modelmap.blocks] == [4, 4, 7, 7]


@every_pico
def test_a_model_on_meta_has_the_same_map(name: str) -> None:
    config = pico_config(name)
    with torch.device("meta"):
        hollow = AUTO.get(config.model_type, AutoModelForCausalLM).from_config(config)
    assert all(parameter.is_meta for parameter in hollow.parameters())
    assert bind(hollow) == bind(pico_model(name))


@every_pico
def test_replaced_linears_have_the_same_map(name: str) -> None:
    model = pico_model(name)
    plain = bind(model)
    for port in plain.linears:
        parent, _, leaf = port.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Replaced(model.get_submodule(port.name)))
    assert bind(model) == plain


@every_pico
def test_a_peft_model_has_the_map_of_its_base(name: str) -> None:
    model = pico_model(name)
    plain = bind(model)
    targets = [port.name for port in plain.linears]
    assert bind(get_peft_model(model, LoraConfig(r=2, target_modules=targets))) == plain


def test_adapted_and_retrained_modules_outside_the_blocks_have_the_same_map() -> None:
    model = pico_model("llama")
    plain = bind(model)
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head", "norm"])
    adapted = get_peft_model(model, config)
    assert bind(adapted) == plain
    model.model.norm.original_module.weight = nn.Parameter(torch.ones(33))
    with pytest.raises(ShapeError, match=r"model\.norm has weight 33"):
        bind(adapted)


def test_an_unknown_architecture_is_named() -> None:
    model = pico_model("llama")
    model.config.model_type = "frobnicator"
    with pytest.raises(UnknownArchitecture) as error:
        bind(model)
    message = str(error.value)
    assert "'frobnicator'" in message
    assert "docs/adding.md" in message
    assert all(model_type in message for row in FAMILIES.values() for model_type in row.model_types)


def test_a_module_that_is_no_model_is_named() -> None:
    with pytest.raises(UnknownArchitecture, match="'Linear'"):
        bind(nn.Linear(2, 2))


def test_everything_that_does_not_fit_is_listed_at_once() -> None:
    model = pico_model("llama")
    model.model.extra = nn.Linear(32, 7)
    model.model.layers[1].mlp.odd = Replaced(nn.Linear(3, 3, bias=False))
    model.model.layers[0].scale = nn.Parameter(torch.ones(1))
    del model.model.layers[0].mlp.up_proj, model.model.layers[1].input_layernorm
    with pytest.raises(UnknownArchitecture) as error:
        bind(model)
    fit = str(error.value)
    unclaimed, missing = fit[fit.index("not described") : fit.index("not in the model")], fit[fit.index("not in the") :]
    assert "model.extra" in unclaimed
    assert "model.layers.1.mlp.odd" in unclaimed
    assert "model.layers.0," in unclaimed
    assert "model.layers.0.mlp.up_proj" in missing
    assert "model.layers.1.input_layernorm" in missing
    assert "q_proj" not in fit


def test_a_model_with_another_head_is_not_mapped() -> None:
    with pytest.raises(UnknownArchitecture, match=r"score(.|\n)*not in the model: lm_head"):
        bind(LlamaForSequenceClassification(pico_config("llama")))


def test_a_port_that_is_no_linear_is_missing() -> None:
    model = pico_model("llama")
    model.lm_head = nn.Identity()
    with pytest.raises(UnknownArchitecture, match="not in the model: lm_head"):
        bind(model)


def test_a_model_without_blocks_is_not_mapped() -> None:
    with pytest.raises(UnknownArchitecture, match=r"not in the model: model\.layers"):
        bind(pico_model("llama", num_hidden_layers=0))


def test_a_row_that_claims_twice_is_refused() -> None:
    row = FAMILIES["llama"]
    twice = replace(row, entry=(*row.entry, PortSpec("layers.0.mlp.up_proj", Space.RESIDUAL, (Space.FFN,))))
    with pytest.raises(UnknownArchitecture, match=r"described twice: model\.layers\.0\.mlp\.up_proj"):
        bind(pico_model("llama"), twice)
    nested = replace(row, norms=(*row.norms, NormSpec("layers", "rms")))
    with pytest.raises(UnknownArchitecture, match=r"described twice:(.|\n)*model\.layers\.1\.mlp\.up_proj"):
        bind(pico_model("llama"), nested)


def test_sizes_that_are_not_the_configuration_s_are_named() -> None:
    model = pico_model("llama")
    model.config.intermediate_size = 41
    with pytest.raises(ShapeError) as error:
        bind(model)
    message = str(error.value)
    for name in ("gate_proj", "up_proj"):
        assert f"model.layers.1.mlp.{name} has out_features 40" in message
        assert f"model.layers.1.mlp.{name} 41 (ffn)" in message
    assert "model.layers.0.mlp.down_proj has in_features 40" in message
    assert "q_proj" not in message


@pytest.mark.parametrize(
    ("attribute", "value", "named"),
    [
        ("hidden_size", 34, "model.embed_tokens"),
        ("num_key_value_heads", 4, "model.layers.0.self_attn.v_proj"),
        ("head_dim", 8, "model.layers.0.self_attn.k_norm"),
        ("vocab_size", 300, "lm_head"),
    ],
)
def test_each_size_is_checked(attribute: str, value: int, named: str) -> None:
    model = pico_model("qwen3")
    setattr(model.config, attribute, value)
    with pytest.raises(ShapeError, match=named.replace(".", r"\.")):
        bind(model)


def test_an_unknown_port_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownArchitecture, match=r"did you mean 'model\.layers\.0\.mlp\.up_proj'"):
        bind(pico_model("llama"))["model.layers.0.mlp.up_prj"]


@every_pico
def test_pico_models_are_reproducible_and_not_degenerate(name: str) -> None:
    one, wide, other = pico_model(name), pico_model(name, dtype=torch.float64), pico_model(name, seed=1)
    for a, b, c in zip(one.parameters(), wide.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.double(), b)
        assert not torch.equal(a, c)
        assert a.std() > 0.01
        assert a.ndim == 1 or a.mean() > 0.01
    assert wide.dtype == torch.float64
    exact, rounded = logits(wide, pico_inputs(wide)), logits(one, pico_inputs(one))
    torch.testing.assert_close(rounded, exact.float(), atol=1e-3, rtol=1e-3)


def test_a_saved_pico_model_is_a_hugging_face_folder(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "pico", "qwen3", seed=3)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = pico_inputs(loaded)
    assert torch.equal(logits(loaded, inputs), logits(pico_model("qwen3", seed=3), inputs))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Zwölf  boxkämpfer\n\tjagen\u2009Viktor <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == VOCAB_SIZE
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert pico_tokenizer().encode(text) == tokenizer.encode(text)


def test_weights_that_others_packed_are_not_asked_whether_they_are_finite() -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.full((4, 4), torch.nan).to(torch.float8_e4m3fn), requires_grad=False)
    require_finite(model)
    model.bias = nn.Parameter(torch.full((4,), torch.nan))
    with pytest.raises(FormatError, match="not finite"):
        require_finite(model)
