"""The script that tells whether a run still answers as it did."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import drift
import pytest
from conftest import FAST, ROOT

import tokenrl


def record(i, correct, kind="", **changed):
    row = {"phase": "trained", "question": f"q{i}", "answer": "1", "type": kind, "length": 3}
    return row | {"correct": correct, "truncated": False} | changed


def compared(then, now):
    """({(group, measure): "worse", "up" or "down"} of what has changed, all the rows)"""
    rows, changed = drift.compare(then, now), {}
    for group, measure, before, after, p in rows:
        if p <= 0.05:
            worse = drift.is_worse(measure, before, after, p)
            changed[group, measure] = "worse" if worse else "up" if after > before else "down"
    return changed, rows


def stepped_down(p_values, alpha):
    """Holm's procedure in its own words: which hypotheses are rejected at `alpha`."""
    order, rejected = sorted(range(len(p_values)), key=lambda i: p_values[i]), set()
    for rank, i in enumerate(order):
        if p_values[i] > alpha / (len(p_values) - rank):
            break
        rejected.add(i)
    return rejected


def test_holm():
    assert drift.holm([]) == []
    assert drift.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    rng = random.Random(0)
    for _ in range(200):
        p_values = [rng.random() ** 3 for _ in range(rng.randint(1, 8))]
        adjusted = drift.holm(p_values)
        assert all(p <= a <= 1 for p, a in zip(p_values, adjusted))
        for alpha in (0.01, 0.05, 0.2, 0.5):
            rejected = {i for i, p in enumerate(adjusted) if p <= alpha}
            assert rejected == stepped_down(p_values, alpha)


def test_only_less_accuracy_or_more_truncated_is_worse():
    then = [record(i, i < 40, "AB"[i % 2], entropy=0.3 + i / 100) for i in range(60)]
    assert compared(then, then)[0] == {}
    fallen = [{**row, "correct": int(row["question"][1:]) < 10} for row in then]
    changed, rows = compared(then, fallen)
    assert changed == {(g, "correct"): "worse" for g in ("all (60)", "A (30)", "B (30)")}
    assert len(rows) == 12
    assert set(compared(fallen, then)[0].values()) == {"up"}
    changed, _ = compared(then, [{**row, "truncated": True} for row in then])
    assert changed["all (60)", "truncated"] == "worse"
    changed, _ = compared(then, [{**row, "length": 9, "entropy": 0.1} for row in then])
    assert set(changed.values()) == {"up", "down"}


def test_noise_is_no_change():
    then = [record(i, i < 40, entropy=0.3 + i / 100) for i in range(60)]
    noise = [{**row, "entropy": row["entropy"] + 1e-6} for row in then]
    noise[39]["correct"] = noise[38]["correct"] = False
    assert compared(then, noise)[0] == {}


def test_a_run_without_entropies_is_compared_in_the_rest():
    then = [record(i, True) for i in range(9)]
    _, rows = compared(then, [{**row, "entropy": 0.1} for row in then])
    assert [row[1] for row in rows] == ["correct", "truncated", "length"]


def test_only_questions_that_both_have_are_compared():
    then = [record(i, True) for i in range(40)]
    now = [record(i, i >= 40) for i in range(30, 70)][::-1]
    assert compared(then, now)[0] == {("all (10)", "correct"): "worse"}
    with pytest.raises(tokenrl.UserError):
        drift.compare(then, [record(i, True) for i in range(50, 60)])


def test_the_number_of_tests_is_adjusted_for():
    then = [record(i, i < 9, f"k{i % 10}") for i in range(90)]
    now = [{**row, "correct": 6 <= i < 9} for i, row in enumerate(then)]
    correct = [[row["correct"] for row in side] for side in (then, now)]
    assert tokenrl.mcnemar(*correct) < 0.05
    assert compared(then, now)[0] == {}  # one of 33 tests


def test_a_fresh_run_has_not_drifted(cli):
    run = ["--name", "x", "--steps", "1", "--validate-every", "0"]
    assert cli("train", "svamp", *FAST, *run)[0] == 0
    words = [sys.executable, ROOT / "tests" / "drift.py", "svamp", "--against", "runs/x"]
    words += ["--limit", "8", "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"all \(8\) +│ (\w+) +│.+│ 1 +│", done.stdout) == [*drift.MEASURES]
    assert "worse" not in done.stdout and "base" in done.stderr


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """run_of(records then, records now): the arguments that compare a run with an evaluation which
    is not really made; `.command` is what would make it."""

    def make(then, now, status=0):
        def fake(command, **_):
            make.command = command
            rows = [{"policy": name, **row} for name in ("base", "run") for row in now]
            output = Path(command[command.index("--output") + 1])
            output.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return subprocess.CompletedProcess(command, status)

        monkeypatch.setattr(subprocess, "run", fake)
        rows = [record(i, False, phase="base") for i in range(9)] + then
        (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["task", "--against", str(tmp_path)]

    return make


def test_exit_codes(run_of, capsys):
    good, bad = ([record(i, right) for i in range(20)] for right in (True, False))
    assert drift.main(run_of(good, bad)) == 1
    assert re.search(r"all \(20\) +│ correct .*│ ↓ worse", capsys.readouterr().out)
    assert drift.main(run_of(bad, good)) == drift.main(run_of(good, good)) == 0
    assert drift.main(run_of(good, bad, status=1)) == 2  # the evaluation itself has failed
    assert drift.main(run_of([], good)) == 2
    assert drift.main(["task", "--against", "none"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_options_are_those_of_eval(run_of, tmp_path):
    rows = [record(0, True)]
    drift.main([*run_of(rows, rows), "--limit", "5", "--decimal-is-no-option"])
    words = run_of.command
    assert words[2:4] == ["eval", "task"] and words[words.index("--adapter") + 1] == str(tmp_path)
    assert words[words.index("--limit") + 1] == "5" and "--decimal-is-no-option" in words
    for named in (["--model", "merged"], ["--adapter=other"]):
        drift.main([*run_of(rows, rows), *named])
        assert str(tmp_path) not in run_of.command
