"""Check for leaks: trivial features that tell expert from synthetic answers, which a reward model would then learn.

Each check is a small classifier of scikit-learn, cross-validated on the pairs that the reward model will learn from:
a decision tree for a scalar, logistic regression for the bag of an answer's tokens. Chance is 0.5.
"""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from irlfast.data.encoding import Encoder
from irlfast.data.packing import PromptGroup

MOST_PAIRS = 4000  # enough to see an accuracy of 0.9; more pairs only take time
FOLDS = 5
HIGH = 0.9
REMEDIES = {
    "length": "sample answers as long as the experts' (max_new_tokens, length_penalty), or use reward_data: init_sft",
    "end token": "raise max_new_tokens so that samples end, or max_length so that demonstrations do",
    "truncation": "raise max_new_tokens, or lower max_length to cut demonstrations as the samples are",
    "special tokens": "strip special tokens from the demonstrations",
    "bag of tokens": "let models write both answers (reward_data: init_sft), or start closer to the demonstrations",
}


def find_leaks(pairs: Sequence[PromptGroup], encoder: Encoder, max_new_tokens: int) -> dict[str, float]:
    """Return the accuracy of each check, 0.5 (chance) to 1 (a leak); nothing if there are too few pairs to tell."""
    pairs = pairs[:: -(-len(pairs) // MOST_PAIRS)]
    if len(pairs) < 2 * FOLDS:
        return {}
    answers = [answer for pair in pairs for answer in pair.answers[:2]]
    special = {*encoder.tokenizer.all_special_ids}.difference(encoder.ends)
    scalars = {
        "length": [len(answer) for answer in answers],
        "end token": [answer[-1] in encoder.ends for answer in answers],
        "truncation": [answer[-1] not in encoder.ends and len(answer) >= max_new_tokens for answer in answers],
        "special tokens": [sum(token in special for token in answer) for answer in answers],
    }
    labels, groups = np.tile([1, 0], len(pairs)), np.repeat(np.arange(len(pairs)), 2)
    accuracies = {name: scalar_accuracy(np.array(values), labels, groups) for name, values in scalars.items()}
    return accuracies | {"bag of tokens": bag_accuracy(answers, labels, groups)}


def scalar_accuracy(values: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    from sklearn.tree import DecisionTreeClassifier

    return held_out_accuracy(DecisionTreeClassifier(max_depth=3, random_state=0), values[:, None], labels, groups)


def bag_accuracy(answers: Sequence[Sequence[int]], labels: np.ndarray, groups: np.ndarray) -> float:
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize

    ends = np.cumsum([0, *map(len, answers)])
    tokens = np.concatenate([np.array(answer) for answer in answers])
    bags = csr_matrix((np.ones(len(tokens)), tokens, ends))
    bags.sum_duplicates()
    return held_out_accuracy(LogisticRegression(max_iter=200), normalize(bags), labels, groups)


def held_out_accuracy(model, features, labels: np.ndarray, groups: np.ndarray) -> float:
    """Return the mean accuracy over folds; both answers to a prompt are in the same fold."""
    from sklearn.model_selection import GroupKFold, cross_val_score

    return float(cross_val_score(model, features, labels, groups=groups, cv=GroupKFold(FOLDS)).mean())


def log_leaks(leaks: dict[str, float], phase: str) -> None:
    """Print the accuracies, and a remedy beside each accuracy above ``HIGH``."""
    if not leaks:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{phase}: tells expert from synthetic, alone")
    table.add_column("accuracy", justify="right")
    table.add_column("")
    for name, accuracy in leaks.items():
        table.add_row(name, f"{accuracy:.3f}", f"warning: {REMEDIES[name]}" if accuracy > HIGH else "")
    Console(stderr=True, width=120).print(table)
