"""Make the bundled demo again from a seed: word problems, a tokenizer, and a small half-competent model.

    python data/make_demo.py                             10 minutes on 2 CPU cores; writes data/demo/
    python data/make_demo.py --chain 4 --output chain4   3 minutes; a second task for the same model

The problems are SVAMP-style: one operation, short stories, numbers that do not matter, and wordings whose
keywords mislead ("more" in a subtraction, "left" in an addition). A template is one story pattern together with one
question pattern, and three disjoint sets of templates and of number pairs go to pretraining, to RL training and to
the held-out test: no problem of the test shares its template or its deciding numbers with a problem seen before. One
pretraining example in five is a bare sum such as "What is 7 * 8?", rightly answered, over all numbers.

The model learns from a made-up class of pupils, as a language model learns from the web. 50 % of the written answers
come from pupils who go by keywords, take the first two numbers and compute at once; 30 % from pupils who read the
question, write down a thought ("Mila has fewer.") and then compute; 15 % from pupils who guess; and 5 % are readers
with a slip of the pen. So the model's most likely answer is often the hasty one, while the thoughtful one comes by
sampling: a policy that reinforcement learning can improve. During RL it is told only right or wrong.

`--chain K` makes a task with K choices in a row, each to be learned by itself: "Ada has 47 pens. Then Ada finds 5.
Then Ada pays 3. How many pens is that?" is answered by K sums. The pupils misread "finds" in 10 % of the lines and
"pays" in 65 % (`--misread 0.1 0.65`), so that 0.625 ** K of their answers are right, and less where the model writes
what is most likely. The folder holds a model, fine-tuned from data/demo/, and the task:

    python tokenrl.py train chain --model chain4 --data-dir chain4
"""

import argparse
import json
import os
import random
import re
import zlib
from pathlib import Path

NAMES = "Ada Ben Cleo Dan Ella Finn Gita Hugo Ines Jack Kofi Lena Milo Nora Omar Pia Ravi Sara Tom Uma".split()
OBJECTS = (
    "apples balls beads books buttons cards coins cookies cups dolls eggs flowers hats kites marbles nuts "
    "pears pens plums rings shells stamps stickers stones"
).split()
BOXES = [
    ("bag", "bags"),
    ("basket", "baskets"),
    ("box", "boxes"),
    ("jar", "jars"),
    ("shelf", "shelves"),
    ("tray", "trays"),
    ("table", "tables"),
    ("drawer", "drawers"),
]

# kind, how often, type, operation, a reader's thought, stories, questions. {a} {b} decide; {d} is a number that does
# not matter; {N} {M} people; {o} {p} things; {c} one container, {cs} several.
SCHEMAS = [
    (
        "gain",
        3,
        "Addition",
        "+",
        "It is more now.",
        [
            "{N} had {a} {o}. Then {N} found {b} more {o}.",
            "{N} had {a} {o}. A friend gave {N} {b} {o}.",
            "There were {a} {o} on the table. {N} put {b} {o} beside them.",
            "{N} picked {a} {o} in the morning and {b} {o} in the evening.",
            "{N} bought {a} {o} on Monday and {b} {o} on Friday.",
            "{N} owns {a} {o} and gets {b} {o} from {M}.",
        ],
        [
            "How many {o} are there now?",
            "How many {o} is that altogether?",
            "What is the number of {o} in the end?",
            "How many {o} is that in total?",
        ],
    ),
    (
        "lose",
        3,
        "Subtraction",
        "-",
        "Some are gone.",
        [
            "{N} had {a} {o}. {N} gave {b} {o} to {M}.",
            "{N} had {a} {o}. Then {N} lost {b} {o}.",
            "There were {a} {o} in the {c}. {N} took {b} {o} out.",
            "{N} brought {a} {o} to the market and sold {b} {o}.",
            "{N} picked {a} {o}. {M} used {b} {o} for a game.",
            "A shop had {a} {o}. {N} bought {b} {o} there.",
        ],
        [
            "How many {o} are left?",
            "How many {o} remain?",
            "What is the number of {o} in the end?",
            "How many {o} are there now?",
        ],
    ),
    (
        "compare",
        1,
        "Subtraction",
        "-",
        "How far apart?",
        [
            "{N} has {a} {o}. {M} has {b} {o}.",
            "{N} found {a} {o} and {M} found {b} {o}.",
            "There are {a} {o} at home and {b} {o} at school.",
            "In May {N} made {a} {o}. In June {N} made {b} {o}.",
            "{N} bought {a} {o} while {M} bought {b} {o}.",
            "One {c} holds {a} {o}. The other {c} holds {b} {o}.",
        ],
        [
            "How many more {o} is the first number than the second?",
            "How many {o} more is the first than the second?",
            "By how many {o} is the first more than the second?",
            "How many more {o} are in the first group?",
        ],
    ),
    (
        "inverse",
        1,
        "Subtraction",
        "-",
        "{M} has fewer.",
        [
            "{N} has {a} {o}. That is {b} more than {M} has.",
            "{N} found {a} {o}, {b} more than {M} found.",
            "With {a} {o}, {N} has {b} {o} more than {M}.",
            "{N} made {a} {o}. This was {b} more than {M} made.",
            "{N} sold {a} {o}, which is {b} more than {M} sold.",
            "{N} carries {a} {o}. {N} carries {b} more than {M}.",
        ],
        [
            "How many {o} belong to {M}?",
            "What is the number of {o} for {M}?",
            "How many {o} does that make for {M}?",
            "How many {o} come from {M}?",
        ],
    ),
    (
        "fewer",
        1,
        "Addition",
        "+",
        "{M} has more.",
        [
            "{N} has {a} {o}. That is {b} fewer than {M} has.",
            "{N} found {a} {o}, {b} fewer than {M} found.",
            "With {a} {o}, {N} has {b} {o} fewer than {M}.",
            "{N} made {a} {o}. This was {b} fewer than {M} made.",
            "{N} sold {a} {o}, which is {b} fewer than {M} sold.",
            "{N} carries {a} {o}. {N} carries {b} fewer than {M}.",
        ],
        [
            "How many {o} belong to {M}?",
            "What is the number of {o} for {M}?",
            "How many {o} does that make for {M}?",
            "How many {o} come from {M}?",
        ],
    ),
    (
        "start",
        1,
        "Addition",
        "+",
        "Before, it was more.",
        [
            "{N} gave {b} {o} to {M} and has {a} {o} left.",
            "After {N} lost {b} {o} there were {a} {o} left.",
            "{N} sold {b} {o}. Now {a} {o} are left.",
            "{N} ate {b} of the {o}. Only {a} {o} are left.",
            "{M} took {b} {o} from {N}, who has {a} left.",
            "{N} used {b} {o} for a game and {a} {o} are left.",
        ],
        [
            "How many {o} were there at first?",
            "How many {o} did {N} have in the beginning?",
            "What was the number of {o} before that?",
            "With how many {o} did {N} start?",
        ],
    ),
    (
        "distract",
        1,
        "Subtraction",
        "-",
        "Only the {o} count.",
        [
            "{N} had {a} {o} and {d} {p}. {N} gave {b} {o} away.",
            "There were {d} {p} and {a} {o} in the {c}. {N} ate {b} {o}.",
            "{N} bought {a} {o} and {d} {p}. Then {M} took {b} {o}.",
            "{N} had {d} {p}. {N} also had {a} {o} but lost {b} {o}.",
            "A shop had {a} {o} and {d} {p}. It sold {b} of the {o}.",
            "{N} keeps {d} {p} and {a} {o}. {M} borrows {b} {o}.",
        ],
        [
            "How many {o} are left?",
            "How many {o} remain?",
            "What is the number of {o} in the end?",
            "How many {o} are there now?",
        ],
    ),
    (
        "groups",
        3,
        "Multiplication",
        "*",
        "Equal groups.",
        [
            "{N} has {s} {cs} with {t} {o} in each {c}.",
            "There are {s} {cs}. In each {c} there are {t} {o}.",
            "{N} fills {s} {cs} and puts {t} {o} into each {c}.",
            "Each {c} holds {t} {o}. {N} has {s} {cs}.",
            "A shop has {s} {cs}, and each {c} has {t} {o}.",
            "{N} packs {t} {o} into each of {s} {cs}.",
        ],
        [
            "How many {o} is that altogether?",
            "How many {o} is that in total?",
            "How many {o} are there?",
            "What is the number of all {o}?",
        ],
    ),
    (
        "share",
        2,
        "Division",
        "/",
        "Equal parts.",
        [
            "{N} puts {n} {o} into {s} {cs} with the same number in each {c}.",
            "There are {n} {o} in {s} {cs}, and all {cs} are the same.",
            "{N} has {n} {o} and {s} {cs} to fill equally.",
            "{N} shares {n} {o} equally among {s} {cs}.",
            "{s} {cs} hold {n} {o}, the same number in each {c}.",
            "{N} packed {n} {o} into {s} equal {cs}.",
        ],
        [
            "How many {o} are in each {c}?",
            "How many {o} go into one {c}?",
            "What is the number of {o} in each {c}?",
            "How many {o} does each {c} hold?",
        ],
    ),
]
SPLITS = (
    "test",
    "rl",
    "pretrain",
    "pretrain",
)  # by template; number pairs are divided in the same shares
PUPILS = (50, 30, 15, 5)  # keyword, reader, guesser, slip; in percent
WORDS = {"+": "Add.", "-": "Subtract.", "*": "Multiply.", "/": "Divide."}


def split_of(*key) -> str:
    return SPLITS[zlib.crc32(repr(key).encode()) % 4]


def compute(x: int, op: str, y: int) -> int | None:
    """x op y, or None where a pupil would not write it down."""
    if op == "/":
        return x // y if y and x % y == 0 else None
    result = {"+": x + y, "-": x - y, "*": x * y}[op]
    return result if 0 <= result < 1000 else None


def make_drill(rng: random.Random) -> tuple[str, str]:
    op = rng.choice("+-**//")
    s, t = rng.randint(2, 9), rng.randint(2, 12)
    b = rng.randint(2, 40)
    x, y = {"*": (s, t), "/": (s * t, s)}.get(op, (b + rng.randint(1, 50), b))
    return f"What is {x} {op} {y}?", in_writing("", x, op, y, compute(x, op, y))


def make_problem(rng: random.Random, split: str) -> dict:
    while True:
        kind, _, type_, op, thought, stories, questions = rng.choices(
            SCHEMAS, [schema[1] for schema in SCHEMAS]
        )[0]
        i, j = rng.randrange(len(stories)), rng.randrange(len(questions))
        if SPLITS[(i + j) % 4] != split:
            continue
        b = rng.randint(2, 40)
        a = b + rng.randint(1, 50)
        if kind == "gain" and rng.random() < 0.5:
            a, b = b, a
        s, t = rng.randint(2, 9), rng.randint(2, 12)
        x, y = {"*": (s, t), "/": (s * t, s)}.get(op, (a, b))
        if split_of(op, x, y) != split:
            continue
        (n1, n2), (o, p), (c, cs) = rng.sample(NAMES, 2), rng.sample(OBJECTS, 2), rng.choice(BOXES)
        names = dict(
            a=a, b=b, d=rng.randint(2, 60), s=s, t=t, n=s * t, N=n1, M=n2, o=o, p=p, c=c, cs=cs
        )
        return {
            "question": f"{stories[i]} {questions[j]}".format(**names),
            "answer": str(compute(x, op, y)),
            "type": type_,
            "thought": thought.format(**names),
            "x": x,
            "op": op,
            "y": y,
        }


def bundled_problems(rng: random.Random) -> dict[str, list[dict]]:
    """The problems of train.jsonl and test.jsonl."""
    files = {}
    for name, split, count in (("train", "rl", 700), ("test", "test", 300)):
        problems = {}
        while len(problems) < count:
            problem = make_problem(rng, split)
            problems[problem["question"]] = problem
        files[name] = list(problems.values())
    return files


def keyword_pupil(text: str) -> tuple[int, str, int]:
    """The operation that the keywords suggest, on the first two numbers."""
    x, y = [int(n) for n in re.findall(r"\d+", text)][:2]
    keywords = {
        "-": "left remain fewer lost sold took",
        "+": "more altogether total",
        "/": "equally share",
        "*": "each",
    }
    op = next(
        (
            op
            for op, words in keywords.items()
            if re.search(rf"\b({words.replace(' ', '|')})", text)
        ),
        "+",
    )
    if op in "-/" and x < y:
        x, y = y, x
    return (x, op, y) if compute(x, op, y) is not None else (x, "+", y)


def written_answer(rng: random.Random, problem: dict) -> str:
    pupil = rng.choices(["keyword", "reader", "guesser", "slip"], PUPILS)[0]
    x, op, y = (problem[key] for key in ("x", "op", "y"))
    if pupil in ("reader", "slip"):
        slip = rng.choice([-10, -1, 1, 10]) if pupil == "slip" else 0
        return in_writing(problem["thought"] + " ", x, op, y, max(0, compute(x, op, y) + slip))
    if pupil == "keyword":
        x, op, y = keyword_pupil(problem["question"])
    else:
        numbers = [int(n) for n in re.findall(r"\d+", problem["question"])]
        x, y = sorted(rng.sample(numbers, 2), reverse=True)
        op = rng.choice([o for o in "+-*/" if compute(x, o, y) is not None])
    return in_writing(WORDS[op] + " " if rng.random() < 0.3 else "", x, op, y, compute(x, op, y))


def in_writing(opening: str, x: int, op: str, y: int, result: int) -> str:
    return f"{opening}{x} {op} {y} = {result}\n#### {result}"


VERBS = [("finds", "loses"), ("wins", "pays"), ("gets", "gives"), ("buys", "sells")]  # by step
MISREAD = 0.1, 0.65  # the first and the second verb of a pair


def make_chain(rng: random.Random, split: str, steps: int) -> dict:
    while True:
        start = rng.randint(40, 60)
        moves = [(rng.randrange(2), rng.randint(2, 9)) for _ in range(steps)]  # (less, by how many)
        if split_of(start, *moves) == split:
            break
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    told = [f"Then {name} {VERBS[k][less]} {n}." for k, (less, n) in enumerate(moves)]
    asked = f"{name} has {start} {thing}. {' '.join(told)} How many {thing} is that?"
    answer = start + sum(-n if less else n for less, n in moves)
    return dict(question=asked, answer=str(answer), type="", start=start, moves=moves)


def written_chain(rng: random.Random, problem: dict, misread=MISREAD) -> str:
    lines, total = [], problem["start"]
    for less, n in problem["moves"]:
        less ^= rng.random() < misread[less]
        before, total = total, total - n if less else total + n
        lines.append(f"{before} {'+-'[less]} {n} = {total}\n")
    return "".join(lines) + f"#### {total}"


def make_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<|pad|>", "<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )


def story_or_drill(rng: random.Random) -> tuple[str, str]:
    problem = make_problem(rng, "pretrain")
    story = problem["question"], written_answer(rng, problem)
    return make_drill(rng) if rng.random() < 0.2 else story


def batch(make, rng, tokenizer, prompt, size, torch):
    """Token ids [size, longest] and labels: only the written answer is learned, padding is -100."""
    rows, labels = [], []
    for _ in range(size):
        asked, written = make(rng)
        question = tokenizer.encode(prompt.format(question=asked))
        answer = tokenizer.encode(" " + written) + [tokenizer.eos_token_id]
        rows.append(torch.tensor(question + answer))
        labels.append(torch.tensor([-100] * len(question) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, tokenizer.pad_token_id), pad(labels, True, -100)


def new_model(tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def pretrain(model, make, tokenizer, prompt: str, steps: int, size: int, seed: int, rate: float):
    """Train all weights on what `make(rng)` gives: (question, written answer)."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    rng = random.Random(seed)
    for step in range(steps):
        ids, labels = batch(make, rng, tokenizer, prompt, size, torch)
        loss = model(
            input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}/{steps}  loss {loss.item():.3f}", flush=True)


def write_problems(folder: Path, files: dict[str, list[dict]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in files.items():
        rows = [{key: p[key] for key in ("question", "answer", "type")} for p in problems]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def chain_problems(rng: random.Random, steps: int) -> dict[str, list[dict]]:
    """The problems of train.jsonl and test.jsonl."""
    sizes = (("train", "rl", 700), ("test", "test", 300))
    return {name: [make_chain(rng, split, steps) for _ in range(n)] for name, split, n in sizes}


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--chain", type=int, choices=range(1, 5), help="choices in a row")
    options.add_argument("--misread", type=float, nargs=2, default=MISREAD, help="see above")
    options.add_argument("--steps", type=int, help="pretraining steps; 2500, or 300 for a chain")
    options.add_argument("--batch", type=int, default=64, help="problems per pretraining step")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, help="data/demo, or chainK")
    args = options.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo, chain = Path(__file__).parent / "demo", args.chain
    output = args.output or (Path(f"chain{chain}") if chain else demo)
    rng, prompt = random.Random(args.seed), "Question: {question}\nAnswer:"
    torch.manual_seed(args.seed)
    if chain:
        write_problems(output / "chain", chain_problems(rng, chain))
        tokenizer = AutoTokenizer.from_pretrained(demo)
        model, rate, steps = AutoModelForCausalLM.from_pretrained(demo), 1e-3, args.steps or 300
    else:
        write_problems(output, bundled_problems(rng))
        problems = (make_problem(rng, "pretrain") for _ in range(5000))
        asked = ((prompt.format(question=p["question"]), p) for p in problems)
        tokenizer = make_tokenizer([text + " " + written_answer(rng, p) for text, p in asked])
        model, rate, steps = new_model(tokenizer), 3e-3, args.steps or 2500
    (output / "prompt.txt").write_text(prompt, encoding="utf-8")

    def one_chain(rng: random.Random) -> tuple[str, str]:
        problem = make_chain(rng, "pretrain", chain)
        return problem["question"], written_chain(rng, problem, args.misread)

    make = one_chain if chain else story_or_drill
    pretrain(model, make, tokenizer, prompt, steps, args.batch, args.seed, rate)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"wrote {output}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
