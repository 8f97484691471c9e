"""The whole of ``python train.py`` as one dataclass. ``check`` refuses what can be refused without torch, so at once;
``wanquant.qat.plan`` resolves the rest."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

from wanquant.evaluate.prompts import check_captions, pairs
from wanquant.ptq.config import PTQConfig
from wanquant.qat.config import DataConfig, LossConfig, QATConfig
from wanquant.runs.launch import processes

#: Ranges of numbers in the config, from and to.
RANGES = {"lr": (0, 10), "floor": (0, 1), "ema": (0, 1), "diverged": (1, 1e9), "weight_decay": (0, 10)}
#: In blockwise training one in so many videos is set aside.
SET_ASIDE = 8
#: Columns that a list of videos may have them under.
FILE_KEYS, CAPTION_KEYS = ("file", "video", "path", "file_name"), ("caption", "text", "prompt")


@dataclass
class TrainConfig(PTQConfig):
    """``python train.py``: all of ``python ptq.py``, and the training between."""

    qat: QATConfig = field(default_factory=QATConfig)

    def check(self) -> None:
        """``ValueError`` names the key at fault and what it may be."""
        super().check()
        qat = self.qat
        if self.mode != "quantize":
            raise ValueError(f"mode={self.mode}: train.py has no other than quantize")
        if self.model.lora and not self.model.lora_fuse:
            raise ValueError("model.lora_fuse=false: train.py trains weights with the LoRA fused into them")
        _check_ranges(qat)
        _check_scope(qat)
        _check_data(qat.data, self.model.language)
        _check_loss(qat.loss, qat.data.source)
        if qat.scope == "blockwise":
            _check_blockwise(qat)
        _check_prompts(self)


def _check_ranges(qat: QATConfig) -> None:
    """What can be said of each number and word by itself, and of the batch and the steps."""
    for name in ("steps", "batch", "accumulation", "save_every", "window"):
        if getattr(qat, name) < 1:
            raise ValueError(f"qat.{name}={getattr(qat, name)}: must be at least 1")
    for name, (low, high) in RANGES.items():
        if not low <= getattr(qat, name) <= high:
            raise ValueError(f"qat.{name}={getattr(qat, name)}: must lie between {low} and {high:g}")
    if qat.clip < 0 or qat.warmup < 0 or qat.bf16_steps < 0 or qat.check_every < 0:
        raise ValueError("qat.clip, qat.warmup, qat.bf16_steps and qat.check_every must not be negative")
    if len(qat.betas) != 2 or not all(0 <= beta < 1 for beta in qat.betas):
        raise ValueError(f"qat.betas={qat.betas}: two numbers of at least 0 and below 1")
    if qat.lora.rank < 1 or qat.lora.alpha <= 0:
        raise ValueError(f"qat.lora.rank={qat.lora.rank}, qat.lora.alpha={qat.lora.alpha}: must be positive")
    if qat.bf16_steps >= qat.steps:
        raise ValueError(f"qat.bf16_steps={qat.bf16_steps} leaves none of qat.steps={qat.steps} to quantize")
    together = processes()
    if qat.batch % (qat.accumulation * together):
        raise ValueError(
            f"qat.batch={qat.batch} does not divide into qat.accumulation={qat.accumulation} parts of each of "
            f"{together} processes"
        )


def _check_scope(qat: QATConfig) -> None:
    """What the scope has no use for, or cannot do without."""
    if qat.samples < 0 or (qat.samples and qat.scope != "blockwise"):
        raise ValueError(f"qat.samples={qat.samples}: at least 0, and for qat.scope=blockwise alone")
    if 0 < qat.samples < 2 * SET_ASIDE:
        raise ValueError(f"qat.samples={qat.samples}: at least {2 * SET_ASIDE}, of which some are set aside")
    if not qat.quantize and qat.scope in ("scales", "lora", "blockwise"):
        raise ValueError(f"qat.scope={qat.scope} is for a quantized model: choose all, blocks or norms")
    if qat.scope == "scales" and qat.bf16_steps:
        raise ValueError("qat.scope=scales has no use for qat.bf16_steps: without rounding there are no scales")
    if qat.scope == "all" and qat.blocks:
        raise ValueError("qat.scope=all trains every block: choose qat.scope=blocks for some")
    if qat.scope == "blocks" and not qat.blocks:
        raise ValueError("qat.scope=blocks needs qat.blocks=[...]")


def _check_blockwise(qat: QATConfig) -> None:
    if qat.data.source != "trajectories":
        raise ValueError("qat.scope=blockwise learns from BF16's trajectories: qat.data.source=trajectories")
    if qat.loss != type(qat.loss)():
        raise ValueError("qat.scope=blockwise has a loss of its own, the blocks' outputs: leave qat.loss alone")
    if qat.bf16_steps or qat.recompute:
        raise ValueError("qat.scope=blockwise has no use for qat.bf16_steps and qat.recompute")
    if qat.scaling == "delayed":
        raise ValueError("qat.scope=blockwise has all inputs of a block before it: qat.scaling=current")


def _check_loss(config: LossConfig, source: str) -> None:
    for name, weight in vars(config).items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"qat.loss.{name}={weight}: must be at least 0 and finite")
    if not any(vars(config).values()):
        raise ValueError("qat.loss: flow, output and blocks are all 0, so nothing would be learned")
    if config.flow and source == "trajectories":
        raise ValueError("qat.loss.flow is for videos: choose qat.data.source=scenes or folder")


def _check_data(config: DataConfig, language: str) -> None:
    if config.source == "scenes" and language != "scenes":
        raise ValueError("qat.data.source=scenes draws what tiny-wan knows: choose trajectories or folder")
    if config.source == "folder" and not config.path:
        raise ValueError("qat.data.source=folder needs qat.data.path=<list, or folder with a metadata.jsonl or .csv>")
    if config.source == "folder":
        read_list(Path(config.path))
    if config.source == "scenes" and config.videos_per_scene < 1:
        raise ValueError(f"qat.data.videos_per_scene={config.videos_per_scene}: must be at least 1")
    if not 0 <= config.drop <= 1:
        raise ValueError(f"qat.data.drop={config.drop}: must lie between 0 and 1")


def _check_prompts(config: TrainConfig) -> None:
    """No prompt is both learned from and measured on."""
    qat, measured = config.qat, pairs(config.prompts)
    if qat.data.source == "scenes":  # which leaves them out
        return
    learned = captions_of(qat.data)
    if qat.data.source == "trajectories":
        check_captions(learned, config.model.language)
    validated = pairs(config.calib, "calib") if qat.check_every else []
    twice = sorted(set(learned) & {text for text, _ in (*measured, *validated)})
    if twice:
        raise ValueError(f"qat.data holds a prompt that is measured on: {twice[0]}")


def read_list(path: Path) -> list[tuple[Path, str]]:
    """Videos and captions of a JSONL or CSV file; ``ValueError`` names the line that is wrong."""
    if path.is_dir():
        found = [path / name for name in ("metadata.jsonl", "metadata.csv") if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} has no metadata.jsonl or metadata.csv: list the videos and their captions there")
        path = found[0]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"qat.data.path={path}: {error}") from None
    rows = []
    for number, row in _rows(path, text):
        where = f"{path}, line {number}"
        file, caption = (next((row[key] for key in keys if row.get(key)), None) for keys in (FILE_KEYS, CAPTION_KEYS))
        if not isinstance(file, str) or not isinstance(caption, str):
            raise ValueError(f"{where}: it needs a file and a caption ({FILE_KEYS[0]}, {CAPTION_KEYS[0]})")
        video = path.parent / file
        if not video.is_file():
            raise ValueError(f"{where}: there is no video {video}")
        rows.append((video, caption))
    if not rows:
        raise ValueError(f"{path} lists no videos")
    return rows


def _rows(path: Path, text: str) -> list[tuple[int, dict[str, object]]]:
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        return [(reader.line_num, dict(row)) for row in reader]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # a caption may hold other separators of lines
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not an object")
            rows.append((number, row))
    return rows


def captions_of(config: DataConfig) -> list[str]:
    """The prompts or captions of the data, of a source that lists them."""
    if config.source == "trajectories":
        return [text for text, _ in pairs(config.prompts, "qat.data.prompts")]
    return [caption for _, caption in read_list(Path(config.path))]
