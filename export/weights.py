"""From a checkpoint's tensors to `weights.data`, without holding the model in memory.

The model is built with uninitialised parameters, which cost no memory until touched. Each parameter is bound to the
checkpoint tensor of its name and read from the safetensors file when it is written. Where a parameter has no such
tensor of its shape (renamed, merged, adapted), the model is loaded by transformers instead and written from memory.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from llmx.export.attention import IMPLEMENTATION
from llmx.export.checkpoint import Checkpoint
from llmx.export.lowering import quiet
from llmx.export.packed_checkpoints import PackedTensor, find_packed
from llmx.runtime.errors import CheckpointError, ExportError, UnsupportedModelError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CHUNK = 32 << 20
_ROWS = 16 << 20  # bytes of float32 rows at once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor inside a safetensors file, by byte range."""

    file: Path
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def chunks(self, dtype: torch.dtype) -> Iterator[bytearray | memoryview]:
        """The tensor's bytes as `dtype`, a few tens of megabytes at a time."""
        with self.file.open("rb", buffering=0) as file:
            done = 0
            while done < self.length:
                raw = bytearray(os.pread(file.fileno(), min(_CHUNK, self.length - done), self.offset + done))
                if not raw:
                    raise CheckpointError(f"{self.file} ends before its tensors do; download it again.")
                done += len(raw)
                yield raw if self.dtype == dtype else as_bytes(torch.frombuffer(raw, dtype=self.dtype), dtype)

    def rows(self) -> Iterator[torch.Tensor]:
        """The tensor as float32 [n, columns], a few rows after the other; axes before the last are one."""
        columns, size = self.shape[-1], self.dtype.itemsize * self.shape[-1]
        left, at = self.length // size, self.offset
        with self.file.open("rb", buffering=0) as file:
            while left:
                count = min(left, max(1, _ROWS // (4 * columns)))
                raw = bytearray(os.pread(file.fileno(), count * size, at))
                if len(raw) != count * size:
                    raise CheckpointError(f"{self.file} ends before its tensors do; download it again.")
                yield torch.frombuffer(raw, dtype=self.dtype).view(count, columns).float()
                left, at = left - count, at + count * size


def as_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    """Little-endian bytes of `tensor` as `dtype`. Raises ExportError where a finite value overflows it."""
    converted = tensor.detach().to("cpu", dtype).contiguous()
    if _narrower(dtype, tensor.dtype) and not torch.isfinite(converted).all() and torch.isfinite(tensor).all():
        raise ExportError(
            f"a weight of {tensor.abs().max():.3g} overflows {str(dtype).removeprefix('torch.')}; export with --dtype bf16 or fp32."
        )
    return memoryview(converted.reshape(-1).view(torch.uint8).numpy())


def _narrower(dtype: torch.dtype, source: torch.dtype) -> bool:
    """Whether `dtype` cannot hold every finite value of `source`."""
    both_float = dtype.is_floating_point and source.is_floating_point
    return both_float and torch.finfo(dtype).max < torch.finfo(source).max


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's safetensors files by name. Raises CheckpointError for a damaged file."""
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        size = file.stat().st_size
        try:
            with file.open("rb") as handle:
                (header_size,) = struct.unpack("<Q", handle.read(8))
                if header_size > size:
                    raise ValueError("header longer than the file")
                header = json.loads(handle.read(header_size))
            for name, info in header.items():
                if name == "__metadata__":
                    continue
                start, end = info["data_offsets"]
                if 8 + header_size + end > size:
                    raise ValueError("data cut short")
                dtype = _DTYPES.get(info["dtype"])
                if dtype is not None:
                    tensors[name] = StoredTensor(
                        file, 8 + header_size + start, end - start, dtype, tuple(info["shape"])
                    )
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); download it again.") from None
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


class Stored(Protocol):
    """Where a parameter's values lie."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self) -> Iterator[torch.Tensor]: ...

    def chunks(self, dtype: torch.dtype) -> Iterator[bytearray | memoryview]: ...


@dataclass
class SourceModel:
    """A model ready to trace, and where each of its parameters' values come from (by name)."""

    module: torch.nn.Module
    stored: dict[str, Stored]  # empty: the module holds its values

    def chunks(self, name: str, tensor: torch.Tensor) -> Iterator[bytearray | memoryview]:
        """Bytes of parameter `name` in its own dtype."""
        if self.stored:
            yield from self.stored[name].chunks(tensor.dtype)
        else:
            yield as_bytes(tensor, tensor.dtype)

    def rows(self, name: str, tensor: torch.Tensor, transposed: bool = False) -> Iterator[torch.Tensor]:
        """Parameter `name` as float32 [n, columns], a few rows after the other; `transposed`: of the matrix turned over."""
        if transposed:
            yield torch.cat(list(self.rows(name, tensor))).T.contiguous()
        elif self.stored:
            yield from self.stored[name].rows()
        else:
            flat = tensor.detach().reshape(-1, tensor.shape[-1])
            for piece in flat.split(max(1, _ROWS // (4 * flat.shape[1]))):
                yield piece.float()

    def parameters_by_name(self) -> dict[str, tuple[str, torch.nn.Parameter]]:
        """Every name that a parameter goes by (tied ones have several) -> (the name it is stored under, itself)."""
        stored_under = {id(parameter): name for name, parameter in self.module.named_parameters()}
        every = self.module.named_parameters(remove_duplicate=False)
        return {name: (stored_under[id(parameter)], parameter) for name, parameter in every}

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def num_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.module.parameters())


def build_source(
    checkpoint: Checkpoint, dtype: torch.dtype, adapter: Path | None, attention: str | None
) -> SourceModel:
    """Build the model for tracing with the implementation `attention` (None: what transformers chooses), weights bound to
    the checkpoint where they can be, else loaded.
    """
    if adapter is None or checkpoint.packed is not None:
        module = _build_empty(checkpoint, dtype, attention)
        stored = _bind(module, checkpoint, dtype)
        if checkpoint.packed is not None:
            _check_packed(checkpoint, adapter, stored)
        if stored is not None:
            return SourceModel(module, stored)
        del module
    module = load_model(checkpoint, dtype, adapter, attention)
    static_experts(module)
    return SourceModel(module, {})


def _build_empty(checkpoint: Checkpoint, dtype: torch.dtype, attention: str | None) -> torch.nn.Module:
    from transformers.initialization import no_init_weights

    with quiet(), no_init_weights(), _construction_errors(checkpoint):
        module = checkpoint.auto_class.from_config(
            checkpoint.config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=checkpoint.trust_remote_code,
        )
        module.tie_weights()
        static_experts(module)
    return module.eval()


def static_experts(module: Any) -> None:
    """Mixtures of experts by gathered matrices: the default loops over the experts that were hit, data-dependent."""
    if hasattr(module, "set_experts_implementation") and module._can_set_experts_implementation():
        module.set_experts_implementation("batched_mm")


def _check_packed(checkpoint: Checkpoint, adapter: Path | None, stored: dict[str, Stored] | None) -> None:
    """Raises UnsupportedModelError where a checkpoint that is quantized already would have to be loaded by transformers."""
    if adapter is not None:
        raise UnsupportedModelError(
            f"{checkpoint.name} is already quantized, and an adapter is merged into weights as they were; export the original "
            "checkpoint with --adapter and --quantize."
        )
    if stored is None:
        raise UnsupportedModelError(
            f"{checkpoint.name} is already quantized, and its tensors do not belong to the model's layers one to one; export "
            "the original checkpoint, with --quantize."
        )
    if not any(isinstance(tensor, PackedTensor) for tensor in stored.values()):
        assert checkpoint.packed is not None
        raise UnsupportedModelError(
            f"{checkpoint.name}'s config.json says that it is quantized ({checkpoint.packed.method}), and none of its tensors "
            "is; take quantization_config out of config.json if its weights are the original ones."
        )


def _bind(module: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Stored] | None:
    """Parameter name -> checkpoint tensor, or None where the checkpoint must be loaded by transformers."""
    from transformers.conversion_mapping import WeightConverter, get_model_conversion_mapping

    if any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(module)):
        return None
    if dtype != torch.float32 and (module._keep_in_fp32_modules or module._keep_in_fp32_modules_strict):
        return None
    found = read_index(checkpoint.path)
    prefix = module.base_model_prefix + "."
    bound: dict[str, Stored] = {}
    for name, parameter in module.named_parameters():
        candidates = [name, name.removeprefix(prefix), prefix + name]
        tensor: Stored | None = next((found[c] for c in candidates if c in found), None)
        if tensor is None and checkpoint.packed is not None:
            tensor = find_packed(name, tuple(parameter.shape), checkpoint.packed, found, candidates)
        if tensor is None or tensor.shape != tuple(parameter.shape):
            return None
        bound[name] = tensor
    persistent = set(module.state_dict()) & {name for name, _ in module.named_buffers()}
    return None if persistent else bound


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, adapter: Path | None = None, attention: str | None = None
) -> torch.nn.Module:
    """The model as transformers loads it (with its default attention unless told), a LoRA adapter merged in when given.

    Raises CheckpointError where weights are missing or of another shape, or the adapter does not fit.
    """
    if checkpoint.packed is not None:
        return _load_packed(checkpoint, dtype, adapter, attention)
    with quiet(), _construction_errors(checkpoint):
        module, report = checkpoint.auto_class.from_pretrained(
            checkpoint.path,
            config=checkpoint.config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=checkpoint.trust_remote_code,
            output_loading_info=True,
        )
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report.get(kind, ()))
        if checkpoint.task == "embed":  # hidden states do not pass through it
            names = [name for name in names if not name.startswith("pooler.")]
        if names:
            raise CheckpointError(
                f"{checkpoint.name} lacks weights for {len(names)} of the model's parameters ({kind.replace('_', ' ')}: "
                f"{names[0]} …); its config and weights do not belong together."
            )
    if adapter is not None:
        module = _merge_adapter(module, adapter)
    return module.eval()


def _load_packed(
    checkpoint: Checkpoint, dtype: torch.dtype, adapter: Path | None, attention: str | None
) -> torch.nn.Module:
    """A model whose checkpoint is quantized already, with what its codes stand for."""
    source = build_source(checkpoint, dtype, adapter, attention)
    with torch.no_grad():
        for name, parameter in source.module.named_parameters():
            raw = bytearray(b"".join(source.chunks(name, parameter)))
            parameter.copy_(torch.frombuffer(raw, dtype=parameter.dtype).view(parameter.shape))
    return source.module


def _merge_adapter(module: Any, adapter: Path) -> Any:
    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{adapter} is not a PEFT adapter: it has no adapter_config.json.")
    try:
        from peft import PeftModel
    except ImportError:
        from llmx.runtime.errors import MissingDependencyError

        raise MissingDependencyError('--adapter needs peft: pip install "llmx[export]".') from None
    try:
        with quiet():
            merged = PeftModel.from_pretrained(module, str(adapter)).merge_and_unload(safe_merge=True)
    except Exception as error:
        raise CheckpointError(
            f"The adapter {adapter} does not fit the model: {str(error).strip().splitlines()[0][:200]}"
        ) from None
    return merged


@contextmanager
def _construction_errors(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except KeyError as error:
        if error.args == (IMPLEMENTATION,):
            raise UnsupportedModelError(
                f"{checkpoint.config.model_type} cannot be exported: it does not use transformers' attention interface, "
                "which the export traces through"
            ) from None
        raise CheckpointError(f"transformers cannot build {checkpoint.name}: {error!r}") from error
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"transformers cannot build {checkpoint.name}: {text[0][:240]}") from error
