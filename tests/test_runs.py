"""Run folders: resumed, killed, locked, damaged and strangers' ones; and what rewards may do."""

import json
import math
import os
import random
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DEMO, FAST, exact, rows_of, script
from test_cli import one_step, refused, small_task, weights_of

import tokenrl

QUICK = ["--prompts-per-step", 2, "--group-size", 3, "--max-new-tokens", 12, "--device", "cpu"]
pytestmark = pytest.mark.usefixtures("quick")


def same_run(one, two):
    assert exact(rows_of(f"{one}/metrics.jsonl")) == exact(rows_of(f"{two}/metrics.jsonl"))
    assert rows_of(f"{one}/eval.jsonl") == rows_of(f"{two}/eval.jsonl")
    first, second = weights_of(one), weights_of(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# ---- resume --------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_from_its_last_save(cli, monkeypatch):
    settings = [*FAST, "--steps", "8", "--save-every", "3", "--replay", "1"]
    assert cli("train", "svamp", *settings, "--name", "whole")[0] == 0
    plain, steps = tokenrl.update, []

    def cut(*arguments):
        steps.append(1)
        if len(steps) == 6:
            raise tokenrl.UserError("cut")
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenrl, "update", cut)
        assert cli("train", "svamp", *settings, "--name", "cut")[0] == 1
    assert torch.load("runs/cut/state.pt", weights_only=True)["step"] == 3
    assert len(rows_of("runs/cut/metrics.jsonl")) == 5
    assert cli("train", "svamp", "--resume", "runs/cut", "--device", "cpu")[0] == 0
    same_run("runs/cut", "runs/whole")
    again = ["train", "svamp", "--resume", "runs/cut"]
    for option in (["--lr", "0.5"], ["--group-size", "8"], ["--steps", "9"], ["--method", "grpo"]):
        assert refused(cli(*again, *option), option[0])
    machine = ["--batch-rows", 2, "--max-pack-tokens", 64, "--save-every", 1, "--device", "cpu"]
    assert cli(*again, *machine)[0] == 0
    assert refused(cli("train", "other", "--resume", "runs/cut"), "svamp", "other")
    same_run("runs/cut", "runs/whole")  # resuming a finished run changes nothing


class Killed(BaseException):
    pass


WATCHED = {"armed": False, "left": math.inf, "seen": []}


def on_write(event, arguments):
    """Ends the process, as far as this one is concerned, before its n-th write."""
    if not WATCHED["armed"] or event not in ("open", "os.rename", "os.remove", "os.mkdir"):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    if "runs" not in (path := str(arguments[0])) or path.endswith("run.lock"):
        return
    WATCHED["seen"].append((event, path))
    if len(WATCHED["seen"]) > WATCHED["left"]:
        raise Killed  # and again at each later one: the dead clean nothing up


@pytest.mark.parametrize("validate, save", [(1, 1), (0, 2)])
def test_a_run_killed_between_any_two_writes_ends_with_the_same_numbers(cli, validate, save):
    if "hooked" not in WATCHED:
        sys.addaudithook(on_write)
        WATCHED["hooked"] = True
    task = small_task()
    start = ["train", *task, *QUICK, "--steps", 1 + save, "--save-every", save, "--replay", 1]
    start += ["--validate-every", validate, "--eval-problems", 2]

    def run(left, *arguments):
        WATCHED.update(armed=True, left=left, seen=[])
        try:
            return cli(*arguments)
        except Killed:
            return None
        finally:
            WATCHED["armed"] = False

    Path("runs").mkdir()
    assert run(math.inf, *start, "--name", "whole")[0] == 0
    writes = WATCHED["seen"]
    assert {"eval.jsonl", "state.pt", "adapter_model.safetensors", "metrics.jsonl"} <= {
        Path(path).name.split(".tmp")[0].removesuffix(f".{os.getpid()}") for _, path in writes
    }
    shown = [n for n, (event, _) in enumerate(writes) if event in ("open", "os.rename")]
    for left in shown[:: 1 if validate else 3]:
        shutil.rmtree("runs/killed", ignore_errors=True)
        assert run(left, *start, "--name", "killed") is None
        if not Path("runs/killed/config.json").exists():
            assert refused(cli("train", *task, "--resume", "runs/killed"), "killed")
            continue
        code, text = cli("train", *task[:3], "--resume", "runs/killed")
        assert code == 0, (left, writes[left], text)
        same_run("runs/killed", "runs/whole")
        assert not list(Path("runs/killed").glob("*tmp*"))


def test_a_killed_process_leaves_no_lock_and_no_other_goes_on_with_its_run(cli, tmp_path):
    settings = [*FAST, "--steps", "10", "--save-every", "3", "--replay", "1"]
    process = script("train", "svamp", *settings, "--name", "killed", cwd=tmp_path)
    metrics, end = tmp_path / "runs" / "killed" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # so that it does not end before we have looked
    again = ["train", "svamp", "--resume", "runs/killed", "--device", "cpu"]
    try:
        assert refused(cli(*again), "runs/killed", "process")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert cli(*again)[0] == 0
    assert cli("train", "svamp", *settings, "--name", "whole")[0] == 0
    same_run("runs/killed", "runs/whole")


def test_one_run_is_trained_by_one_process_at_a_time(cli, monkeypatch):
    one_step(cli, "one")
    plain = tokenrl.evaluate
    found = []

    def evaluate(*arguments):
        if not found:
            found.append(None)
            found[0] = cli("train", "svamp", "--resume", "runs/two")
        return plain(*arguments)

    monkeypatch.setattr(tokenrl, "evaluate", evaluate)
    one_step(cli, "two")
    assert refused(found[0], "runs/two", "process")
    assert exact(rows_of("runs/one/metrics.jsonl")) == exact(rows_of("runs/two/metrics.jsonl"))


def test_resume_after_the_data_changed(cli):
    task = small_task()
    start = ["train", *task, *QUICK, "--steps", 2, "--validate-every", 0]
    assert cli(*start, "--name", "one")[0] == 0
    before = {path.name: path.read_bytes() for path in Path("runs/one").iterdir()}
    files = {split: Path(f"d/few/{split}.jsonl") for split in ("train", "test")}
    again = ["train", *task[:3], "--resume", "runs/one"]
    for path in files.values():
        whole = path.read_text()
        for changed in (whole.splitlines(keepends=True)[1:], whole.splitlines(keepends=True)[::-1]):
            path.write_text("".join(changed))
            assert refused(cli(*again), "data", "runs/one")
        path.write_text(whole)
    assert before == {path.name: path.read_bytes() for path in Path("runs/one").iterdir()}
    assert cli(*again)[0] == 0


def test_resume_after_the_prompt_or_the_worked_examples_changed(cli):
    task, shown = small_task(), Path("d/few/examples.jsonl")
    shown.write_text('{"question": "What is 1 + 1?", "answer": "#### 2"}\n')
    Path("asked.txt").write_text("Ask: {question}")
    start = ["train", *task, *QUICK, "--steps", 1, "--validate-every", 0, "--eval-problems", 2]
    for name, path in (("asked.txt", Path("asked.txt")), ("plain", shown)):
        assert cli(*start, "--prompt", name, "--name", name)[0] == 0
        again, whole = ["train", *task[:3], "--resume", f"runs/{name}"], path.read_text()
        path.write_text(whole.replace("What", "How much").replace("Ask", "Solve"))
        assert refused(cli(*again), "prompt", f"runs/{name}")
        path.write_text(whole)
        assert cli(*again)[0] == 0
    config = json.loads(Path("runs/plain/config.json").read_text())
    del config["asked"]  # as older versions wrote it
    Path("runs/plain/config.json").write_text(json.dumps(config))
    assert cli("train", *task[:3], "--resume", "runs/plain")[0] == 0


def test_a_run_of_other_data_is_no_silent_judge_of_these(cli):
    task = small_task()
    assert cli("train", *task, *QUICK, "--steps", 1, "--name", "one")[0] == 0
    ask = ["eval", *task, "--adapter", "runs/one"]
    more = ["train", *task, *QUICK, "--steps", 1, "--adapter", "runs/one"]
    for command in (ask, more):
        code, text = cli(*command)
        assert code == 0 and "other data" not in text
    small_task(train=13, test=5)  # shuffled anew
    for command in (ask, more):
        code, text = cli(*command)
        assert code == 0 and "runs/one had other data" in text
    shutil.copytree("d/few", "d/new")
    code, text = cli("eval", "new", *task[1:], "--adapter", "runs/one")
    assert code == 0 and "runs/one had other data" in text  # whatever it is called


def test_a_run_that_was_asked_otherwise_is_noted(cli):
    """By a prompt, worked examples or a reward that were edited since."""
    task, shown = small_task(), Path("d/few/examples.jsonl")
    shown.write_text('{"question": "What is 1 + 1?", "answer": "#### 2"}\n')
    Path("asked.txt").write_text("What: {question}")
    Path("r.py").write_text("def f(text, answer): return 0.5  # What")
    start = ["train", *task, *QUICK, "--steps", 1, "--validate-every", 0, "--eval-problems", 2]
    code = ["--reward", "r.py:f"]
    for path, own, more in (
        (Path("asked.txt"), ["--prompt", "asked.txt"], []),
        (shown, ["--prompt", "plain"], []),
        (Path("r.py"), code, code),
    ):
        run = f"runs/{path.stem}"
        assert cli(*start, *own, "--name", path.stem)[0] == 0
        commands = [
            ["eval", *task, "--adapter", run, "--limit", 2, *more],
            [*start, "--adapter", run, *own],
        ]
        assert all("Note" not in cli(*command)[1] for command in commands)
        path.write_text(path.read_text().replace("What", "How much"))
        for command in commands:
            code_, text = cli(*command)
            assert code_ == 0 and f"Note: {run} had another prompt" in text
        assert refused(cli("train", *task[:3], "--resume", run, *more), run, "reward")


def test_a_run_goes_on_where_what_it_names_was_moved(cli):
    task = small_task()[:3]
    shutil.copytree(DEMO, "base")
    Path("r.py").write_text("def f(text, answer): return 0.5")
    start = ["train", *task, "--model", "base", *FAST, "--steps", 1, "--reward", "r.py:f"]
    assert cli(*start, "--name", "first")[0] == 0
    assert cli(*start, "--adapter", "runs/first", "--name", "second")[0] == 0
    Path("moved").mkdir()
    for name in ("base", "r.py", "runs/first"):
        Path(name).rename(f"moved/{Path(name).name}")
    again = ["train", *task, "--resume", "runs/second", "--model", "moved/base"]
    again += ["--adapter", "moved/first", "--reward"]
    assert cli(*again, "moved/r.py:f")[0] == 0
    assert refused(cli(*again, "moved/r.py:g"), "--reward was r.py:f")
    pattern = ["--eval-problems", 0, "--validate-every", 0, "--steps", 1, "--reward"]
    assert cli("train", *task, "--model", "demo", *QUICK, *pattern, "regex:a/5")[0] == 0
    again = ["train", *task, "--resume", "runs/few-s-grpo", "--reward", "regex:b/5"]
    assert refused(cli(*again), "--reward was regex:a/5")


def test_resume_asks_again_what_is_missing_of_the_comparison(cli):
    task = small_task()
    start = ["train", *task, *QUICK, "--steps", 2, "--validate-every", 0]
    assert cli(*start, "--name", "one")[0] == 0
    path = Path("runs/one/eval.jsonl")
    rows = rows_of(path)
    for kept in (rows[4:], rows[:4], rows[1:], rows[:3] + rows[4:], []):
        tokenrl.write_jsonl(path, kept)
        code, text = cli("train", *task[:3], "--resume", "runs/one")
        assert code == 0 and "trained" in text and "base" in text
        assert sorted(map(str, rows_of(path))) == sorted(map(str, rows))


def test_resume_without_its_state(cli):
    run = one_step(cli, "one")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    (run / "state.pt").unlink()
    assert refused(cli("train", "svamp", "--resume", run), "state.pt", "runs/one")
    del before["state.pt"]
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    for path in run.iterdir():
        if path.name != "config.json":
            path.unlink()
    code, text = cli("train", "svamp", "--resume", run)  # killed before its first save
    assert code == 0 and "from step 1 of 1" in text
    assert len(rows_of(run / "metrics.jsonl")) == 1


# ---- code of strangers ---------------------------------------------------------------------------

NOTES = """
import pathlib
pathlib.Path("executed").write_text("")
def f(*_): return 1.0
def m(trie, rewards, rng): return {0: 1.0}
"""


@pytest.mark.parametrize("key, name", [("metric", "f"), ("reward", "f"), ("method", "m")])
def test_code_comes_only_from_this_command_line(cli, key, name):
    run = one_step(cli, "x")
    (run / "notes.py").write_text(NOTES)
    option = f"runs/x/notes.py:{name}"
    config = json.loads((run / "config.json").read_text())
    config["settings"][key] = option
    del config["asked"]  # made of other code
    (run / "config.json").write_text(json.dumps(config))
    asked = ["svamp", "--adapter", run]
    commands = {
        "eval": ["eval", *asked, "--limit", 2],
        "inspect": ["inspect", *asked, "--index", 3],
        "resume": ["train", "svamp", "--resume", run],
        "train": ["train", *asked, *FAST, "--steps", 1],
        "merge": ["merge", run, "out"],
        "plot": ["plot", run],
    }
    needs = {"metric": ["eval", "resume"], "method": ["inspect", "resume"]}
    for label, command in commands.items():
        answer = cli(*command)
        if label in needs.get(key, ["eval", "inspect", "resume"]):
            assert refused(answer, f"--{key} {option}")
        else:
            assert answer[0] == 0
        assert not Path("executed").exists()
    for label in needs.get(key, ["eval", "inspect", "resume"]):
        assert cli(*commands[label], f"--{key}", option)[0] == 0
        assert Path("executed").exists()
        Path("executed").unlink()
    (run / "other.py").write_text(NOTES)  # another file than the run's is refused or taken, as said
    assert refused(cli(*commands["resume"], f"--{key}", f"runs/x/other.py:{name}"), f"--{key}")
    assert not Path("executed").exists()


def test_inspect_takes_a_runs_metric_for_no_code(cli):
    Path("kpi.py").write_text("def f(text, answer): return 1.0\n")
    run = one_step(cli, "x", "--metric", "kpi.py:f")
    assert "--metric kpi.py:f" in cli("eval", "svamp", "--adapter", run, "--limit", 1)[1]
    assert cli("inspect", "svamp", "--adapter", run, "--index", 3)[0] == 0


# ---- output --------------------------------------------------------------------------------------


def test_output_is_written_through_links_and_into_devices(cli):
    Path("target.jsonl").write_text("old\n" * 500)
    os.symlink("target.jsonl", "link.jsonl")
    os.symlink("/dev/null", "null")
    asked = ["eval", "svamp", "--limit", 2, "--output"]
    for name in ("link.jsonl", "null"):
        assert cli(*asked, name)[0] == 0 and Path(name).is_symlink()
    assert len(rows_of("target.jsonl")) == 2
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.symlink("/dev/null", "null.svg")
    assert cli("inspect", "svamp", "--index", 3, "--output", "null.svg")[0] == 0
    assert Path("null.svg").is_symlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
def test_an_evaluation_is_shown_before_it_is_written(cli):
    answer = cli("eval", "svamp", "--limit", 2, "--output", "/dev/full")
    assert refused(answer, "accuracy (greedy)", "The disk is full")


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_output_that_cannot_be_written_is_found_first(cli, monkeypatch, command):
    def never(*_):
        raise AssertionError("too late")

    monkeypatch.setattr(tokenrl, "find_policy", never)
    Path("file").write_text("")
    Path("folder.svg").mkdir()
    for output in ("folder.svg", "file/x.svg", "/proc/x.svg"):
        answer = cli(command, "svamp", "--output", output)
        assert refused(answer, output.split("/")[0])


def test_evaluation_that_fails_leaves_what_was_there(cli):
    Path("out.jsonl").write_text("mine\n")
    assert cli("eval", "svamp", "--output", "out.jsonl", "--reward", "none")[0] == 1
    assert Path("out.jsonl").read_text() == "mine\n"


# ---- rewards that misbehave ----------------------------------------------------------------------


def test_rewards_at_their_edges(cli):
    Path("r.py").write_text(
        "import sys, os\n"
        "def leaves(text, answer): sys.exit()\n"
        "def sums(text, answer): return 0.7 + 0.2 + 0.1\n"
        "def over(text, answer): return 1.0000000000000002\n"
        "def stops(text, answer): raise KeyboardInterrupt\n"
        "def moves(text, answer): os.chdir('/'); return float('#' in text)\n"
    )
    asked = ["eval", "svamp", "--limit", 3, "--min-accuracy", 1, "--device", "cpu", "--reward"]
    assert refused(cli(*asked, "r.py:leaves"), "SystemExit")
    assert refused(cli(*asked, "r.py:stops"), "KeyboardInterrupt")
    assert cli(*asked, "r.py:sums")[0] == 0
    assert cli(*asked, "r.py:over")[0] == 0
    options = [*FAST, "--steps", "1", "--name", "x", "--reward"]
    for name in ("leaves", "stops"):
        assert refused(cli("train", "svamp", *options, f"r.py:{name}"), f"r.py:{name}")
    here = os.getcwd()
    assert cli("train", "svamp", *options, "r.py:moves")[0] == 0
    assert os.getcwd() == here and len(rows_of("runs/x/metrics.jsonl")) == 1


FORKS = """
import multiprocessing, time
done = []
def f(text, answer):
    if len(done) < 2:
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
        time.sleep(0.05)
        process.terminate()
        process.join(5)
        done.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            raise RuntimeError("it did not end")
        if process.exitcode != 128 + 15:
            raise RuntimeError(f"it ended with {process.exitcode}")
    return float("1" in text)
"""


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_reward_may_end_processes_of_its_own(cli):
    Path("forks.py").write_text(FORKS)
    options = [*FAST, "--steps", "1", "--eval-problems", "0", "--reward", "forks.py:f"]
    assert cli("train", "svamp", *options)[0] == 0


def test_training_and_evaluation_use_the_reward_asked_for(cli):
    Path("kpi.py").write_text("def half(text, answer): return 0.5\ndef one(*_): return 1.0\n")
    one_step(cli, "half", "--reward", "kpi.py:half", "--eval-problems", 8)
    [row] = rows_of("runs/half/metrics.jsonl")
    assert row["reward"] == pytest.approx(0.5 * (1 - row["truncated"]))
    assert row["reward"] > 0 == row["accuracy"]
    assert not any(a["correct"] for a in rows_of("runs/half/eval.jsonl"))
    asked = ["--reward", "kpi.py:one", "--limit", "8", "--output", "o.jsonl"]
    assert cli("eval", "svamp", *asked)[0] == 0
    assert all(a["correct"] != a["truncated"] for a in rows_of("o.jsonl"))


def test_text_answers_from_file_to_adapter(cli):
    rows = [{"question": f"Is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(12)]
    tokenrl.write_jsonl(Path("parity.jsonl"), rows)
    assert cli("prep", "parity.jsonl", "--reward", "exact", "--data-dir", "d")[0] == 0
    assert refused(cli("train", "parity", "--model", "demo", "--data-dir", "d"), "not a number")
    Path("kpi.py").write_text("def short(text, answer): return float(len(text) < 5)\n")
    metric = ["--metric", "kpi.py:short"]
    arguments = ["--model", "demo", "--data-dir", "d", *FAST, "--steps", "1", *metric]
    code, text = cli("train", "parity", *arguments, "--reward", "exact")
    assert code == 0 and "metric │" in text
    answers = rows_of("runs/parity-s-grpo/eval.jsonl")
    assert all(a["metric"] == (len(a["completion"]) < 5) for a in answers)
    asked = ["--adapter", "runs/parity-s-grpo", "--data-dir", "d", *metric]
    code, text = cli("eval", "parity", *asked)  # with the reward that it was trained with
    assert code == 0 and "metric │" in text


# ---- what can be done to a run folder ------------------------------------------------------------


def test_files_have_the_usual_modes(cli):
    before = os.umask(0o027)
    try:
        run = one_step(cli, "one")
        assert cli("merge", run, "merged")[0] == 0
        for path in [*run.iterdir(), *Path("merged").iterdir()]:
            if path.name not in ("run.lock", "prompt.txt"):  # the one is empty, the other a copy
                assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
    finally:
        os.umask(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with all its files, in a folder with its task."""
    folder = tmp_path_factory.mktemp("finished")
    here = os.getcwd()
    os.chdir(folder)
    try:
        task = small_task()
        options = ["--steps", "2", "--validate-every", "1", "--eval-problems", "2", "--name", "x"]
        with pytest.raises(SystemExit) as ended:
            tokenrl.main(list(map(str, ["train", *task, *QUICK, *options])))
        assert not ended.value.code
    finally:
        os.chdir(here)
    return folder


def read_by(name):
    """The commands that read a file of a run, by the file's name."""
    task, tiny = ["few", "--data-dir", "d"], ["--max-new-tokens", 4, "--device", "cpu"]
    yield "train --resume", ["train", *task, "--resume", "runs/x"]
    if name in ("metrics.jsonl", "eval.jsonl"):
        yield "plot", ["plot", "runs/x", "--what", "entropy", "--output", "x.svg"]
        yield "plot", ["plot", "runs/x", "--what", "validation"]
    elif name not in ("state.pt", "run.lock"):
        adapter = ["--model", "demo", "--adapter", "runs/x"]
        yield "eval", ["eval", *task, *adapter, *tiny, "--limit", 1]
        yield "inspect", ["inspect", *task, *adapter, *tiny, "--index", 0]
        yield "merge", ["merge", "runs/x", "out"]
        small = ["--steps", 1, "--eval-problems", 0, "--validate-every", 0, "--prompts-per-step", 1]
        yield "train", ["train", *task, *adapter, *tiny, *small]


def all_end_in_one_sentence(cli, name, what):
    """Each command that reads the file works, or ends in one sentence."""
    found = {}
    for label, command in read_by(name):
        try:
            code, text = cli(*command)
            found[label] = code
            assert code in (0, 1) and (code == 0 or len(text.split("Error: ")[1]) < 600)
        except BaseException as error:
            raise AssertionError(f"{name}, {what}: {command}"[:300]) from error
    shutil.rmtree("out", ignore_errors=True)
    return found


def damages(name, content, rng):
    """(what is done to a file, its content afterwards; None: it is gone, "folder": it is one)"""
    yield "gone", None
    yield "a folder", "folder"
    yield "empty", b""
    yield "torn", content[: rng.randrange(1, len(content) - 1)]
    yield "noise", rng.randbytes(300)
    flipped = bytearray(content)
    for _ in range(3):
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    yield "bits flipped", bytes(flipped)
    if name.endswith(("json", "jsonl")):
        for value in ("null", "[]", "3", '"text"', "{}", "[" * 5000, "{\n"):
            yield value[:6], value.encode()


FILES = ["config.json", "adapter_config.json", "adapter_model.safetensors", "state.pt"]


@pytest.mark.parametrize("name", [*FILES, "metrics.jsonl", "eval.jsonl", "run.lock"])
def test_damaged_files_end_in_one_sentence(cli, finished, tmp_path, name):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = Path("runs/x", name)
    whole = path.read_bytes() or b"0123"
    for damage, content in damages(name, whole, random.Random(name)):
        shutil.rmtree("runs")
        shutil.copytree(finished / "runs", "runs")
        path.unlink()
        if content == "folder":
            path.mkdir()
        elif content is not None:
            path.write_bytes(content)
        all_end_in_one_sentence(cli, name, damage)


ODD = [None, [], {}, "", "x", -1, 0, 1.5, math.nan, math.inf, True, 10**400, [1], "\0", "a" * 5000]


@pytest.mark.parametrize("seed", range(4))
def test_odd_values_in_a_runs_files_end_in_one_sentence(cli, finished, tmp_path, seed):
    """Values of wrong types and out of range, and missing ones, in every JSON file."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    rng = random.Random(seed)
    cases = []
    for name in ("config.json", "adapter_config.json"):
        whole = json.loads(Path("runs/x", name).read_text())
        inner = whole.get("settings", whole)
        for key in list(inner) + ["settings", "problems", "asked"] * (name == "config.json"):
            cases.append((name, key))
    for name in ("metrics.jsonl", "eval.jsonl"):
        cases += [(name, key) for key in rows_of(f"runs/x/{name}")[0]]
    for name, key in cases[seed::11]:
        shutil.rmtree("runs")
        shutil.copytree(finished / "runs", "runs")
        path, value = Path("runs/x", name), rng.choice([*ODD, "missing"])
        rows = rows_of(path) if name.endswith("l") else [json.loads(path.read_text())]
        row = rng.choice(rows)
        row = row["settings"] if key in row.get("settings", {}) else row
        row[key] = value
        if value == "missing":
            del row[key]
        if (name, key) == ("config.json", "steps") and isinstance(value, int) and value > 99:
            continue  # that is a run which only begins
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        all_end_in_one_sentence(cli, name, f"{key} {value!r}")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [],
        lambda state: {},
        lambda state: state | {"step": "two"},
        lambda state: state | {"step": -1},
        lambda state: state | {"step": 3},
        lambda state: state | {"weights": {}},
        lambda state: state | {"weights": None},
        lambda state: state | {"optimizer": {}},
        lambda state: state | {"rewards": None, "best": "x"},
        lambda state: state | {"weights": {k: w[:1] for k, w in state["weights"].items()}},
        lambda state: state | {"weights": {k + "x": w for k, w in state["weights"].items()}},
        lambda state: {k: v for k, v in state.items() if k != "stale"},
    ],
)
def test_a_state_that_does_not_fit(cli, finished, tmp_path, change):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    state = torch.load("runs/x/state.pt", weights_only=True)
    torch.save(change(state | {"step": 1}), "runs/x/state.pt")
    assert refused(cli("train", "few", "--data-dir", "d", "--resume", "runs/x"), "runs/x")


def test_a_state_of_another_shape_of_lora(cli, finished, tmp_path):
    """torch would spread the one row of rank 1 over all 16, and say nothing."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    small = ["--steps", 2, "--lora-rank", 1, "--validate-every", 0, "--eval-problems", 0]
    assert cli("train", "few", *small_task()[1:], *QUICK, *small, "--name", "small")[0] == 0
    state = torch.load("runs/small/state.pt", weights_only=True)
    torch.save(state | {"step": 1}, "runs/x/state.pt")
    assert refused(cli("train", "few", "--data-dir", "d", "--resume", "runs/x"), "state.pt")


def test_a_torn_line_of_metrics_is_found_before_training(cli, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = Path("runs/x/metrics.jsonl")
    whole = path.read_text()
    path.write_text(whole + whole[:40])  # after the last save: the step is taken again
    assert cli("train", "few", "--data-dir", "d", "--resume", "runs/x")[0] == 0
    assert path.read_text() == whole
    first, second = whole.splitlines(keepends=True)
    for torn in (first[:40] + "\n" + second, first[:40] + second, first, second):
        path.write_text(torn)
        answer = cli("train", "few", "--data-dir", "d", "--resume", "runs/x")
        assert refused(answer, "metrics.jsonl") and "evaluating" not in answer[1]


def test_adapters_without_safetensors_are_refused_and_nothing_is_asked_for(
    cli, finished, tmp_path, monkeypatch
):
    import huggingface_hub

    def never(*_, **__):
        raise AssertionError("the hub was asked")

    for name in ("hf_hub_download", "snapshot_download", "model_info", "file_exists"):
        monkeypatch.setattr(huggingface_hub, name, never)
    monkeypatch.setattr("peft.utils.save_and_load.hf_hub_download", never)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    weights = weights_of("runs/x")
    Path("runs/x/adapter_model.safetensors").unlink()
    for binary in (False, True):
        if binary:
            torch.save(weights, "runs/x/adapter_model.bin")
        for command in (
            ["eval", "few", "--data-dir", "d", "--adapter", "runs/x"],
            ["inspect", "few", "--data-dir", "d", "--adapter", "runs/x"],
            ["merge", "runs/x", "out"],
            ["train", "few", "--data-dir", "d", "--model", "demo", "--adapter", "runs/x"],
        ):
            lacking = "runs/x holds no adapter (no adapter_model.safetensors)"
            assert refused(cli(*command), lacking)
    assert not Path("out").exists()


def test_runs_of_the_first_edition(cli, finished, tmp_path):
    """They can be evaluated, merged, drawn and gone on from; resuming is refused."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    old = {"task": "few", "model": "demo", "method": "s-grpo", "lr": 0.003, "steps": 2}
    old |= {"l2": 0.0, "max_grad_norm": 1.0, "checkpointing": False, "group_size": 4}
    old |= {"max_new_tokens": 24, "temperature": 1.0, "prompt": "auto", "shots": None}
    old |= {"reward": "number", "data_dir": "d", "seed": 0, "dtype": "auto", "batch_rows": 64}
    Path("runs/x/config.json").write_text(json.dumps({"settings": old, "versions": {}}))
    rows = rows_of("runs/x/metrics.jsonl")
    for row in rows:
        for key in ("entropy", "kl", "validation", "tokens_packed"):
            row.pop(key, None)
    tokenrl.write_jsonl(Path("runs/x/metrics.jsonl"), rows)
    answers = rows_of("runs/x/eval.jsonl")
    tokenrl.write_jsonl(
        Path("runs/x/eval.jsonl"), [{k: v for k, v in a.items() if k != "entropy"} for a in answers]
    )
    found = all_end_in_one_sentence(cli, "config.json", "of the first edition")
    assert found["eval"] == found["merge"] == found["train"] == 0
    assert found["train --resume"] == 1 and cli("plot", "runs/x")[0] == 0
    assert refused(cli("train", "few", "--data-dir", "d", "--resume", "runs/x"), "--adapter runs/x")


def test_the_base_of_an_adapter_is_asked_for_by_its_name(cli):
    assert DEMO.is_dir()
    run = one_step(cli, "one")
    path = run / "config.json"
    path.write_text(path.read_text().replace('"model": "demo"', '"model": "a/first"'))
    assert refused(cli("eval", "svamp", "--adapter", run, "--model", "demo"), "made for a/first")
