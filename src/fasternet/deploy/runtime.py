"""Any network in any engine and precision behind one callable, from pictures (N, C, H, W) to logits or feature maps."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fasternet.deploy import onnx_file
from fasternet.deploy.cpu_engine import CpuEngine, check_threads
from fasternet.deploy.cpu_module import CpuModule
from fasternet.deploy.engines import REASONS, SPEED_ONLY, explain_engine
from fasternet.deploy.fold import fold_batch_norm
from fasternet.deploy.optimize import from_timm, optimize_for_inference
from fasternet.models.fasternet import FasterNet
from fasternet.ops import PConv2d

Output = Tensor | list[Tensor]
_MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclasses.dataclass(frozen=True, eq=False)
class Runtime:
    """A network ready to run; ``create_runtime`` makes it.

    Attributes:
        engine: What runs it.
        precision: What it computes in; inputs and outputs are float32 always.
        num_images: Pictures that a call takes at most.
        load_s: Seconds from the module or the file to the first output.
        file_bytes: Size of the file that would be deployed; None where the engine takes the module itself.
        reasons: For each choice, why it computes so.
    """

    engine: str
    precision: str
    num_images: int
    load_s: float
    file_bytes: int | None
    reasons: Mapping[str, str]
    _run: Callable[[Tensor], Output] = dataclasses.field(repr=False)
    _buffer: Tensor = dataclasses.field(repr=False)

    def __call__(self, x: Tensor) -> Any:
        """Map pictures to logits, or to the feature maps of a network that returns a list of them.

        Args:
            x: (N, C, H, W), float32, on the device and of the size of the example, in any memory format; N is at most
                ``num_images``. Engines of a fixed batch compute fewer pictures at the cost of ``num_images``.

        Returns:
            (N, K), or a list of (N, C_i, H_i, W_i); float32, on the same device, in memory of its own, which no later
            call overwrites.

        Raises:
            ValueError: ``x`` does not fit.
        """
        buffer, n = self._buffer, len(x)
        if (
            x.shape[1:] != buffer.shape[1:]
            or not 1 <= n <= self.num_images
            or (x.dtype, x.device) != (buffer.dtype, buffer.device)
        ):
            size = ", ".join(map(str, buffer.shape[1:]))
            raise ValueError(
                f"x must be float32 of the shape (1 to {self.num_images}, {size}) on {buffer.device}, "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        if self.engine == "cpu":  # no operator of PyTorch runs in it
            return self._run(x)
        with torch.inference_mode():
            if self.engine == "eager":  # it takes any batch, in any memory format, like cpu
                return self._run(x)
            if (
                n < self.num_images
                or x.stride() != buffer.stride()
                or (self.engine == "compile" and not _is_alike(x, buffer))
            ):
                buffer[:n] = x
                x = buffer
            return map_outputs(lambda output: output[:n], self._run(x))


def create_runtime(
    model: nn.Module,
    example: Tensor,
    *,
    engine: str = "eager",
    precision: str = "fp32",
    threads: int | None = None,
    memory_format: str | None = None,
) -> Runtime:
    """Make a network ready to run in an engine.

    A FasterNet becomes ``optimize_for_inference`` in eager and has BN folded elsewhere; any other network is
    re-parameterised where it can be, and has BN folded. The engine ``cpu`` runs a whole FasterNet, no other network.

    Args:
        model: Any network from pictures to logits, or to a list of feature maps; it is not modified.
        example: (N, C, H, W), float32: the largest batch, and the size of the pictures; its device is the network's.
        engine: One of ``ENGINES``; one that cannot run is never replaced by another. ``"auto"`` asks for the fastest,
            see ``auto.choose_engine``: the runtime says which it is.
        precision: ``"fp32"``, ``"bf16"`` or ``"int8"``. The last is quantised with random pictures: speed only.
        threads: Of the CPU; None takes PyTorch's. ``eager`` and ``compile`` run in PyTorch's threads: set these with
            ``environment.set_threads`` around making and running it.
        memory_format: ``"contiguous"`` or ``"channels_last"``, for eager and compile; None is contiguous. FasterNet in
            eager chooses its own.

    Returns:
        The network as a callable, which has run once.

    Raises:
        ValueError: An argument does not fit, the engine or precision cannot run here (``explain_engine`` says why), or
            it cannot build this network.
        ModuleNotFoundError: The engine's package is missing.
    """
    current = torch.get_num_threads()
    check_arguments(example, engine, precision, threads, memory_format)
    if engine == "auto":
        from fasternet.deploy.auto import choose_engine

        return choose_engine(model, example, precision=precision, threads=threads).runtime
    is_onnx = engine in ("onnxruntime", "openvino")
    layout = _MEMORY_FORMATS["contiguous" if is_onnx else memory_format or "contiguous"]
    devices = [example.device] if example.is_cuda else []
    # Of tensors made in inference mode a compiled graph would be one for such tensors alone.
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices), _build(engine, precision):
        example = example.detach().clone(memory_format=layout)
        run: Callable[[Tensor], Output]
        if engine == "cpu":
            run, load_s, file_bytes, reasons = _load_engine_file(model, example, precision, threads or current)
        else:
            network, reasons = prepare_network(model, example, engine)
            if is_onnx:
                run, load_s, file_bytes = onnx_file.load(network, example, engine, precision, threads or current)
            else:
                run, load_s = _load_module(network, example, engine, precision, layout)
                file_bytes = None
    reasons |= {"engine": REASONS[engine], **({"precision": SPEED_ONLY} if precision == "int8" else {})}
    return Runtime(engine, precision, len(example), load_s, file_bytes, reasons, run, example)


def check_arguments(
    example: Tensor, engine: str, precision: str, threads: int | None, memory_format: str | None = None
) -> None:
    """Refuse, as ``create_runtime`` does, what cannot run here or does not fit."""
    if example.dim() != 4 or example.dtype != torch.float32 or not len(example):
        raise ValueError(f"example must be float32 (N, C, H, W), got {example.dtype} {tuple(example.shape)}")
    if memory_format is not None and memory_format not in _MEMORY_FORMATS:
        raise ValueError(f"memory_format {memory_format!r} is not one of {', '.join(_MEMORY_FORMATS)}")
    if (reason := explain_engine(engine, precision, example.device.type)) is not None:
        raise (ModuleNotFoundError if "pip install" in reason else ValueError)(reason)
    if threads is not None:
        check_threads(threads)
    current = torch.get_num_threads()
    if threads not in (None, current) and engine in ("eager", "compile"):
        raise ValueError(
            f"threads={threads}, but engine {engine} runs in PyTorch's threads, which are {current}: "
            "set them with fasternet.environment.set_threads"
        )
    if engine == "auto" and memory_format is not None:
        raise ValueError(f"memory_format={memory_format} is for eager and compile: engine auto chooses its own")


def prepare_network(model: nn.Module, example: Tensor, engine: str) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy of a network in its fastest exact form for an engine, and why it is that."""
    from timm.models import reparameterize_model
    from timm.models.fasternet import FasterNet as TimmFasterNet

    model = copy.deepcopy(model).to(example.device, torch.float32).eval()
    if isinstance(model, TimmFasterNet):
        model = from_timm(model)
    if isinstance(model, FasterNet):
        if engine == "eager":
            optimized = optimize_for_inference(model, batch_size=len(example))
            return optimized, dict(optimized.reasons)
        for module in model.modules():
            if isinstance(module, PConv2d):
                module.impl = "split_cat"
        reasons = {"pconv": "split_cat: compilers turn the slices into views and write the concatenation directly"}
    else:
        model = reparameterize_model(model)
        reasons = {"form": "re-parameterised where the network can be"}
    reasons["norm"] = "BN folded into the layer before it, where that layer has no other reader"
    return fold_batch_norm(model, example).requires_grad_(False), reasons


class InPrecision(nn.Module):
    """A network that computes in a precision and takes and gives float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Output:
        """Map pictures to logits or feature maps."""
        return map_outputs(Tensor.float, self.network(x.to(self.dtype)))


def map_outputs(function: Callable[[Tensor], Tensor], output: Output) -> Output:
    """Apply a function to logits, or to each feature map."""
    return function(output) if isinstance(output, Tensor) else [function(x) for x in output]


def _load_engine_file(
    model: nn.Module, example: Tensor, precision: str, threads: int
) -> tuple[Callable[[Tensor], Output], float, int, dict[str, str]]:
    """Write a FasterNet into an engine file and load it; see ``onnx_file.load``. The last is why it computes so."""
    from timm.models.fasternet import FasterNet as TimmFasterNet

    if not isinstance(model, FasterNet | TimmFasterNet):
        raise ValueError(
            f"it is a {type(model).__name__}, and only a FasterNet runs whole in C++: "
            "take eager, compile, onnxruntime or openvino"
        )
    with tempfile.TemporaryDirectory(prefix="fasternet-") as name:
        file = Path(name) / "engine.safetensors"
        CpuEngine.from_model(model, precision=precision).save(file)
        num_bytes = file.stat().st_size
        start = time.perf_counter()
        module = CpuModule(CpuEngine.load(file), threads)
        output = module(example)
        load_s = time.perf_counter() - start
    check_output(output)
    return module.forward, load_s, num_bytes, dict(module.reasons)


def check_output(output: object) -> None:
    """Refuse what is neither logits nor a list of feature maps."""
    is_list = isinstance(output, list) and all(isinstance(x, Tensor) for x in output)
    if not is_list and not isinstance(output, Tensor):
        raise ValueError(
            f"its output is no tensor of logits and no list of feature maps, but a {type(output).__name__}"
        )


def _load_module(
    network: nn.Module, example: Tensor, engine: str, precision: str, layout: torch.memory_format
) -> tuple[Callable[[Tensor], Output], float]:
    """Return what runs a network in PyTorch, and the seconds until its first output."""
    is_fasternet = isinstance(network, FasterNet)
    if not (is_fasternet and engine == "eager"):  # that one has chosen
        network = network.to(memory_format=layout)
    if precision == "bf16":
        network = InPrecision(network, torch.bfloat16)

    def run_eager(x: Tensor) -> Output:
        return cast(Output, network(x if is_fasternet else x.contiguous(memory_format=layout)))

    start = time.perf_counter()
    run = run_eager if engine == "eager" else _compile(network, example)
    with torch.inference_mode():
        output = run(example)
    check_output(output)
    if example.is_cuda:
        torch.cuda.synchronize()
    return run, time.perf_counter() - start


def _compile(network: nn.Module, example: Tensor) -> Callable[[Tensor], Output]:
    """Compile a network whole, its weights as constants, which lets the compiler lay them out for its kernels."""
    from torch._inductor import config

    # Compiled graphs are kept by code object, a few for each: an exported network brings one of its own.
    exported = torch.export.export(network, (example,)).module()
    mode = "reduce-overhead" if example.is_cuda else None
    compiled = torch.compile(exported.forward, fullgraph=True, dynamic=False, mode=mode)
    with config.patch(freezing=True), torch.inference_mode():  # as it will be called: else it is compiled anew
        compiled(example)
    if not example.is_cuda:
        return compiled
    return lambda x: map_outputs(Tensor.clone, compiled(x))  # CUDA graphs write every output into the same memory


def _is_alike(x: Tensor, example: Tensor) -> bool:
    """Whether a compiled graph takes a tensor for what it was compiled with: inference mode makes others."""
    return not x.requires_grad and torch._C._dispatch_keys(x) == torch._C._dispatch_keys(example)


@contextlib.contextmanager
def _build(engine: str, precision: str) -> Iterator[None]:
    """Keep exporters and compilers from talking, and turn what fails into one sentence; lack of memory stays itself."""
    disabled, seeds = logging.root.manager.disable, random.getstate()  # nncf draws
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as raised:
        error: BaseException = raised
        while error.__cause__ is not None:  # exporters wrap what a user can understand
            error = error.__cause__
        first = str(error).strip().partition("\n")[0]
        first = first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"
        raise ValueError(f"engine {engine} cannot run this network in {precision}: {first}") from raised
    finally:
        logging.disable(disabled)
        random.setstate(seeds)
