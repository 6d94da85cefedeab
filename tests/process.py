"""Python in a process of its own, for what is decided at start-up or measured for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(
    code: str, *arguments: str, without: tuple[str, ...] = (), timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` with the edgeq that the tests run with: an installed one before the checkout.

    Variables whose names begin with one of `without` are not handed on.
    """
    paths = [path for path in sys.path if path and Path(path) != ROOT]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(without or ("\0",))}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env={**kept, "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
