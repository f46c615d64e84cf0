"""Every table of RESULTS.md: runs the comparisons, keeps their figures as JSON, writes the page.

    python -m bench.comparison.results COUNTERFACT QAEDIT --run DIR [--only NAME]...
    python -m bench.comparison.results --write

The first takes hours on two cores, and resumes where it was stopped; the second only writes the
page, from bench/comparison/results/*.json. COUNTERFACT and QAEDIT are files of CounterFact and
QAEdit records, which are not shipped here. The figures of each run go to NAME.json in that folder,
and a report to DIR/NAME.html.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import coachhook as ch
from bench.comparison import quality
from bench.comparison.editors import MAKERS, named
from bench.harness.facts import part_of
from bench.harness.run_folder import read_json, write, write_json
from bench.harness.script import Run, run_script
from coachhook.evaluation.bootstrap import METRICS, harmonic, interval, lead
from coachhook.facts.request import EditRequest
from coachhook.report.page import write_report
from coachhook.report.runs import load_run

MODEL = "smollm2"
KEPT = Path(__file__).with_name("results")
PAGE = Path(__file__).parents[2] / "RESULTS.md"
FORMS = ("greedy", "teacher_forced", "exact")
# The forms of the metrics in each harmonic mean; a second form is that of locality.
MEANS = {
    "greedy": ("greedy",),
    "greedy, locality teacher-forced": ("greedy", "teacher_forced"),
    "exact": ("exact",),
}


@dataclass(frozen=True)
class Asked:
    """One comparison: records `first` to `first + edits` of `data`, `batch_size` at a time."""

    name: str
    title: str
    data: str
    first: int
    edits: int
    batch_size: int
    every: int


RUNS = (
    Asked("qaedit", "Consecutive: QAEdit, 10 a batch", "qaedit", 0, 100, 10, 5),
    Asked("counterfact", "Consecutive: CounterFact, 10 a batch", "counterfact", 0, 200, 10, 5),
    Asked("single", "Single round: CounterFact, all in one batch", "counterfact", 0, 50, 50, 1),
)


def main(
    counterfact: Annotated[Path | None, typer.Argument()] = None,
    qaedit: Annotated[Path | None, typer.Argument()] = None,
    run: Run = None,
    only: Annotated[list[str] | None, typer.Option()] = None,
    write_only: Annotated[
        bool, typer.Option("--write", help="Measure nothing; write the page of what is kept.")
    ] = False,
) -> None:
    """Measure all comparisons, or those named, and write RESULTS.md."""
    if write_only and (counterfact or qaedit or run or only):
        raise typer.BadParameter("--write measures nothing: give it alone")
    if not write_only:
        if counterfact is None or qaedit is None or run is None:
            raise typer.BadParameter("give COUNTERFACT, QAEDIT and --run DIR; or --write alone")
        files = {"counterfact": counterfact, "qaedit": qaedit}
        unknown = set(only or ()) - {asked.name for asked in RUNS}
        if unknown:
            names = ", ".join(asked.name for asked in RUNS)
            raise typer.BadParameter(f"there is no run {unknown.pop()!r}; there are {names}")
        # All files are read before the first run, since each run takes an hour.
        facts = {name: ch.load_requests(file).requests for name, file in files.items()}
        for asked in RUNS:
            if not only or asked.name in only:
                keep(asked, files[asked.data], facts[asked.data], run)
    found = kept()
    if not found:
        raise typer.BadParameter(f"there is nothing in {KEPT} to write a page of")
    write(PAGE, page(found).encode())


def keep(asked: Asked, file: Path, facts: Sequence[EditRequest], place: Path) -> None:
    """Run one comparison and keep its figures."""
    requests = part_of(file, facts, asked.first, asked.edits)
    protocol = quality.protocol_of(file, requests, asked.batch_size, asked.every, MODEL)
    names = [named(name) for name in MAKERS]
    results = quality.compare(protocol, requests, names, place / asked.name)
    KEPT.mkdir(exist_ok=True)
    found = {"asked": vars(asked), **figures(protocol, results)}
    write_json(KEPT / f"{asked.name}.json", found)
    # The folder may also hold editors with other numbers, which the report leaves out.
    whole = load_run(place / asked.name)
    write_report(replace(whole, editors=dict(results)), place / f"{asked.name}.html")


def figures(protocol: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a comparison for the page: everything but the records themselves."""
    # An editor that failed half-way answered fewer records: it is listed apart, not compared.
    last = {name: r["points"][-1] for name, r in results.items() if not r["failure"]}
    best = max(last, key=lambda name: last[name]["harmonic_mean"] or 0.0, default=None)
    ahead = last[best]["records"] if best else None
    found = {}
    for name, result in results.items():
        if name not in last:
            found[name] = {"failure": result["failure"]}
            continue
        point, records = last[name], last[name]["records"]
        found[name] = {
            "failure": None,
            "machine": result["machine"],
            **{metric: point[metric] for metric in METRICS},
            "means": means_of(records, ahead if name != best else None),
            "preferences": point["preferences"],
            "perplexity_change": point["perplexity_after"] / point["perplexity_before"] - 1,
            "divergence": point["divergence"],
            "first_batch": point["first_batch"],
            "ordinary_open": point["gate"] and point["gate"]["ordinary"],
            "seconds_per_edit": result["seconds_per_edit"],
            "bytes_held": result["bytes_held"],
            "peak_bytes": result["peak_bytes"],
            "overhead": result["overhead"],
        }
    return {
        "protocol": dict(protocol),
        "before": before(last[best]) if best else None,
        "editors": found,
    }


def means_of(
    records: Sequence[dict[str, Any]], ahead: Sequence[dict[str, Any]] | None
) -> dict[str, Any]:
    """Harmonic means of an editor's records with their 95 % intervals. behind: 95 % interval of the
    paired difference from the records `ahead` of the best editor, None without them."""
    found = {}
    for form, forms in MEANS.items():
        mean = partial(_harmonic, forms)
        found[form] = {
            "mean": mean(records),
            "interval": interval(records, mean),
            "behind": None if ahead is None else lead(ahead, records, *forms),
        }
    return found


def _harmonic(forms: Sequence[str], records: Sequence[dict[str, Any]]) -> float | None:
    return harmonic(records, *forms)


def before(point: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of the unedited model, which are the same for every editor."""
    return {
        "reliability": point["before_reliability"],
        "already_true": point["already_true"],
        "preferences": point["before_preferences"],
        "facts": point["n_requests"],
    }


def kept() -> dict[str, dict[str, Any]]:
    """The figures of every run that was kept, in the order of `RUNS`."""
    files = {asked.name: KEPT / f"{asked.name}.json" for asked in RUNS}
    return {name: read_json(file) for name, file in files.items() if file.exists()}


def page(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """RESULTS.md."""
    parts = [(Path(__file__).with_name("results.head.md")).read_text(encoding="utf-8")]
    parts += [section(found) for found in runs.values()]
    return "\n".join(parts)


def section(found: Mapping[str, Any]) -> str:
    asked, before = found["asked"], found["before"]
    finished = {name: e for name, e in found["editors"].items() if not e["failure"]}
    failed = {name: e["failure"] for name, e in found["editors"].items() if e["failure"]}
    told = [f"`{name}` failed: {reason}\n" for name, reason in failed.items()]
    if not finished:
        return "\n".join([f"## {asked['title']}", "", *told])
    order = sorted(
        finished, key=lambda n: finished[n]["means"]["greedy"]["mean"] or 0, reverse=True
    )
    editors = {name: finished[name] for name in order}
    # A run may have been resumed on another machine.
    machines = dict.fromkeys(described(found["machine"]) for found in editors.values())
    preferred = [kind for kind, value in before["preferences"].items() if value is not None]
    lines = [
        f"## {asked['title']}",
        "",
        f"{before['facts']} facts of {found['protocol']['edits']} records from number "
        f"{asked['first']} on. The unedited model gives {share(before['reliability'])} of a "
        f"target's tokens on average; true before: {before['already_true']}. "
        f"{found['protocol']['model']} on {found['protocol']['device']}: {'; '.join(machines)}.",
        "",
        *table(
            ("harmonic mean (95 %)", *MEANS),
            ((name, *(mean(e["means"][form]) for form in MEANS)) for name, e in editors.items()),
        ),
        "",
        *table(
            (f"behind {order[0]} by", *MEANS),
            (
                (name, *(span(e["means"][form]["behind"]) for form in MEANS))
                for name, e in list(editors.items())[1:]
            ),
        ),
        "",
        *table(
            ("editor", *METRICS, "first batch", *preferred),
            (
                ("none", *("–",) * 4, *(share(before["preferences"][kind]) for kind in preferred)),
                *(
                    (
                        name,
                        *(forms(e[metric]) for metric in METRICS),
                        share(e["first_batch"]),
                        *(share(e["preferences"][kind]) for kind in preferred),
                    )
                    for name, e in editors.items()
                ),
            ),
        ),
        "",
        *table(
            ("editor", *COSTS),
            ((name, *(cost(e) for cost in COSTS.values())) for name, e in editors.items()),
        ),
        "",
    ]
    return "\n".join([*lines, *told])


def described(machine: Mapping[str, Any]) -> str:
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine['processor']}, {machine['cores']} cores, {threads}, torch {machine['torch']}"


COSTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "perplexity": lambda e: f"{e['perplexity_change']:+.2%}",
    "divergence": lambda e: f"{e['divergence']:.4f}",
    "ordinary tokens open": lambda e: percent(e["ordinary_open"]),
    "seconds an edit": lambda e: f"{e['seconds_per_edit']:.2f}",
    "peak GB": lambda e: f"{e['peak_bytes'] / 1e9:.2f}",
    "MB held": lambda e: f"{e['bytes_held'] / 1e6:.2f}",
    "first token": lambda e: f"{e['overhead']['first_token_ratio']:.2f}",
    "tokens/s": lambda e: f"{e['overhead']['tokens_per_second_ratio']:.2f}",
}


def table(columns: Sequence[str], rows: Any) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]


def forms(scores: Mapping[str, float | None]) -> str:
    return " / ".join(share(scores[form]) for form in FORMS)


def mean(found: Mapping[str, Any]) -> str:
    around = f" ({span(found['interval'])})" if found["interval"] else ""
    return share(found["mean"]) + around


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def span(found: Sequence[float] | None) -> str:
    return "–" if found is None else f"{found[0]:.3f} to {found[1]:.3f}"


if __name__ == "__main__":
    run_script(main)
