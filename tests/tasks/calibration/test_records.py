"""Records of clips on disk: written and read; damaged ones, and those of others, are refused."""

from dataclasses import replace

import pytest
import torch

from lightning_kv.calibration.clips import ClipRecord
from lightning_kv.data.shards import PromptSample
from lightning_kv.tasks.calibration.records import CalibrationDirectory, Wanted

SAMPLE = PromptSample("clip/1", "a dog", 7)


def record(validates=True):
    rng = torch.Generator().manual_seed(1)
    made = {
        "norm": torch.tensor(2.0).double(),
        "gn/mass": torch.randn(2, 3, generator=rng).double(),
    }
    made |= {"zero": torch.ones(2).double()} if validates else {}
    sites = {(10, 3): made, (2, 0): {name: own * 2 for name, own in made.items()}}
    return ClipRecord("clip/1-s1", "clip/1", sites, {"mass": torch.rand(2, generator=rng)})


@pytest.fixture
def run(tmp_path):
    made = CalibrationDirectory(tmp_path / "run")
    made.open("mark", {"a": 1})
    return made


def test_what_is_written_is_read(run):
    run.write(record(), SAMPLE)
    found, own = run.read("clip/1-s1"), record()
    assert (found.key, found.unit, found.validates) == (own.key, own.unit, True)
    assert found.sites.keys() == own.sites.keys()
    for place, site in own.sites.items():
        assert all(torch.equal(found.sites[place][name], value) for name, value in site.items())
    assert torch.equal(found.profile["mass"], own.profile["mass"])
    before = run.file_of(own.key).read_bytes()
    run.write(record(), SAMPLE)
    assert run.file_of(own.key).read_bytes() == before
    assert sorted(p.name for p in run.path.iterdir()) == ["clips", "run.json"]
    assert len(list((run.path / "clips").iterdir())) == 1  # a name of one's own, and nothing else


def test_what_is_finished_is_what_was_asked_for(run):
    plain, exact = Wanted(SAMPLE, False), Wanted(SAMPLE, True)
    key = "clip/1-s1"
    assert run.finished({key: plain}) == set()
    run.write(record(validates=False), SAMPLE)
    assert run.finished({key: plain, "other": plain}) == {key}
    assert run.finished({key: exact}) == set()  # it has to be measured exactly too
    run.write(record(), SAMPLE)
    assert run.finished({key: exact}) == run.finished({key: plain}) == {key}


@pytest.mark.parametrize("other", [{"prompt": "a cat"}, {"world_seed": 8}])
def test_the_record_of_another_clip_is_refused(run, other):
    run.write(record(), SAMPLE)
    wanted = {"clip/1-s1": Wanted(SAMPLE._replace(**other), False)}
    with pytest.raises(ValueError, match=r"record of another clip that is called 'clip/1-s1'"):
        run.finished(wanted)


def test_a_video_is_known_by_its_content(run, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"one")
    sample = SAMPLE._replace(video=tmp_path / "a.mp4")
    run.write(record(), sample)
    assert run.finished({"clip/1-s1": Wanted(sample._replace(world_seed=9), False)})
    (tmp_path / "a.mp4").write_bytes(b"two")
    with pytest.raises(ValueError, match="another clip"):
        run.finished({"clip/1-s1": Wanted(sample, False)})


@pytest.mark.parametrize("content", [b"", b"not a file", None])
def test_a_damaged_record_is_named(run, content):
    run.write(record(), SAMPLE)
    path = run.file_of("clip/1-s1")
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match=r"clip_1-s1.*cannot be read.*Remove the file"):
        run.finished({"clip/1-s1": Wanted(SAMPLE, False)})


def test_what_a_crash_has_left_is_no_record(run):
    run.write(record(), SAMPLE)
    path = run.file_of("clip/1-s1")
    path.rename(path.with_name(f".{path.name}.0.tmp"))  # as it is called until it is whole
    assert run.finished({"clip/1-s1": Wanted(SAMPLE, False)}) == set()


def test_half_validated_sites_do_not_validate():
    own = record()
    sites = {place: dict(site) for place, site in own.sites.items()}
    del sites[2, 0]["zero"]
    assert not replace(own, sites=sites).validates
