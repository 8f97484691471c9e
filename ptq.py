"""Quantize a video diffusion transformer without training, and measure what it cost.

python ptq.py protect=boundary
python ptq.py -m protect=none,entry,exit,boundary
python ptq.py dry_run=true
"""

from wanquant.cli import main

if __name__ == "__main__":
    main("ptq")
