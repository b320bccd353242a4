"""Face images from disk to uint8 batches: folders, records, image pairs, drawn faces, the order of samples, augmentation."""

from __future__ import annotations


def __getattr__(name: str) -> type:
    """`data.RecordIODataset`, imported when it is asked for: drawing faces (data.synthetic) needs no torch."""
    if name == "RecordIODataset":
        from data.recordio import RecordIODataset

        return RecordIODataset
    raise AttributeError(f"module 'data' has no attribute {name!r}")
