"""The engine: where models live, and how gradients become steps. Single process, plain torch."""

import ctypes
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastpref.models.adapters import adapter_state, load_adapters, save_adapters
from fastpref.models.model import LogpModel
from fastpref.models.quantize import is_quantized
from fastpref.train.optimizer import Optimizer, OptimizerSpec

# what save_state writes: a folder without it holds a model alone
STATE = "state.pt"
# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class Engine(Protocol):
    """What the loop needs of one process or of many."""

    rank: int
    world_size: int
    device: torch.device
    model: LogpModel

    def prepare(self, spec: OptimizerSpec) -> None:
        """Build the optimizer and its schedule."""

    def autocast(self) -> AbstractContextManager[None]:
        """The context that forwards run in."""

    def backward(self, loss_sum: Tensor, count: float, *, last: bool) -> None:
        """Add the gradient of loss_sum / count, count being global; last: of this step."""

    def step(self, loss: Tensor) -> tuple[Tensor, float]:
        """Clip, step, advance the schedule: (gradient norm before clipping, rate that was used).

        From the first ``loss`` (0-d) or norm on that is not finite the weights stay as they are.
        """

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""

    def all_gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """The rows of all ranks, which may differ in number, and where this rank's begin."""

    def sizes(self) -> tuple[int, int]:
        """Bytes that save_model writes, and save_state."""

    def save_model(self, folder: Path) -> None:
        """Write the model as plain transformers reads it; where there are adapters, those alone."""

    def save_state(self, folder: Path) -> None:
        """Write what else a resumed run needs: optimizer, schedule, random state."""

    def load_model(self, folder: Path) -> None:
        """Take the weights back from a checkpoint's folder; ValueError where one is missing."""

    def load_state(self, folder: Path) -> None:
        """Take back what save_state wrote."""


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees: a step asks for it again, and new pages cost time.

    Measured: 6 % of the step in bench/dpo_step.py.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    largest = 2**31 - 1
    # the trim threshold alone would leave large blocks to mmap; an old glibc takes 32 MiB at most
    if mallopt and (mallopt(M_MMAP_THRESHOLD, largest) or mallopt(M_MMAP_THRESHOLD, 32 << 20)):
        mallopt(M_TRIM_THRESHOLD, largest)


class TorchEngine:
    """One process, one device."""

    rank = 0
    world_size = 1

    def __init__(self, model: LogpModel, device: torch.device, *, bf16: bool = False) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        # quantised weights lie where they were loaded, and cannot be moved
        self.model = model if is_quantized(model) else model.to(device)
        self.device = device
        self.bf16 = bf16

    def prepare(self, spec: OptimizerSpec) -> None:
        self.optimizer = Optimizer(self.model, spec)

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def backward(self, loss_sum: Tensor, count: float, *, last: bool) -> None:
        with self.optimizer.accumulating():
            (loss_sum / count).backward()  # type: ignore[no-untyped-call]

    def step(self, loss: Tensor) -> tuple[Tensor, float]:
        return self.optimizer.step(loss)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return values

    def all_gather(self, rows: Tensor) -> tuple[Tensor, int]:
        return rows, 0

    def sizes(self) -> tuple[int, int]:
        adapters = self.model.adapters
        saved = self.model.parameters() if adapters is None else adapter_state(adapters).values()
        model = sum(p.nbytes for p in saved)
        return model, self.optimizer.nbytes()

    def save_model(self, folder: Path) -> None:
        if self.model.adapters is not None:
            save_adapters(self.model.adapters, folder)
        else:
            self.model.model.save_pretrained(folder)

    def save_state(self, folder: Path) -> None:
        state = {
            **self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        torch.save(state, folder / STATE)

    def load_model(self, folder: Path) -> None:
        if self.model.adapters is not None:
            load_adapters(self.model.adapters, folder)
            return
        model = self.model.model
        loader: Any = type(model)
        saved, report = loader.from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            got = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
            raise ValueError(f"need every weight of the model in {folder}, got none for {got}")
        model.load_state_dict(saved.state_dict())

    def load_state(self, folder: Path) -> None:
        state = torch.load(folder / STATE, map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state)
        torch.set_rng_state(state["rng"].cpu())
        if state["rng_cuda"]:
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["rng_cuda"]])
