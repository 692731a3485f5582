"""LoRA adapters of peft on a language model; with them off, the model is its own reference."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref.data.packing import Batch
from fastpref.models.attention import ModelError
from fastpref.models.model import LogpModel, head_of

# what peft calls differently
_PEFT_NAMES = {"alpha": "lora_alpha"}
_WEIGHTS = "adapter_model.safetensors"


def import_peft() -> Any:
    """The peft package.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"need peft for lora, got none ({error}); pip install 'fastpref[lora]'"
        ) from error
    return peft


def lora_config(lora: Mapping[str, Any]) -> Any:
    """peft's LoraConfig of our entries: its own names, and alpha for lora_alpha.

    Raises:
        ModelError: peft is not installed.
        TypeError, ValueError: peft does not take the entries.
    """
    entries = {_PEFT_NAMES.get(name, name): value for name, value in lora.items()}
    return import_peft().LoraConfig(task_type="CAUSAL_LM", **entries)


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of peft's lie in the model."""
    return any(hasattr(module, "adapter_layer_names") for module in model.modules())


def add_adapters(
    model: PreTrainedModel, lora: Mapping[str, Any], *, revision: str | None = None
) -> Any:
    """Put new adapters on a model, in place, and freeze everything else.

    Args:
        model: without adapters; quantised or not. Adapters are fp32 over half or quantised weights.
        lora: entries of peft's LoraConfig, alpha for its lora_alpha.
        revision: of the base model, which peft notes beside the adapters.

    Returns:
        peft's PeftModel around the model.

    Raises:
        ModelError: an entry names nothing in the model, or the head; the model is then changed.
    """
    head, embeddings = head_of(model), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    names = {module: name for name, module in model.named_modules()}
    try:
        made = import_peft().get_peft_model(model, lora_config(lora), revision=revision)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"need lora entries that fit {type(model).__name__}: {error}; target_modules may be"
            f" all-linear, or some of {', '.join(_linear_names(model))}"
        ) from error
    _check_head(model, names[head], "the head")
    if tied:
        _check_head(model, names[embeddings], "the embeddings, whose weight is the head's")
    _check_matches(model, lora)
    config = made.peft_config[made.active_adapter]
    base = Path(config.base_model_name_or_path or "")
    if config.base_model_name_or_path and base.is_dir():  # it must be found from anywhere
        config.base_model_name_or_path = str(base.resolve())
    return made


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    found = {name: m for name, m in model.named_modules() if hasattr(m, "adapter_layer_names")}
    return {name: m for name, m in found.items() if not name.endswith(".base_layer")}


def _check_head(model: nn.Module, name: str, what: str) -> None:
    module = _adapted(model).get(name)
    if module is None:
        return
    key = "modules_to_save" if hasattr(module, "original_module") else "target_modules"
    key = "target_parameters" if hasattr(module, "parameter_name") else key
    raise ModelError(
        f"need a head that stays as it is, got lora with {name} in {key}: that is {what}, which"
        " fastpref reads whole for its log-probs; leave it out"
    )


def _linear_names(model: nn.Module) -> list[str]:
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = sorted({n.split(".base_layer")[0].split(".")[-1] for n in linear})
    return [n for n in names if not n.startswith(("lora_", "default"))]


def _check_matches(model: nn.Module, lora: Mapping[str, Any]) -> None:
    # peft is content with one that matches
    adapted = _adapted(model)
    for key in ("target_modules", "modules_to_save"):
        wanted = lora.get(key) or ()
        for name in () if isinstance(wanted, str) else wanted:
            if not any(f".{found}".endswith(f".{name}") for found in adapted):
                raise ModelError(
                    f"need layers of the model in lora's {key}, got {name!r}; linear layers"
                    f" here: {', '.join(_linear_names(model))}"
                )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key) or ():
            if not any(re.fullmatch(rf"(.*\.)?({pattern})", found) for found in adapted):
                raise ModelError(
                    f"need layers that have an adapter in lora's {key}, got {pattern!r}"
                )


class AdapterOff(LogpModel):
    """The same modules with their adapters off: the model as it came, without a second one.

    Args:
        adapted: the policy; neither its weights nor its mode are touched.
    """

    def __init__(self, adapted: LogpModel) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(adapted.__dict__)  # the same modules and options

    def hidden(self, batch: Batch) -> Tensor:
        with self.off():
            return super().hidden(batch)

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        with self.off(), super().plain() as model:
            yield model

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the adapters of the modules do nothing."""
        tuner = self.adapters.base_model
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable_adapter_layers()


def unadapted(model: LogpModel) -> LogpModel:
    """The model without its adapters, on the same modules; itself where it has none."""
    return model if model.adapters is None else AdapterOff(model)


def base_state(model: LogpModel) -> dict[str, Tensor]:
    """Weights and buffers without the adapters', under the names they had before those came."""
    state: dict[str, Tensor] = model.model.state_dict()
    if model.adapters is None:
        return state
    found = {}
    for name, value in state.items():
        parts = name.split(".")
        if not any(part.startswith("lora_") or part == "modules_to_save" for part in parts):
            kept = (part for part in parts if part not in ("base_layer", "original_module"))
            found[".".join(kept)] = value
    return found


def adapter_state(adapters: Any) -> dict[str, Tensor]:
    """The tensors of a PeftModel's adapters, as peft writes them."""
    state: dict[str, Tensor] = import_peft().get_peft_model_state_dict(
        adapters,
        save_embedding_layers=False,  # they are frozen, or saved as modules_to_save
    )
    return state


def save_adapters(adapters: Any, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as PeftModel reads them."""
    adapters.save_pretrained(folder, save_embedding_layers=False)


def load_adapters(adapters: Any, folder: Path) -> None:
    """Take the adapters' weights back from a folder.

    Raises:
        ValueError: it lacks one, or holds another.
    """
    from safetensors.torch import load_file

    path = folder / _WEIGHTS
    saved = load_file(path) if path.is_file() else {}
    want = {name: value.shape for name, value in adapter_state(adapters).items()}
    got = {name: value.shape for name, value in saved.items()}
    if want != got:
        differ = sorted(name for name in {*want, *got} if want.get(name) != got.get(name))
        raise ValueError(f"need the adapters of this run in {path}, got others: {_some(differ)}")
    import_peft().set_peft_model_state_dict(adapters, saved)


def _some(names: Iterable[str]) -> str:
    first, *more = names
    return f"{first} and {len(more)} more" if more else first
