"""What the tests record: random episodes and the attributes of their file."""

import numpy as np

ATTRIBUTES = {
    "domain": "cartpole",
    "task": "swingup",
    "frame_skip": 4,
    "image_size": 8,
    "render_quality": "fast",
    "action_dim": 2,
    "seed": 0,
    "versions": "{}",
}


def random_episode(frames: int, seed: int = 0, image_size: int = 8, action_dim: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng([seed, frames])
    return {
        "pixels": random.integers(0, 256, (frames, image_size, image_size, 3), dtype=np.uint8),
        "action": random.uniform(-1, 1, (frames, action_dim)).astype(np.float32),
        "reward": random.standard_normal(frames).astype(np.float32),
        "discount": np.ones(frames, dtype=np.float32),
        "is_init": np.arange(frames) == 0,
    }
