"""The bundled problems: made from a seed, and split so that the test is unseen."""

import random
import re
import sys

from conftest import DEMO, rows_of

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
