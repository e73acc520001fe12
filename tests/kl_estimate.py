"""How the `kl` of a step, estimated from some nodes, compares with the exact KL of its samples.

    python tests/kl_estimate.py --method s-grpo --lr 1e-2 --steps 25

Trains the bundled model as `train svamp` does, but for validation. Exact: KL(before || after) over
the whole vocabulary, mean over every sampled token of the step. Also: how many of the sampled
tokens lie on the trained nodes, of which a shared one counts once in `trained`.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import tokenrl  # noqa: E402


def logprobs(policy, rollouts) -> torch.Tensor:
    """[sampled tokens, vocabulary], by plain passes."""
    rows = []
    for rollout in rollouts:
        texts = [torch.tensor(rollout.prompt + c) for c in rollout.completions]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        logits, start = policy.model(input_ids=ids).logits, len(rollout.prompt) - 1
        rows += [row[start:][: len(c)] for row, c in zip(logits, rollout.completions)]
    return torch.cat(rows).log_softmax(-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", default="s-grpo")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    settings = tokenrl.Settings("svamp", "demo", device="cpu", **vars(args))
    policy, task = tokenrl.find_policy(settings)
    torch.manual_seed(0)
    policy.model = tokenrl.trainable_model(policy, settings)
    optimizer, method = tokenrl.new_optimizer(policy.model), tokenrl.credit_function(settings)
    ratios, covered, sampled = [], 0, 0
    for step in range(args.steps):
        rng = random.Random(f"0/{step}")
        problems = tokenrl.step_problems(task.train, step, settings.prompts_per_step, 0)
        rollouts = tokenrl.roll_out(policy, problems, settings, rng.getrandbits(32))
        credited = tokenrl.credit(rollouts, method, rng)
        optimizer.param_groups[0]["lr"] = tokenrl.learning_rate(step, settings)
        with torch.no_grad():
            old = logprobs(policy, rollouts)
        _, found = tokenrl.update(policy, credited, len(rollouts), optimizer, settings)
        with torch.no_grad():
            exact = (old.exp() * (old - logprobs(policy, rollouts))).sum(-1).mean().item()
        ratios.append(exact / found["kl"])
        covered += sum(n in weights for _, trie, weights in credited for p in trie.paths for n in p)
        sampled += len(old)
        print(f"{step + 1:4} estimated {found['kl']:.5f}, exact {exact:.5f}", flush=True)
    logs = torch.tensor(ratios).log()
    middle, spread = logs.mean().exp(), logs.std().exp()
    print(f"exact / estimated: geometric mean {middle:.2f}, spread x {spread:.2f}, ", end="")
    print(f"median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"{covered / sampled:.1%} of the sampled tokens lie on trained nodes")


if __name__ == "__main__":
    main()
