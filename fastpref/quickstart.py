"""The control experiment of the DPO paper in miniature: corpus, SFT, sampled pairs, DPO, frontier.

Every stage is the one that the real commands use; only the corpus and its gold reward are made.
Source: arXiv:2305.18290, section 6.1 (there: film reviews, GPT-2 large, a sentiment classifier).
"""

import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastpref.data.formats import Example
from fastpref.data.synthetic import gold_reward, reviews
from fastpref.data.tokenize import Tokens, tokenize
from fastpref.evaluate.frontier import Standing, mean_and_error, standing, text_of
from fastpref.models.model import LogpModel
from fastpref.models.tiny import tiny_model, tiny_tokenizer
from fastpref.report.page import write_report
from fastpref.rollout.generate import SamplingParams, generate
from fastpref.train.config import ConfigError, SFTConfig
from fastpref.train.preference_config import DPOConfig
from fastpref.train.run import Result, dpo, sft

MAX_NEW_TOKENS = 48


@dataclass(kw_only=True)
class QuickstartConfig:
    """The whole way in miniature."""

    output_dir: str = "runs/quickstart"
    """Folder of the summary and of every stage's run."""
    seed: int = 0
    """Seed of the corpus, the model, the sampling and the training; the first one of several."""
    seeds: int = 1
    """How many seeds to run; the summary holds their mean."""
    reviews: int = 6000
    """Reviews that the model is fine-tuned on."""
    prompts: int = 768
    """Prompts whose sampled completions become preference pairs."""
    samples_per_prompt: int = 4
    """Completions per prompt; the best and the worst by gold reward make a pair."""
    eval_prompts: int = 256
    """Held-out prompts for the gold reward and the KL."""
    beta: float = 0.1
    """DPO's strength of the pull to the SFT model."""
    learning_rate: float = 5e-4
    """DPO's peak learning rate (the model is tiny)."""
    num_train_epochs: float = 1.0
    """DPO's passes over the pairs."""
    loss_type: str = "sigmoid"
    """DPO's loss."""
    shuffle_preferences: bool = False
    """Swap chosen and rejected in a random half of the training pairs: the control."""

    def __post_init__(self) -> None:
        for key in ("seeds", "reviews"):
            if getattr(self, key) < 1:
                raise ConfigError(f"need {key} of at least 1, got {getattr(self, key)}")
        for key in ("samples_per_prompt", "prompts", "eval_prompts"):
            if getattr(self, key) < 2:  # a pair, a standard error
                raise ConfigError(f"need {key} above 1, got {getattr(self, key)}")


@dataclass(frozen=True)
class Outcome:
    """One seed's figures."""

    seed: int
    gold_reward_before: float
    gold_reward_before_se: float
    gold_reward_after: float
    gold_reward_after_se: float
    kl: float
    kl_se: float
    accuracy: float
    """Share of held-out pairs whose chosen completion has the higher implicit reward."""
    pairs: int
    seconds: float


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run every seed, print the table and some completions, write ``summary.json``.

    Returns:
        The summary: means over seeds of gold_reward_before, gold_reward_after, kl (nats) and
        accuracy, the seconds it all took, and each seed's own figures under ``runs``.
    """
    began = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one gains little here, and waits where a core is busy
    try:
        return all_seeds(config, began)
    finally:
        torch.set_num_threads(threads)


def all_seeds(config: QuickstartConfig, began: float) -> dict[str, Any]:
    root = Path(config.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    shown: list[dict[str, str]] = []
    for seed in range(config.seed, config.seed + config.seeds):
        outcome, samples = one_seed(config, seed, root / f"seed-{seed}")
        outcomes.append(outcome)
        shown = shown or samples
    summary = summarise(config, outcomes, time.perf_counter() - began)
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (root / "samples.json").write_text(json.dumps(shown, indent=2, ensure_ascii=False) + "\n")
    show(summary, outcomes, shown)
    page = write_report([root], root / "report.html")
    Console().print(f"the whole of it, with figures: {page}", soft_wrap=True)
    return summary


def one_seed(
    config: QuickstartConfig, seed: int, folder: Path
) -> tuple[Outcome, list[dict[str, str]]]:
    """Corpus, SFT, pairs, DPO and both standings for one seed."""
    began = time.perf_counter()
    tuned = fine_tune(config, seed, folder)
    tokenizer, reference = tuned.tokenizer, tuned.model.frozen_copy()
    openings = [r.prompt for r in reviews(config.prompts + config.eval_prompts, seed + 10_000)]
    prompts = token_ids(openings, tokenizer)
    halves = slice(config.prompts), slice(config.prompts, None)
    rng = random.Random(seed)
    pairs, held_out = (
        sampled_pairs(config, reference, tokenizer, openings[half], prompts[half], rng)
        for half in halves
    )
    if config.shuffle_preferences:
        half = set(rng.sample(range(len(pairs)), len(pairs) // 2))  # a coin could favour one side
        pairs = [swapped(pair) if i in half else pair for i, pair in enumerate(pairs)]
    before = judge(reference, reference, tokenizer, prompts[halves[1]], seed)
    trained = prefer(config, seed, folder, tuned, pairs, held_out)
    after = judge(trained.model, reference, tokenizer, prompts[halves[1]], seed)
    outcome = Outcome(
        seed=seed,
        gold_reward_before=before.reward,
        gold_reward_before_se=before.reward_se,
        gold_reward_after=after.reward,
        gold_reward_after_se=after.reward_se,
        kl=after.kl,
        kl_se=after.kl_se,
        accuracy=trained.metrics["eval_rewards/accuracies"],
        pairs=len(pairs),
        seconds=time.perf_counter() - began,
    )
    texts = zip(openings[halves[1]], before.texts, after.texts, strict=True)
    samples = [{"prompt": p, "before": b, "after": a} for p, b, a in texts]
    return outcome, samples[:4]


# what both stages share; no checkpoints, since a stage takes seconds, and one report for all
STAGE: dict[str, Any] = {
    "resume": "auto",
    "save_strategy": "no",
    "report": False,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "max_length": 96,
}


def fine_tune(config: QuickstartConfig, seed: int, folder: Path) -> Result:
    """A tiny model, fine-tuned on the corpus by the trainer of ``fastpref sft``."""
    corpus = reviews(config.reviews, seed)
    rows = [{"prompt": r.prompt, "completion": r.completion} for r in corpus]
    tokenizer = tiny_tokenizer([r.prompt + r.completion for r in corpus], vocab_size=512)
    base = tiny_model(tokenizer, hidden=96, layers=2, heads=4, kv_heads=2, seed=seed)
    recipe = SFTConfig(
        dataset_name=str(write_jsonl(folder / "reviews.jsonl", rows)),
        output_dir=str(folder / "sft"),
        per_device_train_batch_size=64,
        num_train_epochs=3,
        learning_rate=3e-3,
        logging_steps=20,
        seed=seed,
        **STAGE,
    )
    return sft(recipe, base, tokenizer=tokenizer)


def prefer(
    config: QuickstartConfig,
    seed: int,
    folder: Path,
    tuned: Result,
    pairs: list[dict[str, str]],
    held_out: list[dict[str, str]],
) -> Result:
    """The fine-tuned model, trained on the pairs by the trainer of ``fastpref dpo``."""
    recipe = DPOConfig(
        dataset_name=str(write_jsonl(folder / "pairs.jsonl", pairs)),
        eval_dataset_name=str(write_jsonl(folder / "held_out_pairs.jsonl", held_out)),
        output_dir=str(folder / "dpo"),
        per_device_train_batch_size=32,
        num_train_epochs=config.num_train_epochs,
        learning_rate=config.learning_rate,
        beta=config.beta,
        loss_type=config.loss_type,
        logging_steps=5,
        seed=seed,
        **STAGE,
    )
    return dpo(recipe, tuned.model, tokenizer=tuned.tokenizer)


def token_ids(prompts: list[str], tokenizer: Any) -> list[Tokens]:
    """Prompts as the trainer tokenises them."""
    examples = [Example(p, (" .",), i, f"prompt[{i}]", {}) for i, p in enumerate(prompts)]
    groups, _ = tokenize(examples, tokenizer, max_length=None)
    return [group.prompt for group in groups]


def judge(
    policy: LogpModel, reference: LogpModel, tokenizer: Any, prompts: list[Tokens], seed: int
) -> Standing:
    return standing(
        *(policy, reference, tokenizer, prompts, gold_reward),
        n=2,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed + 1,
    )


def sampled_pairs(
    config: QuickstartConfig,
    model: LogpModel,
    tokenizer: Any,
    texts: list[str],
    prompts: list[Tokens],
    rng: random.Random,
) -> list[dict[str, str]]:
    """The best and the worst completion of each prompt by gold reward; ties make no pair."""
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    n = config.samples_per_prompt
    sampled = generate(model, tokenizer, prompts, n, params, seed=rng.randrange(2**31))
    pairs = []
    for prompt, row in zip(texts, sampled, strict=True):
        finished = [text_of(tokenizer, c) for c in row if c.finished]
        ranked = sorted(finished, key=gold_reward)
        if len(ranked) > 1 and gold_reward(ranked[-1]) > gold_reward(ranked[0]):
            pairs.append({"prompt": prompt, "chosen": ranked[-1], "rejected": ranked[0]})
    return pairs


def swapped(pair: dict[str, str]) -> dict[str, str]:
    return pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}


def summarise(config: QuickstartConfig, outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """Means over seeds; the gain's standard error is over seeds where there are several."""

    def mean(name: str) -> float:
        return statistics.fmean(getattr(o, name) for o in outcomes)

    gains = [o.gold_reward_after - o.gold_reward_before for o in outcomes]
    if len(gains) > 1:
        gain, gain_se = mean_and_error(torch.tensor(gains, dtype=torch.float64))
    else:
        one = outcomes[0]
        gain, gain_se = (
            gains[0],
            (one.gold_reward_before_se**2 + one.gold_reward_after_se**2) ** 0.5,
        )
    return {
        "gold_reward_before": mean("gold_reward_before"),
        "gold_reward_after": mean("gold_reward_after"),
        "gain": gain,
        "gain_se": gain_se,
        "kl": mean("kl"),
        "accuracy": mean("accuracy"),
        "seconds": seconds,
        "shuffle_preferences": config.shuffle_preferences,
        "config": asdict(config),
        "runs": [asdict(o) for o in outcomes],
    }


def show(summary: dict[str, Any], outcomes: list[Outcome], samples: list[dict[str, str]]) -> None:
    console = Console()
    table = Table(title="gold reward in [-1, 1], KL to the SFT model in nats (± standard error)")
    for name in ("seed", "reward before", "reward after", "KL", "held-out accuracy", "seconds"):
        table.add_column(name, justify="right")
    for o in outcomes:
        table.add_row(
            str(o.seed),
            f"{o.gold_reward_before:+.3f} ± {o.gold_reward_before_se:.3f}",
            f"{o.gold_reward_after:+.3f} ± {o.gold_reward_after_se:.3f}",
            f"{o.kl:.2f} ± {o.kl_se:.2f}",
            f"{o.accuracy:.3f}",
            f"{o.seconds:.0f}",
        )
    console.print(table)
    gain = f"{summary['gain']:+.3f} ± {summary['gain_se']:.3f}"
    console.print(f"gain {gain} at a KL of {summary['kl']:.2f} nats")
    for sample in samples:
        for when in ("before", "after"):
            console.print(f"{when:>6}: {sample['prompt']} |{sample[when]}", markup=False)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
