import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

import tokenrl  # noqa: E402

# A busy machine is no failure of the code.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")

SHAPES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    eos_token_id=1,
    pad_token_id=0,
    bos_token_id=None,
)
ARCHITECTURES = {
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPES)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SHAPES, head_dim=8, sliding_window=64)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SHAPES, head_dim=8, sliding_window=64, final_logit_softcapping=3.0
        )
    ),
    "granite": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            **SHAPES, logits_scaling=2.0, embedding_multiplier=3.0, attention_multiplier=0.2
        )
    ),
    "cohere": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**SHAPES, logit_scale=0.5)
    ),
}


class Words:
    """The part of a tokenizer that sampling needs: token n is the text "n "."""

    eos_token, eos_token_id = None, 1

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return "".join(f"{i} " for i in ids)


def random_model(kind: str):
    """A small random model whose distributions are peaked enough for completions to share prefixes."""
    torch.manual_seed(0)
    model = ARCHITECTURES[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return random_model(request.param)


@pytest.fixture
def words():
    return Words()


def random_completions(
    rng: random.Random, count: int, length: int, tokens: int = 3
) -> list[list[int]]:
    """Completions over few tokens, so that they branch everywhere; some are prefixes of others, some are equal."""
    return [
        [rng.randrange(2, 2 + tokens) for _ in range(rng.randint(1, length))] for _ in range(count)
    ]


ROOT = Path(__file__).parent.parent
DEMO = ROOT / "data" / "demo"
FAST = [
    "--device",
    "cpu",
    "--prompts-per-step",
    "2",
    "--group-size",
    "4",
    "--max-new-tokens",
    "24",
    "--eval-problems",
    "8",
    "--validate-every",
    "0",
]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; returns (exit code, everything printed, on one line)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tokenrl.py"])

    def run(*arguments):
        code = 0
        try:
            tokenrl.main([str(a) for a in arguments])
        except SystemExit as exit:
            code = exit.code or 0
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return code, " ".join((printed.out + printed.err).split())

    return run


def script(*arguments, cwd, **options):
    """The command as a user runs it, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tokenrl.py"), *map(str, arguments)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def exact(rows):
    """Metrics without what a clock or a memory meter gives."""
    return [
        {k: v for k, v in row.items() if k not in ("rollout_s", "update_s", "peak_memory")}
        for row in rows
    ]


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def quick(monkeypatch):
    """The demo is loaded once and not checked again: a command then takes a tenth of a second."""
    plain = tokenrl.load_model

    def load(name, *options):
        if name != "demo":
            return plain(name, *options)
        if options not in LOADED:
            LOADED[options] = plain(name, *options)
        return copy.deepcopy(LOADED[options][0]), LOADED[options][1]

    monkeypatch.setattr(tokenrl, "load_model", load)
    monkeypatch.setattr(tokenrl, "check_model", lambda *_: None)


LOADED = {}
