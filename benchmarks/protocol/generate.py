"""Make demonstrations whose right answers are known: sums with their steps, two-mode experts, and wrong answers."""

import random
from typing import NamedTuple

Row = dict[str, str]
LETTERS = "abcdefgh"


def sums(count: int, digits: int, rng: random.Random) -> list[Row]:
    """Return ``count`` different sums of two numbers of ``digits`` digits, with the steps of column addition."""
    low, high = 10 ** (digits - 1), 10**digits
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < count:
        pairs[rng.randrange(low, high), rng.randrange(low, high)] = None
    return [{"prompt": f"{a}+{b}", "completion": column_addition(a, b)} for a, b in pairs]


def column_addition(a: int, b: int) -> str:
    """Write each column's sum from the right, with the carry, and then the result: ``8+7=15 4+1+1=6 65``."""
    steps, carry = [], 0
    for one, other in zip(str(a)[::-1], str(b)[::-1], strict=True):
        total = int(one) + int(other) + carry
        steps.append(f"{one}+{other}{f'+{carry}' if carry else ''}={total}")
        carry = total // 10
    return " ".join([*steps, str(a + b)])


def is_right_sum(prompt: str, answer: str) -> bool:
    a, b = prompt.split("+")
    return answer.split(" ")[-1] == str(int(a) + int(b))


class Modes(NamedTuple):
    """The two answers to a prompt that the expert writes equally often."""

    ascending: str
    backwards: str


def modes_of(prompt: str) -> Modes:
    """Return the letters of the prompt in the order of the alphabet, and in reverse order."""
    return Modes("".join(sorted(prompt)), prompt[::-1])


def two_modes(count: int, length: int, rng: random.Random) -> list[Row]:
    """Return ``count`` demonstrations of an expert that tosses a coin between :func:`modes_of` a prompt.

    The prompts are different, and their two modes differ.
    """
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompt = "".join(rng.choices(LETTERS, k=length))
        if len(set(modes_of(prompt))) == 2:
            prompts[prompt] = None
    return [{"prompt": prompt, "completion": rng.choice(modes_of(prompt))} for prompt in prompts]


def with_wrong_answers(rows: list[Row], share: float, rng: random.Random) -> list[Row]:
    """Return the rows, of which a ``share`` has the answer of another row: a right answer to another prompt.

    The share is exact. The answers move on by one row in a random circle; it is drawn again until no row has its own.
    """
    chosen = rng.sample(range(len(rows)), round(share * len(rows)))
    while any(rows[i]["completion"] == rows[j]["completion"] for i, j in circle(chosen)):
        rng.shuffle(chosen)
    noisy = list(rows)
    for i, j in circle(chosen):
        noisy[i] = rows[i] | {"completion": rows[j]["completion"]}
    return noisy


def circle(numbers: list[int]) -> list[tuple[int, int]]:
    """Return each number with the next, the last with the first."""
    return list(zip(numbers, numbers[1:] + numbers[:1], strict=True))
