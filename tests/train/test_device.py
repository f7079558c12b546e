import dataclasses

import pytest
import torch

from fasternet.train import device


@pytest.mark.parametrize(
    ("instructions", "precision"), [(("avx2",), "fp32"), (("avx2", "avx512_bf16"), "bf16"), (("amx_bf16",), "bf16")]
)
def test_select_precision_is_bf16_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, instructions: tuple[str, ...], precision: str
) -> None:
    machine = dataclasses.replace(device.describe_machine(), instruction_sets=instructions)
    monkeypatch.setattr(device, "describe_machine", lambda: machine)
    cpu = torch.device("cpu")
    assert device.select_precision("auto", cpu) == precision
    assert device.select_precision("fp32", cpu) == "fp32"
    if precision == "fp32":
        with pytest.raises(ValueError, match="neither avx512_bf16 nor amx_bf16"):
            device.select_precision("bf16", cpu)
    else:
        assert device.select_precision("bf16", cpu) == "bf16"


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "cuda:99", "cuda:"])
def test_select_device_refuses_what_is_not_there(name: str) -> None:
    if name == "cuda:" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=repr(name)):
        device.select_device(name)
