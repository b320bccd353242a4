"""The HTML page of audit.py: what was found, the worst first, with the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.audit_images import picture
from utils.errors import UserError
from utils.evaluation.html import columns, heading, montage, page, paragraph, table
from utils.evaluation.neighbours import NOTHING

if TYPE_CHECKING:
    from scripts.audit import Audit

SHOWN = 4  # images of an identity on the page
LIMITS = (
    "Everything here is as good as the network: people whom it cannot tell apart, such as twins, appear as one, "
    "and one person whom it does not recognise, as a child for example, is not found. A network that was trained "
    "on this set has learned its wrong labels too, the better the longer it was trained: one of another set finds"
    " more. An identity of one image has nothing to be compared with; of two images that differ, either may be "
    "the wrong one; and where most images of an identity show another person, the right ones appear as wrong. "
    "Copies with other pixels are looked for within an identity, between identities that seem to be one person, "
    "and where a label seems wrong. Of a test set, only people are found whom the network recognises, in images "
    "that were given.")


def audit_page(audit: Audit, lines: Sequence[str]) -> str:
    """The HTML page. lines: those of the proposal."""
    findings, most = audit.findings, audit.options.page_findings
    wrong = sum(row["kind"] == "wrong label" for row in findings["noise"])
    body: list[str] = [
        paragraph(f"Images: {audit.dataset.describe()}; embedded by {audit.weights.describe(audit.options.resume)}. "
                  "Findings are suspicions, the worst first: look before you drop anything."),
        table(["finding", "number", "file"], [
            ["pairs of identities that seem to be one person", len(findings["duplicates"]), "duplicates.csv"],
            ["images that seem to have a wrong label", wrong, "noise.csv"],
            ["other images far from their identity", len(findings["noise"]) - wrong, "noise.csv"],
            ["pairs of images that are copies", len(findings["copies"]), "copies.csv"],
            ["identities and images of the test sets", len(findings["overlap"]), "overlap.csv"],
            ["lines of the proposal", sum(not line.startswith("#") for line in lines), "exclude.txt"]]),
        table(["threshold", "cosine", "chosen because"], audit.thresholds.rows),
        *(paragraph(note) for note in audit.notes),
        heading("What this cannot know"), paragraph(LIMITS)]
    for title, kind, choose, draw in (
        ("One person, two identities", "duplicates", None, _draw_duplicate),
        ("Wrong labels", "noise", "wrong label", _draw_noise),
        ("Outliers", "noise", "outlier", _draw_noise),
        ("People and images of the test sets", "overlap", None, _draw_overlap),
        ("Copies", "copies", None, _draw_copies),
    ):
        rows = [row for row in findings[kind] if choose is None or row["kind"] == choose]
        body.append(heading(title))
        body.append(paragraph(f"{min(most, len(rows)):,} of {len(rows):,}" if rows else "Nothing was found."))
        body.append(columns([draw(audit, row) for row in rows[:most]]))
    return page(f"Audit of {audit.options.data}", "\n".join(body))


def _draw_duplicate(audit: Audit, row: dict[str, Any]) -> str:
    one, other = row["_labels"]
    return montage([(_pictures(audit, one), f"{row['identity']}: {row['images']} images"),
                    (_pictures(audit, other), f"{row['other']}: {row['other images']} images\n"
                                              f"cosine {row['cosine']:.3f}")], 72)


def _draw_noise(audit: Audit, row: dict[str, Any]) -> str:
    i = row["_image"]
    return montage([(_picture(audit, i), f"{row['image']}"),
                    (_pictures(audit, int(audit.labels[i]), i), f"its identity: {row['identity']}\n"
                                                                   f"cosine {row['cosine']:.3f}"),
                    (_pictures(audit, row["_closest"]), f"closest: {row['closest']}\n"
                                                        f"cosine {row['closest cosine']:.3f}")], 72)


def _draw_overlap(audit: Audit, row: dict[str, Any]) -> str:
    test, numbers = row["_test"]
    tested = [picture_or_none(test.images, t) for t in numbers]
    own = _pictures(audit, row["_label"]) if row["_image"] is None else [_picture(audit, row["_image"])]
    return montage([(tested, f"{row['test image']}\n{row['test images']} images of {row['test set']}"),
                    (own, f"{row['image'] or row['identity']}\n{row['kind']}, cosine {row['cosine']:.3f}")], 72)


def _draw_copies(audit: Audit, row: dict[str, Any]) -> str:
    one, other = row["_images"]
    return montage([([_picture(audit, one), _picture(audit, other)],
                     f"{row['image']}\n{row['other']}\n{row['kind']}, cosine {row['cosine']:.3f}")], 72)


def _picture(audit: Audit, i: int) -> np.ndarray | None:
    """An image by its position in `order`."""
    return picture_or_none(audit.dataset, int(audit.order[i]))


def _pictures(audit: Audit, c: int, without: int = -1) -> list[np.ndarray | None]:
    """Some images of an identity: those that are closest to it."""
    if audit.options.centers_only:
        found = np.flatnonzero(audit.labels_of_data == c)[:SHOWN].tolist()
        return [picture_or_none(audit.dataset, i) for i in found]
    own = audit.own[audit.starts[c]:audit.starts[c + 1]]
    best = [int(audit.starts[c] + k) for k in np.argsort(-np.nan_to_num(own, nan=NOTHING), kind="stable")]
    return [_picture(audit, i) for i in best if i != without][:SHOWN]


def picture_or_none(images: Any, i: int) -> np.ndarray | None:
    """uint8 (3, 112, 112), or None for an image that can no longer be read."""
    try:
        return picture(images, i).numpy()
    except UserError:
        return None
