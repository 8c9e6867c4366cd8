"""Train the embedded model on the panorama world (recipe: flow matching, teacher forcing)."""

from __future__ import annotations

import copy
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_kv.cache.passes import Pass
from lightning_kv.data.panorama import draw_prompt, draw_world, phrase_table
from lightning_kv.models.codec import PatchCodec, PhraseEncoder
from lightning_kv.models.embedded import save_embedded
from lightning_kv.models.sizes import PRESETS
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan
from lightning_kv.tasks.forcing import ForcingSession
from lightning_kv.tasks.launch import resolved
from lightning_kv.tasks.muon import Muon
from lightning_kv.tasks.options import PretrainOptions, Recipe


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


class Pretrain(L.LightningModule):
    """Trains :class:`~lightning_kv.models.wan.CausalWan` to predict clean panorama chunks.

    Args:
        recipe: What to train, and how long.
        out: Directory for sample pictures.
        picture_every: Steps between two pictures.
    """

    def __init__(self, recipe: Recipe, out: Path, picture_every: int = 100) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recipe, self.out, self.picture_every = recipe, out, picture_every
        embedded = new_model(recipe.seed)
        self.model, self.codec, self.encoder = embedded.network, embedded.codec, embedded.encoder
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
        self.losses: dict[str, float] = {}

    def train_dataloader(self) -> DataLoader:
        """Batches from the step this run has reached."""
        config = self.model.config
        codec = copy.deepcopy(self.codec).cpu()  # worlds are drawn on the CPU
        data = PanoramaBatches(
            self.recipe, codec, (config.layers, config.heads), int(self.done), self.global_rank
        )
        return DataLoader(data, batch_size=None)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, AdamW for everything else."""
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        held = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in held]
        return [
            Muon(matrices, weight_decay=self.recipe.weight_decay),
            torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
        ]

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

    def training_step(self, batch: Batch, _: int) -> None:
        """One step of both optimisers and of the averaged weights."""
        step = int(self.done)
        stage, within = self.recipe.at(step)
        estimate = self.predict(batch, self.model)
        target = batch.latents.repeat_interleave(self.recipe.streams, 0)
        error = (estimate - target).square()
        loss = (error / spread(batch.t).clamp_min(stage.floor) ** 2).mean()
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = stage.rate(within)
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = self.recipe.ema[step >= 500]
        decay = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.average.parameters()), list(self.model.parameters()), 1 - decay
        )
        self.done += 1
        self._report(batch, error.detach(), loss.detach(), stage.rate(within))
        if self.picture_every and step % self.picture_every == 0 and self.global_rank == 0:
            self._picture(batch, estimate.detach())

    def _report(self, batch: Batch, error: Tensor, loss: Tensor, rate: float) -> None:
        frames = error.mean((2, 3, 4))
        blind = (batch.t > 0.8).repeat_interleave(3, 1)
        seen = batch.revisited.repeat_interleave(self.recipe.streams, 0)
        values = {"loss": loss, "lr": rate, "step": float(self.done)}
        for name, mask in (("mse_revisit", blind & seen), ("mse_new", blind & ~seen)):
            if mask.any():
                values[name] = frames[mask].mean()
        self.log_dict(values, prog_bar=True)
        self.losses = {name: float(value) for name, value in values.items()}

    def _picture(self, batch: Batch, estimate: Tensor) -> None:
        """Truth above the one-step estimates of its noisiest stream, for one sequence."""
        from matplotlib.image import imsave

        rows = self.codec.decode(torch.stack([batch.latents[0], estimate[0]]))
        strip = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [2 * 32, F * 32, 3]
        folder = self.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        imsave(folder / f"step-{int(self.done):05d}.png", strip.clamp(0, 1).cpu().numpy())


def stamp(out: Path, recipe: object) -> str:
    """Make the directory of a training run, or check that it holds one of this recipe.

    Returns:
        The recipe as JSON.

    Raises:
        ValueError: It holds another.
    """
    described = json.dumps(asdict(recipe), indent=2)
    file = out / "recipe.json"
    if file.exists() and file.read_text() != described:
        raise ValueError(
            f"{out} holds a training run with another recipe. "
            "Give another --out, or the recipe in its recipe.json."
        )
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(described)
    return described


def pretrain(options: PretrainOptions) -> Path:
    """Train, or go on from the last checkpoint in ``out``; returns the weights file.

    Raises:
        ValueError: ``out`` holds a run with another recipe.
    """
    torch.set_num_threads(options.threads)
    out = options.out
    described = stamp(out, options.recipe)
    task = Pretrain(options.recipe, out, options.picture_every)
    last = out / "last.ckpt"
    trainer_for(options).fit(task, ckpt_path=last if last.exists() else None, weights_only=False)
    if int(task.done) < options.recipe.steps:
        raise RuntimeError(
            f"Stopped at step {int(task.done)} of {options.recipe.steps}. "
            "Give the same command again to go on."
        )
    target = out / "panorama.safetensors"
    metadata = {
        "recipe": described,
        "commit": commit(),
        "steps": str(int(task.done)),
        "final_losses": json.dumps(task.losses),
        "reproduce": "lightning-kv pretrain, with the recipe in this metadata",
    }
    save_embedded(target, VideoModel(task.average, task.codec, task.encoder), metadata)
    return target


def trainer_for(options: PretrainOptions) -> L.Trainer:
    """A Trainer that saves checkpoints and logs losses in the run directory."""
    from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
    from lightning.pytorch.loggers import CSVLogger

    saver = ModelCheckpoint(
        options.out,
        filename="last",
        every_n_train_steps=options.checkpoint_every * 2,  # two optimisers step each time
        save_top_k=1,
        enable_version_counter=False,
    )
    return L.Trainer(
        accelerator=resolved(options.accelerator),
        devices=1,
        max_epochs=1,
        callbacks=[saver, RichProgressBar()],
        logger=CSVLogger(options.out, name="", version="log"),
        log_every_n_steps=10,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def commit() -> str:
    """Commit of the code that is running, ``-dirty`` if changed; ``unknown`` outside a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
