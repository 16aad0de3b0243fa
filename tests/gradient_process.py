"""One process of several that sketch gradients together, of a toy: `python gradient_process.py RANK FOLDER`."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimtune.calib.gradients import Batch, sketch_gradients

WORLD = 2


class Toy(nn.Module):
    """An embedding, two linears and a loss."""

    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.up, self.down = nn.Embedding(50, 24), nn.Linear(24, 40), nn.Linear(40, 50)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> SimpleNamespace:
        scores = self.down(torch.tanh(self.up(self.embedding(input_ids))))[:, :-1]
        return SimpleNamespace(loss=nn.functional.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten()))


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(50, (2, 6 + i), generator=generator) for i in range(6)]
    return [{"input_ids": each, "labels": each} for each in tokens]


def sketch(data: list[Batch], passes: int):
    model = Toy()
    return sketch_gradients(model, {"up": model.up, "down": model.down}, data, directions=4, passes=passes)


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for number in (1, 3):
        sketch(batches()[rank::WORLD], number).save(folder / f"{rank}-{number}")
    dist.destroy_process_group()
