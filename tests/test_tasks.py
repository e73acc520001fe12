"""Rewards of one's own and prepared tasks. How answers are read: test_answers.py."""

import json
import os
import re
from pathlib import Path

import pytest

import tokenrl

# ---- rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, text, answer, reward",
    [
        ("number", "#### 1,234", "1234", 1.0),
        ("number", "#### 1", "2", 0.0),
        ("exact", "I think.\n#### Paris", "paris", 1.0),
        ("exact", "#### Paris, France", "Paris", 0.0),
        ("regex:Total: {answer}$", "Total: 1.5", "1.5", 1.0),
        ("regex:Total: {answer}$", "Total: 1x5", "1.5", 0.0),
        ("regex:^####", "#### 3", "4", 1.0),
        ("regex:^[{answer}]$", "(", "B", 0.0),
        ("regex:^[{answer}]$", "B", "B", 1.0),
        ("regex:x.py:{answer}", "x.py:3", "3", 1.0),
    ],
)
def test_rewards(option, text, answer, reward):
    found = tokenrl.reward_function(option)(text, answer)
    assert found == reward and type(found) is float


def test_the_number_reward_reads_by_the_tasks_decimal_mark():
    for decimal, right in ((",", "1200"), (".", "1.2")):
        reward = tokenrl.reward_function("number", decimal)
        assert reward("#### 1.200", right) == 1 and reward("#### 1.200", "7") == 0


@pytest.mark.parametrize(
    "option, is_code",
    [
        ("FILE.py:f", True),
        ("a/b c.py:f", True),
        ("C:\\x\\FILE.py:f", True),
        ("number", False),
        ("FILE.py", False),
        ("s-grpo", False),
        ("regex:x.py:f", False),
        ("FILE.txt:f", False),
        ("", False),
        (":", False),
    ],
)
def test_is_code(option, is_code):
    assert tokenrl.is_code(option) == is_code


@pytest.fixture
def score(tmp_path):
    """A reward function from the text of a file."""
    path = tmp_path / "score.py"

    def load(code, name="f"):
        path.write_text(code)
        return tokenrl.reward_function(f"{path}:{name}")

    return load


def test_a_reward_from_a_file(score):
    near = score(
        "def f(text, answer):\n    return max(0.0, 1 - abs(float(text) - float(answer)) / 10)\n"
    )
    assert near("7", "9") == pytest.approx(0.8)


@pytest.mark.parametrize(
    "value, reward",
    [
        ("0.7 + 0.2 + 0.1", 1.0),
        ("1.0000000000000002", 1.0),
        ("1 + 4e-7", 1.0),
        ("-1e-9", 0.0),
        ("1/3", 0.333333),
        ("True", 1.0),
        ("False", 0.0),
        ("1", 1.0),
        ("numpy.float32(0.5)", 0.5),
        ("numpy.bool_(True)", 1.0),
        ("numpy.int64(1)", 1.0),
        ("numpy.array(0.25)", 0.25),
        ("numpy.float32(0.7) + numpy.float32(0.3)", 1.0),
        ("__import__('fractions').Fraction(1, 4)", 0.25),
        ("__import__('torch').tensor(0.5)", 0.5),
    ],
)
def test_numbers_that_are_rewards(score, value, reward):
    found = score(f"import numpy\ndef f(text, answer): return {value}")("", "")
    assert found == reward and type(found) is float


@pytest.mark.parametrize(
    "value",
    ["2", "1.00001", "-0.001", "float('nan')", "float('inf')", "None", "'a'", "1j", "[1]"],
)
def test_what_is_no_reward(score, value):
    with pytest.raises(tokenrl.UserError) as error:
        score(f"def f(text, answer): return {value}")("abc", "def")
    assert "'abc'" in str(error.value) and "'def'" in str(error.value)
    assert "not from 0 to 1" in str(error.value) or "Error(" in str(error.value)


@pytest.mark.parametrize(
    "code, sentence",
    [
        (
            "1 / 0",
            "fails on 'abc' where 'def' is right: ZeroDivisionError('division by zero')",
        ),
        ("sys.exit()", "SystemExit"),
        ("sys.exit('no')", "SystemExit('no')"),
        ("(_ for _ in ()).throw(KeyboardInterrupt)", "KeyboardInterrupt"),
        ("(_ for _ in ()).throw(GeneratorExit)", "GeneratorExit"),
        ("f(text)", "TypeError"),
        ("f(text, answer)", "RecursionError"),
        ("__import__('numpy').array([1, 0])", "TypeError"),
    ],
)
def test_a_reward_that_fails_ends_in_one_sentence(score, code, sentence):
    with pytest.raises(tokenrl.UserError) as error:
        score(f"import sys\ndef f(text, answer): return {code}")("abc", "def")
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "code, sentence",
    [
        ("def g(): pass", "KeyError('f')"),
        ("{}['x']", "KeyError('x')"),
        ("def f(", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit(3)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("\0", "cannot be loaded"),
    ],
)
def test_a_file_that_cannot_be_loaded(score, code, sentence):
    with pytest.raises(tokenrl.UserError) as error:
        score(code)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    for name in ("none.py:f", f"{tmp_path}/x.py:f", ".py:f"):
        with pytest.raises(tokenrl.UserError, match="cannot be loaded from .*FileNotFound"):
            tokenrl.load_function(name)


def test_the_current_folder_is_kept(score, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    chdir = f"os.chdir({str(tmp_path / 'sub')!r})"
    reward = score(
        f"import os\n{chdir}\ndef f(text, answer):\n    {chdir}\n    return 1 / len(text)\n"
    )
    assert Path.cwd() == tmp_path
    assert reward("ab", "") == 0.5 and Path.cwd() == tmp_path
    with pytest.raises(tokenrl.UserError):
        reward("", "")
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize(
    "pattern",
    ["(", r"\{answer}", "[", "{answer}**", "(?P<a>x)(?P<a>y)", "a{2,1}"],
)
def test_a_pattern_is_tried_with_answers_in_it(pattern):
    with pytest.raises(tokenrl.UserError, match="PatternError|error\\("):
        tokenrl.reward_function(f"regex:{pattern}")


def test_a_pattern_that_fails_with_one_answer_only():
    reward = tokenrl.reward_function("regex:[ -{answer}]")
    with pytest.raises(tokenrl.UserError, match="bad character range"):
        reward("text", "\n")


@pytest.mark.parametrize(
    "option", ["best", "numbr", "", "regex", "exact:", "FILE.py", "score.txt:f"]
)
def test_unknown_rewards(option):
    with pytest.raises(tokenrl.UserError, match="is not number, exact"):
        tokenrl.reward_function(option)


# ---- prepared tasks ------------------------------------------------------------------------------

PROBLEMS = [tokenrl.Problem(f"What is {i} + \u00e9?", str(i), "sum") for i in range(10)]


def test_prepared_tasks_are_read_back(tmp_path):
    sizes = tokenrl.write_task("sums", PROBLEMS, tokenrl.STORY_EXAMPLES, 0.3, 0, tmp_path, ",")
    task = tokenrl.load_task("sums", tmp_path)
    assert sizes == (7, 3) == (len(task.train), len(task.test))
    assert set(task.train) | set(task.test) == set(PROBLEMS) and not set(task.train) & set(
        task.test
    )
    assert task.examples == tokenrl.STORY_EXAMPLES and task.decimal == ","
    tokenrl.write_task("sums", PROBLEMS, [], 0.3, 0, tmp_path)
    again = tokenrl.load_task("sums", tmp_path)
    assert again.train == task.train and again.decimal == ""  # the same seed, the same split
    assert again.examples == tokenrl.STORY_EXAMPLES  # they may be the user's own


def test_tasks_of_the_first_edition_are_read(tmp_path):
    (tmp_path / "old").mkdir()
    for split, answer in (("train", "1"), ("test", "2")):
        tokenrl.write_jsonl(
            tmp_path / "old" / f"{split}.jsonl", [{"question": "q", "answer": answer, "type": ""}]
        )
    task = tokenrl.load_task("old", tmp_path)
    assert task == tokenrl.Task([tokenrl.Problem("q", "1")], [tokenrl.Problem("q", "2")], [], "")


def test_the_bundled_task_is_read():
    task = tokenrl.load_task("demo", tokenrl.DATA)
    assert (len(task.train), len(task.test), task.decimal) == (700, 300, "")


@pytest.mark.parametrize(
    "file, content, sentence",
    [
        ("test.jsonl", "", "test.jsonl is empty"),
        ("test.jsonl", None, "There is no file"),
        (
            "train.jsonl",
            '{"question": "q", "answer": 1}\n{"question": "q2"}\n',
            "train.jsonl line 2: no answer",
        ),
        (
            "train.jsonl",
            '\n\n{"question": "q", "answer": 1}\n{"question": "q2", "answer": "x"}\n',
            "train.jsonl line 4: the answer 'x' is not a number",
        ),
        (
            "test.jsonl",
            '{"question": "q", "answer": NaN}',
            "test.jsonl line 1: the answer 'nan' is not a number",
        ),
        ("train.jsonl", "{", "train.jsonl does not hold rows"),
        ("train.jsonl", "[1]", "train.jsonl does not hold rows: 'int' object"),
        ("train.jsonl", '{"answer": 1}', "train.jsonl line 1: no question"),
        (
            "examples.jsonl",
            '{"question": "q", "answer": "a"}\n{"question": "q"}\n',
            "examples.jsonl line 2 lacks",
        ),
        (
            "examples.jsonl",
            json.dumps({"question": PROBLEMS[7].question, "answer": "a"}),
            "is a worked example, too",
        ),
        ("task.json", '{"decimal": ";"}', "is not a number"),
        ("task.json", '{"decimal": [1]}', "is not a number"),
        ("task.json", "{", "task.json does not hold rows"),
        ("task.json", "3", "task.json does not hold rows"),
    ],
)
def test_errors_name_file_and_line(tmp_path, file, content, sentence):
    tokenrl.write_task("t", PROBLEMS, [], 0.3, 0, tmp_path)
    path = tmp_path / "t" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(tokenrl.UserError) as error:
        tokenrl.load_task("t", tmp_path)
    assert sentence in str(error.value)


@pytest.mark.parametrize("content", ["", "{}", '{"decimal": ""}'])
def test_a_task_without_a_decimal_mark(tmp_path, content):
    tokenrl.write_task("t", PROBLEMS, [], 0.3, 0, tmp_path)
    (tmp_path / "t" / "task.json").write_text(content)
    assert tokenrl.load_task("t", tmp_path).decimal == ""


def test_text_answers_only_where_they_are_asked_for(tmp_path):
    problems = [tokenrl.Problem(f"Is {i} even?", "no" if i % 2 else "yes") for i in range(6)]
    tokenrl.write_task("parity", problems, [], 0.5, 0, tmp_path)
    assert len(tokenrl.load_task("parity", tmp_path, numeric=False).train) == 3
    with pytest.raises(tokenrl.UserError, match="is not a number"):
        tokenrl.load_task("parity", tmp_path)


def test_a_task_that_is_not_there(tmp_path):
    tokenrl.write_task("sums", PROBLEMS, [], 0.3, 0, tmp_path)
    for name in ("none", "svamp", "sums.csv", "a\0b", "../x"):
        with pytest.raises(tokenrl.UserError, match="There is no task .* prep .* --data-dir"):
            tokenrl.load_task(name, tmp_path)


def test_every_worked_example_is_right():
    for row in tokenrl.STORY_EXAMPLES + tokenrl.MULTIPLY_EXAMPLES:
        sums = re.findall(r"(\d[\d *+-]*)=( \d[\d *+-]*)", row["answer"])
        assert sums and all(eval(left) == eval(right) for left, right in sums)
        assert tokenrl.number_reward(row["answer"], str(eval(sums[-1][1])))


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_text_of_many_programs(tmp_path, encoding):
    path = tmp_path / "t.txt"
    path.write_bytes("Gr\u00fc\u00dfe, 5 \u20ac\r\nb\rc\n".encode(encoding))
    assert tokenrl.read_text(path) == "Gr\u00fc\u00dfe, 5 \u20ac\nb\nc\n"


def test_writing_replaces_a_file_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "f.jsonl"
    tokenrl.write_jsonl(path, [{"a": "\u00e9\u2028"}, {"b": "\ud800"}])
    assert tokenrl.read_rows(path) == [(1, {"a": "\u00e9\u2028"}), (2, {"b": "?"})]
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        tokenrl.write_atomically(path, "new")
    assert path.read_bytes() == before
