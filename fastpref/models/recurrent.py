"""Models whose layers carry a state from token to token: one sequence a row, no shared prompt.

Letters: B sequences, L tokens of the longest, T tokens of all.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpref.data.packing import Batch
from fastpref.models.attention import ModelError

# config attributes that list the kinds of a model's layers, newest first
_LISTS = ("layer_types", "layers_block_type", "block_types")
# kinds that mix tokens outside attention; "hybrid" layers do both
_RECURRENT = {
    "conv",
    "hybrid",
    "hybrid_sliding",
    "linear_attention",
    "mamba",
    "recurrent",
}


def recurrence(model: PreTrainedModel) -> str | None:
    """Why completions of this model cannot share a prompt; None where nothing says so.

    What the config does not say, the perturbation test of check_agreement finds.
    """
    for name in _LISTS:
        kinds = set(getattr(model.config, name, None) or ()) & _RECURRENT
        if kinds:
            return f"its layers of kind {', '.join(sorted(kinds))} carry a state along the row"
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state along the row"
    return None


def to_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """Segments of an unshared batch as rows, padded on the right with id 0; no sync.

    Returns:
        The ids (B, L) int64, and (T,) int64: where each token stands in them, flattened.

    Raises:
        ModelError: the batch shares prompts.
    """
    segments, total = batch.segments, len(batch.input_ids)
    if len(segments.k_index) != total:
        raise ModelError(
            "need a batch of pack(groups, share=False) for a model with recurrent layers, got one"
            " whose completions share prompts"
        )
    count, longest = len(segments.bounds), segments.max_q
    device = batch.input_ids.device
    starts = segments.cu_q[:-1].long()
    shift = longest * torch.arange(count, device=device) - starts
    index = torch.arange(total, device=device)
    index += torch.repeat_interleave(shift, segments.cu_q.diff(), output_size=total)
    ids = batch.input_ids.new_zeros(count * longest).index_copy(0, index, batch.input_ids)
    return ids.view(count, longest), index
