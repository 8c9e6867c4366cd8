"""Latents on disk and their pixels: nothing is changed, lost or half-written on the way."""

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_kv.cli import main
from lightning_kv.models.codec import PatchCodec
from lightning_kv.models.embedded import save_embedded
from lightning_kv.tasks import decode as module
from lightning_kv.tasks.decode import decode
from lightning_kv.tasks.rollouts.latent_files import read_latents, write_latents

PANORAMA = {"prompt": "day slow", "model": "panorama", "policy": "full", "seed": "0"}
ODD = ["sliding-window@6f", "a.b", "50% #1 [x]*?", "été 日本", "-o", 'it\'s "q"', "a:b", "%03d"]


def latents(frames=3, seed=0):
    return torch.randn(frames, 16, 4, 4, generator=torch.Generator().manual_seed(seed))


def shown(path):
    with av.open(str(path)) as video:
        rate = float(video.streams.video[0].average_rate)
        return np.stack([f.to_ndarray(format="rgb24") for f in video.decode(video=0)]), rate


def pictures(codec, given):
    """What a video of the panorama has to show: 32 x 32 pixels, each 10 x 10 large."""
    frames = codec.decode(given[None].float())[0].permute(0, 2, 3, 1).numpy()
    return frames.repeat(10, axis=1).repeat(10, axis=2)


def is_video_of(path, codec, given, others=()):
    found, _ = shown(path)
    wanted = pictures(codec, given)
    assert found.shape == wanted.shape
    near = np.abs(found / 255 - wanted).mean()
    far = [np.abs(found / 255 - pictures(codec, other)).mean() for other in others]
    assert near < 0.03 and all(near < other / 3 for other in far), (near, far)


def a_run(folder, names=("full", "sliding-window@6f"), clips=2):
    """A run directory with latents; gives each clip's path and latents."""
    made = {}
    for name in names:
        for number in range(clips):
            path = folder / "latents" / name / f"clip-{number}.safetensors"
            made[path] = latents(seed=len(made))
            write_latents(path, made[path], 8, PANORAMA)
    return made


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def refused(words, *given, **more):
    with pytest.raises(ValueError) as error:
        decode(*given, **more)
    assert all(word in str(error.value) for word in words), error.value


# -- latents in and out ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_clip_comes_back_as_it_was(tmp_path, dtype):
    path = tmp_path / "new" / "deep" / "clip.safetensors"
    given = latents(5).to(dtype)
    about = {"prompt": 'a "fox" 日本\n', "model": "m.yaml", "policy": "x@6f", "seed": "3"}
    write_latents(path, given, 7.5, about)
    found, words = read_latents(path)
    assert found.dtype == dtype and torch.equal(found, given)
    assert words == {"fps": 7.5, **about}
    with safe_open(path, "pt") as file:  # any other reader finds them too
        assert torch.equal(file.get_tensor("latents"), given)
    assert files(tmp_path) == ["new/deep/clip.safetensors"]


def test_equal_input_gives_equal_bytes(tmp_path):
    given = latents(6)
    for name in ("a", "b"):
        write_latents(tmp_path / name, given.clone(), 16, dict(PANORAMA))
    every = torch.randn(2, 6, 16, 4, 4)
    every[1] = given
    write_latents(tmp_path / "c", every[1], 16, PANORAMA)  # of a batch, its own bytes alone
    write_latents(tmp_path / "d", given.mT.contiguous().mT, 16, PANORAMA)
    contents = {name: (tmp_path / name).read_bytes() for name in "abcd"}
    assert len(set(contents.values())) == 1
    assert given.nbytes < len(contents["a"]) < given.nbytes + 1000
    write_latents(tmp_path / "e", given, 8, PANORAMA)
    assert (tmp_path / "e").read_bytes() != contents["a"]


def test_a_clip_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "clip.safetensors"
    write_latents(path, latents(), 8, PANORAMA)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_latents(path, latents(4), 8, PANORAMA | {"seed": object()})
    assert path.read_bytes() == before and files(tmp_path) == ["clip.safetensors"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"x": torch.zeros(2)},
        {"latents": torch.zeros(2, 3)},
        {"latents": torch.zeros(1, 2, 16, 4, 4)},
        {"latents": torch.zeros(2, 16, 4, 4), "more": torch.zeros(1)},
    ],
)
def test_other_tensors_are_no_clip(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"about": json.dumps({"fps": 8})})
    refused([str(path), "holds no latents of a clip", ", ".join(sorted(tensors))], path)


def test_files_that_are_no_clip(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"latents": latents()}, path)
    refused([str(path), "holds no latents of a clip"], path)  # nothing says what it is
    write_latents(path, latents(), 8, PANORAMA)
    path.write_bytes(path.read_bytes()[:-1])
    refused([str(path), "cannot be read as safetensors"], path)
    assert files(tmp_path) == ["x.safetensors"]


# -- pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_becomes_the_video_of_its_latents(tmp_path, panorama, dtype):
    given = latents(4).to(dtype)
    write_latents(tmp_path / "clip.safetensors", given, 8, PANORAMA)
    done = decode(tmp_path / "clip.safetensors")
    assert (done.videos, done.kept) == ((tmp_path / "clip.mp4",), 0)
    assert done.out == tmp_path / "clip.mp4" and "1 video written to" in done.words[0]
    is_video_of(done.out, panorama.codec, given, [latents(4, seed=1)])
    assert shown(done.out)[1] == 8 and files(tmp_path) == ["clip.mp4", "clip.safetensors"]


def test_the_video_goes_where_it_is_wanted(tmp_path, panorama):
    clip, out = tmp_path / "clip.safetensors", tmp_path / "b.MP4"
    write_latents(clip, latents(), 12.5, PANORAMA)
    assert decode(clip, out).videos == (out,)
    assert shown(out)[1] == 12.5
    before = out.read_bytes()
    refused([str(out), "exists and would be lost", "--force"], clip, out)
    assert out.read_bytes() == before
    write_latents(clip, latents(5, seed=1), 8, PANORAMA)
    assert decode(clip, out, force=True).videos == (out,)
    is_video_of(out, panorama.codec, latents(5, seed=1), [latents(5)])
    for wrong in (tmp_path / "b.avi", tmp_path / "no" / "b.mp4", tmp_path):
        refused([str(wrong), "no place for a video", "ends in .mp4"], clip, wrong)
    assert files(tmp_path) == ["b.MP4", "clip.safetensors"]


def test_a_run_becomes_a_folder_of_videos(tmp_path, panorama):
    made = a_run(tmp_path)
    done = decode(tmp_path)
    assert done.out == tmp_path / "decoded" and (len(done.videos), done.kept) == (4, 0)
    for clip, given in made.items():
        inside = clip.relative_to(tmp_path / "latents").with_suffix(".mp4")
        others = [other for other in made.values() if other is not given]
        is_video_of(tmp_path / "decoded" / inside, panorama.codec, given, others)
    elsewhere = tmp_path / "other" / "place"
    assert decode(tmp_path, elsewhere).out == elsewhere
    assert files(elsewhere) == files(tmp_path / "decoded")
    assert len(files(elsewhere)) == 4


@pytest.mark.parametrize("name", ODD)
def test_names_with_odd_characters(tmp_path, panorama, name):
    made = a_run(tmp_path / name, [name], clips=0)
    clip = tmp_path / name / "latents" / name / f"{name}.safetensors"
    write_latents(clip, latents(), 8, PANORAMA)
    assert not made and files(tmp_path) == [f"{name}/latents/{name}/{name}.safetensors"]
    video = tmp_path / name / "decoded" / name / f"{name}.mp4"
    assert decode(tmp_path / name).videos == (video,)
    is_video_of(video, panorama.codec, latents())
    assert decode(clip).videos == (clip.with_name(f"{name}.mp4"),)


@pytest.mark.parametrize("name", ["a.b", "-o", "%03d"])
def test_names_with_odd_characters_in_the_folder_where_one_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_latents(Path(f"{name}.safetensors"), latents(), 8, PANORAMA)
    assert decode(Path(f"{name}.safetensors")).videos == (Path(f"{name}.mp4"),)
    assert shown(tmp_path / f"{name}.mp4")[0].shape == (3, 320, 320, 3)


def test_a_name_with_a_colon_in_the_folder_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_latents(Path("a:b.safetensors"), latents(), 8, PANORAMA)
    assert decode(Path("a:b.safetensors")).videos == (Path("a:b.mp4"),)


def test_a_run_is_taken_up_where_it_was_left(tmp_path, panorama):
    made = a_run(tmp_path)
    videos = decode(tmp_path).videos
    for video in videos:
        os.utime(video, (1, 1))
    videos[1].unlink()
    again = decode(tmp_path)
    assert (again.videos, again.kept) == ((videos[1],), 3)
    assert "1 video written" in again.words[0] and "3 were there already" in again.words[0]
    assert [video.stat().st_mtime == 1 for video in videos] == [True, False, True, True]
    is_video_of(videos[1], panorama.codec, list(made.values())[1])
    none = decode(tmp_path)
    assert (none.videos, none.kept) == ((), 4)
    whole = decode(tmp_path, force=True)
    assert (whole.videos, whole.kept) == (videos, 0)
    assert all(video.stat().st_mtime != 1 for video in videos)


def test_the_codec_is_that_of_the_clips_model(tmp_path, panorama, monkeypatch):
    """Each model is loaded once, and a clip of another model is decoded by that one."""
    basis = panorama.codec.basis.flip(1)
    codec = PatchCodec(panorama.codec.mean, basis, panorama.codec.scale)
    other = type(panorama)(panorama.network, codec, panorama.encoder)
    save_embedded(tmp_path / "other.safetensors", other, {})
    a_run(tmp_path / "run", ["full"], clips=2)
    path = tmp_path / "run" / "latents" / "full"
    for name in ("x", "y"):
        about = PANORAMA | {"model": str(tmp_path / "other.safetensors")}
        write_latents(path / f"{name}.safetensors", latents(), 8, about)
    loaded, real = [], module.load_embedded

    def load(weights, *more):
        loaded.append(weights.name)
        return real(weights, *more)

    monkeypatch.setattr(module, "load_embedded", load)
    decode(tmp_path / "run")
    assert loaded == ["panorama.safetensors", "other.safetensors"]
    video = tmp_path / "run" / "decoded" / "full" / "x.mp4"
    is_video_of(video, codec, latents())
    wanted = pictures(panorama.codec, latents())
    assert np.abs(shown(video)[0] / 255 - wanted).mean() > 0.05


# -- errors ----------------------------------------------------------------------------------


def test_what_holds_no_latents_is_said(tmp_path):
    (tmp_path / "latents").mkdir()
    for path in (tmp_path, tmp_path / "latents", tmp_path / "no", tmp_path / "no.safetensors"):
        refused(["no latents at", str(path), "--latents true"], path)
    assert files(tmp_path) == []


def test_a_model_that_is_not_here_is_said(tmp_path):
    path = tmp_path / "clip.safetensors"
    write_latents(path, latents(), 8, PANORAMA | {"model": "panoramma"})
    refused(["No model 'panoramma'", "Did you mean 'panorama'"], path)
    write_latents(path, latents(), 8, PANORAMA | {"model": str(tmp_path / "gone.yaml")})
    refused(["No model file", "gone.yaml"], path)
    refused(["no Wan VAE in", "nowhere"], path, vae=tmp_path / "nowhere")
    assert files(tmp_path) == ["clip.safetensors"]


def test_a_damaged_clip_stops_a_run_that_goes_on_later(tmp_path, panorama):
    made = list(a_run(tmp_path).items())
    path, given = made[2]
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    refused([str(path), "cannot be read as safetensors"], tmp_path)
    assert len(files(tmp_path / "decoded")) == 2
    path.write_bytes(whole)
    done = decode(tmp_path)
    assert (len(done.videos), done.kept) == (2, 2)
    is_video_of(done.videos[0], panorama.codec, given, [made[0][1]])


class Breaks(PatchCodec):
    """Gives out after two frames."""

    def stream(self, given):
        for number, piece in enumerate(super().stream(given)):
            if number == 2:
                raise RuntimeError("out of memory")
            yield piece


@pytest.fixture
def breaking(monkeypatch, panorama):
    codec = panorama.codec
    broken = Breaks(codec.mean, codec.basis, codec.scale)
    real = module._codec
    monkeypatch.setattr(module, "_codec", lambda *_: broken)
    return lambda: monkeypatch.setattr(module, "_codec", real)


@pytest.mark.parametrize("there", [False, True])
def test_no_video_is_half_written(tmp_path, panorama, breaking, there):
    clip, video = tmp_path / "clip.safetensors", tmp_path / "clip.mp4"
    write_latents(clip, latents(4), 8, PANORAMA)
    if there:
        video.write_bytes(b"an older video")
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(clip, force=there)
    assert files(tmp_path) == ["clip.mp4", "clip.safetensors"][not there :]
    if there:
        assert video.read_bytes() == b"an older video"
    breaking()
    decode(clip, force=there)
    is_video_of(video, panorama.codec, latents(4))


def test_videos_before_an_error_are_whole_and_kept(tmp_path, panorama, breaking):
    folder = tmp_path / "latents" / "full"
    given = {"a": latents(2), "b": latents(4, seed=1), "c": latents(2, seed=2)}
    for name, clip in given.items():
        write_latents(folder / f"{name}.safetensors", clip, 8, PANORAMA)
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(tmp_path)
    assert files(tmp_path / "decoded") == ["full/a.mp4"]
    breaking()
    done = decode(tmp_path)
    assert [video.name for video in done.videos] == ["b.mp4", "c.mp4"] and done.kept == 1
    for name, clip in given.items():
        is_video_of(tmp_path / "decoded" / "full" / f"{name}.mp4", panorama.codec, clip)


@pytest.mark.parametrize("about", ["{", "[]", '{"model": "panorama"}'])
def test_words_that_are_no_description_are_said(tmp_path, about):
    path = tmp_path / "x.safetensors"
    save_file({"latents": latents()}, path, {"about": about})
    refused([str(path)], path)


def test_a_file_where_the_folder_of_videos_should_be_is_said(tmp_path):
    a_run(tmp_path / "run", ["full"], clips=1)
    (tmp_path / "file").touch()
    refused([str(tmp_path / "file")], tmp_path / "run", tmp_path / "file")


def test_latents_that_are_no_numbers_are_said(tmp_path):
    write_latents(tmp_path / "x.safetensors", latents() * float("nan"), 8, PANORAMA)
    refused([], tmp_path / "x.safetensors")


def test_the_command_says_what_it_did(tmp_path, capsys):
    a_run(tmp_path, ["full"])
    main(["decode", str(tmp_path)])
    assert f"2 videos written to {tmp_path / 'decoded'}." in capsys.readouterr().out
    main(["decode", str(tmp_path)])
    assert "0 videos written" in (said := capsys.readouterr().out)
    assert "2 were there already" in said
    clip = tmp_path / "latents" / "full" / "clip-0.safetensors"
    main(["decode", str(clip), "-o", str(tmp_path / "x.mp4")])
    assert (tmp_path / "x.mp4").is_file()
    with pytest.raises(SystemExit) as stop:
        main(["decode", str(clip), "-o", str(tmp_path / "x.mp4")])
    assert stop.value.code == 2 and "would be lost" in capsys.readouterr().err
    main(["decode", str(clip), "-o", str(tmp_path / "x.mp4"), "--force"])
