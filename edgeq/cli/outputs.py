"""Names of results on the command line, looked at before any work."""

from __future__ import annotations

from os.path import abspath
from pathlib import Path

from edgeq.cli.console import say
from edgeq.inputs import check_output, expand_user, is_folder
from edgeq.printable import printable

__all__ = ["check_outputs"]


def check_outputs(*paths: Path | None, quiet: bool = False) -> None:
    """UsageError for a name that no file or folder can have. A line says which folder does not exist, and will be made
    with the result: it may be misspelled.
    """
    outputs = [path for path in paths if path is not None]
    for path in outputs:
        check_output(path)
    places = [Path(abspath(expand_user(path))) for path in outputs]  # noqa: PTH100  # a circle of links is no error
    told = set[Path]()
    for path, place in zip(outputs, places, strict=True):
        folder = place.parent
        if not (quiet or folder in told or set(places) & {folder, *folder.parents}) and _will_be_made(folder):
            say(f"note: the folder {printable(str(path.parent))} does not exist and will be made")
        told.add(folder)


def _will_be_made(folder: Path) -> bool:
    """Whether there is no such folder, and one can be made."""
    for place in (folder, *folder.parents):
        try:
            place.lstat()
        except FileNotFoundError:
            continue
        except (OSError, ValueError):  # below a file, in a circle of links, or no name that the system takes
            return False
        return place != folder and is_folder(place)
    return False
