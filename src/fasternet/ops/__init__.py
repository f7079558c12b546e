"""The operator: PConv, what it is compared with, and the FasterNet block as one operator."""

from fasternet.ops.pconv import PConv2d, Selection, count_partial_channels, list_impls, pconv2d, pconv2d_, select_impl
from fasternet.ops.pconv_nd import PConv1d, PConv3d, PConvPWConv

__all__ = [
    "PConv1d",
    "PConv2d",
    "PConv3d",
    "PConvPWConv",
    "Selection",
    "count_partial_channels",
    "list_impls",
    "pconv2d",
    "pconv2d_",
    "select_impl",
]
