"""The pictures of a report, as SVG that takes its colours from the page around it."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_WIDTH = 5.2
# matplotlib draws with these stand-ins, which are then replaced by the style sheet's colours.
_INK, _FAINT = "#010101", "#020202"
_SERIES = tuple(f"#0300{i:02x}" for i in range(9))
_HEAT = "#040404"
_VARIABLES = {
    _INK: "var(--ink)",
    _FAINT: "var(--faint)",
    _HEAT: "var(--heat)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)},
}
# As `gate_scores.LayerScores` names them, and as the page does.
_POPULATIONS = {
    "edited": "edited subjects",
    "paraphrased": "in paraphrases",
    "beside": "locality prompts",
    "ordinary": "ordinary text",
}
# By gate: what it scores a token by, and what it compares this with.
_UNITS = {
    "keyed": "z-score of the largest cosine, among ordinary tokens",
    "calibrated": "z-score of the difference norm, among ordinary tokens",
    "sequence": "z-score of the difference norm, within its sequence",
    "memory": "largest cosine to a fingerprint",
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "coachhook",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _FAINT,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    # Names may hold dollar signs.
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
}


def curves(title: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Shares, 0 to 1, over the edits so far: one line for each name, of points `(edits, share)`."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.9))
        axes = figure.subplots()
        for i, (name, points) in enumerate(lines.items()):
            edits, shares = zip(*points, strict=True)
            colour, dashed = _SERIES[i % len(_SERIES)], i // len(_SERIES) % 2
            style: Any = {"linestyle": "--" if dashed else "-", "marker": "s" if dashed else "o"}
            axes.plot(edits, shares, markersize=3, color=colour, label=name, **style)
        axes.set(title=title, xlabel="edits so far", ylim=(-0.03, 1.05))
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        return _svg(figure, title)


def bars(title: str, unit: str, values: Mapping[str, float], reference: float | None) -> str:
    """One horizontal bar for each name; reference: the value at which a dotted line is drawn."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.8 + 0.26 * len(values)))
        axes = figure.subplots()
        names = list(values)
        drawn = axes.barh(names, list(values.values()), color=_SERIES[0], height=0.6)
        axes.bar_label(drawn, fmt="%.2f", padding=3, color=_INK, fontsize=8)
        axes.invert_yaxis()
        if reference is not None:
            axes.axvline(reference, color=_INK, linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel=unit)
        axes.margins(x=0.15)
        return _svg(figure, title)


def heat_map(title: str, rows: Sequence[tuple[int, Mapping[int, float]]]) -> str:
    """Retention: rows `(edits so far, {batch: share})`, the darker the better."""
    with rc_context(_STYLE):
        batches = sorted({batch for _, shares in rows for batch in shares})
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.24 * len(rows)))
        axes = figure.subplots()
        for y, (_, shares) in enumerate(rows):
            for batch, share in shares.items():
                # The share as opacity: the page's colour on the page's ground.
                axes.barh(y, 1, left=batch - 0.5, height=0.92, color=_HEAT, alpha=share, lw=0)
                if len(batches) <= 12:
                    axes.text(batch, y, f"{share:.2f}", ha="center", va="center", fontsize=7)
        axes.set(title=title, xlabel="batch", ylabel="edits so far")
        axes.set_yticks(range(len(rows)), [str(edits) for edits, _ in rows])
        axes.set_xlim(batches[0] - 0.5, batches[-1] + 0.5)
        if len(batches) <= 12:
            axes.set_xticks(batches)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.invert_yaxis()
        return _svg(figure, title)


def populations(
    title: str, gate: str | None, points: Sequence[tuple[int, Sequence[Mapping[str, Any]]]]
) -> str:
    """The scores of four populations at each layer's gate, and its threshold, as edits accumulate.

    gate: see `gate_scores.GateScores`, None if not known; points: `(edits so far, layers)`, each
    layer as `gate_scores.LayerScores` has it.
    """
    with rc_context(_STYLE):
        layers = [layer["layer"] for layer in points[0][1]]
        height = 0.8 + len(layers) * (0.35 + 0.62 * len(points))
        figure = Figure(figsize=(_WIDTH, height))
        grid = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
        for row, (axes, number) in enumerate(zip(grid, layers, strict=True)):
            for y, (_, found) in enumerate(points):
                layer = found[row]
                for i, name in enumerate(_POPULATIONS):
                    if layer["z"].get(name) is not None:
                        _span(axes, layer["z"][name], y + 0.19 * (i - 1.5), _SERIES[i])
                if layer["alpha"] is not None:
                    across = [layer["alpha"]] * 2
                    axes.plot(across, [y - 0.45, y + 0.45], color=_INK, lw=1.2, ls="--")
            axes.set_yticks(range(len(points)), [f"{edits} edits" for edits, _ in points])
            axes.set_ylim(len(points) - 0.5, -0.5)
            place = f"input of block {number}'s FFN" if gate == "memory" else f"layer {number}"
            axes.set_title(place, loc="left", fontsize=9)
        grid[-1].set_xlabel(
            f"{_UNITS.get(gate or '', 'z-score')}\nthe gate opens from the dashed line on"
        )
        handles = [
            grid[0].plot([], [], color=_SERIES[i], lw=4, label=name)[0]
            for i, name in enumerate(_POPULATIONS.values())
        ]
        narrow: Any = {"ncols": 4, "fontsize": 8, "handlelength": 1.2, "columnspacing": 1.2}
        figure.legend(handles=handles, loc="outside lower center", **narrow)
        figure.suptitle(title, fontsize=10)
        return _svg(figure, title)


def memory_texts(title: str, scores: Mapping[str, Any]) -> str:
    """How close texts of each kind come to an edit of a memory, against what opens it. scores: as
    `memory_scores.MemoryScores` has them."""
    with rc_context(_STYLE):
        own, kinds = scores["own"], [*scores["own"], *scores["beside"]]
        figure = Figure(figsize=(_WIDTH, 1.2 + 0.24 * len(kinds)))
        axes = figure.subplots()
        for y, found in enumerate(kinds):
            _span(axes, found["cosines"], y, _SERIES[0 if y < len(own) else 1])
        axes.axvline(scores["threshold"], color=_INK, lw=1.2, ls="--")
        axes.set_yticks(range(len(kinds)), [f"{found['kind']} ({found['n']})" for found in kinds])
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.grid(axis="x")
        unit = f"largest cosine at the input of block {scores['block']}'s FFN"
        axes.set(title=title, xlabel=f"{unit}\nthe gate opens from the dashed line on")
        names = ("to its own edit", "to another edit")
        handles = [
            axes.plot([], [], color=_SERIES[i], lw=4, label=name)[0] for i, name in enumerate(names)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
        return _svg(figure, title)


def _span(axes: Any, quantiles: Sequence[float], y: float, colour: str) -> None:
    """One population, by its `gate_scores.QUANTILES`: the thin line spans it, the thick one its
    middle 90 %, the dot is its median."""
    axes.plot([quantiles[0], quantiles[-1]], [y, y], color=colour, lw=0.7)
    axes.plot([quantiles[2], quantiles[-3]], [y, y], color=colour, lw=4)
    # A ring of the same colour, for a population that is all in one place.
    dot: Any = {"color": _INK, "markersize": 4, "markeredgecolor": colour}
    axes.plot(quantiles[len(quantiles) // 2], y, "o", **dot)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` that scales to its container and is labelled with `title`."""
    held = io.StringIO()
    figure.savefig(held, format="svg", transparent=True, metadata={"Date": None})
    text = held.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # The ids of groups would repeat in every picture of the page.
    text = re.sub(r'<g id="[A-Za-z_0-9.]+">', "<g>", text)
    text = re.sub(r"font-family: [^;]*;", "", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    width, height = (72 * inches for inches in figure.get_size_inches())
    opening = f'<svg role="img" aria-label={quoteattr(title)} viewBox="0 0 {width:g} {height:g}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, text.replace("xlink:href", "href"), count=1)
