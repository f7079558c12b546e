"""What a backbone tells of its feature maps, with the face of timm's ``feature_info``, which heads of others read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any


class FeatureInfo(list[dict[str, Any]]):
    """A dictionary for the map of each stage: ``num_chs``, ``reduction`` (its stride), ``module``, ``index``.

    ``channels()``, ``reduction()`` and ``module_name()`` return a list with a value for each map in ``out_indices``, or
    the values of other stages: ``idx``, one or several.

    Args:
        channels: Channels of all stages.
        out_indices: Stages whose maps the backbone returns.
        normed: Whether these maps come out of ``feature_norms``.
    """

    def __init__(self, channels: Sequence[int], out_indices: Sequence[int], *, normed: bool) -> None:
        self.out_indices = tuple(out_indices)
        for i, num_chs in enumerate(channels):
            parent = "feature_norms" if normed and i in self.out_indices else "stages"
            self.append({"num_chs": num_chs, "reduction": 4 * 2**i, "module": f"{parent}.{i}", "index": i})

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """Return the value of ``key`` for each map, or for the one at ``idx``."""
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """Return the dictionary of each map, or of the one at ``idx``, with these keys alone."""
        if isinstance(idx, int):
            return {key: self[idx][key] for key in keys or self[idx]}
        return [self.get_dicts(keys, i) for i in (self.out_indices if idx is None else idx)]

    channels = functools.partialmethod(get, "num_chs")
    reduction = functools.partialmethod(get, "reduction")
    module_name = functools.partialmethod(get, "module")
