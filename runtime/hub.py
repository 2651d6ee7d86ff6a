"""Folders and hub ids: whatever names a package or a checkpoint becomes a local folder."""

from __future__ import annotations

import contextlib
import glob
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmx.runtime.errors import LlmxError, PackageError, RequestError
from llmx.runtime.manifest import MANIFEST_FILE, Manifest

_PATIENCE = 5.0  # seconds for the hub's first answer
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def looks_like_hub_id(name: str) -> bool:
    """`org/name` or `name`, as the Hugging Face hub spells repositories; paths (`./x`, `/x`, `a/b/c`) are not."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith((".", "/"))


def download(
    name: str, revision: str | None, patterns: list[str] | None, error: type[LlmxError]
) -> tuple[Path, str | None]:
    """Fetch a hub repository's files into the shared cache; returns (folder, commit).

    Raises `error`, one sentence: no such repository or revision, no access, no network.
    """
    from huggingface_hub import snapshot_download

    with _one_sentence(name, revision, error):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **_where()))
    return folder, _commit(folder)


def _where() -> dict[str, Any]:
    """The client's arguments: its cache alone where the hub does not answer, which it would ask for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return {}
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # the client's errors, whichever library it uses by now
        return {"local_files_only": True}
    return {}


@contextlib.contextmanager
def _one_sentence(name: str, revision: str | None, error: type[LlmxError]) -> Iterator[None]:
    """What the hub's client raises within the block becomes `error`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise error(f"{name} is gated: accept its terms on the hub, then run `hf auth login`.") from None
    except RevisionNotFoundError:
        raise error(f"{name} has no revision {revision!r} on the hub.") from None
    except RepositoryNotFoundError:
        raise error(
            f"There is no folder {name} here and no such repository on the hub (or it is private: `hf auth login`)."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as problem:
        silent = isinstance(problem, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
        reason = f"no answer from {constants.ENDPOINT}" if silent else _first_sentence(problem)
        raise error(f"There is no folder {name} here, and the hub could not be reached for it ({reason}).") from None


def _first_sentence(problem: Exception) -> str:
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return textwrap.shorten(lines[0].partition(". ")[0].rstrip("."), 160, placeholder=" …")


def _commit(folder: Path) -> str | None:
    """The commit of a snapshot's folder in the hub's cache."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def resolve_package(name: str | Path, revision: str | None = None) -> Path:
    """The folder of the package `name`: a local folder, or a hub id of a published package.

    Raises PackageError when it is neither, RequestError for a `revision` of a local folder.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        if revision is not None:
            raise RequestError(f"A revision goes with a hub id, and {name} is a local folder; leave it out.")
        return folder
    owner, slash, _ = str(name).partition("/")
    # published packages have an owner, and what lies in a folder that is here is a path
    if not looks_like_hub_id(str(name)) or not slash or Path(owner).is_dir():
        raise PackageError(
            f"There is no model package at {name}; create one with `llmx export --model … --output {name}`."
        )
    return _download_package(str(name), revision)


def _download_package(name: str, revision: str | None) -> Path:
    """The manifest first: it says whether the repository is a package, and which of its files belong to it."""
    path = _download_manifest(name, revision)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackageError(f"{MANIFEST_FILE} of {name} cannot be read: {error}.") from None
    files = list(Manifest.from_json(text, f"{name}/{MANIFEST_FILE}").files)
    folder = path.parent
    if _lacking(folder, files):
        # Of the manifest's commit, not of what the revision means by now.
        patterns = [glob.escape(file) for file in (MANIFEST_FILE, *files)]
        folder, _ = download(name, _commit(folder) or revision, patterns, PackageError)
    lacking = _lacking(folder, files)
    if lacking:  # without a network the hub's client returns what its cache has
        raise PackageError(
            f"{name} lacks {lacking[0]}, which its manifest lists: the hub could not be reached for it, or has no such file."
        )
    return folder


def _lacking(folder: Path, files: list[str]) -> list[str]:
    return [file for file in files if not (folder / file).is_file()]


def _download_manifest(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _one_sentence(name, revision, PackageError):
        try:
            return Path(hf_hub_download(name, MANIFEST_FILE, revision=revision, **_where()))
        except LocalEntryNotFoundError:  # no network, which says nothing about the repository
            raise
        except EntryNotFoundError:
            raise PackageError(
                f"{name} on the hub is not a model package (no {MANIFEST_FILE}): export it first: "
                f"llmx export --model {name}"
            ) from None
