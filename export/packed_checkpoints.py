"""Checkpoints that are quantized already: GPTQ, AWQ and compressed-tensors, read as they are stored.

Their codes, scales and zero points go into a package unchanged, as `MatMulNBits` takes them. Layouts, for a linear layer of N
outputs and K inputs in groups of G inputs, `bits` 4 or 8, values packed into int32 from the lowest bits up:

- GPTQ (GPTQModel, AutoGPTQ): `qweight` [K * bits / 32, N] packed along K; `qzeros` [K / G, N * bits / 32] packed along N,
  each stored less one (but in `checkpoint_format` gptq_v2); `scales` [K / G, N]; `g_idx` [K], the group of each input.
- AWQ (AutoAWQ, version gemm): `qweight` [K, N / 8] and `qzeros` [K / G, N / 8] packed along N, where the eight values of
  an int32 belong to its columns 0, 2, 4, 6, 1, 3, 5, 7; `scales` [K / G, N].
- compressed-tensors (format pack-quantized): `weight_packed` [N, K * bits / 32] packed along K, codes less 2^(bits - 1)
  signed; `weight_scale` [N, K / G] (K / G = 1: a scale for each output); `weight_zero_point` [N * bits / 32, K / G] packed
  along N; `weight_g_idx` as `g_idx`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from llmx.export.blocks import Blocks, Scheme
from llmx.runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    from llmx.export.weights import StoredTensor

_LARGEST_BLOCK = 256
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_CODES = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
_PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"),
}


@dataclass(frozen=True)
class PackedFormat:
    """What a config's `quantization_config` says. `zeros_less_one`: GPTQ's stored zero points."""

    method: str
    bits: int
    zeros_less_one: bool = False


def read_format(config: dict[str, Any], model: str) -> PackedFormat:
    """The format of a checkpoint quantized already. Raises UnsupportedModelError for those that cannot be read."""
    method = str(config.get("quant_method", "unknown"))
    if method == "compressed-tensors":
        return _compressed(config, model)
    if method not in _PARTS:
        raise _refused(model, method, "GPTQ, AWQ and compressed-tensors (pack-quantized) are read")
    bits: int = config.get("bits", config.get("w_bit", 0))
    if bits not in ((4, 8) if method == "gptq" else (4,)):
        raise _refused(model, method, f"{bits} bits are not read")
    kind = str(config.get("version") or config.get("format") or "gemm").lower()
    if method == "awq" and kind != "gemm":
        raise _refused(model, method, f"of its layouts gemm is read, and not {kind}")
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if method == "gptq" and layout not in ("gptq", "gptq_v2"):
        raise _refused(model, method, f"of its layouts gptq and gptq_v2 are read, and not {layout}")
    return PackedFormat(method, bits, method == "gptq" and layout == "gptq")


def _compressed(config: dict[str, Any], model: str) -> PackedFormat:
    method = "compressed-tensors"
    if config.get("format") != "pack-quantized":
        raise _refused(model, method, f"of its formats pack-quantized is read, and not {config.get('format')}")
    groups = list((config.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    bits = {weight.get("num_bits") for weight in weights}
    if len(bits) != 1 or not bits <= {4, 8} or any(weight.get("type") != "int" for weight in weights):
        raise _refused(model, method, "weights of 4 or 8 bits alike in all layers are read")
    if any(group.get("input_activations") for group in groups):
        raise _refused(model, method, "quantized activations are not read")
    if config.get("sparsity_config") not in (None, {}) and config["sparsity_config"].get("format", "dense") != "dense":
        raise _refused(model, method, "sparse weights are not read")
    return PackedFormat(method, 4 if bits == {4} else 8)


def _refused(model: str, method: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model} is already quantized ({method}), and {why}; export the original checkpoint, with --quantize."
    )


@dataclass(frozen=True)
class PackedTensor:
    """A linear layer's quantized weight inside a checkpoint, `shape` [N, K], by the checkpoint's `parts`."""

    name: str
    form: PackedFormat
    shape: tuple[int, int]
    parts: dict[str, StoredTensor]

    @property
    def scheme(self) -> Scheme:
        zeros = self._zero_points()
        symmetric = zeros is None or bool((zeros == 1 << (self.form.bits - 1)).all())
        return Scheme(self.form.bits, self._block_size(), symmetric)

    def blocks(self) -> Blocks:
        """The whole tensor."""
        scheme, columns = self.scheme, self.shape[1]
        self._check_groups()
        scales = self._scales()
        repeat = columns // scales.shape[1] // scheme.block_size
        zeros = None if scheme.symmetric else self._zero_points()
        if zeros is not None:
            zeros = zeros.repeat_interleave(repeat, dim=1)
        return Blocks(scheme, self._codes(), scales.repeat_interleave(repeat, dim=1), zeros)

    def rows(self) -> Iterator[torch.Tensor]:
        yield self.blocks().dequantized()

    def chunks(self, dtype: torch.dtype) -> Iterator[bytearray | memoryview]:
        from llmx.export.weights import as_bytes

        yield as_bytes(self.blocks().dequantized(), dtype)

    def _codes(self) -> torch.Tensor:
        packed, bits = _read(self.parts[_CODES[self.form.method]]), self.form.bits
        if self.form.method == "gptq":
            return _unpack(packed.T, bits).contiguous()
        if self.form.method == "awq":
            return _awq(packed).T.contiguous()
        return _unpack(packed, bits)[:, : self.shape[1]].contiguous()

    def _scales(self) -> torch.Tensor:
        """float32 [N, groups]."""
        if self.form.method == "compressed-tensors":
            return _read(self.parts["weight_scale"]).float().reshape(self.shape[0], -1)
        return _read(self.parts["scales"]).float().T.contiguous()

    def _zero_points(self) -> torch.Tensor | None:
        """uint8 [N, groups], or None where there are none."""
        method, bits = self.form.method, self.form.bits
        if method == "compressed-tensors":
            stored = self.parts.get("weight_zero_point")
            return _unpack(_read(stored).T, bits)[:, : self.shape[0]].T.contiguous() if stored is not None else None
        if method == "awq":
            return _awq(_read(self.parts["qzeros"])).T.contiguous()
        zeros = _unpack(_read(self.parts["qzeros"]), bits)[:, : self.shape[0]].T
        return ((zeros + int(self.form.zeros_less_one)) & ((1 << bits) - 1)).contiguous()

    def _groups(self) -> int:
        stored = self.parts["weight_scale" if self.form.method == "compressed-tensors" else "scales"]
        return stored.shape[1] if self.form.method == "compressed-tensors" else stored.shape[0]

    def _block_size(self) -> int:
        """The largest power of two that a group holds a whole number of."""
        groups, columns = self._groups(), self.shape[1]
        size = columns // groups if groups and columns % groups == 0 else 0
        block = min(size & -size, _LARGEST_BLOCK)
        if block < 16:
            raise UnsupportedModelError(
                f"{self.name} is quantized in {groups} groups of its {columns} inputs, which are no blocks of 16 or more"
            )
        return block

    def _check_groups(self) -> None:
        stored = self.parts.get("g_idx", self.parts.get("weight_g_idx"))
        if stored is None:
            return
        groups, size = _read(stored), self.shape[1] // self._groups()
        if not torch.equal(groups.long(), torch.arange(self.shape[1]) // size):
            raise UnsupportedModelError(
                f"{self.name} has its inputs in groups of another order (act-order), which MatMulNBits cannot read; export "
                "the original checkpoint, with --quantize"
            )


def find_packed(
    name: str, shape: tuple[int, ...], form: PackedFormat, found: dict[str, StoredTensor], candidates: list[str]
) -> PackedTensor | None:
    """The quantized tensor of parameter `name` [N, K] among a checkpoint's tensors, or None. `candidates`: names that the
    parameter may go by there.
    """
    for candidate in candidates:
        base = candidate.removesuffix("weight")
        parts = {part: found[base + part] for part in _PARTS[form.method] if base + part in found}
        if base == candidate or _CODES[form.method] not in parts or len(shape) != 2:
            continue
        return PackedTensor(name, form, (shape[0], shape[1]), parts)
    return None


def _read(stored: StoredTensor) -> torch.Tensor:
    raw = bytearray(b"".join(stored.chunks(stored.dtype)))
    return torch.frombuffer(raw, dtype=stored.dtype).reshape(stored.shape)


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, m * 32 / bits] of int32 [n, m], from the lowest bits up."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).reshape(packed.shape[0], -1)


def _awq(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, m * 8] of int32 [n, m] in AWQ's order of columns."""
    columns = torch.empty(len(packed), packed.shape[1], 8, dtype=torch.uint8)
    columns[..., list(_AWQ_COLUMNS)] = _unpack(packed, 4).view(len(packed), -1, 8)
    return columns.reshape(len(packed), -1)
