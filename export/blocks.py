"""Block-wise quantization of matrices, in the layout of `com.microsoft::MatMulNBits`.

A matrix [rows, columns] is cut along its columns into blocks of `block_size`; each has a scale and, where the scheme is
asymmetric, a zero point: `value = (code - zero_point) * scale`. Layout of the operator's inputs (its schema, onnxruntime
1.32): codes uint8 [rows, blocks, block_size * bits / 8], within a block the lower code in the lower bits of a byte;
scales [rows, blocks]; zero points uint8 [rows, ceil(blocks * bits / 8)], packed alike. Without zero points, 2^(bits - 1)
is meant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored: `bits` is 4 or 8, `block_size` a power of two of at least 16."""

    bits: int
    block_size: int
    symmetric: bool

    @property
    def middle(self) -> int:
        """The code of zero where no zero point says another."""
        return 1 << (self.bits - 1)

    def blocks(self, columns: int) -> int:
        return -(-columns // self.block_size)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row's codes, the last block filled up."""
        return self.blocks(columns) * self.block_size * self.bits // 8

    def zero_point_bytes(self, columns: int) -> int:
        """Bytes of a row's packed zero points."""
        return -(-self.blocks(columns) * self.bits // 8)


@dataclass(frozen=True)
class Blocks:
    """Some rows, quantized. `codes` uint8 [rows, columns], `scales` [rows, blocks] in the graph's dtype, `zero_points`
    uint8 [rows, blocks] or None where the scheme is symmetric.
    """

    scheme: Scheme
    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None

    def dequantized(self) -> torch.Tensor:
        """float32 [rows, columns]."""
        columns, size = self.codes.shape[1], self.scheme.block_size
        scales = self.scales.float().repeat_interleave(size, dim=1)[:, :columns]
        if self.zero_points is None:
            return (self.codes.float() - self.scheme.middle) * scales
        zero_points = self.zero_points.float().repeat_interleave(size, dim=1)[:, :columns]
        return (self.codes.float() - zero_points) * scales

    def packed_codes(self) -> torch.Tensor:
        """uint8 [rows, row_bytes]; what fills up the last block stands for zero."""
        rows, columns = self.codes.shape
        missing = -columns % self.scheme.block_size
        codes = self.codes
        if missing:
            fill = (
                self.zero_points[:, -1:]
                if self.zero_points is not None
                else codes.new_full((rows, 1), self.scheme.middle)
            )
            codes = torch.cat([codes, fill.expand(-1, missing)], dim=1)
        return _packed(codes, self.scheme.bits)

    def packed_zero_points(self) -> torch.Tensor:
        """uint8 [rows, zero_point_bytes]."""
        assert self.zero_points is not None
        return _packed(self.zero_points, self.scheme.bits)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes of uint8 [rows, n] codes, each row from a byte of its own."""
    if bits == 8:
        return codes.contiguous()
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpacked(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of each row: the inverse of the packing."""
    if bits == 8:
        return packed[:, :count]
    return torch.stack([packed & 15, packed >> 4], dim=2).reshape(packed.shape[0], -1)[:, :count]


def block_parameters(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales [rows, blocks] as `dtype` and zero points (None: symmetric) for float32 [rows, columns].

    Symmetric: the value farthest from zero becomes code 0, so all codes are used (as llama.cpp's Q4_0 does); the opposite
    value is cut by one step. Asymmetric: the range from the smallest to the largest value, zero within.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % scheme.block_size))
    grouped = padded.view(rows, -1, scheme.block_size)
    low, high = grouped.amin(2), grouped.amax(2)
    if scheme.symmetric:
        farthest = torch.where(-low >= high, low, high)
        return (farthest / -scheme.middle).to(dtype), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    most = (1 << scheme.bits) - 1
    scales = ((high - low) / most).to(dtype)
    safe = torch.where(scales == 0, 1.0, scales.float())
    return scales, (-low / safe).round().clamp(0, most).to(torch.uint8)


def encode(
    weight: torch.Tensor, scheme: Scheme, scales: torch.Tensor, zero_points: torch.Tensor | None
) -> torch.Tensor:
    """Codes uint8 [rows, columns], each the nearest to its value in float32 `weight`."""
    columns, size = weight.shape[1], scheme.block_size
    step = torch.where(scales == 0, 1.0, scales.float()).repeat_interleave(size, dim=1)[:, :columns]
    middle: torch.Tensor | int = scheme.middle
    if zero_points is not None:
        middle = zero_points.float().repeat_interleave(size, dim=1)[:, :columns]
    codes = (weight / step + middle).round_().clamp_(0, (1 << scheme.bits) - 1)
    return codes.to(torch.uint8)


def round_to_nearest(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Blocks:
    """float32 [rows, columns], each block by itself."""
    scales, zero_points = block_parameters(weight, scheme, dtype)
    return Blocks(scheme, encode(weight, scheme, scales, zero_points), scales, zero_points)
