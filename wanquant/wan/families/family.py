"""What a family of video models is: its classes, and how it is asked for a video. ``Family`` itself is Wan's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from diffusers.utils.torch_utils import get_module_execution_device
from transformers import UMT5EncoderModel

from wanquant.wan.config import GenerationConfig

COMPONENTS = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
#: Inside a block, a linear and the linear or norm that alone makes its input: smoothing folds there, exactly. The other
#: inputs come from norms without weights, whose modulation blocks share, from a GELU, or from the text.
FOLDS = {"attn1.to_out.0": "attn1.to_v", "attn2.to_out.0": "attn2.to_v", "attn2.to_q": "norm2"}
#: Tokens of a picture beside the text's, as Wan2.1's encoder makes them.
PICTURE_TOKENS = 257

#: A prompt as the pipeline takes it: tensors by the names of its arguments.
Text = dict[str, torch.Tensor]
#: Makes a tensor of a size and a ``dtype``.
Make = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Family:
    """The classes of the pipeline and its parts, and what is particular to them.

    components      the folders a pipeline must have
    text_encoders   their classes by folder
    folds           by a linear's name inside a block, the module that smoothing may fold into
    image_encoder   class of the encoder of pictures, where videos start from one; not every checkpoint has it
    block_lists     the transformer's lists of blocks in the order they run, and where its config has their number
    guidance        how a guided denoising step runs, and
    solvers         what it may be denoised by, as ``GenerationConfig`` names them

    Methods are Wan's. ``vae`` and ``config`` are the configs of VAE and transformer, ``size`` frames, rows and columns
    of latents.
    """

    pipeline: Any
    transformer: Any
    vae: Any = AutoencoderKLWan
    text_encoders: Mapping[str, Any] = field(default_factory=lambda: {"text_encoder": UMT5EncoderModel})
    components: tuple[str, ...] = COMPONENTS
    folds: Mapping[str, str] = field(default_factory=lambda: FOLDS)
    image_encoder: Any = None
    block_lists: Mapping[str, str] = field(default_factory=lambda: {"blocks": "num_layers"})
    guidance: str = "branches"
    solvers: tuple[str, ...] = ("unipc", "euler")

    @property
    def takes_pictures(self) -> bool:
        return self.image_encoder is not None

    @property
    def needs_pictures(self) -> bool:
        return self.takes_pictures

    @property
    def picture_frames(self) -> int:
        """Frames of latents that a picture takes beside the video's."""
        return 0

    def shown(self, picture: Any) -> dict[str, Any]:
        """The pipeline's arguments for a picture."""
        return {"image": picture}

    def beside(self, config: Mapping[str, Any]) -> Sequence[int]:
        """Where the last blocks each belong to another: the numbers of these, and they are protected together."""
        return ()

    @property
    def is_wan(self) -> bool:
        """Whether blocks are called as Wan's are, which training and LoRA files need."""
        return type(self) is Family

    def lengths(self, config: Mapping[str, Any]) -> list[int]:
        """Of the lists of blocks."""
        return [config[key] for key in self.block_lists.values()]

    def sized(self, config: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
        """The transformer's config with so many blocks in the lists."""
        return {**config, **dict(zip(self.block_lists.values(), lengths, strict=True))}

    def shrinks(self, vae: Any) -> tuple[int, int]:
        """How many times smaller latents are than the video, in time, and in height and width."""
        return 4, vae.get("scale_factor_spatial", 8)

    def latents(self, vae: Any, settings: GenerationConfig) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        time, space = self.shrinks(vae)
        return (settings.num_frames - 1) // time + 1, settings.height // space, settings.width // space

    def channels(self, vae: Any) -> int:
        """Of the latents."""
        return int(vae["z_dim"])

    def patch(self, config: Any) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token."""
        return tuple(config["patch_size"])  # type: ignore[return-value]

    def prepare(self, vae: Any) -> None:
        """Sets the VAE up, in place."""

    def tile(self, vae: Any) -> tuple[float, float, float]:
        """Latents that are decoded together at most, where the VAE decodes in tiles."""
        return math.inf, math.inf, math.inf

    def inputs(
        self, config: Any, size: tuple[int, int, int], settings: GenerationConfig, rows: int, make: Make, **how: Any
    ) -> dict[str, Any]:
        """Of one pass through the transformer on ``rows`` videos; ``timestep_per_token`` is Wan2.2-TI2V's."""
        kind = {"dtype": torch.bfloat16}
        tokens = math.prod(length // patch for length, patch in zip(size, self.patch(config), strict=True))
        found = {
            "hidden_states": make(rows, config["in_channels"], *size, **kind),
            "timestep": make(*((rows, tokens) if how.get("timestep_per_token") else (rows,)), dtype=torch.float32),
            "encoder_hidden_states": make(rows, settings.max_text_length, config["text_dim"], **kind),
        }
        if config["image_dim"] is not None:
            found["encoder_hidden_states_image"] = make(rows, PICTURE_TOKENS, config["image_dim"], **kind)
        return found

    def schedule(self, pipe: Any, settings: GenerationConfig) -> None:
        """Gives the pipeline the scheduler that the settings ask for, where its own is another.

        Noise levels are s·σ / (1 + (s - 1)·σ) with the flow shift s, σ going down evenly from 1. UniPC of first order
        without its corrector is Euler's method, and its config is one that a saved pipeline keeps.
        """
        scheduler = pipe.scheduler
        if not isinstance(scheduler, UniPCMultistepScheduler):
            raise ValueError(
                f"the pipeline's scheduler is a {type(scheduler).__name__}; Wan's is UniPCMultistepScheduler"
            )
        asked: dict[str, Any] = {} if settings.flow_shift is None else {"flow_shift": settings.flow_shift}
        if settings.solver == "euler":
            asked |= {"solver_order": 1, "disable_corrector": list(range(settings.steps))}
        if any(scheduler.config[name] != value for name, value in asked.items()):
            pipe.scheduler = UniPCMultistepScheduler.from_config(scheduler.config, **asked)

    def embed(self, pipe: Any, prompt: str, settings: GenerationConfig) -> Text:
        """One prompt's, without a row's dimension."""
        found, _ = pipe.encode_prompt([prompt], None, False, max_sequence_length=settings.max_text_length)
        return {"prompt_embeds": found[0]}

    def asked(self, pipe: Any, settings: GenerationConfig) -> dict[str, Any]:
        """Arguments of the pipeline that are not every pipeline's."""
        second = settings.guidance_scale_2 if pipe.config.boundary_ratio is not None else None
        return {"guidance_scale": settings.guidance_scale, "guidance_scale_2": second}

    def denoise(
        self, pipe: Any, text: Text, negative: Text, noise: torch.Tensor, settings: GenerationConfig, **given: Any
    ) -> torch.Tensor:
        """From noise [rows, channels, frames', h, w] to final latents of the same size; ``given`` are further arguments
        of the pipeline."""
        found: torch.Tensor = pipe(
            **text,
            **{f"negative_{name}": tensor for name, tensor in negative.items()},
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=settings.steps,
            latents=noise,
            output_type="latent",
            **self.asked(pipe, settings),
            **given,
        ).frames
        return found

    def pixels(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        """What the VAE makes of latents, bit for bit as the pipeline has it."""
        vae = pipe.vae
        latents = latents.to(vae.dtype)
        mean, scale = (
            values.view(1, -1, 1, 1, 1).to(latents)
            for values in (torch.tensor(vae.config.latents_mean), 1 / torch.tensor(vae.config.latents_std))
        )
        pixels: torch.Tensor = vae.decode(latents / scale + mean, return_dict=False)[0]
        return pixels

    def decode(self, pipe: Any, latents: torch.Tensor) -> np.ndarray:
        """The video of one sample's final latents, float32 [frames, height, width, 3] in 0..1."""
        pixels = self.pixels(pipe, latents[None].to(get_module_execution_device(pipe.vae)))
        return np.asarray(pipe.video_processor.postprocess_video(pixels, output_type="np")[0], np.float32)
