"""FSDP2 on a quantized model with an adapter: two processes compute what one does, and share the packed codes.

The file is its own worker: `python test_fsdp.py RANK FOLDER` is one of the two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

WORLD = 2


def make() -> nn.Module:
    """A pico Llama in 4 bits with LoRA factors that are not zero."""
    from pico import pico_model
    from slimtune.arch import bind
    from slimtune.lora.attach import add_lora
    from slimtune.quant.apply import all_linear, quantize_
    from slimtune.quant.rtn import Rtn

    model = pico_model("llama")
    quantize_(model, bind(model), all_linear(Rtn(bits=4, group_size=12)))
    wrapped = add_lora(model, r=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def loss_of(model: nn.Module) -> Tensor:
    tokens = torch.randint(6, 262, (4, 9), generator=torch.Generator().manual_seed(2))
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def shard_(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    from slimtune.arch import bind
    from slimtune.lora.attach import base_of

    for block in bind(model).blocks:
        fully_shard(base_of(model).get_submodule(block.name))
    return fully_shard(model)


def work(rank: int, folder: Path) -> None:
    """One process: shard, run forward and backward, write down what it has, and what all have together."""
    store = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    sharded: Any = shard_(make())
    local = {name: p.to_local().clone() for name, p in sharded.named_parameters()}
    loss = loss_of(sharded)
    loss.backward()
    after = {name: p.to_local().clone() for name, p in sharded.named_parameters()}
    gradients = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
    whole = {name: p.full_tensor().detach().clone() for name, p in sharded.named_parameters()}
    facts = {"loss": loss.detach(), "local": local, "after": after, "gradients": gradients, "whole": whole}
    torch.save(facts, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        model = make()
        loss = loss_of(model)
        loss.backward()
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    parameters = dict(model.named_parameters())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    packed = {name for name, p in parameters.items() if p.dtype in (torch.uint8, torch.bfloat16)}
    assert len(packed) == 3 * 14 and len(trained) == 2 * 14
    for facts in ranks:
        torch.testing.assert_close(facts["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
        assert facts["gradients"].keys() == trained
        for name in trained:
            torch.testing.assert_close(facts["gradients"][name], parameters[name].grad, rtol=1e-5, atol=1e-5)
        for name, parameter in parameters.items():
            assert torch.equal(facts["whole"][name], parameter.detach()), name
            assert torch.equal(facts["after"][name], facts["local"][name]), name
    for name in packed:
        parts = [facts["local"][name] for facts in ranks]
        assert [len(part) for part in parts] == [len(parameters[name]) // 2] * WORLD
        assert torch.equal(torch.cat(parts), parameters[name].detach())
        assert parts[0].dtype == parameters[name].dtype


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
