"""The pictures of the documentation are those that are drawn, seen by everyone, and on a page."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .pages import DOCS, PAGES
from .pictures.graph import Edge, draw
from .pictures.runs import PICTURES, SHORTENER, shortener_resources
from .pictures.svg import BLUE

IMAGES = DOCS / "images"
BY_HAND = {"two-loops.svg"}
"""Of an idea, not of a run."""

HERE = sorted({*PICTURES, *BY_HAND})
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_as_it_is_drawn_now(name: str) -> None:
    """Else ``make pictures`` draws it anew."""
    assert (IMAGES / name).read_text("utf-8") == PICTURES[name]()


def test_there_is_no_other_picture() -> None:
    there = {path.name for path in IMAGES.iterdir() if not path.name.startswith("bench-")}
    assert there == set(HERE)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_drawn_twice_is_the_same(name: str) -> None:
    """Its times are those of a clock that stands still while code runs."""
    assert PICTURES[name]() == PICTURES[name]()


def test_the_timeline_is_of_the_resources_that_the_example_has() -> None:
    assert list(SHORTENER) == [each.name for each in shortener_resources()]


@pytest.mark.parametrize("name", HERE)
def test_a_picture_is_on_a_page_once(name: str) -> None:
    """In the page itself, so that its text has the colour of the page's."""
    line = f'<div>\n--8<-- "docs/images/{name}"\n</div>\n'
    assert [page.read_text("utf-8").count(line) for page in PAGES].count(1) == 1


@pytest.mark.parametrize("name", HERE)
def test_a_picture_says_what_it_shows_to_who_does_not_see_it(name: str) -> None:
    root = _parsed(IMAGES / name)
    labels = [root.find(f"{SVG}{kind}") for kind in ("title", "desc")]
    assert all(label is not None and label.text for label in labels)
    ids = [label.get("id") for label in labels if label is not None]
    assert (root.get("role"), root.get("aria-labelledby")) == ("img", " ".join(map(str, ids)))
    assert root.get("viewBox") is not None


def test_no_two_pictures_have_an_id_in_common() -> None:
    ids = [each.get("id") for name in HERE for each in _parsed(IMAGES / name).iter() if each.get("id")]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", HERE)
def test_a_picture_is_seen_on_white_and_on_dark(name: str) -> None:
    """Its texts and lines have the colour of the page's text, and all else stands out from both."""
    colours = set(re.findall(r'(?:fill|stroke)="([^"]+)"', (IMAGES / name).read_text("utf-8")))
    assert colours <= {"currentColor", "none", BLUE}
    assert _contrast(BLUE, "#ffffff") > 3
    assert _contrast(BLUE, "#1e2129") > 3


@pytest.mark.parametrize("name", PICTURES)
def test_nothing_in_a_picture_is_outside_of_it(name: str) -> None:
    """As far as numbers tell: texts are counted at six tenths of their height a letter."""
    root = _parsed(IMAGES / name)
    _, _, width, height = map(float, str(root.get("viewBox")).split())
    for each in root.iter(f"{SVG}rect"):
        x, y, wide, high = (float(str(each.get(key))) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + wide <= width
        assert 0 <= y <= y + high <= height
    for each in root.iter(f"{SVG}text"):
        x, y = (float(str(each.get(key))) for key in ("x", "y"))
        half = each.get("text-anchor") == "middle"
        assert x + len(str(each.text)) * 7.8 * (0.5 if half else 1) <= width
        assert y <= height


def test_in_a_graph_lines_cross_no_more_than_they_must() -> None:
    """Two that would cross in the order of declaration do not."""
    edges = [Edge("a", "d"), Edge("b", "c")]
    lines = re.findall(r"M([\d.]+) \S+ C\S+ \S+ \S+ \S+ ([\d.]+)", draw("g", "g", list("abcd"), edges))
    (a, d), (b, c) = ((float(start), float(end)) for start, end in lines)
    assert (a < b) == (d < c)


def _parsed(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_text("utf-8"))


def _contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it."""
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
