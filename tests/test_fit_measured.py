"""`edgeq fit` against processes that do it, on models of the real shapes: within 3 % of their peak.

EDGEQ_REF_DIR names a folder with the checkpoints, quantized with the default recipes; their weights may be random.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from documents import ROOT


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        import check_fit

        return check_fit


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("index", range(13))
def test_the_peak_of_a_conversation(tool: ModuleType, index: int) -> None:
    pytest.importorskip("edgeq.backends.cpu", reason="the native backend is not built", exc_type=ImportError)
    setting, folder = tool.MEMORY[index], Path(os.environ.get("EDGEQ_REF_DIR", ""))
    if "EDGEQ_REF_DIR" not in os.environ or not (folder / setting.name).exists():
        pytest.skip(f"EDGEQ_REF_DIR names no folder with the checkpoint {setting.name}")
    peak, predicted = tool.measured(tool.PEAK, folder, setting)
    assert abs(predicted / peak - 1) <= 0.03, (
        f"{setting}: {predicted / 1e6:.0f} MB predicted, {peak / 1e6:.0f} measured"
    )


def test_every_setting_is_tried(tool: ModuleType) -> None:
    assert len(tool.MEMORY) == 13
    assert len(tool.SPEED) >= 6
