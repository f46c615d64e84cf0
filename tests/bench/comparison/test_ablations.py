"""Ablations: one thing changed at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from bench.comparison import ablations
from coachhook.errors import ConfigError
from tests.support.bench import FACTS, arguments


@pytest.mark.slow  # An edited model for each ablation.
def test_ablations_change_one_thing_at_a_time(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    default, *others = ablations.variants(n_blocks=4, text=Path("corpus.txt"))
    for variant in others:
        settings = variant.config.to_dict()
        changed = {k for k, v in default.config.to_dict().items() if settings[k] != v}
        changed |= {
            k for k in ("batch_size", "dtype") if getattr(variant, k) != getattr(default, k)
        }
        # A gate comes with its α.
        assert len(changed - {"gate"}) <= 1, variant
        assert changed or variant.name == "calibrated, α 5", variant
    names = [(variant.group, variant.name) for variant in others]
    assert len(set(names)) == len(names)

    asked = arguments(tiny_folder, tmp_path, only=["dtype"], text=None)
    for name in ("batch_size", "every", "editor"):
        del asked[name]
    ablations.main(**asked)
    rows = json.loads(capsys.readouterr().out)["variants"]
    assert [row["name"] for row in rows] == ["", "bfloat16", "float16"]
    assert all(sum(row["verdicts"].values()) == len(FACTS) - 1 for row in rows)
    monkeypatch.setattr(ablations, "edited", lambda *_: pytest.fail("measured again"))
    ablations.main(**asked | {"as_json": False})
    assert "bfloat16" in capsys.readouterr().out

    def fail(*_: Any) -> None:
        raise ConfigError("no such setting")

    monkeypatch.setattr(ablations, "edited", fail)
    ablations.main(**asked | {"run": None, "as_json": False})
    assert capsys.readouterr().out.count("failed: no such") == 3
    with pytest.raises(typer.BadParameter, match="'colour'"):
        ablations.main(**asked | {"only": ["colour"]})
