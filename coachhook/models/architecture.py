"""Where each architecture keeps its blocks and FFN down-projections."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from coachhook.errors import ArchitectureError, ConfigError

# model_type -> where layer {} keeps its down-projection. What stands before ".{}" is the list of
# blocks; everything else about an architecture is left to its own forward.
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


@dataclass(frozen=True)
class Architecture:
    """Where a model keeps what is hooked: `template` names the down-projection of layer `{}`."""

    template: str

    @classmethod
    def of(cls, model: nn.Module, template: str | None = None) -> "Architecture":
        """The architecture of `model`, from the registry or from a `template` of its own.

        Raises `ArchitectureError` when neither leads to the model's down-projections.
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
        architecture.down_projection(model, 0)
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
        """The down-projection of block `layer` (the module now in its place, hooked or not)."""
        try:
            return model.get_submodule(self.name(layer))
        except AttributeError:
            raise ArchitectureError(
                f"{type(model).__name__} has no module {self.name(layer)!r}; print(model) shows "
                "the names, and a template like 'model.layers.{}.mlp.down_proj' says which to use"
            ) from None

    def d_in(self, model: nn.Module, layer: int) -> int:
        """Width of the keys of block `layer`."""
        module = self.down_projection(model, layer)
        width = getattr(module, "in_features", None)
        # Conv1D has no such name, and a weight of (d_in, d_out).
        return int(width or module.weight.shape[0])


def default_layers(n_blocks: int) -> tuple[int, ...]:
    """Three layers that end a little under two fifths of the depth: above that, keys say less of
    the subject; more layers carried no more (csrc_notes/editing-capacity.md)."""
    last = min(round(0.38 * n_blocks), n_blocks - 1)
    return tuple(range(max(0, last - 2), last + 1))


def check_layers(layers: Sequence[int], n_blocks: int) -> tuple[int, ...]:
    """`layers` sorted, or `ConfigError` if one is missing from a model of `n_blocks` blocks."""
    chosen = tuple(sorted(set(layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= n_blocks:
        raise ConfigError(
            f"layers {list(layers)} do not fit a model of {n_blocks} blocks; "
            f"give numbers from 0 to {n_blocks - 1}"
        )
    return chosen
