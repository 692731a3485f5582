"""Models and tokenizers from a local folder or a hub id, and the check before the first step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastpref.data.packing import pack
from fastpref.data.tokenize import Group
from fastpref.models.adapters import has_adapters
from fastpref.models.attention import ModelError
from fastpref.models.flops import EXPERTS
from fastpref.models.model import LogpModel, head_of
from fastpref.models.quantize import Quantization, in_int8, is_quantized, prepare_quantized

_DTYPES = ("auto", "float32", "bfloat16", "float16")

# dtype -> (mean, largest) difference in nats that rounding alone explains: ours keeps fp32 logits,
# the plain model rounds them to its dtype, and the two sum attention in different orders
_TOLERANCE = {
    torch.float64: (1e-4, 1e-3),  # transformers' norms and rotations stay in fp32
    torch.float32: (1e-4, 1e-3),
    torch.float16: (0.01, 0.2),
    torch.bfloat16: (0.05, 1.0),
}
_STILL = 1e-4  # mean movement in nats of log-probs that must not move at all
_CHECKED_TOKENS = 128  # of the prompt and of a completion: the plain logits stay small


def _merge(adapter: str) -> str:
    return (
        "merge them into their base model first, in Python: from peft import"
        f" AutoPeftModelForCausalLM as P; P.from_pretrained({adapter!r})"
        ".merge_and_unload().save_pretrained(FOLDER), and copy the tokenizer there"
    )


def _check_folder(name_or_path: str, needed: dict[str, tuple[str, ...]]) -> None:
    folder = Path(name_or_path)
    if not folder.exists():
        if name_or_path.startswith(("/", "./", "../", "~")):
            raise ModelError(f"need an existing folder or a hub id, got {name_or_path}")
        return
    if not folder.is_dir():
        raise ModelError(f"need a folder or a hub id, got the file {name_or_path}")
    have = sorted(path.name for path in folder.iterdir())
    of_model = [name for name in have if not name.startswith("adapter_model")]
    for what, patterns in needed.items():
        if not any(Path(name).match(p) for name in of_model for p in patterns):
            hint = ""
            if any(name.endswith((".bin", ".pt", ".pth")) for name in have):
                hint = " (pickled weights are not read: save them again as safetensors)"
            elif "adapter_config.json" in have:
                hint = f" (adapters alone: {_merge(name_or_path)})"
            raise ModelError(
                f"need {what} ({' or '.join(patterns)}) in {folder}, got {have or 'no file'}{hint}"
            )


def _load(load: Callable[..., Any], what: str, name_or_path: str, **options: Any) -> Any:
    try:
        return load(name_or_path, **options)
    except (OSError, ValueError, SafetensorError) as error:
        where = (
            "the files of this folder"
            if Path(name_or_path).exists()
            else "a local folder, or a hub id and a network (or a cached copy)"
        )
        raise ModelError(f"need {where} to load the {what} of {name_or_path!r}: {error}") from error


def load_model(
    name_or_path: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """A causal language model from a local folder or a hub id, from safetensors only.

    Args:
        name_or_path: a folder that holds config.json and *.safetensors, or a hub id.
        dtype: of the weights: "auto" (as saved), "float32", "bfloat16" or "float16".
        quantization: of linear layers but the head.
        device: where quantised weights go; they can go nowhere else afterwards.

    Returns:
        The transformers model, in eval mode.

    Raises:
        ModelError: files or weights are missing, or the model is no decoder-only language model.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"need dtype of {', '.join(_DTYPES)}, got {dtype!r}")
    _check_folder(name_or_path, {"a config": ("config.json",), "weights": ("*.safetensors",)})
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _load(AutoConfig.from_pretrained, "config", name_or_path, **source)
    if config.is_encoder_decoder:
        raise ModelError(
            f"need a decoder-only language model, got {name_or_path} of the encoder-decoder type"
            f" {config.model_type!r}"
        )
    if quantization is not None:
        source |= quantization.options(config, dtype, device or torch.device("cpu"))
    model, info = _load(
        AutoModelForCausalLM.from_pretrained,
        "model",
        name_or_path,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        **source,
    )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"need every weight of {type(model).__name__} in {name_or_path}, got files without"
            f" {missing[:5]}{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}"
        )
    if has_adapters(model):  # found beside the config
        raise ModelError(
            f"need a model alone in {name_or_path}, got one with adapters: {_merge(name_or_path)}"
        )
    if is_quantized(model):
        prepare_quantized(model)
    loaded: PreTrainedModel = model
    return loaded


def load_tokenizer(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub id, as it was saved. A pad token is not needed.

    Raises:
        ModelError: no tokenizer files, or no EOS token (completions end with it).
    """
    _check_folder(
        name_or_path,
        {"a tokenizer": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")},
    )
    tokenizer: PreTrainedTokenizerBase = _load(
        AutoTokenizer.from_pretrained,
        "tokenizer",
        name_or_path,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"need a tokenizer with an EOS token, got {name_or_path} without one: set eos_token in"
            " its tokenizer_config.json"
        )
    return tokenizer


def load_generation_config(name_or_path: str, *, revision: str = "main") -> GenerationConfig | None:
    """The generation config of a local folder or a hub id; None where there is none."""
    try:
        return GenerationConfig.from_pretrained(name_or_path, revision=revision)
    except OSError as error:
        if (Path(name_or_path) / "generation_config.json").exists():
            raise ModelError(f"need a readable generation config, got {error}") from error
        return None


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError where the tokenizer can make an id that the model has no row for."""
    rows = model.config.get_text_config().vocab_size  # not the weight: it is empty under ZeRO-3
    if len(tokenizer) > rows:
        raise ModelError(
            f"need a model with a row for each of the tokenizer's {len(tokenizer)} tokens, got"
            f" {rows} rows: model and tokenizer do not belong together, or the model's embeddings"
            " were not resized"
        )


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = {child: child.training for child in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for child, mode in before.items():
            child.training = mode


def _ours(model: LogpModel, groups: list[Group]) -> list[Tensor]:
    # log-probs of each completion, groups packed into one row
    batch = pack(groups, share=model.shares_prompts).to(next(model.parameters()).device)
    logp = model(batch).logp
    return list(logp.split(batch.completions.diff().tolist()))


def _plain(model: LogpModel, group: Group) -> tuple[list[Tensor], list[Tensor]]:
    # log-probs of each completion run alone through model(...), and what the head read
    logps, hidden = [], []
    head = head_of(model.model)
    hook = head.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0]))
    try:
        with model.plain() as plain:
            for completion in group.completions:
                ids = torch.tensor([[*group.prompt, *completion]], device=plain.device)
                logits = plain(input_ids=ids, use_cache=False).logits[0]
                logits = logits[len(group.prompt) - 1 : -1]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                target = ids[0, len(group.prompt) :, None]
                logps.append(logits.log_softmax(-1).gather(-1, target)[:, 0])
    finally:
        hook.remove()
    return logps, hidden


def _too_far(got: list[Tensor], want: list[Tensor], limits: tuple[float, float]) -> str | None:
    # the largest difference in words, None where all is within the limits
    gaps = [(g.double() - w.double()).abs() for g, w in zip(got, want, strict=True)]
    every = torch.cat(gaps)
    mean, largest = float(every.mean()), float(every.max())
    if mean <= limits[0] and largest <= limits[1]:  # false for NaN
        return None
    worst = max(range(len(gaps)), key=lambda i: float(gaps[i].nan_to_num(torch.inf).max()))
    token = int(gaps[worst].nan_to_num(torch.inf).argmax())
    return (
        f"{largest:.3g} nats at token {token} of completion {worst} (got"
        f" {float(got[worst][token]):.4f}, need {float(want[worst][token]):.4f}), mean"
        f" {mean:.2g}; rounding explains {limits[1]:g} and {limits[0]:g}"
    )


def _cause(model: LogpModel, group: Group, plain_hidden: list[Tensor]) -> str:
    # where one unshared sequence already parts from the plain model
    batch = pack([group], share=model.shares_prompts).to(next(model.parameters()).device)
    ours, plain = model.hidden(batch), plain_hidden[0]
    rounding = max(1e-4, 10 * torch.finfo(ours.dtype).eps)
    if not (ours - plain).norm() <= rounding * plain.norm():
        return (
            "the trunk gives other hidden states: a layer that does not use the registered"
            " attention, or an input besides tokens and positions"
        )
    head = head_of(model.model)
    return (
        "trunk and hidden states agree, so something stands between the trunk and the"
        f" probabilities that the config does not say (read from it: scale {head.logit_scale:g},"
        f" softcap {head.softcap})"
    )


@contextmanager
def unchanged(model: LogpModel, group: Group, what: str) -> Iterator[None]:
    """Around a change to the model that must be one of speed alone.

    Args:
        model: on its final device and in its final dtype.
        group: any row of the data.
        what: is done to it.

    Raises:
        ModelError: log-probs differ by more than rounding explains; names the largest difference.
    """
    dtype, group = next(model.parameters()).dtype, _cut(group)
    with torch.no_grad():
        before = _ours(model, [group])
    yield
    with torch.no_grad():
        gap = _too_far(_ours(model, [group]), before, _TOLERANCE[dtype])
    if gap:
        raise ModelError(
            f"need the log-probs of {type(model.model).__name__} unchanged by {what}, got a"
            f" difference of {gap}"
        )


def _has_experts(model: LogpModel) -> bool:
    # another token changes how many rows each expert multiplies, and so the order of its sums
    return any(getattr(model.model.config, name, None) for name in EXPERTS)


def _cut(group: Group) -> Group:
    completions = tuple(c[:_CHECKED_TOKENS] for c in group.completions)
    return Group(
        prompt=group.prompt[-_CHECKED_TOKENS:],
        completions=completions,
        scored=(None,) * len(completions),
        row=group.row,
        extras={},
    )


@torch.no_grad()
def check_agreement(model: LogpModel, group: Group) -> None:
    """Run one row through the plain model(...) and through fastpref's packed form of it.

    The plain log-probs are those of each completion alone. Ours must agree with them alone, shared
    in a group, and beside another group; changing one completion must move no other; training
    mode must change nothing. At most 128 tokens of the prompt and of each completion are used.

    Args:
        model: on its final device and in its final dtype.
        group: any row of the data.

    Raises:
        ModelError: it does not agree; names the largest difference in nats, the token, the cause.
    """
    group = _cut(group)
    dtype = next(model.parameters()).dtype
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    limits = _TOLERANCE[torch.bfloat16 if in_int8(model.model) else dtype]
    who = f"{type(model.model).__name__} in {str(dtype).removeprefix('torch.')}"
    refusal = f"need packed log-probs equal to those of the plain model, got from {who}"
    with _mode(model, training=False):
        plain, hidden = _plain(model, group)
        first = replace(group, completions=group.completions[:1], scored=group.scored[:1])
        if gap := _too_far(_ours(model, [first]), plain[:1], limits):
            cause = _cause(model, first, hidden)
            raise ModelError(f"{refusal} a difference of {gap}. Likely cause: {cause}.")
        twice = _ours(model, [group, group])
        mixes = (
            "a layer mixes tokens outside the registered attention (a recurrent state, a"
            " convolution), so completions cannot share a prompt or a row"
        )
        if gap := _too_far(twice, plain + plain, limits):
            raise ModelError(f"{refusal} a difference of {gap}. Likely cause: {mixes}.")
        # the same shapes again, so the same roundings: far sharper than the agreement above
        still = (limits[0] if _has_experts(model) else _STILL, limits[0])
        if in_int8(model.model):  # a column is rounded or not by the largest of all its rows
            still = limits
        one, *others = group.completions
        vocab = model.model.config.vocab_size
        changed = replace(group, completions=([(t + 1) % vocab for t in one], *others))
        if gap := _too_far(_ours(model, [changed, group])[1:], twice[1:], still):
            raise ModelError(
                f"{refusal} log-probs that move when another completion changes, by {gap}."
                f" Likely cause: {mixes}."
            )
    with _mode(model, training=True):
        if gap := _too_far(_ours(model, [group, group]), twice, still):
            raise ModelError(
                f"{refusal} other log-probs in training mode, by {gap}. Likely cause: dropout or"
                " noise that is not a rate on a module."
            )
