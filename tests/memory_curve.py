"""The memory of a process that trains: does it stay where it was in the first 20 steps?

    python tests/memory_curve.py                                  # the bundled model
    python tests/memory_curve.py --model FOLDER --prompts 2 --vary

Ordinary steps on the CPU, but for the completions' length, which is fixed or, with --vary, changes
from step to step, as it does in training. Exits with 1 where memory grows to over 1.15 times.
"""

import random
import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tokenrl  # noqa: E402


def main(
    model: str = "demo",
    steps: int = 200,
    every: int = 10,
    prompts: int = 8,
    length: int = 64,
    vary: bool = False,
):
    policy = tokenrl.Policy(*tokenrl.load_model(model, "cpu"), "plain")
    policy.model = tokenrl.add_lora(policy.model, 16, 32, "all-linear", 1 / 3)
    settings, rng, peaks = tokenrl.Settings(), random.Random(0), []
    method, optimizer = tokenrl.credit_function(settings), tokenrl.new_optimizer(policy.model)
    optimizer.param_groups[0]["lr"] = 1e-5
    print("step, GiB at the peak since the last line, GiB held now")
    for step in range(1, steps + 1):
        tokens = rng.randint(length // 4, length) if vary else length
        ids = [[rng.randrange(300) for _ in range(64)] for _ in range(prompts)]
        options = {"max_new_tokens": tokens, "ends": set(), "seed": step, "with_stats": True}
        drawn = zip(ids, *tokenrl.sample(policy.model, None, ids, 8, **options))
        rollouts = [tokenrl.Rollout(None, i, c, [0.0, 1.0] * 4, *stats) for i, c, *stats in drawn]
        credited = tokenrl.credit(rollouts, method, rng)
        tokenrl.update(policy, credited, prompts, optimizer, settings)
        tokenrl.release_memory()  # as the training loop does
        peaks.append(tokenrl.peak_memory("cpu"))
        held = tokenrl.peak_memory("cpu", reset=True)
        if step % every == 0:
            print(f"{step:4} {max(peaks[-every:]) / 2**30:.3f} {held / 2**30:.3f}", flush=True)
    growth = max(peaks) / max(peaks[:20])
    print(f"Largest peak: {growth:.2f} times that of the first 20 steps.")
    sys.exit(growth > 1.15)


if __name__ == "__main__":
    typer.run(main)
