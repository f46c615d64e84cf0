"""Where each architecture keeps its blocks and FFN down-projections."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from coachhook.errors import ArchitectureError, ConfigError

# model_type -> module name of layer {}'s down-projection; the part before ".{}" names the list of
# blocks. Everything else about an architecture is left to its own forward.
DOWN_PROJECTIONS = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.{}.fc2",
    "phi": "model.layers.{}.mlp.fc2",
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"),
        "model.layers.{}.mlp.down_proj",
    ),
}

# Names of a block's FFN, the likeliest first. OPT's begins with `fc1`; in blocks that hold one
# thing each (Nemotron-H) it is the `mixer`.
FFNS = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "fc1", "mixer")

# Parts of the names of blocks that are not the language model's.
OTHER_TOWERS = ("vision", "visual", "audio", "image")


@dataclass(frozen=True)
class Architecture:
    """Where a model keeps its blocks. template: module name of layer `{}`'s down-projection."""

    template: str

    @classmethod
    def of(cls, model: Any, template: str | None = None) -> "Architecture":
        """The architecture of `model`, from `template` or, if that is None, from the registry.

        Raises `ArchitectureError` if the chosen one does not lead to the model's down-projections.
        """
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        chosen = template or DOWN_PROJECTIONS.get(kind)
        if chosen is None:
            raise ArchitectureError(
                f"architecture {kind!r} is not known (known: {', '.join(sorted(DOWN_PROJECTIONS))}"
                "); name its down-projection with a template, as 'model.layers.{}.mlp.down_proj'"
            )
        if chosen.count("{}") != 1 or ".{}." not in chosen:
            raise ArchitectureError(
                f"module template {chosen!r} must contain '.{{}}.' once, for the layer number"
            )
        architecture = cls(chosen)
        module = architecture.down_projection(model, 0)
        # `nf` is the width of a Conv1D's output.
        width = getattr(module, "out_features", None) or getattr(module, "nf", None)
        hidden = None if template is None else model.config.get_text_config().hidden_size
        if hidden is not None and width is not None and width != hidden:
            raise ArchitectureError(
                f"{architecture.name(0)} puts out {width} numbers, and the hidden state has "
                f"{hidden}, so it is no down-projection; name the module whose output is added to "
                "the hidden state"
            )
        return architecture

    @classmethod
    def of_blocks(cls, model: Any, template: str | None = None) -> "Architecture":
        """The same where nothing is asked of the FFN but a name, as by the memory readout: for a
        kind that is not in the registry the list of blocks is looked for. template: module name of
        block `{}`'s FFN, or of a part of it. Raises `ArchitectureError` if there is no list of
        blocks, or are several that it could be."""
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        architecture = cls(template or DOWN_PROJECTIONS.get(kind) or _found(model))
        if architecture.template.count("{}") != 1 or ".{}." not in architecture.template:
            raise ArchitectureError(
                f"module template {template!r} must contain '.{{}}.' once, for the block's number"
            )
        architecture.ffn(model, 0)
        return architecture

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The list of transformer blocks."""
        path = self.template.split(".{}")[0]
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList):
            raise ArchitectureError(
                f"{type(model).__name__} has no list of blocks at {path!r}; print(model) shows the "
                "names, and a template such as 'model.layers.{}.mlp.down_proj' says which to use"
            )
        return blocks

    def name(self, layer: int) -> str:
        """Full module name of the down-projection of block `layer`."""
        return self.template.replace("{}", str(layer))

    def down_projection(self, model: nn.Module, layer: int) -> Any:
        """The module at the down-projection of block `layer`: the original, or a hook on it."""
        try:
            return model.get_submodule(self.name(layer))
        except AttributeError:
            raise ArchitectureError(
                f"{type(model).__name__} has no module {self.name(layer)!r}; print(model) shows "
                "the names, and a template like 'model.layers.{}.mlp.down_proj' says which to use"
            ) from None

    def ffn(self, model: nn.Module, number: int) -> nn.Module:
        """The module of block `number` that takes the normed hidden state `(..., d)` and leads to
        the FFN's output: an MLP, a mixture of experts, or the first projection of an FFN that has
        no module of its own. Raises `ArchitectureError` if there is none of a known name."""
        block = self.blocks(model)[number]
        rest = self.template.split(".{}.")[1]
        # Of a template that names a part of the FFN, the FFN; where the part stands by itself in
        # the block, as OPT's, the module that begins it.
        own = rest.split(".")[0]
        for name in FFNS if own == "fc2" else (own, *FFNS):
            found = block._modules.get(name)
            if found is not None:
                return found
        raise ArchitectureError(
            f"block {number} of {type(model).__name__} has no FFN of a known name (known: "
            f"{', '.join(FFNS)}; there are {', '.join(block._modules)}); use the delta readout"
        )

    def width(self, model: Any, layer: int, site: str) -> int:
        """Width of the inputs of block `layer`'s down-projection, or of its FFN (`site="ffn"`)."""
        if site == "ffn":
            return int(model.config.get_text_config().hidden_size)
        return self.d_in(model, layer)

    def d_in(self, model: nn.Module, layer: int) -> int:
        """Width of the keys of block `layer`."""
        module = self.down_projection(model, layer)
        width = getattr(module, "in_features", None)
        # Conv1D has no `in_features`; its weight is (d_in, d_out).
        return int(width or module.weight.shape[0])


def default_layers(n_blocks: int) -> tuple[int, ...]:
    """Three layers, the last at 38 % of the depth: higher up, keys carry less about the subject,
    and more layers held no more edits (csrc_notes/editing-capacity.md)."""
    last = min(round(0.38 * n_blocks), n_blocks - 1)
    return tuple(range(max(0, last - 2), last + 1))


def memory_blocks(n_blocks: int) -> tuple[int, tuple[int, ...]]:
    """The gate block and the write blocks of a model of this depth: at 18 % of it, where subjects
    are told apart best, and at 38 % (csrc_notes/memory.md)."""
    gate = min(round(0.18 * n_blocks), n_blocks - 1)
    return gate, (max(gate, min(round(0.38 * n_blocks), n_blocks - 1)),)


def check_layers(layers: Sequence[int], n_blocks: int) -> tuple[int, ...]:
    """`layers`, sorted and without repeats. Raises `ConfigError` for none, or one that a model of
    `n_blocks` blocks does not have."""
    chosen = tuple(sorted(set(layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= n_blocks:
        raise ConfigError(
            f"layers {list(layers)} do not fit a model of {n_blocks} blocks; "
            f"give numbers from 0 to {n_blocks - 1}"
        )
    return chosen


def _found(model: Any) -> str:
    """The template of the only list of as many blocks as the model's text part has layers."""
    n_layers = model.config.get_text_config().num_hidden_layers
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            ffn = next((ffn for ffn in FFNS if ffn in module[0]._modules), None)
            if ffn is not None and not any(part in name for part in OTHER_TOWERS):
                found.append(f"{name}.{{}}.{ffn}")
    if len(found) != 1:
        raise ArchitectureError(
            f"{type(model).__name__} has {len(found)} lists of {n_layers} blocks with an FFN of a "
            "known name; name the FFN with a template, as 'model.layers.{}.mlp'"
        )
    return found[0]
