"""Profiles: the settings that `coachhook calibrate` found for a model, kept beside its statistics.

A profile is a small JSON file named by the model's identity. It holds settings for new hooks
folders, not weights or edits: an existing folder keeps the settings that it was made with.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from coachhook.config import EditConfig
from coachhook.errors import ConfigError, ProfileError
from coachhook.models.architecture import Architecture
from coachhook.models.base import weight_checksums
from coachhook.models.embedded import cache_dir
from coachhook.models.placement import fetched
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
class Profile:
    """Settings for one model. identity: see `identity`; model: its name, for people; figures: what
    was measured with these settings, JSON-ready."""

    identity: str
    model: str
    settings: Settings
    figures: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "identity": self.identity,
            "model": self.model,
            "settings": {**vars(self.settings), "layers": list(self.settings.layers)},
            "figures": dict(self.figures),
        }


class _Versioned(TypedDict):
    version: Any


class _ProfileEntry(TypedDict):
    """A profile in JSON, without its version. settings: a `Settings`."""

    identity: str
    model: str
    settings: dict[str, Any]
    figures: dict[str, Any]


def identity(model: Any, architecture: Architecture) -> str:
    """SHA-256 of a model's type, sizes and all its down-projections rounded to bfloat16, so that a
    float32 model and its bfloat16 copy share a profile."""
    n_blocks = len(architecture.blocks(model))
    weights = (fetched(architecture.down_projection(model, layer)) for layer in range(n_blocks))
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
    """Where the profile of a model is looked for."""
    return cache_dir() / "profiles" / f"{model_identity[:32]}.json"


def find(model_identity: str) -> Profile | None:
    """The profile of a model, if it was calibrated on this machine.

    A profile that is broken or of another version is ignored with a warning, since editing can do
    without it; so is, silently, one that names another model.
    """
    path = default_path(model_identity)
    if not path.exists():
        return None
    try:
        found = load(path)
    except ProfileError as error:
        logger.warning("%s; going on with the default settings", error)
        return None
    return found if found.identity == model_identity else None


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
        checked(found["settings"], Settings, "settings")
        settings = Settings(**{**found["settings"], "layers": tuple(found["settings"]["layers"])})
        # Only to raise ConfigError for values out of range.
        settings.applied(EditConfig())
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
