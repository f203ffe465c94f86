"""Pictures of a model's predictions, mixture, attention and codes on held-out episodes, as self-contained HTML.

`inferred` is what `infer_episode` returns for an episode: a TensorDict [T] of the frames and the model's outputs.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.evaluation.clips import predict_clip, spread, strip_columns
from aime_fast.evaluation.pictures import attention_sheet, enlarge, filmstrip, png_bytes, sheet, to_uint8
from aime_fast.reporting.charts import WIDE, Line, line_chart, number, stacked_chart

CONTEXT, HORIZON = 8, 50  # observed and predicted frames, as in the evaluation
COLUMNS = 12  # frames in a row
CELL = 64  # least height of a cell, pixels
MAX_VIDEO = 6 << 20  # bytes; a larger video is not inlined


def data_uri(kind: str, data: bytes) -> str:
    """Bytes of a MIME type as a `data:` URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def picture_sheet(image: Tensor, rows: Sequence[str], columns: Sequence[str], caption: str) -> str:
    """An image uint8 [H, W, 3] of equal cells, with the names of its rows on the left and of its columns on top."""
    head = "".join(f"<span>{escape(name)}</span>" for name in columns)
    side = "".join(f"<span>{escape(name)}</span>" for name in rows)
    return (
        f'<figure class="sheet"><figcaption>{escape(caption)}</figcaption><div class="strip">'
        f'<div class="side">{side}</div><div class="head">{head}</div>'
        f'<img alt="{escape(caption)}" src="{data_uri("image/png", png_bytes(image))}"></div></figure>'
    )


def open_loop(model: nn.Module, episodes: Sequence[TensorDict]) -> str:
    """A filmstrip of truth, open-loop prediction and error for the middle of each episode.

    Args:
        model: in eval mode.
        episodes: as for `predict_clip`, which raises ValueError for one of fewer than two frames.
    """
    parts = []
    for i, episode in enumerate(episodes, 1):
        clip = predict_clip(model, episode, CONTEXT, HORIZON)
        columns = strip_columns(clip, COLUMNS)
        names = ["observed", *(f"+{c - clip.observed + 1}" for c in columns[1:])]
        image = filmstrip(clip.truth[columns], clip.decoded[columns], observed=1, smallest=CELL)
        caption = f"held-out episode {i}: {clip.observed} observed frames from frame {clip.first} on, then the actions alone"
        parts.append(picture_sheet(image, ("truth", "prediction", "error"), names, caption))
    return "".join(parts)


def mixture(inferred: TensorDict) -> str:
    """The mixture weights of the prior over an episode as stacked areas, above frames of the episode."""
    weights = inferred["mixture_weights"].float()  # [T, K]
    labels = [f"component {k + 1}" for k in range(weights.shape[1])]
    columns = spread(COLUMNS, len(weights))
    frames = sheet(enlarge(to_uint8(inferred["video"][columns]), CELL)[None])
    chart = stacked_chart(weights.tolist(), "mixture weights of the prior, frame by frame", "frame", labels, WIDE)
    strip = picture_sheet(frames, ("frame",), list(map(str, columns)), "the episode")
    return chart + strip


def attention(inferred: TensorDict) -> str:
    """The attention map and the map of each slot over frames of an episode."""
    columns = spread(COLUMNS - 2, len(inferred["video"]))
    maps = inferred[columns]
    image = attention_sheet(maps["video"], maps["attention"], maps["slot_maps"], smallest=CELL)
    rows = ("frame", "attention", *(f"slot {s + 1}" for s in range(maps["slot_maps"].shape[1])))
    return picture_sheet(image, rows, [str(c) for c in columns], "attention above the mean of each map, in red")


def codebook(inferred: Sequence[TensorDict], codebook_size: int) -> str:
    """The share of each code in the tokens of all episodes, the most used first, one line for each head.

    Args:
        codebook_size: V, codes of a head.
    """
    codes = torch.cat([each["tokens"].flatten(0, -2) for each in inferred])  # [N, Q]
    lines, counts = [], [head.bincount(minlength=codebook_size) for head in codes.unbind(1)]
    for q, count in enumerate(counts, 1):
        share = (count / count.sum()).sort(descending=True).values
        perplexity = torch.special.entr(share).sum().exp().item()
        label = f"head {q}: {int((count > 0).sum())} of {codebook_size} codes, perplexity {perplexity:.1f}; least used"
        used = share[share > 0].tolist()
        lines.append(Line(label, range(1, len(used) + 1), used))
    title = f"share of each code in {number(len(codes))} held-out tokens of each head, the most used first"
    return line_chart(lines, title, x_label="rank of the code", log=True, width=WIDE)


def inline_picture(path: Path) -> str:
    """A PNG file as a figure, named by its file name."""
    source = data_uri("image/png", path.read_bytes())
    return f'<figure class="sheet"><figcaption>{escape(path.name)}</figcaption><img alt="{escape(path.stem)}" src="{source}"></figure>'


def inline_video(path: Path) -> str | None:
    """An mp4 as a video element; None if it is larger than MAX_VIDEO."""
    if path.stat().st_size > MAX_VIDEO:
        return None
    source = data_uri("video/mp4", path.read_bytes())
    return (
        f'<figure class="sheet"><figcaption>truth, prediction, error; green border: the model sees the frame, red: it predicts it'
        f'</figcaption><video controls loop muted autoplay playsinline src="{source}"></video></figure>'
    )
