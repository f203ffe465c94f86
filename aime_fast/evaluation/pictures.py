"""Sample sheets as PNG and predictions as mp4. Frames are float in [-1, 1] unless said otherwise."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.evaluation.clips import COLUMNS, CONTEXT, HORIZON, infer_episode, predict_clip, strip_columns
from aime_fast.runtime.files import replacing

GREEN, RED = (40, 170, 70), (210, 50, 50)  # border of observed and of predicted frames
GAP = 2  # pixels of white between the cells of a sheet


def to_uint8(frames: Tensor) -> Tensor:
    """float [..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3] on the CPU."""
    return ((frames.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1).cpu()


def error_picture(truth: Tensor, decoded: Tensor) -> Tensor:
    """Absolute difference averaged over colour, [..., 3, H, W] in [-1, 1]: black where equal, white from half the range on."""
    error = (truth.float() - decoded.float()).abs().mean(-3, keepdim=True).clamp(max=1.0)
    return (2 * error - 1).expand_as(truth)


def overlay(frames: Tensor, attention: Tensor) -> Tensor:
    """Frames with attention in red over them, [N, 3, H, W]: the part of a map above its mean; a uniform map shows nothing.

    Args:
        frames: [N, 3, H, W]. attention: [N, Ha, Wa], non-negative.
    """
    even = attention.float().mean((-2, -1), keepdim=True)
    attention = (attention.float() - even).clamp_min(0)
    attention = attention / torch.maximum(attention.amax((-2, -1), keepdim=True), even).clamp_min(1e-12)
    strength = F.interpolate(attention[:, None], frames.shape[-2:], mode="bilinear", align_corners=False)  # [N, 1, H, W]
    dark = 0.6 * (frames.float() + 1) - 1
    red = torch.tensor([1.0, -0.6, -0.8], device=frames.device)[:, None, None]
    return torch.lerp(dark, red.expand_as(dark), 0.8 * strength)


def enlarge(frames: Tensor, smallest: int) -> Tensor:
    """uint8 [..., H, W, 3] repeated by a whole factor until H >= `smallest`."""
    factor = -(-smallest // frames.shape[-3])
    return frames.repeat_interleave(factor, -3).repeat_interleave(factor, -2)


def write_sheet(path: Path, truth: Tensor, reconstruction: Tensor, attention: Tensor, smallest: int = 96) -> None:
    """A sheet with one column a frame and rows truth | reconstruction | error | attention overlay.

    Args:
        path: PNG to write. truth, reconstruction: [N, 3, H, W]. attention: [N, Ha, Wa]. smallest: least height of a cell, pixels.
    """
    rows = torch.stack([truth, reconstruction, error_picture(truth, reconstruction), overlay(truth, attention)])  # [4, N, 3, H, W]
    write_png(path, sheet(enlarge(to_uint8(rows), smallest)))


def sheet(cells: Tensor) -> Tensor:
    """uint8 [rows, columns, H, W, 3] -> one image [rows * (H + GAP), columns * (W + GAP), 3]."""
    return F.pad(cells, (0, 0, 0, GAP, 0, GAP), value=255).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)


def filmstrip(truth: Tensor, decoded: Tensor, observed: int, smallest: int = 96) -> Tensor:
    """A sheet uint8 [H', W', 3], one column a frame, rows truth | prediction | error; borders as in `prediction_frames`.

    Args:
        truth, decoded: [N, 3, H, W]. observed: how many of the N frames the model observed. smallest: least height of a cell, pixels.
    """
    cells = enlarge(to_uint8(torch.stack([truth, decoded, error_picture(truth, decoded)])), smallest)  # [3, N, H', W', 3]
    paint_border(cells[1], observed, max(2, smallest // 32))
    return sheet(cells)


def attention_sheet(frames: Tensor, attention: Tensor, slot_maps: Tensor, smallest: int = 96) -> Tensor:
    """A sheet uint8 [H', W', 3], one column a frame, rows frame | attention | slot 1 | ... | slot S, each laid over the frame.

    Args:
        frames: [N, 3, H, W]. attention: [N, Ha, Wa]. slot_maps: [N, S, Ha, Wa].
    """
    maps = [attention, *slot_maps.unbind(1)]
    rows = torch.stack([frames.float(), *(overlay(frames, each) for each in maps)])  # [2 + S, N, 3, H, W]
    return sheet(enlarge(to_uint8(rows), smallest))


def paint_border(panels: Tensor, observed: int, width: int) -> None:
    """Paint, in place, the border of uint8 panels [T, H, W, 3]: green for the first `observed`, then red."""
    for part, colour in ((panels[:observed], GREEN), (panels[observed:], RED)):
        paint = torch.tensor(colour, dtype=torch.uint8)
        part[:, :width] = part[:, -width:] = paint
        part[:, :, :width] = part[:, :, -width:] = paint


def write_png(path: Path, image: Tensor) -> None:
    """Write uint8 [H, W, 3] as a PNG. Raises OSError."""
    with replacing(path) as file:
        file.write(png_bytes(image))


def png_bytes(image: Tensor) -> bytes:
    """uint8 [H, W, 3] as a PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.cpu().numpy()).save(file, format="PNG", optimize=True)
    return file.getvalue()


def prediction_frames(truth: Tensor, decoded: Tensor, context: int, smallest: int = 192) -> Tensor:
    """truth | decoded | error side by side, uint8 [T, H', W', 3]; the border of an observed frame is green, that of a predicted one red.

    Args:
        truth, decoded: [T, 3, H, W]. context: number of observed frames. smallest: least height of a panel, pixels.
    """
    panels = enlarge(to_uint8(torch.stack([truth, decoded, error_picture(truth, decoded)])), smallest)  # [3, T, H', W', 3]
    paint_border(panels[1], context, max(4, smallest // 32))
    return panels.permute(1, 2, 0, 3, 4).flatten(2, 3)


def write_video(path: Path, frames: Tensor, frames_per_second: int = 6) -> None:
    """Write uint8 [T, H, W, 3] as H.264 mp4 with even sides, playable in a browser; whole or not at all. Raises OSError."""
    import imageio_ffmpeg

    frames = F.pad(frames, (0, 0, 0, frames.shape[2] % 2, 0, frames.shape[1] % 2)).contiguous()
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{frames.shape[2]}x{frames.shape[1]}", "-r", str(frames_per_second), "-i", "-"]
    coded = ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "10", "-f", "mp4"]
    with replacing(path) as file:
        # imageio_ffmpeg's own writer does not tell whether ffmpeg has failed, as it does on a full disk.
        done = subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *source, *coded, file.name],
            input=frames.numpy().tobytes(), capture_output=True, check=False, pass_fds=(file.fileno(),),
        )  # fmt: skip
        if done.returncode:
            raise _ffmpeg_error(path, done)


def _ffmpeg_error(path: Path, done: subprocess.CompletedProcess[bytes]) -> OSError:
    """What ended ffmpeg: the error of the system that it names, or its last line."""
    said = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
    number = errno.EFBIG if done.returncode == -getattr(signal, "SIGXFSZ", 0) else None
    number = number or next((each for each in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if os.strerror(each) in "\n".join(said)), errno.EIO)
    return OSError(number, os.strerror(number) if number != errno.EIO else f"ffmpeg: {said[-1]}", str(path))


def write_samples(model: nn.Module, episode: TensorDict, folder: Path, step: int) -> dict[str, Path]:
    """Write the pictures of a training step: reconstruction, open-loop filmstrip and attention, each as a PNG.

    Args:
        model: in eval mode. episode: as for `predict_clip`, with `is_init`. folder: where `step_<step>[_<name>].png` go.

    Returns:
        The files by name: samples, open_loop, attention.
    """
    paths = {name: folder / f"step_{step:08d}{suffix}.png" for name, suffix in (("samples", ""), ("open_loop", "_open_loop"))}
    paths["attention"] = folder / f"step_{step:08d}_attention.png"
    out = infer_episode(model, episode, COLUMNS)
    write_sheet(paths["samples"], out["video"], out["reconstructions"], out["attention"])
    clip = predict_clip(model, episode)
    columns = strip_columns(clip)
    write_png(paths["open_loop"], filmstrip(clip.truth[columns], clip.decoded[columns], observed=1))
    write_png(paths["attention"], attention_sheet(out["video"], out["attention"], out["slot_maps"]))
    return paths


def write_prediction(
    model: nn.Module, episodes: Iterable[TensorDict], path: Path, device: torch.device, context: int = CONTEXT, horizon: int = HORIZON
) -> None:
    """Write a video of whole episodes' middle parts: truth | reconstruction, then open-loop prediction | error.

    Args:
        model: in eval mode.
        episodes: as for `predict_clip`, on any device; those of fewer than two frames are left out.
        path: mp4 to write.
        device: where the model is.
        context: observed frames; horizon: frames predicted from the actions alone.

    Raises:
        ValueError: no episode has two frames.
    """
    clips = (
        predict_clip(model, episode.select("pixels", "action").to(device), context, horizon) for episode in episodes if len(episode) > 1
    )
    films = [prediction_frames(clip.truth, clip.decoded, clip.observed) for clip in clips]
    if not films:
        raise ValueError("prediction video: every held-out episode has fewer than two frames")
    write_video(path, torch.cat(films))
