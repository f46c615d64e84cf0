"""Reading a run's results: the folder of a comparison, or the JSON document of one command."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coachhook.errors import ConfigError
from coachhook.system.json_shapes import MisshapenError, checked, parsed

# Version of the folders and documents that bench.comparison.quality writes.
VERSION = 2


@dataclass(frozen=True)
class Run:
    """A run's results. title: what was run, for a heading. notes: settings by name. editors: by
    name, the result that bench.comparison.quality writes for each; a single evaluation counts as
    one editor with one point and no costs."""

    title: str
    notes: dict[str, str]
    editors: dict[str, dict[str, Any]]


def load_run(path: Path) -> Run:
    """Read a folder of `bench.comparison.quality --run`, or a file with the JSON of that script, of
    `coachhook eval` or of `coachhook demo`.

    Raises `ConfigError` if `path` is none of these, or of another version.
    """
    if path.is_dir():
        description = path / "protocol.json"
        if not description.exists():
            raise ConfigError(
                f"{path} is no folder of a comparison: it has no protocol.json; give one that "
                "bench.comparison.quality --run has written, or a file with the JSON of a run"
            )
        protocol = _document(description)
        results = [_document(file) for file in sorted(path.glob("*@*.json"))]
        return _comparison(path, protocol, {str(_of(r, "editor", path)): r for r in results})
    document = _document(path)
    if "protocol" in document:
        return _comparison(path, document["protocol"], _of(document, "editors", path))
    found = document.get("evaluation", document)
    if not isinstance(found, Mapping) or "records" not in found:
        raise ConfigError(
            f"{path} holds no run; give a folder of bench.comparison.quality --run, or the JSON of "
            "that script, of coachhook eval or of coachhook demo"
        )
    title = "The demo" if "evaluation" in document else "Edits in force"
    point = {"edits": _of(found, "n_requests", path), **found}
    return Run(title, {}, {"edits": {"editor": "edits", "failure": None, "points": [point]}})


def _comparison(path: Path, protocol: Any, editors: Any) -> Run:
    if isinstance(protocol, Mapping) and "batch_size" not in protocol and "version" in protocol:
        raise ConfigError(
            f"{path} compares no editors; a page is made of what bench.comparison.quality --run "
            "has written, and bench.comparison.ablations prints its own table"
        )
    version = _of(protocol, "version", path)
    if version != VERSION:
        raise ConfigError(
            f"{path} is a run of version {version}, and this is version {VERSION}; run it again"
        )
    if not editors:
        raise ConfigError(f"{path} has no finished editor yet; go on with the run first")
    if not isinstance(editors, Mapping) or not all(isinstance(r, dict) for r in editors.values()):
        raise ConfigError(f"{path} is no run: its editors are not results by name")
    edits, size = (_of(protocol, name, path) for name in ("edits", "batch_size"))
    if not (isinstance(edits, int) and isinstance(size, int)):
        raise ConfigError(f"{path} is no run: {edits!r} edits in batches of {size!r}")
    names = ("facts", "model", "batch_size", "every")
    notes = {name.replace("_", " "): str(_of(protocol, name, path)) for name in names}
    rounds = "in one batch" if size >= edits else f"in batches of {size}"
    return Run(f"{edits} edits {rounds}", notes, dict(editors))


def _document(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = checked(parsed(path.read_bytes()), dict[str, Any])
    except (OSError, MisshapenError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    return found


def _of(document: Any, key: str, path: Path) -> Any:
    if not isinstance(document, Mapping) or key not in document:
        raise ConfigError(f"{path} is no run, or one of another version: it has no {key!r}")
    return document[key]
