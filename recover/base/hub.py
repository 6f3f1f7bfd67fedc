"""Whether a hub is reached from here, and which commit of a repository is meant.

Both are asked once. The commit is kept by a run, and used wherever the repository is read. A branch moves: two calls of
a run, or two reads within one, must not take one model from two states of it.
"""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.error import HTTPError

import huggingface_hub  # which loads its own parts when they are used

Kind = Literal["model", "dataset"]

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
SECONDS = 8.0  # for an answer; where there is no network the libraries would try for half a minute
COMMIT = re.compile(r"[0-9a-f]{40}")
# What can be the name of a repository: letters, digits, `-`, `_` and `.`, and one slash at most.
NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)


class NoCommit(Exception):
    """The hub has no such repository or revision, or cannot be reached; the message says which and what to do."""


class Repository(NamedTuple):
    """A repository as a user names it; `revision`: branch, tag or commit, None for the default branch."""

    kind: Kind
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}@{self.revision or 'default'}"


_commits: dict[str, str] = {}
_refused: dict[str, str] = {}


@cache
def unreached() -> str | None:
    """Why no hub is reached from here, or None: asked once, and answered within seconds."""
    for name in OFFLINE:
        if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON"):
            return f"{name} is set"
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=SECONDS).close()
    except HTTPError:
        return None  # it answers
    except (OSError, ValueError) as error:
        return f"{endpoint}: {getattr(error, 'reason', error)}"
    return None


def prepared(name: str) -> bool:
    """Whether `datasets` has been here with this data set before."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    return (folder / name.replace("/", "___")).is_dir()


def named(name: str) -> bool:
    """Whether this can be the name of a repository at all."""
    return NAME.fullmatch(name) is not None and not name.endswith((".git", "."))


def commit(repository: Repository) -> str:
    """The commit of this repository, the same one at every call of this process.

    Raises:
        NoCommit: there is none, at once where the hub cannot be reached and no copy is in the cache.
    """
    if repository.revision is not None and COMMIT.fullmatch(repository.revision):
        return repository.revision
    key = str(repository)
    if key in _refused:
        raise NoCommit(_refused[key])
    if key not in _commits:
        try:
            _commits[key] = _asked(repository)
        except NoCommit as error:
            _refused[key] = str(error)
            raise
    return _commits[key]


def known(repository: Repository) -> str | None:
    """The commit if it was asked for before, or is named; nothing is fetched."""
    named_so = repository.revision if COMMIT.fullmatch(repository.revision or "") else None
    return named_so or _commits.get(str(repository))


def pin(commits: Mapping[str, str]) -> None:
    """From now on these are the commits of these repositories (`str` of each)."""
    _commits.update(commits)


def forget() -> None:
    """Ask anew from now on."""
    _commits.clear()
    _refused.clear()


def pinned(repositories: Iterable[Repository] | None = None) -> dict[str, str]:
    """All commits that were asked for so far; or those of these repositories."""
    wanted = None if repositories is None else set(map(str, repositories))
    return {key: value for key, value in _commits.items() if wanted is None or key in wanted}


def newest(repository: Repository) -> str | None:
    """What the hub says now, whatever is pinned; None if it does not answer."""
    try:
        return _answer(repository)
    except Exception:  # whatever a library raises: nothing hangs on this answer
        return None


def _asked(repository: Repository) -> str:
    from huggingface_hub import errors

    what = f"{repository.kind} {repository.name!r}"
    try:
        return _answer(repository)
    except errors.GatedRepoError as error:
        raise NoCommit(
            f"the hub gives {what} only to those whom its owner has allowed: ask on its page, and log in "
            "(hf auth login)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NoCommit(f"the hub's {what} has no revision {repository.revision!r}: check the branch or tag") from error
    except errors.RepositoryNotFoundError as error:
        raise NoCommit(
            f"the hub has no {what}, or shows it to its members only: check the name, or log in (hf auth login)"
        ) from error
    except errors.HFValidationError as error:
        raise NoCommit(f"{repository.name!r} cannot be the name of a repository of the hub: check it") from error
    except Exception as error:  # of httpx, of requests, of the system
        there = _cached(repository)
        if there is not None:
            return there
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {_line(error)}"
        raise NoCommit(
            f"the hub, where {what} would be, cannot be reached ({why}), and no copy of it is in the cache: check the "
            "name, or fetch it where there is a network"
        ) from error


def _answer(repository: Repository) -> str:
    api, revision = huggingface_hub.HfApi(), repository.revision
    found = api.repo_info(repository.name, repo_type=repository.kind, revision=revision, timeout=SECONDS).sha
    if not found:
        raise ValueError("the answer names no commit")
    return found


def _cached(repository: Repository) -> str | None:
    """The commit of the copy in the hub's cache: the one that this revision was last, else the one changed last."""
    try:
        repositories = huggingface_hub.scan_cache_dir().repos
    except Exception:  # there is no cache
        return None
    copies = [
        copy
        for each in repositories
        if (each.repo_type, each.repo_id) == (repository.kind, repository.name)
        for copy in each.revisions
    ]
    wanted = repository.revision or "main"
    of_branch = [copy for copy in copies if wanted in copy.refs]
    # A copy that was fetched by its commit has no branch on record.
    found = of_branch or ([] if repository.revision else copies)
    return max(found, key=lambda copy: copy.last_modified).commit_hash if found else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
