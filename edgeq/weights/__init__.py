"""What a model is made of: the table of its tensors, and the trees of weights that it runs on."""

from edgeq.formats.qmatrix import Matrix, QMatrix
from edgeq.weights.table import Part, Role, TensorSpec, all_tensors, mtp_tensors, text_tensors, vision_tensors
from edgeq.weights.trees import (
    AttentionWeights,
    DeltaNetWeights,
    LayerWeights,
    MLPWeights,
    TextWeights,
    map_text,
    text_weights,
)

__all__ = [
    "AttentionWeights",
    "DeltaNetWeights",
    "LayerWeights",
    "MLPWeights",
    "Matrix",
    "Part",
    "QMatrix",
    "Role",
    "TensorSpec",
    "TextWeights",
    "all_tensors",
    "map_text",
    "mtp_tensors",
    "text_tensors",
    "text_weights",
    "vision_tensors",
]
