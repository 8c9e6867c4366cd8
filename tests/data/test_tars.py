"""Tars that are not what they say: refused in words, by the reader and by the check."""

import gzip
import io
import json
import re
import tarfile

import pytest

from lightning_kv.data.check_shards import check_shards
from lightning_kv.data.datamodule import PromptDataModule, VideoDataModule
from lightning_kv.data.tars import Member, grouped, members
from lightning_kv.data.videos import VideoError, probe
from lightning_kv.utilities.files import checksum


@pytest.fixture(scope="module")
def clip(tmp_path_factory, film):
    return film(tmp_path_factory.mktemp("clip") / "a.mp4", 6).read_bytes()


@pytest.fixture
def set_of(tmp_path, tar, vouch):
    """A folder with one tar of these files, and an index that vouches for it."""

    def write(*files, samples=1, **more):
        tar(tmp_path / "set" / "set-000000.tar", files)
        vouch(tmp_path / "set", [samples], **more)
        return tmp_path / "set"

    return write


def refused(folder, said, video=True):
    """Both the reader and the check say so, in three parts; nothing is written."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError, match=said) as error:
        data = VideoDataModule(folder) if video else PromptDataModule(folder)
        data.setup("test")
        list(data.test_dataloader())
    findings = check_shards(folder)
    assert any(re.search(said, each) for each in findings), findings
    for words in (str(error.value), *findings):
        assert len(re.findall(r"\.(?=\s|$)", words)) >= 3, words
    assert sorted(folder.parent.rglob("*")) == before


def test_a_member_is_a_file_of_its_own(tmp_path, tar, clip):
    path = tar(tmp_path / "a.tar", [("./000.json", b"{}"), ("000.mp4", clip), ("001.mp4", clip)])
    first, second = grouped(path)["000"]["mp4"], grouped(path)["001"]["mp4"]
    with tarfile.open(path) as whole, second.open() as own:
        assert own.read() == whole.extractfile("001.mp4").read() == clip
        for place, whence in ((5, 0), (-7, 2), (-2, 1), (10**9, 0)):
            assert own.seek(place, whence) == own.tell()
            at = own.tell()
            assert own.read(30) == clip[at : at + 30]
        with pytest.raises((OSError, ValueError)):
            own.seek(-1)
    assert checksum(first) == checksum(second) and str(second) == f"{path}::001.mp4"
    assert probe(first).path == first and probe(first).frames == 6 and first.suffix == ".mp4"
    assert list(grouped(path)["000"]) == ["json", "mp4"]
    with pytest.raises(VideoError, match="No such file"):
        probe(Member(tmp_path / "none.tar", "a.mp4", 0, 5))


def test_a_tar_of_a_folder_may_be_packed_by_hand(tmp_path, clip):
    for place in ("x/000.mp4", "x/in/001.mp4"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(clip)
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=kind) as file:
            file.add(tmp_path / "x", ".")
            file.add(tmp_path / "x/000.mp4", "long/" * 30 + "é.mp4") if kind else None
        assert {"000", "in/001"} <= set(grouped(tmp_path / "a.tar"))


def damaged(name, content):
    if name == "truncated in a video":
        return content[: len(content) // 2]
    if name == "truncated between two":
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            return content[: tar.getmembers()[2].offset]
    if name == "its head damaged":
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            at = tar.getmembers()[2].offset
        return content[: at + 148] + b"7777777" + content[at + 155 :]
    if name == "a page of HTML":
        return b"<!DOCTYPE html><title>404</title>" + bytes(2000)
    if name == "a gzip bomb":
        return gzip.compress(bytes(2**28), 9)
    if name == "gzip":
        return gzip.compress(content)
    return {"nothing": b"", "zeros": bytes(10240), "LFS": b"version https://git-lfs.github.com"}[
        name
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "truncated in a video": "no whole, uncompressed tar|damaged or cut short",
        "truncated between two": "damaged or cut short",
        "its head damaged": "damaged or cut short|no whole, uncompressed tar",
        "a page of HTML": "Given HTML",
        "a gzip bomb": "Given gzip",
        "gzip": "Given gzip",
        "nothing": "Given nothing|missing or damaged",
        "zeros": "another number of samples",
        "LFS": "a pointer of Git LFS",
    }.items(),
)
@pytest.mark.parametrize("honest", [True, False])
def test_what_is_no_whole_tar_is_refused(set_of, vouch, clip, name, said, honest):
    folder = set_of(("000.mp4", clip), ("001.mp4", clip), ("002.mp4", clip), samples=3)
    path = folder / "set-000000.tar"
    path.write_bytes(damaged(name, path.read_bytes()))
    if not honest:  # an index that knows the checksum of the damage
        vouch(folder, [3])
    refused(folder, f"{said}|missing or damaged" if honest else said)


def test_an_empty_set_is_refused(set_of):
    refused(set_of(samples=0), "index of shards cannot be used")


@pytest.mark.parametrize(
    "key", ["../x", "/x", "a/../../x", "..\\x", "C:x", "\\x", "a\nb", "../../etc/x"]
)
@pytest.mark.parametrize("extension", ["mp4", "json"])
def test_a_key_that_leads_out_is_refused(set_of, clip, key, extension):
    files = [(f"{key}.{extension}", clip if extension == "mp4" else b'{"prompt": "x"}')]
    refused(set_of(*files), "leads out of its folder", video=extension == "mp4")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(set_of, vouch, clip, kind):
    folder = set_of(("000.mp4", clip), samples=1)
    with tarfile.open(folder / "set-000000.tar", "a") as tar:
        info = tarfile.TarInfo("001.mp4")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    vouch(folder, [2])
    refused(folder, "no plain file")


@pytest.mark.parametrize(
    "files", [["0.mp4", "1.mp4", "0.mp4"], ["0.mp4", "0.mp4"], ["0.json", "1.mp4", "0.mp4"]]
)
def test_a_key_that_comes_twice_is_refused(set_of, clip, files):
    refused(set_of(*((name, clip) for name in files), samples=2), "a key twice|of one name")


def test_two_shards_with_one_key_are_refused(tmp_path, tar, vouch, clip):
    for name in ("a.tar", "b.tar"):
        tar(tmp_path / "set" / name, [("000.mp4", clip)])
    vouch(tmp_path / "set", [1, 1])
    refused(tmp_path / "set", "Two shards hold one key|a key that .*a.tar holds too")


def test_prompts_of_two_shards_with_one_key_are_refused(tmp_path, tar, vouch):
    for name in ("a.tar", "b.tar"):
        tar(tmp_path / "set" / name, [("000.json", b'{"prompt": "x"}')])
    vouch(tmp_path / "set", [1, 1])
    refused(tmp_path / "set", "no distinct keys|a key that .*a.tar holds too", video=False)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("video", [True, False])
def test_an_index_that_lies_about_its_samples_is_refused(set_of, clip, samples, video):
    name, content = ("mp4", clip) if video else ("json", b'{"prompt": "x"}')
    folder = set_of((f"0.{name}", content), (f"1.{name}", content), samples=samples)
    refused(folder, "another number of samples", video)


@pytest.mark.parametrize(
    "more",
    [{"name": "a", "shards": [{}]}, {"shards": {"file": 1}}, {"schema": "1"}, {"shards": None}],
)
def test_an_index_of_nonsense_is_refused(set_of, clip, more):
    refused(set_of(("0.mp4", clip), ("1.mp4", clip), samples=2, **more), "cannot be used")


@pytest.mark.parametrize("file", ["../out.tar", "/etc/passwd", "..", "in/a.tar", "..\\a.tar", 3])
def test_an_index_that_leads_out_is_refused(set_of, clip, file):
    folder = set_of(("0.mp4", clip))
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["file"] = file
    (folder / "index.json").write_text(json.dumps(index))
    refused(folder, "cannot be used")


def test_shards_without_an_index_are_refused(set_of, clip):
    folder = set_of(("0.mp4", clip))
    (folder / "index.json").unlink()
    refused(folder, "There is no index of shards")


def test_files_of_macos_are_left_out_and_said(set_of, clip):
    junk = [("._000.mp4", b"Mac OS X"), ("__MACOSX/._000.mp4", b"Mac OS X"), ("in/._a.mp4", b"")]
    folder = set_of(junk[0], ("000.mp4", clip), *junk[1:], (".DS_Store", b""))
    assert [each.name for each in members(folder / "set-000000.tar")] == ["000.mp4"]
    assert [batch.key for batch in VideoDataModule(folder).test_dataloader()] == [["000"]]
    (finding,) = check_shards(folder)
    assert "holds files that are left out. Given 4, such as '._000.mp4'" in finding


def test_prompts_beside_files_of_macos_are_read(set_of):
    record = b'{"prompt": "x"}'
    junk = [(name, b"Mac OS X") for name in ("._0.json", "in/._a.json", "__MACOSX/in/._a.json")]
    folder = set_of(junk[0], ("0.json", record), *junk[1:], ("in/a.json", record), samples=2)
    assert len(PromptDataModule(folder).keys()) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Cannot read"),
        (b"no video at all", "Cannot read"),
        (None, "damaged or cut short|Cannot read"),
        ("sound", "none of them a video"),
    ],
)
def test_a_video_that_is_none_is_refused(set_of, clip, content, said):
    content = clip[: len(clip) // 2] if content is None else content
    content = sound() if content == "sound" else content
    refused(set_of(("000.mp4", content)), said)


def sound():
    """An mp4 without a picture."""
    import av
    import numpy as np

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (b"{", "no JSON in UTF-8"),
        (b"", "no JSON in UTF-8"),
        ("[" * 10**5, "no JSON in UTF-8"),
        ('{"prompt": "schön"}'.encode("latin-1"), "no JSON in UTF-8"),
        (b"[]", "holds no prompt"),
        (b'{"prompt": 3}', "holds no prompt"),
        (b'{"prompt": "\\ud800"}', "no text that can be written"),
        (json.dumps({"prompt": "x" * 10**5}), "too long"),
    ],
)
@pytest.mark.parametrize("video", [True, False])
def test_a_record_that_cannot_be_read_is_refused(set_of, clip, record, said, video):
    record = record if isinstance(record, bytes) else record.encode()
    files = [("000.json", record), *([("000.mp4", clip)] if video else [])]
    refused(set_of(*files), said, video)


def test_a_record_larger_than_any_is_not_read(set_of, clip):
    refused(set_of(("0.json", b" " * 2**21), ("0.mp4", clip)), "too large|too long")


def test_samples_without_one_video_are_refused(set_of, clip):
    folder = set_of(("0.mp4", clip), ("0.mkv", clip))
    refused(folder, "has not one video|is no sample")
    folder = set_of(("0.mp4", clip), ("1.json", b'{"prompt": "x"}'), samples=2)
    refused(folder, "has not one video|Some samples have no video")
    refused(set_of(("0.txt", b"x")), "has not one video|is no sample")
