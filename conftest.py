"""What must be known before anything is collected: how Triton runs here, or that it does not."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

collect_ignore = [] if importlib.util.find_spec("triton") else ["src/slimtune/kernels/triton.py"]
