"""A cache of prepacked weights, mapped into memory and shared by a package's graphs.

onnxruntime repacks matrix weights for the CPU when it opens a graph, into private memory, for each session anew. Saved
once as an optimised model with its prepacked blobs (`session.save_external_prepacked_constant_initializers`), they are
memory-mapped instead: no copy, shared by both graphs and by every process that runs the package.

An entry depends on the package's weights, onnxruntime's version and the CPU, so it lives in the user's cache folder and
never in the package:

    <cache>/<key>/prefill.onnx, decode.onnx, weights.bin, complete; where graphs' blobs differ, decode/decode.onnx, decode/weights.bin

Invariants: an entry's folder appears by one rename, with `complete` in it; whoever finds it may read it without a lock.
Least recently used entries are removed when the cache outgrows its bound.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmx.runtime.machine import cpu_fingerprint
from llmx.runtime.manifest import Manifest, check_hashes
from llmx.runtime.providers import import_onnxruntime

DATA_FILE = "weights.bin"
COMPLETE = "complete"
MIN_WEIGHTS = 32 << 20  # smaller packages open faster than the cache helps
DEFAULT_BOUND = 64 << 30
_PARTIAL = ".partial-"
_STALE = 3600.0  # seconds without a write, after which a partial entry's builder is taken for dead


def default_cache_dir() -> Path:
    """`$LLMX_CACHE`, else `llmx` in `$XDG_CACHE_HOME` or the platform's cache folder."""
    own = os.environ.get("LLMX_CACHE")
    if own:
        return Path(own)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "llmx" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmx"


def wanted(manifest: Manifest) -> bool:
    """Whether the package is large enough for the cache to help."""
    weights = manifest.files.get("weights.data")
    return weights is not None and weights.size >= MIN_WEIGHTS


class MappedCache:
    """Owns the folder of entries. `bound`: most bytes that all entries may take together."""

    def __init__(self, folder: Path | None = None, bound: int = DEFAULT_BOUND) -> None:
        self.folder = (folder or default_cache_dir()) / "prepacked"
        self.bound = bound

    def get(self, package: Path, manifest: Manifest, make_options: Callable[[], Any]) -> dict[str, Path] | None:
        """Graph files of the package's entry, built where missing; None where the package is better opened as it is.

        A cache that cannot be written costs memory, not the run: it warns once and returns None. Raises PackageError where
        the files to be cached were altered.
        """
        if not wanted(manifest):
            return None
        entry = self.folder / self.key(manifest)
        names = {name: graph.file for name, graph in manifest.graphs.items() if name != "candidates"}
        if not self._usable(entry, names):
            shutil.rmtree(entry, ignore_errors=True)
            check_hashes(package, manifest)  # once for each entry: later opens read what was checked here
            try:
                self._build(entry, package, names, make_options)
            except Exception as error:  # onnxruntime's failures share no base class; opening the package itself tells
                reason = " ".join(str(error).split())[:160]
                warnings.warn(
                    f"the cache of prepacked weights at {self.folder} could not be written ({reason})", stacklevel=2
                )
                return None
        with contextlib.suppress(OSError):
            os.utime(entry / COMPLETE)  # read for "least recently used"
        return {name: self._graph(entry, file) for name, file in names.items()}

    def key(self, manifest: Manifest) -> str:
        """Hash of everything that the blobs depend on."""
        facts = [import_onnxruntime().__version__, cpu_fingerprint()]
        facts += [
            f"{name}={info.sha256}"
            for name, info in sorted(manifest.files.items())
            if name.endswith((".onnx", ".data"))
        ]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]

    @staticmethod
    def _graph(entry: Path, file: str) -> Path:
        return next((path for path in entry.glob(f"*/{file}")), entry / file)

    def _usable(self, entry: Path, names: dict[str, str]) -> bool:
        """Whether every file that the entry noted on completion still has its size."""
        try:
            noted = dict(line.rsplit(" ", 1) for line in (entry / COMPLETE).read_text().splitlines())
            return bool(noted) and all((entry / name).stat().st_size == int(size) for name, size in noted.items())
        except (OSError, ValueError):
            return False

    def _build(self, entry: Path, package: Path, names: dict[str, str], make_options: Callable[[], Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._evict(2 * (package / "weights.data").stat().st_size * len(names))
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.folder))
        try:
            for file in names.values():
                own = partial / Path(file).stem
                own.mkdir()
                _save_prepacked(package / file, own / file, make_options())
            self._merge(partial, list(names.values()))
            files = [p for p in partial.rglob("*") if p.is_file()]
            noted = [f"{p.relative_to(partial).as_posix()} {p.stat().st_size}" for p in files]
            (partial / COMPLETE).write_text("\n".join(noted))
            try:
                partial.rename(entry)
            except OSError:  # another process was faster: its entry is as good
                if not self._usable(entry, names):
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @staticmethod
    def _merge(partial: Path, files: list[str]) -> None:
        """Bring graphs whose blobs are byte-identical together over one data file, the first's; the first graph's to the top."""
        kept: list[Path] = []
        for file in files:
            own = partial / Path(file).stem
            same = next((f for f in kept if filecmp.cmp(f / DATA_FILE, own / DATA_FILE, shallow=False)), None)
            if same is None:
                kept.append(own)
                continue
            (own / file).rename(same / file)
            (own / DATA_FILE).unlink()
            own.rmdir()
        for path in list(kept[0].iterdir()):
            path.rename(partial / path.name)
        kept[0].rmdir()

    def _evict(self, needed: int) -> None:
        """Remove what died builders left, and least recently used entries until `needed` more bytes stay within the bound."""
        entries = []
        for path in self.folder.iterdir():
            if path.name.startswith(_PARTIAL):
                with contextlib.suppress(OSError):
                    if time.time() - max(p.stat().st_mtime for p in [path, *path.rglob("*")]) > _STALE:
                        shutil.rmtree(path, ignore_errors=True)
                continue
            with contextlib.suppress(OSError):
                size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
                entries.append(((path / COMPLETE).stat().st_mtime, size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + needed <= self.bound:
                break
            shutil.rmtree(path, ignore_errors=True)
            total -= size


def _save_prepacked(source: Path, target: Path, options: Any) -> None:
    """Write `source`'s optimised graph and prepacked weights beside it (`DATA_FILE`)."""
    ort = import_onnxruntime()
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA_FILE)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "4096")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
