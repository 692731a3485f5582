"""A language model's head that gives log-probs without logits.

Letters: H hidden size, V vocabulary, M scored tokens.
"""

from typing import overload

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fastpref.kernels.linear_kl import linear_kl
from fastpref.kernels.linear_logp import linear_logp_stats
from fastpref.kernels.logp_from_logits import TokenStats

# model type -> (config attribute, whether the logits are divided by it)
_LOGIT_SCALE = {
    "cohere": ("logit_scale", False),
    "cohere2": ("logit_scale", False),
    "cohere2_moe": ("logit_scale", False),
    "cohere_compass_text": ("logit_scale", False),
    "falcon_h1": ("lm_head_multiplier", False),
    "granite": ("logits_scaling", True),
    "granite_swa": ("logits_scaling", True),
    "granitemoe": ("logits_scaling", True),
    "granitemoe_swa": ("logits_scaling", True),
    "granitemoehybrid": ("logits_scaling", True),
    "granitemoeshared": ("logits_scaling", True),
    "hyperclovax": ("logits_scaling", False),  # the same name, but multiplied
    "inkling_text": ("logits_mup_width_multiplier", True),
    "minicpm3": ("logits_scaling", True),
}
_LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_scale(config: PretrainedConfig) -> float:
    """What the model multiplies its logits by, read from its config; 1 where nothing is said."""
    name, divides = _LOGIT_SCALE.get(config.model_type, ("", False))
    value = getattr(config, name, None) if name else None
    if value is None:
        return 1.0
    return 1.0 / float(value) if divides else float(value)


def logit_softcap(config: PretrainedConfig) -> float | None:
    """The cap of cap * tanh(logits / cap), read from the config; None where there is none."""
    values = [value for name in _LOGIT_CAPS if (value := getattr(config, name, None)) is not None]
    return float(values[0]) if values else None


class LogpHead(nn.Linear):
    """nn.Linear that can also score targets straight from hidden states.

    The weight is read inside this forward and nowhere else, so that ZeRO-3 and FSDP gather it.

    Args:
        linear: the head to replace; its parameters are taken over, not copied.
        scale: what the model multiplies its logits by.
        softcap: the cap of cap * tanh(logits / cap), after the scale; None for none.
    """

    def __init__(self, linear: nn.Linear, *, scale: float = 1.0, softcap: float | None = None):
        super().__init__(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        self.weight = linear.weight
        self.bias = linear.bias
        self.logit_scale = scale
        self.softcap = softcap
        self.workspace: int | None = None  # bytes for linear_logp; None: its default
        self.train(linear.training)

    @overload
    def forward(self, hidden: Tensor) -> Tensor: ...

    @overload
    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        *,
        rows: Tensor | None = None,
        outputs: tuple[str, ...] = (),
        temperature: float = 1.0,
        entropy_grad: bool = False,
    ) -> TokenStats: ...

    def forward(
        self,
        hidden: Tensor,
        target: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        outputs: tuple[str, ...] = (),
        temperature: float = 1.0,
        entropy_grad: bool = False,
    ) -> Tensor | TokenStats:
        """Logits (..., V) of nn.Linear without target; with it linear_logp_stats: log-probs (M,)
        in nats and the named statistics, scale and cap included. Autocast means to it what it means
        to nn.Linear: products of hidden and weight in the lower dtype.
        """
        if target is None:
            return super().forward(hidden)
        hidden, weight, bias = self._operands(hidden)
        return linear_logp_stats(
            hidden,
            weight,
            target,
            bias=bias,
            rows=rows,
            temperature=temperature,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            outputs=outputs,
            workspace=self.workspace,
            entropy_grad=entropy_grad,
        )

    def _operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden, weight and bias as autocast has them."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if not torch.is_autocast_enabled(hidden.device.type):
            return hidden, weight, bias
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

    def kl(
        self, hidden: Tensor, ref_hidden: Tensor, reference: "LogpHead", *, rows: Tensor
    ) -> Tensor:
        """(M,) KL(reference || self) in nats, over the full vocabulary; linear_kl of both heads."""
        hidden, weight, bias = self._operands(hidden)
        ref_hidden, ref_weight, ref_bias = reference._operands(ref_hidden)
        return linear_kl(
            hidden,
            weight,
            ref_hidden,
            ref_weight,
            bias=bias,
            ref_bias=ref_bias,
            rows=rows,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            workspace=self.workspace,
        )
