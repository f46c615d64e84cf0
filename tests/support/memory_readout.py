"""A tiny model edited under the memory readout, with rows of any values, and texts to ask it."""

from typing import Any

import torch
from torch import Tensor

from coachhook import EditConfig, Editor, EditRequest, StatisticsSource, ValueConfig
from coachhook.config import MemoryConfig
from tests.support.tiny import TARGETS, tiny_model, tiny_tokenizer

GATE, WRITES = 1, (1, 2)
FACTS = [
    EditRequest("They moved to {}", "France", TARGETS[0]),
    EditRequest("I was told of {}", "Rome", TARGETS[1]),
]
OTHER = "The following is well known."


def config(**memory: Any) -> EditConfig:
    # A random model tells no subject from another: the threshold is one that only the edited
    # prompts themselves reach.
    given = {"gate_block": GATE, "write_blocks": WRITES, "least": 0.999, "ordinary": 0.9}
    given |= {"neighbours": 0.99, "unlikely": 100.0, "starts": ("a {}",)}
    return EditConfig(
        readout="memory",
        preservation=1.0,
        statistics=StatisticsSource(n_tokens=1024),
        values=ValueConfig(steps=5, rate=0.3, clamp=2.0),
        memory=MemoryConfig(**{**given, **memory}),
    )


def editor_of(kind: str = "llama", **others: Any) -> Editor:
    return Editor.from_pretrained(tiny_model(kind, **others), tiny_tokenizer(), config=config())


def with_rows(editor: Editor) -> Editor:
    """Rows of any values serve: nothing is optimised."""
    shape = (len(FACTS), len(WRITES), editor.model.config.hidden_size)
    editor.edit(FACTS, values=torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return editor


def ids_of(text: str) -> Tensor:
    return torch.tensor([tiny_tokenizer()(text)["input_ids"]])


@torch.no_grad()
def logits(model: Any, *texts: str) -> list[Tensor]:
    return [model(input_ids=ids_of(text)).logits for text in texts]
