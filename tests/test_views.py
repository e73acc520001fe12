"""What is shown: the live table, tables of evaluations, statistics, inspect, plot."""

import importlib.util
import io
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
from conftest import random_completions
from rich.console import Console

import tokenrl

PROBLEM = tokenrl.Problem("What is 7 * 8? [/b]:smile:", "56")
GIB = 2**30


@pytest.fixture
def screen(monkeypatch):
    """Puts a console of some width in place, a terminal or a pipe; returns it with `.text()`."""

    def place(width=80, terminal=False):
        file = io.StringIO()
        options = {"force_terminal": terminal, "color_system": None, **tokenrl.AS_IT_IS}
        console = Console(file=file, width=width, height=24, legacy_windows=False, **options)
        console.text = lambda: re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.getvalue()).replace(
            "\r", "\n"
        )
        monkeypatch.setattr(tokenrl, "console", console)
        return console

    return place


def metrics(step, **changed):
    row = {"step": step, "reward": 0.5, "accuracy": 0.5, "signal": 0.75, "distinct": 0.9}
    row |= {"entropy": 0.412, "kl": 0.0004, "length": 31.2, "tokens_trained": 300}
    row |= {"tokens_generated": 2000, "skipped": False, "rollout_s": 1.5, "update_s": 0.5}
    return row | {"peak_memory": 0.44 * GIB} | changed


def record(i, correct, kind="", **changed):
    row = {"phase": "base", "index": i, "question": f"q{i}", "answer": "1", "type": kind}
    row |= {"completion": f"so\n#### {i}", "correct": correct, "length": 3, "truncated": False}
    return row | {"samples": 0, "samples_correct": 0} | changed


# ---- the live table ------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
def test_live_table_fits_80_columns(screen, terminal):
    console = screen(80, terminal)
    tokenrl.show_step(metrics(1), "cpu", "a note")
    wild = {"reward": math.nan, "peak_memory": 75.2 * GIB, "signal": 1.0}
    tokenrl.show_step(metrics(2, skipped=True, **wild), "cpu")
    long = {"validation": 1.0, "tokens_trained": 2000, "rollout_s": 123.456, "reward": -0.5}
    tokenrl.show_step(metrics(3, **long), "cpu")
    lines = [line.rstrip() for line in console.text().splitlines()]
    [head] = [line for line in lines if line.startswith("step reward")]
    for name in ("signal", "entropy", "length", "trained", "seconds", "memory", "validation"):
        assert name in head.split()
    rows = [line for line in lines if re.match(r" +!?\d ", line)]
    assert len(rows) == 3 and max(map(len, [head, *rows])) <= 79
    assert rows[1].startswith("  !2") and "nan" in rows[1] and rows[0].startswith("   1")
    assert rows[2].endswith("100.0%") and "%" in rows[0] and not rows[0].endswith("%")
    ends = {match.end() for match in re.finditer(r"\S+", head)}
    for row in rows:
        cells = {match.end() for match in re.finditer(r"\S+", row)}
        assert cells <= ends, "numbers stand right below their titles"


@pytest.mark.parametrize("device, memory", [("cpu", "memory"), ("cuda:1", "VRAM")])
def test_live_table_has_the_numbers_of_the_row(screen, device, memory):
    console = screen()
    tokenrl.show_step(metrics(12), device, "note")
    _, head, row = filter(str.strip, console.text().splitlines())
    shown = dict(zip(head.split(), row.split()))
    assert shown.pop("trained") == "15.0%" and shown.pop("signal") == "75%"
    numbers = {"step": 12, "reward": 0.5, "entropy": 0.412, "length": 31, memory: 0.44}
    numbers |= {"kl": 0.0004, "seconds": 2.0}
    assert {name: float(value) for name, value in shown.items()} == numbers


def test_a_skipped_step_is_red(screen):
    console = screen(terminal=True)
    console._color_system = Console(force_terminal=True, color_system="standard")._color_system
    tokenrl.show_step(metrics(1), "cpu")
    tokenrl.show_step(metrics(2, skipped=True), "cpu")
    raw = console.file.getvalue()
    assert re.search(r"\x1b\[31m *!2 ", raw) and not re.search(r"\x1b\[31m *1 ", raw)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_titles_stand_between_a_note_and_its_step(screen, terminal):
    console = screen(80, terminal)
    with tokenrl.progress("training", 3) as tick:
        for step, text in ((1, "first"), (2, ""), (3, "last")):
            note = text and tokenrl.completion_note(PROBLEM, text, 1)
            tokenrl.show_step(metrics(step), "cpu", note)
            tick(1)
    found = re.findall(r"^ +([123])  |completion +(\w+)|^(step) ", console.text(), re.M)
    assert ["".join(each) for each in found] == ["first", "step", "1", "2", "last", "step", "3"]
    assert not terminal or "100%" in console.text()


def test_completion_note(screen):
    console = screen()
    console.print(tokenrl.completion_note(PROBLEM, "7 * 8 = 56 [/b]:smile:\n#### 56", 0.5))
    text = console.text()
    for part in (PROBLEM.question, "7 * 8 = 56 [/b]:smile:↵#### 56", "reference   56", "0.5"):
        assert part in text
    assert len(text.strip().splitlines()) == 4


@pytest.mark.parametrize("text", ["line\n" * 300, "word " * 3000, "x" * 9000])
def test_long_completions_are_cut(screen, text):
    console = screen()
    console.print(tokenrl.completion_note(PROBLEM, text, 0))
    assert len(console.text().splitlines()) <= 15


def test_the_mean_step(screen):
    rows = [metrics(1), metrics(2, peak_memory=3 * GIB, rollout_s=57.5, validation=0.5)]
    rows[1] |= {"tokens_trained": 100, "tokens_generated": 3000, "reward": 1.0}
    console = screen()
    tokenrl.show_step(tokenrl.mean_step(rows), "cpu", "note")
    _, head, row = filter(str.strip, console.text().splitlines())
    shown = dict(zip(head.split()[1:], row.split()))
    assert shown["trained"] == "8.0%" and shown["seconds"] == "30.00" and shown["memory"] == "3.00"
    assert shown["reward"] == "0.750" and "validation" not in shown


# ---- statistics ----------------------------------------------------------------------------------


def test_wilson():
    assert tokenrl.wilson(133, 300) == pytest.approx((0.388, 0.500), abs=1e-3)
    assert tokenrl.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert tokenrl.wilson(10, 10)[1] == 1.0


def test_mcnemar_is_the_share_of_coin_throws_as_uneven():
    assert tokenrl.mcnemar([True, False], [True, False]) == 1.0
    for mended, broken in itertools.product(range(6), range(6)):
        before = [False] * mended + [True] * broken + [True, False]
        after = [True] * mended + [False] * broken + [True, False]
        throws = itertools.product([-1, 1], repeat=mended + broken)
        uneven = [abs(sum(throw)) >= abs(mended - broken) for throw in throws]
        assert tokenrl.mcnemar(before, after) == pytest.approx(sum(uneven) / len(uneven))
    assert tokenrl.mcnemar([1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.5, 4.0]) == pytest.approx(1 / 4)
    assert tokenrl.mcnemar([0] * 3000, [1] * 3000) == 0.0


# ---- tables of evaluations -----------------------------------------------------------------------


def cells(text):
    """{first cell: the others} of a table's text."""
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in text.splitlines()
        if "│" in line
    ]
    return {row[0]: row[1:] for row in rows}


def test_comparison(screen):
    before = [record(i, i < 2, "AB"[i % 2]) for i in range(30)]
    after = [record(i, i >= 1, "AB"[i % 2], length=9, truncated=i < 3) for i in range(30)]
    console = screen(100)
    console.print(
        tokenrl.comparison_table({"base": before, "runs/[b]x[/b]:smile:": after}, "title")
    )
    rows = cells(console.text())
    assert "runs/[b]x[/b]:smile:" in console.text()
    assert rows["accuracy (greedy)"] == ["6.7%  (2/30)", "96.7%  (29/30)"]
    assert rows["difference, paired"] == ["", "+90.0 points"]
    assert rows["p (exact McNemar)"] == ["", "1.1e-07"]  # 28 mended, 1 broken
    assert rows["A (15)"] == ["6.7%", "93.3%"] and rows["B (15)"] == ["6.7%", "100.0%"]
    assert rows["truncated"] == ["0.0%", "10.0%"] and rows["length"] == ["3.0", "9.0"]
    assert not any("pass@" in label or label in ("entropy", "metric") for label in rows)


def test_comparison_of_samples_and_what_else_the_records_have(screen):
    rows = [record(i, True, str(i), entropy=0.25, metric=0.5) for i in range(21)]  # 21 types
    rows = [{**row, "samples": 5, "samples_correct": i % 3} for i, row in enumerate(rows)]
    console = screen()
    console.print(tokenrl.comparison_table({"base": rows, "run": rows}, "title"))
    shown = cells(console.text())
    assert shown["entropy"] == ["0.250"] * 2 and shown["metric"] == ["0.500"] * 2
    assert shown["pass@1"] == ["20.0%"] * 2 and shown["pass@5"] == ["66.7%"] * 2
    assert not any("(1)" in label for label in shown)


def test_comparison_of_one_policy_alone(screen):
    console = screen()
    console.print(tokenrl.comparison_table({"base": [record(0, True)]}, "title"))
    shown = cells(console.text())
    assert shown["accuracy (greedy)"] == ["100.0%  (1/1)"] and "difference, paired" not in shown


@pytest.mark.parametrize("width", [80, 120])
def test_names_of_several_adapters_stay_apart(screen, width):
    records = [record(i, i < 2) for i in range(10)]
    names = [f"runs/svamp-s-grpo-with-a-long-name-{i}" for i in range(3)]
    console = screen(width)
    console.print(tokenrl.comparison_table({"base": records} | dict.fromkeys(names, records), "t"))
    text = console.text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    head = text.split("┡")[0].splitlines()[2:]
    columns = ["".join(parts).replace(" ", "") for parts in zip(*(re.split("┃", h) for h in head))]
    assert columns[2:-1] == ["base", *names]  # folded, but whole


def test_changes_in_full(screen):
    before = [record(i, i < 2) for i in range(9)]
    after = [record(i, 0 < i < 7, truncated=i == 8) for i in range(9)]
    long = " ".join(f"w{i}" for i in range(80)) + " [/b]:smile:"
    after[2]["completion"], other = long, [record(i, i < 2) for i in range(9)]
    console = screen()
    console.print(*tokenrl.changes({"base": before, "runs/a": after, "runs/b": other}, 2), sep="\n")
    text = console.text()
    counts = re.findall(r"(runs/\w) against base: (\d+) (mended|broken|still wrong)", text)
    expected = [("a", "5", "1", "2"), ("b", "0", "0", "7")]
    kinds = ("mended", "broken", "still wrong")
    assert counts == [(f"runs/{n}", c, kind) for n, *own in expected for c, kind in zip(own, kinds)]
    assert re.findall(r"^q(\d)", text, re.M) == [*"23", "0", *"78", *"23"]
    assert re.findall(r"w\d+", text) == [f"w{i}" for i in range(80)] and "[/b]:smile:" in text
    assert text.count("(cut off)") == 1 and text.count("reference: 1") == 7
    assert max(map(len, text.splitlines())) <= 80


# ---- inspect -------------------------------------------------------------------------------------


def decode(tokens):
    return "".join(f"{token} " for token in tokens)


@pytest.mark.parametrize("method", ["grpo", "s-grpo", "t-spmo"])
@pytest.mark.parametrize("seed", range(3))
def test_inspect_marks_exactly_the_trained_tokens(method, seed):
    rng = random.Random(seed)
    completions = random_completions(rng, 6, 8)
    rewards = [float(rng.random() < 0.5) for _ in completions[1:]] + [0.5]
    trie = tokenrl.Trie(completions)
    weights = {
        "grpo": lambda: tokenrl.grpo_weights(trie, rewards),
        "s-grpo": lambda: tokenrl.s_grpo_weights(trie, rewards, 2, 0.5, rng),
        "t-spmo": lambda: tokenrl.t_spmo_weights(trie, rewards),
    }[method]()
    most = max(map(abs, weights.values()))
    for path in trie.paths:
        marks = []
        text = tokenrl.credit_text(decode, trie, path, weights).plain
        for sign, marked, plain in re.findall(r"\[([+-]+)([\d ]+)\]|([\d ]+)", text):
            marks += [(int(token), sign) for token in (marked or plain).split()]
        assert [token for token, _ in marks] == [trie.tokens[node] for node in path]
        for node, (_, sign) in zip(path, marks):
            weight = weights.get(node, 0.0)
            thirds = (3 * abs(weight) > most * 1.00001) + (3 * abs(weight) > 2 * most * 1.00001)
            assert sign == ("+" if weight > 0 else "-") * (0 if not weight else 1 + thirds)


class Shown:
    """A policy as show_group needs it; [7, 8] was cut off."""

    def __init__(self, decode):
        self.tokenizer = self
        self.decode, self.finished = decode, lambda completion: completion != [7, 8]


def group(screen, rewards, methods, word=decode):
    rollout = tokenrl.Rollout(PROBLEM, [1], [[2, 3, 4], [2, 3, 5], [2, 6], [7, 8]], rewards)
    console = screen(100)
    console.print(*tokenrl.show_group(Shown(word), rollout, methods), sep="\n")
    return console.text()


def test_show_group_shows_text_as_it_is(screen):
    word = lambda tokens: "[/b]:smile:\n" * len(tokens)  # noqa: E731
    text = group(screen, [1.0, 0.0, 0.0, 0.5], {"grpo": ("rule", {0: 0.5})}, word)
    assert text.count("[/b]") > 10 and text.count(":smile:") > 10 and "↵" in text


def test_show_group(screen):
    methods = {"grpo": ("rule one.", {0: 0.5, 2: -0.5}), "mine": ("rule [/b] two", {3: 0.1})}
    text = group(screen, [1.0, 0.0, 0.0, 0.5], methods)
    for part in (PROBLEM.question, "56", "rule one", "rule [/b] two", "node", "2 of 7", "1 of 7"):
        assert part in text
    assert re.search(r"^ 1 reward 1  \[\+\+\+2 \]3 \[---4 \] *$", text, re.M)
    cut = re.findall(r"^ \d reward (\S+) .*\(cut off\) *$", text, re.M)
    assert cut == ["0.5", "0.5"]  # one completion, by both methods


def test_show_group_without_signal(screen):
    text = group(screen, [1.0] * 4, {"grpo": ("rule", {})})
    assert "no method learns anything" in text and "0 of 7" in text
    assert "[+++" not in text and "reward 1  2 3 4" in text


def test_inspect_says_each_methods_rule(cli, tmp_path):
    (tmp_path / "mine.py").write_text(
        'def best(trie, rewards, rng):\n    """The last token of the best.\n\n    More."""\n'
        "    return {trie.paths[0][-1]: 1.0}\n\n\ndef bare(trie, rewards, rng):\n    return {}\n"
    )
    small = ["--group-size", "4", "--max-new-tokens", "24", "--device", "cpu"]
    code, text = cli("inspect", "svamp", *small, "--method", "all")
    assert code == 0 and "s-grpo: GRPO" in text and "at random" in text
    assert text.count("nodes are trained") == 3
    code, text = cli("inspect", "svamp", *small, "--method", "mine.py:best")
    assert code == 0 and "best: The last token of the best. 1 of" in text
    code, text = cli("inspect", "svamp", *small, "--method", "mine.py:bare")
    assert code == 0 and "bare: " in text and "None" not in text


# ---- plot ----------------------------------------------------------------------------------------


def write_run(name, rows, records=()):
    Path(name).mkdir(parents=True)
    write = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)  # noqa: E731
    (Path(name) / "metrics.jsonl").write_text(write(rows))
    (Path(name) / "eval.jsonl").write_text(write(records))


def test_curve_of_few_steps_is_their_values():
    nan = [metrics(1, entropy=math.nan), metrics(2), metrics(3)]
    assert tokenrl.curve_of(nan, "entropy") == {2: 0.412, 3: 0.412}
    assert tokenrl.curve_of([metrics(1, reward=0.0)], "reward") == {1: 0.0}
    assert tokenrl.curve_of(nan, "validation") == tokenrl.curve_of([], "reward") == {}
    rows = [metrics(step) | ({"validation": step / 10} if step % 2 else {}) for step in range(1, 6)]
    assert tokenrl.curve_of(rows, "validation") == {1: 0.1, 3: 0.3, 5: 0.5}


@pytest.mark.parametrize("steps", [29, 30, 100, 1001])
def test_a_long_curve_is_at_most_thirty_means(steps):
    curve = tokenrl.curve_of([metrics(i, reward=float(i)) for i in range(1, steps + 1)], "reward")
    assert 15 <= len(curve) <= 30 and max(curve) == steps
    width = next(iter(curve))
    for step, value in [*curve.items()][:-1]:
        assert value == pytest.approx(step - (width - 1) / 2)


def test_curves_of_all_runs_are_on_one_scale(screen):
    console, up = screen(), {i: float(i) for i in range(1, 9)}
    console.print(tokenrl.curve_table({"[b]up[/b]": up, "flat": {1: 8.0, 2: 8.0}}, "reward"))
    rows = cells(console.text())
    assert rows["[b]up[/b]"] == ["▁▂▃▄▅▆▇█", "1", "8"] and rows["flat"] == ["██", "8", "8"]
    console.print(tokenrl.curve_table({"one": {5: 0.5}}, "reward"))
    assert cells(console.text())["one"] == ["▁", "0.5", "0.5"]


def test_plot_keeps_long_names_apart(cli, monkeypatch):
    monkeypatch.setattr(tokenrl.console, "width", 80, raising=False)
    names = [f"runs/invoices-2026-qwen2.5-coder-0.5b-with-a-long-name-{i}" for i in (1, 2)]
    for name in names:
        Path(name).mkdir(parents=True)
        rows = [{"step": i, "reward": i / 40} for i in range(1, 41)]
        tokenrl.write_jsonl(Path(name, "metrics.jsonl"), rows)
    text = cli("plot", *names)[1]
    assert "name-1" in text.replace(" ", "") and "name-2" in text.replace(" ", "")


def test_plot(cli):
    base = [record(i, i < 1) for i in range(4)]
    trained = [record(i, i < 3, phase="trained") for i in range(4)]
    write_run("runs/a", [metrics(1), metrics(2, reward=0.75)], base + trained)
    write_run("runs/b", [metrics(1)], base)
    write_run("runs/empty", [])
    code, text = cli("plot", "runs/a", "runs/b", "runs/empty", "none")
    assert code == 0 and re.search(r"runs/a 25.0% → 75.0% │ ▁█ +│ 0.5 +│ 0.75", text)
    assert "empty" not in text and "none" not in text
    assert re.search(r"runs/b +│", text)  # no arrow before there is an end
    for what in ("validation", "foo"):
        code, text = cli("plot", "runs/a", "--what", what)
        assert code == 1 and f"no {what} to draw in runs/a" in text
    for what in ("entropy", "kl", "distinct", "rollout_s", "tokens_trained"):
        assert cli("plot", "runs/a", "--what", what)[0] == 0


def test_picture(cli, monkeypatch):
    write_run("a", [metrics(1), metrics(2)], [record(0, True), record(0, True, phase="trained")])
    if importlib.util.find_spec("matplotlib"):
        for name in ("a.png", "a.svg"):
            assert cli("plot", "a", "--output", name)[0] == 0 and Path(name).stat().st_size > 999
        assert "<svg" in Path("a.svg").read_text()
    assert "must end in .png or .svg" in cli("plot", "a", "--output", "a.gif")[1]
    assert not Path("a.gif").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, text = cli("plot", "a", "--output", "b.png")
    assert code == 1 and "pip install matplotlib" in text
