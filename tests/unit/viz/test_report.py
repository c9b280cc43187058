from __future__ import annotations

import html
import math
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stego_core.errors import ConfigError, ShapeError
from stego_core.masks.palette import cluster_colors, color_hex
from stego_core.viz.confusion import ConfusionFacts
from stego_core.viz.curve import scale_curve
from stego_core.viz.report import Failure, ReportFacts, ReportImage
from stego_core.viz.report import write_report as write_to_uri

NAMES = ["sky", "grass", "water", "rock"]
COLORS = cluster_colors(4)
HOSTILE = "<img src=x onerror=alert(1)>\"'&<script>alert(2)</script>../../up.jpg"
VOID = {"img", "meta", "polyline"}


class Page(HTMLParser):
    """The elements and the visible text of a page; checks that every element is closed."""

    def __init__(self, index: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(index.read_text("utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, {key: value or "" for key, value in attrs})
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self._open[-1][0] != "style":
            self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def image(name: str = "a.jpg", seed: int = 0, size: tuple[int, int] = (60, 80)) -> ReportImage:
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, 3, (3, 4)), np.ones((5, 5), dtype=int)).astype(np.uint8)
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    ids, counts = np.unique(labels, return_counts=True)
    shares = {int(k): float(n) / labels.size for k, n in zip(ids, counts, strict=True)}
    return ReportImage(name, pixels, labels, shares)


def facts(**changes: object) -> ReportFacts:
    values: dict[str, object] = {
        "title": "Segmentation of photos",
        "rows": [("backbone", "tiny-vit"), ("seconds", "12.5")],
        "metrics": {"eval/cluster/miou": 0.2734, "eval/linear/miou": math.nan},
        "quarantine": [("bad.jpg", "truncated", "12 bytes missing")],
        "curves": {"loss/total": [(0, 1.0), (10, 0.5), (20, 0.25)]},
        "query": "SELECT count(*) FROM 'masks/part-*.parquet' WHERE share > 0.2;",
    }
    return ReportFacts(**{**values, **changes})  # type: ignore[arg-type]


def write_report(folder: Path, *rest: Any) -> Path:
    return Path(write_to_uri(str(folder), *rest))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_image_of_the_page_exists_and_every_file_is_shown(tmp_path: Path):
    index = write_report(tmp_path, [image(seed=s) for s in range(3)], facts(), NAMES, COLORS)
    assert index == tmp_path / "index.html"
    sources = {attributes["src"] for attributes in Page(index).all("img")}
    assert sources == set(files_of(tmp_path)) - {"index.html"}
    for source in sources:
        with Image.open(tmp_path / source) as opened:
            opened.load()
            assert opened.format == ("PNG" if source.endswith(".png") else "JPEG")


def test_the_page_loads_nothing_from_elsewhere_and_says_so_in_its_policy(tmp_path: Path):
    page = Page(write_report(tmp_path, [image()], facts(), NAMES, COLORS))
    policies = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert policies[0]["content"].startswith(
        "default-src 'none'; img-src 'self' data: file:; style-src 'unsafe-inline'"
    )
    assert "script-src" not in policies[0]["content"]
    for tag in ("script", "link", "iframe", "object", "base"):
        assert page.all(tag) == []
    for _, attributes in page.elements:
        for key in ("src", "href", "srcset", "data", "action"):
            assert "//" not in attributes.get(key, "")
    style = (tmp_path / "index.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_every_link_leads_to_a_place_on_the_page(tmp_path: Path):
    page = Page(write_report(tmp_path, [image(), image()], facts(), NAMES, COLORS))
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    links = {attributes["href"] for attributes in page.all("a")}
    assert links
    assert links <= {f"#{each}" for each in ids}


def test_hostile_names_are_shown_as_text_wherever_they_stand(tmp_path: Path):
    hostile = facts(
        title=HOSTILE,
        rows=[(HOSTILE, HOSTILE)],
        metrics={HOSTILE: 1.0},
        quarantine=[(HOSTILE, HOSTILE, HOSTILE)],
        curves={HOSTILE: [(0, 1.0)]},
        query=HOSTILE,
    )
    names = [HOSTILE] * 3 + ["unused " + HOSTILE]
    plain = Page(write_report(tmp_path / "plain", [image()], facts(), NAMES, COLORS))
    page = Page(write_report(tmp_path / "a" / "b", [image(HOSTILE)], hostile, names, COLORS))
    assert page.all("script") == []
    assert len(page.all("img")) == len(plain.all("img"))
    for _, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")]
    # Title twice, image once, 3 clusters in 3 legends, 2 in a row, metric, 3 in quarantine,
    # curve, query.
    assert page.texts.count(HOSTILE) == 2 + 1 + 3 * 3 + 2 + 1 + 3 + 1 + 1
    assert "unused " + HOSTILE in page.texts


def test_file_names_are_numbers_and_nothing_is_written_outside_the_folder(tmp_path: Path):
    folder = tmp_path / "a" / "report"
    names = ["../../up.jpg", "/etc/passwd", "x/y\\z\0.jpg", "bad\udcff.jpg", "a.jpg", "a.jpg"]
    index = write_report(folder, [image(name) for name in names], facts(), NAMES, COLORS)
    assert "bad\\udcff.jpg" in Page(index).texts
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    numbered = {
        f"{order:06d}-{kind}"
        for order in range(1, 7)
        for kind in ("image.jpg", "mask.png", "overlay.jpg")
    }
    crops = {f"cluster-{cluster:05d}-{rank}.jpg" for cluster in range(3) for rank in range(6)}
    assert written == numbered | crops | {"index.html"}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} <= set(folder.rglob("*"))


def test_a_cluster_has_one_color_in_mask_legend_bar_and_palette(tmp_path: Path):
    shown = image()
    index = write_report(tmp_path, [shown], facts(), NAMES, COLORS)
    with Image.open(tmp_path / "images" / "000001-mask.png") as mask:
        ids, rgb = np.asarray(mask), np.asarray(mask.convert("RGB"))
    for cluster in shown.shares:
        drawn = {tuple(color) for color in rgb[ids == cluster]}
        assert drawn == {tuple(COLORS[cluster])}
    text = index.read_text("utf-8")
    for cluster in shown.shares:
        row = f'style="background:{color_hex(COLORS[cluster])}"></i><bdi class="name">'
        assert text.count(row + NAMES[cluster] + "</bdi>") == 2
    assert f"<bdi>{NAMES[3]}</bdi>" in text.split("does not occur")[1]


def test_the_legends_state_shares_largest_first(tmp_path: Path):
    first = ReportImage("1", image().pixels, np.zeros((2, 2), int), {0: 0.25, 2: 0.75, 3: 0.0})
    second = ReportImage("2", image().pixels, np.zeros((2, 2), int), {0: 0.9, 2: 0.0002})
    page = Page(write_report(tmp_path, [first, second], facts(), NAMES, COLORS))
    note = "Image, mask and overlay; the share of each cluster beside them."
    assert page.texts[page.texts.index(note) + 1 :] == [
        *["1", "water", "75.0 %", "sky", "25.0 %"],
        *["2", "sky", "90.0 %", "water", "< 0.1 %"],
    ]
    overall = page.texts[page.texts.index("Grey pixels have no cluster.") - 6 :][:6]
    assert overall == ["sky", "57.5 %", "2 images", "water", "37.5 %", "2 images"]


def test_the_montage_has_the_sixteen_images_with_the_largest_share(tmp_path: Path):
    shares = [round((7 * n % 19 + 1) / 20, 2) for n in range(19)]  # of 19 images, in no order
    labels = np.array([[0, 1], [1, 1]])
    images = [ReportImage(f"{s}", image().pixels, labels, {0: s}) for s in shares]
    page = Page(write_report(tmp_path, images, facts(), NAMES, COLORS))
    alts = [a["alt"] for a in page.all("img") if "cluster-" in a["src"]]
    best = sorted(shares, reverse=True)[:16]
    assert alts == [f"sky in {share}" for share in best]


def test_the_least_confident_images_come_first(tmp_path: Path):
    known = {"a": 0.4, "b": None, "c": 0.123, "d": 0.4}
    images = [replace(image(), name=name, confidence=value) for name, value in known.items()]
    page = Page(write_report(tmp_path, images, facts(), NAMES, COLORS))
    assert [text for text in page.texts if text in known][:4] == ["c", "a", "d", "b"]
    told = [text for text in page.texts if text.startswith("Mean confidence")]
    assert told == ["Mean confidence 0.12.", "Mean confidence 0.40.", "Mean confidence 0.40."]


def test_a_montage_crop_shows_the_place_where_the_cluster_is(tmp_path: Path):
    pixels = np.zeros((90, 120, 3), dtype=np.uint8)
    pixels[60:90, 90:120] = (250, 120, 10)
    labels = np.zeros((9, 12), dtype=np.uint8)
    labels[6:, 9:] = 1
    shown = ReportImage("a", pixels, labels, {0: 11 / 12, 1: 1 / 12})
    write_report(tmp_path, [shown], facts(), NAMES, COLORS)
    with Image.open(tmp_path / "images" / "cluster-00001-0.jpg") as crop:
        middle = np.asarray(crop)[90, 90].astype(int)
    assert np.abs(middle - [250, 120, 10]).max() < 12  # JPEG


def test_facts_metrics_quarantine_and_query_are_on_the_page(tmp_path: Path):
    texts = Page(write_report(tmp_path, [image()], facts(), NAMES, COLORS)).texts
    assert texts[texts.index("backbone") + 1] == "tiny-vit"
    assert texts[texts.index("eval/cluster/miou") + 1] == "0.2734"
    assert texts[texts.index("eval/linear/miou") + 1] == "–"
    assert texts[texts.index("bad.jpg") + 1 :][:2] == ["truncated", "12 bytes missing"]
    assert facts().query in texts


def test_a_long_quarantine_is_cut_and_says_so(tmp_path: Path):
    rows = [(f"bad-{number}.jpg", "empty", "") for number in range(1234)]
    texts = Page(write_report(tmp_path, [], facts(quarantine=rows), NAMES, COLORS)).texts
    assert len([text for text in texts if text.startswith("bad-")]) == 500
    assert any("The first 500 of 1\u202f234" in text for text in texts)


def test_a_curve_runs_from_corner_to_corner_and_breaks_where_a_value_is_missing(tmp_path: Path):
    points = [(20, 0.0), (0, 4.0), (5, 2.0), (10, math.nan), (15, math.inf)]
    page = Page(write_report(tmp_path, [], facts(curves={"loss": points}), NAMES, COLORS))
    assert [p["points"] for p in page.all("polyline")] == ["0.0,0.0 75.0,45.0", "300.0,90.0"]


@pytest.mark.parametrize("points", [[], [(3, math.nan)], [(3, 1.0)], [(0, 2.0), (9, 2.0)]])
def test_a_curve_with_nothing_to_scale_by_is_still_drawn(tmp_path: Path, points):
    page = Page(write_report(tmp_path, [], facts(curves={"loss": points}), NAMES, COLORS))
    assert len(page.all("svg")) == 1
    drawn = " ".join(p["points"] for p in page.all("polyline"))
    assert "nan" not in drawn
    assert len(drawn.split()) == sum(math.isfinite(value) for _, value in points)


def test_a_long_curve_is_drawn_by_the_means_of_equal_runs(tmp_path: Path):
    points = [(step, float(step % 4)) for step in range(2000)]
    curve = scale_curve("loss", points)
    assert sum(len(line.split()) for line in curve.lines) == 500
    assert (curve.low, curve.high, curve.last) == (1.5, 1.5, 3.0)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    for name in ("one", "two"):
        images = [image(str(seed), seed, (300, 700)) for seed in range(3)]
        write_report(tmp_path / name, iter(images), facts(), NAMES, COLORS)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_second_report_leaves_no_files_of_the_first_and_keeps_those_of_others(tmp_path: Path):
    write_report(tmp_path, [image(seed=s) for s in range(3)], facts(), NAMES, COLORS)
    (tmp_path / "images" / "mine.jpg").write_bytes(b"x")
    write_report(tmp_path, [image()], facts(), NAMES, COLORS)
    write_report(tmp_path / "fresh", [image()], facts(), NAMES, COLORS)
    fresh = files_of(tmp_path / "fresh")
    shutil.rmtree(tmp_path / "fresh")
    assert files_of(tmp_path) == {**fresh, "images/mine.jpg": b"x"}


def test_a_report_without_images_is_a_page_with_the_facts(tmp_path: Path):
    index = write_report(tmp_path, [], facts(curves={}, metrics={}), NAMES, COLORS)
    page = Page(index)
    assert page.all("img") == []
    assert "No images" in page.texts
    assert "tiny-vit" in page.texts
    assert files_of(tmp_path).keys() == {"index.html"}


def test_a_report_of_nothing_at_all_can_be_written(tmp_path: Path):
    empty = ReportFacts("t", [], {}, [], {}, "")
    texts = Page(write_report(tmp_path, [], empty, [], cluster_colors(0))).texts
    assert "No image was put aside." in texts


def test_thumbnails_are_at_most_320_pixels_wide_and_state_their_size(tmp_path: Path):
    images = [image("w", 0, (200, 1000)), image("h", 1, (1500, 100)), image("s", 2, (8, 8))]
    page = Page(write_report(tmp_path, images, facts(), NAMES, COLORS))
    for attributes in page.all("img"):
        with Image.open(tmp_path / attributes["src"]) as opened:
            assert opened.size == (int(attributes["width"]), int(attributes["height"]))
            assert opened.size <= (320, 480)
        assert attributes["loading"] == "lazy"
    with Image.open(tmp_path / "images" / "000001-mask.png") as mask:
        assert mask.size == (320, 64)


def test_images_are_read_one_at_a_time(tmp_path: Path):
    living: list[weakref.ref[np.ndarray]] = []
    most = 0

    def stream() -> Iterator[ReportImage]:
        nonlocal most
        for seed in range(6):
            shown = image(str(seed), seed)
            living.append(weakref.ref(shown.pixels))
            most = max(most, sum(each() is not None for each in living))
            yield shown
            del shown

    write_report(tmp_path, stream(), facts(), NAMES, COLORS)
    assert most <= 2  # the one being made and the one that the loop still names


def test_more_clusters_than_a_palette_holds_work(tmp_path: Path):
    labels = np.array([[0, 299], [299, 299]], dtype=np.uint16)
    shown = ReportImage("a", image().pixels, labels, {0: 0.25, 299: 0.75})
    names = [f"c{number}" for number in range(300)]
    page = Page(write_report(tmp_path, [shown], facts(), names, cluster_colors(300)))
    assert "298 clusters do not occur" in page.texts
    with Image.open(tmp_path / "images" / "000001-mask.png") as mask:
        assert mask.getpixel((79, 59)) == tuple(cluster_colors(300)[299])


def test_what_does_not_fit_together_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ShapeError, match="3 cluster names"):
        write_report(tmp_path, [], facts(), NAMES[:3], COLORS)
    stray = ReportImage("odd.jpg", image().pixels, np.zeros((2, 2), int), {4: 1.0})
    with pytest.raises(ShapeError, match=r"odd\.jpg.*cluster 4.*4 clusters"):
        write_report(tmp_path, [stray], facts(), NAMES, COLORS)


def test_without_jinja2_one_line_names_the_extra_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"stego-ray\[report\]") as caught:
        write_report(tmp_path / "report", [image()], facts(), NAMES, COLORS)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_browser_shows_the_images_from_disk_under_the_policy(tmp_path: Path):
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    browser = next((path for path in found if path), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome on the PATH")
    green = np.full((200, 300, 3), (10, 200, 30), dtype=np.uint8)
    shown = ReportImage("a", green, np.zeros((2, 2), int), {0: 1.0})
    index = write_report(tmp_path / "report", [shown], facts(curves={}), NAMES, COLORS)
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,2400"]
    subprocess.run(
        [browser, *options, f"--user-data-dir={tmp_path / 'profile'}",
         f"--screenshot={picture}", index.as_uri()],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    is_green = (np.abs(pixels - [10, 200, 30]) < 8).all(axis=2)
    is_tinted = (np.abs(pixels - (0.45 * green[0, 0] + 0.55 * COLORS[0])) < 8).all(axis=2)
    assert is_green.sum() > 40_000  # the photograph of 200 × 300 and its montage crop
    assert is_tinted.sum() > 40_000  # the overlay


def test_failures_are_shown_worst_first_and_lead_to_their_images(tmp_path: Path):
    told = [None, Failure(40.0, HOSTILE), Failure(12.34, "class 3 as cluster 1 (no class)")]
    images = [replace(image(f"{n}.jpg", n), failure=one) for n, one in enumerate(told)]
    index = write_report(tmp_path, images, facts(), NAMES, COLORS)
    section = index.read_text("utf-8").split('<section id="failures">')[1].split("</section>")[0]
    assert re.findall(r'href="#(image-\d)"', section) == ["image-3", "image-2"]
    assert section.index("12.3 %") < section.index("40.0 %")
    assert "class 3 as cluster 1 (no class)" in section
    assert HOSTILE not in section
    assert HOSTILE in html.unescape(section)
    assert Page(index).texts.count(HOSTILE) == 2  # there and beside its image


def test_a_report_without_scored_images_has_no_section_of_failures(tmp_path: Path):
    index = write_report(tmp_path, [image()], facts(), NAMES, COLORS)
    assert "failures" not in index.read_text("utf-8").split("</style>")[1]


def test_a_confusion_is_drawn_and_without_one_there_is_no_section(tmp_path: Path):
    confusion = ConfusionFacts(["sky", HOSTILE], [50.0, 25.0], np.eye(2, 3))
    index = write_report(tmp_path / "a", [image()], facts(confusion=confusion), NAMES, COLORS)
    section = index.read_text("utf-8").split('<section id="confusion">')[1].split("</section>")[0]
    assert "<svg" in section
    assert "<script>" not in section
    plain = write_report(tmp_path / "b", [image()], facts(), NAMES, COLORS)
    assert 'id="confusion"' not in plain.read_text("utf-8")


def test_failures_beyond_the_sample_do_not_describe_the_clusters(tmp_path: Path):
    sample = [image(seed=s) for s in range(2)]
    worst = replace(image(seed=5), failure=Failure(1.0, "a as b"), is_sampled=False)
    plain = write_report(tmp_path / "plain", sample, facts(), NAMES, COLORS)
    index = write_report(tmp_path / "worst", [*sample, worst], facts(), NAMES, COLORS)

    def legend(page: Path) -> str:
        return page.read_text("utf-8").split('<ul class="legend columns">')[1].split("</ul>")[0]

    assert legend(index) == legend(plain)
    assert "all 2 images of an even sample" in index.read_text("utf-8")
    assert "even sample" not in plain.read_text("utf-8")
