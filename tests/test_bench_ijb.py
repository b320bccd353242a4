"""scripts/bench_ijb.py at a small size: it runs, and its numbers are those of plain loops."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from scripts import bench_ijb


def test_rows_and_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "rows.csv"
    flags = ["--scale", "0.0005", "--embedding-size", "16", "--directory", str(tmp_path), "--csv", str(table)]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    monkeypatch.setattr(bench_ijb.measure, "restart_peak", lambda _: 0.0)  # not in the tests' own process
    bench_ijb.main()
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == [
        "open the files", "check the embeddings' checksums", "score", "score, --far-nearest"]
    assert all(float(row["seconds"]) > 0 and float(row["peak_mib"]) > 0 for row in rows)
    out = capsys.readouterr().out
    assert "G2" in out and "embedding_size 16" in out and sorted(tmp_path.iterdir()) == [table]
