"""Margins on the target cosine, and the margin softmax over class centers that may be sharded."""
