"""How many videos a job makes of which kind: what its needs are worked out from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoCounts:
    """Videos that are denoised in BF16 and quantized, those that are decoded, and those in memory at the end; whether
    quantized blocks stand ``beside`` those of BF16 meanwhile, and whether all of them do, packed. Then which of them
    are for what: calibration, noise floors, choosing blocks (in BF16, and quantized); in training what is learned from,
    the PTQ baseline, and validation. ``renamed`` are stages that the job has other names for.

    Single steps: ``replayed`` by the quantized model, in as many passes as so many videos take; trajectories of
    ``other_lengths``, recorded in BF16, in videos of the model's own; ``replays`` to choose blocks, mostly in BF16 and
    mostly quantized; the ``longest`` number of frames; ``recorded_steps`` that are kept on the disk, and of how many
    frames each."""

    bf16: int
    quantized: int
    decoded: int = 0
    held: int = 0
    beside: bool = False
    all_beside: bool = False
    calibrated: int = 0
    floors: int = 0
    choosing: tuple[int, int] = (0, 0)
    prompts: int = 0
    recorded: int = 0
    untrained: int = 0
    looks: float = 0.0
    replayed: float = 0.0
    other_lengths: float = 0.0
    replays: tuple[float, float] = (0.0, 0.0)
    longest: int = 0
    recorded_steps: tuple[tuple[int, int], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def replays_in_all(self) -> float:
        """Single steps, in as many passes as so many videos take."""
        return self.replayed + sum(self.replays) + self.looks

    @property
    def any_quantized(self) -> bool:
        return bool(self.quantized or self.replays_in_all)
