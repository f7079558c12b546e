"""Files of packed shards: tar files of pictures in the WebDataset layout, in a folder or at an http(s) address.

``shards.json`` beside them lists the classes in order and, for each split, the shards with their numbers of pictures
and bytes and their SHA-256. In a shard, the members ``KEY.jpg`` (any picture suffix) and ``KEY.cls`` (the label) follow
each other; in one of others the label may stand in ``KEY.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from fasternet.data.datasets import SHARDS_FILE
from fasternet.models.checkpoint import Preprocessing
from fasternet.models.download import download_url, hash_file

LABEL_SUFFIX = ".cls"
SHARD_NAME = re.compile(r"\w[\w.-]*")  # it goes into a path: one that somebody else wrote must not lead elsewhere
LABEL_KEYS = ("label", "cls", "class", "class_name")  # in a member KEY.json
RETRY_DELAYS_S = (1.0, 5.0, 25.0)  # a run of days outlives a server's restart


@dataclasses.dataclass(frozen=True)
class Shard:
    """A tar file of pictures: its name, how many pictures it holds (-1: not known), its SHA-256 and size."""

    name: str
    num_images: int
    sha256: str
    num_bytes: int | None = None  # older lists do not tell


class Member(NamedTuple):
    """A picture in a tar file: its name, its label (number or name of a class, if any), where its bytes are."""

    name: str
    label: int | str | None
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Contents:
    """What ``shards.json`` says."""

    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]


def is_address(root: str) -> bool:
    """Tell whether a folder of shards is an address."""
    return root.startswith(("http://", "https://"))


def load_contents(root: str) -> Contents:
    """Read the ``shards.json`` of a folder or address.

    Raises:
        FileNotFoundError: There is none in the folder.
        ConnectionError: The address cannot be reached.
        ValueError: It is not what ``pack_shards`` or ``index_shards`` writes.
    """
    with contextlib.ExitStack() as stack:
        path = Path(root, SHARDS_FILE)
        if is_address(root):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fasternet-"))
            path = _download(f"{root}/{SHARDS_FILE}", Path(folder), None)
        text = path.read_bytes()
    try:
        return _parse(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{root}/{SHARDS_FILE} is not what 'fasternet data pack' writes; pack or index the pictures again"
        ) from None


def save_contents(folder: Path, contents: Contents, **facts: Any) -> None:
    """Write ``shards.json`` with further facts for the reader."""
    (folder / SHARDS_FILE).write_text(json.dumps({**dataclasses.asdict(contents), **facts}, indent=1) + "\n")


def _parse(values: Mapping[str, Any]) -> Contents:
    splits = [tuple(Shard(**shard) for shard in values[split]) for split in ("train", "validation")]
    for shard in itertools.chain(*splits):
        if not SHARD_NAME.fullmatch(shard.name) or shard.num_images < 1 or len(shard.sha256) != 64:
            raise ValueError
    preprocessing: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values["preprocessing"].items()
    }
    return Contents(tuple(map(str, values["class_names"])), Preprocessing(**preprocessing), *splits)


@contextlib.contextmanager
def open_shard(root: str, shard: Shard) -> Iterator[BinaryIO]:
    """Open a shard; one at an address is fetched and its hash compared, and it leaves nothing on the disk.

    Raises:
        FileNotFoundError: There is no such file.
        ConnectionError: The address cannot be reached, after some attempts.
        ValueError: The file has another hash, or a local one another size.
    """
    with contextlib.ExitStack() as stack:
        path = Path(root, shard.name)
        if is_address(root):
            with tempfile.TemporaryDirectory(prefix="fasternet-") as folder:
                # Open, the file outlives its folder: a process that is killed leaves none behind.
                file = stack.enter_context(_fetch(f"{root}/{shard.name}", Path(folder), shard.sha256).open("rb"))
        else:
            if not path.is_file():
                raise FileNotFoundError(f"no shard at {path}")
            file = stack.enter_context(path.open("rb"))
            size = os.fstat(file.fileno()).st_size
            if shard.num_bytes not in (None, size):
                raise ValueError(
                    f"shard {path} is not the one that {SHARDS_FILE} describes: "
                    f"it has {size} bytes instead of {shard.num_bytes}"
                )
        yield file


def check_shard(root: str, shard: Shard) -> str | None:
    """Return one sentence on what is wrong with a shard, or None; all of it is read, and its hash compared."""
    try:
        with open_shard(root, shard) as file:
            list_members(file, shard, f"{root}/{shard.name}")
        if not is_address(root) and hash_file(Path(root, shard.name)) != shard.sha256:
            return f"shard {root}/{shard.name} is not the one that {SHARDS_FILE} describes: its SHA-256 differs"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def fetch_shards(root: str, shards: Sequence[Shard]) -> Path:
    """Fetch the shards of an address into the user's cache folder, where they are not there yet, or damaged.

    Returns:
        The folder that holds them, each checked against its hash.

    Raises:
        ConnectionError: The address cannot be reached, after some attempts.
        ValueError: A file has another hash.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasternet" / "shards"
    folder = cache / hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        _fetch(f"{root}/{shard.name}", folder, shard.sha256)
    return folder


def list_members(file: BinaryIO, shard: Shard, where: str) -> list[Member]:
    """List the pictures of a tar file, and compare their number with the shard's unless that is negative.

    Raises:
        ValueError: The file is truncated or no tar file, or holds another number of pictures.
    """
    members: list[Member] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for _, group in itertools.groupby((info for info in tar if info.isfile()), key=_get_key):
                members += _find_pictures(file, list(group))
    except tarfile.TarError as error:
        raise ValueError(f"shard {where} is damaged or truncated: {error}") from None
    if shard.num_images not in (-1, len(members)):
        raise ValueError(
            f"shard {where} is damaged or truncated: it holds {len(members)} pictures instead of {shard.num_images}"
        )
    return members


def number_label(where: str, member: Member, class_names: Sequence[str]) -> int:
    """Return the number of a picture's class.

    Raises:
        ValueError: It has no label, or one that is none of the classes.
    """
    label = member.label
    if isinstance(label, str) and label in class_names:
        return class_names.index(label)
    if not isinstance(label, int) or label >= len(class_names):
        raise ValueError(
            f"{where}/{member.name} has the label {label}; it must be one of 0 to {len(class_names) - 1}, or its name"
        )
    return label


def read_member(file: BinaryIO, member: Member) -> bytes:
    """Return the bytes of a picture in a tar file."""
    file.seek(member.offset)
    return file.read(member.num_bytes)


def _get_key(info: tarfile.TarInfo) -> str:
    """Return what the members of a picture have in common: the name up to the first dot after the last slash."""
    folder, slash, name = info.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _find_pictures(file: BinaryIO, group: Sequence[tarfile.TarInfo]) -> Iterator[Member]:
    contents = {Path(info.name).suffix: info for info in group}
    label: int | str | None = None
    if info := contents.get(LABEL_SUFFIX) or contents.get(".json"):
        file.seek(info.offset_data)
        label = _read_label(file.read(info.size), is_json=info.name.endswith(".json"))
    for info in group:
        if Path(info.name).suffix.lower() in Image.registered_extensions():
            yield Member(info.name, label, info.offset_data, info.size)


def _read_label(content: bytes, *, is_json: bool) -> int | str | None:
    """Return a number, a name, or None where there is neither."""
    try:
        label: Any = json.loads(content) if is_json else content.decode().strip()
    except ValueError:
        return None
    if is_json:
        label = next((label[key] for key in LABEL_KEYS if key in label), None) if isinstance(label, dict) else None
    if isinstance(label, str):
        return int(label) if label.isascii() and label.isdigit() else label or None
    return label if isinstance(label, int) and not isinstance(label, bool) and label >= 0 else None


def _fetch(url: str, folder: Path, sha256: str) -> Path:
    for delay in RETRY_DELAYS_S:
        try:
            return _download(url, folder, sha256)
        except ConnectionError:
            time.sleep(delay)
    return _download(url, folder, sha256)


def _download(url: str, folder: Path, sha256: str | None) -> Path:
    try:
        return download_url(url, sha256=sha256, folder=folder)
    except ConnectionError as error:
        raise ConnectionError(str(error).partition(": without a network")[0]) from None  # that is for weights
    except ValueError:
        raise ValueError(f"{url} is not the file that {SHARDS_FILE} describes: its SHA-256 differs") from None
