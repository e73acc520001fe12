"""Rewards of one's own, inspect, plot, merge, several processes, and the README's own commands."""
import importlib.util
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import DEMO, FAST, ROOT, random_completions, rows_of
from rich.console import Console

import tokenrl


def shown(*things, width=200):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(*things, sep="\n")
    return capture.get()


# ---- rewards -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("option, text, answer, reward", [
    ("number", "#### 1,234", "1234", 1.0),
    ("exact", "I think.\n#### Paris", "paris", 1.0), ("exact", "#### Paris, France", "Paris", 0.0),
    ("exact", r"so \boxed{B}", "B", 1.0), ("exact", "It is:\nnet 30", "net 30", 1.0),
    ("exact", "The answer is C.", "C", 1.0), ("exact", "The answer is: Paris", "Paris", 1.0),
    ("exact", "**Answer:** Paris", "Paris", 1.0), ("exact", "The answer is **Paris**.", "'Paris'", 1.0),
    ("exact", "C\nD", "C", 0.0), ("exact", "", "C", 0.0), ("exact", "#### C\r\nD", "C", 1.0),
    ("exact", "", "*", 0.0), ("exact", "#### *", "*", 1.0), ("exact", "#### \u00a0Paris\u00a0", "Paris", 1.0),
    ("regex:Total: {answer}$", "Total: 1.5", "1.5", 1.0), ("regex:Total: {answer}$", "Total: 1x5", "1.5", 0.0),
    ("regex:^####", "#### 3", "4", 1.0), ("regex:= {answer}?$", "= ", "12", 1.0),
    ("regex:{answer}+$", "1212", "12", 1.0),
    ("regex:^[{answer}]$", "(", "B", 0.0), ("regex:^[{answer}]$", "B", "B", 1.0),
    ("exact", r"The answer is $\boxed{B}$.", "B", 1.0), ("exact", "#### 5 $", "5 $", 1.0),
])
def test_rewards(option, text, answer, reward):
    assert tokenrl.reward_function(option)(text, answer) == reward


def test_reward_from_a_file(tmp_path):
    path = tmp_path / "score.py"
    path.write_text("def near(text, answer):\n    return max(0.0, 1 - abs(float(text) - float(answer)) / 10)\n")
    assert tokenrl.reward_function(f"{path}:near")("7", "9") == pytest.approx(0.8)
    path.write_text("import numpy\ndef half(text, answer):\n    return numpy.float32(0.5)\n")
    assert tokenrl.reward_function(f"{path}:half")("", "") == 0.5


@pytest.mark.parametrize("code, name, sentence", [
    ("def f(text, answer): return 2", "f", "returned 2, which is not a number from 0 to 1, on the completion 'abc'"),
    ("def f(text, answer): return float('nan')", "f", "returned nan"),
    ("def f(text, answer): return None", "f", "returned None"),
    ("def f(text, answer): return 1 / 0", "f", "raised ZeroDivisionError (division by zero) on the completion 'abc'"),
    ("def f(text): return 1.0", "f", "raised TypeError"),
    ("def f(text, answer): return 1.0", "g", "defines no function 'g'"),
    ("f = 3", "f", "defines no function 'f'"), ("{}['x']", "f", "cannot be run: KeyError: 'x'"),
    ("def f(", "f", "cannot be run: SyntaxError"),
])
def test_a_broken_reward_is_reported_with_its_completion(tmp_path, code, name, sentence):
    path = tmp_path / "score.py"
    path.write_text(code)
    with pytest.raises(tokenrl.UserError) as error:
        tokenrl.reward_function(f"{path}:{name}")("abc", "def")
    assert sentence in str(error.value)


def test_unknown_rewards_end_in_one_sentence(cli):
    assert "is not a reward; use number, exact" in cli("train", "svamp", *FAST, "--reward", "best")[1]
    assert "is not a regular expression" in cli("train", "svamp", *FAST, "--reward", "regex:(")[1]
    assert "'numbr' is not a reward" in cli("prep", "multiply", "--reward", "numbr", "--data-dir", "d")[1]
    assert "There is no file none.py" in cli("eval", "svamp", "--metric", "none.py:f")[1]


def test_text_answers_from_file_to_adapter(cli, tmp_path):
    rows = [{"question": f"Is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(12)]
    Path("parity.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "0 usable problems" in cli("prep", "parity.jsonl", "--data-dir", "d")[1]
    code, text = cli("prep", "parity.jsonl", "--reward", "exact", "--data-dir", "d")
    assert code == 0 and "train parity --reward exact --data-dir d" in text
    text = cli("prep", "parity.jsonl", "--reward", "regex:^{answer}$", "--data-dir", "d")[1]
    assert "--reward 'regex:^{answer}$'" in text
    assert "line 1: the answer is not a number" in cli("train", "parity", "--model", DEMO, "--data-dir", "d")[1]
    Path("kpi.py").write_text("def short(text, answer): return float(len(text) < 5)\n")
    arguments = ["--model", DEMO, "--data-dir", "d", *FAST, "--steps", "1", "--metric", "kpi.py:short"]
    code, text = cli("train", "parity", *arguments, "--reward", "exact")
    assert code == 0 and "mean of --metric" in text and "--adapter runs/parity-s-grpo --data-dir d" in text
    answers = rows_of("runs/parity-s-grpo/eval.jsonl")
    assert all(a["metric"] == (len(a["completion"]) < 5) for a in answers)
    code, text = cli("eval", "parity", "--adapter", "runs/parity-s-grpo", "--data-dir", "d")  # asks as it was trained
    assert code == 0 and "mean of --metric" in text


def test_training_and_evaluation_use_the_reward_asked_for(cli):
    Path("kpi.py").write_text("def half(text, answer): return 0.5\ndef one(text, answer): return 1.0\n")
    assert cli("train", "svamp", *FAST, "--steps", "1", "--reward", "kpi.py:half", "--name", "half")[0] == 0
    [row] = rows_of("runs/half/metrics.jsonl")
    assert row["reward"] == pytest.approx(0.5 * (1 - row["truncated"])) and row["reward"] > 0 == row["accuracy"]
    assert not any(a["correct"] for a in rows_of("runs/half/eval.jsonl"))
    assert cli("eval", "svamp", "--reward", "kpi.py:one", "--limit", "8", "--output", "o.jsonl")[0] == 0
    assert all(a["correct"] != a["truncated"] for a in rows_of("o.jsonl"))


# ---- evaluation tables ---------------------------------------------------------------------------------------------

def record(i, correct, kind):
    return {"index": i, "question": f"q{i}", "answer": "1", "type": kind, "completion": f"so\n#### {i}",
            "correct": correct, "length": 3, "truncated": False, "samples": 0, "samples_correct": 0}


def test_types_and_changes_are_shown():
    before = [record(i, i < 2, "AB"[i % 2]) for i in range(30)]
    after = [record(i, i >= 1, "AB"[i % 2]) for i in range(30)]
    text = shown(tokenrl.comparison_table({"base": before, "run": after}, "title"))
    assert re.search(r"A \(15\) +│ +6\.7% +│ +93\.3%", text) and re.search(r"B \(15\) +│ +6\.7% +│ +100\.0%", text)
    assert "+90.0 points" in text and "1.1e-07" in text  # 28 mended, 1 broken
    text = shown(tokenrl.changes_table(before, after, "run"))
    assert [int(n) for n in re.findall(r"\+ │ q(\d+)", text)] == list(range(2, 12))  # ten of the 28 mended
    assert "mended (+): 28, broken (-): " in text
    assert re.findall(r"- │ q(\d+)", text) == ["0"] and "#### 11" in text


def test_statistics():
    assert tokenrl.wilson(133, 300) == pytest.approx((0.388, 0.500), abs=1e-3)
    assert tokenrl.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert tokenrl.mcnemar([True] + [False] * 5, [False] + [True] * 5) == pytest.approx(14 / 64)
    assert tokenrl.mcnemar([True, False], [True, False]) == 1.0
    for right, k in ((0, 2), (2, 2), (2, 5), (5, 1)):
        drawn = list(itertools.combinations([True] * right + [False] * (5 - right), k))
        assert tokenrl.pass_at_k(5, right, k) == pytest.approx(sum(map(any, drawn)) / len(drawn))


# ---- inspect -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["grpo", "s-grpo", "t-spmo"])
@pytest.mark.parametrize("seed", range(3))
def test_inspect_marks_exactly_the_trained_tokens(words, method, seed):
    rng = random.Random(seed)
    completions = random_completions(rng, 6, 8)
    rewards = [float(rng.random() < 0.5) for _ in completions[1:]] + [0.5]
    trie, policy = tokenrl.Trie(completions), tokenrl.Policy(None, words, "plain")
    settings = type("S", (), {"alpha": 2, "p": 0.5})
    weights = tokenrl.credit_weights(method, trie, rewards, settings, rng)
    for path in trie.paths:
        marks = []
        for sign, marked, plain in re.findall(r"\[([+-]+)([\d ]+)\]|([\d ]+)", tokenrl.credit_text(
                policy, trie, path, weights).plain):
            marks += [(int(token), sign) for token in (marked or plain).split()]
        assert [token for token, _ in marks] == [trie.tokens[node] for node in path]
        most = max(map(abs, weights.values()))
        for node, (_, sign) in zip(path, marks):
            weight = weights.get(node, 0.0)
            assert sign == ("+" if weight > 0 else "-") * (0 if not weight else 1 + (3 * abs(weight) > most * 1.00001)
                                                           + (3 * abs(weight) > 2 * most * 1.00001))


def test_inspect(cli):
    code, text = cli("inspect", "svamp", "--method", "all", "--device", "cpu", "--output", "group.html")
    assert code == 0
    for part in ("s-grpo", "t-spmo", "grpo", "branch points", "(the prompt)", "reward 1", "reward 0", "[+"):
        assert part in text
    assert "branch points" in Path("group.html").read_text()
    assert cli("inspect", "svamp", "--index", "3", "--method", "t-spmo", "--output", "group.svg")[0] == 0
    assert Path("group.svg").read_text().startswith("<svg")
    text = cli("inspect", "svamp", "--method", "grpo", "--max-new-tokens", "2")[1]  # nobody finishes in two tokens
    assert "no method learns anything from it" in text and "0 of" in text and "[+++" not in text
    assert "there are 700 training problems" in cli("inspect", "svamp", "--index", "700")[1]
    assert "must end in .html or .svg" in cli("inspect", "svamp", "--output", "group.pdf")[1]
    assert cli("train", "svamp", *FAST, "--steps", "1", "--method", "t-spmo")[0] == 0
    code, text = cli("inspect", "svamp", "--adapter", "runs/svamp-t-spmo")
    assert code == 0 and "t-spmo" in text and "s-grpo" not in text  # the run's own method and group size
    assert "4 reward" in text and "5 reward" not in text


def test_inspect_writes_completions_as_they_are(cli, monkeypatch):
    monkeypatch.setattr(tokenrl, "token_text", lambda policy, tokens: "[/b]:smile:")
    assert cli("inspect", "svamp", "--index", "3", "--output", "group.html")[0] == 0
    page = Path("group.html").read_text()
    assert page.count("[/b]") > 10 and page.count(":smile:") > 10


def test_inspect_few_problems_without_signal(cli):
    tokenrl.write_task("few", [tokenrl.Problem(f"{i}+1?", str(i + 1)) for i in range(6)], [], 0.3, 0, Path("d"))
    code, text = cli("inspect", "few", "--model", DEMO, "--data-dir", "d", "--max-new-tokens", "2")
    assert code == 0 and "no method learns anything from it" in text


# ---- plot ----------------------------------------------------------------------------------------------------------

def write_run(name, rewards):
    Path(name).mkdir()
    rows = [{"reward": r, "accuracy": r, "length": 9, "tokens_trained": 1, "tokens_generated": 4, "signal": 1.0,
             "distinct": 1.0, "peak_memory": 2**30} for r in rewards]
    (Path(name) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_plot_in_the_terminal(cli, capsys):
    write_run("a", [0.0, 0.5, 1.0, 0.5])
    write_run("b", [1.0, 0.0])
    code, text = cli("plot", "a", "b", "--smooth", "2")
    assert code == 0 and text.endswith("* a: 0.25 0.75 o b: 0.5")
    lines = [line.plain for line in tokenrl.draw_curves({"up": [0, 1, 2, 3], "flat": [3, 3]}, 3, 4, 4)]
    assert [line.split("│")[1] for line in lines[:4]] == ["oo *", "  * ", " *  ", "*   "]
    assert [line.split(": ")[1] for line in lines[-2:]] == ["2", "3"]  # the second is shorter than a mean
    assert cli("plot", "a", "--what", "trained")[1].endswith("a: 0.25 0.25 0.25 0.25")
    assert cli("plot", "a", "--what", "distinct")[1].endswith("a: 1 1 1 1")
    assert "There is no file" in cli("plot", "none")[1]
    (Path("b") / "metrics.jsonl").write_text("")
    assert "b has no steps yet" in cli("plot", "b")[1]


def test_plot_as_a_picture(cli, monkeypatch):
    write_run("a", [0.0, 0.5, 1.0])
    if importlib.util.find_spec("matplotlib"):
        assert cli("plot", "a", "--output", "a.svg")[0] == 0
        assert "<svg" in Path("a.svg").read_text()
    assert "must end in .png or .svg" in cli("plot", "a", "--output", "a.gif")[1]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, text = cli("plot", "a", "--output", "a.png")
    assert code == 1 and "pip install matplotlib" in text


# ---- merge ---------------------------------------------------------------------------------------------------------

def test_merged_checkpoint_answers_as_the_adapter_does(cli):
    arguments = [*FAST, "--steps", "6", "--lr", "0.02", "--group-size", "8"]
    assert cli("train", "svamp", *arguments, "--name", "one")[0] == 0
    code, text = cli("merge", "runs/one", "merged")
    assert code == 0 and "float32" in text
    limit = ["--limit", "60"]
    assert cli("eval", "svamp", "--adapter", "runs/one", *limit, "--output", "one.jsonl")[0] == 0
    shutil.copytree(DEMO, "d/demo2")  # the same problems under another name, for another model
    assert cli("eval", "demo2", "--model", "merged", "--data-dir", "d", *limit, "--output", "two.jsonl")[0] == 0
    answers = {name: [row["completion"] for row in rows_of("one.jsonl") if row["policy"] == name]
               for name in ("base", "runs/one")}
    assert [row["completion"] for row in rows_of("two.jsonl")] == answers["runs/one"] != answers["base"]
    assert "is there already" in cli("merge", "runs/one", "merged")[1]
    assert "holds no adapter" in cli("merge", "merged", "other")[1]


def test_merge_adds_in_float32_and_saves_in_the_base_dtype(cli, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    model.save_pretrained("base")
    path = Path("base/generation_config.json")  # as some checkpoints have it, which transformers refuses to save
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.7, "do_sample": False}))
    transformers.AutoTokenizer.from_pretrained(DEMO).save_pretrained("base")
    base, _ = tokenrl.load_model("base", "cpu", "float32")
    lora = tokenrl.add_lora(base, 4, 8, "q_proj", 1.0)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    lora.save_pretrained("run")
    assert cli("merge", "run", "out")[0] == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert merged.dtype == torch.bfloat16
    layer, plain = lora.base_model.model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.q_proj.weight
    delta = 8 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    found = merged.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(found, (plain.float() + delta).to(torch.bfloat16)) and not torch.equal(found, plain)
    assert cli("merge", "run", "whole", "--dtype", "float32")[0] == 0
    found = transformers.AutoModelForCausalLM.from_pretrained("whole").model.layers[0].self_attn.q_proj.weight
    assert torch.equal(found, plain.float() + delta)


# ---- several processes ---------------------------------------------------------------------------------------------

TWO_GRADIENTS = """
import random, sys, torch
sys.path[:0] = ["{root}", "{root}/tests"]
import tokenrl
from test_core import lora, random_step, settings_of
from conftest import random_model

tokenrl.join_processes("cpu")
rank, world = tokenrl.processes()
for method, beta in (("grpo", 0.0), ("t-spmo", 0.0), ("grpo", 0.1)):
    model, rollouts = lora(random_model("qwen2")), random_step()[2 * bool(beta):]  # KL counts a node of two groups once
    optimizer, kept = tokenrl.new_optimizer(model), []
    optimizer.step = lambda: kept.extend(p.grad.clone() for p in model.parameters() if p.requires_grad)
    settings = settings_of(method=method, l2=0.01, beta=beta)
    tokenrl.update(tokenrl.Policy(model, None, "plain"), rollouts[rank::world], optimizer, 0.0, settings,
                   random.Random(0))
    torch.save(kept, f"{{method}}-{{beta}}-{{world}}-{{rank}}.pt")
tokenrl.leave_processes()
"""


def torchrun(*arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.run([*command, *map(str, arguments)], cwd=cwd, text=True, capture_output=True)


def test_two_processes_give_the_gradient_of_one(tmp_path):
    (tmp_path / "gradients.py").write_text(TWO_GRADIENTS.format(root=ROOT))
    subprocess.run([sys.executable, "gradients.py"], cwd=tmp_path, check=True)
    result = torchrun("gradients.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for case in ("grpo-0.0", "t-spmo-0.0", "grpo-0.1"):
        one, first, second = (torch.load(tmp_path / f"{case}-{name}.pt") for name in ("1-0", "2-0", "2-1"))
        assert one and any(g.abs().max() > 0 for g in one)
        for whole, a, b in zip(one, first, second):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, whole, atol=1e-4 * whole.abs().max().item(), rtol=1e-3)


def test_torchrun_trains_with_one_voice(tmp_path):
    result = torchrun(ROOT / "tokenrl.py", "train", "svamp", *FAST, "--steps", "3", "--replay", "3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("before training") == 1 and result.stdout.count("training time") == 1
    rows, answers = (rows_of(tmp_path / "runs/svamp-s-grpo" / name) for name in ("metrics.jsonl", "eval.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3] and len(answers) == 16
    assert [a["index"] for a in answers] == [*range(8)] * 2
    torch.load(tmp_path / "runs/svamp-s-grpo/state.pt", weights_only=True)


def test_evaluation_alone_heeds_no_other_processes(cli, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")  # clusters set these too
    code, text = cli("eval", "svamp", "--limit", "4")
    assert code == 0 and "/4)" in text
    assert cli("train", "svamp", *FAST, "--steps", "1")[0] == 0  # no torchrun, which sets LOCAL_RANK


# ---- the README ----------------------------------------------------------------------------------------------------

def readme_commands():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("python tokenrl.py")]


def test_the_readmes_commands_work(cli, tmp_path, monkeypatch):
    """Every `python tokenrl.py` line of the README in its order, on small models, short runs and made-up data."""
    from test_cli import fake_svamp
    fake_svamp(tmp_path, monkeypatch)
    monkeypatch.setattr(tokenrl, "SVAMP_URL", (tmp_path / "SVAMP.json").as_uri())
    monkeypatch.setattr(tokenrl, "DATA", tmp_path / "data")
    shutil.copytree(DEMO, "data/demo")
    for name in ("Qwen/Qwen2-1.5B", "Qwen2.5-Coder-0.5B-Instruct", "MODEL"):
        shutil.copytree(DEMO, name)
    tool = {c.name or c.callback.__name__: c for c in tokenrl.app.registered_commands}
    assert {"prep", "train", "eval", "inspect", "plot", "merge"} == set(tool)
    commands = readme_commands()
    assert len(commands) > 10 and {line.split()[2] for line in commands} == set(tool)
    for name, text in readme_files().items():
        Path(name).write_text(text)
    for line in commands:
        words = line.split()[2:]
        if words[0] == "train" and "--resume" not in words:
            words += [*FAST, "--steps", "1"]
        words = [re.sub("METHOD", "t-spmo", re.sub("SEED", "0", word)) for word in words]
        code, text = cli(*words, *(["--data-dir", "data"] if words[0] in ("prep", "train", "eval", "inspect") else []))
        assert code == 0 or "is below --min-accuracy" in text, (line, text)


def readme_files():
    """Files that the README shows, by the name in the line before their block."""
    return dict(re.findall(r"`([\w.]+)`:\n\n```(?:csv|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.S))


def test_the_readmes_program_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO, "Qwen/Qwen2-1.5B")
    [program] = re.findall(r"```python\n(import random\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {}
    exec(program, names)
    assert len(names["logps"]) == len(names["weights"])
