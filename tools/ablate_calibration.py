#!/usr/bin/env python3
"""What each stage of calibration gains: one folder for every set of stages, each with one more than the one before.

    tools/ablate_calibration.py MODEL TEXT OUT [--bpw 4.65]
    tools/compare_formats.py MODEL OUT/* --text held-out.txt

The table in docs/concepts/quantization.md is of these folders. Without allocation the bits are those of the recipe q4.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgeq.quant import quantize  # noqa: E402
from edgeq.quant.calibrate.request import BUDGETS, Budget  # noqa: E402
from edgeq.quant.calibrate.rounding import EFFORTS, Effort  # noqa: E402

STANDARD, ROUNDING = BUDGETS["standard"], EFFORTS["standard"]
PLAIN = STANDARD._replace(equalize=False)
STAGES: dict[str, tuple[Budget, Effort]] = {
    "1-rounding": (PLAIN, ROUNDING._replace(sweeps=0, share=0.0)),
    "2-descent": (PLAIN, ROUNDING._replace(share=0.0)),
    "3-correction": (PLAIN, ROUNDING),
    "4-equalization": (STANDARD, ROUNDING),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="to calibrate on, UTF-8")
    parser.add_argument("out", type=Path, help="folder of the folders")
    parser.add_argument("--bpw", type=float, default=4.65, help="bits per weight for the allocation")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    quantize(args.model, args.out / "0-search", mtp=False, vision="none")
    for name, (budget, effort) in STAGES.items():
        with (
            patch("edgeq.quant.calibrate.request.BUDGETS", {"standard": budget}),
            patch("edgeq.quant.calibrate.request.EFFORTS", {"standard": effort}),
        ):
            quantize(args.model, args.out / name, calibrate=args.text, keep_bits=True, mtp=False, vision="none")
        print(name, flush=True)
    quantize(args.model, args.out / "5-allocation", calibrate=args.text, target_bpw=args.bpw, mtp=False, vision="none")


if __name__ == "__main__":
    main()
