"""The command line, through its own commands: what works, and what every bad input says."""
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import DEMO, FAST, ROOT, random_model, rows_of, script

import tokenrl


def exact(rows):
    """Metrics without what a clock or a memory meter gives."""
    return [{k: v for k, v in row.items() if k not in ("rollout_s", "update_s", "peak_memory")} for row in rows]


# ---- prep ----------------------------------------------------------------------------------------------------------

def fake_svamp(tmp_path, monkeypatch):
    rows = [{"ID": str(i), "Body": f"Box {i} holds {i} pens", "Question": "How many pens is that?", "Equation": "",
             "Answer": float(i) if i else 22090603.0, "Type": "Common-Divison"} for i in range(10)]
    path = tmp_path / "SVAMP.json"
    path.write_text(json.dumps(rows))
    monkeypatch.setattr(tokenrl, "SVAMP_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_prep_svamp_from_a_file_and_by_download(cli, tmp_path, monkeypatch):
    path = fake_svamp(tmp_path, monkeypatch)
    code, text = cli("prep", "svamp", "--source", path, "--data-dir", "d1")
    assert code == 0 and "│ train │ 7 │ │ test │ 3 │" in text
    rows = rows_of("d1/svamp/train.jsonl") + rows_of("d1/svamp/test.jsonl")
    assert sorted(int(row["answer"]) for row in rows) == [*range(1, 10), 22090603]
    assert {row["type"] for row in rows} == {"Common-Division"}
    assert "Box 3 holds 3 pens. How many pens is that?" in {row["question"] for row in rows}
    monkeypatch.setattr(tokenrl, "SVAMP_URL", path.as_uri())
    assert cli("prep", "svamp", "--data-dir", "d2")[0] == 0
    assert rows_of("d2/svamp/train.jsonl") == rows_of("d1/svamp/train.jsonl")


def test_prep_svamp_refuses_other_files_and_says_what_to_do_offline(cli, tmp_path, monkeypatch):
    path = fake_svamp(tmp_path, monkeypatch)
    path.write_text(path.read_text() + " ")
    assert "sha256 differs" in cli("prep", "svamp", "--source", path)[1]
    assert "There is no file none.json" in cli("prep", "svamp", "--source", "none.json")[1]

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr(tokenrl.urllib.request, "urlopen", unreachable)
    code, text = cli("prep", "svamp", "--data-dir", "d")
    assert code == 1 and "prep svamp --source SVAMP.json" in text
    assert "--source SVAMP.json" in cli("train", "svamp", "--model", DEMO.parent, "--data-dir", "d")[1]


def test_prep_multiply(cli):
    assert cli("prep", "multiply", "--digits", "2x1", "--count", "50", "--data-dir", "d")[0] == 0
    rows = rows_of("d/multiply/train.jsonl")
    assert len(rows) == 35 and all(re.fullmatch(r"What is \d\d \* \d\?", row["question"]) for row in rows)
    assert "47 * 30 = 1410" in rows_of("d/multiply/examples.jsonl")[0]["answer"]  # digit by digit


def test_prep_own_csv_and_jsonl(cli, tmp_path):
    lines = ["frage,antwort,type", '"Two, and two?",4,sum', "Nothing?,,sum", "A word?,many,sum"]
    lines += ['"Two, and two?",4,sum', *(f"{i} and {i}?,{2 * i}.0,sum" for i in range(8))]
    Path("own.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    code, text = cli("prep", "own.csv", "--question", "frage", "--answer", "antwort", "--data-dir", "d")
    assert code == 0
    for part in ("read │ 12", "rejected: no answer: 1 (line 3)", "rejected: the answer is not a number: 1 (line 4)",
                 "rejected: the question came before: 1 (line 5)", "train │ 6", "test │ 3"):
        assert part in text
    Path("own.jsonl").write_text("".join(json.dumps({"question": f"q{i}", "answer": i}) + "\n" for i in range(4)))
    assert cli("prep", "own.jsonl", "--name", "mine", "--data-dir", "d")[0] == 0
    assert len(rows_of("d/mine/train.jsonl")) == 3
    Path("d/mine/examples.jsonl").write_text(own := '{"question": "mine", "answer": "1"}\n')
    assert "kept as they were" in cli("prep", "own.jsonl", "--name", "mine", "--data-dir", "d")[1]
    assert Path("d/mine/examples.jsonl").read_text() == own  # the user's work


@pytest.mark.parametrize("content, arguments, sentence", [
    (None, [], "There is no file f.jsonl"),
    (b"", [], "f.jsonl is empty"),
    (b"\xff\xfe\x00", [], "f.jsonl is not UTF-8 text (byte 0)"),
    (b'{"question": "q", "answer": 1}\nnot json\n', [], "f.jsonl is not JSON at line 2"),
    (b"[1, 2]\n", [], "line 1 is not an object"),
    (b'{"question": "q", "answer": 1}\n', ["--question", "frage"], "no column 'frage' (it has: answer, question)"),
    (b'{"question": "q", "answer": 1}\n', ["--answer", "a"], "no column 'a'"),
    (b'{"question": "q", "answer": 1}\n', [], "1 usable problems are too few"),
    (b'{"question": "q", "answer": 1}\n', ["--name", "../x"], "cannot be a task's name"),
    (b'{"question": "q", "answer": 1}\n', ["--name", ".."], "cannot be a task's name"),
])
def test_prep_bad_files(cli, content, arguments, sentence):
    if content is not None:
        Path("f.jsonl").write_bytes(content)
    code, text = cli("prep", "f.jsonl", "--data-dir", "d", *arguments)
    assert code == 1 and sentence in text


def test_prep_other_bad_input(cli):
    assert "neither svamp nor multiply nor a .csv or .jsonl file" in cli("prep", "swamp")[1]
    Path("svamp.csv").write_text("question,answer\n1+1?,2\n,4\n")
    assert "'svamp' cannot be a task's name" in cli("prep", "svamp.csv")[1]
    code, text = cli("prep", "svamp.csv", "--name", "mine", "--data-dir", "d")
    assert code == 1 and "rejected: no question: 1 (line 3)" in text and "1 usable problems are too few" in text
    assert "--digits '0' is not a number of digits" in cli("prep", "multiply", "--digits", "0")[1]
    Path("bad.csv").write_text('question,answer\n"open quote,3')
    assert "bad.csv is not valid CSV after line 1" in cli("prep", "bad.csv")[1]
    Path("commas.csv").write_text("question,answer\nHow much is it?,1,200\n1+1?,2\n2+2?,4\n")
    text = cli("prep", "commas.csv", "--data-dir", "d")[1]
    assert "rejected: more fields than the header" in text and "(line 2)" in text


def test_prep_reads_what_spreadsheets_write(cli):
    for separator in ";\t":
        lines = (separator.join(row) for row in (("question", " answer"), ("1,5 + 1?", "50 %"), ('"a;b"', "5 \u20ac")))
        Path("sheet.csv").write_text("\n".join(lines), encoding="utf-8-sig")
        assert cli("prep", "sheet.csv", "--data-dir", "d", "--test-share", "0.5")[0] == 0
        rows = rows_of("d/sheet/train.jsonl") + rows_of("d/sheet/test.jsonl")
        assert sorted((row["question"], row["answer"]) for row in rows) == [("1,5 + 1?", "50 %"), ("a;b", "5 \u20ac")]


# ---- train and eval ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["s-grpo", "t-spmo"])
def test_training_learns(tmp_path, method):
    """The README's command, shortened: held-out accuracy rises, and what is shown is what the files say."""
    process = script("train", "svamp", "--method", method, "--steps", "60", "--device", "cpu", cwd=tmp_path)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert "bundled demo" in text and "\x1b" not in text and "\r" not in text
    assert max(map(len, text.splitlines())) <= 80
    run = tmp_path / "runs" / f"svamp-{method}"
    rows, answers = rows_of(run / "metrics.jsonl"), rows_of(run / "eval.jsonl")
    right = {phase: [a["correct"] for a in answers if a["phase"] == phase] for phase in ("base", "trained")}
    assert len(right["base"]) == len(right["trained"]) == 300
    assert sum(right["trained"]) - sum(right["base"]) >= 30  # ten points
    assert tokenrl.mcnemar(right["base"], right["trained"]) < 0.001
    assert f"({sum(right['trained'])}/300)" in text
    share = sum(r["tokens_trained"] for r in rows) / sum(r["tokens_generated"] for r in rows)
    assert (0.1 < share < 0.6) if method == "s-grpo" else (share < 0.05)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "state.pt"} <= set(os.listdir(run))


def test_train_eval_and_gate(cli):
    code, text = cli("train", "svamp", *FAST, "--steps", "2", "--method", "t-spmo", "--replay", "2", "--l2", "0.01",
                     "--beta", "0.01", "--eval-samples", "2", "--name", "one")
    assert code == 0 and "pass@2" in text
    assert json.loads(Path("runs/one/config.json").read_text())["settings"]["replay"] == 2
    shutil.copytree("runs/one", "runs/two")
    code, text = cli("eval", "svamp", "--adapter", "runs/one", "--adapter", "runs/two", "--limit", "8",
                     "--samples", "2", "--output", "out.jsonl")
    assert code == 0 and "runs/one" in text and "runs/two" in text and "pass@2" in text
    answers = rows_of("out.jsonl")
    assert [len([a for a in answers if a["policy"] == name]) for name in ("base", "runs/one", "runs/two")] == [8, 8, 8]
    trained = [a["completion"] for a in rows_of("runs/one/eval.jsonl") if a["phase"] == "trained"]
    # What was saved is what was trained.
    assert trained == [a["completion"] for a in answers if a["policy"] == "runs/one"]
    code, text = cli("eval", "svamp", "--limit", "4", "--min-accuracy", "1.0", "--max-new-tokens", "1")
    assert code == 1 and "is below --min-accuracy" in text


def test_each_column_is_its_own_adapter_and_the_gate_asks_the_last(cli):
    for name, size in (("zero", 0.0), ("wild", 1.0)):
        model = tokenrl.add_lora(tokenrl.load_model("demo", "cpu")[0], 4, 8, "q_proj,v_proj", 1.0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_().mul_(size)
        model.save_pretrained(name)
    for (first, last), wanted in ((("zero", "wild"), 1), (("wild", "zero"), 0)):
        code, _ = cli("eval", "svamp", "--device", "cpu", "--max-new-tokens", 40, "--limit", 20, "--output", "o.jsonl",
                      "--adapter", first, "--adapter", last, "--min-accuracy", 0.1)
        said = {p: [a["completion"] for a in rows_of("o.jsonl") if a["policy"] == p] for p in ("base", "zero", "wild")}
        assert code == wanted and said["zero"] == said["base"] != said["wild"]


def test_training_never_asks_a_test_problem(cli, monkeypatch):
    asked = {"roll_out": set(), "evaluate": set()}
    for name in asked:
        def watched(policy, problems, *rest, name=name, plain=getattr(tokenrl, name), **options):
            asked[name].update(problem.question for problem in problems)
            return plain(policy, problems, *rest, **options)
        monkeypatch.setattr(tokenrl, name, watched)
    assert cli("train", "svamp", *FAST, "--steps", "4", "--prompts-per-step", "8", "--replay", "1")[0] == 0
    train, test = ({row["question"] for row in rows_of(DEMO / f"{split}.jsonl")} for split in ("train", "test"))
    assert asked["roll_out"] <= train and asked["evaluate"] <= test and not train & test


def test_runs_never_overwrite_each_other(cli):
    for _ in range(2):
        assert cli("train", "svamp", *FAST, "--steps", "1", "--name", "same")[0] == 0
    assert sorted(os.listdir("runs")) == ["same", "same-2"]
    assert exact(rows_of("runs/same/metrics.jsonl")) == exact(rows_of("runs/same-2/metrics.jsonl"))


def test_dry_run(cli):
    code, text = cli("train", "svamp", *FAST, "--dry-run", "--method", "grpo")
    assert code == 0 and "peak memory, update" in text
    assert "tokens generated │ 192" in text  # 2 x 4 x 24: none ends early
    assert "peak memory, evaluation" in text and not Path("runs").exists()
    tokenrl.write_task("few", [tokenrl.Problem(f"{i}+1?", str(i + 1)) for i in range(6)], [], 0.5, 0, Path("d"))
    few = ["few", "--data-dir", "d", "--model", DEMO, *FAST, "--prompts-per-step", 8]
    code, text = cli("train", *few, "--dry-run")
    assert code == 0 and "tokens generated │ 768" in text  # 8 x 4 x 24: problems come again, as in training
    text = cli("train", "svamp", *FAST, "--dry-run", "--method", "t-spmo")[1]
    assert "tokens trained │ 8" in text  # 2 groups of two pairs that branch at their last token
    assert "tokens generated │ 288" in cli("train", "svamp", *FAST, "--dry-run", "--replay", "1")[1]


def test_a_resumed_run_goes_on_from_its_last_save(cli, monkeypatch):
    settings, plain = [*FAST, "--steps", "8", "--save-every", "3", "--replay", "1"], tokenrl.train_step
    assert cli("train", "svamp", *settings, "--name", "whole")[0] == 0

    def cut(policy, problems, optimizer, step, settings):
        if step == 5:
            raise tokenrl.UserError("cut")
        return plain(policy, problems, optimizer, step, settings)
    with monkeypatch.context() as patch:
        patch.setattr(tokenrl, "train_step", cut)
        assert cli("train", "svamp", *settings, "--name", "cut")[0] == 1
    assert torch.load("runs/cut/state.pt", weights_only=True)["step"] == 3
    assert len(rows_of("runs/cut/metrics.jsonl")) == 5
    assert cli("train", "svamp", "--resume", "runs/cut", "--device", "cpu")[0] == 0
    assert exact(rows_of("runs/cut/metrics.jsonl")) == exact(rows_of("runs/whole/metrics.jsonl"))
    whole, again = (transformers_weights(Path("runs", name)) for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_run_killed_several_times_ends_with_the_same_numbers(cli, tmp_path):
    settings = [*FAST, "--steps", "20", "--save-every", "3", "--replay", "1", "--method", "t-spmo"]
    assert cli("train", "svamp", *settings, "--name", "whole")[0] == 0
    metrics, moments = tmp_path / "runs" / "killed" / "metrics.jsonl", [random.uniform(0, 0.4) for _ in range(2)]
    for number, moment in enumerate(moments):
        again = ["--resume", "runs/killed"] if number else [*settings, "--name", "killed"]
        process = script("train", "svamp", *again, "--device", "cpu", cwd=tmp_path)
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        while not metrics.exists() or metrics.stat().st_mtime_ns == before:  # cut at the last save, or a step taken
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, text = cli("train", "svamp", "--resume", "runs/killed", "--device", "cpu")
    assert code == 0
    assert exact(rows_of("runs/killed/metrics.jsonl")) == exact(rows_of("runs/whole/metrics.jsonl")), moments
    assert rows_of("runs/killed/eval.jsonl") == rows_of("runs/whole/eval.jsonl")
    weights = [transformers_weights(tmp_path / "runs" / name) for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    code, text = cli("train", "svamp", "--resume", "runs/killed", "--lr", "0.5", "--group-size", "8")
    assert code == 1 and "group_size was 4, now 8" in text and "lr was 0.0" in text
    saving = ["--batch-rows", 2, "--max-pack-tokens", 64, "--checkpointing", "--save-every", 1]
    assert cli("train", "svamp", "--resume", "runs/killed", "--device", "cpu", *saving)[0] == 0
    assert "not a run that can be resumed" in cli("train", "svamp", "--resume", "runs")[1]


def transformers_weights(run):
    return safetensors.torch.load_file(run / "adapter_model.safetensors")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_exit(tmp_path, number, code):
    process = script("train", "svamp", *FAST, "--steps", "500", "--save-every", "400", cwd=tmp_path)
    metrics = tmp_path / "runs" / "svamp-s-grpo" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    text = process.communicate()[0]
    assert process.returncode == code and "--resume runs/svamp-s-grpo" in " ".join(text.split()), text
    state = torch.load(metrics.parent / "state.pt", weights_only=True)
    assert state["step"] == len(metrics.read_text().splitlines())


def test_a_second_signal_gives_up_and_says_how_to_continue(cli, monkeypatch):
    def killed_twice(*_, **__):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(tokenrl, "evaluate", killed_twice)
    code, text = cli("train", "svamp", *FAST, "--name", "my run")
    assert code == 130 and "Interrupted" in text and "train svamp --resume 'runs/my run'" in text


def test_full_disk_keeps_the_last_checkpoint(cli, monkeypatch):
    write, calls = Path.write_bytes, []

    def full(path, data):
        calls.append(path.name)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    code, text = cli("train", "svamp", *FAST, "--steps", "4", "--save-every", "2", "--name", "full")
    assert code == 1 and "The disk is full" in text and calls == ["state.pt"] * 2
    assert torch.load("runs/full/state.pt", weights_only=True)["step"] == 2
    saved = transformers_weights(Path("runs/full"))
    weights = torch.load("runs/full/state.pt", weights_only=True)["weights"]
    weights = {name.replace(".default", ""): weight for name, weight in weights.items()}
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)


def test_non_finite_steps_stop_the_run(cli, monkeypatch):
    monkeypatch.setattr(tokenrl, "s_grpo_weights", lambda trie, *_: {0: float("nan")})
    code, text = cli("train", "svamp", *FAST, "--steps", "9", "--name", "nan")
    assert code == 1 and "Three steps in a row" in text
    assert [row["skipped"] for row in rows_of("runs/nan/metrics.jsonl")][-3:] == [True] * 3
    assert all(torch.isfinite(w).all() for w in transformers_weights(Path("runs/nan")).values())


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2 GiB",
                                     "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
                                     "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."])
def test_out_of_memory(cli, monkeypatch, message):
    def fail(*args, **kwargs):
        raise RuntimeError(message)
    monkeypatch.setattr(tokenrl, "sample", fail)
    code, text = cli("train", "svamp", *FAST, "--dry-run")
    assert code == 1 and "Out of memory" in text
    assert text.index("--batch-rows") < text.index("--max-pack-tokens") < text.index("--max-new-tokens")


@pytest.mark.parametrize("arguments, sentence", [
    (["train", "swamp"], "There is no task 'swamp' in d; make it with: python tokenrl.py prep YOUR_FILE.csv"),
    (["train", "svamp", "--method", "ppo"], "'ppo' is not one of"),
    (["train", "svamp", "--shots", "1"], "--shots needs a chat or plain prompt"),
    (["eval", "svamp", "--reward", "no.py:kpi"], "There is no file no.py, which 'no.py:kpi' names"),
    (["train", "svamp", "--group-size", "1"], "should be greater than or equal to 2"),
    (["inspect", "svamp", "--group-size", "0"], "should be greater than or equal to 2"),
    (["train", "svamp", "--prompt", "none.txt"], "There is no file none.txt"),
    (["train", "svamp", "--prompt", "chat"], "has no chat template"),
    (["train", "svamp", "--lora-targets", "nothing"], "this model has no module 'nothing'"),
    (["train", "svamp", "--lora-targets", "q_proj, w_proj"], "this model has no module 'w_proj'"),
    (["eval", "svamp", "--adapter", "nowhere"], "nowhere holds no adapter"),
    (["train", "svamp", "--dtype", "int3"], "'int3' is not one of auto"),
    (["train", "svamp", "--device", "abacus"], "'abacus' is not there"),
])
def test_bad_arguments(cli, arguments, sentence):
    if arguments[1] == "swamp":
        arguments = [*arguments, "--model", DEMO, "--data-dir", "d"]
    code, text = cli(*arguments)
    assert code in (1, 2) and sentence in text.replace(" │ │ ", " ")


@pytest.mark.parametrize("content, sentence", [
    ("", "train.jsonl is empty"), ('{"question": "q"}\n', "train.jsonl line 1: no answer"),
    ('{"question": "q", "answer": 1}\n{"question": "q", "answer": "x"}\n', "line 2: the answer is not a number"),
    ("{", "is not JSON at line 1"),
])
def test_bad_prepared_data(cli, content, sentence):
    Path("d/mine").mkdir(parents=True)
    Path("d/mine/train.jsonl").write_text(content)
    code, text = cli("train", "mine", "--model", DEMO, "--data-dir", "d")
    assert code == 1 and sentence in text


def test_bad_worked_examples(cli):
    shutil.copytree(DEMO, "d/mine")
    Path("d/mine/examples.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": "q"}\n')
    code, text = cli("train", "mine", "--model", DEMO, "--data-dir", "d")
    assert code == 1 and "examples.jsonl line 2 lacks" in text


def test_shots_is_the_number_of_worked_examples_and_evaluation_keeps_it(cli, monkeypatch):
    Path("d/mine").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"question": f"{split} {i}", "answer": i} for i in range(5)]
        tokenrl.write_jsonl(Path(f"d/mine/{split}.jsonl"), rows)
    tokenrl.write_jsonl(Path("d/mine/examples.jsonl"), [{"question": f"q{i}", "answer": "a"} for i in range(3)])
    seen, sample = [], tokenrl.sample

    def watched(model, tokenizer, prompts, *rest, **options):
        seen.extend(tokenizer.decode(prompt).count("Answer:") - 1 for prompt in prompts)
        return sample(model, tokenizer, prompts, *rest, **options)
    monkeypatch.setattr(tokenrl, "sample", watched)
    monkeypatch.setattr(tokenrl, "check_packing", lambda *_: None)  # it samples too

    asked = ["mine", "--data-dir", "d"]
    for options, shots in (([], 3), (["--shots", 2], 2), (["--shots", 0], 0), (["--shots", 9], 3)):
        seen.clear()
        assert cli("eval", *asked, "--model", DEMO, "--prompt", "plain", "--limit", 2, *options)[0] == 0
        assert set(seen) == {shots}
    assert cli("train", *asked, "--model", DEMO, "--prompt", "plain", *FAST, "--steps", 1, "--shots", 1)[0] == 0
    seen.clear()
    assert cli("eval", *asked, "--adapter", "runs/mine-s-grpo", "--limit", 2)[0] == 0
    assert set(seen) == {1}


def test_a_folder_that_cannot_be_written(cli):
    Path("runs").write_text("in the way")
    code, text = cli("train", "svamp", *FAST)
    assert code == 1 and "Error:" in text and "runs" in text


def test_prompt_file_must_hold_the_question(cli):
    Path("p.txt").write_text("Answer me.")
    assert "does not contain {question}" in cli("train", "svamp", "--prompt", "p.txt")[1]


# ---- models --------------------------------------------------------------------------------------------------------

def save_model(folder, **options):
    """A random Qwen2 with the demo's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    config = transformers.AutoConfig.from_pretrained(DEMO, **options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_named_model_is_never_replaced(cli):
    shutil.copytree(DEMO, "d/demo2")
    code, text = cli("train", "demo2", "--model", "Qwen/Qwen2-1.5B", "--data-dir", "d")
    assert code == 1 and "'Qwen/Qwen2-1.5B' is neither a local folder nor could it be had from the hub" in text
    assert "The hub's client says:" in text and "--model demo" not in text
    code, text = cli("train", "demo2", "--data-dir", "d")  # on a CPU too
    assert code == 1 and "It was asked for because --model names none" in text and "--model demo" in text
    assert "there is 'demo2': leave out the ending" in cli("train", "demo2.csv", "--data-dir", "d")[1]
    assert cli("train", "demo2", "--model", "demo", "--data-dir", "d", *FAST, "--steps", "1")[0] == 0
    assert cli("merge", "runs/demo2-s-grpo", "merged")[0] == 0
    Path("empty").mkdir()
    code, text = cli("train", "demo2", "--model", "empty", "--data-dir", "d")
    assert code == 1 and "empty does not hold a model that can be loaded" in text
    shutil.copytree(DEMO, "pointer")
    Path("pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    code, text = cli("train", "demo2", "--model", "pointer", "--data-dir", "d")
    assert code == 1 and "pointer does not hold a model that can be loaded" in text


@pytest.mark.parametrize("name, content, sentence", [
    ("tokenizer.json", None, "lacks its tokenizer"),
    ("config.json", "[]", "does not hold a model that can be loaded"),
    ("config.json", ("hidden_size", 64), "does not hold a model that can be loaded"),
    ("config.json", ("hidden_size", "wide"), "does not hold a model that can be loaded"),
    ("model.safetensors", "layers.1.", "lacks weights of its model, such as model.layers.1."),
])
def test_a_broken_model_ends_in_one_sentence(cli, name, content, sentence):
    shutil.copytree(DEMO, "broken")
    path = Path("broken", name)
    if content is None:
        path.unlink()
    elif isinstance(content, tuple):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict([content])))
    elif name == "model.safetensors":
        kept = {k: v for k, v in safetensors.torch.load_file(path).items() if content not in k}
        safetensors.torch.save_file(kept, path, metadata={"format": "pt"})
    else:
        path.write_text(content)
    shutil.copytree(DEMO, "d/demo2")
    code, text = cli("train", "demo2", "--model", "broken", "--data-dir", "d")
    assert code == 1 and f"broken {sentence}" in text


def test_auto_falls_back_to_the_bundled_model_when_the_hub_is_unreachable(cli, monkeypatch):
    devices = iter(["cuda"])  # what is asked first is whether there is a GPU
    monkeypatch.setattr(tokenrl, "pick_device", lambda device: next(devices, "cpu"))
    shutil.copytree(DEMO, "d/svamp")
    code, text = cli("train", "svamp", *FAST, "--steps", "1", "--data-dir", "d")
    assert code == 0 and "Qwen/Qwen2-1.5B cannot be trained here, so this is the bundled demo" in text
    assert "neither a local folder nor could it be had from the hub" in text


@pytest.mark.parametrize("message, sentence", [
    ("[enforce fail] DefaultCPUAllocator: can't allocate memory", "Out of memory"),
    ("some layer is not as it should be", "does not hold a model that can be loaded: some layer is not")])
def test_only_what_cannot_be_reached_falls_back_to_the_bundled_model(cli, monkeypatch, message, sentence):
    def fails(*_, **__):
        raise RuntimeError(message)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    monkeypatch.setattr(tokenrl, "pick_device", lambda device: "cuda")
    shutil.copytree(DEMO, "d/svamp")
    code, text = cli("train", "svamp", *FAST, "--steps", "1", "--data-dir", "d")
    assert code == 1 and sentence in text and "bundled demo" not in text


def test_the_bundled_model_runs_on_the_cpu_of_a_mac(cli, monkeypatch):
    monkeypatch.setattr(tokenrl, "pick_device", lambda device: "mps" if device == "auto" else device)
    code, text = cli("eval", "svamp", "--limit", "4")
    assert code == 0 and "/4)" in text


def test_the_script_alone_has_no_bundled_model(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenrl, "DATA", tmp_path / "data")
    code, text = cli("train", "svamp", "--device", "cpu")
    assert code == 1 and "copy that folder with the script" in text


def test_answers_that_are_cut_off_are_told(cli):
    code, text = cli("train", "svamp", *FAST, "--steps", "1", "--max-new-tokens", "2")
    assert code == 0 and "100% were cut off at 2 tokens" in text
    assert "were cut off" not in cli("train", "svamp", *FAST, "--steps", "1")[1]


def test_auto_does_not_fall_back_where_the_data_is_wrong(cli, monkeypatch):
    monkeypatch.setattr(tokenrl, "pick_device", lambda device: "cuda")
    shutil.copytree(DEMO, "d/svamp")
    Path("d/svamp/examples.jsonl").write_text('{"question": "q"}\n')
    code, text = cli("train", "svamp", *FAST, "--steps", "1", "--data-dir", "d")
    assert code == 1 and "examples.jsonl line 1 lacks" in text and "demo" not in text


def test_another_task_trains_a_local_model(cli, tmp_path):
    save_model(tmp_path / "model")
    Path("own.jsonl").write_text("".join(json.dumps({"question": f"{i}+1", "answer": i + 1}) + "\n" for i in range(9)))
    assert cli("prep", "own.jsonl", "--data-dir", "d")[0] == 0
    code, text = cli("train", "own", *FAST, "--steps", "1", "--data-dir", "d", "--model", "model", "--temperature", "2")
    assert code == 0 and "plain prompt" in text  # a base model: worked examples
    command = "eval own --model merged --prompt auto --max-new-tokens 24 --reward number --data-dir d"
    assert command in " ".join(cli("merge", "runs/own-s-grpo", "merged")[1].split())
    assert cli(*command.split())[0] == 0
    code, text = cli("eval", "own", "--data-dir", "d", "--adapter", "runs/own-s-grpo", "--model", DEMO)
    assert code == 1 and "was made for model" in text


def test_an_adapter_that_does_not_fit(cli, tmp_path):
    save_model(tmp_path / "a" / "model")
    save_model(tmp_path / "b" / "model", hidden_size=64)
    Path("own.jsonl").write_text("".join(json.dumps({"question": f"{i}+1", "answer": i + 1}) + "\n" for i in range(9)))
    cli("prep", "own.jsonl", "--data-dir", "d")
    assert cli("train", "own", *FAST, "--steps", "1", "--data-dir", "d", "--model", "a/model")[0] == 0
    code, text = cli("eval", "own", "--adapter", "runs/own-s-grpo", "--data-dir", "d", "--model", "b/model")
    assert code == 1 and "does not fit" in text
    Path("d").rename("moved")
    assert cli("train", "own", "--resume", "runs/own-s-grpo", "--data-dir", "moved")[0] == 0
    Path("moved").rename("d")
    weights = Path("runs/own-s-grpo/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    code, text = cli("eval", "own", "--adapter", "runs/own-s-grpo", "--data-dir", "d")
    assert code == 1 and "does not fit" in text
    Path("runs/own-s-grpo/config.json").write_text('{"settings": {"model": "a/first.gguf"}}')
    with pytest.raises(tokenrl.UserError, match="was made for a/first.gguf, not for a/second.gguf"):
        tokenrl.load_adapter(random_model("qwen2"), Path("runs/own-s-grpo"), "x", "a/second.gguf")
    Path("nameless").mkdir()
    for foreign, sentence in (("[]", "holds no adapter"),
                              ('{"base_model_name_or_path": null}', "made for a model that it does not name"),
                              ('{"base_model_name_or_path": 3}', "was made for 3"),
                              ('{"base_model_name_or_path": "model"}', "does not fit a/model")):
        Path("nameless/adapter_config.json").write_text(foreign)
        assert sentence in cli("eval", "own", "--adapter", "nameless", "--data-dir", "d", "--model", "a/model")[1]
    for foreign in ("[]", "{"):
        Path("runs/own-s-grpo/config.json").write_text(foreign)
        assert "is not the config.json of a run" in cli("train", "own", "--resume", "runs/own-s-grpo")[1]
    Path("runs/own-s-grpo/config.json").write_text("{}")
    assert "not a run that can be resumed" in cli("train", "own", "--resume", "runs/own-s-grpo")[1]


def test_options_that_could_train_nothing(cli):
    options = ["--max-grad-norm", "0", "--lora-targets", "q_proj, v_proj"]
    assert cli("train", "svamp", *FAST, "--steps", "2", *options)[0] == 0
    weights = transformers_weights(Path("runs/svamp-s-grpo"))
    for target in ("q_proj", "v_proj"):
        assert any(w.abs().max() > 0 for name, w in weights.items() if f"{target}.lora_B" in name)
    config = json.loads(Path("runs/svamp-s-grpo/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 32)


def test_a_float32_checkpoint_is_computed_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert tokenrl.pick_dtype("auto", "cuda", torch.float32) == torch.float32
    assert tokenrl.pick_dtype("auto", "cuda", torch.bfloat16) == torch.bfloat16


def test_eval_shows_types_as_they_are_and_writes_into_a_new_folder(cli):
    problems = [tokenrl.Problem(f"{i}+1?", str(i + 1), kind) for i, kind in enumerate(["[b]", "[/b]"] * 9)]
    tokenrl.write_task("kinds", problems, [], 0.7, 0, Path("d"))
    code, text = cli("eval", "kinds", "--model", DEMO, "--data-dir", "d", "--output", "new/answers.jsonl")
    assert code == 0 and "[b] (" in text and "[/b] (" in text and len(rows_of("new/answers.jsonl")) == 13
    assert "new is a folder" in cli("eval", "kinds", "--model", DEMO, "--data-dir", "d", "--output", "new")[1]


def test_an_adapter_may_lie_in_a_folder_called_base(cli):
    assert cli("train", "svamp", *FAST, "--steps", "1")[0] == 0
    Path("runs/svamp-s-grpo").rename("base")
    code, text = cli("eval", "svamp", "--adapter", "base", "--limit", "4", "--output", "answers.jsonl")
    assert code == 0 and {row["policy"] for row in rows_of("answers.jsonl")} == {"base", "base/"}


def test_gguf_without_its_package(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    shutil.copytree(DEMO, "d/svamp")
    code, text = cli("train", "svamp", "--model", "model.gguf", "--data-dir", "d")
    assert code == 1 and "pip install gguf" in text


CHAT = ("{% for m in messages %}<|user|>{{ m.content }}<|turn|>{% endfor %}"
        "{% if add_generation_prompt %}<|user|>{% endif %}")


def chat_tokenizer(template):
    vocabulary = {"<|pad|>": 0, "<|end|>": 1, "<|user|>": 2, "<|turn|>": 3, "Hi": 4, "1+1?": 5, "2": 6, "2+2?": 7}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|pad|>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", additional_special_tokens=["<|user|>", "<|turn|>"])
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


def test_a_chat_template_that_refuses_the_prompt():
    tokenizer = chat_tokenizer("{{ raise_exception('no turns, please') }}")
    with pytest.raises(tokenrl.UserError, match="no turns, please.*--prompt plain"):
        tokenrl.Policy(None, tokenizer, "chat").prompt_ids("1+1?")


def test_a_prompt_does_not_end_with_the_end_token():
    tokenizer = chat_tokenizer(None)
    tokenizer._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 1)])  # as Llama's do with add_eos_token
    assert tokenizer.encode("1+1?") == [5, 1]
    assert tokenrl.Policy(None, tokenizer, "{question}").prompt_ids("1+1?") == [5]


def test_chat_prompt_holds_the_worked_examples_as_turns():
    policy = tokenrl.Policy(None, chat_tokenizer(CHAT), "chat", [{"question": "1+1?", "answer": "2"}])
    assert policy.prompt_ids("2+2?") == [2, 5, 3, 2, 6, 3, 2, 7, 3, 2]


@pytest.mark.parametrize("template, ends, wanted", [
    (None, [1], "plain"), (CHAT, [1], "plain"), (CHAT, [1, 3], "chat"), (CHAT, 3, "chat")])
def test_chat_prompt_only_for_models_that_end_their_turn(template, ends, wanted):
    tokenizer = chat_tokenizer(template)
    model = random_model("qwen2")
    model.config.eos_token_id = model.generation_config.eos_token_id = ends
    assert tokenrl.choose_prompt("auto", model, tokenizer) == wanted


def test_sliding_window_shorter_than_the_sequence_is_refused(cli, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    config = transformers.Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=64, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    shutil.copytree(DEMO, "d/demo2")
    code, text = cli("train", "demo2", "--model", "gemma", "--data-dir", "d", *FAST, "--max-new-tokens", "60")
    assert code == 1 and "sliding window of 64" in text


# ---- help, start-up, output ----------------------------------------------------------------------------------------

def test_help_needs_no_heavy_import():
    code = "import sys, tokenrl; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    for command in ([], ["prep"], ["train"], ["eval"], ["inspect"], ["plot"], ["merge"]):
        text = subprocess.run([sys.executable, "tokenrl.py", *command, "--help"], cwd=ROOT, capture_output=True,
                              text=True, check=True).stdout
        assert "Usage" in text
