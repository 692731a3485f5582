"""Activations that wait for the backward in pinned host memory."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# bytes; copying less costs more than it frees
LEAST = 1 << 20


def on_host(model: nn.Module) -> saved_tensors_hooks:
    """A context: what autograd saves of a forward inside it waits in host memory.

    Parameters and their views stay where they are, and so does what is smaller than a MiB. Under
    non-reentrant checkpointing a layer saves its inputs alone, and these are what goes.

    Args:
        model: whose parameters stay.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    # torch's save_on_cpu waits for each copy; here the stream's order makes them right: the device
    # memory is reused, and the copy read back, by what is queued behind the copy
    def pack(saved: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if saved.nbytes < LEAST or saved.untyped_storage().data_ptr() in parameters:
            return saved
        host = torch.empty_like(saved, device="cpu", pin_memory=saved.is_cuda)
        host.copy_(saved, non_blocking=True)
        return saved.device, host

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
