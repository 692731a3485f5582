"""Which share f of the vocabulary a backward that skips rare columns would still have to compute.

A column is active where some row of the batch gives it a probability of eps or more, or has it as
its label. ``python -m bench.active_vocabulary --runs FOLDER --out DIR`` trains small models on the
harmless pairs and measures f, the probability that the other columns hold and the gradient error
of leaving them out, then f of made rows at V=128256; ``--model FOLDER`` measures a model at hand.
Letters as in kernels/linear_logp.py.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness import facts, write
from bench.pairs import pairs
from fastpref.data.formats import to_examples
from fastpref.data.packing import pack, split_groups
from fastpref.data.tokenize import tokenize
from fastpref.models.load import load_model, load_tokenizer
from fastpref.models.model import LogpModel, head_of
from fastpref.models.tiny import tiny_model, tiny_tokenizer
from fastpref.train.run import dpo, sft

ROWS = (64, 256, 1024, 2048, 8192)
EPS = {f"2^-{n}": 2.0**-n for n in (8, 10, 12, 14, 16)}
BLOCK = 64  # rows at a time
HELD_OUT = 400  # pairs that no model was trained on, of 1,996


@dataclass(frozen=True)
class Head:
    """What the head reads in a DPO step: live completion rows, pair by pair."""

    hidden: torch.Tensor  # (M, H)
    weight: torch.Tensor  # (V, H)
    target: torch.Tensor  # (M,)
    sign: torch.Tensor  # (M,): 1 in chosen completions, -1 in rejected

    def __len__(self):
        return len(self.target)

    @property
    def columns(self):
        return len(self.weight)

    def block(self, start, size=BLOCK):
        """Probabilities (R, V) and labels of R rows from ``start`` on."""
        rows = slice(start, start + size)
        return (self.hidden[rows] @ self.weight.T).softmax(1), self.target[rows]


@dataclass(frozen=True)
class Zipf:
    """Made rows: a unigram law beside a peaked law over candidates of the row's own.

    p = (1 - background) q + background u with u[k] ~ 1 / k over V columns. q[j] ~ j^-a over a
    row's candidates in the order of their draw without replacement, from u where ``drawn`` is
    "unigram" (frequent words are likely candidates) and evenly where it is "uniform" (the worst
    case: rows share no more than chance). a is uniform in ``peaks``, so that rows differ as those
    of a language model do, from nearly sure to hundreds of likely words. Labels are drawn from p.
    """

    drawn: str
    peaks: tuple[float, float] = (1.6, 3.0)
    columns: int = 128_256
    candidates: int = 2000
    background: float = 0.02

    def __len__(self):
        return max(ROWS)

    def block(self, start, size=BLOCK):
        draw = torch.Generator().manual_seed(start)
        unigram = 1 / torch.arange(1, self.columns + 1)
        unigram /= unigram.sum()
        weight = unigram if self.drawn == "unigram" else torch.ones(self.columns)
        keys = torch.empty(size, self.columns).exponential_(generator=draw).div_(weight)
        order = keys.topk(self.candidates, largest=False).indices
        low, high = self.peaks
        power = low + (high - low) * torch.rand(size, 1, generator=draw)
        own = torch.arange(1, self.candidates + 1) ** -power
        p = (self.background * unigram).repeat(size, 1)
        p.scatter_add_(1, order, own.mul_((1 - self.background) / own.sum(1, keepdim=True)))
        return p, torch.multinomial(p, 1, generator=draw)[:, 0]


def head_rows(folder, rows, count):
    """The first ``count`` live rows of a DPO run's batches of eight pairs, in fp32."""
    model = LogpModel(load_model(str(folder))).eval()
    examples, _ = to_examples(rows, "preference")
    groups, _ = tokenize(examples, load_tokenizer(str(folder)), max_length=512)
    found, have = [], 0
    for part in split_groups(groups, max_groups=8):
        batch = pack(part)
        sign = torch.ones(len(batch.completions) - 1)
        sign[1::2] = -1
        with torch.no_grad():
            hidden = model.hidden(batch)[batch.rows]
        found.append((hidden, batch.target, sign.repeat_interleave(batch.completions.diff())))
        have += len(batch.target)
        if have >= count:
            break
    hidden, target, sign = (torch.cat(x)[:count] for x in zip(*found, strict=True))
    head = head_of(model.model)
    if head.bias is not None or head.logit_scale != 1 or head.softcap is not None:
        raise ValueError(f"need a head without bias, scale and cap, got {head}")
    return Head(hidden, head.weight.detach(), target, sign)


def measure(source):
    """A row for each number of rows: f over disjoint batches, and what the rest would hold."""
    least = torch.tensor(list(EPS.values()))
    starts = range(0, len(source) // BLOCK * BLOCK, BLOCK)
    peaks = torch.empty(len(starts), source.columns)
    above, nats, sure = torch.zeros(len(EPS)), 0.0, 0.0
    for i, start in enumerate(starts):
        p, target = source.block(start)
        peaks[i] = p.amax(0)
        peaks[i, target] = torch.inf  # labels are always active
        above += torch.stack([(p >= e).sum() for e in least]).float() / (BLOCK * len(starts))
        nats -= p.gather(1, target[:, None]).log().mean().item() / len(starts)
        sure += p.amax(1).mean().item() / len(starts)
    batches = {M: len(starts) * BLOCK // M for M in ROWS}
    tops = {
        M: peaks[: n * M // BLOCK].view(n, M // BLOCK, -1).amax(1) for M, n in batches.items() if n
    }
    dropped = dropped_mass(source, starts, tops, least)
    for M, top in tops.items():
        share = torch.stack([(top >= e).float().mean(1) for e in least])
        mean, most = dropped[M]
        yield (
            M,
            top[0],
            {
                "rows": M,
                "batches": batches[M],
                "nats_per_label": nats,
                "mean_largest_probability": sure,
                "columns_above_eps_per_row": named(above),
                "f": named(share.mean(1)),
                "f_largest": named(share.amax(1)),
                "dropped_mass_mean": named(mean),
                "dropped_mass_largest": named(most),
            },
        )


def dropped_mass(source, starts, tops, least):
    """By rows: the mean and the largest probability of a row in inactive columns, each (E,)."""
    sums = {M: torch.zeros(2, len(least)) for M in tops}
    for i, start in enumerate(starts):
        p, _ = source.block(start)
        for M, top in tops.items():
            batch = i * BLOCK // M
            if batch < len(top):
                mass = p @ (top[batch, :, None] < least).float()
                sums[M][0] += mass.sum(0) / (M * len(top))
                sums[M][1] = torch.maximum(sums[M][1], mass.amax(0))
    return sums


def gradient_errors(head, M, top):
    """Relative errors of dX and dW over the first M rows when inactive columns are left out.

    ``uniform`` is g = 1 in every row, as in SFT; ``dpo`` g = 1 in chosen rows and -1 in rejected
    ones, DPO's up to a factor while the policy is its reference. dX has one error for both: g is
    a factor of its rows. In fp64.
    """
    head = Head(head.hidden.double(), head.weight.double(), head.target, head.sign.double())
    least = torch.tensor(list(EPS.values()))
    level = (top[:, None] < least).sum(1)  # by how many eps, the first ones, a column is left out
    W = head.weight
    exact = W.new_empty(M, W.shape[1])
    lost = W.new_zeros(len(EPS), M, W.shape[1])
    dW = W.new_zeros(2, *W.shape)
    for start in range(0, M, 4 * BLOCK):
        rows = slice(start, min(start + 4 * BLOCK, M))
        p, target = head.block(start, rows.stop - start)
        d = p.neg_()
        for n in range(1, len(EPS) + 1):
            columns = (level == n).nonzero()[:, 0]
            lost[:n, rows] += d[:, columns] @ W[columns]
        d[torch.arange(len(d)), target] += 1
        exact[rows] = d @ W
        x = head.hidden[rows]
        dW[0].addmm_(d.T, x)
        dW[1].addmm_(d.T, x * head.sign[rows, None])
    errors = {"dX": {**relative(lost, exact), "worst_row": named(worst_row(lost, exact))}}
    for name, grad in zip(("dW_uniform", "dW_dpo"), dW, strict=True):
        errors[name] = relative((grad[top < e] for e in least), grad)
    return errors


def relative(errors, exact):
    """Frobenius and largest entry, each over the exact gradient's; bf16 is its rounding alone."""
    rounding = exact.bfloat16().to(exact.dtype) - exact
    both = [(e.norm(), e.abs().max() if e.numel() else e.new_zeros(())) for e in errors]
    norms, largest = (torch.stack(x) for x in zip(*both, strict=True))
    return {
        "frobenius": named(norms / exact.norm()),
        "largest": named(largest / exact.abs().max()),
        "bf16_frobenius": (rounding.norm() / exact.norm()).item(),
    }


def worst_row(errors, exact):
    return (errors.norm(dim=2) / exact.norm(dim=1)).amax(1)


def named(values):
    return dict(zip(EPS, (float(f"{v:.4g}") for v in values.tolist()), strict=True))


def record(case, source, where, out):
    """Measure a source and write its rows; ``where`` is the facts of this process."""
    for M, top, found in measure(source):
        row = {"op": "active_vocabulary", "case": case, "V": source.columns, **found}
        if isinstance(source, Head):
            row["errors"] = gradient_errors(source, M, top)
        write(row | where, out)


def train(runs, vocab, rows):
    """An SFT run and a DPO run that goes on from it; the folders of the models to look at."""
    base = runs / f"base-{vocab}"
    if not base.exists():
        texts = (row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected"))
        tokenizer = tiny_tokenizer(texts, vocab)
        tiny_model(tokenizer, hidden=256).save_pretrained(base)
        tokenizer.save_pretrained(base)
    common = {
        "per_device_train_batch_size": 16,
        "max_length": 512,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_steps": 50,
        "resume": "auto",
        "report": False,
    }
    tuned, aligned = runs / f"sft-{vocab}", runs / f"dpo-{vocab}"
    options = {"max_steps": 300, "learning_rate": 1e-3}
    keys = {"model_name_or_path": str(base), "output_dir": str(tuned)}
    sft(common | options | keys, train_dataset=rows)
    options = {"max_steps": 50, "learning_rate": 1e-4}
    keys = {"model_name_or_path": str(tuned), "output_dir": str(aligned)}
    dpo(common | options | keys, train_dataset=rows)
    steps = {f"SFT step {n}": tuned / f"checkpoint-{n}" for n in (50, 150, 300)}
    return {"untrained": base, **steps, "DPO step 50": aligned}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder whose JSONL files take the rows")
    parser.add_argument("--runs", type=Path, help="folder of the models trained here; kept")
    parser.add_argument("--vocab", type=int, nargs="*", default=[4096, 32_000], help="most tokens")
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="models at hand")
    parser.add_argument("--zipf", action="store_true", help="made rows at V=128256")
    given = parser.parse_args()
    where = facts()
    data, rows = pairs(1996)
    if given.runs is not None:
        for vocab in given.vocab:
            for name, folder in train(given.runs, vocab, rows[:-HELD_OUT]).items():
                source = head_rows(folder, rows[-HELD_OUT:], max(ROWS))
                shape = f"llama 4x256, V={source.columns}, {name}"
                record(f"{shape}, held-out {data} pairs", source, where, given.out)
            source = head_rows(folder, rows, max(ROWS))
            record(f"{shape}, {data} pairs of its training", source, where, given.out)
    for folder in given.model:
        source = head_rows(folder, rows[-HELD_OUT:], max(ROWS))
        record(f"{folder.name}, {data} pairs", source, where, given.out)
    if given.zipf:
        for drawn in ("unigram", "uniform"):
            made = Zipf(drawn)
            record(f"{made}", made, where, given.out)


if __name__ == "__main__":
    main()
