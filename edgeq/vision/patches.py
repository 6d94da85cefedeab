"""Frames as patches: what the vision tower takes."""

from __future__ import annotations

import math

import numpy as np

from edgeq.formats.bf16 import Float32
from edgeq.processor import PixelConfig, ProcessorConfig
from edgeq.vision.resize import UInt8
from edgeq.vision.sizes import grid_of

__all__ = ["Patches", "normalized"]


class Patches:
    """The patches of some frames, float32 [patches, values of a patch], made when rows of them are asked for.

    They are in block order: the squares of patches that become tokens row by row, and the patches of each likewise.
    The values of a patch are [3 channels, frames, rows, columns]; an odd last frame, as that of an image, is there
    twice.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, frames: UInt8, config: ProcessorConfig, pixels: PixelConfig) -> None:
        """frames: uint8 [frames, 3, height, width], sides multiples of `config.factor`."""
        self.frames, self.config, self.pixels = frames, config, pixels
        self.grid = grid_of(len(frames), (frames.shape[2], frames.shape[3]), config)
        self.shape = (math.prod(self.grid), config.patch_values)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Float32:
        start, stop, step = rows.indices(len(self))
        row = self.grid[2] * self.config.merge_size  # patches of a row of squares
        out = np.empty((max(stop - start, 0), self.shape[1]), np.float32)
        for square in range(start // row, -(-stop // row) if len(out) else 0):
            first, last = max(start, square * row), min(stop, (square + 1) * row)
            out[first - start : last - start] = self._row_of_squares(square)[first - square * row : last - square * row]
        return out[::step]

    def _row_of_squares(self, index: int) -> Float32:
        """One row of squares of one temporal patch: float32 [patches, values]."""
        c, (_, height, width) = self.config, self.grid
        p, m, t = c.patch_size, c.merge_size, c.temporal_patch_size
        patch, row = divmod(index, height // m)
        frames = [self.frames[min(i, len(self.frames) - 1)] for i in range(patch * t, (patch + 1) * t)]
        x = np.stack([frame[:, row * c.factor : (row + 1) * c.factor] for frame in frames])
        x = x.reshape(t, 3, m, p, width // m, m, p).transpose(4, 2, 5, 1, 0, 3, 6)
        return normalized(x, self.pixels, axis=3).reshape(-1, self.shape[1])


def normalized(x: UInt8, c: PixelConfig, axis: int) -> Float32:
    """Values of pixels as the tower takes them, with the same roundings as torchvision; the channels are on `axis`."""
    shape = (-1,) + (1,) * (x.ndim - axis - 1)
    mean, std = (np.array(values, np.float32).reshape(shape) for values in (c.mean, c.std))
    factor = np.float32(1 / c.rescale_factor)
    y = x.astype(np.float32)
    if c.do_rescale and c.do_normalize:  # in one step: 255 times the mean is taken off values up to 255
        mean, std = mean * factor, std * factor
    elif c.do_rescale:
        y *= np.float32(c.rescale_factor)
    if c.do_normalize:
        y -= mean
        y /= std
    return y
