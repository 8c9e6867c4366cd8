import pytest
import torch
from torch import nn

from lightning_kv.metrics.aesthetic import AestheticQuality
from lightning_kv.metrics.alignment import TextAlignment
from lightning_kv.metrics.backbones import Backbone, WeightsUnavailable, Wrapped
from lightning_kv.metrics.backbones.weights import WEIGHTS, checksum
from lightning_kv.metrics.base import clip_value

HEAD = WEIGHTS["laion-aesthetic"]


class Colour(Backbone):
    name, num_features, recipe = "colour", 3, "mean colour against grey"
    heard = ()

    def forward(self, frames):
        return frames.mean((2, 3)) - 0.5

    def text_features(self, texts):
        self.heard = (*self.heard, *texts)
        return torch.tensor([[float(len(text)), 1.0, -2.0] for text in texts])


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A machine without any weights."""
    for name in ("LIGHTNING_KV_CLIP_VIT_L14", "LIGHTNING_KV_LAION_AESTHETIC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LIGHTNING_KV_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def pixels(count, seed=0):
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_alignment_is_the_plain_cosine_with_the_prompt():
    metric, shown = TextAlignment(Colour()), pixels(11)
    found = metric.curve(shown, prompt="a cat")
    text = torch.tensor([5.0, 1.0, -2.0])
    wanted = [torch.cosine_similarity(f.mean((1, 2)) - 0.5, text, dim=0).item() for f in shown]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    assert min(wanted) < 0  # negative ones stay
    assert metric.backbone.heard == ("a cat",)  # once for all blocks


def test_another_prompt_is_another_value():
    metric, shown = TextAlignment(Colour()), pixels(4)
    values = [clip_value(metric.curve(shown, prompt=p)) for p in ("a", "a long one")]
    assert abs(values[0] - values[1]) > 0.01


def test_alignment_needs_a_prompt_and_something_that_reads_it():
    for call in (TextAlignment(Colour()).curve, lambda x: TextAlignment(Colour()).update(x[None])):
        with pytest.raises(ValueError, match=r"compares frames with the prompt.*prompts=\["):
            call(pixels(2))
    with pytest.raises(ValueError, match="compares frames with the prompt"):
        TextAlignment(Colour()).reader()
    deaf = TextAlignment(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(ValueError, match="'sequential' reads no text"):
        deaf.reader(prompt="a cat")


def test_beauty_is_the_linear_layer_on_features_of_length_one(tmp_path):
    head = nn.Linear(3, 1)
    torch.save(head.state_dict(), tmp_path / HEAD.file)
    shown = pixels(10)
    found = AestheticQuality(Colour(), tmp_path / HEAD.file).curve(shown)
    features = nn.functional.normalize(Colour()(shown), dim=1)
    wanted = (features @ head.weight.T + head.bias).squeeze(1) / 10
    torch.testing.assert_close(found, wanted.detach().double(), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad
    dimmed = (shown - 0.5) / 3 + 0.5  # shorter features of the same direction
    other = AestheticQuality(Colour(), tmp_path / HEAD.file).curve(dimmed)
    torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)


def test_the_head_is_looked_for_where_weights_lie(tmp_path):
    with pytest.raises(WeightsUnavailable, match=r"sa_0_4_vit_l_14_linear\.pth"):
        AestheticQuality(Colour())
    path = tmp_path / "models" / "metrics" / "laion-aesthetic" / HEAD.file
    path.parent.mkdir(parents=True)
    torch.save(nn.Linear(3, 1).state_dict(), path)
    metric = AestheticQuality(Colour())
    assert f"v1 (SHA-256 {checksum(path)[:8]})" in metric.recipe
    assert metric.name == "aesthetic_quality/colour"
    assert "given by the user" in AestheticQuality(Colour(), nn.Linear(3, 1)).recipe


def test_a_head_for_other_features_is_refused(tmp_path):
    torch.save(nn.Linear(5, 1).state_dict(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"width 3: it holds .*\(1, 5\)"):
        AestheticQuality(Colour(), tmp_path / "head.pth")
    torch.save([1, 2], tmp_path / "head.pth")
    with pytest.raises(ValueError, match="not a linear layer"):
        AestheticQuality(Colour(), tmp_path / "head.pth")


def test_a_missing_backbone_is_said():
    for kind in (TextAlignment, AestheticQuality):
        with pytest.raises(WeightsUnavailable, match=f"lightning-kv fetch {kind.backbones[0]}"):
            kind()
    with pytest.raises(ValueError, match="not defined on 'clip-vit-b32'"):
        AestheticQuality("clip-vit-b32")
    assert Wrapped(Colour()).num_features == 3
