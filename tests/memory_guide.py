"""Peak memory of a training step of Qwen2-1.5B, from random weights of that shape: the memory guide in RESULTS.md.

    python tests/memory_guide.py                       # 5 rows x groups of 8 and 16 x 256 and 1024 new tokens
    python tests/memory_guide.py --layers 2            # a quick look

One prompt of 256 tokens. Every figure comes from a process of its own. The completions are random tokens that share up
to 16 first tokens in pairs, so that T-SPMO has branch points as deep as that. The rollout is measured at its end, where
it is largest: a prompt of all but 8 of the tokens is computed once, and 8 more are sampled for each of the group. The
update is whole, with all its passes.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tokenrl  # noqa: E402

SHAPE = dict(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
    eos_token_id=151643,
)
CASES = {  # method, pack tokens
    "grpo": ("grpo", None),
    "s-grpo": ("s-grpo", None),
    "s-grpo --max-pack-tokens 2048": ("s-grpo", 2048),
    "t-spmo": ("t-spmo", None),
}


def build(layers: int):
    torch, transformers = tokenrl.torch, tokenrl.transformers
    device = tokenrl.pick_device("auto")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**SHAPE | {"num_hidden_layers": layers})
        ).eval()
    torch.set_default_dtype(torch.float32)
    return tokenrl.add_lora(model, 16, 32, "all-linear", 1 / 3), device


def completions_of(rng: random.Random, count: int, length: int) -> list[list[int]]:
    pairs = []
    for _ in range(count // 2):
        start = [rng.randrange(1000) for _ in range(rng.randint(1, 16))]
        pairs += [
            start + [rng.randrange(1000) for _ in range(length - len(start))] for _ in range(2)
        ]
    return pairs


def measure(case: str, group_size: int, length: int, layers: int) -> dict:
    method, pack_tokens = CASES[case]
    model, device = build(layers)
    rng = random.Random(0)
    prompt = [rng.randrange(1000) for _ in range(256)]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tokenrl.peak_memory(device, reset=True)
    tokenrl.sample(
        model, None, [prompt + [7] * (length - 8)], group_size, max_new_tokens=8, ends=set()
    )
    rollout = tokenrl.peak_memory(device)
    settings = tokenrl.Settings(method=method, max_pack_tokens=pack_tokens)
    rewards = [float(i % 2) for i in range(group_size)]
    rollout_of = tokenrl.Rollout(
        tokenrl.Problem("", "0"), prompt, completions_of(rng, group_size, length), rewards
    )
    tokenrl.peak_memory(device, reset=True)
    credited = tokenrl.credit([rollout_of], tokenrl.credit_function(settings), random.Random(0))
    policy, optimizer = tokenrl.Policy(model, None, "plain"), tokenrl.new_optimizer(model)
    tokenrl.update(policy, credited, 1, optimizer, settings)
    return {
        "device": device,
        "weights": weights,
        "rollout": rollout,
        "update": tokenrl.peak_memory(device),
    }


def main(
    layers: Annotated[int, typer.Option(help="Layers; Qwen2-1.5B has 28.")] = 28,
    case: str = "",
    group_size: int = 0,
    length: int = 0,
):
    if case:  # one figure, in a process of its own
        print(json.dumps(measure(case, group_size, length, layers)))
        return
    sizes = [(group, length) for group in (8, 16) for length in (256, 1024)]
    table = Table(
        "",
        *(f"{group} x {length}" for group, length in sizes),
        title="rollout / update, peak memory in GiB",
    )
    found = None
    for name in CASES:
        cells = []
        for group, length in sizes:
            command = [
                sys.executable,
                __file__,
                "--layers",
                layers,
                "--case",
                name,
                "--group-size",
                group,
                "--length",
                length,
            ]
            child = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
            if child.returncode:  # its own words are above; the other cells still tell something
                cells.append("failed")
            else:
                found = json.loads(child.stdout.splitlines()[-1])
                cells.append(f"{found['rollout'] / 2**30:.2f} / {found['update'] / 2**30:.2f}")
            print(name, group, length, cells[-1], file=sys.stderr)
        table.add_row(name, *cells)
    Console().print(table)
    if found is None:
        sys.exit("Every size failed; see above.")
    print(
        f"{found['device']}, bfloat16, weights {found['weights'] / 2**30:.2f} GiB, LoRA on the last third"
    )


if __name__ == "__main__":
    typer.run(main)
