"""What a calibration would take: clips, passes, arithmetic, bytes and hours, without any weights.

One floating-point operation (FLOP) is a multiplication or an addition. Per token and block, linear
layers take ``2 (6 dim^2 + 2 dim ffn)``; attention takes ``4 dim`` for each pair of tokens; a
backward pass without gradients of weights takes as much as its forward pass in linear layers, and
2.5 times as much in attention (a kernel that forms its logits again).

Shapes: K probes, S scorers, E budgets that are measured exactly, L layers, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from lightning_kv.calibration.memory import Memory
from lightning_kv.calibration.sites import SiteSettings, sites_of
from lightning_kv.models.sizes import parameters
from lightning_kv.models.wan import WanConfig
from lightning_kv.utilities.formatting import format_bytes, several

CPU_RATE = 1.5e10
"""FLOP per second of one core on the embedded model, measured: its passes are small."""
CPU_LOOKUPS = 4.0
"""How many times slower passes are there in which memories are looked up, measured: what a policy
decides between them takes longer than they do."""
GPU_RATE = 2.5e14
"""FLOP per second of an H100 in bfloat16, assumed."""

BACKWARD = 2.5  # of attention, times its forward pass


@dataclass(frozen=True)
class Passes:
    """FLOP of the passes of a model at one size.

    Args:
        config: Of the model.
        latent_size: Latent height and width.
    """

    config: WanConfig
    latent_size: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Of a latent frame."""
        return self.config.geometry(self.latent_size).tokens

    def attention(self, queries: int, keys: int) -> float:
        """Self-attention of all layers, of frames that read frames, their own included."""
        of = self.config
        return 4.0 * queries * keys * self.tokens**2 * of.dim * of.layers

    def forward(self, queries: int, keys: int) -> float:
        """A whole pass."""
        of, rows = self.config, queries * self.tokens
        linear = 2 * (6 * of.dim**2 + 2 * of.dim * of.ffn_dim)
        crossed = 4 * of.text_len * of.dim
        return float(rows * of.layers * (linear + crossed)) + self.attention(queries, keys)


@dataclass(frozen=True)
class Work:
    """What a calibration would take.

    Args:
        config: Of the model.
        latent_size: Latent height and width.
        settings: What is measured in a pass.
        frames: Latent frames of a clip.
        context: Given frames of it.
        prompts: Number of prompts.
        samples: Clips of each.
        validate: Prompts that are also measured exactly.
        videos: History is that of real videos: one rollout for each site.
        ranks: Number of processes.
        size: Bytes of a number.
        rate: FLOP per second of a process.
        held: Frames of history that the reference holds at most; the reach where None.
        lookups: How many times slower passes are in which memories are looked up.
    """

    config: WanConfig
    latent_size: tuple[int, int]
    settings: SiteSettings
    frames: int
    context: int
    prompts: int
    samples: int
    validate: int
    videos: bool
    ranks: int
    size: int
    rate: float
    held: int | None = None
    lookups: float = 1.0

    @property
    def memories(self) -> Collection[Memory]:
        """Scorers whose memory is looked up."""
        return self.settings.memories(self.config.chunk).values()

    def keys(self, chunk: int) -> int:
        """Frames that a pass over a chunk reads, its own included."""
        held = self.settings.reach if self.held is None else self.held
        return min(chunk * self.config.chunk, held) + self.config.chunk

    @property
    def sites(self) -> tuple[int, ...]:
        """Chunks of a typical clip at which heads are judged."""
        given = 0 if self.videos else self.context
        return sites_of("typical", self.frames, self.config.chunk, self.settings, given)

    @property
    def clips(self) -> int:
        """All of them."""
        return self.prompts * self.samples

    @property
    def validating(self) -> int:
        """Clips that are also measured exactly."""
        return min(self.validate, self.prompts) * self.samples

    @property
    def site_passes(self) -> int:
        """Passes of a clip in which heads are judged."""
        return len(self.sites) * len({s % len(self.config.timesteps) for s in self.settings.steps})

    def rollout(self) -> tuple[int, float]:
        """Passes of a clip's rollouts, and their FLOP."""
        chunk, passes = self.config.chunk, Passes(self.config, self.latent_size)
        made = self.config.passes * self.config.geometry(self.latent_size).branches
        count = -(-self.frames // chunk)
        if self.videos:
            each = [n for site in self.sites for n in [*[1] * site, made]]
            places = [n for site in self.sites for n in range(site + 1)]
        else:  # a clip is made before its memories are looked up, and made again with its sites
            places = list(range(count)) * (2 if self.memories else 1)
            each = [1 if (n + 1) * chunk <= self.context else made for n in places]
        read = map(self.keys, places)
        flops = sum(n * passes.forward(chunk, keys) for n, keys in zip(each, read, strict=True))
        return sum(each), flops

    def looked_up(self) -> tuple[int, float]:
        """Passes of a clip in which memories are looked up, and their FLOP."""
        chunk, passes = self.config.chunk, Passes(self.config, self.latent_size)
        reads = [
            min(n * chunk, budget) + chunk
            for memory in self.memories
            for budget in memory.looked_up
            for n in range(self.sites[-1] + 1)
        ]
        return len(reads), sum(passes.forward(chunk, keys) for keys in reads)

    @property
    def _read(self) -> int:
        """Frames that a pass reads in which heads are judged, their own included, on average."""
        return round(sum(map(self.keys, self.sites)) / len(self.sites))

    def judged(self) -> float:
        """FLOP of one pass in which heads are judged by mass, output and probes."""
        chunk, own = self.config.chunk, self.settings
        passes, keys = Passes(self.config, self.latent_size), self._read
        forward, attention = passes.forward(chunk, keys), passes.attention(chunk, keys)
        rows = min(1.0, own.rows / (chunk * passes.tokens))
        probe = forward + (forward - attention) + BACKWARD * attention  # blocks run again
        each = attention * (rows + (1 if own.probes else 0))
        return forward + own.probes * probe + attention / 2 + len(own.scorers) * each

    def exact(self) -> float:
        """FLOP of one pass in which heads are also judged exactly.

        A run starts in a head's layer, whose attention is given.
        """
        chunk, own, layers = self.config.chunk, self.settings, self.config.layers
        passes, keys = Passes(self.config, self.latent_size), self._read
        forward, attention = passes.forward(chunk, keys), passes.attention(chunk, keys)
        runs = [len(own.exact)] * len(own.scorers) + [1]  # the last takes whole heads away
        batches = sum(-(-self.config.heads * each // (own.batch - 1)) for each in runs)
        each = (forward - attention) * (layers + 1) / 2 + attention * (layers - 1) / 2
        return batches * own.batch * each + attention * sum(runs[:-1])

    @property
    def flops(self) -> dict[str, float]:
        """Of all clips, by what is done."""
        return {
            "rollouts": self.clips * self.rollout()[1],
            "looking memories up": self.clips * self.looked_up()[1],
            "judging heads": self.clips * self.site_passes * self.judged(),
            "measuring exactly": self.validating * self.site_passes * self.exact(),
        }

    @property
    def record(self) -> int:
        """Bytes of the record of a clip, float64."""
        own, of = self.settings, self.config
        grid = len(own.budgets) * len(own.scorers) * (2 + own.probes)
        heads = of.layers * of.heads * (grid + own.reach + 2 * of.dim // of.heads)
        return 8 * heads * self.site_passes

    @property
    def memory(self) -> int:
        """Bytes of a process at most, about: weights, cache, and what a judged pass keeps."""
        own, of = self.settings, self.config
        tokens = Passes(of, self.latent_size).tokens
        branches = of.geometry(self.latent_size).branches
        weights = parameters(of) * self.size
        cache = 2 * branches * of.layers * self.keys(self.sites[-1]) * tokens * of.dim * self.size
        rows = of.chunk * tokens
        kept = of.layers * rows * of.dim * (7 + own.probes) * self.size
        inside = rows * (3 * of.ffn_dim + 12 * of.dim) * self.size
        batched = own.batch * inside if self.validating else inside
        return math.ceil(weights + cache + kept + batched)

    @property
    def dealt(self) -> list[int]:
        """Clips of each rank."""
        return [len(range(rank, self.clips, self.ranks)) for rank in range(self.ranks)]

    @property
    def hours(self) -> float:
        """Until the first rank is done, which has most to do: clips that validate come first."""
        each = self.rollout()[1] + self.site_passes * self.judged()
        each += self.looked_up()[1] * self.lookups
        flops = self.dealt[0] * each
        flops += -(-self.validating // self.ranks) * self.site_passes * self.exact()
        return flops / self.rate / 3600

    @property
    def _reference(self) -> str:
        """What losses are against."""
        held, horizon = max(map(self.keys, self.sites)), self.config.train_horizon
        known = f"Losses are against a reference that reads {held} frames, the chunk included"
        if held <= horizon:
            return f"{known}."
        return (
            f"{known}, and the model was trained on {horizon}: what it loses there is not what it "
            "loses in use. Give a --reference that holds fewer, or shorter clips and a smaller "
            "reach."
        )

    def words(self, what: str) -> list[str]:
        """All of it in lines.

        Args:
            what: How the rate is known.
        """
        (passes, _), (looks, _) = self.rollout(), self.looked_up()
        items = ", ".join(map(str, dict.fromkeys(self.dealt)))
        chunks = ", ".join(map(str, self.sites))
        lines = [
            f"Clips: {self.clips} ({several(self.prompts, 'prompt')}), of which "
            f"{self.validating} are also measured exactly; on {self.ranks} "
            f"{'process' if self.ranks == 1 else 'processes'}: {items} each.",
            f"Passes of a clip: {passes} of its rollouts; "
            + (f"{looks} in which memories are looked up; " if looks else "")
            + f"{self.site_passes} in which heads are judged (such as in chunks {chunks}).",
            f"Arithmetic: {flop_words(sum(self.flops.values()))} in all; "
            + "; ".join(
                f"{name} {flop_words(value)}" for name, value in self.flops.items() if value
            )
            + ".",
            f"Disk: {format_bytes(self.record)} a clip, {format_bytes(self.record * self.clips)} "
            f"in all. Tensors of a process: about {format_bytes(self.memory)}.",
            self._reference,
            f"Time: about {time_words(self.hours)} at {flop_words(self.rate)} a second and process "
            f"({what}).",
        ]
        return lines


def flop_words(value: float) -> str:
    """FLOP with a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {prefix}FLOP"
        value /= 1000
    return f"{value:.3g} EFLOP"


def time_words(hours: float) -> str:
    """Hours, or minutes where they are few, or seconds."""
    if hours >= 1:
        return f"{hours:.3g} hours"
    return f"{hours * 60:.2g} minutes" if hours * 60 >= 1 else f"{hours * 3600:.2g} seconds"
