"""The HTML report: its text, and what a browser shows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import BROWSER, look, printed, screenshot
from export_models import images, small_net
from hostile_texts import HOSTILE
from report_contents import LONG, NASTY, content, frozen, module, output

from sn_export import export_onnx
from sn_export.reporting import as_content, collect_file_facts, save_report, to_html, to_markdown

needs_browser = pytest.mark.skipif(
    BROWSER is None,
    reason="no Chromium on PATH, and scripts/test could not install it (Debian: apt-get install "
    "chromium, which it does as root)",
)
VOID = {"meta", "br", "wbr", "img", "link"}


class _Page(HTMLParser):
    """Parses a page; fails if an element is not closed in its place."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("passed", [True, False])
def test_the_page_stands_alone(passed: bool) -> None:
    """The page has no script, no link and no address, and closes every element."""
    page = to_html(content(passed))
    parsed = _Page(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert not {"src", "href", "style"} & {name for name, _ in parsed.attributes}
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "://" not in page and "url(" not in page and "@import" not in page
    assert page.startswith("<!DOCTYPE html>")


def test_ids_are_unique_and_charts_have_names() -> None:
    """No id is used twice, and every drawing has a name for screen readers."""
    parsed = _Page(to_html(content(False)))
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    labels = [v for n, v in parsed.attributes if n == "aria-labelledby" and v]
    assert {one for label in labels for one in label.split()} <= set(ids)
    assert parsed.attributes.count(("role", "img")) == 4  # sigma, two histograms, modules


@pytest.mark.parametrize("passed", [True, False])
def test_names_are_only_text(passed: bool) -> None:
    """A name that is markup adds no element, wherever it is shown."""
    wild, tame = (_Page(to_html(content(passed, name))) for name in (NASTY, LONG))
    assert wild.tags == tame.tags
    assert any(NASTY.splitlines()[0] in text for text in wild.texts)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("write", [to_html, to_markdown])
@pytest.mark.parametrize("passed", [True, False])
def test_nothing_unprintable_in_a_page(
    passed: bool, write: Callable[[Any], str], kind: str, tmp_path: Path
) -> None:
    """Control characters, bidirectional marks and lone surrogates are escaped everywhere."""
    text = HOSTILE[kind]
    given = content(
        passed,
        text,
        notes=[text],
        attempts=[{"exporter": "dynamo", "error": text}],
        versions={text: text},
    )
    given["files"] = {text: {"bytes": 1, "sha256": text}}
    given["frozen"].append(frozen(text, kind=text, dtype=text))
    page = write(given)
    assert all(line.isprintable() for line in page.split("\n"))
    tame = write(json.loads(json.dumps(given).replace(json.dumps(text)[1:-1], "tame")))
    assert page.count("\n") == tame.count("\n")
    suffix = ".html" if write is to_html else ".md"
    save_report(given, tmp_path / f"r{suffix}")
    assert (tmp_path / f"r{suffix}").read_bytes() == page.encode()


def test_verdict_comes_first() -> None:
    """Before any number the page says whether the file is proved, and why not."""
    good, bad = (to_html(content(passed)) for passed in (True, False))
    assert "Proved: both outputs are within tolerance on 6 input sets" in good
    assert "Not proved: 1 of 2 outputs is outside tolerance on 6 input sets" in bad
    assert bad.index("49 of 3136 elements") < bad.index("<h2")
    assert f"The first module to differ is &#39;{LONG}&#39; (Conv2d), max_abs 0.02." in bad


def test_the_comparison_alone() -> None:
    """The page of a ParityReport has its outputs, and no part about a file or frozen layers."""
    for given in (content()["parity"], {"parity": content()["parity"]}):
        page = to_html(given)
        assert "Proved: both" in page and "histogram-" in page
        assert "sha256" not in page and "Frozen" not in page and "No file was published" not in page


@pytest.mark.parametrize("passed", [True, False])
def test_model_target_and_inputs(passed: bool) -> None:
    """The page of a failure names model and target too, and the dimensions of inputs that vary."""
    page = to_html(content(passed, "image"))
    assert '<h1>sn_export · <span class="name">Critic</span>' in page
    assert ("critic.onnx, which was not written" in page) is not passed
    table = page.split('<h2 id="inputs">')[1].split("</table>")[0]
    cells = re.findall(r"<t[dh][^>]*>(?:<span[^>]*>)?([^<]*)", table.split("<tbody>")[1])
    assert cells[:4] == ["image", "float32", "batch × 3 × 64 × 64", "0: batch"]
    assert cells[4:] == ["noise", "int64", "scalar", "none"]


def test_no_table_is_repeated_as_metadata() -> None:
    """Sigma and versions, which have tables, are not repeated among the metadata."""
    own = {"sn_export.exporter": "dynamo", "run": "42"}
    repeated = {"sn_export.frozen": '{"a": 1.25}', "sn_export.versions": '{"torch": "2"}'}
    page = to_html(content(metadata={**own, **repeated}))
    assert "sn_<wbr>export.<wbr>exporter" in page  # a key breaks where a word of it ends
    page = page.replace("<wbr>", "")
    assert all(key in page for key in own)
    assert not any(key in page for key in repeated)


def test_modules_that_were_not_compared() -> None:
    """If modules were not compared, the page has no part about them."""
    given = content()
    given["parity"]["modules"] = []
    assert "Modules" not in to_html(given)


@pytest.mark.parametrize("exact", [True, False])
def test_sigma_is_shown_where_there_is_one(exact: bool) -> None:
    """A column without values is left out."""
    norm = {name: frozen("a")[name] for name in ("module", "tensor", "shape", "dtype")}
    weight_norm = {**norm, "kind": "weight_norm", "is_applied": True}
    page = to_html(content(frozen=[weight_norm]))
    assert "sigma" not in page.split("<body>")[1]
    assert "the computed value of 1 tensor under another reparametrization" in page
    page = to_html(content(frozen=[weight_norm, frozen("b", sigma_exact=1.26 if exact else None)]))
    assert "W / sigma of 1 tensor," in page
    assert ("sigma true" in page) is ("deviation" in page) is exact
    assert page.count("<tr>") == page.count("</tr>")


def test_attempts_and_folding_are_told() -> None:
    """The page says which exporter was tried before, and what was folded."""
    page = to_html(
        content(
            attempts=[{"exporter": "dynamo", "error": "no 5-D pixel_shuffle"}],
            folded=[{"name": "body.weight", "nodes": 7}],
        )
    )
    assert "exporter: dynamo, error: no 5-D pixel_shuffle" in page
    assert "name: body.weight, nodes: 7" in page


@pytest.mark.parametrize(
    "values",
    [
        {"max_abs": None, "max_rel": "inf", "mean_abs": "-inf", "passed": False},
        {"shape": [], "worst_index": [], "atol": 0.0},
        {"histogram": None},
        {"histogram": {"edges": [1e-3, 1e-2], "counts": [0], "zeros": 0, "not_finite": 7}},
        {"atol": 1e9},
    ],
    ids=["not finite", "scalar", "no histogram", "only NaN", "wide"],
)
def test_unusual_outputs(values: dict[str, Any]) -> None:
    """The report of a failure takes NaN, infinity, scalars and empty parts."""
    given = content()
    given["parity"]["outputs"] = [output(**values)]
    _Page(to_html(given))


@pytest.mark.parametrize("error", [0.0, None, "inf", 1e-300, 1e300])
@pytest.mark.parametrize("sigma", [0.0, None, "inf", 1e-30, 1e30])
def test_unusual_charts(error: Any, sigma: Any) -> None:
    """Bars stay within the chart for any number."""
    given = content()
    given["parity"]["modules"] = [module("a", max_abs=error), module("b")]
    given["frozen"] = [frozen("a", sigma=sigma), frozen("b", sigma_exact=sigma)]
    page = to_html(given)
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([^"]*)%"', page)]
    assert widths and all(0 <= width <= 100 for width in widths)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "a report or its JSON content, got int"),
        ({"a": 1}, r"'parity' or 'outputs', got the keys \['a'\]"),
    ],
)
def test_what_is_no_report(given: Any, message: str) -> None:
    """A value that is no report is refused with the type or keys found."""
    with pytest.raises(TypeError, match=message):
        to_html(given)


@pytest.mark.parametrize("write", [to_html, to_markdown])
@pytest.mark.parametrize("key", ["max_abs", "reason", "passed"])
def test_what_is_missing_is_named(key: str, write: Callable[[Any], str]) -> None:
    """A key that is missing in the content is named."""
    given = content()
    del given["parity"]["outputs"][0][key]
    with pytest.raises(ValueError, match=f"not the content of a report: .*'{key}'"):
        write(given)


def test_saving(tmp_path: Path) -> None:
    """A real report is saved in three formats with the hash of the file; nothing else is left."""
    report = export_onnx(
        small_net("hook"), images(), tmp_path / "net.onnx", exporter="torchscript", sigma_exact=True
    )
    for suffix in (".json", ".html", ".md"):
        assert report.save(tmp_path / f"report{suffix}", command="make it").suffix == suffix
    found = json.loads((tmp_path / "report.json").read_text())
    digest = found["files"]["net.onnx"]["sha256"]
    assert found["files"]["net.onnx"]["bytes"] == (tmp_path / "net.onnx").stat().st_size
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert digest in text and "make it" in text and found["versions"]["torch"] in text
    # The JSON alone gives the same page.
    assert to_html(found) == (tmp_path / "report.html").read_text(encoding="utf-8")
    assert as_content(report.parity)["parity"] == as_content(report)["parity"]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("external", [True, False])
def test_hash_of_external_data(tmp_path: Path, external: bool) -> None:
    """Data beside the file are hashed if the file names them, not if an old export did."""
    path = tmp_path / "net.onnx"
    (tmp_path / "net.onnx.data").write_bytes(b"old")
    export_onnx(
        small_net("hook"), images(), path, exporter="torchscript", external_data=external, samples=0
    )
    facts = collect_file_facts(path)
    assert list(facts) == (["net.onnx", "net.onnx.data"] if external else ["net.onnx"])
    for name, found in facts.items():
        data = (tmp_path / name).read_bytes()
        assert found == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert collect_file_facts(tmp_path / "nothing.onnx") == {}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("report.pdf", ValueError, r"must end in one of .json, .html, .md, got '.*report.pdf'"),
        ("nowhere/report.md", FileNotFoundError, "no folder '.*nowhere'"),
        ("folder.md", IsADirectoryError, "it is a folder"),
    ],
)
def test_saving_where_it_cannot_be(
    tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    """A place that cannot be written ends in one clear error, and no file."""
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(error, match=message):
        save_report(content(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.md"]


def test_saving_to_what_is_no_path() -> None:
    """A value that is no path is refused."""
    with pytest.raises(TypeError, match="path must be the path of a file, got None"):
        save_report(content(), None)  # type: ignore[arg-type]


@needs_browser
@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
def test_in_a_browser(tmp_path: Path, passed: bool, dark: bool, width: int) -> None:
    """On phone and desk, light and dark, everything is there, readable and within the width."""
    seen = look(to_html(content(passed)), tmp_path, width, dark)
    assert seen["width"] <= width
    assert seen["cut"] == []
    assert seen["poor"] == []  # contrast of text below 4.5
    assert seen["small"] == 0
    dark_page = sum(int(v) for v in re.findall(r"\d+", seen["background"])[:3]) < 200
    assert dark_page is dark
    verdict = "✓ Proved: both" if passed else "✗ Not proved: 1 of 2"
    assert 0 <= seen["text"].index(verdict) < seen["text"].index("Outputs")
    for text in ("5.96e-07", "1.25", "1.2625", "−0.99 %", "torch", "2.13.0+cpu", "9f86d081" * 8):
        assert text in seen["text"] or text in seen["drawn"], text
    drawn = [bar for bar in seen["bars"] if bar["width"] > 2]
    assert {"stored", "exact", "zero", "value"} <= {bar["kind"] for bar in drawn}
    assert ("wrong" in {bar["kind"] for bar in drawn}) is not passed
    assert ("✗ first outside" in seen["drawn"]) is not passed
    fills = {bar["kind"]: bar["fill"] for bar in drawn}
    assert len({fills["stored"], fills["exact"], fills["zero"]}) == 3


@needs_browser
def test_names_do_nothing_in_a_browser(tmp_path: Path) -> None:
    """A browser shows names that are markup as text."""
    seen = look(to_html(content(False, NASTY)), tmp_path, 360)
    assert "owned" not in seen["title"]
    assert "<script>document.title='owned'</script>" in seen["text"]
    assert seen["width"] <= 360


@needs_browser
def test_many_modules_in_a_browser(tmp_path: Path) -> None:
    """With 300 modules the chart has one bar for each, in order, and the long table is closed."""
    given = content(False)
    given["parity"]["modules"] = [module(f"m{i}", i < 200) for i in range(300)]
    given["parity"]["first_divergent"] = "m200"
    seen = look(to_html(given), tmp_path, 360)
    names = [text for text in seen["drawn"] if text.endswith("· Conv2d")]
    assert names == [f"m{i} · Conv2d" for i in range(300)]
    assert seen["drawn"].count("✗ first outside") == 1
    assert "m299\n" not in seen["text"]


@pytest.mark.parametrize("sigma", [None, "inf", 0.0])
def test_many_sigmas_that_are_no_numbers(sigma: Any) -> None:
    """The overview takes sigma that is NaN or infinite."""
    for exact in (None, "inf", 0.0, 1.0):
        many = [frozen(f"m{i}", sigma=sigma, sigma_exact=exact) for i in range(30)]
        _Page(to_html(content(frozen=many)))


@pytest.mark.parametrize("count", [20, 21, 60])
@pytest.mark.parametrize("exact", [None, 1.5])
def test_many_rows_have_an_overview(count: int, exact: float | None) -> None:
    """Past 20 layers or modules the charts are closed, and an overview and the worst are shown."""
    given = content(False)
    given["frozen"] = [frozen(f"m{i}", sigma=1 + i / 100, sigma_exact=exact) for i in range(count)]
    given["parity"]["modules"] = [module(f"m{i}", i != 7) for i in range(count)]
    given["parity"]["first_divergent"] = "m7"
    page = to_html(given)
    _Page(page)
    is_long = count > 20
    assert (page.count("one by one</summary>") == 2) is is_long
    assert ("Largest error: m7, 0.02." in page) is is_long
    worst = (
        f"Largest sigma: m{count - 1}.weight" if exact is None else "true sigma: m0.weight, −33 %"
    )
    assert (worst in page) is is_long


@needs_browser
def test_sixty_layers_make_a_short_page(tmp_path: Path) -> None:
    """Sixty frozen layers and modules take no more than a few screens."""
    given = content()
    given["frozen"] = [frozen(f"blocks.{i}.conv") for i in range(60)]
    given["parity"]["modules"] = [module(f"blocks.{i}.conv") for i in range(60)]
    seen = look(to_html(given), tmp_path)
    assert seen["height"] < 3000
    assert seen["cut"] == []


@needs_browser
def test_a_phone_shows_the_end_of_a_long_path(tmp_path: Path) -> None:
    """On a phone paths that begin alike can be told apart, and scales lose no digit."""
    given = content(False)
    path = "discriminator_blocks_with_long_names"
    given["parity"]["modules"] = [module(f"{path}.{i}.0", i < 4) for i in range(9)]
    seen = look(to_html(given), tmp_path, 360)
    assert f"{path}.8.0 · Conv2d" in seen["drawn"]
    assert seen["cut"] == []


@needs_browser
def test_picture_and_print(tmp_path: Path) -> None:
    """The page can be drawn and printed, and in print the closed tables are open."""
    given = content()
    assert screenshot(to_html(given), tmp_path).startswith(b"\x89PNG")
    short = printed(to_html(given), tmp_path)
    assert short.startswith(b"%PDF")
    given["frozen"] = [frozen(f"m{i}") for i in range(40)]
    opened = printed(to_html(given), tmp_path).count(b"/Type /Page\n")
    page = to_html(given).replace("details::details-content", "details::none")
    assert opened > printed(page, tmp_path).count(b"/Type /Page\n") > 0
