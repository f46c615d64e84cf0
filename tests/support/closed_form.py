"""Keys, moments, and the closed form of the update that the recursion must agree with."""

import torch
from torch import Tensor

from coachhook.editing.inverse import Earlier, RecursiveInverse

D_IN, D_OUT = 48, 20
PRESERVATION = 3.0


def moment(d: int = D_IN, n: int = 500, seed: int = 0) -> Tensor:
    """Second moment of correlated keys with a mean, as those of an FFN have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + 0.5
    return keys.T @ keys / n


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def closed_form(accumulated: Tensor, keys: Tensor, fit: float = 1.0) -> Tensor:
    """`G` such that `Δ = Rᵀ G`, by one direct solve; accumulated: `C_accu` without `keys`."""
    keys = keys.double()
    solved: Tensor = torch.linalg.solve(accumulated + fit * keys.T @ keys, fit * keys.T)
    return solved.T


def weighted(given: Tensor, preservation: float = PRESERVATION) -> Tensor:
    """`λ C₀` with the ridge that is allowed, 10⁻⁵ of the mean diagonal."""
    found = preservation * given.double()
    return found + 1e-5 * found.diagonal().mean() * torch.eye(len(found), dtype=torch.float64)


class Harsh:
    """Keys and a moment that rounding is hard on: eigenvalues from 1 to 10⁶ (of each other), keys
    in twenty narrow clusters, a quarter of every batch keys of earlier batches."""

    def __init__(self, d: int, preservation: float) -> None:
        self.generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(self.normal(d, d))[0]
        spectrum = torch.logspace(6, 0, d, dtype=torch.float64)
        self.moment = (basis * spectrum) @ basis.T
        self.root = spectrum.sqrt()[:, None] * basis.T
        self.centres = 2 * self.normal(20, d) @ self.root
        self.accumulated = weighted(self.moment, preservation)
        self.seen: list[Tensor] = []
        self.times_made = 0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def earlier(self) -> Earlier:
        self.times_made += 1
        return Earlier(self.seen)

    def batch(self, n: int) -> Tensor:
        pick = torch.randint(len(self.centres), (n,), generator=self.generator)
        keys = 0.3 * self.normal(n, len(self.moment)) @ self.root + self.centres[pick]
        if self.seen:
            pick = torch.randint(len(self.seen), (n // 4,), generator=self.generator)
            keys[: n // 4] = torch.stack([self.seen[int(i)][-1] for i in pick])
        return keys

    def run(self, solver: RecursiveInverse, batches: int, n: int) -> float:
        """The relative error of Δ after so many batches of n keys, against direct solves."""
        got = want = torch.zeros(())
        for _ in range(batches):
            keys, residuals = self.batch(n), self.normal(n, D_OUT)
            got = got + residuals.T @ solver.solve(keys, fit=1.0)
            want = want + residuals.T @ closed_form(self.accumulated, keys)
            solver.absorb(keys)
            self.accumulated += keys.T @ keys
            self.seen.append(keys)
        return relative_error(got, want)
