"""The plug-ins of data/methods.py against brute force over prefixes, and compare_methods.py."""

import itertools
import json
import math
import random
import runpy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import compare_methods
import pytest
from conftest import FAST, ROOT, random_completions, rows_of

import tokenrl

METHODS = runpy.run_path(str(ROOT / "data" / "methods.py"))
NAMES = ["token_mean", "top_entropy", "prefix_cut", "tempo", "worthwhile"]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def advantages(rewards):
    spread = math.sqrt(mean((r - mean(rewards)) ** 2 for r in rewards))
    return [(r - mean(rewards)) / (spread + 1e-4) for r in rewards]


def prefixes_of(completion):
    return [tuple(completion[: t + 1]) for t in range(len(completion))]


class Group:
    """A random group: each prefix has a probability, and an entropy that its siblings share."""

    def __init__(self, seed, count=9, length=7):
        rng = random.Random(seed)
        self.completions = random_completions(rng, rng.randint(2, count), length)
        self.rewards = [rng.choice([0.0, 1.0, rng.random()]) for _ in self.completions]
        self.prefixes = {p for c in self.completions for p in prefixes_of(c)}
        ordered = sorted(self.prefixes)
        self.entropy = {p: random.Random(f"{seed}{p[:-1]}").random() for p in ordered}
        self.prob = {p: rng.choice([rng.random(), 1.0]) for p in ordered}
        entropies = [[self.entropy[p] for p in prefixes_of(c)] for c in self.completions]
        logprobs = [[math.log(self.prob[p]) for p in prefixes_of(c)] for c in self.completions]
        self.trie = tokenrl.Trie(self.completions, entropies, logprobs)

    def through(self, prefix):
        return [
            r for c, r in zip(self.completions, self.rewards) if tuple(c[: len(prefix)]) == prefix
        ]

    def weights(self, name, rng=None, **numbers):
        """{prefix: weight} that a method gives to this group."""
        found = METHODS[name](self.trie, self.rewards, rng or random.Random(0), **numbers)
        prefix = {
            n: p
            for c, path in zip(self.completions, self.trie.paths)
            for n, p in zip(path, prefixes_of(c))
        }
        return {prefix[node]: weight for node, weight in found.items()}


def assert_same(found, wanted):
    wanted = {key: value for key, value in wanted.items() if abs(value) > 1e-9}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_token_mean(seed):
    group, wanted = Group(seed), defaultdict(float)
    tokens = [(p, r) for c, r in zip(group.completions, group.rewards) for p in prefixes_of(c)]
    for prefix, reward in tokens:
        wanted[prefix] += (reward - mean(group.rewards)) / len(tokens)
    assert_same(group.weights("token_mean"), wanted)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_top_entropy(seed, share):
    group, wanted = Group(seed), defaultdict(float)
    tokens = [p for c in group.completions for p in prefixes_of(c)]
    for completion, advantage in zip(group.completions, advantages(group.rewards)):
        for prefix in prefixes_of(completion):
            higher = sum(group.entropy[other] > group.entropy[prefix] for other in tokens)
            if higher < share * len(tokens):
                wanted[prefix] += advantage / (len(group.completions) * len(completion))
    assert_same(group.weights("top_entropy", share=share), wanted)


class Scripted(random.Random):
    """Its randint returns what the script says, and notes what it could have been."""

    def __init__(self, script):
        super().__init__(0)
        self.script, self.ranges = list(script), []

    def randint(self, low, high):
        self.ranges.append((low, high))
        return self.script.pop(0) if self.script else low


@pytest.mark.parametrize("least", [1, 2, 4])
@pytest.mark.parametrize("seed", range(10))
def test_prefix_cut_is_grpo_on_average(seed, least):
    group, average = Group(seed, count=4, length=6), defaultdict(float)
    first = Scripted([])
    group.weights("prefix_cut", first, least=least)
    assert first.ranges == [(min(least, len(c)), len(c)) for c in group.completions]
    cases = list(itertools.product(*(range(low, high + 1) for low, high in first.ranges)))
    for cuts in cases:
        found = group.weights("prefix_cut", Scripted(cuts), least=least)
        kept = {p for c, cut in zip(group.completions, cuts) for p in prefixes_of(c)[:cut]}
        assert found.keys() <= kept
        for prefix, weight in found.items():
            average[prefix] += weight / len(cases)
    wanted = defaultdict(float)
    for completion, advantage in zip(group.completions, advantages(group.rewards)):
        for prefix in prefixes_of(completion):
            wanted[prefix] += advantage / (len(group.completions) * len(completion))
    assert_same({p: w for p, w in average.items() if abs(w) > 1e-9}, wanted)


@pytest.mark.parametrize("seed", range(30))
def test_tempo(seed):
    group, wanted = Group(seed), defaultdict(float)
    spread = math.sqrt(mean((r - mean(group.rewards)) ** 2 for r in group.rewards)) + 1e-4
    for completion, reward in zip(group.completions, group.rewards):
        for prefix in prefixes_of(completion):
            difference = mean(group.through(prefix)) - mean(group.through(prefix[:-1]))
            credit = (reward - mean(group.rewards) + difference) / spread
            wanted[prefix] += credit / (len(group.completions) * len(completion))
    assert_same(group.weights("tempo"), wanted)


def test_tempo_is_grpo_where_nothing_branches():
    trie, rewards = tokenrl.Trie([[2, 3, 4], [5, 6]]), [1.0, 0.0]
    found, grpo = METHODS["tempo"](trie, rewards, None), tokenrl.grpo_weights(trie, rewards)
    assert {n: found[n] for n in (1, 2, 4)} == pytest.approx({n: grpo[n] for n in (1, 2, 4)})
    assert found[0] == pytest.approx(2 * grpo[0])


def others_credit(group):
    """{prefix: sum of R_i - mean R of the others through the longest prefix before it}"""
    credit = defaultdict(float)
    for i, completion in enumerate(group.completions):
        for prefix in prefixes_of(completion):
            for length in reversed(range(len(prefix))):
                others = [
                    reward
                    for j, (c, reward) in enumerate(zip(group.completions, group.rewards))
                    if j != i and tuple(c[:length]) == prefix[:length]
                ]
                if others:
                    credit[prefix] += group.rewards[i] - mean(others)
                    break
    return credit


@pytest.mark.parametrize("seed", range(40))
def test_worthwhile_takes_the_best_of_all_packs(seed):
    group = Group(seed, count=4, length=4)
    credit = others_credit(group)
    pull = {p: abs(credit[p]) * (1 - group.prob[p]) for p in group.prefixes}
    price = sum(pull.values()) / (len(pull) + 1)
    packs = [frozenset([()])]  # every set of prefixes that holds the parents of its members
    for prefix in sorted(group.prefixes, key=len):
        packs += [pack | {prefix} for pack in packs if prefix[:-1] in pack]
    value = lambda pack: sum(pull[p] for p in pull if p[:-1] in pack) - price * len(pack)  # noqa: E731
    best = max(packs, key=lambda pack: (value(pack), -len(pack)))
    chosen = [p for p in pull if p[:-1] in best and pull[p] > price]
    assert_same(group.weights("worthwhile"), {p: credit[p] / len(chosen) for p in chosen})
    assert chosen or not any(pull.values())


def test_worthwhile_where_the_model_was_sure():
    trie = tokenrl.Trie([[2, 3], [4, 5]], [[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2)
    assert METHODS["worthwhile"](trie, [1.0, 0.0], None) == {}
    trie = tokenrl.Trie([[2], [3]], [[0.5]] * 2, [[math.log(0.5)]] * 2)
    assert METHODS["worthwhile"](trie, [1.0, 0.0], None) == {0: 0.5, 1: -0.5}


def test_worthwhile_packs_no_further_than_the_choices():
    sure, torn = 0.0, math.log(0.5)
    completions = [[2, 3, 4, 5, 6], [2, 3, 7, 8, 9]]
    logprobs = [[sure, sure, torn, sure, sure]] * 2
    found = METHODS["worthwhile"](tokenrl.Trie(completions, logprobs, logprobs), [1.0, 0.0], None)
    assert found == {2: 0.5, 5: -0.5}


def test_the_credit_over_others_is_unbiased():
    """Over all groups of three, by their chance: three times the gradient of the mean reward."""
    share = {(): 0.3, (2,): 0.6, (3,): 0.8}  # of token 2 after each prefix, else token 3
    score = {(2, 2): 0.1, (2, 3): 1.0, (3, 2): 0.4, (3, 3): 0.0}

    def prob(prefix):
        return share[prefix[:-1]] if prefix[-1] == 2 else 1 - share[prefix[:-1]]

    def slope(prefix):  # of log pi(token | prefix) by the logit of token 2
        return 1 - share[prefix[:-1]] if prefix[-1] == 2 else -share[prefix[:-1]]

    found, wanted = defaultdict(float), defaultdict(float)
    for completion, reward in score.items():
        for prefix in prefixes_of(completion):
            wanted[prefix[:-1]] += prob(completion[:1]) * prob(completion) * reward * slope(prefix)
    for completions in itertools.product(score, repeat=3):
        chance = math.prod(prob(c[:1]) * prob(c) for c in completions)
        trie = tokenrl.Trie([list(c) for c in completions])
        credit = METHODS["credit_over_others"](trie, [score[c] for c in completions])
        prefix = {
            n: c[: t + 1] for c, path in zip(completions, trie.paths) for t, n in enumerate(path)
        }
        for node, value in credit.items():
            found[prefix[node][:-1]] += chance * value * slope(prefix[node])
    for prefix, value in wanted.items():
        assert found[prefix] == pytest.approx(3 * value)


@pytest.mark.parametrize(
    "name, text, reward",
    [
        ("right_with_steps", "4 * 5 = 20\n#### 20", 1.0),
        ("right_with_steps", "24 / 3 = 8 and 8-1=7\n#### 7", 1.0),
        ("right_with_steps", "4 * 5 = 21\n#### 20", 0.0),
        ("right_with_steps", "4 * 5 = 20\n#### 21", 0.0),
        ("right_with_steps", "#### 20", 0.0),
        ("right_and_short", "#### 20", 1.0),
        ("right_and_short", "well " * 20 + "#### 20", 0.5),
        ("right_and_short", "#### 19", 0.0),
    ],
)
def test_the_shipped_rewards(name, text, reward):
    answer = "7" if text.endswith("7") else "20"
    assert tokenrl.reward_function(f"{ROOT / 'data' / 'rewards.py'}:{name}")(text, answer) == reward


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_methods_train(cli, name):
    method = f"{ROOT / 'data' / 'methods.py'}:{name}"
    code, text = cli("train", "svamp", *FAST, "--steps", "1", "--method", method, "--name", "run")
    assert code == 0, text
    [row] = rows_of("runs/run/metrics.jsonl")
    assert 0 < row["tokens_trained"] <= row["tokens_generated"] and not row["skipped"]


def test_compare_methods(tmp_path):
    own = "def first(trie, rewards, rng): return dict.fromkeys((p[0] for p in trie.paths), 0.1)\n"
    Path(tmp_path, "own.py").write_text(own)
    small = [
        *FAST,
        "--seeds",
        "1",
        "--steps",
        "2",
        "--rates",
        "1e-3",
        "3e-3",
        "--validate-every",
        "1",
    ]

    def compare():
        command = [
            sys.executable,
            ROOT / "tests" / "compare_methods.py",
            "--methods",
            "t-spmo",
            "own.py:first",
        ]
        return subprocess.run(
            [*map(str, command), *small], cwd=tmp_path, text=True, capture_output=True
        )

    done = compare()
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("2 steps, 1 seeds") :]
    assert "│ t-spmo" in table and "│ first" in table and "0.001" in table
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 4
    settings = [json.loads((run / "config.json").read_text())["settings"] for run in runs]
    assert sorted((s["method"], s["lr"]) for s in settings) == [
        ("own.py:first", 1e-3),
        ("own.py:first", 3e-3),
        ("t-spmo", 1e-3),
        ("t-spmo", 3e-3),
    ]
    (runs[0] / "eval.jsonl").unlink()  # one that was interrupted before its end
    before = [(run / "metrics.jsonl").stat().st_mtime for run in runs]
    again = compare()
    assert again.returncode == 0 and again.stdout.count("problems to train") == 1
    assert again.stdout[again.stdout.index("2 steps, 1 seeds") :] == table
    after = [(run / "metrics.jsonl").stat().st_mtime for run in runs]
    assert after[1:] == before[1:]


def test_compare_methods_tells_of_seeds_that_failed_and_of_no_validation(tmp_path, monkeypatch):
    keys = ["before", "accuracy", "tokens to target", "generated", "trained", "packed", "update"]
    run = dict.fromkeys([*keys, "memory", "entropy"], 1.0)
    args = SimpleNamespace(task="svamp", steps=2, seeds=2, target=0.9, rates=[1e-3])
    table = compare_methods.comparison({"a": [run, run], "b": [run]}, {"a": 1.0, "b": 1.0}, args)
    assert [*table.columns[0].cells] == ["a", "b (1 of 2 seeds)"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(compare_methods, "train", lambda *_: tmp_path)
    with pytest.raises(SystemExit, match="--validate-every"):
        compare_methods.best_rate("a", args, [])
