"""The model card, ``README.md`` of a model folder: what the hub shows of a model, and sorts it by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CARD_FILE = "README.md"


def write_card(document: Mapping[str, Any]) -> str:
    """Return the card that a ``config.json`` calls for."""
    own = document["fasternet"]
    name = own.get("name", document["architecture"].rpartition(".")[2])  # behind a dot where timm does not know it
    size = document["pretrained_cfg"]["input_size"][-1]
    by_timm = own["timm"] == "builds it"
    head = [f"license: {own['license']}"] if own.get("license") else []
    head += [f"library_name: {'timm' if by_timm else 'fasternet'}", "pipeline_tag: image-classification"]
    head += ["tags:", "- image-classification", *(["- timm"] if by_timm else []), "- fasternet"]
    lines = ["---", *head, "---", f"# {name}", ""]
    lines += [f"An image classifier of {document['num_classes']} classes for pictures of {size} x {size} pixels."]
    metrics = {key: value for key, value in own.get("metrics", {}).items() if isinstance(value, int | float)}
    if document["num_classes"] <= 5:
        metrics.pop("top5", None)  # 100 always
    lines += [f"{key} = {value:.4g}" for key, value in metrics.items()]
    lines += ["", "```sh", "fasternet predict picture.jpg --checkpoint FOLDER", "```", ""]
    if by_timm:
        lines += ["```python", "import timm", ""]
        lines += ['model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()', "```", ""]
    lines += ["`config.json` holds the names of the classes, the preprocessing and the recipe of the training."]
    return "\n".join(lines) + "\n"


def address_card(card: str, repository: str) -> str:
    """Return a model card as it reads on the hub, where FOLDER is to be fetched from the repository ``USER/NAME``."""
    folder = repository.rpartition("/")[2]
    card = card.replace("local-dir:FOLDER", f"hf-hub:{repository}").replace(
        "--checkpoint FOLDER", f"--checkpoint {folder}"
    )
    return card.replace("```sh\nfasternet", f"```sh\nhf download {repository} --local-dir {folder}\nfasternet", 1)
