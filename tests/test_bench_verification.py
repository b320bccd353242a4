"""scripts/bench_verification.py at a small size: it runs, and both implementations agree."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from scripts import bench_verification


def test_rows_and_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "rows.csv"
    flags = ["--pairs", "200", "--embedding-size", "16", "--image-bytes", "50", "--repeat", "2", "--csv", str(table)]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    monkeypatch.setattr(bench_verification, "keep_freed_memory", lambda: None)  # not in the tests' own process
    threads = torch.get_num_threads()
    bench_verification.main()
    torch.set_num_threads(threads)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == ["arithmetic", "arithmetic, threshold by threshold", "open the set"]
    assert all(0 < float(row["p20_s"]) <= float(row["p80_s"]) and row["pairs"] == "200" for row in rows)
    assert "pairs 200, embedding_size 16, image_bytes 50" in capsys.readouterr().out
