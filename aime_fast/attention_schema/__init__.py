"""Pillar 4, attention schema: slots infer where the model attends, a prior predicts where it will."""

from aime_fast.attention_schema.posterior import AttentionPosterior
from aime_fast.attention_schema.prior import AttentionPrior
from aime_fast.attention_schema.schema import AttentionSchema
from aime_fast.attention_schema.slot_attention import SlotAttention

__all__ = ["AttentionPosterior", "AttentionPrior", "AttentionSchema", "SlotAttention"]
