"""Losses on pairs of sequence log-probs: pure functions in a table, P pairs.

l_w and l_l are log pi/pi_ref of the chosen and the rejected completion, in nats.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairLoss(NamedTuple):
    """What a pairwise loss returns: each (P,); the rewards are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def sigmoid(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    margin: Tensor | float = 0.0,
) -> Tensor:
    """-(1-e) log sigmoid(h) - e log sigmoid(-h), h = beta (l_w - l_l) - margin (DPO and cDPO).

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; margin as in Llama 2, arXiv:2307.09288.
    """
    h = beta * (chosen_logratios - rejected_logratios) - margin
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def ipo(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    """(l_w/|w| - l_l/|l| - 1/(2 beta))^2, per token as TRL has it.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    chosen = chosen_logratios / chosen_lengths.clamp(min=1)
    rejected = rejected_logratios / rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    margin: Tensor | float = 0.0,
) -> Tensor:
    """max(0, 1 - (beta (l_w - l_l) - margin)).

    Source: Zhao et al. 2023, arXiv:2305.10425 (SLiC), with a reference as in TRL.
    """
    return (1 - (beta * (chosen_logratios - rejected_logratios) - margin)).relu()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
}
# every input of a loss by name, and whether it can do without
_INPUTS = {
    name: {p.name: p.default is not p.empty for p in inspect.signature(loss).parameters.values()}
    for name, loss in LOSSES.items()
}


def _inputs(loss_type: str) -> dict[str, bool]:
    if loss_type not in _INPUTS:
        near = difflib.get_close_matches(str(loss_type), _INPUTS, n=1, cutoff=0.0)
        known = ", ".join(_INPUTS)
        raise ValueError(f"need loss_type in {known}; got {loss_type!r}, nearest {near[0]!r}")
    return _INPUTS[loss_type]


def _check(tensors: dict[str, Tensor | None]) -> None:
    shape = next(x.shape for x in tensors.values() if x is not None)
    for name, x in tensors.items():
        if x is not None and (x.ndim != 1 or x.shape != shape):
            raise ValueError(f"need {name} (P,) = {tuple(shape)}, got {tuple(x.shape)}")
        if x is not None and not (x.is_floating_point() or name.endswith("_lengths")):
            raise TypeError(f"need floating-point {name}, got {x.dtype}")


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
) -> PairLoss:
    """Pairwise preference loss of each pair, with its implicit rewards.

    Args:
        chosen_logps: (P,) sequence log-probs of the chosen completions, in nats; floating point,
            differentiable, like rejected_logps.
        rejected_logps: (P,) the same of the rejected ones.
        ref_chosen_logps: (P,) under the reference; None, for both, means zeros (reference-free).
        ref_rejected_logps: (P,) the same of the rejected ones.
        beta: positive.
        loss_type: a name of ``fastpref.losses.preference.LOSSES``; a name that TRL has means TRL's
            number.
        label_smoothing: in [0, 0.5), the probability that a label is wrong ("sigmoid").
        chosen_lengths: (P,) scored tokens of the chosen completions ("ipo").
        rejected_lengths: (P,) the same of the rejected ones ("ipo").
        margin: (P,) subtracted from beta * (l_w - l_l) ("sigmoid", "hinge").
        weight: (P,) multiplies the losses.

    Returns:
        PairLoss of three (P,) tensors, fp32 (fp64 for fp64 inputs): losses, and beta * (log-prob -
        reference log-prob) of chosen and rejected, detached.

    Raises:
        ValueError: a shape or range differs from the above, the type is unknown, lacks an input or
            has no use for one that was given (lengths excepted).
        TypeError: a dtype differs from the above.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; each type names its own.
    """
    wanted = _inputs(loss_type)
    given = {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}
    refs = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    _check({**given, **refs, **lengths, "margin": margin, "weight": weight})
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        alone = [name for name, x in refs.items() if x is not None]
        raise ValueError(f"need both reference log-probs or neither, got {alone[0]} alone")
    if not 0 < beta < float("inf") or not 0 <= label_smoothing < 0.5:
        got = f"{beta} and {label_smoothing}"
        raise ValueError(f"need beta > 0 and label_smoothing in [0, 0.5), got {got}")
    wide = torch.promote_types(chosen_logps.dtype, torch.float32)
    chosen, rejected = chosen_logps.to(wide), rejected_logps.to(wide)
    if ref_chosen_logps is not None and ref_rejected_logps is not None:
        chosen, rejected = chosen - ref_chosen_logps, rejected - ref_rejected_logps
    options = {
        "beta": beta,
        "label_smoothing": label_smoothing or None,
        "margin": margin,
        **lengths,
    }
    lacking = [k for k, optional in wanted.items() if not optional and options.get(k, 0) is None]
    if lacking:
        raise ValueError(f"loss_type {loss_type!r} needs {' and '.join(lacking)}, got None")
    idle = [k for k in ("label_smoothing", "margin") if options[k] is not None and k not in wanted]
    if idle:
        raise ValueError(f"loss_type {loss_type!r} has no {' and no '.join(idle)}, got one")
    used = {k: v for k, v in options.items() if k in wanted and v is not None}
    losses = LOSSES[loss_type](chosen, rejected, **used)
    if weight is not None:
        losses = losses * weight
    return PairLoss(losses, (beta * chosen).detach(), (beta * rejected).detach())
