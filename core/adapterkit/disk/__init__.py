"""Checkpoints on disk: read by their headers, and changed without loading the model."""

from adapterkit.disk.checkpoint import Checkpoint, Entry, Shard
from adapterkit.disk.skeleton import skeleton

__all__ = ["Checkpoint", "Entry", "Shard", "skeleton"]
