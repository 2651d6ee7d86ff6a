"""Sessions on disk: one npz file, its header JSON, read without pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from llmx.runtime.dtypes import numpy_dtype
from llmx.runtime.errors import ContextLengthError, LlmxError, RequestError
from llmx.runtime.manifest import MANIFEST_FILE
from llmx.runtime.parked_state import ParkedState, Part, make_parked, on_host

if TYPE_CHECKING:
    from llmx.runtime.llm import LLM

FORMAT, VERSION = "llmx-session", 1


def save_session(
    path: Path, llm: LLM, tokens: list[int], dropped: list[int], settings: dict[str, Any], parked: ParkedState
) -> None:
    """Write the file under another name, then give it its own. Raises RequestError where that fails."""
    parts = [part for part in parked.parts if part.start < parked.length]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "package": package_hash(llm),
        "tokens": tokens,
        "dropped": dropped,
        **settings,
        "made_for": parked.made_for,
        "length": parked.length,
        "parts": [[part.start, part.end] for part in parts],
    }
    arrays: dict[str, Any] = {
        f"{i}.{j}": _plain(on_host(a)) for i, part in enumerate(parts) for j, a in enumerate(part.arrays)
    }
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise RequestError(f"The session cannot be written to {path}: {error.strerror or error}.") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def load_session(path: Path, llm: LLM) -> tuple[list[int], list[int], dict[str, Any], ParkedState]:
    """(tokens, forgotten tokens, settings, state) of a file. Raises RequestError, ContextLengthError."""
    try:
        with np.load(path, allow_pickle=False) as data:
            header = json.loads(data["header"].tobytes())
            if header["format"] != FORMAT or header["version"] != VERSION:
                raise ValueError("another format")
            if header["package"] != package_hash(llm):
                raise RequestError(
                    f"{path} was saved with another package than {llm.folder}; load it with that one, or begin a new session."
                )
            parts = [_part(data, index, span, llm) for index, span in enumerate(header["parts"])]
        found = _checked(header, parts, llm)
    except FileNotFoundError:
        raise RequestError(f"There is no saved session at {path}.") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, LlmxError):
            raise
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise RequestError(f"{path} is no saved session, or is damaged ({reason}); begin a new session.") from None
    if len(found[0]) > llm.max_length:
        raise ContextLengthError(
            f"{path} holds {len(found[0])} tokens and the context {llm.max_length}; load the model with a larger max_length."
        )
    return found


def _checked(
    header: dict[str, Any], parts: list[Part], llm: LLM
) -> tuple[list[int], list[int], dict[str, Any], ParkedState]:
    tokens, dropped = ([int(t) for t in header[name]] for name in ("tokens", "dropped"))
    if not all(0 <= t < llm.backend.vocab_size for t in (*tokens, *dropped)):
        raise ValueError("its tokens are not of the vocabulary")
    parked = make_parked(llm.backend, parts, int(header["made_for"]))
    parked.cut(int(header["length"]))
    starts = [0, *(part.end for part in parts)] if llm.backend.stores_state else [0] * len(parts)
    if any(part.start != start for part, start in zip(parts, starts, strict=False)) or parked.length > len(tokens):
        raise ValueError("its state does not fit its tokens")
    return tokens, dropped, {"on_full": header["on_full"], "keep_first": header["keep_first"]}, parked


def _part(data: Any, index: int, span: list[int], llm: LLM) -> Part:
    start, end = span
    if not 0 <= start < end:
        raise ValueError("its state does not fit its tokens")
    tensors = [tensor for tensor in llm.manifest.state if tensor.layout != "cross"]
    arrays = []
    for place, tensor in enumerate(tensors):
        array = data[f"{index}.{place}"]
        sizes = {"slots": 1, "max_length": end - start}
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape]
        dtype = numpy_dtype(tensor.dtype)
        if list(array.shape) not in (shape, shape[1:]) or array.dtype.itemsize != dtype.itemsize:
            raise ValueError(f"{tensor.input} has another shape")
        arrays.append(array if array.dtype == dtype else array.view(dtype))
    backend: Any = llm.backend
    return Part(start, end, arrays if backend.stores_state else backend.wrap_state(arrays))


def _plain(array: np.ndarray) -> np.ndarray:
    """An array of a dtype that npz files know; others (bfloat16) as integers of the same size."""
    return array if array.dtype.kind in "fiu" else array.view(f"u{array.dtype.itemsize}")


def package_hash(llm: LLM) -> str:
    """sha256 of the package's manifest, which holds those of all its files."""
    return hashlib.sha256((llm.folder / MANIFEST_FILE).read_bytes()).hexdigest()
