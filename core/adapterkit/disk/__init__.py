"""Checkpoints on disk: read by their headers, and changed without loading the model."""
