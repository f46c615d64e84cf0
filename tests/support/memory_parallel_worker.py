"""One process of those that share a model under the memory readout.

`python -m torch.distributed.run --nproc-per-node 2 tests/support/memory_parallel_worker.py FOLDER`
reads `model` and `edits` there, and each process writes what it saw.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from coachhook import HookSet
from coachhook.errors import AttachError, BaseModelMismatchError
from coachhook.hooks.tensor_parallel import is_sharded
from tests.support.memory_readout import FACTS, OTHER, ids_of, logits

TEXTS = (FACTS[0].prompt, FACTS[1].prompt, OTHER)


def measure(model: Any, hooks: HookSet) -> dict[str, Tensor]:
    """What a user sees of the model without hooks, with them, and with one edit switched off."""
    seen: dict[str, Tensor] = {}

    def look(state: str) -> None:
        for i, found in enumerate(logits(model, *TEXTS)):
            seen[f"{state} {i}"] = found
        ids = ids_of(TEXTS[0])
        seen[f"{state} generated"] = model.generate(
            ids, max_new_tokens=6, do_sample=False, pad_token_id=0
        )

    look("unhooked")
    hooks.attach(model)
    look("hooked")
    hooks.disable(0)
    look("disabled")
    hooks.enable(0)
    hooks.detach(model)
    look("detached")
    return {name: value.contiguous() for name, value in seen.items()}


def check_refusals(model: Any, folder: Path) -> None:
    differing, foreign = (HookSet.from_pretrained(folder / "edits") for _ in range(2))
    if dist.get_rank() == 1:
        differing.disable(0)
    for name in foreign.base.checksums:
        foreign.base.checksums[name] = "0" * 64  # type: ignore[index]
    for hooks, kind, message in (
        (differing, AttachError, "number 1 is attaching other hooks than number 0"),
        (foreign, BaseModelMismatchError, "checksum"),
    ):
        with pytest.raises(kind, match=message):
            hooks.attach(model)


def main(folder: Path) -> None:
    shared = AutoModelForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()
    assert is_sharded(shared)
    with torch.no_grad():
        seen = measure(shared, HookSet.from_pretrained(folder / "edits"))
    check_refusals(shared, folder)
    save_file(seen, folder / f"rank{dist.get_rank()}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
