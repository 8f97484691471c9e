"""What is measured on videos, and the whole of ``python eval.py`` as one dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wanquant.choices import check_choices, choice
from wanquant.evaluate.prompts import OWN, PromptsConfig, check_captions, pairs, settled
from wanquant.runs.tracking import TrackerConfig
from wanquant.wan.config import ModelConfig

if TYPE_CHECKING:
    from wanquant.wan.cached import Pair

#: Whether LPIPS is measured; ``auto``: where its weights are.
LPIPS = ("auto", "on", "off")
#: What optical flow is taken by; ``auto``: RAFT, where its weights are.
FLOWS = ("auto", "raft", "farneback")


@dataclass
class EvalConfig:
    """``noise_floor``: also compare BF16 with itself, other seeds and initial noise perturbed by one unit
    in the last place; costs one more BF16 video a pair, and with a single seed two."""

    name: str = "fidelity"
    #: Generate videos with the quantized model. Without, single steps alone are measured: a ranking, but no drift.
    videos: bool = True
    #: Denoising steps of each BF16 trajectory whose error is measured, spread evenly over it; all if it has no more.
    single_steps: int = 10
    noise_floor: bool = True
    #: Of VBench.
    dimensions: list[str] = field(default_factory=list)
    #: ``auto``: where its weights are.
    lpips: str = choice("auto", LPIPS)
    #: Of ``motion_speed``. ``auto``: RAFT, where its weights are, Farnebäck's otherwise.
    flow: str = choice("auto", FLOWS)
    #: Also quantize each block alone, on the calibration prompts: the cheapest measure, for the ladder of a sweep.
    block_sqnr: bool = False
    #: Let VBench take weights that are not the published ones; the scores are marked as meaningless.
    foreign_weights: bool = False


@dataclass
class EvaluateConfig:
    """The whole of ``python eval.py``: of a ``run`` (or each of a sweep), or of the model at ``model.path``."""

    run: str | None = None
    #: The BF16 model beside it; of a run, where it is now, if not where it was.
    reference: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    dry_run: bool = False
    cache: str = "outputs/cache"
    threads: int = 1
    #: Hold a checkpoint to its SHA256SUMS.
    verify: bool = True

    def check(self) -> None:
        """``ValueError`` names the key at fault and what it may be; needs no torch."""
        check_choices(self)
        self.model.check_video()
        if self.threads < 1:
            raise ValueError(f"threads={self.threads}: must be at least 1")
        if self.eval.block_sqnr:
            raise ValueError("eval.block_sqnr=true is measured by ptq.py, with the calibration prompts")
        if not self.eval.videos:
            raise ValueError("eval.videos=false leaves nothing to judge: single steps are measured by ptq.py")
        if Path(self.prompts.name).name != self.prompts.name:
            raise ValueError(f"prompts.name={self.prompts.name}: a folder is named so, leave / and .. out")
        if self.run is not None and self.model.path != "tiny":
            raise ValueError(
                "run= knows its model: leave model.path out, or say where it is now with reference=<folder>"
            )
        if self.run is None and self.reference is None and self.eval.lpips == "on":
            raise ValueError("eval.lpips=on compares with a reference: give reference=<folder>")
        if self.run is not None and not Path(self.run).is_dir():
            raise ValueError(f"there is no folder {self.run}")
        if self.run is None:
            check_captions((text for text, _ in self.pairs_of_model()), self.model.language)

    def pairs_of_model(self) -> list[Pair]:
        """What a model is judged on where there is no run."""
        return pairs(self.prompts_of_model())

    def prompts_of_model(self) -> PromptsConfig:
        """``prompts=own`` stands for the list a run is made from."""
        prompts = settled(self.prompts)
        own = prompts.name == OWN and not prompts.texts
        texts = prompts.by_language[self.model.language] if own else prompts.texts
        return replace(prompts, texts=texts, seeds=prompts.seeds or [0])
