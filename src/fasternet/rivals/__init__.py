"""The networks that FasterNet is compared with: Table 3, and today's fast ones; any network by name, in and out."""

from fasternet.rivals.backbone import create_backbone
from fasternet.rivals.batch_norm import randomize_batch_norm
from fasternet.rivals.checkpoint import load_network, load_rival, save_network
from fasternet.rivals.network import create_network, is_fasternet, resolve_network
from fasternet.rivals.registry import Rival, create_rival, find_rival, list_rivals

__all__ = [
    "Rival",
    "create_backbone",
    "create_network",
    "create_rival",
    "find_rival",
    "is_fasternet",
    "list_rivals",
    "load_network",
    "load_rival",
    "randomize_batch_norm",
    "resolve_network",
    "save_network",
]
