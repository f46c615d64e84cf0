"""Where the result of a script goes: to people as a table, to machines as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def put(result: dict[str, Any], table: Table, json_to: str | None) -> None:
    """Print `table`, after writing `result` to the path `json_to` if given; for "-", print only
    `result`."""
    if json_to == "-":
        json.dump(result, sys.stdout)
        return
    if json_to is not None:
        Path(json_to).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    Console().print(table)
