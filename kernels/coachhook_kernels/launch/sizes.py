"""Whole numbers of tiles. Triton's own functions for these cost the host 6 µs a call, since they
also take what a kernel holds while it is compiled."""


def cdiv(total: int, part: int) -> int:
    """`total / part`, rounded up."""
    return -(-total // part)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`, for `n` ≥ 1."""
    return 1 << (n - 1).bit_length()


MATCHED_ALONE = 1024
"""So many fingerprints one program matches faster than several would share them out."""


def telling_rows(most: int) -> list[int]:
    """Numbers of rows, rising to `most`: each up to `most` takes the kernels, in the variants, of
    one of them. Tiles are chosen by how many of 32 rows there are, up to the 256 from which the
    products are a library's; beyond, configurations may have been measured at powers of two."""
    rows = [1, 2, 16, *range(32, 256, 32), 255]
    rows += [1 << power for power in range(8, most.bit_length())]
    return [*(n for n in rows if n < most), most]
