"""Puts the trained parts together into a pipeline in diffusers layout, BF16 safetensors.

    python -m tools.tiny_wan.export --vae outputs/tiny_wan/vae --transformer outputs/tiny_wan/transformer/scratch

Written beside the package's own weights under a temporary name, which takes their place when it is whole.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from transformers import ByT5Tokenizer

from tools.tiny_wan.train_transformer import FLOW_SHIFT, TEXT_LENGTH, TextToVelocity, count_blocks, weights_in
from tools.tiny_wan.train_vae import new_vae
from wanquant.qat.state import weights_in as weights_of_loop
from wanquant.wan import tiny

GENERATION = {
    "height": tiny.HEIGHT,
    "width": tiny.WIDTH,
    "num_frames": tiny.NUM_FRAMES,
    "steps": 20,
    "guidance_scale": 2.0,
    "flow_shift": FLOW_SHIFT,
    "max_text_length": TEXT_LENGTH,
    "fps": 8,
    "negative_prompt": "",
}


def assemble(vae_folder: Path, transformer_folder: Path) -> WanPipeline:
    trained = weights_in(transformer_folder)
    model = TextToVelocity(count_blocks(trained))
    model.load_state_dict(trained)
    vae = new_vae()
    vae.load_state_dict(weights_of_loop(vae_folder))
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    return WanPipeline(
        tokenizer=ByT5Tokenizer(),
        text_encoder=model.text_encoder.to(torch.bfloat16),
        transformer=model.transformer.to(torch.bfloat16),
        vae=vae.to(torch.bfloat16),
        scheduler=scheduler,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=tiny.folder())
    args = parser.parse_args()
    pipe = assemble(args.vae, args.transformer)
    if args.out.exists() and not (args.out / "model_index.json").is_file():
        parser.error(f"{args.out} is no pipeline: it would be replaced")
    temporary, old = (args.out.with_name(args.out.name + suffix) for suffix in (".partial", ".old"))
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.save_pretrained(temporary)
    (temporary / "generation.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    if args.out.exists():
        if (args.out / "README.md").is_file():  # the model card, which a person writes
            shutil.copyfile(args.out / "README.md", temporary / "README.md")
        args.out.rename(old)
    temporary.rename(args.out)
    shutil.rmtree(old, ignore_errors=True)
    size = sum(path.stat().st_size for path in args.out.rglob("*.safetensors"))
    print(f"{args.out}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
