"""The commands train and eval: what works, and what every bad input says."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import DEMO, FAST, ROOT, Words, exact, random_model, rows_of, script
from rich.console import Console

import tokenrl

pytestmark = pytest.mark.usefixtures("quick")


def weights_of(run):
    return safetensors.torch.load_file(Path(run) / "adapter_model.safetensors")


def one_step(cli, name, *options):
    assert cli("train", "svamp", *FAST, "--steps", "1", "--name", name, *options)[0] == 0
    return Path("runs", name)


def small_task(name="few", train=14, test=4, **options):
    """A task of few problems, some of which the demo solves, in the folder d."""
    rows = [tokenrl.Problem(**row) for row in rows_of(DEMO / "train.jsonl")[: train + test]]
    tokenrl.write_task(name, rows, [], options.get("share", test / len(rows)), 0, Path("d"))
    return [name, "--data-dir", "d", "--model", "demo"]


def refused(answer, *words):
    """One sentence, and nothing else but what stands before it."""
    code, text = answer
    assert code in (1, 2) and "Error" in text, text
    for word in words:
        assert word in text, (word, text)
    return True


# ---- what works ----------------------------------------------------------------------------------


def check_learning(run, text, low, high):
    """Held-out accuracy rose, and what was shown is what the files say."""
    rows, answers = rows_of(run / "metrics.jsonl"), rows_of(run / "eval.jsonl")
    phases = ("base", "trained")
    right = {name: [a["correct"] for a in answers if a["phase"] == name] for name in phases}
    assert len(right["base"]) == len(right["trained"]) == 100
    assert sum(right["trained"]) - sum(right["base"]) >= 20
    assert tokenrl.mcnemar(right["base"], right["trained"]) < 0.001
    assert f"({sum(right['trained'])}/100)" in text
    share = sum(r["tokens_trained"] for r in rows) / sum(r["tokens_generated"] for r in rows)
    assert low < share < high
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows if "validation" in row] == [10]
    files = {"adapter_model.safetensors", "adapter_config.json", "config.json", "state.pt"}
    assert files <= set(os.listdir(run)) and not list(run.glob("*tmp"))


LEARN = ["--device", "cpu", "--steps", "10", "--validate-every", "10", "--lr", "2e-3"]
LEARN += ["--eval-problems", "100", "--target-kl", "0.01"]


def test_training_learns(tmp_path):
    """The README's command, shortened, through a pipe."""
    process = script("train", "svamp", *LEARN, cwd=tmp_path)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    assert "bundled model" in text and "\x1b" not in text and "\r" not in text
    assert max(len(line) for line in text.splitlines() if "tokenrl.py" not in line) <= 80
    check_learning(tmp_path / "runs/svamp-s-grpo", text, 0.1, 0.6)


def test_training_learns_where_completions_branch(cli):
    code, text = cli("train", "svamp", *LEARN, "--method", "t-spmo")
    assert code == 0
    check_learning(Path("runs/svamp-t-spmo"), text, 0.0, 0.05)


def test_train_eval_and_gate(cli):
    options = ["--method", "t-spmo", "--replay", "2", "--beta", "0.01"]
    assert cli("train", "svamp", *FAST, "--steps", "2", *options, "--name", "one")[0] == 0
    assert json.loads(Path("runs/one/config.json").read_text())["settings"]["replay"] == 2
    shutil.copytree("runs/one", "runs/two")
    both = ["--adapter", "runs/one", "--adapter", "runs/two"]
    code, text = cli("eval", "svamp", *both, "--limit", 8, "--samples", 2, "--output", "out.jsonl")
    assert code == 0 and "runs/one" in text and "runs/two" in text and "pass@2" in text
    answers = rows_of("out.jsonl")
    said = {
        name: [a["completion"] for a in answers if a["policy"] == name]
        for name in ("base", "runs/one", "runs/two")
    }
    assert list(map(len, said.values())) == [8, 8, 8]
    trained = [a["completion"] for a in rows_of("runs/one/eval.jsonl") if a["phase"] == "trained"]
    assert trained == said["runs/one"]  # what was saved is what was trained
    short = ["--limit", "4", "--min-accuracy", "1.0", "--max-new-tokens", "1"]
    code, text = cli("eval", "svamp", *short)
    assert code == 1 and "below --min-accuracy" in text


def test_adapters_are_compared_as_all_were_asked_or_not_at_all(cli):
    """Else the gate would judge the last one by the prompt of the first."""
    Path("other.txt").write_text("Solve: {question}")
    one_step(cli, "plain", "--seed", 1)
    one_step(cli, "alike")
    one_step(cli, "other", "--prompt", "other.txt", "--max-new-tokens", 9)
    both = ["eval", "svamp", "--limit", 2, "--adapter", "runs/plain", "--adapter"]
    assert cli(*both, "runs/alike")[0] == 0
    assert refused(cli(*both, "runs/other"), "runs/other", "--prompt", "--max-new-tokens")
    assert cli(*both, "runs/other", "--prompt", "other.txt", "--max-new-tokens", 9)[0] == 0
    assert refused(cli(*both, "runs/other", "--prompt", "auto"), "how: --max-new-tokens")


def test_a_process_without_a_prompt_of_its_own(cli, monkeypatch):
    plain = tokenrl.train

    def train(*arguments):
        for row, _ in plain(*arguments):
            yield row, []

    monkeypatch.setattr(tokenrl, "train", train)
    one_step(cli, "one")


def test_patience_is_named_where_it_ends_a_run(cli):
    task = small_task(train=30)
    often = ["--steps", 9, "--validate-every", 1, "--patience", 2, "--max-new-tokens", 1]
    code, text = cli("train", *task, *often, "--group-size", 2, "--prompts-per-step", 1)
    assert code == 0 and "of 2 (no gain: --patience)" in text
    assert "--patience" not in cli("train", *task, *FAST, "--steps", 1)[1]


def test_an_adapter_with_dropout_is_trained_without(cli):
    model = tokenrl.load_model("demo", "cpu")[0]
    options = {"r": 4, "lora_dropout": 0.5, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained("elsewhere")
    base = tokenrl.load_model("demo", "cpu")[0]
    Path("r.py").write_text("def f(text, answer): return 0.5")  # nothing there names a reward
    asked = ["--adapter", "elsewhere", "--reward", "r.py:f", "--model", "demo", "--limit", 2]
    assert cli("eval", "svamp", *asked)[0] == 0
    loaded = tokenrl.load_adapter(base, Path("elsewhere"), "default", "demo", trainable=True)
    with torch.no_grad():
        for key, parameter in loaded.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    trie = tokenrl.Trie([[5, 6, 7]])
    first, second = (tokenrl.packed_logprobs(loaded, [3, 4], trie, [0, 1, 2]) for _ in range(2))
    assert torch.equal(first, second)


def test_an_adapter_that_is_a_prompt_is_refused(cli):
    model = tokenrl.load_model("demo", "cpu")[0]
    tuned = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(model, tuned).save_pretrained("tuned")
    answer = cli("eval", "svamp", "--model", "demo", "--limit", 2, "--adapter", "tuned")
    assert refused(answer, "tuned does not fit demo")


def test_each_column_is_its_own_adapter_and_the_gate_asks_the_last(cli):
    for name, size in (("zero", 0.0), ("wild", 1.0)):
        model = tokenrl.add_lora(tokenrl.load_model("demo", "cpu")[0], 4, 8, "q_proj,v_proj", 1.0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_().mul_(size)
        model.save_pretrained(name)
    options = ["--device", "cpu", "--max-new-tokens", 40, "--limit", 20, "--min-accuracy", 0.1]
    for first, last, wanted in (("zero", "wild", 1), ("wild", "zero", 0)):
        both = ["--adapter", first, "--adapter", last]
        code, text = cli("eval", "svamp", *options, *both, "--output", "o.jsonl", "--shown", 1)
        rows = rows_of("o.jsonl")
        said = {p: [a["completion"] for a in rows if a["policy"] == p] for p in ("base", *both)}
        assert code == wanted and said["zero"] == said["base"] != said["wild"]
        # What each adapter mended, broke and left wrong is shown in full, beside the base's answer.
        assert "wild against base" in text and "zero against base: 0 mended" in text
        assert "broken, up to 1 shown" in text and "still wrong" in text


def test_eval_answers_a_question_of_the_users(cli):
    run = one_step(cli, "one")
    question = "Ann has 3 pens and gets 4 more. How many pens are there?"
    code, text = cli("eval", "svamp", "--question", question, "--adapter", run, "--device", "cpu")
    assert code == 0 and re.search(r"base .*####.* runs/one .*####", text)
    assert "accuracy" not in text and "%" not in text
    Path("r.py").write_text("def close(text, answer): return float(answer) > 1")
    own = ["--reward", "r.py:close", "--metric", "r.py:close"]  # needs a reference
    code, text = cli("eval", "svamp", "--question", question, *own, "--device", "cpu")
    assert code == 0 and "####" in text


def test_eval_shows_types_as_they_are_and_writes_into_a_new_folder(cli):
    kinds = enumerate(["[b]", "[/b]"] * 9)
    problems = [tokenrl.Problem(f"{i}+1?", str(i + 1), kind) for i, kind in kinds]
    tokenrl.write_task("kinds", problems, [], 0.7, 0, Path("d"))
    asked = ["eval", "kinds", "--model", DEMO, "--data-dir", "d", "--output"]
    code, text = cli(*asked, "new/answers.jsonl")
    assert code == 0 and "[b] (" in text and "[/b] (" in text
    assert len(rows_of("new/answers.jsonl")) == 13


def test_an_adapter_may_lie_in_a_folder_called_base(cli):
    one_step(cli, "one").rename("base")
    asked = ["--adapter", "base", "--limit", "4", "--output", "answers.jsonl"]
    assert cli("eval", "svamp", *asked)[0] == 0
    assert {row["policy"] for row in rows_of("answers.jsonl")} == {"base", "base/"}


def test_training_never_asks_a_test_problem(cli, monkeypatch):
    """Training problems are trained, held-out ones validated, and the test set is asked twice."""
    asked = {"roll_out": [], "evaluate": [], "validate": []}
    for name in asked:

        def watched(policy, problems, *rest, name=name, plain=getattr(tokenrl, name), **options):
            if name != "roll_out" or rest[0].temperature:  # else it is for evaluate
                asked[name].append({problem.question for problem in problems})
            return plain(policy, problems, *rest, **options)

        monkeypatch.setattr(tokenrl, name, watched)
    few = small_task(train=28, test=8)
    options = ["--steps", "4", "--prompts-per-step", 8, "--replay", 1, "--validate-every", 2]
    assert cli("train", *few, *FAST, *options)[0] == 0
    train, test = ({r["question"] for r in rows_of(f"d/few/{s}.jsonl")} for s in ("train", "test"))
    held_out = asked["validate"][0]
    trained = set().union(*asked["roll_out"])
    assert len(held_out) == 4 and asked["validate"] == [held_out] * 3  # at the start too
    assert held_out < train and trained <= train - held_out
    assert [a for a in asked["evaluate"] if a != held_out] == [test, test] and not train & test


def test_metrics_are_of_the_steps_own_completions(cli, monkeypatch):
    seen, plain = [], tokenrl.roll_out

    def watched(*arguments, **options):
        found = plain(*arguments, **options)
        seen.extend([found] * (arguments[2].temperature > 0))  # not what is evaluated
        return found

    monkeypatch.setattr(tokenrl, "roll_out", watched)
    one_step(cli, "one", "--prompts-per-step", 6, "--replay", 3, "--seed", 1)
    [row], [rollouts, replays] = rows_of("runs/one/metrics.jsonl"), seen
    rewards = [reward for r in rollouts for reward in r.rewards]
    other = [reward for r in rollouts + replays for reward in r.rewards]
    mean = sum(rewards) / len(rewards)
    assert row["reward"] == pytest.approx(mean) and mean != pytest.approx(sum(other) / len(other))
    distinct = [len(set(map(tuple, r.completions))) / 4 for r in rollouts]
    assert row["distinct"] == pytest.approx(sum(distinct) / 6) and len(set(distinct)) > 1
    entropies = [x for r in rollouts for tokens in r.entropies for x in tokens]
    assert row["entropy"] == pytest.approx(sum(entropies) / len(entropies)) and row["entropy"] > 0
    everything = [len(c) for r in rollouts + replays for c in r.completions]
    assert row["tokens_generated"] == sum(everything)
    assert row["tokens_trained"] <= row["tokens_packed"] and row["grad_norm"] > 0


def test_runs_never_overwrite_each_other(cli):
    for _ in range(2):
        one_step(cli, "same")
    assert sorted(os.listdir("runs")) == ["same", "same-2"]
    rows = [exact(rows_of(f"runs/{name}/metrics.jsonl")) for name in ("same", "same-2")]
    assert rows[0] == rows[1]


def test_dry_run(cli, monkeypatch):
    """The largest step: none ends early, all groups have signal, and nothing is left behind."""
    seen, plain = [], tokenrl.show_step
    watched = lambda row, *rest: seen.append(row) or plain(row, *rest)
    monkeypatch.setattr(tokenrl, "show_step", watched)
    code, text = cli("train", "svamp", *FAST, "--dry-run", "--method", "grpo")
    assert code == 0 and "The largest step" in text and "memory" in text
    few = small_task(train=3, test=3)
    cli("train", *few, *FAST, "--prompts-per-step", 8, "--dry-run")  # problems come again
    cli("train", "svamp", *FAST, "--dry-run", "--replay", "1")
    cli("train", "svamp", *FAST, "--dry-run", "--prompt", "plain", "--stop", " ")  # nor by a text
    assert [row["tokens_generated"] for row in seen] == [192, 768, 288, 192]  # 2 x 4 x 24, ...
    assert all(row["signal"] == 1 and row["length"] == 24 for row in seen)
    assert not Path("runs").exists()


def test_the_dry_run_asks_the_longest_prompts(cli, monkeypatch):
    asked, plain = [], tokenrl.roll_out

    def watched(policy, problems, *rest):
        asked.extend(len(policy.prompt_ids(problem.question)) for problem in problems)
        return plain(policy, problems, *rest)

    monkeypatch.setattr(tokenrl, "roll_out", watched)
    few = small_task(train=14, test=4)
    assert cli("train", *few, *FAST, "--dry-run")[0] == 0
    policy, task = tokenrl.find_policy(tokenrl.Settings("few", model="demo", data_dir=Path("d")))
    lengths = sorted(len(policy.prompt_ids(problem.question)) for problem in task.train)
    assert sorted(asked) == lengths[-2:]


def test_no_test_problems_are_none(cli):
    code, text = cli("train", "svamp", *FAST, "--steps", "1", "--eval-problems", "0")
    assert code == 0 and "accuracy" not in text and "Adapter:" in text
    assert not Path("runs/svamp-s-grpo/eval.jsonl").exists() or not rows_of(
        "runs/svamp-s-grpo/eval.jsonl"
    )


def test_a_sample_is_shown_with_its_question_reference_and_reward(cli):
    code, text = cli("train", "svamp", *FAST, "--steps", "1")
    assert code == 0
    shown = re.search(r"question (.+?) completion .*? reference (\S+) reward [01] step", text)
    asked = [(row["question"], row["answer"]) for row in rows_of(DEMO / "train.jsonl")]
    assert shown and shown.groups() in asked


def test_targets_may_be_written_with_blanks(cli):
    run = one_step(cli, "one", "--lora-targets", "q_proj, v_proj", "--prompts-per-step", 8)
    for target in ("q_proj", "v_proj"):
        found = [w for name, w in weights_of(run).items() if f"{target}.lora_B" in name]
        assert any(w.abs().max() > 0 for w in found)
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 32)


def test_answers_that_are_cut_off_are_told(cli):
    code, text = cli("train", "svamp", *FAST, "--steps", "1", "--max-new-tokens", "2")
    assert code == 0 and "100% cut off at 2 tokens" in text.split("step reward")[0]
    assert "Nothing was trained: no rewards differed; see --reward." in text


def test_version_and_help(monkeypatch, cli, capsys):
    assert cli("--version") == (0, f"tokenrl {tokenrl.__version__}")
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("prep", "train", "eval", "inspect", "plot", "merge"):
        with pytest.raises(SystemExit):
            tokenrl.main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80 and len(lines) <= 90
        if command == "train":
            options = re.findall(r"--(?!help)[a-z-]+", " ".join(lines))
            assert options.index("--steps") < 6 and options[0] == "--model"


IMPORT = """
import logging, os, signal, sys, warnings
def state():
    handlers = {n: signal.getsignal(n) for n in signal.valid_signals()}
    levels = {name: logging.getLogger(name).level for name in ("", "transformers", "torch")}
    return dict(os.environ), handlers, levels, logging.getLogger().handlers[:], warnings.filters[:]
before = state()
import tokenrl
assert state() == before
assert not {"torch", "transformers", "peft", "accelerate", "numpy"} & set(sys.modules)
"""


def test_importing_changes_nothing_and_needs_no_heavy_import():
    subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, check=True, timeout=60)


# ---- validation, the best adapter, methods of one's own, further training ------------------------


def test_the_best_adapter_is_kept_and_training_stops_early(cli, monkeypatch):
    scores, kept = iter([0.2, 0.3, 0.6, 0.5, 0.4, 0.9]), []
    monkeypatch.setattr(tokenrl, "validate", lambda *_: next(scores))
    plain = tokenrl.save_run

    def watched(run, model, optimizer, state, keep):
        plain(run, model, optimizer, state, keep)
        own = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        kept.append((state["step"], keep, own))

    monkeypatch.setattr(tokenrl, "save_run", watched)
    options = ["--steps", "30", "--validate-every", "1", "--patience", "2", "--target-kl", "0"]
    few = small_task()
    code, text = cli("train", *few, *FAST, *options, "--prompts-per-step", 8, "--name", "best")
    assert code == 0 and "from step 2 of 4" in text and "validation" in text
    assert "50.0%" in text  # in the table
    rows = rows_of("runs/best/metrics.jsonl")
    assert [row["validation"] for row in rows] == [0.3, 0.6, 0.5, 0.4]
    assert [(step, keep) for step, keep, _ in kept][:3] == [(0, True), (1, True), (2, True)]
    assert not any(keep for step, keep, _ in kept if step > 2)
    weights = {name.replace(".default", ""): w for name, w in kept[2][2].items()}
    found = weights_of("runs/best")
    assert weights.keys() == found.keys()
    assert all(torch.equal(weights[name], found[name]) for name in found)
    assert not all(torch.equal(a, b) for a, b in zip(kept[2][2].values(), kept[-1][2].values()))
    asked = ["--adapter", "runs/best", "--output", "o.jsonl"]
    assert cli("eval", "few", "--data-dir", "d", *asked)[0] == 0
    answers = [a["completion"] for a in rows_of("o.jsonl") if a["policy"] == "runs/best"]
    trained = [a["completion"] for a in rows_of("runs/best/eval.jsonl") if a["phase"] == "trained"]
    assert answers == trained  # the closing comparison is of what was kept


MINE = '''
def first(trie, rewards, rng, scale=1.0):
    """Only the first token of each completion. More."""
    mean = sum(rewards) / len(rewards)
    return {path[0]: scale * (r - mean) / len(rewards) for path, r in zip(trie.paths, rewards)}

def entropies(trie, rewards, rng):
    assert len(trie.entropies) == len(trie.logprobs) == len(trie.tokens)
    assert min(trie.entropies) >= 0 >= max(trie.logprobs)
    return {rng.randrange(len(trie.tokens)): 0.1}
'''


def test_a_method_of_ones_own(cli):
    Path("mine.py").write_text(MINE)
    options = [*FAST, "--steps", "2", "--prompts-per-step", 8]
    code, text = cli("train", "svamp", *options, "--method", "mine.py:first")
    assert code == 0 and "first on svamp" in text and "svamp, first, runs/svamp-first" in text
    rows = rows_of("runs/svamp-first/metrics.jsonl")
    assert all(0 < row["tokens_trained"] <= 4 * 8 for row in rows)
    config = json.loads(Path("runs/svamp-first/config.json").read_text())
    assert config["settings"]["method"] == "mine.py:first"
    assert "svamp-first" in cli("eval", "svamp", "--adapter", "runs/svamp-first", "--limit", 2)[1]
    assert "svamp-first" in cli("plot", "runs/svamp-first")[1]
    asked = ["--adapter", "runs/svamp-first", "--index", 3]
    assert refused(cli("inspect", "svamp", *asked), "--method mine.py:first")
    code, text = cli("inspect", "svamp", *asked, "--method", "mine.py:first")
    assert code == 0 and "first: Only the first token of each completion." in text
    assert cli("train", "svamp", *options, "--method", "mine.py:entropies", "--replay", 1)[0] == 0


SPOILS = """
import tokenrl
def careful(trie, rewards, rng):
    return tokenrl.grpo_weights(trie, rewards)
def spoils(trie, rewards, rng):
    weights = tokenrl.grpo_weights(trie, rewards)
    trie.paths.sort(key=len)
    for i, path in enumerate(trie.paths):
        path.reverse()
        rewards[i] -= 0.5
    return weights
"""


def test_a_method_may_write_into_what_it_gets(cli):
    Path("m.py").write_text(SPOILS)
    options = [*FAST, "--steps", "2", "--prompts-per-step", 8, "--eval-problems", 0]
    for name in ("careful", "spoils"):
        assert cli("train", "svamp", *options, "--method", f"m.py:{name}")[0] == 0
    first, second = (rows_of(f"runs/svamp-{name}/metrics.jsonl") for name in ("careful", "spoils"))
    assert exact(first) == exact(second) and sum(row["tokens_trained"] for row in first)


def test_code_may_import_what_lies_beside_it(cli):
    Path("own").mkdir()
    Path("own/beside_it.py").write_text("few = 1.0")
    Path("own/r.py").write_text(
        "from beside_it import few\ndef f(text, answer): return few * (text > answer)"
    )
    one_step(cli, "one", "--reward", "own/r.py:f")


@pytest.mark.parametrize(
    "code, words",
    [
        ("def f(trie, rewards, rng): return 1 / 0", ["ZeroDivisionError"]),
        ("def f(trie, rewards, rng): raise SystemExit(0)", ["SystemExit"]),
        ("def f(trie, rewards, rng): return [1.0]", []),
        ("def f(trie, rewards, rng): return {0: 'x'}", []),
        ("def f(trie, rewards, rng): return {10**6: 1.0}", ["nodes"]),
        ("def f(trie, rewards): return {}", ["TypeError"]),
        ("def f(trie, rewards, rng): return {0: float('nan')}", ["finite"]),
        ("f = 3", ["no function"]),
        ("import nothing_like_it", ["nothing_like_it"]),
    ],
)
def test_a_broken_method_ends_in_one_sentence(cli, code, words):
    Path("m.py").write_text(code)
    options = [*FAST, "--steps", "4", "--prompts-per-step", 8, "--eval-problems", 0]
    assert refused(cli("train", "svamp", *options, "--method", "m.py:f"), *words)


def test_training_goes_on_from_an_adapter(cli):
    options = ["--lora-rank", 4, "--lora-targets", "q_proj", "--lr", 0.02]
    first = one_step(cli, "first", *options, "--prompts-per-step", 8)
    more = [*FAST, "--steps", "2", "--adapter", first, "--method", "grpo"]
    code, text = cli("train", "svamp", *more, "--name", "more", "--beta", 0.1)
    assert code == 0 and re.search(r"base ┃ +start ┃ +trained", text)
    config = json.loads(Path("runs/more/adapter_config.json").read_text())
    assert config["r"] == 4 and config["target_modules"] == ["q_proj"]
    old, new = rows_of(first / "eval.jsonl"), rows_of("runs/more/eval.jsonl")
    for before, now in (("base", "base"), ("trained", "start")):
        texts = [
            [a["completion"] for a in rows if a["phase"] == p]
            for rows, p in ((old, before), (new, now))
        ]
        assert texts[0] == texts[1] and len(texts[0]) == 8
    assert weights_of("runs/more").keys() == weights_of(first).keys()
    whole = rows_of("runs/more/metrics.jsonl")
    assert len(whole) == 2
    for shape in (
        ["--lora-rank", 8],
        ["--lora-alpha", 1],
        ["--lora-targets", "v_proj"],
        ["--lora-layers", 1],
    ):
        assert refused(cli("train", "svamp", *more, *shape), shape[0])
    few = small_task("other")  # another task
    code, text = cli("train", *few, *FAST, "--steps", "1", "--adapter", first)
    assert code == 0 and Path("runs/other-s-grpo").is_dir() and "start" in text
    assert refused(cli("train", "svamp", *FAST, "--adapter", "nowhere"), "nowhere/config.json")
    assert not Path("runs/svamp-s-grpo").exists()


def test_a_task_for_tests_only_is_not_trained(cli):
    task = small_task("exam", train=0, test=6, share=1)
    assert refused(cli("train", *task, *FAST), "exam", "test")
    assert cli("eval", *task)[0] == 0 and not Path("runs").exists()
    assert cli("inspect", *task, "--max-new-tokens", 8)[0] == 0


# ---- what is printed can be pasted ---------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
def test_every_printed_command_can_be_pasted(cli, monkeypatch, terminal):
    """Names that need quotes and are long: each command stands in one line, and works."""
    options = {"force_terminal": terminal, "width": 80, "legacy_windows": False}
    folder = Path("a folder with a rather long name which alone fills half a line of 80")
    folder.mkdir()
    (folder / "r.py").write_text("def r(text, answer): return float(len(text) % 2)\n" + MINE)
    code = shlex.quote(f"{folder}/r.py:r")
    small_task()
    Path("d").rename(folder / "d")
    asked = ["few", "--data-dir", folder / "d", "--model", DEMO, "--reward", f"{folder}/r.py:r"]
    asked += ["--metric", f"{folder}/r.py:r", "--method", f"{folder}/r.py:first"]
    said = []

    def run(*arguments, wanted=0):
        with open("out.txt", "w", encoding="utf-8") as file:
            console = Console(file=file, **options, **tokenrl.AS_IT_IS)
            monkeypatch.setattr(tokenrl, "console", console)
            assert cli(*arguments)[0] == wanted
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", Path("out.txt").read_text(encoding="utf-8"))
        lines = [line for line in text.splitlines() if "python tokenrl.py " in line]
        said.extend(lines)
        return [shlex.split(line.split("python tokenrl.py ")[1]) for line in lines]

    monkeypatch.setattr(sys, "argv", ["../some where/tokenrl.py"])
    run("train", *asked, *FAST, "--steps", "1", "--name", "elsewhere", wanted=0)
    assert "python '../some where/tokenrl.py' eval few" in Path("out.txt").read_text()
    monkeypatch.setattr(sys, "argv", ["tokenrl.py"])
    [again] = run("train", *asked, *FAST, "--steps", "1", "--name", "a long name too")
    assert code in said[-1] and run(*again) == []
    plain, stopped = tokenrl.update, []

    def stop(*arguments):
        stopped.append(os.kill(os.getpid(), signal.SIGTERM)) if not stopped else None
        return plain(*arguments)

    monkeypatch.setattr(tokenrl, "update", stop)
    [again] = run("train", *asked, *FAST, "--steps", "3", "--name", "b", wanted=143)
    assert len(run(*again)) == 1 and len(rows_of("runs/b/metrics.jsonl")) == 3


# ---- signals, full disks and steps that fail -----------------------------------------------------


def test_a_second_signal_gives_up_and_says_how_to_continue(cli, monkeypatch):
    def killed_twice(*_, **__):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(tokenrl, "evaluate", killed_twice)
    before = signal.getsignal(signal.SIGINT)
    code, text = cli("train", "svamp", *FAST, "--name", "my run")
    assert code == 130 and "train svamp --resume 'runs/my run'" in text
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_signal_within_a_step_saves_it_and_leaves_the_terminal_as_it_was(
    cli, monkeypatch, number, code, terminal
):
    plain, steps = tokenrl.update, []

    def update(*arguments):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return plain(*arguments)

    monkeypatch.setattr(tokenrl, "update", update)
    before = signal.getsignal(number)
    with open("out.txt", "w", encoding="utf-8") as file:
        console = Console(file=file, force_terminal=terminal, width=80, **tokenrl.AS_IT_IS)
        monkeypatch.setattr(tokenrl, "console", console)
        found = cli("train", "svamp", *FAST, "--steps", "50", "--save-every", "40")[0]
    text = Path("out.txt").read_text(encoding="utf-8")
    assert found == code and "--resume runs/svamp-s-grpo" in text and len(steps) == 2
    assert text.rfind("\x1b[?25h") >= text.rfind("\x1b[?25l")  # the cursor is back
    assert ("\x1b[?25h" in text) == terminal and signal.getsignal(number) is before
    state = torch.load("runs/svamp-s-grpo/state.pt", weights_only=True)
    assert state["step"] == 2 == len(rows_of("runs/svamp-s-grpo/metrics.jsonl"))


def test_ctrl_c_that_ends_the_pipe_too_saves_the_step(cli, monkeypatch):
    """`train ... | tee log`: both get the signal, and what is said of it can no longer be read."""
    plain, said = tokenrl.update, tokenrl.console.print

    def update(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    def no_longer(*words, **options):
        if "Stopping" in str(words[:1]):
            raise SystemExit(1)  # as rich does
        said(*words, **options)

    monkeypatch.setattr(tokenrl, "update", update)
    monkeypatch.setattr(tokenrl.console, "print", no_longer)
    assert cli("train", "svamp", *FAST, "--steps", 5, "--save-every", 5, "--name", "x")[0] == 130
    assert torch.load("runs/x/state.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize("phase", ["base", "trained"])
def test_sigterm_within_an_evaluation(cli, monkeypatch, phase):
    plain, calls = tokenrl.evaluate, []

    def evaluate(policy, problems, settings, samples, tick):
        calls.append(1)

        def killed(count):
            if len(calls) == ("base", "trained").index(phase) + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            tick(count)

        return plain(policy, problems, settings, samples, killed)

    options = ["--steps", "2", "--batch-rows", 4]
    with monkeypatch.context() as patch:
        patch.setattr(tokenrl, "evaluate", evaluate)
        code, text = cli("train", "svamp", *FAST, *options)
    assert code == 143 and "--resume runs/svamp-s-grpo" in text and "Traceback" not in text
    code, text = cli("train", "svamp", "--resume", "runs/svamp-s-grpo")
    assert code == 0 and "Adapter:" in text
    assert [a["phase"] for a in rows_of("runs/svamp-s-grpo/eval.jsonl")].count(phase) == 8


def test_full_disk_keeps_the_last_checkpoint(cli, monkeypatch):
    write, calls = Path.write_bytes, []

    def full(path, data):
        calls.append(path.name == "state.pt")
        if sum(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    code, text = cli("train", "svamp", *FAST, "--steps", "4", "--save-every", "2", "--name", "full")
    assert code == 1 and "disk is full" in text
    assert torch.load("runs/full/state.pt", weights_only=True)["step"] == 2
    saved = weights_of("runs/full")
    weights = torch.load("runs/full/state.pt", weights_only=True)["weights"]
    weights = {name.replace(".default", ""): weight for name, weight in weights.items()}
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in saved)


@pytest.mark.parametrize(
    "options",
    [
        "--lr 1e20 --target-kl 0 --validate-every 3",
        "--lr 1e3 --target-kl 0 --validate-every 3",
        "--lr 1e20 --target-kl 0.003",
    ],
)
def test_whatever_a_learning_rate_does_a_good_adapter_is_kept(cli, options):
    options = [*options.split(), "--steps", "6", "--save-every", "1", "--prompts-per-step", 8]
    code, text = cli("train", "svamp", *FAST, *options, "--name", "x")
    assert all(torch.isfinite(w).all() for w in weights_of("runs/x").values())
    assert code == 0 or "--lr" in text or "--dtype" in text
    out = ["--limit", "40", "--output", "o.jsonl", "--adapter", "runs/x", "--device", "cpu"]
    assert cli("eval", "svamp", *out)[0] == 0
    right = {"base": 0, "runs/x": 0}
    for row in rows_of("o.jsonl"):
        right[row["policy"]] += row["correct"]
    assert right["runs/x"] >= right["base"] - 6


def test_non_finite_steps_stop_the_run(cli, monkeypatch):
    plain = tokenrl.step_packs

    def bad(*given):
        for trie, weights in plain(*given):
            yield trie, dict.fromkeys(weights, float("nan"))

    monkeypatch.setattr(tokenrl, "step_packs", bad)
    code, text = cli("train", "svamp", *FAST, "--steps", "9", "--name", "nan")
    assert refused((code, text), "not finite", "runs/nan", "--lr")
    rows = [row for row in rows_of("runs/nan/metrics.jsonl") if row["tokens_trained"]]
    assert [row["skipped"] for row in rows] == [True] * 3
    assert all(torch.isfinite(w).all() for w in weights_of("runs/nan").values())


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    ],
)
def test_out_of_memory(cli, monkeypatch, message):
    def fail(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(tokenrl, "sample", fail)
    code, text = cli("train", "svamp", *FAST, "--dry-run")
    assert refused((code, text), "memory", "--batch-rows", "--max-pack-tokens", "--max-new-tokens")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("train swamp --model demo --data-dir d", ["'swamp'", "prep YOUR_FILE.csv"]),
        ("train svamp --method ppo", ["ppo", "s-grpo", "FILE.py:function"]),
        ("inspect svamp --method ppo", ["ppo", "s-grpo"]),
        ("train svamp --method no.py:f", ["no.py"]),
        ("train svamp --method regex:no.py:f", ["regex:no.py:f"]),
        ("train svamp --shots 1", ["--shots", "prompt"]),
        ("eval svamp --reward no.py:kpi", ["no.py"]),
        ("eval svamp --metric no.py:kpi", ["no.py"]),
        ("train svamp --reward best", ["'best'"]),
        ("train svamp --group-size 1", ["--group-size", "2"]),
        ("inspect svamp --group-size 0", ["--group-size", "2"]),
        ("train svamp --k 3", ["--k", "--alpha"]),
        ("train svamp --prompt none.txt", ["none.txt"]),
        ("train svamp --prompt chat", ["chat template"]),
        ("train svamp --lora-targets nothing", ["'nothing'", "q_proj"]),
        ("train svamp --lora-targets embed_tokens", ["'embed_tokens'"]),
        ("train svamp --lora-targets lm_head", ["'lm_head'"]),
        ("train svamp --lora-targets q_proj,w_proj", ["'w_proj'"]),
        ("eval svamp --adapter nowhere", ["nowhere/config.json"]),
        ("inspect svamp --adapter nowhere", ["nowhere/config.json"]),
        ("merge nowhere out", ["nowhere/config.json"]),
        ("train svamp --resume nowhere", ["nowhere"]),
        ("train svamp --dtype int3", ["int3"]),
        ("eval svamp --dtype tensor", ["tensor"]),
        ("train svamp --device abacus", ["'abacus'"]),
        ("train svamp --device cuda:99", ["cuda:99"]),
        ("train svamp --max-new-tokens 9999", ["context", "--max-new-tokens"]),
        ("eval svamp --max-new-tokens 9999", ["--max-new-tokens"]),
        ("eval svamp --limit 0", ["--limit"]),
        ("eval svamp --limit -1", ["--limit"]),
        ("eval svamp --samples -1", ["--samples"]),
        ("eval svamp --shown -1", ["--shown"]),
        ("inspect svamp --index 999", ["--index", "700"]),
        ("inspect svamp --output group.pdf", [".svg"]),
        ("plot none", ["none"]),
        ("plot none --what weight", ["no weight to draw"]),
    ],
)
def test_bad_arguments(cli, arguments, words):
    assert refused(cli(*arguments.split()), *words)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "option, values",
    [
        ("lr", "inf nan 1e37 -1 x"),
        ("lora-alpha", "nan inf -1 1e300"),
        ("seed", f"{2**70} -1 1.5"),
        ("p", "nan 1.5 -0.1"),
        ("temperature", "0 nan inf -1 1e-300"),
        ("beta", "nan inf -1 1e300"),
        ("target-kl", "nan inf -1"),
        ("lora-layers", "0 1.1 nan"),
        ("lora-rank", "0 -1"),
        ("steps", "0 -5"),
        ("prompts-per-step", "0"),
        ("max-new-tokens", f"0 {10**30}"),
        ("batch-rows", "0"),
        ("max-pack-tokens", "0"),
        ("validate-every", "-1"),
        ("patience", f"0 {10**30}"),
        ("save-every", f"0 {10**30}"),
        ("eval-problems", "-1"),
        ("alpha", "-1"),
        ("k", "-1"),
        ("replay", "-1"),
        ("shots", "-1"),
    ],
)
def test_options_beyond_their_edges(cli, option, values):
    for value in values.split():
        assert refused(cli("train", "svamp", f"--{option}={value}"), f"--{option}")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "options",
    [
        "--lora-alpha 1e9",
        "--beta 1e9",
        "--temperature 100",
        "--temperature 0.01",
        "--target-kl 1e-30 --lr 1",
        "--max-pack-tokens 1 --replay 2",
        "--batch-rows 1",
        "--lora-layers 0.001 --lora-rank 1",
        "--alpha 0 --p 0",
        "--alpha 4 --k 4",
        f"--seed {2**32 - 1} --save-every {10**9} --patience {10**9}",
    ],
)
def test_options_at_their_edges(cli, options):
    code, text = cli(
        "train", "svamp", *FAST, "--steps", "2", "--eval-problems", 2, *options.split()
    )
    assert code == 0, text


@pytest.mark.parametrize(
    "content, words",
    [
        ("", ["mine"]),
        ('{"question": "q"}\n', ["train.jsonl line 1", "no answer"]),
        ('{"question": "q", "answer": 1}\n{"question": "q", "answer": "x"}\n', ["line 2"]),
        ("{", ["train.jsonl"]),
    ],
)
def test_bad_prepared_data(cli, content, words):
    small_task("mine")
    Path("d/mine/train.jsonl").write_text(content)
    assert refused(cli("train", "mine", "--model", DEMO, "--data-dir", "d"), *words)


def test_bad_worked_examples(cli):
    task = small_task("mine")
    tokenrl.write_jsonl(
        Path("d/mine/examples.jsonl"), [{"question": "q", "answer": "a"}, {"question": "q"}]
    )
    assert refused(cli("train", *task), "examples.jsonl line 2")


def test_shots_is_the_number_of_worked_examples_and_evaluation_keeps_it(cli, monkeypatch):
    examples = [{"question": f"q{i}", "answer": "a"} for i in range(3)]
    problems = [tokenrl.Problem(f"train {i}", str(i)) for i in range(8)]
    tokenrl.write_task("mine", problems, examples, 0.5, 0, Path("d"))
    seen, sample = [], tokenrl.sample

    def watched(model, tokenizer, prompts, *rest, **options):
        seen.extend(tokenizer.decode(prompt).count("Answer:") - 1 for prompt in prompts)
        return sample(model, tokenizer, prompts, *rest, **options)

    monkeypatch.setattr(tokenrl, "sample", watched)
    asked, model = ["mine", "--data-dir", "d"], ["--model", DEMO, "--prompt", "plain"]
    for options, shots in (([], 3), (["--shots", 2], 2), (["--shots", 0], 0), (["--shots", 9], 3)):
        seen.clear()
        assert cli("eval", *asked, *model, "--limit", 2, *options)[0] == 0
        assert set(seen) == {shots}
    assert cli("train", *asked, *model, *FAST, "--steps", 1, "--shots", 1)[0] == 0
    seen.clear()
    assert cli("eval", *asked, "--adapter", "runs/mine-s-grpo", "--limit", 2)[0] == 0
    assert set(seen) == {1}


def test_a_folder_that_cannot_be_written(cli):
    Path("runs").write_text("in the way")
    assert refused(cli("train", "svamp", *FAST), "runs")


def test_a_stop_text_as_a_shell_passes_it(cli, monkeypatch):
    asked, plain = [], tokenrl.sample

    def sample(*arguments, **options):
        asked.append(options["stop"])
        return plain(*arguments, **options)

    monkeypatch.setattr(tokenrl, "sample", sample)
    ask, plain_prompt = ["eval", "svamp", "--limit", 2, "--device", "cpu"], ["--prompt", "plain"]
    for own in ([], plain_prompt):
        asked.clear()
        assert cli(*ask, *own, "--stop", r"\n####")[0] == 0 and set(asked) == {"\n####"}
    asked.clear()
    assert cli(*ask, *plain_prompt)[0] == 0 and set(asked) == {"\nQuestion:"}


def test_prompt_file_must_hold_the_question(cli):
    Path("p.txt").write_text("Answer me.")
    assert refused(cli("train", "svamp", "--prompt", "p.txt"), "{question}")


def test_a_start_that_failed_leaves_no_folder_behind(cli):
    Path("bad.py").write_text("def f(text, answer): return 2\n")
    for _ in range(2):
        options = ["--reward", "bad.py:f", "--name", "x"]
        assert refused(cli("train", "svamp", *FAST, *options), "not from 0 to 1")
    assert not Path("runs/x-2").exists()
    one_step(cli, "x")
    assert os.listdir("runs") == ["x"]


# ---- models --------------------------------------------------------------------------------------


def save_model(folder, **options):
    """A random Qwen2 with the demo's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    config = transformers.AutoConfig.from_pretrained(DEMO, **options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_named_model_is_never_replaced(cli):
    task = small_task("demo2")[:3]
    code, text = cli("train", *task, "--model", "Qwen/Qwen2-1.5B")
    assert refused((code, text), "Qwen/Qwen2-1.5B is no folder") and "--model demo" not in text
    assert refused(cli("train", *task), "Qwen/Qwen2-1.5B is no folder")  # on a CPU too
    assert cli("train", *task, "--model", "demo", *FAST, "--steps", "1")[0] == 0
    assert cli("merge", "runs/demo2-s-grpo", "merged")[0] == 0
    Path("empty").mkdir()
    assert refused(cli("train", *task, "--model", "empty"), "empty holds no model")
    shutil.copytree(DEMO, "pointer")
    Path("pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert refused(cli("train", *task, "--model", "pointer"), "pointer holds no model")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer.json", None, ["tokenizer"]),
        ("tokenizer.json", "{}", ["no model"]),
        ("config.json", "[]", ["no model"]),
        ("config.json", ("hidden_size", 64), ["no model"]),
        ("config.json", ("hidden_size", "wide"), ["no model"]),
        ("model.safetensors", "layers.1.", ["lacks weights", "model.layers.1."]),
        ("model.safetensors", "nan", ["not finite"]),
    ],
)
def test_a_broken_model_ends_in_one_sentence(cli, name, content, words):
    shutil.copytree(DEMO, "broken")
    path = Path("broken", name)
    if content is None:
        path.unlink()
    elif isinstance(content, tuple):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict([content])))
    elif name == "model.safetensors":
        loaded = safetensors.torch.load_file(path)
        kept = {k: v for k, v in loaded.items() if content not in k}
        if content == "nan":
            kept["model.norm.weight"][0] = torch.nan
        safetensors.torch.save_file(kept, path, metadata={"format": "pt"})
    else:
        path.write_text(content)
    task = small_task("demo2")[:3]
    for command in ("train", "eval", "inspect"):
        assert refused(cli(command, *task, "--model", "broken"), "broken", *words)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_is_the_bundled_model_without_a_gpu(cli, monkeypatch, device):
    plain, prepared = tokenrl.load_model, []
    problems = [tokenrl.Problem(f"{i}+1", str(i + 1)) for i in range(40)]
    monkeypatch.setattr(tokenrl, "load_model", lambda *_: plain("demo", "cpu", "auto"))
    monkeypatch.setattr(tokenrl, "pick_device", lambda asked: device if asked == "auto" else asked)
    monkeypatch.setattr(
        tokenrl, "svamp_problems", lambda source: prepared.append(source) or problems
    )
    for _ in range(2):  # the real SVAMP is prepared once
        options = ["--steps", "1", "--data-dir", "d", "--device", "auto"]
        code, text = cli("train", "svamp", *FAST, *options)
        real = device == "cuda"
        assert code == 0 and ("bundled model" in text) != real
        assert ("Loading Qwen/Qwen2-1.5B" in text) == real
    assert prepared == [None] * real


@pytest.mark.parametrize(
    "message, words",
    [
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory", ["Out of memory"]),
        ("some layer is not as it should be", ["no model", "some layer is not"]),
    ],
)
def test_a_model_that_cannot_be_had_is_never_replaced(cli, monkeypatch, message, words):
    def fails(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    monkeypatch.setattr(tokenrl, "pick_device", lambda device: "cuda")
    monkeypatch.setattr(tokenrl, "fetch_model", lambda name: str(DEMO))
    shutil.copytree(DEMO, "d/svamp")
    code, text = cli("train", "svamp", *FAST, "--steps", "1", "--data-dir", "d")
    assert refused((code, text), *words) and "bundled model" not in text


def test_the_bundled_model_runs_on_the_cpu_of_a_mac(cli, monkeypatch):
    monkeypatch.setattr(
        tokenrl, "pick_device", lambda device: "mps" if device == "auto" else device
    )
    code, text = cli("eval", "svamp", "--limit", "4")
    assert code == 0 and "/4)" in text


def test_the_script_alone_has_no_bundled_model(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenrl, "DATA", tmp_path / "data")
    asked = ["train", "svamp", "--device", "cpu", "--data-dir", "d"]
    for model in ([], ["--model", "demo"]):
        assert refused(cli(*asked, *model), "demo: copy that folder")


def test_auto_does_not_fall_back_where_the_data_is_wrong(cli, monkeypatch):
    monkeypatch.setattr(tokenrl, "pick_device", lambda device: "cuda")
    shutil.copytree(DEMO, "d/svamp")
    Path("d/svamp/examples.jsonl").write_text('{"question": "q"}\n')
    code, text = cli("train", "svamp", *FAST, "--steps", "1", "--data-dir", "d")
    assert refused((code, text), "examples.jsonl line 1") and "demo" not in text


def test_another_task_trains_a_local_model(cli, tmp_path):
    save_model(tmp_path / "model")
    problems = [tokenrl.Problem(f"{i}+1", str(i + 1)) for i in range(9)]
    tokenrl.write_task("own", problems, [], 0.3, 0, Path("d"))
    options = [*FAST, "--steps", "1", "--data-dir", "d", "--model", "model", "--temperature", "2"]
    code, text = cli("train", "own", *options)
    assert code == 0 and "plain prompt" in text  # a base model: worked examples
    assert cli("merge", "runs/own-s-grpo", "merged")[0] == 0
    assert cli("eval", "own", "--data-dir", "d", "--model", "merged")[0] == 0
    asked = ["--data-dir", "d", "--adapter", "runs/own-s-grpo", "--model", DEMO]
    assert refused(cli("eval", "own", *asked), "made for model")


def test_an_adapter_that_does_not_fit(cli, tmp_path):
    save_model(tmp_path / "a" / "model")
    save_model(tmp_path / "b" / "model", hidden_size=64)
    problems = [tokenrl.Problem(f"{i}+1", str(i + 1)) for i in range(9)]
    tokenrl.write_task("own", problems, [], 0.3, 0, Path("d"))
    run = Path("runs/own-s-grpo")
    options = [*FAST, "--steps", "1", "--data-dir", "d", "--model", "a/model"]
    assert cli("train", "own", *options)[0] == 0
    asked = ["eval", "own", "--adapter", run, "--data-dir", "d"]
    assert refused(cli(*asked, "--model", "b/model"), "does not fit")
    Path("d").rename("moved")
    assert cli("train", "own", "--resume", run, "--data-dir", "moved")[0] == 0
    Path("moved").rename("d")
    Path("nameless").mkdir()
    for foreign, word in (
        ("[]", "adapter_config.json"),
        ('{"base_model_name_or_path": null}', "made for None"),
        ('{"base_model_name_or_path": 3}', "made for 3"),
        ('{"base_model_name_or_path": "model"}', "nameless"),
    ):
        Path("nameless/adapter_config.json").write_text(foreign)
        asked = ["--adapter", "nameless", "--data-dir", "d", "--model", "a/model"]
        assert refused(cli("eval", "own", *asked), word)


@pytest.mark.parametrize("change", ["renamed", "missing", "nan", "more"])
def test_an_adapter_with_other_keys_or_nan_is_refused(cli, change):
    """peft fills what it does not find with an untrained adapter."""
    run = one_step(cli, "one")
    weights = weights_of(run)
    first = min(weights)
    if change == "nan":
        weights[first][0] = torch.nan
    elif change == "more":
        weights["base_model.model.extra.lora_A.weight"] = torch.zeros(2, 2)
    else:
        moved = weights.pop(first)
        if change == "renamed":
            weights[first.replace("layers", "blocks")] = moved
    safetensors.torch.save_file(weights, run / "adapter_model.safetensors")
    for command in (
        ["eval", "svamp", "--adapter", run],
        ["inspect", "svamp", "--adapter", run],
        ["merge", run, "out"],
        ["train", "svamp", *FAST, "--adapter", run],
    ):
        assert refused(cli(*command), "runs/one", "finite" if change == "nan" else "fit")
    assert not Path("out").exists()


def test_every_start_checks_the_model(cli, monkeypatch):
    """And computes in float32 where float16 has too few digits for it."""
    seen, bad = [], {torch.float16}

    def check(model, tokenizer):
        seen.append(model.dtype)
        tokenrl.refuse(model.dtype in bad, "not exact")

    monkeypatch.setattr(tokenrl, "check_model", check)
    short = ["svamp", "--device", "cpu", "--max-new-tokens", 2, "--dtype"]
    train = ["train", *FAST, "--steps", 1]
    for command in (train, ["eval", "--limit", 2], ["inspect", "--index", 3]):
        seen.clear()
        assert cli(*command, *short, "float16")[0] == 0 and seen == [torch.float16, torch.float32]
        bad.add(torch.float32)
        assert refused(cli(*command, *short, "float32"), "not exact")
        bad.remove(torch.float32)


def test_a_float32_checkpoint_is_computed_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert tokenrl.pick_dtype("auto", "cuda", torch.float32) == torch.float32
    assert tokenrl.pick_dtype("auto", "cuda", torch.bfloat16) == torch.bfloat16


CHAT = (
    "{% for m in messages %}<|user|>{{ m.content }}<|turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)


def chat_tokenizer(template):
    words = ["<|pad|>", "<|end|>", "<|user|>", "<|turn|>", "Hi", "1+1?", "2", "2+2?"]
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|pad|>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|turn|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def test_a_completion_that_was_cut_off_earns_nothing():
    policy = tokenrl.Policy(random_model("qwen2"), chat_tokenizer(None), "{question}")
    problem = tokenrl.Problem("1+1?", "2")
    assert policy.reward(problem, [6, 1]) == 1.0 and policy.reward(problem, [6]) == 0.0
    assert policy.reward(problem, [5, 1]) == 0.0
    policy.score = tokenrl.exact_reward  # the end token is no part of the answer
    assert policy.reward(problem, [6, 1]) == 1.0


def test_models_with_a_switch_for_thinking_are_asked_without():
    tokenizer = chat_tokenizer("{% if enable_thinking is false %}2{% endif %}")
    assert tokenizer.decode(tokenrl.Policy(None, tokenizer, "chat").prompt_ids("1+1?")) == "2"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no turns, please') }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{{ nothing.at.all }}",
        "{% for",
        "{{ 'x' * 1.5 }}",
    ],
)
def test_a_chat_template_that_raises_anything(template):
    tokenizer = chat_tokenizer(template)
    with pytest.raises(tokenrl.UserError, match="--prompt plain"):
        tokenrl.Policy(None, tokenizer, "chat").prompt_ids("1+1?")


def test_an_end_token_is_no_beginning():
    """Where one token is both, and is put behind a text."""

    class Appends(Words):
        bos_token_id = 1

        def encode(self, text, add_special_tokens=True, **_):
            return [ord(character) for character in text] + [1] * add_special_tokens

    assert tokenrl.Policy(None, Appends(), "{question}").prompt_ids("abc") == [97, 98, 99]


def test_a_prompt_does_not_end_with_the_end_token():
    tokenizer = chat_tokenizer(None)
    tokenizer._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 1)]
    )  # as Llama's do with add_eos_token
    assert tokenizer.encode("1+1?") == [5, 1]
    assert tokenrl.Policy(None, tokenizer, "{question}").prompt_ids("1+1?") == [5]


def test_chat_prompt_holds_the_worked_examples_as_turns():
    examples = [{"question": "1+1?", "answer": "2"}]
    policy = tokenrl.Policy(None, chat_tokenizer(CHAT), "chat", examples)
    assert policy.prompt_ids("2+2?") == [2, 5, 3, 2, 6, 3, 2, 7, 3, 2]


@pytest.mark.parametrize(
    "template, ends, wanted",
    [(None, [1], "plain"), (CHAT, [1], "plain"), (CHAT, [1, 3], "chat"), (CHAT, 3, "chat")],
)
def test_chat_prompt_only_for_models_that_end_their_turn(template, ends, wanted):
    tokenizer = chat_tokenizer(template)
    model = random_model("qwen2")
    model.config.eos_token_id = model.generation_config.eos_token_id = ends
    assert tokenrl.choose_prompt("auto", model, tokenizer) == wanted


def test_sliding_window_shorter_than_the_sequence_is_refused(cli, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    config = transformers.Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=64,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    task = small_task("demo2")[:3]
    options = ["--model", "gemma", *FAST, "--max-new-tokens", "60"]
    assert refused(cli("train", *task, *options), "sliding window", "64")


def test_the_longest_question_is_found_by_tokens(cli):
    """300 emojis are fewer characters than another question, but more tokens."""
    task = small_task("mine")
    rows = rows_of("d/mine/train.jsonl")
    rows[4]["question"] = "Ann has 3 pens and gets 4 more. " * 10
    rows[3]["question"] = "\U0001f600" * 300
    tokenrl.write_jsonl(Path("d/mine/train.jsonl"), rows)
    assert refused(cli("train", *task, *FAST, "--steps", 2), "context", "--max-new-tokens")
    assert not Path("runs").exists()


def test_a_signal_within_an_evaluation_ends_it_after_the_batch(cli, monkeypatch):
    plain, batches = tokenrl._decode, []

    def asked(*arguments):
        batches.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(tokenrl, "_decode", asked)
    code, text = cli("train", "svamp", *FAST, "--batch-rows", "2", "--steps", "1")
    assert code == 130 and len(batches) == 1 and "--resume runs/svamp-s-grpo" in text
