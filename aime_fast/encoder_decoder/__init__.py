"""Pillar 2, representation: frame encoder and decoder, likelihoods, discriminators."""

from aime_fast.encoder_decoder.decoder import VAEDecoder
from aime_fast.encoder_decoder.discriminators import ImageDiscriminator, TemporalDiscriminator
from aime_fast.encoder_decoder.encoder import VAEEncoder

__all__ = ["ImageDiscriminator", "TemporalDiscriminator", "VAEDecoder", "VAEEncoder"]
