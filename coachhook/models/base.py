"""The model that hooks belong to, identified by checksums of its hooked weights."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BaseModel:
    """The model that hooks belong to: its name, checksums of its hooked weights (see
    `weight_checksums`), the template of its down-projections, and `(d_in, d_out)` by layer."""

    name: str
    checksums: Mapping[str, str]
    template: str
    shapes: Mapping[int, tuple[int, int]]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.shapes)


def weight_checksums(weights: Iterable[torch.Tensor]) -> dict[str, str]:
    """SHA-256 of the hooked weights rounded to bfloat16 and to float16, by dtype name.

    Two models match if either checksum agrees, so hooks made on a float32 model also fit its
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
