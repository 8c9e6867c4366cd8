"""Published checkpoints: where they are, under which terms, and how their authors run them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from lightning_kv.models.samplers import warp
from lightning_kv.models.sizes import PRESETS
from lightning_kv.models.wan import WanConfig
from lightning_kv.utilities.model_folders import hub_copy, models_folder

FOUR = warp((1000, 750, 500, 250), 5.0)
"""The four noise levels of Self Forcing and of most that came after it."""

ROLLING = warp((1000, 800, 600, 400, 200), 5.0)
"""The five noise levels that Rolling Forcing has in flight."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """Files of one repository on the model hub.

    Args:
        name: What it is called here.
        about: What it is, in a sentence.
        project: Code, as ``owner/name`` on GitHub.
        licence: Terms of code and weights, as far as they are known.
        repo: Repository on the model hub.
        files: Paths in the repository, the weights first, then a LoRA; a folder ends in ``/``.
        size: Bytes of the download, to the digits that are known; None where nobody has said.
    """

    name: str
    about: str
    project: str
    licence: str
    repo: str
    files: tuple[str, ...]
    size: int | None = None

    @property
    def folder(self) -> Path:
        """Where a download of it goes."""
        return models_folder() / self.name

    @property
    def root(self) -> Path | None:
        """The local folder that holds all of ``files``; None where there is none.

        That is :attr:`folder`, or a copy in the hub's own cache. The network is never asked.
        """
        for root in (self.folder, _cached(self)):
            if root is not None and all(_whole(root, file) for file in self.files):
                return root
        return None

    @property
    def path(self) -> Path | None:
        """The weights here, a file or a folder; None where one of ``files`` is missing."""
        root = self.root
        return None if root is None else root / self.files[0]

    @property
    def page(self) -> str:
        """Its page on the model hub."""
        return f"https://huggingface.co/{self.repo}"

    @property
    def command(self) -> str:
        """The line that downloads it without this package."""
        paths = " ".join(f if not f.endswith("/") else f'--include "{f}*"' for f in self.files)
        return f"hf download {self.repo} {paths} --local-dir {self.folder}"


@dataclass(frozen=True, kw_only=True)
class Published(Download):
    """One checkpoint and how its authors run it.

    Args:
        paper: Its arXiv id, or nothing.
        key: Top-level key of the weights that the authors use; None for a flat file.
        preset: Size: ``wan-1.3b`` or ``wan-14b``.
        changes: Fields of :class:`WanConfig` that differ from the preset.
        policy: Cache policy that the authors run.
    """

    paper: str = ""
    key: str | None = None
    preset: str = "wan-1.3b"
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    policy: str = "full"

    @property
    def config(self) -> WanConfig:
        """Sizes and sampling of this checkpoint."""
        return replace(PRESETS[self.preset], model=self.name, **self.changes)

    @property
    def lora(self) -> Path | None:
        """The LoRA here that belongs on top of the weights; None where there is none."""
        root = self.root
        return None if root is None or len(self.files) < 2 else root / self.files[1]


_SELF_FORCING = {
    "project": "guandeh17/Self-Forcing",
    "paper": "2506.08009",
    "licence": "code Apache-2.0, weights CC BY-NC-SA 4.0 (not for commercial use)",
    "repo": "gdhe17/Self-Forcing",
    "key": "generator_ema",
}
_CAUSAL_FORCING = {
    "project": "thu-ml/Causal-Forcing",
    "paper": "2602.02214",
    "licence": "Apache-2.0, code and weights",
    "repo": "zhuhz22/Causal-Forcing",
    "key": "generator_ema",
}
_CAUSVID = {
    "project": "tianweiy/CausVid",
    "paper": "2412.07772",
    "licence": "CC BY-NC-SA 4.0 (not for commercial use)",
    "repo": "tianweiy/CausVid",
    "key": "generator",
}

_ENTRIES = (
    Published(
        name="self-forcing",
        about="Self Forcing, chunks of 3 frames, 4 steps, trained with DMD on 21 frames.",
        files=("checkpoints/self_forcing_dmd.pt",),
        size=5_700_000_000,
        **_SELF_FORCING,
    ),
    Published(
        name="self-forcing-sid",
        about="Self Forcing trained with SiD in place of DMD.",
        files=("checkpoints/self_forcing_sid.pt",),
        **_SELF_FORCING,
    ),
    Published(
        name="self-forcing-diffusers",
        about="Self Forcing's weights in the diffusers layout, as FastVideo runs them.",
        project="hao-ai-lab/FastVideo",
        paper="2506.08009",
        licence="code Apache-2.0, weights: see the model page",
        repo="wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers",
        files=("transformer/",),
    ),
    Published(
        name="causal-forcing",
        about="Causal Forcing, chunks of 3 frames, 4 steps.",
        files=("chunkwise/causal_forcing.pt",),
        size=5_700_000_000,
        **_CAUSAL_FORCING | {"key": "generator"},
    ),
    Published(
        name="causal-forcing-frame",
        about="Causal Forcing frame by frame, 4 steps.",
        files=("framewise/causal_forcing.pt",),
        changes={"chunk": 1},
        **_CAUSAL_FORCING,
    ),
    Published(
        name="causal-forcing-2step",
        about="Causal Forcing++ frame by frame, 2 steps (the first frame takes 4).",
        files=("causal-forcing++/framewise-2step.pt",),
        changes={"chunk": 1, "timesteps": warp((1000, 500), 5.0), "first_timesteps": FOUR},
        **_CAUSAL_FORCING,
    ),
    Published(
        name="causal-forcing-1step",
        about="Causal Forcing++ frame by frame, 1 step (the first frame takes 4).",
        files=("causal-forcing++/framewise-1step.pt",),
        changes={"chunk": 1, "timesteps": (1000.0,), "first_timesteps": FOUR},
        **_CAUSAL_FORCING,
    ),
    Published(
        name="causal-forcing-long",
        about="Causal Forcing for minutes of video, run as Rolling Forcing is.",
        files=("chunkwise/longvideo.pt",),
        changes={"sampler": "rolling", "timesteps": ROLLING},
        policy="rolling-forcing",
        **_CAUSAL_FORCING,
    ),
    Published(
        name="rolling-forcing",
        about="Rolling Forcing: five chunks of 3 frames in flight at five noise levels.",
        project="TencentARC/RollingForcing",
        paper="2509.25161",
        licence="code under Tencent's own terms, weights MIT",
        repo="TencentARC/RollingForcing",
        files=("checkpoints/rolling_forcing_dmd.pt",),
        key="generator_ema",
        size=17_000_000_000,
        changes={"sampler": "rolling", "timesteps": ROLLING},
        policy="rolling-forcing",
    ),
    Published(
        name="longlive",
        about="LongLive 1.0: tuned on 240 frames with 3 sink frames and a window of 12.",
        project="NVlabs/LongLive",
        paper="2509.22622",
        licence="code Apache-2.0, weights: see the model page",
        repo="Efficient-Large-Model/LongLive-1.3B",
        files=("models/longlive_base.pt", "models/lora.pt"),
        key="generator",
        changes={"train_horizon": 240},
        policy="longlive",
    ),
    Published(
        name="causvid",
        about="CausVid, chunks of 3 frames, 3 steps.",
        files=("autoregressive_checkpoint/model.pt",),
        changes={"timesteps": (1000.0, 757.0, 522.0), "shift": 8.0},
        **_CAUSVID,
    ),
    Published(
        name="causvid-4step",
        about="CausVid, chunks of 3 frames, 4 steps on a schedule of shift 8.",
        files=("autoregressive_checkpoint_warp_4step_cfg2/model.pt",),
        changes={"timesteps": warp((1000, 750, 500, 250), 8.0)},
        **_CAUSVID,
    ),
    Published(
        name="krea-14b",
        about="Krea Realtime 14B, 4 steps; its authors encode 3 frames of context again at every "
        "chunk, and a window of 3 history frames comes nearest to that.",
        project="krea-ai/realtime-video",
        licence="CC BY-NC-SA 4.0 (not for commercial use)",
        repo="krea/krea-realtime-video",
        files=("krea-realtime-video-14b.safetensors",),
        size=28_600_000_000,
        preset="wan-14b",
        changes={"timesteps": (1000.0, 937.0, 833.0, 625.0), "shift": 5.0},
        policy="sliding-window@3f",
    ),
)

CATALOGUE: dict[str, Published] = {entry.name: entry for entry in _ENTRIES}
"""Published checkpoints by name."""

PARTS: dict[str, Download] = {
    "wan2.1-parts": Download(
        name="wan2.1-parts",
        about="Text encoder (UMT5-XXL, 5.7 billion parameters), tokenizer and VAE of Wan2.1, which "
        "every checkpoint here needs.",
        project="Wan-Video/Wan2.1",
        licence="Apache-2.0",
        repo="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        files=("tokenizer/", "text_encoder/", "vae/"),
    )
}
"""What checkpoints need beside themselves, by name."""


def parts_folder() -> Path | None:
    """A local folder with ``tokenizer/``, ``text_encoder/`` and ``vae/``; None where none is."""
    return PARTS["wan2.1-parts"].root


def by_file_name(path: str | Path) -> Published | None:
    """The checkpoint that a weights file is, by its name; None where that does not settle it.

    A name that several checkpoints share is settled by the folder it has in its repository.

    >>> by_file_name("downloads/self_forcing_dmd.pt").name
    'self-forcing'
    >>> by_file_name("framewise/causal_forcing.pt").name
    'causal-forcing-frame'
    >>> by_file_name("causal_forcing.pt") is None
    True
    """
    given = PurePath(path).parts
    single = [one for one in CATALOGUE.values() if not one.files[0].endswith("/")]
    for tail in (2, 1):
        found = [one for one in single if PurePath(one.files[0]).parts[-tail:] == given[-tail:]]
        if len(found) == 1:
            return found[0]
    return None


def _whole(root: Path, file: str) -> bool:
    """Whether a file is there, or a folder with every shard that its index names."""
    path = root / file
    if not file.endswith("/"):
        return path.is_file()
    if not (path / _marker(file)).is_file():
        return False
    if file == "tokenizer/":
        return any((path / name).is_file() for name in ("tokenizer.json", "spiece.model"))
    for index in path.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError):  # cut off
            return False
        return all((path / shard).is_file() for shard in shards)
    return any(path.glob("*.safetensors"))


def _marker(folder: str) -> str:
    """A file that a folder of the diffusers layout has for sure."""
    return "tokenizer_config.json" if folder == "tokenizer/" else "config.json"


def _cached(found: Download) -> Path | None:
    """The snapshot in the hub's own cache that has the first of the files."""
    first = found.files[0]
    file = first + _marker(first) if first.endswith("/") else first
    path = hub_copy(found.repo, file)
    return path and path.parents[file.count("/")]
