"""One self-contained HTML file from the JSON of a run: tables, curves, gates, every edit."""

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from coachhook.errors import ConfigError
from coachhook.evaluation.bootstrap import METRICS, harmonic, interval, lead
from coachhook.report.runs import Run
from coachhook.report.shapes import check_results
from coachhook.system.json_shapes import MisshapenError, MissingError
from coachhook.system.tensor_file import write

Point = Mapping[str, Any]
_MOST_POINTS = 6
# Edits of a memory that are shown one by one.
_MOST_ENTRIES = 50
# Control characters and halves of surrogate pairs.
_NO_TEXT = dict.fromkeys({*range(32), *range(0xD800, 0xE000)} - set(b"\t\n\r"), "\ufffd")


def render(run: Run) -> str:
    """The report of `run`. Raises `ConfigError` if matplotlib or jinja2 is not installed, and for a
    run that is damaged, of another version or without any evaluation."""
    try:
        from jinja2 import Environment, StrictUndefined

        from coachhook.report import figures
    except ImportError as error:
        raise ConfigError(
            f"a report needs matplotlib and jinja2 ({error}); pip install 'coachhook[report]'"
        ) from None
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_printable,
    )
    text = (files("coachhook.report") / "page.html").read_text(encoding="utf-8")
    try:
        check_results(run.editors)
    except MissingError as error:
        raise ConfigError(f"the run is of another version: {error}; run it again") from None
    except MisshapenError as error:
        raise ConfigError(f"this is no run, or a damaged one ({error}); run it again") from error
    return environment.from_string(text).render(_contents(run, figures))


def _printable(value: Any) -> Any:
    """Text with U+FFFD in place of characters that no page can hold; other values unchanged."""
    return value.translate(_NO_TEXT) if isinstance(value, str) else value


def _contents(run: Run, figures: Any) -> dict[str, Any]:
    """The variables of the template."""
    points = {name: result["points"] for name, result in run.editors.items() if result["points"]}
    if not points:
        raise ConfigError("no editor of this run got as far as its first evaluation")
    # Editors that failed half-way answered fewer requests: they are left out, unless all failed.
    whole = {n: p for n, p in points.items() if not run.editors[n]["failure"]} or points
    # The best first; where there is no harmonic mean, by reliability.
    finished = dict(sorted(whole.items(), key=lambda item: _merit(item[1][-1]), reverse=True))
    last = {name: points[-1] for name, points in finished.items()}
    gates = {name: points for name, points in finished.items() if points[-1]["gate"]}
    return {
        "run": run,
        "metrics": METRICS,
        "table": _table(run, last),
        "before_preferences": next(iter(last.values()))["before_preferences"],
        "failures": {n: r["failure"] for n, r in run.editors.items() if r["failure"]},
        "curves": _curves(figures, finished),
        "retention": {
            name: figures.heat_map(
                f"Retention: {name}",
                [
                    (p["edits"], {int(b): share for b, share in p["retention"].items()})
                    for p in points
                ],
            )
            for name, points in finished.items()
            if points[-1]["retention"]
        },
        "gates": {name: _populations(figures, name, points) for name, points in gates.items()},
        "samples": {name: points[-1]["gate"]["samples"] for name, points in gates.items()},
        "n_layers": {name: len(points[-1]["gate"]["layers"]) for name, points in gates.items()},
        "memories": {
            name: {
                **point["memory"],
                "picture": figures.memory_texts(f"Forms and neighbours: {name}", point["memory"]),
                "worst": sorted(point["memory"]["entries"], key=_badly_told)[:_MOST_ENTRIES],
            }
            for name, point in last.items()
            if point.get("memory")
        },
        "overhead": _overhead(figures, {name: run.editors[name] for name in finished}),
        "records": {name: point["records"] for name, point in last.items()},
    }


def _some(points: Sequence[Point]) -> Sequence[Point]:
    """At most `_MOST_POINTS` evenly spaced points, with the last among them."""
    return points[:: -math.ceil(len(points) / _MOST_POINTS)][::-1]


def _merit(point: Point) -> tuple[float, float]:
    return point["harmonic_mean"] or 0.0, point["reliability"]["greedy"] or 0.0


def _badly_told(entry: Point) -> tuple[bool, int, float]:
    """The order of a memory's edits: those first that are met without opening, and then those that
    a neighbour comes closest to, of edits in force."""
    closed = sum(not form["opens"] for form in entry["forms"])
    beside = entry["nearest"]["cosine"] if entry["nearest"] else -1.0
    return not entry["enabled"], -closed, -beside


def write_report(run: Run, path: Path) -> None:
    """Write the report to `path`, whole or not at all."""
    write(path, render(run).encode())


def _table(run: Run, last: Mapping[str, Point]) -> list[dict[str, Any]]:
    """A row an editor; the first one's lead over each of the others."""
    first = next(iter(last))
    rows = []
    for name, point in last.items():
        records, result = point["records"], run.editors[name]
        asked_the_same = name != first and len(records) == len(last[first]["records"])
        rows.append(
            {
                "name": name,
                "edits": point["edits"],
                "scores": {metric: point[metric] for metric in METRICS},
                "harmonic": harmonic(records, "greedy"),
                "interval": interval(records, lambda some: harmonic(some, "greedy")),
                "lead": lead(last[first]["records"], records, "greedy") if asked_the_same else None,
                "preferences": point["preferences"],
                "before": point["before_reliability"],
                "already_true": point["already_true"],
                "perplexity": point["perplexity_after"] / point["perplexity_before"] - 1,
                "divergence": point["divergence"],
                "gate": point["gate"],
                "seconds": result.get("seconds_per_edit"),
                "bytes": result.get("bytes_held"),
                "peak": result.get("peak_bytes"),
                "overhead": result.get("overhead"),
            }
        )
    best = max((row["harmonic"] for row in rows if row["harmonic"] is not None), default=None)
    for row in rows:
        row["best"] = row["harmonic"] is not None and row["harmonic"] == best
    return rows


def _curves(figures: Any, finished: Mapping[str, Sequence[Point]]) -> list[str]:
    if all(len(points) < 2 for points in finished.values()):
        return []
    found = []
    for metric in (*METRICS, "harmonic mean"):
        lines = {}
        for name, points in finished.items():
            line = [(p["edits"], _greedy(p, metric)) for p in points]
            line = [(edits, share) for edits, share in line if share is not None]
            if line:
                lines[name] = line
        if lines:
            found.append(figures.curves(f"{metric.capitalize()}, greedy", lines))
    return found


def _greedy(point: Point, metric: str) -> float | None:
    score: float | None = (
        point["harmonic_mean"] if metric == "harmonic mean" else point[metric]["greedy"]
    )
    return score


def _populations(figures: Any, name: str, points: Sequence[Point]) -> str:
    gate = points[-1]["gate"].get("gate")
    layers = [(point["edits"], point["gate"]["layers"]) for point in _some(points)]
    title = "Cosines" if gate == "memory" else "z-scores"
    drawn: str = figures.populations(f"{title}: {name}", gate, layers)
    return drawn


def _overhead(figures: Any, results: Mapping[str, Any]) -> list[str]:
    found = {n: r["overhead"] for n, r in results.items() if r.get("overhead")}
    if not found:
        return []
    unit = "unedited model's speed = 1"
    return [
        figures.bars(title, unit, {name: speeds[key] for name, speeds in found.items()}, 1.0)
        for title, key in (
            ("First token", "first_token_ratio"),
            ("Tokens a second", "tokens_per_second_ratio"),
        )
    ]
