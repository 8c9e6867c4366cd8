"""Downloads from small servers on this machine: checkpoints with the real hub client, and files."""

import hashlib
import json
import os
import re
import shlex
import socket
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from lightning_kv.metrics.backbones import weights as manifest
from lightning_kv.metrics.backbones.weights import WEIGHTS, WeightsUnavailable, locate, published
from lightning_kv.models.catalogue import CATALOGUE, PARTS, parts_folder
from lightning_kv.tasks.fetch import fetch, terms

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The three kinds of address that a download asks: about, tree, and the files."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        self.server.asked[self.command, self.path.partition("?")[0]] += 1
        parts = self.path.partition("?")[0].replace("%2B", "+").strip("/").split("/")
        kind = parts[0] == "api"
        repo = "/".join(parts[2:4] if kind else parts[:2])
        files = self.server.repos.get(repo)
        if files is None:
            return self.reply(404, b"", send, {"X-Error-Code": "RepoNotFound"})
        if not kind:
            body = files.get("/".join(parts[4:]))
            if body is None:
                return self.reply(404, b"", send, {"X-Error-Code": "EntryNotFound"})
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.reply(200, body, send, {"ETag": etag, "X-Repo-Commit": COMMIT})
        held = [{"rfilename": n, "size": len(b)} for n, b in files.items()]
        about = {"id": repo, "sha": COMMIT, "siblings": held}
        if "tree" in parts:
            about = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in files.items()
            ]
            about.append({"type": "directory", "path": "checkpoints", "oid": "0"})
        self.reply(200, json.dumps(about).encode(), send, {"Content-Type": "application/json"})

    def reply(self, status, body, send, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def point_at(monkeypatch, port):
    from huggingface_hub import constants

    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.asked = {}, Counter()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    point_at(monkeypatch, server.server_port)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path / "models"))
    yield server
    server.shutdown()
    server.server_close()


def test_a_checkpoint_arrives_byte_for_byte_and_alone(hub, tmp_path):
    one = CATALOGUE["longlive"]
    base, lora = bytes(range(256)) * 40, b"lora" * 1000
    hub.repos[one.repo] = {
        "models/longlive_base.pt": base,
        "models/lora.pt": lora,
        "README.md": b"more",
        "models/other.pt": b"x" * 10_000,
    }
    (said,) = fetch("longlive")
    assert one.licence in terms("longlive") and one.page in terms("longlive")
    assert str(tmp_path / "models" / "longlive") in said
    assert one.path.read_bytes() == base and one.lora.read_bytes() == lora
    held = {p.name for p in one.folder.rglob("*") if p.is_file() and ".cache" not in p.parts}
    assert held == {"longlive_base.pt", "lora.pt"}


def test_what_is_here_is_not_downloaded_again_unless_forced(hub):
    one = CATALOGUE["causal-forcing-2step"]  # its folder is `causal-forcing++`
    hub.repos[one.repo] = {one.files[0]: b"first"}
    fetch(one.name)
    asked = sum(hub.asked.values())
    hub.repos[one.repo] = {one.files[0]: b"second"}
    (said,) = fetch(one.name)
    assert sum(hub.asked.values()) == asked
    assert "already here" in said and str(one.folder) in said
    assert one.path.read_bytes() == b"first"
    fetch(one.name, force=True)
    assert one.path.read_bytes() == b"second"


def test_parts_are_three_folders(hub):
    repo = PARTS["wan2.1-parts"].repo
    shards = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    hub.repos[repo] = {
        "tokenizer/tokenizer_config.json": b"{}",
        "tokenizer/tokenizer.json": b"{}",
        "text_encoder/config.json": b"{}",
        "text_encoder/model.safetensors.index.json": json.dumps(shards).encode(),
        "text_encoder/1.safetensors": b"1" * 5000,
        "text_encoder/2.safetensors": b"2" * 5000,
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": b"v",
        "transformer/config.json": b"{}",
        "transformer/diffusion_pytorch_model.safetensors": b"not wanted",
    }
    fetch("wan2.1-parts")
    root = parts_folder()
    assert {p.name for p in root.iterdir() if not p.name.startswith(".")} == {
        "tokenizer",
        "text_encoder",
        "vae",
    }
    assert (root / "text_encoder" / "2.safetensors").read_bytes() == b"2" * 5000


def test_a_copy_in_the_hubs_cache_is_enough(hub, tmp_path):
    from huggingface_hub import hf_hub_download

    one = CATALOGUE["self-forcing"]
    hub.repos[one.repo] = {one.files[0]: b"weights"}
    hf_hub_download(one.repo, one.files[0], cache_dir=tmp_path / "hub")
    asked = sum(hub.asked.values())
    (said,) = fetch("self-forcing")
    assert sum(hub.asked.values()) == asked and "already here" in said
    assert one.path.read_bytes() == b"weights" and not one.folder.exists()


def command_in(message):
    return shlex.split(message.split("`")[-2])


def test_a_full_disk_is_said_before_anything_is_written(hub, monkeypatch):
    one = CATALOGUE["self-forcing"]
    hub.repos[one.repo] = {one.files[0]: b"w" * 3000}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2999))
    with pytest.raises(ValueError, match=r"2.93 KiB, and 2.93 KiB are free.*LIGHTNING_KV_MODELS"):
        fetch("self-forcing")
    assert not one.folder.exists() and not any("resolve" in path for _, path in hub.asked)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3000))
    fetch("self-forcing")
    assert one.path.is_file()


def test_a_repository_that_is_gone_is_said_with_the_line_to_run_elsewhere(hub):
    with pytest.raises(ValueError) as error:
        fetch("krea-14b")
    one = CATALOGUE["krea-14b"]
    want = ["hf", "download", one.repo, *one.files, "--local-dir", str(one.folder)]
    assert command_in(str(error.value)) == want
    assert "404" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_has_moved_is_said(hub):
    one = CATALOGUE["self-forcing"]
    hub.repos[one.repo] = {"checkpoints/other.pt": b"w"}
    with pytest.raises(ValueError, match=r"no checkpoints/self_forcing_dmd.pt.*hugg.*/gdhe17"):
        fetch("self-forcing")
    assert not one.folder.exists()


def test_no_network_is_said_with_the_line_to_run_elsewhere(hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    point_at(monkeypatch, closed)
    with pytest.raises(ValueError) as error:
        fetch("wan2.1-parts")
    one = PARTS["wan2.1-parts"]
    want = ["hf", "download", one.repo]
    for folder in ("tokenizer", "text_encoder", "vae"):
        want += ["--include", f"{folder}/*"]
    assert command_in(str(error.value)) == [*want, "--local-dir", str(one.folder)]
    assert "wan2.1-parts was not downloaded" in str(error.value)


def test_the_line_to_run_elsewhere_puts_the_files_where_they_are_looked_for(hub, capsys):
    """The hub's own command line, on the lines that our errors give."""
    from huggingface_hub.cli.hf import main

    parts = {f"{d}/config.json": b"{}" for d in ("text_encoder", "vae")}
    parts |= {f"{d}/m.safetensors": b"m" for d in ("text_encoder", "vae")}
    parts |= {"tokenizer/tokenizer_config.json": b"{}", "tokenizer/tokenizer.json": b"{}"}
    hub.repos[PARTS["wan2.1-parts"].repo] = parts | {"transformer/x.bin": b"no"}
    hub.repos[CATALOGUE["longlive"].repo] = dict.fromkeys(CATALOGUE["longlive"].files, b"w")
    for one in (PARTS["wan2.1-parts"], CATALOGUE["longlive"]):
        assert one.root is None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", shlex.split(one.command))
            try:
                main()
            except SystemExit as end:
                assert not end.code
        assert one.root == one.folder
        assert not (one.folder / "transformer").exists()


def test_without_the_hub_client_the_install_line_is_given(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "lightning_kv\[wan\]"') as error:
        fetch("self-forcing")
    assert command_in(str(error.value))[:3] == ["hf", "download", "gdhe17/Self-Forcing"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("long-live", "longlive"), ("wan2.1", "wan2.1-parts"), ("alexnett", "alexnet")],
)
def test_an_unknown_name_is_answered_with_the_nearest(hub, given, meant):
    for ask in (fetch, terms):
        with pytest.raises(ValueError, match=f"No download '{given}'. Did you mean '{meant}'"):
            ask(given)
    assert not hub.asked


def test_a_name_means_one_thing():
    assert len(CATALOGUE | PARTS | WEIGHTS) == len(CATALOGUE) + len(PARTS) + len(WEIGHTS)


# -- weights of metrics -------------------------------------------------------------------------

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
    (said,) = fetch("alexnet")
    assert DIGEST in said and "as published" in said
    assert shelf.asked == [None]
    assert locate("alexnet").read_bytes() == CONTENT and held() == [".pth"]
    assert "already here" in fetch("alexnet")[0] and len(shelf.asked) == 1
    fetch("alexnet", force=True)
    assert shelf.asked == [None, None]


def test_what_broke_off_goes_on_where_it_was(shelf):
    shelf.breaks = 1_000_001
    with pytest.raises(ValueError, match=r"broke off after 1000001 of 3000000 bytes\. Try again"):
        fetch("alexnet")
    assert held() == [".part"] and part().read_bytes() == CONTENT[:1_000_001]
    with pytest.raises(WeightsUnavailable):
        locate("alexnet")
    with pytest.raises(ValueError, match=r"broke off after 2000002 of 3000000 bytes"):
        fetch("alexnet")
    shelf.breaks = None
    fetch("alexnet")
    assert shelf.asked == [None, "bytes=1000001-", "bytes=2000002-"]
    assert locate("alexnet").read_bytes() == CONTENT and held() == [".pth"]


def test_a_server_that_sends_no_parts_is_asked_for_the_whole_again(shelf):
    shelf.breaks, shelf.parts = 1000, False
    for _ in range(2):
        with pytest.raises(ValueError, match=r"broke off after 1000 of 3000000"):
            fetch("alexnet")
    shelf.breaks = None
    fetch("alexnet")
    assert locate("alexnet").read_bytes() == CONTENT


def test_a_whole_part_is_only_checked_and_named(shelf):
    """As after a power cut between the last byte and the new name."""
    shelf.breaks = 10
    with pytest.raises(ValueError, match="broke off"):
        fetch("alexnet")
    part().write_bytes(CONTENT)
    fetch("alexnet")
    assert shelf.asked == [None, "bytes=3000000-"]
    assert locate("alexnet").read_bytes() == CONTENT


def test_without_a_checksum_nothing_is_put_together_from_two_answers(shelf):
    shelf.publish("")
    shelf.breaks = 1000
    with pytest.raises(ValueError, match="broke off"):
        fetch("alexnet")
    shelf.breaks = None
    assert "no checksum is published" in fetch("alexnet")[0]
    assert shelf.asked == [None, None]
    assert locate("alexnet").read_bytes() == CONTENT


def test_a_file_with_another_checksum_does_not_stay(shelf):
    shelf.content = b"something else" * 100
    with pytest.raises(ValueError, match="is not the published 'alexnet'"):
        fetch("alexnet")
    assert held() == []
    with pytest.raises(WeightsUnavailable):
        locate("alexnet")


def test_one_that_was_there_stays_until_the_new_one_is_whole(shelf):
    fetch("alexnet")
    shelf.breaks = 1000
    with pytest.raises(ValueError, match="broke off"):
        fetch("alexnet", force=True)
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
        fetch("alexnet")
    assert held() == [] and "\n" not in str(error.value)


def test_no_network_is_said_to_be_none(shelf):
    shelf.shutdown()
    shelf.server_close()
    with pytest.raises(ValueError, match=r"was not downloaded .*refused.*copy it"):
        fetch("alexnet")
    assert held() == []


def test_a_folder_that_cannot_be_made_is_said(shelf, home):
    (home / "models").write_text("in the way")
    with pytest.raises(ValueError, match=r"alexnet was not downloaded .*copy it"):
        fetch("alexnet")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(shelf, screen, terminal):
    read = screen(terminal)
    fetch("alexnet")
    shown = read()
    assert ("2/2 MiB" in shown and published("alexnet").file in shown) == terminal
    assert bool(shown) == terminal


def test_a_licence_is_asked_for_before_anything_else(home):
    assert "CC-BY-NC-SA-4.0" in terms("musiq-spaq")
    with pytest.raises(WeightsUnavailable, match=r"--accept_license CC-BY-NC-SA-4.0"):
        fetch("musiq-spaq")


def test_what_nobody_publishes_cannot_be_fetched(home):
    with pytest.raises(ValueError, match=r"cannot be downloaded.*METRIC/amt-s=FILE"):
        fetch("amt-s", accept=["cc-by-nc-sa-4.0"])
