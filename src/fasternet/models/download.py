"""Fetches weight files: from the Hugging Face hub, or by URL with resume; cached, and hashed where a hash is known."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_TIMEOUT_S = 20.0
_CHUNK = 1 << 20


def download_from_hub(repository: str, filename: str) -> Path:
    """Fetch one file of a hub repository into the hub's own cache; a cached file needs no network.

    The hub's cache names large files by the SHA-256 that the hub states: a fresh download is compared with it.

    Raises:
        ConnectionError: The hub cannot be reached; one sentence with the way out.
        ValueError: The file differs from the hub's hash.
    """
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # Asked first, because a download repeats its attempts for half a minute where there is no network.
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, filename), timeout=_TIMEOUT_S)
        path = Path(huggingface_hub.hf_hub_download(repository, filename, etag_timeout=_TIMEOUT_S))
    except Exception as error:  # each major release of the hub has its own HTTP library and errors
        raise ConnectionError(_unreachable(f"{repository}/{filename}", error)) from None
    if re.fullmatch("[0-9a-f]{64}", sha256 := path.resolve().name):
        _verify(path, sha256)
    return path


def download_url(url: str, *, sha256: str | None = None, folder: Path | None = None) -> Path:
    """Fetch a file by URL, continuing an interrupted download; a cached file needs no network, unless it is damaged.

    Of several processes that want the same file one fetches it, and the others wait. On a terminal a bar shows the
    progress.

    Args:
        url: Address of the file.
        sha256: Expected hash, or None where none is published.
        folder: Cache folder; default: that of ``torch.hub``.

    Returns:
        Path of the complete file.

    Raises:
        ConnectionError: The server cannot be reached or breaks off; what came is kept for the next try.
        ValueError: The file has another hash; it is deleted.
    """
    folder = folder or Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / url.rsplit("/", 1)[-1]
    if _is_complete(path, sha256):
        return path
    part = path.with_name(path.name + ".part")
    with _lock(part):
        if _is_complete(path, sha256):
            return path  # another process fetched it meanwhile
        try:
            _fetch(url, part)
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise ConnectionError(_unreachable(url, error)) from None
        if sha256 is not None:
            _verify(part, sha256)
        part.replace(path)
    return path


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _lock(part: Path) -> Iterator[None]:
    """Hold ``part`` for this process alone; an empty one does not stay."""
    while True:
        file = part.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, however it ends
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(part.stat(), os.fstat(file.fileno())):
                break
        file.close()  # who held it before has renamed or deleted it
    with file:
        try:
            yield
        finally:
            if part.exists() and part.stat().st_size == 0:
                part.unlink()


def _fetch(url: str, part: Path) -> None:
    """Append to ``part`` what of ``url`` it lacks; a server that ignores the range sends all anew."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # nothing is lacking
        os.truncate(part, 0)  # it is no part of this file
        return _fetch(url, part)
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        expected = int(response.headers.get("Content-Length", -1))
        received = 0
        with (
            part.open("ab" if resumed else "wb") as file,
            _show_progress(part.stem, have if resumed else 0, expected) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if expected >= 0 and received < expected:
        raise ConnectionError(f"the connection broke off after {received} of {expected} bytes")


def _show_progress(name: str, have: int, expected: int) -> Any:
    """Return a bar for a download of which so many bytes are there and so many expected; silent but on a terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    total = have + expected if expected >= 0 else None
    return tqdm(
        desc=name, initial=have, total=total, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty()
    )


def _is_complete(path: Path, sha256: str | None) -> bool:
    return path.is_file() and (sha256 is None or hash_file(path) == sha256)


def _verify(path: Path, sha256: str) -> None:
    found = hash_file(path)
    if found != sha256:
        path.resolve().unlink()  # the hub's cache is links to files
        path.unlink(missing_ok=True)
        raise ValueError(f"{path.name} has SHA-256 {found} instead of {sha256}: it was deleted, download it again")


def _unreachable(what: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"cannot download {what} ({reason}): without a network, give a file (checkpoint_path, or --checkpoint)"
