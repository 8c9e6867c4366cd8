"""The published weights that metrics are made of: what, whose, how large, under which terms."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One published file, or one folder in the format of transformers.

    Args:
        name: What it is called here.
        about: What it is, in a sentence.
        file: Its name as published; a folder ends in ``/``.
        licence: Identifier of its terms, as in SPDX.
        source: Project that made it, as ``owner/name`` on GitHub.
        size: Bytes of the download, to the digits that are known; None where nobody has said.
        sha256: First digits of its checksum, as published; empty where nothing is published.
        noncommercial: Whether its licence forbids commercial use.
        repo: Repository on the model hub that holds it; empty where none does.
        path: Its path in that repository, or a pattern for each file of a folder.
        url: Address of the file where it is not on the model hub.
    """

    name: str
    about: str
    file: str
    licence: str
    source: str
    size: int | None = None
    sha256: str = ""
    noncommercial: bool = False
    repo: str = ""
    path: tuple[str, ...] = ()
    url: str = ""

    @property
    def variable(self) -> str:
        """Environment variable that says where it lies."""
        return "LIGHTNING_KV_" + self.name.upper().replace("-", "_")

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder in the format of transformers."""
        return self.file.endswith("/")

    @property
    def page(self) -> str:
        """Where a person reads about it."""
        return f"https://huggingface.co/{self.repo}" if self.repo else self.url or self.project

    @property
    def project(self) -> str:
        """Page of the project that made it."""
        return f"https://github.com/{self.source}"

    @property
    def fetchable(self) -> bool:
        """Whether it can be downloaded as it is used."""
        return bool(self.repo or self.url)


_TRANSFORMERS = ("*.json", "merges.txt", "model.safetensors")
_TORCHVISION = "https://download.pytorch.org/models/"

_ENTRIES = (
    Weights(
        name="i3d",
        about="I3D on Kinetics-400, plain weights, for the Frechet video distance.",
        file="i3d_pretrained_400.pt",
        licence="MIT",
        source="songweige/TATS",
        size=50_900_000,
        url="https://huggingface.co/spaces/LanguageBind/Open-Sora-Plan-v1.0.0/resolve/"
        "810fa8c4bdb3a4c8eec9bd57375c29bde6fb46de/opensora/eval/fvd/videogpt/i3d_pretrained_400.pt",
    ),
    Weights(
        name="i3d-torchscript",
        about="I3D on Kinetics-400 as StyleGAN-V runs it: TorchScript, whose code runs on loading; "
        "ported in a project under NVIDIA's source licence.",
        file="i3d_torchscript.pt",
        licence="Apache-2.0",
        source="universome/stylegan-v",
        size=51_200_000,
        repo="flateon/FVD-I3D-torchscript",
        path=("i3d_torchscript.pt",),
    ),
    Weights(
        name="dino-vitb16",
        about="DINO ViT-B/16, for subject consistency.",
        file="dino-vitb16/",
        licence="Apache-2.0",
        source="facebookresearch/dino",
        size=343_000_000,
        repo="facebook/dino-vitb16",
        path=("*.json", "pytorch_model.bin"),
    ),
    Weights(
        name="dinov2-vitb14",
        about="DINOv2 ViT-B/14, for subject consistency.",
        file="dinov2-base/",
        licence="Apache-2.0",
        source="facebookresearch/dinov2",
        size=346_000_000,
        repo="facebook/dinov2-base",
        path=_TRANSFORMERS,
    ),
    Weights(
        name="clip-vit-b32",
        about="CLIP ViT-B/32, for background consistency and alignment with the prompt.",
        file="clip-vit-base-patch32/",
        licence="MIT",
        source="openai/CLIP",
        size=605_000_000,
        repo="openai/clip-vit-base-patch32",
        path=_TRANSFORMERS,
    ),
    Weights(
        name="clip-vit-l14",
        about="CLIP ViT-L/14, for aesthetic quality and alignment with the prompt.",
        file="clip-vit-large-patch14/",
        licence="MIT",
        source="openai/CLIP",
        size=1_710_000_000,
        repo="openai/clip-vit-large-patch14",
        path=_TRANSFORMERS,
    ),
    Weights(
        name="laion-aesthetic",
        about="LAION aesthetic predictor v1: one linear layer on CLIP ViT-L/14.",
        file="sa_0_4_vit_l_14_linear.pth",
        licence="MIT",
        source="LAION-AI/aesthetic-predictor",
        size=4_000,
        url="https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/"
        "sa_0_4_vit_l_14_linear.pth",
    ),
    Weights(
        name="musiq-spaq",
        about="MUSIQ on SPAQ, for imaging quality.",
        file="musiq_spaq_ckpt-358bb6af.pth",
        licence="CC-BY-NC-SA-4.0",
        noncommercial=True,
        source="chaofengc/IQA-PyTorch",
        size=109_000_000,
        repo="chaofengc/IQA-PyTorch-Weights",
        path=("musiq_spaq_ckpt-358bb6af.pth",),
    ),
    Weights(
        name="amt-s",
        about="AMT-S frame interpolation, for motion smoothness: a TorchScript file that you "
        "export from the project's own code and its amt-s.pth.",
        file="amt-s.torchscript.pt",
        licence="CC-BY-NC-SA-4.0",
        noncommercial=True,
        source="MCG-NKU/AMT",
        size=12_000_000,
    ),
    Weights(
        name="raft-large",
        about="RAFT on Chairs and Things (torchvision's C_T_V1), for dynamic degree.",
        file="raft_large_C_T_V1-22a6c225.pth",
        licence="BSD-3-Clause",
        source="princeton-vl/RAFT",
        size=20_129_000,
        sha256="22a6c225",
        url=_TORCHVISION + "raft_large_C_T_V1-22a6c225.pth",
    ),
    Weights(
        name="alexnet",
        about="AlexNet on ImageNet: trunk of LPIPS.",
        file="alexnet-owt-7be5be79.pth",
        licence="BSD-3-Clause",
        source="pytorch/vision",
        size=233_087_000,
        sha256="7be5be79",
        url=_TORCHVISION + "alexnet-owt-7be5be79.pth",
    ),
    Weights(
        name="vgg16",
        about="VGG16 on ImageNet: trunk of LPIPS.",
        file="vgg16-397923af.pth",
        licence="BSD-3-Clause",
        source="pytorch/vision",
        size=527_796_000,
        sha256="397923af",
        url=_TORCHVISION + "vgg16-397923af.pth",
    ),
    Weights(
        name="squeezenet",
        about="SqueezeNet 1.1 on ImageNet: trunk of LPIPS.",
        file="squeezenet1_1-b8a52dc0.pth",
        licence="BSD-3-Clause",
        source="pytorch/vision",
        size=4_729_000,
        sha256="b8a52dc0",
        url=_TORCHVISION + "squeezenet1_1-b8a52dc0.pth",
    ),
    Weights(
        name="videomae-ssv2",
        about="VideoMAE-v2 ViT-g on Something-Something-v2, for the content-debiased distance.",
        file="vit_g_hybrid_pt_1200e_ssv2_ft.pth",
        licence="Apache-2.0",
        source="OpenGVLab/VideoMAEv2",
        size=2_020_000_000,
        sha256="5a210a92",
        repo="OpenGVLab/VideoMAE2",
        path=("mae-g/vit_g_hybrid_pt_1200e_ssv2_ft.pth",),
    ),
)

WEIGHTS: dict[str, Weights] = {entry.name: entry for entry in _ENTRIES}
"""Published weights by name."""
