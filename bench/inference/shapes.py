"""Models to generate with, and synthetic edits to put on them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.ops.layers import random_delta, random_gate
from coachhook.hooks.gates import KeyedGate
from coachhook.hooks.gates.gate import GateReading
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


class Opening(NamedTuple):
    """What opens a gate: read: of the input of `site`, keys `(..., d)`; parts: the gate's tensors,
    `threshold` among them."""

    site: nn.Module
    read: Callable[[Tensor], GateReading]
    parts: dict[str, Tensor]
    threshold: Tensor


class Synthetic(ABC):
    """Synthetic edits behind closed gates, on a model and off it."""

    exact: bool
    """Whether closed gates leave the logits alone bit for bit on a GPU, too."""
    layers: list[int]

    def __init__(self, model: Any) -> None:
        self.model = model

    @abstractmethod
    def set(self, on: bool) -> None:
        """Put the edits on the model, or take them off."""

    @abstractmethod
    def opening(self) -> Opening:
        """Of the last gate."""

    @abstractmethod
    def bytes_held(self) -> int:
        """Bytes that the edits add to memory."""

    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes of them that a pass reads while every gate is closed."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        self.set(True)
        try:
            yield
        finally:
            self.set(False)


class SyntheticHooks(Synthetic):
    """Random edits behind closed gates, at `count` layers up to the last one hooked by default."""

    exact = False

    def __init__(self, model: Any, count: int, gate: str, edits: int, rank: int | None) -> None:
        super().__init__(model)
        architecture = Architecture.of(model)
        last = default_layers(len(architecture.blocks(model)))[-1]
        self.layers = list(range(max(0, last + 1 - count), last + 1))
        self.bases: dict[str, nn.Module] = {}
        self.hooks: dict[str, HookLinear] = {}
        for layer in self.layers:
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

    def set(self, on: bool) -> None:
        for name in self.hooks:
            self.model.set_submodule(name, self.hooks[name] if on else self.bases[name])

    def opening(self) -> Opening:
        hook = list(self.hooks.values())[-1]
        return Opening(hook, hook.read, dict(hook.gate.named_buffers()), hook.gate.alpha)

    def bytes_held(self) -> int:
        return sum(
            int(tensor.nbytes)
            for hook in self.hooks.values()
            for tensor in (*hook.gate.buffers(), hook.down, hook.up)
            if tensor is not None
        )

    def bytes_read(self) -> int:
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
