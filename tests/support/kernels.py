"""Layers, gates and keys for the tests of the kernels, and the rule by which results are judged."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from coachhook_kernels import Delta, TokenGate, hook_correction_, hook_linear
from coachhook_kernels.hook_linear import op, reference
from coachhook_kernels.launch import runtime

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN], ids=str)

Result = tuple[Tensor, Tensor, Tensor]


def random(*shape: int, seed: int, dtype: torch.dtype = SINGLE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def scalar(value: float, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The same matrix as `nn.Linear` holds it, as the transposed view of a `Conv1D`, or as every
    third column of every second row of another."""
    if layout == "linear":
        return matrix.contiguous()
    if layout == "conv1d":
        return matrix.mT.contiguous().mT
    rows, columns = matrix.shape
    around = matrix.new_full((2 * rows + 1, 3 * columns + 1), torch.nan)
    around[1::2, 1::3] = matrix
    return around[1::2, 1::3]


def spaced(vector: Tensor) -> Tensor:
    """The same vector as every second element of another, whose own are NaN, or the opposite."""
    around = ~vector if vector.dtype == torch.bool else torch.full_like(vector, torch.nan)
    return torch.stack([vector, around], dim=-1)[..., 0]


def errors(got: Tensor, exact: Tensor) -> Tensor:
    """Absolute errors; both NaN, or the same infinity, is no error."""
    got, exact = got.double(), exact.double()
    same = (got == exact) | (got.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (got - exact).abs())
    assert not difference.isnan().any(), "NaN on one side alone"
    return difference


def error(got: Tensor, exact: Tensor) -> float:
    """The largest of `errors`."""
    found = errors(got, exact)
    return found.max().item() if found.numel() else 0.0


def assert_as_exact(got: Tensor, eager_same_dtype: Tensor, float64_reference: Tensor) -> None:
    """`err(got) <= 2 err(torch, same dtype) + ε`, errors against the float64 reference.

    ε is the spacing of the dtype at the largest finite result: torch may be right by luck, and
    Triton's interpreter cuts bfloat16 off where a GPU rounds.
    """
    assert got.shape == eager_same_dtype.shape == float64_reference.shape
    finite = float64_reference[float64_reference.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    slack = torch.finfo(got.dtype).eps * largest
    bound = 2 * error(eager_same_dtype, float64_reference) + slack
    assert error(got, float64_reference) <= bound


@dataclass(frozen=True)
class Case:
    """A hooked layer and keys for it. rank None: a dense Δ. opened: which gates are to be open."""

    rows: int = 5
    d_in: int = 37
    d_out: int = 23
    dtype: torch.dtype = SINGLE
    keyed: bool = True
    rank: int | None = None
    size: int = 9
    fingerprints: int = 5
    disabled: str = "none"
    opened: str = "some"
    bias: bool = True
    layout: str = "linear"

    def __str__(self) -> str:
        kind = f"keyed{self.size}x{self.fingerprints}" if self.keyed else "calibrated"
        form = "dense" if self.rank is None else f"rank{self.rank}"
        parts = [f"{self.rows}x{self.d_in}x{self.d_out}", str(self.dtype)[6:], kind, form]
        parts += [self.opened, f"{self.disabled} disabled", self.layout]
        return "-".join([*parts, "" if self.bias else "no bias"]).rstrip("-")


FORMS = {
    "keyed dense": Case(),
    "keyed factored": Case(rank=5),
    "calibrated dense": Case(keyed=False),
    "calibrated factored": Case(keyed=False, rank=5),
}
forms = pytest.mark.parametrize("form", FORMS)


class Problem(NamedTuple):
    keys: Tensor
    weight: Tensor
    bias: Tensor | None
    delta: Delta
    gate: TokenGate

    def double(self) -> "Problem":
        """The same in float64, the gate's scalars apart: the scores are float32 by definition."""
        return self.to(torch.float64)

    def to(self, dtype: torch.dtype) -> "Problem":
        def convert(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        gate = self.gate._replace(
            projection=convert(self.gate.projection),
            offset=convert(self.gate.offset),
            fingerprints=convert(self.gate.fingerprints),
        )
        down, up = self.delta
        return Problem(
            self.keys.to(dtype),
            self.weight.to(dtype),
            convert(self.bias),
            Delta(down.to(dtype), convert(up)),
            gate,
        )

    def with_alpha(self, alpha: float) -> "Problem":
        return self._replace(gate=self.gate._replace(alpha=scalar(alpha)))

    def z(self) -> Tensor:
        """What the gate compares with α, from the float64 reference."""
        score = reference.hook_linear(*self.double())[1]
        return (score - self.gate.mean) / self.gate.std


def threshold(z: Tensor, opened: str) -> float:
    """An α that all, some or none of the finite z clear, and that no z is near."""
    ordered = z[z.isfinite()].flatten().double().sort().values
    if opened == "all":
        return ordered[0].item() - 1.0
    if opened == "none":
        return ordered[-1].item() + 1.0
    gaps = ordered.diff()
    widest = gaps.argmax()
    assert gaps[widest] > 1e-3, "no threshold between these scores"
    return ((ordered[widest] + ordered[widest + 1]) / 2).item()


def make(case: Case, seed: int = 0) -> Problem:
    """Every second token resembles the key of some edit; the others are as chance made them."""
    d_in, d_out, dtype = case.d_in, case.d_out, case.dtype
    wide = torch.float64

    def matrix(rows: int, columns: int, number: int) -> Tensor:
        values = random(rows, columns, seed=seed + number, dtype=wide) / columns**0.5
        return laid_out(values.to(dtype), case.layout)

    if case.rank is None:
        delta = Delta(matrix(d_out, d_in, 1))
    else:
        up, _ = torch.linalg.qr(random(d_out, case.rank, seed=seed + 2, dtype=wide))
        delta = Delta(matrix(case.rank, d_in, 1), laid_out(up.to(dtype), case.layout))
    edited = random(max(1, case.fingerprints), d_in, seed=seed + 3, dtype=wide)
    keys = random(case.rows, d_in, seed=seed + 4, dtype=wide)
    for i in range(0, case.rows, 2):
        likeness = edited[7 * i % len(edited)]
        keys[i] = (1 + 0.5 * (not case.keyed)) * likeness + 0.05 * keys[i]
    if not case.keyed:
        keys[1::2] /= 3
    gate = TokenGate(scalar(0.1), scalar(0.25), scalar(0.0))
    if case.keyed:
        projection = matrix(case.size, d_in, 5)
        offset = 0.1 * random(case.size, seed=seed + 6, dtype=wide)
        prints = normalize(edited @ projection.to(wide).mT - offset, dim=-1)[: case.fingerprints]
        enabled = torch.ones(case.fingerprints, dtype=torch.bool, device=DEVICE)
        if case.disabled == "some":
            enabled[1::3] = False
        elif case.disabled == "all":
            enabled[:] = False
        gate = gate._replace(
            projection=projection,
            offset=offset.to(dtype),
            fingerprints=prints.to(dtype),
            enabled=enabled,
        )
    bias = random(d_out, seed=seed + 7, dtype=dtype) if case.bias else None
    problem = Problem(keys.to(dtype), matrix(d_out, d_in, 8), bias, delta, gate)
    return problem.with_alpha(threshold(problem.z(), case.opened))


def run_linear(problem: Problem) -> Result:
    return hook_linear(*problem)


def run_correction(problem: Problem, output: Tensor) -> Result:
    """`hook_correction_`, which adds to `output`."""
    return output, *hook_correction_(output, problem.keys, problem.delta, problem.gate)


def run_tiles(problem: Problem, output: Tensor) -> Result:
    """The kernels for many rows, for any number of them."""
    from coachhook_kernels.hook_linear import tiles

    return output, *tiles.launch(problem.keys, problem.delta, problem.gate, output)


ENTRIES = ("linear", "correction", "tiles")
CORRECTIONS = {"correction": run_correction, "tiles": run_tiles}


def run(entry: str, problem: Problem) -> Result:
    """One entry on the base output, if that is not its own to compute."""
    if entry == "linear":
        return run_linear(problem)
    return CORRECTIONS[entry](problem, base_output(problem))


def entries_of(problem: Problem) -> tuple[str, ...]:
    """The ways to the kernels that differ: what the kernel of few rows does not take, a correction
    gives to the kernels for many."""
    from coachhook_kernels.hook_linear import decode

    taken = decode.takes(problem.keys, problem.delta, problem.gate)
    return ENTRIES if taken else ("linear", "correction")


def base_output(problem: Problem) -> Tensor:
    return linear(problem.keys, problem.weight, problem.bias)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def score_rounding(problem: Problem) -> Tensor:
    """`(t,)`: how far two scores of a token lie apart at most that sum in different orders.

    A product of n terms, summed in any order in float32, is within `n ε/2` of the sum of their
    magnitudes of what is exact, so that two of them are within `n ε` of each other.
    """
    keys, _, _, (down, _), gate = problem.double()
    single = torch.finfo(SINGLE).eps
    projection = down if gate.projection is None else gate.projection
    moved = keys.shape[-1] * single * (keys.abs() @ projection.abs().mT).norm(dim=-1)
    vector = keys @ projection.mT
    n_squares = vector.shape[-1]
    if gate.offset is None:
        # A norm moves no further than its vector; half of its squares' rounding is left by the
        # root, which rounds as well.
        return moved + (n_squares / 2 + 1) * single * vector.norm(dim=-1)
    # The sketch, and its difference from the offset, are float32.
    moved += 2 * single * (vector.norm(dim=-1) + gate.offset.norm())
    # A unit vector moves by twice what its vector does, over its length. A cosine, whose terms'
    # magnitudes are 1 in sum, is then a sum over the size of the sketch; so is the norm.
    length = (vector - gate.offset).norm(dim=-1)
    return 2 * moved / length + (1.5 * n_squares + 4) * single


class Scores(NamedTuple):
    """What every entry should say of a problem's tokens, what torch says in float32, and how far
    the order of sums may move a score."""

    single: Tensor
    exact: Tensor
    nearest: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, problem: Problem) -> "Scores":
        # Whatever the dtype, the products behind a score are summed in float32 and never rounded.
        _, single, _ = reference.hook_linear(*problem.to(SINGLE))
        exact = reference.hook_linear(*problem.double())[1:]
        return cls(single, *exact, score_rounding(problem))

    def check(self, score: Tensor, index: Tensor, rounding: float = 0.0) -> None:
        """rounding: relative, of the vector whose norm is the score."""
        assert score.dtype == SINGLE
        assert index.dtype == torch.int64
        # Torch's own sums may be exact by luck, on one processor and not on another: twice their
        # error is no bound then, and what the order of the sums can do is.
        off = errors(score, self.exact)
        by_torch = 2 * error(self.single, self.exact)
        allowed = self.rounding.nan_to_num(0.0).clamp_min(by_torch)
        # A norm moves no further than its vector, whose parts move by this share of each.
        allowed = allowed + rounding * self.exact.nan_to_num(0.0)
        assert (off <= allowed).all(), off.max()
        assert torch.equal(index, self.nearest)


def vector_rounding(problem: Problem, entry: str) -> float:
    """Relative rounding of `Δ k` before its norm: none, but where the vendor's library computes it,
    which rounds to nearest."""
    from coachhook_kernels.dual_path import configs

    dense = entry == "linear" and not problem.gate.keyed and problem.delta.up is None
    many = problem.keys.shape[0] >= configs.COMPOSED_ROWS
    return torch.finfo(problem.keys.dtype).eps / 2 if dense and many else 0.0


def check(problem: Problem, *entries: str, poisoned: bool = True) -> Tensor:
    """Run the entries (if none is named, all that differ) and hold each against the reference;
    returns which gates were open.

    A closed row of an output that was given is NaN beforehand, and must be the same NaN after.
    """
    exact = problem.double()
    expected_scores = Scores.of(problem)
    is_open = problem.gate.is_open(expected_scores.exact)
    base = base_output(problem)
    given = base.clone()
    if poisoned:
        given[~is_open] = torch.nan
    correction = problem.delta.expand(problem.delta.project(problem.keys)).to(base.dtype)
    exact_correction = exact.delta.expand(exact.delta.project(exact.keys))
    for entry in entries or entries_of(problem):
        try:
            if entry == "linear":
                start = base
                output, *scores = run_linear(problem)
                expected = reference.hook_linear(*exact)[0]
            else:
                start = given
                output, *scores = CORRECTIONS[entry](problem, given.clone())
                assert torch.equal(bits(output)[~is_open], bits(given)[~is_open])
                expected = torch.where(is_open[..., None], given.double() + exact_correction, given)
            assert output.dtype == problem.keys.dtype
            plain = torch.where(is_open[..., None], start + correction, start)
            assert_as_exact(output, plain, expected)
            expected_scores.check(*scores, vector_rounding(problem, entry))
        except AssertionError as error:
            error.add_note(f"entry: {entry}")
            raise
    return is_open


def check_case(case: Case, *entries: str) -> None:
    problem = make(case)
    is_open = check(problem, *entries)
    share = is_open.double().mean().item()
    assert {"none": share == 0, "all": share == 1, "some": 0 < share < 1}[case.opened]


def refuse(*_: object) -> None:
    pytest.fail("the plain torch path ran")


@contextmanager
def kernels_only() -> Iterator[Callable[[], Tensor]]:
    """The operations run their kernels, interpreted where there is no GPU, and nothing else.

    Memory comes full of NaN. Yields what gives the counters of the next launch, which must be zero
    in the end, too.
    """
    from coachhook_kernels.hook_linear import decode, tiles
    from coachhook_kernels.launch import counters as workspace

    def zeros() -> Tensor:
        return torch.zeros(workspace.SET, dtype=torch.int32)

    def counters() -> Tensor:
        return sets[-1] if DEVICE == "cpu" else workspace.counters(torch.device(DEVICE, 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "eager_correction_", refuse)
        patch.setattr(runtime, "_broken", set())
        if DEVICE == "cpu":
            # On a CPU every launch would get counters of its own; here one set is kept, as on a GPU
            # a stream keeps one, until it is given up.
            sets = [zeros()]
            patch.setattr(runtime, "triton_runs", lambda *tensors: True)
            patch.setattr(runtime, "discard", lambda: sets.append(zeros()))
            patch.setattr(decode, "counters", lambda device: sets[-1])
            patch.setattr(tiles, "counters", lambda device: sets[-1])
        # As `use_deterministic_algorithms`, which would import all of Inductor first.
        torch._C._set_deterministic_algorithms(True, warn_only=True)
        try:
            assert torch.empty(3, device=DEVICE).isnan().all()
            yield counters
        finally:
            torch._C._set_deterministic_algorithms(False)
        assert not runtime._broken, "a kernel did not compile"
        assert not counters().any(), "a launch left its counters"
