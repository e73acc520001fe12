"""How the `kl` of a step, estimated from some nodes, compares with the exact KL of its samples.

    python tests/kl_estimate.py --method s-grpo --lr 1e-2 --steps 25

Trains the bundled model as `train svamp` does, but for validation. Exact: KL(before || after) over
the whole vocabulary, mean over every sampled token of the step. Also: how many of the sampled
tokens lie on the trained nodes, of which a shared one counts once in `trained`.
"""

import argparse
import sys
import tempfile
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
        with torch.no_grad():
            logits, start = policy.model(input_ids=ids).logits, len(rollout.prompt) - 1
        rows += [row[start:][: len(c)] for row, c in zip(logits, rollout.completions)]
    return torch.cat(rows).log_softmax(-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", default="s-grpo")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    options = vars(args) | {"device": "cpu", "validate_every": 0}
    settings = tokenrl.Settings("svamp", "demo", **options)
    policy, task = tokenrl.find_policy(settings)
    torch.manual_seed(0)
    policy.model = tokenrl.trainable_model(policy, settings)
    roll_out, update = tokenrl.roll_out, tokenrl.update
    drawn, ratios, covered, sampled = [], [], 0, 0

    def watched_roll_out(*given):
        found = roll_out(*given)
        drawn.extend(found)
        return found

    def watched_update(policy, credited, *rest):
        nonlocal covered, sampled
        old = logprobs(policy, drawn)
        sums, found = update(policy, credited, *rest)
        exact = (old.exp() * (old - logprobs(policy, drawn))).sum(-1).mean().item()
        print(f"estimated {found['kl']:.5f}, exact {exact:.5f}", flush=True)
        ratios.append(exact / found["kl"])
        covered += sum(n in weights for _, trie, weights in credited for p in trie.paths for n in p)
        sampled += len(old)
        drawn.clear()
        return sums, found

    tokenrl.roll_out, tokenrl.update = watched_roll_out, watched_update
    with tempfile.TemporaryDirectory() as run:
        for _ in tokenrl.train(policy, task.train, [], settings, Path(run), []):
            pass
    middle = torch.tensor(ratios).log().mean().exp()
    print(f"exact / estimated: geometric mean {middle:.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"{covered / sampled:.1%} of the sampled tokens lie on trained nodes")


if __name__ == "__main__":
    main()
