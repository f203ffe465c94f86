"""Pillar 1, perception: VQ-VAE video tokens, causal Perceiver context, next-token prediction."""

from aime_fast.perceiver_io.context import CausalPerceiverIO
from aime_fast.perceiver_io.predictor import PerceiverTokenPredictor
from aime_fast.perceiver_io.tokenizer import VQPTTokenizer

__all__ = ["CausalPerceiverIO", "PerceiverTokenPredictor", "VQPTTokenizer"]
