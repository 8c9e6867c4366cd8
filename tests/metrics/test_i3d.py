"""I3D against plain loops and torchvision's Inception blocks; no published weights are needed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_kv.metrics.backbones import i3d
from lightning_kv.metrics.backbones.i3d import (
    I3D,
    I3DBackbone,
    I3DScriptBackbone,
    Mixed,
    Pool,
    Unit,
)


class Colours(nn.Module):
    """Stands in for the network: the first pixel of the first frame, and 397 zeros."""

    def forward(self, clips: Tensor) -> Tensor:
        assert clips.shape[1:] == (3, 16, 224, 224) and clips.dtype == torch.float32
        return torch.nn.functional.pad(clips[:, :, 0, 0, 0], (0, 397))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with parameters and statistics that all matter, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator) * 0.2
            positive = name.endswith(("running_var", "bn.weight"))
            tensor.copy_(values.abs() + 0.5 if positive else values)
    return module.eval()


def windows(sizes, kernel, stride):
    """For each output position: the input positions of its window, None outside (TF "SAME")."""
    starts = []
    for size, width, step in zip(sizes, kernel, stride, strict=True):
        count = math.ceil(size / step)
        before = max((count - 1) * step + width - size, 0) // 2
        axis = [[i * step - before + j for j in range(width)] for i in range(count)]
        starts.append([[p if 0 <= p < size else None for p in row] for row in axis])
    return starts


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (7, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize("shape", [(4, 5, 6), (7, 3, 8)])
def test_same_padding_is_that_of_plain_loops(size, stride, shape):
    unit = randomised(Unit(2, 3, size, (stride,) * 3))
    x = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(1))
    axes = windows(shape, (size,) * 3, (stride,) * 3)
    expected = torch.zeros(1, 3, *(len(axis) for axis in axes))
    for place in itertools.product(*(range(len(axis)) for axis in axes)):
        for offset in itertools.product(range(size), repeat=3):
            source = [axes[d][place[d]][offset[d]] for d in range(3)]
            if None not in source:
                weights = unit.conv3d.weight[(..., *offset)]
                expected[(0, slice(None), *place)] += weights @ x[(0, slice(None), *source)]
    bn = unit.bn
    scale = bn.weight / (bn.running_var + 1e-3).sqrt()
    column = (None, slice(None), None, None, None)
    expected = (expected - bn.running_mean[column]) * scale[column] + bn.bias[column]
    torch.testing.assert_close(unit(x), expected.clamp_min(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "stride"), [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (1, 1, 1)), ((2, 2, 2), (2, 2, 2))]
)
def test_pools_are_those_of_plain_loops(kernel, stride):
    x = torch.rand(1, 1, 3, 7, 6, generator=torch.Generator().manual_seed(2))
    axes = windows(x.shape[2:], kernel, stride)
    found = Pool(kernel, stride)(x)
    assert found.shape[2:] == tuple(len(axis) for axis in axes)
    for place in itertools.product(*(range(len(axis)) for axis in axes)):
        rows = ([p for p in axes[d][place[d]] if p is not None] for d in range(3))
        expected = max(x[(0, 0, *source)].item() for source in itertools.product(*rows))
        assert found[(0, 0, *place)].item() == expected


# Torchvision's names of the blocks, and of the convolutions in one.
BLOCKS = dict(
    zip(
        ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"),
        ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"),
        strict=True,
    )
)
BRANCHES = {
    "b0": "branch1",
    "b1a": "branch2.0",
    "b1b": "branch2.1",
    "b2a": "branch3.0",
    "b2b": "branch3.1",
    "b3b": "branch4.1",
}


@pytest.mark.parametrize("block", BLOCKS)
def test_on_one_frame_every_block_is_torchvisions_inception(block):
    googlenet = pytest.importorskip("torchvision.models.googlenet")
    with torch.device("meta"):
        names = googlenet.GoogLeNet(init_weights=False, aux_logits=False)
    flat = getattr(names, f"inception{BLOCKS[block]}").to_empty(device="cpu")
    inputs = flat.branch1.conv.in_channels
    deep = randomised(Mixed(inputs, i3d.LAYERS[f"Mixed_{block}"]), seed=3)
    for ours, theirs in BRANCHES.items():
        unit, plain = deep.get_submodule(ours), flat.get_submodule(theirs)
        weight = unit.conv3d.weight
        plain.conv.weight.data = weight[:, :, weight.shape[2] // 2].clone()
        plain.bn.load_state_dict(unit.bn.state_dict())
    x = torch.rand(1, inputs, 5, 6, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected, found = flat.eval()(x), deep(x.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_parameters_have_the_names_and_number_of_the_published_file():
    net = I3D()
    state = net.state_dict()
    # 57 convolutions with batch normalisation, and the logits.
    assert sum(name.endswith("conv3d.weight") for name in state) == 58
    assert sum(name.endswith("bn.running_var") for name in state) == 57
    assert {name: tuple(state[name].shape) for name in (
        "Conv3d_1a_7x7.conv3d.weight",
        "Conv3d_2c_3x3.bn.running_mean",
        "Mixed_3b.b1b.conv3d.weight",
        "Mixed_5c.b3b.bn.bias",
        "logits.conv3d.weight",
        "logits.conv3d.bias",
    )} == {
        "Conv3d_1a_7x7.conv3d.weight": (64, 3, 7, 7, 7),
        "Conv3d_2c_3x3.bn.running_mean": (192,),
        "Mixed_3b.b1b.conv3d.weight": (128, 96, 3, 3, 3),
        "Mixed_5c.b3b.bn.bias": (128,),
        "logits.conv3d.weight": (400, 1024, 1, 1, 1),
        "logits.conv3d.bias": (400,),
    }  # fmt: skip
    # In float32 this is the 50.9 MB of the published file.
    held = sum(t.numel() for name, t in state.items() if not name.endswith("tracked"))
    assert held * 4 == pytest.approx(50.9e6, rel=2e-3)


def test_logits_are_the_mean_over_time_of_pooled_positions():
    net = randomised(I3D())
    clips = torch.rand(1, 3, 17, 224, 224, generator=torch.Generator().manual_seed(5)) * 2 - 1
    last = []
    net.Mixed_5c.register_forward_hook(lambda module, given, found: last.append(found))
    with torch.no_grad():
        found = net(clips)
    (x,) = last
    assert x.shape == (1, 1024, 3, 7, 7)
    pairs = torch.stack([x[0, :, t : t + 2].mean((1, 2, 3)) for t in range(2)])
    logits = pairs @ net.logits.conv3d.weight.flatten(1).T + net.logits.conv3d.bias
    assert found.shape == (1, 400)
    # Random weights make logits of 1e12 that are small differences of larger sums: what counts is
    # the error against the largest, some 6 eps of float32; one position left out moves a fourth.
    wanted, largest = logits.detach().mean(0), logits.detach().abs().max()
    assert (found[0] - wanted).abs().max() < 3e-6 * largest
    assert (logits[0].detach() - wanted).abs().max() > 0.1 * largest


def test_a_file_is_read_whole_or_not_at_all(tmp_path):
    path = tmp_path / "i3d_pretrained_400.pt"
    # As published: without the counters of batches.
    state = {k: v for k, v in randomised(I3D()).state_dict().items() if "tracked" not in k}
    torch.save(state, path)
    backbone = I3DBackbone.load(path)
    for name, tensor in backbone.net.state_dict().items():
        assert "tracked" in name or torch.equal(tensor, state[name])
    assert len(backbone.weights_sha256) == 64 and backbone.comparable
    variance = state.pop("Mixed_4e.b1a.bn.running_var")
    with pytest.raises(
        ValueError, match=r"f\.pt does not fit I3D: .*Mixed_4e\.b1a\.bn\.running_var"
    ):
        i3d.load_exactly(backbone.net, state, "f.pt")
    whole = state | {"Mixed_4e.b1a.bn.running_var": variance}
    with pytest.raises(ValueError, match=r"does not fit I3D: .*spare"):
        i3d.load_exactly(backbone.net, whole | {"spare": variance}, "f.pt")
    with pytest.raises(ValueError, match="does not fit I3D"):
        i3d.load_exactly(backbone.net, whole | {"logits.conv3d.bias": torch.zeros(600)}, "f.pt")


def test_the_recipe_is_exact():
    backbone = I3DBackbone(Colours())
    assert backbone.recipe == "i3d-k400/16f/squash224-bilinear"
    assert (backbone.name, backbone.num_features, backbone.clip_len) == ("i3d", 400, 16)
    assert not backbone.train().training
    assert I3DScriptBackbone(Colours()).recipe == backbone.recipe


@pytest.mark.parametrize("batch", [1, 3])
def test_clips_are_moved_to_minus_one_to_one(batch):
    clips = torch.rand(batch, 16, 3, 224, 224, generator=torch.Generator().manual_seed(6))
    found = I3DBackbone(Colours())(clips)
    assert found.shape == (batch, 400)
    torch.testing.assert_close(found[:, :3], 2 * clips[:, 0, :, 0, 0] - 1, rtol=0, atol=1e-6)


def test_frames_are_squashed_bilinearly_without_antialiasing():
    # A wide frame, halved and stretched at once: pixel centres of the result in the source.
    source = torch.rand(3, 30, 448, generator=torch.Generator().manual_seed(7))
    shown = I3DBackbone(Colours()).prepared(source.expand(1, 16, -1, -1, -1))[0, :, 9]
    for row, column in [(0, 0), (3, 223), (100, 17), (223, 111)]:
        y = min(max((row + 0.5) * 30 / 224 - 0.5, 0), 29)
        x = (column + 0.5) * 448 / 224 - 0.5
        top, left = int(y), int(x)
        below, right = min(top + 1, 29), min(left + 1, 447)
        dy, dx = y - top, x - left
        upper = source[:, top, left] * (1 - dx) + source[:, top, right] * dx
        lower = source[:, below, left] * (1 - dx) + source[:, below, right] * dx
        expected = 2 * (upper * (1 - dy) + lower * dy) - 1
        torch.testing.assert_close(shown[:, row, column], expected, rtol=0, atol=1e-5)


def test_short_clips_are_refused():
    with pytest.raises(ValueError, match="clips of 9 frames"):
        I3DBackbone(Colours(), clip_len=9)
    assert I3DBackbone(Colours(), clip_len=10).recipe == "i3d-k400/10f/squash224-bilinear"
    for shape in [(1, 15, 3, 8, 8), (1, 3, 16, 8, 8), (16, 3, 8, 8)]:
        with pytest.raises(ValueError, match=r"Pass \[clips, 16, 3, height, width\]"):
            I3DBackbone(Colours())(torch.zeros(shape))


class Stub(nn.Module):
    """Takes what the published TorchScript takes, and like it drops the axis of a single clip."""

    def forward(
        self,
        x: Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> Tensor:
        logits = torch.cat([x[:, :, 0, 0, 0], torch.zeros(x.shape[0], 397)], 1)
        if rescale or resize:
            logits = logits + 1000
        if not return_features:
            logits = torch.softmax(logits, 1)
        return logits.squeeze(0)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_the_torchscript_file_is_read_when_asked_for_by_its_name(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Stub()).save(str(path))
    backbone = I3DScriptBackbone.load(path)
    clips = torch.rand(3, 16, 3, 224, 224, generator=torch.Generator().manual_seed(8))
    expected = 2 * clips[:, 0, :, 0, 0] - 1
    for batch in (3, 1):
        found = backbone(clips[:batch])
        assert found.shape == (batch, 400) and found.dtype == torch.float32
        torch.testing.assert_close(found[:, :3], expected[:batch], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="TorchScript"):
        I3DBackbone.load(path)


def test_plain_weights_are_no_torchscript(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no TorchScript"):
        I3DScriptBackbone.load(path)
