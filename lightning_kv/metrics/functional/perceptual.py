"""How different frames look to a network that was taught by people's judgments."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_kv.metrics.functional.fidelity import check_pixels

SMALLEST = 32  # pixels; below, the deepest features of AlexNet have no extent


def lpips(preds: Tensor, target: Tensor, net: str | nn.Module = "alex") -> Tensor:
    """Learned perceptual distance of every frame (Zhang et al., arXiv 1801.03924).

    Args:
        preds: ``[F, 3, H, W]`` in [0, 1], H and W at least 32.
        target: The same shape and range.
        net: ``alex``, ``vgg`` or ``squeeze``, whose weights must be on this machine; or a network
            of :class:`~lightning_kv.metrics.backbones.lpips.LPIPSNetwork`.

    Returns:
        float64 ``[F]``, 0 for identical frames.

    Raises:
        ValueError: The shapes differ, the values are not floats in [0, 1], or frames are smaller.
        WeightsUnavailable: The network's weights are not here.

    Example:
        >>> import torch
        >>> from lightning_kv.metrics.backbones.lpips import LPIPSNetwork
        >>> black = torch.zeros(2, 3, 64, 64)
        >>> lpips(black, black, LPIPSNetwork("squeeze")).tolist()
        [0.0, 0.0]
    """
    check_pixels(preds, target)
    if min(preds.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"Frames are too small for LPIPS: {tuple(preds.shape[-2:])} pixels. Pass "
            f"frames with sides of at least {SMALLEST} pixels, or leave LPIPS out."
        )
    if isinstance(net, str):
        from lightning_kv.metrics.backbones.lpips import network

        net = network(net)
    return net(preds, target)
