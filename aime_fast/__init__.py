"""aime_fast: AIME, a variational world model for visual reinforcement learning, as a performance-tuned trainer."""

__version__ = "0.1.0"
