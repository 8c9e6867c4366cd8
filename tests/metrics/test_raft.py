"""RAFT with random weights against torchvision's own forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lightning_kv.metrics.backbones import raft
from lightning_kv.metrics.backbones.raft import RAFT, cropped, margins
from lightning_kv.metrics.backbones.weights import published

optical_flow = pytest.importorskip("torchvision.models.optical_flow")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return optical_flow.raft_large(weights=None).eval()


def pair(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 1, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_the_flow_is_torchvisions(net):
    first, second = pair(128, 136)
    shown = optical_flow.Raft_Large_Weights.C_T_V1.transforms()(first, second)
    with torch.no_grad():
        *_, fewer, expected = net(*shown, num_flow_updates=20)
    found = RAFT(net)(first, second)
    assert found.shape == (1, 2, 128, 136)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, fewer, rtol=1e-4, atol=1e-4)


def test_other_sizes_are_padded_with_their_border_and_cropped():
    class Shown(torch.nn.Module):
        def forward(self, first, second, num_flow_updates):
            assert num_flow_updates == 20
            return [first[:, :2] * 0, torch.cat([first[:, :1], second[:, 1:2]], 1)]

    first, second = pair(131, 141)
    found = RAFT(Shown())(first, second)
    expected = 2 * torch.cat([first[:, :1], second[:, 1:2]], 1) - 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # The authors' padder: half of what is missing on either side, the larger half behind.
    assert margins(131, 141, 8) == (1, 2, 2, 3)
    padded = F.pad(first, margins(131, 141, 8), mode="replicate")
    assert padded.shape[-2:] == (136, 144)
    assert torch.equal(padded[..., 0, 0], first[..., 0, 0])
    assert torch.equal(cropped(padded, margins(131, 141, 8)), first)


@pytest.mark.parametrize("size", range(1, 40))
def test_margins_are_the_least_that_do(size):
    left, right, above, below = margins(size, 2 * size, 16)
    assert (size + above + below) % 16 == 0 and (2 * size + left + right) % 16 == 0
    assert above <= below <= above + 1 and left <= right <= left + 1
    assert above + below < 16 and left + right < 16


def test_tiny_frames_are_refused(net):
    with pytest.raises(ValueError, match="at least 128 x 128"):
        RAFT(net)(*pair(127, 200))


def test_a_file_is_read_if_it_is_the_published_one(net, tmp_path, monkeypatch):
    path = tmp_path / "raft_large_C_T_V1-22a6c225.pth"
    torch.save(net.state_dict(), path)
    with pytest.raises(ValueError, match="is not the published 'raft-large'"):
        RAFT.load(path)
    monkeypatch.setattr(raft, "published", lambda name: replace(published(name), sha256=""))
    loaded = RAFT.load(path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[name], tensor)
    assert not loaded.train().training and loaded.comparable
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not fit RAFT"):
        RAFT.load(path)
