"""Where the embedded model is kept."""

from pathlib import Path

import pytest

from coachhook.errors import ModelError
from coachhook.models.embedded import embedded_model


def test_a_cache_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="set COACHHOOK_CACHE to a folder"):
        embedded_model()
