"""Causal Wan: the diffusion transformer of the Self Forcing family, at any size.

Parameter names and shapes are those of the original Wan2.1 weights (arXiv 2503.20314); the
attention history is whatever the given session answers, so the model does not know who decides.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.rotary import Rotary
from lightning_kv.models.precision import PROFILES, known_profile
from lightning_kv.models.samplers import ChunkPlan, sigma_of


@dataclass(frozen=True)
class WanConfig:
    """Sizes and conventions of one checkpoint. Defaults of the conventions are Wan's.

    Args:
        dim: Hidden width.
        ffn_dim: Width of the MLP.
        layers: Number of blocks.
        heads: Number of heads; ``dim / heads`` is the head width.
        channels: Latent channels, in and out.
        patch: Patch size over time, height, width.
        text_dim: Width of the text states.
        text_len: Number of text states; shorter prompts are zero-padded to it.
        freq_dim: Width of the timestep sinusoid.
        eps: Of every norm.
        rope_theta: Rotary base for time, height, width.
        prediction: What the network puts out: ``velocity`` (noise - x0) or ``x0``.
        chunk: Latent frames denoised together.
        short_last: The last chunk of a rollout may have fewer frames.
        train_horizon: Longest sequence seen in training, latent frames.
        latent_size: Latent height and width the checkpoint was trained at.
        stride: Pixel frames per latent frame (after the first), and pixels per latent side.
        fps: Pixel frames per second of the videos it was trained on.
        sampler: How it is sampled: ``few-step``, ``rolling`` (several chunks in flight), or
            ``flow`` (many steps with guidance); see :mod:`lightning_kv.models.samplers`.
        timesteps: Noise levels of the sampler, as the model sees them (0 to 1000).
        shift: Of the schedule whose 1,000 entries the timesteps are rounded to; 0 where they are
            exact.
        first_timesteps: Noise levels of the first chunk where they differ.
        guidance: Scale of classifier-free guidance (``flow`` only); 1 means none.
        model: Name of the model whose head tables apply; nothing where none is known to.
    """

    dim: int
    ffn_dim: int
    layers: int
    heads: int
    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    rope_theta: tuple[float, float, float] = (10000.0, 10000.0, 10000.0)
    prediction: Literal["velocity", "x0"] = "velocity"
    chunk: int = 3
    short_last: bool = True
    train_horizon: int = 21
    latent_size: tuple[int, int] = (60, 104)
    stride: tuple[int, int] = (4, 8)
    fps: int = 16
    sampler: Literal["few-step", "rolling", "flow"] = "few-step"
    timesteps: tuple[float, ...] = (1000.0, 937.5, 2500 / 3, 625.0)
    shift: float = 0.0
    first_timesteps: tuple[float, ...] = ()
    guidance: float = 1.0
    model: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        levels = [self.timesteps, *([self.first_timesteps] if self.first_timesteps else [])]
        top = 1000 if self.sampler != "flow" else 999.999
        for level in levels:
            falling = all(a > b for a, b in pairwise(level))
            if not level or not falling or not 0 < level[-1] <= level[0] <= top:
                raise ValueError(
                    f"Noise levels {level} cannot be sampled. Give falling numbers above 0, up to "
                    f"{top:g}; for flow also {{steps: 50, shift: 5.0}} in a model file."
                )
        wrong = {
            "sampler": self.sampler not in ("few-step", "rolling", "flow"),
            "prediction": self.prediction not in ("velocity", "x0"),
            "chunk": self.chunk < 1,
            "fps": self.fps <= 0,
            "guidance": self.guidance != 1 and self.sampler != "flow",
            "first_timesteps": bool(self.first_timesteps) and self.sampler != "few-step",
        }
        for name in (name for name, bad in wrong.items() if bad):
            raise ValueError(
                f"{name}={getattr(self, name)!r} does not go with sampler={self.sampler!r}. "
                "Samplers are few-step, rolling and flow; predictions velocity and x0; guidance "
                "goes with flow, first_timesteps with few-step; chunk and fps are above 0."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WanConfig:
        """Rebuild from JSON, where tuples are lists."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding of one head."""
        return Rotary(self.dim // self.heads, self.rope_theta)

    @property
    def passes(self) -> int:
        """The most passes of a chunk, its commit pass included, in each branch."""
        return max(len(self.timesteps), len(self.first_timesteps)) + 1

    def pixel_frames(self, frames: int) -> int:
        """Pixel frames of so many latent frames: one for the first, ``stride`` for each other."""
        return 1 + self.stride[0] * (frames - 1)

    def frames_for(self, pixel_frames: int) -> int:
        """Latent frames that show so many pixel frames, or more."""
        return 1 - (1 - pixel_frames) // self.stride[0]

    def latent_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Latent height and width of a picture.

        Raises:
            ValueError: Pixels that make no whole number of patches.
        """
        side = self.stride[1]
        steps = [side * patch for patch in self.patch[1:]]
        if any(pixels < step or pixels % step for pixels, step in zip(size, steps, strict=True)):
            near = [max(1, round(x / step)) * step for x, step in zip(size, steps, strict=True)]
            raise ValueError(
                f"{size[0]} x {size[1]} pixels make no whole number of patches of "
                f"{steps[0]} x {steps[1]}. Use {near[0]} x {near[1]}, for example."
            )
        return size[0] // side, size[1] // side

    def plan(self, frames: int, context: int = 0) -> ChunkPlan:
        """The chunks of a rollout.

        Args:
            frames: Latent frames, the context included.
            context: Given frames at the start.

        Raises:
            ValueError: They make no chunks of this model.
        """
        return ChunkPlan(frames, self.chunk, context, self.short_last)

    def geometry(self, latent_size: tuple[int, int] | None = None) -> Geometry:
        """Sizes for the cache, at a latent height and width (default: the trained one).

        Raises:
            ValueError: A size that is no multiple of the patch.
        """
        height, width = latent_size or self.latent_size
        down, across = self.patch[1:]
        if min(height, width) < 1 or height % down or width % across:
            near = (max(1, round(height / down)) * down, max(1, round(width / across)) * across)
            raise ValueError(
                f"Latents of {height} x {width} cannot be cut into patches of {down} x {across}. "
                f"Use {near[0]} x {near[1]}, for example."
            )
        return Geometry(
            layers=self.layers,
            heads=self.heads,
            head_dim=self.dim // self.heads,
            grid=(height // down, width // across),
            rotary=self.rotary,
            train_horizon=self.train_horizon,
            chunk=self.chunk,
            flight=self.chunk * (len(self.timesteps) if self.sampler == "rolling" else 1),
            branches=2 if self.sampler == "flow" and self.guidance != 1 else 1,
            model=self.model,
        )


class Session(Protocol):
    """What a model asks of the cache."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Pass) -> Tensor:
        """Attention of queries before rotation ``[B, T, H, D]`` to history and own chunk."""
        ...


Context = list[tuple[Tensor, Tensor]]
"""Keys and values of the text, per layer, each ``[B, H, L, D]``."""


class RMSNorm(nn.Module):
    """Root mean square norm over the full hidden width; statistics in float32 or wider."""

    fused = False

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., dim]``."""
        if self.fused:
            return rms_norm(x, self.weight.shape, self.weight, self.eps)
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(work.square().mean(-1, keepdim=True) + self.eps)
        return (work * scale).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Projections shared by self- and cross-attention, under the original names."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def query(self, x: Tensor) -> Tensor:
        """Normalised queries ``[B, T, H, D]``."""
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys and values, each ``[B, T, H, D]``."""
        keys, values = self.norm_k(self.k(x)), self.v(x)
        return keys.unflatten(-1, (self.heads, -1)), values.unflatten(-1, (self.heads, -1))


class Block(nn.Module):
    """One transformer block: self-attention, cross-attention, MLP, modulated per frame."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.self_attn = Attention(dim, config.heads, config.eps)
        self.cross_attn = Attention(dim, config.heads, config.eps)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def text(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the embedded text, each ``[B, H, L, D]``."""
        keys, values = self.cross_attn.key_value(states)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def attention_gate(self, modulation: Tensor) -> Tensor:
        """Factor on what self-attention adds, ``[B, F, dim]``, from ``[B, F, 6, dim]``."""
        return (self.modulation.unsqueeze(0) + modulation)[:, :, 2]

    def forward(self, x, modulation, text, layer: int, session: Session, step: Pass) -> Tensor:
        """Advance tokens ``[B, F, n, dim]``; ``modulation`` is ``[B, F, 6, dim]``."""
        shape = x.shape
        parts = (self.modulation.unsqueeze(0) + modulation).unsqueeze(3).unbind(2)
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = parts
        y = modulate(x, shift_sa, scale_sa, self.eps).flatten(1, 2)
        attended = session.attend(
            layer, self.self_attn.query(y), *self.self_attn.key_value(y), step
        )
        x = x + gate_sa * self.self_attn.o(attended.flatten(2)).view(shape)
        query = self.cross_attn.query(self.norm3(x).flatten(1, 2)).transpose(1, 2)
        crossed = scaled_dot_product_attention(query, *text).transpose(1, 2).flatten(2)
        x = x + self.cross_attn.o(crossed).view(shape)
        return x + gate_ffn * self.ffn(modulate(x, shift_ffn, scale_ffn, self.eps))


class Head(nn.Module):
    """Last norm, modulation and projection."""

    def __init__(self, dim: int, out: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Project ``[B, F, n, dim]`` under the timestep embedding ``[B, F, dim]``."""
        parts = self.modulation.unsqueeze(0) + embedding.unsqueeze(2)
        shift, scale = parts.unsqueeze(3).unbind(2)
        return self.head(modulate(x, shift, scale, self.eps))


class CausalWan(nn.Module):
    """Wan2.1 made causal over time (Self Forcing, arXiv 2506.08009).

    Args:
        config: Sizes and conventions.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.channels, dim, config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(dim, math.prod(config.patch) * config.channels, config.eps)
        self.profile = PROFILES["float32"]

    def cast(self, profile: str) -> CausalWan:
        """Give weights and casts the precision of a profile; returns itself.

        Raises:
            ValueError: No profile of that name.
        """
        self.profile = known_profile(profile)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.fused = self.profile.fused_norm
        return self.to(self.profile.dtype)

    def geometry(self, latent_size: tuple[int, int] | None = None) -> Geometry:
        """Sizes for the cache at a latent height and width, in this network's precision."""
        made = self.config.geometry(latent_size)
        rotary = replace(made.rotary, work=self.profile.rotary)
        size = self.patch_embedding.weight.element_size()
        return replace(made, rotary=rotary, element_size=size)

    def prepare(self, text: Tensor) -> Context:
        """Text states ``[B, L, text_dim]`` to keys and values per layer, once per prompt.

        The states are zero-padded to ``text_len``, and the padding is attended, as in Wan.

        Raises:
            ValueError: More than ``text_len`` states, or another width.
        """
        length, width = self.config.text_len, self.config.text_dim
        if text.shape[1] > length or text.shape[2] != width:
            raise ValueError(
                f"Text states of shape {tuple(text.shape)} do not fit this model. "
                f"It takes [batch, at most {length}, {width}]."
            )
        padded = nn.functional.pad(text, (0, 0, 0, length - text.shape[1]))
        states = self.text_embedding(padded.to(self.patch_embedding.weight.dtype))
        return [block.text(states) for block in self.blocks]

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Context, session: Session, step: Pass
    ) -> Tensor:
        """One pass over the frames of a query.

        Args:
            x: Noisy latents ``[B, F, C, H, W]``.
            timesteps: ``[B, F]``, 0 (clean) to 1000 (noise).
            context: From :meth:`prepare`.
            session: Answers self-attention.
            step: What this pass is for.

        Returns:
            The network's output ``[B, F, C, H, W]``; see :meth:`x0`.
        """
        tokens, embedding = self.embed(x, timesteps)
        tokens = self.through(tokens, embedding, context, session, step)
        return self.unpatch(tokens, embedding, x.shape)

    def embed(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, F, n, dim]`` of latents, and the embedding of the noise levels.

        Args:
            x: As in :meth:`forward`.
            timesteps: As in :meth:`forward`.

        Returns:
            What the first block takes, and ``[B, F, dim]``.
        """
        tokens = self.patch_embedding(x.transpose(1, 2))  # [B, dim, F, h, w]
        tokens = tokens.flatten(3).permute(0, 2, 3, 1)
        return tokens, self.time_embedding(self._sinusoid(timesteps).to(tokens.dtype))

    def through(
        self,
        tokens: Tensor,
        embedding: Tensor,
        context: Context,
        session: Session,
        step: Pass,
        layers: range | None = None,
    ) -> Tensor:
        """Tokens after some blocks.

        Args:
            tokens: From :meth:`embed`, or behind the block before the first of ``layers``.
            embedding: From :meth:`embed`.
            context: As in :meth:`forward`.
            session: As in :meth:`forward`.
            step: As in :meth:`forward`.
            layers: Which; all where None.
        """
        modulation = self.modulation(embedding)
        for layer in range(len(self.blocks)) if layers is None else layers:
            block, text = self.blocks[layer], context[layer]
            tokens = block(tokens, modulation, text, layer, session, step)
        return tokens

    def modulation(self, embedding: Tensor) -> Tensor:
        """Shifts, scales and gates of all blocks ``[B, F, 6, dim]``, before each adds its own."""
        return self.time_projection(embedding).unflatten(-1, (6, -1))

    def unpatch(self, tokens: Tensor, embedding: Tensor, shape: torch.Size) -> Tensor:
        """The output, of the shape of the latents, from tokens behind the last block."""
        out = self.head(tokens, embedding)
        batch, frames, _, *size = shape
        patch_t, patch_h, patch_w = self.config.patch
        grid = [side // patch for side, patch in zip(size, (patch_h, patch_w), strict=True)]
        out = out.view(batch, frames, *grid, patch_t, patch_h, patch_w, self.config.channels)
        out = out.permute(0, 1, 4, 7, 2, 5, 3, 6)  # [B, F, pt, C, h, ph, w, pw]
        return out.flatten(6, 7).flatten(4, 5).flatten(1, 2)

    def x0(self, output: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """Clean estimate from the network's output, in the profile's precision.

        ``x_t = (1 - s) x0 + s noise``, so ``x0 = x_t - s * velocity``; see :func:`sigma_of` for s.
        """
        if self.config.prediction == "x0":
            return output
        work = torch.promote_types(x.dtype, self.profile.estimate)
        sigma = sigma_of(timesteps, self.config.shift).to(work).view(*timesteps.shape, 1, 1, 1)
        return x.to(work) - sigma * output.to(work)

    def _sinusoid(self, timesteps: Tensor) -> Tensor:
        half = self.config.freq_dim // 2
        steps = torch.arange(half, dtype=torch.float64, device=timesteps.device)
        angles = timesteps.double().unsqueeze(-1) * 10000.0 ** (-steps / half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without gains, then scale and shift (per frame)."""
    return layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
