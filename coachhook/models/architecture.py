"""Models: loading, and where each architecture keeps its blocks and FFN down-projections."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from coachhook.errors import ArchitectureError, ConfigError, ModelError
from coachhook.models import embedded

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
        found = template or DOWN_PROJECTIONS.get(kind)
        if found is None:
            raise ArchitectureError(
                f"architecture {kind!r} is not known (known: {', '.join(sorted(DOWN_PROJECTIONS))}"
                "); name its down-projection with a template, as 'model.layers.{}.mlp.down_proj'"
            )
        if found.count("{}") != 1 or ".{}." not in found:
            raise ArchitectureError(
                f"module template {found!r} must contain '.{{}}.' once, for the layer number"
            )
        architecture = cls(found)
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

    def d_in(self, model: Any, layer: int) -> int:
        """Width of the keys of block `layer`."""
        module = self.down_projection(model, layer)
        width = getattr(module, "in_features", None)
        # Conv1D has no such name, and a weight of (d_in, d_out).
        return int(width or module.weight.shape[0])


@dataclass(frozen=True)
class BaseModel:
    """The model that hooks belong to: its name, SHA-256 sums of its hooked weights per rounding,
    the template of its down-projections, and `(d_in, d_out)` of each hooked layer."""

    name: str
    checksums: Mapping[str, str]
    template: str
    shapes: Mapping[int, tuple[int, int]]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.shapes)


def default_layers(n_blocks: int) -> tuple[int, ...]:
    """Three layers that end a little under two fifths of the depth: above that, keys say less of
    the subject; more layers carried no more (csrc_notes/editing.md)."""
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


def load_model(
    name: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    `name` is "smollm2" (the embedded model), a local folder or a hub id. On a CPU the default
    dtype is float32, on a GPU the checkpoint's own. Raises `ModelError` when it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(embedded.embedded_model() if str(name) == embedded.NAME else name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = dtype or (torch.float32 if device == "cpu" else "auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=wanted)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load model {str(name)!r}: {reason} (expected 'smollm2', a folder with a "
            "transformers checkpoint, or a hub id)"
        ) from error
    # The name that was asked for, which for the embedded model is not that of its folder.
    model.config._name_or_path = str(name)
    return model.eval().to(device), prepare_tokenizer(tokenizer)


def prepare_tokenizer(tokenizer: Any) -> Any:
    """Check that `tokenizer` gives character offsets; give it a padding token if it has none."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} gives no character offsets, which locate the subject's "
            "tokens; load the fast tokenizer (use_fast=True)"
        )
    if tokenizer.pad_token_id is None:
        # Which one does not matter: padding is always masked.
        tokenizer.pad_token = (
            tokenizer.eos_token
            or tokenizer.bos_token
            or tokenizer.unk_token
            or tokenizer.convert_ids_to_tokens(0)
        )
    return tokenizer


def weight_checksums(weights: Iterable[torch.Tensor]) -> dict[str, str]:
    """SHA-256 over the hooked weights as they round to each half-precision type.

    Two models match if either entry agrees, so hooks made on a float32 model also fit its
    bfloat16 or float16 copy.
    """
    halves = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    digests = {name: hashlib.sha256() for name in halves}
    for weight in weights:
        for name, dtype in halves.items():
            digests[name].update(str(tuple(weight.shape)).encode())
            rounded = weight.detach().to(dtype).cpu().contiguous()
            digests[name].update(rounded.view(torch.uint8).numpy().data)
    return {name: digest.hexdigest() for name, digest in digests.items()}
