"""prep: from the files that people have to a prepared task."""

import hashlib
import itertools
import json
import os
import re
import urllib.error
from pathlib import Path

import pytest
from conftest import rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenrl


def answers_of(folder):
    """{question: answer} of a prepared task."""
    return {
        row["question"]: row["answer"]
        for split in ("train", "test")
        for row in rows_of(f"{folder}/{split}.jsonl")
    }


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbered(*answers):
    return [{"question": f"q{i}", "answer": answer} for i, answer in enumerate(answers)]


# ---- svamp and multiply --------------------------------------------------------------------------


def fake_svamp(tmp_path, monkeypatch):
    rows = [
        {
            "ID": str(i),
            "Body": f"Box {i} holds {i} pens",
            "Question": "How many pens is that?",
            "Equation": "",
            "Answer": float(i) if i else 22090603.0,
            "Type": "Common-Divison",
        }
        for i in range(10)
    ]
    path = tmp_path / "SVAMP.json"
    path.write_text(json.dumps(rows))
    monkeypatch.setattr(tokenrl, "SVAMP_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_svamp_from_a_file_and_by_download(cli, tmp_path, monkeypatch):
    path = fake_svamp(tmp_path, monkeypatch)
    code, text = cli("prep", "svamp", "--source", path, "--data-dir", "d1")
    assert code == 0 and "d1/svamp: 7 to train, 3 to test" in text
    rows = rows_of("d1/svamp/train.jsonl") + rows_of("d1/svamp/test.jsonl")
    assert sorted(int(row["answer"]) for row in rows) == [*range(1, 10), 22090603]
    assert {row["type"] for row in rows} == {"Common-Division"}
    assert "Box 3 holds 3 pens. How many pens is that?" in {row["question"] for row in rows}
    monkeypatch.setattr(tokenrl, "SVAMP_URL", path.as_uri())
    assert cli("prep", "svamp", "--data-dir", "d2")[0] == 0
    assert rows_of("d2/svamp/train.jsonl") == rows_of("d1/svamp/train.jsonl")


def test_svamp_refuses_other_files_and_says_what_to_do_offline(cli, tmp_path, monkeypatch):
    path = fake_svamp(tmp_path, monkeypatch)
    path.write_text(path.read_text() + " ")
    assert "sha256 differs" in cli("prep", "svamp", "--source", path)[1]
    code, text = cli("prep", "svamp", "--source", "none.json")
    assert code == 1 and "none.json" in text

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(tokenrl.urllib.request, "urlopen", unreachable)
    code, text = cli("prep", "svamp", "--data-dir", "d")
    assert code == 1 and "--source" in text


def test_multiply(cli):
    assert cli("prep", "multiply", "--digits", "2", "--count", "50", "--data-dir", "d")[0] == 0
    rows = rows_of("d/multiply/train.jsonl")
    assert len(rows) == 35 and all(
        re.fullmatch(r"What is \d\d \* \d\d\?", row["question"]) for row in rows
    )
    assert "47 * 30 = 1410" in rows_of("d/multiply/examples.jsonl")[0]["answer"]  # digit by digit
    code, text = cli("prep", "multiply", "--digits", "1", "--count", "37", "--data-dir", "d")
    assert code == 1 and "--count 37" in text and "only 36 products" in text
    for digits in ("0", "10", "x", "2x"):
        assert cli("prep", "multiply", "--digits", digits)[0] == 1
    code, _ = cli("prep", "multiply", "--digits", "2x1", "--count", "50", "--data-dir", "d2")
    rows = rows_of("d2/multiply/train.jsonl")
    assert all(re.fullmatch(r"What is \d\d \* \d\?", row["question"]) for row in rows)
    assert {row["type"] for row in rows} == {"2x1"}


@pytest.mark.parametrize("digits", ["1", "2"])
def test_multiply_can_give_every_pair_once(digits):
    factors = range(2, 10) if digits == "1" else range(10, 100)
    wanted = set(itertools.combinations_with_replacement(factors, 2))
    wanted -= {tuple(sorted(pair)) for pair in tokenrl.FACTORS}  # the prompt shows their products
    problems = tokenrl.multiply_problems(digits, len(wanted), 0)
    found = [tuple(map(int, re.findall(r"\d+", problem.question))) for problem in problems]
    assert {tuple(sorted(pair)) for pair in found} == wanted and len(found) == len(wanted)
    assert all(int(problem.answer) == a * b for problem, (a, b) in zip(problems, found))
    assert any(a < b for a, b in found) and any(a > b for a, b in found)  # in either order
    with pytest.raises(tokenrl.UserError, match="gives only"):
        tokenrl.multiply_problems(digits, len(wanted) + 1, 0)


@pytest.mark.parametrize("digits, count", [("2", 1000), ("2", 4000), ("2x1", 600)])
def test_no_product_of_a_worked_example_is_asked(digits, count):
    shown = {frozenset(pair) for pair in tokenrl.FACTORS}
    for seed in range(3):
        problems = tokenrl.multiply_problems(digits, count, seed)
        asked = {frozenset(map(int, re.findall(r"\d+", p.question))) for p in problems}
        assert len(problems) == len(asked) == count and not asked & shown


def test_multiply_of_nine_digits():
    problems = tokenrl.multiply_problems("9", 50, 3)
    assert len(set(problems)) == 50 and problems == tokenrl.multiply_problems("9", 50, 3)
    assert problems != tokenrl.multiply_problems("9", 50, 4)


# ---- files ---------------------------------------------------------------------------------------


def test_own_csv_and_jsonl(cli):
    lines = ["frage,antwort,type", '"Two, and two?",4,sum', "Nothing?,,sum", "A word?,many,sum"]
    lines += [
        '"Two, and two?",4.0,sum',
        '"Two, and two?",5,sum',
        *(f"{i} and {i}?,{2 * i}.0,sum" for i in range(8)),
    ]
    Path("own.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    code, text = cli(
        "prep", "own.csv", "--question", "frage", "--answer", "antwort", "--data-dir", "d"
    )
    assert code == 0
    for part in (
        "rejected line 3: no answer",
        "rejected line 4: the answer 'many' is not a number",
        "rejected line 5: a repeat: '4.0' after '4'",
        "rejected line 6: a contradiction: '5' after '4'",
        "d/own: 6 to train, 3 to test, 4 in rejected.jsonl",
    ):
        assert part in text
    rejected = rows_of("d/own/rejected.jsonl")
    assert [row["line"] for row in rejected] == [3, 4, 5, 6]
    assert "many" in rejected[1]["reason"] and rejected[1]["row"]["frage"] == "A word?"
    write_rows("own.jsonl", numbered(*range(4)))
    assert cli("prep", "own.jsonl", "--name", "mine", "--data-dir", "d")[0] == 0
    assert len(rows_of("d/mine/train.jsonl")) == 3
    Path("d/mine/examples.jsonl").write_text(own := '{"question": "mine", "answer": "1"}\n')
    assert cli("prep", "own.jsonl", "--name", "mine", "--data-dir", "d")[0] == 0
    assert Path("d/mine/examples.jsonl").read_text() == own  # the user's work


def test_many_rejected_rows_are_not_all_shown(cli):
    write_rows("own.jsonl", numbered(1, 2, 3, 4, *("x" * 5000 for _ in range(30))))
    code, text = cli("prep", "own.jsonl", "--data-dir", "d")
    assert code == 0 and text.count("rejected line") == 10 and len(text) < 3000
    assert len(rows_of("d/own/rejected.jsonl")) == 30
    write_rows("own.jsonl", numbered(1, 2, 3, 4))
    assert cli("prep", "own.jsonl", "--data-dir", "d")[0] == 0
    assert rows_of("d/own/rejected.jsonl") == []  # of this preparation


@pytest.mark.parametrize(
    "name, content, arguments, sentence",
    [
        ("f.jsonl", None, [], "There is no file f.jsonl"),
        ("f.jsonl", b"", [], "0 usable problems"),
        ("f.csv", b"question,answer\n", [], "0 usable problems"),
        ("f.jsonl", b"\xff\xfe\x00", [], "f.jsonl does not hold rows"),
        ("f.jsonl", b"a\0b", [], "f.jsonl does not hold rows"),
        ("f.xlsx", b"PK\x81\x8d", [], "f.xlsx is not text"),
        (
            "f.jsonl",
            b'{"question": "q", "answer": 1}\nnot json\n',
            [],
            "f.jsonl does not hold rows: Expecting value: line 2",
        ),
        ("f.jsonl", b"[1, 2]\n", [], "f.jsonl does not hold rows: 'int' object"),
        ("f.jsonl", b"3\n", [], "f.jsonl does not hold rows: 'int' object"),
        ("f.json", b'[{"question": "q", "answer": 1}, {"questi', [], "f.json does not hold rows"),
        ("f.json", b"[" * 200_000, [], "f.json does not hold rows"),
        (
            "f.json",
            b'[{"question": "q", "answer": 1}, [2]]',
            [],
            "f.json does not hold rows: 'list' object",
        ),
        ("f.json", b"[]", [], "0 usable problems"),
        (
            "f.jsonl",
            b'{"question": "q", "answer": 1}\n',
            ["--question", "frage"],
            "columns ['answer', 'question']; see --question",
        ),
        (
            "f.jsonl",
            b'{"question": "q", "answer": 1}\n',
            ["--answer", "a"],
            "see --question and --answer",
        ),
        ("f.jsonl", b'{"question": "q", "answer": 1}\n', [], "1 usable problems"),
        (
            "f.jsonl",
            b'{"question": "q", "answer": 1}\n',
            ["--name", "../x"],
            "cannot be the name of a task",
        ),
        (
            "f.jsonl",
            b'{"question": "q", "answer": 1}\n',
            ["--name", ".."],
            "cannot be the name of a task",
        ),
        (
            "f.jsonl",
            b'{"question": "q", "answer": 1}\n',
            ["--test-share", "nan"],
            "too few for --test-share nan",
        ),
        (
            "f.jsonl",
            b'{"question": "q", "answer": 1}\n',
            ["--test-share", "0"],
            "too few for --test-share 0.0",
        ),
        (
            "f.csv",
            b'question,answer\n"open quote,3',
            [],
            "f.csv does not hold rows: unexpected end",
        ),
        ("svamp.csv", b"question,answer\n1+1?,2\n,4\n", [], "'svamp' cannot be the name of a task"),
        (
            "svamp.csv",
            b"question,answer\n1+1?,2\n,4\n",
            ["--name", "demo"],
            "'demo' cannot be the name of a task",
        ),
        ("Demo.csv", b"question,answer\n1+1?,2\n", [], "'Demo' cannot be the name of a task"),
        ("f.csv", b"question,answer\n1+1?,2\n,4\n", [], "rejected line 3: no question"),
        ("f.csv", b"question,answer\nIs 1  6?,2\nis 1 6?,3\n", [], "line 3: a contradiction"),
        ("f.jsonl", b'\n{"question": "1+1?", "answer": ""}\n', [], "rejected line 2: no answer"),
        (
            "f.csv",
            b"question,answer\nHow much?,1,200\n1?,2\n",
            [],
            "rejected line 2: more fields than the header",
        ),
        (
            "f.csv",
            b"question,answer,answer\n1?,1,2\n2?,3,4\n",
            [],
            "rename one of two equal columns",
        ),
        ("f.csv", b"question,answer\n1?,3. Mai\n2?,2\n", [], "'3. Mai' is not a number"),
        ("f.csv", b"question,answer\n1?,12-May\n2?,2\n", [], "'12-May' is not a number"),
        ("f.csv", b'question,answer\n1?,"12,50- EUR"\n2?,2\n', [], "is not a number"),
        (
            "f.txt",
            b"Some notes.\n1+1?\n",
            [],
            "f.txt has the columns ['Some notes.']",
        ),
    ],
)
def test_bad_files(cli, name, content, arguments, sentence):
    if content is not None:
        Path(name).write_bytes(content)
    code, text = cli("prep", name, "--data-dir", "d", *arguments)
    assert code == 1 and sentence in text
    assert not Path("d").exists()


def test_other_bad_input(cli):
    assert "There is no file swamp" in cli("prep", "swamp")[1]
    Path("folder.csv").mkdir()
    assert "There is no file folder.csv" in cli("prep", "folder.csv")[1]
    assert cli("prep", "multiply", "--decimal", ";")[0] == 2
    assert (
        "'numbr' is not number, exact"
        in cli("prep", "multiply", "--reward", "numbr", "--data-dir", "d")[1]
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize(
    "separator, announced, ends",
    [
        (";", "", "\n"),
        ("\t", "", "\r\n"),
        (";", "sep=;", "\r\n"),
        (",", '"sep=,"', "\n"),
        ("|", "sep=|", "\n"),
        ("\t", "sep=\t", "\r"),
    ],
)
def test_what_spreadsheets_write(cli, encoding, separator, announced, ends):
    rows = [
        ("question", " answer", ""),
        ('"1,5 + 1?"', "50 %", ""),
        ('"a;b\u00fc|\t"', "5 \u20ac", ""),
        ("", "", ""),
    ]
    lines = [announced] * bool(announced) + [separator.join(row) for row in rows]
    Path("sheet.csv").write_bytes(ends.join(lines).encode(encoding))
    code, text = cli("prep", "sheet.csv", "--data-dir", "d", "--test-share", "0.5")
    assert code == 0 and " 0 in rejected.jsonl" in text
    assert answers_of("d/sheet") == {"1,5 + 1?": "50 %", "a;b\u00fc|": "5 \u20ac"}


def test_line_numbers_are_those_of_the_file(cli):
    Path("f.csv").write_text('sep=;\nquestion;answer\n"a\nb";1\n\nc;2\nd;x\n')
    assert "rejected line 7: the answer 'x'" in cli("prep", "f.csv", "--data-dir", "d")[1]


def test_json_arrays(cli):
    Path("f.json").write_text(
        json.dumps(
            numbered(1, 2, "3", 4.0, [5], {"6": 7}, None, True, float("nan"), float("inf")),
            indent=2,
        )
    )
    code, text = cli("prep", "f.json", "--data-dir", "d")
    assert code == 0 and "line 9: the answer 'nan' is not a number" in text
    assert "line 5: the answer '[5]' is not a number" in text
    assert answers_of("d/f") == {"q0": "1", "q1": "2", "q2": "3", "q3": "4"}


def test_half_a_surrogate_pair(cli):
    Path("f.jsonl").write_text(
        "".join(f'{{"question": "q{i} \\ud800", "answer": {i}}}\n' for i in range(4))
        + '{"question": "q", "answer": "\\ud800"}\n'
    )
    assert cli("prep", "f.jsonl", "--data-dir", "d")[0] == 0
    assert answers_of("d/f") == {f"q{i} ?": str(i) for i in range(4)}
    assert rows_of("d/f/rejected.jsonl")[0]["line"] == 5


# ---- answers -------------------------------------------------------------------------------------


OFFICE = """\
\ufeffsep=;
Frage;Antwort;Art
"3 Kisten zu je 12,50 \u20ac. Was kosten sie?";"37,50 \u20ac";Rechnung
"Netto 1.200,00 EUR, dazu 19 % Steuer. Wie viel brutto?";"1.428,00 EUR";Rechnung
"14 Stunden zu 85 EUR. Was wird berechnet?";"1.190";Rechnung
"Ein Rabatt von 25 auf 100. Wie viel Prozent?";"25 %";Rabatt
"Eine Schicht dauert 7,5 h. Wie lang sind 5 Schichten?";"37,5 h";Zeit
"Was ist ein Achtel als Dezimalzahl?";"0,125";Mass

"3 Kisten zu je 12,50 \u20ac. Was kosten sie?";"37,00 \u20ac";Rechnung
"2 mal 2.500 St\u00fcck?";"5.000";St\u00fcck
"Wie hei\u00dft der Lieferant?";"Meier";Text
"""


def test_a_sheet_of_a_european_office(cli):
    Path("orders.csv").write_text(OFFICE, encoding="utf-8")
    columns = ["--question", "Frage", "--answer", "Antwort"]
    code, text = cli("prep", "orders.csv", *columns, "--data-dir", "d")
    assert code == 0 and "d/orders: 5 to train, 2 to test, 2 in rejected.jsonl" in text
    assert "rejected line 10: a contradiction: '37,00 \u20ac' after '37,50 \u20ac'" in text
    assert "the answer 'Meier' is not a number" in text
    assert sorted(answers_of("d/orders").values()) == [
        "0,125",
        "1.190",
        "1.428,00 EUR",
        "25 %",
        "37,5 h",
        "37,50 \u20ac",
        "5.000",
    ]
    task = tokenrl.load_task("orders", Path("d"))
    assert task.decimal == ","
    values = sorted(
        float(tokenrl.read_number(p.answer, task.decimal)) for p in task.train + task.test
    )
    assert values == [0.125, 25, 37.5, 37.5, 1190, 1428, 5000]


@pytest.mark.parametrize(
    "answers, decimal",
    [
        ((1, 2, 3), ""),
        (("1", "72", "-5"), ""),
        (("3,5", "1.200", "7"), ","),
        (("1.234,56", "1.200", "7"), ","),
        (("1.200.000", "1.200", "7"), ","),
        (("1.5", "1,200", "7"), "."),
        (("1,234.50", "1,200", "7"), "."),
        (("1,200,000", "1,200", "7"), "."),
        ((1.5, 2, 3), ""),
        ((1.5, "3,5", "1.200"), ","),
        ((1.5, "1.5", "1,200"), "."),
        (("it is 1,5\n#### 3,5", "#### 1.200", "7"), ","),
        (("1,200", "7", "8"), None),
        (("1.200", "1.250", "8"), None),
        (("3,5", "3.5", "8"), None),
        (("3,5", "3.5", "1.200"), None),
        (("1,200", 1.5, "8"), None),
    ],
)
def test_the_decimal_mark_is_found_or_asked_for(cli, answers, decimal):
    write_rows("f.jsonl", numbered(*answers))
    code, text = cli("prep", "f.jsonl", "--data-dir", "d", "--test-share", "0.34")
    if decimal is None:
        shown = [answer for answer in answers if len(str(answer)) > 1 and answer != 1.5]
        assert code == 1 and all(text.count(answer) for answer in shown[:2])
        assert "two ways" in text and "--decimal" in text and not Path("d").exists()
    else:
        assert code == 0 and json.loads(Path("d/f/task.json").read_text()) == {"decimal": decimal}
        assert ("decimal mark" in text) == bool(decimal) and (
            not decimal or f"mark {decimal}" in text
        )
        assert tokenrl.load_task("f", Path("d")).decimal == decimal


def test_the_decimal_mark_can_be_said(cli):
    write_rows("f.jsonl", numbered("1,200", "1.200", "7", "3.5", "3,5"))
    for mark, texts, values in (
        (",", {"1,200", "1.200", "7", "3,5"}, {1.2, 1200, 7, 3.5}),
        (".", {"1,200", "1.200", "7", "3.5"}, {1200, 1.2, 7, 3.5}),
    ):
        code, text = cli("prep", "f.jsonl", "--data-dir", "d", "--decimal", mark)
        assert code == 0 and " 1 in rejected.jsonl" in text
        assert set(answers_of("d/f").values()) == texts
        task = tokenrl.load_task("f", Path("d"))
        assert task.decimal == mark
        assert {
            float(tokenrl.read_number(p.answer, mark)) for p in task.train + task.test
        } == values


def test_a_task_is_not_made_of_its_own_files(cli):
    Path("d/own").mkdir(parents=True)
    write_rows("d/own/train.jsonl", numbered(*"123"))
    before = Path("d/own/train.jsonl").read_bytes()
    code, text = cli("prep", "d/own/train.jsonl", "--name", "own", "--data-dir", "d")
    assert code == 1 and "would be overwritten" in text
    assert Path("d/own/train.jsonl").read_bytes() == before
    assert cli("prep", "d/own/train.jsonl", "--name", "other", "--data-dir", "d")[0] == 0


def test_rounding_is_no_part_of_a_reference(cli):
    write_rows("f.jsonl", numbered(0.1 + 0.2, 0.99 * 3, 2.5, 1.6e-19))
    assert cli("prep", "f.jsonl", "--data-dir", "d", "--test-share", "0.34")[0] == 0
    assert set(answers_of("d/f").values()) == {"0.3", "2.97", "2.5", "1.6e-19"}


def test_worked_answers_of_gsm8k(cli):
    write_rows(
        "f.jsonl",
        numbered(
            "4 * 18 = <<4*18=72>>72\n#### 72",
            "#### 5\nNo: 6\n#### 6",
            "7",
            "nothing ####",
            "#### x",
        ),
    )
    code, text = cli("prep", "f.jsonl", "--data-dir", "d")
    assert code == 0 and set(answers_of("d/f").values()) == {"72", "6", "7"}
    assert "line 4: no answer" in text and "the answer 'x' is not a number" in text


def test_exact_answers_that_cannot_be_earned_are_rejected(cli):
    good = [
        "Paris",
        "net 30",
        "5 $",
        "'quoted'",
        "*bold*",
        "x = 5",
        "(B)",
        "1/2",
        "5\u00bd inch",
        "*",
        "No.",
    ]
    bad = [
        "two\nlines",
        "the answer is 5",
        "Answer: B",
        "so \\boxed{B}",
        "<answer>B</answer>",
        "{}",
    ]
    write_rows("f.jsonl", numbered(*good, *bad))
    code, text = cli("prep", "f.jsonl", "--data-dir", "d", "--reward", "exact")
    assert code == 0 and "no completion can give 'two\\nlines'" in text
    assert set(answers_of("d/f").values()) == set(good)
    assert all(tokenrl.exact_reward(f"#### {answer}", answer) == 1 for answer in good)


# ---- the task that is written --------------------------------------------------------------------


def test_a_task_for_evaluation_only(cli):
    write_rows("f.jsonl", numbered(1, 2, 3))
    code, text = cli("prep", "f.jsonl", "--data-dir", "d", "--test-share", "1")
    assert code == 0 and "0 to train, 3 to test" in text
    task = tokenrl.load_task("f", Path("d"))
    assert task.train == [] and len(task.test) == 3


@pytest.mark.parametrize("moment", range(14))
def test_train_and_test_are_of_one_preparation_at_every_moment(tmp_path, monkeypatch, moment):
    """The disk is full, or the process is killed, at the n-th thing that it does to the folder."""

    class Killed(BaseException):
        pass

    def prepare(word):
        problems = [tokenrl.Problem(f"{word} {i}", str(i)) for i in range(10)]
        tokenrl.write_task(
            "t", problems, [], 0.3, 0, tmp_path, "", [{"line": 1, "reason": word, "row": {}}]
        )

    prepare("old")
    calls = itertools.count()

    def breaking(function):
        def broken(*arguments, **options):
            if next(calls) >= moment:
                raise Killed
            return function(*arguments, **options)

        return broken

    for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "write_text")):
        monkeypatch.setattr(owner, name, breaking(getattr(owner, name)))
    finished = True
    try:
        prepare("new")
    except Killed:
        finished = False
    monkeypatch.undo()
    assert finished == (moment == 13)
    words = {
        split: {row["question"].split()[0] for row in rows_of(tmp_path / "t" / f"{split}.jsonl")}
        for split in ("train", "test")
        if (tmp_path / "t" / f"{split}.jsonl").exists()
    }
    if "train" in words:
        assert words["train"] == words["test"] == ({"new"} if finished else words["train"])
    else:
        with pytest.raises(tokenrl.UserError, match="There is no task 't'"):
            tokenrl.load_task("t", tmp_path)


def test_a_full_disk_leaves_no_half_of_a_task(tmp_path, monkeypatch):
    problems = [tokenrl.Problem(f"q{i}", str(i)) for i in range(10)]
    tokenrl.write_task("t", problems, [], 0.3, 0, tmp_path)
    write = Path.write_text

    def full(path, data, **options):
        write(path, data[:3], **options)
        if "train" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        tokenrl.write_task("t", problems, [], 0.5, 1, tmp_path)
    assert len(tokenrl.load_task("t", tmp_path).train) == 7  # the old task, whole
    monkeypatch.undo()
    tokenrl.write_task("t", problems, [], 0.5, 1, tmp_path)
    assert len(tokenrl.load_task("t", tmp_path).train) == 5 and not list(tmp_path.rglob("*.new"))


# ---- whatever bytes a person gives ---------------------------------------------------------------


def prepared_or_refused(path, reward="number", decimal=None):
    try:
        problems, rejected, mark = tokenrl.file_problems(
            path, "question", "answer", reward, decimal
        )
    except tokenrl.UserError as error:
        assert str(error)
        return
    assert all(problem.question and problem.answer for problem in problems)
    if reward == "number":
        assert all(tokenrl.read_number(problem.answer, mark) is not None for problem in problems)
    tokenrl.write_jsonl(path.with_name("rejected.jsonl"), rejected)
    if problems:
        tokenrl.write_task("fuzz", problems, [], 1, 0, path.parent, mark, rejected)
        read = tokenrl.load_task("fuzz", path.parent, reward == "number").test
        assert {p.answer for p in read} == {
            p.answer.encode(errors="replace").decode() for p in problems
        }  # half a surrogate pair is ?


SUFFIXES = st.sampled_from([".csv", ".json", ".jsonl"])
PIECES = st.sampled_from(
    [
        b"question",
        b"answer",
        b",",
        b";",
        b"\t",
        b"\n",
        b"\r\n",
        b'"',
        b"sep=;\n",
        b"\xff\xfe",
        b"\0",
        b"[",
        b"]",
        b"{",
        b"}",
        b'{"question":"a","answer":',
        b"1,5",
        b"1.200",
        b"NaN",
        b"1e999",
        b":",
        b'[{"question":"a","answer":1}]',
        b"\xe4",
        "\u00e4".encode(),
        b"\\ud800",
        b"#### ",
        b"-",
        b"sep=",
    ]
)


@given(
    st.one_of(
        st.binary(max_size=80),
        st.lists(PIECES, max_size=25).map(b"".join),
        st.lists(PIECES, max_size=25).map(lambda p: b"question,answer\n" + b"".join(p)),
    ),
    SUFFIXES,
)
@settings(max_examples=600)
def test_any_bytes_are_read_or_refused_in_a_sentence(tmp_path_factory, raw, suffix):
    path = tmp_path_factory.getbasetemp() / f"data{suffix}"
    path.write_bytes(raw)
    prepared_or_refused(path)


CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.just("\ud800"),
    st.from_regex(r"-?[0-9]{1,3}[.,][0-9]{1,3} ?(%|EUR)?", fullmatch=True),
    st.lists(st.integers(), max_size=2),
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {}, optional={"question": CELLS, "answer": CELLS, "type": CELLS, "": CELLS}
        ),
        max_size=6,
    ),
    st.booleans(),
    st.sampled_from(["number", "exact", "regex:{answer}"]),
    st.sampled_from([None, "", ",", "."]),
)
@settings(max_examples=400)
def test_any_rows_are_read_or_refused_in_a_sentence(tmp_path_factory, rows, array, reward, decimal):
    path = tmp_path_factory.getbasetemp() / ("rows.json" if array else "rows.jsonl")
    path.write_text(json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows))
    prepared_or_refused(path, reward, decimal)


def test_a_wide_header_is_read_in_time(tmp_path):
    path = tmp_path / "wide.csv"
    path.write_text(
        "question,answer,"
        + ",".join(f"c{i}" for i in range(50_000))
        + "\nq,1\n"
        + "," * 50_001
        + "\n"
    )
    assert len(tokenrl.read_rows(path)) == 1
