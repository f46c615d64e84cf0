"""Ordinary text from files, and the statistics measured on it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from coachhook.errors import AttachError, ConfigError, StatisticsError
from coachhook.hooks.gates import CalibratedGate, Threshold
from coachhook.hooks.layer import HookLinear
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import read_pass
from coachhook.statistics.measure import key_statistics
from coachhook.statistics.source import StatisticsSource
from coachhook.statistics.text import _documents
from coachhook_kernels import Delta
from tests.support.tiny import tiny_lm, tiny_model, tiny_tokenizer

TEXTS = [f"Paragraph {i} says that the weather stayed dry in the valley." for i in range(40)]
LAYERS = (1, 2)


def write(folder: Path, kind: str) -> Path:
    path = folder / f"text.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(TEXTS))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    else:
        parquet.write_table(pa.table({"text": TEXTS}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_moment_is_the_mean_over_the_file(tmp_path: Path, kind: str) -> None:
    model, tokenizer = tiny_model("llama", seed=1), tiny_tokenizer()
    architecture = Architecture.of(model)
    source = StatisticsSource(path=str(write(tmp_path, kind)), n_tokens=100_000)
    found = key_statistics(LanguageModel(model, tokenizer), architecture, LAYERS, source)

    modules = [architecture.down_projection(model, layer) for layer in LAYERS]
    keys: list[list[torch.Tensor]] = [[], []]
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        for piece in ids.split(64, dim=1):
            if piece.shape[1] > 1:
                for i, k in enumerate(read_pass(model, {"input_ids": piece}, modules)[0]):
                    keys[i].append(k[0].double())
    for i, layer in enumerate(LAYERS):
        rows = torch.cat(keys[i])
        torch.testing.assert_close(
            found[layer].moment.double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5
        )
        assert len(found[layer].background) == len(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot read"),
        ("short.txt", b"Two words.", "tokens of text"),
        ("empty.txt", b"", "0 tokens"),
        ("latin.txt", b"\xff\xfe\xfa", "cannot read"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": 3}', "bad.jsonl:2"),
        ("broken.jsonl", b"{", "broken.jsonl:1: not JSON"),
        ("half.jsonl", rb'{"text": "half a \ud800 pair"}', "half.jsonl:1: not text"),
        ("not.parquet", b"no parquet at all", "not a Parquet file"),
    ],
)
def test_unusable_text(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    model = tiny_model("llama", seed=1)
    with pytest.raises(StatisticsError, match=message):
        key_statistics(tiny_lm(model), Architecture.of(model), (1,), StatisticsSource(str(path)))


def test_parquet_with_categories_of_text(tmp_path: Path) -> None:
    path = tmp_path / "categories.parquet"
    parquet.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), path)
    assert list(_documents(path)) == TEXTS


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"words": TEXTS}, "no 'text' column"),
        ({"text": [1, 2]}, "holds int64, not strings"),
        ({"text": [TEXTS]}, "holds list<.*string>, not strings"),
    ],
)
def test_parquet_without_text(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = tmp_path / "other.parquet"
    parquet.write_table(pa.table(columns), path)
    model = tiny_model("llama", seed=1)
    with pytest.raises(StatisticsError, match=message):
        key_statistics(tiny_lm(model), Architecture.of(model), (1,), StatisticsSource(str(path)))


def test_too_few_tokens() -> None:
    with pytest.raises(ConfigError, match="at least 256"):
        StatisticsSource(n_tokens=3)


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_is_cached(dtype: torch.dtype, bos: bool) -> None:
    model, source = tiny_model("llama", seed=2).to(dtype), StatisticsSource(n_tokens=256)
    args = LanguageModel(model, tiny_tokenizer(bos=bos)), Architecture.of(model), (1,), source
    first, second = key_statistics(*args), key_statistics(*args)
    assert torch.equal(first[1].moment, second[1].moment)
    assert torch.equal(first[1].first, second[1].first)


def test_another_template_is_another_measurement() -> None:
    lm = tiny_lm(tiny_model("llama", seed=3))
    source = StatisticsSource(n_tokens=256)
    down = key_statistics(lm, Architecture.of(lm.model), (1,), source)
    other = Architecture.of(lm.model, "model.layers.{}.self_attn.o_proj")
    attention = key_statistics(lm, other, (1,), source)
    assert down[1].moment.shape != attention[1].moment.shape


def test_hooks_must_be_off() -> None:
    model = tiny_model("llama", seed=4)
    architecture = Architecture.of(model)
    base = architecture.down_projection(model, 1)
    hook = HookLinear(base, Delta(torch.zeros(32, 64)), CalibratedGate(Threshold()))
    model.set_submodule(architecture.name(1), hook)
    with pytest.raises(AttachError, match="detach"):
        key_statistics(tiny_lm(model), architecture, (1,))


def test_an_unwritable_cache_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("COACHHOOK_CACHE", str(blocked))
    model = tiny_model("llama", seed=5)
    source = StatisticsSource(n_tokens=256)
    assert key_statistics(tiny_lm(model), Architecture.of(model), (1,), source)
    assert "not cached" in caplog.text
