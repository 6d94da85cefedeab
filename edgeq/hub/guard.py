"""What a hub says is checked before `huggingface_hub` makes names of files from it.

The library keeps a file under its ETag, in a folder named after the commit, and links it under the repository's name
for it. A server, or whoever stands between, that answers with `../../x` as ETag has it write outside of its cache
(so with version 2.4). Here every answer passes a hook of the HTTP client, and such an answer ends the download.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from edgeq.errors import NetworkError
from edgeq.printable import brief, printable

__all__ = ["guard_client"]

_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_TAG = re.compile(r'(W/)?"?[A-Za-z0-9][A-Za-z0-9_.=+:~-]{0,199}"?')
_PART = re.compile(r"(?!\.{1,2}$)[^/\\]{1,255}")  # of a file's path
_LONGEST_WAIT = 60  # seconds that a server may ask for before a request is tried again

_HEADERS = {"etag": _TAG, "x-linked-etag": _TAG, "x-repo-commit": _COMMIT, "x-xet-hash": _TAG}
_FIELDS = {"sha": _COMMIT, "oid": _TAG, "sha256": _TAG, "blobId": _TAG, "xetHash": _TAG}


def guard_client() -> None:
    """Make every HTTP client that `huggingface_hub` creates from now on check its answers."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    if not isinstance(_http._GLOBAL_CLIENT_FACTORY, _GuardedFactory):  # there is no public way to ask for it
        set_client_factory(_GuardedFactory(_http._GLOBAL_CLIENT_FACTORY))


class _GuardedFactory:
    """Makes clients as `inner` does, with the check added."""

    def __init__(self, inner: Callable[[], Any]) -> None:
        self._inner = inner

    def __call__(self) -> Any:
        client = self._inner()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [*hooks.get("response", []), _check]}
        return client


def _check(response: Any) -> None:
    """NetworkError for an answer that would have a file written where it does not belong, or waits too long."""
    if response.request.method == "HEAD":  # the names of what is stored come from these only
        for name, pattern in _HEADERS.items():
            _expect(pattern, response.headers.get(name), name)
    wait = response.headers.get("retry-after", "")
    if wait.isascii() and wait.isdigit() and (len(wait) > 9 or int(wait) > _LONGEST_WAIT):
        raise NetworkError(f"the Hugging Face Hub asks to wait {brief(wait)} seconds", hint="try again later")
    if "/api/models/" in response.request.url.path and response.status_code == 200:
        response.read()
        for entry in _entries(response.json()):
            _check_entry(entry)


def _entries(listing: Any) -> Iterator[Mapping[str, Any]]:
    """The objects that say where files are: a model's description and its `siblings`, or the entries of a tree."""
    described = [listing, *_list(listing.get("siblings"))] if isinstance(listing, Mapping) else _list(listing)
    for entry in described:
        if isinstance(entry, Mapping):
            yield entry
            if isinstance(entry.get("lfs"), Mapping):
                yield entry["lfs"]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _check_entry(entry: Mapping[str, Any]) -> None:
    for field, pattern in _FIELDS.items():
        _expect(pattern, entry.get(field), field)
    for field in ("path", "rfilename"):
        name = entry.get(field, "x")
        if not isinstance(name, str) or printable(name) != name or not all(map(_PART.fullmatch, name.split("/"))):
            raise _unsafe(field, name)


def _expect(pattern: re.Pattern[str], text: Any, what: str) -> None:
    if text is not None and not (isinstance(text, str) and pattern.fullmatch(text)):
        raise _unsafe(what, text)


def _unsafe(what: str, text: Any) -> NetworkError:
    return NetworkError(
        f"the answer of the Hugging Face Hub has {what} {brief(text)}, which cannot be the name of a file",
        hint="check HF_ENDPOINT and the network between",
    )
