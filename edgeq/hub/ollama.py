"""Models that ollama has on this machine: read where they are, never written.

A model is a manifest, `manifests/HOST/NAMESPACE/MODEL/TAG`, that names blobs by their digest, `blobs/sha256-...`
(https://github.com/ollama/ollama, manifest/ and types/model/name.go). This finds the manifest that a name means;
`edgeq.checkpoint.ollama` opens it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from edgeq.errors import UsageError
from edgeq.inputs import exists, expand_user, is_file, is_folder
from edgeq.printable import first_of

__all__ = ["find_manifest"]

_NAME = re.compile(
    r"((?P<host>[\w.-]+(:\d+)?)/)??((?P<namespace>[\w-][\w.-]*)/)?(?P<model>[\w.-]+)(:(?P<tag>[\w.-]+))?", re.ASCII
)
_PLACES = (  # where packages for the whole system put them, after the user's own
    "/usr/share/ollama/.ollama/models",
    "/var/lib/ollama/.ollama/models",
    "/var/lib/ollama/models",
    "/var/lib/ollama",
    "/var/snap/ollama/common/models",
)


def find_manifest(name: str) -> Path:
    """The manifest of "[HOST/][NAMESPACE/]MODEL[:TAG]", as ollama completes and compares names (without regard to
    case). UsageError if ollama does not have it, with what it has.
    """
    parts = _NAME.fullmatch(name)
    if parts is None or ".." in name:
        raise UsageError(f"{name!r} is no name of a model of ollama's", hint="name one as `ollama list` shows it")
    wanted = [parts["host"] or "registry.ollama.ai", parts["namespace"] or "library", parts["model"]]
    wanted.append(parts["tag"] or "latest")
    stores = [store for store in _stores() if is_folder(store)]
    for store in stores:
        for manifests in ("manifests-v2", "manifests"):
            if found := _descend(store / manifests, wanted):
                return found
    known = sorted({known for store in stores for known in _known(store)})
    where = " or ".join(map(str, stores)) or "any of the folders that it uses"
    raise UsageError(
        f"ollama has no model {name} in {where}{', but' if known else ''}{':' if known else ''}",
        details=first_of(known),
        hint=f"run `ollama pull {name}`, or set OLLAMA_MODELS to the folder with its manifests and blobs",
    )


def _stores() -> Iterator[Path]:
    """Where models can be, the likeliest first: what OLLAMA_MODELS says is all that counts then."""
    if place := os.environ.get("OLLAMA_MODELS", "").strip().strip("'\""):
        yield expand_user(Path(place))
        return
    yield expand_user(Path("~/.ollama/models"))
    yield from map(Path, _PLACES)


def _descend(folder: Path, names: list[str]) -> Path | None:
    """The file at the end of a path, whose parts may be written otherwise."""
    if not names:
        return folder if is_file(folder) else None
    if not is_folder(folder):
        return None
    try:
        entries = [entry for entry in folder.iterdir() if entry.name.lower() == names[0].lower()]
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}", hint="read it as a user who may") from None
    found = (_descend(entry, names[1:]) for entry in sorted(entries, key=lambda entry: entry.name != names[0]))
    return next((path for path in found if path), None)


def _known(store: Path) -> Iterator[str]:
    """The models in a store, as short as ollama lists them."""
    for manifests in ("manifests-v2", "manifests"):
        for path in (store / manifests).glob("*/*/*/*") if exists(store / manifests) else ():
            host, namespace, model, tag = path.relative_to(store / manifests).parts
            prefix = "" if host == "registry.ollama.ai" and namespace == "library" else f"{namespace}/"
            yield f"{'' if host == 'registry.ollama.ai' else f'{host}/'}{prefix}{model}:{tag}"
