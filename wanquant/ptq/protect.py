"""Which blocks stay BF16."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ProtectConfig:
    """``blocks`` are indices from either end, so that a preset means the same on 30 or 40 blocks;
    ``modules`` are patterns (``re.fullmatch``) of names inside a block, ``ffn.net.2``."""

    name: str = "none"
    blocks: list[int] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
