"""The deployed forms against each other: exactness first, a mark that is named as inexact, no speed without green."""

import pytest
import torch
from torch import nn

from fasternet.benchmark import deploy
from fasternet.deploy import compare_outputs
from fasternet.timing import Peak


@pytest.fixture
def measured(monkeypatch):
    settings = {"num_blocks": 4, "min_block_s": 1e-4, "warmup_s": 0.0}
    monkeypatch.setattr(deploy, "choose_settings", lambda device, **_: settings)
    monkeypatch.setattr(deploy, "measure_peaks", lambda **_: [Peak("gemm", {"precision": "fp32"}, 1e9)])
    return lambda: list(deploy.measure_deploy(["fasternet_t0"], input_size=32, quick=True))


def test_deploy_records_exactness_before_speed(measured):
    records = measured()
    kinds = [record.kind for record in records]
    assert kinds.index("difference") < kinds.index("latency")
    differences = {record.subject: record for record in records if record.kind == "difference"}
    assert differences["fasternet_t0"].condition["baseline"] == "timm"
    for record in differences.values():
        assert record.values["max_relative_difference"] <= record.values["limit"]
        assert record.values["changed_predictions"] == 0
    latencies = {record.subject: record for record in records if record.kind == "latency"}
    forms = {f"fasternet_t0:{form}:{layout}" for form in deploy.FORMS for layout in ("contiguous", "channels_last")}
    assert set(latencies) == {"fasternet_t0:optimized", *forms}
    inexact = {name for name, record in latencies.items() if not record.values["exact"]}
    assert inexact == {name for name in forms if "inplace" in name}
    ratios = [record for record in records if record.kind == "ratio"]
    assert [record.subject for record in ratios] == ["fasternet_t0:optimized"] * 7
    assert {record.condition["baseline"] for record in ratios} == set(latencies)


def test_deploy_times_nothing_that_computes_another_function(measured, monkeypatch):
    optimize = deploy.optimize_for_inference

    def spoil(model, **options):
        optimized = optimize(model, **options)
        optimized.stages[2].blocks[3].project.data.mul_(1.01)
        return optimized

    monkeypatch.setattr(deploy, "optimize_for_inference", spoil)
    with pytest.raises(ValueError, match="fasternet_t0:optimized is wrong: relative difference"):
        measured()


def test_deploy_inplace_form_really_is_the_inexact_one():
    model = deploy.create_model("fasternet_t0", width=8).eval()
    x = torch.randn(2, 3, 64, 64)
    forms = {form: deploy.create_form(model, form, "contiguous", x) for form in deploy.FORMS}
    differences = {name: compare_outputs(form, model, x)["max_relative_difference"] for name, form in forms.items()}
    assert differences["split_cat"] < 1e-5
    assert differences["slicing"] < 1e-5
    assert differences["inplace"] > 1e-3


def test_compare_outputs_counts_changed_predictions():
    images = torch.tensor([[1.0, 2.0], [4.0, 1.0], [1.0, 3.0]])
    swap = nn.Linear(2, 2, bias=False)
    nn.init.constant_(swap.weight, 0.0)
    swap.weight.data += torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = compare_outputs(swap, nn.Identity(), images, batch_size=2)
    assert found == {"max_relative_difference": 0.75, "changed_predictions": 3, "num_images": 3}
