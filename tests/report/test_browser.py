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
def page(tmp_path: Path, make_run) -> Path:
    run = make_run(tmp_path / "run", RECALL, ["first", "second", "third"])
    write_page(run.directory.report, [run], ["Run window@6f."])
    return run.directory.report


@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it_without_complaint(tmp_path: Path, page: Path, width: int) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.open(page, width)
        assert tab.run("innerWidth") == width
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
            "[...document.querySelectorAll('table.results tbody th')].map((e) => e.dataset.value)"
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
