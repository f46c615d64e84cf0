"""Models to generate with, and synthetic edits to put on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.ops.layers import random_delta, random_gate
from coachhook.hooks.gates import KeyedGate
from coachhook.hooks.layer import HookLinear
from coachhook.models.architecture import Architecture, default_layers
from coachhook.models.loading import load_model
from coachhook_kernels import Delta


@dataclass(frozen=True)
class Shape:
    """A run. sizes: of a model with random weights, or None for a loaded model; prompts: lengths in
    tokens."""

    sizes: dict[str, Any] | None
    prompts: tuple[int, ...]
    hooked_layers: int = 3

    @property
    def decode_prompt(self) -> int:
        """Tokens in the cache when decoding starts."""
        return sorted(self.prompts)[len(self.prompts) // 2]


LOADED = Shape(None, (16, 128, 512))
SHAPES = {
    "tiny": Shape(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
        },
        (4, 8),
    ),
    "llama-3-8b": Shape(
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "rope_theta": 500000.0,
        },
        (16, 128, 512),
        hooked_layers=5,
    ),
}


def build(name: str, shape: Shape, device: torch.device) -> Any:
    """A model of `shape` with random weights, or the model `name` if the shape has no sizes."""
    if shape.sizes is None:
        return load_model(name, device=device.type)[0]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, **shape.sizes
    )
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class SyntheticHooks:
    """Random edits behind closed gates, at `count` layers up to the last one hooked by default."""

    def __init__(self, model: Any, count: int, gate: str, edits: int, rank: int | None) -> None:
        self.model = model
        architecture = Architecture.of(model)
        last = default_layers(len(architecture.blocks(model)))[-1]
        self.bases: dict[str, nn.Module] = {}
        self.hooks: dict[str, HookLinear] = {}
        for layer in range(max(0, last + 1 - count), last + 1):
            base = architecture.down_projection(model, layer)
            weight = base.weight.detach()
            # Llama's layout, (d_out, d_in): Conv1D keeps the transpose.
            d_in, d_out = base.in_features, base.out_features
            delta = random_delta(d_in, d_out, rank, weight)
            # As large as the weight itself, so that an open gate shows in the logits.
            delta = Delta(delta.down * (weight.std() * 2 * d_in**0.5), delta.up)
            name = architecture.name(layer)
            self.bases[name] = base
            self.hooks[name] = HookLinear(base, delta, random_gate(gate, d_in, edits, weight))

    @property
    def last(self) -> HookLinear:
        return list(self.hooks.values())[-1]

    def set(self, on: bool) -> None:
        for name in self.hooks:
            self.model.set_submodule(name, self.hooks[name] if on else self.bases[name])

    @contextmanager
    def attached(self) -> Iterator[None]:
        self.set(True)
        try:
            yield
        finally:
            self.set(False)

    def bytes_held(self) -> int:
        """Bytes that the hooks add to memory."""
        return sum(
            int(tensor.nbytes)
            for hook in self.hooks.values()
            for tensor in (*hook.gate.buffers(), hook.down, hook.up)
            if tensor is not None
        )

    def bytes_read(self) -> int:
        """Bytes of the hooks that a pass reads while every gate is closed."""
        total = 0
        for hook in self.hooks.values():
            if isinstance(hook.gate, KeyedGate):
                total += sum(t.nbytes for t in hook.gate.buffers()) - hook.gate.owner.nbytes
            else:
                total += int(hook.down.nbytes)
        return total


def bytes_read(model: Any) -> int:
    """Bytes of weights that one decoding step reads: all, but for an untied input embedding."""
    total = sum(int(parameter.nbytes) for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return total if tied else total - int(embedding.nbytes)
