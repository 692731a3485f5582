"""The pairwise losses: one function each, one line of the table each; P pairs, values (P,).

A loss's signature says what it reads of a pair, by these names:
  chosen_logps, ref_chosen_logps   log pi(y_w|x), log pi_ref(y_w|x), summed over tokens, in nats
  chosen_logratios                 l_w = log pi - log pi_ref
  chosen_scores                    f'(pi/pi_ref) of an f-divergence; l_w for the reverse KL
  chosen_lengths                   |w|, scored tokens
  chosen_mean_logps, chosen_nll    p_w = log pi / |w|; -p_w
  chosen_kl                        sum over positions of KL(pi_ref || pi), over the full vocabulary
the same of the rejected completion l; margin, win_rate: numbers of the pair; beta, label_smoothing;
and options of its own. D = l_w - l_l. A name that TRL has means TRL's number.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Number = Tensor | float


def _smoothed(h: Tensor, label_smoothing: float) -> Tensor:
    # -(1-e) log s(h) - e log s(-h): e is the probability that the label is wrong
    if label_smoothing == 0:  # half the operations
        return -logsigmoid(h)
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def sigmoid(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    margin: Number | None = None,
) -> Tensor:
    """-(1-e) log s(h) - e log s(-h), h = beta D - margin: DPO, and cDPO where e > 0.

    Source: arXiv:2305.18290, eq. 7; margin as in Llama 2, arXiv:2307.09288.
    """
    h = beta * (chosen_scores - rejected_scores)
    return _smoothed(h if margin is None else h - margin, label_smoothing)


def robust(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """(-(1-e) log s(h) + e log s(-h)) / (1 - 2e), h = beta D: unbiased where labels flip.

    Source: arXiv:2403.00409.
    """
    h, e = beta * (chosen_scores - rejected_scores), label_smoothing
    return (-(1 - e) * logsigmoid(h) + e * logsigmoid(-h)) / (1 - 2 * e)


def ipo(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    """(l_w/|w| - l_l/|l| - 1/(2 beta))^2: per token.

    Source: arXiv:2310.12036, eq. 17, averaged as TRL does.
    """
    gap = chosen_scores / chosen_lengths - rejected_scores / rejected_lengths
    return (gap - 1 / (2 * beta)) ** 2


def ipo_sum(chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float) -> Tensor:
    """(D - 1/(2 beta))^2. Source: arXiv:2310.12036, eq. 17, over summed log-probs."""
    return (chosen_scores - rejected_scores - 1 / (2 * beta)) ** 2


def hinge(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, margin: Number | None = None
) -> Tensor:
    """max(0, 1 - (beta D - margin)). Source: arXiv:2309.06657 (RSO)."""
    h = beta * (chosen_scores - rejected_scores)
    return (1 - (h if margin is None else h - margin)).relu()


def slic(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    slic_delta: float = 1.0,
    slic_lambda: float = 0.1,
) -> Tensor:
    """max(0, delta - log pi_w + log pi_l) - lambda log pi_w. Source: arXiv:2305.10425."""
    return (slic_delta - chosen_logps + rejected_logps).relu() - slic_lambda * chosen_logps


def exo_pair(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, label_smoothing: float = 1e-3
) -> Tensor:
    """q log(q/(1-e)) + (1-q) log((1-q)/e), q = s(beta D). Source: arXiv:2402.00856, eq. 16."""
    if label_smoothing <= 0:
        need = "need label_smoothing above 0 for loss_type 'exo_pair' (the paper's is 1e-3)"
        raise ValueError(f"{need}, got {label_smoothing}")
    h = beta * (chosen_scores - rejected_scores)
    wins = h.sigmoid() * (logsigmoid(h) - math.log1p(-label_smoothing))
    return wins + (-h).sigmoid() * (logsigmoid(-h) - math.log(label_smoothing))


def nca_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """-log s(r_w) - log s(-r_w)/2 - log s(-r_l)/2, r = beta l. Source: arXiv:2402.05369."""
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def bco_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """-log s(r_w) - log s(-r_l), r = beta l: BCO without its shift. Source: arXiv:2404.04656."""
    return -logsigmoid(beta * chosen_logratios) - logsigmoid(-beta * rejected_logratios)


def bco_pair_delta(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    delta: Number | None = None,
) -> Tensor:
    """-log s(r_w - d) - log s(d - r_l), r = beta l, d the running mean of all rewards.

    Without ``delta`` that of these pairs. Source: arXiv:2404.04656.
    """
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    if delta is None:
        delta = ((chosen + rejected) / 2).mean().detach()
    return -logsigmoid(chosen - delta) - logsigmoid(delta - rejected)


def sppo(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, win_rate: Number
) -> Tensor:
    """(l_w - (P - 1/2)/beta)^2 + (l_l + (P - 1/2)/beta)^2, P the win rate of w over l.

    Source: arXiv:2405.00675, eq. 4.7, with 1/beta for eta.
    """
    goal = (win_rate - 0.5) / beta
    return (chosen_logratios - goal) ** 2 + (rejected_logratios + goal) ** 2


def sppo_hard(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """sppo where the chosen one always wins. Source: arXiv:2405.00675."""
    return sppo(chosen_logratios, rejected_logratios, beta=beta, win_rate=1.0)


def aot(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """sigmoid of sort(log pi_w - log pi_l) - sort(the same of the reference).

    The losses are of ranks, not of pairs. Source: arXiv:2406.05882.
    """
    gap = (chosen_logps - rejected_logps).sort().values
    gap = gap - (ref_chosen_logps - ref_rejected_logps).sort().values
    return _smoothed(beta * gap, label_smoothing)


def aot_unpaired(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """sigmoid of sort(l_w) - sort(l_l): of ranks, not of pairs. Source: arXiv:2406.05882."""
    gap = chosen_logratios.sort().values - rejected_logratios.sort().values
    return _smoothed(beta * gap, label_smoothing)


def sft(
    chosen_nll: Tensor, *, chosen_lengths: Tensor, mean_chosen_length: Number | None = None
) -> Tensor:
    """-p_w |w| / mean |w|: their mean over pairs is the mean over the chosen ones' tokens.

    ``mean_chosen_length``: tokens, over all pairs of the step; without it over these.
    """
    mean = chosen_lengths.double().mean() if mean_chosen_length is None else mean_chosen_length
    return chosen_nll * (chosen_lengths / mean)


def unlikelihood(
    chosen_logps: Tensor, rejected_logps: Tensor, *, unlikelihood_alpha: float = 0.1
) -> Tensor:
    """-log pi_w + alpha log pi_l: a baseline without bound. Source: arXiv:2305.18290."""
    return -chosen_logps + unlikelihood_alpha * rejected_logps


def discopop(
    chosen_scores: Tensor, rejected_scores: Tensor, *, beta: float, discopop_tau: float = 0.05
) -> Tensor:
    """-(1-m) log s(z) + m exp(-z), z = beta D, m = s(z/tau). Source: arXiv:2406.08414, eq. 5."""
    z = beta * (chosen_scores - rejected_scores)
    # m exp(-z) as one exponential: 0 * inf is NaN
    exponential = (logsigmoid(z / discopop_tau) - z).exp()
    return -(-z / discopop_tau).sigmoid() * logsigmoid(z) + exponential


def apo_zero(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """1 - s(beta l_w) + s(beta l_l). Source: arXiv:2408.06266, eq. 7."""
    return (-beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()


def apo_down(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """s(beta l_w) + 1 - s(beta D). Source: arXiv:2408.06266, eq. 8."""
    gap = chosen_logratios - rejected_logratios
    return (beta * chosen_logratios).sigmoid() + (-beta * gap).sigmoid()


def sigmoid_norm(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    """-log s(beta (l_w/|w| - l_l/|l|)). Source: arXiv:2411.15124 (Tulu 3)."""
    gap = chosen_scores / chosen_lengths - rejected_scores / rejected_lengths
    return -logsigmoid(beta * gap)


def rdpo(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    rdpo_alpha: float = 0.05,
) -> Tensor:
    """-log s(beta D + alpha (|w| - |l|)): a longer winner moves less. Source: arXiv:2403.19159."""
    longer = chosen_lengths - rejected_lengths
    return -logsigmoid(beta * (chosen_scores - rejected_scores) + rdpo_alpha * longer)


def alpha_dpo(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    alpha_dpo_gamma: float = 0.6,
    alpha_dpo_alpha: float = 0.2,
    gap_mean: Number | None = None,
    gap_std: Number | None = None,
) -> Tensor:
    """-log s(beta (p_w - p_l - sg(gamma + alpha (g - mu)/s))), g = l_w/|w| - l_l/|l|.

    mu, s: the moving mean and deviation of g; without them those of these pairs. gamma is the
    paper's gamma / beta. Source: arXiv:2410.10148.
    """
    gap = (chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths).detach()
    mean = gap.mean() if gap_mean is None else gap_mean
    squares = ((gap - mean) ** 2).mean() if gap_std is None else torch.as_tensor(gap_std) ** 2
    shifted = (gap - mean) / squares.sqrt().clamp(min=1e-6)  # one pair has no deviation
    target = alpha_dpo_gamma + alpha_dpo_alpha * shifted
    return -logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps - target))


def modpo(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    margin: Number,
    modpo_weight: float = 0.5,
) -> Tensor:
    """-log s((beta D - margin) / w_0), margin the weighted rewards of the other objectives, w - l.

    Source: arXiv:2310.03708.
    """
    return -logsigmoid((beta * (chosen_scores - rejected_scores) - margin) / modpo_weight)


def rpo(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_nll: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    rpo_alpha: float = 1.0,
) -> Tensor:
    """sigmoid - alpha log pi_w / |w|. Source: arXiv:2404.19733."""
    h = beta * (chosen_scores - rejected_scores)
    return _smoothed(h, label_smoothing) + rpo_alpha * chosen_nll


def rpo_sq(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    margin: Number,
    reward_scale: float = 1.0,
) -> Tensor:
    """(beta D - s margin)^2, margin the rewards' difference. Source: arXiv:2406.11704."""
    return (beta * (chosen_scores - rejected_scores) - reward_scale * margin) ** 2


def _two_sided_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of two coins, whose heads have these log-odds."""
    heads = a.sigmoid() * (logsigmoid(a) - logsigmoid(b))
    return heads + (-a).sigmoid() * (logsigmoid(-a) - logsigmoid(-b))


def rpo_bwd_kl(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    margin: Tensor,
    reward_scale: float = 1.0,
) -> Tensor:
    """KL of coins of log-odds s margin and beta D. Source: arXiv:2406.11704, as in NeMo-Aligner."""
    return _two_sided_kl(reward_scale * margin, beta * (chosen_scores - rejected_scores))


def rpo_fwd_kl(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    margin: Tensor,
    reward_scale: float = 1.0,
) -> Tensor:
    """KL of coins of log-odds beta D and s margin. Source: arXiv:2406.11704, as in NeMo-Aligner."""
    return _two_sided_kl(beta * (chosen_scores - rejected_scores), reward_scale * margin)


def simpo(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
) -> Tensor:
    """-log s(beta (p_w - p_l) - gamma), without a reference. Source: arXiv:2405.14734."""
    h = beta * (chosen_mean_logps - rejected_mean_logps) - simpo_gamma
    return _smoothed(h, label_smoothing)


def cpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_nll: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
) -> Tensor:
    """-log s(beta (log pi_w - log pi_l)) - alpha p_w. Source: arXiv:2401.08417."""
    h = beta * (chosen_logps - rejected_logps)
    return _smoothed(h, label_smoothing) + cpo_alpha * chosen_nll


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logp), which may be as good as 1."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    # log(1 - p) loses p near 0 one way, near 1 the other
    near_one = torch.log(-torch.expm1(logp.clamp(min=-1.0)))
    return logp - torch.where(logp > -math.log(2), near_one, torch.log1p(-logp.exp()))


def orpo(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float) -> Tensor:
    """-p_w - beta log s(odds(p_w) - odds(p_l)), odds(p) = log(e^p / (1 - e^p)); beta is lambda.

    Source: arXiv:2403.07691.
    """
    odds = _log_odds(chosen_mean_logps) - _log_odds(rejected_mean_logps)
    return -chosen_mean_logps - beta * logsigmoid(odds)


def tdpo(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
) -> Tensor:
    """-log s(beta (D - (K_l - K_w))). Source: arXiv:2404.11999."""
    gap = chosen_logratios - rejected_logratios
    return -logsigmoid(beta * (gap - (rejected_kl - chosen_kl)))


def tdpo2(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    tdpo_alpha: float = 0.5,
) -> Tensor:
    """-log s(beta (D - alpha (K_l - sg K_w))). Source: arXiv:2404.11999."""
    gap = chosen_logratios - rejected_logratios
    return -logsigmoid(beta * (gap - tdpo_alpha * (rejected_kl - chosen_kl.detach())))


class Loss(NamedTuple):
    """A line of the table."""

    function: Callable[..., Tensor]
    couples: Literal["", "mean", "sort"] = ""
    """How a loss depends on the log-probs of all pairs: not, by their moments, by their order."""


LOSSES = {
    "sigmoid": Loss(sigmoid),
    "robust": Loss(robust),
    "ipo": Loss(ipo),
    "ipo_sum": Loss(ipo_sum),
    "hinge": Loss(hinge),
    "slic": Loss(slic),
    "exo_pair": Loss(exo_pair),
    "nca_pair": Loss(nca_pair),
    "bco_pair": Loss(bco_pair),
    "bco_pair_delta": Loss(bco_pair_delta, couples="mean"),
    "sppo": Loss(sppo),
    "sppo_hard": Loss(sppo_hard),
    "aot": Loss(aot, couples="sort"),
    "aot_unpaired": Loss(aot_unpaired, couples="sort"),
    "aot_global": Loss(aot, couples="sort"),  # runs sort the whole step under either name
    "sft": Loss(sft),
    "unlikelihood": Loss(unlikelihood),
    "discopop": Loss(discopop),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "sigmoid_norm": Loss(sigmoid_norm),
    "rdpo": Loss(rdpo),
    "alpha_dpo": Loss(alpha_dpo, couples="mean"),
    "modpo": Loss(modpo),
    "rpo": Loss(rpo),
    "rpo_sq": Loss(rpo_sq),
    "rpo_bwd_kl": Loss(rpo_bwd_kl),
    "rpo_fwd_kl": Loss(rpo_fwd_kl),
    "simpo": Loss(simpo),
    "cpo": Loss(cpo),
    "orpo": Loss(orpo),
    "tdpo": Loss(tdpo),
    "tdpo2": Loss(tdpo2),
}
