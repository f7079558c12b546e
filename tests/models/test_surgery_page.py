"""docs/surgery.md: its Python runs as it stands; the pruning recipe is run by test_tools.py."""

import re
from pathlib import Path

import torch

from fasternet import PConvPWConv

PAGE = Path(__file__).parents[2] / "docs" / "surgery.md"


def test_python_of_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    replacing, layer, _ = blocks
    names: dict = {}
    exec(replacing, names)
    assert isinstance(names["new"].layer1[0].conv1, PConvPWConv)
    assert "layer4.1.conv2" in capsys.readouterr().out
    exec(layer, names)
    assert names["layer"](torch.zeros(1, 64, 9, 9)).shape == (1, 128, 5, 5)
