"""`python -m coachhook`: the command line."""

from coachhook.cli.app import main

main()
