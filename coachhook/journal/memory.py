"""What one batch adds under the `memory` readout: rows and fingerprints of its edits."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from coachhook.system.tensor_file import TensorFile


@dataclass(frozen=True)
class MemoryFactors:
    """Of n edits and w write blocks, on the CPU. rows bfloat16 `(n, w, d)`: what an open token
    receives after each block, zero for an edit without one; fingerprints float32 `(f, s)`: unit
    rows; owner int64 `(f,)`: the row of the edit each belongs to. Last come those of the edits'
    rivals, in their order (`EditRecord.rivals`)."""

    NAMES: ClassVar[tuple[str, ...]] = ("rows", "fingerprints", "owner")
    rows: Tensor
    fingerprints: Tensor
    owner: Tensor

    def stored(self, file: TensorFile, layer: int) -> "StoredMemory":
        """The same, read from the file that holds it."""
        return StoredMemory(file, layer, self.fingerprints, self.owner)


@dataclass(frozen=True)
class StoredMemory:
    """Rows in a file, read at each access; only fingerprints and owners are in memory."""

    NAMES: ClassVar[tuple[str, ...]] = MemoryFactors.NAMES
    file: TensorFile
    layer: int
    fingerprints: Tensor
    owner: Tensor

    @property
    def rows(self) -> Tensor:
        return self.file[f"rows.{self.layer}"]

    def stored(self, file: TensorFile, layer: int) -> "StoredMemory":
        return StoredMemory(file, layer, self.fingerprints, self.owner)
