"""The tables of the documentation are what the kept results give: nothing in them is typed."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tools import write_table

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results"
COMMANDS = re.findall(r"^python tools/write_table\.py (.+)$", (KEPT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_is_made_again_as_it_stands(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, name, page, *how = shlex.split(command)
    copy = tmp_path / "page.md"
    shutil.copy(ROOT / page, copy)
    monkeypatch.setattr(sys, "argv", ["write_table.py", str(ROOT / source), name, str(copy), *how])
    write_table.main()
    assert copy.read_text() == (ROOT / page).read_text()


def test_all_kept_results_are_listed() -> None:
    listed = {Path(shlex.split(command)[0]).name for command in COMMANDS}
    assert {path.name for path in KEPT.glob("*.tar.xz")} == listed
