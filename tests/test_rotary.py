"""Rotary frequencies are those of transformers, to the bit where it matters: a rounding off is 0.01 radians at position
200,000."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.config import Linear, RopeConfig, Yarn, yarn_attention_factor
from edgeq.model import rotary

SECTIONS = (11, 11, 10)
# Of transformers 5.23 (Qwen3_5TextRotaryEmbedding.inv_freq, head_dim 256, partial_rotary_factor 0.25), as float32.
TRANSFORMERS = {
    RopeConfig(1e7, 64, SECTIONS): (
        "0000803f2bb31a3f1bf8ba3e35f8613e778d083e5609a53d3f76473d7711f13c39ad913c5210303c15cad43b7d96803b0d691b3bedd3bb3a"
        "e201633a022e093a60cba539c1604839e22cf2387e58923852df303841c4d537ab2d8137c41f1c37c1b0bc36c60c64364acf09364c8ea635"
        "574c49359d49f3348e04933444af3134"
    ),
    RopeConfig(1e7, 64, SECTIONS, Yarn(4.0, 262144, yarn_attention_factor(4.0))): (
        "0000803f2bb31a3f1bf8ba3e35f8613e778d083e5609a53d3f76473d7711f13c39ad913c5210303c15cad43b7d96803b0d691b3bedd3bb3a"
        "e201633a64a3f8393eb586398b0510390d5c9738067e1b3868c39a37edf61237ab2d8136c41f1c36c1b0bc35c60c64354acf09354c8ea634"
        "574c49349d49f3338e04933344af3133"
    ),
    RopeConfig(1e4, 64, SECTIONS, Yarn(4.0, 4096, yarn_attention_factor(4.0), 8.0, 2.0, truncate=False)): (
        "0000803f11f93f3f9af50f3f9be8d73e9be8a13e23d4723e8718363e778d083ecdcccc3d0d94993dc255663d15ba2c3de386013d4f43c23c"
        "39ad913cf27b5a3c8db1113c0e3fb43bd2f1543bcc4de93aa4d25c3a0d691b3a2815e9398ec9ae396f1283398c944439166a13392517dd38"
        "60cba53815a8783853773a3872d40b38"
    ),
    RopeConfig(5e5, 64, SECTIONS, Linear(3.0)): (
        "abaaaa3e5d82623ed34f163e847ec73d7562843d80b32f3de730e93cefbe9a3c0b614d3c314a083c59e2b43be711703b8a4f1f3b0370d33a"
        "6b4f8c3a57383a3ad726f7399c02a439bcac593901731039a0b6bf3845717e382dd928388f18e037d8b59437645e453760f9023745d4ad36"
        "dfb46636de181936df30cb3575d68635"
    ),
}


@pytest.mark.parametrize("rope", TRANSFORMERS, ids=["plain", "yarn", "yarn-spelled-out", "linear"])
def test_frequencies(rope: RopeConfig) -> None:
    expected = np.frombuffer(bytes.fromhex(TRANSFORMERS[rope]), np.float32)
    found = rotary.frequencies(rope)
    assert found.dtype == np.float32
    # On the ramp itself torch's vectorised arithmetic may round once more or less.
    exact = rope.scaling is None or isinstance(rope.scaling, Linear)
    assert np.array_equal(found, expected) if exact else np.allclose(found, expected, rtol=1.2e-7, atol=0)


def test_yarn_sharpens_by_the_papers_factor() -> None:
    assert yarn_attention_factor(4.0) == pytest.approx(1.138629436111989, rel=1e-15)
    assert yarn_attention_factor(1.0) == yarn_attention_factor(0.5) == 1.0


def test_axes_interleave() -> None:
    assert rotary.axes(RopeConfig(1e4, 16, (3, 3, 2))).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
