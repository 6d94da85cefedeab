"""What a model is made of: the declaration of its tensors, and the trees of weights that it runs on."""

from edgeq.formats.qmatrix import Matrix, QMatrix
from edgeq.weights.streamed import StreamedLayers, Turns
from edgeq.weights.table import (
    Part,
    Role,
    TensorSpec,
    all_tensors,
    declare_mtp,
    declare_text,
    declare_vision,
    mtp_tensors,
    text_tensors,
    vision_tensors,
)
from edgeq.weights.trees import (
    Affine,
    AttentionWeights,
    DeltaNetWeights,
    LayerWeights,
    MergerWeights,
    MLPWeights,
    MTPWeights,
    TextWeights,
    VisionBlockWeights,
    VisionWeights,
    leaves,
    map_tree,
)

__all__ = [
    "Affine",
    "AttentionWeights",
    "DeltaNetWeights",
    "LayerWeights",
    "MLPWeights",
    "MTPWeights",
    "Matrix",
    "MergerWeights",
    "Part",
    "QMatrix",
    "Role",
    "StreamedLayers",
    "TensorSpec",
    "TextWeights",
    "Turns",
    "VisionBlockWeights",
    "VisionWeights",
    "all_tensors",
    "declare_mtp",
    "declare_text",
    "declare_vision",
    "leaves",
    "map_tree",
    "mtp_tensors",
    "text_tensors",
    "vision_tensors",
]
