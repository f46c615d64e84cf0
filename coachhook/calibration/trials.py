"""Trials of settings by probe edits, whatever the readout: made while there is time, and judged."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from coachhook.calibration.probe_edits import ProbeScores
from coachhook.calibration.profiles import MemorySettings, Profile, Settings
from coachhook.errors import ConfigError
from coachhook.system.progress import track

MINUTES = 6.0

Choice = TypeVar("Choice")
Figures = TypeVar("Figures")


@dataclass(frozen=True)
class Trial:
    """Probe edits with some settings, and their scores. seconds: including the target values,
    unless an earlier trial had optimised them."""

    settings: Settings | MemorySettings
    scores: ProbeScores
    seconds: float


@dataclass(frozen=True)
class Calibration(Generic[Figures]):
    """The profile that was found, and every layer and trial that led to it; `cut_short`: the time
    ran out before the search ended."""

    profile: Profile
    layers: list[Figures]
    trials: list[Trial]
    seconds: float
    cut_short: bool

    @property
    def took(self) -> bool:
        """Whether at least half of the probe edits met their targets under the chosen settings."""
        return best_of(self.trials).scores.reliability >= 0.5


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial of the highest rank; of equals, the first."""
    return max(trials, key=lambda trial: trial.scores.rank)


def check_minutes(minutes: float) -> None:
    """Raise `ConfigError` for a budget below 0."""
    if not minutes >= 0:
        raise ConfigError(f"the budget is a number of minutes from 0 on, not {minutes}")


def untried(
    rounds: Iterable[Sequence[Choice]], tried: list[Choice], trials: Sequence[Trial]
) -> Iterator[Choice]:
    """Each choice of the rounds once, until a trial is perfect; `tried` is added to before it is
    given. The caller must add the trial of each to `trials` before it asks for the next."""
    for choices in rounds:
        for choice in choices:
            if any(trial.scores.perfect for trial in trials):
                return
            if choice not in tried:
                tried.append(choice)
                yield choice


def try_out(
    choices: Iterator[Choice],
    trial: Callable[[Choice], Trial],
    trials: list[Trial],
    most: int,
    deadline: float,
) -> bool:
    """Add the trial of each choice to `trials`, which may decide what is chosen next; return
    whether the time was over first. At least one trial is made. most: for the progress bar;
    deadline: by `time.monotonic`."""
    with track("probe edits", most) as advance:
        for choice in choices:
            if trials and time.monotonic() > deadline:
                return True
            trials.append(trial(choice))
            advance(1)
    return False


def profile_of(
    model: Any,
    identity: str,
    trials: Sequence[Trial],
    counts: Mapping[str, int],
    seconds: float,
) -> Profile:
    """The profile of the best trial. counts: of what was tried with, by name."""
    best = best_of(trials)
    return Profile(
        identity=identity,
        model=str(model.config._name_or_path or type(model).__name__),
        settings=best.settings,
        figures={
            **asdict(best.scores),
            **counts,
            "trials": len(trials),
            "seconds": seconds,
        },
    )
