"""Forward substitution of many lines by a triangular matrix, for a program of one warp: what the errors of 16 columns do to the
columns after them, on the matrix units.

R (k, k) is upper triangular, K its width.  A line is a vector of a thread's own, its columns tensors (lines,), 16 at a time.  The
sums Σ e_m R_mc of the columns c to come are a tuple of tiles (COLUMNS, lines), in registers; the first is due next.
"""

import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

# Columns taken at a time, the least that the matrix units take.
COLUMNS = tl.constexpr(16)


@triton.jit
def columns_of(tile):
    """The columns of tile (lines, COLUMNS), a tuple of tensors (lines,).  Nothing moves where a thread has a whole line."""
    columns = (tile,)
    for level in tl.static_range(4):
        even = ()
        odd = ()
        for i in tl.static_range(len(columns)):
            a, b = tl.split(tl.reshape(columns[i], [tile.shape[0], COLUMNS // 2 >> level, 2]))
            even = even + (a,)
            odd = odd + (b,)
        columns = even + odd
    flat = ()
    for i in tl.static_range(len(columns)):
        flat = flat + (tl.reshape(columns[i], [tile.shape[0]]),)
    return flat


@triton.jit
def tile_of(columns):
    """The inverse of `columns_of`."""
    LINES: tl.constexpr = columns[0].shape[0]
    tiles = columns
    for level in tl.static_range(4):
        joined = ()
        for i in tl.static_range(len(tiles) // 2):
            joined = joined + (tl.reshape(tl.join(tiles[i], tiles[i + len(tiles) // 2]), [LINES, 2 << level]),)
        tiles = joined
    return tiles[0]


@triton.jit
def scalars(pointer):
    """The COLUMNS values from `pointer` on, a tuple of tensors (1,), which every thread loads four at a time."""
    return columns_of(tl.load(pointer + tl.arange(0, COLUMNS)[None, :]))


@triton.jit
def zero_sums(LINES: tl.constexpr, K: tl.constexpr):
    """Σ e_m R_mc at the start: a tile (COLUMNS, LINES) for each COLUMNS columns."""
    sums = ()
    for _ in tl.static_range(K // COLUMNS):
        sums = sums + (tl.zeros([COLUMNS, LINES], tl.float32),)
    return sums


@triton.jit
def load_tile(tiles_ptr, index, K: tl.constexpr):
    """A tile of `as_tiles`, transposed; the last one again after the last.  In float16 nothing moves between threads."""
    pointer = tiles_ptr + tl.minimum(index, (K // COLUMNS) * (K // COLUMNS) - 1) * (COLUMNS * COLUMNS)
    tile = tl.load(pointer + tl.arange(0, COLUMNS * COLUMNS))
    return tl.reshape(tl.permute(tl.reshape(tile, [8, 4, 2, 2, 2]), [3, 0, 1, 2, 4]), [COLUMNS, COLUMNS])


@triton.jit
def add_to_tiles(sums, errors, tiles_ptr, diagonal, K: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """The tiles FIRST … LAST - 1 of `sums` with errors added, a tuple.  errors: two float16 pieces, or float32 alone."""
    later = ()
    for i in tl.static_range(FIRST, LAST):
        r = load_tile(tiles_ptr, diagonal + i, K)
        if len(errors) == 2:
            rest = load_tile(tiles_ptr + K * K, diagonal + i, K)
            total = tl.dot(rest, errors[0], tl.dot(r, errors[1], sums[i]))
            later = later + (tl.dot(r, errors[0], total),)
        else:
            later = later + (tl.dot(r, errors[0], sums[i], input_precision="tf32x3"),)
    return later


@triton.jit
def add_errors(sums, e, tiles_ptr, first, K: tl.constexpr):
    """Σ e_m R_mc of the columns after the COLUMNS from `first` on, with their errors e added.

    What is summed for columns after the block is not used, and half of it not computed.
    """
    TILES: tl.constexpr = K // COLUMNS
    errors = tl.trans(tile_of(e))
    if tiles_ptr.dtype.element_ty == tl.float16:
        high = errors.to(tl.float16)
        pieces = (high, (errors - high.to(tl.float32)).to(tl.float16))
    else:
        pieces = (errors,)
    diagonal = first // COLUMNS * (TILES + 1)
    near = add_to_tiles(sums, pieces, tiles_ptr, diagonal, K, 1, TILES // 2)
    far = ()
    for i in tl.static_range(TILES // 2 - 1, TILES - 1):
        far = far + (sums[i],)
    if first < K // 2:
        far = add_to_tiles(sums, pieces, tiles_ptr, diagonal, K, TILES // 2, TILES)
    return near + far + (tl.zeros(errors.shape, tl.float32),)


def as_tiles(R: Tensor) -> Tensor:
    """R (b, k, k) in tiles of 16 × 16 one after the other, (b, k · k): each as the threads of a warp hold its transpose for their
    matrix units, eight values a thread."""
    return rearrange(
        R, "b (i t pair two) (j half g) -> b (i j g t pair half two)", i=R.shape[-1] // 16, t=4, two=2, half=2, g=8
    )
