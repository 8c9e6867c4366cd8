"""What docs/extending.md says works."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_kv.cli import parse

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/extending.md").read_text()
(NETWORK,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
(SETTINGS,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def made():
    """What the example leaves behind."""
    names = {}
    exec(compile(NETWORK, "extending.md", "exec"), names)
    return names


def test_a_network_of_ones_own_is_rolled_out(made, capsys):
    assert len(NETWORK.splitlines()) <= 60 and len(re.findall(r"session\.\w+", NETWORK)) == 1
    full, window = made["full"], made["window"]
    assert full.latents.shape == (1, 21, 4, 4, 6) and full.latents.isfinite().all()
    apart = (full.latents - window.latents).abs().amax((0, 2, 3, 4))
    assert not apart[:9].any() and apart[9:].min() > 0  # from 9 frames of history on
    history = [3 * chunk for chunk in range(7)]
    share = sum(min(frames, 6) for frames in history) / sum(history)
    read = window.costs[0].rows_read / full.costs[0].rows_read
    assert read == pytest.approx(share, abs=1e-12)


def test_it_attends_as_dense_attention_says(made):
    """The first chunk again without the package: softmax over its own rotated rows."""
    from lightning_kv.cache.passes import Pass

    network, config = made["model"].network, made["CONFIG"]
    rotary = config.rotary

    class Dense:
        def attend(self, layer, q, k, v, step):
            times = torch.tensor(step.query_times).repeat_interleave(24)
            places = config.geometry().places().repeat(3, 1)
            turned = [turn(rotary, x, times, places) for x in (q, k)]
            scores = torch.einsum("bqhd,bkhd->bhqk", *turned) / q.shape[-1] ** 0.5
            return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    from lightning_kv.models.samplers import keyed_noise

    noise = keyed_noise(0, ["a boat on a lake"], config.plan(21), (4, 4, 6))
    text = network.prepare(made["encoder"](["a boat on a lake"]))
    with torch.no_grad():
        step = Pass("denoise", (0, 1, 2), (1000.0,) * 3, 0)
        first = network(noise(0, 0), torch.full((1, 3), 1000.0), text, Dense(), step)
        x = 0.5 * first + 0.5 * noise(0, 1)
        last = network(x, torch.full((1, 3), 500.0), text, Dense(), step)
    assert torch.allclose(last, made["full"].latents[:, :3], atol=1e-5)


def turn(rotary, x, times, places):
    """Rotary embedding by complex numbers."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    angles = rotary.angles(times, *places.unbind(-1)).double()
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2).float()


def test_the_settings_that_are_shown_parse(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(SETTINGS)
    options = parse("evaluate", ["-c", str(path)])
    assert options.data.class_path == "mine.sets.Sentences"
    assert options.trainer.callbacks == yaml.safe_load(SETTINGS)["trainer"]["callbacks"]
    words = re.findall(r"`(--[^`]*)`", TEXT)
    typed = [w.replace("...", "x:Y") for text in words for w in text.split(", ") if " " in w]
    assert len(typed) >= 6
    for text in typed:
        parse("evaluate", text.split())
