"""What a report says of a training in a line."""

from __future__ import annotations

from typing import Any

from wanquant.runs.reports.training import headline, untrained_table


def told(verdict: str, kept: list[bool] | None = None) -> dict[str, Any]:
    metric = {"mean": 0.05, "ci95": [-0.1, 0.2], "n": 24, "verdict": verdict, "could_see": 0.2134}
    training = {} if kept is None else {"blocks": [{"kept": each} for each in kept]}
    return {
        "qat": {"quantize": True}, "over_untrained": {"step_sqnr": metric}, "training": training,
        "metrics": {"step_sqnr": metric, "untrained.step_sqnr": metric},
    }  # fmt: skip


def test_no_difference_says_which_could_have_been_seen() -> None:
    result = told("no difference found")
    assert "no difference found (4 in 5 times 0.21 would show) (+0.05 dB [-0.10, 0.20] of" in headline(result)
    assert untrained_table(result).rows[0][-1] == "no difference found (4 in 5 times 0.21 would show)"
    assert "4 in 5" not in headline(told("better"))


def test_a_training_that_kept_no_block_says_so() -> None:
    assert headline(told("too few pairs", [False, False])).endswith("; no block got better, so none was changed")
    assert "none was changed" not in headline(told("better", [False, True]))
