# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.11,<3", "transformers>=5.17,<6", "peft>=0.20,<1", "typer>=0.20,<1", "rich>=14,<16"
# ]
# ///
"""tokenrl: teach a language model to reason with reinforcement learning, on the hardware you have.

    python tokenrl.py train svamp                   # bundled demo on a laptop, Qwen2-1.5B on a GPU
    python tokenrl.py train svamp --method t-spmo   # credit only where completions part
    python tokenrl.py eval svamp --adapter runs/svamp-s-grpo
    python tokenrl.py prep questions.csv            # your own questions and answers

Only a LoRA adapter is trained, and the gradient is spent on few of the sampled tokens (S-GRPO and
T-SPMO, Lee & Tong 2025, arXiv 2504.20834). The idea that keeps this file small: sample a group of
G completions of one prompt and put them into a trie: a node is one token after one exact prefix. A
method is a credit function, which gives weights to some of the nodes, and

    loss = - sum over weighted nodes n of  weight(n) * log pi(token(n) | prefix(n))

Only ancestors of weighted nodes need a forward pass and only their parents need logits. They go
through the model, after the prompt, as ONE sequence where each token sees its ancestors: exactly.

Left out: critic, reward model, a second copy of the model (the KL term switches the adapter off),
old policy and clipping (one update per rollout is on-policy, and --target-kl limits each step).

The file reads as the data flow: problem -> prompt -> G completions -> rewards -> trie -> weights ->
packed forward -> loss -> step.
"""

import contextlib
import csv
import ctypes
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import fmean, pstdev
from typing import Annotated, Literal, get_args
from unicodedata import normalize

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

__version__ = "2.0.0"


class _Lazy:
    """A module imported at its first use, so that help and data preparation answer at once."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


torch, transformers, peft = _Lazy("torch"), _Lazy("transformers"), _Lazy("peft")
accelerate, numpy = _Lazy("accelerate"), _Lazy("numpy")
filelock, safetensors = _Lazy("filelock"), _Lazy("safetensors.torch")
AS_IT_IS = {"markup": False, "emoji": False, "highlight": False}  # the user's text is no markup
console, errors = Console(**AS_IT_IS), Console(stderr=True, **AS_IT_IS)


class UserError(Exception):
    """Something the user can put right: shown as one sentence, never as a traceback."""


def refuse(bad, sentence: str) -> None:
    if bad:
        raise UserError(sentence)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    pattern = "(out of|can't allocate|not enough) memory"
    return isinstance(error, MemoryError) or bool(re.search(pattern, str(error)))


@contextlib.contextmanager
def explained(sentence: str, kinds=Exception, show=first_line):
    """Whatever a user's file, model or code raises inside becomes a UserError that begins so."""
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(f"{sentence}: {show(error)}") from None


# ---- 1. Settings: every option of train, eval and inspect, once ---------------------------------

DATA = Path(__file__).resolve().parent / "data"
ALL, TRAIN, SHOW, ASK = "train eval inspect", "train", "train inspect", "train eval"
app = typer.Typer(
    help="Teach a language model to reason by reinforcement learning on a few sampled tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def option(default, help: str, panel: str, on: str = ALL, *names, low=0, high=1e9, shown=True):
    """A field of Settings that is an option of the commands named in `on`."""
    info = typer.Option(*names, help=help, rich_help_panel=panel, show_default=shown)
    return field(default=default, metadata={"info": info, "on": on.split(), "range": (low, high)})


@dataclass
class Settings:
    """How a model is asked and trained, and where things are. A run's config.json holds it."""

    task: str = ""
    model: str = option("auto", "Hub id or folder; auto: Qwen2-1.5B, or demo.", "Main")
    method: str = option("s-grpo", "s-grpo, t-spmo, grpo, FILE.py:function.", "Main", SHOW)
    steps: int = option(100, "Training steps.", "Main", TRAIN, low=1)
    lr: float = option(1e-3, "Peak learning rate; warms up, decays.", "Main", TRAIN, high=1e20)
    start_from: str = option("", "Run to start from.", "Main", TRAIN, "--adapter", shown="none")
    seed: int = option(0, "Of problems, samples, adapter.", "Main", high=2**32 - 1)

    alpha: int = option(4, "s-grpo: train the first N tokens.", "Credit", SHOW)
    p: float = option(0.3, "s-grpo: chance of each later token.", "Credit", SHOW, high=1)
    k: int = option(0, "s-grpo: at most N in all; 0: no limit.", "Credit", SHOW)
    replay: int = option(0, "Extra groups from inside completions.", "Credit", TRAIN)

    prompts_per_step: int = option(8, "Problems asked per step.", "Rollout", TRAIN, low=1)
    group_size: int = option(8, "Completions per problem (G).", "Rollout", SHOW, low=2)
    max_new_tokens: int = option(200, "Longest completion.", "Rollout", low=1)
    temperature: float = option(1.0, "Of the samples.", "Rollout", low=0.01, high=100)
    batch_rows: int = option(64, "Completions decoded at a time.", "Rollout", low=1)
    prompt: str = option("auto", "auto, chat, plain, or a {question} file.", "Rollout")
    shots: int | None = option(None, "Worked examples.", "Rollout", shown="all")
    stop: str = option("", "Ends a completion; plain: \\nQuestion:", "Rollout", shown="none")

    target_kl: float = option(0.001, "Largest KL of a step; 0: no limit.", "Update", TRAIN)
    beta: float = option(0.0, "Weight of the KL to the base model.", "Update", TRAIN)
    lora_rank: int = option(16, "Rank of the LoRA matrices.", "Update", TRAIN, low=1)
    lora_alpha: float = option(32.0, "Scale: alpha / rank.", "Update", TRAIN)
    lora_targets: str = option("all-linear", "Modules, with commas.", "Update", TRAIN)
    lora_layers: float = option(
        1 / 3, "Share of layers, from the last.", "Update", TRAIN, low=1e-3, high=1, shown="1/3"
    )
    max_pack_tokens: int | None = option(
        None, "Tokens of an update's pass.", "Update", TRAIN, low=1, shown="512; 4096 with CUDA"
    )

    validate_every: int = option(20, "Steps between validations; 0: none.", "Run", TRAIN)
    patience: int = option(5, "Validations without gain before the end.", "Run", TRAIN, low=1)
    save_every: int = option(10, "Steps between saves.", "Run", TRAIN, low=1)
    eval_problems: int | None = option(None, "Test problems asked.", "Run", TRAIN, shown="all")

    reward: str = option("number", "number, exact, regex:..., FILE.py:function.", "Data")
    metric: str = option("", "A KPI to report too; same forms.", "Data", ASK, shown="none")
    data_dir: Path = option(DATA, "Where prepared tasks live.", "Data", shown="data/ here")
    device: str = option("auto", "auto, cpu, cuda or mps.", "Machine")
    dtype: str = option("auto", "auto, float32, bfloat16, float16.", "Machine")


def flag(key: str) -> str:
    """The name of a field of Settings on a command line."""
    return {"task": "TASK", "start_from": "--adapter"}.get(key, "--" + key.replace("_", "-"))


def check_settings(settings: Settings) -> None:
    """Raise for a value of a wrong type or out of range, on a command line or in a config.json."""
    for item in fields(Settings):
        value, kinds = getattr(settings, item.name), get_args(item.type) or (item.type,)
        fits, wanted = isinstance(value, kinds), kinds[0].__name__
        if kinds[0] in (int, float):
            low, high = item.metadata["range"]
            fits = type(value) in (int, *kinds) and (value is None or low <= value <= high)
            wanted += f" from {low:g} to {high:g}"
        refuse(not fits, f"{flag(item.name)} {value} must be {wanted}.")


# ---- 2. Answers: reading the final number or text of a completion -------------------------------

# What Unicode, Markdown and LaTeX spell in many ways gets one spelling, in this order.
_SAME = str.maketrans(
    "‐‒–—―−⁄∕’‘“”„«»×·⋅∙∗≈", '------//\'\'"""""*****=', "\u200b\u200c\u200d\u2060\ufeff"
)
_VERBS = "is|are|was|were|be|to|of|equals|ist|sind"  # before a minus in words
_SPELLINGS = [
    (r"(?<![\w*\\])[*_]++(?=\S)|(?<=[^\s*_])[*_]++(?![\w({-])|`", ""),  # **bold**, _it_, `code`
    (r"(?<=\d)(?=[¼-¾⅐-⅞])", " "),  # 1½ is 1 1/2
    (r"[⁺⁻]?[⁰¹²³⁴-⁹]+", r"^\g<0>"),  # 10³ is not 103
    (r"[₀-₉]+", r"_\g<0>"),
    # By character: on a whole text of combining marks, normalize() takes quadratic time.
    (r"[A-Za-z][\u0300-\u036f]|[^\x00-\x7f]", lambda m: normalize("NFKC", m[0]).translate(_SAME)),
    (r"\n[-*+] +", "\n"),  # the dash of a list is no minus
    (rf"(?im)(^|[=:,;(] ?|\b(?:{_VERBS}) )(?:minus|negative) (?=[\d.$€£])", r"\1-"),
    (r"\\\\(?![a-zA-Z])", ";"),  # the end of a row
    (r"\\!\s*|\\[()\[\]]|\\(?:left|right|displaystyle)(?![a-z])", ""),
    (r"\\[,;:> ]|~|\\(?:q?quad|thinspace|implies|[rR]ightarrow|therefore)(?![a-z])", " "),
    (r"\\([$%#&_])|\{(,)\}", r"\1\2"),
    (r"\\(?:text|math|mbox|underline)[a-z]*\s*(?:\{([^{}]*)\})?", r"\1"),
    (r"([-_^])\{([^{}]*)\}(?!\d)", r"\1\2"),
    (r"\\(?:times|cdot)(?![a-z])", "*"),
    (r"\\approx(?![a-z])", "="),
    (r"\^ ?\\circ|\\degree", "°"),
    (r"\\pi(?![a-z])", "π"),
    (r"(?<=\d)\s*(?=\\[dtc]?frac)", " "),  # 2\frac{1}{2} is 2 1/2
    (r" +", " "),
]
_FRACTION = re.compile(r"\\[dtc]?frac\s*(\{[^{}\\]*\}|\d)\s*(\{[^{}\\]*\}|\d)")
_MARK = re.compile(  # but no heading
    r"""(?i)\#{4,}+(?!\ ?(?:step|\d\.\ [a-z].{,80}\n)) | \\f?box(?:ed)?\s*\{ | <answer>
    | \b(?:answer|antwort|réponse|respuesta)["']?\s?(?:(?:ist?|lautet|est?)\b:?|[:=])""",
    re.VERBOSE,
)
_CURRENCY = r"(?:[A-Z]{0,3}[$€£¥₹]|EUR|USD|GBP|CHF|JPY|CAD|AUD|INR|CNY|SEK|NOK|DKK|PLN|Rs\.?)"
_SCALES = dict(hundred=2, thousand=3, lakh=5, million=6, crore=7, billion=9, trillion=12, bn=9)
_SCALES |= dict(millon=6, milliard=9, mrd=9, mio=6, mn=6, tausend=3, tsd=3, k=3, m=6, b=9)
_SCALE = "|".join(word for word in _SCALES if len(word) > 1)
_NUMBER = re.compile(
    rf"""
    (?: (?P<odd> (?: \\[a-zA-Z]+(?:[_^[]\w+]?)? | [√±/] | [^\W\d_]_?\d*(?=\()  # \sqrt 2, f(2)
        | \b[nxyz](?:\^\d)?\ ?[-+*] | -(?=\ ?[-+(]) ) [\ (]* )  # x + 2, -(2)
      | (?<![\w.^]) (?<!\^-) )  # not in a word, no exponent of a unit
    (?P<sign> (?<![\w)\].%]) (?: (?<![\w)\].%]\ ) -\ ?  # - 5, but not in 10 - 5
      | (?<![\d)%]\ ) - ) )?  # is -5, but not in 10 -5
    (?: {_CURRENCY}\ ? (?P<sign2> - )? )?
    (?P<digits> [.,]?\d+ (?: (?: [.,:'_ ] | ,\ (?=\d{{3}}\b) ) \d+ )* )  # see _decimal
    (?: \ ?/\ ? (?P<under> \d+ (?:[.,]\d+)* ) )?
    (?: (?: [eE] | \ ?[*x]\ ?10\ ?\^\ ? ) (?P<tens> [-+]?\d+ ) | \ ?\^\ ? (?P<power> [-+]?\d+ ) )?
    (?: \ ?(?P<scale> (?i:{_SCALE})(?=e?[ns]?\b) | (?<!\ )[kKMB]\b ) )?
    """,
    re.VERBOSE,
)
_END = re.compile(  # what may stand behind a number; anything else says that it goes on
    r"""
    (?! \(\d | \ ?[xyznRπ](?![^\W\d_]) | [^\W\d_]++\d(?<!m[23]\b) | [eE][-+] )  # not 0.(3), 2x
    (?! [^\w(,]{,2}(?:\ ?[^\W\d_]++){,2}\ (?:[-+*/;&x]|and|or|to|plus|minus|times|over|by
        |und|oder|bis|et|ou|y|o)(?:\W{,3}\d|\ (?:a|one)\ (?:half|third|quarter))  # not 5 or 6
      | \ ?[^\W\d_]+[.,]?\ \d+(?:\ ?[^\W\d_]+)?\.?(?:\n|\Z) )  # not 2h 30m, 1 in 5
    [^\w\n.,:;|&<>(+*/÷^√∞\\\u0300-\u036f-]*+  # a bracket, a currency, percent
    (?: \Z | [\n(] | [^\W\d_] | [-/]+\ ?[^\W\d_]{2}  # a unit: m, /hour, -year-old
      | [.,:;|&<>]++ (?<!\.\.) (?! [-+($€£\[ ]* [\d\\] ) )  # not 3:30, 1, 2 or 0.33...
    """,
    re.VERBOSE,
)
_REASON = re.compile(r"(?<=.)[.!] (?=[A-Z(])| \((?=[^()]*=)|,? (?:because|since|where|denn|weil)\b")
_CELL_END = re.compile(r"(?!(?<=\d)[-.] ?[^\W\d_])[.,-]*+ ?[^\s\d?!=:;]*(?:\^?[23])?")  # not 3-May


def _decimal(digits: str, decimal: str) -> Fraction:
    """Raises ValueError where `digits` is no decimal number, with or without thousands groups."""
    for mark, other in (".,", ",."):  # without a decimal mark: what can be read with a point is
        groups = rf"(?!0)(?:\d{{1,3}}([{other}'_ ])\d{{3}}(?:\1\d{{3}})*|\d\d?(?:,\d\d)+,\d{{3}})"
        if mark in (decimal or ".,") and re.fullmatch(rf"(?:\d*|{groups})(?:[{mark}]\d+)?", digits):
            return Fraction(re.sub(rf"[^\d{mark}]", "", digits).replace(",", "."))
    raise ValueError


def _value(match: re.Match | None, decimal: str) -> Fraction | None:
    """What a match of _NUMBER is worth, or None where it is not understood as a whole."""
    if not match or match["odd"] or not _END.match(match.string, match.end()):
        return None
    under, power = match["under"], match["power"]
    whole, _, digits = match["digits"].rpartition(" ") if under else ("", "", match["digits"])
    try:
        value = _decimal(digits, decimal) / _decimal(under or "1", decimal)
        exponent = int(power or match["tens"] or 0)
        if (whole and not 0 < value < 1) or (power and under) or abs(exponent) * len(digits) > 4300:
            return None
        value += _decimal(whole or "0", decimal)  # a mixed number
        value = value**exponent if power else value * Fraction(10) ** exponent
    except (ValueError, ZeroDivisionError):
        return None
    value *= 10 ** _SCALES.get((match["scale"] or "").lower(), 0)
    return -value if match["sign"] or match["sign2"] else value


def _plain(text: str, decimal: str = "") -> str:
    def quotient(match: re.Match) -> str:
        top, under = (part.strip("{} \n") for part in match.groups())
        a, b = (_value(_NUMBER.fullmatch(part), decimal) for part in (top, under))
        try:
            return f"{a / b} "
        except (TypeError, ValueError, ZeroDivisionError):  # no numbers, or too long to write
            return rf"\frac({top})/({under})"

    for pattern, plain in _SPELLINGS:
        text = re.sub(pattern, plain, text)
    for _ in range(3):  # fractions in fractions, the inner ones first
        text = _FRACTION.sub(quotient, text)
    return text


def _final_parts(text: str) -> list[str]:
    """The line behind each mark that something follows, the last mark first; at the end of the
    list, all the text behind the last of these marks (without a mark, the whole text)."""
    text = text.rpartition("</think>")[2]
    lines, start, end = [], 0, None
    for mark in reversed(list(_MARK.finditer(text))):
        part, end = text[mark.end() : end], mark.start()
        depth = 1
        for brace in re.finditer(r"[{}]", part if mark[0].endswith("{") else ""):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                part = part[: brace.start()]
                break
        if line := part.lstrip().split("\n")[0].split("</")[0].strip():
            lines.append(line)
            start = start or mark.end()
    return [re.sub(r"[{}]", " ", part).strip() for part in (*lines, text[start:])]


def read_number(text: str, decimal: str = "") -> Fraction | None:
    """The number that the whole text is, but for currency, percent or a unit; None if it is not
    one. decimal: "," or "." is the decimal mark; "" reads 1,234 as a group and 3,5 as a decimal."""
    match = _NUMBER.match(_plain(text, decimal).strip())
    unit = match and _CELL_END.fullmatch(match.string, match.end())
    return _value(match, decimal) if unit else None


def extract_number(text: str, decimal: str = "") -> Fraction | None:
    """The final answer of a completion, or None: the first number behind the last mark (#### 5,
    \\boxed{5}, the answer is 5), else the last number. A number is read whole or not at all."""
    *lines, rest = _final_parts(_plain(text, decimal))
    for line in lines:
        sentence = _REASON.split(line)[0]  # of: 5 apples (5 + 3 = 8)
        sentence = re.sub(r"(?:[,;]| and| or) ?[a-zA-Z]_?\d? ?=", " & ", sentence)  # x=5, y=6
        if sides := [side for side in sentence.split("=") if re.search(r"\d", side)]:
            return _value(_NUMBER.search(sides[-1].strip()), decimal)
    numbers = list(_NUMBER.finditer(rest))
    return _value(numbers[-1], decimal) if numbers else None


def number_reward(text: str, answer: str, decimal: str = "") -> float:
    """1.0 if the final answer of `text` is the number `answer`, else 0.0."""
    found = extract_number(text, decimal)
    wanted = read_number(str(answer), decimal) or read_number(str(answer))
    return float(found is not None and found == wanted)


def final_text(text: str) -> str:
    """What exact_reward compares: the line behind the last mark, or the content of its \\boxed{},
    else the last line; without Markdown, quotes and closing full stop."""
    line = " ".join(_final_parts(_plain(text))[0].split("\n")[-1].split())
    return line.strip(" '\"$*_").rstrip(" '\"$*_.") or line


def exact_reward(text: str, answer: str) -> float:
    """1.0 if the final answer of `text` is the text `answer`, capitals aside, else 0.0."""
    return float(final_text(text).casefold() == final_text("#### " + answer).casefold())


# ---- 3. Tasks: rewards, files, problems, prep ---------------------------------------------------

SVAMP_URL = "https://raw.githubusercontent.com/arkilpatel/SVAMP/main/SVAMP.json"
SVAMP_SHA256 = "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e"

# Worked examples for the prompt, a question and below it the answer: `prep` writes them to
# examples.jsonl, where they can be edited. Products go by steps that leave no direct answer.
STORIES = """\
A kiosk had 24 kites. It sold 9 kites and 3 balls. How many kites are left?
Only the kites count: 24 - 9 = 15 kites are left.
#### 15

Mina fills 4 bags with 6 shells in each bag. How many shells is that?
4 bags of 6 shells are 4 * 6 = 24 shells.
#### 24

After Jon gave away 7 stamps he had 12 left. How many stamps did he have before?
He had the 12 that are left and the 7 he gave away: 12 + 7 = 19 stamps.
#### 19"""
STORY_EXAMPLES = [
    dict(zip(("question", "answer"), story.split("\n", 1))) for story in STORIES.split("\n\n")
]
FACTORS = (47, 36), (83, 52), (8, 59), (64, 27)


def product_example(a: int, b: int) -> dict:
    tens, ones = b // 10 * 10, b % 10
    answer = f"{a} * {b} = {a} * {tens} + {a} * {ones}\n{a} * {tens} = {a * tens}\n"
    answer += f"{a} * {ones} = {a * ones}\n{a * tens} + {a * ones} = {a * b}\n#### {a * b}"
    return {"question": f"What is {a} * {b}?", "answer": answer}


MULTIPLY_EXAMPLES = [product_example(a, b) for a, b in FACTORS]


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    type: str = ""


@dataclass
class Task:
    train: list[Problem]  # empty in a task for evaluation only
    test: list[Problem]
    examples: list[dict]
    decimal: str = ""


def is_code(option: str) -> bool:
    """Whether an option is of the form FILE.py:function."""
    return option.rpartition(":")[0].endswith(".py") and not option.startswith("regex:")


def method_name(method: str) -> str:
    """What a method is called in names of runs and tables."""
    return method.rpartition(":")[2]


def load_function(option: str) -> Callable:
    """The function that FILE.py:function names."""
    path, _, name = option.rpartition(":")
    fault = f"{name!r} cannot be loaded from {path}"
    sys.path.append(str(Path(path).resolve().parent))  # for what it imports from beside it
    with explained(fault, BaseException, repr), contextlib.chdir("."):  # it may exit, or move
        function = runpy.run_path(path)[name]
        if not callable(function):
            raise TypeError("no function")
    return function


def reward_function(option: str, decimal: str = "") -> Callable[[str, str], float]:
    """(completion, reference answer) -> reward in [0, 1], by number, exact, FILE.py:function or
    regex:PATTERN, where {answer} stands for the reference."""
    if option == "exact":
        return exact_reward
    if option == "number":
        return partial(number_reward, decimal=decimal)
    known = option.startswith("regex:") or is_code(option)
    refuse(not known, f"{option!r} is not number, exact, regex:PATTERN or FILE.py:function.")
    pattern = re.sub(r"\{answer\}(?=[?*+{])", "(?:{answer})", option.removeprefix("regex:"))

    def matches(text: str, answer: str) -> bool:
        return bool(re.search(pattern.replace("{answer}", re.escape(answer)), text))

    score = load_function(option) if is_code(option) else matches

    def reward(text: str, answer: str) -> float:
        fault = f"{option} fails on {text!r} where {answer!r} is right"
        with explained(fault, BaseException, repr), contextlib.chdir("."):
            value = round(float(score(text, answer)), 6)  # 0.7 + 0.2 + 0.1 is 1
            if not 0 <= value <= 1:
                raise ValueError(f"{value} is not from 0 to 1")
        return value

    if score is matches:
        reward("", "Paris")  # refuses a wrong pattern
    return reward


def read_text(path: Path) -> str:
    """Text as UTF-8, or as Windows writes it: UTF-16 with a byte order mark, or Windows-1252."""
    refuse(not path.is_file(), f"There is no file {path}.")
    for encoding in ("utf-16", "utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeError):
            return path.read_text(encoding)
    raise UserError(f"{path} is not text; save it as UTF-8.")


def read_rows(path: Path) -> list[tuple[int, dict]]:
    """(line, row) of JSONL, of a JSON array, or of a sheet: CSV with a header line."""
    text = read_text(path)
    with explained(f"{path} does not hold rows"):
        if path.suffix.lower() not in (".json", ".jsonl"):
            mark, table = re.fullmatch(r'(?is)(?:"?sep=(.)"?\n)?(.*)', text).groups()  # Excel's own
            style = {"skipinitialspace": True, "strict": True}
            style["delimiter"] = mark or max(",;\t", key=table.split("\n")[0].count)
            reader = csv.DictReader(io.StringIO(table), **style)
            names = [name for name in reader.fieldnames or () if name]
            refuse(len(names) > len({*names}), f"{path}: rename one of two equal columns: {names}.")
            return [(reader.line_num + bool(mark), row) for row in reader if any(row.values())]
        if not text.lstrip().startswith("["):  # JSONL is an array without its commas
            text = "[" + ",\n".join(line.strip() or "{}" for line in text.split("\n")) + "]"
        return [(line, {**row}) for line, row in enumerate(json.loads(text), 1) if row != {}]


def write_atomically(path: Path, text: str) -> None:
    """Whenever it is killed, the old text is there or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several processes may write it
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)


def write_jsonl(path: Path, rows) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def to_problem(row: dict, question="question", answer="answer", decimal="") -> Problem:
    """A row's texts; of a worked answer what follows the last ####, as in GSM8K. JSON's numbers get
    the decimal mark of the others."""
    cells = [row.get(column) for column in (question, answer, "type")]
    asked, wanted, kind = ("" if cell is None else str(cell).strip() for cell in cells)
    if isinstance(cells[1], float):
        wanted = f"{cells[1]:.15g}".replace(".", decimal or ".")  # not 0.30000000000000004
    return Problem(asked, wanted.rpartition("####")[2].strip(), kind)


def fault_of(problem: Problem, reward: str, decimal: str) -> str:
    """Why no answer can be found right, or nothing."""
    if not problem.question or not problem.answer:
        return "no answer" if problem.question else "no question"
    if reward == "number" and read_number(problem.answer, decimal) is None:
        return f"the answer {problem.answer!r:.60} is not a number (--reward)"
    broken = "\n" in problem.answer or _MARK.search(problem.answer)
    if reward == "exact" and (broken or not final_text("#### " + problem.answer)):
        return f"no completion can give {problem.answer!r:.60}"
    return ""


def decimal_mark(answers: list[str]) -> str:
    """The decimal mark, "" if it makes no difference; one 3,5 tells how to read all 1,200."""
    unclear = [a for a in answers if read_number(a, ",") != read_number(a, ".")]
    commas = [a for a in unclear if read_number(a, ".") is None]
    points = [a for a in unclear if read_number(a, ",") is None]
    if unclear and bool(commas) == bool(points):
        shown = " and ".join(commas[:1] + points[:1] or unclear[:2])
        raise UserError(f"{shown} can be read in two ways: say --decimal , or --decimal .")
    return "," if commas else "." if points else ""


def file_problems(path: Path, question: str, answer: str, reward: str, decimal: str | None):
    """(problems, rejected rows, decimal mark) of a file."""
    rows = read_rows(path)
    columns = {column for _, row in rows for column in row if column}
    lacking = rows and not {question, answer} <= columns
    refuse(lacking, f"{path} has the columns {sorted(columns)}; see --question and --answer.")
    if decimal is None:
        texts = [row for _, row in rows if isinstance(row.get(answer), str)]
        answers = [to_problem(row, question, answer).answer for row in texts]
        decimal = decimal_mark(answers) if reward == "number" else ""
    good, rejected = {}, []
    for line, row in rows:
        problem = to_problem(row, question, answer, decimal)
        key = " ".join(problem.question.casefold().split())
        reason = fault_of(problem, reward, decimal)
        if any(row.get(None, ())):
            reason = "more fields than the header (is 1,200 without quotes?)"
        elif before := not reason and good.get(key):
            old, new = before.answer, problem.answer
            kind = "repeat" if new == old or number_reward(new, old, decimal) else "contradiction"
            reason = f"a {kind}: {new!r:.60} after {old!r:.60}"
        if reason:
            rejected.append({"line": line, "reason": reason, "row": row})
        else:
            good[key] = problem
    return list(good.values()), rejected, decimal


def svamp_problems(source: Path | None) -> list[Problem]:
    """SVAMP (Patel et al. 2021), from a copy or the network."""
    address = source.absolute().as_uri() if source else SVAMP_URL
    with explained(f"{address} cannot be read (with a copy: prep svamp --source SVAMP.json)"):
        raw = urllib.request.urlopen(address, timeout=20).read()
    other = hashlib.sha256(raw).hexdigest() != SVAMP_SHA256
    refuse(other, "SVAMP.json is not as published: its sha256 differs.")
    problems = []
    for row in json.loads(raw):
        body, answer = row["Body"].strip(), str(row["Answer"]).removesuffix(".0")
        stop = "" if body.endswith((".", "?", "!", ",")) else "."
        kind = row["Type"].replace("Divison", "Division")  # the file misspells one
        problems.append(Problem(f"{body}{stop} {row['Question'].strip()}", answer, kind))
    return problems


def multiply_problems(digits: str, count: int, seed: int) -> list[Problem]:
    """Products of numbers with `digits` (3, or 2x1) digits; no unordered pair comes twice."""
    found = re.fullmatch(r"([1-9])(?:x([1-9]))?", digits)
    refuse(not found, f"--digits {digits!r} is neither 1 to 9, such as 3, nor a pair: 2x1.")
    sizes = int(found[1]), int(found[2] or found[1])
    left, right = (range(max(2, 10 ** (n - 1)), 10**n) for n in sizes)  # times 1 teaches nothing
    total, pairs = len(left) * len(right), {}
    most = min(total, 2 * (count + len(FACTORS)))  # a * b and b * a
    for i in random.Random(seed).sample(range(total), most):
        a, b = left[i // len(right)], right[i % len(right)]
        problem = Problem(f"What is {a} * {b}?", str(a * b), f"{len(str(a))}x{len(str(b))}")
        pairs.setdefault(frozenset((a, b)), problem)
    problems = [pairs[pair] for pair in pairs if pair not in map(frozenset, FACTORS)]
    few = f"--count {count}: --digits {digits} gives only {len(problems)} products."
    refuse(len(problems) < count, few)
    return problems[:count]


def write_task(name, problems, examples, test_share, seed, data_dir, decimal="", rejected=()):
    """Split at random and write data_dir/name; returns the sizes of train and test."""
    problems = random.Random(seed).sample(problems, len(problems))
    test = round(len(problems) * test_share) if 0 < test_share <= 1 else 0
    train, folder = len(problems) - test, data_dir / name
    refuse(not test, f"{len(problems)} usable problems: too few for --test-share {test_share}.")
    folder.mkdir(parents=True, exist_ok=True)
    files = {"rejected.jsonl": rejected, "task.json": [{"decimal": decimal}]}
    if not (folder / "examples.jsonl").exists():  # else they are the user's
        files["examples.jsonl"] = examples
    files["test.jsonl"] = [asdict(problem) for problem in problems[train:]]
    files["train.jsonl"] = [asdict(problem) for problem in problems[:train]]
    for file, rows in files.items():  # a full disk shows while the old files are there
        write_jsonl(folder / f"{file}.new", rows)
    (folder / "train.jsonl").unlink(missing_ok=True)  # comes last: where it is, all fit
    for file in files:
        os.replace(folder / f"{file}.new", folder / file)
    return train, test


def load_task(name: str, data_dir: Path, numeric: bool = True) -> Task:
    """A task that `prep` wrote; `numeric`: all answers must be numbers."""
    folder = data_dir / name
    source = name if name in ("svamp", "multiply") else "YOUR_FILE.csv"
    make = f"There is no task {name!r} in {data_dir} (another --data-dir?); make it with: "
    make += to_paste(["prep", source], Settings(data_dir=data_dir), [])
    refuse(not (folder / "train.jsonl").exists(), make)
    files = folder / "task.json", folder / "examples.jsonl"
    facts, examples = (read_rows(file) if file.exists() else [] for file in files)
    for line, row in examples:
        whole = all(isinstance(row.get(key), str) for key in ("question", "answer"))
        refuse(not whole, f"{files[1]} line {line} lacks a question or a worked answer as text.")
    shown = {row["question"].strip() for _, row in examples}
    decimal = facts[0][1].get("decimal", "") if facts else ""
    task = Task([], [], [row for _, row in examples], decimal)
    for path, problems in (folder / "train.jsonl", task.train), (folder / "test.jsonl", task.test):
        for line, row in read_rows(path):
            problems.append(to_problem(row))
            fault = fault_of(problems[-1], "number" if numeric else "", task.decimal)
            refuse(fault, f"{path} line {line}: {fault}.")
            copied = problems is task.test and problems[-1].question in shown
            refuse(copied, f"{path} line {line} is a worked example, too: drop one ({files[1]}).")
    refuse(not task.test, f"{folder / 'test.jsonl'} is empty.")
    return task


@app.command(epilog="Example: python tokenrl.py prep invoices.csv --question text --answer total")
def prep(
    what: Annotated[str, typer.Argument(help="svamp, multiply, or a CSV, JSONL or JSON file.")],
    source: Annotated[Path | None, typer.Option(help="A copy of SVAMP.json.")] = None,
    digits: Annotated[str, typer.Option(help="multiply: of both (3), or each (2x1).")] = "2",
    count: Annotated[int, typer.Option(help="multiply: how many problems.", min=2)] = 1000,
    question: Annotated[str, typer.Option(help="Column of the question.")] = "question",
    answer: Annotated[str, typer.Option(help="Column of the answer.")] = "answer",
    decimal: Annotated[Literal[",", "."] | None, typer.Option(help="The decimal mark.")] = None,
    reward: Annotated[str, typer.Option(help="As in train.")] = "number",
    name: Annotated[str, typer.Option(help="Of the task.", show_default="the file's")] = "",
    test_share: Annotated[float, typer.Option(help="Of the problems; 1: all.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    data_dir: Annotated[Path, typer.Option(help="Where tasks live.", show_default="data/")] = DATA,
):
    """Prepare a task: check and split problems into data/NAME/{train,test}.jsonl."""
    reward_function(reward)  # refuses a wrong one
    name = name or Path(what).stem
    ours = {"demo", "svamp", "multiply"} - {what}
    if not re.fullmatch(r"\w[\w.-]*", name) or name.lower() in ours:
        raise UserError(f"{name!r} cannot be the name of a task; use --name.")
    examples, rejected = STORY_EXAMPLES, []
    if what == "svamp":
        problems = svamp_problems(source)
    elif what == "multiply":
        problems, examples = multiply_problems(digits, count, seed), MULTIPLY_EXAMPLES
    else:
        inside = Path(what).resolve().parent == (data_dir / name).resolve()
        refuse(inside, f"{what} would be overwritten: move it, or use --name.")
        problems, rejected, decimal = file_problems(Path(what), question, answer, reward, decimal)
    for row in rejected[:10]:
        console.print(f"rejected line {row['line']}: {row['reason']}")
    split = test_share, seed, data_dir
    train, test = write_task(name, problems, examples, *split, decimal or "", rejected)
    counts = f"{train:,} to train, {test:,} to test, {len(rejected):,} in rejected.jsonl"
    counts += f", decimal mark {decimal}" if decimal else ""
    console.print(f"{data_dir / name}: {counts}", soft_wrap=True)
    chosen = Settings(reward=reward, data_dir=data_dir)
    command = to_paste(["train" if train else "eval", name], chosen, ["reward"])
    console.print("Next:", command, soft_wrap=True)


def fetch_model(name: str) -> str:
    """The folder of a model: `name` itself, or its copy in the hub's cache, downloaded first."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import model_info, snapshot_download, utils

    utils.logging.set_verbosity_error()  # each of its retries is a warning
    if not console.is_terminal:
        utils.disable_progress_bars()
    files = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]
    fetch = partial(snapshot_download, name, allow_patterns=files, ignore_patterns="*/*")
    try:
        with ThreadPool(1) as pool:  # the client's own time limit begins anew for each address
            pool.apply_async(model_info, [name]).get(5)  # seconds
        return fetch()
    except (utils.RepositoryNotFoundError, utils.HFValidationError):
        fault = "is no folder and not on the hub; check the spelling (private: hf auth login)"
    except Exception as error:  # of any kind
        with contextlib.suppress(FileNotFoundError):  # nothing there, or not all of it
            return fetch(local_files_only=True)
        reason = first_line(error) if str(error) else "no answer"
        fault = f"is no folder, and the hub fails ({reason}); try again, or give a folder or demo"
    raise UserError(f"{name} {fault}.")


# ---- 4. Policy: model, tokenizer, LoRA, prompts, memory meter, a card's graphs ------------------


@dataclass
class Policy:
    """A model, how it is asked and how its completions are scored."""

    model: object
    tokenizer: object
    prompt: str  # "chat", "plain", or a text with {question} in it
    examples: list[dict] = field(default_factory=list)
    score: Callable[[str, str], float] = number_reward  # (text, reference) -> reward in [0, 1]
    metric: Callable[[str, str], float] | None = None  # a KPI beside the reward, in evaluation only
    stop: str = ""
    ends: set[int] | None = None  # tokens that end a completion; None: all that the model knows

    def prompt_ids(self, question: str) -> list[int]:
        if self.prompt == "chat":
            roles = {"question": "user", "answer": "assistant"}
            turns = [{"role": roles[k], "content": row[k]} for row in self.examples for k in roles]
            turns.append({"role": "user", "content": question})
            return chat_ids(self.tokenizer, turns, add_generation_prompt=True)
        text = self.prompt.replace("{question}", question)
        if self.prompt == "plain":
            shots = [f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in self.examples]
            text = "".join(shots) + f"Question: {question}\nAnswer:"
        # A template may hold the begin token itself, and the end that some append is wrong here.
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        begin = self.tokenizer.encode("1")[:1]
        lacks = begin == [getattr(self.tokenizer, "bos_token_id", None)] and ids[:1] != begin
        return begin + ids if lacks else ids

    def text(self, completion: list[int]) -> str:
        text = self.tokenizer.decode(completion, skip_special_tokens=True)
        return text.split(self.stop)[0] if self.stop else text

    def finished(self, completion: list[int]) -> bool:
        """Whether it ended by itself; else it was cut off at max_new_tokens."""
        stopped = bool(self.stop) and self.stop in self.tokenizer.decode(completion)
        return stopped or completion[-1] in end_tokens(self.model, self.tokenizer)

    def reward(self, problem: Problem, completion: list[int]) -> float:
        if not self.finished(completion):  # or nothing would teach the model to stop
            return 0.0
        return self.score(self.text(completion), problem.answer)


def chat_ids(tokenizer, turns: list[dict], **options) -> list[int]:
    options |= {"return_dict": False, "enable_thinking": False}  # long thoughts would be cut off
    with explained("The chat template fails (use --prompt plain)"):
        return tokenizer.apply_chat_template(turns, **options)


def processes(cpu: bool = False):
    """What accelerate knows of this process and the others; the first call picks the device."""
    many = "LOCAL_RANK" in os.environ  # not WORLD_SIZE, which clusters set too
    return accelerate.PartialState(cpu=many and (cpu or not torch.accelerator.is_available()))


def pick_device(device: str) -> str:
    """The device to compute on; under torchrun or accelerate launch, that of this process."""
    state = processes(device == "cpu")
    if device == "auto" or state.num_processes > 1:
        return str(state.device)
    with explained(f"--device {device!r} is not there; use auto, cpu, cuda or mps"):
        torch.empty(0, device=device)
    return device


def pick_dtype(dtype: str, device: str, stored):
    """The dtype to compute in. auto: 16 bits, except if `stored` in 32 or where they are slow."""
    known = ("auto", "float32", "bfloat16", "float16")
    refuse(dtype not in known, f"--dtype {dtype} is none of {', '.join(known)}.")
    if dtype != "auto":
        return getattr(torch, dtype)
    if stored == torch.float32:
        return torch.float32
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def is_bundled(model: str) -> bool:
    return model == "demo" or Path(model).resolve() == DATA / "demo"


def stored_dtype(folder: str):
    return transformers.AutoConfig.from_pretrained(folder).get_text_config().dtype or torch.float32


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple:
    """(model, tokenizer) of a hub id, a local folder, or "demo"."""
    folder = str(DATA / "demo") if is_bundled(name) else fetch_model(name)
    device = pick_device(device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    with explained(f"{name} holds no model that can be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        kind = pick_dtype(dtype, device, stored_dtype(folder))
        model, found = load(folder, dtype=kind, output_loading_info=True)
    missing = sorted(found["missing_keys"])  # transformers fills them with random numbers
    refuse(missing, f"{name} lacks weights of its model, such as {' '.join(missing[:1])}.")
    refuse(not tokenizer.encode("1"), f"{name} lacks its tokenizer (tokenizer.json).")
    check_finite(model.named_parameters(), name)
    if not is_bundled(name):
        model.name_or_path = name  # what adapters say they are for
    return model.eval().to(device), tokenizer  # no dropout: train what was sampled from


def check_finite(weights, name) -> None:
    for key, weight in weights:
        refuse(weight.element_size() == 1, f"{name} is quantized: take its full weights.")
        finite = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32).isfinite()
        refuse(not finite, f"{name} holds numbers that are not finite, in {key}.")


def base_of(model):
    """The transformers model, with or without a peft wrapper around it."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


@explained("LoRA does not fit this model")
def add_lora(model, rank: int, alpha: float, targets: str, layer_share: float):
    """LoRA on the last `layer_share` of the layers; those below store no activations."""
    stack = model.get_decoder().layers
    parts = {name.rpartition(".")[2]: module for name, module in stack.named_modules()}
    linear = sorted(name for name, part in parts.items() if isinstance(part, torch.nn.Linear))
    wanted = linear if targets == "all-linear" else [t.strip() for t in targets.split(",")]
    strange = sorted({*wanted} - {*parts})  # peft complains only when it finds none
    choice = f"use all-linear, or some of {', '.join(linear)}"
    refuse(strange, f"--lora-targets: layers have no module {strange}; {choice}.")
    first = len(stack) - max(1, round(len(stack) * layer_share))
    options = {"r": rank, "lora_alpha": alpha, "target_modules": wanted, "task_type": "CAUSAL_LM"}
    options["layers_to_transform"] = list(range(first, len(stack)))
    return recomputing(peft.get_peft_model(model, peft.LoraConfig(**options)))


def recomputing(model):
    """Let layers keep their input alone and compute the rest again in the backward pass (Chen et
    al. 2016, arXiv 1604.06174); not with a cache: it would grow twice."""

    def lean(forward, *inputs, **options):
        learns = torch.is_grad_enabled()  # first: rollouts come here too
        if learns and not any(isinstance(x, transformers.Cache) for x in options.values()):
            forward = partial(torch.utils.checkpoint.checkpoint, forward, use_reentrant=False)
        return forward(*inputs, **options)

    for layer in model.get_decoder().layers:
        layer.forward = partial(lean, layer.forward)
    return model


def load_adapter(model, folder: Path, name: str, model_name: str, trainable: bool = False):
    """The model with the adapter of a run's folder, there under `name`."""
    made_for, path = run_settings(folder)["model"], folder / "adapter_model.safetensors"
    other = Path(made_for).name != Path(model_name).name
    refuse(other, f"{folder} was made for {made_for}, not for {model_name}; give its --model.")
    for file in (path, folder / "adapter_config.json"):  # peft would ask the hub for them
        refuse(not file.is_file(), f"{folder} holds no adapter (no {file.name}).")
    options = {"adapter_name": name, "is_trainable": trainable, "torch_device": str(model.device)}
    with explained(f"{folder} does not fit {model_name}"):
        if isinstance(model, peft.PeftModel):
            model.load_adapter(str(folder), **options)
        else:
            model = peft.PeftModel.from_pretrained(model, str(folder), **options)
        found = safetensors.load_file(path)
        if model.peft_config[name].is_prompt_learning:  # we ask the model inside
            raise ValueError("it is no part of the layers")
        wanted = peft.get_peft_model_state_dict(model, None, name, save_embedding_layers=False)
        if strange := found.keys() ^ wanted.keys():  # peft would only warn
            raise ValueError(f"{min(strange)} is on one side only")
        check_finite(found.items(), path)
        kinds = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32}
        refuse(trainable and kinds, f"{folder} trains whole modules: add --dtype float32.")
        return recomputing(model.eval()) if trainable else model  # a stranger's can have dropout


def save_checkpoint(thing, folder: Path, **options) -> None:
    """save_pretrained with the usual permissions: safetensors lets only the owner read."""
    thing.save_pretrained(str(folder), **options)
    for path in folder.glob("*.safetensors"):
        shutil.copymode(next(folder.glob("*config.json")), path)


def end_tokens(model, tokenizer=None) -> set[int]:
    """Every end token that the generation config, the config or the tokenizer knows."""
    base, found = base_of(model), set()
    for knows in (base.generation_config, base.config.get_text_config(), tokenizer):
        ids = getattr(knows, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [ids])
    return found - {None}


def choose_prompt(option: str, model, tokenizer) -> str:
    """chat, plain, or the text of a template. auto: prompt.txt in the model's folder, else chat if
    the model stops where its chat template ends a turn; a base model can have a template too."""
    own = Path(tokenizer.name_or_path, "prompt.txt")
    if option == "auto" and own.is_file():
        option = str(own)
    if option == "auto":
        turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
        template = getattr(tokenizer, "chat_template", None)
        chats = template and end_tokens(model) & set(chat_ids(tokenizer, turn)[-3:])
        option = "chat" if chats else "plain"
    if option in ("chat", "plain"):
        return option
    text = read_text(Path(option))
    refuse("{question}" not in text, f"The prompt file {option} does not contain {{question}}.")
    return text


def peak_memory(device, reset: bool = False) -> int:
    """Peak bytes since the last reset, 0 if unknown: reserved on a CUDA card, held now on MPS, else
    of the whole process, which only Linux can reset."""
    kind = torch.device(device).type
    if kind == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        return peak
    if kind == "mps":
        return torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError, TypeError):  # some containers do not tell
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(peak[1]) * 1024
    with contextlib.suppress(ImportError):  # Windows has no such module; macOS counts bytes
        usage = importlib.import_module("resource").getrusage(0).ru_maxrss
        return usage * (1 if sys.platform == "darwin" else 1024)
    return 0


def release_memory() -> None:
    """Give freed memory back to the system, which glibc's malloc would keep."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def blocked(places, dtype):
    """An additive attention mask: the dtype's minimum where `places` is True, else 0."""
    return places.view(torch.uint8).to(dtype).mul_(torch.finfo(dtype).min)  # bytes convert fast


def rounded(length: int) -> int:
    """Up to 16, 32, ...: kernels are kept for each length, and attention wants aligned rows."""
    return -(-length // 16) * 16


def check_length(config, length: int) -> None:
    """Refuse what exceeds a model's context, or its sliding window, where packs are not exact."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or math.inf
    kinds = getattr(text, "layer_types", None)  # none: all layers slide
    if not kinds or "sliding_attention" in kinds:
        limit = min(limit, getattr(text, "sliding_window", None) or limit)
    over = f"{length} tokens are over this model's context or sliding window, {limit}"
    refuse(length > limit, f"{over}; lower --max-new-tokens or shorten the prompt.")


GRAPHS = {"cuda": 128}  # where decoding is captured: tokens of a graph
STREAMS = {}  # of a device: one for all captures, since each keeps a workspace of its own


def next_steps(base, cache, visible, room: int) -> Callable:
    """`_step` for the next `room` tokens of all rows. More than one: by a graph, in which nothing
    can move, so that `cache` gets their places now, the last of `visible`."""
    if room == 1:
        return partial(_step, base, cache, visible)
    place = torch.tensor([visible.shape[1] - room], device=base.device)
    ids = place.new_zeros(len(visible), 1)
    layers, longer = cache.layers, partial(torch.nn.functional.pad, pad=(0, 0, 0, room))
    for layer in layers:
        layer.keys, layer.values = longer(layer.keys), longer(layer.values)

    def write(keys, values, number, *_, **__):
        layer = layers[number]
        return layer.keys.index_copy_(2, place, keys), layer.values.index_copy_(2, place, values)

    cache.update = write  # it holds the layers alone: with `cache` it would be a cycle

    def step():
        visible.index_fill_(1, place, True)
        hidden = _step(base, cache, visible, ids)
        place.add_(1)
        return hidden

    results = replayed(step, base.device)
    # A finished row may draw nothing, -1, from numbers that are not finite.
    return lambda tokens: (ids.copy_(tokens.clamp(min=0)), next(results))[1]


def replayed(step: Callable, device) -> Iterator:
    """The results of `step`, call by call, from the second on by a CUDA graph: its replay does not
    wait for Python to launch a thousand kernels."""
    yield step()  # loads what it needs, which a capture cannot
    graph, stream = torch.cuda.CUDAGraph(), STREAMS.setdefault(device, torch.cuda.Stream(device))
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")  # NCCL has a thread of its own
            try:
                result = step()  # is recorded, not run
            finally:
                graph.capture_end()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        GRAPHS.clear()  # it waits for values, as a mixture of experts does, and always will
        graph = None
    while True:
        yield (graph.replay() or result) if graph else step()


# ---- 5. Rollout: sampling groups of completions -------------------------------------------------

SAMPLED_ROWS = 48  # of [vocabulary] logits at a time: with 152k tokens below malloc's 32 MiB
BLOCK = 128  # tokens of the vocabulary whose probabilities are summed in float32


@dataclass
class Rollout:
    """A group of completions; `prompt` ends with the prefix that a replay starts from."""

    problem: Problem
    prompt: list[int]
    completions: list[list[int]]
    rewards: list[float]
    entropies: list[list[float]] | None = None  # of what each token was drawn from, in nats
    logprobs: list[list[float]] | None = None  # of each token there

    @property
    def has_signal(self) -> bool:
        return len(set(self.rewards)) > 1


def logits_of(model, hidden):
    """float32 logits [n, vocabulary] of final hidden states [n, width]."""
    base = base_of(model)
    config = base.config.get_text_config()
    logits = base.get_output_embeddings()(hidden).float()
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    if scale != 1:  # Cohere has the one, Granite the other
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return cap * torch.tanh(logits / cap) if cap else logits


def draw(logits, temperature: float, generator):
    """(tokens, entropies, log-probs) [rows] from softmax(logits / temperature), with `logits`
    [rows, V] overwritten. Temperature 0: the most likely token, and the numbers of temperature 1.
    Token -1 where logits are NaN."""
    scores = logits.div_(temperature or 1.0).clamp_(min=-1e30)  # 0 * -inf would be NaN below
    probs = scores.softmax(-1)
    if temperature == 0:
        tokens = scores.argmax(-1)
    elif logits.device.type == "cpu":
        tokens = _invert(probs, generator)
    else:  # an exponential race, since a sum in parallel need not grow steadily
        tokens = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)
    logps = probs.gather(1, tokens[:, None])[:, 0].log()
    log_total = scores.gather(1, tokens[:, None])[:, 0] - logps  # of exp(scores)
    entropies = log_total - scores.mul_(probs).sum(-1)  # in place: a third array is slow
    return torch.where(entropies.isfinite(), tokens, -1), entropies.clamp_(min=0), logps


def _invert(probs, generator):
    """Draw by inverting the cumulative distribution in float64, first over blocks, then within one:
    on a CPU torch.multinomial is slower than the model."""
    size = probs.shape[1]
    if size % BLOCK:  # padding makes a copy
        probs = torch.nn.functional.pad(probs, (0, -size % BLOCK))
    blocks = probs.unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1).double()  # [rows, V / BLOCK]
    ends = sums.cumsum(-1)
    chance = 1 - torch.rand(len(probs), 1, generator=generator, dtype=torch.float64)  # in (0, 1]
    at = chance * ends[:, -1:]
    block = torch.searchsorted(ends, at).clamp_(max=ends.shape[1] - 1)
    share = 1 - (ends.gather(1, block) - at) / sums.gather(1, block)  # of the block, in (0, 1]
    within = blocks[torch.arange(len(blocks)), block[:, 0]].double().cumsum(-1)  # [rows, BLOCK]
    inner = torch.searchsorted(within, share * within[:, -1:]).clamp_(max=BLOCK - 1)
    return (block * BLOCK + inner)[:, 0].clamp_(max=size - 1)


def sample(
    model,
    tokenizer,
    prompts: list[list[int]],
    group_size: int = 1,
    *,
    prefixes: list[list[int]] | None = None,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    stop: str = "",
    rows: int = 64,
    seed: int = 0,
    ends: set[int] | None = None,
    with_stats: bool = False,
    tick: Callable = lambda count: None,
):
    """`group_size` completions of each prompt, as token ids: result[prompt][completion][position].

    A completion ends with a token in `ends` (default: all that model or tokenizer know), one that
    completes the text `stop`, or that at `max_new_tokens`. It continues its prompt's entry in
    `prefixes`, which counts but is not returned. At most `rows` at a time; `tick` is told how many
    each time. `with_stats`: (completions, entropies, logprobs), nested alike; see draw.
    """
    ends = end_tokens(model, tokenizer) if ends is None else ends
    prefixes = prefixes or [[]] * len(prompts)
    generator = torch.Generator(model.device).manual_seed(seed)
    check_length(model.config, max(map(len, prompts), default=0) + max_new_tokens)
    beyond = max(set().union(*prompts), default=0) >= model.config.get_text_config().vocab_size
    refuse(beyond, "A prompt has a token that the model lacks.")
    tail = len(stop.encode()) + 1  # tokens that hold the whole of it: none is shorter than a byte

    def ended(i: int, tokens: list[int]) -> bool:
        if tokens[-1] in ends or len(prefixes[i]) + len(tokens) >= max_new_tokens:
            return True
        return bool(stop) and stop in tokenizer.decode((prefixes[i] + tokens)[-tail:])

    starts = [prompt + prefix for prompt, prefix in zip(prompts, prefixes)]
    order = sorted(range(len(starts)), key=lambda i: len(starts[i]))  # alike: little padding
    everyone = [i for i in order for _ in range(group_size)]
    results = tuple([[] for _ in prompts] for _ in range(3))
    with torch.inference_mode():
        for first in range(0, len(everyone), rows):
            owners = everyone[first : first + rows]
            decoded = _decode(model, starts, owners, ended, temperature, generator)
            for i, parts in zip(owners, decoded):
                for result, part in zip(results, parts):
                    result[i].append(part)
            tick(len(owners))
    return results if with_stats else results[0]


def _prefill(base, prompts: list[list[int]]):
    """Compute prompts as a batch: (cache, final hidden states [B, width], which places of the cache
    hold tokens [B, P]). What all begin with (the worked examples) is computed once and repeated."""
    cache = transformers.DynamicCache()  # with the config a sliding layer drops the first places
    shared = os.path.commonprefix([prompt[:-1] for prompt in prompts])
    if shared:
        ids = torch.tensor([shared], device=base.device)
        _step(base, cache, torch.ones_like(ids, dtype=torch.bool), ids)
        cache.batch_repeat_interleave(len(prompts))
    rests = [prompt[len(shared) :] for prompt in prompts]
    longest = max(map(len, rests))
    if not getattr(base.config.get_text_config(), "sliding_window", None):  # padding counts there
        longest = rounded(longest)
    padded = [[-1] * (longest - len(rest)) + rest for rest in rests]
    ids = torch.tensor(padded, device=base.device)
    visible = torch.nn.functional.pad(ids >= 0, (len(shared), 0), value=True)
    ids = ids.clamp(min=0)
    return cache, _step(base, cache, visible, ids), visible


def _step(base, cache, visible, ids):
    """Final hidden states [B, width] of the last of `ids` [B, n], which follow what is cached."""
    positions = (visible.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if ids.shape[1] == 1:
        visible = blocked(~visible, base.dtype)[:, None, None]
    decoder = base.get_decoder()  # transformers 5.24 has a new name for its cache
    new = "cache" in inspect.signature(decoder.forward).parameters
    options = {"cache" if new else "past_key_values": cache, "use_cache": True}
    output = decoder(input_ids=ids, attention_mask=visible, position_ids=positions, **options)
    return output.last_hidden_state[:, -1].contiguous()


def _decode(model, starts, owners: list[int], ended: Callable, temperature: float, generator):
    """(tokens, entropies, log-probs) of a completion for each of `owners`, indices of `starts`.
    Each start is computed once, and repeated for its group."""
    base, unique = base_of(model), list(dict.fromkeys(owners))
    cache, hidden, visible = _prefill(base, [starts[i] for i in unique])
    index = torch.tensor([unique.index(i) for i in owners], device=base.device)
    cache.batch_select_indices(index)
    hidden, visible = hidden[index], visible[index]
    completions = [([], [], []) for _ in owners]
    live, finished = list(range(len(owners))), set()  # whose each row is; who needs no more
    room, left = GRAPHS.get(base.device.type, 1), 0
    while True:
        chunks = hidden.split(SAMPLED_ROWS)
        parts = [draw(logits_of(model, chunk), temperature, generator) for chunk in chunks]
        drawn = [torch.cat(column) for column in zip(*parts)]  # tokens, entropies, log-probs
        for row, *values in zip(live, *(column.tolist() for column in drawn)):
            if row in finished:
                continue
            refuse(values[0] < 0, "The logits are not finite; try a lower --lr or --dtype float32.")
            for part, value in zip(completions[row], values):
                part.append(value)
            if ended(owners[row], completions[row][0]):
                finished.add(row)
        if len(finished) == len(owners):
            return completions
        tokens = drawn[0]
        if not left:  # rows can leave between graphs only
            keep = [i for i, row in enumerate(live) if row not in finished]
            if len(keep) < len(live):  # finished rows would cost as much as the others
                live, index = [live[i] for i in keep], index.new_tensor(keep)
                cache.batch_select_indices(index)
                tokens, visible = tokens[index], visible[index]
            visible, left = torch.nn.functional.pad(visible, (0, room), value=room == 1), room
            step = None  # frees the last graph, whose memory the next one needs
            step = next_steps(base, cache, visible, room)
        hidden, left = step(tokens[:, None]), left - 1


def roll_out(policy, problems, settings, seed: int, prefixes=None, **options) -> list[Rollout]:
    """Sample and score one group per problem; with `prefixes` they are replays."""
    prefixes = prefixes or [[]] * len(problems)
    prompts = [policy.prompt_ids(problem.question) for problem in problems]
    options |= {"max_new_tokens": settings.max_new_tokens, "rows": settings.batch_rows}
    options |= {"temperature": settings.temperature, "seed": seed, "prefixes": prefixes}
    options |= {"stop": policy.stop, "ends": policy.ends, "with_stats": True}
    drawn = sample(policy.model, policy.tokenizer, prompts, settings.group_size, **options)
    rollouts = []
    for problem, prompt, prefix, group, *stats in zip(problems, prompts, prefixes, *drawn):
        rewards = [policy.reward(problem, prefix + completion) for completion in group]
        rollouts.append(Rollout(problem, prompt + prefix, group, rewards, *stats))
    return rollouts


def replay_points(policy, rollouts: list[Rollout], turns: range, settings, rng: random.Random):
    """(problems, prefixes) of the replays number `turns`, which let later positions branch: random
    cuts, by turns of a success (even numbers) and a failure, in groups with signal."""
    successes, failures = [], []
    for rollout in rollouts:
        for completion, reward in zip(rollout.completions, rollout.rewards):
            if rollout.has_signal and 2 < len(completion) < settings.max_new_tokens:
                pool = failures if reward < max(rollout.rewards) else successes
                pool.append((rollout.problem, completion))
    pools = [pool for pool in (successes, failures) if pool]
    problems, prefixes = [], []
    for turn in turns if pools else []:
        problem, whole = rng.choice(pools[turn % len(pools)])
        prefix = whole[: rng.randrange(1, len(whole) - 1)]
        while len(policy.text(prefix)) > len(policy.text(whole)):  # it would end in the stop text
            prefix.pop()
        problems.append(problem)
        prefixes.append(prefix)
    return problems, prefixes


# ---- 6. Credit: the trie and one short pure function per method ---------------------------------


class Trie:
    """The completions of one prompt, shared prefixes stored once. A node is one token after one
    exact prefix.

    .tokens     token id of each node
    .parents    parent of each node, always of lower index; -1 where the parent is the prompt
    .depths     position in the completion, from 0
    .paths      for each completion, its nodes from first to last token
    .entropies  entropy (nats) of the distribution that each node's token was drawn from, and
    .logprobs   the token's log-prob in it; None where they were not given
    """

    def __init__(self, completions: list[list[int]], entropies=None, logprobs=None):
        self.tokens, self.parents, self.paths = [], [], []
        first = []  # (completion, position) where each node came first
        node_of = {}  # (parent, token) -> node
        for number, completion in enumerate(completions):
            node, path = -1, []
            for depth, token in enumerate(completion):
                key = (node, token)
                if key not in node_of:
                    node_of[key] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(node)
                    first.append((number, depth))
                node = node_of[key]
                path.append(node)
            self.paths.append(path)
        self.depths = [depth for _, depth in first]
        self.entropies = entropies and [entropies[number][depth] for number, depth in first]
        self.logprobs = logprobs and [logprobs[number][depth] for number, depth in first]


def _spread(rewards: list[float], chosen: list[list[int]]) -> dict[int, float]:
    """Give each chosen node of completion i its share A_i / (G * len_i); opposite shares cancel.

    A_i = (R_i - mean R) / (std R + 1e-4), population std (Shao et al. 2024, arXiv 2402.03300)."""
    weights = defaultdict(float)
    mean, std = fmean(rewards), pstdev(rewards)
    for reward, nodes in zip(rewards, chosen):
        advantage = (reward - mean) / (std + 1e-4)
        for node in nodes:
            weights[node] += advantage / (len(chosen) * len(nodes))
    return {node: weight for node, weight in weights.items() if abs(weight) > 1e-9}


def grpo_weights(trie: Trie, rewards: list[float]) -> dict[int, float]:
    """Every token, by its completion's reward against the mean of the group.

    GRPO (arXiv 2402.03300): {node: sum over completions i through it of A_i / (G * len_i)}."""
    return _spread(rewards, trie.paths)


def s_grpo_weights(trie: Trie, rewards, alpha: int, p: float, rng, k: int | None = None):
    """GRPO on the first tokens and others drawn at random; shared beginnings count once.

    S-GRPO (arXiv 2504.20834): of each completion every position t < alpha, then each with
    probability p until there are k; len_i is their number."""

    def chosen(path):
        return [node for t, node in enumerate(path) if t < alpha or rng.random() < p][:k]

    return _spread(rewards, list(map(chosen, trie.paths)))


def t_spmo_weights(trie: Trie, rewards: list[float]) -> dict[int, float]:
    """Where completions part: mean reward with a token, minus that of all that got there.

    T-SPMO (arXiv 2504.20834): {node: A(v|p) / number of nodes with credit}, A(v|p) = mean reward of
    the completions through prefix p and token v, minus that of all through p. Its term is one of
    pi, so where the trie knows pi the weight is times pi."""
    through = defaultdict(list)  # rewards of the completions through each node; -1 is the prompt
    for path, reward in zip(trie.paths, rewards):
        for node in [-1, *path]:
            through[node].append(reward)
    mean = {node: fmean(passing) for node, passing in through.items()}
    credit = {node: mean[node] - mean[parent] for node, parent in enumerate(trie.parents)}
    credit = {node: value for node, value in credit.items() if abs(value) > 1e-9}
    pi = [math.exp(logprob) for logprob in trie.logprobs or [0.0] * len(trie.tokens)]
    return {node: value * pi[node] / len(credit) for node, value in credit.items()}


METHODS = {"s-grpo": s_grpo_weights, "t-spmo": t_spmo_weights, "grpo": grpo_weights}


def credit_function(settings) -> Callable[[Trie, list[float], random.Random], dict[int, float]]:
    """(trie, rewards, rng) -> {node: weight}, as --method names it: one of METHODS with its numbers
    from the settings, or a function of the user's own."""
    method, alpha, p, k = settings.method, settings.alpha, settings.p, settings.k
    refuse(0 < k < alpha, f"--k {k} must not be less than --alpha {alpha}.")
    known = method in METHODS or is_code(method)
    refuse(not known, f"--method {method} is none of {', '.join(METHODS)}, FILE.py:function.")
    if method == "s-grpo":
        return lambda trie, rewards, rng: s_grpo_weights(trie, rewards, alpha, p, rng, k or None)
    if method in METHODS:
        return lambda trie, rewards, rng: METHODS[method](trie, rewards)
    return load_function(method)


def credit(rollouts: list[Rollout], method: Callable, rng: random.Random) -> list[tuple]:
    """(rollout, trie, {node: weight}) of each group; without signal, or without weights, none."""
    credited = []
    for rollout in rollouts:
        if rollout.has_signal:
            parts = rollout.completions, rollout.entropies, rollout.logprobs
            trie = Trie(*parts)
            with explained("--method gave no {node: weight}", (Exception, SystemExit), repr):
                found = method(Trie(*parts), [*rollout.rewards], rng)  # it may write into its own
                weights = {node: float(weight) for node, weight in found.items() if weight}
                known = weights.keys() <= set(range(len(trie.tokens)))
                if not (known and all(map(math.isfinite, weights.values()))):
                    raise ValueError("wanted: nodes of the trie, finite weights")
            if weights:
                credited.append((rollout, trie, weights))
    return credited


# ---- 7. Update: pack, forward, loss, step -------------------------------------------------------

TRAINED_ROWS = 64  # of [vocabulary] logits at a time
MAX_GRAD_NORM = 1.0
KL_TOKENS = 256  # enough to estimate how far a step goes


def ancestors(trie: Trie, nodes) -> set[int]:
    """All nodes above `nodes`: what their forward pass computes besides the prompt."""
    found = set()
    for node in nodes:
        while (node := trie.parents[node]) >= 0 and node not in found:
            found.add(node)
    return found


def pack(prompt: list[int], trie: Trie, nodes: list[int]):
    """The prompt and the ancestors of `nodes` as one sequence: (ids [L], positions [L], unseen
    places [L, L] of bool, slot {node: index}). Padding sees only itself."""
    order, start = sorted(ancestors(trie, nodes)), len(prompt)  # parents before their children
    length = rounded(start + len(order))
    pad = [0] * (length - start - len(order))
    slot = {node: start + i for i, node in enumerate(order)} | ({-1: start - 1} if start else {})
    unseen = ~numpy.eye(length, dtype=bool)
    unseen[:start, :start] = ~numpy.tri(start, dtype=bool)
    for node in order:  # sees what its parent sees, and itself
        if (parent := trie.parents[node]) in slot:  # none: it begins the sequence
            unseen[slot[node]] &= unseen[slot[parent]]
    ids = prompt + [trie.tokens[node] for node in order] + pad
    positions = [*range(start), *(start + trie.depths[node] for node in order), *pad]
    return torch.tensor(ids), torch.tensor(positions), torch.from_numpy(unseen), slot


def packed_logprobs(model, prompt_ids: list[int], trie: Trie, nodes, temperature: float = 1.0):
    """log pi(token(n) | prefix(n)) for each of `nodes`: float32 [len(nodes)], differentiable.

    Logits are made a few rows at a time, and again in the backward pass: never all at once."""
    alone = not prompt_ids and -1 in {trie.parents[node] for node in nodes}
    refuse(alone, "The prompt is empty: nothing predicts the first token of a completion.")
    base = base_of(model)
    ids, positions, unseen, slot = pack(prompt_ids, trie, nodes)
    check_length(base.config, int(positions.max()) + 2)
    device, dtype = base.device, base.get_input_embeddings().weight.dtype
    hidden = base.get_decoder()(
        input_ids=ids[None].to(device),
        position_ids=positions[None].to(device),
        attention_mask=blocked(unseen, dtype)[None, None].to(device),
        use_cache=False,
    ).last_hidden_state[0]
    rows = [slot[trie.parents[node]] for node in nodes]
    tokens = torch.tensor([trie.tokens[node] for node in nodes], dtype=torch.long, device=device)

    def logps(part, wanted):
        scores = (logits_of(model, part) / temperature).log_softmax(-1)
        return scores.gather(-1, wanted[:, None])[:, 0]

    again = partial(torch.utils.checkpoint.checkpoint, logps, use_reentrant=False)
    parts = zip(hidden[rows].split(TRAINED_ROWS), tokens.split(TRAINED_ROWS))
    return torch.cat([again(part, wanted) for part, wanted in parts])


def split_nodes(trie: Trie, nodes: list[int], budget: int) -> Iterator[list[int]]:
    """`nodes` in lists, one forward pass each, of at most `budget` ancestors. A completion is never
    cut, however long: what lies deep in it needs all that is above."""
    wanted, part, needed = set(nodes), [], set()
    for path in sorted(trie.paths):  # alike ones side by side
        own = [node for node in path if node in wanted]
        above = set(path[: trie.depths[own[-1]]]) if own else set()
        if part and len(needed | above) > budget and not above <= needed:
            yield part
            part, needed = [], set()
        wanted.difference_update(own)
        needed |= above
        part += own
    if part:
        yield part


def step_packs(credited: list[tuple], budget: int) -> Iterator[tuple]:
    """(the trie of all prompts with completions, {node: weight}) of each forward pass of a step."""
    joint = Trie([r.prompt + c for r, *_ in credited for c in r.completions])
    budget += max((len(r.prompt) for r, *_ in credited), default=0)  # prompts do not count
    total = defaultdict(float)  # a replay can meet nodes of its first group
    joint_paths = iter(joint.paths)
    for _, trie, weights in credited:
        joint_node = {}  # of each node of the group's trie
        for path in trie.paths:
            joint_node.update(zip(path, next(joint_paths)[-len(path) :]))  # behind the prompt
        for node, weight in weights.items():
            total[joint_node[node]] += weight
    for part in split_nodes(joint, list(total), budget):
        yield joint, {node: total[node] for node in part}


def update(policy, credited: list[tuple], groups: int, optimizer, settings):
    """One optimizer step on the mean loss over the `groups` of all processes, none if its gradient
    is not finite. Returns metrics of this process: to add up, and to take the maximum of."""
    params = optimizer.param_groups[0]["params"]
    card = policy.model.device.type == "cuda"  # it waits for each pass to be launched
    packs = list(step_packs(credited, settings.max_pack_tokens or (4096 if card else 512)))
    own = sum(len(weights) for _, weights in packs)
    trained, loss_sum = sum(gather([own])), 0.0
    scale = 1024.0 if policy.model.dtype == torch.float16 else 1.0  # small ones are lost
    for trie, weights in packs:
        given = policy.model, [], trie, weights, settings.temperature
        logp = packed_logprobs(*given)
        shares = logp.new_tensor([w / groups for w in weights.values()])
        loss = -(shares * logp).sum()
        if settings.beta:  # mean KL to the model without its adapter (k3, Schulman 2020)
            with torch.no_grad(), policy.model.disable_adapter():
                reference = packed_logprobs(*given)
            gap = reference - logp
            loss = loss + settings.beta / trained * (gap.exp() - gap - 1).sum()
        (loss * scale).backward()
        loss_sum += loss.item()
    for p in params:  # the losses of all processes are parts of one sum
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad / scale
        p.grad = accelerate.utils.reduce(p.grad, "sum")
    norm = float(torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM))
    kl, skipped = 0.0, not math.isfinite(norm)
    if trained and not skipped:
        kl, skipped = limited_step(policy, credited, params, optimizer, settings)
    optimizer.zero_grad(set_to_none=True)
    packed = sum(len(ancestors(trie, weights)) for trie, weights in packs)
    sums = {"tokens_trained": own, "tokens_packed": packed, "loss": loss_sum}
    return sums, {"grad_norm": norm, "kl": kl, "skipped": skipped}


def limited_step(policy, credited, params, optimizer, settings) -> tuple[float, bool]:
    """Step, and shorten it until KL(policy before it || after it) is under --target-kl: (that KL,
    whether nothing is left of the step). It is estimated: the mean of k3 (Schulman 2020) over some
    nodes of each process, trained or not, so that one limit suits a method that trains few."""
    whole = [(r, trie, dict.fromkeys(range(len(trie.tokens)), 1.0)) for r, trie, _ in credited]
    probe = next(step_packs(whole, KL_TOKENS), None)

    def logprobs():
        if not probe:  # nothing in this process has signal
            return torch.zeros(0)
        with torch.no_grad():
            return packed_logprobs(policy.model, [], *probe, settings.temperature)

    old, start = logprobs(), [p.detach().clone() for p in params]
    optimizer.step()
    for _ in range(8):
        gap = logprobs() - old
        kl = fmean(gather((gap.expm1() - gap).tolist()))
        if kl <= settings.target_kl or not settings.target_kl:
            return kl, False
        if not math.isfinite(kl):
            break
        share = 0.9 * math.sqrt(settings.target_kl / kl)  # KL grows with the square of a step
        for p, origin in zip(params, start):
            p.data.copy_(origin.lerp(p.data, share))
    for p, origin in zip(params, start):
        p.data.copy_(origin)
    return 0.0, True


# ---- 8. The training loop -----------------------------------------------------------------------


def train(policy, problems, held_out, settings, run: Path, stop: list) -> Iterator[tuple]:
    """Train until settings.steps, saving into `run`: yields (row of metrics, rollouts) per step.
    Continues where run/state.pt left off; `stop` ends it early once something is put in. The
    adapter that is kept is the best on `held_out`, problems that are not trained, if there are any.
    """
    rank, world = processes().process_index, processes().num_processes
    device, method = policy.model.device, credit_function(settings)
    optimizer = new_optimizer(policy.model)
    state, stopping = load_state(run, policy.model, optimizer), False
    if state["step"] == 0:
        state["best"] = validate(policy, held_out, settings) if held_out else 0.0
        save_run(run, policy.model, optimizer, state, keep=True)
    while state["step"] < settings.steps and state["stale"] < settings.patience and not stopping:
        step, start = state["step"], time.perf_counter()
        rng = random.Random(f"{settings.seed}/{step}" + f"/{rank}" * (world > 1))
        peak_memory(device, reset=True)

        asked = step_problems(problems, step, settings.prompts_per_step, settings.seed)[rank::world]
        rollouts = roll_out(policy, asked, settings, rng.getrandbits(32))
        turns = range(rank, settings.replay, world)
        inside, prefixes = replay_points(policy, rollouts, turns, settings, rng)
        replays = roll_out(policy, inside, settings, rng.getrandbits(32), prefixes)
        middle = time.perf_counter()

        credited = credit(rollouts + replays, method, rng)
        groups = sum(gather([len(rollouts + replays)]))
        optimizer.param_groups[0]["lr"] = lr = learning_rate(step, settings)
        sums, peaks = update(policy, credited, groups, optimizer, settings)

        peaks |= {"rollout_s": middle - start, "update_s": time.perf_counter() - middle}
        peaks["peak_memory"] = peak_memory(device)
        done = state["step"] = step + 1
        row = {"step": done, "lr": lr} | step_metrics(policy, rollouts, replays, sums, peaks)
        last = done == settings.steps
        stopping = any(gather([bool(stop)]))  # all leave after the same step
        if held_out and (last or done % settings.validate_every == 0):
            row["validation"] = validate(policy, held_out, settings)
        due = last or done % settings.save_every == 0
        keep = judge(state, row, due and not held_out)
        if rank == 0:
            with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if due or stopping or "validation" in row:
            save_run(run, policy.model, optimizer, state, keep)
        release_memory()
        yield row, rollouts  # is shown before the run may end
        check_alive(state, row, run)


# ---- 9. Around the loop: start-up check, schedule, metrics, saving and resuming, evaluation ------

DEAD_STEPS = 5  # so many in a row with nothing to learn from end a run


def check_model(model, tokenizer) -> None:
    """Refuse a model that is not exact here: one that ignores masks or positions, as recurrent ones
    do, or changes its logits in a way of its own."""
    unfit = f"{model.config.model_type} models do not fit the packed update; use one like Qwen2"
    with explained(unfit):
        for what, gap in deviations(model, tokenizer).items():
            refuse(not gap < 1, f"{unfit} ({what}: {gap:.2g})")


def deviations(model, tokenizer) -> dict[str, float]:
    """How far our logits, and the log-probs of sampling and of packing, are from the model's own in
    a plain pass: root mean squares, as shares of what can be rounding."""
    base, rng = base_of(model), random.Random(0)
    config = base.config.get_text_config()
    size = min(len(tokenizer), config.vocab_size)
    ids = [rng.randrange(size) for _ in range(30)]
    prompts = [ids[:17], ids[:3] + ids[17:]]
    options = {"max_new_tokens": 12, "ends": set(ids), "with_stats": True}
    groups, _, stats = sample(model, tokenizer, prompts, 5, **options)
    gaps = []
    for prompt, group, logprobs in zip(prompts, groups, stats):
        trie, rows = Trie(group), [torch.tensor(prompt + completion) for completion in group]
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(base.device)
        with torch.inference_mode():
            theirs = base(input_ids=inputs).logits.float()
            ours = logits_of(model, base.get_decoder()(input_ids=inputs).last_hidden_state)
            packed = packed_logprobs(model, prompt, trie, range(len(trie.tokens))).cpu()
        after = [row[len(prompt) - 1 :].log_softmax(-1) for row in theirs.cpu()]
        wanted = torch.cat([row[range(len(c)), c] for row, c in zip(after, group)])
        drawn, nodes = torch.tensor(sum(logprobs, [])), sum(trie.paths, [])
        gaps.append(torch.stack([drawn - wanted, packed[nodes] - wanted]))
    # Each layer rounds anew, by about epsilon of what is there: a random walk.
    epsilon, spread = torch.finfo(base.dtype).eps, theirs.std(-1).mean().item()
    rounding = max(1e-3, epsilon * spread * math.sqrt(config.num_hidden_layers))
    sampling, packing = (torch.cat(gaps, 1).pow(2).mean(1).sqrt() / rounding).tolist()
    logits = ((ours - theirs).norm() / theirs.norm()).item() / 0.01
    return {"logits": logits, "sampling": sampling, "packing": packing}


def step_problems(problems: list[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The problems of one step: epoch after epoch in a new order, a function of (seed, step) alone:
    a resumed run sees what the uninterrupted one would have seen."""
    epochs = (random.Random(f"{seed}/{epoch}") for epoch in itertools.count())
    order = (problem for rng in epochs for problem in rng.sample(problems, len(problems)))
    return list(itertools.islice(order, step * count, (step + 1) * count))


def learning_rate(step: int, settings) -> float:
    """Linear warm-up over the first tenth of the steps, then linear decay to a tenth."""
    warm = max(1, settings.steps // 10)
    decay = 1 - 0.9 * max(0, step + 1 - warm) / max(1, settings.steps - warm)
    return settings.lr * min((step + 1) / warm, decay)


def gather(values: list) -> list:
    """The values of all processes in one list, in order."""
    return accelerate.utils.gather_object(values)


def new_optimizer(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.0)


def judge(state: dict, row: dict, score_rewards: bool) -> bool:
    """Enter a step into the state; returns whether to keep its adapter: the best on validation, or
    else the latest, unless the mean reward since the last save fell under half of the best."""
    if row["skipped"]:
        state["failures"] += 1
    elif row["tokens_trained"]:
        state["failures"] = 0
    lost = row["truncated"] > 0.9 or (row["reward"] == 0 and state["best"] > 0.1)
    state["dead"] = state["dead"] + 1 if lost and row["signal"] == 0 else 0
    state["rewards"].append(row["reward"])
    if "validation" in row:
        score, least = row["validation"], state["best"]
        state["stale"] = 0 if score > least else state["stale"] + 1
    elif score_rewards:
        score = fmean(state["rewards"])  # of before this step: they know no wild one
        least = state["best"] / 2 if row["kl"] < 1 else math.inf
    else:
        return False
    state["rewards"] = []
    if score < least:
        return False
    state["best"], state["best_step"] = max(score, state["best"]), row["step"]
    return True


def check_alive(state: dict, row: dict, run: Path) -> None:
    """End a run that goes on to no purpose."""
    advice = "start again with a lower --lr, a higher --target-kl or more --max-new-tokens"
    end = f"{run} holds the adapter of step {state['best_step']}; {advice}."
    failing = "Three steps failed: a loss that is not finite, or a KL over --target-kl"
    refuse(state["failures"] >= 3, f"{failing}. {end}")
    dead = f"{DEAD_STEPS} steps in a row had no signal, with {row['truncated']:.0%} cut off"
    refuse(state["dead"] >= DEAD_STEPS, f"{dead}. {end}")


def step_metrics(policy, rollouts, replays, sums: dict, peaks: dict) -> dict:
    """The row of a step: means (with replays only for signal), sums and the largest of `peaks`."""
    every = rollouts + replays
    completions = [c for r in rollouts for c in r.completions]
    rewards = [reward for r in rollouts for reward in r.rewards]
    means = {
        "reward": rewards,
        "accuracy": [reward == 1 for reward in rewards],
        "signal": [r.has_signal for r in every],
        "distinct": [len(set(map(tuple, r.completions))) / len(r.completions) for r in rollouts],
        "entropy": [entropy for r in rollouts for row in r.entropies for entropy in row],
        "length": list(map(len, completions)),
        "truncated": [not policy.finished(c) for c in completions],
    }
    sums["tokens_generated"] = sum(len(c) for r in every for c in r.completions)
    all_means, all_sums, all_peaks = zip(*gather([(means, sums, peaks)]))
    row = {key: fmean(x for own in all_means for x in own[key]) for key in means}
    row |= {key: sum(own[key] for own in all_sums) for key in sums}
    return row | {key: max(own[key] for own in all_peaks) for key in peaks}


def save_run(run: Path, model, optimizer, state: dict, keep: bool) -> None:
    """state.pt and, with `keep`, the adapter: they replace the old files once all are complete."""
    if processes().process_index > 0:
        return
    temporary, names = run / "saving.tmp", ["state.pt"]
    temporary.mkdir(exist_ok=True)
    if keep:
        save_checkpoint(model, temporary, save_embedding_layers=False)  # "auto" would ask the hub
        names = ["adapter_config.json", "adapter_model.safetensors", "state.pt"]
    weights = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    buffer = io.BytesIO()  # torch.save into a file does not say so when the disk is full
    torch.save(state | {"optimizer": optimizer.state_dict(), "weights": weights}, buffer)
    (temporary / "state.pt").write_bytes(buffer.getvalue())
    # state.pt comes last, but for step 0: an adapter without it is no run that can go on.
    for name in names if state["step"] else reversed(names):
        os.replace(temporary / name, run / name)
    shutil.rmtree(temporary, ignore_errors=True)


def load_state(run: Path, model, optimizer) -> dict:
    """The state from which a run goes on: model, optimizer and metrics are put back to it."""
    counts = dict.fromkeys(["step", "best_step", "stale", "failures", "dead"], 0)
    state = {"best": 0.0, "rewards": []} | counts
    path, log, adapter = run / "state.pt", run / "metrics.jsonl", run / "adapter_model.safetensors"
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    try:
        if path.exists() or adapter.exists():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            state = {key: type(start)(saved[key]) for key, start in state.items()}
            check_finite(saved["weights"].items(), path)
            refuse(saved["weights"].keys() != names, "of another adapter")
            model.load_state_dict(saved["weights"], strict=False)
            optimizer.load_state_dict(saved["optimizer"])
            if state["step"]:  # the best adapter, which is needed at the end
                safetensors.load_file(adapter)
        if processes().process_index == 0:
            text = read_text(log) if log.exists() else ""
            lines = text.splitlines(keepends=True)[: state["step"]]  # line n is step n
            steps = [json.loads(line)["step"] for line in lines]
            refuse(steps != [*range(1, state["step"] + 1)], "steps are missing")
            write_atomically(log, "".join(lines))
    except Exception as error:  # torn files
        damage = f"state.pt or metrics.jsonl in {run} is damaged ({first_line(error)})"
        raise UserError(f"{damage}; --adapter {run} starts anew from it.") from None
    return state


def evaluate(policy, problems, settings, samples: int = 0, tick: Callable = lambda count: None):
    """One record per problem: the greedy completion, whether it is right, and how many of `samples`
    at settings.temperature are. Processes share the problems. `tick` is told of each batch."""
    rank, world = processes().process_index, processes().num_processes
    own = problems[rank::world]
    ask = partial(roll_out, seed=settings.seed + rank, tick=lambda rows: tick(rows * world))
    firsts = ask(policy, own, replace(settings, group_size=1, temperature=0.0))
    groups = ask(policy, own, replace(settings, group_size=samples)) if samples else firsts
    records = []
    for number, (problem, first, group) in enumerate(zip(own, firsts, groups)):
        [greedy], [entropy] = first.completions, first.entropies
        record = {"index": rank + number * world, **asdict(problem)}
        record |= {"completion": policy.text(greedy), "reward": first.rewards[0]}
        record |= {"correct": record["reward"] == 1, "length": len(greedy)}
        record |= {"entropy": fmean(entropy), "truncated": not policy.finished(greedy)}
        record |= {"samples": samples, "samples_correct": group.rewards.count(1) if samples else 0}
        if policy.metric:
            record["metric"] = policy.metric(record["completion"], problem.answer)
        records.append(record)
    return sorted(gather(records), key=lambda record: record["index"])


def validate(policy, held_out, settings) -> float:
    """The mean reward of greedy answers; of rewards of 0 and 1, their accuracy."""
    return fmean(record["reward"] for record in evaluate(policy, held_out, settings))


# ---- 10. Views: what is known, as tables and text -----------------------------------------------

TITLES = "step reward signal entropy     kl length trained seconds memory validation"
LINE = "{mark:>4} {reward:6.3f} {signal:6.0%} {entropy:7.3f} {kl:6.4f} {length:6.0f} "
LINE += "{trained:7.1%} {seconds:7.2f} {memory:6.2f}"
MEANS = {"truncated": ".1%", "length": ".1f", "entropy": ".3f", "metric": ".3f"}


@contextlib.contextmanager
def progress(label: str, total: int, stop: list = ()):
    """Yields tick(count), which moves a bar and ends the program if there is a signal in `stop`."""
    if not console.is_terminal:
        console.print(f"{label}: {total:,} ...")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)

        def tick(count: int) -> None:
            bar.advance(task, count)
            if stop:
                raise SystemExit(128 + stop[0])

        yield tick


def show_step(row: dict, device, note: str = "") -> None:
    """A line of the live table; where there is a note, it and the titles stand above."""
    if note:
        memory = "  VRAM" if torch.device(device).type == "cuda" else "memory"
        console.print(note)
        console.print(TITLES.replace("memory", memory), style="bold", soft_wrap=True)
    share = row["tokens_trained"] / row["tokens_generated"]
    more = {"mark": "!" * row["skipped"] + str(row["step"]), "trained": share}
    more |= {"seconds": row["rollout_s"] + row["update_s"], "memory": row["peak_memory"] / 2**30}
    line = LINE.format(**row, **more)
    if "validation" in row:
        line += f" {row['validation']:10.1%}"
    console.print(line, style="red" if row["skipped"] else None, soft_wrap=True)


def mean_step(rows: list[dict]) -> dict:
    """The row of a step as they were on average, with the highest peak of memory."""
    row = {key: fmean(row[key] for row in rows) for key in rows[0] if key != "validation"}
    return row | {"step": "", "skipped": 0, "peak_memory": max(r["peak_memory"] for r in rows)}


def completion_note(problem: Problem, text: str, reward: float) -> str:
    """A sample with its question, reference and reward."""
    text = text.replace("\n", "↵")
    return (
        f"\nquestion    {problem.question:.700}\ncompletion  {text:.700}\n"
        f"reference   {problem.answer}\nreward      {reward:g}\n"
    )


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300  # neither NaN nor infinite


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    share, extra = right / total, 1.96**2 / total
    middle, half = share + extra / 2, math.sqrt(extra * (share * (1 - share) + extra / 4))
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))


def mcnemar(before: list, after: list) -> float:
    """Exact two-sided p that as many rise as fall (McNemar 1947; for numbers the sign test)."""
    up, down = sum(b < a for b, a in zip(before, after)), sum(b > a for b, a in zip(before, after))
    tail = sum(math.comb(up + down, k) for k in range(min(up, down) + 1))
    return min(1.0, 2 * tail / 2 ** (up + down))


def pass_at_k(total: int, right: int, k: int) -> float:
    """Unbiased chance that one of k samples is right (Chen et al. 2021, arXiv 2107.03374)."""
    return 1 - math.comb(total - right, k) / math.comb(total, k)


def comparison_table(results: dict[str, list[dict]], title: str) -> Table:
    """A column per policy, compared with the first."""
    table = Table(title=title, title_justify="left")
    for name in ["", *results]:
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    policies, add = [*results.values()], table.add_row
    rights = [[r["correct"] for r in records] for records in policies]
    before, *after = rights
    add("accuracy (greedy)", *(f"{fmean(own):.1%}  ({sum(own)}/{len(own)})" for own in rights))
    intervals = [wilson(sum(own), len(own)) for own in rights]
    add("95 % interval", *(f"{low:.1%} to {high:.1%}" for low, high in intervals))
    if after:
        gains = [100 * (fmean(own) - fmean(before)) for own in after]
        add("difference, paired", "", *(f"{gain:+.1f} points" for gain in gains))
        add("p (exact McNemar)", "", *(f"{mcnemar(before, own):.2g}" for own in after))
    if count := policies[0][0]["samples"]:
        for k in [2**i for i in range(8) if 2**i < count] + [count]:
            chances = [[pass_at_k(count, r["samples_correct"], k) for r in p] for p in policies]
            add(f"pass@{k}", *(f"{fmean(own):.1%}" for own in chances))
    for key, form in MEANS.items():
        values = [[r.get(key) for r in records] for records in policies]
        if all(map(is_number, sum(values, []))):
            add(key, *(f"{fmean(own):{form}}" for own in values))
    kinds = sorted({r["type"] for r in policies[0]})
    for kind in kinds if 1 < len(kinds) <= 20 else []:
        rights = [[r["correct"] for r in p if r["type"] == kind] for p in policies]
        add(f"{kind or 'no type'} ({len(rights[0])})", *(f"{fmean(own):.1%}" for own in rights))
    return table


def changes(results: dict[str, list[dict]], most: int) -> Iterator:
    """Answers beside those of the first policy: mended, broken and still wrong."""
    (base, before), *others = results.items()
    kinds = {"mended": (False, True), "broken": (True, False), "still wrong": (False, False)}
    for name, after in others:
        for kind, right in kinds.items():
            pairs = [(b, a) for b, a in zip(before, after) if (b["correct"], a["correct"]) == right]
            yield f"\n{name} against {base}: {len(pairs)} {kind}, up to {most} shown"
            for pair in pairs[:most]:
                table = Table(base, name, expand=True)
                table.add_row(*(r["completion"] + " (cut off)" * r["truncated"] for r in pair))
                yield f"{pair[0]['question']}\nreference: {pair[0]['answer']}"
                yield table


def show_group(policy: Policy, rollout: Rollout, methods: dict) -> Iterator:
    """What `inspect` shows of a group, given {method: (its rule, its {node: weight})}."""
    trie = Trie(rollout.completions)
    yield f"Problem: {rollout.problem.question}\nAnswer: {rollout.problem.answer}"
    tokens, nodes = sum(map(len, trie.paths)), len(trie.tokens)
    yield f"{tokens} tokens are {nodes} nodes (a node: one token after one exact beginning)."
    yield "Trained: [+more likely], [-less likely], up to +++."
    if not rollout.has_signal:
        yield Text("All rewards are equal: no method learns anything from this group.", "yellow")
    for name, (rule, weights) in methods.items():
        yield f"\n{name}: {rule} {len(weights)} of {nodes} nodes are trained."
        rows = zip(trie.paths, rollout.completions, rollout.rewards)
        for number, (path, completion, reward) in enumerate(rows, 1):
            text = credit_text(policy.tokenizer.decode, trie, path, weights)
            mark = "" if policy.finished(completion) else " (cut off)"
            yield Text.assemble(f"{number:2} reward {reward:g}  ", text, mark)


def credit_text(decode: Callable, trie: Trie, path: list[int], weights: dict[int, float]) -> Text:
    """A completion, trained tokens in brackets: three signs for the largest weight, or fewer."""
    most, text = max(map(abs, weights.values()), default=1.0), Text()

    def signs(node: int) -> str:
        weight = weights.get(node, 0.0)
        return ("+" if weight > 0 else "-") * math.ceil(3 * abs(weight) / most - 1e-6)

    for marks, run in itertools.groupby(path, signs):
        words = decode([trie.tokens[node] for node in run]).replace("\n", "↵")
        style = "dim" if not marks else "green" if "+" in marks else "red"
        text.append(f"[{marks}{words}]" if marks else words, style)
    return text


def curve_of(rows: list[dict], what: str) -> dict[int, float]:
    """{step: value} of a column of metrics.jsonl, as at most 30 means of neighbours."""
    known = [(i, row[what]) for i, row in enumerate(rows, 1) if is_number(row.get(what))]
    size = len(known) // 30 + 1
    chunks = [known[i : i + size] for i in range(0, len(known), size)]
    return {chunk[-1][0]: fmean(y for _, y in chunk) for chunk in chunks}


def run_rows(path: Path) -> list[dict]:
    """The rows of a run's file, none where it is not there yet."""
    return [row for _, row in read_rows(path)] if path.exists() else []


def accuracies(run: Path) -> str:
    """The accuracy before and after training, as far as the run has both."""
    rows = [row for row in run_rows(run / "eval.jsonl") if is_number(row.get("correct"))]
    phases = [[r["correct"] for r in rows if r.get("phase") == p] for p in ("base", "trained")]
    return " → ".join(f"{fmean(phase):.1%}" for phase in phases) if all(phases) else ""


def curve_table(curves: dict[str, dict], what: str) -> Table:
    """A line per run, all of them on one scale."""
    values = [y for curve in curves.values() for y in curve.values()]
    low, scale = min(values), 7.99 / (max(values) - min(values) or 1)
    table = Table("run", what, "first", "last")
    table.columns[0].overflow = "fold"
    for run, curve in curves.items():
        own = [*curve.values()]
        line = "".join("▁▂▃▄▅▆▇█"[int((y - low) * scale)] for y in own)
        table.add_row(run, line, f"{own[0]:.3g}", f"{own[-1]:.3g}")
    return table


# ---- 11. Commands -------------------------------------------------------------------------------

DEFAULT_MODEL = "Qwen/Qwen2-1.5B"
CODE = ["reward", "metric", "method"]  # settings that may name a FILE.py
ASKED = ["prompt", "shots", "stop", "max_new_tokens", "temperature", "reward"]
MACHINE = {"start_from", "data_dir", "device", "batch_rows", "max_pack_tokens", "save_every"}


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False):
    if version:
        console.print(f"tokenrl {__version__}")
        raise SystemExit


opt = partial(typer.Option, rich_help_panel="This command")  # an option of one command alone


def asks(command: Callable) -> Callable:
    """`command(settings, its own options)` for typer, with the options of Settings that name it."""
    name = command.__name__.removesuffix("_command")
    shared = [item for item in fields(Settings) if name in item.metadata.get("on", ())]
    tasks = typer.Argument(help="svamp, multiply, or a task that prep made.")

    def run(context: typer.Context, task: Annotated[str, tasks], **values):
        settings = Settings(task, **{item.name: values.pop(item.name) for item in shared})
        check_settings(settings)
        source = context.get_parameter_source
        given = {item.name for item in shared if source(item.name).name == "COMMANDLINE"}
        if folder := values.get("resume") or values.get("adapter"):
            first, *others = folder if name == "eval" else [folder]
            take_over(settings, given, first, name)
            for other in others:
                its = replace(settings)
                take_over(its, given, other, name)
                odd = [flag(key) for key in ASKED if getattr(its, key) != getattr(settings, key)]
                refuse(odd, f"{other} is not asked as {first} is; say how: {', '.join(odd)}.")
        command(settings, **values)

    first, last, every = (dict(inspect.signature(f).parameters) for f in (run, command, Settings))
    del first["values"], last["settings"]
    for item in shared:
        kind = Annotated[item.type, item.metadata["info"]]
        first[item.name] = every[item.name].replace(annotation=kind)
    run.__signature__ = inspect.Signature((first | last).values())
    run.__doc__ = command.__doc__
    return run


def find_policy(settings: Settings) -> tuple[Policy, Task]:
    """Load what the settings ask for; `auto` there gives way to the name of a model."""
    svamp, device = settings.task == "svamp", pick_device(settings.device)
    if settings.model == "auto":
        settings.model = DEFAULT_MODEL
        if svamp and not device.startswith("cuda"):
            settings.model = "demo"
            console.print(f"No CUDA GPU: the small bundled model, not --model {DEFAULT_MODEL}.")
    name, bundled, demo = settings.model, is_bundled(settings.model), DATA / "demo"
    refuse(bundled and not demo.is_dir(), f"There is no {demo}: copy that folder, or use --model.")
    with processes().main_process_first():
        if svamp and not bundled and not (settings.data_dir / "svamp").is_dir():
            console.print("Preparing SVAMP first, as prep svamp does ...")
            write_task("svamp", svamp_problems(None), STORY_EXAMPLES, 0.3, 0, settings.data_dir)
    # The bundled model has never seen the words of the real SVAMP.
    place = ("demo", DATA) if svamp and bundled else (settings.task, settings.data_dir)
    task = load_task(*place, numeric=settings.reward == "number")
    score = reward_function(settings.reward, task.decimal)
    metric = reward_function(settings.metric, task.decimal) if settings.metric else None
    if bundled and settings.device == "auto" and device == "mps":
        device = "cpu"  # faster for so small a model
    console.print(f"Loading {name} ...")
    model, tokenizer = load_model(name, device, settings.dtype)
    try:
        check_model(model, tokenizer)
    except UserError:
        if model.dtype != torch.float16:  # too few digits for some: float32 then
            raise
        check_model(model.float(), tokenizer)
    form = choose_prompt(settings.prompt, model, tokenizer)
    idle = settings.shots and form not in ("chat", "plain")
    refuse(idle, "--shots needs a chat or plain prompt: a template holds its own examples.")
    examples, stop = task.examples[: settings.shots], settings.stop.replace("\\n", "\n")
    if form == "plain" and not stop:
        stop = "\nQuestion:"  # a base model goes on to invent the next question
    return Policy(model, tokenizer, form, examples, score, metric, stop), task


def read_json(path: Path) -> dict:
    with explained(f"{path} is not a JSON object"):
        return {**json.loads(read_text(path))}


def run_settings(run: Path) -> dict:
    """The settings in a run's config.json, checked; of an adapter from elsewhere its model."""
    ours, theirs = run / "config.json", run / "adapter_config.json"
    if theirs.exists() and not ours.exists():
        saved = {"model": str(read_json(theirs).get("base_model_name_or_path"))}
    else:
        saved = read_json(ours).get("settings")
    refuse(not isinstance(saved, dict), f"{run} holds no adapter: {ours} has no settings.")
    saved = {"model": "auto", "data_dir": DATA} | saved
    saved["data_dir"] = Path(str(saved["data_dir"]))
    known = {item.name: saved[item.name] for item in fields(Settings) if item.name in saved}
    check_settings(Settings(**known))
    return known


def take_over(settings: Settings, given: set[str], run: Path, command: str) -> None:
    """Set what this command line leaves open as in the run; to train is to resume it. Code is only
    run from a FILE.py on this command line, since the run may be a stranger's."""
    saved, resume = run_settings(run), command == "train"
    for item in fields(Settings):
        key, here, there = item.name, getattr(settings, item.name), saved.get(item.name)
        refuse(resume and key not in saved, f"{run} lacks {key}: --adapter {run} begins anew.")
        if key in given or key == "task":
            path = resume and (key == "model" or is_code(str(here)))  # it may have moved
            same = here == there or (path and Path(here).name == Path(there).name)
            changed = resume and key not in MACHINE and not same
            refuse(changed, f"{flag(key)} was {there}, not {here}: --adapter {run} begins anew.")
        elif resume or (key in saved and key not in MACHINE and command in item.metadata["on"]):
            trust = f"if you trust it, add {flag(key)} {shlex.quote(str(there))}"
            refuse(key in CODE and is_code(there), f"{run} was made with its own code; {trust}")
            setattr(settings, key, there)


def digests(settings: Settings, policy: Policy, task: Task) -> dict[str, str]:
    """What tells whether two runs had the same problems, asked and scored alike."""
    code = [settings.reward.rpartition(":")[0]] if is_code(settings.reward) else []
    facts = {"problems": [task.train, task.test, task.decimal]}
    facts["asked"] = [policy.prompt, policy.examples, *(read_text(Path(file)) for file in code)]
    dumps = {key: json.dumps(fact, default=asdict).encode() for key, fact in facts.items()}
    return {key: hashlib.sha256(dump).hexdigest()[:16] for key, dump in dumps.items()}


def note_changes(run: Path, now: dict[str, str]) -> None:
    """Say so where a run had other data, or was asked or scored otherwise."""
    saved = now | (read_json(run / "config.json") if (run / "config.json").exists() else {})
    if saved["problems"] != now["problems"]:
        console.print(f"Note: {run} had other data: it may know these answers.")
    if saved["asked"] != now["asked"]:
        console.print(f"Note: {run} had another prompt, other worked examples or other rewards.")


def open_run(settings: Settings, now: dict[str, str], name: str, resume: Path | None) -> Path:
    """The folder of the run that goes on, or a new one: runs/NAME, or -2, -3, ... behind it."""
    if resume:
        saved = read_json(resume / "config.json")  # older ones know less
        changed = any(saved.get(key, fact) != fact for key, fact in now.items())
        refuse(changed, f"The data, prompt or reward changed: use --adapter {resume}.")
        return resume
    run, number = Path("runs", name), 2
    while run.exists():
        run, number = Path("runs", f"{name}-{number}"), number + 1
    run.mkdir(parents=True)
    config = {"settings": asdict(settings), "version": __version__} | now
    write_atomically(run / "config.json", json.dumps(config, indent=2, default=str) + "\n")
    return run


@app.command("train", epilog="Example: python tokenrl.py train svamp --method t-spmo --steps 50")
@asks
def train_command(
    settings: Settings,
    name: Annotated[str, opt(help="Folder in runs/.", show_default="TASK-METHOD")] = "",
    resume: Annotated[Path | None, opt(help="Continue the run in this folder.")] = None,
    dry: Annotated[bool, opt("--dry-run", help="Take one large step; tell its memory.")] = False,
):
    """Train a LoRA adapter by reinforcement learning: evaluate, train, evaluate again."""
    credit_function(settings)  # what is wrong with it is said now
    console.quiet = processes(settings.device == "cpu").process_index > 0  # one speaks
    policy, task = find_policy(settings)
    refuse(not task.train, f"{settings.task} is all test; prepare it with a --test-share under 1.")
    torch.manual_seed(settings.seed)
    policy.model = trainable_model(policy, settings)
    asked = task.train + task.test[: settings.eval_problems]
    longest = max(len(policy.prompt_ids(problem.question)) for problem in asked)
    check_length(policy.model.config, longest + settings.max_new_tokens)
    now = digests(settings, policy, task)
    if settings.start_from:
        note_changes(Path(settings.start_from), now)
    if dry:
        return dry_run(policy, task.train, settings)
    rank = processes().process_index
    name = name or f"{settings.task}-{method_name(settings.method)}"
    run = gather([None if rank else open_run(settings, now, name, resume)])[0]
    try:
        with contextlib.nullcontext() if rank else filelock.FileLock(run / "run.lock", timeout=0):
            train_and_compare(policy, task, settings, run)
    except filelock.Timeout:
        raise UserError(f"Another process is training {run}; wait for it, or end it.") from None
    except UserError:
        if not (rank or resume or (run / "state.pt").exists()):
            shutil.rmtree(run, ignore_errors=True)  # a start that failed
        raise
    processes().wait_for_everyone()


def trainable_model(policy: Policy, settings: Settings):
    """The model with a fresh LoRA adapter, or with the one that --adapter starts from."""
    keys = "lora_rank", "lora_alpha", "lora_targets", "lora_layers"
    shape = [getattr(settings, key) for key in keys]
    if not settings.start_from:
        return add_lora(policy.model, *shape)
    changed = shape != [getattr(Settings, key) for key in keys]
    refuse(changed, f"--adapter has its own shape: leave out {', '.join(map(flag, keys))}.")
    folder = Path(settings.start_from)
    return load_adapter(policy.model, folder, "default", settings.model, trainable=True)


def train_and_compare(policy: Policy, task: Task, settings: Settings, run: Path) -> None:
    """Evaluate, train and evaluate again, as far as the run has not done it yet."""
    size = min(100, len(task.train) // 7) if settings.validate_every else 0
    held_out, train_set = task.train[:size], task.train[size:]
    test_set, rows = task.test[: settings.eval_problems], []
    base, label = base_of(policy.model), method_name(settings.method)
    form = policy.prompt if policy.prompt in ("chat", "plain") else "template"
    trained, total = (count / 1e6 for count in policy.model.get_nb_trainable_parameters())
    console.print(
        f"{label} on {settings.task}: {len(train_set)} problems to train, {size} to validate, "
        f"{len(test_set)} to test\n{base.config.model_type}: {total:,.1f} M parameters, "
        f"{trained:.2f} M in LoRA, {base.dtype}, {base.device}, {form} prompt\nrun {run}"
    )
    with catch_signals(to_paste(["train", settings.task, "--resume", run], settings, CODE)) as stop:
        asked = partial(evaluate_once, policy, test_set, settings, run, stop)
        phases = ["base", "start"] if settings.start_from else ["base"]  # start: as --adapter is
        results = {phase: asked(phase) for phase in phases}
        if base_rows := results["base"]:
            right, cut = (fmean(r[key] for r in base_rows) for key in ("correct", "truncated"))
            limit = f"{cut:.0%} cut off at {settings.max_new_tokens} tokens"
            console.print(f"before training: {right:.1%} right (greedy), {limit}")
        with progress("training", settings.steps) as tick:
            for row, rollouts in train(policy, train_set, held_out, settings, run, stop):
                note = ""
                if rollouts and (not rows or row["step"] % 10 == 1):  # a process can have no prompt
                    first, text = rollouts[0], policy.text(rollouts[0].completions[0])
                    note = completion_note(first.problem, text, first.rewards[0])
                show_step(row, base.device, note)
                tick(1 if rows else row["step"])
                rows.append(row)
        if any(gather([bool(stop)])):
            stop.append(signal.SIGTERM)  # where another process got the signal
            return
        kept = safetensors.load_file(run / "adapter_model.safetensors")
        peft.set_peft_model_state_dict(policy.model, kept)
        results["trained"] = asked("trained")
    if test_set:
        console.print(comparison_table(results, f"{settings.task}, {label}, {run}"))
    if rows:
        minutes = sum(row["rollout_s"] + row["update_s"] for row in rows) / 60
        show_step(mean_step(rows), base.device, f"{len(rows)} steps in {minutes:.1f} min, a step:")
        if not any(row["tokens_trained"] for row in rows):
            console.print("Nothing was trained: no rewards differed; see --reward.")
    state = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
    end = " (no gain: --patience)" * (state["stale"] >= settings.patience)
    console.print(f"Adapter: {run}, from step {state['best_step']} of {state['step']}{end}")
    again = to_paste(["eval", settings.task, "--adapter", run], settings, CODE[:2])
    console.print("Ask it again:", again, soft_wrap=True)


def to_paste(words: list, settings: Settings, keys: list[str]) -> str:
    """A command, with what it must say again: code, and where the data are."""
    for key in [*keys, "data_dir"]:
        if (value := getattr(settings, key)) != getattr(Settings, key):
            words += [flag(key), value]
    return shlex.join(["python", sys.argv[0], *map(str, words)])


@contextlib.contextmanager
def catch_signals(again: str):
    """Yields a list that gets the first Ctrl-C or SIGTERM; `again` is the command that goes on."""
    stop, owner = [], os.getpid()

    def handle(number, frame):
        if os.getpid() != owner:  # a process that a reward has forked
            os._exit(128 + number)
        if stop:
            raise SystemExit(128 + number)
        stop.append(number)
        with contextlib.suppress(SystemExit):  # a pipe that Ctrl-C has ended, too
            console.print("Stopping after this step or batch (press again to give up) ...")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stop:
            console.print("What was saved is intact. Continue with:", again, soft_wrap=True)
    if stop:
        raise SystemExit(128 + stop[0])


def evaluate_once(policy, problems, settings: Settings, run: Path, stop, phase: str) -> list[dict]:
    """The records of a phase: those in run/eval.jsonl, or new ones, which are added there."""
    path = run / "eval.jsonl"
    old = run_rows(path)
    done = [row for row in old if row.get("phase") == phase]
    asked = [Problem(*(row.get(part.name) for part in fields(Problem))) for row in done]
    whole = all(r.get(key) in (0, 1) for r in done for key in ("correct", "truncated", "samples"))
    if whole and asked == problems:
        return done
    bare = policy.model.disable_adapter() if phase == "base" else contextlib.nullcontext()
    with bare, progress("evaluating", len(problems), stop) as tick:
        found = evaluate(policy, problems, settings, 0, tick)
    records = [{"phase": phase, **record} for record in found]
    if processes().process_index == 0:
        write_jsonl(path, [row for row in old if row.get("phase") != phase] + records)
    return records


def dry_run(policy: Policy, problems: list[Problem], settings: Settings) -> None:
    """A step at its largest: the longest prompts, no completion ends, every group has signal."""
    count = settings.prompts_per_step + settings.replay
    longest = sorted(problems, key=lambda problem: len(policy.prompt_ids(problem.question)))
    settings = replace(settings, steps=1, prompts_per_step=count, replay=0)
    turns = itertools.cycle([0.0, 1.0])
    policy.ends, policy.stop = set(), ""
    policy.reward = lambda problem, completion: next(turns)
    with tempfile.TemporaryDirectory() as folder:
        for row, _ in train(policy, longest[-count:], [], settings, Path(folder), []):
            show_step(row, policy.model.device, "The largest step:")


@app.command("eval", epilog="Example: python tokenrl.py eval svamp --adapter runs/svamp-s-grpo")
@asks
def eval_command(
    settings: Settings,
    adapter: Annotated[list[Path] | None, opt(help="A run's folder; may be repeated.")] = None,
    question: Annotated[str, opt(help="Only answer this question of yours.")] = "",
    samples: Annotated[int, opt(help="N samples a problem, for pass@k.", min=0)] = 0,
    limit: Annotated[int | None, opt(help="First N problems.", show_default="all", min=1)] = None,
    shown: Annotated[int, opt(help="Answers shown of each kind.", min=0)] = 3,
    output: Annotated[Path | None, opt(help="Write every answer to this JSONL file.")] = None,
    min_accuracy: Annotated[float, opt(help="Exit code 1 if the last is below it.")] = 0.0,
):
    """Compare the base model and any number of adapters on the test problems."""
    check_writable(output)
    policy, task = find_policy(settings)
    problems, results = [Problem(question, "")] if question else task.test[:limit], {}
    if question:  # no reference, which code of the user's may need
        policy.score, policy.metric = (lambda text, answer: 0.0), None
    now = digests(settings, policy, task)
    for number, folder in enumerate([None, *dict.fromkeys(adapter or [])]):
        label, name = "base", f"adapter{number}"
        if folder:
            label = str(folder) + "/" * (str(folder) == "base")
            policy.model = load_adapter(policy.model, folder, name, settings.model)
            policy.model.set_adapter(name)
            note_changes(folder, now)
        with progress(label, len(problems) * (1 + samples)) as tick:
            results[label] = evaluate(policy, problems, settings, samples, tick)
    if question:
        for name, [record] in results.items():
            console.print(Text(name, "bold"), record["completion"], sep="\n")
        return
    console.print(*changes(results, shown), sep="\n")
    console.print(comparison_table(results, f"{settings.task}, {Path(settings.model).name}"))
    if output:
        rows = [{"policy": name, **record} for name in results for record in results[name]]
        with open(output, "w", encoding="utf-8") as file:  # links, devices
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    reached = fmean(record["correct"] for record in results[label])
    low = f"Accuracy {reached:.1%} is below --min-accuracy {min_accuracy:.1%}."
    refuse(not reached >= min_accuracy, low)  # NaN fails too


def check_writable(path: Path | None, *kinds: str) -> None:
    """Raise now, not after an hour, where --output cannot be written or is of no known kind."""
    if path:
        refuse(kinds and path.suffix not in kinds, f"--output must end in {' or '.join(kinds)}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "a").close()


@app.command("inspect", epilog="Example: python tokenrl.py inspect svamp --method all")
@asks
def inspect_command(
    settings: Settings,
    index: Annotated[int | None, opt(help="Training problem; else one with signal.", min=0)] = None,
    adapter: Annotated[Path | None, opt(help="A run's folder.")] = None,
    output: Annotated[Path | None, opt(help="Also write it to this .html or .svg file.")] = None,
):
    """Sample one group and show which tokens a method trains, with what credit."""
    check_writable(output, ".html", ".svg")
    names = METHODS if settings.method == "all" else [settings.method]
    functions = {name: credit_function(replace(settings, method=name)) for name in names}
    policy, task = find_policy(settings)
    if adapter:
        policy.model = load_adapter(policy.model, adapter, "adapter", settings.model)
    problems = task.train or task.test
    asked = problems[:20] if index is None else problems[index : index + 1]
    refuse(not asked, f"--index {index}: there are {len(problems)} problems, from 0.")
    for problem in asked:
        [rollout] = roll_out(policy, [problem], settings, settings.seed)
        if rollout.has_signal:
            break
    shown = {}
    for name, function in functions.items():
        credited = credit([rollout], function, random.Random(settings.seed))
        rule = first_line(METHODS.get(name, function).__doc__ or "a method without a docstring.")
        shown[method_name(name)] = rule, credited[0][2] if credited else {}
    console.record = bool(output)
    console.print(*show_group(policy, rollout, shown), sep="\n")
    if output:
        (console.save_html if output.suffix == ".html" else console.save_svg)(str(output))


@app.command(epilog="Example: python tokenrl.py plot runs/* --what entropy")
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN...")],
    what: Annotated[str, opt(help="A column of metrics.jsonl, such as validation.")] = "reward",
    output: Annotated[Path | None, opt(help="Also draw it into this .png or .svg file.")] = None,
):
    """Draw the curves of one or more runs, in the terminal and as a picture."""
    check_writable(output, ".png", ".svg")
    curves = {}
    for run in runs:
        if curve := curve_of(run_rows(run / "metrics.jsonl"), what):
            curves[f"{run} {accuracies(run)}".strip()] = curve
    refuse(not curves, f"There is no {what} to draw in {', '.join(map(str, runs))}.")
    console.print(curve_table(curves, what))
    if output:
        from matplotlib.figure import Figure

        axes = (figure := Figure(layout="constrained")).subplots()
        for run, curve in curves.items():
            axes.plot(*zip(*curve.items()), label=run)
        axes.set(xlabel="step", ylabel=what)
        axes.legend()
        figure.savefig(output)


@app.command(epilog="Example: python tokenrl.py merge runs/svamp-s-grpo merged")
def merge(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the merged checkpoint.")],
    dtype: Annotated[str, opt(help="auto (the model's own), float32, bfloat16, float16.")] = "auto",
):
    """Write base model and adapter as one plain checkpoint, for vLLM, llama.cpp's converter or
    transformers. bfloat16 rounds away what is under a 500th of a weight."""
    refuse(out.exists(), f"{out} is there already; give a new folder.")
    saved = run_settings(run)
    name, prompt = saved["model"], saved.get("prompt", "auto")
    console.print(f"Loading {name} ...")
    model, tokenizer = load_model(name, "cpu", "float32")  # so that only the sum is rounded
    source = Path(tokenizer.name_or_path)
    kind = stored_dtype(source) if dtype == "auto" else pick_dtype(dtype, "cpu", None)
    model = load_adapter(model, run, "adapter", name)
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    odd = first.weight is last.weight and (hasattr(first, "lora_A") or hasattr(last, "lora_A"))
    refuse(odd, f"{run} changes one of two tied embeddings: no merge keeps that.")
    model = model.merge_and_unload().to(kind)
    check_finite(model.named_parameters(), run)  # its lora_alpha can be anything
    # The base's own top_k or penalties would answer otherwise than in training.
    ends, pad = sorted(end_tokens(model, tokenizer)), model.generation_config.pad_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    save_checkpoint(model, out)
    tokenizer.save_pretrained(out)
    template = source / "prompt.txt" if prompt == "auto" else Path(prompt)
    if template.is_file():  # so that auto asks as in training
        shutil.copy(template, out / "prompt.txt")
    console.print(f"Written: {out}, {kind}")


def main(arguments: list[str] | None = None) -> None:
    # Before torch is imported: threads that spin long starve each other beside a busy core, and a
    # GPU's memory in fixed pieces is lost to fragments.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "600")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    sys.modules.setdefault("tokenrl", sys.modules[__name__])  # for `import tokenrl` in a FILE.py
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="replace")  # some cannot show a table's lines
    try:
        app(arguments)
    except Exception as error:
        sentence = str(error)
        if out_of_memory(error):
            sentence = "Out of memory: lower --batch-rows, --max-pack-tokens or --max-new-tokens."
        elif "No space left" in sentence:
            sentence = "The disk is full: make room; a run then goes on with --resume."
        elif isinstance(error, ModuleNotFoundError):
            sentence += f": pip install {error.name}"
        elif not isinstance(error, (UserError, OSError)):
            raise
        errors.print(Text("Error:", "bold red"), sentence, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    try:
        main()
    finally:
        if "torch" in sys.modules and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # gloo's threads could abort the end
