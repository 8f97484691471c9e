"""Tables of sweeps and analyses, between the markers of a Markdown file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluate.results import METRIC, changed, named, shifted, sweep
from tools import keep_results, write_table
from wanquant.runs.run import Run

BEGIN, END = "<!-- table T: begin -->", "<!-- table T: end -->"


def run(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, write_table.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_sweep_goes_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    folder = sweep(tmp_path / "sweep", named("ends", **{"protect.blocks": [0, 39]}))
    done = run(folder, "T", readme)
    assert done.returncode == 0, done.stderr
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| rank | protect |")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 5
    assert "minus ends, dB" in write_table.write(folder, reference="ends")


def test_packed_results_give_the_same_table(tmp_path: Path) -> None:
    folder, archive = sweep(tmp_path / "sweep", named("ends")), tmp_path / "kept" / "sweep.tar.xz"
    for run_ in folder.iterdir():
        (run_ / "config.yaml").write_text("config\n")
    assert keep_results.keep(folder, archive) == 2
    assert write_table.write(archive) == write_table.write(folder)
    first = archive.read_bytes()
    (folder / "0" / "videos").mkdir()
    Run(folder / "2", "ptq", "").fail(ValueError("out of luck"))
    assert keep_results.keep(folder, archive) == 2
    assert archive.read_bytes() == first


def test_nothing_finished_is_not_packed(tmp_path: Path) -> None:
    Run(tmp_path / "sweep" / "0", "ptq", "").fail(ValueError("out of luck"))
    with pytest.raises(ValueError, match="holds no finished run"):
        keep_results.keep(tmp_path / "sweep", tmp_path / "kept.tar.xz")
    assert not (tmp_path / "kept.tar.xz").exists()


def test_further_tables_instead(tmp_path: Path) -> None:
    looks = {"metrics.error_flicker": METRIC, "metrics.motion_energy": METRIC}
    folder = sweep(tmp_path / "sweep", named("ends", **looks), named("other", **looks))
    first = folder / "0" / "result.json"
    first.write_text(json.dumps(changed(looks)))
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    done = run(folder, "T", readme, "--further")
    assert done.returncode == 0, done.stderr
    text = readme.read_text()
    assert "| protect | error flicker | motion energy, dB |" in text
    assert "| ranks of, against | single steps, SQNR | latent SQNR | PSNR |" in text
    assert "latent SQNR, dB" not in text


def test_an_analysis_is_a_table_of_its_blocks(tmp_path: Path) -> None:
    """The most sensitive first, what is not finite before that."""
    result = changed({})
    blocks = [
        {
            "block": block, "few_bits": 0.25, "residual_absmax": 120.0, "input_absmax": 8.0,
            **{f"{name}{end}": value for name in ("sensitivity", "block_sqnr") for end in ("", "_low", "_high")},
        }
        for block, value in enumerate((30.0, 20.0, None))
    ]  # fmt: skip
    correlation = [{"measure": "m", "meaning": "a measure", "spearman": 0.5, "ci95": [0.25, 0.75]}]
    result |= {"mode": "analyze", "analysis": {"blocks": blocks, "correlation": correlation}}
    result["calibration"]["pairs"] = 20
    (tmp_path / "result.json").write_text(json.dumps(result))
    text = write_table.write(tmp_path)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| 2", "| 1", "| 0"]
    assert rows[0][1] == "– [–, –]"
    assert rows[1][1:] == ["20.00 [20.00, 20.00]", "20.00 [20.00, 20.00]", "120", "8", "25.0 % |"]
    assert "a measure: 0.5 [0.25, 0.75]" in text
    result["mode"] = "quantize"
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="not a finished analysis"):
        write_table.write(tmp_path)


def test_what_is_no_complete_sweep_is_refused(tmp_path: Path) -> None:
    Run(sweep(tmp_path / "failed") / "1", "ptq", "").fail(ValueError("out of luck"))
    with pytest.raises(ValueError, match="1 failed: ValueError: out of luck"):
        write_table.write(tmp_path / "failed")
    (sweep(tmp_path / "running") / "1").mkdir()
    with pytest.raises(ValueError, match="not finished"):
        write_table.write(tmp_path / "running")
    few = sweep(tmp_path / "few", named("x"))
    for path in few.glob("*/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"demonstration": True}))
    with pytest.raises(ValueError, match="too few"):
        write_table.write(few)


def test_a_file_without_markers_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    done = run(sweep(tmp_path / "sweep"), "T", tmp_path / "README.md")
    assert done.returncode == 2
    assert "must hold" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def trained(folder: Path, recipe: str, protect: str, gain: float, seed: int = 0, lr: float = 1e-3) -> None:
    """A training whose single steps are better than its baseline's by so much, and latents by half of it."""
    result = changed({"protect.name": protect, "qat": {"name": recipe, "quantize": True, "lr": lr, "seed": seed}})
    for name, by in (("step_sqnr", gain), ("latent_sqnr", gain / 2)):
        result["metrics"] |= {name: shifted(by, 0.1), f"untrained.{name}": METRIC}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


def test_recipes_of_training_stand_beside_their_baselines(tmp_path: Path) -> None:
    gains = [("on", "none", 2.0), ("flow", "none", -1.0), ("on", "ends", 3.0), ("flow", "ends", -1.5)]
    for number, (recipe, protect, gain) in enumerate(gains):
        trained(tmp_path / "sweep" / str(number), recipe, protect, gain)
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    done = run(tmp_path / "sweep", "T", readme, "--trainings")
    assert done.returncode == 0, done.stderr
    lines = [line for line in readme.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["single steps: qat", "hif8_w8a8, protect none", "hif8_w8a8, protect ends", "over all"]
    assert [row[0] for row in rows[2:5]] == ["PTQ baseline itself", "on", "flow"]
    means = [[float(cell.split(" ")[0]) for cell in row[1:] if "[" in cell] for row in rows]
    assert means[3:5] == [[2.0, 3.0, 2.5], [-1.0, -1.5, -1.25]]
    assert rows[5][0] == "final latents: qat"
    assert means[8:] == [[1.0, 1.5, 1.25], [-0.5, -0.75, -0.625]]
    low, high = (float(part) for part in rows[3][3].split("[")[1].rstrip("]").split(","))
    assert low < 2.5 < high
    # Trainings that made no videos have the first half of it, and a sweep's table too.
    for path in (tmp_path / "sweep").glob("*/result.json"):
        result = json.loads(path.read_text())
        kept = {name: value for name, value in result["metrics"].items() if name.endswith("step_sqnr")}
        over = {"over_untrained": {"step_sqnr": METRIC}, "gates": {}, "metrics": kept}
        path.write_text(json.dumps(result | over))
    assert "single steps: qat" in write_table.write(tmp_path / "sweep", trainings=True)
    assert "final latents: qat" not in write_table.write(tmp_path / "sweep", trainings=True)
    assert "against its baseline" in write_table.write(tmp_path / "sweep")
    (tmp_path / "sweep" / "3" / "result.json").unlink()
    assert run(tmp_path / "sweep", "T", readme, "--trainings").returncode == 2


def test_a_recipe_is_the_mean_of_its_seeds(tmp_path: Path) -> None:
    for number, (gain, seed, lr) in enumerate([(1.0, 0, 1e-3), (3.0, 1, 1e-3), (-1.0, 0, 1e-4), (-2.0, 1, 1e-4)]):
        trained(tmp_path / str(number), f"on seed={seed}", "none", gain, seed, lr)  # as a sweep over seeds names it
    text = write_table.write(tmp_path, trainings=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    assert [(row[0], float(row[1].split(" ")[0]), row[1].split("(")[1], len(row)) for row in rows[3:5]] == [
        ("on lr=0.001", 2.0, "1.00 to 3.00)", 2),
        ("on lr=0.0001", -1.5, "-2.00 to -1.00)", 2),
    ]
    trained(tmp_path / "4", "on seed=2", "none", 1.0, 2)
    with pytest.raises(ValueError, match="not run in every setting"):
        write_table.write(tmp_path, trainings=True)


def test_one_recipe_has_a_row_for_each_setting(tmp_path: Path) -> None:
    for protect, gains in (("none", (1.0, 3.0)), ("ends", (-1.0, 1.0)), ("exit", (0.5, 0.5))):
        for seed, gain in enumerate(gains):
            trained(tmp_path / f"{len(list(tmp_path.iterdir()))}", f"on seed={seed}", protect, gain, seed)
    text = write_table.write(tmp_path, trainings=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    assert rows[0] == ["single steps: quant", "protect", "PTQ baseline itself", "on, over it"]
    assert [(row[1], float(row[3].split(" ")[0]), row[3].split("(")[1]) for row in rows[2:5]] == [
        ("none", 2.0, "1.00 to 3.00)"),
        ("ends", 0.0, "-1.00 to 1.00)"),
        ("exit", 0.5, "0.50 to 0.50)"),
    ]
    assert "for all 3 settings together" in text


def test_over_all_settings_and_seeds(tmp_path: Path) -> None:
    gains = {
        ("on", "none"): (1.0, 3.0),
        ("on", "ends"): (0.0, 1.0),
        ("flow", "none"): (-1, 1),
        ("flow", "ends"): (-3, -5),
    }
    for (recipe, protect), by_seed in gains.items():
        for seed, gain in enumerate(by_seed):
            trained(tmp_path / f"{len(list(tmp_path.iterdir()))}", f"{recipe} seed={seed}", protect, gain, seed)
    text = write_table.write(tmp_path, trainings=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    cells = [[(float(cell.split(" ")[0]), cell.split("(")[1]) for cell in row[1:]] for row in rows[3:5]]
    assert cells == [
        [(2.0, "1.00 to 3.00)"), (0.5, "0.00 to 1.00)"), (1.25, "0.50 to 2.00)")],
        [(0.0, "-1.00 to 1.00)"), (-4.0, "-5.00 to -3.00)"), (-2.0, "-2.00 to -2.00)")],
    ]


def test_nothing_further_is_refused(tmp_path: Path) -> None:
    """Instead of an empty table."""
    folder = sweep(tmp_path, named("x"))
    for path in folder.glob("*/result.json"):
        result = json.loads(path.read_text())
        metrics = {"step_sqnr": result["metrics"]["step_sqnr"]}
        path.write_text(json.dumps(result | {"metrics": metrics, "gates": {}}))
    with pytest.raises(ValueError, match="measured nothing further"):
        write_table.write(folder, further=True)
