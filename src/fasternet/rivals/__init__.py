"""The networks that FasterNet is compared with: Table 3, and today's fast ones."""

from fasternet.rivals.batch_norm import randomize_batch_norm
from fasternet.rivals.registry import Rival, create_rival, find_rival, list_rivals

__all__ = ["Rival", "create_rival", "find_rival", "list_rivals", "randomize_batch_norm"]
