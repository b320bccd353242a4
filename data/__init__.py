"""Face images from disk to uint8 batches; see README.md."""

from data.recordio import RecordIODataset

__all__ = ["RecordIODataset"]
