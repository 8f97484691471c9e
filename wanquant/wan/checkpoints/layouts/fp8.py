"""FP8 layouts: weights as codes of E4M3, for engines that know no other 8-bit float.

``comfyui``             one file by the authors' names, as ComfyUI's *scaled* ones: ``<linear>.weight`` F8_E4M3,
                        ``<linear>.scale_weight`` float32 [], ``<linear>.scale_input`` where that is static, and the
                        marker ``scaled_fp8`` (``comfy/utils.py``, ``convert_old_quants``): of two elements it has
                        ComfyUI multiply dequantized weights, of none it lets it multiply codes.
``compressed-tensors``  diffusers' files, ``<linear>.weight`` F8_E4M3 and ``<linear>.weight_scale`` float32 [out, 1] or
                        [1], and in ``config.json`` a ``quantization_config`` of format ``float-quantized`` (the package
                        compressed-tensors; vLLM reads it).

Of E4M3 these are the checkpoint's own codes and scales. HiF8 and E5M2 are *carried*: each row's (or the tensor's)
values times the largest power of two that keeps them within 448, by which its scale is divided. They have no more
mantissa bits than E4M3, so all stay what they are but those below 2^-6 after that which are no multiples of 2^-9; these
are rounded, by at most 2^-10, and counted. To round anew, by E4M3's own scale, would change nearly every value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wanquant.kernels import LARGEST_E4M3
from wanquant.quant.eight_bit import CARRIED
from wanquant.quant.scale import PerRow, PerTensor
from wanquant.quant.scheme import Scheme
from wanquant.wan.checkpoints.checkpoint import write_json
from wanquant.wan.checkpoints.layouts.pieces import PREFIX, RENAME, Checkpoint, Piece, write, write_as_source

E4M3 = torch.float8_e4m3fn
#: What vLLM-Omni's Wan calls a linear otherwise than diffusers (its ``wan2_2_transformer.py``, ``load_weights``).
OMNI = ((".to_out.0", ".to_out"), (".ffn.net.0.", ".ffn.net_0."), (".ffn.net.2", ".ffn.net_2"))


class Weights:
    """Of a checkpoint's linears in E4M3. ``lost`` of ``total`` values are not those of the checkpoint, of the weights
    that have been made so far."""

    def __init__(self, checkpoint: Checkpoint, layout: str) -> None:
        self.checkpoint, self.format = checkpoint, checkpoint.scheme.format
        self.lost = self.total = 0
        self._lifts: dict[str, torch.Tensor] = {}
        if self.format.name != "e4m3" and self.format.name not in CARRIED:
            others = "mindie-sd or modelslim" if self.format.name in ("int8", "mxfp8") else "bf16"
            raise ValueError(f"layout {layout} holds E4M3 and NVFP4, and not {self.format.name}: choose {others}")
        inputs = checkpoint.scheme.act_format.name
        if checkpoint.scheme.act_static and inputs != "e4m3":
            raise ValueError(f"layout {layout}: static scales of {inputs} are none of E4M3's: use e4m3")
        checkpoint.refuse_factors(f"layout {layout}")

    def codes(self, linear: str) -> torch.Tensor:
        """[out, in]."""
        codes = self.checkpoint.source.read(f"{linear}.weight")
        if self.format.name == "e4m3":
            return codes.view(E4M3)
        lift = self._lift(linear)
        # In BF16, where powers of two multiply exactly.
        values = (self.format.decode(codes).view(*lift.shape, -1) * lift.bfloat16()[..., None]).view(codes.shape)
        carried = values.to(E4M3)
        self.lost += int((carried.to(torch.bfloat16) != values).count_nonzero())
        self.total += values.numel()
        return carried

    def scale(self, linear: str) -> torch.Tensor:
        """float32 [out] or []."""
        scale = self.checkpoint.source.read(f"{linear}.weight_scale")
        return scale if self.format.name == "e4m3" else scale / self._lift(linear)

    def scale_shape(self, linear: str) -> tuple[int, ...]:
        return self.checkpoint.source.tensors[f"{linear}.weight_scale"].shape

    def _lift(self, linear: str) -> torch.Tensor:
        """float32, a power of two for each scale. Kept, because a file has its scales before its weights."""
        if linear not in self._lifts:
            values = self.format.decode(self.checkpoint.source.read(f"{linear}.weight"))
            largest = values.view(*self.scale_shape(linear), -1).abs().amax(-1).double()
            if not largest.isfinite().all():
                raise ValueError(f"{linear}.weight has values that are not finite, which E4M3 cannot carry")
            _, exponent = torch.frexp(LARGEST_E4M3 / largest)
            lift = torch.ldexp(torch.ones_like(largest), exponent - 1)
            self._lifts[linear] = torch.where(largest > 0, lift, 1.0).float()
        return self._lifts[linear]

    def remarks(self, inputs: str) -> list[str]:
        """What is not as the checkpoint has it. ``inputs``: how the engine rounds them, "" where as the checkpoint."""
        scheme, said = self.checkpoint.scheme, []
        if self.total:
            said.append(
                f"{self.format.name} carried by e4m3: {self.lost} of {self.total} weights were rounded once more"
            )
        if inputs:
            said.append(inputs)
        if scheme.attention != "off":
            said.append(f"attention is not quantized there (quant.attention={scheme.attention} here)")
        return said


def write_comfyui(checkpoint: Checkpoint, target: Path, naming: str, on_file: Callable[[], None]) -> list[str]:
    scheme, rename, weights = checkpoint.scheme, RENAME[naming], Weights(checkpoint, "comfyui")
    if not isinstance(scheme.weight_granularity, PerTensor):
        raise ValueError(
            f"quant.weights.granularity={scheme.config.weights.granularity}: ComfyUI has one scale a weight, to which "
            "codes would be rounded a second time: quantize with quant=e4m3_per_tensor"
        )
    pieces = {rename(name): checkpoint.as_it_is(name) for name in checkpoint.others()}
    for name in checkpoint.linears:
        parts = {"weight": Piece("", E4M3, checkpoint.shape(name), partial(weights.codes, name))}
        parts["scale_weight"] = Piece("", torch.float32, (), partial(weights.scale, name))
        if scheme.act_static:
            parts["scale_input"] = checkpoint.as_it_is(f"{name}.input_scale")
        pieces |= {f"{rename(name)}.{part}": piece for part, piece in (parts | checkpoint.bias(name)).items()}
    marker = torch.zeros(0 if scheme.act_static else 2, dtype=E4M3)
    name = f"{PREFIX if naming == 'prefixed' else ''}scaled_fp8"
    write(pieces | {name: Piece("", E4M3, tuple(marker.shape), lambda: marker)}, target / "fp8_scaled.safetensors")
    on_file()
    return weights.remarks(
        "" if scheme.act_static else "ComfyUI multiplies these weights in BF16: inputs are not rounded"
    )


def write_compressed_tensors(
    checkpoint: Checkpoint, target: Path, naming: str, on_file: Callable[[], None]
) -> list[str]:
    scheme, weights = checkpoint.scheme, Weights(checkpoint, "compressed-tensors")

    def parts(name: str) -> dict[str, Piece]:
        shape = (*weights.scale_shape(name), 1)
        made = {"weight": Piece("", E4M3, checkpoint.shape(name), partial(weights.codes, name))}
        made["weight_scale"] = Piece("", torch.float32, shape, lambda: weights.scale(name)[..., None])
        if scheme.act_static:
            read = checkpoint.source.read
            made["input_scale"] = Piece("", torch.float32, (1,), lambda: read(f"{name}.input_scale")[None])
        return made | checkpoint.bias(name)

    write_as_source(checkpoint, target, parts, on_file)
    config = {**checkpoint.config, "quantization_config": _compressed_config(checkpoint)}
    write_json(target / "config.json", config)
    return weights.remarks(_inputs_of(scheme))


def _compressed_config(checkpoint: Checkpoint) -> dict[str, Any]:
    scheme, static = checkpoint.scheme, checkpoint.scheme.act_static
    by = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**by, "strategy": "tensor" if isinstance(scheme.weight_granularity, PerTensor) else "channel"}
    inputs = {**by, "strategy": "tensor" if static else "token", "dynamic": not static}
    group = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}, "input_activations": inputs}
    return compressed_config(checkpoint, "float-quantized", group)


def compressed_config(checkpoint: Checkpoint, format_: str, group: dict[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint whose linears are all quantized in one way."""
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": _plain_linears(checkpoint),
    }


def _plain_linears(checkpoint: Checkpoint) -> list[str]:
    """Every matrix called ``weight`` that is not quantized, by diffusers' name of its module and by vLLM-Omni's: what
    is not found in the list is taken for quantized."""
    tensors, found = checkpoint.source.tensors, set[str]()
    for name in checkpoint.others():
        module, _, part = name.rpartition(".")
        if part == "weight" and len(tensors[name].shape) == 2:
            found.add(module)
            for ours, theirs in OMNI:
                module = module.replace(ours, theirs)
            found.add(module)
    return sorted(found)


def _inputs_of(scheme: Scheme) -> str:
    """How the engine rounds inputs; "" where as the checkpoint does."""
    if scheme.act_static:
        return ""
    own = isinstance(scheme.act_granularity, PerRow) and scheme.config.activations.rule == f"amax/{LARGEST_E4M3:g}"
    if scheme.act_format.name == "e4m3" and own:
        return ""
    here = scheme.act_format.name
    return f"inputs are rounded to e4m3, by the largest magnitude of a token, where here they are {here}"
