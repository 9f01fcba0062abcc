"""The site in a real browser: nothing from elsewhere, errors that are found, both schemes, phones."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from .pages import DOCS, ROOT, entries, sections

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
FLAGS = [
    *("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
SCHEMES = ["light", "dark"]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a warning."""
    made = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(made)]
    done = subprocess.run(
        build,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return made


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002


@pytest.fixture(scope="session")
def served(site: Path) -> Iterator[str]:
    """The address of the site."""
    handler = functools.partial(_Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or what stands for it."""
    if not CHROMIUM:
        message = "no Chromium: as root on Debian, apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with sync_playwright() as playwright:
        flags = [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else FLAGS
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, served: str, **options: Any) -> Generator[tuple[Page, list[str]]]:
    """Open a page of its own; what goes wrong in it, and what it wants from elsewhere, is noted."""
    wrong: list[str] = []
    context = browser.new_context(**options)
    page = context.new_page()

    def elsewhere(route: Any) -> None:
        wrong.append(f"from elsewhere: {route.request.url}")
        route.abort()

    def failed(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # by leaving the page
            wrong.append(f"{request.failure}: {request.url}")

    def said(message: Any) -> None:
        if message.type in ("error", "warning"):
            wrong.append(message.text)

    def answered(response: Any) -> None:
        if response.status >= 400:
            wrong.append(f"{response.status}: {response.url}")

    page.on("console", said)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", failed)
    page.on("response", answered)
    page.route(lambda url: not url.startswith((served, "file:", "data:", "blob:")), elsewhere)
    yield page, wrong
    context.close()


Opens = Callable[..., Any]


@pytest.fixture
def opens(browser: Browser, served: str) -> Opens:
    """A page of its own, in which nothing goes wrong."""

    @contextmanager
    def opens(**options: Any) -> Generator[Page]:
        with opened(browser, served, **options) as (page, wrong):
            yield page
        assert wrong == []

    return opens


@dataclass
class Visit:
    """What was seen of a page."""

    wrong: list[str]
    titles: int
    description: str
    width: int


@pytest.fixture(scope="session")
def visits(browser: Browser, served: str, site: Path) -> dict[str, Visit]:
    """Of every page, read at a desk and then on a phone."""
    seen: dict[str, Visit] = {}
    with opened(browser, served) as (page, wrong):
        for path in sorted(str(each.relative_to(site)) for each in site.rglob("*.html")):
            page.set_viewport_size({"width": 1280, "height": 800})
            page.goto(f"{served}/{path}", wait_until="load")
            titles = page.locator("h1").count()
            description = page.locator("meta[name=description]").get_attribute("content")
            page.set_viewport_size({"width": 360, "height": 740})
            width: int = page.evaluate("document.scrollingElement.scrollWidth")
            seen[path] = Visit([*wrong], titles, description or "", width)
            wrong.clear()
    assert len(seen) > 20
    return seen


def test_every_page_loads_and_wants_nothing_from_elsewhere(visits: dict[str, Visit]) -> None:
    """No error in the console, no missing file, no other host."""
    assert {path: visit.wrong for path, visit in visits.items() if visit.wrong} == {}


def test_every_page_has_its_own_title_and_description(visits: dict[str, Visit]) -> None:
    assert {path for path, visit in visits.items() if visit.titles != 1} == set()
    told = [visit.description for path, visit in visits.items() if path != "404.html"]
    assert len(set(told)) == len(told)


def test_no_page_is_wider_than_a_phone(visits: dict[str, Visit]) -> None:
    """Tables and code scroll in themselves."""
    assert {path: visit.width for path, visit in visits.items() if visit.width > 360} == {}


# -- colours -------------------------------------------------------------------------------------------

CONTRASTS = """
() => {
  const rgb = text => {
    const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true})
    context.fillStyle = text
    context.fillRect(0, 0, 1, 1)
    return [...context.getImageData(0, 0, 1, 1).data]
  }
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
  const over = (top, below) => top.slice(0, 3)
    .map((v, i) => v * top[3] / 255 + below[i] * (1 - top[3] / 255)).concat(255)
  const behind = element => {
    const layers = []
    for (let at = element; at; at = at.parentElement)
      layers.push(rgb(getComputedStyle(at).backgroundColor))
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 255])
  }
  const found = {}
  for (const selector of ["article p", "article li", "article td", "article pre code", "article p a",
                          "article h2", "article p code", "nav.md-nav--primary a"]) {
    const element = document.querySelector(selector)
    if (!element) continue
    const below = behind(element), text = over(rgb(getComputedStyle(element).color), below)
    const [a, b] = [light(text), light(below)].sort((x, y) => y - x)
    found[selector] = (a + 0.05) / (b + 0.05)
  }
  return found
}
"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_stands_out_in_both_schemes(opens: Opens, served: str, scheme: Any) -> None:
    """By the reader's own setting; 4.5 is what WCAG asks of text, 3 of links that are underlined."""
    with opens(color_scheme=scheme) as page:
        for path in ("index.html", "tutorial.html", "errors.html", "benchmarks.html"):
            page.goto(f"{served}/{path}", wait_until="load")
            found = page.evaluate(CONTRASTS)
            assert {"article p", "article p code"} <= set(found)
            assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}, path


def test_the_scheme_can_be_chosen_and_stays(opens: Opens, served: str) -> None:
    def scheme(page: Page) -> str | None:
        return page.locator("body").get_attribute("data-md-color-scheme")

    with opens(color_scheme="light") as page:
        page.goto(f"{served}/index.html", wait_until="load")
        assert scheme(page) == "default"
        page.locator("label[for=__palette_1]").click()
        assert scheme(page) == "slate"
        page.goto(f"{served}/tutorial.html", wait_until="load")
        assert scheme(page) == "slate"


# -- search --------------------------------------------------------------------------------------------


def headings() -> list[tuple[str, str]]:
    """Return the messages in the headings of both pages of errors, each with its page."""
    found: list[tuple[str, str]] = []
    for page in (DOCS / "errors.md", DOCS / "errors-of-drivers.md"):
        for text in sections(page).values():
            found += [(message, page.stem) for named, _ in entries(text) for message in named]
    return found


def found(page: Page, message: str) -> list[str]:
    """Return the three pages that are found first when a message is pasted."""
    page.locator("[data-md-component=search-query]").fill("")
    results = page.locator(".md-search-result__meta")
    page.wait_for_function("!/[0-9]/.test(document.querySelector('.md-search-result__meta').innerText)")
    page.keyboard.insert_text(message)
    page.wait_for_function(
        "/matching|No/.test(document.querySelector('.md-search-result__meta').innerText)"
    )
    if "No" in results.inner_text():
        return []
    pages = page.locator(".md-search-result__item")  # whose first link is that of the best section
    links = [pages.nth(at).locator("a").first for at in range(min(3, pages.count()))]
    return [str(link.get_attribute("href")) for link in links]


def page_in(link: str) -> str:
    """Return the name of a link's page."""
    return Path(urlsplit(link).path).stem


def searching(page: Page, address: str) -> None:
    """Open the search by its key."""
    page.goto(address, wait_until="load")
    page.keyboard.press("/")
    page.wait_for_function(
        "document.activeElement.dataset.mdComponent === 'search-query'"
        " && document.querySelector('.md-search-result__meta').innerText.includes('Type')"
    )


def test_pasted_errors_are_found(opens: Opens, served: str) -> None:
    """The page of each is among the first three, and nearly always the first."""
    lost: list[tuple[str, list[str]]] = []
    first = 0
    messages = headings()
    with opens() as page:
        searching(page, f"{served}/index.html")
        for message, page_of in messages:
            links = [page_in(link) for link in found(page, message.replace("…", "shop"))]
            first += links[:1] == [page_of]
            if page_of not in links:
                lost.append((message, links))
    assert lost == []
    assert first / len(messages) > 0.95


@pytest.mark.parametrize(
    ("message", "page_of"),
    [
        ("RuntimeError: Event loop is closed", "event-loop-is-closed"),
        ("got Future <Future pending> attached to a different loop", "errors-of-drivers"),
        (
            "asyncpg.InterfaceError: cannot perform operation: another operation is in progress",
            "errors-of-drivers",
        ),
        (
            "operations are not permitted (Background on this error at: https://sqlalche.me/e/20/isce)",
            "errors-of-drivers",
        ),
        (
            "lifekit.StartupError: api did not start: engine and cache failed (2 sub-exceptions)",
            "errors",
        ),
        (
            "NotOpenError: db (shop/resources.py:12) is not open: no lifespan of 'shop' runs here.",
            "errors",
        ),
        ("lifekit.DeadlineError: db (shop/resources.py:12): close took longer than 10 s", "errors"),
        (
            "ConnectionRefusedError: [Errno 111] Connect call failed ('127.0.0.1', 5432)",
            "errors-of-drivers",
        ),
    ],
)
def test_a_whole_line_of_a_traceback_finds_its_page_first(
    opens: Opens, served: str, message: str, page_of: str
) -> None:
    with opens() as page:
        searching(page, f"{served}/tutorial.html")
        assert page_in(found(page, message)[0]) == page_of


def test_the_site_can_be_read_and_searched_from_files(opens: Opens, site: Path) -> None:
    with opens() as page:
        searching(page, (site / "index.html").as_uri())
        links = found(page, "Event loop is closed")
        assert any("event-loop-is-closed" in link for link in links)
        page.goto(links[0], wait_until="load")
        assert page.locator("h1").count() == 1
