"""Floating-point operations that a model's forward and backward cannot do without.

A product with a weight counts 2 per entry and row; its backward as much for the input, and as much
again for the weight where that is trained. Attention counts scores and values of the pairs that are
visible. What is recomputed does not count, nor what is no product: norms, rotations, gates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastpref.data.tokenize import Group

# dense bf16, in TFLOP/s, by a part of the device's name; NVIDIA's data sheets
_PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200 NVL": 835,
    "H200": 989,
    "A100": 312,
    "B200": 2250,
    "L40S": 362,
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Flops:
    """What a forward costs: per token, per scored token, per query and key that it sees."""

    token: float
    """The trunk's weights; of experts those that a token goes to."""
    target: float
    """The head's weights."""
    pair: float
    """Attention of all layers without a window."""
    near_pair: float
    """Attention of all layers with one."""
    window: int | None
    trained_token: float
    """The part of ``token`` that is of trained weights."""
    trained_target: float

    def forward(self, group: Group, *, share: bool = True) -> float:
        """Of a group, whose prompt is computed once, or once per completion."""
        spans = list(_spans(group, share))
        return _tokens(spans) * self.token + _targets(group) * self.target + self._attention(spans)

    def step(self, group: Group, *, share: bool = True) -> float:
        """Of a group's forward and backward."""
        spans = list(_spans(group, share))
        tokens, targets = _tokens(spans), _targets(group)
        weights = 2 * (tokens * self.token + targets * self.target)
        trained = tokens * self.trained_token + targets * self.trained_target
        return weights + trained + 3 * self._attention(spans)

    def _attention(self, spans: list[tuple[int, int]]) -> float:
        every, near = (
            sum(_visible(*span, window) for span in spans) * cost if cost else 0.0
            for cost, window in ((self.pair, None), (self.near_pair, self.window))
        )
        return every + near


def _spans(group: Group, share: bool) -> Iterator[tuple[int, int]]:
    """The positions that are computed of each sequence: its first and past its last."""
    prompt = len(group.prompt)
    for i, completion in enumerate(group.completions):
        yield (prompt if share and i else 0), prompt + len(completion)


def _tokens(spans: list[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in spans)


def _targets(group: Group) -> int:
    return sum(
        len(tokens) if flags is None else sum(flags)
        for tokens, flags in zip(group.completions, group.scored, strict=True)
    )


def _visible(start: int, stop: int, window: int | None) -> int:
    """Keys that the queries at these positions see, together."""
    if window is None or stop <= window:
        return (stop * (stop + 1) - start * (start + 1)) // 2
    if start >= window:
        return (stop - start) * window
    return _visible(start, window, None) + (stop - window) * window


def flops_of(trunk: nn.Module, head: nn.Linear, config: Any) -> Flops:
    """Counted off a model's weights."""
    experts = next((n for name in EXPERTS if (n := getattr(config, name, None))), None)
    routed = getattr(config, "num_experts_per_tok", None)
    share = routed / experts if routed and experts else 1.0
    token = trained = 0.0
    for name, entries, is_trained in _weights(trunk):
        part = 2.0 * entries * (share if ".experts." in f".{name}." else 1.0)
        token += part
        trained += part * is_trained
    target = 2.0 * head.in_features * head.out_features
    layers, windowed = _attention_layers(config)
    heads = getattr(config, "num_attention_heads", None) or 0
    each = 2.0 * heads * sum(head_sizes(config)) if heads else 0.0  # scores and values
    return Flops(
        token,
        target,
        pair=each * (layers - windowed),
        near_pair=each * windowed,
        window=getattr(config, "sliding_window", None),
        trained_token=trained,
        trained_target=target * head.weight.requires_grad,
    )


def _weights(trunk: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """(name, entries, whether trained) of every weight that multiplies rows."""
    taken = set()
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Embedding):
            taken.add(id(module.weight))
        elif isinstance(module, nn.Linear):  # by its sizes: a quantised weight has fewer entries
            taken.add(id(module.weight))
            entries = module.in_features * module.out_features
            yield name, entries, module.weight.requires_grad
    for name, p in trunk.named_parameters():
        if p.ndim >= 2 and id(p) not in taken:
            yield name, p.numel(), p.requires_grad


def head_sizes(config: Any) -> tuple[int, int]:
    """(of a key, of a value), entries of one head."""
    compressed = getattr(config, "qk_nope_head_dim", None)  # latent attention: keys of two parts
    if compressed is not None:
        return compressed + config.qk_rope_head_dim, config.v_head_dim
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size, size


def _attention_layers(config: Any) -> tuple[int, int]:
    """(layers of attention, those of them with a window)."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        layers = config.num_hidden_layers
        return layers, 0 if getattr(config, "sliding_window", None) is None else layers
    windowed = sum(kind in ("sliding_attention", "hybrid_sliding") for kind in kinds)
    full = sum(kind in ("full_attention", "attention", "hybrid") for kind in kinds)
    return windowed + full, windowed


def peak_flops(device_name: str) -> float | None:
    """The most operations a second that a device does in bf16, by its name; None if unknown."""
    for part, tera in _PEAKS.items():
        if part.lower() in device_name.lower():
            return tera * 1e12
    return None
