"""``python tests/helpers/count_loads.py FILE KEY=VALUE...``: train, and write which policies were loaded, in order."""

import json
import sys
from pathlib import Path

from irlfast import train
from irlfast.models import load, prepare
from irlfast.sampling import generation

LOADS: list[list[str]] = []  # [who loads, the model]
FILE = sys.argv.pop(1)


def counted(who: str, function):
    def load_and_count(name, config=None, heads=0, *arguments, **keys):
        if not heads:
            LOADS.append([who, str(name)])
        return function(name, config, heads, *arguments, **keys)

    return load_and_count


prepare.load_model = counted("scores", prepare.load_model)
load.load_model = counted("trains", load.load_model)
vllm = generation.generate_vllm
generation.generate_vllm = lambda name, **keys: LOADS.append(["samples", str(name)]) or vllm(name, **keys)
code = train.main()
Path(FILE).write_text(json.dumps(LOADS))
sys.exit(code)
