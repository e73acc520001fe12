"""Credit functions compared at equal rollouts, each with its own best learning rate: one table.

    python tests/compare_methods.py                                     # the three built-in ones
    python tests/compare_methods.py --methods s-grpo data/methods.py:tempo MINE.py:mine --seeds 5
    python tests/compare_methods.py --task multiply --model Qwen/Qwen2-1.5B --rates 1e-4 3e-4

Options it does not know go to `train`. All methods are asked the same problems in the same order,
with as many completions. The rate of a method is that of --rates with the highest validation
accuracy on average over a run of seed 0, so that speed and end both count; validation problems are
held out of the training split. Then come the other seeds. The test is for the accuracy alone.

Runs lie in runs/compare-METHOD-RATE-SEED-... of the current folder. What is there is not trained
again, and what was interrupted goes on: delete the runs of a method or task whose files changed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import zlib
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


def rows_of(path: Path) -> list[dict]:
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def finished(run: Path) -> bool:
    path = run / "eval.jsonl"
    return path.exists() and any(row["phase"] == "trained" for row in rows_of(path))


def train(method: str, rate: float, seed: int, args, others: list[str]) -> Path | None:
    """The folder of the finished run, trained as far as it is not there; None if it failed."""
    options = ["--method", method, "--lr", rate, "--seed", seed, "--steps", args.steps]
    options += ["--model", args.model, "--validate-every", args.validate_every, *others]
    options += ["--patience", args.steps]  # equal rollouts: no run ends before the others
    mark = zlib.crc32(repr([args.task, *options]).encode())  # other options are another run
    name = f"compare-{method.rpartition(':')[2]}-{rate:g}-{seed}-{mark:08x}"
    run = Path("runs", name)
    if not finished(run):
        where = ["--resume", run] if run.exists() else ["--name", name]
        command = [sys.executable, ROOT / "tokenrl.py", "train", args.task, *options, *where]
        ended = subprocess.run(list(map(str, command))).returncode
        if ended < 0 or ended > 128:
            sys.exit("Interrupted; the same command goes on from here.")
    return run if finished(run) else None


def tokens_to(target: float, steps: list[dict]) -> int | None:
    """Tokens generated until the first validation at or above the target, or None."""
    generated = 0
    for row in steps:
        generated += row["tokens_generated"]
        if row.get("validation", 0.0) >= target:
            return generated
    return None


def figures(run: Path, target: float) -> dict[str, float | None]:
    """What a finished run gave; tokens and seconds are those of one step."""
    steps, answers = rows_of(run / "metrics.jsonl"), rows_of(run / "eval.jsonl")
    tail = steps[-max(1, len(steps) // 10) :]
    return {
        "before": 100 * statistics.fmean(a["correct"] for a in answers if a["phase"] == "base"),
        "accuracy": 100
        * statistics.fmean(a["correct"] for a in answers if a["phase"] == "trained"),
        "tokens to target": tokens_to(target, steps),
        "generated": statistics.fmean(s["tokens_generated"] for s in steps),
        "trained": statistics.fmean(s["tokens_trained"] for s in steps),
        "packed": statistics.fmean(s["tokens_packed"] for s in steps),
        "update": 1000 * statistics.median(s["update_s"] for s in steps),
        "memory": max(s["peak_memory"] for s in steps) / 2**30,
        "entropy": statistics.fmean(s["entropy"] for s in tail),
    }


def best_rate(method: str, args, others: list[str]) -> float:
    found = {}
    for rate in args.rates:
        if run := train(method, rate, 0, args, others):
            scores = [s["validation"] for s in rows_of(run / "metrics.jsonl") if "validation" in s]
            if not scores:
                sys.exit("Nothing was validated: give more problems, or --validate-every.")
            found[rate] = statistics.fmean(scores)
    if not found:
        sys.exit(f"No run of {method} came to its end; what it said stands above.")
    return max(found, key=found.get)


def cell(values: list[float | None], form: str) -> str:
    """Mean ± standard deviation, and of how many runs where some have no value."""
    there = [value for value in values if value is not None]
    if not there:
        return "never"
    spread = f" ± {statistics.stdev(there):{form}}" if len(there) > 1 else ""
    some = f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    return f"{statistics.fmean(there):{form}}{spread}{some}"


def comparison(found: dict[str, list[dict]], rates: dict[str, float], args) -> Table:
    before = statistics.fmean(run["before"] for runs in found.values() for run in runs)
    columns = {
        "accuracy": ("accuracy, %", ".1f"),
        "tokens to target": (f"tokens to {args.target:.0%} val.", ",.0f"),
        "generated": ("generated", ",.0f"),
        "trained": ("trained", ",.0f"),
        "packed": ("packed", ",.0f"),
        "update": ("update, ms", ".0f"),
        "memory": ("GiB", ".2f"),
        "entropy": ("entropy", ".3f"),
    }
    title = f"{args.task}, {args.steps} steps, {args.seeds} seeds: mean ± standard deviation"
    caption = f"before training {before:.1f} %; generated, trained and packed are tokens a step"
    table = Table("", "lr", *(label for label, _ in columns.values()), title=title, caption=caption)
    for method, runs in found.items():
        cells = (cell([run[key] for run in runs], form) for key, (_, form) in columns.items())
        failed = f" ({len(runs)} of {args.seeds} seeds)" if len(runs) < args.seeds else ""
        table.add_row(method.rpartition(":")[2] + failed, f"{rates[method]:g}", *cells)
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", default=["grpo", "s-grpo", "t-spmo"])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each method")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--task", default="svamp")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--target", type=float, default=0.9, help="validation accuracy to reach")
    parser.add_argument("--validate-every", type=int, default=2)
    args, others = parser.parse_known_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    rates, found = {}, {}
    for method in args.methods:
        rates[method] = best_rate(method, args, others)
        runs = [train(method, rates[method], seed, args, others) for seed in range(args.seeds)]
        found[method] = [figures(run, args.target) for run in runs if run]
    width = None if sys.stdout.isatty() else 150
    Console(width=width).print(comparison(found, rates, args))


if __name__ == "__main__":
    main()
