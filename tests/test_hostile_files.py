"""Claims in damaged or hostile files are checked before they cost memory or time."""

from __future__ import annotations

import json

import pytest

from data.insightface_bin import _Name
from utils.checkpoint.layout import DamagedCheckpoint, newest_first, read_manifest


def test_a_call_in_a_bin_file_takes_no_more_arguments_than_numpy_writes():
    assert _Name("scalar")(1, 2, 3, 4).arguments == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="numpy"):
        _Name("scalar")(*b"12345")


@pytest.mark.parametrize("name", ["/dev/zero", "../state.pth.tar", "shards/../../x"])
def test_a_manifest_names_files_of_its_checkpoint_only(tmp_path, name):
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {
        "state.pth.tar": [0, 0], "shards/.metadata": [0, 0], name: [0, 0]}}))
    with pytest.raises(DamagedCheckpoint, match="manifest.json"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"saved_at": ' + "9" * 400 + "}", "{}"])
def test_a_damaged_manifest_does_not_end_the_search_for_checkpoints(tmp_path, text):
    step = tmp_path / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(text)
    assert newest_first(str(tmp_path)) == [str(step)]
