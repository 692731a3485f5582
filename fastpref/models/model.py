"""A causal language model as a trunk and a head that scores packed batches.

Letters: T tokens, H hidden size, M scored tokens.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpref.data.packing import Batch
from fastpref.kernels.logp_from_logits import TokenStats
from fastpref.models.attention import NAME, ModelError
from fastpref.models.attention_backends import Choice, Needs, choose, sdpa_per_segment
from fastpref.models.flops import Flops, flops_of, head_sizes
from fastpref.models.head import LogpHead, logit_scale, logit_softcap
from fastpref.models.offload import on_host
from fastpref.models.recurrent import recurrence, to_rows
from fastpref.models.router import RouterLoad

log = logging.getLogger(__name__)

# config attributes of routers that draw at random in training
_NOISE = ("router_jitter_noise", "input_jitter_noise")


def head_of(model: Any) -> nn.Module:
    """The module that a CausalLM makes its logits with."""
    head: nn.Module = model.get_output_embeddings()
    return head


def trunk_of(model: Any) -> nn.Module:
    """The module that a CausalLM makes the head's hidden states with."""
    trunk: nn.Module = model.get_decoder()
    return trunk


def _check_class(model: PreTrainedModel) -> None:
    who, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ModelError(f"need a decoder-only language model, got the encoder-decoder {who}")
    extra = [name for name in ("vision_config", "audio_config") if getattr(config, name, None)]
    if extra or config.get_text_config() is not config:
        raise ModelError(f"need a model of text alone, got {who} with {extra or 'a text_config'}")
    noise = [name for name in _NOISE if getattr(config, name, None)]
    if noise:
        raise ModelError(
            f"need routers that choose alike in every forward, got {who} with {', '.join(noise)}"
        )
    if getattr(config, "attention_chunk_size", None):
        raise ModelError(f"need attention over whole sequences, got {who} with chunked attention")
    head = head_of(model)
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"need a language model whose head is an nn.Linear, got {who} with"
            f" {type(head).__name__} as head"
        )
    if trunk_of(model) in (model, head):
        raise ModelError(f"need a model made of a trunk and a head, got {who} without a trunk")


def _replace_head(model: PreTrainedModel) -> None:
    old = head_of(model)
    if isinstance(old, LogpHead) or not isinstance(old, nn.Linear):
        return
    name = next(name for name, module in model.named_modules() if module is old)
    new = LogpHead(old, scale=logit_scale(model.config), softcap=logit_softcap(model.config))
    model.set_submodule(name, new)
    if head_of(model) is not new:
        raise ModelError(f"need a head that can be replaced, got {type(model).__name__}.{name}")


def _plain_attention(model: PreTrainedModel) -> str:
    name: str = model.config._attn_implementation
    if name == NAME:  # wrapped before
        name = model.get_correct_attn_implementation(None)
    # transformers 5.17 lets SDPA drop the cap without a word
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    return "eager" if capped and name == "sdpa" else name


def _needs(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Needs:
    config = model.config
    key_size, value_size = head_sizes(config)
    return Needs(
        type(model).__name__,
        device,
        dtype,
        head_size=key_size,
        value_size=value_size,
        window=getattr(config, "sliding_window", None),
        softcap=getattr(config, "attn_logit_softcapping", None),
    )


def _turn_dropout_off(model: PreTrainedModel) -> int:
    # rates, not modes: train() must still reach gradient checkpointing, which reads module.training
    count = 0
    for module in model.modules():
        names = [name for name, x in vars(module).items() if isinstance(x, float) and x > 0]
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        for name in names:
            if "drop" in name or (is_dropout and name == "p"):
                setattr(module, name, 0.0)
                count += 1
    return count


class _Recomputed:
    """A layer's forward of which only the input is kept."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # no random numbers to restore: dropout is off
        return checkpoint(
            self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )


class LogpModel(nn.Module):
    """A transformers CausalLM that scores packed batches.

    Its head becomes a LogpHead on the same parameters and its attention fastpref's; its dropout
    rates are set to 0, with a line in the log. Saving `.model` saves what was loaded: neither
    change reaches the weights or the config.

    A model with recurrent layers keeps its own attention and reads every completion in a row of its
    own, with its own copy of the prompt: `shares_prompts` is False, and its batches are those of
    pack(groups, share=False).

    Args:
        model: decoder-only, text alone, head an nn.Linear.
        head_workspace: bytes that linear_logp may use beyond its inputs and gradients; None: its
            default.
        attn_implementation: one of attention_backends.NAMES; None for the fastest that can run the
            model.
        adapters: peft's PeftModel around the model; None where it has no adapters.

    Raises:
        ModelError: the model is of a kind that cannot be trained this way.
    """

    model: PreTrainedModel
    compiles = False
    """Whether layers are compiled."""
    offload_activations = False
    """Whether what the trunk saves for the backward waits in host memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        head_workspace: int | None = None,
        attn_implementation: str | None = None,
        adapters: Any = None,
    ):
        super().__init__()
        self._adapters = (adapters,)  # no submodule: its weights are the model's
        _check_class(model)
        _replace_head(model)
        self.head_workspace = head_workspace
        head = head_of(model)
        if isinstance(head, LogpHead):
            head.workspace = head_workspace
        if off := _turn_dropout_off(model):
            log.warning("dropout is off: %d rates of %s set to 0", off, type(model).__name__)
        self._plain_attention = _plain_attention(model)
        self.attn_implementation = attn_implementation
        self._choices: dict[tuple[str, torch.dtype], Choice] = {}
        self.model = model
        self.router_loads: list[RouterLoad] | None = None  # see recorded_load
        reason = recurrence(model)
        self.shares_prompts = reason is None
        if self.shares_prompts:
            self._set_attention(NAME)
        else:
            log.warning("%s computes prompts once per completion: %s", type(model).__name__, reason)

    @property
    def adapters(self) -> Any:
        """peft's PeftModel around the model; None where it has no adapters."""
        return self._adapters[0]

    def _set_attention(self, name: str) -> None:
        self.model.set_attn_implementation(name)
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                got = module.config._attn_implementation
                if got != name:
                    raise ModelError(
                        f"need a model whose attention goes through transformers'"
                        f" AttentionInterface, got {type(module).__name__} that stays with {got!r}"
                    )

    def flops(self) -> Flops:
        """What the forward of one token, one scored token and one visible pair costs."""
        head = head_of(self.model)
        assert isinstance(head, LogpHead)
        return flops_of(trunk_of(self.model), head, self.model.config)

    def attention(self, device: torch.device) -> Choice:
        """The attention that runs on a device, in the dtype that holds here (autocast's, if on).

        Raises:
            ModelError: the attn_implementation that was asked for cannot run this model there.
        """
        if not self.shares_prompts:
            return self._own_attention()
        dtype = self.model.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        key = device.type, dtype
        if key not in self._choices:
            try:
                needs = _needs(self.model, device, dtype)
                self._choices[key] = choose(needs, self.attn_implementation)
            except ValueError as error:
                raise ModelError(str(error)) from error
        return self._choices[key]

    def _own_attention(self) -> Choice:
        # of rows of one completion each, which need no segments
        own, asked = self._plain_attention, self.attn_implementation
        if asked is not None:
            raise ModelError(
                f"need {type(self.model).__name__} without an attn_implementation, since its"
                f" completions cannot share a row, got {asked}: leave the key out"
            )
        return Choice(own, sdpa_per_segment, "transformers' own, a completion a row")

    def hidden(self, batch: Batch) -> Tensor:
        """(T, H): what the head would read, of every token of the batch."""
        if not self.shares_prompts:
            return self._hidden_of_rows(batch)
        if self.model.config._attn_implementation != NAME:  # else the segments go unread
            raise ModelError("need a LogpModel outside plain(), got a call inside it")
        out = self._trunk(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            segments=batch.segments,
            backend=self.attention(batch.input_ids.device).backend,
        )
        self._record(out)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def _hidden_of_rows(self, batch: Batch) -> Tensor:
        # right-padded rows without a mask: causal layers see nothing of what comes after
        ids, index = to_rows(batch)
        out = self._trunk(input_ids=ids)
        self._record(out, index)
        hidden: Tensor = out.last_hidden_state.flatten(0, 1)
        return hidden.index_select(0, index)

    def _trunk(self, **inputs: Any) -> Any:
        # the trunk alone: what the head keeps of its slabs stays
        with on_host(self.model) if self.offload_activations else nullcontext():
            return trunk_of(self.model)(**inputs, use_cache=False, **self._asked())

    def _asked(self) -> dict[str, bool]:
        return {} if self.router_loads is None else {"output_router_logits": True}

    def _record(self, out: Any, index: Tensor | None = None) -> None:
        if self.router_loads is not None:
            self.router_loads.append(RouterLoad.of(self.model, out, index))
            self.router_loads = None  # the policy comes first; what may follow is its reference

    def forward(
        self,
        batch: Batch,
        *,
        outputs: tuple[str, ...] = (),
        temperature: float = 1.0,
        entropy_grad: bool = False,
    ) -> TokenStats:
        """Log-probs of the batch's targets.

        Args:
            batch: packed tokens, on the model's device.
            outputs: names of further statistics of each row, as in linear_logp_stats.
            temperature: divides the logits; > 0.
            entropy_grad: whether the entropy is differentiable: a loss needs it, a metric does not.

        Returns:
            TokenStats of (M,) in fp32, logp in nats; None where not asked for.
        """
        options = {"temperature": temperature, "entropy_grad": entropy_grad}
        return self._stats(self.hidden(batch), batch, outputs=outputs, **options)

    def _stats(self, hidden: Tensor, batch: Batch, **options: Any) -> TokenStats:
        stats: TokenStats = head_of(self.model)(hidden, batch.target, rows=batch.rows, **options)
        return stats

    def against(
        self, reference: "LogpModel", batch: Batch, *, outputs: tuple[str, ...] = ()
    ) -> tuple[TokenStats, Tensor, Tensor]:
        """Log-probs of the batch's targets, and how far each position's distribution has moved.

        Returns:
            TokenStats as of a call; the reference's log-probs (M,); KL(reference || self) (M,) in
            nats, over the full vocabulary, differentiable in self.
        """
        hidden = self.hidden(batch)
        with torch.no_grad():
            ref_hidden = reference.hidden(batch)
            ref_logp = reference._stats(ref_hidden, batch).logp
        head, ref_head = head_of(self.model), head_of(reference.model)
        assert isinstance(head, LogpHead) and isinstance(ref_head, LogpHead)
        kl = head.kl(hidden, ref_hidden, ref_head, rows=batch.rows)
        return self._stats(hidden, batch, outputs=outputs), ref_logp, kl

    def compile_layers(self, on: bool = True) -> None:
        """Have torch.compile fuse what stands between the products of each layer, or no longer.

        Layers share their code, and lengths are no part of it: one compilation serves all layers
        and all batches.
        """
        self.compiles = on
        for layer in self.layers(needed=on):
            layer._compiled_call_impl = None
            if on:
                layer.compile(dynamic=True)
        if on:
            # modes of autograd, kinds of layers, and the reference have code of their own; at the
            # limit torch would go on without compiled code
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    def checkpoint_layers(self, on: bool = True) -> None:
        """Keep each layer's input alone, and compute the rest again in the backward; or no longer.

        Not transformers' switch: that one is closed to torch.compile.
        """
        for layer in self.layers(needed=on):
            forward: Any = layer.forward
            if on != isinstance(forward, _Recomputed):
                layer.forward = _Recomputed(forward) if on else forward.forward

    def layers(self, *, needed: bool = True) -> list[GradientCheckpointingLayer]:
        """The layers of the trunk; ModelError where they are needed and transformers knows none."""
        modules: list[nn.Module] = [*self.model.modules()]
        found = [m for m in modules if isinstance(m, GradientCheckpointingLayer)]
        if needed and not found:
            raise ModelError(f"need a model made of layers, got {type(self.model).__name__}")
        return found

    def frozen_copy(self) -> "LogpModel":
        """The same model with weights of its own that require no gradient: a reference."""
        return copy.deepcopy(self).requires_grad_(False).eval()

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """Inside, self.model is an ordinary CausalLM with the attention it was loaded with:
        generate() and model(...) work; calling the LogpModel does not.
        """
        # a cache binds compiled code to the number of its layer
        eager = torch.compiler.set_stance("force_eager") if self.compiles else nullcontext()
        with eager:
            if not self.shares_prompts:  # it has no other attention
                yield self.model
                return
            self._set_attention(self._plain_attention)
            try:
                yield self.model
            finally:
                self._set_attention(NAME)
