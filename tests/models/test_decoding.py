"""Completions, partial passes and modes: what surrounds an edit must not be disturbed by it."""

import threading
from pathlib import Path

import pytest
import torch

import coachhook as ch
from coachhook.errors import ContextLengthError, RequestError
from coachhook.models.architecture import Architecture
from coachhook.models.decoding import complete, is_exactly, natural_stop, starts_with
from coachhook.models.passes import eval_mode, read_pass
from coachhook.models.tokens import encode
from tests.support.tiny import tiny_lm, tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "target", "starts", "exactly"),
    [
        (" Lyon.", "Lyon", True, True),
        (" Lyon", "Lyon", True, True),
        (" Lyon\nand more", "Lyon", True, True),
        (" Lyon, in France", "Lyon", True, False),
        (" Lyonnais", "Lyon", False, False),
        (" Paris, not Lyon", "Lyon", False, False),
        (" St. Louis. It is", "St. Louis", True, True),
        ("大阪です", "大阪", True, False),
        ("", "Lyon", False, False),
    ],
)
def test_matching(text: str, target: str, starts: bool, exactly: bool) -> None:
    assert starts_with(text, target) is starts
    assert is_exactly(text, target) is exactly


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Lyon. It is", "Lyon"),
        ("Lyon\nParis", "Lyon"),
        ("3.14 is pi! Yes", "3.14 is pi"),
        ("", ""),
        ("no end", "no end"),
    ],
)
def test_natural_stop(text: str, answer: str) -> None:
    assert natural_stop(text) == answer


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_prompt_near_the_end_of_the_context(kind: str) -> None:
    lm = tiny_lm(tiny_model(kind, seed=1))
    word = "a"
    near = word * 125
    assert len(lm.tokenizer(near)["input_ids"]) == 125
    alone = complete(lm, ["Hello"], 20)[0]
    texts = complete(lm, [near, "Hello"], 20)
    assert texts[1] == alone
    with pytest.raises(ContextLengthError, match="context of 128"):
        complete(lm, [word * 128], 20)


def test_a_token_put_behind_the_text_is_no_target() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<eos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", end)]
    )
    assert tokenizer("Hello")["input_ids"][-1] == end
    assert tokenizer.decode(encode(tokenizer, "The capital is", "Lyon").target).strip() == "Lyon"


def test_every_module_gets_its_own_mode_back() -> None:
    model = tiny_model("llama", seed=1).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_a_partial_pass_leaves_other_threads_alone() -> None:
    model = tiny_model("llama", seed=1)
    module = Architecture.of(model).down_projection(model, 1)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits
    failures: list[BaseException] = []
    stop = threading.Event()

    def generate() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    assert torch.allclose(model(input_ids=ids).logits, want, atol=1e-5)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    for _ in range(100):
        (keys,), _ = read_pass(model, {"input_ids": ids[:, :3]}, [module])
        assert keys.shape[1] == 3
    stop.set()
    thread.join()
    assert failures == []


def test_editing_under_inference_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    editor = ch.Editor.from_pretrained(
        tiny_model("llama", seed=1),
        tiny_tokenizer(),
        config=ch.EditConfig(
            readout="delta",
            layers=(1, 2),
            preservation=1.0,
            false_alarms=0.02,
            statistics=ch.StatisticsSource(n_tokens=1024),
        ),
    )
    with torch.inference_mode():
        report = editor.edit([ch.EditRequest("We know that the capital of {} is", "Peru", "Lyon")])
    assert len(report.edits) == 1
    with pytest.raises(RequestError, match="list of EditRequest"):
        editor.edit(report.edits[0].request)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="empty"):
        editor.hooks.trace(editor.model, editor.tokenizer, "")
    with pytest.raises(ch.CoachhookError, match="no edit"):
        editor.hooks.disable("0")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [{"false_alarms": 100}, {"fingerprint_size": 1.5}, {"layers": ()}, {"layers": ("a",)}],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(ch.CoachhookError):
        ch.EditConfig(readout="delta", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [{"contexts": ("no slot",)}, {"steps": 0}, {"rate": float("nan")}, {"stop": None}],
    ids=str,
)
def test_value_settings_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(ch.CoachhookError):
        ch.ValueConfig(**settings)  # type: ignore[arg-type]
