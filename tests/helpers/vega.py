"""Draw charts once, in the process that runs are forked from: the first ones of a process take most of a report's time.

Vega's JavaScript, which every report needs, is made once, too, and so is Transformers' table of renamed tensors.
"""

import numpy as np
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from irlfast.reports.charts import draw_curves, draw_held_out, draw_log_ratios, draw_timeline, vega
from irlfast.reports.files import LOGGED

vega()
draw_curves({"sft": np.ones((3, len(LOGGED)))})
draw_held_out({"sft": {"exact_match": 0.5, "reward_accuracy": 0.5}}, "sft")
draw_log_ratios({"stage-00": {"expert": np.arange(3.0), "synthetic": np.arange(3.0)}})
draw_timeline({"sft": [1.0] * 9})
get_checkpoint_conversion_mapping("llama")
