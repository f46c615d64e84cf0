"""`python -m coachhook`: the command line."""

from coachhook.cli import main

main()
