"""3 × 3 convolutions with a quarter of the multiplications (Winograd's F(4×4, 3×3), as in
Lavin & Gray, 2016), for frozen weights on CPU.

An image is cut into tiles of 6 × 6 that overlap by two; the product of a transformed tile and the
transformed kernel, 36 numbers for each pair of channels, is transformed back to 4 × 4 outputs. The
transforms along one side of an image are a product with a band matrix of its tiles, which also
makes the padding; so all of it is five matrix products.

Such a matrix grows with the side, so large images are first cut into blocks of 32 × 32 outputs,
with a margin of what lies around them.

oneDNN as MindSpore calls it on CPU writes each input nine times over before it multiplies, and is
1.3 to 3 times slower where channels are many and images small.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.primitive import constexpr

OUTPUTS, TILE = 4, 6
"""Along one side: outputs of a tile, and its inputs."""
_POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
"""Where the polynomials are evaluated, beside infinity. With these, rounding in float32 costs
1.1e-6 of the result's deviation; with the usual 0, ±1, ±2 it is 2.3e-6, summed directly 3e-7."""


def _cook_toom() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Aᵀ (4, 6), G (6, 3) and Bᵀ (6, 6), so that Aᵀ((G g) ⊙ (Bᵀ d)) correlates d (6,) with g (3,).

    A product of polynomials, interpolated from its values at the points (Toom, 1963), transposed.
    """
    at, g, bt = np.zeros((OUTPUTS, TILE)), np.zeros((TILE, 3)), np.zeros((TILE, TILE))
    for i, point in enumerate(_POINTS):
        others = [other for other in _POINTS if other != point]
        at[:, i] = point ** np.arange(OUTPUTS)
        g[i] = point ** np.arange(3) / np.prod([point - other for other in others])
        bt[i, : TILE - 1] = np.polynomial.polynomial.polyfromroots(others)
    at[-1, -1] = g[-1, -1] = 1
    bt[-1] = np.polynomial.polynomial.polyfromroots(_POINTS)
    return at, g, bt


_AT, _G, _BT = _cook_toom()


def transform(weight: np.ndarray) -> np.ndarray:
    """A kernel (out, in, 3, 3) as (36, in, out), float32; columns of the tile come first."""
    out, channels = weight.shape[:2]
    kernels = weight.transpose(1, 0, 3, 2).reshape(channels * out, 9).astype(np.float64)
    return (np.kron(_G, _G) @ kernels.T).reshape(-1, channels, out).astype(np.float32)


def tiles(length: int) -> int:
    """Along a side of so many outputs."""
    return -(-length // OUTPUTS)


def input_matrix(length: int, given: int, margin: int = 0) -> np.ndarray:
    """(6 · tiles, margin + given + margin) float32: a side of so many cells, repeated to `length`
    if there are fewer, cut into tiles and transformed; rows are ordered by element of the tile.

    At each end the tiles take one cell more. It is padding, or one of the `margin` cells that are
    there beside the given ones.
    """
    matrix = np.zeros((TILE, tiles(length), length + 2))
    for tile in range(tiles(length)):
        inputs = slice(tile * OUTPUTS, min(tile * OUTPUTS + TILE, length + 2))
        matrix[:, tile, inputs] = _BT[:, : inputs.stop - inputs.start]
    cells = np.arange(-1, length + 1)
    seen = cells if margin else cells[1:-1]
    repeated = np.zeros((length + 2, given + 2 * margin))
    repeated[seen + 1, (seen if given == length else seen // 2) + margin] = 1
    return (matrix @ repeated).reshape(TILE * tiles(length), -1).astype(np.float32)


def output_matrix(length: int) -> np.ndarray:
    """(6 · tiles, length) float32: what the tiles' products are multiplied with, transposed."""
    matrix = np.zeros((TILE, tiles(length), length))
    for tile in range(tiles(length)):
        outputs = slice(tile * OUTPUTS, min((tile + 1) * OUTPUTS, length))
        matrix[:, tile, outputs] = _AT[: outputs.stop - outputs.start].T
    return matrix.reshape(-1, length).astype(np.float32)


@constexpr
def _input_matrix(length: int, given: int, margin: int) -> Tensor:
    return Tensor(input_matrix(length, given, margin))


@constexpr
def _output_matrix(length: int) -> Tensor:
    return Tensor(output_matrix(length))


@constexpr
def _input_matrices(length: int, given: int, margin: int) -> Tensor:
    return Tensor(np.tile(input_matrix(length, given, margin), (TILE, 1, 1)))


@constexpr
def _output_matrices(length: int) -> Tensor:
    return Tensor(np.tile(output_matrix(length), (TILE, 1, 1)))


BLOCK, UNIT = 32, 16
"""Along a side: outputs of a block, and cells that are taken together across."""


@constexpr
def in_blocks(height: int, width: int) -> bool:
    """Is an image of so many outputs cut into blocks?"""
    return height % BLOCK == width % BLOCK == 0 and max(height, width) >= 4 * BLOCK


def cut(batch: int, channels: int, height: int, width: int, side: int) -> np.ndarray:
    """int32: which units make the blocks of `side` cells, with a margin of one row above and below
    and of one unit at either side; what is beyond the image is the unit after the last.

    Ordered by image, block down, block across, channel, row, unit.
    """
    across = width // UNIT
    image, channel = np.ogrid[:batch, :channels]
    block, row = np.ogrid[: height // side, -1 : side + 1]
    rows = block * side + row
    block, unit = np.ogrid[: width // side, -1 : side // UNIT + 1]
    units = block * (side // UNIT) + unit
    rows, units = rows[None, :, None, None, :, None], units[None, None, :, None, None, :]
    planes = (image * channels + channel)[:, None, None, :, None, None]
    inside = (rows >= 0) & (rows < height) & (units >= 0) & (units < across)
    beyond = batch * channels * height * across
    found = np.where(inside, (planes * height + rows) * across + units, beyond)
    return found.astype(np.int32).ravel()


def join(batch: int, channels: int, height: int, width: int) -> np.ndarray:
    """int32: which rows of blocks of outputs, as they come of `cut`, make the image."""
    down, across = height // BLOCK, width // BLOCK
    rows = np.arange(batch * channels * height * across, dtype=np.int32)
    rows = rows.reshape(batch, down, across, channels, BLOCK)
    return np.ascontiguousarray(rows.transpose(0, 3, 1, 4, 2)).ravel()


@constexpr
@cache
def _cut(batch: int, channels: int, height: int, width: int, side: int) -> Tensor:
    return Tensor(cut(batch, channels, height, width, side))


@constexpr
@cache
def _join(batch: int, channels: int, height: int, width: int) -> Tensor:
    return Tensor(join(batch, channels, height, width))


@constexpr
def _nothing() -> Tensor:
    return Tensor(np.zeros((1, UNIT), np.float32))


def fits(channels: int, out: int) -> bool:
    """May a kernel for so many channels be transformed? It becomes four times as large; above 38 MB
    it stays as it is. So do those of pictures and latents, of three and four channels, which are
    too few for a product of matrices."""
    return min(channels, out) > 4 and channels * out <= 2**18


@constexpr
def worthwhile(batch: int, channels: int, out: int, height: int, width: int) -> bool:
    """Is this faster than oneDNN for an output of this size?

    As measured on two cores. The products with band matrices grow with the side, which must be less
    than there are channels, and those of blocks are worth it for many channels; a kernel of 36
    numbers must be read for each pair of channels, however few the outputs are; and five operators
    start instead of one. What is transformed takes more than twice the memory, so the largest
    images are left out.
    """
    outputs = batch * height * width
    if in_blocks(height, width):
        return channels * out >= 2**15 and outputs * max(channels, out) <= 2**25
    short = min(height, width) >= OUTPUTS and max(height, width) < min(channels, out)
    return short and outputs >= 128 and outputs * channels * out >= 2**20


class Winograd(nn.Cell):
    """(batch, in, h, w) and a transformed kernel (36, in, out), float32 → (batch, out, height,
    width): a convolution of stride 1 with one cell of padding.

    If height and width are larger than h and w, they are 2h and 2w, or one less: the input is then
    first enlarged to that by repetition.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reshape, self.concat, self.gather = ops.Reshape(), ops.Concat(0), ops.Gather()
        self.across_in = ops.MatMul(transpose_b=True)
        self.down_in = ops.BatchMatMul(transpose_b=True)
        self.multiply = ops.BatchMatMul()
        self.down_out = ops.BatchMatMul(transpose_a=True)
        self.across_out = ops.MatMul(transpose_a=True)

    def convolve(
        self, x: Tensor, kernel: Tensor, height: int, width: int, margins: tuple[int, int]
    ) -> Tensor:
        """Of images that have `margins`, down and across, on each side: what is there or, if they
        are 0, padding."""
        batch, channels, rows, columns = x.shape
        down, side = margins
        out = kernel.shape[2]
        across = -(-width // OUTPUTS)
        # Each product puts the side that it transforms in front, so that no axes are exchanged:
        # (element across, tile across, batch, in, height), then
        # (element across, element down, tile down, tile across, batch, in).
        matrix = _input_matrix(width, columns - 2 * side, side)
        v = self.across_in(matrix, self.reshape(x, (-1, columns)))
        v = self.reshape(v, (TILE, -1, rows))
        v = self.down_in(_input_matrices(height, rows - 2 * down, down), v)
        y = self.multiply(self.reshape(v, (TILE**2, -1, channels)), kernel)
        y = self.reshape(y, (TILE, -1, across * batch * out))
        y = self.down_out(y, _output_matrices(height))
        y = self.across_out(self.reshape(y, (TILE * across, -1)), _output_matrix(width))
        return self.reshape(y, (batch, out, height, width))

    def convolve_blocks(self, x: Tensor, kernel: Tensor, height: int, width: int) -> Tensor:
        """The same of large images, cut into blocks."""
        batch, channels, given_height, given_width = x.shape
        side = BLOCK * given_height // height
        units = self.concat((self.reshape(x, (-1, UNIT)), _nothing()))
        units = self.gather(units, _cut(batch, channels, given_height, given_width, side), 0)
        blocks = self.reshape(units, (-1, channels, side + 2, side + 2 * UNIT))
        y = self.convolve(blocks, kernel, BLOCK, BLOCK, (1, UNIT))
        out = kernel.shape[2]
        rows = self.gather(self.reshape(y, (-1, BLOCK)), _join(batch, out, height, width), 0)
        return self.reshape(rows, (batch, out, height, width))

    def construct(self, x: Tensor, kernel: Tensor, height: int, width: int) -> Tensor:
        if in_blocks(height, width):
            return self.convolve_blocks(x, kernel, height, width)
        return self.convolve(x, kernel, height, width, (0, 0))
