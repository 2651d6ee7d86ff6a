"""The folder that a package is written into: whole at the end or not there at all, whatever ends the process."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from llmx.runtime.errors import ExportError
from llmx.runtime.manifest import MANIFEST_FILE
from llmx.runtime.units import human_bytes

_DAY = 86400.0
_CLOCK = 60.0  # seconds by which a process's start and a file's time may disagree
_PARTIAL, _OLD = "partial", "old"
# Errors of a full, broken or read-only disk: they mean the package even where they name no file.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}


@contextlib.contextmanager
def package_folder(output: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends well, and vanishes otherwise.

    A link at `output` stays, and the package goes where it points. What a killed export left behind is removed first.
    Raises ExportError: `output` exists (without `force`), or nothing can be written there. Other errors of the block pass.
    """
    target = _target(output)
    made = _make_parents(target)
    try:
        _sweep(target)
        _check_replaceable(output, target, force)
        partial = _beside(target, _PARTIAL)
        try:
            partial.mkdir()
        except OSError as error:
            raise ExportError(_nothing_written(target.parent, error)) from None
        try:
            yield partial
            _move_into_place(partial, output, target)
        except OSError as error:
            if not _is_of_writing(error, partial):
                raise
            raise _failed(output, error) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty: someone else uses it by now
                folder.rmdir()
        raise


def check_free_space(folder: Path, needed: int) -> None:
    """Raises ExportError before anything is written when `needed` bytes do not fit beside the package's output.

    `folder` is what `package_folder` gave.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"The package needs {human_bytes(needed)} and {folder.parent} has {human_bytes(free)} free, "
            f"{human_bytes(needed - free)} too little; free some space or choose another --output."
        )


def _target(output: Path) -> Path:
    """Where `output` lies once links are followed."""
    try:
        return output.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else None
        raise ExportError(f"Nothing can be written to {output}: {reason or 'its links go in a circle'}.") from None


def _make_parents(target: Path) -> list[Path]:
    """The parents of `target` that were not there and are now, the innermost first."""
    try:
        made = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(_nothing_written(target.parent, error)) from None
    return made


def _nothing_written(folder: Path, error: OSError) -> str:
    reason = "it is no folder" if error.errno in (errno.EEXIST, errno.ENOTDIR) else error.strerror or str(error)
    return f"Nothing can be written to {folder}: {reason}; choose another --output."


def _check_replaceable(output: Path, target: Path, force: bool) -> None:
    try:
        exists = target.exists()
        package = exists and target.is_dir() and ((target / MANIFEST_FILE).is_file() or not any(target.iterdir()))
    except OSError as error:
        raise ExportError(_nothing_written(output, error)) from None
    if exists and not force:
        raise ExportError(f"{output} already exists; choose another --output, or replace it with --force.")
    if exists and not package:
        raise ExportError(f"{output} is not a model package, so --force does not replace it; choose another --output.")


def _move_into_place(partial: Path, output: Path, target: Path) -> None:
    """`partial` becomes `target`. An old package there is gone afterwards, or back where it was if that fails."""
    retired = _beside(target, _OLD)
    try:
        if target.exists():
            target.rename(retired)
        partial.rename(target)
    except BaseException as error:
        if retired.exists() and not target.exists():
            retired.rename(target)
        if isinstance(error, OSError):
            raise _failed(output, error) from None
        raise
    finally:
        if target.exists():
            shutil.rmtree(retired, ignore_errors=True)


def _failed(output: Path, error: OSError) -> ExportError:
    advice = "; free some space or choose another --output" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return ExportError(f"Writing {output} failed: {error.strerror or error} (nothing was left behind){advice}.")


def _is_of_writing(error: OSError, partial: Path) -> bool:
    if error.filename is None:
        return error.errno in _DISK
    return Path(os.fsdecode(error.filename)).is_relative_to(partial) if _is_path(error.filename) else False


def _is_path(name: object) -> bool:
    return isinstance(name, (str, bytes, os.PathLike))


# -- what a killed export left ----------------------------------------------------------------------------------------


def _beside(target: Path, kind: str) -> Path:
    """A name for a folder of this process beside `target`: .NAME.KIND-MACHINE-PID-RANDOM."""
    return target.with_name(f".{target.name}.{kind}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}")


def _machine() -> str:
    """Tells apart machines and containers, whose process ids mean nothing to each other."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _sweep(target: Path) -> None:
    """Remove what exports to `target` left that are no longer running; an old package without successor moves back."""
    for kind in (_OLD, _PARTIAL):
        prefix = f".{target.name}.{kind}-"
        with contextlib.suppress(OSError):  # a parent that cannot be listed: nothing to sweep
            for folder in [p for p in target.parent.iterdir() if p.name.startswith(prefix)]:
                if not _is_abandoned(folder, folder.name.removeprefix(prefix)):
                    continue
                if kind == _OLD and not target.exists():
                    folder.rename(target)
                else:
                    shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path, owner: str) -> bool:
    """Whether no process writes `folder`. Of another machine's processes only a day without a change tells."""
    match = re.fullmatch(r"([0-9a-f]{8})-(\d+)-[0-9a-f]{8}", owner)
    if match is None:
        return False  # the user's own
    changed = _last_change(folder)
    if match[1] != _machine():
        return time.time() - changed > _DAY
    if int(match[2]) == os.getpid():
        return False
    try:
        started = psutil.Process(int(match[2])).create_time()
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OverflowError):
        return False
    return started > changed + _CLOCK  # the id belongs to a later process


def _last_change(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
