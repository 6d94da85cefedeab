"""Calling libraries whose failures are not ours to foresee.

A library written in Rust raises a `PanicException` where it gives up, which is no `Exception`; one that talks to the
network raises whatever the answer made of it. Both have to end as one clear error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgeq.errors import EdgeqError

__all__ = ["translated"]

_PYTHONS_OWN = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)


@contextmanager
def translated(translate: Callable[[BaseException], EdgeqError]) -> Iterator[None]:
    """Raise `translate(error)` for whatever the block raises, panics included.

    Errors of our own, interruptions and a lack of memory pass as they are.
    """
    try:
        yield
    except (EdgeqError, *_PYTHONS_OWN):
        raise
    except BaseException as error:
        raise translate(error) from error
