"""Uploads a model folder to the Hugging Face hub: weights, configuration and model card, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fasternet.models import convert
from fasternet.models.card import CARD_FILE, address_card
from fasternet.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_config, write_atomically

# A list of what goes, not of what stays: training states, logs and pictures of a run are nobody else's.
_UPLOADED = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, "LICENSE")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def push_folder(folder: Path | str, repository: str, *, private: bool = False, license: str | None = None) -> str:
    """Upload a model folder; a repository that is absent is created, and its card names it in place of the folder.

    Args:
        folder: A model folder, or a run folder (its ``best``).
        repository: ``USER/NAME`` on the hub; ``NAME`` alone is the token's user's.
        private: Create the repository for its owner's eyes only; one that is public already is refused.
        license: The hub's word for the licence of the weights, as ``apache-2.0``; it is written into the folder too.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError: There is no model folder.
        ValueError: A file in it is damaged, or an argument is not what the hub allows.
        PermissionError: There is no token, or the hub refuses it.
        ConnectionError: The hub cannot be reached.
    """
    import huggingface_hub

    path, _ = read_config(Path(folder))
    convert.read_state(path / WEIGHTS_FILE)
    if huggingface_hub.get_token() is None:
        raise PermissionError("the hub takes uploads with a token only: run `hf auth login`, or set HF_TOKEN")
    if license is not None:
        write_license(path, license)
    try:
        api = huggingface_hub.HfApi()
        created = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(created.repo_id).private:
            raise ValueError(f"{created.repo_id} exists and is public: make it private on the hub, or name another")
        content: dict[str, Path | bytes] = {name: path / name for name in _UPLOADED if (path / name).is_file()}
        if CARD_FILE in content:
            card = (path / CARD_FILE).read_text(encoding="utf-8")
            content[CARD_FILE] = address_card(card, created.repo_id).encode()
        api.create_commit(
            created.repo_id,
            [huggingface_hub.CommitOperationAdd(name, given) for name, given in content.items()],
            commit_message="Upload model folder with fasternet",
        )
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    except Exception as error:  # each major release of the hub has its own HTTP library and errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(f"the hub refuses the token for {repository} ({reason})") from None
        raise ConnectionError(f"cannot push to {repository} ({reason})") from None
    return str(created.url)


def write_license(folder: Path, license: str) -> None:
    """Write the licence of the weights into ``config.json`` and the model card of a model folder.

    Raises:
        ValueError: It is not written as the hub writes licences.
    """
    if not _LICENSE.fullmatch(license):
        raise ValueError(f"license {license!r} must be written as the hub does: apache-2.0, cc-by-4.0, other ...")
    folder, document = read_config(folder)
    document.setdefault("fasternet", {})["license"] = license
    document.setdefault("pretrained_cfg", {})["license"] = license
    text = json.dumps(document, indent=2) + "\n"
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    if (folder / CARD_FILE).is_file():
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        head, separator, rest = card.partition("\n---\n")
        head = re.sub(r"\nlicense:.*", "", head).replace("---", f"---\nlicense: {license}", 1)
        write_atomically(folder / CARD_FILE, lambda path: path.write_text(head + separator + rest, encoding="utf-8"))
