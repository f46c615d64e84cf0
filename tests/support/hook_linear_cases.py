"""The shapes, gates and layouts in which the kernels of `hook_linear` are tested."""

from dataclasses import replace

from tests.support.kernels import BRAIN, FORMS, HALF, SINGLE, Case

TYPES = (SINGLE, HALF, BRAIN)


def table_of_rows() -> list[Case]:
    """Every form at a single row and around the edges of tiles; two of the four in between. More
    numbers in between would differ by what a mask is compared with: other tables have some."""
    table = []
    for i, n_rows in enumerate([1, 2, 3, 8, 11, 14, 15, 16, 17, 32, 33, 64, 65, 70]):
        for j, form in enumerate(FORMS.values()):
            if 1 < n_rows < 15 and (i + j) % 2:
                continue
            case = replace(form, rows=n_rows, dtype=TYPES[(i + j) % 3])
            table.append(replace(case, opened=("all", "none")[j % 2]) if n_rows == 1 else case)
    return table


def table_of_shapes() -> list[Case]:
    """From a single number to more than one tile, slice and step in each direction."""
    shapes = [(1, 1), (1, 40), (530, 1), (129, 65), (64, 32), (1100, 70)]
    return [
        replace(form, d_in=d_in, d_out=d_out, rank=rank, dtype=dtype, fingerprints=min(5, d_in))
        for d_in, d_out in shapes
        for form, rank in (
            (FORMS["keyed dense"], None),
            (FORMS["calibrated factored"], min(5, d_in, d_out)),
        )
        for dtype in TYPES
    ]


def table_of_ranks() -> list[Case]:
    """One, more than one tile of any kind, and full."""
    return [
        Case(d_in=90, d_out=80, keyed=keyed, rank=rank, dtype=dtype)
        for keyed in (True, False)
        for rank in (1, 33, 80)
        for dtype in TYPES
    ]


def table_of_fingerprints() -> list[Case]:
    """Into each of the sizes that a table of matches has; 2100 is more than 64 tiles."""
    table = [Case(fingerprints=0, opened=opened) for opened in ("none", "all")]
    for count, dtype in ((1, HALF), (300, BRAIN), (300, SINGLE), (2100, BRAIN)):
        table.append(Case(fingerprints=count, dtype=dtype, size=16))
        table.append(Case(17, fingerprints=count, dtype=dtype, size=16, rank=3))
    for count in (2, 33, 300):
        table.append(Case(16, fingerprints=count, disabled="some"))
        table += [
            Case(fingerprints=count, disabled="all", opened=opened) for opened in ("none", "all")
        ]
    # As many columns as a fingerprint has by default, one more, and one alone; and the most.
    table += [Case(size=64, d_in=90), Case(size=65, d_in=90), Case(size=1, fingerprints=1)]
    return [*table, Case(size=128, d_in=140), Case(17, size=128, d_in=140, dtype=BRAIN)]


def table_of_gates() -> list[Case]:
    """All gates open, and none; in more tiles than a launch has programs, too."""
    table = [
        replace(form, rows=n_rows, opened=opened, dtype=dtype)
        for form, dtype in zip(FORMS.values(), (BRAIN, HALF, SINGLE, BRAIN), strict=True)
        for n_rows in (3, 16, 19)
        for opened in ("all", "none")
    ]
    flood = Case(300, d_out=100, opened="all", dtype=BRAIN)
    table += [flood, replace(flood, rank=40), replace(flood, keyed=False)]
    return [*table, Case(70, d_out=100, opened="all"), Case(70, d_out=100, rank=40, opened="all")]


def table_of_layouts() -> list[Case]:
    return [
        replace(form, rows=n_rows, layout=layout, bias=layout == "conv1d", dtype=dtype)
        for form in FORMS.values()
        for layout, dtype in (("conv1d", BRAIN), ("strided", SINGLE))
        for n_rows in (7, 21)
    ] + [replace(form, bias=False) for form in FORMS.values()]
