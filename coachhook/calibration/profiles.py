"""Profiles: the settings that `coachhook calibrate` found for a model, kept beside its statistics.

A profile is a small JSON file named by the model's identity. It holds settings for new hooks
folders, not weights or edits: an existing folder keeps the settings that it was made with.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired

from torch import Tensor
from typing_extensions import TypedDict

from coachhook.config import EditConfig
from coachhook.errors import ConfigError, ProfileError
from coachhook.models.architecture import Architecture
from coachhook.models.base import weight_checksums
from coachhook.models.embedded import cache_dir
from coachhook.models.placement import fetched
from coachhook.readouts.memory import identifying
from coachhook.system.files import write
from coachhook.system.json_shapes import MisshapenError, checked, parsed

logger = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True)
class Settings:
    """The settings of an `EditConfig` that depend on the model; clamp is that of its `values`."""

    layers: tuple[int, ...]
    preservation: float
    clamp: float
    fingerprint_size: int
    resemblance: float
    false_alarms: float

    def applied(self, config: EditConfig) -> EditConfig:
        """`config` with these settings, except for layers that it already names."""
        return replace(
            config,
            layers=config.layers or self.layers,
            preservation=self.preservation,
            fingerprint_size=self.fingerprint_size,
            resemblance=self.resemblance,
            false_alarms=self.false_alarms,
            values=replace(config.values, clamp=self.clamp),
        )


@dataclass(frozen=True)
class MemorySettings:
    """The settings of the memory readout that depend on the model, see `MemoryConfig`."""

    gate_block: int
    write_blocks: tuple[int, ...]
    least: float

    def applied(self, config: EditConfig) -> EditConfig:
        """`config` with these settings, except for blocks that it already names."""
        given = config.memory
        gate = self.gate_block if given.gate_block is None else given.gate_block
        memory = replace(
            given,
            gate_block=gate,
            write_blocks=given.write_blocks or self.write_blocks,
            least=self.least,
        )
        return replace(config, memory=memory)


# By readout. A profile from before there were two names none and is for `delta`.
_SETTINGS: dict[str, type[Settings] | type[MemorySettings]] = {
    "delta": Settings,
    "memory": MemorySettings,
}


@dataclass(frozen=True)
class Profile:
    """Settings for one model. identity: see `identity` and `identity_of_blocks`; model: its name,
    for people; settings: those of one readout; figures: what was measured with these settings,
    JSON-ready."""

    identity: str
    model: str
    settings: Settings | MemorySettings
    figures: Mapping[str, Any]

    @property
    def readout(self) -> str:
        return "memory" if isinstance(self.settings, MemorySettings) else "delta"

    def to_dict(self) -> dict[str, Any]:
        settings = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self.settings).items()
        }
        return {
            "version": VERSION,
            "readout": self.readout,
            "identity": self.identity,
            "model": self.model,
            "settings": settings,
            "figures": dict(self.figures),
        }


class _Versioned(TypedDict):
    version: Any


class _ProfileEntry(TypedDict):
    """A profile in JSON, without its version. readout: delta's profiles of earlier versions have
    none; settings: a `Settings` or `MemorySettings`."""

    readout: NotRequired[str]
    identity: str
    model: str
    settings: dict[str, Any]
    figures: dict[str, Any]


def identity(model: Any, architecture: Architecture) -> str:
    """SHA-256 of a model's type, sizes and all its down-projections rounded to bfloat16, so that a
    float32 model and its bfloat16 copy share a profile."""
    n_blocks = len(architecture.blocks(model))
    weights = (fetched(architecture.down_projection(model, layer)) for layer in range(n_blocks))
    return _identity(model, architecture, weights)


def identity_of_blocks(model: Any, architecture: Architecture) -> str:
    """The same by what tells each block from its like, for the memory readout, which asks nothing
    of an FFN."""
    blocks = architecture.blocks(model)
    each = (identifying(block, f"block {number}") for number, block in enumerate(blocks))
    return _identity(model, architecture, (weight for weights in each for weight in weights))


def _identity(model: Any, architecture: Architecture, weights: Iterable[Tensor]) -> str:
    config = model.config.get_text_config()
    recipe = {
        "model": config.model_type,
        "template": architecture.template,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "weights": weight_checksums(weights)["bfloat16"],
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def default_path(model_identity: str) -> Path:
    """Where the profile of a model is looked for; the identities of the two readouts differ."""
    return cache_dir() / "profiles" / f"{model_identity[:32]}.json"


def find(model_identity: str, readout: str = "delta") -> Profile | None:
    """The profile of a model, if it was calibrated on this machine.

    A profile that is broken or of another version is ignored with a warning, since editing can do
    without it; so is, silently, one that names another model or readout.
    """
    path = default_path(model_identity)
    if not path.exists():
        return None
    try:
        found = load(path)
    except ProfileError as error:
        logger.warning("%s; going on with the default settings", error)
        return None
    return found if (found.identity, found.readout) == (model_identity, readout) else None


def load_for(path: Path, readout: str) -> Profile:
    """`load`; raises `ConfigError` for a profile of another readout."""
    found = load(path)
    if found.readout != readout:
        raise ConfigError(
            f"{path} has settings of the readout {found.readout}, not of {readout}; give "
            f"--readout {found.readout} with it, or another profile"
        )
    return found


def load(path: Path) -> Profile:
    """Read a profile. Raises `ProfileError` if it is missing, broken or of another version."""
    try:
        data = parsed(path.read_bytes())
        version = checked(data, _Versioned)["version"]
        if version != VERSION:
            raise ProfileError(
                f"{path} has version {version!r}, this coachhook reads {VERSION}; "
                "install a newer coachhook, or run 'coachhook calibrate' again"
            )
        found: _ProfileEntry = checked(data, _ProfileEntry)
        readout = found.get("readout", "delta")
        if readout not in _SETTINGS:
            raise MisshapenError(f"readout: {readout!r} is not known")
        checked(found["settings"], _SETTINGS[readout], "settings")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found["settings"].items()
        }
        settings = _SETTINGS[readout](**values)
        # Only to raise ConfigError for values out of range.
        settings.applied(EditConfig(readout=readout))
    except OSError as error:
        raise ProfileError(f"cannot read the profile {path}: {error.strerror}") from error
    except (MisshapenError, ConfigError) as error:
        raise ProfileError(
            f"{path} is not a whole profile ({error}); run 'coachhook calibrate' again"
        ) from error
    return Profile(found["identity"], found["model"], settings, found["figures"])


def save(profile: Profile, path: Path) -> None:
    """Write a profile, whole or not at all. Raises `ProfileError` when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, f"{json.dumps(profile.to_dict(), indent=1, allow_nan=False)}\n".encode())
    except OSError as error:
        raise ProfileError(f"cannot write the profile {path}: {error.strerror}") from error
