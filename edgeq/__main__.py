"""`python -m edgeq`, and the command `edgeq` itself."""

from __future__ import annotations

import os
import signal

__all__ = ["main"]


def main() -> None:
    """Run the command line; exits the process. What it needs is imported where a failure is told."""
    try:
        from edgeq.shortage import exit_on_shortage
    except (MemoryError, OSError, ImportError) as error:
        raise SystemExit(_no_memory(error)) from None
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:  # there is nothing to clean up yet, and an exception would leave a traceback from anywhere in an import
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    with exit_on_shortage():
        from edgeq.cli import main as run

        try:
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            run()
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def _no_memory(error: BaseException) -> int:
    """The exit code where there is not even room for the module that tells such things well."""
    import sys

    sys.stderr.write(f"error: not enough memory to start ({error})\nhint: raise the limit (ulimit)\n")
    return 3


if __name__ == "__main__":
    main()
