"""Videos as mp4, side by side with labels, and a contact sheet as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wanquant.runs.files import replacing

#: Small videos are enlarged to at least this height where people look at them.
VIEW_HEIGHT = 192
LABEL_HEIGHT = 22


def to_uint8(video: np.ndarray) -> np.ndarray:
    """0..1 to 0..255, rounded; NaN shows as magenta, so that nobody takes it for a dark picture."""
    broken = ~np.isfinite(video).all(-1)
    pixels = np.round(np.clip(np.where(np.isfinite(video), video, 0.0), 0.0, 1.0) * 255).astype(np.uint8)
    pixels[broken] = (255, 0, 255)
    return pixels


def write_mp4(path: Path, frames: np.ndarray, fps: int, crf: int = 10) -> None:
    """H.264, yuv420p, uint8 [frames, height, width, 3] with even sides; renamed into place when whole. The same frames
    give the same file."""
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        # With AVX-512, x264's macroblock tree does not come out the same each time.
        options = {"crf": str(crf), "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_png(path: Path, image: Image.Image) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def enlarge(frames: np.ndarray, height: int = VIEW_HEIGHT) -> np.ndarray:
    """Whole multiples, without smoothing: what is seen is what was generated."""
    factor = max(1, -(-height // frames.shape[1]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def thumbnail(frame: np.ndarray, height: int = 96) -> np.ndarray:
    """A small picture enlarged as above, a large one reduced to ``height``."""
    if frame.shape[0] <= height:
        return np.asarray(enlarge(frame[None], height)[0])
    width = round(frame.shape[1] * height / frame.shape[0])
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def read_mp4(path: Path) -> np.ndarray:
    """uint8 [frames, height, width, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def frames_per_second(path: Path) -> int:
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return round(rate.numerator / rate.denominator) if rate else 16  # PyAV's own rational has no round


def side_by_side(
    videos: Sequence[np.ndarray], labels: Sequence[str], columns: int | None = None, height: int | None = None
) -> np.ndarray:
    """uint8 videos of one size next to each other, each under its label, in lines of ``columns``; with a ``height``
    large ones are reduced to it, small ones are always enlarged."""
    columns = columns or len(videos)
    panels = []
    for frames, label in zip(videos, labels, strict=True):
        if height is not None and frames.shape[1] > height:
            large = np.stack([thumbnail(frame, height) for frame in frames])
        else:
            large = enlarge(frames, height or VIEW_HEIGHT)
        strip = Image.new("RGB", (large.shape[2], LABEL_HEIGHT), "white")
        ImageDraw.Draw(strip).text((6, 3), label, fill="black", font=ImageFont.load_default(14 if columns < 4 else 11))
        banner = np.broadcast_to(np.asarray(strip), (len(large), LABEL_HEIGHT, large.shape[2], 3))
        panels.append(np.concatenate([banner, large], axis=1))
    white = np.full_like(panels[0], 255)
    panels += [white] * (-len(panels) % columns)
    gap = np.full((*panels[0].shape[:2], 8, 3), 255, np.uint8)
    lines = []
    for first in range(0, len(panels), columns):
        line = [piece for panel in panels[first : first + columns] for piece in (gap, panel)][1:]
        lines.append(np.concatenate(line, axis=2))
    whole = np.concatenate(lines, axis=1)
    # The codec wants even sides.
    return np.pad(whole, ((0, 0), (0, whole.shape[1] % 2), (0, whole.shape[2] % 2), (0, 0)), constant_values=255)


def contact_sheet(rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]], columns: int = 5) -> Image.Image:
    """For each titled row its videos (label, uint8 frames), a line each of ``columns`` frames evenly spread."""
    font, texts, strips, top = ImageFont.load_default(14), [], [], 0
    for title, videos in rows:
        texts.append(((4, top + 1), title))
        top += 20
        for label, frames in videos:
            picks = np.linspace(0, len(frames) - 1, columns).round().astype(int)
            strip = Image.fromarray(np.concatenate([thumbnail(frames[i]) for i in picks], axis=1))
            texts.append(((4, top + strip.height // 2 - 8), label))
            strips.append((strip, top))
            top += strip.height + 4
        top += 8
    sheet = Image.new("RGB", (90 + max(strip.width for strip, _ in strips), top), "white")
    draw = ImageDraw.Draw(sheet)
    for place, text in texts:
        draw.text(place, text, fill="black", font=font)
    for strip, top in strips:
        sheet.paste(strip, (90, top))
    return sheet
