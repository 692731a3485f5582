"""The groups of a run: rows or files, tokenised."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.data.files import DataError
from fastpref.data.formats import Example, load_examples, to_examples
from fastpref.data.packing import num_tokens, row_tokens
from fastpref.data.tokenize import Group, tokenize
from fastpref.data.unpaired import add_mismatched
from fastpref.methods.base import Method
from fastpref.models.load import load_generation_config
from fastpref.train.config import ConfigError, TrainConfig
from fastpref.train.console import tell
from fastpref.train.schedule import eval_strategy

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Data:
    """Rows given from Python; None: the configuration names them."""

    train: Rows | None = None
    evaluation: Rows | None = None


def read_data(
    config: TrainConfig, method: Method, data: Data, model: Any, tokenizer: Any
) -> tuple[list[Group], list[Group]]:
    """Training and evaluation groups; no evaluation groups where none will be read."""
    generation_config = (
        load_generation_config(str(config.model_name_or_path), revision=config.model_revision)
        if model is None
        else model.generation_config
    )
    reader = Reader(config, method, tokenizer, generation_config)
    train_groups = reader.groups("train", data.train)
    given = data.evaluation is not None or config.eval_dataset_name is not None
    if eval_strategy(config, given) == "no" and not config.eval_on_start:
        return train_groups, []
    return train_groups, reader.groups("eval", data.evaluation)


def check_budget(
    config: TrainConfig, part: str, groups: Sequence[Group], *, share: bool = True
) -> None:
    """Refuse groups over the token budget now, not hours from here."""
    budget = config.max_tokens_per_micro_batch
    size = num_tokens if share else row_tokens
    sizes = [size(group) for group in groups] if budget else []
    if budget and max(sizes, default=0) > budget:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        raise ConfigError(
            f"{part}: row {groups[largest].row}: need max_tokens_per_micro_batch of at least"
            f" {sizes[largest]}, the tokens of the largest group, got {budget}: raise it or lower"
            " max_length"
        )


@dataclass(frozen=True)
class Reader:
    """Rows or files to tokenised groups."""

    config: TrainConfig
    method: Method
    tokenizer: Any
    generation_config: Any
    """The model's: it may know stop tokens that the tokenizer does not."""

    def groups(self, part: str, rows: Rows | None) -> list[Group]:
        """The groups of the ``train`` or ``eval`` part; a line says what was dropped and why."""
        examples, dropped = self.examples(part, rows)
        if self.method.mismatches:
            examples = add_mismatched(examples)
        try:
            groups, cut = tokenize(
                examples,
                self.tokenizer,
                max_length=self.config.max_length,
                truncation_mode=self.config.truncation_mode,
                generation_config=self.generation_config,
                own=1 if self.method.mismatches else None,
            )
        except DataError:
            raise
        except ValueError as error:  # what the tokenizer cannot do
            raise ConfigError(f"{part}: {error}") from error
        check_budget(self.config, part, groups)
        counts = [f"{name} {n}" for name, n in (dropped | cut).items() if n]
        taken = dropped["unpaired_from_pairs"], dropped["sft_on_chosen"]  # counted, not dropped
        rows_read = len(examples) - taken[0] + sum(dropped.values()) - sum(taken)
        tell(", ".join([f"{part}: {len(groups)} groups of {rows_read} rows", *counts]))
        return groups

    def examples(self, part: str, rows: Rows | None) -> tuple[list[Example], dict[str, int]]:
        config = self.config
        options: dict[str, Any] = {
            "turn_marker": config.turn_marker,
            "skip_bad_rows": config.skip_bad_rows,
        }
        if rows is not None:
            return to_examples(rows, self.method.kind, name=f"{part}_dataset", **options)
        name, split = config.dataset_name, config.dataset_train_split
        if part == "eval":
            split = config.dataset_test_split
            if config.eval_dataset_name is None and Path(str(name)).is_file():
                raise ConfigError(f"need eval_dataset_name beside the one file {name}, got none")
            if config.eval_dataset_name is not None:
                name = config.eval_dataset_name
                split = "train" if Path(name).is_file() else split  # a file is one split
        if name is None:
            raise ConfigError(f"need dataset_name, or {part}_dataset from Python")
        return load_examples(
            name, self.method.kind, split=split, config_name=config.dataset_config, **options
        )
