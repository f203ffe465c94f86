"""Write the RLDS samples beside this file: `python make_rlds.py`, with tensorflow-cpu 2.21.0, tensorflow-datasets 4.9.10, Python 3.11.

episodes.npz: rows of three episodes of cheetah run, 16 px, recorded by `aime_fast.collect` (frame skip 10, random policy, seed 0); each
action is taken after the picture of its row. Each becomes one RLDS episode, whose last row holds what must not be used.
png/: pictures as PNG, two cameras, 2 shards of train and one of test. raw/: the first episode, pictures as integers and packed; each reward
is beside the picture that it came with, as in dm_env.
"""

from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

HERE = Path(__file__).parent
UNUSED = 9.0  # outside [-1, 1], so a reader that takes it is found out
SIZE = (16, 16, 3)
TERMINAL = 1  # the episode that ends in a terminal state; the others are cut off


def image():
    return tfds.features.Image(shape=SIZE, dtype=np.uint8, encoding_format="png")


def tensor(shape, dtype, encoding="none"):
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding)


OBSERVATIONS = {
    "png": {"pixels": image(), "walker/egocentric_camera": image(), "position": tensor((2,), np.float64)},
    "raw": {
        "pixels": tensor(SIZE, np.uint8), "packed": tensor(SIZE, np.uint8, "zlib"), "position": tensor((2,), np.float64, "bytes"),
    },
}  # fmt: skip


def features(name):
    flags = {flag: np.bool_ for flag in ("is_first", "is_last", "is_terminal")}
    step = {"observation": OBSERVATIONS[name], "action": tensor((6,), np.float32), "reward": np.float32, **flags}
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step), "episode_id": tfds.features.Text()})


def example(name, number, episode):
    last, steps = len(episode["action"]) - 1, []
    for t, pixels in enumerate(episode["pixels"]):
        seen = {
            "pixels": pixels, "packed": pixels, "walker/egocentric_camera": pixels[:, ::-1],
            "position": np.array([t / 10, number], np.float64),
        }  # fmt: skip
        before, after = 0.0 if t == 0 else episode["reward"][t - 1], UNUSED if t == last else episode["reward"][t]
        steps.append({
            "observation": {key: seen[key] for key in OBSERVATIONS[name]},
            "action": np.full(6, UNUSED, np.float32) if t == last else episode["action"][t],
            "reward": np.float32(before if name == "raw" else after),
            "is_first": t == 0, "is_last": t == last, "is_terminal": t == last and number == TERMINAL,
        })  # fmt: skip
    return {"steps": steps, "episode_id": f"episode {number}"}


def write(name, splits):
    """Splits: for each the numbers of its episodes, a shard a list."""
    with np.load(HERE / "episodes.npz") as file:
        episodes = [{key: file[f"{key}_{i}"] for key in ("pixels", "action", "reward")} for i in range(3)]
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    version = tfds.core.Version("1.0.0")
    identity = tfds.core.dataset_info.DatasetIdentity(f"cheetah_{name}", version, data_dir=str(folder), module_name="make_rlds")
    spec, infos = features(name), []
    serializer = tfds.core.example_serializer.ExampleSerializer(spec.get_serialized_info())
    for split, shards in splits.items():
        template = tfds.core.ShardedFileTemplate(folder, dataset_name=identity.name, split=split, filetype_suffix="tfrecord")
        written = 0
        for path, numbers in zip(template.sharded_filepaths(len(shards)), shards):
            records = [serializer.serialize_example(spec.encode_example(example(name, i, episodes[i]))) for i in numbers]
            tfds.core.file_adapters.TfRecordFileAdapter.write_examples(path, enumerate(records))
            written += sum(map(len, records))
        infos.append(tfds.core.SplitInfo(split, [len(numbers) for numbers in shards], written, filename_template=template))
    info = tfds.core.DatasetInfo(builder=identity, features=spec)
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(folder)


if __name__ == "__main__":
    write("png", {"train": [[0], [1]], "test": [[2]]})
    write("raw", {"train": [[0]]})
    for name in OBSERVATIONS:  # tfds itself reads what it wrote
        builder = tfds.builder_from_directory(HERE / name)
        print(name, {split: [len(list(e["steps"])) for e in builder.as_dataset(split)] for split in builder.info.splits})
