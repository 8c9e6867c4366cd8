"""The functions behind the metrics: a value of every frame of clips, or one of two sets."""

from __future__ import annotations

from lightning_kv.metrics.functional.attention import (
    output_error,
    retained_mass,
)
from lightning_kv.metrics.functional.consistency import (
    Consistency,
    consistency,
    lag_coherence,
    similarity,
)
from lightning_kv.metrics.functional.dynamics import (
    dynamic_rule,
    is_dynamic,
    mean_motion,
    motion_score,
    motion_smoothness,
)
from lightning_kv.metrics.functional.fidelity import (
    identical_frames,
    ms_ssim,
    pooled_psnr,
    psnr,
    ssim,
)
from lightning_kv.metrics.functional.frechet import (
    frechet_distance,
    frechet_error,
    frechet_from_moments,
    frechet_infinity,
    null_distance,
)
from lightning_kv.metrics.functional.frechet_difference import (
    delta_frechet,
)
from lightning_kv.metrics.functional.imaging import (
    brightness,
    colourfulness,
    contrast,
    saturation,
    sharpness,
)
from lightning_kv.metrics.functional.kernel import (
    jedi_from_moments,
    kernel_distance,
    kernel_error,
    kernel_null,
)
from lightning_kv.metrics.functional.latents import (
    channel_shift,
    divergence,
    divergence_onset,
    latent_cosine,
    latent_mse,
    latent_relative,
    latent_shift,
    latent_snr,
)
from lightning_kv.metrics.functional.moments import (
    Moments,
)
from lightning_kv.metrics.functional.motion import (
    flicker,
    frame_change,
)
from lightning_kv.metrics.functional.panorama import (
    camera_kept,
    camera_rule,
    decode_columns,
    decode_positions,
    first_visit,
    fit_positions,
    last_seen,
    recall,
    revisit_error,
    ruler_error,
    ruler_errors,
)
from lightning_kv.metrics.functional.perceptual import (
    lpips,
)

__all__ = [
    "Consistency",
    "Moments",
    "brightness",
    "camera_kept",
    "camera_rule",
    "channel_shift",
    "colourfulness",
    "consistency",
    "contrast",
    "decode_columns",
    "decode_positions",
    "delta_frechet",
    "divergence",
    "divergence_onset",
    "dynamic_rule",
    "first_visit",
    "fit_positions",
    "flicker",
    "frame_change",
    "frechet_distance",
    "frechet_error",
    "frechet_from_moments",
    "frechet_infinity",
    "identical_frames",
    "is_dynamic",
    "jedi_from_moments",
    "kernel_distance",
    "kernel_error",
    "kernel_null",
    "lag_coherence",
    "last_seen",
    "latent_cosine",
    "latent_mse",
    "latent_relative",
    "latent_shift",
    "latent_snr",
    "lpips",
    "mean_motion",
    "motion_score",
    "motion_smoothness",
    "ms_ssim",
    "null_distance",
    "output_error",
    "pooled_psnr",
    "psnr",
    "recall",
    "retained_mass",
    "revisit_error",
    "ruler_error",
    "ruler_errors",
    "saturation",
    "sharpness",
    "similarity",
    "ssim",
]
