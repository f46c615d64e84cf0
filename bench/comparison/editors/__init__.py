"""The editors to compare, by name. csrc_notes/quality.md says what they share."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bench.comparison.editors.direct import Direct, Rule, accumulated, alphaedit, memit
from bench.comparison.editors.grace import Grace
from bench.comparison.editors.hooked import Hooked, Memory
from bench.comparison.editors.one_gradient import OneGradient
from bench.comparison.editors.setting import Editor, Setting, hooked_layers
from bench.comparison.editors.tuned import Constrained, LowRank


def _direct(
    rule: Callable[[Tensor, float, float], Rule], averaged: bool
) -> Callable[[Setting, float], Editor]:
    def make(setting: Setting, strength: float) -> Editor:
        moments = {k: setting.statistics[k].moment for k in setting.layers}
        rules = {k: rule(moments[k], strength, setting.config.fit) for k in moments}
        return Direct(setting, rules, averaged)

    return make


# Changes whenever an editor's behaviour does: results of another version are not reused.
EDITORS_VERSION = 1


@dataclass(frozen=True)
class Maker:
    """make: builds an editor from a setting and the one number that it is most sensitive to.
    number: the default, chosen on records other than those of the results (csrc_notes/quality.md).
    takes_values: whether it uses the common target values, whose time then counts as its own."""

    make: Callable[[Setting, float], Editor]
    number: float
    takes_values: bool = True


def _hooked(gate: str, **changed: float) -> Callable[[Setting, float], Editor]:
    return lambda setting, preservation: Hooked(
        setting, gate=gate, preservation=preservation, **changed
    )


MAKERS = {
    "memory": Maker(Memory, 0.86, takes_values=False),
    "paper": Maker(_hooked("sequence", fit=1.0, context_weight=1.0), 15.0),
    "keyed": Maker(_hooked("keyed"), 15.0),
    "calibrated": Maker(_hooked("calibrated"), 15.0),
    "sequence": Maker(_hooked("sequence"), 15.0),
    "onegradient": Maker(OneGradient, 1.0, takes_values=False),
    "accumulated": Maker(_direct(accumulated, averaged=False), 15.0),
    "memit": Maker(_direct(memit, averaged=True), 50.0),
    "alphaedit": Maker(_direct(alphaedit, averaged=True), 1.0),
    "grace": Maker(Grace, 0.5),
    "lora": Maker(LowRank, 5e-3, takes_values=False),
    "constrained": Maker(Constrained, 0.03, takes_values=False),
}


def named(name: str) -> str:
    """The full `kind@number` of `name`, with the editor's default where `name` has no number.

    Raises ValueError for an unknown editor, and for anything but a positive number.
    """
    kind, _, number = name.partition("@")
    if kind not in MAKERS:
        raise ValueError(f"there is no editor {kind!r}; there are {', '.join(MAKERS)}")
    try:
        strength = float(number) if number else MAKERS[kind].number
    except ValueError:
        strength = math.nan
    if not 0 < strength < math.inf:
        raise ValueError(f"{number!r} behind {kind}@ is no positive number")
    return f"{kind}@{strength:g}"


def make_editor(name: str, setting: Setting) -> Editor:
    """The editor `name`, as `named` gives it, on a model of its own."""
    kind, _, number = name.partition("@")
    return MAKERS[kind].make(setting, float(number))


def takes_values(name: str) -> bool:
    return MAKERS[name.partition("@")[0]].takes_values


__all__ = [
    "EDITORS_VERSION",
    "MAKERS",
    "Editor",
    "Setting",
    "hooked_layers",
    "make_editor",
    "named",
    "takes_values",
]
