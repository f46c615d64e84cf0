"""Scripts that tell a mistake in one line, as `coachhook` does."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from coachhook.errors import CoachhookError


def run_script(main: Callable[..., Any]) -> None:
    """`main` with the command line's arguments. What says itself what was wrong ends it with exit
    status 2, without a traceback."""
    try:
        typer.run(main)
    except (CoachhookError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
