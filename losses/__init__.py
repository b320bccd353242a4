"""Losses: the ArcFace margin and the sharded margin softmax."""
