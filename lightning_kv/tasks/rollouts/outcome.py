"""What came of a rollout: whether it broke, and what it cost."""

from __future__ import annotations

from typing import Any

from lightning_kv.rollout import Rollout


def broken(out: Rollout, reference: Rollout, index: int) -> str | None:
    """Why a clip cannot be measured; None where it can."""
    for whose, rollouts in (("the", out), ("the reference's", reference)):
        for what, made in (("latents", rollouts.latents), ("pixels", rollouts.frames)):
            bad = None if made is None else ~made[index].isfinite().flatten(1).all(1)
            if bad is not None and bool(bad.any()):
                return f"{whose} {what} are not finite from frame {int(bad.float().argmax())} on"
    return None


def cost(out: Rollout, reference: Rollout, index: int) -> dict[str, Any]:
    """What one clip cost; reads as a share of the reference's. Seconds are the whole batch's."""
    own, base = out.costs[index], reference.costs[index].rows_read
    return {
        "kv_bytes_peak": own.peak_bytes,
        "kv_bytes_mean": sum(own.chunk_bytes) / len(own.chunk_bytes),
        "kv_rows_read": own.rows_read,
        "kv_rows_scored": own.rows_scored,
        "kv_read_fraction": own.rows_read / base if base else None,
        "kv_scored_fraction": own.rows_scored / base if base else None,
        "kv_rebuilt_frames": own.rebuilt_frames,
        "seconds_per_chunk": out.seconds_per_chunk,
    }
