"""Loads the C++ library and runs networks in it: the only file that knows its C interface (``csrc/fasternet.h``).

Needs no torch. Maps are NHWC. The layers are those of ``fasternet.native_layers``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from fasternet.native_layers import Activation, Array, Block, Feature, Head, Layer, PartialConv, Patch

__all__ = [
    "ISAS",
    "ISA_VARIABLE",
    "LIBRARY_VARIABLE",
    "PRECISIONS",
    "Activation",
    "Array",
    "Block",
    "Feature",
    "Head",
    "Layer",
    "Network",
    "PartialConv",
    "Patch",
    "explain_native",
    "measure_peak",
    "select_isa",
]

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
PRECISIONS = ("fp32", "bf16")
ISA_VARIABLE = "FASTERNET_CPU_ISA"  # names the instruction set where the argument isa does not
LIBRARY_VARIABLE = "FASTERNET_NATIVE_LIBRARY"  # names another build of the library

_INTERFACE = 2  # FN_INTERFACE
Call = Callable[[int, Sequence[int], int], None]
_MOST_CHANNELS = 2**20
_BUILT = Path(__file__).parent / "_native" / "libfasternet.so"  # where CMakeLists.txt puts it
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}
_LAYOUTS = {"NCHW": 0, "NHWC": 1}
_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.uint8): 1}

# Of each kind of layer (fn_kind), its arrays: name, place among the pointers of fn_layer, sizes.
_KINDS = (Patch, Block, PartialConv, Feature, Head)
_ARRAYS: tuple[tuple[tuple[str, int, str], ...], ...] = (
    (("weight", 0, "out C k k"), ("bias", 3, "out"), ("mean", 6, "C"), ("std", 7, "C")),
    (
        *(("partial", 0, "Cp Cp k k"), ("expand", 1, "hidden C"), ("expand_bias", 4, "hidden")),
        *(("project", 2, "C hidden"), ("project_bias", 5, "C")),
    ),
    (("weight", 0, "Cp Cp k k"),),
    (("scale", 0, "C"), ("shift", 3, "C")),
    (("weight", 0, "hidden C"), ("bias", 3, "hidden"), ("classifier", 1, "out hidden"), ("classifier_bias", 4, "out")),
)
_OPTIONAL = ("out", "hidden", "C", "out hidden")  # sizes of what may be None: biases and the like, the classifier


class _Layer(ctypes.Structure):  # fn_layer
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "in_channels", "out_channels", "hidden_channels")),
        *((name, ctypes.c_int32) for name in ("kernel_size", "partial_channels", "partial_start", "activation")),
        ("pointers", ctypes.c_void_p * 8),  # weight 0 to 2, bias 0 to 2, mean, std
    ]


class _Input(ctypes.Structure):  # fn_input
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("dtype", "layout")),
        *((name, ctypes.c_int64) for name in "nchw"),
    ]


_TEXT, _INT, _LONG, _POINTER = ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fn_explain": (_TEXT, (_TEXT, _TEXT)),
    "fn_select": (_TEXT, (_TEXT,)),
    "fn_interface": (_INT, ()),
    "fn_source": (_TEXT, ()),
    "fn_measure_peak": (ctypes.c_double, (_TEXT, _TEXT, ctypes.c_double)),
    "fn_create": (_INT, (_POINTER, _INT, _TEXT, _TEXT, _POINTER, _TEXT, _LONG)),
    "fn_destroy": (None, (_POINTER,)),
    "fn_num_outputs": (_INT, (_POINTER,)),
    "fn_output_shape": (_INT, (_POINTER, _POINTER, _INT, _POINTER, _TEXT, _LONG)),
    "fn_num_bytes": (_LONG, (_POINTER,)),
    "fn_run": (_INT, (_POINTER, _POINTER, _POINTER, _INT, _POINTER, _TEXT, _LONG)),
}


def explain_native(isa: str | None = None, precision: str = "fp32") -> str | None:
    """Say why networks cannot run here.

    Args:
        isa: One of ``ISAS``; None: the one that ``FASTERNET_CPU_ISA`` names, else any.
        precision: "fp32" or "bf16".

    Returns:
        None where they can, else one sentence; also where ``FASTERNET_CPU_ISA`` names no instruction set.

    Raises:
        ValueError: ``isa`` is no instruction set, or ``precision`` none that there is.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if isa is not None and isa not in ISAS:
        raise ValueError(f"isa must be one of {', '.join(ISAS)}, not {isa!r}")
    forced = None if isa is not None else os.environ.get(ISA_VARIABLE) or None
    if forced is not None and forced not in ISAS:
        return f"{ISA_VARIABLE} must be one of {', '.join(ISAS)}, not {forced!r}"
    try:
        library = _library()
    except ValueError as error:
        return str(error)
    wanted = isa or forced
    if wanted is None and library.fn_select(precision.encode()) is not None:
        return None
    # bf16 is asked of the processor, never computed by portable code unasked.
    reason: bytes | None = library.fn_explain((wanted or "avx512_bf16").encode(), precision.encode())
    if reason is None:
        return None
    code = f" with instruction set {wanted}" if wanted else ""
    asked = f", which {ISA_VARIABLE} asks for" if forced else ""
    return f"engine cpu cannot compute in {precision}{code}{asked}: {reason.decode()}"


def select_isa(isa: str | None, precision: str) -> tuple[str, str]:
    """Choose the instruction set.

    Args:
        isa: One of ``ISAS``; None: the one that ``FASTERNET_CPU_ISA`` names, else the fastest that this processor has.
        precision: "fp32" or "bf16"; bf16 without hardware for it only where "portable" is asked for.

    Returns:
        Its name, and in a few words why.

    Raises:
        ValueError: It cannot run here, or there is no such instruction set or precision.
    """
    if (reason := explain_native(isa, precision)) is not None:
        raise ValueError(reason)
    if isa is not None:
        return isa, "asked for"
    if forced := os.environ.get(ISA_VARIABLE):
        return forced, f"{ISA_VARIABLE} asks for it"
    return _library().fn_select(precision.encode()).decode(), "the fastest of this processor"


def measure_peak(isa: str, precision: str, seconds: float = 0.2) -> float:
    """Measure the multiply-adds per second of one core in registers, for about ``seconds``: the floor under latencies.

    Raises:
        ValueError: ``isa`` cannot run here, or ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, not {seconds}")
    isa, _ = select_isa(isa, precision)
    return float(_library().fn_measure_peak(isa.encode(), precision.encode(), seconds))


class Network:
    """A list of layers, packed once for one instruction set and precision, run many times.

    Several threads may share one (they wait for each other); several networks run side by side. A process that is
    forked while another thread runs one must not use that one in the child, where it would wait for ever.

    Args:
        layers: Each takes what the one before gives; at least one ``Feature`` or a ``Head`` at the end. Copied.
        precision: "fp32" or "bf16".
        isa: See ``select_isa``; the attributes ``isa`` and ``reason`` tell what it chose, and why.

    Raises:
        ValueError: A layer does not fit the one before, or the instruction set cannot run here.
        MemoryError: There is not enough memory for the weights.
    """

    def __init__(self, layers: Sequence[Layer], *, precision: str = "fp32", isa: str | None = None) -> None:
        self.isa, self.reason = select_isa(isa, precision)
        self.precision = precision
        if not all(isinstance(layer, _KINDS) for layer in layers):
            raise ValueError(f"layers must be some of {', '.join(kind.__name__ for kind in _KINDS)}, nothing else")
        if not any(isinstance(layer, Feature | Head) for layer in layers):
            raise ValueError("layers must hold a Feature or a Head: nothing would come out")
        if any(isinstance(layer, Patch) and layer.mean is not None for layer in layers[1:]):
            raise ValueError("layers must have no mean and std after the first, which alone sees the picture")
        arrays: list[Array] = []  # what the structs point into
        structs = [
            _to_struct(layer, f"layers[{i}], a {type(layer).__name__},", arrays) for i, layer in enumerate(layers)
        ]
        self._is_picture, self._has_head = isinstance(layers[0], Patch), isinstance(layers[-1], Head)
        self._num_layers, self._channels = len(structs), int(structs[0].in_channels)
        self._library = _library()
        handle = ctypes.c_void_p()
        given = (_Layer * len(structs))(*structs), len(structs), self.isa.encode(), precision.encode()
        _check(self._library.fn_create, *given, ctypes.byref(handle))
        del arrays  # had to live until here: the library has copied them
        self._handle = handle.value
        self._num_outputs = int(self._library.fn_num_outputs(handle.value))
        self._last: tuple[object, list[tuple[int, ...]]] = None, []  # an input's form, the shapes of its outputs
        end = weakref.finalize(self, self._library.fn_destroy, handle.value)
        end.atexit = False  # another thread may be running it

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied and pickled: two would share what the library holds."""
        raise TypeError("a Network cannot be copied or pickled: make another from the same layers")

    @property
    def num_bytes(self) -> int:
        """Memory of packed weights and buffers, now."""
        return int(self._library.fn_num_bytes(self._handle))

    def run(
        self,
        x: npt.NDArray[Any],
        *,
        layout: str = "NCHW",
        threads: int = 1,
        out: Sequence[Array] | None = None,
        seconds: npt.NDArray[np.float64] | None = None,
    ) -> list[Array]:
        """Run a batch; other Python threads run meanwhile.

        Args:
            x: Pictures, float32 or uint8, (N, C, H, W) or (N, H, W, C) as ``layout`` says. For a network that does not
                start with a ``Patch``: maps, float32 (N, H, W, C). What is not contiguous and aligned is copied.
            layout: "NCHW" or "NHWC"; of pictures only.
            threads: Share the work; the result does not depend on it.
            out: Where the results go, as a former call returned them, none of them in ``x``; None: new arrays.
            seconds: (number of layers) float64, receives where the time went, the mean over the threads.

        Returns:
            The maps (N, H, W, C) of the ``Feature`` layers in order, then (N, classes) of the ``Head``.

        Raises:
            ValueError: An argument does not fit.
            MemoryError: There is not enough memory for the buffers.
        """
        threads = _check_integer("threads", threads, 1, 1024)
        x, given = self._check_input(x, layout)
        shapes = self._shape_outputs(given)
        outputs = [np.empty(shape, np.float32) for shape in shapes] if out is None else list(out)
        if len(outputs) != len(shapes):
            raise ValueError(f"out must hold {len(shapes)} arrays, not {len(outputs)}")
        if out is not None and any(np.may_share_memory(x, array) for array in outputs if isinstance(array, np.ndarray)):
            raise ValueError("out must not share memory with x, which would be overwritten while it is read")
        pairs = enumerate(zip(outputs, shapes, strict=True))
        pointers = (ctypes.c_void_p * len(shapes))(*(_point(f"out[{i}]", *pair, np.float32) for i, pair in pairs))
        times = None if seconds is None else _point("seconds", seconds, (self._num_layers,), np.float64)
        _check(self._library.fn_run, self._handle, ctypes.byref(given), pointers, threads, times)
        return outputs

    def bind(self, x: npt.NDArray[Any], *, layout: str = "NCHW") -> tuple[Call, list[tuple[int, ...]]]:
        """Check a form of input once, and return what runs such inputs, and the shapes of the outputs.

        What is returned takes the addresses of input and outputs and the number of threads, and trusts them.
        """
        x, given = self._check_input(x, layout)
        form = given.dtype, given.layout, given.n, given.c, given.h, given.w

        def call(data: int, outputs: Sequence[int], threads: int) -> None:
            pointers = (ctypes.c_void_p * len(outputs))(*outputs)
            _check(self._library.fn_run, self._handle, ctypes.byref(_Input(data, *form)), pointers, threads, None)

        return call, self._shape_outputs(given)

    def _check_input(self, x: npt.NDArray[Any], layout: str) -> tuple[npt.NDArray[Any], _Input]:
        if not isinstance(x, np.ndarray) or x.ndim != 4:
            raise ValueError(f"x must be an array of four dimensions, not {_describe(x)}")
        if layout not in _LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, not {layout!r}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"x must be float32 or uint8, not {x.dtype}")
        layout = layout if self._is_picture else "NHWC"
        n, *rest = x.shape
        c, h, w = rest if layout == "NCHW" else (rest[2], *rest[:2])
        if c != self._channels:
            raise ValueError(f"x must have {self._channels} channels, not {c} (shape {x.shape}, layout {layout})")
        x = np.require(x, requirements=("C", "A"))
        return x, _Input(x.ctypes.data, _DTYPES[x.dtype], _LAYOUTS[layout], n, c, h, w)

    def _shape_outputs(self, given: _Input) -> list[tuple[int, ...]]:
        form = given.n, given.h, given.w, given.layout, given.dtype
        known, shapes = self._last  # read at once: another thread may replace it
        if known == form:
            return shapes
        sizes = (ctypes.c_int64 * 4)()
        shapes = []
        for i in range(self._num_outputs):
            _check(self._library.fn_output_shape, self._handle, ctypes.byref(given), i, sizes)
            shapes.append((sizes[0], sizes[3]) if self._has_head and i == self._num_outputs - 1 else tuple(sizes))
        self._last = form, shapes
        return shapes


def _to_struct(layer: Layer, where: str, arrays: list[Array]) -> _Layer:
    """Check types and shapes, on which memory safety hangs; whether the layers make sense, fn_create checks."""
    struct = _Layer(kind=_KINDS.index(type(layer)))
    sizes: dict[str, int] = {}
    if isinstance(layer, PartialConv | Feature):
        sizes["C"] = _check_integer(f"{where} channels", layer.channels, 1, _MOST_CHANNELS)
    for name, place, letters in _ARRAYS[struct.kind]:
        array = getattr(layer, name)
        if array is None and letters in _OPTIONAL:
            continue
        arrays.append(_check_weight(f"{where} {name}", array, letters.split(), sizes))
        struct.pointers[place] = arrays[-1].ctypes.data
    if isinstance(layer, Patch) and (layer.mean is None) != (layer.std is None):
        raise ValueError(f"{where} must have both mean and std, or neither")
    if isinstance(layer, Patch) and layer.std is not None and not (layer.std > 0).all():
        raise ValueError(f"{where} std must be positive, not {layer.std.min()}")
    if isinstance(layer, Head) and layer.classifier is None and layer.classifier_bias is not None:
        raise ValueError(f"{where} must have no classifier_bias without a classifier")
    if isinstance(layer, Block | PartialConv):
        struct.partial_start = _check_integer(f"{where} start", layer.start, 0, sizes["C"])
    if isinstance(layer, Block | Head):
        if layer.activation not in _ACTIVATIONS:
            raise ValueError(f"{where} activation must be one of {', '.join(_ACTIVATIONS)}, not {layer.activation!r}")
        struct.activation = _ACTIVATIONS[layer.activation]
    struct.in_channels, struct.hidden_channels = sizes["C"], sizes.get("hidden", 0)
    struct.out_channels = sizes.get("out", sizes["hidden" if isinstance(layer, Head) else "C"])
    struct.kernel_size, struct.partial_channels = sizes.get("k", 0), sizes.get("Cp", 0)
    return struct


def _check_weight(name: str, array: object, letters: list[str], sizes: dict[str, int]) -> Array:
    """Return the array, contiguous, if it has the sizes known so far; note the new ones."""
    expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
    if isinstance(array, np.ndarray) and array.dtype == np.float32 and array.ndim == len(letters) and array.size:
        shape: tuple[int, ...] = array.shape
        if max(shape) > _MOST_CHANNELS:
            raise ValueError(f"{name} must have sizes from 1 to {_MOST_CHANNELS}, not {_describe(array)}")
        if all(sizes.setdefault(letter, size) == size for letter, size in zip(letters, shape, strict=True)):
            return np.require(array, requirements=("C", "A"))
    raise ValueError(f"{name} must be a float32 array ({expected}), not {_describe(array)}")


def _check_integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, not {value!r}")
    return int(value)


def _point(name: str, array: Any, shape: tuple[int, ...], dtype: type[np.floating[Any]]) -> int:
    """Return where an array lies that the library may write to."""
    fits = isinstance(array, np.ndarray) and array.shape == shape and array.dtype == dtype
    if not (fits and array.flags.carray):
        kind = "contiguous, aligned, writeable"
        raise ValueError(f"{name} must be a {kind} {dtype.__name__} array {shape}, not {_describe(array)}")
    return int(array.ctypes.data)


def _describe(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def _check(function: Any, *arguments: Any) -> None:
    """Call a function of the library; raise what it says went wrong."""
    message = ctypes.create_string_buffer(512)
    status = function(*arguments, message, len(message))
    if status:
        raise (MemoryError if status == 2 else ValueError)(message.value.decode(errors="replace"))


def _library() -> ctypes.CDLL:
    return _load(Path(os.environ.get(LIBRARY_VARIABLE) or _BUILT).absolute())


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    """Load the library; a ValueError says why there is none."""
    if not path.is_file():
        if path != _BUILT:
            raise ValueError(f"the CPU engine's library {path}, which {LIBRARY_VARIABLE} names, does not exist")
        raise ValueError(
            "the CPU engine's library was not built when fasternet was installed: put a C++20 compiler in place, "
            "install it again, and pip's --verbose shows what is amiss"
        )
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise ValueError(f"the CPU engine's library cannot be loaded: {error}") from None
    if (interface := library.fn_interface()) != _INTERFACE:
        raise ValueError(
            f"the CPU engine's library has interface {interface}, not {_INTERFACE}: install fasternet again"
        )
    return library
