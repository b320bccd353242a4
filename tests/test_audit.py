"""scripts/audit.py: planted faults are found, its proposal is one that --exclude takes, hostile inputs are one line."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.ijb import Layout, write_ijb
from helpers.images import make_folder, smooth_image, smooth_pixels
from helpers.packages import JPEGS, insightface, write
from PIL import Image
from torch import nn

from data.align import TEMPLATE
from data.formats import open_training_set
from scripts import audit, audit_images
from scripts.planted_faults import plant, score
from utils.checkpoint.shards import rows_of
from utils.checkpoint.weights import Weights
from utils.errors import UserError
from utils.files import lock_output


class Pixels(nn.Module):
    """The colors of 7 x 7 parts of an image: tells the people of `draw` apart."""

    embedding_size = 147

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(images, 16).flatten(1)


def draw(person: int, image: int, seed: int = 0) -> Image.Image:
    """A person is a pattern of colors, an image adds another pattern."""
    mixed = 0.6 * smooth_pixels(1000 * seed + person) + 0.4 * smooth_pixels(10**6 + 1000 * person + image)
    return Image.fromarray(mixed.astype(np.uint8))


def draw_set(root, people: dict[str, list[tuple[int, int]]]) -> None:
    for name, images in people.items():
        (root / name).mkdir(parents=True)
        for number, (person, image) in enumerate(images):
            draw(person, image).save(root / name / f"{number:03d}.jpg", quality=95)


@pytest.fixture
def weights(monkeypatch):
    """Has audit.py take these weights, whatever is in the file of --resume."""
    given = {"backbone": Pixels(), "centers": None, "identities": None, "sub_centers": 1}

    def opened(path, arch=None, *, with_centers=False, channel_order=None):
        centers = rows_of(given["centers"]) if with_centers and given["centers"] is not None else None
        return Weights(given["backbone"], "pixels", 0, centers, given["identities"], None, given["sub_centers"])

    monkeypatch.setattr(audit, "open_weights", opened)
    return given


@pytest.fixture
def run(tmp_path, weights):
    (tmp_path / "weights").touch()

    def run(data, *more):
        audit.main([str(data), "--resume", str(tmp_path / "weights"), "--output", str(tmp_path / "audit"), "-j", "0",
                    "--index", "none", "--device", "cpu", *map(str, more)])
        return tmp_path / "audit"

    return run


def rows_in(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def source(tmp_path):
    """A set as synthesize.py lays it out: 24 people of 8 images, and pairs of 8 others."""
    root = tmp_path / "source"
    draw_set(root / "train", {f"{person:06d}": [(person, k) for k in range(8)] for person in range(24)})
    tested = {f"{person:06d}": [(person, k) for k in range(3)] for person in range(24, 32)}
    draw_set(root / "lfw" / "imgs", tested)
    (root / "lfw" / "pair.list").write_text("".join(
        f"{name}/000.jpg {name}/001.jpg 1\n{name}/002.jpg {other}/002.jpg 0\n"
        for name, other in zip(tested, [*list(tested)[1:], "000024"])))
    (root / "synthetic.json").write_text(json.dumps({"seed": 0}))
    return root


def test_planted_faults_are_found(source, run, tmp_path, capfd):
    truth = plant(source, tmp_path / "faulty", split=3, wrong=0.05, overlaps=2, copies=3, draw=draw)
    assert [len(faults) for faults in truth.values()] == [3, 10, 2, 2, 6]
    out = run(tmp_path / "faulty", "--test-pairs", tmp_path / "faulty" / "lfw" / "pair.list", "--copy-above", "0.98")
    scores = score(truth, str(out))
    for category, (right, found, planted) in scores.items():
        assert right >= 0.8 * planted and right >= 0.8 * found, f"{category}: {scores}"
    page = (out / "index.html").read_text()
    assert page.count("<img") > 50 and "http" not in page.replace("http-equiv", "")
    printed = capfd.readouterr().out
    assert "comparing 29 x 29 references: about 0.0 s" in printed and "of the cuts would be found" in printed

    # The proposal is one that main.py --exclude takes.
    left = open_training_set(str(tmp_path / "faulty"), index="none", skip_bad=False, progress=False,
                             exclude=str(out / "exclude.txt"))
    assert len(left.identities) == 24
    names = set(left.image_names(np.arange(len(left))))
    assert len(names & set(truth["noise"])) <= 2


def test_a_second_run_embeds_nothing_again(run, tmp_path, monkeypatch):
    draw_set(tmp_path / "faces", {str(person): [(person, k) for k in range(3)] for person in range(4)})
    embedded, original = [], audit_images.embed_images

    def embed_images(backbone, images, *more, **options):
        embedded.append(len(images))
        return original(backbone, images, *more, **options)

    monkeypatch.setattr(audit_images, "embed_images", embed_images)
    monkeypatch.setattr(audit_images, "EMBED_IMAGES", 5)
    first = (run(tmp_path / "faces") / "index.html").read_text()
    assert embedded == [5, 5, 2]
    assert (run(tmp_path / "faces") / "index.html").read_text() == first and embedded == [5, 5, 2]
    note = tmp_path / "audit" / "embeddings" / "train.npy.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "done": 10}))  # as an interruption leaves it
    assert (run(tmp_path / "faces") / "index.html").read_text() == first and embedded == [5, 5, 2, 2]
    draw(9, 9).save(tmp_path / "faces" / "0" / "000.jpg")
    run(tmp_path / "faces")
    assert embedded[4:] == [5, 5, 2]  # other pixels


@pytest.fixture
def five(tmp_path):
    """Identities p0 to p4 of 4 images; p3 and p4 are one person."""
    draw_set(tmp_path / "faces", {f"p{c}": [(min(c, 3), k + 10 * c) for k in range(4)] for c in range(5)})
    return tmp_path / "faces"


def test_centers_alone_find_duplicates_without_the_images(five, weights, run, monkeypatch):
    monkeypatch.setattr(audit_images, "embed_images", None)
    weights["centers"] = torch.eye(6, 147)[[0, 1, 2, 3, 3, 5]] + 0.01
    rows = rows_in(run(five, "--centers-only", "--duplicate-above", "0.9") / "duplicates.csv")
    assert [(row["identity"], row["other"]) for row in rows] == [("p3", "p4")]
    assert "merge p4 into p3" in (five.parent / "audit" / "exclude.txt").read_text()
    # By name, in another order, with classes that the set does not have.
    weights["identities"] = ["x", "p4", "p3", "p2", "p1", "p0"]
    rows = rows_in(run(five, "--centers-only", "--duplicate-above", "0.9") / "duplicates.csv")
    assert [(row["identity"], row["other"]) for row in rows] == [("p1", "p2")]


def test_of_several_centers_of_a_class_those_of_other_classes_count(five, weights, run):
    """Without images any two centers count; those of one class are not compared."""
    weights["sub_centers"], weights["centers"] = 2, torch.eye(10, 147)[[0, 0, 1, 2, 3, 4, 5, 6, 7, 4]]
    rows = rows_in(run(five, "--centers-only", "--duplicate-above", "0.9") / "duplicates.csv")
    assert [(row["identity"], row["other"]) for row in rows] == [("p2", "p4")]


def test_of_several_centers_the_one_of_most_images_counts(five, weights, run):
    """The other one, where a class has gathered wrong images, makes no duplicate."""
    images = [torch.from_numpy(np.asarray(draw(min(c, 3), 10 * c)).transpose(2, 0, 1).copy()) for c in range(5)]
    own = Pixels()(torch.stack(images).double() / 127.5 - 1).float()
    weights["sub_centers"] = 2
    weights["centers"] = torch.stack([value for c in range(5) for value in (own[(c + 1) % 3], own[c])])
    rows = rows_in(run(five, "--by", "centers", "--duplicate-above", "0.6") / "duplicates.csv")
    assert [(row["identity"], row["other"]) for row in rows] == [("p3", "p4")]


@pytest.mark.parametrize(("given", "flags", "message"), [
    ({}, ["--centers-only"], "has no class centers; use --by means"),
    ({"centers": torch.ones(4, 147)}, ["--by", "centers"], "has 4 class centers, and .* has 5 identities"),
    ({"centers": torch.ones(6, 147), "identities": ["a", "b", "p0", "p1", "p2", "p3"]}, ["--by", "centers"],
     "has no class center of 1 of the 5 identities in .*, such as p4"),
    ({"centers": torch.full((5, 147), float("nan"))}, ["--centers-only"], "no two identities can be compared"),
    ({}, ["--centers-only", "--test-bin", "x"], "--centers-only: test sets"),
    ({}, ["--imgs-root", "x"], "--imgs-root x: is for --test-pairs"),
    ({}, ["--test-images", "missing"], "--test-images missing: cannot be read"),
    ({}, ["--copy-above", "2"], "--copy-above 2: give a number"),
])
def test_mistakes_are_one_line(five, weights, run, given, flags, message):
    weights.update(given)
    with pytest.raises(UserError, match=message):
        run(five, *flags)


def test_a_center_that_is_not_finite_is_left_out(five, weights, run, capfd):
    weights["centers"] = torch.eye(5, 147) + 0.1
    weights["centers"][2, 7] = float("nan")
    run(five, "--centers-only")
    assert "warning: 1 references of identities are zero, NaN or infinite" in capfd.readouterr().err


def test_embeddings_that_are_nan_are_counted(five, weights, run, capfd):
    class Broken(Pixels):
        def forward(self, images):
            output = super().forward(images).clone()
            output[1] = float("nan")
            return output

    weights["backbone"] = Broken()
    out = run(five)
    assert "1 images have no usable embedding" in (out / "index.html").read_text()
    assert "1 of 20 embeddings are unusable" in capfd.readouterr().err
    assert not any("p0/001.jpg" in row.values() for row in rows_in(out / "noise.csv"))


def test_damaged_images_are_counted(five, run, capfd):
    data = (five / "p0" / "001.jpg").read_bytes()
    (five / "p0" / "001.jpg").write_bytes(data[:len(data) // 2])  # with a good header
    (five / "p1" / "002.jpg").write_bytes(b"no image")
    out = run(five)
    error = capfd.readouterr().err
    assert "1 of 20 images is bad and skipped" in error and "1 of 19 images cannot be read" in error
    assert (out / "index.html").exists()
    for path in five.rglob("*.jpg"):
        data = path.read_bytes()
        path.write_bytes(data[:400] if len(data) > 600 else data)
    with pytest.raises(UserError, match="no image can be used"):
        run(five)


def test_test_sets_of_all_kinds_are_compared(five, run, tmp_path, capfd):
    draw_set(tmp_path / "test", {"ann": [(3, 90), (3, 91)], "eve": [(7, 1), (7, 2)]})
    shutil.copyfile(five / "p1" / "002.jpg", tmp_path / "test" / "eve" / "copy.jpg")
    (tmp_path / "test" / "eve" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "list.txt").write_text("test/eve/copy.jpg\ntest/ann/000.jpg\n")
    rows = rows_in(run(five, "--test-images", f"{tmp_path / 'test'},{tmp_path / 'list.txt'}",
                       "--overlap-above", "0.6") / "overlap.csv")
    of_directory = [row for row in rows if row["test set"] == str(tmp_path / "test")]
    people = [row for row in of_directory if row["kind"] == "identity"]
    assert [(row["identity"] in ("p3", "p4"), row["test images"]) for row in people] == [(True, "2")]
    same = [row for row in rows if row["kind"] == "same pixels"]
    assert len(same) == 2 and {row["image"] for row in same} == {"p1/002.jpg"}
    assert "1 of 6 images cannot be read" in capfd.readouterr().err
    lines = (tmp_path / "audit" / "exclude.txt").read_text()
    assert "drop identity p3" in lines and "drop identity p4" in lines  # one person: both identities
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="names no image"):
        run(five, "--test-images", tmp_path / "empty.txt")


def test_people_of_ijb_are_found(five, run, tmp_path, capfd):
    """Its faces are aligned when they are read: here the photos are crops already. Subjects join templates."""
    people = [3, 3, 7, 1, 8, 9]  # of the images: one of p3, who is also p4; one of p1
    layout = Layout(template=np.array([10, 20, 30, 40, 50, 60]), media=np.arange(6), score=np.ones(6),
                    pairs=np.array([[10, 20, 1], [10, 30, 0]]),
                    galleries={"G1": np.array([[10, 500], [30, 501], [40, 502]])},
                    probes=np.array([[20, 500], [50, 503], [60, 504]]), landmarks=np.repeat(TEMPLATE[None], 6, axis=0))
    photos = [np.asarray(draw(person, 50 + k)) for k, person in enumerate(people)]
    root = write_ijb(tmp_path / "IJBC", layout, photos)
    (root / "loose_crop" / "6.jpg").write_bytes(b"no image")
    out = run(five, "--test-ijb", root, "--overlap-above", "0.6")
    rows = rows_in(out / "overlap.csv")
    found = {(row["identity"] in ("p3", "p4"), row["identity"], row["test images"]) for row in rows}
    assert sorted((own, images) for own, _, images in found) == [(False, "1"), (True, "2")]
    assert {row["test image"] for row in rows} == {str(root / "loose_crop" / name) for name in ("1.jpg", "4.jpg")}
    assert "1 of 6 images cannot be read" in capfd.readouterr().err and "<img" in (out / "index.html").read_text()


def test_names_from_files_do_no_harm(run, tmp_path):
    """Names with markup and with bytes that are no text appear escaped on the page, and as they are in the CSV."""
    draw_set(tmp_path / "faces", {"<b>x": [(0, 0), (0, 1), (0, 2)], "y, \"z\"\udcff": [(0, 3), (0, 4), (0, 5)],
                                  "w": [(1, 0), (1, 1), (2, 7)], "v": [(2, k) for k in range(6)]})
    out = run(tmp_path / "faces", "--duplicate-above", "0.5", "--noise-margin", "0.1")
    assert "<b>" not in (out / "index.html").read_text()
    text = (out / "duplicates.csv").read_bytes().decode("utf-8", "surrogateescape")
    assert "<b>x" in text and "\udcff" in text
    open_training_set(str(tmp_path / "faces"), index="none", skip_bad=False, progress=False,
                      exclude=str(out / "exclude.txt"))


def test_one_identity_is_too_few(run, tmp_path):
    make_folder(tmp_path / "faces", {"a": 2})
    with pytest.raises(UserError, match="has 1 identity"):
        run(tmp_path / "faces")


def test_identities_of_one_image_cannot_be_judged(run, tmp_path):
    (tmp_path / "faces").mkdir()
    for c in range(3):
        (tmp_path / "faces" / str(c)).mkdir()
        smooth_image(c).save(tmp_path / "faces" / str(c) / "a.jpg")
    assert "labels cannot be judged" in (run(tmp_path / "faces") / "index.html").read_text()


def test_connected_numbers_have_the_smallest_of_them():
    assert audit_images.components(6, [5, 1, 3], [3, 2, 5]).tolist() == [0, 1, 1, 3, 4, 3]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_few_strangers_are_no_duplicates(run, tmp_path, capfd, count):
    draw_set(tmp_path / "faces", {str(c): [(c, k) for k in range(4)] for c in range(count)})
    out = run(tmp_path / "faces")
    assert not rows_in(out / "duplicates.csv") and "Too few identities" in (out / "index.html").read_text()
    assert "give --duplicate-above" in capfd.readouterr().err


def test_embeddings_of_other_weights_that_were_never_made_are_not_taken(run, weights, tmp_path, monkeypatch):
    """The run before the last was whole, and the last one, with other weights, was killed at its start."""
    draw_set(tmp_path / "faces", {str(c): [(c, k) for k in range(3)] for c in range(4)})
    run(tmp_path / "faces")
    rows = np.load(tmp_path / "audit" / "embeddings" / "train.npy").copy()
    with monkeypatch.context() as patched:
        patched.setattr(audit_images, "embed_images", lambda *given, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "faces", "--flip")
    run(tmp_path / "faces")
    np.testing.assert_array_equal(np.load(tmp_path / "audit" / "embeddings" / "train.npy"), rows)
    (tmp_path / "audit" / "embeddings" / "train.npy").write_bytes(b"")  # as a crash of the machine may leave it
    run(tmp_path / "faces")
    np.testing.assert_array_equal(np.load(tmp_path / "audit" / "embeddings" / "train.npy"), rows)


def test_two_audits_do_not_write_to_one_directory(five, run, tmp_path):
    out = run(five)
    lock = lock_output(str(out))
    with pytest.raises(UserError, match="is writing there"):
        run(five)
    lock.close()
    run(five)


def test_an_edited_proposal_is_kept(five, run, capfd):
    out = run(five, "--duplicate-above", "0.6")
    (out / "exclude.txt").write_text("# mine\n")
    run(five, "--duplicate-above", "0.6")
    assert (out / "exclude.txt.1").read_text() == "# mine\n" and "merge p4 into p3" in (out / "exclude.txt").read_text()
    run(five, "--duplicate-above", "0.6")
    assert not (out / "exclude.txt.2").exists() and "was renamed to" in capfd.readouterr().out


def test_a_test_set_that_cannot_be_used_ends_the_audit_before_its_work(five, run, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_images, "embed_images", None)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "large.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="photos: no image can be used"):
        run(five, "--test-images", tmp_path / "photos")


def test_names_with_line_breaks_stay_out_of_the_proposal(run, tmp_path):
    draw_set(tmp_path / "faces", {"l\ndrop identity a": [(0, k) for k in range(3)], "m": [(0, k + 9) for k in range(4)],
                                  "a": [(1, k) for k in range(3)]})
    out = run(tmp_path / "faces", "--duplicate-above", "0.6")
    assert "# a name with a line break: 'merge l\\ndrop identity a into m'" in (out / "exclude.txt").read_text()
    left = open_training_set(str(tmp_path / "faces"), index="none", skip_bad=False, progress=False,
                             exclude=str(out / "exclude.txt"))
    assert len(left.identities) == 3


def test_centers_of_label_numbers_are_found_by_number(five, run, weights, tmp_path):
    """A package without names, of which --exclude leaves out a label: later centers do not move up."""
    weights["identities"], weights["centers"] = [*map(str, range(6))], torch.eye(6, 147)[[0, 1, 2, 3, 4, 3]] + 0.01
    write(tmp_path / "package", insightface([k // 2 for k in range(12)], [JPEGS[0]] * 12))
    (tmp_path / "lines").write_text("drop identity 2\n")
    rows = rows_in(run(tmp_path / "package", "--centers-only", "--duplicate-above", "0.9", "--exclude",
                       tmp_path / "lines") / "duplicates.csv")
    assert [(row["identity"], row["other"]) for row in rows] == [("3", "5")]
