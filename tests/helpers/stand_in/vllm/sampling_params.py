"""The settings of answers, in vLLM's place."""

import types

RequestOutputKind = types.SimpleNamespace(FINAL_ONLY=2)


class SamplingParams:
    def __init__(self, **given):
        self.given = given
