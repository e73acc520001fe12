"""Rewards as plug-ins: functions (completion, reference answer) -> from 0 to 1.

python tokenrl.py train svamp --reward data/rewards.py:right_with_steps
"""

import re

from tokenrl import number_reward

EQUATION = re.compile(r"(\d+) *([-+*/]) *(\d+) *= *(\d+)", re.ASCII)


def holds(a, sign, b, result):
    a, b, result = int(a), int(b), int(result)
    true = {"+": a + b == result, "-": a - b == result, "*": a * b == result, "/": a == b * result}
    return true[sign]


def right_with_steps(text, answer):
    """1 for the right number, if at least one calculation is written down and all that are hold."""
    steps = EQUATION.findall(text)
    return number_reward(text, answer) if steps and all(holds(*step) for step in steps) else 0.0


def right_and_short(text, answer, words=20):
    """1 for the right number in at most `words` words, half of it for the right number in more."""
    return number_reward(text, answer) * (1.0 if len(text.split()) <= words else 0.5)
