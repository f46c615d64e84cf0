"""Settings of an editor. The figures of csrc_notes/figures.md were measured with the defaults."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from coachhook.errors import ConfigError
from coachhook.hooks.gates import GATES
from coachhook.statistics.source import StatisticsSource

_INVERSE_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def _check_positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{name} must be a positive number, not {value!r}")


def readout_of(asked: str | None, *of_delta: Any) -> str:
    """The readout that is meant: the one asked for; or `delta` where any of its own settings is
    given; or the default."""
    given = any(setting is not None for setting in of_delta)
    return asked or ("delta" if given else EditConfig.readout)


@dataclass(frozen=True)
class ValueConfig:
    """How target values are optimised (csrc_notes/method.md, "Target values").

    contexts: texts with {} in place of the prompt, so that the value works behind other text too.
    gain: share of the shift that prefixed contexts receive while optimising; a paraphrase's key
    resembles the edited key only in part and will receive only part of the shift.
    steps, rate: steps of Adam, and its learning rate in units of `‖h‖ / √d`.
    clamp: largest norm of the shift in units of `‖h‖`. kl, decay: weights of the two penalties.
    stop: text such as "." that is made likely behind a target, unless the target itself ends a
    sentence, so that a completion ends there and not in the middle of a longer word. It gains exact
    answers and costs some generality.
    enough: a request is done when its mean negative log-likelihood (nats) falls below this.
    tokens: how many tokens, counted over all contexts, are optimised at once; halved whenever
    memory does not suffice.
    """

    contexts: tuple[str, ...] = (
        "As I was told yesterday, {}",
        "In other news, {} what? The answer is",
    )
    gain: float = 0.9
    stop: str = ""
    steps: int = 20
    rate: float = 0.2
    clamp: float = 1.0
    kl: float = 0.0625
    decay: float = 0.01
    enough: float = 0.05
    tokens: int = 8_192

    def __post_init__(self) -> None:
        _check_positive(self, "gain", "steps", "rate", "clamp", "tokens")
        for name in ("steps", "tokens"):
            if not isinstance(getattr(self, name), int):
                raise ConfigError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        if not isinstance(self.stop, str):
            raise ConfigError(f"stop must be a text, not {self.stop!r}")
        for context in self.contexts:
            if context.count("{}") != 1:
                raise ConfigError(f"context {context!r} must contain {{}} once, for the prompt")


@dataclass(frozen=True)
class MemoryConfig:
    """The `memory` readout (csrc_notes/method.md, "Memory").

    gate_block: the block at whose FFN's input tokens are compared with the edits; write_blocks:
    the blocks after which an open token receives its edit's rows. None: by the model's depth.
    contexts, starts: texts with {} in place of the subject, in mid-sentence and where something
    begins (but for the start of a text, which is read anyway); the mean key of each group is one
    fingerprint of an edit.
    rivals: how many made-up names that end as a subject does, and begin as another, stand beside
    each edit: a token that resembles one of them more than the subject stays closed.
    The threshold is the lowest cosine that no larger shares reach than these: ordinary, of ordinary
    tokens; neighbours, of the other edits' subjects; but at least `least`. Neighbours raise it
    above that by `raised` at most: further up it shuts out more paraphrases than neighbours.
    unlikely: a request is refused if its target's mean negative log-likelihood (nats) stays above.
    """

    gate_block: int | None = None
    write_blocks: tuple[int, ...] | None = None
    contexts: tuple[str, ...] = (
        "Yesterday we heard of {}",
        "In the end it was {}",
        "They had never seen {}",
        "As everyone knows, {}",
        "A friend told me that {}",
    )
    starts: tuple[str, ...] = ("\n{}", '"{}', "({}", "Q: {}", "- {}")
    rivals: int = 4
    ordinary: float = 3e-4
    neighbours: float = 0.02
    least: float = 0.88
    raised: float = 0.03
    unlikely: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "ordinary", "neighbours", "raised", "unlikely")
        if not isinstance(self.rivals, int) or self.rivals < 0:
            raise ConfigError(f"rivals must be a whole number from 0, not {self.rivals!r}")
        for name in ("ordinary", "neighbours"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"{name} is a share below 1, not {getattr(self, name)}")
        if not -1 <= self.least <= 1:
            raise ConfigError(f"least is a cosine, -1 to 1, not {self.least}")
        for name in ("contexts", "starts"):
            for context in getattr(self, name):
                if not isinstance(context, str) or context.count("{}") != 1:
                    raise ConfigError(
                        f"{name}: {context!r} must contain {{}} once, for the subject"
                    )
        blocks = self.write_blocks
        if blocks is not None:
            if not blocks or not all(isinstance(block, int) for block in blocks):
                raise ConfigError(f"write_blocks must be block numbers, not {blocks!r}")
            if list(blocks) != sorted(set(blocks)):
                raise ConfigError(f"write_blocks must rise without repeats, not {blocks!r}")
            if self.gate_block is not None and blocks[0] < self.gate_block:
                raise ConfigError(
                    f"write block {blocks[0]} runs before the gate's block {self.gate_block}; "
                    "write after it, or in the same block"
                )


@dataclass(frozen=True)
class EditConfig:
    """How facts are edited into a model.

    readout: how an open token is changed: "memory", by rows of its edit's own (settings in
    `memory`), or "delta", by the paper's Δ of the hooked layers, with one of its gates.
    layers: blocks that the delta readout hooks, or None for the default share of the model's
    depth. template: module name of the down-projection, for architectures outside the registry.
    gate: of the delta readout, "keyed", "calibrated" or "sequence". preservation: λ, weight of
    ordinary text against one edited key. context_weight: weight of an edit's keys under the
    contexts, where the key of its bare prompt has 1, in solves and in what later batches
    preserve. A layer is full after `d_in` keys of weight 1. fit: weight of a batch's own keys
    in its solve; larger values leave less of the residual. With context_weight and fit at 1 the
    solve is the paper's closed form. false_alarms: largest share of background tokens that may
    open a gate. fingerprint_size: s; a GPU's kernels take up to 128, wider ones are left to
    plain torch. resemblance: lowest cosine that opens the keyed gate.
    calibrated_alpha: lowest α of the calibrated gate; sequence_alpha: where the paper's α rule
    starts. inverse_dtype: dtype in which the `d_in² / 2` numbers of each layer's inverse are
    stored: "float64", or "float32" for half the memory and an error of Δ that is kept near 1 % at
    most. inverse_device: where the inverse is kept and updated, "cpu" or a GPU such as "cuda:1";
    None is the GPU that holds the layer, or the CPU if no GPU does.
    """

    layers: tuple[int, ...] | None = None
    template: str | None = None
    gate: str = "keyed"
    readout: str = "memory"
    preservation: float = 15.0
    context_weight: float = 0.003
    fit: float = 10.0
    false_alarms: float = 5e-4
    fingerprint_size: int = 64
    resemblance: float = 0.62
    calibrated_alpha: float = 5.0
    sequence_alpha: float = 2.2
    inverse_dtype: str = "float64"
    inverse_device: str | None = None
    values: ValueConfig = field(default_factory=ValueConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    statistics: StatisticsSource = field(default_factory=StatisticsSource)

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ConfigError(f"gate {self.gate!r} is not known; choose one of {', '.join(GATES)}")
        if self.readout not in ("delta", "memory"):
            raise ConfigError(f"readout {self.readout!r} is not known; choose one of delta, memory")
        if self.readout == "memory":
            self._check_memory()
        _check_positive(self, "preservation", "context_weight", "fit")
        _check_positive(self, "false_alarms", "fingerprint_size")
        if self.false_alarms >= 1:
            raise ConfigError(f"false_alarms is a share below 1, not {self.false_alarms}")
        if not -1 <= self.resemblance <= 1:
            raise ConfigError(f"resemblance is a cosine, -1 to 1, not {self.resemblance}")
        if not isinstance(self.fingerprint_size, int):
            raise ConfigError(f"fingerprint_size must be a whole number, {self.fingerprint_size!r}")
        if self.inverse_dtype not in ("float64", "float32"):
            raise ConfigError(f"inverse_dtype is float64 or float32, not {self.inverse_dtype!r}")
        device = self.inverse_device
        if device is not None and not _INVERSE_DEVICE.fullmatch(str(device)):
            raise ConfigError(
                f"inverse_device {device!r} is not a device that computes in float64; "
                "give 'cpu', 'cuda' or one GPU such as 'cuda:1'"
            )
        if self.layers is not None and (
            not self.layers or not all(isinstance(layer, int) for layer in self.layers)
        ):
            raise ConfigError(f"layers must be block numbers such as (9, 10), not {self.layers!r}")

    def _check_memory(self) -> None:
        """Settings that this readout would ignore are not meant for it."""
        for name, given, usual in (("gate", self.gate, "keyed"), ("layers", self.layers, None)):
            if given != usual:
                raise ConfigError(
                    f"{name} {given!r} is a setting of the delta readout, and this is the memory "
                    'readout; add readout="delta" (--readout delta), or name blocks by '
                    "MemoryConfig(gate_block=…, write_blocks=…)"
                )

    @classmethod
    def paper(cls, **changed: Any) -> "EditConfig":
        """The paper's method: its readout, its gate and α rule, its closed form with equal weights
        for all keys, and its spreading. changed: other settings, such as layers."""
        return cls(readout="delta", gate="sequence", fit=1.0, context_weight=1.0, **changed)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EditConfig":
        """The inverse of `to_dict`, also after a trip through JSON."""
        known = {f.name for f in fields(cls)}
        unknown = set(data) - known
        if unknown:
            raise ConfigError(f"unknown settings {sorted(unknown)}; known are {sorted(known)}")
        data = completed(data)
        values = {**data["values"], "contexts": tuple(data["values"]["contexts"])}
        layers = data["layers"]
        return cls(
            **{
                **data,
                "layers": None if layers is None else tuple(layers),
                "values": ValueConfig(**values),
                "memory": _memory_config(data["memory"]),
                "statistics": StatisticsSource(**data["statistics"]),
            }
        )


def completed(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data`, of `to_dict`, with the settings that did not exist yet when its folder was written:
    as that folder was made, and within the memory readout as they are now."""
    memory = data.get("memory", {})
    if isinstance(memory, dict):
        memory = {**asdict(MemoryConfig()), **memory}
    # Equal weights for an edit's keys, and no other readout.
    return {"context_weight": 1.0, "readout": "delta", **data, "memory": memory}


def _memory_config(data: dict[str, Any]) -> MemoryConfig:
    unknown = set(data) - {f.name for f in fields(MemoryConfig)}
    if unknown:
        raise ConfigError(f"unknown settings {sorted(unknown)} of the memory readout")
    lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list | tuple)}
    return MemoryConfig(**{**data, **lists})
