"""What one batch adds to one layer under the `delta` readout: in memory, in a file, or merged."""

from dataclasses import dataclass, replace
from typing import ClassVar, NoReturn, Protocol

import torch
from torch import Tensor

from coachhook.errors import CompactedError
from coachhook.system.tensor_file import TensorFile


class Marks(Protocol):
    """What every readout has of one batch and layer: fingerprints `(f, s)`, unit rows; owner int64
    `(f,)`: the row of the edit each belongs to."""

    @property
    def fingerprints(self) -> Tensor: ...
    @property
    def owner(self) -> Tensor: ...


class Factors(Marks, Protocol):
    """What one batch of n edits adds to one layer; float32 on the CPU.

    residuals `(n, d_out)` and solutions `(n, d_in)`: their rows i, r and a, make edit i's share
    `r aᵀ` of Δ, zero for an edit that does not use the layer. keys `(c, d_in)`: the columns of `K₂`
    absorbed into `C_accu`.
    """

    @property
    def residuals(self) -> Tensor: ...
    @property
    def solutions(self) -> Tensor: ...
    @property
    def keys(self) -> Tensor: ...


FACTORS = ("residuals", "solutions", "keys", "fingerprints", "owner")


@dataclass(frozen=True)
class LayerFactors:
    """Factors in memory. See `Factors`."""

    NAMES: ClassVar[tuple[str, ...]] = FACTORS
    residuals: Tensor
    solutions: Tensor
    keys: Tensor
    fingerprints: Tensor
    owner: Tensor

    def stored(self, file: TensorFile, layer: int) -> "StoredFactors":
        """The same, read from the file that holds them."""
        return StoredFactors(file, layer, self.fingerprints, self.owner)

    def spread(self, rows: Tensor, n: int) -> "LayerFactors":
        """These factors as the rows `rows` of a batch of `n` edits; the other rows are zero."""
        return replace(
            self,
            residuals=self.residuals.new_zeros(n, self.residuals.shape[1]).index_copy(
                0, rows, self.residuals
            ),
            solutions=self.solutions.new_zeros(n, self.solutions.shape[1]).index_copy(
                0, rows, self.solutions
            ),
            owner=rows[self.owner],
        )

    @classmethod
    def nothing(cls, n: int, shape: tuple[int, int], size: int) -> "LayerFactors":
        """Factors of `n` edits that do not use a layer of `shape` `(d_in, d_out)`; size: s."""
        d_in, d_out = shape
        return cls(
            residuals=torch.zeros(n, d_out),
            solutions=torch.zeros(n, d_in),
            keys=torch.zeros(0, d_in),
            fingerprints=torch.zeros(0, size),
            owner=torch.zeros(0, dtype=torch.long),
        )


@dataclass(frozen=True)
class StoredFactors:
    """Factors in a file, read at each access; only fingerprints and owners are in memory."""

    NAMES: ClassVar[tuple[str, ...]] = FACTORS
    file: TensorFile
    layer: int
    fingerprints: Tensor
    owner: Tensor

    def stored(self, file: TensorFile, layer: int) -> "StoredFactors":
        return StoredFactors(file, layer, self.fingerprints, self.owner)

    @property
    def residuals(self) -> Tensor:
        return self.file[f"residuals.{self.layer}"]

    @property
    def solutions(self) -> Tensor:
        return self.file[f"solutions.{self.layer}"]

    @property
    def keys(self) -> Tensor:
        return self.file[f"keys.{self.layer}"]


@dataclass(frozen=True)
class MergedFactors:
    """What is left of factors merged into the journal's base: fingerprints and owners."""

    NAMES: ClassVar[tuple[str, ...]] = ("fingerprints", "owner")
    fingerprints: Tensor
    owner: Tensor

    @property
    def residuals(self) -> Tensor:
        self._gone()

    @property
    def solutions(self) -> Tensor:
        self._gone()

    @property
    def keys(self) -> Tensor:
        self._gone()

    def _gone(self) -> NoReturn:
        raise CompactedError("this batch was merged with others; its own share of Δ is not kept")
