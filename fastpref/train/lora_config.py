"""LoRA and quantised base models as a run is told of them: our keys, and TRL's folded into them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fastpref.models.adapters import import_peft, lora_config
from fastpref.models.quantize import Quantization, check_bitsandbytes
from fastpref.train.config import ConfigError, TrainConfig, unknown
from fastpref.train.console import tell
from fastpref.train.peer_keys import LORA_KEYS

# what check_keys puts before the name of a key of TRL's
PEER = "trl_"
# TRL's
DEFAULTS = {"r": 16, "alpha": 32}
# of peft's entries, those that leave the model as it was where the adapters are off
TAKEN = {
    *("r", "alpha", "target_modules", "exclude_modules", "target_parameters", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("init_lora_weights", "use_rslora", "use_dora", "lora_bias"),
}
STARTS = (True, False, "gaussian", "orthogonal")


def settled(entries: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``lora`` in our names, r and alpha among them; None where adapters were not asked for.

    Args:
        entries: ours, and TRL's under names that open with ``trl_``.

    Raises:
        ConfigError: an entry that cannot be honoured, or peft is not installed.
    """
    lora = None if entries is None else folded(entries)
    if lora is None:
        return None
    if lora.pop("lora_dropout", 0):
        tell("lora_dropout has no effect: dropout is always off")
    check(lora)
    return {key: value for key, value in lora.items() if key in TAKEN}


def folded(entries: Mapping[str, Any]) -> dict[str, Any] | None:
    """One mapping of both kinds of entries; TRL's alone count only beside its use_peft."""
    short = {"lora_alpha": "alpha", "dropout": "lora_dropout"}
    own: dict[str, Any] = {}
    for name, value in entries.items():
        key = short.get(name, name)
        if not name.startswith(PEER):
            if own.setdefault(key, value) != value:
                raise ConfigError(f"need one {key} of lora, got {own[key]} and {value}")
    theirs = {k.removeprefix(PEER): x for k, x in entries.items() if k.startswith(PEER)}
    use_peft = theirs.pop("use_peft", None)
    if own and use_peft is False:
        raise ConfigError(f"need one of lora and use_peft: False, got both: {own}")
    given = {key: value for key, value in theirs.items() if value is not None}
    if entries and not own and not use_peft:
        if given:
            tell(f"use_peft is off, so there is no effect of {', '.join(given)}")
        return None
    peers = {LORA_KEYS[key]: value for key, value in given.items()}
    for key in own.keys() & peers.keys():
        if own[key] != peers[key]:
            raise ConfigError(f"need one {key} of lora, got {own[key]} and {peers[key]}")
    return DEFAULTS | peers | own


def check(lora: dict[str, Any]) -> None:
    """Names, then values; target_modules becomes what peft means by it."""
    try:
        fields = dataclasses.fields(import_peft().LoraConfig)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    neutral = {f.name: f.default for f in fields} | {"task_type": "CAUSAL_LM"}
    for key, value in lora.items():
        if key not in TAKEN and key not in neutral:
            raise ConfigError(unknown("key of lora", key, sorted(TAKEN)))
        if key not in TAKEN and value is not None and value != neutral[key]:
            raise ConfigError(f"lora: {key}: {value!r} is not supported; leave the key out")
    if not isinstance(lora["r"], int) or lora["r"] < 1:
        raise ConfigError(f"need lora's r: a whole number of at least 1, got {lora['r']!r}")
    alpha = lora["alpha"]
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ConfigError(f"need lora's alpha above 0, got {alpha!r}")
    if lora.get("init_lora_weights", True) not in STARTS:
        raise ConfigError(
            f"need init_lora_weights of {', '.join(map(str, STARTS))} (others change the base "
            f"model, which is the reference), got {lora['init_lora_weights']!r}"
        )
    modules = lora.get("target_modules")
    if modules == ["all-linear"]:
        lora["target_modules"] = "all-linear"
    elif isinstance(modules, str) and modules.isidentifier():  # else a pattern of whole names
        lora["target_modules"] = [modules]
    try:
        lora_config({key: value for key, value in lora.items() if key in TAKEN})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"need lora that peft takes, got {lora}: {error}") from error


def check_quantization(config: TrainConfig) -> None:
    """Raise ConfigError where a quantised model could not be trained as asked."""
    asked = [key for key in ("load_in_4bit", "load_in_8bit") if getattr(config, key)]
    if not asked:
        return
    if len(asked) > 1:
        raise ConfigError(f"need one of {' and '.join(asked)}, got both")
    if config.lora is None:
        raise ConfigError(
            f"need lora for {asked[0]} (quantised weights cannot be trained), got none"
        )
    try:
        check_bitsandbytes()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def quantization(config: TrainConfig) -> Quantization | None:
    """How the base model is to be kept; None: as it is."""
    if config.load_in_8bit:
        return Quantization(8)
    if not config.load_in_4bit:
        return None
    return Quantization(
        4,
        quant_type=config.bnb_4bit_quant_type,
        nested=config.use_bnb_nested_quant,
        storage=config.bnb_4bit_quant_storage,
    )
