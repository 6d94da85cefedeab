"""LoRA adapters, of PEFT, mlx-lm and llama.cpp: what they are, and checkpoints with them."""

from edgeq.adapters.adapted import AdaptedCheckpoint, adapted
from edgeq.adapters.changes import Adapter
from edgeq.adapters.reading import CONFIG, Given, given_adapters, read_adapter, read_folder

__all__ = [
    "CONFIG",
    "AdaptedCheckpoint",
    "Adapter",
    "Given",
    "adapted",
    "given_adapters",
    "read_adapter",
    "read_folder",
]
