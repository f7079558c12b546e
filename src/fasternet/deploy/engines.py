"""Which engines and precisions there are, what each is, and why one cannot run here."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Literal, get_args

import torch

from fasternet import native
from fasternet.environment import describe_machine

Engine = Literal["eager", "compile", "onnxruntime", "openvino", "cpu", "auto"]
Precision = Literal["fp32", "bf16", "int8"]
ENGINES: tuple[str, ...] = get_args(Engine)
PRECISIONS: tuple[str, ...] = get_args(Precision)

_PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
SPEED_ONLY = "speed only: calibrated on random pictures, so that its accuracy is not known"
REASONS = {
    "eager": "PyTorch as it is: no preparation, any batch up to the example's",
    "compile": "one graph with the weights as constants; on CUDA replayed as a CUDA graph",
    "onnxruntime": "from an ONNX file, on the CPU",
    "openvino": "from OpenVINO's own file, made of an ONNX file; one stream, for the lowest latency",
    "cpu": "from its own file: the whole FasterNet in one call of C++",
    "auto": "the fastest of those that are ready, but compile",
}


def explain_engine(engine: str, precision: str = "fp32", device: str = "cpu") -> str | None:
    """Say why an engine cannot run here.

    Args:
        engine: One of ``ENGINES``.
        precision: ``"fp32"``, ``"bf16"`` or ``"int8"``.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        None where it runs, else one sentence.

    Raises:
        ValueError: There is no such engine, precision or device.
    """
    for name, value, allowed in (
        ("engine", engine, ENGINES),
        ("precision", precision, PRECISIONS),
        ("device", device, ("cpu", "cuda")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    if engine == "auto":
        candidates = [name for name in ENGINES if name not in ("auto", "compile")]
        is_ready = any(explain_engine(name, precision, device) is None for name in candidates)
        return (
            None if is_ready else f"engine auto finds none for {precision} on {device}: {', '.join(candidates)} tried"
        )
    if device == "cuda" and engine not in ("eager", "compile"):
        return f"engine {engine} runs on the CPU alone: give the device cpu, or take eager or compile"
    if engine in _PACKAGES:
        packages = (*_PACKAGES[engine], *(("nncf",) if (engine, precision) == ("openvino", "int8") else ()))
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"engine {engine} needs {', '.join(missing)}: pip install 'fasternet[{engine}]'"
    elif precision == "int8":
        why = "it computes in fp32 or bf16" if engine == "cpu" else "PyTorch quantises with torchao, not here"
        return f"engine {engine} has no int8: {why}; take onnxruntime or openvino"
    elif engine == "cpu":
        return native.explain_native(precision=precision)
    if engine == "compile" and device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "engine compile needs a C++ compiler: install g++, or name one in CXX"
    if engine == "compile" and device == "cuda" and importlib.util.find_spec("triton") is None:
        return "engine compile needs triton on CUDA: pip install triton"
    if precision == "bf16":
        return _explain_bf16(engine, device)
    return None


def _explain_bf16(engine: str, device: str) -> str | None:
    if engine == "onnxruntime":
        return "engine onnxruntime has no bf16 convolutions on the CPU: take fp32 or int8, or openvino"
    if device == "cuda":
        return None if torch.cuda.is_bf16_supported(including_emulation=False) else "the GPU has no bf16 arithmetic"
    machine = describe_machine()
    if {"avx512_bf16", "amx_bf16", "bf16"} & set(machine.instruction_sets):
        return None
    return f"precision bf16 needs a processor with avx512_bf16, amx_bf16 or, on ARM, bf16: {machine.processor} has none"
