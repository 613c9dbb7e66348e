"""A module in vLLM's place, quick to start, whose answers are drawn from the weights, the seed and the prompt."""

import hashlib
import json
import random
import time
import types
from pathlib import Path

START, STEP = 0.3, 0.2  # seconds: time to be killed in


class LLM:
    def __init__(self, model, enable_lora=False, **given):
        if enable_lora:  # so that the adapter is merged first
            raise ValueError("the stand-in does not support LoRA")
        self.words = json.loads(Path(model, "config.json").read_text())["vocab_size"]
        self.weights = [
            hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(model).glob("*.safetensors"))
        ]
        time.sleep(START)
        self.llm_engine, self.waiting = self, []

    def add_request(self, request_id, prompt, options, lora_request):
        self.waiting.append((request_id, prompt["prompt_token_ids"], options.given))

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        """Answer all that wait."""
        time.sleep(STEP)
        done, self.waiting = self.waiting, []
        return [types.SimpleNamespace(request_id=name, outputs=self.answers(ids, given)) for name, ids, given in done]

    def answers(self, prompt, given):
        seeds = range(given["seed"], given["seed"] + given["n"])
        return [with_logprobs(self.answer(prompt, given, seed), given) for seed in seeds]

    def answer(self, prompt, given, seed):
        draw = random.Random(f"{self.weights} {seed} {prompt}")
        ids = [token for token in range(self.words) if token not in given.get("logit_bias", ())]
        return draw.choices(ids, k=given["max_tokens"])


def with_logprobs(ids, given):
    """An answer with the log-probability −1 of each token, where they are asked for."""
    steps = [{token: types.SimpleNamespace(logprob=-1.0)} for token in ids]
    return types.SimpleNamespace(token_ids=ids, logprobs=steps if "logprobs" in given else None)
