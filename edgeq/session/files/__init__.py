"""Session files: a conversation with its states, so that it goes on elsewhere and later as if it had never stopped.

The format is described in docs/reference/sessions.md. A file grows (`edgeq.formats.growing`): what a turn adds is its
keys and values, a state, and the conversation's text and ids. When it is read, states stay in the mapped file until
they are needed, and are held to their checksums before they are.

file.py saves a conversation, writing.py writes what is new of it (known.py: what is old), saved.py reads it back, from
arrays that checked.py holds to their checksums, and with the states of states.py.
"""

from __future__ import annotations

from edgeq.session.files.file import SessionFile
from edgeq.session.files.saved import SavedSession

__all__ = ["SavedSession", "SessionFile"]
