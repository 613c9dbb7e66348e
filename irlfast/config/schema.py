"""Every key of a run, in one frozen dataclass. The description of a key is its ``--help`` line.

:mod:`irlfast.config.inputs` has the first keys: those of the run, its model and its demonstrations.

Pydantic checks types, bounds and names. It names every wrong key with the value that it found, and reads YAML's
``5e-7``, which YAML takes for text, as a number. DeepSpeed depends on Pydantic anyway.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from irlfast.config.inputs import Inputs
from irlfast.config.methods import METHOD_FACTS, MethodFacts
from irlfast.config.types import Count, NotNegative, Order, PairLossName, Positive, key


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Config(Inputs):
    """Every key of a run (flat YAML; TRL's name where TRL has one)."""

    # SFT: the whole of method sft, a warm start of the others
    sft_epochs: NotNegative | None = key(None, "Passes of SFT (default: 1 for method sft, else none).")
    sft_steps: Annotated[int, Field(ge=0)] | None = key(None, "Optimiser steps of SFT, in place of sft_epochs.")
    sft_loss_type: Literal["nll", "dft", "psft", "asft", "iw_sft"] = key(
        "nll",
        "The loss of SFT: -log pi by token (nll); this times the token's probability (dft), with the KL to pi_ref "
        "(asft); this times pi / pi_ref by answer (iw_sft); or pi / pi_old, clipped (psft).",
    )
    sft_kl_weight: NotNegative = key(0.1, "Weight of the KL to pi_ref in sft_loss_type asft.")
    sft_nll_steps: Annotated[int, Field(ge=0)] = key(
        0, "Optimiser steps with nll before those with sft_loss_type. pi_ref is the policy after them."
    )
    sft_learning_rate: Positive | None = key(None, "Peak learning rate of SFT (default: learning_rate).")
    sft_optim: Literal["rmsprop", "adamw_torch"] | None = key(None, "Optimiser of SFT (default: optim).")
    sft_global_batch_size: Count | None = key(
        None, "Demonstrations per optimiser step of SFT, over all processes (default: global_batch_size)."
    )

    # IRFT; a list gives one value per stage
    stages: Count = key(3, "T: how many times the policy is sampled, and trained on what it sampled.")
    inner_epochs: Positive | list[Positive] | None = key(None, "K: passes over the pairs of a stage (default: 1).")
    inner_steps: Count | list[Count] | None = key(None, "K: optimiser steps per stage, in place of inner_epochs.")
    prompts_per_stage: Literal["split", "all"] = key(
        "split", "The prompts of a stage: split takes the next 1/T of the data, all takes every prompt."
    )
    history: Annotated[int, Field(ge=0)] = key(0, "Mix in the pairs of this many earlier stages.")
    reference: Literal["stage", "initial"] = key(
        "stage", "pi_ref: the policy at the start of the stage, or at the start of the first stage."
    )
    loss_type: PairLossName | list[PairLossName] = key(
        "sigmoid",
        "The loss on pairs, by default -log sigmoid(beta (rho(y) - rho(y~))); docs/kernels.md has all formulas. A list "
        "is a mixture.",
    )
    loss_weights: list[float] | None = key(None, "Weights of the losses that loss_type lists (default: 1 each).")
    label_smoothing: Annotated[float, Field(ge=0, le=0.49)] = key(
        0.0, "Share of pairs that are the wrong way round, for loss_type cdpo, robust and exo_pair."
    )
    discopop_tau: Annotated[float, Field(ge=1e-6)] = key(0.05, "Temperature of loss_type discopop.")
    reward_shift: Annotated[float, Field(ge=-80, le=80)] = key(
        0.0, "Subtracted from the rewards of loss_type space (log mu of its paper), bco_pair and kto_pair."
    )
    renyi_alpha: Order | list[Order] = key(0.5, "Order alpha of the Renyi divergence of loss_type iris.")
    historical_weight: NotNegative = key(
        0.1, "t_spin: weight of the loss on the policy's answer above the first policy's, from the second stage on."
    )
    beta: Positive | list[Positive] = key(
        0.1, "Scale of the log-ratio. In rft and afd, weight of the KL to the reference (1: the learned reward's own)."
    )
    token_weighting: Literal["none", "remaining"] = key(
        "none", "Weights in SFT. remaining gives token k of T the weight (T - k) / T (state-action forward KL)."
    )
    nll_weight: NotNegative = key(0.0, "Weight of the demonstrations' mean negative log-likelihood per token.")

    # RFT and AfD: the reward
    reward_data: Literal["policy_demo", "init_sft", "init_demo", "sft_demo", "preference", "none"] = key(
        "policy_demo",
        "The pairs to learn a reward from: the stage's policy against demonstrations (policy_demo), the initial policy "
        "against SFT's (init_sft), either against demonstrations (init_demo, sft_demo), rejected against chosen "
        "(preference). none learns no reward.",
    )
    reward_loss: Literal["bradley_terry", "gaussian", "linear", "bce", "airl", "gail", "fairl", "alpha"] = key(
        "bradley_terry",
        "The loss of the reward model: of the difference of a pair (bradley_terry; gaussian, with a learned variance; "
        "linear), of a discriminator (bce), or the bound of a divergence (airl: reverse KL, gail: JS, fairl: forward "
        "KL, alpha).",
    )
    divergence: Literal["airl", "gail", "fairl", "alpha"] | None = key(
        None,
        "The divergence that the policy lowers, by the reward of a discriminator's logit (default: that of "
        "reward_loss, else airl, whose reward is the logit itself).",
    )
    divergence_alpha: float = key(0.5, "Alpha of the alpha-divergence.")
    reward_level: Literal["sequence", "token"] = key(
        "sequence", "Read the reward's heads at the last token of an answer, or sum them over all of its tokens."
    )
    reward_regularization: Positive = key(
        0.1, "Weight of the squared rewards (linear), or of the squared log-variances (gaussian)."
    )
    reward_heads: Count = key(1, "Heads of a reward model, which are an ensemble.")
    reward_models: Count = key(1, "Reward models that learn apart, each with its own seed. All heads are one ensemble.")
    reward_combine: Literal["mean", "min", "mean_std"] = key(
        "mean",
        "mean adds the rewards up, each the mean of its heads. min and mean_std take the least of all heads of all "
        "rewards, or their mean less reward_std_weight standard deviations.",
    )
    reward_std_weight: NotNegative = key(1.0, "Number of standard deviations that mean_std takes off.")
    reward_every: Literal["stage", "round"] = key(
        "stage",
        "When a reward learns from the policy's answers: at the start of every stage, or of the first stage and then "
        "in every round, from the answers that it judges there.",
    )
    reward_backbone: str | None = key(
        None, "The model that a reward starts from, with the policy's tokenizer: folder or hub name (none: the policy)."
    )
    reward_frozen_layers: Annotated[int, Field(ge=0)] = key(
        0, "First layers of the reward's backbone that are not trained. All layers: heads on the policy's own backbone."
    )
    reward_epochs: Positive | None = key(None, "Passes over the reward's pairs of a stage (default: 1).")
    reward_steps: Count | None = key(None, "Optimiser steps of a reward per stage, in place of reward_epochs.")
    reward_learning_rate: Positive | None = key(None, "Peak learning rate of a reward (default: learning_rate).")
    reward_optim: Literal["rmsprop", "adamw_torch"] | None = key(None, "Optimiser of a reward (default: optim).")
    reward_model_name_or_path: list[str] = key([], "Reward models to add: folders or hub names.")
    reward_overlong: Literal["cut", "drop"] = key(
        "cut", "Texts over the limit of an added reward model: cut keeps their end, drop leaves their prompts out."
    )
    implicit_reward_policy: list[str] = key(
        [],
        "Policies whose implicit rewards, beta (log pi - log pi_ref) of an answer, are added: folders, hub names, or "
        "policies of the run itself: initial, sft-nll, sft.",
    )
    implicit_reward_reference: list[str] = key(
        [], "pi_ref of each implicit reward, by the same names (default: none, so that the reward is beta log pi)."
    )
    reward_function: list[str] = key(
        [],
        "Python functions that give rewards to add, as package.module:function or file.py:function. They are called as "
        "TRL calls its own.",
    )
    reward_normalize: bool = key(
        False, "Give each reward mean 0 and standard deviation 1 over a stage's first answers, before weights mix them."
    )
    reward_weights: list[float] = key(
        [],
        "Weights of all rewards (default: 1): the learned one, the reward models, the implicit rewards, that of "
        "features, the functions.",
    )
    feature_reward: list[Annotated[float, Field(ge=0, le=1)]] = key(
        [],
        "EBFT: reward answers whose hidden states match the demonstration's, at these depths of the first stage's "
        "policy (0: embedding, 1: last layer).",
    )
    feature_whitening: bool = key(False, "Whiten the features of a prompt's answers by their second moment.")
    feature_diversity: NotNegative = key(1.0, "Price of an answer's similarity to the prompt's other answers.")

    # RFT and AfD: aligning the policy to it
    align: Literal["rloo", "ppo", "grpo", "apa", "bon"] = key(
        "rloo", "The policy loss: rloo, ppo, grpo or apa, or bon, which is SFT on the best of the n answers."
    )
    num_generations: Annotated[int, Field(ge=2)] = key(4, "n: answers per prompt.")
    align_rounds: Count = key(1, "Rounds per stage. Each samples answers anew, to the next share of the prompts.")
    kl_in: Literal["loss", "reward", "none"] = key(
        "loss",
        "Where rloo, ppo and grpo subtract beta KL(pi || pi_ref). In the reward it is that of the policy that sampled.",
    )
    reward_credit: Literal["sequence", "token"] = key(
        "sequence",
        "sequence gives all tokens of an answer the advantage of its whole reward. token gives each token that of the "
        "rewards from it on, where a reward is one of tokens (reward_level: token, implicit rewards, kl_in: reward).",
    )
    gamma: Annotated[float, Field(ge=0, le=1)] = key(
        1.0, "Discount per token of the later rewards, where reward_credit is token."
    )
    whiten_rewards: bool = key(False, "Divide the advantages of rloo and ppo by their standard deviation.")
    cliprange: Positive = key(0.2, "Clip range of ppo and grpo, and of sft_loss_type psft.")
    vllm_importance_sampling_correction: bool = key(
        False,
        "Weight the gradients of rloo, ppo and grpo by pi / pi_sampler: the trainer's probabilities by those of the "
        "sampler, which may be vLLM or Transformers.",
    )
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = key(
        "sequence_mask",
        "The weights of vllm_importance_sampling_correction: of each token or of the whole answer. truncate cuts those "
        "above vllm_importance_sampling_clip_max, mask makes them 0.",
    )
    vllm_importance_sampling_clip_max: Positive | None = key(
        3.0,
        "The largest weight of vllm_importance_sampling_correction (null: no bound, which is unbiased by sequence).",
    )
    missing_eos_penalty: NotNegative = key(0.0, "Subtracted from the reward of an answer that was cut.")
    length_penalty: float = key(0.0, "Subtracted from the reward per token of the answer.")

    # The teacher: a second model in training without a gradient, for the methods that have one
    sync_ref_model: bool = key(
        False, "Let the teacher follow the policy: teacher = alpha policy + (1 - alpha) teacher (false: frozen)."
    )
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = key(
        0.6, "Alpha of sync_ref_model. 1 at every step is the policy itself, without a second model."
    )
    ref_model_sync_steps: Count = key(512, "Optimiser steps from one synchronisation to the next.")
    teacher_prompt_template: str = key(
        "{prompt}\n\nThis is an example for a response to the question:\n{privileged_context}\n\nNow answer with a "
        "response of your own, including the thinking process.",
        "The last turn of the teacher's prompt in sdft; {privileged_context} is the demonstration.",
    )
    distillation_mode: Literal["sampled_token", "full_logits", "topk_logits"] = key(
        "full_logits", "Where sdft compares policy and teacher: at the sampled token, all tokens or the policy's top k."
    )
    distillation_alpha: Annotated[float, Field(ge=0, le=1)] = key(
        1.0, "The divergence of sdft: 0 is forward KL (teacher || policy), 1 reverse KL, between them Jensen-Shannon."
    )
    distillation_topk: Count = key(100, "k of topk_logits.")
    distillation_add_tail: bool = key(False, "Count the tokens outside the top k as one more token.")
    distillation_is_clip: Positive | None = key(
        None, "Weigh a token by pi / pi_old, at most this, where pi_old sampled it (default: no weights)."
    )
    num_loss_tokens_to_skip: Annotated[int, Field(ge=0)] = key(0, "First tokens of an answer that sdft does not learn.")

    # Hidden reasoning
    thought_reward: Literal["logprob", "prob", "jensen"] = key(
        "logprob",
        "The objective of n thoughts z: the mean of log pi(y|x,z) (logprob), of pi(y|x,z) (prob: VeriFree), or the log "
        "of the mean of pi(y|x,z) (jensen: JEPO).",
    )
    thought_mark: str = key("</think>", "The text that ends a thought; one token. It should not occur in answers.")
    max_thought_tokens: Count = key(256, "Most tokens of a thought, its mark included.")

    # Optimisation
    learning_rate: Positive | list[Positive] = key(5e-7, "Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"] = key(
        "linear", "Learning-rate schedule of a stage."
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = key(0.1, "Share of a stage's steps that warm up.")
    optim: Literal["rmsprop", "adamw_torch"] = key("rmsprop", "The optimiser. Its state starts anew in each stage.")
    weight_decay: NotNegative = key(0.0, "Weight decay.")
    router_aux_loss_coef: NotNegative = key(
        0.0,
        "Weight of the load-balancing loss of a policy that is a mixture of experts (0: no such loss, unlike TRL).",
    )
    max_grad_norm: NotNegative = key(1.0, "Clip the norm of the gradient to this value (0: no clipping).")
    global_batch_size: Count = key(
        8,
        "Prompts with their answers (pairs, demonstrations) per optimiser step, over all processes. The same run on "
        "another number of processes takes the same steps.",
    )
    per_device_train_batch_size: Count | None = key(
        None,
        "TRL's spelling of global_batch_size: this number, times gradient_accumulation_steps, times the processes that "
        "the run is started with. It is refused beside global_batch_size.",
    )
    gradient_accumulation_steps: Count | None = key(
        None, "See per_device_train_batch_size (default there: 1). Alone it is refused."
    )
    max_tokens_per_batch: Count | Literal["auto"] = key(
        "auto",
        "Most tokens of a forward pass. On a GPU, auto is what the memory holds, measured at the second step of each "
        "phase, and half of it once the memory ran out. On a CPU, auto is about a thousand.",
    )

    # What may go wrong: values that are not finite, values far from those before, unlikely demonstrations
    max_bad_steps: Count = key(
        3,
        "Steps whose loss or gradient is not finite are skipped. After this many in a row, a phase goes back to its "
        "last checkpoint with a tenth of the learning rate, once; after as many again, the run stops.",
    )
    on_spike: Literal["warn", "stop", "ignore"] = key(
        "warn",
        "When the loss, the gradient's norm, the margin or the demonstrations' log-likelihood is suddenly far from the "
        "values logged before: warn, stop the run, or ignore it.",
    )
    max_expert_drop: Positive | None = key(
        None,
        "End a stage once the demonstrations' log-likelihood is this many nats below the reference's (default: warn).",
    )
    keep: Literal["last", "best"] = key("last", "The policy that becomes final/: the last, or the best held-out one.")
    metric_for_best_model: Literal["exact_match", "nll", "reward_accuracy"] = key(
        "nll", "The held-out metric by which keep: best chooses."
    )

    # Held-out evaluation
    eval_every_stage: bool = key(
        True, "Evaluate the policy after every phase. false: only the first policy and the last one."
    )
    scorer: list[str] = key(
        [],
        "Python functions by which `irlfast evaluate` scores answers, as package.module:function or file.py:function. "
        "Each gets the prompt, the answer, the expert's answer and the row.",
    )

    # Sampling
    use_vllm: bool = key(False, "Sample by vLLM, not by Transformers.")
    async_sampling: bool = key(
        False,
        "Sample a stage's answers while the stage before still trains, by vLLM, from its policy at async_sampling_at.",
    )
    async_sampling_at: Annotated[float, Field(gt=0, lt=1)] = key(
        0.5, "Share of a stage's optimiser steps after which its policy answers the next stage's prompts."
    )
    temperature: NotNegative | list[NotNegative] = key(
        1.0, "Temperature of synthetic answers. The gradients of rloo, ppo, grpo, apa and reasoning are unbiased at 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = key(1.0, "Nucleus of synthetic answers.")
    top_k: Annotated[int, Field(ge=0)] = key(0, "Draw from this many of the most likely tokens (0: all).")
    max_new_tokens: Count = key(256, "Most tokens of a sampled answer, end token included.")
    per_device_eval_batch_size: Count = key(64, "Sequences that are scored or generated at a time, per device.")
    ds3_gather_for_generation: bool = key(
        True,
        "With zero_stage 3, each process loads the whole policy to sample by Transformers (false: its weights are "
        "gathered layer by layer for every token, which is slow, but has room).",
    )
    vllm_python: str | None = key(None, "A Python interpreter that has vLLM (default: the one that runs irlfast).")
    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = key(0.9, "Share of the GPU's memory for vLLM.")
    vllm_tensor_parallel_size: Count = key(1, "GPUs per vLLM engine.")
    vllm_server: list[str] = key(
        [], "Addresses of running vLLM servers that sample in place of engines of the run, as http://host:8000."
    )
    vllm_server_requests: Count = key(256, "Answers that each server of vllm_server has in work at a time.")

    # The engine
    num_processes: Count | None = key(
        None, "Processes that `irlfast train` alone starts on this machine (default: one per visible GPU, else one)."
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = key(
        1, "ZeRO stage of DeepSpeed. One process in float32 needs none, and takes none."
    )
    deepspeed: str | None = key(
        None,
        "A JSON file of DeepSpeed settings that are merged over ours, its ZeRO stage included. auto is what "
        "Transformers' Trainer fills in; sizes of batches, if there, are those of the run.",
    )
    save_steps: Annotated[int, Field(ge=0)] = key(
        100, "Optimiser steps between checkpoints, rounded up to a multiple of logging_steps (0: no checkpoints)."
    )
    async_save: bool = key(
        True,
        "Write checkpoints beside training, from a copy in host memory: 4 bytes per trained parameter, and the "
        "optimiser's state. Without room for it, and with false, training waits.",
    )
    save_total_limit: Count | None = key(
        None,
        "Policies of stages that are kept: the last ones, and the best one with keep: best (default: all). Policies of "
        "the phases before the stages always are.",
    )
    preemption_grace: Annotated[float, Field(ge=0, le=3600)] = key(
        120.0,
        "Seconds that a run takes at most, after SIGTERM or SIGUSR1, for a checkpoint or the shard in work (0: none).",
    )
    logging_steps: Count = key(10, "Optimiser steps between lines of metrics.jsonl.")
    stall_timeout: NotNegative = key(
        1800.0,
        "End the run when a step, or a batch of answers or scores, takes more than this many seconds; only warn in "
        "work that may take long, as a download, vLLM or writing a model (0: never).",
    )
    profile: bool = key(False, "Write a torch profiler trace of steps 3 to 5 of each phase: trace.json in its folder.")
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = key([], "Trackers that get the metrics.")
    run_name: str | None = key(None, "Name of the run on trackers (default: the name of output_dir).")
    project: str | None = key(None, "Project on trackers (default: the tracker's own variable, else irlfast).")
    push_to_hub: bool = key(False, "Upload final/ at the end. Whether the upload will work is tried before training.")
    hub_model_id: str | None = key(None, "The repository that push_to_hub uploads to.")
    hub_private: bool = key(True, "Make the repository private. false: make it public.")

    def at(self, name: str, stage: int) -> Any:
        """Return the value of a key at a stage: a list has one value per stage."""
        value = getattr(self, name)
        return value[stage] if isinstance(value, list) else value

    @property
    def facts(self) -> MethodFacts:
        """The method's defaults, and what it needs and leaves."""
        return METHOD_FACTS[self.method]


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
