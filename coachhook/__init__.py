"""Change single facts in a language model you serve: consecutive batch editing with hook layers."""

from coachhook.config import EditConfig, ValueConfig
from coachhook.editor import BatchReport, Editor
from coachhook.errors import CoachhookError
from coachhook.hooks import HookLinear, HookState
from coachhook.hookset import HookSet
from coachhook.journal import EditRecord, Verdict
from coachhook.loaders import load_requests
from coachhook.requests import EditRequest, LocalityPrompt
from coachhook.statistics import StatisticsSource

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
    "load_requests",
]
