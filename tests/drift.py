"""Does a run still answer as it did? Its closing evaluation against one of today.

    python tests/drift.py TASK --against RUN [options of eval]

Evaluates RUN's adapter (or what --adapter or --model name) with `tokenrl.py eval`, and compares the
questions that both evaluations asked, in all and by type: accuracy, truncated share, length and,
where both have it, entropy. Exact paired tests (McNemar for shares, the sign test for numbers) with
Holm's adjustment at 0.05. Exit code 1 where accuracy has fallen or more is truncated, 2 where there
is nothing to compare; a change of length or entropy alone is shown and is no fault.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.table import Table  # noqa: E402

import tokenrl  # noqa: E402

LEVEL = 0.05
MEASURES = {  # of a record: how its mean is written, which direction is worse
    "correct": (".1%", -1),
    "truncated": (".1%", 1),
    "length": (".1f", 0),
    "entropy": (".3f", 0),
}


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values: the chance of any false one up to 0.05 is at most 0.05 (Holm 1979)."""
    adjusted, reached, left = p_values[:], 0.0, len(p_values)
    for i in sorted(range(left), key=p_values.__getitem__):
        adjusted[i] = reached = max(reached, min(1.0, left * p_values[i]))
        left -= 1
    return adjusted


def compare(then: list[dict], now: list[dict]) -> list[tuple]:
    """(group, measure, mean then, mean now, adjusted p) of the questions that both have."""
    known = {(record["question"], record["answer"]): record for record in then}
    pairs = [(known.get((record["question"], record["answer"])), record) for record in now]
    pairs = [(old, new) for old, new in pairs if old]
    if not pairs:
        raise tokenrl.UserError("The two evaluations share no question.")
    kinds = sorted({new["type"] for _, new in pairs})
    groups = {"all": pairs}
    if 1 < len(kinds) <= 20:
        groups |= {kind or "no type": [p for p in pairs if p[1]["type"] == kind] for kind in kinds}
    found, p_values = [], []
    for group, own in groups.items():
        for measure in MEASURES:
            before, after = ([record.get(measure) for record in side] for side in zip(*own))
            if None not in before + after:
                found.append((f"{group} ({len(own)})", measure, fmean(before), fmean(after)))
                # Rounded, because another machine computes the same entropy a little differently.
                rounded = ([round(x, 3) for x in side] for side in (before, after))
                p_values.append(tokenrl.mcnemar(*rounded))
    return [(*row, p) for row, p in zip(found, holm(p_values))]


def is_worse(measure: str, then: float, now: float, p: float) -> bool:
    return p <= LEVEL and (now - then) * MEASURES[measure][1] > 0


def drift_table(rows: list[tuple], title: str) -> Table:
    table = Table("", "", "then", "now", "p (Holm)", "", title=title, title_justify="left")
    for group, measure, then, now, p in rows:
        form, arrow = MEASURES[measure][0], "\u2191" if now > then else "\u2193"
        verdict = arrow * (p <= LEVEL) + " worse" * is_worse(measure, then, now, p)
        table.add_row(group, measure, f"{then:{form}}", f"{now:{form}}", f"{p:.2g}", verdict)
    return table


def evaluate(task: str, run: Path, options: list[str]) -> list[dict]:
    """The records of the last policy that `eval` asks today; what it prints goes to stderr."""
    named = any(option.split("=")[0] in ("--adapter", "--model") for option in options)
    whom = [] if named else ["--adapter", str(run)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "now.jsonl"
        command = [sys.executable, str(ROOT / "tokenrl.py"), "eval", task, *whom, *options]
        command += ["--shown", "0", "--output", str(output)]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise tokenrl.UserError("The evaluation itself has failed.")
        records = [record for _, record in tokenrl.read_rows(output)]
    return [record for record in records if record["policy"] == records[-1]["policy"]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(usage=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("task")
    parser.add_argument("--against", type=Path, required=True)
    known, options = parser.parse_known_args(arguments)
    try:
        records = [record for _, record in tokenrl.read_rows(known.against / "eval.jsonl")]
        then = [record for record in records if record["phase"] == "trained"]
        if not then:
            raise tokenrl.UserError(f"{known.against} has no evaluation after its training.")
        now = evaluate(known.task, known.against, options)
        rows = compare(then, now)
    except tokenrl.UserError as error:
        tokenrl.errors.print(f"Error: {error}", soft_wrap=True)
        return 2
    tokenrl.console.print(drift_table(rows, f"{known.task}, {known.against}"))
    return int(any(is_worse(*row[1:]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
