"""Write the demonstrations that ship with irlfast: quantities in words, and their canonical form.

    python -m irlfast.demo.generate

The command writes ``train.jsonl`` and ``test.jsonl`` beside this file, the same bytes every time. Each kind has a
quarter of the rows:

    times      twenty to nine in the evening                        20:40
    dates      the day after the 28th of February 1987              1987-03-01
    numbers    twelve thousand four hundred and six                 12406
    durations  ten minutes short of two hours                       110 min

The writers turn a value into words. ``expert`` reads words back into the canonical form by rules of its own, and
``tests/commands/test_demo.py`` checks every row with it.
"""

import datetime
import json
import random
import re
from pathlib import Path

TRAIN_ROWS, TEST_ROWS = 8000, 500
SEED = 2024

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
ORDINALS |= {"twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"}
MONTHS = (  # counted from 1; the names in ``calendar`` follow the locale
    "- January February March April May June July August September October November December"
).split()
FEASTS = {"New Year's Day": (1, 1), "Valentine's Day": (2, 14), "Halloween": (10, 31), "Christmas Eve": (12, 24)}
FEASTS |= {"Christmas Day": (12, 25), "New Year's Eve": (12, 31)}
# The hours (0 to 23) in each part of the day. Two hours that look alike on a clock face are in different parts.
DAY_PARTS = {
    "at night": (0, 21, 22, 23),
    "in the morning": range(1, 12),
    "in the afternoon": range(12, 18),
    "in the evening": range(18, 21),
}


# ---------------------------------------------------------------- writers: from a random value to words


def write_number(rng: random.Random) -> tuple[str, str]:
    form = rng.randrange(6)
    if form == 0:  # 4.7 thousand, 1.2 million
        tenths, scale = rng.randrange(11, 100), rng.choice(["thousand", "million"])
        value = tenths * (100 if scale == "thousand" else 100_000)
        return f"{tenths // 10}.{tenths % 10} {scale}", str(value)
    if form == 1:  # twenty-six hundred and five
        hundreds, rest = rng.choice([n for n in range(11, 100) if n % 10]), rng.randrange(100)
        return f"{in_words(hundreds)} hundred" + (f" and {in_words(rest)}" if rest else ""), str(hundreds * 100 + rest)
    if form == 2:  # three and a half thousand
        whole, fraction = rng.randrange(1, 100), rng.choice(["a quarter", "a half", "three quarters"])
        quarters = 4 * whole + 1 + ["a quarter", "a half", "three quarters"].index(fraction)
        return f"{in_words(whole)} and {fraction} thousand", str(quarters * 250)
    value = rng.randrange(10 ** rng.randrange(2, 5), 10**5)
    return in_words(value, rng.choice([" and ", " "])), str(value)


def write_duration(rng: random.Random) -> tuple[str, str]:
    hours, minutes = rng.randrange(1, 25), draw_minute(rng)
    form = rng.randrange(6)
    if form == 0:  # 3 h 25 min
        return f"{hours} h {minutes} min", f"{60 * hours + minutes} min"
    if form == 1:  # three and a quarter hours
        fraction, minutes = rng.choice([("a quarter", 15), ("a half", 30), ("three quarters", 45)])
        return f"{in_words(hours)} and {fraction} hours", f"{60 * hours + minutes} min"
    if form == 2:  # ten minutes short of two hours
        minutes = max(1, minutes // 2)
        return f"{count(minutes, 'minute')} short of {count(hours, 'hour')}", f"{60 * hours - minutes} min"
    return spoken_duration(hours, minutes), f"{60 * hours + minutes} min"


def write_time(rng: random.Random) -> tuple[str, str]:
    hour, minute = rng.randrange(24), draw_minute(rng)
    return spoken_time(rng, hour, minute), f"{hour:02d}:{minute:02d}"


def spoken_time(rng: random.Random, hour: int, minute: int) -> str:
    form = rng.randrange(4)
    part = next(part for part, hours in DAY_PARTS.items() if hour in hours)
    face = (hour - 1) % 12 + 1  # the hour on a clock face, 1 to 12
    if form == 0:
        return f"{face}:{minute:02d} {'am' if hour < 12 else 'pm'}"
    if minute == 0:
        return {0: "midnight", 12: "noon"}.get(hour, f"{in_words(face)} o'clock {part}")
    if form == 1:
        return f"{in_words(face)} {'oh ' if minute < 10 else ''}{in_words(minute)} {part}"
    named = (hour + (minute > 30)) % 24
    end = {0: "midnight", 12: "noon"}.get(named, f"{in_words((named - 1) % 12 + 1)} {part}")
    return f"{past_or_to(minute)} {end}"


def past_or_to(minute: int) -> str:
    side, distance = ("to", 60 - minute) if minute > 30 else ("past", minute)
    names = {15: "a quarter", 30: "half"}
    return f"{names.get(distance) or in_words(distance) + ('' if distance % 5 == 0 else ' minutes')} {side}"


def write_date(rng: random.Random) -> tuple[str, str]:
    date = datetime.date(rng.randrange(1900, 2040), 1, 1) + datetime.timedelta(days=rng.randrange(365))
    text = spoken_date(rng, date)
    if rng.random() < 0.1:
        feast = rng.choice(list(FEASTS))
        text, date = f"{feast} {date.year}", date.replace(month=FEASTS[feast][0], day=FEASTS[feast][1])
    if rng.random() < 0.3:  # the day before the 1st of March 1988
        word = rng.choice(["after", "before"])
        text, date = f"the day {word} {text}", date + datetime.timedelta(1 if word == "after" else -1)
    return text, date.isoformat()


def spoken_date(rng: random.Random, date: datetime.date) -> str:
    form, month = rng.randrange(5), MONTHS[date.month]
    number = f"{date.day}{'th' if 10 < date.day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(date.day % 10, 'th')}"
    if form == 0:
        return f"{month[:3]} {date.day}, {date.year}"
    if form == 1:
        return f"{date.day} {month} {date.year}"
    if form == 2:
        return f"{month} {number}, {date.year}"
    if form == 3:
        return f"the {number} of {month} {date.year}"
    return f"the {ordinal(date.day)} of {month} {spoken_year(date.year)}"


def spoken_year(year: int) -> str:
    century, rest = divmod(year, 100)
    if rest == 0:
        return "two thousand" if century == 20 else f"{in_words(century)} hundred"
    if 2000 < year < 2010:
        return f"two thousand and {in_words(rest)}"
    return f"{in_words(century)} {'oh ' if rest < 10 else ''}{in_words(rest)}"


def in_words(value: int, after_hundred: str = " and ") -> str:
    if value < 20:
        return ONES[value]
    if value < 100:
        return TENS[value // 10 - 2] + (f"-{ONES[value % 10]}" if value % 10 else "")
    if value < 1000:
        rest = value % 100
        return f"{ONES[value // 100]} hundred" + (after_hundred + in_words(rest) if rest else "")
    rest = value % 1000
    joint = after_hundred if rest < 100 else " "
    return f"{in_words(value // 1000, after_hundred)} thousand" + (
        joint + in_words(rest, after_hundred) if rest else ""
    )


def ordinal(value: int) -> str:
    before, hyphen, last = in_words(value).rpartition("-")
    return before + hyphen + ORDINALS.get(last, f"{last}th")


def count(value: int, unit: str) -> str:
    return {"hour": "an hour"}.get(unit, f"a {unit}") if value == 1 else f"{in_words(value)} {unit}s"


def spoken_duration(hours: int, minutes: int) -> str:
    if (hours, minutes) == (1, 30):
        return "an hour and a half"
    return count(hours, "hour") + (f" and {count(minutes, 'minute')}" if minutes else "")


def draw_minute(rng: random.Random) -> int:
    """Draw a minute of an hour: mostly a round one, as people say them."""
    return 5 * rng.randrange(12) if rng.random() < 0.6 else rng.randrange(60)


# ---------------------------------------------------------------- the expert: from words to the canonical form

VALUES = {word: i for i, word in enumerate(ONES)} | {word: 20 + 10 * i for i, word in enumerate(TENS)}
VALUES |= {"a": 1, "an": 1, "oh": 0}
CARDINALS = {ordinal: cardinal for cardinal, ordinal in ORDINALS.items()}


def expert(prompt: str) -> str:
    """Return the one right answer to a prompt, by rules that share the writers' words but no code."""
    if re.search("|".join([*FEASTS, *(rf"\b{name[:3]}" for name in MONTHS[1:])]), prompt):
        return read_date(prompt).isoformat()
    if re.search(r"noon|midnight|in the|at night|\d [ap]m", prompt):
        minute = read_time(prompt) % 1440
        return f"{minute // 60:02d}:{minute % 60:02d}"
    if re.search(r"hour|minute|\bmin\b", prompt):
        return f"{read_duration(prompt)} min"
    return str(round(read_number(prompt)))


def read_number(text: str) -> float:
    """Read digits or words; "hundred", "thousand" and "million" multiply the number before them."""
    text = text.replace("three quarters", "0.75").replace("a quarter", "0.25").replace("a half", "0.5")
    total, part = 0.0, 0.0
    for word in re.findall(r"[a-z]+|[\d.]+", text):
        if word[0].isdigit():
            part += float(word)
        elif word == "hundred":
            part *= 100
        elif word in ("thousand", "million"):
            total, part = total + part * {"thousand": 1000, "million": 1_000_000}[word], 0
        elif word != "and":
            part += VALUES[word]
    return total + part


def read_duration(text: str) -> int:
    """Read a duration in minutes."""
    missing, short_of, whole = text.partition(" short of ")
    if short_of:
        return read_duration(whole) - read_duration(missing)
    text = text.replace("an hour and a half", "ninety minutes")
    units = {"m": 1, "h": 60}
    parts = re.findall(r"(.+?) (h|min|hour|minute)s?(?: and |\b)", text)
    return round(sum(read_number(amount) * units[unit[0]] for amount, unit in parts))


def read_time(text: str) -> int:
    """Read a time as minutes since midnight; times before midnight are negative."""
    if relative := re.fullmatch("(.+) (past|to) (noon|midnight)", text):
        return read_time(relative[3]) + read_distance(relative[1], relative[2])
    if digits := re.fullmatch(r"(\d+):(\d+) ([ap])m", text):
        return int(digits[1]) % 12 * 60 + int(digits[2]) + 720 * (digits[3] == "p")
    if text in ("noon", "midnight"):
        return 720 * (text == "noon")
    parts = re.fullmatch("(.+) (in the .+|at night)", text)
    assert parts, text
    spoken, part = parts.groups()
    if relative := re.fullmatch("(.+) (past|to) (.+)", spoken):
        face = read_number(relative[3]) * 60 + read_distance(relative[1], relative[2])
    else:
        hour, minutes = spoken.split(" ", 1)
        face = read_number(hour) * 60 + (0 if minutes == "o'clock" else read_number(minutes))
    morning = round(face) % 720
    return morning if morning // 60 in DAY_PARTS[part] else morning + 720


def read_distance(text: str, side: str) -> int:
    """Read minutes past the hour; minutes to the hour are negative."""
    distance = {"a quarter": 15, "half": 30}.get(text) or round(read_number(text.removesuffix(" minutes")))
    return distance if side == "past" else -distance


def read_date(text: str) -> datetime.date:
    if shifted := re.fullmatch("the day (after|before) (.+)", text):
        return read_date(shifted[2]) + datetime.timedelta(1 if shifted[1] == "after" else -1)
    for feast, (month, day) in FEASTS.items():
        if text.startswith(feast):
            return datetime.date(int(text.split()[-1]), month, day)
    month = next(i for i in range(1, 13) if re.search(rf"\b{MONTHS[i][:3]}", text))
    if digits := re.findall(r"\d+", text):
        return datetime.date(int(digits[1]), month, int(digits[0]))
    written = re.fullmatch(r"the (.+) of \w+ (\w+) (.+)", text)
    assert written, text
    day = sum(VALUES[CARDINALS.get(word) or word.removesuffix("th")] for word in written[1].split("-"))
    if re.search("hundred|thousand", text):
        return datetime.date(round(read_number(f"{written[2]} {written[3]}")), month, day)
    return datetime.date(round(VALUES[written[2]] * 100 + read_number(written[3])), month, day)


# ---------------------------------------------------------------- the two files

WRITERS = (write_time, write_date, write_number, write_duration)


def make_rows(seed: int = SEED) -> list[dict[str, str]]:
    """Make ``TRAIN_ROWS + TEST_ROWS`` shuffled rows: every kind in equal shares, and no prompt twice."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    for writer in WRITERS:
        wanted = len(rows) + (TRAIN_ROWS + TEST_ROWS) // len(WRITERS)
        while len(rows) < wanted:
            prompt, completion = writer(rng)
            rows[prompt] = completion
    shuffled = [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]
    rng.shuffle(shuffled)
    return shuffled


def main() -> None:
    rows = make_rows()
    for name, part in (("train", rows[:TRAIN_ROWS]), ("test", rows[TRAIN_ROWS:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (Path(__file__).parent / f"{name}.jsonl").write_bytes(text.encode())


if __name__ == "__main__":
    main()
