"""The whole of ``python ptq.py`` as one dataclass. ``check`` refuses what can be refused without torch, so at once;
``wanquant.ptq.plan`` resolves the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

from wanquant.choices import check_choices, choice
from wanquant.evaluate.config import EvalConfig
from wanquant.evaluate.prompts import PromptsConfig, check_captions, pairs
from wanquant.ptq.protect import ProtectConfig
from wanquant.quant.config import QuantConfig
from wanquant.runs.tracking import TrackerConfig
from wanquant.wan.config import ModelConfig

MODES = ("quantize", "analyze", "convert")
#: What a heatmap can show of a view, besides ``absmax``, which is known for every single step.
STATISTICS = ("absmax", "std", "kurtosis", "p99.9", "sqnr")


@dataclass
class AnalysisConfig:
    """``bins`` of denoising steps; ``statistic`` of the heatmaps; ``sensitivity``: also quantize each block, and each
    kind of linear, alone and replay the calibration videos' denoising steps with it, which takes that many times as
    long."""

    bins: int = 4
    statistic: str = choice("absmax", STATISTICS)
    sensitivity: bool = False


@dataclass
class ConvertConfig:
    """Of ``mode=convert``: the folder it writes ``to``, the run's own ``checkpoint`` if empty, and the directory of a
    run of ``mode=analyze`` whose ``statistics`` are taken by rules that need some."""

    to: str = ""
    statistics: str = ""


@dataclass
class PTQConfig:
    """The whole of ``python ptq.py``. ``mode=quantize`` says what a quantization cost, ``mode=analyze`` what passes
    through the BF16 model; ``mode=convert`` quantizes a checkpoint of any size from files to files."""

    mode: str = choice("quantize", MODES)

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    protect: ProtectConfig = field(default_factory=ProtectConfig)
    calib: PromptsConfig = field(default_factory=PromptsConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    #: Save the packed checkpoint.
    checkpoint: bool = True
    #: Print the plan and do nothing else.
    dry_run: bool = False
    #: Where what several runs share is kept: calibration statistics, BF16 latents, sensitivities.
    cache: str = "outputs/cache"
    #: Of the CPU. A number, and the same under every launcher, because sums round by it.
    threads: int = 1
    #: Run what is finished already.
    force: bool = False
    #: Hold a model that comes with a SHA256SUMS to it.
    verify: bool = True

    def check(self) -> None:
        """``ValueError`` names the key at fault and what it may be."""
        check_choices(self)
        counts = {"analysis.bins": self.analysis.bins, "threads": self.threads, "model.batch": self.model.batch}
        counts["eval.single_steps"] = self.eval.single_steps
        for key, count in counts.items():
            if count < 1:
                raise ValueError(f"{key}={count}: must be at least 1")
        if self.mode == "convert":
            self._check_convert()
            return
        self.model.check_video()
        if self.convert != ConvertConfig():
            raise ValueError(f"convert is for mode=convert, not for mode={self.mode}")
        if self.mode == "analyze" and self.eval.dimensions:
            raise ValueError("mode=analyze makes no videos to judge: leave eval.dimensions out")
        if self.eval.dimensions and not self.eval.videos:
            raise ValueError("eval.videos=false makes no videos to judge: leave eval.dimensions out")
        if self.mode == "analyze" and self.quant.format != "hif8":
            raise ValueError(f"mode=analyze looks at HiF8, not at {self.quant.format}: leave quant.format as it is")
        videos = [*pairs(self.prompts), *pairs(self.calib, "calib")]
        check_captions((text for text, _ in videos), self.model.language)

    def _check_convert(self) -> None:
        """What makes no sense without generating."""
        if self.model.outliers.blocks or self.model.outliers.count:
            raise ValueError("mode=convert takes a model as its files have it: leave model.outliers out")
        if self.model.lora:
            raise ValueError("mode=convert takes a model as its files have it: leave model.lora out, or mode=quantize")
        if self.eval.dimensions:
            raise ValueError("mode=convert makes no videos to judge: leave eval.dimensions out")
        if not self.checkpoint:
            raise ValueError("mode=convert makes a checkpoint and nothing else: leave checkpoint=true")
