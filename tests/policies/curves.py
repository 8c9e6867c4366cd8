"""Head curves that were not measured but drawn: heads of log-normal importance, falling losses."""

import torch

from lightning_kv.policies.head_curves import HeadCurves, described


def drawn(geometry, grid, prompts=6, seed=0, keys=("mass/gn",), spread=0.2, **about):
    """Curves for a model.

    Args:
        geometry: Of the model.
        grid: Budgets, ascending.
        prompts: Number of prompts.
        seed: Of what is drawn.
        keys: Which curves, ``SCORER/METRIC``.
        spread: How far prompts differ, in logs.
        about: What else the file says of the model.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (geometry.layers, geometry.heads, 1)
    step = torch.tensor(grid, dtype=torch.float64) - grid[0]

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    curves = {}
    for key in keys:
        size = noise(*shape).exp() * (spread * noise(prompts, *shape)).exp()
        curves[key] = size * (-0.4 * step).exp()
        curves[key][..., -1] = 0
    importance = {"history": noise(*shape[:2]).exp()}
    model = {"name": geometry.model, "geometry": described(geometry), **about}
    extra = {"lag/mass": noise(*shape[:2], 2, 5).float()}
    return HeadCurves(tuple(grid), curves, importance, extra, {"model": model, "created": "x"})
