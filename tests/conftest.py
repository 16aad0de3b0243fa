"""What every test starts from: no network, few threads, the same seed, and real data only where it is at hand.

pytest-randomly shuffles the tests and prints its seed in the header: `--randomly-seed=N` repeats that order.
"""

import os
from pathlib import Path

# Before transformers is imported anywhere: it reads these once. Tests that start a process hand them on.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent

torch.set_num_threads(min(2, torch.get_num_threads()))
settings.register_profile("slimtune", deadline=None, derandomize=True)  # a shared machine is slow at random
settings.load_profile("slimtune")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same weights, whichever test ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that may lie beside the repository; tests that need it skip where it does not."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data in ../shared/data beside the repository")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared_data: Path) -> Path:
    """The Hugging Face folder of a trained Llama with 260 thousand parameters."""
    folder = shared_data / "models" / "stories260K" / "hf"
    if not (folder / "config.json").is_file():
        pytest.skip("needs the model stories260K in ../shared/data/models beside the repository")
    return folder
