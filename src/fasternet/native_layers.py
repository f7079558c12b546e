"""What the layers of a network in the C++ engine are made of: frozen dataclasses of numpy arrays, in PyTorch's order.

``fasternet.native`` runs them. Maps are NHWC; C and ``out`` are channels, Cp those of the partial convolution, k its
kernel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Activation = Literal["none", "relu", "gelu"]


@dataclass(frozen=True, eq=False)
class Patch:
    """Embedding or merging: a k x k convolution with stride k, and a bias.

    ``mean`` and ``std`` (C), in the first layer only: what a uint8 picture, divided by 255, is normalised with.
    """

    weight: Array  # (out, C, k, k)
    bias: Array | None = None  # (out)
    mean: Array | None = None
    std: Array | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """FasterNet block: ``x + project(activation(expand(pconv(x))))``; k is odd, ``start`` the first channel of Cp."""

    partial: Array  # (Cp, Cp, k, k)
    expand: Array  # (hidden, C)
    expand_bias: Array | None  # (hidden)
    project: Array  # (C, hidden)
    project_bias: Array | None = None  # (C)
    start: int = 0
    activation: Activation = "gelu"


@dataclass(frozen=True, eq=False)
class PartialConv:
    """Partial convolution of the channels from ``start`` on; the others pass through."""

    weight: Array  # (Cp, Cp, k, k)
    channels: int
    start: int = 0


@dataclass(frozen=True, eq=False)
class Feature:
    """Gives the map to the caller, optionally times ``scale`` (C) plus ``shift`` (C); the trunk goes on without it."""

    channels: int
    scale: Array | None = None
    shift: Array | None = None


@dataclass(frozen=True, eq=False)
class Head:
    """Global average pooling, a linear layer, an activation, and a classifier where there is one."""

    weight: Array  # (hidden, C)
    bias: Array | None = None  # (hidden)
    classifier: Array | None = None  # (out, hidden)
    classifier_bias: Array | None = None  # (out)
    activation: Activation = "gelu"


Layer = Patch | Block | PartialConv | Feature | Head
