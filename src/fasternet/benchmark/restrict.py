"""Instruction sets that the runtimes may use: what to set before they load, and whether each of them keeps to it.

They read these variables once, when they are loaded, so a restricted comparison runs in a process of its own. Without
torch at the top: whoever starts that process does not need it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# ATen and inductor; oneDNN, in PyTorch and in OpenVINO; OpenVINO's own kernels, where it was built to listen; MKL.
_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OV_CPU_MAX_ISA", "MKL_ENABLE_INSTRUCTIONS")
_LIMITS = {
    "portable": ("default", "SSE41", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512_CORE", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512_CORE_BF16", "AVX512"),
}
_FORBIDDEN = {  # in the names of kernels
    **{"portable": ("avx", "amx"), "avx2": ("avx512", "avx10", "amx")},
    **dict.fromkeys(("avx512", "avx512_bf16"), ("amx",)),
}


def list_variables(isa: str) -> dict[str, str]:
    """Return the environment under which the runtimes use no more than an instruction set.

    Args:
        isa: One of ``native.ISAS``; for the largest there is nothing to set.
    """
    from fasternet.native import ISA_VARIABLE

    return {**dict(zip(_VARIABLES, _LIMITS.get(isa, ()), strict=False)), ISA_VARIABLE: isa}


def is_restricted(variables: Mapping[str, str]) -> bool:
    """Whether this process has been started under such an environment."""
    return all(os.environ.get(name) == value for name, value in variables.items())


def explain_leak(engine: str, isa: str) -> str | None:
    """Say why an engine cannot be held to an instruction set; None where it is.

    Args:
        engine: One of ``deploy.ENGINES``.
        isa: One of ``native.ISAS``; this process runs under ``list_variables`` of it.
    """
    if engine == "onnxruntime":
        return "ONNX Runtime's kernels (MLAS) take what the processor has, and no setting holds them back"
    if engine == "openvino":
        forbidden = _FORBIDDEN.get(isa, ())
        leaks = [name for name in _list_openvino_kernels() if any(word in name for word in forbidden)]
        return f"OpenVINO computes with {leaks[0]} all the same" if leaks else None
    if engine in ("eager", "compile"):
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        is_larger = isa in ("portable", "avx2") and capability not in ("DEFAULT", "NO AVX", isa.upper())
        return f"PyTorch computes with {capability} all the same" if is_larger else None
    return None


def _list_openvino_kernels() -> list[str]:
    """Return the names of the kernels that OpenVINO takes for a pointwise convolution and one of 3x3."""
    import numpy as np
    import openvino
    from openvino import opset13

    inputs = x = opset13.parameter([1, 16, 8, 8])
    for k in (1, 3):
        weight = opset13.constant(np.ones((16, 16, k, k), np.float32))
        x = opset13.convolution(x, weight, [1, 1], [k // 2, k // 2], [k // 2, k // 2], [1, 1])
    compiled = openvino.Core().compile_model(openvino.Model([x], [inputs]), "CPU")
    nodes = compiled.get_runtime_model().get_ordered_ops()
    kernels = (node.get_rt_info()["primitiveType"] for node in nodes)
    return [str(kernel.astype(str) if hasattr(kernel, "astype") else kernel) for kernel in kernels]
