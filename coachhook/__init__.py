"""Change single facts in a language model you serve: consecutive batch editing with hook layers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coachhook.config import EditConfig, ValueConfig
    from coachhook.editor import BatchReport, Editor
    from coachhook.errors import CoachhookError
    from coachhook.facts.loaders import load_requests
    from coachhook.facts.request import EditRequest, LocalityPrompt
    from coachhook.hooks.layer import HookLinear, HookState
    from coachhook.hookset import HookSet
    from coachhook.journal.journal import EditRecord, Verdict
    from coachhook.statistics.source import StatisticsSource
    from coachhook.system.processes import joined

__version__ = "0.1.0"

__all__ = [
    "BatchReport",
    "CoachhookError",
    "EditConfig",
    "EditRecord",
    "EditRequest",
    "Editor",
    "HookLinear",
    "HookSet",
    "HookState",
    "LocalityPrompt",
    "StatisticsSource",
    "ValueConfig",
    "Verdict",
    "joined",
    "load_requests",
]

# Where each name lives. They are imported at first use (PEP 562), because torch and transformers
# take seconds and `coachhook --help` needs neither.
_HOMES = {
    "BatchReport": "editor",
    "CoachhookError": "errors",
    "EditConfig": "config",
    "EditRecord": "journal.journal",
    "EditRequest": "facts.request",
    "Editor": "editor",
    "HookLinear": "hooks.layer",
    "HookSet": "hookset",
    "HookState": "hooks.layer",
    "LocalityPrompt": "facts.request",
    "StatisticsSource": "statistics.source",
    "ValueConfig": "config",
    "Verdict": "journal.journal",
    "joined": "system.processes",
    "load_requests": "facts.loaders",
}

if not TYPE_CHECKING:  # a type checker that saw it would take any misspelt name for an export

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
