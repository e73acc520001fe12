"""GRPO, S-GRPO and T-SPMO on the bundled model with equal rollouts and several seeds: the table in the README.

    python tests/compare_methods.py                                   # 3 methods x 5 seeds, about ten minutes
    python tests/compare_methods.py --seeds 2 --steps 50 --lr 1e-3    # options it does not know go to `train`

Runs lie in runs/compare-METHOD-SEED, with the options behind it, of the current folder; what is there already is not
trained again, and what was interrupted goes on.
"""
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("grpo", "s-grpo", "t-spmo")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(run: Path) -> dict[str, float]:
    """What one run gave: accuracies in per cent, share of tokens trained, medians of the seconds, peak memory."""
    answers, steps = rows_of(run / "eval.jsonl"), rows_of(run / "metrics.jsonl")
    result = {}
    for phase in ("base", "trained"):
        own = [a for a in answers if a["phase"] == phase]
        result[f"{phase} greedy"] = 100 * statistics.mean(a["correct"] for a in own)
        result[f"{phase} sampled"] = 100 * sum(a["samples_correct"] for a in own) / sum(a["samples"] for a in own)
    generated = sum(s["tokens_generated"] for s in steps)
    return result | {"tokens": generated, "share": 100 * sum(s["tokens_trained"] for s in steps) / generated,
                     "rollout": statistics.median(s["rollout_s"] for s in steps),
                     "update": statistics.median(s["update_s"] for s in steps),
                     "memory": max(s["peak_memory"] for s in steps) / 2**30}


def main(context: typer.Context, seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of each method.")] = 5):
    if own := {"--seed", "--method", "--name", "--resume", "--eval-samples"} & {a.split("=")[0] for a in context.args}:
        raise typer.BadParameter(f"{', '.join(own)} is set here for each run.")
    found: dict[str, list[dict]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        for method in METHODS:
            name = re.sub(r"[^\w.]+", "-", " ".join(["compare", method, str(seed), *context.args]))
            run, options = Path("runs", name), ["--method", method, "--seed", seed, "--name", name, "--eval-samples", 4]
            if not (run / "eval.jsonl").exists() or rows_of(run / "eval.jsonl")[-1]["phase"] != "trained":
                command = [sys.executable, ROOT / "tokenrl.py", "train", "svamp",
                           *(["--resume", run] if run.exists() else [*options, *context.args])]
                subprocess.run(list(map(str, command)), check=True)
            found[method].append(figures(run))
    table = Table("", *METHODS, title=f"{seeds} seeds: mean ± standard deviation (lowest to highest)")
    for key, label, form in (("base greedy", "before, greedy %", ".1f"), ("base sampled", "before, sampled %", ".1f"),
                             ("trained greedy", "after, greedy %", ".1f"),
                             ("trained sampled", "after, sampled %", ".1f"),
                             ("tokens", "tokens sampled", ",.0f"), ("share", "tokens trained, %", ".1f"),
                             ("rollout", "rollout, s a step", ".3f"), ("update", "update, s a step", ".3f"),
                             ("memory", "peak memory, GiB", ".2f")):
        cells = []
        for method in METHODS:
            values = [run[key] for run in found[method]]
            spread = f" ± {statistics.stdev(values):{form}}" if seeds > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}\n({min(values):{form}} to {max(values):{form}})")
        table.add_row(label, *cells)
    Console().print(table)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(main)
    app()
