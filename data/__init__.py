"""Face images from disk to uint8 batches; see README.md."""

from __future__ import annotations


def __getattr__(name: str) -> type:
    """`data.RecordIODataset`, imported on first use, because importing it imports torch."""
    if name == "RecordIODataset":
        from data.recordio import RecordIODataset

        return RecordIODataset
    raise AttributeError(f"module 'data' has no attribute {name!r}")
