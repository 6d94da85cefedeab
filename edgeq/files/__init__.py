"""Results that appear at their names whole or not at all, and what killed runs leave behind."""

from edgeq.files.leftovers import Leftover, find_leftovers
from edgeq.files.publish import new_file, new_folder

__all__ = ["Leftover", "find_leftovers", "new_file", "new_folder"]
