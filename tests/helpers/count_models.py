"""Started by tests: ``irlfast train``, which prints at every step how many language models the process holds."""

import gc
import sys
from typing import Any

from irlfast.engine import fit
from irlfast.train import main

train_step = fit.train_step


def counted_step(*arguments: Any) -> Any:
    count = sum(type(kept).__name__ == "LlamaForCausalLM" for kept in gc.get_objects())
    print("models:", count, file=sys.stderr)
    return train_step(*arguments)


if __name__ == "__main__":
    fit.train_step = counted_step
    sys.exit(main())
