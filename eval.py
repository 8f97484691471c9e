"""The verdict on a run, a sweep, or a model: VBench, fidelity to BF16, collapse gates.

python eval.py run=outputs/ptq/<run or sweep>
python eval.py run=outputs/ptq/<run> eval=vbench5
python eval.py model.path=<folder> prompts=demo5
"""

from wanquant.cli import main

if __name__ == "__main__":
    main("eval")
