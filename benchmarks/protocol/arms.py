"""The arms of the comparison: what each does with the same start, prompts and budget."""

from typing import Any, NamedTuple


class Arm(NamedTuple):
    keys: dict[str, Any] = {}  # noqa: RUF012  # read only; of the run
    answers: int = 1  # trained on, per prompt: a step has as many answers in every arm
    from_scratch: bool = False  # trains a new policy, as long as the start and SFT continued together
    of: str = ""  # the arm whose policy this one uses, without training
    best_of: int = 0  # answers of that policy, of which the likeliest is taken
    tasks: tuple[str, ...] = ()  # the only tasks with it; none: all
    judges: tuple[str, ...] = ()  # the only kinds of tasks with it; none: all


START = "SFT, the start"
CONTINUED = "SFT continued"
PAIRS = {"method": "irft", "beta": 0.5, "nll_weight": 0.2}
ALONE = PAIRS | {"beta": 1.0}  # losses of each reward alone, without a difference of two
RFT = {"method": "rft", "beta": 1.0, "num_generations": 4, "reward_learning_rate": 3e-4}
AFD = RFT | {"method": "afd", "history": 1}
ROUNDS = {"stages": 1, "align_rounds": 2, "num_generations": 4, "reward_learning_rate": 3e-4}
# Half of the steps are SFT's. The reward is the log-ratio of its policy to the start.
OF_SFT = ROUNDS | {"method": "rft", "beta": 1.0, "sft_steps": 1, "reward_data": "none", "kl_in": "reward"}
OF_SFT |= {"reward_credit": "token", "implicit_reward_policy": ["sft"], "implicit_reward_reference": ["initial"]}
EBFT = {"reward_data": "none", "feature_reward": [0.5, 1.0], "feature_whitening": True, "kl_in": "none"}

# An arm has the optimiser, the schedule and the answers per step of all arms (jobs.py). Its other keys are not tuned.
ARMS = {
    START: Arm(),
    CONTINUED: Arm({"method": "sft"}),
    "SFT on all data from the start": Arm({"method": "sft"}, from_scratch=True),
    "SFT continued, likeliest of 8": Arm(of=CONTINUED, best_of=8, judges=("words", "sums")),
    "DFT": Arm({"method": "sft", "sft_loss_type": "dft"}),
    "iw-SFT": Arm({"method": "sft", "sft_loss_type": "iw_sft"}),
    "PSFT": Arm({"method": "sft", "sft_loss_type": "psft", "ref_model_sync_steps": 8, "cliprange": 0.28}),
    "ASFT": Arm({"method": "sft", "sft_loss_type": "asft"}),
    "IRFT, sigmoid": Arm(PAIRS, answers=2),
    "IRFT, linear": Arm(PAIRS | {"loss_type": "linear"}, answers=2),
    "SPIN": Arm({"method": "spin", "beta": 0.5}, answers=2),
    "SPACE": Arm(ALONE | {"loss_type": "space"}, answers=2),
    "IRIS": Arm(ALONE | {"loss_type": "iris"}, answers=2),
    "T-SPIN": Arm({"method": "t_spin", "beta": 0.5}, answers=2),
    "RFT, RLOO": Arm(RFT, answers=4),
    "RFT, best of 4": Arm(RFT | {"align": "bon"}),
    "AfD, reverse KL": Arm(AFD | {"divergence": "airl"}, answers=4),
    "AfD, JS": Arm(AFD | {"divergence": "gail"}, answers=4),
    "R-AIRL": Arm(ROUNDS | {"method": "r_airl", "beta": 1.0, "kl_in": "reward"}, answers=4),
    "GAD": Arm(ROUNDS | {"method": "gad", "beta": 0.1, "sft_epochs": 0}, answers=4),
    "rewards per token of SFT": Arm(OF_SFT, answers=4),
    "EBFT": Arm(RFT | EBFT, answers=4),
    "SDFT": Arm({"method": "sdft", "teacher_prompt_template": "{prompt}: {privileged_context}"}),
}
