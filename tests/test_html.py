"""The parts of self-contained pages: everything is escaped, images are inside, nothing comes from the network."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from utils.evaluation.html import Markup, escape, heading, montage, page, paragraph, picture, table

HOSTILE = '<script>alert("1")</script>\x1b[31m\udcff & \'x\''


class Tags(HTMLParser):
    """The tags and the attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_text_is_escaped_everywhere():
    body = (heading(HOSTILE, name=HOSTILE) + paragraph(HOSTILE) + table([HOSTILE], [[HOSTILE]])
            + montage([(None, HOSTILE), (np.zeros((8, 8, 3), np.uint8), HOSTILE)]))
    text = page(HOSTILE, body)
    found = Tags(text)
    assert "script" not in found.tags
    assert found.text.count(r'<script>alert("1")</script>\x1b[31m\udcff & ' + "'x'") == 8
    text.encode("utf-8")  # a lone surrogate could not be written


def test_pages_load_nothing():
    found = Tags(page("t", montage([(np.zeros((3, 8, 8), np.uint8), "one")])))
    links = [value for name, value in found.attributes if name in ("src", "href")]
    assert links and all(link.startswith("data:") for link in links)
    assert ("name", "viewport") in found.attributes
    assert any("default-src 'none'" in value for _, value in found.attributes)


@pytest.mark.parametrize("form", ["chw", "hwc", "pillow", "path"])
def test_pictures_are_embedded(form, tmp_path):
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :, 0] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = {"chw": pixels.transpose(2, 0, 1), "hwc": pixels, "pillow": Image.fromarray(pixels),
             "path": tmp_path / "a.png"}[form]
    data = re.search(r"base64,([^\"]+)", picture(image, 60))
    shown = Image.open(io.BytesIO(base64.b64decode(data[1])))
    assert shown.size == (20, 10)
    np.testing.assert_allclose(np.asarray(shown.convert("RGB"))[5, 5], [200, 0, 0], atol=4)
    assert 'width="60"' in picture(image, 60)


def test_unknown_kinds_of_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.bin"):
        picture(tmp_path / "a.bin")


def test_an_item_of_several_images_is_one_figure():
    found = Tags(montage([([None, None], "two"), (None, "one")]))
    assert found.tags.count("figure") == 2 and found.text.count("no image") == 3


def test_numbers_are_aligned_and_rows_have_all_cells():
    text = table(["name", "count"], [["a", 1], ["b", 2.5]])
    assert text.count("<td class=number>") == 2 and text.count("<th class=number>") == 1
    with pytest.raises(ValueError):
        table(["name", "count"], [["a"]])


def test_markup_is_not_escaped_twice():
    assert escape(Markup("<b>x</b>")) == "<b>x</b>" and "<b>" in table(["a"], [[Markup("<b>x</b>")]])
