"""What stands in for norms and attention while a model trains on a CPU, against the formulas in float64."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForSeq2SeqLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from pico import PICO, pico_inputs, pico_model, pico_tokenizer, save_pico
from slimtune.calib import cpu
from slimtune.calib.cpu import cpu_kernels
from slimtune.errors import ShapeError
from slimtune.evaluate.generate import GREEDY, write_reply
from slimtune.evaluate.inference import cache_of
from slimtune.evaluate.perplexity import perplexity
from slimtune.evaluate.speed import speed
from slimtune.kernels import attention as kernel
from slimtune.kernels import compiled
from slimtune.kernels.attention import attention
from slimtune.kernels.rows import rms_norm
from slimtune.lora.attach import add_lora, base_of


def sides(heads: int, few: int, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    def side(of: int, length: int) -> Tensor:
        return (torch.randn(2, length, of, 8, dtype=torch.float64).to(dtype).transpose(1, 2)).requires_grad_()

    return side(heads, queries), side(few, keys), side(few, keys)


def mask_of(kind: str, queries: int, keys: int, heads: int) -> Tensor | None:
    if kind == "none":
        return None
    seen = torch.rand(2, heads if kind == "each head" else 1, queries, keys) < 0.6
    seen[..., 0] = True
    if kind == "one of all":
        seen = seen[:1]
    return seen if kind != "added" else torch.where(seen, 0.0, -torch.inf).double() + torch.randn(seen.shape).double()


@pytest.mark.parametrize("kind", ["none", "seen", "one of all", "each head", "added"])
@pytest.mark.parametrize(("heads", "few"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (13, 5), (1, 9)])
def test_attention_is_the_formula(
    kind: str, heads: int, few: int, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "QUERIES", 4)
    monkeypatch.setattr(kernel, "SCORES", 4 * 7 * 3)
    q, k, v = sides(heads, few, queries, keys)
    mask = mask_of(kind, queries, keys, heads)
    for causal in [False, True] if mask is None and queries == keys else [False]:
        wide = (t.repeat_interleave(heads // few, 1) for t in (k, v))
        wanted = scaled_dot_product_attention(q, *wide, attn_mask=mask, is_causal=causal, scale=0.3)
        got = attention(q, k, v, mask=mask, causal=causal, scale=0.3)
        torch.testing.assert_close(got, wanted)
        up = torch.randn_like(wanted)
        truth = torch.autograd.grad(wanted, (q, k, v), up)
        for mine, theirs in zip(torch.autograd.grad(got, (q, k, v), up), truth, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_rows_that_see_nothing_have_no_gradient() -> None:
    q, k, v = sides(4, 2, 5, 5)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[1, :, :2] = False
    grads = torch.autograd.grad(attention(q, k, v, mask=mask)[:, :, 2:].square().sum(), (q, k, v))
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not grads[0][1, :, :2].any() and grads[0][0, :, 2:].any()


def test_attention_in_bfloat16_is_as_close_as_pytorchs() -> None:
    q, k, v = sides(6, 2, 150, 150, torch.bfloat16)
    with torch.no_grad():
        q.mul_(4)  # scores that bfloat16 alone would not tell apart
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    truth = scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    up = torch.randn_like(truth).bfloat16()
    wanted = torch.autograd.grad(truth, exact, up.double())

    def errors(y: Tensor) -> list[float]:
        grads = torch.autograd.grad(y, (q, k, v), up)
        return [float((g - w).norm() / w.norm()) for g, w in zip(grads, wanted, strict=True)]

    mine = errors(attention(q, k, v, causal=True))
    theirs = errors(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    assert max(mine) < 0.01
    assert all(a < 1.1 * b for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("kind", ["none", "seen", "one of all", "each head", "added"])
@pytest.mark.parametrize(("queries", "keys"), [(23, 23), (17, 9), (3, 30)])
@pytest.mark.parametrize("loops", [True, False])
def test_attention_of_halves_is_the_formula(
    kind: str, queries: int, keys: int, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "QUERIES", 6)
    monkeypatch.setattr(kernel, "FEWEST", 5)
    monkeypatch.setattr(kernel, "SCORES", 2 * 3 * 6 * keys)
    if not loops:
        monkeypatch.setattr(compiled, "library", lambda: None)
    q, k, v = sides(6, 2, queries, keys, torch.bfloat16)
    mask = mask_of(kind, queries, keys, 6)
    for causal in [False, True] if mask is None and queries == keys else [False]:
        exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
        wide = (t.repeat_interleave(3, 1) for t in exact[1:])
        truth = scaled_dot_product_attention(exact[0], *wide, attn_mask=mask, is_causal=causal, scale=0.3)
        up = torch.randn_like(truth).bfloat16()
        got = attention(q, k, v, mask=mask, causal=causal, scale=0.3)
        with torch.no_grad():
            torch.testing.assert_close(attention(q, k, v, mask=mask, causal=causal, scale=0.3), got)
        wanted = [truth.detach(), *torch.autograd.grad(truth, exact, up.double())]
        for mine, theirs in zip([got.detach(), *torch.autograd.grad(got, (q, k, v), up)], wanted, strict=True):
            assert float((mine - theirs).norm()) < 0.01 * float(theirs.norm())


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 4, 12), (1, 12)])
def test_norm_is_the_formula(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimtune.kernels.rows.NUMBERS", 40)
    x = torch.randn(shape, dtype=torch.float64).mul_(3).requires_grad_()
    gain = torch.rand(12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, gain, 0.1), (x,))
    torch.testing.assert_close(rms_norm(x, gain, 0.1), nn.functional.rms_norm(x, (12,), gain, 0.1))
    half = x.detach().bfloat16()
    assert rms_norm(half, gain, 0.1).dtype == torch.bfloat16
    torch.testing.assert_close(
        rms_norm(half, gain, 0.1).double(), nn.functional.rms_norm(half.double(), (12,), gain, 0.1), rtol=5e-3, atol=0
    )


SILU = ("llama", "llava", "mistral", "qwen2", "qwen3")  # phi3 has both of its halves in one linear


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were called, from now on."""
    used: list[str] = []
    for name in ("attention", "rms_norm", "gated_silu", "rotary"):
        real = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *args, real=real, name=name, **rest: (used.append(name), real(*args, **rest))[1]
        )
    return used


def kernels_of(family: str) -> set[str]:
    """Those that a family has a use for."""
    kind = family.split("-")[0]
    return {
        *(["rms_norm"] if kind != "opt" else []),
        *(["attention"] if kind not in ("t5", "gemma2") else []),
        *(["gated_silu"] if kind in SILU else []),
        *(["rotary"] if kind not in ("t5", "opt", "phi3") else []),
    }


def gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    loss = model(**inputs, labels=inputs.get("decoder_input_ids", inputs["input_ids"])).loss
    loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("family", PICO)
@pytest.mark.parametrize("padded", [False, True])
def test_models_learn_what_they_learnt(family: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_model(family, dtype=torch.float64)
    wrapped = add_lora(model, r=2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    inputs = pico_inputs(model)
    if padded:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, -3:] = 0
    wanted, theirs = gradients(wrapped, inputs)
    used = spied(monkeypatch)
    with cpu_kernels(base_of(wrapped)):
        got, mine = gradients(wrapped, inputs)
    assert got == pytest.approx(wanted, rel=1e-6)  # transformers' norms compute in float32
    for some, other in zip(mine, theirs, strict=True):
        assert float((some - other).norm()) <= 1e-3 * float(other.norm()) + 1e-9
    assert set(used) == kernels_of(family)


@pytest.mark.parametrize("family", PICO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_models_say_what_they_said(
    family: str, dtype: torch.dtype, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico_model(family, dtype=dtype)
    inputs = pico_inputs(model)
    if padded:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, :3] = 0
    shown = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[:, -7:] > 0
    said, used = [], spied(monkeypatch)
    for kernels in (nullcontext(), cpu_kernels(model)):
        assert not used
        with torch.no_grad(), kernels:
            output = model(**inputs, use_cache=True)
            name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
            rest = {"encoder_outputs": (output.encoder_last_hidden_state,)} if name != "input_ids" else {}
            mask = inputs.get("attention_mask")
            if mask is not None:
                rest["attention_mask"] = mask if rest else torch.cat([mask, mask.new_ones(2, 1)], 1)
            last = model(**{name: inputs[name][:, -1:]}, **rest, **cache_of(output), use_cache=True).logits
            said.append(torch.cat([output.logits[:, -7:][shown], last.flatten(0, 1)]).double())
    room = 2e-5 if dtype is torch.float32 else 0.03
    assert float((said[1] - said[0]).norm()) < room * float(said[0].norm())
    assert said[0].shape[0] == int(shown.sum()) + 2
    assert set(used) == kernels_of(family)


@pytest.mark.parametrize("measure", ["perplexity", "speed", "write_reply"])
def test_measuring_and_writing_use_them(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, used = pico_model("llama"), spied(monkeypatch)
    tokens = pico_inputs(model, batch=1, length=16)["input_ids"]
    if measure == "perplexity":
        perplexity(model, tokens[0], length=8)
    elif measure == "speed":
        speed(model, prompt_tokens=4, new_tokens=2, repeats=1)
    else:
        write_reply(model, pico_tokenizer(), {"input_ids": tokens}, 2, GREEDY, lambda _: None)
    assert set(used) == kernels_of("llama")


def test_parts_in_another_dtype_stay_transformers_own(tmp_path: Path) -> None:
    save_pico(tmp_path, "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    inputs = pico_inputs(model)
    assert {p.dtype for p in model.parameters()} == {torch.float16, torch.float32}  # its last linears stay in float32
    with torch.no_grad():
        wanted = model(**inputs).logits
        with cpu_kernels(model):
            torch.testing.assert_close(model(**inputs).logits, wanted, rtol=0.02, atol=0.02)


def test_attention_of_somebody_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def own(*args: Any, **rest: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **rest)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, cpu.USUAL, own)
    model = pico_model("llama")
    with torch.no_grad(), cpu_kernels(model):
        model(**pico_inputs(model))
    assert calls and ALL_ATTENTION_FUNCTIONS[cpu.USUAL] is own


def test_sides_that_are_unlike_are_left_to_pytorch() -> None:
    q, k, v = (t.detach() for t in sides(4, 2, 3, 5, torch.float32))
    same = nn.Module()
    for some in ((q, k[:1], v[:1]), (q[:1], k, v), (q, k, v[..., :4]), (q, k, v)):
        wide = [t.repeat_interleave(2, 1) for t in some[1:]]
        wanted = scaled_dot_product_attention(some[0], *wide).transpose(1, 2)
        same.num_key_value_groups = 2
        torch.testing.assert_close(cpu._attention(same, *some, None, is_causal=False)[0], wanted)
    with pytest.raises(ShapeError, match="unlike sides"):
        attention(q, k.bfloat16(), v.bfloat16())
    with pytest.raises(ShapeError, match="unlike sides"):
        attention(q, k[:, :, :0], v[:, :, :0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_and_masks_of_one_row(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "QUERIES", 4)
    q, k, v = (t.detach().mT.contiguous().mT for t in sides(4, 2, 9, 9, dtype))
    seen = torch.rand(2, 1, 1, 9) < 0.7
    seen[..., 0] = True
    for mask, causal in ((seen, False), (None, True)):
        wide = [t.double().repeat_interleave(2, 1) for t in (k, v)]
        wanted = scaled_dot_product_attention(q.double(), *wide, attn_mask=mask, is_causal=causal)
        got = attention(q, k, v, mask=mask, causal=causal).double()
        assert float((got - wanted).norm()) < (1e-5 if dtype is torch.float32 else 0.01) * float(wanted.norm())


def test_models_without_a_map_stay_as_they_are() -> None:
    model = nn.Linear(3, 3)
    with cpu_kernels(model):
        assert ALL_ATTENTION_FUNCTIONS[cpu.USUAL] is sdpa_attention_forward


def test_nothing_stays_behind() -> None:
    model: Any = add_lora(pico_model("llama"), r=2)
    before, rope = model.get_base_model().config.to_dict(), modeling_llama.apply_rotary_pos_emb
    with cpu_kernels(base_of(model)), cpu_kernels(base_of(model)):
        assert ALL_ATTENTION_FUNCTIONS[cpu.USUAL] is cpu._attention
        assert modeling_llama.apply_rotary_pos_emb is not rope
    with pytest.raises(RuntimeError), cpu_kernels(base_of(model)):
        model(torch.zeros(1, 3))
    assert ALL_ATTENTION_FUNCTIONS[cpu.USUAL] is sdpa_attention_forward
    assert modeling_llama.apply_rotary_pos_emb is rope
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.get_base_model().config.to_dict() == before


def test_gains_that_train_keep_their_gradient() -> None:
    model = pico_model("llama")
    inputs = pico_inputs(model)
    with cpu_kernels(model):
        _, grads = gradients(model, inputs)
    assert all(grad is not None for grad in grads)


def test_linears_that_are_replaced_on_the_way_are_used() -> None:
    model = pico_model("llama").requires_grad_(False)
    inputs = pico_inputs(model)
    layer: Any = model.model.layers[0].mlp
    with cpu_kernels(model):
        before = model(**inputs).logits
        narrow = slice(0, 24)  # as pruning does while a model trains
        for name in ("gate_proj", "up_proj"):
            linear = nn.Linear(32, 24, bias=False)
            linear.weight = nn.Parameter(getattr(layer, name).weight[narrow], requires_grad=False)
            setattr(layer, name, linear)
        out = nn.Linear(24, 32, bias=False)
        out.weight = nn.Parameter(layer.down_proj.weight[:, narrow], requires_grad=False)
        layer.down_proj = out
        after = model(**inputs).logits
    assert not torch.allclose(after, before)
    with torch.no_grad():
        torch.testing.assert_close(after, model(**inputs).logits)
