"""The shape of the package: who imports whom, what is public, how long files are, what starts fast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fasternet

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_imports_point_down():
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "3 kept, 0 broken" in result.stdout


def test_public_names_are_these():
    assert fasternet.__all__ == [
        "CpuEngine",
        "DetectionPredictor",
        "FasterNet",
        "FasterNetConfig",
        "PConv1d",
        "PConv2d",
        "PConv3d",
        "PConvPWConv",
        "Predictor",
        "choose_engine",
        "count_costs",
        "create_backbone",
        "create_faster_rcnn",
        "create_mask_rcnn",
        "create_model",
        "create_network",
        "create_runtime",
        "fold_batch_norm",
        "list_impls",
        "list_models",
        "load_checkpoint",
        "load_detector",
        "optimize_detector",
        "optimize_for_inference",
        "pconv2d",
        "pconv2d_",
        "replace_convs",
        "save_checkpoint",
        "use_native_blocks",
    ]
    for name in fasternet.__all__:
        assert getattr(fasternet, name).__doc__
    with pytest.raises(AttributeError, match="nothing"):
        fasternet.nothing  # noqa: B018


def test_files_stay_short():
    assert len(SOURCES) > 50
    long = {path.name: count for path in SOURCES if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def test_modules_say_what_they_are():
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


LIGHT = "fasternet", "fasternet.cli", "fasternet.detection", "fasternet.report", "fasternet.records", "fasternet.deploy"


@pytest.mark.parametrize("module", LIGHT)
def test_import_stays_light(module):
    heavy = "torch", "torchvision", "timm", "matplotlib", "sklearn", "numpy", "PIL"
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
