"""The whole network in the C++ engine, from NumPy arrays to NumPy arrays; a saved engine runs without PyTorch.

Shapes: pictures (N, C, H, W) or (N, H, W, C); logits (N, K); a feature map (N, C, H, W), a view of NHWC memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from fasternet import native
from fasternet.native import Block, Feature, Head, Layer, Patch

if TYPE_CHECKING:
    from torch import nn

FORMAT, VERSION = "fasternet-cpu-engine", "1"
MIN_INPUT_SIZE = 32  # as in models.fasternet, which needs torch
MAX_THREADS = 1024  # of native.Network.run
_KINDS = {kind.__name__.lower(): kind for kind in (Patch, Block, Feature, Head)}
_NHWC_TO_NCHW = (0, 3, 1, 2)


class CpuEngine:
    """A FasterNet in the C++ engine.

    Calls from several threads at once are allowed and wait for each other; several engines do not.

    Args:
        layers: What ``deploy.to_layers`` returns.
        precision: ``"fp32"`` or ``"bf16"``, in which it computes; what goes in and out is float32 always.
        isa: Instruction set, one of ``native.ISAS``; None takes the fastest of this processor.
        threads: Of a call that does not name them; the result does not depend on them.

    Attributes:
        precision: The argument.
        isa: The instruction set.
        threads: The argument; may be set.
        reasons: For each choice, why it computes so.

    Raises:
        ValueError: An argument does not fit, or the engine cannot run here.
        MemoryError: There is no memory for the weights.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        precision: str = "fp32",
        isa: str | None = None,
        threads: int = 1,
    ) -> None:
        self.threads = threads
        self._layers, self._wanted_isa = tuple(layers), isa
        if not self._layers or not isinstance(self._layers[0], Patch):
            raise ValueError("layers must begin with a Patch: the engine takes pictures")
        self._network = native.Network(self._layers, precision=precision, isa=isa)
        self.precision, self.isa = precision, self._network.isa
        self.reasons: Mapping[str, str] = {
            "engine": "the whole network in one call of C++: no copies around PConv, no dispatch per operator",
            "norm": "BN folded in double precision into the convolution before it",
            "isa": f"{self.isa}: {self._network.reason}",
        }

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        precision: str = "fp32",
        isa: str | None = None,
        threads: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> CpuEngine:
        """Make an engine of a network.

        Args:
            model: A ``FasterNet`` or timm's, as a classifier or for its feature maps; it is not modified.
            precision: See ``CpuEngine``.
            isa: See ``CpuEngine``.
            threads: See ``CpuEngine``.
            mean: Of each channel of the pictures, from 0 to 1; with ``std`` it lets the engine take uint8 pictures,
                which are divided by 255 and normalised on the way in.
            std: Of each channel.

        Raises:
            ValueError: ``model`` is no FasterNet or has LayerNorm, an argument does not fit, or it cannot run here.
            MemoryError: There is no memory for the weights.
        """
        from fasternet.deploy.cpu_layers import to_layers

        layers = to_layers(model, mean=mean, std=std)
        return cls(layers, precision=precision, isa=isa, threads=threads)

    @property
    def threads(self) -> int:
        """Threads of a call that does not name them."""
        return self._threads

    @threads.setter
    def threads(self, threads: int) -> None:
        self._threads = check_threads(threads)

    @property
    def has_head(self) -> bool:
        """Whether a call gives logits; else it gives feature maps."""
        return isinstance(self._layers[-1], Head)

    @property
    def num_bytes(self) -> int:
        """Memory of packed weights and buffers, now; the folded float32 layers, kept for ``save``, are beside it."""
        return self._network.num_bytes

    def __call__(
        self, x: np.ndarray, *, layout: str = "NCHW", threads: int | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """Map pictures to logits, or to the feature maps of the network.

        Args:
            x: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``; H and W of at least 32, at least one picture;
                float32, or uint8 where the engine has mean and std. What is contiguous in either order of memory
                is taken without a copy, anything else is copied first.
            layout: Order of the dimensions of ``x``.
            threads: Of this call; None takes the engine's.

        Returns:
            (N, K), or a list of (N, C, H, W), which are views of (N, H, W, C); float32, in memory of their own.

        Raises:
            ValueError: ``x``, ``layout`` or ``threads`` does not fit.
            MemoryError: There is no memory for the buffers.
        """
        x, layout = self._arrange(x, layout)
        outputs = self._network.run(x, layout=layout, threads=self.threads if threads is None else threads)
        if self.has_head:
            return outputs[-1]
        return [output.transpose(_NHWC_TO_NCHW) for output in outputs]

    def bind(self, x: np.ndarray) -> tuple[native.Call, list[tuple[int, ...]]] | None:
        """Do what ``native.Network.bind`` does, for pictures (N, C, H, W); None where they would have to be copied."""
        x, layout = self._arrange(x, "NCHW")
        return self._network.bind(x, layout=layout) if x.flags.c_contiguous and x.flags.aligned else None

    def _arrange(self, x: np.ndarray, layout: str) -> tuple[np.ndarray, str]:
        """Return pictures in the order that lies in memory, and its name; what does not fit at all, native refuses."""
        if not isinstance(x, np.ndarray) or x.ndim != 4 or layout not in ("NCHW", "NHWC"):
            return x, layout
        if len(x) and min(x.shape[2:] if layout == "NCHW" else x.shape[1:3]) < MIN_INPUT_SIZE:
            raise ValueError(
                f"x must have H and W of at least {MIN_INPUT_SIZE}, not the shape {x.shape} in the layout {layout}"
            )
        if layout == "NCHW" and not x.flags.c_contiguous and (y := x.transpose(0, 2, 3, 1)).flags.c_contiguous:
            return y, "NHWC"
        return x, layout

    def __reduce__(self) -> Any:
        """Copy and pickle the layers; the copy packs them anew, for the processor that it is on."""
        options: dict[str, Any] = {"precision": self.precision, "isa": self._wanted_isa, "threads": self.threads}
        return functools.partial(type(self), **options), (self._layers,)

    def save(self, path: str | Path) -> None:
        """Write the engine into one file, at once or not at all: a safetensors file of the folded float32 weights.

        Args:
            path: The file; one that exists is replaced.

        Raises:
            OSError: It cannot be written.
        """
        from fasternet.models.checkpoint import write_atomically

        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"no folder {path.parent} for the engine file")
        tensors = dict(_name_tensors(self._layers))
        description = json.dumps(
            {
                "precision": self.precision,
                "layers": [_describe_layer(layer) for layer in self._layers],
            }
        )
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "engine": description,
            "sha256": _hash(description, tensors),
        }
        write_atomically(path, lambda part: safetensors.numpy.save_file(tensors, part, metadata))

    @classmethod
    def load(
        cls, path: str | Path, *, precision: str | None = None, isa: str | None = None, threads: int = 1
    ) -> CpuEngine:
        """Read an engine that ``save`` wrote; PyTorch is not needed.

        Args:
            path: The file.
            precision: See ``CpuEngine``; None takes the saved engine's.
            isa: See ``CpuEngine``.
            threads: See ``CpuEngine``.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is truncated, altered or something else, or the engine cannot run here.
            MemoryError: There is no memory for the weights.
        """
        layers, saved = _read(Path(path))
        return cls(layers, precision=precision or saved, isa=isa, threads=threads)


def check_threads(threads: object) -> int:
    """Return a number of threads that a call can have.

    Raises:
        ValueError: It is none.
    """
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer) or not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads must be an integer from 1 to {MAX_THREADS}, not {threads!r}")
    return int(threads)


def _name_tensors(layers: Sequence[Layer]) -> Iterator[tuple[str, np.ndarray]]:
    for number, layer in enumerate(layers):
        for field in dataclasses.fields(layer):
            if isinstance(value := getattr(layer, field.name), np.ndarray):
                yield f"{number:03}.{field.name}", np.ascontiguousarray(value)


def _describe_layer(layer: Layer) -> dict[str, Any]:
    """Return what a layer is beside its arrays."""
    values = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    plain = {name: int(v) if isinstance(v, np.integer) else v for name, v in values.items()}
    plain = {name: value for name, value in plain.items() if isinstance(value, int | str)}
    return {"kind": type(layer).__name__.lower(), **plain}


def _hash(description: str, tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[list[Layer], str]:
    """Return the layers of an engine file, and the precision that they were saved for."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not an engine file")
    if not path.is_file():
        raise FileNotFoundError(f"no engine file at {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} holds no CPU engine: CpuEngine.save writes one")
            if metadata.get("version") != VERSION:
                raise ValueError(f"{path} has version {metadata.get('version')} of the engine file, not {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error})") from None
    text = metadata.get("engine", "")
    if _hash(text, tensors) != metadata.get("sha256"):
        raise ValueError(f"{path} was altered after it was written: its contents do not have its sha256")
    try:
        description = json.loads(text)
        layers: list[Layer] = []
        for number, fields in enumerate(description["layers"]):
            prefix = f"{number:03}."
            arrays = {name[len(prefix) :]: array for name, array in tensors.items() if name.startswith(prefix)}
            layers.append(_KINDS[fields.pop("kind")](**fields, **arrays))
        return layers, str(description["precision"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} describes no layers that this version knows ({error})") from None
