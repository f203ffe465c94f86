"""Write samples.zip beside this file: `python make_minari.py`, with minari[hdf5,arrow] 0.5.4, gymnasium 1.4.0, pillow 13, Python 3.11.

The episodes are those of ../rlds/episodes.npz; after the last picture no action is known. Three data sets, as Minari laid them out:
dict_hdf5: nested observations, pictures doubled to 32 x 32, which Minari stores as JPEG; box_parquet: the same pictures, not nested;
dict_arrow: nested, pictures of 16 x 16 as they are. Zipped, since metadata.json has the bounds of every pixel.
"""

import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TERMINAL = 1  # the episode that ends in a terminal state; the others are cut off
SETS = {"dict_hdf5": ("hdf5", 2, True), "dict_arrow": ("arrow", 1, True), "box_parquet": ("parquet", 2, False)}


def write(name, data_format, scale, nested, episodes):
    import minari
    from gymnasium.spaces import Box, Dict
    from minari.data_collector import EpisodeBuffer

    pixels = Box(0, 255, (16 * scale, 16 * scale, 3), np.uint8)
    position = Box(-9, 9, (2,), np.float64)
    buffers = []
    for number, episode in enumerate(episodes):
        pictures, steps = episode["pixels"].repeat(scale, 1).repeat(scale, 2), len(episode["pixels"]) - 1
        ended = np.arange(steps) == steps - 1
        buffers.append(
            EpisodeBuffer(
                id=number, seed=number,
                observations={"pixels": pictures, "position": np.zeros((steps + 1, 2))} if nested else pictures,
                actions=episode["action"][:steps], rewards=list(episode["reward"][:steps].astype(float)),
                terminations=list(ended & (number == TERMINAL)), truncations=list(ended & (number != TERMINAL)),
                infos={"time": np.arange(steps + 1.0)[:, None]},
            )
        )  # fmt: skip
    space = Dict({"pixels": pixels, "position": position}) if nested else pixels
    minari.create_dataset_from_buffers(
        f"{name}-v0", buffers, observation_space=space, action_space=Box(-1, 1, (6,), np.float32), data_format=data_format
    )
    found = list(minari.load_dataset(f"{name}-v0").iterate_episodes())  # minari itself reads what it wrote
    print(name, [(len(episode.rewards), episode.terminations.tolist()) for episode in found])


if __name__ == "__main__":
    with np.load(HERE.parent / "rlds" / "episodes.npz") as file:
        recorded = [{key: file[f"{key}_{i}"] for key in ("pixels", "action", "reward")} for i in range(3)]
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(HERE / "samples.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        os.environ["MINARI_DATASETS_PATH"] = folder
        for name, (data_format, scale, nested) in SETS.items():
            write(name, data_format, scale, nested, recorded)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and "-v0" in str(path):
                out.write(path, path.relative_to(folder))
