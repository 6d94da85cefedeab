"""edgeq: quantize and run Qwen3.5 0.8B, 2B and 4B on laptops, Macs and Raspberry Pi.

    import edgeq

    edgeq.quantize("Qwen/Qwen3.5-2B", "q2b", bits=4)
    model = edgeq.load("q2b")
    for piece in model.chat().send("Hello!"):
        print(piece.text, end="")

`load` and `quantize` are imported when first used, so that `import edgeq` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeq.errors import (
    EdgeqError,
    MediaError,
    MemoryBudgetError,
    ModelError,
    NetworkError,
    QualityError,
    UsageError,
)
from edgeq.version import __version__

if TYPE_CHECKING:
    from edgeq.api import Model, load, load_session
    from edgeq.generate import GenerationSettings
    from edgeq.quant import quantize
    from edgeq.session.chat import Chat
    from edgeq.session.prompt import Prompt
    from edgeq.session.reply import Piece, Reply, Usage
    from edgeq.session.visual_settings import VisualSettings
    from edgeq.text.tool_calls import ToolCall
    from edgeq.vision.visual import Visual

_LAZY = {
    "Chat": "edgeq.session.chat",
    "GenerationSettings": "edgeq.generate",
    "Model": "edgeq.api",
    "Piece": "edgeq.session.reply",
    "Prompt": "edgeq.session.prompt",
    "Reply": "edgeq.session.reply",
    "ToolCall": "edgeq.text.tool_calls",
    "Usage": "edgeq.session.reply",
    "Visual": "edgeq.vision.visual",
    "VisualSettings": "edgeq.session.visual_settings",
    "load": "edgeq.api",
    "load_session": "edgeq.api",
    "quantize": "edgeq.quant",
}

__all__ = [
    "Chat",
    "EdgeqError",
    "GenerationSettings",
    "MediaError",
    "MemoryBudgetError",
    "Model",
    "ModelError",
    "NetworkError",
    "Piece",
    "Prompt",
    "QualityError",
    "Reply",
    "ToolCall",
    "Usage",
    "UsageError",
    "Visual",
    "VisualSettings",
    "__version__",
    "load",
    "load_session",
    "quantize",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "vision":
        return import_module("edgeq.vision")
    if name not in _LAZY:
        raise AttributeError(f"module 'edgeq' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
