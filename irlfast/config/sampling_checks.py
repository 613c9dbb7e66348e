"""Checks of the keys of sampling: which servers answer, how old answers may be, and who has the whole policy."""

from typing import Any

from irlfast.common.addresses import check_address
from irlfast.common.files import InputError
from irlfast.config.deepspeed import zero_stage
from irlfast.config.methods import OWN_KL
from irlfast.config.types import is_set


def check_vllm_server(config: Any) -> None:
    servers = config.vllm_server
    if servers and not config.use_vllm:
        raise InputError("vllm_server: found servers with use_vllm: false, expected use_vllm: true")
    for url in servers:
        check_address("vllm_server", url)
    if len({*servers}) < len(servers):
        raise InputError("vllm_server: found an address twice, expected each server once")


def check_async_sampling(config: Any) -> None:
    """Check that a stage can be sampled while the one before trains, and that its loss may see such answers."""
    if not config.async_sampling:
        if is_set(config, "async_sampling_at"):
            raise InputError(
                f"async_sampling_at: found {config.async_sampling_at} without async_sampling, expected "
                "async_sampling: true"
            )
        return
    facts = config.facts
    if not (facts.learns_pairs or facts.aligns) or facts.needs_rejected:
        raise InputError(
            f"async_sampling: found true with method {config.method}, which learns from fresh answers or from none; "
            "expected irft, spin, t_spin, rft, afd, gad or r_airl"
        )
    if config.stages == 1:
        raise InputError(
            "async_sampling: found true with stages 1, where no stage trains before the only one is sampled; expected "
            "stages of 2 or more"
        )
    if not config.use_vllm:
        raise InputError(
            "async_sampling: found true with use_vllm: false, where the processes that train also sample; expected "
            "use_vllm: true"
        )
    if facts.aligns and config.align not in OWN_KL and not config.vllm_importance_sampling_correction:
        raise InputError(
            f"async_sampling: found true with align {config.align}, whose gradient is of answers of the policy itself; "
            "expected vllm_importance_sampling_correction: true, which weights older answers"
        )


def check_split_sampling(config: Any) -> None:
    """Check that a policy which is to answer from its parts has some, and that Transformers is to sample."""
    if config.ds3_gather_for_generation:
        return
    if config.use_vllm:
        raise InputError(
            "ds3_gather_for_generation: found false with use_vllm, whose engines split a policy by "
            "vllm_tensor_parallel_size; expected true"
        )
    if (stage := zero_stage(config)) != 3:
        raise InputError(
            f"ds3_gather_for_generation: found false with zero_stage {stage}, which splits no policy; expected true, "
            "or zero_stage 3"
        )
