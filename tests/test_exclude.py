"""--exclude: images and identities that a training set is used without, in main.py and in pack.py."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
from helpers.images import make_folder
from helpers.packages import JPEGS, insightface, write
from helpers.training import train

from data.exclude import ExcludingSet, read_exclusions
from data.formats import open_training_set
from scripts import pack
from utils.checkpoint.identities import can_be_compared
from utils.checkpoint.reader import AUTO
from utils.errors import UserError
from utils.options import describe_changes, parse_options
from utils.preflight import count_classes, open_dataset, shared_facts


@pytest.fixture
def folder(tmp_path):
    """ann with 3 images, bob with 2, cid with 1, dan with 2."""
    make_folder(tmp_path / "faces", {"ann": 3, "bob": 2, "cid": 1, "dan": 2})
    return tmp_path / "faces"


def excluding(path, *lines: str, **options) -> ExcludingSet:
    file = path.parent / "exclude.txt"
    file.write_text("# a comment\n\n" + "".join(f"{line}\n" for line in lines))
    return open_training_set(str(path), **{"index": "none", "skip_bad": False, "progress": False,
                                           "exclude": str(file), **options})


def test_images_and_identities_are_dropped_and_later_labels_move_up(folder):
    dataset = excluding(folder, "drop image ann/001.jpg", "drop identity bob")
    assert dataset.identities == ["ann", "cid", "dan"] and dataset.labels.tolist() == [0, 0, 1, 2, 2]
    assert [label for _, label in dataset] == dataset.labels.tolist() and len(dataset) == 5
    names = ["ann/000.jpg", "ann/002.jpg", "cid/000.jpg", "dan/000.jpg", "dan/001.jpg"]
    assert dataset.image_names(np.arange(5)) == names
    assert [dataset.encoded(i)[1].removeprefix(f"{folder}/") for i in range(5)] == names
    assert "without those in" in dataset.describe() and "3 images, 1 identities, 0 merged" in dataset.describe()


def test_an_identity_that_loses_all_images_loses_its_label(folder):
    assert excluding(folder, "drop image cid/000.jpg").identities == ["ann", "bob", "dan"]


def test_identities_are_merged_over_several_lines(folder):
    dataset = excluding(folder, "merge ann into dan", "merge dan into bob")
    assert dataset.identities == ["bob", "cid"] and dataset.labels.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert dataset.merged == {"ann": "bob", "dan": "bob"}


def test_a_long_chain_of_merges_ends_where_it_leads(tmp_path):
    make_folder(tmp_path / "faces", {f"{c:03d}": 1 for c in range(200)})
    lines = [f"merge {c:03d} into {c + 1:03d}" for c in range(199)]
    for order in (lines, lines[::-1]):
        dataset = excluding(tmp_path / "faces", *order)
        assert dataset.identities == ["199"] and set(dataset.merged.values()) == {"199"}


def test_the_target_of_a_merge_may_lose_its_own_images(folder):
    dataset = excluding(folder, "drop image cid/000.jpg", "merge bob into cid")
    assert dataset.identities == ["ann", "cid", "dan"] and dataset.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_names_are_the_rest_of_the_line(tmp_path):
    make_folder(tmp_path / "faces", {"a into b": 1, " c": 1, "d": 2})
    dataset = excluding(tmp_path / "faces", "merge a into b into d", "drop image  c/000.jpg")
    assert dataset.identities == ["d"] and len(dataset) == 3
    make_folder(tmp_path / "more", {"x": 1, "x into y": 1, "y into z": 1, "z": 1})
    with pytest.raises(UserError, match="can be read in 2 ways"):
        excluding(tmp_path / "more", "merge x into y into z")


@pytest.mark.parametrize(("lines", "message"), [
    (["drop identity eve", "drop image ann/9.jpg", "merge bob into eva"],
     r"3 of its names are not in .*, such as identity eve, identity eva, image ann/9.jpg"),
    (["merge ann into bob", "merge bob into ann"], "ann is merged into itself, over 2 lines"),
    (["merge ann into ann"], "ann is merged into itself"),
    (["merge ann into bob", "merge ann into cid"], "ann is merged into two identities"),
    (["merge ann into bob", "drop identity bob"], "ann is merged into bob, and bob is dropped"),
    (["merge ann into bob", "drop identity ann"], "ann is merged into bob, and ann is dropped"),
    ([f"drop identity {name}" for name in ("ann", "bob", "cid", "dan")], "leaves no image"),
    (["drop ann"], r"exclude.txt:3: expected 'drop image IDENTITY/FILE'.* got 'drop ann'"),
    (["drop image "], "exclude.txt:3: expected"),
    (["merge ann"], "exclude.txt:3: expected"),
])
def test_mistakes_are_one_line(folder, lines, message):
    with pytest.raises(UserError, match=message):
        excluding(folder, *lines)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--exclude .*missing: cannot be read"):
        read_exclusions(str(tmp_path / "missing"))


def test_a_bad_image_that_is_dropped_is_no_error(folder):
    (folder / "ann" / "001.jpg").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"001\.jpg"):
        excluding(folder, "drop identity bob")
    assert len(excluding(folder, "drop image ann/001.jpg")) == 7
    assert len(excluding(folder, "drop identity bob", skip_bad=True)) == 5


def test_the_fingerprint_shows_what_is_left(folder):
    prints = [excluding(folder, *lines).fingerprint() for lines in (
        [], ["drop image ann/000.jpg"], ["drop image ann/001.jpg"], ["merge ann into bob"], ["drop identity ann"])]
    assert len(set(prints)) == 5
    assert prints[0] == open_training_set(str(folder), index="none", skip_bad=False, progress=False).fingerprint()
    assert all(text.startswith("FaceFolder:") for text in prints)  # comparable with a run without the file


def test_workers_get_the_same_images(folder):
    dataset = excluding(folder, "drop image ann/001.jpg", "merge cid into dan")
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.labels.tolist() == dataset.labels.tolist() and copy[2][1] == dataset[2][1]
    assert copy.fingerprint() == dataset.fingerprint() and copy.identities == dataset.identities


def test_packages_name_images_by_key_or_by_their_list(tmp_path):
    write(tmp_path / "package", insightface([0, 0, 1], JPEGS[:3]))
    dataset = excluding(tmp_path / "package", "drop image 0/2")
    assert dataset.image_names(np.arange(2)) == ["0/1", "1/3"] and dataset.labels.tolist() == [0, 1]
    for name in ("1/2", "0/x", "0/99999999999", "0/7"):
        with pytest.raises(UserError, match="1 of its names"):
            excluding(tmp_path / "package", f"drop image {name}")
    (tmp_path / "package" / "train.identities.txt").write_text("ann\nbob\n")
    (tmp_path / "package" / "train.files.txt").write_text("ann/a.jpg\nann/b.jpg\nbob/a.jpg\n")
    dataset = excluding(tmp_path / "package", "drop image ann/a.jpg")
    assert dataset.image_names(np.arange(2)) == ["ann/b.jpg", "bob/a.jpg"]
    (tmp_path / "package" / "train.files.txt").write_text("ann/a.jpg\n")
    with pytest.raises(UserError, match="must have a line for each"):
        excluding(tmp_path / "package", "drop image ann/a.jpg")


def test_images_of_several_sets_have_the_number_of_their_set(folder, tmp_path):
    make_folder(tmp_path / "other", {"ann": 2, "zoe": 1})
    file = tmp_path / "lines"
    file.write_text("drop image 2/ann/000.jpg\ndrop image 1/bob/001.jpg\nmerge 2/ann into ann\n")
    dataset = open_training_set(f"{folder},{tmp_path / 'other'}", index="none", skip_bad=False, progress=False,
                                exclude=str(file))
    assert dataset.identities == ["ann", "bob", "cid", "dan", "zoe"]
    assert dataset.labels.tolist() == [0, 0, 0, 1, 2, 3, 3, 0, 4]
    assert dataset.image_names(np.array([8, 7, 3])) == ["2/zoe/000.jpg", "2/ann/001.jpg", "1/bob/000.jpg"]
    assert dataset.fingerprint().startswith("UnionSet(FaceFolder,FaceFolder):")


def test_num_classes_auto_counts_what_is_left(folder, tmp_path):
    (tmp_path / "lines").write_text("merge bob into ann\ndrop identity cid\n")
    options = parse_options([str(folder), "--num-classes", "auto", "-b", "2", "--exclude", str(tmp_path / "lines")])
    plan = type("Plan", (), {"nodes": 1})()
    dataset = open_dataset(options, plan)
    assert count_classes(options, dataset).num_classes == 2
    facts = shared_facts(options, dataset, ())
    (tmp_path / "lines").write_text("merge bob into ann\ndrop identity cid\ndrop image ann/000.jpg\n")
    assert facts != shared_facts(options, dataset, ())  # nodes that read other lines are stopped


def test_evaluation_has_nothing_to_exclude():
    with pytest.raises(UserError, match="--exclude x with --evaluate"):
        parse_options(["-e", "--resume", "c", "--imgs-root", "i", "--pair-list", "p", "--exclude", "x"])


def test_a_resume_says_that_the_file_changed(folder):
    first, second, none = (parse_options([str(folder), *given]) for given in (
        ["--exclude", "a"], ["--exclude", "b"], []))
    assert describe_changes(dataclasses.asdict(first), second) == "--exclude b (was a)"
    assert describe_changes(dataclasses.asdict(first), none) == "--exclude off (was a)"


def test_a_run_is_not_resumed_where_labels_would_mean_other_people(pools, folder, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text("drop image ann/000.jpg\n")
    argv = [str(folder), "--num-classes", "4", "-b", "2", "--epochs", "2", "--seed", "0", "-j", "0", "--exclude",
            str(lines), "--output", str(tmp_path / "run")]
    pools(1).run(train, [*argv, "--max-steps", "1"])
    lines.write_text("drop image ann/000.jpg\ndrop image ann/001.jpg\n")
    pools(1).run(train, [*argv, "--max-steps", "2", "--resume", AUTO])
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    lines.write_text("drop identity ann\n")
    with pytest.raises(AssertionError, match="was trained with ann as class 0, which is bob"):
        pools(1).run(train, [*argv, "--resume", AUTO])


def test_nor_where_a_package_without_names_loses_a_label(pools, tmp_path):
    write(tmp_path / "package", insightface([k // 2 for k in range(8)], [JPEGS[0]] * 8))
    (tmp_path / "lines").write_text("drop identity 1\n")
    argv = [str(tmp_path / "package"), "--num-classes", "4", "-b", "2", "--epochs", "2", "--seed", "0", "-j", "0",
            "--output", str(tmp_path / "run")]
    pools(1).run(train, [*argv, "--max-steps", "1"])
    with pytest.raises(AssertionError, match="was trained with 1 as class 1, which is 2 in this training set"):
        pools(1).run(train, [*argv, "--resume", AUTO, "--exclude", str(tmp_path / "lines")])


@pytest.mark.parametrize(("stored", "given", "comparable"), [
    ("ann bob", "bob cid", True),
    ("0 1 2", "ann bob cid", False),  # the package has got names
    ("ann bob cid", "0 1 2", False),
    ("0 1 2", "0 1 2 3", False),  # equal labels, of two packages perhaps
    ("0 1 2", "0 2", True),
    ("1 2 3", "0 1 2 3", True),
    ("0 2", "1 2", True),
    ("0 1", "01 02", False),  # names that are no labels
    ("0 1", "2 1", False),
    ("", "0 2", False),
])
def test_which_identities_can_be_compared(stored, given, comparable):
    assert can_be_compared(stored.split(), given.split()) is comparable


def test_pack_leaves_out_and_merges(folder, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text("merge dan into ann\ndrop image ann/001.jpg\ndrop identity bob\n")
    pack.main(["rec", str(folder), str(tmp_path / "package"), "--exclude", str(lines)])
    packed = open_training_set(str(tmp_path / "package"), index="none", skip_bad=False, progress=False)
    assert packed.identities == ["ann", "cid"] and packed.labels.tolist() == [0, 0, 0, 0, 1]
    assert packed.image_names(np.arange(5)) == ["ann/000.jpg", "ann/002.jpg", "ann/dan.000.jpg", "ann/dan.001.jpg",
                                                "cid/000.jpg"]
    again = excluding(folder, *lines.read_text().splitlines())
    assert sorted(packed.encoded(i)[0] for i in range(5)) == sorted(again.encoded(i)[0] for i in range(5))

    lines.write_text("merge cid into ann\ndrop image ann/002.jpg\n")
    pack.main(["folder", str(tmp_path / "package"), str(tmp_path / "out"), "--exclude", str(lines)])
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.jpg")) == [
        "ann/000.jpg", "ann/cid.000.jpg", "ann/dan.000.jpg", "ann/dan.001.jpg"]


def test_pack_refuses_merged_images_of_one_name(folder, tmp_path):
    (folder / "ann" / "dan.000.jpg").write_bytes((folder / "ann" / "000.jpg").read_bytes())
    (tmp_path / "lines").write_text("merge dan into ann\n")
    with pytest.raises(UserError, match=r"merged, it would be ann/dan\.000\.jpg, which there is"):
        pack.main(["rec", str(folder), str(tmp_path / "package"), "--exclude", str(tmp_path / "lines")])


def test_unpacked_identities_without_names_have_padded_numbers(tmp_path):
    write(tmp_path / "package", insightface([k // 2 for k in range(22)], [JPEGS[0]] * 22))
    (tmp_path / "lines").write_text("merge 3 into 10\n")
    pack.main(["folder", str(tmp_path / "package"), str(tmp_path / "out"), "--exclude", str(tmp_path / "lines")])
    names = sorted(path.name for path in (tmp_path / "out" / "10").iterdir())
    assert names == ["03.07.jpg", "03.08.jpg", "21.jpg", "22.jpg"] and not (tmp_path / "out" / "03").exists()
