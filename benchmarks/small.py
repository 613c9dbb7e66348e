"""Write small data in the form of the real files, for ``pytest benchmarks --quick``."""

import itertools
import json
from pathlib import Path

QUESTIONS = 96
LETTERS = "BDGKLMNPRSTV"
SOUNDS = ("AE1", "EH1", "IY1", "OW1")


def write_data(folder: Path) -> None:
    """Write every file that a benchmark reads: words with their sounds, sums, and dialogues with two answers."""
    words = [
        {"prompt": f"{a}{vowel}{b}".lower(), "completion": f"{a} {sound} {b}"}
        for a, b in itertools.product(LETTERS, LETTERS)
        for vowel, sound in zip("AEIO", SOUNDS, strict=True)
    ]
    sums = [
        {
            "prompt": f"Tom has {n} apples and buys {n % 7}.",
            "completion": f"{n} + {n % 7} = {n + n % 7}\n#### {n + n % 7}",
        }
        for n in range(2 * QUESTIONS)
    ]
    dialogues = [
        {
            "chosen": f"\n\nHuman: May I take the {n} coins?\n\nAssistant: No, these are not yours.",
            "rejected": f"\n\nHuman: May I take the {n} coins?\n\nAssistant: Yes, take all {n}.",
        }
        for n in range(QUESTIONS)
    ]
    files = {
        "cmudict_train": words[::2],
        "cmudict_test": words[1::2],
        "gsm8k_train": sums[::2],
        "gsm8k_test": sums[1::2],
        "hh_harmless_test": dialogues,
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
