"""Packs what a sweep, or an analysis, measured, so that its tables can be made again and the sweep taken up elsewhere.

python tools/keep_results.py outputs/ptq/protection benchmarks/results/protection.tar.xz
python tools/write_table.py benchmarks/results/protection.tar.xz protection-tiny docs/protection.md

Of each run its ``result.json`` and ``config.yaml``, and nothing of videos, checkpoints or reports. Unpacked into the
folder of a sweep, by the same state of the code, its finished runs are not run again.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

from wanquant.evaluate.sweep.summary import jobs_of
from wanquant.runs.files import replacing
from wanquant.runs.run import read_result

KEPT = ("config.yaml", "result.json")


def keep(folder: Path, archive: Path) -> int:
    """Packs the finished runs of ``folder`` into ``archive``, whole or not at all; returns how many there are.

    The same results give the same archive. ``ValueError`` if none is finished.
    """
    runs = [folder] if (folder / "result.json").is_file() else jobs_of(folder)
    done = [run for run in runs if (run / "result.json").is_file() and read_result(run)["status"] == "ok"]
    if not done:
        raise ValueError(f"{folder} holds no finished run")
    with replacing(archive) as partial, tarfile.open(partial, mode="w:xz") as tar:
        for path in (run / name for run in done for name in KEPT):
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            tar.addfile(entry, io.BytesIO(path.read_bytes()))
    return len(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="of a sweep, or of a run with mode=analyze")
    parser.add_argument("archive", type=Path, help="NAME.tar.xz")
    args = parser.parse_args()
    try:
        print(f"{args.archive}: {keep(args.directory, args.archive)} finished runs")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
