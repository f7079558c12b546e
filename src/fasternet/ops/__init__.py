"""The operator: PConv, what it is compared with, and the FasterNet block as one operator."""

from fasternet.ops.pconv import PConv2d, Selection, count_partial_channels, list_impls, pconv2d, pconv2d_, select_impl

__all__ = [
    "PConv2d",
    "Selection",
    "count_partial_channels",
    "list_impls",
    "pconv2d",
    "pconv2d_",
    "select_impl",
]
