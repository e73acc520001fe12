# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.13", "transformers>=5.23", "peft>=0.21", "typer>=0.29", "rich>=15"]
# ///
"""tokenrl: teach a language model to reason with reinforcement learning, on the hardware you have.

    python tokenrl.py train svamp                      # the bundled demo on a laptop, Qwen2-1.5B on a GPU
    python tokenrl.py train svamp --method t-spmo      # credit only where completions branch
    python tokenrl.py eval svamp --adapter runs/svamp-s-grpo
    python tokenrl.py prep questions.csv               # your own questions and answers

Only a LoRA adapter is trained, there is no critic, and the gradient is spent on few of the sampled tokens
(S-GRPO and T-SPMO, Lee & Tong 2025, arXiv 2504.20834). The idea that keeps this file small: sample a group of G
completions of one prompt and put them into a trie, where a node is one token after one exact prefix. Then every
method is the same program with another credit function, which gives a weight to some of the nodes, and

    loss = - sum over weighted nodes n of  weight(n) * log pi(token(n) | prefix(n))

    GRPO     sum over completions i through n of  A_i / (G * len_i),   A_i = (R_i - mean R) / (std R + eps)
    S-GRPO   the same over a random subset T_i of positions: t < alpha always, the others with probability p
    T-SPMO   mean R of the completions through n  -  mean R of those through its parent,  / number of nodes with credit
             (by default on pi instead of log pi, see pack_loss)

Only ancestors of weighted nodes need a forward pass and only their parents need logits, so the prompt and the needed
nodes go through the model as ONE sequence in which each token sees its ancestors. That is exact, not approximate.

What is left out: no critic and no reward model, no second copy of the model (the optional KL term reads the same
model with its adapter switched off), no old policy and no clipping (one update per rollout is exactly on-policy).

The file reads in the order in which the data flows:
    problem -> prompt -> G completions -> rewards -> trie -> weights -> packed forward -> loss -> step -> metrics
"""
from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import importlib.util
import io
import json
import math
import numbers
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
import urllib.request
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, get_args

import typer
from rich.console import Console
from rich.console import Group as Stack
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text


class _Lazy:
    """A module that is imported at its first use, so that help and data preparation answer at once."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


torch, transformers, peft = _Lazy("torch"), _Lazy("transformers"), _Lazy("peft")
AS_IT_IS = {"markup": False, "emoji": False, "highlight": False}  # the user's text can hold what rich takes for markup
console, errors = (Console(stderr=stderr, **AS_IT_IS) for stderr in (False, True))


class UserError(Exception):
    """Something the user can put right: shown as one sentence, never as a traceback."""


class Unreachable(UserError):
    """What should come from the network cannot be had."""


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or bool(re.search("(out of|can't allocate|not enough) memory", str(error)))


# ---- 1. Tasks: problems, data files, rewards ------------------------------------------------------------------

DATA = Path(__file__).resolve().parent / "data"
SVAMP_URL = "https://raw.githubusercontent.com/arkilpatel/SVAMP/main/SVAMP.json"
SVAMP_SHA256 = "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e"

# Worked examples for the prompt. `prep` writes them beside the data as examples.jsonl, where they can be edited.
STORY_EXAMPLES = [
    {"question": "A kiosk had 24 kites. It sold 9 kites and 3 balls. How many kites are left?",
     "answer": "Only the kites count: 24 - 9 = 15 kites are left.\n#### 15"},
    {"question": "Mina fills 4 bags with 6 shells in each bag. How many shells is that?",
     "answer": "4 bags of 6 shells are 4 * 6 = 24 shells.\n#### 24"},
    {"question": "After Jon gave away 7 stamps he had 12 left. How many stamps did he have before?",
     "answer": "He had the 12 that are left and the 7 he gave away: 12 + 7 = 19 stamps.\n#### 19"},
]
MULTIPLY_EXAMPLES = [
    {"question": "What is 47 * 36?",
     "answer": "47 * 6 = 282\n47 * 30 = 1410\n282 + 1410 = 1692\n#### 1692"},
    {"question": "What is 8 * 59?",
     "answer": "8 * 9 = 72\n8 * 50 = 400\n72 + 400 = 472\n#### 472"},
]


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    type: str = ""


# A minus counts as a sign only where it cannot be a subtraction: "3-2" holds 3 and 2, "= -2" holds -2.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}.%])[-\u2212])?(?:[$€£]\s?)?(?<![\w.])(?P<sign2>(?<=[$€£])-)?"
    r"(?:(?P<whole>\d+)[ ](?=\d+/\d))?(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimals>\.\d+)?"
    r"(?:/(?P<under>\d+))?",
    re.ASCII)
_MARK = re.compile(r"####|\\boxed\{|\banswer(?: is:?|:| =)", re.IGNORECASE)
_EDGES = re.compile(r"""^[\s*_`'"]+|[\s*_`'".}$]+$""")  # what exact_reward overlooks around an answer


def _numbers(text: str) -> Iterator[Fraction]:
    text = text.replace("{,}", ",").replace("\\$", "$")  # as LaTeX writes them
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text)  # 2\frac{1}{2} is 2 1/2
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    for match in _NUMBER.finditer(text):
        if not (match["digits"] or match["decimals"]):
            continue
        with contextlib.suppress(ValueError, ZeroDivisionError):  # 3/0; thousands of digits
            value = Fraction((match["digits"] or "0").replace(",", "") + (match["decimals"] or ""))
            value = value / int(match["under"] or 1) + int(match["whole"] or 0)
            yield -value if match["sign"] or match["sign2"] else value


def extract_number(text: str) -> Fraction | None:
    """The final answer of a completion, exactly, or None.

    It is the first number after the last mark on its line ("#### n", "\\boxed{n}", "the answer is n"); without a mark
    that a number follows, the last number of the text. Commas, currency signs, decimals and fractions are read.
    """
    for mark in reversed(list(_MARK.finditer(text))):
        line = text[mark.end():].lstrip().split("\n")[0]
        if (number := next(_numbers(line), None)) is not None:
            return number
    return next(reversed(list(_numbers(text))), None)


def number_reward(text: str, answer: str) -> float:
    """1.0 if the final answer of `text` equals `answer` as a number (1,234 = 1234 = 1234.0), else 0.0."""
    found = extract_number(text)
    return float(found is not None and found == next(_numbers(str(answer)), None))


def exact_reward(text: str, answer: str) -> float:
    """1.0 if the final answer of `text` is the text `answer`, else 0.0. The final answer is the rest of the line after
    the last mark (see extract_number), or the last line; capitals, quotes, Markdown's marks and a closing full stop do
    not count."""
    marks = list(_MARK.finditer(text))
    lines = text[marks[-1].end():].lstrip().split("\n") if marks else text.strip().split("\n")[-1:]
    found, wanted = ((_EDGES.sub("", t) or t.strip()).casefold() for t in (lines[0], answer))
    return float(found == wanted)


def reward_function(option: str) -> Callable[[str, str], float]:
    """(text of a completion, reference answer) -> reward in [0, 1], as --reward and --metric name it: number, exact,
    regex:PATTERN ({answer} in it stands for the reference) or FILE.py:function."""
    if option in (named := {"number": number_reward, "exact": exact_reward}):
        return named[option]
    if option.startswith("regex:"):
        pattern = re.sub(r"\{answer\}(?=[?*+{])", "(?:{answer})", option.removeprefix("regex:"))
        try:
            re.compile(pattern.replace("{answer}", "0"))
        except re.error as error:
            raise UserError(f"{option!r} is not a regular expression: {error}.") from None
        return lambda text, answer: float(bool(re.search(pattern.replace("{answer}", re.escape(answer)), text)))
    path, _, name = option.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(f"{option!r} is not a reward; use number, exact, regex:PATTERN or FILE.py:function.")
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}, which {option!r} names; give the path of yours.")
    try:
        defined = runpy.run_path(path)
    except Exception as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {first_line(error)}") from None
    if not callable(function := defined.get(name)):
        raise UserError(f"{path} defines no function {name!r}.")

    def checked(text: str, answer: str) -> float:
        try:
            value = function(text, answer)
            if isinstance(value, numbers.Real) and 0 <= value <= 1:  # numpy's numbers too
                return float(value)
            fault = f"returned {value!r}, which is not a number from 0 to 1,"
        except Exception as error:
            fault = f"raised {type(error).__name__} ({first_line(error)})"
        raise UserError(f"{option} {fault} on the completion {text!r} with the reference answer {answer!r}.")
    return checked


def is_number(text: str) -> bool:
    bare = re.sub(r"\s?[%$€£]$", "", text)  # 50 %, 12.50 €
    return bool(_NUMBER.fullmatch(bare)) and next(_numbers(text), None) is not None


def read_text(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8 and try again.") from None


def read_rows(path: Path) -> list[tuple[int, dict]]:
    """(line number, row) of a CSV file with a header line, or of a JSONL file."""
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        delimiter = max(",;\t", key=text.split("\n")[0].count)  # spreadsheets of many countries write semicolons
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True, delimiter=delimiter)
        try:
            return [(reader.line_num, {key and key.strip(): value for key, value in row.items()}) for row in reader]
        except csv.Error as error:
            raise UserError(f"{path} is not valid CSV after line {reader.line_num}: {error}.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} is not JSON at line {number}: {error}.") from None
            if not isinstance(row, dict):
                raise UserError(f'{path} line {number} is not an object such as {{"question": ..., "answer": ...}}.')
            rows.append((number, row))
    return rows


def to_problem(row: dict, question: str, answer: str, numeric: bool) -> Problem | str:
    """The problem in a row, or the reason why there is none; `numeric`: the answer must be a number."""
    if None in row:  # an answer such as 1,200 without quotes
        return "more fields than the header (put texts with commas into quotes)"
    # Through bytes and back: half a surrogate pair, which JSON can escape, cannot be written to a file again.
    asked, wanted, kind = ("" if row.get(key) is None else str(row[key]).encode(errors="replace").decode().strip()
                           for key in (question, answer, "type"))
    if not asked or not wanted:
        return "no question" if not asked else "no answer"
    return Problem(asked, wanted, kind) if is_number(wanted) or not numeric else "the answer is not a number"


def read_problems(path: Path, numeric: bool) -> list[Problem]:
    """The problems of a file that `prep` wrote. Errors name the line."""
    problems = []
    for number, row in read_rows(path):
        problem = to_problem(row, "question", "answer", numeric)
        if isinstance(problem, str):
            raise UserError(f"{path} line {number}: {problem}.")
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} is empty.")
    return problems


def load_task(task: str, data_dir: Path, numeric: bool = True) -> tuple[list[Problem], list[Problem], list[dict]]:
    """(train problems, test problems, worked examples) of a prepared task; `numeric`: all answers must be numbers."""
    folder = data_dir / task
    if not (folder / "train.jsonl").exists():
        known = sorted(p.parent.name for p in data_dir.glob("*/train.jsonl") if p.parent.name != "demo")
        if Path(task).stem in known:
            raise UserError(f"There is no task {task!r}, but there is {Path(task).stem!r}: leave out the ending.")
        raise UserError(
            f"There is no task {task!r} in {data_dir}" + (f" (there are: {', '.join(known)})" if known else "")
            + "; make it with: python tokenrl.py prep " + (task if task in ("svamp", "multiply") else "YOUR_FILE.csv"))
    path = folder / "examples.jsonl"
    examples = read_rows(path) if path.exists() else []
    for number, row in examples:
        if not (isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)):
            raise UserError(f'{path} line {number} lacks a "question" or a worked "answer" as text.')
    train_set, test_set = (read_problems(folder / f"{split}.jsonl", numeric) for split in ("train", "test"))
    return train_set, test_set, [row for _, row in examples]


def svamp_problems(source: Path | None) -> list[Problem]:
    """SVAMP (Patel et al. 2021) from `source`, or downloaded; the published file's checksum is checked either way."""
    if source:
        if not source.is_file():
            raise UserError(f"There is no file {source}.")
        raw = source.read_bytes()
    else:
        try:
            with urllib.request.urlopen(SVAMP_URL, timeout=20) as answer:
                raw = answer.read()
        except OSError as error:
            raise Unreachable(f"SVAMP could not be downloaded ({error}); fetch {SVAMP_URL} on another machine and run: "
                              "python tokenrl.py prep svamp --source SVAMP.json") from None
    if hashlib.sha256(raw).hexdigest() != SVAMP_SHA256:
        raise UserError("This SVAMP.json is not the published file (its sha256 differs); fetch it again, or prepare "
                        "your own version as CSV or JSONL with: python tokenrl.py prep FILE")
    problems = []
    for row in json.loads(raw):
        body = row["Body"].strip()
        question = (body if body.endswith((".", "?", "!", ",")) else body + ".") + " " + row["Question"].strip()
        problems.append(Problem(question, str(row["Answer"]).removesuffix(".0"),
                                row["Type"].replace("Divison", "Division")))  # the file misspells one
    return problems


def multiply_problems(digits: str, count: int, seed: int) -> list[Problem]:
    """Products of random numbers with `digits` ("3", or "2x1") digits; no unordered pair comes twice."""
    match = re.fullmatch(r"([1-9])(?:x([1-9]))?", digits)
    if not match:
        raise UserError(f"--digits {digits!r} is not a number of digits from 1 to 9 such as 3, or a pair such as 2x1.")
    sizes = int(match[1]), int(match[2] or match[1])
    bounds = [(10 ** (size - 1) + (size == 1), 10 ** size - 1) for size in sizes]  # times 1 teaches nothing
    rng, pairs = random.Random(seed), {}
    for _ in range(20 * count):
        a, b = (rng.randint(low, high) for low, high in bounds)
        pairs.setdefault((min(a, b), max(a, b)), (a, b))
        if len(pairs) == count:
            break
    return [Problem(f"What is {a} * {b}?", str(a * b), f"{len(str(a))}x{len(str(b))}") for a, b in pairs.values()]


def file_problems(path: Path, question: str, answer: str, numeric: bool) -> tuple[list[Problem], dict[str, list[int]]]:
    """Problems of a CSV or JSONL file, and {why rows were rejected: their lines}."""
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"{path} is neither svamp nor multiply nor a .csv or .jsonl file.")
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} is empty.")
    columns = {key for _, row in rows for key in row if key}
    for name, option in ((question, "--question"), (answer, "--answer")):
        if name not in columns:
            raise UserError(f"{path} has no column {name!r} (it has: {', '.join(sorted(columns)) or 'none'}); "
                            f"name yours with {option}.")
    problems, rejected = {}, defaultdict(list)
    for line, row in rows:
        problem = to_problem(row, question, answer, numeric)
        if isinstance(problem, str):
            rejected[problem].append(line)
        elif problem.question in problems:
            rejected["the question came before"].append(line)
        else:
            problems[problem.question] = problem
    return list(problems.values()), rejected


def write_task(name: str, problems: list[Problem], examples: list[dict], test_share: float, seed: int,
               data_dir: Path) -> tuple[int, int]:
    """Split at random and write data_dir/name/{train,test,examples}.jsonl; returns the two sizes. Worked examples that
    are there already may be the user's own, and are kept."""
    problems = random.Random(seed).sample(problems, len(problems))
    cut = len(problems) - round(len(problems) * test_share)
    if not 0 < cut < len(problems):
        raise UserError(f"{len(problems)} usable problems are too few to split into train and test.")
    folder = data_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "examples.jsonl").exists():
        write_jsonl(folder / "examples.jsonl", examples)
    write_jsonl(folder / "test.jsonl", map(asdict, problems[cut:]))
    write_jsonl(folder / "train.jsonl", map(asdict, problems[:cut]))  # last: where it is, the task is whole
    return cut, len(problems) - cut


def write_jsonl(path: Path, rows) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several processes may prepare the same task
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---- 2. Policy: model, tokenizer, LoRA, prompts, memory meter -------------------------------------------------

@dataclass
class Policy:
    """What it takes to ask and to train: the model with its tokenizer, and the form of the prompt."""
    model: object
    tokenizer: object
    prompt: str  # "chat", "plain", or a text with {question} in it
    examples: list[dict] = field(default_factory=list)
    score: Callable[[str, str], float] = number_reward  # (text, reference answer) -> reward in [0, 1]
    metric: Callable[[str, str], float] | None = None  # a KPI beside the reward, for evaluation only

    @property
    def stop(self) -> str:
        return "\nQuestion:" if self.prompt == "plain" else ""  # a base model goes on to invent the next question

    def prompt_ids(self, question: str) -> list[int]:
        """Worked examples cost little: the prompt is computed once for the whole group."""
        if self.prompt == "chat":
            turns = [{"role": role, "content": row[key]} for row in self.examples
                     for role, key in (("user", "question"), ("assistant", "answer"))]
            turns.append({"role": "user", "content": question})
            return chat_ids(self.tokenizer, turns, add_generation_prompt=True)
        if self.prompt == "plain":
            shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in self.examples)
            text = f"{shots}Question: {question}\nAnswer:"
        else:
            text = self.prompt.replace("{question}", question)
        ids, end = self.tokenizer.encode(text), self.tokenizer.eos_token
        # Some tokenizers append their end token, after which there is nothing to be said.
        return ids[:-1] if end and ids[-1:] == [self.tokenizer.eos_token_id] and not text.endswith(end) else ids

    def text(self, completion: list[int]) -> str:
        text = self.tokenizer.decode(completion, skip_special_tokens=True)
        return text.split(self.stop)[0] if self.stop else text

    def finished(self, completion: list[int]) -> bool:
        """Whether the completion ended by itself; else it was cut off at max_new_tokens."""
        return (completion[-1] in end_tokens(self.model, self.tokenizer)
                or bool(self.stop) and self.stop in self.tokenizer.decode(completion))

    def reward(self, problem: Problem, completion: list[int]) -> float:
        """The score, but nothing for a completion that was cut off: or nothing would teach the model to stop, and
        completions drift to the limit."""
        return self.score(self.text(completion), problem.answer) if self.finished(completion) else 0.0


def chat_ids(tokenizer, turns: list[dict], **options) -> list[int]:
    """The conversation as the tokenizer's chat template writes it, without the long thoughts of models that have a
    switch for them: here thinking has to fit into max_new_tokens."""
    try:
        return tokenizer.apply_chat_template(turns, return_dict=False, enable_thinking=False, **options)
    except _Lazy("jinja2").TemplateError as error:
        raise UserError(f"This model's chat template refuses the prompt ({first_line(error)}); try --prompt "
                        "plain.") from None


def pick_device(device: str) -> str:
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):
            raise UserError(f"--device {device!r} is not there; use auto, cpu, cuda or mps.") from None
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str, device: str, stored) -> object:
    """The dtype to compute in; `stored` is the checkpoint's own. Auto: float32 for a checkpoint in float32, for others
    bfloat16 where the hardware multiplies it."""
    if dtype != "auto":
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype {dtype!r} is not one of auto, float32, bfloat16.")
        return getattr(torch, dtype)
    if stored == torch.float32:
        return torch.float32
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device == "cpu" and any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16")))
    return torch.bfloat16 if fast else torch.float32


def is_bundled(model: str) -> bool:
    return model == "demo" or Path(model).resolve() == DATA / "demo"


def source_of(name: str) -> tuple[str, dict]:
    """(what to give to from_pretrained, its options) for a model's name."""
    if is_bundled(name):
        return str(DATA / "demo"), {}
    if Path(name).suffix != ".gguf":
        return name, {}
    if not importlib.util.find_spec("gguf"):
        raise UserError("Reading a .gguf file needs one more package: pip install gguf")
    return str(Path(name).parent), {"gguf_file": Path(name).name}


def stored_dtype(name: str):
    """The dtype that a checkpoint is stored in; that of quantised weights once they are unpacked is bfloat16."""
    name, options = source_of(name)
    if options:
        return torch.bfloat16
    return getattr(transformers.AutoConfig.from_pretrained(name), "dtype", None) or torch.float32


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple:
    """(model, tokenizer) of a hub id, a local folder, a .gguf file (needs the `gguf` package), or "demo"."""
    source, options = source_of(name)
    local = Path(source).exists()
    if not console.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of .gguf files; the next lines cannot reach them
    transformers.utils.logging.set_verbosity_error()
    if local or not console.is_terminal:  # a download is long
        transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        device = pick_device(device)
        kind = pick_dtype(dtype, device, stored_dtype(name))
        if options:  # LoRA needs plain weights
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=kind, output_loading_info=True,
                                                                         **options)
    except Exception as error:  # broken files end in errors of many kinds
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        if not local and (isinstance(error, OSError) or type(error).__module__.startswith("httpx")):
            raise Unreachable(f"The model {name!r} is neither a local folder nor could it be had from the hub; check "
                              "the spelling and the network, or give the path of a downloaded folder. The hub's client "
                              f"says: {first_line(error)}") from None
        raise UserError(f"{name} does not hold a model that can be loaded: {first_line(error)}") from None
    if found["missing_keys"]:  # transformers fills them with random numbers
        raise UserError(f"{name} lacks weights of its model, such as {min(found['missing_keys'])}.")
    if not tokenizer.encode("1"):
        raise UserError(f"{name} lacks its tokenizer (tokenizer.json).")
    model.eval()  # no dropout: the log-probs that are trained must be those that were sampled from
    return model.to(device), tokenizer


def base_of(model):
    """The transformers model, with or without a peft wrapper around it."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def add_lora(model, rank: int, alpha: float, targets: str, layer_share: float, checkpointing: bool = False):
    """LoRA on `targets` of the last `layer_share` of the layers; the layers below store no activations. With
    `checkpointing` those above keep only their inputs and compute the rest again in the backward pass: less memory for
    more time, with the same gradient."""
    layers = base_of(model).config.get_text_config().num_hidden_layers
    first = layers - max(1, round(layers * layer_share))
    wanted, modules = [target.strip() for target in targets.split(",")], [name for name, _ in model.named_modules()]
    for target in wanted:  # peft complains only when it finds none of them
        if not any(name.endswith("." + target) for name in modules):
            raise UserError(f"--lora-targets: this model has no module {target!r}.")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=wanted, task_type="CAUSAL_LM",
                             layers_to_transform=list(range(first, layers)))
    try:
        model = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"LoRA does not fit this model: {first_line(error)}") from None
    if checkpointing:
        stack = getattr(base_of(model).get_decoder(), "layers", None)
        if stack is None:
            raise UserError(f"--checkpointing does not know the layers of a {base_of(model).config.model_type} model; "
                            "leave it out.")
        for layer in stack[first:]:
            layer.forward = partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    return model


def load_adapter(model, folder: Path, name: str, given: str):
    """The model, which the user named `given`, with one more adapter from a run's folder, if it was made for it."""
    made_for, device = adapter_settings(folder)["model"], str(base_of(model).device)
    if Path(made_for).name != Path(given).name:
        raise UserError(f"The adapter in {folder} was made for {made_for}, not for {given}; give the right --model.")
    try:
        if isinstance(model, peft.PeftModel):
            model.load_adapter(str(folder), adapter_name=name, torch_device=device)
            return model
        return peft.PeftModel.from_pretrained(model, str(folder), adapter_name=name, torch_device=device)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, _Lazy("safetensors").SafetensorError) as error:
        raise UserError(f"The adapter in {folder} does not fit {given}: {first_line(error)}") from None


def end_tokens(model, tokenizer=None) -> set[int]:
    """Every end token that the generation config, the config or the tokenizer knows: they do not always agree."""
    base, found = base_of(model), set()
    for knows in (getattr(base, "generation_config", None), base.config.get_text_config(), tokenizer):
        value = getattr(knows, "eos_token_id", None)
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return found


def choose_prompt(option: str, model, tokenizer) -> str:
    """"chat", "plain", or the text of a template. Auto: the model folder's own prompt.txt if there is one, else chat
    for chat models. Base checkpoints ship chat templates too, so a chat model is one that also stops, by its own
    configuration, at the token with which its template ends a turn."""
    own = Path(base_of(model).name_or_path) / "prompt.txt"
    if option == "auto" and own.is_file() and (own.parent / "config.json").is_file():
        option = str(own)
    if option == "auto":
        if not getattr(tokenizer, "chat_template", None):
            return "plain"
        turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
        return "chat" if end_tokens(model) & set(chat_ids(tokenizer, turn)[-3:]) else "plain"
    if option == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UserError("This model's tokenizer has no chat template; use --prompt plain, or a template file.")
    if option in ("chat", "plain"):
        return option
    template = read_text(Path(option))
    if "{question}" not in template:
        raise UserError(f"The prompt file {option} does not contain {{question}}.")
    return template


def peak_memory(device: str, reset: bool = False) -> int:
    """Peak memory in bytes since the last reset: VRAM on CUDA; on the CPU the whole process (a reset needs Linux);
    on MPS what the driver holds now. 0 where it cannot be read."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if device.startswith("mps"):
        return torch.mps.driver_allocated_memory()
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError, TypeError):  # some containers do not tell
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    with contextlib.suppress(ImportError):  # Windows has no such module; macOS counts bytes, others KiB
        return importlib.import_module("resource").getrusage(0).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


# ---- 3. Rollout: sampling groups ------------------------------------------------------------------------------

# Rows of [vocabulary] logits at a time. With 152k tokens, 48 rows stay below the 32 MiB above which malloc asks the
# system each time: sampling, which needs the same memory at every token, is faster so.
SAMPLED_ROWS = 48


def logits_of(model, hidden):
    """float32 logits [n, vocabulary] of final hidden states [n, width]."""
    base = base_of(model)
    logits = base.get_output_embeddings()(hidden).float()
    cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
    return cap * torch.tanh(logits / cap) if cap else logits


def sample(model, tokenizer, prompts: list[list[int]], group_size: int = 1, *, max_new_tokens: int | list[int] = 200,
           temperature: float = 1.0, stop: str = "", rows: int = 64, seed: int = 0,
           ends: set[int] | None = None) -> list[list[list[int]]]:
    """`group_size` completions of each prompt, as token ids: result[prompt][completion][position].

    A completion is drawn from softmax(logits / temperature) and nothing else (temperature 0: the most likely token).
    It ends with, and keeps, the first token in `ends` (default: all that the model or tokenizer knows), or the token
    that completes the text `stop`, or at `max_new_tokens` (a list has one limit for each prompt). At most `rows`
    completions are decoded at a time.
    """
    ends = end_tokens(model, tokenizer) if ends is None else ends
    generator = torch.Generator(base_of(model).device).manual_seed(seed)
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths need little padding
    result: list[list[list[int]]] = [[] for _ in prompts]
    width = max(1, rows // group_size)
    with torch.inference_mode():
        for start in range(0, len(order), width):
            chunk = order[start:start + width]
            for done in range(0, group_size, rows):
                groups = _sample_batch(model, tokenizer, [prompts[i] for i in chunk], min(rows, group_size - done),
                                       [limits[i] for i in chunk], temperature, stop, ends, generator)
                for i, group in zip(chunk, groups):
                    result[i] += group
    return result


def _prefill(base, prompts: list[list[int]]):
    """Compute the prompts as one batch, padded on the left: (cache, final hidden state [B, width] of each prompt, which
    places of the cache hold tokens [B, P], number of tokens [B, 1]).

    What all prompts begin with (the worked examples) is computed once and repeated."""
    decoder, device = base.get_decoder(), base.device
    cache = transformers.DynamicCache(config=base.config)
    shared = os.path.commonprefix([prompt[:-1] for prompt in prompts])
    if shared:
        decoder(input_ids=torch.tensor([shared], device=device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
    rests, longest = [p[len(shared):] for p in prompts], max(map(len, prompts)) - len(shared)
    ids = torch.tensor([[0] * (longest - len(rest)) + rest for rest in rests], device=device)
    visible = torch.tensor([[1] * len(shared) + [0] * (longest - len(rest)) + [1] * len(rest) for rest in rests],
                           device=device)
    positions = (visible.cumsum(1) - 1).clamp(min=0)[:, len(shared):]
    hidden = decoder(input_ids=ids, attention_mask=visible, position_ids=positions, past_key_values=cache,
                     use_cache=True).last_hidden_state
    return cache, hidden[:, -1].contiguous(), visible, positions[:, -1:] + 1


def own_layers(cache) -> list:
    """The cache's layers, but for those that read the keys and values of an earlier one (Gemma 3n)."""
    return [layer for layer in cache.layers if layer.keys is not None]


def _make_room(cache, group_size: int, max_new_tokens: int) -> None:
    """Repeat each prompt's keys and values for its group, in memory with room for the new tokens: a cache that grows by
    torch.cat copies all of it at every token."""
    for layer in own_layers(cache):
        layer.stores = []
        for old in (layer.keys, layer.values):  # [B, heads, P, head width]
            rows, heads, seen, width = old.shape
            store = old.new_empty(rows * group_size, heads, seen + max_new_tokens, width)
            store[:, :, :seen].unflatten(0, (rows, group_size)).copy_(old[:, None])
            layer.stores.append(store)
        layer.keys, layer.values = (store[:, :, :seen] for store in layer.stores)
        layer.update = partial(_append, weakref.proxy(layer))  # a reference would be a cycle, which keeps the memory


def _append(layer, keys, values, *_, **__):
    """Stands in for the layer's update(): store the keys and values of one more token, and return all."""
    rows, seen = len(keys), layer.keys.shape[2]
    for store, new in zip(layer.stores, (keys, values)):
        store[:rows, :, seen:seen + 1] = new
    layer.keys, layer.values = (store[:rows, :, :seen + 1] for store in layer.stores)
    return layer.keys, layer.values


def _drop_rows(cache, keep: list[int]) -> list[int]:
    """Leave only the rows `keep`: the last of them move into the gaps. Returns the old number of each new row."""
    kept, late = set(keep), [row for row in reversed(keep) if row >= len(keep)]
    gaps = [row for row in range(len(keep)) if row not in kept]  # as many as there are late rows
    for layer in own_layers(cache) if gaps else ():
        seen = layer.keys.shape[2]
        for store in layer.stores:
            store[gaps, :, :seen] = store[late, :, :seen]
    moved = dict(zip(gaps, late))
    return [moved.get(row, row) for row in range(len(keep))]


def _sample_batch(model, tokenizer, prompts, group_size, limits, temperature, stop, ends, generator):
    base, room = base_of(model), max(limits)
    check_length(base.config, max(len(prompt) + limit for prompt, limit in zip(prompts, limits)))
    cache, hidden, visible, position = _prefill(base, prompts)
    # Each prompt was computed once; for its group, keys and values, hidden state, mask and position are repeated.
    _make_room(cache, group_size, room)
    mask = torch.zeros(len(prompts), 1, 1, visible.shape[1] + room, dtype=hidden.dtype, device=base.device)
    mask[..., :visible.shape[1]].masked_fill_(visible[:, None, None] == 0, torch.finfo(mask.dtype).min)
    hidden, mask, position = (x.repeat_interleave(group_size, 0) for x in (hidden, mask, position))
    completions: list[list[int]] = [[] for _ in range(len(prompts) * group_size)]
    live, seen = list(range(len(completions))), visible.shape[1]
    tail = len(stop.encode()) + 1  # as many tokens hold the whole of it: none is shorter than a byte
    while True:
        parts = hidden.split(SAMPLED_ROWS)
        tokens = torch.cat([draw(logits_of(model, part), temperature, generator) for part in parts])
        keep = []
        for row, token in enumerate(tokens.tolist()):
            completion = completions[live[row]]
            completion.append(token)
            ended = token in ends or len(completion) >= limits[live[row] // group_size]
            if not ended and not (stop and stop in tokenizer.decode(completion[-tail:])):
                keep.append(row)
        if not keep:
            return [completions[i:i + group_size] for i in range(0, len(completions), group_size)]
        if len(keep) < len(live):  # finished rows would cost as much as the others
            order = _drop_rows(cache, keep)
            live = [live[row] for row in order]
            tokens, mask, position = tokens[order], mask[order], position[order]
        seen += 1
        hidden = base.get_decoder()(input_ids=tokens[:, None], attention_mask=mask[..., :seen], position_ids=position,
                                    past_key_values=cache, use_cache=True).last_hidden_state
        hidden, position = hidden[:, -1].contiguous(), position + 1


def draw(logits, temperature: float, generator):
    """One token per row of logits [rows, V], which are overwritten, from softmax(logits / temperature), by inverting
    the cumulative distribution: torch.multinomial draws V numbers a row, on a CPU more slowly than the model runs."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = logits.div_(temperature).softmax(-1).cumsum_(-1)
    uniform = 1 - torch.rand(len(logits), 1, generator=generator, device=logits.device)  # in (0, 1]
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:])[:, 0]


@dataclass
class Rollout:
    """One group: a problem's prompt (with the prefix that a replay starts from), its completions, their rewards."""
    problem: Problem
    prompt: list[int]
    completions: list[list[int]]
    rewards: list[float]

    @property
    def has_signal(self) -> bool:
        return len(set(self.rewards)) > 1


def roll_out(policy: Policy, problems: list[Problem], prefixes: list[list[int]], settings, seed: int) -> list[Rollout]:
    """Sample and score one group per problem, each after its prefix (empty but for replays), which counts towards
    max_new_tokens: a replay is the end of a completion, and must not have more room than one."""
    prompts = [policy.prompt_ids(problem.question) + prefix for problem, prefix in zip(problems, prefixes)]
    groups = sample(policy.model, policy.tokenizer, prompts, settings.group_size, stop=policy.stop, seed=seed,
                    max_new_tokens=[settings.max_new_tokens - len(prefix) for prefix in prefixes],
                    temperature=settings.temperature, rows=settings.batch_rows)
    return [Rollout(problem, prompt, group, [policy.reward(problem, prefix + completion) for completion in group])
            for problem, prefix, prompt, group in zip(problems, prefixes, prompts, groups)]


def replay_points(policy: Policy, rollouts: list[Rollout], turns: range, max_new_tokens: int, rng: random.Random):
    """(problems, prefixes) of the replays number `turns`: random positions inside successful (even numbers) and failed
    completions, so that later positions branch too. Groups that never succeed have nothing to tell apart."""
    pools = [[(r.problem, c) for r in rollouts if max(r.rewards) > 0 for c, reward in zip(r.completions, r.rewards)
              if (reward == max(r.rewards)) == success and 2 < len(c) < max_new_tokens] for success in (True, False)]
    pools = [pool for pool in pools if pool]
    points = [rng.choice(pools[i % len(pools)]) for i in turns if pools]
    prefixes = [c[:rng.randrange(1, len(c) - 1)] for _, c in points]
    for prefix, (_, whole) in zip(prefixes, points):
        while len(policy.text(prefix)) > len(policy.text(whole)):  # it would end within the stop text
            prefix.pop()
    return [problem for problem, _ in points], prefixes


# ---- 4. Credit: the trie and one short pure function per method -----------------------------------------------

class Trie:
    """The completions of one prompt, shared prefixes stored once. A node is one token after one exact prefix.

    .tokens   token id of each node
    .parents  parent of each node, always of lower index; -1 where the parent is the prompt
    .depths   position in the completion, from 0
    .paths    for each completion, its nodes from first to last token
    """

    def __init__(self, completions: list[list[int]]):
        self.tokens, self.parents, self.depths, self.paths = [], [], [], []
        node_of: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        for completion in completions:
            node, path = -1, []
            for depth, token in enumerate(completion):
                key = (node, token)
                if key not in node_of:
                    node_of[key] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(node)
                    self.depths.append(depth)
                node = node_of[key]
                path.append(node)
            self.paths.append(path)


def _advantages(rewards: list[float], eps: float = 1e-4) -> list[float]:
    """(R - mean) / (std + eps) with the population's standard deviation (Shao et al. 2024, arXiv 2402.03300)."""
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [(r - mean) / (std + eps) for r in rewards]


def _spread(rewards: list[float], chosen: list[list[int]]) -> dict[int, float]:
    """Give each chosen node of completion i its share A_i / (G * len_i); opposite shares of one node cancel."""
    weights: dict[int, float] = defaultdict(float)
    for advantage, nodes in zip(_advantages(rewards), chosen):
        for node in nodes:
            weights[node] += advantage / (len(chosen) * len(nodes))
    return {node: weight for node, weight in weights.items() if abs(weight) > 1e-9}


def grpo_weights(trie: Trie, rewards: list[float]) -> dict[int, float]:
    """GRPO (arXiv 2402.03300), every token: {node: sum over completions i through it of A_i / (G * len_i)}."""
    return _spread(rewards, trie.paths)


def s_grpo_weights(trie: Trie, rewards: list[float], alpha: int, p: float, rng: random.Random) -> dict[int, float]:
    """S-GRPO (arXiv 2504.20834): as GRPO over a random subset of each completion's positions, drawn with `rng`:
    every position t < alpha, and each t >= alpha with probability p; len_i is the size of the subset."""
    return _spread(rewards, [[n for n in path if trie.depths[n] < alpha or rng.random() < p] for path in trie.paths])


def rewards_through(trie: Trie, rewards: list[float]) -> dict[int, list[float]]:
    """{node: rewards of the completions through it}; -1 is the prompt, which all of them go through."""
    through: dict[int, list[float]] = defaultdict(list)
    for path, reward in zip(trie.paths, rewards):
        for node in [-1, *path]:
            through[node].append(reward)
    return through


def t_spmo_weights(trie: Trie, rewards: list[float]) -> dict[int, float]:
    """T-SPMO (arXiv 2504.20834): {node: A(v|p) / number of nodes with credit}, where A(v|p) is the mean reward of the
    completions through prefix p and token v, minus that of all completions through p. Only branch points get any."""
    mean = {node: sum(passing) / len(passing) for node, passing in rewards_through(trie, rewards).items()}
    credit = {n: mean[n] - mean[parent] for n, parent in enumerate(trie.parents) if abs(mean[n] - mean[parent]) > 1e-9}
    return {node: value / len(credit) for node, value in credit.items()}


def credit_weights(method: str, trie: Trie, rewards: list[float], settings, rng: random.Random) -> dict[int, float]:
    if method == "grpo":
        return grpo_weights(trie, rewards)
    if method == "s-grpo":
        return s_grpo_weights(trie, rewards, settings.alpha, settings.p, rng)
    if method == "t-spmo":
        return t_spmo_weights(trie, rewards)
    raise NotImplementedError(f"credit_weights names no function for the method {method!r}")


# ---- 5. Update: pack, forward, loss ---------------------------------------------------------------------------

# Rows of [vocabulary] logits at a time, here above those 32 MiB: smaller pieces are scattered over the heap between the
# activations, and keep it from shrinking (0.8 GiB for GRPO on Qwen2-1.5B, with 48 rows).
TRAINED_ROWS = 64


def ancestors(trie: Trie, node: int, known: set[int]) -> list[int]:
    """The ancestors of a node, nearest first, up to the first that is in `known`."""
    found, node = [], trie.parents[node]
    while node >= 0 and node not in known:
        found.append(node)
        node = trie.parents[node]
    return found


def pack(prompt: list[int], trie: Trie, nodes: list[int]):
    """One sequence of the prompt and all ancestors of `nodes`, each once: (ids [L], positions [L], allowed [L, L] of
    bool, slot {node: index in the sequence}). A row of `allowed` sees the prompt and the node's own ancestors."""
    needed: set[int] = set()
    for node in nodes:
        needed.update(ancestors(trie, node, needed))
    order, start = sorted(needed), len(prompt)  # parents come before their children
    slot = {-1: start - 1} | {node: start + i for i, node in enumerate(order)}
    ids = torch.tensor(prompt + [trie.tokens[n] for n in order])
    positions = torch.tensor([*range(start), *(start + trie.depths[n] for n in order)])
    allowed = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    allowed[start:, start:] = False
    for node in order:
        row = slot[node]
        allowed[row] = allowed[slot[trie.parents[node]]]
        allowed[row, row] = True
    return ids, positions, allowed, slot


def packed_logprobs(model, prompt_ids: list[int], trie: Trie, nodes: list[int], temperature: float = 1.0):
    """log pi(token(n) | prefix(n)) for each of `nodes`: float32 [len(nodes)], differentiable.

    One forward over the prompt and the ancestors of `nodes`; logits only at their parents, a few rows at a time, so
    that [tokens, vocabulary] never exists. Equal to one forward pass per completion up to rounding. Raises UserError
    where a sliding attention window is shorter than the sequence, or where there is no prompt.
    """
    base = base_of(model)
    if not prompt_ids:
        raise UserError("The prompt is empty: what comes first in a completion has nothing to be predicted from.")
    ids, positions, allowed, slot = pack(prompt_ids, trie, nodes)
    check_length(base.config, int(positions.max()) + 2)
    dtype, device = base.get_input_embeddings().weight.dtype, base.device
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
    hidden = base.get_decoder()(input_ids=ids[None].to(device), position_ids=positions[None].to(device),
                                attention_mask=mask[None, None].to(device), use_cache=False).last_hidden_state[0]
    # The dtype is named because there may be no nodes: a group without signal.
    rows = torch.tensor([slot[trie.parents[node]] for node in nodes], dtype=torch.long, device=device)
    tokens = torch.tensor([trie.tokens[node] for node in nodes], dtype=torch.long, device=device)
    return token_logprobs(model, hidden[rows], tokens, temperature)


def token_logprobs(model, hidden, tokens, temperature: float):
    """log-prob of each of `tokens` [n] under softmax(logits / temperature), from hidden states [n, width]: float32 [n].

    The gradient of each is a vector of [width] that is at hand once its row of logits is, so it is computed there and
    kept, instead of the row or of computing the row again in the backward pass. (Not where the output embedding itself
    is trained, which would lose its gradient.)
    """
    def logps(part, wanted):
        return (logits_of(model, part) / temperature).log_softmax(-1).gather(-1, wanted[:, None])[:, 0]

    parts = zip(hidden.split(TRAINED_ROWS), tokens.split(TRAINED_ROWS))
    if not hidden.requires_grad or any(p.requires_grad for p in base_of(model).get_output_embeddings().parameters()):
        return torch.cat([logps(part, wanted) for part, wanted in parts])
    values, slopes = [], []
    for part, wanted in parts:
        part = part.detach().requires_grad_()
        value = logps(part, wanted)
        slopes += torch.autograd.grad(value.sum(), part)
        values.append(value.detach())
    return torch.cat(values) + ((hidden - hidden.detach()) * torch.cat(slopes)).sum(-1)  # adds 0, with that gradient


def check_length(config, length: int) -> None:
    """Packed and cached attention are exact only while everything lies inside a model's sliding window; beyond its
    context no model is."""
    text = config.get_text_config()
    if length > (context := getattr(text, "max_position_embeddings", None) or length):
        raise UserError(f"Prompt and completion need {length} tokens, but this model's context holds {context}; lower "
                        "--max-new-tokens or shorten the prompt.")
    window = getattr(text, "sliding_window", None)
    slides = "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"])
    if window and slides and length > window:
        raise UserError(f"Prompt and completion need {length} tokens, but this model attends over a sliding window of "
                        f"{window}; lower --max-new-tokens or shorten the prompt.")


def check_packing(model, tokenizer) -> None:
    """Refuse a model that cannot be sampled from here, or whose packed pass differs from plain ones on a few tokens:
    one that ignores masks or positions (recurrent ones, say), or scales its logits in its own way."""
    base = base_of(model)
    try:
        sample(model, tokenizer, [[0, 1, 2], [1, 2]], 2, max_new_tokens=2, ends=set())
        gap = packing_gap(model, tokenizer)
        fault = "" if gap < (1e-3 if base.dtype == torch.float32 else 0.5) else f"log-probs differ by {gap:.3g}"
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        fault = f"{type(error).__name__}: {first_line(error)}"
    if fault:
        raise UserError(f"This model's architecture ({base.config.model_type}) does not fit the packed update "
                        f"({fault}); use a plain decoder such as Qwen2, Llama or Gemma.")


def packing_gap(model, tokenizer) -> float:
    """The largest difference of log-probs between the packed pass and plain forward passes on a few random tokens."""
    base, device, gap = base_of(model), base_of(model).device, 0.0
    rng = random.Random(0)
    ids = [rng.randrange(min(len(tokenizer), base.config.get_text_config().vocab_size)) for _ in range(12)]
    prompt, completions = ids[:5], [ids[5:9], ids[5:7] + ids[9:12]]
    trie = Trie(completions)
    with torch.inference_mode():
        packed = packed_logprobs(model, prompt, trie, list(range(len(trie.tokens))))
        for path, completion in zip(trie.paths, completions):
            logits = base(input_ids=torch.tensor([prompt + completion], device=device)).logits[0].float()
            plain = logits[len(prompt) - 1:-1].log_softmax(-1)[range(len(completion)), completion]
            gap = max(gap, (packed[path] - plain).abs().nan_to_num(math.inf).max().item())
    return gap


def step_trie(rollouts: list[Rollout], tries: list[Trie],
              weights: list[dict[int, float]]) -> tuple[list[int], Trie, dict[int, float]]:
    """All groups of a step as one trie: what their prompts share (token ids), the trie of the rest of each prompt and
    its completions, and the weight of its nodes, given each group's weights on the trie of its completions alone."""
    shared = os.path.commonprefix([rollout.prompt for rollout in rollouts])
    joint = Trie([r.prompt[len(shared):] + completion for r in rollouts for completion in r.completions])
    total: dict[int, float] = defaultdict(float)  # a replay can meet the nodes of the group that it came from
    paths = iter(joint.paths)
    for rollout, trie, own in zip(rollouts, tries, weights):
        nodes = {}
        for path in trie.paths:
            nodes.update(zip(path, next(paths)[len(rollout.prompt) - len(shared):]))
        for node, weight in own.items():
            total[nodes[node]] += weight
    return shared, joint, total


def split_nodes(trie: Trie, nodes: list[int], budget: int) -> Iterator[list[int]]:
    """Cut `nodes` into lists with at most `budget` ancestors each (a single long path may have more)."""
    part: list[int] = []
    needed: set[int] = set()
    for node in sorted(nodes):
        if part and len(needed) + len(ancestors(trie, node, needed)) > budget:
            yield part
            part, needed = [], set()
        part.append(node)
        needed.update(ancestors(trie, node, needed))
    yield part


def pack_loss(policy: Policy, prompt: list[int], trie: Trie, weights: dict[int, float], beta: float, settings):
    """The docstring's formula on some of a step's nodes, a scalar, plus beta times their summed KL to the model without
    its adapter (the k3 estimate of Schulman 2020)."""
    nodes = list(weights)
    weight = torch.tensor([weights[n] for n in nodes], device=base_of(policy.model).device)
    logp = packed_logprobs(policy.model, prompt, trie, nodes, settings.temperature)
    # On pi instead of log pi, a branch counts by how likely it is; the gradient of pi is pi * grad log pi.
    loss = -(weight * (logp.exp() if settings.method == "t-spmo" and settings.on_prob else logp)).sum()
    if beta:
        with torch.no_grad(), policy.model.disable_adapter():
            reference = packed_logprobs(policy.model, prompt, trie, nodes, settings.temperature)
        gap = reference - logp
        loss = loss + beta * (gap.exp() - gap - 1).sum()
    return loss


def update(policy: Policy, rollouts: list[Rollout], optimizer, lr: float, settings, rng: random.Random) -> dict:
    """One optimizer step on the mean loss of all groups of all processes; groups without signal cost nothing. Returns
    what was trained here. A step with a non-finite gradient is skipped and reported."""
    params = [p for p in policy.model.parameters() if p.requires_grad]
    credited: dict[int, list] = defaultdict(list)  # by first token of the prompt, so that some of the prompt is shared
    for rollout in rollouts:
        if rollout.has_signal:
            trie = Trie(rollout.completions)
            if weights := credit_weights(settings.method, trie, rollout.rewards, settings, rng):
                credited[rollout.prompt[0]].append((rollout, trie, weights))
    loss_sum, own = 0.0, sum(len(weights) for groups in credited.values() for *_, weights in groups)
    group_count, trained = map(sum, zip(*gather((len(rollouts), own))))
    for groups in credited.values():
        prompt, trie, weights = step_trie(*zip(*groups))
        for nodes in split_nodes(trie, list(weights), settings.max_pack_tokens):
            part = {n: weights[n] / group_count for n in nodes}
            loss = pack_loss(policy, prompt, trie, part, settings.beta / trained, settings)
            loss.backward()
            loss_sum += loss.item()
    for p in params if processes()[1] > 1 else ():  # the losses of all processes are parts of one sum
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.distributed.all_reduce(p.grad)
    if trained and settings.l2:
        (settings.l2 * sum(p.pow(2).sum() for p in params)).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(params, settings.max_grad_norm or math.inf))
    skipped = not math.isfinite(norm)
    if trained and not skipped:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"tokens_trained": own, "loss": loss_sum, "grad_norm": norm, "skipped": skipped}


def processes() -> tuple[int, int]:
    """(number of this process, number of processes): (0, 1) unless join_processes has connected several."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if joined else (0, 1)


def main_process() -> bool:
    """Whether this is the process that shows and saves."""
    return processes()[0] == 0


def gather(value) -> list:
    """The values of all processes, in order."""
    values = [value] * processes()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


# ---- 6. Train and evaluate: short loops that call the above ---------------------------------------------------

def step_problems(problems: list[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The problems of one step: epoch after epoch in a new order, a function of (seed, step) alone so that a resumed
    run sees what the uninterrupted one would have seen."""
    size, first = len(problems), step * count
    epochs = range(first // size, (first + count - 1) // size + 1)
    order = [i for epoch in epochs for i in random.Random(f"{seed}/{epoch}").sample(range(size), size)]
    return [problems[i] for i in order[first % size:][:count]]


def learning_rate(step: int, settings) -> float:
    """Linear warm-up over the first tenth of the steps, then linear decay to a tenth of the peak."""
    warm = max(1, settings.steps // 10)
    decay = 1 - 0.9 * max(0, step + 1 - warm) / max(1, settings.steps - warm)
    return settings.lr * min((step + 1) / warm, decay)


def train_step(policy: Policy, problems: list[Problem], optimizer, step: int, settings) -> dict:
    """Rollout, credit, update: one row of metrics. Each process takes its share of the problems and replays."""
    rank, world = processes()
    device, rng = str(base_of(policy.model).device), random.Random(f"{settings.seed}/{step}" + f"/{rank}" * (world > 1))
    peak_memory(device, reset=True)
    start = time.perf_counter()
    asked = step_problems(problems, step, settings.prompts_per_step, settings.seed)[rank::world]
    rollouts = roll_out(policy, asked, [[]] * len(asked), settings, seed=rng.getrandbits(32))
    points = replay_points(policy, rollouts, range(rank, settings.replay, world), settings.max_new_tokens, rng)
    replays = roll_out(policy, *points, settings, seed=rng.getrandbits(32))
    every, middle = rollouts + replays, time.perf_counter()
    updated = update(policy, every, optimizer, learning_rate(step, settings), settings, rng)
    facts = {  # lists, of which the row shows the mean over all processes
        "reward": [reward for r in rollouts for reward in r.rewards],
        "signal": [r.has_signal for r in every],
        "distinct": [len(set(map(tuple, r.completions))) / len(r.completions) for r in rollouts],
        "length": [len(c) for r in rollouts for c in r.completions],
        "truncated": [not policy.finished(c) for r in rollouts for c in r.completions],
        "tokens_generated": sum(len(c) for r in every for c in r.completions), **updated,
        "rollout_s": middle - start, "update_s": time.perf_counter() - middle, "peak_memory": peak_memory(device)}
    return metrics_row(step, learning_rate(step, settings), gather(facts))


def metrics_row(step: int, lr: float, facts: list[dict]) -> dict:
    """One row of metrics from the facts of all processes: means of the lists, sums of the tokens and losses, and of
    time and memory the most that a process took."""
    joined = {key: [fact[key] for fact in facts] for key in facts[0]}
    lists = {key: sum(values, []) for key, values in joined.items() if isinstance(values[0], list)}
    lists["accuracy"] = [reward == 1 for reward in lists["reward"]]
    return {"step": step + 1, "lr": lr, **{key: sum(values) / max(1, len(values)) for key, values in lists.items()},
            **{key: sum(joined[key]) for key in ("tokens_generated", "tokens_trained", "loss")},
            **{key: max(joined[key]) for key in ("grad_norm", "skipped", "rollout_s", "update_s", "peak_memory")}}


def new_optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)


def train(policy: Policy, problems: list[Problem], settings, run: Path, stop: list) -> Iterator[dict]:
    """Train until settings.steps, yielding one row of metrics a step, saving into `run`; `stop` ends it early once
    something is put in. Continues where run/state.pt left off if there is one."""
    optimizer, failures = new_optimizer(policy.model), 0
    for step in range(load_state(run, policy.model, optimizer), settings.steps):
        metrics = train_step(policy, problems, optimizer, step, settings)
        stopping = any(gather(bool(stop)))  # all processes leave after the same step
        failures = failures + 1 if metrics["skipped"] else 0
        if main_process():
            with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps or stopping or failures == 3:
                save_run(run, policy.model, optimizer, step + 1)
        yield metrics
        if failures == 3:
            raise UserError("Three steps in a row had a non-finite loss or gradient; the last good adapter is kept in "
                            f"{run}. Lower --lr, or use --dtype float32.")
        if stopping:
            return


def save_run(run: Path, model, optimizer, step: int) -> None:
    """The adapter as peft writes it, and state.pt for --resume; each file replaces the old one only when complete."""
    temporary = run / "saving.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(str(temporary), save_embedding_layers=False)  # "auto" would ask the hub
    weights = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    state = io.BytesIO()  # torch.save into a file does not say so when the disk is full
    torch.save({"step": step, "optimizer": optimizer.state_dict(), "weights": weights}, state)
    (temporary / "state.pt").write_bytes(state.getvalue())
    for name in ("adapter_config.json", "adapter_model.safetensors", "state.pt"):
        os.replace(temporary / name, run / name)
    shutil.rmtree(temporary, ignore_errors=True)


def load_state(run: Path, model, optimizer) -> int:
    """Put model and optimizer back to the saved step, if there is one, cut the metrics there, and return the step."""
    path, state = run / "state.pt", {"step": 0}
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["weights"], strict=False)  # only the adapter's weights are in there
        optimizer.load_state_dict(state["optimizer"])
    if main_process() and (run / "metrics.jsonl").exists():
        lines = read_text(run / "metrics.jsonl").splitlines(keepends=True)
        write_atomically(run / "metrics.jsonl", "".join(lines[:state["step"]]))  # line n is step n
    return state["step"]


def evaluate(policy: Policy, problems: list[Problem], settings, samples: int = 0, stop: list = ()) -> list[dict]:
    """One record per problem: the greedy completion and whether it is right, and with `samples` > 0 how many of that
    many samples at settings.temperature are right. Several processes share the problems."""
    rank, world = processes()
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].question))[rank::world]
    answers: dict[int, list[list[int]]] = {i: [] for i in order}  # the greedy completion, then the samples
    with bar("evaluating", len(problems) * (1 + samples)) as move:
        for count, temperature in [(1, 0.0)] + [(samples, settings.temperature)] * (samples > 0):
            width = max(1, settings.batch_rows // count)
            for start in range(0, len(order), width):
                chunk = order[start:start + width]
                prompts = [policy.prompt_ids(problems[i].question) for i in chunk]
                groups = sample(policy.model, policy.tokenizer, prompts, count, stop=policy.stop,
                                max_new_tokens=settings.max_new_tokens, temperature=temperature,
                                rows=settings.batch_rows, seed=settings.seed + start * world + rank)
                for i, group in zip(chunk, groups):
                    answers[i] += group
                move(advance=len(chunk) * count * world)
                if stop:
                    raise KeyboardInterrupt
    records = []
    for i, (greedy, *sampled) in answers.items():
        text, problem = policy.text(greedy), problems[i]
        records.append({
            "index": i, **asdict(problem), "completion": text, "correct": policy.reward(problem, greedy) == 1,
            "length": len(greedy), "truncated": not policy.finished(greedy), "samples": len(sampled),
            "samples_correct": sum(policy.reward(problem, completion) == 1 for completion in sampled),
            **({"metric": policy.metric(text, problem.answer)} if policy.metric else {})})
    return sorted(sum(gather(records), []), key=lambda record: record["index"])


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    share, scale = right / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(before: list[bool], after: list[bool]) -> float:
    """Exact two-sided p-value that the same problems are solved as often after as before (McNemar 1947)."""
    mended = sum(b < a for b, a in zip(before, after))
    broken = sum(b > a for b, a in zip(before, after))
    tail = sum(math.comb(mended + broken, k) for k in range(min(mended, broken) + 1)) / 2 ** (mended + broken)
    return min(1.0, 2 * tail)


def pass_at_k(total: int, right: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from `total` samples (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 - math.comb(total - right, k) / math.comb(total, k)


# ---- 7. Command line: typer commands, rich tables -------------------------------------------------------------

app = typer.Typer(help="Teach a language model to reason with reinforcement learning on a few sampled tokens.",
                  no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode="rich")
DEFAULT_MODEL = "Qwen/Qwen2-1.5B"


def option(help: str, *names: str, panel: str, **limits):
    return typer.Option(*names, help=help, rich_help_panel=panel, **limits)


Method = Literal["s-grpo", "t-spmo", "grpo"]
Shown = Literal[Method, "all"]
Task = Annotated[str, typer.Argument(help="svamp, multiply, or the name of a task that prep made.")]
DataDir = Annotated[Path, option("Where prepared tasks live.", panel="Data", show_default="data/ beside the script")]
Model = Annotated[str, option("Hub id, local folder, .gguf file, or demo: the small bundled one. auto: Qwen2-1.5B; "
                              "for svamp demo, where there is no GPU or that cannot be loaded.", panel="Model")]
Device = Annotated[str, option("auto, cpu, cuda or mps.", panel="Model")]
Dtype = Annotated[str, option("auto, float32 or bfloat16.", panel="Model")]
Prompt = Annotated[str, option("auto, chat, plain (worked examples as Question/Answer), or a file with {question} in "
                               "it.", panel="Model")]
Shots = Annotated[int | None, option("Worked examples in a chat or plain prompt.", panel="Model", min=0,
                                     show_default="all of examples.jsonl")]
MaxNewTokens = Annotated[int, option("Longest completion, in tokens.", panel="Rollout", min=1)]
BatchRows = Annotated[int, option("Completions decoded at a time; lower it when memory runs out.", panel="Rollout",
                                  min=1)]
Temperature = Annotated[float, option("Samples come from softmax(logits / temperature).", panel="Rollout", min=0.01)]
Reward = Annotated[str, option("number, exact (as text), regex:PATTERN with {answer} in it, or FILE.py:function, which "
                               "is given completion and answer.", panel="Data")]
Metric = Annotated[str, option("A KPI to report beside the reward when evaluating; same forms.", panel="Data")]
GroupSize = Annotated[int, option("Completions sampled per problem (G), which are compared with each other.",
                                  panel="Rollout", min=2)]
Alpha = Annotated[int, option("s-grpo: the first ALPHA tokens are always trained ...", panel="Credit", min=0)]
P = Annotated[float, option("... and each later one with this probability.", panel="Credit", min=0, max=1)]
Seed = Annotated[int, option("Fixes the order of problems, the samples and the adapter's start.", panel="Run")]


def find_policy(settings) -> tuple[Policy, list[Problem], list[Problem]]:
    """Load what the settings ask for: (policy, train problems, test problems). A named model is never replaced."""
    if settings.model != "auto":
        return load_policy(settings, settings.model)
    reason = "No CUDA GPU in use"
    if settings.task != "svamp" or pick_device(settings.device).startswith("cuda"):
        try:
            return load_policy(settings, DEFAULT_MODEL)
        except Unreachable as error:
            if settings.task != "svamp":
                raise UserError(f"{error} It was asked for because --model names none; to only try the commands, "
                                "--model demo is enough.") from None
            reason = f"{error}\n{DEFAULT_MODEL} cannot be trained here"
    console.print(f"{reason}, so this is the bundled demo: a 1.1 M-parameter model and 1,000 SVAMP-style problems.\n"
                  "For the real thing: --model Qwen/Qwen2-1.5B, or --model PATH of a local folder.", style="yellow")
    return load_policy(settings, "demo")


def load_policy(settings, name: str) -> tuple[Policy, list[Problem], list[Problem]]:
    """What find_policy returns, with the model of this name, which is put into the settings."""
    score, metric = reward_function(settings.reward), settings.metric and reward_function(settings.metric)
    settings.model, task = name, settings.task
    if is_bundled(name) and not (DATA / "demo").is_dir():
        raise UserError(f"There is no {DATA / 'demo'}: copy that folder with the script, or name a model with --model.")
    demo = task == "svamp" and is_bundled(name)  # it has never seen the words of the real SVAMP
    if task == "svamp" and not demo and not (settings.data_dir / task / "train.jsonl").exists():
        console.print("Preparing SVAMP first, as `python tokenrl.py prep svamp` does ...")
        write_task("svamp", svamp_problems(None), STORY_EXAMPLES, 0.3, 0, settings.data_dir)
    where = ("demo", DATA) if demo else (task, settings.data_dir)
    train_set, test_set, examples = load_task(*where, numeric=settings.reward == "number")
    if not demo:
        console.print(f"Loading {name} ...")
    small = is_bundled(name) and settings.device == "auto" and pick_device("auto") == "mps"
    model, tokenizer = load_model(name, "cpu" if small else settings.device, settings.dtype)
    check_packing(model, tokenizer)
    form = choose_prompt(settings.prompt, model, tokenizer)
    if settings.shots and form not in ("chat", "plain"):
        raise UserError("--shots needs a chat or plain prompt: a template holds its own worked examples.")
    return Policy(model, tokenizer, form, examples[:settings.shots], score, metric), train_set, test_set


@app.command()
def prep(
    what: Annotated[str, typer.Argument(help="svamp, multiply, or a CSV or JSONL file of yours.", metavar="TASK|FILE")],
    source: Annotated[Path | None, option("SVAMP.json on this machine instead of a download.", panel="Data")] = None,
    digits: Annotated[str, option("multiply: digits of both numbers (3), or of each (2x1).", panel="Data")] = "2",
    count: Annotated[int, option("multiply: how many problems.", panel="Data", min=2)] = 1000,
    question: Annotated[str, option("FILE: column that holds the question.", panel="Data")] = "question",
    answer: Annotated[str, option("FILE: column that holds the answer.", panel="Data")] = "answer",
    reward: Reward = "number",
    name: Annotated[str, option("Name of the task.", panel="Data", show_default="svamp, multiply, or the file's")] = "",
    test_share: Annotated[float, option("Share held out for the test.", panel="Data", min=0.01, max=0.99)] = 0.3,
    seed: Annotated[int, option("Fixes the split and the generated problems.", panel="Data")] = 0,
    data_dir: DataDir = DATA,
):
    """Prepare a task: read, check and split problems into data/NAME/{train,test}.jsonl."""
    reward_function(reward)  # a wrong one would be found only in training
    rejected: dict[str, list[int]] = {}
    if what == "svamp":
        problems = svamp_problems(source)
    elif what == "multiply":
        problems = multiply_problems(digits, count, seed)
    else:
        problems, rejected = file_problems(Path(what), question, answer, reward == "number")
    name = name or Path(what).stem
    if not re.fullmatch(r"\w[\w.-]*", name) or name.lower() in {"demo", "svamp", "multiply"} - {what}:
        raise UserError(f"{name!r} cannot be a task's name; choose another with --name (letters, digits, - and _).")
    examples = MULTIPLY_EXAMPLES if what == "multiply" else STORY_EXAMPLES
    for reason, lines in rejected.items():
        console.print(f"rejected: {reason}: {len(lines):,} (line {', '.join(map(str, lines[:8]))}"
                      f"{', ...' * (len(lines) > 8)})")
    kept = (data_dir / name / "examples.jsonl").exists()
    train_size, test_size = write_task(name, problems, examples, test_share, seed, data_dir)
    console.print(right_aligned([name, ""], [
        ("read", f"{len(problems) + sum(map(len, rejected.values())):,}"),
        ("train", f"{train_size:,}"), ("test", f"{test_size:,}"),
        *[("worked examples", "kept as they were")] * kept]))
    more = "" if reward == "number" else f" --reward {shlex.quote(reward)}"
    console.print(f"Next: python tokenrl.py train {name}{more}{data_dir_option(data_dir)}")


def data_dir_option(data_dir: Path) -> str:
    """What the command lines that we print for the user must add."""
    return "" if data_dir == DATA else f" --data-dir {shlex.quote(data_dir.as_posix())}"


@app.command(name="train")
def train_command(
    context: typer.Context,
    task: Task,
    method: Annotated[Method, option("Which tokens are trained, with what credit.", panel="Credit")] = "s-grpo",
    alpha: Alpha = 4, p: P = 0.3,
    on_prob: Annotated[bool, option("t-spmo: weight * pi instead of weight * log pi.", "--on-prob/--on-log-prob",
                                    panel="Credit")] = True,
    replay: Annotated[int, option("Extra groups a step, sampled from inside completions.", panel="Credit", min=0)] = 0,
    model: Model = "auto", device: Device = "auto", dtype: Dtype = "auto", prompt: Prompt = "auto", shots: Shots = None,
    lora_rank: Annotated[int, option("Rank of the LoRA matrices.", panel="Model", min=1)] = 16,
    lora_alpha: Annotated[float, option("LoRA's scale; the update is multiplied by alpha / rank.", panel="Model")] = 32,
    lora_targets: Annotated[str, option("Modules that get LoRA, with commas.", panel="Model")] = "q_proj,v_proj",
    lora_layers: Annotated[float, option("Share of the layers, from the last, that get LoRA.", panel="Model",
                                         min=0.001, max=1, show_default="1/3")] = 1 / 3,
    prompts_per_step: Annotated[int, option("Problems asked per step.", panel="Rollout", min=1)] = 8,
    group_size: GroupSize = 8,
    max_new_tokens: MaxNewTokens = 200, temperature: Temperature = 1.0, batch_rows: BatchRows = 64,
    steps: Annotated[int, option("Training steps.", panel="Update", min=1)] = 100,
    lr: Annotated[float | None, option("Peak learning rate; warms up, then decays.", panel="Update", min=0,
                                       show_default="5e-4; 3e-3 for the bundled model")] = None,
    beta: Annotated[float, option("Weight of the KL to the model without adapter.", panel="Update", min=0)] = 0.0,
    l2: Annotated[float, option("L2 penalty on the LoRA matrices.", "--l2", panel="Update", min=0)] = 0.0,
    max_pack_tokens: Annotated[int, option("Tokens in one forward pass of the update, the part of the prompt that all "
                                           "share not counted; less needs less memory.", panel="Update", min=1)] = 1024,
    checkpointing: Annotated[bool, option("Compute activations again in the backward pass: less memory, more time.",
                                          "--checkpointing", panel="Update")] = False,
    max_grad_norm: Annotated[float, option("Gradients are clipped to this norm, unless 0.", panel="Update",
                                           min=0)] = 1.0,
    name: Annotated[str, option("The run's folder in runs/; NAME-2, -3 where that is taken.", panel="Run",
                                 show_default="TASK-METHOD")] = "",
    resume: Annotated[Path | None, option("Continue the run in this folder.", panel="Run")] = None,
    save_every: Annotated[int, option("Steps between saves.", panel="Run", min=1)] = 10,
    eval_problems: Annotated[int, option("Test problems asked before and after; 0 for all.", panel="Run", min=0)] = 0,
    eval_samples: Annotated[int, option("Also draw this many samples of each, for pass@k.", panel="Run", min=0)] = 0,
    dry_run: Annotated[bool, option("Only take one worst-case step and one evaluation batch, and say what memory they "
                                    "took.", "--dry-run", panel="Run")] = False,
    reward: Reward = "number", metric: Metric = "", seed: Seed = 0, data_dir: DataDir = DATA,
):
    """Train a LoRA adapter by reinforcement learning: evaluate, train, evaluate again."""
    settings = SimpleNamespace(**{k: v for k, v in context.params.items() if k not in ("resume", "dry_run", "name")})
    if resume:
        resume_settings(settings, resume, on_command_line(context))
    settings.device = join_processes(settings.device)
    policy, train_set, test_set = find_policy(settings)
    if settings.lr is None:  # small models need larger steps
        settings.lr = 3e-3 if is_bundled(settings.model) else 5e-4
    torch.manual_seed(settings.seed)
    policy.model = add_lora(policy.model, settings.lora_rank, settings.lora_alpha, settings.lora_targets,
                            settings.lora_layers, settings.checkpointing)
    longest = max(train_set + test_set, key=lambda problem: len(problem.question))
    check_length(base_of(policy.model).config, len(policy.prompt_ids(longest.question)) + settings.max_new_tokens)
    if dry_run:
        show_dry_run(policy, train_set, test_set[:settings.eval_problems or None], settings)
        return leave_processes()
    run = resume or gather(main_process() and new_run(name or f"{task}-{settings.method}", settings))[0]
    show_start(policy, settings, run, train_set, test_set)
    train_and_compare(policy, train_set, test_set[:settings.eval_problems or None], settings, run)
    leave_processes()


def join_processes(device: str) -> str:
    """Under torchrun, connect the processes and let only the first one speak; returns the device of this process."""
    if "LOCAL_RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":  # some clusters set one of them
        return device
    device = pick_device(device)
    if device.startswith("cuda"):
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")  # refused where there are fewer GPUs than processes
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    console.quiet = not main_process()
    return device


def leave_processes() -> None:
    """Under torchrun, end this process once all have come here. Not by way of the interpreter's own end, where gloo's
    threads abort some runs that have succeeded (pytorch issue 190489)."""
    if processes()[1] > 1:
        torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def train_and_compare(policy: Policy, train_set, test_set, settings, run: Path) -> None:
    device, task, folder = str(base_of(policy.model).device), settings.task, shlex.quote(run.as_posix())
    again = f"Continue with: python tokenrl.py train {task} --resume {folder}"
    with catch_signals(again) as stop:
        base = evaluate_once(policy, test_set, settings, run, "base", stop)
        console.print(f"before training: {accuracy(base):.1%} of {len(base)} test problems right (greedy)")
        if (cut := sum(record["truncated"] for record in base) / len(base)) > 0.5:
            console.print(f"{cut:.0%} were cut off at {settings.max_new_tokens} tokens, which counts as wrong: unless "
                          "that is what it shall learn, raise --max-new-tokens.", style="yellow")
        with live_table(settings.steps, device) as show:
            for metrics in train(policy, train_set, settings, run, stop):
                show(metrics)
        if any(gather(bool(stop))):
            console.print(f"Stopped and saved. {again}")
            raise typer.Exit(128 + (stop or [signal.SIGTERM])[0])
        trained = evaluate_once(policy, test_set, settings, run, "trained", stop)
    rows = [row for _, row in read_rows(run / "metrics.jsonl")]
    console.print(comparison_table({"base": base, "trained": trained}, f"{task}, {settings.method}, {run}"))
    console.print(training_summary(rows, device))
    console.print(f"Adapter: {run}   Ask it again: python tokenrl.py eval {task} --adapter {folder}"
                  + data_dir_option(settings.data_dir))


def saved_settings(run: Path) -> dict:
    """The settings in a run's config.json; empty if there is none."""
    path = run / "config.json"
    try:
        saved = json.loads(read_text(path)).get("settings", {}) if path.exists() else {}
    except (ValueError, AttributeError):
        raise UserError(f"{path} is not the config.json of a run.") from None
    return {key: Path(value) if key == "data_dir" else value for key, value in saved.items()}


def adapter_settings(run: Path) -> dict:
    """What is known of an adapter: its run's settings (which alone name a .gguf file), at the least its base model."""
    try:
        model = json.loads(read_text(run / "adapter_config.json"))["base_model_name_or_path"]
    except (UserError, ValueError, KeyError, TypeError):
        raise UserError(f"{run} holds no adapter (adapter_config.json and adapter_model.safetensors).") from None
    return {"model": str(model or "a model that it does not name")} | saved_settings(run)


def ask_as_trained(settings, run: Path, explicit: set[str]) -> None:
    """Take over the settings with which a run's adapter was trained, where the command line says nothing else."""
    own = adapter_settings(run)
    of_this_machine = {"task", "data_dir", "device", "dtype", "batch_rows", "seed"}
    for key in vars(settings).keys() & own.keys() - explicit - of_this_machine:
        setattr(settings, key, own[key])


def resume_settings(settings, run: Path, explicit: set[str]) -> None:
    """Take the run's own settings; what was given on the command line now must agree with them."""
    saved = saved_settings(run)
    if not saved:
        raise UserError(f"{run} is not a run that can be resumed (it has no config.json).")
    for key in explicit & {"data_dir", "device", "batch_rows", "max_pack_tokens", "checkpointing", "save_every"}:
        saved.pop(key, None)  # the data may have moved, the memory have run out; the method stays the same
    if differing := [key for key in sorted(explicit & saved.keys()) if vars(settings)[key] != saved[key]]:
        raise UserError("--resume continues a run with its own settings (start a new one for others); these differ: "
                        + ", ".join(f"{key} was {saved[key]}, now {vars(settings)[key]}" for key in differing))
    vars(settings).update(saved)


def on_command_line(context: typer.Context) -> set[str]:
    return {key for key in context.params if context.get_parameter_source(key).name == "COMMANDLINE"}


def new_run(name: str, settings) -> Path:
    """runs/NAME, or runs/NAME-2, -3, ... where that is taken; settings and versions are written into it."""
    run, number = Path("runs") / name, 2
    while run.exists():
        run, number = Path("runs") / f"{name}-{number}", number + 1
    run.mkdir(parents=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    config = {"settings": vars(settings), "versions": versions}
    write_atomically(run / "config.json", json.dumps(config, indent=2, default=str) + "\n")  # paths as text
    return run


@contextlib.contextmanager
def catch_signals(again: str):
    """Yields a list that the first Ctrl-C or SIGTERM is put into, so that the step in progress can be finished and
    saved. A second one ends the program at once, saying `again`."""
    stop: list[int] = []

    def handle(number, frame):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
        console.print("Stopping after this step or batch (press again to give up at once) ...")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except KeyboardInterrupt:
        errors.print(f"Interrupted; what was saved before is intact. {again}")
        raise typer.Exit(128 + stop[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_bar(label: str) -> Progress:
    """With time left; nothing where there is no terminal."""
    return Progress(TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                    TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def bar(label: str, total: int):
    """Yields what moves a progress bar: a function of `advance` or `completed`. Without a terminal, a line says that it
    has begun."""
    if not console.is_terminal:
        console.print(f"{label}: {total:,} answers ...")
    with progress_bar(label) as progress:
        yield partial(progress.update, progress.add_task("", total=total))


def evaluate_once(policy: Policy, problems: list[Problem], settings, run: Path, phase: str, stop: list) -> list[dict]:
    """Evaluate and append to run/eval.jsonl, or take the records from there when resuming."""
    path = run / "eval.jsonl"
    old = [row for _, row in read_rows(path)] if path.exists() else []
    if done := [row for row in old if row["phase"] == phase]:
        return done
    records = [{"phase": phase, **r} for r in evaluate(policy, problems, settings, settings.eval_samples, stop)]
    if main_process():
        write_jsonl(path, old + records)
    return records


def accuracy(records: list[dict]) -> float:
    return sum(record["correct"] for record in records) / len(records)


def gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size else "-"


def memory_name(device: str) -> str:
    return "VRAM" if device.startswith("cuda") else "memory"


@contextlib.contextmanager
def live_table(steps: int, device: str):
    """Yields a function that shows one row of metrics: a live table on a terminal, plain lines elsewhere."""
    titles = f"step reward  acc signal uniq tokens    trained  len roll s upd s {memory_name(device):>6}"
    header, lines = Text(titles, "bold", no_wrap=True), []

    def line(m: dict) -> Text:  # narrower than 80 characters
        memory = f"{m['peak_memory'] / 2**30:.2f}G" + ("!" if m["skipped"] else "")
        text = (f"{m['step']:4} {m['reward']:6.3f} {m['accuracy']:4.0%} {m['signal']:6.0%} {m['distinct']:4.0%} "
                f"{m['tokens_generated']:6} {m['tokens_trained']:5} {m['tokens_trained'] / m['tokens_generated']:4.0%} "
                f"{m['length']:4.0f} {m['rollout_s']:6.2f} {m['update_s']:5.2f} {memory:>6}")
        return Text(text, "red" if m["skipped"] else "", no_wrap=True)

    if not console.is_terminal:
        console.print(header, soft_wrap=True)
        yield lambda metrics: console.print(line(metrics), soft_wrap=True)
        return
    progress = progress_bar("training")
    task = progress.add_task("", total=steps)
    with Live(Stack(header, progress), console=console, refresh_per_second=4) as live:
        def show(metrics):
            lines.append(line(metrics))
            progress.update(task, completed=metrics["step"])
            live.update(Stack(header, *lines[-max(3, console.height - 6):], progress))
        yield show


def show_start(policy: Policy, settings, run: Path, train_set, test_set) -> None:
    base = base_of(policy.model)
    trainable, total = policy.model.get_nb_trainable_parameters()
    kind = policy.prompt if policy.prompt in ("chat", "plain") else "template"
    console.print(Text(settings.method, "bold"), f"on {settings.task}: {len(train_set)} train and {len(test_set)} test "
                  f"problems, {settings.prompts_per_step} x {settings.group_size} completions a step\n"
                  f"{base.config.model_type}, {total / 1e6:,.1f} M parameters, {trainable / 1e6:,.2f} M in LoRA, "
                  f"{str(base.dtype).split('.')[1]} on {base.device}, {kind} prompt\nrun {run}")


def comparison_table(results: dict[str, list[dict]], title: str) -> Table:
    """One column per policy; paired comparisons are with the first."""
    first = [record["correct"] for record in next(iter(results.values()))]
    rows: dict[str, list[str]] = defaultdict(list)
    for number, records in enumerate(results.values()):
        right, total = sum(r["correct"] for r in records), len(records)
        low, high = wilson(right, total)
        rows["accuracy (greedy)"].append(f"{right / total:.1%}  ({right}/{total})")
        rows["95 % interval"].append(f"{low:.1%} to {high:.1%}")
        correct = [record["correct"] for record in records]
        rows["difference, paired"].append(f"{(right - sum(first)) / total * 100:+.1f} points" if number else "")
        rows["p (exact McNemar)"].append(f"{mcnemar(first, correct):.2g}" if number else "")
        if count := records[0]["samples"]:
            sampled = [(count, record["samples_correct"]) for record in records]
            rows["accuracy (sampled)"].append(f"{sum(c for _, c in sampled) / (count * total):.1%}")
            for k in sorted({2 ** i for i in range(1, 8) if 2 ** i < count} | {count}):
                rows[f"pass@{k}"].append(f"{sum(pass_at_k(n, c, k) for n, c in sampled) / total:.1%}")
        rows["mean length, tokens"].append(f"{sum(r['length'] for r in records) / total:.1f}")
        rows["truncated"].append(f"{sum(r['truncated'] for r in records) / total:.1%}")
        if "metric" in records[0]:
            rows["mean of --metric"].append(f"{sum(r['metric'] for r in records) / total:.3f}")
        kinds = Counter(record["type"] for record in records)
        for kind, count in sorted(kinds.items()) if 1 < len(kinds) <= 20 else []:
            own = [record for record in records if record["type"] == kind]
            rows[f"{kind or 'no type'} ({count})"].append(f"{accuracy(own):.1%}")
    return right_aligned(["", *results], [(label, *cells) for label, cells in rows.items()], title)


def changes_table(before: list[dict], after: list[dict], label: str, most: int = 10) -> Table:
    """Problems that are right now and were wrong, and the other way round: at most `most` of each."""
    mended = [(old, new) for old, new in zip(before, after) if old["correct"] < new["correct"]]
    broken = [(old, new) for old, new in zip(before, after) if old["correct"] > new["correct"]]
    table = Table("", "problem", "answer", "base", label, title_justify="left",
                  title=f"mended (+): {len(mended)}, broken (-): {len(broken)}; up to {most} are shown")
    last = lambda record: (record["completion"].strip().split("\n")[-1] or "(nothing)")[-40:]  # noqa: E731
    for sign, style, changed in (("+", "green", mended), ("-", "red", broken)):
        for old, new in changed[:most]:
            table.add_row(sign, old["question"], old["answer"], last(old), last(new), style=style)
    return table


def right_aligned(headers: list[str], rows: list[tuple[str, ...]], title: str | None = None) -> Table:
    """A table whose columns are aligned right, but for the first."""
    table = Table(headers[0], *(Column(header, justify="right") for header in headers[1:]), title=title,
                  title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def training_summary(rows: list[dict], device: str) -> Table:
    total = lambda key: sum(row[key] for row in rows)  # noqa: E731
    seconds, share = total("rollout_s") + total("update_s"), total("tokens_trained") / total("tokens_generated")
    return right_aligned(["training", ""], [
        ("steps", str(len(rows))), ("tokens generated", f"{total('tokens_generated'):,}"),
        ("tokens trained", f"{total('tokens_trained'):,}  ({share:.1%})"),
        ("groups with signal", f"{total('signal') / len(rows):.0%}"),
        ("rollout / update, s a step", f"{total('rollout_s') / len(rows):.2f} / {total('update_s') / len(rows):.2f}"),
        ("training time", f"{seconds / 60:.1f} min"),
        (f"peak {memory_name(device)}", gigabytes(max(row["peak_memory"] for row in rows)))])


def show_dry_run(policy: Policy, train_set: list[Problem], test_set: list[Problem], settings) -> None:
    """One step and one batch of the evaluation at their worst: the longest prompts, completions that never end, and
    signal in every group."""
    device, count = str(base_of(policy.model).device), settings.prompts_per_step + settings.replay
    asked, tested = (sorted((policy.prompt_ids(p.question) for p in problems), key=len)
                     for problems in (train_set, test_set))
    asked = (asked * count)[-count:]  # where there are fewer, some come twice in a step

    def measured(task: Callable):
        peak_memory(device, reset=True)
        start = time.perf_counter()
        return task(), time.perf_counter() - start, peak_memory(device)

    unending = partial(sample, policy.model, policy.tokenizer, rows=settings.batch_rows, ends=set(),
                       max_new_tokens=settings.max_new_tokens, temperature=settings.temperature)
    _, eval_s, eval_peak = measured(lambda: unending(tested[-settings.batch_rows:]))
    groups, rollout_s, rollout_peak = measured(lambda: unending(asked, settings.group_size))
    if settings.method == "t-spmo":  # deepest where pairs of completions differ in nothing but their last token
        pairs = [[(group[i - i % 2], i % 2) for i in range(len(group))] for group in groups]
        groups = [[first[:-1] + [abs(first[-1] - second)] for first, second in pair] for pair in pairs]
    rewards = [float(i % 2) for i in range(settings.group_size)]
    rollouts = [Rollout(train_set[0], prompt, group, rewards) for prompt, group in zip(asked, groups)]
    updated, update_s, update_peak = measured(lambda: update(policy, rollouts, new_optimizer(policy.model), 0.0,
                                                             settings, random.Random(0)))
    memory = memory_name(device)
    console.print(right_aligned([f"worst-case step, {settings.method}", ""], [
        ("weights", gigabytes(sum(p.numel() * p.element_size() for p in policy.model.parameters()))),
        (f"peak {memory}, evaluation", gigabytes(eval_peak)),
        (f"peak {memory}, rollout", gigabytes(rollout_peak)),
        (f"peak {memory}, update", gigabytes(update_peak)),
        ("tokens generated", f"{sum(len(c) for group in groups for c in group):,}"),
        ("tokens trained", f"{updated['tokens_trained']:,}"),
        ("evaluation batch, s", f"{eval_s:.1f}"), ("rollout / update, s", f"{rollout_s:.1f} / {update_s:.1f}")]))


@app.command(name="eval")
def eval_command(
    context: typer.Context,
    task: Task,
    adapter: Annotated[list[Path] | None, option("A run's folder; can be given again. All are asked as the "
                                                 "first was trained.", panel="Model")] = None,
    model: Model = "auto", device: Device = "auto", dtype: Dtype = "auto", prompt: Prompt = "auto", shots: Shots = None,
    max_new_tokens: MaxNewTokens = 200, temperature: Temperature = 1.0, batch_rows: BatchRows = 64,
    reward: Reward = "number", metric: Metric = "",
    samples: Annotated[int, option("Also draw this many samples a problem, for pass@k.", panel="Rollout", min=0)] = 0,
    limit: Annotated[int, option("Only the first N test problems; 0 for all.", panel="Data", min=0)] = 0,
    output: Annotated[Path | None, option("Write every answer to this JSONL file.", panel="Data")] = None,
    min_accuracy: Annotated[float, option("Exit with code 1 if the last column is below this share.", panel="Run",
                                          min=0, max=1)] = 0.0,
    seed: Seed = 0, data_dir: DataDir = DATA,
):
    """Compare the base model and any number of adapters on the held-out problems."""
    if output:
        if output.is_dir():
            raise UserError(f"--output {output} is a folder, not a file.")
        output.parent.mkdir(parents=True, exist_ok=True)
    adapter, settings = list(dict.fromkeys(adapter or [])), SimpleNamespace(**context.params)
    if adapter:
        ask_as_trained(settings, adapter[0], on_command_line(context))
    policy, _, problems = find_policy(settings)
    problems = problems[:limit or None]
    for number, folder in enumerate(adapter):
        policy.model = load_adapter(policy.model, folder, f"adapter{number}", settings.model)
    with policy.model.disable_adapter() if adapter else contextlib.nullcontext():
        results = {"base": evaluate(policy, problems, settings, samples)}
    for number, folder in enumerate(adapter):
        policy.model.set_adapter(f"adapter{number}")
        results[str(folder) + "/" * (str(folder) == "base")] = evaluate(policy, problems, settings, samples)
    label, last = list(results.items())[-1]
    if adapter:
        console.print(changes_table(results["base"], last, label))
    console.print(comparison_table(results, f"{task}, {Path(settings.model).name}"))
    if output:
        write_jsonl(output, [{"policy": name, **record} for name, records in results.items() for record in records])
    if (reached := accuracy(last)) < min_accuracy:
        errors.print(f"Accuracy {reached:.1%} is below --min-accuracy {min_accuracy:.1%}.")
        raise typer.Exit(1)


@app.command(name="inspect")
def inspect_command(
    context: typer.Context,
    task: Task,
    method: Annotated[Shown, option("Whose credit to show; all: one after the other.", panel="Credit")] = "s-grpo",
    alpha: Alpha = 4, p: P = 0.3,
    index: Annotated[int | None, option("Number of the training problem.", panel="Data", min=0,
                                        show_default="the first whose rewards differ")] = None,
    adapter: Annotated[Path | None, option("A run's folder.", panel="Model")] = None,
    model: Model = "auto", device: Device = "auto", dtype: Dtype = "auto", prompt: Prompt = "auto", shots: Shots = None,
    group_size: GroupSize = 8, max_new_tokens: MaxNewTokens = 200, temperature: Temperature = 1.0,
    batch_rows: BatchRows = 64, reward: Reward = "number",
    output: Annotated[Path | None, option("Also write it to this .html or .svg file.", panel="Run")] = None,
    seed: Seed = 0, data_dir: DataDir = DATA,
):
    """Sample one group and show which tokens a method trains, with what credit, and where the completions branch."""
    if output and output.suffix not in (".html", ".svg"):
        raise UserError(f"--output {output} must end in .html or .svg.")
    settings = SimpleNamespace(**context.params)
    if adapter:
        ask_as_trained(settings, adapter, on_command_line(context))
    settings.metric = ""  # there is no evaluation here
    policy, problems, _ = find_policy(settings)
    if adapter:
        policy.model = load_adapter(policy.model, adapter, "adapter", settings.model)
    if index is not None and index >= len(problems):
        raise UserError(f"--index {index} is too high: there are {len(problems)} training problems, from 0.")
    for chosen in range(min(20, len(problems))) if index is None else [index]:
        [rollout] = roll_out(policy, problems[chosen:chosen + 1], [[]], settings, settings.seed)
        if rollout.has_signal:
            break
    shown = list(show_group(policy, rollout, settings))
    console.print(*shown, sep="\n")
    if output:
        paper = Console(record=True, width=max(80, console.width), file=io.StringIO(), force_terminal=True, **AS_IT_IS)
        paper.print(*shown, sep="\n")
        (paper.save_html if output.suffix == ".html" else paper.save_svg)(str(output))
        console.print(f"Written: {output}")


def show_group(policy: Policy, rollout: Rollout, settings) -> Iterator:
    """What `inspect` shows of a group: the problem, each method's credit on each completion, the branch points."""
    trie = Trie(rollout.completions)
    yield Text.assemble(("Problem  ", "bold"), rollout.problem.question, "  ", ("answer ", "bold"),
                        rollout.problem.answer)
    if not rollout.has_signal:
        yield Text("All rewards of this group are equal, so no method learns anything from it.", "yellow")
    for method in get_args(Method) if settings.method == "all" else [settings.method]:
        weights = {}
        if rollout.has_signal:
            weights = credit_weights(method, trie, rollout.rewards, settings, random.Random(settings.seed))
        tokens = sum(map(len, trie.paths))
        yield Text.assemble(("\n" + method, "bold"), f"  {len(weights)} of {len(trie.tokens)} nodes ({tokens} tokens) "
                            "are trained: ", ("[+more likely]", "green"), " ", ("[-less likely]", "red"), ", up to +++")
        for number, (path, reward) in enumerate(zip(trie.paths, rollout.rewards), 1):
            yield Text.assemble((f"{number:2}  reward {reward:g}  ", "bold"), credit_text(policy, trie, path, weights))
    yield branches_table(policy, trie, rollout.rewards)


def token_text(policy: Policy, tokens: list[int]) -> str:
    return policy.tokenizer.decode(tokens).replace("\n", "\u21b5")


def credit_text(policy: Policy, trie: Trie, path: list[int], weights: dict[int, float]) -> Text:
    """One completion: trained tokens in brackets with one to three signs for their share of the largest weight, runs of
    equal strength together; the others dim."""
    most, text = max(map(abs, weights.values()), default=1.0), Text()
    strength = lambda node: math.ceil(3 * abs(weights[node]) / most - 1e-6) if node in weights else 0  # noqa: E731
    for (level, up), run in groupby(path, lambda node: (strength(node), weights.get(node, 0) > 0)):
        words = token_text(policy, [trie.tokens[node] for node in run])
        color = ("green" if up else "red") + (" bold" if level == 3 else "")
        text.append(*((f"[{'+-'[not up] * level}{words}]", color) if level else (words, "dim")))
    return text


def branches_table(policy: Policy, trie: Trie, rewards: list[float], most: int = 10) -> Table:
    """The branch points that most completions pass: what they share, then each continuation with its mean reward."""
    through, children = rewards_through(trie, rewards), defaultdict(list)
    for node, parent in enumerate(trie.parents):
        children[parent].append(node)
    table = Table("after", "comes", "completions", "mean reward", "credit A(v|p)", title="\nbranch points",
                  title_justify="left")
    mean = lambda node: sum(through[node]) / len(through[node])  # noqa: E731
    points = sorted((p for p in children if len(children[p]) > 1), key=lambda p: -len(through[p]))
    for parent in points[:most]:
        before = [trie.tokens[n] for n in [*reversed(ancestors(trie, parent, set())), parent]] if parent >= 0 else []
        label = ("\u2026" if len(before) > 6 else "") + token_text(policy, before[-6:]) if before else "(the prompt)"
        for node in sorted(children[parent], key=lambda n: -len(through[n])):
            token = f'"{token_text(policy, [trie.tokens[node]])}"'  # quoted, for many begin with a space or are one
            table.add_row(label, token, str(len(through[node])), f"{mean(node):.2f}",
                          f"{mean(node) - mean(parent):+.2f}")
            label = ""
        table.add_section()
    return table


CURVES = {"reward": lambda m: m["reward"], "accuracy": lambda m: m["accuracy"], "length": lambda m: m["length"],
          "trained": lambda m: m["tokens_trained"] / m["tokens_generated"], "signal": lambda m: m["signal"],
          "distinct": lambda m: m["distinct"], "memory": lambda m: m["peak_memory"] / 2**30}
Curve = Literal[tuple(CURVES)]


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN...")],
    what: Annotated[Curve, option("trained is the share of tokens, memory in GiB.", panel="Run")] = "reward",
    smooth: Annotated[int | None, option("Show means over this many steps, and list them.", panel="Run", min=1,
                                         show_default="a tenth of them")] = None,
    output: Annotated[Path | None, option("Also draw it into this .png or .svg file.", panel="Run")] = None,
):
    """Draw the curves of one or more runs over each other, in the terminal and as a picture."""
    curves = {}
    for run in runs:
        if not (rows := [row for _, row in read_rows(run / "metrics.jsonl")]):
            raise UserError(f"{run} has no steps yet.")
        curves[str(run)] = [CURVES[what](row) for row in rows]
    width = smooth or max(1, max(map(len, curves.values())) // 10)
    smoothed = {run: [sum(part := values[max(0, i - width + 1):i + 1]) / len(part) for i in range(len(values))]
                for run, values in curves.items()}
    console.print(f"{what}, mean over {width} steps")
    console.print(*draw_curves(smoothed, width, min(console.width, 100) - 9, 16), sep="\n")
    if output:
        save_picture(curves, smoothed, what, output)
        console.print(f"Written: {output}")


def draw_curves(curves: dict[str, list[float]], every: int, width: int, height: int) -> list[Text]:
    """Lines of text: the curves over each other, each with a sign and a colour of its own, then what they are, with the
    values after each `every` steps."""
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    longest, signs = max(map(len, curves.values())), "*o+x#@%="
    colors = ("cyan", "magenta", "yellow", "green", "red", "blue", "white", "bright_black")
    grid = [[(" ", "")] * width for _ in range(height)]
    for number, values in enumerate(curves.values()):
        for column in range(width):
            step = round(column * (longest - 1) / max(1, width - 1))
            if step < len(values):
                row = round((high - values[step]) / ((high - low) or 1) * (height - 1))
                grid[row][column] = (signs[number % 8], colors[number % 8])
    labels = {0: high, height // 2: high - (high - low) * (height // 2) / (height - 1), height - 1: low}
    lines = [Text.assemble(f"{labels[row]:8.3f}" if row in labels else " " * 8, "\u2502", *cells)
             for row, cells in enumerate(grid)]
    lines.append(Text(" " * 8 + "\u2514" + "\u2500" * width + "\n" + " " * 9 + "1" + f"{longest}".rjust(width - 1)))
    for number, (run, values) in enumerate(curves.items()):
        told = " ".join(f"{value:.3g}" for value in values[every - 1::every] or values[-1:])
        lines.append(Text.assemble((f"{signs[number % 8]} ", colors[number % 8]), f"{run}: {told}"))
    return lines


def save_picture(curves: dict, smoothed: dict, what: str, path: Path) -> None:
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--output {path} must end in .png or .svg.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("Drawing a picture needs one more package: pip install matplotlib") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (run, values) in enumerate(smoothed.items()):
        axes.plot(range(1, len(values) + 1), curves[run], color=f"C{number}", alpha=0.2)
        axes.plot(range(1, len(values) + 1), values, color=f"C{number}", label=run)
    axes.set(xlabel="step", ylabel=what)
    axes.legend()
    figure.savefig(path)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the merged checkpoint.")],
    dtype: Annotated[str, option("Of the merged weights: auto (the model's own), float32 or bfloat16. bfloat16 rounds "
                                 "the update away where it is under a 500th of a weight.", panel="Model")] = "auto",
):
    """Write base model and adapter as one plain checkpoint, for vLLM, llama.cpp's converter or transformers."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give a new folder.")
    trained = adapter_settings(run)
    name = trained["model"]
    console.print(f"Loading {name} ...")
    model, tokenizer = load_model(name, "cpu", "float32")  # so that only the sum is rounded
    kind = stored_dtype(name) if dtype == "auto" else pick_dtype(dtype, "cpu", None)
    merged = load_adapter(model, run, "adapter", name).merge_and_unload(safe_merge=True).to(kind)
    try:
        merged.generation_config.validate(strict=True)
    except ValueError:  # some checkpoints set a temperature without this, and could not be saved
        merged.generation_config.do_sample = True
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if (own := Path(base_of(model).name_or_path) / "prompt.txt").is_file():
        shutil.copy(own, out)
    console.print(f"Written: {out}, {gigabytes(sum(p.numel() * p.element_size() for p in merged.parameters()))} in "
                  f"{str(merged.dtype).split('.')[1]}")
    if "task" in trained and not is_bundled(name):
        asked = "".join(f" --{key.replace('_', '-')} {shlex.quote(str(trained[key]))}" for key in
                        ("prompt", "shots", "max_new_tokens", "reward") if trained.get(key) is not None)
        console.print(f"Check it: python tokenrl.py eval {trained['task']} --model {shlex.quote(out.as_posix())}{asked}"
                      + data_dir_option(trained["data_dir"]))


def main(arguments: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft's use of it, not the user's
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a table's lines on a console that cannot show them
    try:
        app(arguments)
    except Exception as error:
        if isinstance(error, UserError):
            sentence = str(error)
        elif getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            sentence = "The disk is full; what was saved before is intact. Make room; a training goes on with --resume."
        elif out_of_memory(error):
            sentence = ("Out of memory. What helps most, in this order: a lower --batch-rows, a lower "
                        "--max-pack-tokens, a lower --max-new-tokens. Check with --dry-run.")
        elif isinstance(error, OSError):
            sentence = str(error)
        else:
            raise
        errors.print(Text("Error:", "bold red"), sentence, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
