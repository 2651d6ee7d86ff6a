"""Folders and hub ids: whatever names a package or a checkpoint becomes a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from llmx.runtime.errors import LlmxError, PackageError

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
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise error(f"{name} is gated: accept its terms on the hub, then run `hf auth login`.") from None
    except RevisionNotFoundError:
        raise error(f"{name} has no revision {revision!r} on the hub.") from None
    except RepositoryNotFoundError:
        raise error(
            f"There is no folder {name} here and no such repository on the hub (or it is private: `hf auth login`)."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise error(
            f"There is no folder {name} here, and the hub could not be reached for it ({reason[:160]})."
        ) from None
    return folder, folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def resolve_package(name: str | Path, revision: str | None = None) -> Path:
    """The folder of the package `name`: a local folder, or a hub id of a published package.

    Raises PackageError when it is neither.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if not looks_like_hub_id(str(name)):
        raise PackageError(
            f"There is no model package at {name}; create one with `llmx export --model … --output {name}`."
        )
    return download(str(name), revision, None, PackageError)[0]
