"""Which matrices of a model are stored quantized, and how: the plan that the writer and the graphs follow.

Weights alone are quantized, block-wise (`llmx.export.blocks`). The plan is made from the modules, before anything is
traced, so that weights are quantized while they are written. Where a graph turns out to use a planned matrix otherwise,
it is stored as it is.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from llmx.export.blocks import Blocks, Scheme, round_to_nearest
from llmx.export.experts import is_operator
from llmx.export.packed_checkpoints import PackedFormat, PackedTensor
from llmx.export.weights import SourceModel, as_bytes
from llmx.runtime.errors import ExportError

BITS = {"int8": 8, "int4": 4}
_FEWEST_ROWS = 16  # outputs; fewer are gates, of no weight
LARGEST_FORM = 2 << 30  # bytes of a second form of the weights that nobody asked for


@dataclass(frozen=True)
class QuantizationOptions:
    """`weights` and `head` ("int8" | "int4"; `head` also "none"): of the layers' matrices, and of the output head and the
    embedding. `exclude`: patterns of module names that stay as they are. `method`: "rtn" rounds to nearest, "gptq" for the
    inputs that `calibration_file` gives rise to. `quality_file`: text on which to measure what quantization costs. Both
    default to text that the model writes.
    """

    weights: str
    block_size: int = 64
    symmetric: bool = True
    head: str = "int8"
    exclude: tuple[str, ...] = ()
    method: str = "rtn"
    calibration_file: Path | None = None
    quality_file: Path | None = None

    def __post_init__(self) -> None:
        if self.weights not in BITS or self.head not in (*BITS, "none"):
            raise ExportError(f"--quantize takes {' or '.join(BITS)}, --quantize-head also none.")
        if self.block_size not in (16, 32, 64, 128, 256):
            raise ExportError(f"--quantize-block-size is 16, 32, 64, 128 or 256, and not {self.block_size}.")
        if self.method not in ("rtn", "gptq"):
            raise ExportError(f"--quantize-method is rtn or gptq, and not {self.method}.")
        for file in (self.calibration_file, self.quality_file):
            if file is not None:
                read_text(file)  # before an hour of work rather than after it

    @property
    def scheme(self) -> Scheme:
        return Scheme(BITS[self.weights], self.block_size, self.symmetric)

    @property
    def head_scheme(self) -> Scheme | None:
        return None if self.head == "none" else Scheme(BITS[self.head], self.block_size, self.symmetric)


def second_form(plan: Plan, prompts: str, source: SourceModel) -> Plan:
    """The matrices of `plan` that prompts get in int8 too, which is a byte a value: all but head, embedding and stacked experts.

    `prompts` is "int8", "same" (none) or "auto": up to `LARGEST_FORM` bytes.
    """
    if prompts not in ("auto", "int8", "same"):
        raise ExportError(f"--quantize-prompts is auto, int8 or same, and not {prompts}.")
    ends = {id(module.weight) for module in _ends(source.module)}
    parameters = dict(source.module.named_parameters())
    layers = {n: w for n, w in plan.items() if id(parameters[n]) not in ends and parameters[n].ndim == 2}
    small = sum(map(num_values, layers.values())) <= LARGEST_FORM
    return layers if prompts == "int8" or (prompts == "auto" and small) else {}


def num_values(weight: QuantizedWeight) -> int:
    return weight.shape[0] * weight.shape[1]


def read_text(file: Path) -> str:
    """The text of a UTF-8 file. Raises ExportError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(
            f"{file} cannot be read as UTF-8 text ({getattr(error, 'strerror', None) or 'other bytes'})."
        ) from None


@dataclass(frozen=True)
class QuantizedWeight:
    """A parameter and its quantized form. `name` is what it is stored under, `shape` [rows, columns] that of the matrix
    whose columns are multiplied (a parameter kept as [in, out] is `transposed`), `dtype` that of the scales. `blocks` gives
    its rows in order.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[Blocks]]
    transposed: bool = False

    @property
    def codes(self) -> str:
        return f"{self.name}:codes"

    @property
    def scales(self) -> str:
        return f"{self.name}:scales"

    @property
    def zero_points(self) -> str | None:
        return None if self.scheme.symmetric else f"{self.name}:zero_points"

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each part, by its key."""
        rows, columns = self.shape
        sizes = {
            self.codes: rows * self.scheme.row_bytes(columns),
            self.scales: rows * self.scheme.blocks(columns) * self.dtype.itemsize,
        }
        return sizes | ({self.zero_points: rows * self.scheme.zero_point_bytes(columns)} if self.zero_points else {})

    @property
    def below_each_other(self) -> tuple[QuantizedWeight, ...]:
        """The stored matrices whose rows these are, in order."""
        return (self,)

    def parts(self) -> Iterator[tuple[str, Iterator[memoryview]]]:
        """Key and bytes of each part; the codes must be read before what follows them."""
        scales: list[torch.Tensor] = []
        zero_points: list[torch.Tensor] = []

        def codes() -> Iterator[memoryview]:
            for rows in self.blocks():
                scales.append(rows.scales)
                if rows.zero_points is not None:
                    zero_points.append(rows.packed_zero_points())
                yield as_bytes(rows.packed_codes(), torch.uint8)

        yield self.codes, codes()
        yield self.scales, (as_bytes(piece, self.dtype) for piece in scales)
        if self.zero_points is not None:
            yield self.zero_points, (as_bytes(piece, torch.uint8) for piece in zero_points)


Plan = dict[str, QuantizedWeight]


def side_by_side(weights: Sequence[QuantizedWeight | None]) -> QuantizedWeight | None:
    """The rows of several quantized matrices as one, whose parts are theirs one after another; None where they do not fit.

    Keys of parts are the members' keys, on a line each.
    """
    known = [weight for weight in weights if weight is not None]
    if len(known) < 2:
        return known[0] if len(known) == len(weights) == 1 else None
    first = known[0]
    if len(known) != len(weights) or any(
        (w.scheme, w.shape[1], w.dtype, w.transposed) != (first.scheme, first.shape[1], first.dtype, False)
        for w in known
    ):
        return None
    return _SideBySide("+".join(w.name for w in known), first.scheme, (sum(w.shape[0] for w in known), first.shape[1]),
                       first.dtype, first.blocks, members=tuple(known))  # fmt: skip


@dataclass(frozen=True)
class _SideBySide(QuantizedWeight):
    members: tuple[QuantizedWeight, ...] = ()

    @property
    def below_each_other(self) -> tuple[QuantizedWeight, ...]:
        return self.members

    @property
    def codes(self) -> str:
        return "\n".join(weight.codes for weight in self.members)

    @property
    def scales(self) -> str:
        return "\n".join(weight.scales for weight in self.members)

    @property
    def zero_points(self) -> str | None:
        return None if self.scheme.symmetric else "\n".join(str(weight.zero_points) for weight in self.members)


def plan_quantization(source: SourceModel, options: QuantizationOptions | None) -> Plan:
    """Every matrix of `source` that is stored quantized, by the name that it is stored under: what the checkpoint holds so
    already, unchanged, and what `options` name, rounded to nearest.
    """
    plan: Plan = {}
    parameters = dict(source.module.named_parameters())
    for name, tensor in source.stored.items():
        if isinstance(tensor, PackedTensor):
            held = functools.partial(_held, tensor)
            plan[name] = QuantizedWeight(name, tensor.scheme, tensor.shape, parameters[name].dtype, held)
    for name, parameter, scheme, transposed in matrices(source, options) if options is not None else ():
        if name in plan:
            continue
        rows, columns = parameter.shape[::-1] if transposed else (parameter[..., 0].numel(), parameter.shape[-1])
        read = functools.partial(_rounded, source, name, parameter, scheme, transposed)
        plan[name] = QuantizedWeight(name, scheme, (rows, columns), parameter.dtype, read, transposed)
    if not plan and options is not None:
        raise ExportError(
            "The model has no matrix to quantize (linear layers, output head, embedding); leave --quantize out."
        )
    return plan


def _held(tensor: PackedTensor) -> Iterator[Blocks]:
    yield tensor.blocks()


def _rounded(
    source: SourceModel, name: str, parameter: torch.Tensor, scheme: Scheme, transposed: bool
) -> Iterator[Blocks]:
    for piece in source.rows(name, parameter, transposed):
        yield round_to_nearest(piece, scheme, parameter.dtype)


def describe_quantization(
    weights: list[QuantizedWeight],
    source: SourceModel,
    options: QuantizationOptions | None,
    packed: PackedFormat | None,
) -> dict[str, Any] | None:
    """The manifest's entry: what was done to how many of the model's values. The layers' scheme, where they have several, is
    that of most values.
    """
    if not weights:
        return None
    ends = {id(module.weight) for module in _ends(source.module)}
    parameters = dict(source.module.named_parameters())
    head = [weight.scheme.bits for weight in weights if id(parameters[weight.name]) in ends]
    sizes: Counter[Scheme] = Counter()
    for weight in weights:
        if id(parameters[weight.name]) not in ends or len(weights) == len(head):
            sizes[weight.scheme] += num_values(weight)
    [(scheme, _)] = sizes.most_common(1)
    methods = {"rtn": "round-to-nearest", "gptq": "gptq"}
    return {
        "method": f"{packed.method} (checkpoint)" if packed else methods[options.method if options else "rtn"],
        "bits": scheme.bits,
        "block_size": scheme.block_size,
        "symmetric": scheme.symmetric,
        "head_bits": max(head, default=None),
        "matrices": len(weights),
        "parameters": sum(map(num_values, weights)),
        "bytes": sum(sum(weight.sizes.values()) for weight in weights),
    }


def matrices(
    source: SourceModel, options: QuantizationOptions
) -> Iterator[tuple[str, torch.nn.Parameter, Scheme, bool]]:
    """(stored name, parameter, scheme, whether it is kept as [in, out]) of every matrix to quantize, each once."""
    from transformers.pytorch_utils import Conv1D

    stored = source.parameters_by_name()
    ends = _ends(source.module)
    table = getattr(source.module.get_input_embeddings(), "weight", None)
    experts = _expert_counts(source.module)
    seen: set[str] = set()
    for module_name, module in source.module.named_modules():
        transposed = isinstance(module, Conv1D)
        end = any(module is other for other in ends)
        if not (end or transposed or isinstance(module, torch.nn.Linear)):
            continue
        found = stored.get(f"{module_name}.weight")
        scheme = options.head_scheme if end else options.scheme
        if found is None or scheme is None or found[0] in seen or found[1].ndim != 2:
            continue
        if any(fnmatch(module_name, pattern) for pattern in options.exclude):
            continue
        rows, columns = found[1].shape[::-1] if transposed else found[1].shape
        if columns < scheme.block_size or rows < _FEWEST_ROWS or (not end and rows in experts):
            continue
        if found[1] is table and columns % scheme.block_size:  # GatherBlockQuantized has no padding
            continue
        seen.add(found[0])
        yield *found, scheme, transposed
    for module_name, module in source.module.named_modules():
        if is_operator(module) and not any(fnmatch(module_name, pattern) for pattern in options.exclude):
            yield from _experts(stored, module_name, module, options.scheme)


def _experts(
    stored: dict[str, tuple[str, torch.nn.Parameter]], module_name: str, module: Any, scheme: Scheme
) -> Iterator[tuple[str, torch.nn.Parameter, Scheme, bool]]:
    """A layer's stacked experts, where blocks divide both of their matrices (QMoE has no padding)."""
    found = [stored[f"{module_name}.{part}"] for part in ("gate_up_proj", "down_proj")]
    if all(parameter.shape[-1] % scheme.block_size == 0 for _, parameter in found):
        for name, parameter in found:
            yield name, parameter, scheme, False


def _ends(module: Any) -> list[torch.nn.Module]:
    """The output head, and the embedding, which may be one matrix: quantized with the head's scheme."""
    try:
        head = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    tables = [module.get_input_embeddings(), head]
    return [table for table in tables if isinstance(table, (torch.nn.Linear, torch.nn.Embedding))]


def _expert_counts(module: Any) -> set[int]:
    """Numbers of experts that the config names: a linear layer with so many outputs chooses between them."""
    config = module.config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return {count for name in names if isinstance(count := getattr(config, name, None), int)}
