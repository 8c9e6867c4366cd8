"""Train the embedded model on the panorama world (recipe: flow matching, teacher forcing)."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lightning_kv.cache.passes import Pass
from lightning_kv.data.panorama import SIZES, draw_prompt, draw_world, phrase_table
from lightning_kv.models.codec import PatchCodec, PhraseEncoder
from lightning_kv.models.embedded import save_embedded
from lightning_kv.models.sizes import PRESETS
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.tasks.options import PretrainOptions, Recipe, Stage
from lightning_kv.tasks.training.module import (
    Training,
    check_numbers,
    commit,
    prepare_training,
    train,
)
from lightning_kv.tasks.training.optimizers import JoinedOptimizer, Muon
from lightning_kv.tasks.training.teacher_forcing import ForcingSession


@dataclass
class Batch:
    """One training step: clean sequences and everything random about the step.

    Shapes: ``latents`` ``[B, F, C, h, w]``; ``revisited`` ``[B, F]``, frames whose position was
    last seen more than two chunks ago; ``t`` ``[B * M, chunks]``.
    """

    latents: Tensor
    prompts: list[str]
    revisited: Tensor
    t: Tensor
    noise: Tensor
    history: Tensor
    visible: list[list[int]]
    head_scale: Tensor | None


class PanoramaBatches(IterableDataset):
    """Batch number i depends on (seed, rank, i) alone, so that a resumed run sees the same data."""

    def __init__(
        self, recipe: Recipe, codec: PatchCodec, heads: tuple[int, int], start: int, rank: int
    ):
        self.recipe, self.codec, self.heads, self.start, self.rank = (
            recipe,
            codec,
            heads,
            start,
            rank,
        )

    def __iter__(self):
        for step in range(self.start, self.recipe.steps):
            yield self.draw(step)

    def draw(self, step: int) -> Batch:
        """Draw the batch of one step."""
        recipe = self.recipe
        stage, _ = recipe.at(step)
        rng = torch.Generator().manual_seed(hash((recipe.seed, self.rank, step)) % 2**63)
        frames = stage.chunks * 3
        worlds = [
            draw_world(draw_prompt(rng, stage.sizes, recipe.slow), rng) for _ in range(stage.batch)
        ]
        latents = torch.stack([self.codec.encode(world.render(frames)) for world in worlds])
        rows = stage.batch * recipe.streams
        order = torch.rand(rows, stage.chunks, generator=rng).argsort(1)
        u = (order + torch.rand(rows, stage.chunks, generator=rng)) / stage.chunks
        t = (recipe.shift * u / (1 + (recipe.shift - 1) * u)).clamp_min(0.02)
        noise = torch.randn(rows, *latents.shape[1:], generator=rng)
        level = recipe.history_noise * torch.rand(stage.batch, stage.chunks, generator=rng)
        level *= torch.rand(stage.batch, 1, generator=rng) < 0.7
        history = torch.randn(latents.shape, generator=rng) * spread(level)
        scale = None
        if stage.head_dropout:
            keep = torch.rand(stage.batch, *self.heads, generator=rng) >= stage.head_dropout
            scale = keep / (1 - stage.head_dropout)
        return Batch(
            latents,
            [world.prompt.text for world in worlds],
            torch.stack([revisited(world.positions(frames), 6) for world in worlds]),
            t,
            noise,
            history,
            self._visible(stage.chunks, rng),
            scale,
        )

    def _visible(self, chunks: int, rng: torch.Generator) -> list[list[int]]:
        """Earlier chunks each chunk may read: all, a window, sink + window or a random half."""
        if float(torch.rand((), generator=rng)) >= self.recipe.history_dropout:
            return [list(range(i)) for i in range(chunks)]
        kind, window = (int(torch.randint(n, (), generator=rng)) for n in (3, 4))
        recent = [set(range(max(0, i - window - 1), i)) for i in range(chunks)]
        if kind == 0:
            seen = recent
        elif kind == 1:
            seen = [late | set(range(min(i, 1))) for i, late in enumerate(recent)]
        else:
            half = {i for i in range(chunks) if torch.rand((), generator=rng) < 0.5}
            seen = [{j for j in range(i) if j in half or j == i - 1} for i in range(chunks)]
        return [sorted(late) for late in seen]


def spread(per_chunk: Tensor) -> Tensor:
    """``[B, chunks]`` to ``[B, F, 1, 1, 1]``."""
    return per_chunk.repeat_interleave(3, 1)[:, :, None, None, None]


def revisited(positions: Tensor, gap: int) -> Tensor:
    """Frames whose position was last seen more than ``gap`` frames ago, bool ``[F]``."""
    same = positions[:, None] == positions[None, :]
    lag = torch.arange(len(positions))[:, None] - torch.arange(len(positions))[None, :]
    return (same & (lag > gap)).any(1) & ~(same & (lag > 0) & (lag <= gap)).any(1)


def new_model(seed: int) -> VideoModel:
    """The embedded model before training, with its codec and text encoder fitted to the world."""
    rng = torch.Generator().manual_seed(seed)
    patches = []
    for _ in range(200):
        strip = draw_world(draw_prompt(rng, (8, 14)), rng).strip()
        patches.append(strip.unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2).transpose(0, 1))
    table = phrase_table()
    encoder = PhraseEncoder(list(table), torch.tensor(list(table.values())))
    config = PRESETS["panorama"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CausalWan(config)
    for block in model.blocks:
        block.modulation.data[:, [2, 5]] += 1.0  # open gates: plain residual blocks at the start
        for linear in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
            linear.weight.data *= 0.3
        for norm in (block.self_attn.norm_q, block.self_attn.norm_k):
            norm.weight.data.fill_(1.4)
    model.head.head.weight.data *= 0.1
    return VideoModel(model, PatchCodec.fit(torch.cat(patches), config.channels), encoder)


class Pretrain(Training):
    """Trains :class:`~lightning_kv.models.wan.CausalWan` to predict clean panorama chunks.

    Args:
        recipe: What to train, and how long.
        out: Directory for sample pictures.
        picture_every: Steps between two pictures; 0 for none.

    Raises:
        ValueError: A recipe that trains nothing.
    """

    def __init__(self, recipe: Recipe, out: Path, picture_every: int = 100) -> None:
        check_recipe(recipe)
        super().__init__(recipe.steps)
        self.recipe, self.out, self.picture_every = recipe, out, picture_every
        embedded = new_model(recipe.seed)
        self.model, self.codec, self.encoder = embedded.network, embedded.codec, embedded.encoder
        self.average = self.averaged(self.model)

    def data(self, start: int) -> PanoramaBatches:
        """Worlds, noise and visible history of each step."""
        config = self.model.config
        codec = copy.deepcopy(self.codec).cpu()  # worlds are drawn on the CPU
        heads = (config.layers, config.heads)
        return PanoramaBatches(self.recipe, codec, heads, start, self.global_rank)

    def optimizer(self) -> JoinedOptimizer:
        """Muon for the matrices of the blocks, AdamW for everything else."""
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        held = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in held]
        return JoinedOptimizer(
            [
                Muon(matrices, lr=1.0, weight_decay=self.recipe.weight_decay),
                torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0),
            ]
        )

    def rate(self, step: int) -> float:
        """That of the stage."""
        stage, within = self.recipe.at(step)
        return stage.rate(within)

    def decay(self, step: int) -> float:
        """That of the recipe, once it is less than what a first few steps keep."""
        return min(self.recipe.ema[step >= 500], (1 + step) / (10 + step))

    def predict(self, batch: Batch, network: CausalWan) -> Tensor:
        """Clean estimates of all noisy chunks, ``[B * M, F, C, h, w]``."""
        clean, frames = batch.latents, batch.latents.shape[1]
        streams = self.recipe.streams
        ids = tuple(range(frames))
        session = ForcingSession(
            network.config.geometry(), network.config.chunk, batch.visible, batch.head_scale
        )
        context = network.prepare(self.encoder(batch.prompts))
        still = Pass("commit", ids, (0.0,) * frames, chunk=0)
        network(clean + batch.history, clean.new_zeros(clean.shape[:2]), context, session, still)
        level = spread(batch.t)
        noisy = (1 - level) * clean.repeat_interleave(streams, 0) + level * batch.noise
        times = 1000 * batch.t.repeat_interleave(3, 1)
        doubled = [tuple(x.repeat_interleave(streams, 0) for x in pair) for pair in context]
        moving = Pass("denoise", ids, (0.0,) * frames, chunk=0)
        return network.x0(network(noisy, times, doubled, session, moving), noisy, times)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As the base does, but sum the norm in the order of the network, not of the groups.

        The shipped weights were trained so, and another order gives other last digits.
        """
        if gradient_clip_algorithm in (None, "norm"):
            nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val or 1.0)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """The loss, and the error of blind estimates of frames that were and were not seen."""
        stage, _ = self.recipe.at(self.global_step)
        estimate = self.predict(batch, self.model)
        target = batch.latents.repeat_interleave(self.recipe.streams, 0)
        error = (estimate - target).square()
        loss = (error / spread(batch.t).clamp_min(stage.floor) ** 2).mean()
        self.estimate = estimate.detach()
        frames = error.detach().mean((2, 3, 4))
        blind = (batch.t > 0.8).repeat_interleave(3, 1)
        seen = batch.revisited.repeat_interleave(self.recipe.streams, 0)
        values = {"loss": loss}
        for name, mask in (("mse_revisit", blind & seen), ("mse_new", blind & ~seen)):
            if mask.any():
                values[name] = frames[mask].mean()
        return values

    def on_train_batch_end(self, outputs: dict, batch: Batch, index: int) -> None:
        """Paint a picture now and then."""
        step = self.global_step - 1
        if self.picture_every and step % self.picture_every == 0 and self.global_rank == 0:
            self._picture(batch, self.estimate)

    def _picture(self, batch: Batch, estimate: Tensor) -> None:
        """Truth above the one-step estimates of its noisiest stream, for one sequence."""
        from matplotlib.image import imsave

        rows = self.codec.decode(torch.stack([batch.latents[0], estimate[0]]))
        strip = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [2 * 32, F * 32, 3]
        folder = self.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        imsave(folder / f"step-{self.global_step:05d}.png", strip.clamp(0, 1).cpu().numpy())


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that trains nothing, or comes to nothing on the way.

    Raises:
        ValueError: Names the setting, what it is and what it may be.
    """
    whose = "The panorama model"
    if not recipe.stages:
        raise ValueError(
            f"{whose} cannot be trained with: stages is {recipe.stages!r}. Give one stage or more, "
            "as in configs/pretrain_panorama.yaml."
        )
    one = vars(recipe)
    check_numbers(whose, {"seed": recipe.seed}, 0, 2**63 - 1, whole=True)
    check_numbers(whose, {"streams": recipe.streams}, 1, whole=True)
    check_numbers(whose, {"shift": recipe.shift}, 0, above=True)
    check_numbers(whose, {n: one[n] for n in ("history_noise", "weight_decay")}, 0)
    check_numbers(whose, {n: one[n] for n in ("history_dropout", "slow")}, 0, 1)
    early, late = _pair(whose, "ema", recipe.ema)
    check_numbers(whose, {"ema[0]": early, "ema[1]": late}, 0, 1)
    for place, stage in enumerate(recipe.stages):
        _check_stage(whose, f"stages[{place}].", stage)


def _check_stage(whose: str, at: str, stage: Stage) -> None:
    """Refuse one stage of a recipe."""

    def named(*names: str) -> dict[str, object]:
        return {at + name: getattr(stage, name) for name in names}

    check_numbers(whose, named("steps", "chunks", "batch"), 1, whole=True)
    check_numbers(whose, named("lr"), 0, above=True)
    check_numbers(whose, named("warmup"), 0, whole=True)
    check_numbers(whose, named("floor"), 0, 1, above=True)
    check_numbers(whose, named("hold", "final"), 0, 1)
    check_numbers(whose, named("head_dropout"), 0, 0.99)  # what is left is scaled up
    low, high = _pair(whose, f"{at}sizes", stage.sizes)
    check_numbers(whose, {f"{at}sizes[0]": low}, SIZES[0], SIZES[-1], whole=True)
    check_numbers(whose, {f"{at}sizes[1]": high}, low, SIZES[-1], whole=True)


def _pair(whose: str, name: str, value: Sequence) -> Sequence:
    """Refuse what is no two numbers."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(
            f"{whose} cannot be trained with: {name} is {value!r}. Give two numbers, as in "
            "configs/pretrain_panorama.yaml."
        )
    return value


def pretrain(
    options: PretrainOptions,
    logger: Logger | Sequence[Logger] | bool | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> Path:
    """Train, or go on from the last checkpoint in ``out``; returns the weights file.

    Args:
        options: What to train, where and how.
        logger: Of Lightning, instead of those in the options.
        callbacks: Of Lightning, beside those in the options and the run's own.

    Raises:
        ValueError: Settings that train nothing, ``out`` holds another run, or the training has come
            to nothing.
    """
    check_numbers("The panorama model", {"picture_every": options.picture_every}, 0, whole=True)
    check_recipe(options.recipe)
    trainer, described = prepare_training("The panorama model", options, logger, callbacks)
    task = Pretrain(options.recipe, options.out, options.picture_every)
    train(task, trainer, options.out, described)
    target = options.out / "panorama.safetensors"
    metadata = {
        "recipe": described,
        "commit": commit(),
        "steps": str(task.steps),
        "final_losses": json.dumps(task.losses),
        "reproduce": "lightning-kv pretrain, with the recipe in this metadata",
    }
    save_embedded(target, VideoModel(task.average, task.codec, task.encoder), metadata)
    return target
