"""The pages in a real browser: no request, no failure, and all of it works from the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, Browser
from report_run import build_run
from test_report_page import KINDS, pages

from recover.report.collect import collect
from recover.report.render import render

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# Every text on the page against the first opaque ground behind it.
CONTRAST = """(() => {
  const parse = (text) => { const m = text.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => [r, g, b].map((v) => linear(v / 255))
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const worst = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (element.closest("script, .skip")) continue;
    const style = getComputedStyle(element);
    const ink = parse(element.closest("svg") ? style.fill : style.color);
    let ground = element;
    while (ground && parse(getComputedStyle(ground).backgroundColor)[3] < 1) ground = ground.parentElement;
    const back = ground ? parse(getComputedStyle(ground).backgroundColor) : [255, 255, 255, 1];
    const [low, high] = [light(ink), light(back)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5 && ink[3] === 1) worst.push(`${ratio.toFixed(2)} ${element.outerHTML.slice(0, 80)}`);
  }
  return [...new Set(worst)];
})()"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in KINDS}
    for name, text in pages(folder / "made").items():
        paths[name].write_text(text, encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


def test_tables_are_sorted_from_the_keyboard(browser: Browser, files: dict[str, Path]) -> None:
    browser.open(files["report"])
    assert browser.console == [] and browser.requests == [files["report"].absolute().as_uri()]
    table = "document.querySelector('#table-last-layer table')"
    column = f"[...{table}.tBodies[0].rows].map(row => row.cells[1].textContent)"
    browser.evaluate(f"{table}.closest('.scroll').focus()")
    for _ in range(2):  # the first heading, then the second
        browser.press("Tab")
    assert browser.evaluate("document.activeElement.closest('th').textContent").startswith("pruned, mean")
    head = f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')"
    assert browser.evaluate(head) == "none"
    orders = []
    for key, said in (("Enter", "ascending"), (" ", "descending")):
        browser.press(key)
        assert browser.evaluate(head) == said
        cells = browser.evaluate(column)
        orders.append([float(cell.removesuffix("%")) / (100 if "%" in cell else 1) for cell in cells])
    raw = [[float(cell.removesuffix("%")) for cell in browser.evaluate(column)]]
    assert raw[0] == sorted(raw[0], reverse=True) and orders[0] == orders[1][::-1]
    assert browser.evaluate(f"{table}.tHead.querySelectorAll('[aria-sort=none]').length") == 6


@pytest.mark.parametrize(
    ("cells", "ascending"),
    [
        (["12,346", "2.4×10⁻⁷", "0.01", "not measured", "7"], ["2.4×10⁻⁷", "0.01", "7", "12,346", "not measured"]),
        (["×1.27 [1.2, 1.3]", "–", "×0.98"], ["×0.98", "×1.27 [1.2, 1.3]", "–"]),
        (["190k", "1.2M", "950"], ["950", "190k", "1.2M"]),
        (["6.35 MB", "900 kB", "1.1 GB"], ["900 kB", "6.35 MB", "1.1 GB"]),
        (["block 10", "block 9"], ["block 9", "block 10"]),
    ],
)
def test_figures_are_sorted_as_numbers_as_they_are_worded(
    browser: Browser, files: dict[str, Path], cells: list[str], ascending: list[str]
) -> None:
    if browser.evaluate("location.href") != files["comparison"].absolute().as_uri():
        browser.open(files["comparison"])
    body = "".join(f"<tr><td>{cell}</td></tr>" for cell in cells)
    table = "document.querySelector('table.sortable')"
    found = []
    browser.evaluate(f"{table}.tHead.rows[0].cells[0].setAttribute('aria-sort', 'none')")
    for _ in range(2):
        browser.evaluate(f"{table}.tBodies[0].innerHTML = `{body}`")
        browser.evaluate(f"{table}.tHead.querySelector('button').click()")
        found.append(browser.evaluate(f"[...{table}.tBodies[0].rows].map(row => row.cells[0].textContent)"))
    assert found[0] == ascending
    figures = [cell for cell in ascending if cell not in ("–", "not measured")]
    assert found[1] == figures[::-1] + ascending[len(figures) :]  # what is absent stays last


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 780, 1100])
def test_pages_are_quiet_legible_and_fit(
    browser: Browser, files: dict[str, Path], kind: str, width: int, dark: bool
) -> None:
    browser.open(files[kind], width=width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert browser.console == [] and browser.requests == [files[kind].absolute().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 26)" if dark else "rgb(252, 251, 249)"
    )
    assert browser.evaluate(CONTRAST) == []
    wide = browser.evaluate("[...document.querySelectorAll('.plot')].filter(plot => plot.checkVisibility()).length")
    assert wide == browser.evaluate("document.querySelectorAll('figure').length")  # one of the two drawings of each


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_screen_reader_is_told_every_name(browser: Browser, files: dict[str, Path], kind: str) -> None:
    browser.open(files[kind])
    nodes = browser.tree()
    for role in ("image", "table", "columnheader", "rowheader", "region", "link", "button", "heading"):
        named = [node["name"] for node in nodes if node["role"] == role]
        assert all(name.strip() for name in named), role
    assert {"main", "image", "table", "heading"} <= {node["role"] for node in nodes}


@pytest.mark.slow
def test_the_theme_is_switched_and_the_page_printed_light(browser: Browser, files: dict[str, Path]) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    browser.open(files["report"], dark=True)
    assert browser.evaluate("document.getElementById('theme').textContent") == "Light"
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate(ground) == "rgb(252, 251, 249)"
    browser.evaluate("localStorage.clear()")
    browser.open(files["report"], dark=True, media="print")
    assert browser.evaluate(ground) == "rgb(255, 255, 255)"
    assert not browser.evaluate("document.querySelector('nav').checkVisibility()")
    assert browser.evaluate(CONTRAST) == []


@pytest.mark.slow
def test_a_hostile_model_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    from report_page import rewrite

    run = build_run(tmp_path)

    def poison(record: dict) -> None:
        for sample in record["tasks"]["sums"]["samples"]:
            sample |= {"text": "</pre><img src=//example.org/x onerror=window.hit=1><script>window.hit=1</script>"}

    rewrite(run / "after/measure.json", poison)
    page = render(run, collect(run))[2]
    browser.open(page)
    assert browser.evaluate("window.hit === undefined") and browser.requests == [page.absolute().as_uri()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [390, 700, 1100])
def test_no_figure_cuts_a_word_off(browser: Browser, files: dict[str, Path], kind: str, width: int) -> None:
    browser.open(files[kind], width=width)
    cut = browser.evaluate("""[...document.querySelectorAll("svg text")].filter((text) => {
      const [word, figure] = [text, text.closest("svg")].map((each) => each.getBoundingClientRect());
      return word.width && (word.right > figure.right + 1 || word.left < figure.left - 1);
    }).map((text) => text.textContent)""")
    assert cut == []


GAPS = """[...document.querySelectorAll('.cards + p, .scroll + p')].map(
    each => each.getBoundingClientRect().top - each.previousElementSibling.getBoundingClientRect().bottom)"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1280, 390])
def test_what_stands_below_a_table_or_the_cards_keeps_away_from_them(
    browser: Browser, files: dict[str, Path], kind: str, width: int
) -> None:
    browser.open(files[kind], width=width)
    gaps = browser.evaluate(GAPS)
    assert all(gap >= 12 for gap in gaps), gaps
