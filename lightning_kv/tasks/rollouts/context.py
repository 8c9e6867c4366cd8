"""From a prompt of the data to what a rollout starts from and what metrics know of its world."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kv.data.datamodule import PromptDataModule, PromptSample
from lightning_kv.data.pairs import SAME_RATE
from lightning_kv.data.panorama import (
    VISIBLE,
    PanoramaPrompt,
    column_tiles,
    poses,
    ruler,
    world_for,
)
from lightning_kv.data.video_clips import first_frames
from lightning_kv.data.videos import VideoError, VideoFile, VideoInfo
from lightning_kv.metrics import Scene
from lightning_kv.metrics.functional.panorama import decode_positions
from lightning_kv.models.codec import PatchCodec
from lightning_kv.models.embeddings import PromptBook
from lightning_kv.models.video import EncodingCodec, VideoModel
from lightning_kv.models.wan import WanConfig
from lightning_kv.policies.base import CachePolicy
from lightning_kv.tasks.rollouts.lengths import read_size
from lightning_kv.tasks.rollouts.settings import RolloutSettings
from lightning_kv.tasks.trainer import is_first

SAME_SHAPE = 0.02  # relative: 480 x 854 in 480 x 832 is seen by nobody


@dataclass(frozen=True)
class Start:
    """Where a clip starts.

    Args:
        sample: Prompt and key.
        scene: What metrics may know of its world; None outside the panorama.
        context: Given latents ``[context_frames, C, h, w]``; None in free generation.
        truth: What really follows, for comparison videos: pixels of the world ``[F, 3, 32, 32]``
            in [0, 1], or of a video, uint8 ``[P, 3, H, W]``; None without context, and of a video
            that ends before the clip.
    """

    sample: PromptSample
    scene: Scene | None = None
    context: Tensor | None = None
    truth: Tensor | None = None

    @property
    def real(self) -> Tensor | None:
        """What sets of clips are compared with, pixels in [0, 1]; None where nobody knows.

        In the panorama it is the truth as the codec shows it: the codec's error is no policy's.
        """
        if self.scene is not None:
            return self.scene.truth_pixels
        return None if self.truth is None else self.truth.float() / 255


def start_of(sample: PromptSample, model: VideoModel, settings: RolloutSettings) -> Start:
    """The start of a prompt: the frames of its video or of its world, or the prompt alone.

    Raises:
        ValueError: Frames are to be given and nothing gives them, or the video cannot be used.
    """
    if sample.video is not None:
        return video_start(sample, model, settings)
    if isinstance(model.codec, PatchCodec):
        return panorama_start(sample, model.codec, settings.frames, settings.context_frames)
    if settings.context_frames:
        raise _nothing_to_give(model.name, settings)
    return Start(sample)


def video_start(sample: PromptSample, model: VideoModel, settings: RolloutSettings) -> Start:
    """Look at the first frames of a video, and at what follows where it is long enough.

    Frames are taken one by one as the video has them, whatever its rate, and resized to the size
    of the clip (bicubic with antialias; nothing is cropped).

    Args:
        sample: Prompt and video.
        model: Its codec encodes.
        settings: How many frames, how many of them given, and their size.

    Raises:
        ValueError: The codec cannot encode, or no frame is to be given.
        VideoError: The video cannot be read, or has too few frames.
    """
    config, world = model.network.config, isinstance(model.codec, PatchCodec)
    check_codec(model.name, model.codec)
    _check_given(settings, config)
    given, whole = map(config.pixel_frames, (settings.context_frames, settings.frames))
    wanted = whole if settings.decode or world else given
    pixels = first_frames(sample.video, wanted, pixel_size(settings, config))
    if len(pixels) < given:
        raise _too_short(sample.video, len(pixels), settings, config)
    truth = pixels if len(pixels) == whole else None
    if world:
        return _panorama_video(sample, model.codec, settings.context_frames, pixels, truth)
    shown = pixels[None, :given].to(next(model.network.parameters()).device)
    latents = model.codec.encode(shown.float() / 255)[0]
    return Start(sample, None, latents, truth)


def _panorama_video(
    sample: PromptSample, codec: PatchCodec, context: int, pixels: Tensor, truth: Tensor | None
) -> Start:
    """The start of a video of some panorama; where its camera is can be read off the ground."""
    prompt = PanoramaPrompt.parse(sample.prompt)
    codes, rulers = code_latents(prompt, codec)
    latents = codec.encode(pixels.to(codec.mean.device).float() / 255)
    scene = Scene(codes, rulers, prompt.size)
    if truth is not None:
        positions = decode_positions(latents, rulers)
        scene = Scene(codes, rulers, prompt.size, positions, codec.decode(latents), latents)
    return Start(sample, scene, latents[:context], truth)


def panorama_start(sample: PromptSample, codec: PatchCodec, frames: int, context: int) -> Start:
    """Draw the world of a prompt and look at its first frames.

    Args:
        sample: Prompt and world seed.
        codec: Of the model.
        frames: Latent frames of the clip.
        context: How many of them are given; 0 for free generation, where no truth exists.
    """
    world = world_for(sample.prompt, sample.world_seed)
    codes, rulers = code_latents(world.prompt, codec)
    known = context > 0 or world.prompt.start == "left"
    positions = world.positions(frames).to(codes.device) if known else None
    if not context:
        return Start(sample, Scene(codes, rulers, world.prompt.size, positions), None, None)
    pixels = world.render(frames)
    latents = codec.encode(pixels.to(codec.mean.device))
    truth = codec.decode(latents)  # what a perfect model could show: the codec's error is not its
    scene = Scene(codes, rulers, world.prompt.size, positions, truth, latents)
    return Start(sample, scene, latents[:context], pixels)


def code_latents(prompt: PanoramaPrompt, codec: PatchCodec) -> tuple[Tensor, Tensor]:
    """Latents of each column code ``[26, C, 3]`` and of the ground per position ``[n, C, 4]``."""
    device = codec.mean.device
    codes = codec.encode(column_tiles(prompt.palette).to(device)).squeeze(-1)
    ground = codec.encode(ruler(prompt.columns).to(device)).squeeze(-2)  # [C, columns]
    views = ground.unfold(1, VISIBLE, prompt.stride)  # [C, n, 4]
    return codes, views.permute(1, 0, 2).contiguous()


def stack_context(starts: list[Start]) -> Tensor | None:
    """Contexts of a batch, ``[B, context_frames, C, h, w]``, or None."""
    return None if starts[0].context is None else torch.stack([s.context for s in starts])


def stack_inputs(starts: Sequence[Start], names: Sequence[str]) -> dict[str, list[Tensor]]:
    """Side inputs by frame of a batch, as far as somebody asks for them and they are known.

    The pose of the camera is known in a panorama that is given, or starts at the left wall.
    """
    if "pose" not in names:
        return {}
    found = [None if start.scene is None else start.scene.positions for start in starts]
    known = all(each is not None for each in found)
    return {"pose": [poses(each) for each in found]} if known else {}


def check_poses(
    policies: Iterable[CachePolicy],
    config: WanConfig,
    settings: RolloutSettings,
    data: PromptDataModule,
) -> None:
    """Refuse panoramas whose camera is not known where a policy asks for its pose.

    Args:
        policies: Of the run.
        config: The model's shape.
        settings: How many frames, and how many of them given.
        data: Prompts, or videos whose camera can be read off.

    Raises:
        ValueError: Names the policy, and the first prompt or video.
    """
    asking = [policy.name for policy in policies if "pose" in policy.inputs]
    if not asking:
        return
    needs = f"The policy {asking[0]!r} needs the camera's pose at every frame"
    ways = "or a setting that does without, such as by: keys of world-kv"
    whole = config.pixel_frames(settings.frames)
    for info in data.video_infos.values():
        if info.frames < whole:
            raise ValueError(
                f"{needs}, and {info.path} ends before the clip: it has {info.frames} frames of "
                f"{whole}. Give --frames {latent_frames(info.frames, config)} at most, {ways}."
            )
    if settings.context_frames:
        return
    for sample in data.prompt_samples():
        if PanoramaPrompt.parse(sample.prompt).start != "left":
            raise ValueError(
                f"{needs}, and nobody knows where {sample.prompt!r} starts with no frames given. "
                f"Give --context_frames {config.chunk}, prompts that start left, {ways}."
            )


def pixel_size(settings: RolloutSettings, config: WanConfig) -> tuple[int, int]:
    """Height and width of every clip in pixels."""
    height, width = read_size(settings.size, config)
    return height * config.stride[1], width * config.stride[1]


def check_context(
    model: str,
    config: WanConfig,
    world: bool,
    settings: RolloutSettings,
    data: Any,
    sets: Sequence[str] = (),
) -> None:
    """Refuse frames to give that nobody gives, and videos that are too short to give them.

    Args:
        model: Its name.
        config: Its shape.
        world: Whether it is of the panorama, whose worlds give frames.
        settings: How many frames, and how many of them given.
        data: The data module. Of one that does not say ``video_infos``, items are checked as they
            come.
        sets: Metrics that compare sets of clips with what really follows.

    Raises:
        ValueError: The first thing that does not fit.
    """
    infos: Mapping[str, VideoInfo] | None = getattr(data, "video_infos", None)
    if infos is None:
        return
    if not infos:
        if settings.context_frames and not world:
            raise _nothing_to_give(model, settings)
        return
    _check_given(settings, config)
    given, whole = map(config.pixel_frames, (settings.context_frames, settings.frames))
    shortest = min(infos.values(), key=lambda info: info.frames)
    if shortest.frames < given:
        raise _too_short(shortest.path, shortest.frames, settings, config)
    if sets and shortest.frames < whole:
        raise VideoError(
            f"{', '.join(sets)} compares clips with what their videos go on to show, and "
            f"{shortest.path} ends before: it has {shortest.frames} frames, and a clip {whole}. "
            f"Give --frames {latent_frames(shortest.frames, config)} at most, --real FOLDER to "
            "compare with other videos, or leave out the metric or the video."
        )
    _tell_differences(infos.values(), settings, pixel_size(settings, config))


def check_codec(model: str, codec: object) -> None:
    """Refuse a model that brings no pixels to latents.

    Raises:
        ValueError: It cannot.
    """
    if not isinstance(codec, EncodingCodec):
        what = "no codec" if codec is None else f"a {type(codec).__name__} without encode()"
        raise ValueError(
            f"{model!r} cannot go on from a video: it has {what}, which would bring the first "
            "frames to latents. Use the panorama model, or a Wan model with its VAE; where "
            "decode=False is to make no pixels, EvaluateModule needs load_model(NAME) in place of "
            "the name."
        )


def check_prompts(model: VideoModel, prompts: Mapping[str, VideoFile | None]) -> None:
    """Refuse prompts that the model does not read, as far as that can be known beforehand.

    Args:
        model: That they are for.
        prompts: Each with the video whose caption it is, where that is known.

    Raises:
        ValueError: Names the first, and its video.
    """
    for prompt, video in prompts.items():
        try:
            if isinstance(model.codec, PatchCodec):
                PanoramaPrompt.parse(prompt)
            elif isinstance(model.encoder, PromptBook):
                model.encoder.require([prompt])
        except ValueError as error:
            if video is None:
                raise
            raise ValueError(f"The caption of {video} cannot be used. {error}") from error


def _check_given(settings: RolloutSettings, config: WanConfig) -> None:
    if not settings.context_frames:
        raise ValueError(
            "Videos give the first frames of clips, and --context_frames 0 takes none of them. "
            f"Give --context_frames {config.chunk} or another multiple of it."
        )


def _nothing_to_give(model: str, settings: RolloutSettings) -> ValueError:
    return ValueError(
        f"--context_frames {settings.context_frames} gives frames of the panorama world, and "
        f"{model!r} has none to give. Use 0, or give videos to go on from: --context_videos."
    )


def _too_short(
    video: VideoFile, frames: int, settings: RolloutSettings, config: WanConfig
) -> VideoError:
    most = latent_frames(frames, config)
    use = f"Use --context_frames {most} at most, or leave" if most else "Leave"
    return VideoError(
        f"{video} is too short: it has {frames} frames, and --context_frames "
        f"{settings.context_frames} shows {config.pixel_frames(settings.context_frames)}. {use} "
        "the video out."
    )


def latent_frames(shown: int, config: WanConfig) -> int:
    """The most latent frames, in whole chunks, that so many pixel frames show whole."""
    return ((shown - 1) // config.stride[0] + 1) // config.chunk * config.chunk


def _tell_differences(
    infos: Iterable[VideoInfo], settings: RolloutSettings, size: tuple[int, int]
) -> None:
    """Say that the model will see videos faster or slower than they are, or out of shape."""
    if not is_first():
        return
    height, width = size
    for info in infos:
        if abs(float(info.fps) / settings.fps - 1) > SAME_RATE:
            warnings.warn(
                f"Frames are taken one by one: {info.path} shows {float(info.fps):g} in a second, "
                f"and a clip {settings.fps:g}.",
                stacklevel=2,
            )
            break
    for info in infos:
        if abs(info.width * height / (info.height * width) - 1) > SAME_SHAPE:
            warnings.warn(
                f"Nothing is cropped: {info.path} has {info.height} x {info.width} pixels, and is "
                f"stretched to {height} x {width}.",
                stacklevel=2,
            )
            break
