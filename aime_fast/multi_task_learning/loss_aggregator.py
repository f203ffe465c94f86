"""LossAggregator: the model's loss terms -> the four task losses that RGB balances."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from aime_fast.config import LossConfig
from aime_fast.runtime import streams

AIME_NAMES = {"lambda_att_dyn": "lambda_attention_motion"}  # keywords of AIME's texts
OUTCOMES = ("reward", "continuation")
OVERSHOOT = ("overshoot_recon", "overshoot_latent", "overshoot_attention")
TASKS = ("elbo", "perceiver", "predictive", "adversarial")

# The side stream on which `infer_and_score` computes most of a task, None: the present one. In the order in which to differentiate them:
# kernels of one stream run in the order in which they were given to it, and of the orders measured this is the fastest (docs/log.md).
BESIDE = {"perceiver": "perceiver", "predictive": "attention", "elbo": None, "adversarial": "adversary"}

# In the order of computation: the first term that is not finite is where a fault began.
TERMS = (
    "commitment", "token_reconstruction", "next_token", "context_recall", "recon", "kl_z", "kl_hierarchical", "kl_attention",
    "mixture_entropy", *OUTCOMES, "gram", "attention_motion", "attention_foreground", "diversity", *OVERSHOOT, "generator",
    "feature_matching",
)  # fmt: skip


class LossAggregator:
    """Weighs and adds the loss terms.

        elbo        = (lambda_recon recon + beta (KL_z + KL_hierarchical) - entropy_weight H(pi)
                       + lambda_overshoot (roll-out: recon + latent) + lambda_outcome (reward + continuation)) / D + lambda_gram Gram
        perceiver   = lambda_commitment VQ commitment + token reconstruction + next-token cross-entropy + lambda_recall context recall
        predictive  = lambda_attention_motion attention motion + diversity + lambda_attention_foreground KL(foreground || attention)
                      + lambda_kl_attention (KL_attention + lambda_overshoot KL_attention of the roll-out)
        adversarial = lambda_gan generator loss + lambda_fm feature matching

    D is the number of pixel values in a frame: the terms in nats a frame become nats a dimension, which does not change their optimum
    and brings their gradient to the size of the other three tasks'. Gram and the KL of attention are not divided, a departure from the
    specification: a mean of squares and at most some nats a frame, both without effect beside D pixels (docs/architecture.md).
    """

    def __init__(self, config: LossConfig | None = None, **weights: float | bool):
        """Args: config, the weights, by default `LossConfig()`; weights, single fields that replace its own; `AIME_NAMES` too."""
        self.config = config or LossConfig()
        for name, weight in weights.items():
            self.config = dataclasses.replace(self.config, **{AIME_NAMES.get(name, name): weight})

    def compute_losses(
        self, outputs: Mapping[str, Tensor], beta: float | Tensor = 1.0, adversarial: bool = True, overshoot: float | Tensor = 1.0
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Combines the terms of `forward_sequence`.

        Args:
            outputs: what `forward_sequence` returned.
            beta: warm-up factor, 0 to 1; multiplies the configured beta.
            adversarial: False before the adversarial task begins: its loss is then 0, without gradient.
            overshoot: warm-up factor, 0 to 1; multiplies the configured lambda_overshoot.

        Returns:
            (every term and task loss by name, [elbo, perceiver, predictive, adversarial]). With side streams a task loss is ready on the
            stream of its task (`BESIDE`) alone, until all have joined.

        Raises:
            KeyError: a loss term is missing from `outputs`.
        """
        keys = set(outputs.keys())
        if missing := [name for name in TERMS if name not in keys]:
            raise KeyError(f"compute_losses: outputs lack {', '.join(missing)}; pass what forward_sequence returned")
        term = {name: outputs[name] for name in TERMS}
        weighed = {
            "elbo": partial(self.elbo, pixels=outputs["reconstructions"].shape[-3:].numel(), beta=beta, overshoot=overshoot),
            "perceiver": self.perceiver,
            "predictive": partial(self.predictive, overshoot=overshoot),
            "adversarial": partial(self.adversarial, on=adversarial),
        }
        task = {}
        streams.fork(*BESIDE.values())
        for name in TASKS:  # each where its backward pass is to begin
            with streams.on(BESIDE[name]):
                task[name] = weighed[name](term)
        return term | task, list(task.values())

    def elbo(self, term: Mapping[str, Tensor], pixels: int, beta: float | Tensor = 1.0, overshoot: float | Tensor = 1.0) -> Tensor:
        """The loss of the ELBO task, of its terms by name; `pixels`: D."""
        c = self.config
        nats = (
            c.lambda_recon * term["recon"]
            + beta * c.beta * (term["kl_z"] + term["kl_hierarchical"])
            - c.entropy_weight * term["mixture_entropy"]
            + overshoot * c.lambda_overshoot * (term["overshoot_recon"] + term["overshoot_latent"])
            + c.lambda_outcome * (term["reward"] + term["continuation"])
        )
        return nats / pixels + c.lambda_gram * term["gram"]

    def perceiver(self, term: Mapping[str, Tensor]) -> Tensor:
        """The loss of the perceiver task, of its terms by name."""
        c = self.config
        weighed = c.lambda_commitment * term["commitment"] + c.lambda_recall * term["context_recall"]
        return weighed + term["token_reconstruction"] + term["next_token"]

    def predictive(self, term: Mapping[str, Tensor], overshoot: float | Tensor = 1.0) -> Tensor:
        """The loss of the predictive task, of its terms by name."""
        c = self.config
        kl_attention = term["kl_attention"] + overshoot * c.lambda_overshoot * term["overshoot_attention"]
        return (
            c.lambda_attention_motion * term["attention_motion"]
            + c.lambda_attention_foreground * term["attention_foreground"]
            + c.lambda_kl_attention * kl_attention
            + c.enforce_diversity * term["diversity"]
        )

    def adversarial(self, term: Mapping[str, Tensor], on: bool = True) -> Tensor:
        """The loss of the adversarial task, of its terms by name; 0, without gradient, where it is not on."""
        c = self.config
        generator = c.lambda_gan * term["generator"] + c.lambda_fm * term["feature_matching"]
        return generator if on else torch.zeros_like(generator)
