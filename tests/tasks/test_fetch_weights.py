"""Downloads of metric weights, from a small server on this machine."""

import hashlib
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from lightning_kv.metrics.backbones import weights as manifest
from lightning_kv.metrics.backbones.weights import WeightsUnavailable, locate, published
from lightning_kv.tasks.fetch_weights import fetch_weights, terms

CONTENT = os.urandom(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Shelf(BaseHTTPRequestHandler):
    """One file, in parts on request; it may break off, or be something else."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        shelf, asked = self.server, self.headers.get("Range")
        shelf.asked.append(asked)
        if shelf.status != 200:
            return self.send_error(shelf.status)
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and shelf.parts else 0
        if start >= len(shelf.content):
            return self.send_error(416)
        body = shelf.content[start:]
        self.send_response(206 if asked and shelf.parts else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", shelf.kind)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[: shelf.breaks])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def shelf(home, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Shelf)
    server.asked, server.content, server.kind = [], CONTENT, "application/octet-stream"
    server.status, server.breaks, server.parts = 200, None, True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def publish(sha256):
        entry = {**vars(published("alexnet")), "sha256": sha256}
        entry["url"] = f"http://127.0.0.1:{server.server_port}/alexnet.pth"
        monkeypatch.setitem(manifest.WEIGHTS, "alexnet", type(published("alexnet"))(**entry))

    server.publish = publish
    publish(DIGEST[:8])
    yield server
    server.shutdown()
    server.server_close()


def held():
    folder = manifest.weights_folder("alexnet")
    return sorted(path.suffix for path in folder.iterdir()) if folder.exists() else []


def part():
    return next(manifest.weights_folder("alexnet").glob("*.part"))


def test_a_file_is_downloaded_checked_and_found(shelf):
    (said,) = fetch_weights("alexnet")
    assert DIGEST in said and "as published" in said
    assert shelf.asked == [None]
    assert locate("alexnet").read_bytes() == CONTENT and held() == [".pth"]
    assert "already here" in fetch_weights("alexnet")[0] and len(shelf.asked) == 1
    fetch_weights("alexnet", force=True)
    assert shelf.asked == [None, None]


def test_what_broke_off_goes_on_where_it_was(shelf):
    shelf.breaks = 1_000_001
    with pytest.raises(ValueError, match=r"broke off after 1000001 of 3000000 bytes\. Try again"):
        fetch_weights("alexnet")
    assert held() == [".part"] and part().read_bytes() == CONTENT[:1_000_001]
    with pytest.raises(WeightsUnavailable):
        locate("alexnet")
    with pytest.raises(ValueError, match=r"broke off after 2000002 of 3000000 bytes"):
        fetch_weights("alexnet")
    shelf.breaks = None
    fetch_weights("alexnet")
    assert shelf.asked == [None, "bytes=1000001-", "bytes=2000002-"]
    assert locate("alexnet").read_bytes() == CONTENT and held() == [".pth"]


def test_a_server_that_sends_no_parts_is_asked_for_the_whole_again(shelf):
    shelf.breaks, shelf.parts = 1000, False
    for _ in range(2):
        with pytest.raises(ValueError, match=r"broke off after 1000 of 3000000"):
            fetch_weights("alexnet")
    shelf.breaks = None
    fetch_weights("alexnet")
    assert locate("alexnet").read_bytes() == CONTENT


def test_a_whole_part_is_only_checked_and_named(shelf):
    """As after a power cut between the last byte and the new name."""
    shelf.breaks = 10
    with pytest.raises(ValueError, match="broke off"):
        fetch_weights("alexnet")
    part().write_bytes(CONTENT)
    fetch_weights("alexnet")
    assert shelf.asked == [None, "bytes=3000000-"]
    assert locate("alexnet").read_bytes() == CONTENT


def test_without_a_checksum_nothing_is_put_together_from_two_answers(shelf):
    shelf.publish("")
    shelf.breaks = 1000
    with pytest.raises(ValueError, match="broke off"):
        fetch_weights("alexnet")
    shelf.breaks = None
    assert "no checksum is published" in fetch_weights("alexnet")[0]
    assert shelf.asked == [None, None]
    assert locate("alexnet").read_bytes() == CONTENT


def test_a_file_with_another_checksum_does_not_stay(shelf):
    shelf.content = b"something else" * 100
    with pytest.raises(ValueError, match="is not the published 'alexnet'"):
        fetch_weights("alexnet")
    assert held() == []
    with pytest.raises(WeightsUnavailable):
        locate("alexnet")


def test_one_that_was_there_stays_until_the_new_one_is_whole(shelf):
    fetch_weights("alexnet")
    shelf.breaks = 1000
    with pytest.raises(ValueError, match="broke off"):
        fetch_weights("alexnet", force=True)
    assert locate("alexnet").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (404, "", "HTTP Error 404"),
        (503, "", "HTTP Error 503"),
        (200, "text/html; charset=utf-8", "a web page and no file"),
    ],
)
def test_an_answer_that_is_no_file_is_said(shelf, status, kind, said):
    shelf.status, shelf.kind = status, kind
    with pytest.raises(ValueError, match=rf"alexnet was not downloaded .*{said}.*copy it") as error:
        fetch_weights("alexnet")
    assert held() == [] and "\n" not in str(error.value)


def test_no_network_is_said_to_be_none(shelf):
    shelf.shutdown()
    shelf.server_close()
    with pytest.raises(ValueError, match=r"was not downloaded .*refused.*copy it"):
        fetch_weights("alexnet")
    assert held() == []


def test_a_folder_that_cannot_be_made_is_said(shelf, home):
    (home / "models").write_text("in the way")
    with pytest.raises(ValueError, match=r"alexnet was not downloaded .*copy it"):
        fetch_weights("alexnet")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(shelf, screen, terminal):
    read = screen(terminal)
    fetch_weights("alexnet")
    shown = read()
    assert ("2/2 MiB" in shown and published("alexnet").file in shown) == terminal
    assert bool(shown) == terminal


def test_a_licence_is_asked_for_before_anything_else(home):
    assert "CC-BY-NC-SA-4.0" in terms("musiq-spaq")
    with pytest.raises(WeightsUnavailable, match=r"--accept_license CC-BY-NC-SA-4.0"):
        fetch_weights("musiq-spaq")


def test_what_nobody_publishes_cannot_be_fetched(home):
    with pytest.raises(ValueError, match=r"cannot be downloaded.*METRIC/amt-s=FILE"):
        fetch_weights("amt-s", accept=["cc-by-nc-sa-4.0"])
    with pytest.raises(ValueError, match="Did you mean 'alexnet'"):
        fetch_weights("alexnett")
