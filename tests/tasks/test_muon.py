"""Our Muon against torch's, and the orthogonaliser against the singular value decomposition."""

import torch

from lightning_kv.tasks.muon import Muon, orthogonalise


def test_steps_equal_torchs_up_to_bfloat16():
    rng = torch.Generator().manual_seed(0)
    starts = [torch.randn(s, generator=rng) for s in ((24, 24), (24, 40), (40, 24), (24, 24))]
    runs = []
    for make in (
        lambda p: Muon(p, lr=0.02, weight_decay=0.05),
        lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ):
        matrices = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = make(matrices)
        for step in range(4):
            for matrix in matrices:
                matrix.grad = (matrix.detach() * 0.3 + step).cos()
            optimizer.step()
        runs.append(matrices)
    for ours, theirs, start in zip(*runs, starts, strict=True):
        moved = (theirs - start).norm()
        assert (
            ours - theirs
        ).norm() < 0.08 * moved  # a bfloat16 step alone differs from a float32 step by 0.06


def test_singular_values_come_near_one_and_directions_stay():
    x = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(1))
    out = orthogonalise(x)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.3 and values.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = (u.transpose(1, 2) @ out @ v.transpose(1, 2)).abs()
    off = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
    assert off.max() < 1e-3
