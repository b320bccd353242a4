#!/usr/bin/env python3
"""Images per second of the training loader, beside the published way of loading; start-up time with and without an index.

    python3 scripts/bench_data.py loader data/ms1m --workers 0,1,2
    python3 scripts/bench_data.py index --files 1000000

loader: whole batches from a DataLoader, on the same files in turns. "ours": data.loader as main.py uses it. "published": a
data set that opens each file with Pillow and converts it to RGB, ToTensor and Normalize in the worker, and PyTorch's default
collation to float batches. ours hands on uint8: what prepare_batch then takes on one core, where a GPU does it in training,
is told as well. Memory is what a worker holds alone (private pages), and with what it shares with others (proportional).

index: a folder of empty files is made, with as many directories as asked for; then FaceFolder opens it as in a first start,
which scans and writes the index, and as in later ones, which find it right. "published": torchvision's way, os.walk over
every directory and a Python tuple of path and label for every file. Every start is a fresh process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data.augment import AUGMENTS, prepare_batch  # noqa: E402
