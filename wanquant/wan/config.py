"""Which model, and how to ask it for a video."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from wanquant.choices import choice

LANGUAGES = ("scenes", "english")
OFFLOADS = ("auto", "none", "group", "disk")
#: ``unipc``: Wan's scheduler as the checkpoint has it. ``euler``: of first order, which few-step distilled models and
#: other families take.
SOLVERS = ("unipc", "euler")
#: How a guided denoising step runs: in two passes, with the prompt and without; in one pass on twice the rows
#: (LTX-Video); or in one, which the scale is an input of (HunyuanVideo).
GUIDANCES = ("branches", "batch", "embedded")


@dataclass(frozen=True)
class Picture:
    """The first frame of a video: where it lies, and the SHA-256 of its file, by which it counts."""

    path: Path
    sha256: str


@dataclass
class GenerationConfig:
    """What ``WanPipeline.__call__`` needs; its own defaults are those of 480p Wan and fit no other model."""

    height: int = 480
    width: int = 832
    num_frames: int = 81
    steps: int = 50
    guidance_scale: float = 5.0
    #: None for the checkpoint's own.
    flow_shift: float | None = 3.0
    max_text_length: int = 512
    fps: int = 16
    negative_prompt: str = ""
    #: Of Wan2.2's second transformer; none for that of the first.
    guidance_scale_2: float | None = None
    solver: str = choice("unipc", SOLVERS)
    guidance: str = choice("branches", GUIDANCES)

    @property
    def branches(self) -> int:
        """What a step computes: with the prompt and, where it is guided by both, without."""
        return 2 if self.guidance_scale > 1 and self.guidance != "embedded" else 1

    @property
    def together(self) -> int:
        """Branches in a pass."""
        return self.branches if self.guidance == "batch" else 1

    @property
    def passes(self) -> int:
        """In a step."""
        return self.branches // self.together

    def __post_init__(self) -> None:
        """``ValueError`` names what no Wan pipeline can do, before it rounds it to something else."""
        for name in ("steps", "max_text_length", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"generation.{name}={getattr(self, name)}: must be at least 1")
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                raise ValueError(f"generation.{name}={getattr(self, name)}: must be a multiple of 16")
        if self.num_frames < 1 or (self.num_frames - 1) % 4:
            told = "must be 1, 5, 9, ... (4n + 1), of LTX-Video 1, 9, 17, ..."
            raise ValueError(f"generation.num_frames={self.num_frames}: {told}")
        if self.flow_shift is not None and not 0 < self.flow_shift < math.inf:
            raise ValueError(f"generation.flow_shift={self.flow_shift}: must be positive and finite")
        for name in ("guidance_scale", "guidance_scale_2"):
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name)):
                raise ValueError(f"generation.{name}={getattr(self, name)}: must be finite")
        if self.guidance_scale_2 is not None and not self.guidance_scale > 1:
            raise ValueError(f"generation.guidance_scale={self.guidance_scale}: guidance_scale_2 needs it above 1")


@dataclass
class OutliersConfig:
    """``blocks`` are indices from either end; with none and a ``count``, so many are drawn by ``seed``.

    ``octaves`` is the width of the spread: a random half of the channels is multiplied by 2^octaves. HiF8 holds 27
    octaves below the target of 15, the last eight as mere powers of two: what is spread by 20 is hardly worse for it.
    """

    blocks: list[int] = field(default_factory=list)
    count: int = 0
    seed: int = 0
    octaves: int = 28


@dataclass
class ModelConfig:
    """``path`` is ``tiny``, a folder in diffusers layout, or a hub id; or a transformer in a folder or file of another
    layout, with the rest of its pipeline from ``base``. ``language`` is what it understands: ``scenes`` (the captions
    of ``wanquant.wan.tiny``) or ``english``."""

    name: str = "tiny"
    path: str = "tiny"
    base: str = ""
    device: str = "auto"
    #: Where the weights wait that do not run at the moment: on the device, on the host, or on the disk.
    offload: str = choice("auto", OFFLOADS)
    language: str = choice("scenes", LANGUAGES)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    #: Videos denoised together: quick for a small model. Products round as those of such a batch.
    batch: int = 1
    #: Numbers of frames besides the model's own at which single denoising steps are measured.
    other_frames: list[int] = field(default_factory=list)
    #: Planted after loading; none by default.
    outliers: OutliersConfig = field(default_factory=OutliersConfig)
    #: LoRA files, ``[high=|low=]path[:scale]``: ``high`` and ``low`` are for one of Wan2.2's two transformers.
    lora: list[str] = field(default_factory=list)
    #: Into the BF16 weights as they are loaded; if not, the LoRA stays in BF16 beside weights that alone are quantized.
    lora_fuse: bool = True

    def check_video(self) -> None:
        """``ValueError`` for a still picture, which has no motion to measure."""
        for frames in self.other_frames:
            if frames < 5 or (frames - 1) % 4:
                raise ValueError(f"model.other_frames={list(self.other_frames)}: must be 5, 9, 13, ... (4n + 1)")
        if self.generation.num_frames < 5:
            raise ValueError(f"generation.num_frames={self.generation.num_frames}: must be 5, 9, 13, ... (4n + 1)")
