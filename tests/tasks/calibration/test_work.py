"""What a calibration would take: published figures, torch's own counter, and shares of ranks."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_kv.calibration.clips import ClipMeter
from lightning_kv.calibration.sites import SiteSettings
from lightning_kv.data.shards import PromptSample
from lightning_kv.models.sizes import PRESETS
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.policies.registry import preset
from lightning_kv.tasks.calibration.records import CalibrationDirectory
from lightning_kv.tasks.calibration.work import Passes, Work

WAN = PRESETS["wan-1.3b"]
TINY = WanConfig(
    dim=48,
    ffn_dim=96,
    layers=3,
    heads=4,
    channels=4,
    patch=(1, 1, 1),
    text_dim=10,
    text_len=7,
    latent_size=(6, 6),
    timesteps=(1000.0, 600.0),
)


def work(config=WAN, **changes):
    told = {
        "latent_size": config.latent_size,
        "settings": SiteSettings(exact=(0, 2, 4, 9)),
        "frames": 126,
        "context": 0,
        "prompts": 32,
        "samples": 1,
        "validate": 4,
        "videos": False,
        "ranks": 8,
        "size": 2,
        "rate": 2.5e14,
    }
    return Work(config, **(told | changes))


def test_a_pass_of_wan_takes_what_is_known_of_it():
    """By key frames, TFLOP: 11.7 in linear layers, 0.44 in text, 1.346 for each key frame."""
    passes = Passes(WAN, WAN.latent_size)
    for keys, tera in ((3, 16.2), (6, 20.2), (9, 24.3), (12, 28.3), (21, 40.4)):
        assert passes.forward(3, keys) / 1e12 == pytest.approx(tera, abs=0.05)
    assert work().rollout()[1] / 1e15 == pytest.approx(8.1, abs=0.05)  # 42 chunks of 5 passes
    assert work().rollout()[0] == 210


class Encoder:
    def __call__(self, prompts):
        return torch.zeros(len(prompts), 3, 10)


def counted(settings, reference=None):
    """What torch counts in one clip with the plain kernel."""
    torch.manual_seed(0)
    network = CausalWan(TINY).eval().requires_grad_(False)
    reference = preset(reference or f"sliding-window@{settings.reach}f")
    meter = ClipMeter(
        VideoModel(network, None, Encoder()), reference, settings, 24, backend="reference"
    )
    with FlopCounterMode(display=False) as count:
        meter.of_prompt("typical", "a", "x", validates=bool(settings.exact))
    return count.get_total_flops()


def test_torch_counts_the_same():
    """But for text, once a clip, and for the backward passes of a kernel that keeps its logits."""
    own = {"reach": 12, "chunks": 1, "steps": (0,), "scorers": ("mass",)}
    plain, probes = SiteSettings(**own, probes=0), SiteSettings(**own, probes=2)
    exact = SiteSettings(**own, probes=2, exact=(0, 3), batch=5)
    told = {"frames": 24, "size": 4, "ranks": 1}
    by = [(counted(each), work(TINY, settings=each, **told)) for each in (plain, probes, exact)]
    (first, mine), (second, more), (third, most) = by
    assert first == pytest.approx(mine.rollout()[1] + mine.judged(), rel=0.02)
    assert third - second == pytest.approx(most.exact(), rel=0.05)
    passes, window = Passes(TINY, TINY.latent_size), 15
    less = 2 * (2.5 - 1.2) * passes.attention(3, window)  # gradients of logits, queries, own keys
    assert second - first == pytest.approx(more.judged() - mine.judged() - less, rel=0.05)


def test_torch_counts_the_same_where_memories_are_looked_up():
    """But for text, once a rollout, and what the memory looks at itself: nothing in a window."""
    own = {"reach": 12, "chunks": 1, "steps": (0,), "probes": 0}
    plain = SiteSettings(**own, scorers=("mass",))
    memory = SiteSettings(**own, scorers=("mass", "window"), every=1)
    told = {"frames": 24, "size": 4, "ranks": 1, "held": 24}
    alone, both = (work(TINY, settings=each, **told) for each in (plain, memory))
    passes, flops = both.looked_up()
    assert passes == 12 * (both.sites[0] + 1) and alone.looked_up() == (0, 0)  # budgets of 1 to 12
    assert both.rollout()[1] == 2 * alone.rollout()[1]
    found = counted(memory, "full") - counted(plain, "full")
    assert found == pytest.approx(
        alone.rollout()[1] + flops + both.judged() - alone.judged(), rel=0.03
    )
    slow = work(TINY, settings=memory, **told, lookups=4.0)
    more = slow.dealt[0] * 3 * flops / slow.rate / 3600
    assert slow.hours == pytest.approx(both.hours + more) and slow.flops == both.flops
    assert "passes in which memories are looked up" not in " ".join(alone.words("measured"))
    assert f"{passes} in which memories are looked up" in " ".join(both.words("measured"))


def test_clips_are_dealt_out_and_the_fullest_rank_counts():
    own = work(prompts=10, validate=4, ranks=4)
    assert own.dealt == [3, 3, 2, 2] and own.clips == 10
    base, exact = own.rollout()[1] + 6 * own.judged(), 6 * own.exact()
    assert own.hours == pytest.approx((3 * base + exact) / 2.5e14 / 3600)
    assert sum(own.flops.values()) == pytest.approx(10 * base + 4 * exact)
    assert work(prompts=3, samples=2, validate=9).validating == 6


def test_a_video_is_rolled_out_once_for_each_site():
    own = work(videos=True)
    passes, _ = own.rollout()
    assert passes == sum(own.sites) + 3 * 5


def test_the_bytes_of_a_record_are_those_on_disk(tmp_path):
    torch.manual_seed(0)
    network = CausalWan(TINY).eval().requires_grad_(False)
    settings = SiteSettings(reach=6, chunks=2)
    meter = ClipMeter(
        VideoModel(network, None, Encoder()), preset("sliding-window@6f"), settings, 18
    )
    run = CalibrationDirectory(tmp_path)
    run.open("mark", {})
    run.write(meter.of_prompt("a", "a", "x"), PromptSample("a", "x", 0))
    size = run.file_of("a").stat().st_size
    assert size == pytest.approx(work(TINY, settings=settings, frames=18).record, rel=0.25)


def test_it_is_said_in_words():
    text = " ".join(work().words("assumed"))
    for part in ("32 prompts", "4 are also measured exactly", "8 processes: 4 each", "EFLOP"):
        assert part in text
    assert "250 TFLOP a second and process (assumed)" in text
    with pytest.raises(ValueError, match="21 latent frames has 1 chunk "):
        work(frames=21).words("assumed")
