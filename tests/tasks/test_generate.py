"""One video: its length, its prompt switches, what it cost, what is refused."""

import math
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_kv import preset, rollout
from lightning_kv.cli import main
from lightning_kv.data.panorama import PALETTES
from lightning_kv.models import WanConfig
from lightning_kv.tasks import generate as generate_module
from lightning_kv.tasks.generate import generate
from lightning_kv.tasks.options import GenerateOptions
from lightning_kv.tasks.rollouts.lengths import FrameTimes, read_size, read_switches

PROMPT = "noon fast n7 left"


def frames_of(path):
    with av.open(str(path)) as video:
        rate = float(video.streams.video[0].average_rate)
        return [f.to_ndarray(format="rgb24") for f in video.decode(video=0)], rate


def test_a_video_is_the_rollout_enlarged(tmp_path, panorama):
    options = GenerateOptions(PROMPT, tmp_path / "a.mp4", policy="top-attention@3f", seconds=1.5)
    made = generate(options)
    shown, rate = frames_of(options.out)
    assert (len(shown), shown[0].shape, rate) == (12, (320, 320, 3), 8)
    plain = rollout(panorama, preset("top-attention@3f"), PROMPT, 12, seed=0)
    expected = plain.frames[0].permute(0, 2, 3, 1).repeat_interleave(10, 1).repeat_interleave(10, 2)
    assert np.abs(np.stack(shown) / 255 - expected.numpy()).mean() < 0.02
    cost = plain.costs[0]
    assert (made.peak_bytes, made.rows_read, made.rows_scored) == (
        cost.peak_bytes,
        cost.rows_read,
        cost.rows_scored,
    )
    text = "\n".join(made.words)
    assert "12 frames, 1.5 s at 8 frames/s" in text and "top-attention@3f" in text
    share = round(100 * made.rows_read / made.rows_all)
    assert 0 < share < 100 and f"({share} %)" in text and "only scored" in text
    assert not made.notes


@pytest.mark.parametrize("frames", [3, 12, 30])
def test_the_rows_of_the_history_are_those_that_the_full_cache_reads(panorama, frames):
    full = rollout(panorama, preset("full"), PROMPT, frames, decode=False)
    assert full.costs[0].rows_history == full.costs[0].rows_read
    chunks = frames // 3
    assert full.costs[0].rows_read == 5 * 6 * 4 * (48 * 48 * chunks * (chunks - 1) // 2)


def times_of(fps, chunk, stride):
    return FrameTimes(
        WanConfig(dim=64, ffn_dim=64, layers=1, heads=1, chunk=chunk, stride=stride), fps
    )


STRIDES = st.sampled_from([(1, 8), (4, 8), (8, 16)])


def test_a_switch_changes_the_colours_at_its_chunk(tmp_path):
    options = GenerateOptions(
        "dusk fast n7 left",
        tmp_path / "a.mp4",
        seconds=4.0,
        switches=("night fast n7 left@2",),
    )
    made = generate(options)
    shown, _ = frames_of(options.out)
    assert len(shown) == 33
    assert made.notes[0].startswith("4 s became 4.125 s: 33 latent frames")
    assert "at 2 s comes at 1.875 s" in made.notes[1]
    assert len(made.notes) == 2
    before, after = (np.array(PALETTES[name][0]) for name in ("dusk", "night"))
    skies = [frame[:8].reshape(-1, 3).mean(0) / 255 for frame in shown]
    nearer = [np.abs(sky - after).sum() < np.abs(sky - before).sum() for sky in skies]
    assert not any(nearer[:15]) and np.mean(nearer[-9:]) > 0.9
    untouched = generate(GenerateOptions("dusk fast n7 left", tmp_path / "b.mp4", seconds=4.0))
    same, _ = frames_of(untouched.out)
    change = [np.abs(a.astype(int) - b).mean() for a, b in zip(shown, same, strict=True)]
    assert max(change[:12]) < 2 < change[15]


@given(st.floats(0.01, 100), st.floats(0.5, 60), st.integers(1, 8), STRIDES)
def test_latent_frames_cover_the_time_in_whole_chunks(seconds, fps, chunk, stride):
    frames = times_of(fps, chunk, stride).frames(seconds)
    assert frames % chunk == 0
    shown = [1 + stride[0] * (n - 1) if n else 0 for n in (frames - chunk, frames)]
    assert shown[0] / fps < seconds <= shown[1] / fps + 1e-6 / fps


def test_published_lengths():
    """21 latent frames are 81 pictures, 5.06 s at 16 a second; 120 are 477, 240 are 957."""
    wan = times_of(16, 3, (4, 8))
    assert [wan.config.pixel_frames(n) for n in (1, 21, 120, 240)] == [1, 81, 477, 957]
    assert wan.frames(5.0625) == 21 and wan.seconds(21) == 5.0625 and wan.frames(5.07) == 24


def test_a_product_that_rounds_badly_adds_no_frame():
    assert math.ceil(8.3 * 30) == 250
    assert times_of(30, 3, (1, 8)).frames(8.3) == 249


@given(st.floats(0.6, 8.9), st.integers(0, 3), STRIDES)
def test_a_switch_comes_with_its_chunk(moment, spaces, stride):
    when = times_of(16, 3, stride)
    text = f"{PROMPT}{' ' * spaces}@{moment!r}"
    frames = when.frames(9)
    try:
        (switch,) = read_switches([text], frames, when, str)
    except ValueError as error:
        assert "in the first chunk" in str(error) and moment < when.seconds(3)
        return
    assert switch.frame % 3 == 0 and switch.prompt == PROMPT
    assert when.seconds(switch.frame) - 1e-6 <= moment < when.seconds(switch.frame + 3)


def test_sizes_are_whole_patches():
    wan = WanConfig(dim=64, ffn_dim=64, layers=1, heads=1)
    assert read_size(None, wan) == (60, 104) and read_size("480x832", wan) == (60, 104)
    assert read_size("256X448", wan) == (32, 56)
    for text, words in (
        ("480x830", "Use 480 x 832"),
        ("8x832", "Use 16 x 832"),
        ("480", "Write HEIGHTxWIDTH"),
        ("-480x832", "Write HEIGHTxWIDTH"),
        ("axb", "Write HEIGHTxWIDTH"),
    ):
        with pytest.raises(ValueError, match=words):
            read_size(text, wan)


def test_switches_are_sorted():
    texts = [f"{PROMPT}@3", "mist slow n4 any@1.5"]
    found = read_switches(texts, 48, times_of(8, 3, (1, 8)), str)
    assert [(s.event.frame, s.event.prompt) for s in found] == [
        (12, "mist slow n4 any"),
        (24, PROMPT),
    ]


def refused(tmp_path, **changed):
    given = {"prompt": PROMPT, "out": tmp_path / "a.mp4", "seconds": 3.0} | changed
    with pytest.raises(ValueError) as error:
        generate(GenerateOptions(**given))
    assert not (tmp_path / "a.mp4").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"prompt": "a cat on the moon"}, "Try 'dusk fast n13 left'"),
        ({"prompt": ""}, "Try 'dusk fast n13 left'"),
        ({"seconds": 0.0}, "--seconds 0 makes no video"),
        ({"seconds": -1.0}, "above 0"),
        ({"seconds": math.nan}, "--seconds nan"),
        ({"seconds": math.inf}, "--seconds inf"),
        ({"fps": 0.0}, "--fps 0"),
        ({"threads": 0}, "leaves nobody to work"),
        ({"policy": "slidng-window"}, "Did you mean 'sliding-window'?"),
        ({"policy": "sliding-window@60f"}, "must lie between 1f and 21f"),
        ({"policy": "{name: x, retain: [}"}, "is no YAML mapping"),
        ({"policy": "{retain: window}"}, "without `name:`"),
        ({"model": "panorma"}, "Did you mean 'panorama'?"),
        ({"switches": ("night fast n7 left",)}, "TEXT@SECONDS"),
        ({"switches": ("night fast n7 left@soon",)}, "TEXT@SECONDS"),
        ({"switches": ("night fast n7 left@nan",)}, "TEXT@SECONDS"),
        ({"switches": ("@2",)}, "Try 'dusk fast n13 left'"),
        ({"switches": ("a cat@2",)}, "Try 'dusk fast n13 left'"),
        ({"switches": (f"{PROMPT}@3",)}, "switches beyond the end: the video is 3 s long"),
        ({"switches": (f"{PROMPT}@0.3",)}, "in the first chunk"),
        ({"switches": (f"{PROMPT}@-2",)}, "in the first chunk"),
        ({"switches": (f"{PROMPT}@1.6", "mist slow n4 any@1.7")}, "would both come at 1.5 s"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(tmp_path, changed, text):
    assert text in refused(tmp_path, **changed)


def test_files_are_not_lost(tmp_path):
    there = tmp_path / "there.mp4"
    there.write_text("mine")
    assert "exists and would be lost" in refused(tmp_path, out=there)
    assert there.read_text() == "mine"
    assert "does not end so. Give -o" in refused(tmp_path, out=tmp_path / "a.gif")
    assert "No folder" in refused(tmp_path, out=tmp_path / "none" / "a.mp4")
    (tmp_path / "folder.mp4").mkdir()
    assert "exists" in refused(tmp_path, out=tmp_path / "folder.mp4", force=True)
    generate(GenerateOptions(PROMPT, there, seconds=0.5, force=True))
    assert len(frames_of(there)[0]) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(tmp_path):
    assert "There is no GPU that torch can use" in refused(tmp_path, accelerator="gpu")


def test_more_frames_than_the_model_knows_are_said(tmp_path):
    made = generate(
        GenerateOptions(PROMPT, tmp_path / "a.mp4", policy="sliding-window@3f", seconds=10.0)
    )
    assert "81 frames exceed the 72" in made.notes[-1]


def test_a_rollout_that_breaks_down_gives_no_video(tmp_path, monkeypatch, capsys):
    def broken(*given, **named):
        made = rollout(*given, **named)
        latents = made.latents.clone()
        latents[0, 7] = float("nan")
        return replace(made, latents=latents)

    monkeypatch.setattr(generate_module, "rollout", broken)
    out = tmp_path / "out.mp4"
    with pytest.raises(SystemExit):
        main(["generate", "dusk fast n10 left", "--seconds", "1.5", "-o", str(out)])
    assert "not finite from frame 7 on" in capsys.readouterr().err
    assert not out.exists()
