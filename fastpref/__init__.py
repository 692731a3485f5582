"""fastpref: learn from preferences with language models.

The ops need torch alone; ``fastpref.sft``, ``dpo`` and ``kto`` train, and need ``fastpref[train]``.
"""

from typing import TYPE_CHECKING, Any

from fastpref.kernels.gae import PPOAdvantages, gae, ppo_advantages
from fastpref.kernels.gather_rows import gather_rows
from fastpref.kernels.linear_kl import linear_kl
from fastpref.kernels.linear_logp import linear_logp, linear_logp_stats
from fastpref.kernels.logp_from_logits import TokenStats, logp_from_logits, logp_stats_from_logits
from fastpref.kernels.ppo_value import ValueLoss, explained_variance, ppo_value_loss
from fastpref.kernels.whiten import token_moments, whiten
from fastpref.logps import linear_sequence_logp, sequence_logp
from fastpref.losses.advantage import adaptive_kl_coef, group_advantages, token_rewards
from fastpref.losses.pairs import PairLoss, dpo_loss
from fastpref.losses.policy import PolicyLoss, ppo_policy_loss
from fastpref.losses.ranking import RankingLoss, ranking_loss
from fastpref.losses.reward import RewardLoss, reward_loss
from fastpref.losses.unpaired import UnpairedLoss, bco_loss, kto_loss, mismatched_kl

if TYPE_CHECKING:
    from fastpref.train.run import dpo as dpo
    from fastpref.train.run import kto as kto
    from fastpref.train.run import sft as sft

__version__ = "0.1.0"
__all__ = [
    "PPOAdvantages",
    "PairLoss",
    "PolicyLoss",
    "RankingLoss",
    "RewardLoss",
    "TokenStats",
    "UnpairedLoss",
    "ValueLoss",
    "adaptive_kl_coef",
    "bco_loss",
    "dpo_loss",
    "explained_variance",
    "gae",
    "gather_rows",
    "group_advantages",
    "kto_loss",
    "linear_kl",
    "linear_logp",
    "linear_logp_stats",
    "linear_sequence_logp",
    "logp_from_logits",
    "logp_stats_from_logits",
    "mismatched_kl",
    "ppo_advantages",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ranking_loss",
    "reward_loss",
    "sequence_logp",
    "token_moments",
    "token_rewards",
    "whiten",
]


def __getattr__(name: str) -> Any:
    if name in ("dpo", "kto", "sft"):  # a trainer author's import must not pull in transformers
        try:
            from fastpref.train import run
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"fastpref.{name} needs {error.name}: pip install 'fastpref[train]'"
            ) from error
        return getattr(run, name)
    raise AttributeError(f"module 'fastpref' has no attribute {name!r}")
