"""Editors to compare, by name; each small, all on the same layers, keys, values and data."""

import math
from collections.abc import Callable

from torch import Tensor

from editors.direct import Direct, Rule, accumulated, alphaedit, memit
from editors.grace import Grace
from editors.hooked import Hooked
from editors.setting import Editor, Setting
from editors.tuned import Constrained, LowRank


def _direct(rule: Callable[[Tensor, float], Rule]) -> Callable[[Setting, float], Editor]:
    def make(setting: Setting, strength: float) -> Editor:
        rules = {k: rule(setting.statistics[k].moment, strength) for k in setting.layers}
        return Direct(setting, rules)

    return make


# What makes each editor, from the one number that it is most sensitive to; and that number, chosen
# on other records than the results are of (csrc_notes/quality.md).
MAKERS: dict[str, tuple[Callable[[Setting, float], Editor], float]] = {
    "keyed": (lambda setting, value: Hooked(setting, "keyed", value), 15.0),
    "calibrated": (lambda setting, value: Hooked(setting, "calibrated", value), 15.0),
    "sequence": (lambda setting, value: Hooked(setting, "sequence", value), 15.0),
    "accumulated": (_direct(accumulated), 150.0),
    "memit": (_direct(memit), 150.0),
    "alphaedit": (_direct(alphaedit), 0.02),
    "grace": (Grace, 0.3),
    "lora": (LowRank, 1e-3),
    "constrained": (Constrained, 5e-4),
}


def named(name: str) -> tuple[str, float]:
    """The editor that `name` means, and its number: its own, or that of `name@number`. Raises
    ValueError for an editor that is not known or a number that is none."""
    kind, _, number = name.partition("@")
    if kind not in MAKERS:
        raise ValueError(f"there is no editor {kind!r}; there are {', '.join(MAKERS)}")
    try:
        strength = float(number) if number else MAKERS[kind][1]
    except ValueError:
        strength = math.nan
    if not 0 < strength < math.inf:
        raise ValueError(f"{number!r} behind {kind}@ is no positive number")
    return kind, strength


def make_editor(name: str, setting: Setting) -> Editor:
    """The editor `name`, on a model of its own. See `named`."""
    kind, strength = named(name)
    return MAKERS[kind][0](setting, strength)


__all__ = ["MAKERS", "Editor", "Setting", "make_editor", "named"]
