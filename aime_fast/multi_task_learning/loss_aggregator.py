"""LossAggregator: the model's loss terms -> the four task losses that RGB balances."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

OVERSHOOT = ("overshoot_recon", "overshoot_latent", "overshoot_attention", "overshoot_context")
TASKS = ("elbo", "perceiver", "predictive", "adversarial")

# in the order of computation, so that the first non-finite term is the one to look at
TERMS = (
    "commitment", "token_reconstruction", "next_token", "recon", "kl_z", "kl_hierarchical", "kl_attention", "mixture_entropy", "gram",
    "attention_dynamics", "diversity", *OVERSHOOT, "generator", "feature_matching",
)  # fmt: skip


class LossAggregator:
    """Weighs and adds the loss terms.

        elbo        = lambda_recon recon + beta (KL_z + KL_hierarchical + KL_attention) - entropy_weight H(pi) + lambda_gram Gram
                      + lambda_overshoot (roll-out: recon + latent + attention + context)
        perceiver   = lambda_commitment VQ commitment + token reconstruction + next-token cross-entropy
        predictive  = lambda_att_dyn attention dynamics + diversity
        adversarial = lambda_gan generator loss + lambda_fm feature matching

    The ELBO terms are in nats a frame. Its task loss is divided by the number of pixel values in a frame (nats a dimension), a
    constant that leaves its optimum alone and brings its gradient to the size of the other three.
    """

    def __init__(
        self,
        lambda_recon: float = 1.0,
        beta: float = 1.0,
        entropy_weight: float = 0.1,
        lambda_gram: float = 0.05,
        lambda_overshoot: float = 0.5,
        lambda_commitment: float = 0.25,
        lambda_att_dyn: float = 0.1,
        lambda_gan: float = 0.1,
        lambda_fm: float = 1.0,
        enforce_diversity: bool = True,
    ):
        self.lambda_recon, self.beta = lambda_recon, beta
        self.entropy_weight, self.lambda_gram = entropy_weight, lambda_gram
        self.lambda_overshoot = lambda_overshoot
        self.lambda_commitment, self.lambda_att_dyn = lambda_commitment, lambda_att_dyn
        self.lambda_gan, self.lambda_fm = lambda_gan, lambda_fm
        self.enforce_diversity = enforce_diversity

    def compute_losses(
        self, outputs: Mapping[str, Tensor], beta: float | Tensor = 1.0, adversarial: bool = True, overshoot: float | Tensor = 1.0
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Combines the terms of `forward_sequence`.

        Args:
            outputs: what `forward_sequence` returned.
            beta: warm-up factor, 0 to 1; multiplies the configured beta.
            adversarial: False while the generator does not play against the discriminators yet: its loss is then 0, without gradient.
            overshoot: warm-up factor, 0 to 1; multiplies the configured lambda_overshoot.

        Returns:
            (every term and task loss by name, [elbo, perceiver, predictive, adversarial]).

        Raises:
            KeyError: a loss term is missing from `outputs`.
        """
        keys = set(outputs.keys())
        if missing := [name for name in TERMS if name not in keys]:
            raise KeyError(f"compute_losses: outputs lack {', '.join(missing)}; pass what forward_sequence returned")
        term = {name: outputs[name] for name in TERMS}
        kl = term["kl_z"] + term["kl_hierarchical"] + term["kl_attention"]
        elbo = (
            self.lambda_recon * term["recon"]
            + beta * self.beta * kl
            - self.entropy_weight * term["mixture_entropy"]
            + self.lambda_gram * term["gram"]
            + overshoot * self.lambda_overshoot * sum(term[name] for name in OVERSHOOT)
        )
        generator = self.lambda_gan * term["generator"] + self.lambda_fm * term["feature_matching"]
        task = {
            "elbo": elbo / outputs["reconstructions"].shape[-3:].numel(),
            "perceiver": self.lambda_commitment * term["commitment"] + term["token_reconstruction"] + term["next_token"],
            "predictive": self.lambda_att_dyn * term["attention_dynamics"] + self.enforce_diversity * term["diversity"],
            "adversarial": generator if adversarial else torch.zeros_like(generator),
        }
        return term | task, [task[name] for name in TASKS]
