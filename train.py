"""Train a quantized video diffusion transformer, and measure whether that beats quantizing it without.

python train.py qat=on
python train.py qat=on qat.scope=all qat.lr=1e-4 qat.steps=200
python train.py qat=off
python train.py dry_run=true
"""

from wanquant.cli import main

if __name__ == "__main__":
    main("train")
