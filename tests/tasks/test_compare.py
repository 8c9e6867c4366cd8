"""Comparisons of video files: against direct calls, with every kind of bad input."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_kv.cli import main
from lightning_kv.commands.compare import CompareOptions, compare
from lightning_kv.data.videos import VideoError, probe, read
from lightning_kv.metrics.backbones.base import RandomBackbone
from lightning_kv.metrics.fidelity import ssim
from lightning_kv.metrics.functional.frechet import frechet_distance
from lightning_kv.runs.directory import RunDirectory
from lightning_kv.runs.video import write_mp4
from lightning_kv.tasks.options import TrainerOptions

pytestmark = pytest.mark.usefixtures("no_page")


def options(root, *candidates, **given):
    """Of a comparison of folders inside of one; few metrics and no videos."""
    usual = {"metrics": ("psnr", "ssim"), "videos": 0, "threads": 1}
    names = () if "pairs" in given else ("full", *(candidates or ("near",)))
    usual |= {"out": root / "run", "folders": tuple(root / name for name in names)}
    return CompareOptions(**usual | {"trainer": TrainerOptions(accelerator="cpu")} | given)


def lines(run):
    """Record lines of a run."""
    files = sorted((run.path if isinstance(run, RunDirectory) else run).glob("records/*.jsonl"))
    return [line for file in files for line in file.read_text().splitlines()]


def strict_json(path):
    """A JSON file without NaN and Infinity."""

    def refuse(word):
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


def pixels(path):
    return torch.cat(list(read(path))).double() / 255


def test_the_numbers_are_those_of_the_frames(folders, page):
    found = compare(options(folders, "near", "far", metrics=("psnr", "ssim", "brightness")))
    assert found.skipped == () and found.notes == ()
    summary = strict_json(folders / "run" / "summary.json")
    assert list(summary["policies"]) == ["full", "near", "far"]
    for name in ("near", "far"):
        clips = summary["policies"][name]["units"]
        assert list(clips) == ["a", "b", "c", "deep/er"]
        for key, values in clips.items():
            right, judged = (pixels(folders / who / f"{key}.mp4") for who in ("full", name))
            errors = ((judged - right) ** 2).mean((1, 2, 3)).numpy()
            assert values["psnr"] == pytest.approx(-10 * np.log10(errors.mean()), abs=1e-6)
            direct = ssim(judged.float(), right.float()).mean().item()
            assert values["ssim"] == pytest.approx(direct, abs=1e-9)
        mean = np.mean([values["psnr"] for values in clips.values()])
        assert summary["policies"][name]["metrics"]["psnr"]["mean"] == pytest.approx(mean)
    full, near = (summary["policies"][name]["units"] for name in ("full", "near"))
    assert {values["psnr"] for values in full.values()} == {None}
    change = np.mean([near[key]["brightness"] - full[key]["brightness"] for key in full])
    paired = summary["policies"]["near"]["metrics"]["brightness"]["paired"]
    assert paired["difference"] == pytest.approx(change) and paired["n"] == 4
    assert summary["policies"]["near"]["metrics"]["psnr"]["paired"] is None
    text = (folders / "run" / "report.html").read_text()
    assert "near" in text and not re.search(r"\bnan\b", text, re.IGNORECASE)


def test_what_a_rollout_cost_is_not_invented(folders, capsys):
    compare(options(folders))
    policy = strict_json(folders / "run" / "summary.json")["policies"]["near"]
    assert set(policy["cost"].values()) == {None}
    with pytest.raises(SystemExit):
        main(["recommend", str(folders / "run")])
    assert "There is nothing to recommend" in capsys.readouterr().err


def test_a_table_of_pairs(folders):
    table = folders / "pairs.csv"
    rows = ["full/a.mp4,near/a.mp4,first,a street", "full/a.mp4,far/b.mp4,second,"]
    table.write_text("\n".join(["reference,candidate,key,prompt", *rows]))
    given = {"pairs": table}
    compare(options(folders, **given))
    records = [json.loads(line) for line in lines(folders / "run")]
    assert [(r["policy"], r["key"], r["prompt"]) for r in records] == [
        ("reference", "first", "a street"),
        ("candidate", "first", "a street"),
        ("reference", "second", "second"),
        ("candidate", "second", "second"),
    ]
    clips = strict_json(folders / "run" / "summary.json")["policies"]["candidate"]["units"]
    assert clips["a street"]["psnr"] > 20 + clips["second"]["psnr"]
    table.write_text(table.read_text().replace("a street", "a beach"))
    with pytest.raises(ValueError, match=r"another run.*prompts\.first \(there 'a street', asked"):
        compare(options(folders, **given))


@pytest.mark.parametrize("metrics", [("psnr",), ("psnr", "fvd/random-3dconv")])
def test_an_interrupted_comparison_goes_on(folders, metrics, video):
    for seed in range(4):
        for name in ("full", "near", "far"):  # long enough for a window of 8 frames
            key = ("a", "b", "c", "deep/er")[seed]
            path = folders / name / f"{key}.mp4"
            path.unlink()
            video(path, seed, frames=9, noise={"full": 0, "near": 4, "far": 30}[name])
    asked = options(folders, "near", "far", metrics=metrics)
    whole = compare(asked).summary
    (file,) = (folders / "run" / "records").iterdir()
    before = file.read_text().splitlines(keepends=True)
    assert len(before) == 12
    file.write_text("".join(before[:5]) + before[5][:40])
    again = compare(asked)
    after = file.read_text().splitlines(keepends=True)
    assert after == before and again.summary == whole
    assert compare(asked).summary == whole and file.read_text() == "".join(before)


def test_features_that_are_lost_are_made_again(folders, video):
    for key in "abcd":
        video(folders / "full" / f"{key}.mp4", ord(key), frames=9)
        video(folders / "near" / f"{key}.mp4", ord(key), frames=9, noise=5)
    asked = options(folders, metrics=("fvd/random-3dconv",))
    whole = compare(asked).summary
    assert whole["policies"]["near"]["metrics"]["fvd/random-3dconv"]["n"] == 4
    (folders / "run" / "features" / "policies" / "near" / "b.npz").unlink()
    again = compare(asked).summary
    assert again["policies"] == whole["policies"]
    (folders / "run" / "features" / "policies" / "near" / "b.npz").write_bytes(b"PK\3\4 damaged")
    with pytest.raises(ValueError, match=r"b\.npz cannot be read as features of clips"):
        compare(asked)


def cut(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize("who", ["near", "full"])
def test_a_broken_file_in_the_middle_is_skipped_and_said(folders, who, capsys):
    broken = folders / who / "b.mp4"
    cut(broken)
    words = ["compare", *(str(folders / name) for name in ("full", "near", "far"))]
    words += ["--out", str(folders / "run"), "--threads", "1", "--accelerator", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--strict"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and str(broken) in said and said.startswith("error: ")
    for _ in range(2):  # and when it is taken up again
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 1
        assert f"Skipped: {who} b: " in capsys.readouterr().out
    policies = strict_json(folders / "run" / "summary.json")["policies"]
    metric = policies["near"]["metrics"]["psnr"]
    assert metric["n"] == 3 and "1 of 4 clips failed" in metric["status"]
    assert policies["near"]["units"]["b"]["psnr"] is None
    assert policies["far"]["metrics"]["psnr"]["n"] == (4 if who == "near" else 3)
    assert policies["far"]["metrics"]["brightness"]["n"] == (4 if who == "near" else 3)
    assert len(lines(folders / "run")) == 12


def damage(path):
    """Zeros in the middle of the pictures: seen only while they are decoded."""
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    middle = start + (len(data) - start) // 2
    data[middle : middle + 3000] = bytes(3000)
    path.write_bytes(data)


def test_damage_inside_of_a_file_is_found_while_it_is_read(folders, video):
    path = video(folders / "near" / "b.mp4", 1, frames=40, size=(64, 64), noise=20)
    video(folders / "full" / "b.mp4", 1, frames=40, size=(64, 64))
    damage(path)
    found = compare(options(folders))
    assert (
        len(found.skipped) == 1 and "near b" in found.skipped[0] and str(path) in found.skipped[0]
    )
    with pytest.raises(VideoError, match=re.escape(str(path))):
        compare(options(folders, strict=True, out=folders / "other"))
    before = lines(found.run)
    with pytest.raises(
        ValueError, match=rf"--strict does not allow.*near b: {re.escape(str(path))}"
    ):
        compare(options(folders, strict=True))
    assert lines(found.run) == before


def test_no_file_can_be_read(folders):
    for path in folders.rglob("*.mp4"):
        path.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"None of 8 videos can be read\. The first: Cannot read"):
        compare(options(folders))
    assert not (folders / "run").exists()


@pytest.mark.parametrize(
    ("other", "said", "option"),
    [
        ({"frames": 9}, r"5 and 9 frames.*--length shortest", {"length": "shortest"}),
        ({"size": (40, 48)}, r"32x32 and 48x40.*--resize", {"resize": True}),
        ({"fps": 12}, r"8 and 12 frames per second.*--fps ignore", {"fps": "ignore"}),
    ],
)
def test_videos_that_differ(folders, video, other, said, option):
    video(folders / "near" / "b.mp4", 1, **other)
    found = compare(options(folders))
    assert len(found.skipped) == 1 and re.search(f"near b: .*{said}", found.skipped[0])
    assert found.summary["policies"]["near"]["metrics"]["psnr"]["n"] == 3
    solved = compare(options(folders, out=folders / "solved", **option))
    assert solved.skipped == ()
    assert solved.summary["policies"]["near"]["metrics"]["psnr"]["n"] == 4
    with pytest.raises(ValueError, match="holds another run"):
        compare(options(folders, **option))
    for wrong in option.keys() - {"resize"}:
        with pytest.raises(ValueError, match="cannot be aligned so"):
            compare(options(folders, out=folders / "new", **{wrong: "somehow"}))


def test_the_shortest_leaves_out_the_end(folders, video):
    video(folders / "near" / "b.mp4", 1, frames=9)
    found = compare(options(folders, length="shortest"))
    (record,) = (json.loads(line) for line in lines(found.run) if '"near", "key": "b"' in line)
    assert len(record["curves"]["psnr"]) == 5 and record["metrics"]["psnr"] > 35


def fading(path, frames, step=6):
    """A grey picture that gets darker by as much in every frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shots = [np.full((1, 32, 32, 3), 220 - step * index, np.uint8) for index in range(frames)]
    write_mp4(path, iter(shots), 8)


def test_all_of_a_clip_are_cut_to_its_shortest(tmp_path, video):
    lengths = {"full": 24, "near": 16, "far": 20}
    for key in "abcdef":
        for name, frames in lengths.items():
            fading(tmp_path / name / f"{key}.mp4", frames)
    video(tmp_path / "far" / "a.mp4", 1, frames=3, size=(64, 64))  # does not fit: cuts nobody
    asked = options(
        tmp_path,
        *("near", "far"),
        metrics=("psnr", "brightness", "fvd/random-3dconv"),
        length="shortest",
        videos=2,
    )
    found = compare(asked)
    assert len(found.skipped) == 1 and found.skipped[0].startswith("far a: ")
    for record in map(json.loads, lines(found.run)):
        assert {len(curve) for curve in record["curves"].values()} <= {16}
        assert record["curves"] or record["failure"]
    rows = found.summary["policies"]["near"]["metrics"]
    assert rows["brightness"]["paired"]["difference"] == 0
    assert rows["psnr"]["mean"] == pytest.approx(100, rel=1e-12)
    assert [rows["fvd/random-3dconv"][n] for n in ("n", "windows", "windows_real")] == [6, 12, 12]
    for row in rows.values():
        assert row["recipe"].endswith("; length=shortest,size=equal,fps=equal")
    assert {probe(found.run.videos / f"{key}.mp4").frames for key in "ab"} == {16}


def test_recipes_say_the_alignment_where_it_matters(folders):
    plain = compare(options(folders)).summary["policies"]["near"]["metrics"]
    resized = compare(options(folders, resize=True, out=folders / "b")).summary["policies"]
    for name, row in plain.items():
        said = f"{row['recipe']}; length=equal,size=resize(bicubic,antialias),fps=equal"
        assert resized["near"]["metrics"][name]["recipe"] == said


def test_a_candidate_that_does_not_fit_is_left_out_of_the_film(folders, video):
    video(folders / "far" / "a.mp4", 1, size=(64, 64))
    damage(video(folders / "far" / "b.mp4", 1, frames=40, size=(64, 64), noise=20))
    for name in ("full", "near"):
        video(folders / name / "b.mp4", 1, frames=40, size=(64, 64))
    sizes = []
    asked = options(folders, "near", "far", videos=3)
    for each in (asked, asked, options(folders, videos=3, out=folders / "alone")):
        run = compare(each).run
        films = [folder / f"{key}.mp4" for key in "abc" for folder in (run.videos, run.differences)]
        shown = [probe(path) for path in films]
        sizes.append([(info.frames, info.height, info.width) for info in shown])
        for path in films:  # those that are lost are made again
            path.unlink()
    both, again, alone = sizes
    assert both == again and both[:4] == alone[:4], "as if near were the only one"
    assert all(wide[2] > narrow[2] for wide, narrow in zip(both[4:], alone[4:], strict=True))


def test_one_frame_and_one_colour(tmp_path, video):
    for name, noise in (("full", 0), ("near", 9)):
        video(tmp_path / name / "one.mp4", 1, frames=1, noise=noise)
        video(tmp_path / name / "grey.mp4", 2, frames=9, colour=128)
    found = compare(options(tmp_path, metrics=None, videos=5))
    assert found.skipped == ()
    clips = strict_json(found.run.summary)["policies"]["near"]["units"]
    assert clips["one"]["temporal_flicker"] is None and clips["one"]["psnr"] is not None
    assert clips["grey"]["psnr"] == 100 and clips["grey"]["ssim"] == 1
    assert {path.name for path in found.run.videos.glob("*.mp4")} == {"one.mp4", "grey.mp4"}
    assert "nan" not in " ".join(lines(found.run)).lower()


def test_what_has_no_partner_is_named(folders):
    (folders / "near" / "b.mp4").unlink()
    (folders / "full" / "c.mp4").unlink()
    found = compare(options(folders))
    assert found.notes == (
        "1 videos of full have no partner in near and are left out: b.",
        "1 videos of near have no partner in full and are left out: c.",
    )
    assert list(found.summary["policies"]["near"]["units"]) == ["a", "deep/er"]


def test_a_metric_that_cannot_judge_a_clip_costs_itself_alone(folders, video):
    for name in ("full", "near"):
        video(folders / name / "large.mp4", 3, size=(176, 176))
    found = compare(options(folders, metrics=("psnr", "ms_ssim")))
    assert found.skipped == ()
    (note,) = found.notes
    assert note.startswith("ms_ssim has no value for 4 videos. The first: near a: ")
    rows = found.summary["policies"]["near"]["metrics"]
    assert (rows["psnr"]["n"], rows["psnr"]["status"]) == (5, "ok")
    assert rows["ms_ssim"]["n"] == 1
    assert rows["ms_ssim"]["status"].startswith("4 of 5 clips have no value: ")
    assert "too small for MS-SSIM" in rows["ms_ssim"]["status"]
    for record in map(json.loads, lines(found.run)):
        judged = record["policy"] == "full" or record["key"] == "large"
        assert list(record["problems"]) == ([] if judged else ["ms_ssim"])
        assert ("ms_ssim" in record["curves"]) == (record["policy"] == "near" and judged)
    asked = options(folders, metrics=("ms_ssim",), strict=True, out=folders / "other")
    with pytest.raises(ValueError, match="too small for MS-SSIM"):
        compare(asked)


def test_a_metric_that_can_judge_no_clip_says_why(folders):
    found = compare(options(folders, metrics=("brightness", "ms_ssim"))).summary["policies"]
    status = found["near"]["metrics"]["ms_ssim"]["status"]
    assert status.startswith("no value: ") and "too small for MS-SSIM" in status
    assert found["near"]["metrics"]["brightness"]["n"] == 4
    assert found["full"]["metrics"]["ms_ssim"]["status"] == "no value: this is the reference itself"


def test_an_encoder_that_cannot_judge_a_clip_costs_its_metrics_alone(folders, video, monkeypatch):
    for key in "abc":
        for name in ("full", "near"):
            video(folders / name / f"{key}.mp4", ord(key), frames=9, noise=4 * (name == "near"))
    judge = RandomBackbone.forward

    def picky(self, clips):
        if clips.shape[-1] < 40:
            raise ValueError("The clip is too narrow. Given 32 pixels. Give 40.")
        return judge(self, clips)

    monkeypatch.setattr(RandomBackbone, "forward", picky)
    for name in ("full", "near"):
        video(folders / name / "deep" / "er.mp4", 9, frames=17, size=(32, 64))
    found = compare(options(folders, metrics=("psnr", "fvd/random-3dconv")))
    rows = found.summary["policies"]["near"]["metrics"]
    assert found.skipped == () and rows["psnr"]["n"] == 4
    assert [rows["fvd/random-3dconv"][n] for n in ("n", "windows", "windows_real")] == [1, 2, 2]
    assert found.notes[0].startswith("fvd/random-3dconv has no value for 6 videos.")
    assert "too narrow" in found.notes[0]


def test_sets_without_pairs(tmp_path, video):
    for seed in range(6):
        video(tmp_path / "full" / f"{seed}.mp4", seed, frames=17)
        video(tmp_path / "near" / f"other{seed}.mp4", seed + 50, frames=17, noise=9)
    found = compare(
        options(tmp_path, metrics=("fvd/random-3dconv", "sharpness"), unpaired=True, videos=2)
    )
    policies = strict_json(found.run.summary)["policies"]
    result = policies["near"]["metrics"]["fvd/random-3dconv"]
    encoder, sets = RandomBackbone(3), []
    for name in ("full", "near"):
        clips = [pixels(path).float() for path in sorted((tmp_path / name).glob("*.mp4"))]
        sets.append(encoder(torch.stack([c[i : i + 8] for c in clips for i in (0, 8)])))
    assert [result[n] for n in ("n", "windows", "windows_real")] == [6, 12, 12]
    assert result["mean"] == pytest.approx(frechet_distance(sets[1], sets[0]).item(), rel=1e-3)
    assert {"null", "status", "ci95", "se"} <= result.keys()
    assert result["against"] == "the clips of full" and result["paired"] is None
    assert policies["near"]["metrics"]["sharpness"]["paired"] is None
    assert policies["full"]["metrics"]["fvd/random-3dconv"]["mean"] is None
    assert "near/other3" in policies["near"]["units"]


def test_a_real_set_tells_who_is_nearer(tmp_path, video):
    for seed in range(7):
        key = f"{seed}.mp4"
        video(tmp_path / "real" / "inside" / key, seed + 90, frames=8)
        video(tmp_path / "full" / key, seed, frames=8)
        video(tmp_path / "near" / key, seed, frames=8, noise=40)
    asked = options(tmp_path, metrics=("fvd/random-3dconv",), real=tmp_path / "real")
    found = compare(asked).summary["policies"]
    own, base = (found[name]["metrics"]["fvd/random-3dconv"] for name in ("near", "full"))
    assert own["against"] == base["against"] == "the real set"
    assert own["paired"]["difference"] == pytest.approx(own["mean"] - base["mean"], abs=1e-9)
    assert own["paired"]["n"] == 7 and 0 < own["paired"]["p_holm"] <= 1
    assert base["paired"] is None
    video(tmp_path / "real" / "more.mp4", 5, frames=8)
    with pytest.raises(ValueError, match=r"another run.*real\.more"):
        compare(asked)
    apart = compare(
        options(
            tmp_path,
            metrics=("fvd/random-3dconv",),
            real=tmp_path / "real",
            unpaired=True,
            out=tmp_path / "apart",
        )
    ).summary["policies"]["near"]["metrics"]["fvd/random-3dconv"]
    assert apart["mean"] is not None and apart["paired"] is None


def test_a_bad_real_file_is_skipped_and_said(tmp_path, video, capsys):
    for seed in range(7):
        for name in ("real", "full", "near"):
            video(tmp_path / name / f"{seed}.mp4", seed + 90 * (name == "real"), frames=8)
    damage(video(tmp_path / "real" / "bad.mp4", 1, frames=40, size=(64, 64), noise=20))
    video(tmp_path / "real" / "short.mp4", 1, frames=5)
    asked = options(tmp_path, metrics=("fvd/random-3dconv",), real=tmp_path / "real")
    for _ in range(2):
        found = compare(asked)
        assert [said.partition(":")[0] for said in found.skipped] == ["real bad", "real short"]
        assert (
            found.summary["policies"]["near"]["metrics"]["fvd/random-3dconv"]["windows_real"] == 7
        )
    with pytest.raises(ValueError, match=r"--strict does not allow.*real bad"):
        compare(replace(asked, strict=True))


def test_sets_that_are_too_small_or_constant_have_a_status(tmp_path, video):
    for seed in range(3):
        for name in ("full", "near"):
            video(tmp_path / name / f"{seed}.mp4", seed, frames=9, colour=99)
        video(tmp_path / "short" / f"{seed}.mp4", seed, frames=5)
    found = compare(
        options(
            tmp_path,
            "near",
            "short",
            metrics=("fvd/random-3dconv", "kvd/random-3dconv"),
            length="shortest",
        )
    ).summary["policies"]
    assert found["short"]["metrics"]["fvd/random-3dconv"]["n"] == 0
    for name in ("near", "short"):
        metric = found[name]["metrics"]["fvd/random-3dconv"]
        assert metric["mean"] is None and metric["status"].startswith("no value: ")


def test_weights_that_are_not_here_are_a_row(folders, monkeypatch, tmp_path, page):
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path / "none"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    found = compare(options(folders, metrics=("psnr", "lpips/vgg")))
    metric = found.summary["policies"]["near"]["metrics"]["lpips/vgg"]
    assert metric["mean"] is None and "unavailable: The weights" in metric["status"]
    assert "unavailable" in found.run.report.read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"candidates": ()}, "Nothing to compare: given 1 folder"),
        ({"candidates": ("near", "near")}, "A folder is given twice"),
        ({"candidates": ("full",)}, "A folder is given twice"),
        ({"candidates": ("nowhere",)}, "There is no such folder"),
        ({"candidates": ("empty",)}, "No video of .* has a partner in .*empty"),
        ({"candidates": ("empty",), "unpaired": True, "metrics": None}, "There are no videos in"),
        ({"pairs": "pairs.csv"}, "--pairs .* says what is compared"),
        ({"metrics": ()}, "No metric is named"),
        ({"metrics": ("recall",)}, "it needs latents and the panorama world"),
        ({"metrics": ("psnr",), "unpaired": True}, "it needs pixels of a reference"),
        ({"metrics": ("psnr", "psnr")}, "named twice"),
        ({"metrics": ("pnsr",)}, "Did you mean 'psnr'"),
        ({"real": "near"}, "--real .* does nothing: no metric compares sets"),
        ({"real": "empty", "metrics": ("fvd/random-3dconv",)}, "There are no videos in --real"),
        ({"real": "nowhere", "metrics": ("fvd/random-3dconv",)}, "no such folder"),
        ({"threads": 0}, "--threads 0"),
        ({"videos": -1}, "--videos -1"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(folders, given, said):
    (folders / "empty").mkdir()
    paths = {key: folders / value for key, value in given.items() if key in ("pairs", "real")}
    names = ("full", *given.get("candidates", ("near",)))
    given = {key: value for key, value in given.items() if key != "candidates"}
    with pytest.raises(ValueError, match=said):
        compare(options(folders, **given | paths | {"folders": [folders / x for x in names]}))
    assert not (folders / "run").exists()


def test_another_run_is_not_mixed_in(folders, video):
    compare(options(folders))
    before = lines(folders / "run")
    for other in ({"metrics": ("psnr",)}, {"folders": (folders / "full", folders / "far")}):
        with pytest.raises(ValueError, match="holds another run"):
            compare(options(folders, **other))
    with pytest.raises(ValueError, match=r"another run.*threads \(there 1, asked 2\)"):
        compare(options(folders, threads=2))
    video(folders / "near" / "a.mp4", 9)
    with pytest.raises(ValueError, match=r"another run.*files\.near\.a"):
        compare(options(folders))
    (folders / "plain").mkdir()
    (folders / "plain" / "mine.txt").write_text("a file of mine")
    with pytest.raises(ValueError, match="no run directory"):
        compare(options(folders, out=folders / "plain"))
    assert lines(folders / "run") == before


ROLLOUTS = Path(__file__).parents[3] / "shared" / "videos" / "rollouts"
KEYS = ("longlive_5s_01", "self_forcing_5s_01")


@pytest.mark.skipif(not ROLLOUTS.is_dir(), reason=f"no recorded rollouts in {ROLLOUTS}")
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.slow
def test_recorded_rollouts(tmp_path, table, capsys):
    names = {"full": "baseline", "forcing": "forcingkv"}
    words = ["--out", str(tmp_path / "run"), "--metrics", "[psnr]", "--videos", "0"]
    words += ["--threads", "1", "--accelerator", "cpu"]
    if table:
        rows = [",".join(str(ROLLOUTS / f"{k}_{w}.mp4") for w in names.values()) for k in KEYS]
        keyed = [f"{row},{key}" for row, key in zip(rows, KEYS, strict=True)]
        (tmp_path / "pairs.csv").write_text("\n".join(["reference,candidate,key", *keyed]))
        main(["compare", "--pairs", str(tmp_path / "pairs.csv"), *words])
    else:
        for name, ending in names.items():
            (tmp_path / name).mkdir()
            for key in KEYS:
                (tmp_path / name / f"{key}.mp4").symlink_to(ROLLOUTS / f"{key}_{ending}.mp4")
        main(["compare", *(str(tmp_path / name) for name in names), *words])
    candidate = "candidate" if table else "forcing"
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"{candidate} against {'reference' if table else 'full'}, over 2" in said
    found = strict_json(tmp_path / "run" / "summary.json")["policies"][candidate]
    assert list(found["units"]) == list(KEYS)
    shown = (read(ROLLOUTS / f"{KEYS[0]}_{ending}.mp4") for ending in names.values())
    errors = [
        error
        for right, judged in zip(*shown, strict=True)
        for error in ((judged.float() - right) / 255).square().mean((1, 2, 3)).tolist()
    ]
    assert len(errors) == 81 and min(errors) > 1e-10
    direct = -10 * np.log10(np.mean(errors))
    assert found["units"][KEYS[0]]["psnr"] == pytest.approx(direct, abs=1e-4)


def test_folders_without_pairs_and_no_other_word(folders, capsys):
    words = ["compare", str(folders / "full"), str(folders / "near"), "--unpaired"]
    main([*words, "--out", str(folders / "run")])
    assert "Results are in" in capsys.readouterr().out
    rows = strict_json(folders / "run" / "summary.json")["policies"]["near"]["metrics"]
    assert {row["n"] for row in rows.values()} == {4} and "brightness" in rows


PEAK = """
import sys
from pathlib import Path
from lightning_kv.commands import compare

compare.conclude = lambda run: {}  # the page takes more memory than any clip, so it would hide it
for frames in ("40", "160"):
    root = Path(sys.argv[1]) / frames
    folders = {"folders": (root / "full", root / "near"), "out": root / "run"}
    metrics = ("psnr", "temporal_flicker", "fvd/random-3dconv")
    asked = compare.CompareOptions(**folders, metrics=metrics, threads=1, videos=1)
    compare.compare(asked)
    (peak,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    print(int(peak.split()[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc to read memory from")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_clips(tmp_path, video):
    for frames in (40, 160):
        for name, noise in (("full", 0), ("near", 3)):
            video(tmp_path / f"{frames}" / name / "a.mp4", 1, frames, (192, 192), noise)
    words = [sys.executable, "-c", PEAK, str(tmp_path)]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    short, long = map(int, found.stdout.split()[-2:])
    # As floats, 120 frames more of both videos are 106 MB.
    assert long - short < 40, (short, long)


@pytest.mark.parametrize("spread", [["--devices", "2"], ["--workers", "3"]], ids=lambda x: x[0])
@pytest.mark.slow
def test_ranks_and_workers_say_what_one_process_says(folders, video, spread):
    metrics = "psnr,ssim,temporal_flicker,fvd/random-3dconv"
    for name, noise in (("full", 0), ("near", 4), ("far", 30)):
        for seed, key in enumerate("abcd"):
            video(folders / name / f"{key}.mp4", seed, frames=9, noise=noise)
    damage(video(folders / "far" / "c.mp4", 3, frames=40, noise=9))
    names = [str(folders / name) for name in ("full", "near", "far")]
    words = ["compare", *names, "--metrics", metrics, "--videos", "1", "--accelerator", "cpu"]
    with pytest.raises(SystemExit) as one:
        main([*words, "--out", str(folders / "one")])
    more = [sys.executable, "-m", "lightning_kv", *words, "--out", str(folders / "more"), *spread]
    found = subprocess.run(more, capture_output=True, text=True, timeout=200)
    assert (one.value.code, found.returncode) == (1, 1), found.stderr
    first, second = (strict_json(folders / run / "summary.json") for run in ("one", "more"))
    assert first["policies"] == second["policies"]
    assert first["policies"]["far"]["metrics"]["psnr"]["n"] == 4
    ranks = {json.loads(line)["rank"] for line in lines(folders / "more")}
    assert ranks == ({0, 1} if spread[0] == "--devices" else {0})
    assert len(list((folders / "more" / "videos").glob("*.mp4"))) == 1
