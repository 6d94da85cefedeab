"""Names of results on the command line, looked at before any work."""

from __future__ import annotations

from pathlib import Path

from edgeq.cli.console import say
from edgeq.inputs import check_output, exists, expand_user
from edgeq.printable import printable

__all__ = ["check_outputs"]


def check_outputs(*paths: Path | None, quiet: bool = False) -> None:
    """UsageError for a name that no file or folder can have. A line says which folder does not exist, and will be made
    with the result: it may be misspelled.
    """
    made = dict[Path, None]()
    for path in paths:
        if path is not None:
            check_output(path)
            if not exists(folder := expand_user(path).parent):
                made[folder] = None
    for folder in () if quiet else made:
        say(f"note: the folder {printable(str(folder))} does not exist and will be made")
