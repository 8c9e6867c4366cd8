"""Our Muon against torch's, and the orthogonaliser against the singular value decomposition."""

import torch

from lightning_kv.tasks.training.optimizers import JoinedOptimizer, Muon, orthogonalise


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


def joined_parts(start):
    matrix, vector = (torch.nn.Parameter(x.clone()) for x in start)
    parts = [
        Muon([matrix], lr=0.02, weight_decay=0.05),
        torch.optim.AdamW([{"params": [vector], "lr": 0.01}], betas=(0.9, 0.98)),
    ]
    return [matrix, vector], parts


def test_joined_optimisers_step_as_each_does_alone_and_go_on_from_a_checkpoint(tmp_path):
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(8, 5, generator=rng), torch.randn(5, generator=rng)

    def steps(tensors, optimizers, numbers):
        for number in numbers:
            for tensor in tensors:
                tensor.grad = (tensor.detach() * 0.3 + number).cos()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.9
                optimizer.step()

    alone, parts = joined_parts(start)
    steps(alone, parts, range(6))
    whole, parts = joined_parts(start)
    joined = JoinedOptimizer(parts)
    steps(whole, [joined], range(3))
    torch.save(joined.state_dict(), tmp_path / "state")
    again, parts = joined_parts([x.detach() for x in whole])
    late = JoinedOptimizer(parts)
    late.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    steps(whole, [joined], range(3, 6))
    steps(again, [late], range(3, 6))
    for one, two, three in zip(alone, whole, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert len(joined.state) == 2 and [g["lr"] for g in late.param_groups] == [
        g["lr"] for g in joined.param_groups
    ]


def test_joined_optimisers_call_a_closure_once():
    tensors, parts = joined_parts((torch.ones(3, 2), torch.ones(2)))
    calls = []

    def closure():
        calls.append(1)
        loss = sum(tensor.square().sum() for tensor in tensors)
        loss.backward()
        return loss

    assert float(JoinedOptimizer(parts).step(closure)) == 8.0
    assert len(calls) == 1 and all((tensor != 1).all() for tensor in tensors)
