"""A network as an ONNX file, and the two runtimes that load it on the CPU: ONNX Runtime and OpenVINO.

int8 is quantised after training, with random pictures: enough to know its speed, not its accuracy.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NUM_CALIBRATION = 4  # random pictures; a whole batch where that is more
_INPUT, _OUTPUT = "images", "logits"
Run = Callable[[Tensor], Tensor | list[Tensor]]


def load(network: nn.Module, example: Tensor, engine: str, precision: str, threads: int) -> tuple[Run, float, int]:
    """Write a network into a file and load it.

    Args:
        network: In evaluation mode, on the CPU.
        example: (N, C, H, W), the one shape that the file will take.
        engine: ``"onnxruntime"`` or ``"openvino"``.
        precision: ``"fp32"``, ``"int8"``, and in OpenVINO ``"bf16"``.
        threads: That the runtime uses.

    Returns:
        What runs the network, the seconds from the file to the first output, and the bytes of the file.

    Raises:
        Exception: The libraries have many, and a ValueError says that OpenVINO does not do as told.
    """
    prepare, start = (
        (_write_onnx, _start_onnxruntime) if engine == "onnxruntime" else (_write_openvino, _start_openvino)
    )
    with tempfile.TemporaryDirectory(prefix="fasternet-") as name:
        file = prepare(network, example, precision, Path(name))
        num_bytes = sum(path.stat().st_size for path in file.parent.iterdir() if path.stem == file.stem)
        begin = time.perf_counter()
        run = start(file, precision, threads)
        run(example)
        return run, time.perf_counter() - begin, num_bytes


def _export(network: nn.Module, example: Tensor, folder: Path) -> Path:
    program = torch.onnx.export(network, (example,), dynamo=True, verbose=False, input_names=[_INPUT])
    assert program is not None
    assert program.exported_program is not None
    form = program.exported_program.call_spec.out_spec
    if not form.is_leaf() and not (form.type is list and all(child.is_leaf() for child in form.children())):
        raise ValueError(f"its output is no tensor of logits and no list of feature maps, but a {form.type.__name__}")
    for number, output in enumerate(program.model.graph.outputs):
        output.name = _OUTPUT if form.is_leaf() else f"map{number}"
    program.save(folder / "network.onnx")
    return folder / "network.onnx"


def _draw_pictures(example: Tensor) -> Iterator[dict[str, Any]]:
    """Yield batches of normally distributed noise, as the runtimes' calibration takes them."""
    random = torch.Generator().manual_seed(0)
    for _ in range(max(1, NUM_CALIBRATION // len(example))):
        yield {_INPUT: torch.randn(example.shape, generator=random).numpy()}


def _write_onnx(network: nn.Module, example: Tensor, precision: str, folder: Path) -> Path:
    file = _export(network, example, folder)
    if precision == "fp32":
        return file
    from onnxruntime import quantization
    from onnxruntime.quantization.registry import QDQRegistry

    class Pictures(quantization.CalibrationDataReader):  # type: ignore[misc]
        batches = _draw_pictures(example)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    quantised = folder / "int8.onnx"
    quantization.quantize_static(
        file,
        quantised,
        Pictures(),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        # Its scale, which ONNX Runtime takes for a weight, is shared by all layers and fails it.
        op_types_to_quantize=[name for name in QDQRegistry if name != "InstanceNormalization"],
    )
    return quantised


def _start_onnxruntime(file: Path, precision: str, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    has_logits = session.get_outputs()[0].name == _OUTPUT

    def run(x: Tensor) -> Tensor | list[Tensor]:
        outputs = [torch.from_numpy(output) for output in session.run(None, {_INPUT: x.detach().numpy()})]
        return outputs[0] if has_logits else outputs

    return run


def _write_openvino(network: nn.Module, example: Tensor, precision: str, folder: Path) -> Path:
    import openvino

    model = _open_openvino().read_model(_export(network, example, folder))
    if precision == "int8":
        import nncf

        pictures = list(_draw_pictures(example))
        model = nncf.quantize(model, nncf.Dataset(pictures), subset_size=len(pictures))
    file = folder / "openvino.xml"
    openvino.save_model(model, file, compress_to_fp16=False)
    return file


def _start_openvino(file: Path, precision: str, threads: int) -> Run:
    import openvino

    hint = openvino.Type.bf16 if precision == "bf16" else openvino.Type.f32
    wanted = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": hint,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # the process's affinity is the user's
    }
    compiled = _open_openvino().compile_model(file, "CPU", wanted)
    for name in ("INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT", "NUM_STREAMS"):
        if (found := compiled.get_property(name)) != wanted[name]:
            raise ValueError(f"OpenVINO took {name} {found} instead of {wanted[name]}")

    has_logits = _OUTPUT in compiled.output(0).names

    def run(x: Tensor) -> Tensor | list[Tensor]:
        outputs = [torch.from_numpy(output) for output in compiled(x.detach().numpy(), share_inputs=True).values()]
        return outputs[0] if has_logits else outputs

    return run


@functools.cache
def _open_openvino() -> Any:
    """Load OpenVINO with every core in sight: it counts them once, and never uses more than it saw then."""
    import openvino

    if not hasattr(os, "sched_setaffinity"):
        return openvino.Core()
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        core = openvino.Core()
        core.get_property("CPU", "FULL_DEVICE_NAME")  # loads what counts
    finally:
        os.sched_setaffinity(0, affinity)
    return core
