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
        class_names: Of the logits, where they are known.

    Attributes:
        precision: The argument.
        isa: The instruction set.
        threads: The argument; may be set.
        class_names: The argument.
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
        class_names: Sequence[str] | None = None,
    ) -> None:
        self._layers = tuple(layers)
        self._network = native.Network(self._layers, precision=precision, isa=isa)
        self.precision, self.isa, self.threads = precision, self._network.isa, threads
        self.class_names = None if class_names is None else tuple(class_names)
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
        class_names: Sequence[str] | None = None,
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
            class_names: See ``CpuEngine``.

        Raises:
            ValueError: ``model`` is no FasterNet or has LayerNorm, an argument does not fit, or it cannot run here.
            MemoryError: There is no memory for the weights.
        """
        from fasternet.deploy.cpu_layers import to_layers

        layers = to_layers(model, mean=mean, std=std)
        return cls(layers, precision=precision, isa=isa, threads=threads, class_names=class_names)

    @property
    def num_bytes(self) -> int:
        """Memory of packed weights and buffers, now."""
        return self._network.num_bytes

    def __call__(
        self, x: np.ndarray, *, layout: str = "NCHW", threads: int | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """Map pictures to logits, or to the feature maps of the network.

        Args:
            x: (N, C, H, W), or (N, H, W, C) with ``layout="NHWC"``; H and W of at least 32, at least one picture;
                float32, or uint8 where the engine has mean and std. Either memory order is taken without a copy.
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
        if isinstance(self._layers[-1], Head):
            return outputs[-1]
        return [output.transpose(_NHWC_TO_NCHW) for output in outputs]

    def _arrange(self, x: np.ndarray, layout: str) -> tuple[np.ndarray, str]:
        """Check pictures; return them in the order that lies in memory, and its name."""
        first = self._layers[0]
        assert isinstance(first, Patch)
        if layout not in ("NCHW", "NHWC"):
            raise ValueError(f"layout {layout!r} is not one of NCHW, NHWC")
        channels = first.weight.shape[1]
        axis, pixels = (1, slice(2, 4)) if layout == "NCHW" else (3, slice(1, 3))
        if x.ndim != 4 or x.shape[axis] != channels or min(x.shape[pixels]) < MIN_INPUT_SIZE:
            shape = f"(N, {channels}, H, W)" if layout == "NCHW" else f"(N, H, W, {channels})"
            raise ValueError(
                f"the input must have the shape {shape} with H and W of at least {MIN_INPUT_SIZE}, got {x.shape}"
            )
        if not len(x):
            raise ValueError("the input must hold at least one picture, got 0")
        if x.dtype == np.uint8 and first.mean is None:
            raise ValueError(
                "the input is uint8, but the engine has no mean and std: make it with them, or give float32"
            )
        if x.dtype not in (np.float32, np.uint8):
            raise ValueError(f"the input must be float32, or uint8 where the engine has mean and std, got {x.dtype}")
        if layout == "NCHW" and not x.flags.c_contiguous and (y := x.transpose(0, 2, 3, 1)).flags.c_contiguous:
            return y, "NHWC"
        return x, layout

    def __reduce__(self) -> Any:
        """Copy and pickle the layers; the copy packs them anew, for the processor that it is on."""
        make = functools.partial(
            CpuEngine, precision=self.precision, threads=self.threads, class_names=self.class_names
        )
        return make, (self._layers,)

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
                "class_names": self.class_names,
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
        description, layers = _read(Path(path))
        return cls(
            layers,
            precision=precision or description["precision"],
            isa=isa,
            threads=threads,
            class_names=description["class_names"],
        )


def _name_tensors(layers: Sequence[Layer]) -> Iterator[tuple[str, np.ndarray]]:
    for number, layer in enumerate(layers):
        for field in dataclasses.fields(layer):
            if isinstance(value := getattr(layer, field.name), np.ndarray):
                yield f"{number:03}.{field.name}", np.ascontiguousarray(value)


def _describe_layer(layer: Layer) -> dict[str, Any]:
    """Return what a layer is beside its arrays."""
    values = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    plain = {name: value for name, value in values.items() if isinstance(value, int | str)}
    return {"kind": type(layer).__name__.lower(), **plain}


def _hash(description: str, tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], list[Layer]]:
    """Return what an engine file says of the engine, and its layers."""
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
    description = json.loads(text)
    layers: list[Layer] = []
    for number, fields in enumerate(description["layers"]):
        prefix = f"{number:03}."
        arrays = {name[len(prefix) :]: array for name, array in tensors.items() if name.startswith(prefix)}
        layers.append(_KINDS[fields.pop("kind")](**fields, **arrays))
    return description, layers
