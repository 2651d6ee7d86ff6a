"""The output's folder: whole or not there, whatever goes wrong; and what killed exports leave."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from llmx.export import folder as folders
from llmx.export.folder import check_free_space, package_folder
from llmx.runtime.errors import ExportError
from llmx.runtime.units import human_bytes


def write(output: Path, force: bool = False, text: str = "{}") -> None:
    with package_folder(output, force) as folder:
        (folder / "llmx.json").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_writes_and_replaces(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    write(output)
    with pytest.raises(ExportError, match="already exists"):
        write(output)
    write(output, force=True, text="second")
    assert (output / "llmx.json").read_text() == "second"
    assert names(output.parent) == ["out"]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/checkpoint/tokenizer.json"),
        PermissionError(errno.EACCES, "Permission denied", "/checkpoint/model.safetensors"),
        OSError(errno.ENOSPC, "No space left on device", "/elsewhere/file"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ],
)
def test_errors_of_other_files_pass(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(OSError) as caught, package_folder(tmp_path / "new" / "out", False):  # noqa: PT011
        raise error
    assert caught.value is error
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", [None, "weights.data"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG])
def test_errors_of_writing_are_one_sentence(tmp_path: Path, number: int, name: str | None) -> None:
    with (
        pytest.raises(ExportError, match=f"Writing .*out failed: {os.strerror(number)} \\(nothing was left behind\\)"),
        package_folder(tmp_path / "out", False) as folder,
    ):
        raise OSError(number, os.strerror(number), *([str(folder / name)] if name else []))
    assert names(tmp_path) == []


def test_a_failing_second_rename_brings_the_old_package_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    write(output, text="first")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ExportError, match="Writing .*out failed: Invalid cross-device link"):
        write(output, force=True, text="second")
    assert names(tmp_path) == ["out"]
    assert (output / "llmx.json").read_text() == "first"

    def interrupted(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(output, force=True, text="second")
    assert names(tmp_path) == ["out"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(ExportError, match="Nothing can be written to .*: it is no folder; choose another --output"):
            write(output)
    with pytest.raises(ExportError, match="Nothing can be written to .*: File name too long"):
        write(tmp_path / ("x" * 250))
    with pytest.raises(ExportError, match="File name too long"):
        write(tmp_path / ("x" * 300) / "out")
    assert names(tmp_path) == ["file"]


def test_force_replaces_packages_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(ExportError, match="is not a model package"):
            write(tmp_path / name, force=True)
    write(tmp_path / "empty", force=True)
    assert names(tmp_path) == ["empty", "file", "folder"]


def test_links_stay_and_lead_to_the_package(tmp_path: Path) -> None:
    store, links = tmp_path / "store", tmp_path / "links"
    store.mkdir()
    links.mkdir()
    (links / "current").symlink_to(store / "v1")
    write(links / "current", text="first")  # the link leads nowhere yet
    write(links / "current", force=True, text="second")
    assert (links / "current").is_symlink() and names(links) == ["current"]
    assert names(store) == ["v1"] and (store / "v1" / "llmx.json").read_text() == "second"
    (links / "a").symlink_to(links / "b")
    (links / "b").symlink_to(links / "a")
    with pytest.raises(ExportError, match="Nothing can be written to"):
        write(links / "a")


# -- what killed exports left -----------------------------------------------------------------------------------------


def left(parent: Path, kind: str, machine: str, pid: int, age: float = 0) -> Path:
    folder = parent / f".out.{kind}-{machine}-{pid}-{int(age):08x}"
    folder.mkdir()
    (folder / "llmx.json").write_text("{}")
    for path in (folder / "llmx.json", folder):
        os.utime(path, (time.time() - age, time.time() - age))
    return folder


@pytest.fixture
def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_ended_processes_are_removed(tmp_path: Path, dead: int) -> None:
    here, other, parent = folders._machine(), "00000000", os.getppid()
    gone = [
        left(tmp_path, "partial", here, dead),
        left(tmp_path, "partial", here, parent, age=10 * 365 * 86400),  # the id belongs to a later process
        left(tmp_path, "partial", other, parent, age=2 * 86400),
    ]
    kept = [
        left(tmp_path, "partial", here, parent),
        left(tmp_path, "partial", here, os.getpid()),
        left(tmp_path, "partial", other, dead, age=3600),
    ]
    (tmp_path / ".out.partial-mine").mkdir()
    (tmp_path / f".other.partial-{here}-{dead}-0123abcd").mkdir()
    write(tmp_path / "out")
    assert not any(folder.exists() for folder in gone)
    assert all(folder.exists() for folder in kept)
    assert (tmp_path / ".out.partial-mine").exists() and (tmp_path / f".other.partial-{here}-{dead}-0123abcd").exists()


def test_an_export_killed_between_the_renames(tmp_path: Path, dead: int) -> None:
    """The old package comes back where there is no new one, and goes where there is."""
    left(tmp_path, "old", folders._machine(), dead)
    with pytest.raises(ExportError, match="already exists"):
        write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    left(tmp_path, "old", folders._machine(), dead)
    write(tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"]


def test_a_killed_export_is_swept_by_the_next(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, signal
from llmx.export.folder import package_folder
with package_folder(pathlib.Path({str(tmp_path / "out")!r}), False):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert len(names(tmp_path)) == 1
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_too_little_space_in_readable_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 45_000}))
    check_free_space(tmp_path / ".x.partial-1", 45_000)
    with pytest.raises(ExportError) as caught:
        check_free_space(tmp_path / ".x.partial-1", 1_225_000)
    assert str(caught.value) == (
        f"The package needs 1.23 MB and {tmp_path} has 45 kB free, 1.18 MB too little; free some space or choose another "
        "--output."
    )


def test_human_bytes() -> None:
    sizes = [0, 999, 1000, 999_499, 999_500, 999_600_000, 1.5e9, 2e12, 3e15]
    assert [human_bytes(s) for s in sizes] == [
        "0 B", "999 B", "1 kB", "999 kB", "1 MB", "1 GB", "1.5 GB", "2 TB", "3,000 TB",
    ]  # fmt: skip
