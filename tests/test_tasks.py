"""Problems, answers and data files."""
import json
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenrl

ANSWERS = [
    # a marked answer comes first
    ("24 - 9 = 15\n#### 15", 15), ("#### 15 apples", 15), ("#### 15\nQuestion: 3 + 4", 15), ("####15", 15),
    (r"so \boxed{42}", 42), (r"\boxed{-3}", -3),
    (r"the answer is $\boxed{5}$.", 5), (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
    (r"\boxed{2\frac{1}{2}}", Fraction(5, 2)), (r"-\tfrac{1}{2}", Fraction(-1, 2)),
    (r"\boxed{-3\dfrac{1}{2}}", Fraction(-7, 2)), (r"\boxed{1{,}428}", 1428), (r"#### -\$5", -5),
    ("The answer is 7. I checked it 2 times.", 7), ("the answer is **5**", 5), ("Final answer: 8, of 10", 8),
    ("The answer is 3. No, the answer is 4.", 4), ("#### 3\n#### 4", 4), ("the answer is:\n12", 12),
    ("#### none, so 6", 6), ("I say #### nothing\n9", 9),
    # else the last number
    ("first 3, then 4", 4), ("10 - 3 = 7", 7), ("12 is not 120", 120), ("no number", None), ("", None),
    # what a number is
    ("1,234", 1234), ("1234.0", 1234), ("1,234,567.50", Fraction(12345675, 10)),
    ("$1,200", 1200), ("-$5", -5), ("$-5", -5),
    ("0.5", Fraction(1, 2)), (".5", Fraction(1, 2)), ("1/2", Fraction(1, 2)), ("2 1/2", Fraction(5, 2)),
    ("24 of 96\n1/4", Fraction(1, 4)),
    ("= -2", -2), ("3-2", 2), ("(5)-3", 3), ("\u22123", -3), ("4 * -2 = -8", -8), ("50%", 50), ("It is 12.", 12),
    ("10 - 3", 3), ("x2 and y3", None), ("3/0", None), ("9" * 5000, None), ("5 kg", 5), ("5kg", 5), ("007", 7),
]


@pytest.mark.parametrize("text, wanted", ANSWERS)
def test_extract_number(text, wanted):
    assert tokenrl.extract_number(text) == wanted


@pytest.mark.parametrize("text, answer, reward", [
    ("#### 1,234", "1234", 1.0), ("#### 1234.0", "1,234", 1.0), ("#### 12", "120", 0.0), ("#### 120", "12", 0.0),
    ("#### 0.5", "1/2", 1.0), ("#### 0.33", "1/3", 0.0), ("#### -4", "4", 0.0), ("", "0", 0.0), ("none", "none", 0.0),
    ("#### 22090603", "22090603", 1.0), ("0.1 + 0.2 = 0.3", "0.3", 1.0),
])
def test_number_reward(text, answer, reward):
    assert tokenrl.number_reward(text, answer) == reward


@given(st.text(alphabet="0123456789-+.,/#$% \n\\boxed{}answeris:ABC\u2212\u0663", max_size=60))
@settings(max_examples=500)
def test_the_parser_never_fails(text):
    found = tokenrl.extract_number(text)
    assert found is None or isinstance(found, Fraction)
    assert tokenrl.number_reward(text, text) in (0.0, 1.0)


@given(st.integers(-10**9, 10**9),
       st.sampled_from(["#### {}", "\\boxed{{{}}}", "3 + 4, so the answer is {}.", "it is {}"]))
def test_every_integer_is_read_back(number, form):
    assert tokenrl.extract_number(form.format(number)) == number
    assert tokenrl.extract_number(form.format(f"{number:,}")) == number


@given(st.binary(max_size=80), st.sampled_from([".csv", ".jsonl"]))
@settings(max_examples=300)
def test_any_bytes_are_read_or_refused_in_a_sentence(tmp_path_factory, raw, suffix):
    path = tmp_path_factory.getbasetemp() / f"data{suffix}"
    path.write_bytes(raw)
    try:
        problems, rejected = tokenrl.file_problems(path, "question", "answer", True)
        assert all(problem.question and tokenrl.is_number(problem.answer) for problem in problems)
    except tokenrl.UserError as error:
        assert str(error)


@given(st.lists(st.fixed_dictionaries({}, optional={
    "question": st.one_of(st.none(), st.integers(), st.text(max_size=8), st.just("\ud800")),
    "answer": st.one_of(st.none(), st.floats(), st.integers(), st.text(max_size=5), st.lists(st.integers()))}),
    max_size=6))
@settings(max_examples=300)
def test_any_rows_are_read_or_refused_in_a_sentence(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        problems, rejected = tokenrl.file_problems(path, "question", "answer", True)
        assert len(problems) + sum(map(len, rejected.values())) == len(rows)
    except tokenrl.UserError as error:
        assert str(error)


def test_prepared_tasks_are_read_back(tmp_path):
    problems = [tokenrl.Problem(f"What is {i} + \u00e9?", str(i), "sum") for i in range(10)]
    sizes = tokenrl.write_task("sums", problems, tokenrl.STORY_EXAMPLES, 0.3, 0, tmp_path)
    train, test, examples = tokenrl.load_task("sums", tmp_path)
    assert sizes == (7, 3) == (len(train), len(test))
    assert set(train) | set(test) == set(problems) and not set(train) & set(test)
    assert examples == tokenrl.STORY_EXAMPLES
    tokenrl.write_task("sums", problems, [], 0.3, 0, tmp_path)
    assert tokenrl.load_task("sums", tmp_path)[0] == train  # the same seed, the same split


@pytest.mark.parametrize("digits, a_digits, b_digits", [("2", 2, 2), ("3x1", 3, 1), ("1x2", 1, 2)])
def test_multiplication(digits, a_digits, b_digits):
    problems = tokenrl.multiply_problems(digits, 30, 0)
    pairs = set()
    for problem in problems:
        _, _, a, _, b = problem.question.rstrip("?").split()
        assert (len(a), len(b)) == (a_digits, b_digits)
        assert int(a) * int(b) == int(problem.answer)
        pairs.add(frozenset([a, b]))
    assert len(pairs) == len(problems) == 30
    assert len(tokenrl.multiply_problems("1", 1000, 0)) == 36  # 2..9 by 2..9, each pair once


def test_every_worked_example_is_right():
    for row in tokenrl.STORY_EXAMPLES + tokenrl.MULTIPLY_EXAMPLES:
        for line in row["answer"].split("\n"):
            if "=" in line:
                a, sign, b, _, result = re.search(r"(\d+) ([-+*]) (\d+) (=) (\d+)", line).groups()
                assert {"-": int(a) - int(b), "+": int(a) + int(b), "*": int(a) * int(b)}[sign] == int(result)
        assert tokenrl.extract_number(row["answer"]) == int(result)


@pytest.mark.parametrize("size, count", [(10, 3), (3, 8), (7, 7)])
def test_every_epoch_asks_every_problem_once_in_a_new_order(size, count):
    problems = list(range(size))
    asked = [i for step in range(size * 3) for i in tokenrl.step_problems(problems, step, count, 0)]
    epochs = [asked[i:i + size] for i in range(0, len(asked) - size + 1, size)]
    assert all(sorted(epoch) == problems for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert asked[:count] != tokenrl.step_problems(problems, 0, count, 1) or size == 3
