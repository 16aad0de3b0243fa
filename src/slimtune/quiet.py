"""What the libraries underneath should not say on a user's terminal."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Silence progress bars and notices of transformers and the hub, and anything that phones home.

    Called by the command line before they are imported; a variable that the user has set stays as it is.
    """
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
