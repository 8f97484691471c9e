"""Quantize a video diffusion transformer without training, and measure what it cost.

python ptq.py protect=boundary
python ptq.py -m protect=none,entry,exit,boundary
python ptq.py dry_run=true
"""

from wanquant.config import main
from wanquant.ptq.job import run_ptq

if __name__ == "__main__":
    main("ptq", run_ptq)
