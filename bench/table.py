"""Tables for the README, and plots, from the newest rows: ``python -m bench.table``."""

import argparse
import itertools
import json
import sys
from pathlib import Path

from bench.harness import RESULTS

ERRORS = (
    *("logp_error", "advantages_error", "returns_error", "loss_error"),
    *("dhidden_error", "dweight_error", "dlogits_error", "dlogp_error", "dvalues_error"),
    "loss_difference",
)
RATES = {"tflop_per_s": "TFLOP/s", "gb_per_s": "GB/s", "tokens_per_second": "tokens/s"}


def newest(rows):
    """The last row of each machine, op, case and provider, in the order of their first."""
    found = {}
    for row in rows:
        key = row["machine"], row["op"], row["case"], row["provider"]
        if row["utc"] >= found.get(key, row)["utc"]:
            found[key] = row
    return list(found.values())


def read(folder):
    """Every row of every machine; ones from before rows named it get it from their file."""
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                yield {"machine": file.stem, **json.loads(line)}
            except json.JSONDecodeError as error:
                print(f"left out: {file}, line {number} is no row: {error}", file=sys.stderr)


def groups(rows):
    """((machine, op), rows), rows of one case side by side."""

    def key(row):
        return row["machine"], row["op"]

    order = {}
    for row in rows:
        order.setdefault((*key(row), row["case"]), len(order))
    rows = sorted(rows, key=lambda row: (key(row), order[*key(row), row["case"]]))
    return itertools.groupby(rows, key)


def cells(row):
    """What a line of a table shows, by column."""
    rate = next((f"{row[name]:,.3g} {unit}" for name, unit in RATES.items() if name in row), "")
    errors = (f"{row[name]:.1e} ({name.split('_')[0]})" for name in ERRORS if name in row)
    return {
        "case": row["case"],
        "provider": row["provider"],
        "ms (p20 to p80)": f"{row['ms_p50']:,.4g} ({row['ms_p20']:,.4g} to {row['ms_p80']:,.4g})",
        "rate": rate,
        "x floor": f"{row['floor_multiple']:.2f}" if "floor_multiple" in row else "",
        "peak MiB": f"{row['peak_mib']:,.4g}" if "peak_mib" in row else "",
        "error": ", ".join(errors),
        "commit": f"{row['commit'] or row.get('sources')}{'+' if row['dirty'] else ''}",
    }


def markdown(rows):
    """A table for each machine and op, from the newest rows."""
    parts = []
    for (machine, op), group in groups(newest(rows)):
        group = list(group)
        lines = [cells(row) for row in group]
        columns = [name for name in lines[0] if any(line[name] for line in lines)]
        last = group[-1]
        versions = (f"{n} {last[n]}" for n in ("torch", "triton", "cuda") if last.get(n))
        about = f"{last['device']}, {last['threads']} threads, {', '.join(versions)}"
        parts += [f"### {op} on {machine}", "", f"{about}.", "", bars(columns)]
        parts += [bars("---" for _ in columns)]
        shown = None
        for line in lines:
            shown, line["case"] = line["case"], "" if line["case"] == shown else line["case"]
            parts.append(bars(line[name] for name in columns))
        parts.append("")
    return "\n".join(parts)


def bars(texts):
    return f"| {' | '.join(texts)} |"


def plot(rows, folder):
    """A picture for each machine and op: every provider's time, case by case, and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for (machine, op), group in groups(newest(rows)):
        cases = [list(rows) for _, rows in itertools.groupby(group, lambda row: row["case"])]
        heights = [len(case) + 1 for case in cases]
        figure, axes = pyplot.subplots(
            len(cases),
            squeeze=False,
            height_ratios=heights,
            figsize=(9, 0.3 * sum(heights) + 1),
            layout="constrained",
        )
        for axis, case in zip(axes[:, 0], cases, strict=True):
            names = [row["provider"] for row in case][::-1]
            axis.barh(names, [row["ms_p50"] for row in case][::-1])
            if floor := case[-1].get("floor_ms"):
                axis.axvline(floor, color="black", linestyle="--")
            axis.set_title(case[0]["case"], fontsize="medium", loc="left")
        axes[-1, 0].set_xlabel("ms; dashed: the floor")
        figure.savefig(folder / f"{machine}-{op}.svg")
        pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench.table", description=__doc__.split(":")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSONL files")
    parser.add_argument("--device", help="a kind of machine, or the start of its name")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="folder for an SVG of each table")
    args = parser.parse_args(argv)
    rows = list(read(args.results))
    kinds = sorted({row["machine"] for row in rows})
    rows = [row for row in rows if row["machine"].startswith(args.device or "")]
    if not rows:
        known = ", ".join(kinds) or "none"
        parser.error(f"no rows of {args.device or 'any'} in {args.results}, which has {known}")
    print(markdown(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    sys.exit(main())
