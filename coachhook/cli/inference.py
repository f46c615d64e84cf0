"""Commands that run a model with the hooks of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coachhook.cli.arguments import Facts, Hooks, Json, Model, TextFile, usable
from coachhook.cli.views.console import show
from coachhook.cli.views.edits import fact
from coachhook.cli.views.evaluation import completion_view, evaluation_view
from coachhook.errors import ConfigError, ContextLengthError, RequestError
from coachhook.facts.remaining import latest

if TYPE_CHECKING:
    from coachhook.hookset import HookSet
    from coachhook.models.language_model import LanguageModel


def evaluate(
    model: Model,
    facts: Facts,
    hooks: Hooks,
    text: TextFile = None,
    as_json: Json = False,
) -> None:
    """Measure what the edits do to the facts of a file, and to everything else."""
    from coachhook.evaluation.evaluate import evaluate as measure

    requests = latest(usable(facts, skip_invalid=False))
    page = None if text is None else page_of(text)
    lm, hookset = with_hooks(model, hooks)
    result = measure(lm, hookset, requests, page)
    show(result.to_dict(), evaluation_view, as_json=as_json)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    hooks: Hooks,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the completion.")] = 40,
    trace: Annotated[bool, typer.Option("--trace", help="Show where the gates open.")] = False,
    as_json: Json = False,
) -> None:
    """Complete a prompt greedily, without and with the edits."""
    from coachhook.models.decoding import complete

    if not prompt:
        raise RequestError("the prompt is empty; give at least one word")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RequestError("the prompt is not UTF-8 text; set the terminal to UTF-8")
    lm, hookset = with_hooks(model, hooks)
    length, limit = len(lm.tokenizer(prompt)["input_ids"]), lm.context_length
    if limit is not None and length + max_new_tokens > limit:
        raise ContextLengthError(
            f"the prompt has {length} tokens, which with {max_new_tokens} new ones do not fit the "
            f"model's context of {limit}; shorten it, or ask for fewer"
        )
    with hookset.off(lm.model):
        (unedited,) = complete(lm, [prompt], max_new_tokens)
    (edited,) = complete(lm, [prompt], max_new_tokens)
    document: dict[str, Any] = {"prompt": prompt, "unedited": unedited, "edited": edited}
    if trace:
        read = hookset.trace(*lm, prompt + edited)
        named = sorted(set(read.edit[read.is_open].tolist()) - {-1})
        document |= {
            "gate": hookset.config.gate,
            "trace": read.to_dict(),
            "edits": {i: fact(hookset.edits[i].request) for i in named},
        }
    show(document, completion_view, as_json=as_json)


def page_of(text: Path) -> str:
    """The contents of a text file. Raises `ConfigError` if it cannot be read."""
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read text from {text}: {error}") from error


def with_hooks(name: str, directory: Path) -> tuple[LanguageModel, HookSet]:
    """A model with the hooks of a folder on it, and the hooks."""
    from coachhook.hookset import HookSet
    from coachhook.models.loading import load_model

    hookset = HookSet.from_pretrained(directory)
    lm = load_model(name)
    hookset.attach(lm.model)
    return lm, hookset
