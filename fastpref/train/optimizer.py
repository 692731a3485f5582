"""AdamW over what is trained: fp32 masters of half weights, moments in 8 bits where asked for."""

import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from fastpref.models.quantize import is_quantized
from fastpref.train.config import BITSANDBYTES, ConfigError

# bitsandbytes leaves the moments of smaller tensors in fp32
LEAST_8BIT = 4096


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW and its schedule, in the field's terms."""

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    schedule: str = "linear"
    schedule_kwargs: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    optim: str = "adamw_torch_fused"
    fp32_master_weights: bool = True


class Optimizer:
    """Clipped AdamW steps and their schedule.

    A trained parameter that is half has an fp32 master: its gradients add up there over the
    micro-batches, are clipped there and take effect there; the parameter is the master, rounded.
    That is 18 bytes a parameter (weight 2, master 4, gradient 4, moments 8) where fp32 weights
    take 16. A bf16 weight without a master takes 8, but a step below a 512th of its size is lost.

    Args:
        model: on its final device; parameters that require a gradient are trained.
        spec: of the steps.

    Raises:
        ValueError: nothing requires a gradient.
    """

    def __init__(self, model: nn.Module, spec: OptimizerSpec) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("the model has no parameter that requires a gradient")
        self.spec = spec
        self.masters: dict[Tensor, Tensor] = {
            p: p.detach().float()
            for p in trained
            if spec.fp32_master_weights and torch.finfo(p.dtype).bits < 32
        }
        self.weights = [self.masters.get(p, p) for p in trained]
        # biases and norms are vectors; decaying them is not what weight decay is for
        groups = [
            {"params": [w for w in self.weights if w.ndim >= 2], "weight_decay": spec.weight_decay},
            {"params": [w for w in self.weights if w.ndim < 2], "weight_decay": 0.0},
        ]
        embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        self.embeddings = [self.masters.get(p, p) for p in embeddings if p.requires_grad]
        self.broken = torch.zeros((), dtype=torch.bool, device=trained[0].device)
        self.adamw = self.make_adamw([g for g in groups if g["params"]])
        self.schedule = get_scheduler(
            spec.schedule,
            self.adamw,
            num_warmup_steps=spec.warmup_steps,
            num_training_steps=spec.total_steps,
            scheduler_specific_kwargs=spec.schedule_kwargs or None,
        )

    def make_adamw(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        spec = self.spec
        common: Any = {"lr": spec.learning_rate, "betas": spec.betas, "eps": spec.epsilon}
        if spec.optim not in BITSANDBYTES:
            return torch.optim.AdamW(groups, **common, fused=True)
        bnb = importlib.import_module("bitsandbytes.optim")
        manager = bnb.GlobalOptimManager.get_instance()
        for weight in self.embeddings:  # in fp32, as transformers has it: most rows are rarely seen
            manager.override_config(weight, "optim_bits", 32)
            # it knows tensors by their address, which another may have after this one
            weakref.finalize(weight, manager.pid2config.pop, id(weight), None)
        paged = spec.optim.startswith("paged")
        adamw: torch.optim.Optimizer = bnb.AdamW(groups, **common, optim_bits=8, is_paged=paged)
        return adamw

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around a backward: a half gradient goes to its master as it comes, and is freed."""
        halves: Any = self.masters  # torch leaves the hook's registration untyped
        hooks = [p.register_post_accumulate_grad_hook(self.accumulate) for p in halves]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def accumulate(self, half: Tensor) -> None:
        master, gradient = self.masters[half], half.grad
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad += gradient
        half.grad = None

    def step(self, loss: Tensor) -> tuple[Tensor, float]:
        """Clip, step, advance the schedule, and forget the gradients.

        Args:
            loss: () whatever the step's gradients are of; looked at for being finite alone.

        Returns:
            The gradients' norm before clipping, (), and the rate that was used. From the first loss
            or norm on that is not finite the weights stay as they are.
        """
        limit = self.spec.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.weights, limit)
        self.broken = self.broken | ~torch.isfinite(norm) | ~torch.isfinite(loss)
        rate = float(self.adamw.param_groups[0]["lr"])
        if self.spec.optim not in BITSANDBYTES:
            # the fused step reads this on the device and then changes nothing: no sync
            self.adamw.found_inf = self.broken.float()  # type: ignore[attr-defined]
            self.adamw.step()
        elif not self.broken:  # a sync, where bitsandbytes itself makes one for every tensor
            self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(list(self.masters), list(self.masters.values()))
        return norm, rate

    def nbytes(self) -> int:
        """Bytes that state_dict holds once there are moments."""
        masters = sum(master.nbytes for master in self.masters.values())
        if self.spec.optim not in BITSANDBYTES:
            return masters + 2 * sum(weight.nbytes for weight in self.weights)
        wide = {id(weight) for weight in self.embeddings}
        large = [w for w in self.weights if w.numel() >= LEAST_8BIT and id(w) not in wide]
        numbers, narrow = (sum(w.numel() for w in ws) for ws in (self.weights, large))
        # of narrow ones a byte each, and an fp32 scale for 256
        return masters + 8 * (numbers - narrow) + 2 * (narrow + 4 * narrow // 256)

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.adamw.state_dict(),
            "schedule": self.schedule.state_dict(),
            "masters": list(self.masters.values()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for master, saved in zip(self.masters.values(), state["masters"], strict=True):
            master.copy_(saved)


def check_optim(optim: str, device: torch.device) -> None:
    """Raise ConfigError for an optimizer that cannot run here, before anything is loaded."""
    if optim not in BITSANDBYTES:
        return
    try:
        importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ConfigError(
            f"need bitsandbytes for optim {optim!r}, got {error}: pip install 'fastpref[quant]'"
        ) from error
    if optim.startswith("paged") and device.type != "cuda":
        raise ConfigError(f"need a CUDA device for optim {optim!r}, got {device.type}")


def check_dtypes(model: nn.Module) -> None:
    """Raise ConfigError for fp16 weights: gradients below 6e-8 would vanish without a word."""
    packed = is_quantized(model)  # frozen, and stored in any dtype
    halves = [
        name
        for name, p in model.named_parameters()
        if p.dtype == torch.float16 and (p.requires_grad or not packed)
    ]
    if halves:
        raise ConfigError(
            f"need float32 or bfloat16 weights to train, got {len(halves)} in float16"
            f" ({halves[0]}), whose gradients need a loss scaler, which is not there: set dtype"
        )
