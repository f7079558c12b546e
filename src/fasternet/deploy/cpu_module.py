"""The C++ engine as a PyTorch module: Tensors in, Tensors out; dense pictures are not copied on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasternet import native
from fasternet.deploy.cpu_engine import CpuEngine, check_threads


class CpuModule(nn.Module):
    """A FasterNet in the C++ engine, for inference only; ``optimize_for_inference`` makes it.

    Args:
        engine: The network.
        threads: Of a call; None takes PyTorch's, ``torch.get_num_threads()``, of that moment.

    Attributes:
        engine: The argument.
        threads: The argument; may be set.
        reasons: For each choice, why it computes so.
    """

    def __init__(self, engine: CpuEngine, threads: int | None = None) -> None:
        super().__init__()
        self.engine, self.threads = engine, threads
        self.reasons: Mapping[str, str] = engine.reasons
        self._bound: tuple[Any, native.Call, list[tuple[int, ...]]] | None = None  # the last form of input
        super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this engine's memory."""
        return {**self.__dict__, "_bound": None}

    @property
    def threads(self) -> int | None:
        """Threads of a call; None takes PyTorch's."""
        return self._threads

    @threads.setter
    def threads(self, threads: int | None) -> None:
        self._threads = None if threads is None else check_threads(threads)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map pictures to logits, or to feature maps; no gradient is recorded.

        Args:
            x: (N, C, H, W) on the CPU, float32, or uint8 where the engine has mean and std. Contiguous and
                channels_last are taken without a copy, views of others are copied.

        Returns:
            Logits (N, K), or a list of maps (N, C, H, W) in channels_last; float32, in memory of their own.

        Raises:
            ValueError: ``x`` does not fit.
        """
        threads = self._threads or torch.get_num_threads()
        bound = self._bound  # read at once: another thread may replace it
        if bound is None or type(x) is not Tensor or _describe_form(x) != bound[0]:
            return self._run_checked(x, threads)
        outputs = [torch.empty(shape) for shape in bound[2]]
        bound[1](x.data_ptr(), [output.data_ptr() for output in outputs], threads)
        return outputs[0] if self.engine.has_head else [output.permute(0, 3, 1, 2) for output in outputs]

    def _run_checked(self, x: Tensor, threads: int) -> Tensor | list[Tensor]:
        """Run a form of input that the call before did not have; checking it takes a tenth of a millisecond."""
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor, not {type(x).__name__}: CpuEngine takes arrays")
        if x.device.type != "cpu" or x.layout != torch.strided:
            raise ValueError(f"x must be a dense tensor on the CPU, not {x.layout} on {x.device}")
        if x.dtype not in (torch.float32, torch.uint8):  # NumPy has no bfloat16
            raise ValueError(f"x must be float32 or uint8, not {x.dtype}")
        array = x.detach().numpy()
        outputs = self.engine(array, threads=threads)
        bound = self.engine.bind(array)
        self._bound = None if bound is None else (_describe_form(x), *bound)
        if isinstance(outputs, list):
            return [torch.from_numpy(output) for output in outputs]
        return torch.from_numpy(outputs)

    def train(self, mode: bool = True) -> CpuModule:
        """Refuse training: the folded network has no BN left to train."""
        if mode:
            raise ValueError("an optimised model is for inference only: train the model that it was made from")
        return self

    def extra_repr(self) -> str:
        """Describe the engine in ``print(module)``."""
        return f"{self.engine.precision}, isa={self.engine.isa}, threads={self.threads}"


def _describe_form(x: Tensor) -> tuple[Any, ...]:
    """Return what a tensor has to share with another, for both to lie in memory in the same way."""
    return (x.shape, x.stride(), x.dtype, x.device) if x.layout == torch.strided else (x.layout,)
