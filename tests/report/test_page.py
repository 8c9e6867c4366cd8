"""The page, parsed: it needs no network and says the numbers of the summary; a browser opens it."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lightning_kv.report.page import PageRun, write_page

RECALL = {
    "full": [1.0, 1.0, 1.0],
    "window@3f": [0.25, 0.5, 0.75],
    "window@6f": [0.5, 0.625, 1.0],
    '<i>"&odd@9f': [0.1, 0.2, 0.3],
}
PROMPTS = ["plain", '<b>"x"&amp;</b><script>alert(1)</script>', "third"]
VOID = {"meta", "link", "img", "br", "input", "hr"}
SVG_LEAVES = {"line", "circle", "path", "use", "rect"}


class Page(HTMLParser):
    """Every element with its attributes, every text with the elements around it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((tuple(self.open), data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def text(self, *inside: str) -> str:
        chosen = [text for around, text in self.texts if set(inside) <= set(around)]
        return " ".join(" ".join(chosen).split())


def results(page: Page) -> dict[str, list[str]]:
    """The values of every row of the big table."""
    rows: dict[str, list[str]] = {}
    for tag, attrs in page.tags:
        if tag == "th" and attrs.get("scope") == "row":
            own = rows.setdefault(attrs.get("data-value", ""), [])
        elif tag == "td" and "data-value" in attrs:
            own.append(attrs["data-value"])
    rows.pop("", None)  # tables that cannot be sorted
    return rows


@pytest.fixture
def run(tmp_path: Path, make_run) -> PageRun:
    return make_run(tmp_path / "my run", RECALL, PROMPTS)


VERDICT = ("Run window@6f: it is <enough>.", "It saves 80 %.")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, make_run) -> tuple[PageRun, Page, str]:
    """A run that nobody changes, its page, and the text of the page."""
    folder = tmp_path_factory.mktemp("plain")
    made = make_run(folder / "my run", RECALL, PROMPTS)
    page = written(folder / "report.html", [made], VERDICT)
    return made, page, (folder / "report.html").read_text()


def written(
    path: Path, runs: list[PageRun], verdict: tuple[str, ...] = ("Run window@6f.",)
) -> Page:
    write_page(path, runs, list(verdict))
    return Page(path)


def test_nothing_is_loaded_from_anywhere(plain) -> None:
    _, page, text = plain
    for tag, attrs in page.tags:
        for name in ("src", "srcset", "data", "poster", "action", "xlink:href", "href"):
            value = attrs.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, f"<{tag} {name}={value[:60]}>"
    assert not re.search(r"@import|url\((?!['\"]?#|data:)", text)
    assert not re.search(r"\b(fetch|XMLHttpRequest|import\()", text)
    assert re.findall(r"https?://[^\"'<> ]+", text) == []


def test_the_table_holds_the_numbers_of_the_summary(plain) -> None:
    run, page, _ = plain
    rows = results(page)
    assert list(rows) == list(RECALL)
    heads = page.text("table", "thead")
    assert heads.startswith(
        "policy recall\xa0↑ share psnr\xa0↑ dB KV peak\xa0↓".replace("\xa0", " ")
    )
    for name, policy in run.summary["policies"].items():
        metrics, cost = policy["metrics"], policy["cost"]
        expected = [
            *(metrics[m]["mean"] for m in ("recall", "psnr")),
            *(cost[c] for c in ("kv_bytes_peak", "kv_bytes_mean", "kv_read_fraction")),
            *(cost[c] for c in ("kv_scored_fraction", "seconds_per_chunk_p50", "speedup")),
            metrics["ruler_error"]["mean"],
        ]
        shown = [None if value == "" else float(value) for value in rows[name]]
        assert shown == expected
    text = page.text("table", "tbody")
    assert "0.500 0.250 … 0.750" in text, "mean and interval of window@3f"
    assert text.count("full reference") == 2, "quality and cost, and where time and bytes go"


def test_the_best_of_a_column_is_marked_and_the_reference_is_not(plain) -> None:
    page = plain[1]
    cells = [attrs for tag, attrs in page.tags if tag == "td"]
    cells = [attrs for attrs in cells if "data-value" in attrs]
    columns = len(cells) // len(RECALL)
    best = [index for index, attrs in enumerate(cells) if "best" in attrs["class"]]
    assert best == [2 * columns], "recall of window@6f; in the other columns all are equal"


def test_verdict_facts_and_recipes_are_there(plain) -> None:
    run, page, _ = plain
    assert page.text("section", "p").startswith(" ".join(VERDICT))
    facts = page.text("header", "dl")
    for fact in ("model panorama", "prompts 3", "latent frames 12", "of them given 4", "seed 7"):
        assert fact in facts
    assert "reference full" in facts and "given by videos" not in facts
    assert "10 log10(1 / mse) < the better" in page.text("dd")
    assert run.summary["fingerprint"] in page.text("code")
    assert "9.9" in page.text("dd")
    config = run.directory.config
    assert page.text("pre").startswith(f"lightning-kv evaluate -c '{config}' prompts: 3 # <worlds>")
    assert page.text("h1") == "my run"
    assert "Half-finished" not in page.text("body")


def test_the_videos_that_rollouts_go_on_from_are_named(tmp_path, run: PageRun) -> None:
    run.summary["run"]["context_videos"] = "films"
    facts = written(tmp_path / "report.html", [run]).text("header", "dl")
    assert "given by videos films" in facts


def test_odd_prompts_and_names_are_text(plain) -> None:
    page = plain[1]
    assert f"Median: {PROMPTS[1]}" in page.text("h3")
    assert len(page.all("script")) == 1
    assert '<i>"&odd' in page.text("button")
    assert not {"b", "i"} & {tag for tag, attrs in page.tags if tag == "i" and not attrs}


def test_moving_pictures_are_inside_and_play(plain) -> None:
    page = plain[1]
    videos = page.all("video")
    assert len(videos) == 3
    greys = []
    for attrs in videos:
        assert {"controls", "loop", "muted", "autoplay", "playsinline"} <= set(attrs)
        kind, content = attrs["src"].split(",", 1)
        assert kind == "data:video/mp4;base64"
        with av.open(io.BytesIO(base64.b64decode(content))) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert len(frames) == 5
        greys.append(np.mean(frames))
    # The prompt with the highest recall is the third, the lowest is the first.
    np.testing.assert_allclose(greys, [100, 70, 40], atol=3)
    assert re.findall(r"(Best|Median|Worst): (\w+)", page.text("h3")) == [
        ("Best", "third"),
        ("Worst", "plain"),
    ]
    assert "among the 3 prompts with a video" in page.text("p")
    assert "window@3f 0.750 window@6f 1.000" in page.text("figcaption", "ul")


def test_pictures_show_what_every_layer_and_head_keeps(plain) -> None:
    page = plain[1]
    images = {attrs["alt"]: attrs["src"] for attrs in page.all("img")}
    assert len(images) == len(RECALL) * (1 + 2), "an overview and two layers for each policy"
    assert all(alt for alt in images)
    (overview,) = (src for alt, src in images.items() if alt.startswith("window@6f, mean"))
    with Image.open(io.BytesIO(base64.b64decode(overview.split(",", 1)[1]))) as image:
        pixels = np.asarray(image)
    # window@6f is the third policy, whose trace keeps six frames: in the last chunk 3 to 8.
    blue = pixels[11, :, 2].astype(int) - pixels[11, :, 0] > 20
    assert np.flatnonzero(blue).tolist() == [3, 4, 5, 6, 7, 8]
    assert "keeps 6 of 9 past frames, reads 6" in page.text("figure")
    unfolded = [attrs for attrs in page.all("details") if "open" in attrs]
    assert len(unfolded) == 2


def test_a_half_finished_run_says_so(tmp_path: Path, make_run) -> None:
    recall = {"full": [1.0, 1.0], "window@3f": [0.5], "late": []}
    run = make_run(tmp_path / "half", recall, PROMPTS, pictured=1, total=8)
    page = written(tmp_path / "report.html", [run], ())
    assert "0 of 8 prompts finished" in page.text("header")
    assert results(page)["late"].count("") == 9
    assert "Only: plain" in page.text("h3"), "the one prompt that both policies with values have"
    assert "No verdict" in page.text("section")
    done = make_run(tmp_path / "more", {"full": [1.0, 1.0], "w": [0.5, 0.5]}, PROMPTS, total=8)
    assert "2 of 8 prompts finished" in written(tmp_path / "b.html", [done]).text("header")


def test_a_run_without_pictures_says_so(tmp_path: Path, make_run) -> None:
    run = make_run(tmp_path / "bare", {"full": [1.0]}, ["p"], pictured=0)
    page = written(tmp_path / "report.html", [run])
    assert "No videos" in page.text("p")
    assert "No traces" in page.text("p")
    assert not page.all("video")


@pytest.mark.usefixtures("no_charts")
def test_several_runs_share_the_table(tmp_path: Path, make_run, run: PageRun) -> None:
    other = make_run(tmp_path / "other", {"full": [1.0], "top": [0.9]}, ["p"])
    page = written(tmp_path / "report.html", [run, other])
    names = ["my run/full", *list(RECALL)[1:], "other/full", "top"]
    assert list(results(page)) == names
    assert page.text("h1") == "my run, other"
    assert page.text("table").count("full reference") == 2 * 2
    assert len(page.all("video")) == 4
    assert "Only: p" in page.text("h3")


@pytest.mark.usefixtures("no_charts")
def test_a_damaged_trace_is_an_error_and_leaves_the_old_page(tmp_path: Path, run: PageRun) -> None:
    path = tmp_path / "report.html"
    written(path, [run])
    before = path.read_bytes()
    for trace in run.directory.traces.iterdir():
        trace.write_bytes(b"cut")
    with pytest.raises(ValueError, match="A trace cannot be read"):
        write_page(path, [run], [])
    assert path.read_bytes() == before


@pytest.mark.usefixtures("no_charts")
def test_statistics_stand_in_the_tables(tmp_path: Path, run: PageRun, add_statistics) -> None:
    page = written(tmp_path / "report.html", [add_statistics(run)])
    marked = [attrs for tag, attrs in page.tags if tag == "sup"]
    assert len(marked) == 2, "corrected p of 0.02 and 0.04 are significant, 0.06 is not"
    titles = [attrs.get("title") or "" for attrs in page.all("td")]
    notes = [title for title in titles if "p = " in title]
    assert notes[0].endswith(
        "difference to the reference -0.125 [-0.5, -0.0625], p = 0.001, corrected 0.02, "
        "d_z = -1.5, n = 3"
    )
    assert len(notes) == 3
    assert "Differences to the reference: 2 of 3 are sure" in page.text("summary")
    folded = page.text("details", "table", "tbody")
    minus = "\N{MINUS SIGN}"
    interval = f"{minus}0.500 … {minus}0.062"
    row = f"window@3f recall {minus}0.125 {interval} 0.001 0.020 {minus}1.50 3 worse"
    assert row in folded
    assert "by Holm's method over all 3 differences to full" in page.text("details", "p")


@pytest.mark.usefixtures("no_charts")
def test_fronts_and_drift_stand_under_their_charts(tmp_path, run: PageRun, add_statistics) -> None:
    page = written(tmp_path / "report.html", [add_statistics(run)])
    text = page.text("section", "table")
    assert "policy P, for bytes P, for time full reference 1.00 1.00 window@3f 0.88 0.88" in text
    assert "window@6f 0.06 0.06 recall" in text, "and no row for the one that is never on it"
    assert (
        "window@3f +0.250 +0.125 … +0.500 +0.375 +0.250 … +0.750 0.031 \N{MINUS SIGN}0.031" in text
    )
    definitions = page.text("details", "table", "thead")
    assert "VDE, late weights vde_late" in definitions
    assert "vde_log" not in definitions, "no policy has a value"
    assert "Drift of psnr" not in page.text("h3")


@pytest.mark.usefixtures("no_charts")
def test_many_metrics_stay_readable(tmp_path: Path, run: PageRun, add_metrics) -> None:
    page = written(tmp_path / "report.html", [add_metrics(run)])
    heads = page.text("section", "thead")
    first = heads.split("policy")[1]
    assert first.split()[:5] == ["recall", "↑", "share", "psnr", "↑"]
    assert "fvd/panorama-encoder ↓ †" in first
    assert "quality" not in first
    assert "More metrics (18)" in page.text("summary")
    assert all(f"quality {number} ↑" in heads for number in range(16))
    assert not re.search("brightness [↑↓]", heads)
    assert "brightness neither way is better" in page.text("dt")
    assert "null 88.2" in page.text("td", "span")
    assert (
        "121.5 from 96 windows of 48 prompts against the real set (64 windows of 32 clips)"
    ) in str(page.all("td"))
    assert "fvd/i3d : unavailable: no <weights> here" in page.text("ul", "li")
    assert "fvd/i3d" not in heads, "no empty column"
    best = {attrs["data-value"] for attrs in page.all("td") if "best" in attrs.get("class", "")}
    assert {"0.875", "121.5"} <= best, "the highest quality and the smallest distance"
    assert "0.625" not in best, "the highest brightness is not the best"


@pytest.mark.usefixtures("no_charts")
def test_a_film_of_differences_is_a_button_away(tmp_path: Path, make_run, plain) -> None:
    run = make_run(tmp_path / "run", RECALL, PROMPTS, differences=True)
    page = written(tmp_path / "report.html", [run])
    videos = page.all("video")
    assert len(videos) == 3, "what is in difference/ is no prompt"
    for attrs in videos:
        assert attrs["data-difference"].startswith("data:video/mp4;base64,")
        assert attrs["data-difference"] != attrs["src"]
    assert page.text("div", "button").count("difference \N{MULTIPLICATION SIGN}4") == 3
    bare = plain[1]
    assert not any("data-difference" in attrs for attrs in bare.all("video"))
    assert "difference \N{MULTIPLICATION SIGN}" not in bare.text("button")


@pytest.mark.usefixtures("no_charts")
def test_a_film_whose_key_has_a_folder_is_found(tmp_path: Path, make_run) -> None:
    run = make_run(tmp_path / "run", {"full": [1.0], "w": [0.5]}, ["p"])
    records = run.directory.path / "records" / "rank-00000.jsonl"
    records.write_text(records.read_text().replace('"k0"', '"street/k0"'))
    (run.directory.videos / "k0.mp4").rename(run.directory.videos / "street__k0.mp4")
    page = written(tmp_path / "report.html", [run])
    assert "street/k0" in page.text("figcaption")


def test_time_and_bytes_are_broken_down(plain) -> None:
    page = plain[1]
    section = page.text("section", "table")
    assert "391 KiB mean, 4.77 MiB peak" in section
    assert "25.0 % read" in section
    bars = [a["style"] for a in page.all("i") if "style" in a and a["style"].startswith("width")]
    assert bars[:2] == ["width:8.00%", "width:92.00%"], "400 000 of 5 000 000 bytes"
    assert bars[2:4] == ["width:100.00%", "width:0.00%"]
    assert bars[6:8] == ["width:25.00%", "width:0.00%"]


def test_videos_alone_have_no_cost_and_no_memory(tmp_path: Path, run: PageRun) -> None:
    summary = run.summary
    summary["model"] = {"name": "video files"}
    for name in ("seed", "context_frames"):
        del summary["run"][name]
    for policy in summary["policies"].values():
        policy["cost"] = dict.fromkeys(policy["cost"])
    records = run.directory.path / "records" / "rank-00000.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for line in lines:
        line["cost"] = dict.fromkeys(line["cost"]) | {"seconds_per_chunk": []}
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = written(tmp_path / "report.html", [run])
    facts = page.text("header", "dl")
    assert facts.startswith("compared video files")
    for word in ("seed", "latent", "given", "model"):
        assert word not in facts
    heads = page.text("h2")
    assert "cost" not in heads
    assert "memory" not in heads
    assert "bytes" not in heads
    assert "KV" not in page.text("body")
    assert "policy" not in page.text("table", "thead")
    assert "latent frame" not in (tmp_path / "report.html").read_text()
