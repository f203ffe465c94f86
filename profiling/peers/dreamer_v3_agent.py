"""DreamerV3 as an agent, as TorchRL ships it: the peer of `profiling.bench control`.

Hafner et al., "Mastering Diverse Domains through World Models", arXiv 2301.04104. World model: that of `dreamer_v3.py`, with a head for
continuation. Losses (`DreamerV3Loss`: of model, actor, imagined and replayed values), imagination (`DreamerEnv`), learner
(`DreamerV3OptimizationStepper`, `DreamerV3Optimizer`, `SoftUpdate` of the slow critic), networks (`DreamerV3MLP`, `SymExpTwoHot`) and the
state from frame to frame (`RSSMStateEstimatorV3`) are those of torchrl 0.14. Written out here is what it lacks: an actor of bounded normals
(its example has one, its package only the discrete one), replay by episodes, and a policy that keeps its state.

Rows are those of `DreamerV3.sequences`: with each frame the action and the reward that led to it, zeros with the first of an episode. A
sequence is cut anywhere in an episode and starts from an empty state. The frame after the last action of an episode is not recorded, so
every frame is one that goes on: right for dm_control, whose episodes end by their time limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from profiling.peers.dreamer_v3 import REWARD_BINS, UNIMIX, DreamerV3Config, WorldModel, lead_to

LEAST_STD, MOST_STD = 0.1, 1.0  # of an action


@dataclass(frozen=True)
class DreamerV3AgentConfig(DreamerV3Config):
    """Sizes and optimization, beside those of the world model. What is not said to be otherwise is as published."""

    behaviour_layers: int = 3  # of actor and critic, of width `hidden_dim`
    behaviour_rate: float = 3e-4  # learning rate of actor and critic; published: 4e-5, for runs of millions of frames
    horizon: int = 15  # actions imagined from each replayed frame
    discount: float = 1 - 1 / 333
    return_decay: float = 0.95  # lambda of the returns
    entropy: float = 3e-4  # weight
    reinforce: bool = True  # the actor's gradient by REINFORCE, else through the model
    slow_rate: float = 0.02  # of the moving average of the critic, towards which the critic is regularised
    replay_value: float = 0.3  # weight of the critic's loss on replayed frames
    train_ratio: float = 32.0  # replayed frames for each frame of an agent step; published: 32 to 512


class ActingWorldModel(WorldModel):
    """The world model with a head for continuation. in_keys: what `DreamerV3OptimizationStepper` passes on."""

    def __init__(self, image_size: int, action_dim: int, config: DreamerV3Config):
        super().__init__(image_size, action_dim, config)
        from torchrl.modules import DreamerV3MLP

        self.in_keys = ["state", "belief", "action"]
        self.continuation = DreamerV3MLP(sum(self.sizes), 1, depth=1, num_cells=config.hidden_dim, outscale=0.0)

    def forward(self, sequences: TensorDict) -> TensorDict:
        """As `WorldModel.forward`; adds ("next", "continue_pred") [B, T, 1], logits."""
        out = super().forward(sequences)
        out["next", "continue_pred"] = self.continuation(out["next", "state"], out["next", "belief"])
        return out


class BoundedNormal(nn.Module):
    """State and belief -> mean [..., A] in (-1, 1) and standard deviation [..., A] of an action."""

    def __init__(self, features: int, config: DreamerV3AgentConfig, action_dim: int):
        super().__init__()
        from torchrl.modules import DreamerV3MLP

        self.layers = DreamerV3MLP(features, 2 * action_dim, depth=config.behaviour_layers, num_cells=config.hidden_dim, outscale=0.01)

    def forward(self, state: Tensor, belief: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = self.layers(state, belief).chunk(2, -1)
        return mean.tanh(), LEAST_STD + (MOST_STD - LEAST_STD) * (spread + 2).sigmoid()


class DreamerV3Agent(nn.Module):
    """World model, actor and critic, and how they learn.

    Args:
        image_size: H = W, divisible by 2 to the number of levels.
        action_dim: A.
        seed: of the weights. Samples come from torch's default generator.
        config: sizes and optimization.

    Attributes: updates: made.

    Example:
        >>> agent = DreamerV3Agent(64, 1, seed=0)
        >>> agent.update(replay.draw(16, 16))
        >>> action = agent.policy()(frame)["action"]
    """

    def __init__(self, image_size: int, action_dim: int, seed: int = 0, config: DreamerV3AgentConfig | None = None):
        super().__init__()
        from torchrl.objectives import DreamerV3ActorLoss, DreamerV3Loss, DreamerV3ModelLoss, DreamerV3ValueLoss, SoftUpdate
        from torchrl.objectives.utils import ValueEstimators
        from torchrl.trainers.algorithms.dreamer_v3 import DreamerV3OptimizationStepper, DreamerV3Optimizer

        self.config = c = config or DreamerV3AgentConfig()
        self.action_dim = action_dim
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.world_model = ActingWorldModel(image_size, action_dim, c)
            self.actor, self.value, self.environment, continuation = self._build()
        model = DreamerV3ModelLoss(
            self.world_model, lambda_reco=c.lambda_reco, lambda_continue=1.0, kl_mode="separate", lambda_dynamic=1.0,
            lambda_representation=0.1, unimix=UNIMIX, free_bits=c.free_nats, reco_symlog=False, num_reward_bins=REWARD_BINS,
            detach_output=False,
        )  # fmt: skip
        actor = DreamerV3ActorLoss(
            self.actor, self.value, self.environment, continuation_model=continuation, imagination_horizon=c.horizon,
            entropy_bonus=c.entropy, use_reinforce=c.reinforce,
        )  # fmt: skip
        actor.make_value_estimator(ValueEstimators.TDLambda, gamma=c.discount, lmbda=c.return_decay)
        value = DreamerV3ValueLoss(self.value, value_loss="two_hot", actor_loss=actor, slow_critic_regularization=1.0)
        optimizer = DreamerV3Optimizer(
            [
                {"params": list(self.world_model.parameters()), "lr": c.learning_rate},
                {"params": [*self.actor.parameters(), *value.parameters()], "lr": c.behaviour_rate},
            ],
            warmup_steps=c.warmup_steps,
        )
        losses = DreamerV3Loss(
            model, actor, value, replay_value_loss_weight=c.replay_value, continuation_horizon=1 / (1 - c.discount), lmbda=c.return_decay
        )
        self.learner = DreamerV3OptimizationStepper(losses, optimizer, SoftUpdate(value, tau=c.slow_rate))
        self.updates = 0

    def _build(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """(actor, critic, imagination as an environment, chance that an imagined state is not the last)."""
        from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
        from tensordict.nn import TensorDictModule as Module
        from tensordict.nn import TensorDictSequential as Sequential
        from torchrl.data import Bounded, Composite, Unbounded
        from torchrl.envs.model_based.dreamer import DreamerEnv
        from torchrl.modules import DreamerV3MLP, SymExpTwoHot, WorldModelWrapper
        from torchrl.modules.distributions import IndependentNormal

        model, config, latent = self.world_model, self.config, ["state", "belief"]
        features, (state_dim, belief_dim) = sum(model.sizes), model.sizes
        actor = ProbabilisticTensorDictSequential(
            Module(BoundedNormal(features, config, self.action_dim), in_keys=latent, out_keys=["loc", "scale"]),
            ProbabilisticTensorDictModule(
                in_keys=["loc", "scale"], out_keys=["action"], default_interaction_type=InteractionType.RANDOM,
                distribution_class=IndependentNormal,
            ),
        )  # fmt: skip
        critic = DreamerV3MLP(features, REWARD_BINS, config.behaviour_layers, config.hidden_dim, outscale=0.0)
        value = Sequential(
            Module(critic, in_keys=latent, out_keys=["state_value_logits"]),
            Module(SymExpTwoHot(REWARD_BINS), in_keys=["state_value_logits"], out_keys=["state_value"]),
        )
        reward = Sequential(
            Module(model.reward, in_keys=latent, out_keys=["reward_logits"]),
            Module(SymExpTwoHot(REWARD_BINS), in_keys=["reward_logits"], out_keys=["reward"]),
        )
        transition = Sequential(Module(model.prior, in_keys=[*latent, "action"], out_keys=["_", *latent]))
        environment = DreamerEnv(WorldModelWrapper(transition, reward), prior_shape=(state_dim,), belief_shape=(belief_dim,))
        environment.observation_spec = Composite(state=Unbounded(state_dim), belief=Unbounded(belief_dim))
        environment.state_spec = environment.observation_spec.clone()
        environment.action_spec = Bounded(-1, 1, (self.action_dim,))
        environment.reward_spec = Unbounded((1,))
        continuation = Sequential(
            Module(model.continuation, in_keys=latent, out_keys=["continue_pred"]),
            Module(nn.Sigmoid(), in_keys=["continue_pred"], out_keys=["continuation"]),
        )
        return actor, value, environment, continuation

    def give_mean_frame(self, mean_frame: Tensor) -> None:
        """The encoder then sees the difference from the mean training frame [3, H, W] in [-1, 1], where `config.mean_frame` says so."""
        if self.config.mean_frame != "none":
            self.world_model.seen.copy_((mean_frame + 1) / 2)

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """One update of everything, from sequences [B, T] of `EpisodeReplay.draw`. Returns scalars by name, detached: losses, entropy,
        the range of returns and the like."""
        state, belief = (part[:, None].expand(-1, batch.shape[1], -1) for part in self.world_model.start(len(batch)))
        found = self.learner.step(None, batch.update({"state": state, "belief": belief}))
        self.updates += 1
        return {name: value for name, value in found.items() if value.numel() == 1}

    def policy(self, sample: bool = True) -> DreamerV3Policy:
        """The policy of the weights as they are whenever it acts."""
        return DreamerV3Policy(self, sample)


class DreamerV3Policy(TensorDictModuleBase):
    """Acts frame by frame, as `aime_fast.control.policy.FramePolicy` does. State and last action are forgotten wherever `is_init` is true.

    Args: sample: actions with the actor's noise; else their mean. Latents are sampled in any case, as TorchRL's estimator does it.
    """

    def __init__(self, agent: DreamerV3Agent, sample: bool):
        super().__init__()
        from torchrl.modules import RSSMStateEstimatorV3

        self.in_keys, self.out_keys = ["pixels", "is_init"], ["action"]
        self.model, self.actor, self.sample = agent.world_model, agent.actor, sample
        self.estimator = RSSMStateEstimatorV3(self.model.prior, self.model.posterior)
        self.action_dim = agent.action_dim
        self.memory: TensorDict | None = None  # [N] with state, belief, previous_action

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Adds `action` float32 [*N, A] in [-1, 1] to `pixels` uint8 [*N, H, W, 3] and `is_init` bool [*N, 1]."""
        pixels = tensordict["pixels"]
        frames = pixels.reshape(-1, *pixels.shape[-3:]).permute(0, 3, 1, 2)
        if self.memory is None or len(self.memory) != len(frames):
            state, belief = self.model.start(len(frames))
            none = torch.zeros(len(frames), self.action_dim)
            self.memory = TensorDict({"state": state, "belief": belief, "previous_action": none}, batch_size=[len(frames)])
        embedded = self.model.embed(frames[:, None].float() / 255)[:, 0]
        seen = self.estimator(self.memory.copy().update({"encoded_latents": embedded, "is_init": tensordict["is_init"].reshape(-1, 1)}))
        distribution = self.actor.get_dist(seen)
        action = (distribution.sample() if self.sample else distribution.mean).clamp(-1, 1)
        self.memory = seen.select("state", "belief").set("previous_action", action)
        return tensordict.set("action", action.reshape(*pixels.shape[:-3], -1))


class EpisodeReplay:
    """Whole episodes in memory, and sequences cut from them: any of a length is as likely as any other."""

    def __init__(self, seed: int):
        self.episodes: list[TensorDict] = []
        self._random = np.random.default_rng(seed)

    def add(self, episode: dict[str, np.ndarray]) -> None:
        """Adds an episode as `play_episodes` yields it."""
        pixels, action, reward = (torch.from_numpy(episode[name]) for name in ("pixels", "action", "reward"))
        following = {"pixels": pixels.permute(0, 3, 1, 2).contiguous(), "reward": lead_to(reward[None, :, None])[0]}
        self.episodes.append(TensorDict({"action": lead_to(action[None])[0], "next": following}, batch_size=[len(action)]))

    def mean_frame(self) -> Tensor:
        """[3, H, W] in [-1, 1]."""
        return torch.stack([episode["next", "pixels"].float().mean(0) for episode in self.episodes]).mean(0) / 127.5 - 1

    def draw(self, count: int, length: int) -> TensorDict:
        """Sequences [count, length]: action, is_init (at the first row of each) and, under next, pixels, reward, terminated, done."""
        places = np.array([max(0, len(episode) - length + 1) for episode in self.episodes], dtype=float)
        if not places.any():
            raise ValueError(f"no episode has {length} frames")
        rows = []
        for number in self._random.choice(len(places), count, p=places / places.sum()):
            begin = int(self._random.integers(places[number]))
            rows.append(self.episodes[number][begin : begin + length])
        no = torch.zeros(count, length, 1, dtype=torch.bool)
        start = torch.arange(length)[:, None].eq(0).expand_as(no)
        return torch.stack(rows).update({"is_init": start, "next": {"terminated": no, "done": no}})
