"""Sampling by several workers: shards, seeds, the queue, and what happens to the shards of a worker that is gone."""

import heapq
import random
import types

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from irlfast.common.files import InputError
from irlfast.sampling import generation, shards, transformers_sampler
from irlfast.sampling.generation import answers_from, sample, sample_groups
from irlfast.sampling.shards import DRAWN, Drawn, Request, Sampling, Shard, parts_of, seed_of
from irlfast.sampling.transformers_sampler import generate_batch
from irlfast.sampling.vllm_sampler import has_room
from irlfast.sampling.work_queue import LocalStore, Queue, WorkerLost
from tests.helpers.shards import shard

END, WORDS = 2, 40


class Ids(list):
    """A prompt's token ids, with the method of arrays that the sampler calls."""

    def tolist(self):
        return [*self]


@pytest.fixture
def run(tmp_path):
    tokenizer = types.SimpleNamespace(
        decode=str,
        batch_decode=lambda answers, **_: [str(answer) for answer in answers],
        get_vocab=lambda: {str(token): token for token in range(WORDS)},
    )
    config = types.SimpleNamespace(
        use_vllm=False, vllm_server=[], per_device_eval_batch_size=8, max_new_tokens=12, max_prompt_length=30
    )
    encoder = types.SimpleNamespace(tokenizer=tokenizer, ends=(END,))
    return types.SimpleNamespace(config=config, encoder=encoder, output=tmp_path)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, initializer_range=0.5, **size)).eval()


def prompts(draw: random.Random, count: int):
    each = [Ids(draw.randrange(WORDS) for _ in range(draw.randint(1, 20))) for _ in range(count)]
    return [types.SimpleNamespace(prompt_ids=ids, row=None) for ids in each]


def sampled_by(workers: int, request: Request, draw: random.Random) -> dict[int, list]:
    """The answers of several workers, by shard. The workers' turns are drawn."""
    parts, store, answers = parts_of(request), LocalStore(), {}
    queues = [Queue(store, "queue", len(parts)) for _ in range(workers)]
    each = {queue: answers_from(queue, "policy", parts, workers) for queue in queues}
    while len(answers) < len(parts):
        queue = draw.choice(queues)
        if queue.mine or queue.has_more():  # it does not wait for others
            number, answers[number] = next(each[queue])
            queue.finish(number)
    return answers


def prompts_and_seeds(model, prompts, seeds, ends, sampling, max_new_tokens, never):
    return [Drawn([*ids, seed % 2**31], []) for ids, seed in zip(prompts, seeds, strict=True)]


def test_answers_are_the_same_on_any_number_of_workers(run, policy, monkeypatch, tmp_path):
    """Numbers of prompts and of answers to each are drawn, and so are the workers' turns.

    An answer says which prompt and seed it was drawn with; the next test shows that it depends on nothing else.
    """
    monkeypatch.setattr(transformers_sampler, "frozen_model", lambda *_, **__: policy)
    monkeypatch.setattr(transformers_sampler, "generate_batch", prompts_and_seeds)
    monkeypatch.setattr(shards, "SHARD_SIZE", 8)
    draw = random.Random(0)
    for case in range(12):
        examples, n = prompts(draw, draw.randint(1, 90)), draw.randint(1, 5)
        how = Sampling(1.0, 1.0, 0, (case,))
        request = Request(run, examples, n, tmp_path, how)
        alone, *several = [sampled_by(workers, request, draw) for workers in (1, 2, 4)]
        assert sum(map(len, alone.values())) == n * len(examples)
        assert several == [alone, alone]


def test_an_answer_depends_on_its_prompt_and_seed_and_not_on_the_batch(policy):
    draw = random.Random(1)
    asked = [[*example.prompt_ids] for example in prompts(draw, 10)]
    seeds = [draw.getrandbits(56) for _ in asked]
    together = generate_batch(policy, asked, seeds, [END], DRAWN, 8)
    alone = [generate_batch(policy, [ids], [seed], [END], DRAWN, 8)[0] for ids, seed in zip(asked, seeds, strict=True)]
    assert together == alone
    others = generate_batch(policy, asked, [seed + 1 for seed in seeds], [END], DRAWN, 8)
    assert sum(a != b for a, b in zip(together, others, strict=True)) > 5


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "never"), [(1.0, 1.0, 0, []), (0.5, 0.8, 0, [7]), (2.0, 1.0, 5, [0, 1, 2])]
)
def test_the_first_token_has_the_distribution_that_the_settings_ask_for(policy, temperature, top_p, top_k, never):
    """Pearson's chi-squared of 4,000 draws against Transformers' own warpers."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    count, how = 4000, Sampling(temperature, top_p, top_k, (0,))
    with torch.no_grad():
        logits = policy(torch.tensor([[5, 6, 7]])).logits[:, -1].float()
    logits[:, never] = -torch.inf
    logits = TemperatureLogitsWarper(temperature)(None, logits)
    logits = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    expected = count * TopPLogitsWarper(top_p)(None, logits).softmax(-1)[0].double()
    seeds = [seed_of((0,), place) for place in range(count)]
    answers = generate_batch(policy, [[5, 6, 7]] * count, seeds, [END], how, 1, never)
    observed = torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=WORDS).double()
    assert not observed[expected == 0].any()
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum()[None] + 1e-9])
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    freedom = len(expected) - 1
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_samplers_log_probabilities_are_the_policys_without_the_settings(policy, temperature):
    """They are those of a forward pass. Temperature, top_p, top_k and suppressed ids do not change them."""
    draw = random.Random(7)
    asked = [[*example.prompt_ids] for example in prompts(draw, 6)]
    how = Sampling(temperature, 0.9, 5, (0,), logps=True)
    answers = generate_batch(policy, asked, range(6), [END], how, 8, [7, 9])
    assert [each.ids for each in answers] == [
        each.ids for each in generate_batch(policy, asked, range(6), [END], how._replace(logps=False), 8, [7, 9])
    ]
    for prompt, (ids, logps) in zip(asked, answers, strict=True):
        with torch.no_grad():
            logits = policy(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logps), expected, rtol=1e-5, atol=1e-5)


def test_log_probabilities_are_kept_with_all_digits_in_the_answers_order(run, policy, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers_sampler, "frozen_model", lambda *_, **__: policy)
    monkeypatch.setattr(shards, "SHARD_SIZE", 4)
    examples, how = prompts(random.Random(8), 5), DRAWN._replace(logps=True)
    request = Request(run, examples, 3, tmp_path / "rollouts", how)
    answers = generation.answers_to("policy", request)
    asked = [[*x.prompt_ids] for x in examples for _ in range(3)]
    seeds = [seed_of(how.seed, place) + k for place in range(5) for k in range(3)]
    alone = [generate_batch(policy, [ids], [seed], [END], how, 12)[0] for ids, seed in zip(asked, seeds, strict=True)]
    assert [[*answer] for answer in answers] == [each.ids for each in alone]
    for kept, each in zip(generation.sampler_logps(request), alone, strict=True):
        torch.testing.assert_close(kept, torch.tensor(each.logps))
    unasked = Request(run, examples, 3, tmp_path / "unasked", DRAWN)
    generation.answers_to("policy", unasked)
    assert generation.sampler_logps(unasked) == []


def test_no_two_answers_of_a_run_share_a_seed():
    """Answers of two stages, to neighbouring prompts, or to the same prompt, are drawn apart."""
    n = 4
    seeds = [
        seed_of(how, place) + k
        for how in [(seed, stage, *more) for seed in range(3) for stage in range(4) for more in ((), (1, 0), (1, 1))]
        for place in range(200)
        for k in range(n)
    ]
    assert len({*seeds}) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_shards_have_the_same_size_whatever_the_number_of_workers_and_hold_each_prompt_once(run, tmp_path):
    draw = random.Random(2)
    for _ in range(20):
        examples, n = prompts(draw, draw.randint(1, 300)), draw.randint(1, 70)
        parts = parts_of(Request(run, examples, n, tmp_path, DRAWN))
        assert sorted(i for part in parts for i in part.chosen) == [*range(len(examples))]
        sizes = {len(part.chosen) for part in parts[:-1]}
        assert len(sizes) < 2 and len(parts[-1].chosen) <= max(sizes, default=len(examples))


def test_a_prompt_that_is_there_twice_gets_two_answers(run, policy, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers_sampler, "frozen_model", lambda *_, **__: policy)
    examples = [types.SimpleNamespace(prompt_ids=Ids([5, 6, 7]), row=None)] * 8
    answers = sample(run, "policy", examples, tmp_path / "samples", DRAWN)
    assert len({tuple(answer) for answer in answers}) > 4


def test_the_groups_of_a_folder_are_the_same_when_it_is_sampled_again(run, policy, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers_sampler, "frozen_model", lambda *_, **__: policy)
    monkeypatch.setattr(shards, "SHARD_SIZE", 8)
    examples = prompts(random.Random(3), 9)
    first = [*sample_groups(run, "policy", examples, 3, tmp_path / "rollouts", DRAWN)]
    (tmp_path / "rollouts" / "00001.jsonl").unlink()
    assert [*sample_groups(run, "policy", examples, 3, tmp_path / "rollouts", DRAWN)] == first
    assert [len(group.answers) for group in first] == [3] * 9


# ---------------------------------------------------------------- workers that are gone, and busy ones


def test_the_shards_of_a_lost_worker_are_taken_by_the_others(run, monkeypatch, tmp_path):
    examples = prompts(random.Random(4), 12)
    monkeypatch.setattr(shards, "SHARD_SIZE", 2)
    parts, store = parts_of(Request(run, examples, 1, tmp_path, DRAWN)), LocalStore()

    def lost(run, policy, claim):
        claim(), claim()
        raise WorkerLost("vLLM was killed by signal 9")
        yield

    def well(run, policy, claim):
        while shard := claim():
            yield shard.number, [Drawn([END], []) for _ in shard.prompts]

    first, second = (Queue(store, "queue", len(parts)) for _ in range(2))
    monkeypatch.setattr(generation, "transformers_answers", lost)
    assert [*answers_from(first, "policy", parts, 2)] == []
    monkeypatch.setattr(generation, "transformers_answers", well)
    done = []
    for number, _ in answers_from(second, "policy", parts, 2):
        second.finish(number)
        done.append(number)
    assert sorted(done) == [*range(6)]


def test_if_all_workers_are_lost_the_last_one_says_why(run, monkeypatch, tmp_path):
    parts, store = parts_of(Request(run, prompts(random.Random(5), 3), 1, tmp_path, DRAWN)), LocalStore()

    def lost(run, policy, claim):
        raise WorkerLost("vLLM was killed by signal 9")
        yield

    monkeypatch.setattr(generation, "transformers_answers", lost)
    assert [*answers_from(Queue(store, "queue", 1), "policy", parts, 2)] == []
    with pytest.raises(InputError, match="killed by signal 9"):
        [*answers_from(Queue(store, "queue", 1), "policy", parts, 2)]


def test_without_a_leader_sampling_is_refused_in_a_sentence(run, monkeypatch, tmp_path):
    run.config.use_vllm, run.config.vllm_tensor_parallel_size = True, 4
    monkeypatch.setattr(generation, "leads_engine", lambda size: False)
    with pytest.raises(InputError, match="vllm_tensor_parallel_size: found 4, but no process"):
        sample(run, "policy", prompts(random.Random(6), 3), tmp_path / "samples", DRAWN)


def test_64_workers_are_busy_with_answers_of_heavy_tailed_lengths():
    """The queue's own code. 64 engines answer 20,000 prompts; lengths are Pareto's, up to 512 tokens.

    A simulated engine makes a token of each answer in work per unit of time, and has at most 128 in work. A worker is
    busy while its engine has an answer in work.
    """
    draw, store, workers, count = random.Random(0), LocalStore(), 64, 20_000
    lengths = [min(512, int(32 * draw.paretovariate(1.1))) for _ in range(count)]
    cuts = [lengths[start : start + shards.SHARD_SIZE] for start in range(0, count, shards.SHARD_SIZE)]
    queues = [Queue(store, "queue", len(cuts)) for _ in range(workers)]
    in_work: list[dict[int, Shard]] = [{} for _ in queues]  # per worker, by number
    done: list[dict[int, list[int]]] = [{} for _ in queues]  # per worker, by number of a shard: the answers there
    events = [(0, worker, -1) for worker in range(workers)]  # (time, worker, the shard of which an answer is done)
    busy_until = [0] * workers
    while events:
        now, worker, number = heapq.heappop(events)
        busy_until[worker] = now
        queue = queues[worker]
        if number >= 0:
            done[worker][number].append(now)
            if len(done[worker][number]) == len(cuts[number]):
                del in_work[worker][number], done[worker][number]
                queue.finish(number)
        while has_room(in_work[worker], done[worker], 128) and (number := queue.claim()) is not None:
            in_work[worker][number], done[worker][number] = shard(number, *[[]] * len(cuts[number])), []
            for length in cuts[number]:
                heapq.heappush(events, (now + length, worker, number))
    assert queues[0].finished() == len(cuts)
    share = sum(busy_until) / (workers * max(busy_until))
    print(f"64 workers are busy {share:.1%} of {max(busy_until)} units of time")
    assert share >= 0.9
