"""docs/models.md: its Python runs as it stands, except for what needs the network."""

import re
from pathlib import Path

import torch

from fasternet.models import create_model
from fasternet.models.convert import to_format

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_python_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(to_format(create_model("fasternet_t0", num_classes=2), "official"), "weights.pth")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    local = [block for block in blocks if "pretrained=True)" not in block and "segmentation_models" not in block]
    assert (len(blocks), len(local)) == (7, 5)
    names: dict = {}
    for block in local:
        exec(block, names)
    assert names["logits"].shape == (1, 2)
    assert names["backbone"].feature_info.channels() == [40, 80, 160, 320]
    assert names["c3"].shape == (1, 80, 28, 28)
    assert names["coarse"].shape == (1, 3, 56, 56)
    assert names["checkpoint"].class_names == ("daisy", "rose")
