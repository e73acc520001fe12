"""The bundled problems: made from a seed, and split so that the test is unseen."""

import random
import re
import sys

from conftest import DEMO, FAST, rows_of

sys.path.insert(0, str(DEMO.parent))

import make_demo  # noqa: E402


def test_the_seed_gives_the_bundled_problems():
    for name, problems in make_demo.bundled_problems(random.Random(0)).items():
        made = [{key: p[key] for key in ("question", "answer", "type")} for p in problems]
        assert made == rows_of(DEMO / f"{name}.jsonl")


def template(question):
    """The wording of a problem, without names, things and numbers."""
    boxes = [word for box in make_demo.BOXES for word in box]
    for words, sign in ((make_demo.NAMES, "N"), (make_demo.OBJECTS, "o"), (boxes, "c")):
        question = re.sub(
            rf"\b({'|'.join(sorted(words, key=len, reverse=True))})\b", sign, question
        )
    return re.sub(r"\d+", "#", question)


def test_splits_share_no_template_and_no_numbers():
    rng = random.Random(1)
    seen = {
        split: [make_demo.make_problem(rng, split) for _ in range(3000)]
        for split in ("pretrain", "rl", "test")
    }
    for kind in (lambda p: template(p["question"]), lambda p: (p["op"], p["x"], p["y"])):
        kinds = [set(map(kind, problems)) for problems in seen.values()]
        assert all(len(k) > 30 for k in kinds)
        assert not kinds[0] & kinds[1] and not kinds[0] & kinds[2] and not kinds[1] & kinds[2]
        files = make_demo.bundled_problems(random.Random(0))
        assert not set(map(kind, files["train"])) & set(map(kind, files["test"]))


def test_every_bundled_answer_is_right():
    for name in ("train", "test"):
        for row in rows_of(DEMO / f"{name}.jsonl"):
            numbers = [int(n) for n in re.findall(r"\d+", row["question"])]
            pairs = [(x, y) for x in numbers for y in numbers]
            ways = {
                "Addition": [x + y for x, y in pairs],
                "Subtraction": [x - y for x, y in pairs],
                "Multiplication": [x * y for x, y in pairs],
                "Division": [x // y for x, y in pairs if x % y == 0],
            }
            assert int(row["answer"]) in ways[row["type"]]


def test_chains(tmp_path):
    """A task of its own: right answers, no test problem in training, and 0.625 ** K right in writing."""
    rng = random.Random(0)
    files = make_demo.chain_problems(rng, 3)
    keys = [{(p["start"], *p["moves"]) for p in files[name]} for name in ("train", "test")]
    assert [len(files[name]) for name in ("train", "test")] == [700, 300] and not keys[0] & keys[1]
    less = {verbs[1] for verbs in make_demo.VERBS}
    for problem in files["test"]:
        start, *told = re.findall(r"(\w+) (\d+)", problem["question"])
        signed = [-int(n) if verb in less else int(n) for verb, n in told]
        assert int(problem["answer"]) == int(start[1]) + sum(signed) and len(told) == 3
    right = [
        make_demo.written_chain(rng, problem).endswith(f"#### {problem['answer']}")
        for problem in files["test"] * 10
    ]
    assert 0.22 < sum(right) / 3000 < 0.32  # 0.625 ** 3, and two mistakes of the same size
    for misread, sign in ((0, 0), 1), ((1, 1), -1):
        for problem in files["test"]:
            moves = [-n if less else n for less, n in problem["moves"]]
            total = problem["start"] + sign * sum(moves)
            assert make_demo.written_chain(rng, problem, misread).endswith(f"#### {total}")


def test_a_chain_is_a_folder_to_train_on(cli, tmp_path, monkeypatch):
    made = ["--chain", "2", "--steps", "1", "--batch", "2", "--output", tmp_path / "chain2"]
    monkeypatch.setattr(sys, "argv", ["make_demo.py", *map(str, made)])
    make_demo.main()
    asked = ["chain", "--model", "chain2", "--data-dir", "chain2"]
    assert cli("train", *asked, *FAST, "--steps", "1")[0] == 0
    assert cli("eval", *asked, "--adapter", "runs/chain-s-grpo", "--limit", "4")[0] == 0
