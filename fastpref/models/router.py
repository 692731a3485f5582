"""The load-balancing loss of mixtures of experts, over the tokens of a whole step.

    loss = E sum_e f_e P_e,   f_e = C_e / N,   P_e = S_e / N

Letters: E experts, N pairs of a token and a layer, C_e how many of them chose expert e, S_e the sum
of their probabilities of it. C carries no gradient and S is a sum over tokens, so the loss is one
of a step however its tokens are cut, once C and N of the whole step are known.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpref.models.attention import ModelError

if TYPE_CHECKING:
    from fastpref.models.model import LogpModel


class RouterLoad(NamedTuple):
    """How the routers spread some tokens over their experts."""

    chosen: Tensor  # (E,) at least fp32: C; no gradient
    probability: Tensor  # (E,) at least fp32: S; differentiable
    rows: Tensor  # () at least fp32: N

    @classmethod
    def of(cls, model: PreTrainedModel, out: Any, index: Tensor | None = None) -> "RouterLoad":
        """The load of a trunk's output, of the rows that ``index`` names where some are padding."""
        layers = getattr(out, "router_logits", None)
        if not layers:
            raise ModelError(
                "need a trunk that returns router_logits for router_aux_loss_coef, got none from"
                f" {type(model).__name__}: set it to 0.0"
            )
        return add_loads([_of_layer(model, logits, index) for logits in layers])

    def nothing(self) -> "RouterLoad":
        """That of no token, differentiable all the same."""
        return RouterLoad(*(0.0 * x for x in self))


def _of_layer(model: Any, logits: Tensor, index: Tensor | None) -> RouterLoad:
    if logits.shape[-1] != model.num_experts:
        raise ModelError(
            f"need router_logits of {model.num_experts} experts for router_aux_loss_coef, got"
            f" {tuple(logits.shape)} from {type(model).__name__}: set it to 0.0"
        )
    logits = logits.flatten(0, -2)
    logits = logits if index is None else logits.index_select(0, index)
    at_least_fp32 = torch.promote_types(logits.dtype, torch.float32)
    probability = logits.softmax(-1, dtype=at_least_fp32)
    top = probability.detach().topk(model.num_experts_per_tok, dim=-1).indices
    chosen = torch.zeros_like(probability).scatter_(-1, top, 1.0).sum(0)
    rows = chosen.new_full((), len(probability))  # a fill, where a copy would sync
    return RouterLoad(chosen, probability.sum(0), rows)


def add_loads(loads: list[RouterLoad]) -> RouterLoad:
    """The load of all their tokens together."""
    return RouterLoad(*(torch.stack(parts).sum(0) for parts in zip(*loads, strict=True)))


def whole_load(loads: list[RouterLoad], all_reduce_sum: Callable[[Tensor], Tensor]) -> RouterLoad:
    """The load of a step, from those of this rank's micro-batches; detached, one collective."""
    load = add_loads(loads)
    flat = torch.cat((load.chosen, load.probability.detach(), load.rows[None]))
    flat = all_reduce_sum(flat)
    chosen, probability = flat[:-1].chunk(2)
    return RouterLoad(chosen, probability, flat[-1])


def balancing_loss(part: RouterLoad, whole: RouterLoad) -> Tensor:
    """What ``part`` adds to the load-balancing loss of ``whole``, which it is a part of.

    Args:
        part: of a micro-batch; its probabilities are differentiable.
        whole: of the step.

    Returns:
        A 0-d tensor, at least fp32, without unit: 0 < loss <= E for one choice a token, and the
        number of choices a token where all experts bear the same load.

    Source:
        Switch Transformer (arXiv 2101.03961), equations 4 to 6, pooled over layers as in
        transformers' load_balancing_loss_func.
    """
    return len(part.chosen) * (whole.chosen * part.probability).sum() / whole.rows**2


def router_coefficient(model: PreTrainedModel, asked: float | None) -> float:
    """The factor of the load-balancing loss: what was asked for, else what the config declares.

    Raises:
        ModelError: asked of a model that has no routers, or whose routers it cannot read.
    """
    routed = hasattr(model.config, "output_router_logits") and bool(
        getattr(model, "num_experts", 0)
    )
    if asked and not routed:
        raise ModelError(
            "need a mixture of experts that returns its router logits for router_aux_loss_coef"
            f" {asked:g}, got {type(model).__name__}"
        )
    if not routed:
        return 0.0
    declared = getattr(model.config, "router_aux_loss_coef", None)
    return float((declared or 0.0) if asked is None else asked)


@contextmanager
def recorded_load(model: "LogpModel", record: bool) -> Iterator[list[RouterLoad]]:
    """Inside, the model's next forward leaves its load in the list, if ``record``."""
    loads: list[RouterLoad] = []
    model.router_loads = loads if record else None
    try:
        yield loads
    finally:
        model.router_loads = None
