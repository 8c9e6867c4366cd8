"""The page in a real browser, at the width of a phone and of a desk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_kv.report.page import write_page

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no `chromium` on the PATH: install it to run these"
)

RECALL = {"full": [1.0] * 3, "window@3f": [0.25, 0.5, 0.75], "window@6f": [0.5, 0.625, 1.0]}
MOVING = """(async () => {
  const found = [];
  for (const video of document.querySelectorAll("video")) {
    video.scrollIntoView();  // a browser starts what it shows
    for (let wait = 0; wait < 100 && !video.currentTime; wait++)
      await new Promise((done) => setTimeout(done, 50));
    found.push([video.videoWidth, video.currentTime > 0]);
  }
  return found;
})()"""


class Tab:
    """A tab of a headless browser, spoken to in DevTools messages over a pipe."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self.reader, self.writer, self.count, self.session = reader, writer, 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def read(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self.reader.read(1)) != b"\0":
            assert byte, "the browser ended"
            content += byte
        return json.loads(content)

    def open(self, path: Path, width: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def run(self, script: str) -> Any:
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    asks, answers = os.pipe(), os.pipe()
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--remote-debugging-pipe", f"--user-data-dir={folder}"]
    shell = f'exec "$@" 3<&{asks[0]} 4>&{answers[1]}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command],
        pass_fds=(asks[0], answers[1]),
        stderr=subprocess.DEVNULL,
    )
    os.close(asks[0])
    os.close(answers[1])
    try:
        with os.fdopen(answers[0], "rb") as reader, os.fdopen(asks[1], "wb") as writer:
            yield Tab(reader, writer)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def page(tmp_path: Path, make_run, add_statistics, add_metrics) -> Path:
    run = make_run(tmp_path / "run", RECALL, ["first", "second", "third"], differences=True)
    add_metrics(add_statistics(run))
    write_page(run.directory.report, [run], ["Run window@6f."])
    return run.directory.report


@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it_without_complaint(tmp_path: Path, page: Path, width: int) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.open(page, width)
        assert tab.run("innerWidth") == width
        tab.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
        assert tab.run("document.documentElement.scrollWidth") == width, "nothing sticks out"
        assert tab.run(MOVING) == [[16, True]] * 3, "three pictures move"
        assert tab.run("[...document.images].every((image) => image.naturalWidth)")
        sizes = tab.run(
            "[...document.querySelectorAll('p, td, th, li, summary')].filter((e) => e.offsetHeight)"
            ".map((e) => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 11, "pixels: text that can be read"
        own = [url for url in tab.requests() if not url.startswith("data:")]
        assert own == [page.as_uri()], "no network"
        assert tab.complaints() == []


def test_heads_sort_tabs_choose_and_the_legend_fades(tmp_path: Path, page: Path) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.open(page, 1400)
        rows = (
            "[...document.querySelector('table.results').querySelectorAll('tbody th')]"
            ".map((e) => e.dataset.value)"
        )
        click = "document.querySelectorAll('table.results thead button')[{}].click()"
        assert tab.run(rows) == ["full", "window@3f", "window@6f"]
        tab.run(click.format(1))  # recall: more is better, so the most comes first
        assert tab.run(rows) == ["full", "window@6f", "window@3f"]
        tab.run(click.format(1))
        assert tab.run(rows) == ["window@3f", "window@6f", "full"]
        tab.run(click.format(2))  # the reference has no PSNR: it stays last
        assert tab.run(rows)[-1] == "full"
        tab.run(click.format(0))
        assert tab.run(rows) == ["full", "window@3f", "window@6f"]

        shown = "[...document.querySelectorAll('.tab.chosen')].map((e) => e.dataset.metric)"
        assert tab.run(shown) == ["recall", "recall"]
        tab.run("document.querySelector('.tabs button[data-metric=psnr]').click()")
        assert tab.run(shown) == ["psnr", "psnr"]

        faded = "document.body.classList.contains('faded')"
        chip = "document.querySelector('.legend button').click()"
        kept = "document.querySelectorAll('svg g.kept').length > 0"
        assert [tab.run(chip + ";" + faded), tab.run(kept)] == [True, True]
        assert tab.run(chip + ";" + faded) is False
        assert tab.complaints() == []


def test_a_film_turns_into_its_differences_at_the_same_moment(tmp_path: Path, page: Path) -> None:
    script = """(async () => {
      const video = document.querySelector("video");
      const [pictures, difference] = document.querySelectorAll(".switch button");
      const loaded = () => new Promise((done) => {
        video.addEventListener("seeked", done, {once: true});
      });
      const seen = async () => {  // a frame is painted a little after the seek
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
        const context = canvas.getContext("2d");
        await new Promise((done) => {
          video.requestVideoFrameCallback(done);
          setTimeout(done, 500);  // it may have been painted already
        });
        for (let tries = 0; tries < 100; tries++) {
          context.drawImage(video, 0, 0);
          const level = context.getImageData(8, 8, 1, 1).data[0];
          if (level) return level;
          await new Promise((done) => setTimeout(done, 20));
        }
        return 0;
      };
      video.autoplay = false;
      video.pause();
      const at = loaded();
      video.currentTime = 0.4;
      await at;
      const found = [[video.currentTime, await seen(), difference.getAttribute("aria-pressed")]];
      for (const button of [difference, pictures]) {
        const there = loaded();
        button.click();
        await there;
        found.push([video.currentTime, await seen(), difference.getAttribute("aria-pressed")]);
      }
      return [...found, video.paused];
    })()"""
    with browser(tmp_path / "profile") as tab:
        tab.open(page, 1400)
        *found, paused = tab.run(script)
        assert [time for time, _, _ in found] == pytest.approx([0.4] * 3)
        grey, difference, back = (level for _, level, _ in found)
        assert difference - grey == pytest.approx(100, abs=8), "the other film is 100 brighter"
        assert back == grey
        assert [pressed for _, _, pressed in found] == ["false", "true", "false"]
        assert paused, "what stands still goes on standing still"
        assert tab.complaints() == []


def test_folds_open_and_their_tables_sort(tmp_path: Path, page: Path) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.open(page, 1400)
        for fold, tables in (("#more", 2), ("#differences", 1)):
            shown = (
                f"[...document.querySelectorAll('{fold} table')].map((e) => e.checkVisibility())"
            )
            assert tab.run(shown) == [False] * tables
            tab.run(f"document.querySelector('{fold} summary').click()")
            assert tab.run(shown) == [True] * tables
        rows = "[...document.querySelectorAll('#differences tbody th')].map((e) => e.dataset.value)"
        head = "[...document.querySelectorAll('#differences thead button')]"
        press = head + ".find((e) => e.textContent == '{}').click()"
        assert tab.run(rows) == ["window@3f", "window@6f"]
        tab.run(press.format("difference"))
        assert tab.run(rows) == ["window@3f", "window@6f"], "-0.125 is more than -0.25"
        tab.run(press.format("difference"))
        assert tab.run(rows) == ["window@6f", "window@3f"]
        tab.run(press.format("p corrected"))
        assert tab.run(rows) == ["window@3f", "window@6f"]
        assert tab.complaints() == []


def test_paper_shows_everything_and_cuts_nothing(tmp_path: Path, page: Path) -> None:
    with browser(tmp_path / "profile") as tab:
        dark = {"name": "prefers-color-scheme", "value": "dark"}
        tab.call("Emulation.setEmulatedMedia", media="print", features=[dark])
        tab.open(page, 1040)  # a landscape page of A4 without its margins
        tab.run(
            "addEventListener('beforeprint', () => { window.unfolded = "
            "[...document.querySelectorAll('details')].every((fold) => fold.open); })"
        )
        assert tab.call("Page.printToPDF", preferCSSPageSize=True)["data"].startswith("JVBERi0")
        assert tab.run("window.unfolded"), "while a page is printed its folds are open"
        assert tab.run("document.querySelectorAll('details:not([open])').length") > 0
        tab.run("dispatchEvent(new Event('beforeprint'))")
        assert tab.run("document.documentElement.scrollWidth") <= 1040, "no table is cut"
        wide = "[...document.querySelectorAll('.scroll, details > div:not(.strips)')]"
        assert tab.run(wide + ".every((e) => e.scrollWidth <= e.clientWidth)")
        assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        gone = "[...document.querySelectorAll('nav, .tabs, .switch')].every((e) => !e.offsetHeight)"
        assert tab.run(gone), "nothing that only a pointer can use"
        tabs = "[...document.querySelectorAll('.tab')].every((e) => e.offsetHeight > 0)"
        assert tab.run(tabs), "charts of all metrics"
