"""The processes of a run agree to stop after the same step, even if only one of them was asked to."""

import dataclasses
import time

import torch

from irlfast.common import dist, stop

LOOK_EVERY = 1.0  # seconds at most: a look waits for the GPU, which then idles until the next step is launched
LOOKS = 20  # within the grace, at least


@dataclasses.dataclass
class Agreement:
    """When the processes next tell each other whether they were asked to stop. All of them know the same numbers."""

    grace: float  # seconds until a process that was asked leaves
    last: int  # the step of the last look
    next: int  # the step of the next one
    since: float = dataclasses.field(default_factory=time.monotonic)  # the time of the last look

    def to_stop(self, step: int) -> bool:
        """Return whether any process was asked to stop. Every process calls this function after each step.

        A single process just knows. Several processes look once per second or step, by their mean time per step since
        the last look, and more often where the grace is short. A look is one collective.
        """
        if dist.world_size() == 1:
            return stop.asked()
        if step < self.next:
            return False
        own = [float(stop.asked()), time.monotonic() - self.since]
        asked, seconds = dist.all_reduce(torch.tensor(own, dtype=torch.float64, device=dist.device())).tolist()
        per_step = seconds / dist.world_size() / (step - self.last)
        steps = int(min(LOOK_EVERY, self.grace / LOOKS) / per_step)
        self.last, self.next, self.since = step, step + max(1, steps), time.monotonic()
        return asked > 0
