"""Comparisons that take seconds."""

import pytest

from bench.comparison import quality
from coachhook.evaluation.ordinary_text import ordinary_text


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> str:
    """Less ordinary text and fewer turns of timings: neither is what is tested here."""
    monkeypatch.setattr(quality, "_ROUNDS", 1)
    page = ordinary_text()[:2000]
    monkeypatch.setattr("coachhook.evaluation.evaluate.ordinary_text", lambda: page)
    return page
