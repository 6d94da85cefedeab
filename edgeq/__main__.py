"""`python -m edgeq`: the same as the command `edgeq`."""

from edgeq.cli import main

main()
