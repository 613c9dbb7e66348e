"""The fused pair loss and its peers, each called through its public function: ``peer(inputs) -> Result``.

Every peer computes −log σ(β · (ρ(expert) − ρ(synthetic))), averaged over pairs, from hidden states and the LM head. All
take the same tensors: sequences padded to one length, experts first, then the synthetic answers in the same order.
"""

import functools
import importlib.metadata
import types
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from irlfast import native
from irlfast.ops import pair_loss
from irlfast.ops.pair_loss import triton_slab

BETA = 0.1
IGNORE = -100


class Inputs(NamedTuple):
    """S = 2P sequences of T tokens. The reference is hidden states and a head, or cached log-probabilities."""

    hidden: Tensor  # [S, T, H] with gradient
    weight: Tensor  # [V, H] with gradient, unless the head is frozen
    targets: Tensor  # [S, T] int64, IGNORE where not scored
    ref_hidden: Tensor | None  # [S, T, H]
    ref_weight: Tensor | None  # [V, H]
    ref_logps: Tensor | None  # [S, T] fp32


class Result(NamedTuple):
    loss: Tensor  # []
    log_ratio: Tensor | None  # [S]; None for the floor, which computes no loss


# From hidden states [S, T, H], weight [V, H] and targets [S, T] to log-probabilities [S, T], 0 where not scored.
TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]


def from_token_logps(token_logps: TokenLogps, inputs: Inputs) -> Result:
    """Compute the loss of a peer that gives only log-probabilities: one call for the policy, one for the reference."""
    policy = token_logps(inputs.hidden, inputs.weight, inputs.targets)
    if inputs.ref_logps is None:
        with torch.no_grad():
            reference = token_logps(inputs.ref_hidden, inputs.ref_weight, inputs.targets)
    else:
        reference = inputs.ref_logps
    log_ratio = policy.float().sum(1) - reference.float().sum(1)
    expert, synthetic = log_ratio.chunk(2)
    return Result(-F.logsigmoid(BETA * (expert - synthetic)).mean(), log_ratio)


# ---------------------------------------------------------------- ours


def irlfast(inputs: Inputs, **options: Any) -> Result:
    sequences, length = inputs.targets.shape
    experts = torch.arange(sequences // 2)
    result = pair_loss(
        inputs.hidden.flatten(0, 1),
        inputs.weight,
        inputs.targets.flatten(),
        torch.arange(0, sequences * length + 1, length, dtype=torch.int32, device=inputs.hidden.device),
        pairs=torch.stack([experts, experts + sequences // 2], dim=1).to(inputs.hidden.device),
        beta=BETA,
        ref_hidden=None if inputs.ref_hidden is None else inputs.ref_hidden.flatten(0, 1),
        ref_weight=inputs.ref_weight,
        ref_logps=None if inputs.ref_logps is None else inputs.ref_logps.flatten(),
        **options,
    )
    return Result(result.loss, result.log_ratio)


def irlfast_recompute(inputs: Inputs) -> Result:
    """Run with a buffer for one answer of a pair instead of two, so that the gradient computes the logits again."""
    return irlfast(inputs, buffer_mb=inputs.targets.shape[1] * len(inputs.weight) * 4 / 2**20)


def irlfast_skipping(inputs: Inputs) -> Result:
    """Skip the tiles of the gradient that weigh less than CCE's threshold."""
    return irlfast(inputs, skip_mass=2**-12)


def irlfast_epilogue(inputs: Inputs) -> Result:
    """Take the exponential in the epilogue of the first product."""
    with mock.patch.object(triton_slab, "EPILOGUE_BY_DEFAULT", True):
        return irlfast(inputs)


def irlfast_cuda(inputs: Inputs) -> Result:
    """Run our CUDA C++ between the vendor's products."""
    return irlfast(inputs, backend="cuda")


# ---------------------------------------------------------------- TRL


def materialised(inputs: Inputs) -> Result:
    """Compute all logits of policy and reference, as TRL did before it computed log-probabilities in chunks."""
    return from_token_logps(materialised_token_logps, inputs)


def materialised_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(hidden @ weight.T, targets.clamp(min=0)).masked_fill(targets == IGNORE, 0)


def trl(inputs: Inputs) -> Result:
    """Call TRL's fused LM head for log-probabilities only."""
    return from_token_logps(functools.partial(trl_token_logps, ("log_probs",)), inputs)


def trl_dpo_trainer(inputs: Inputs) -> Result:
    """Call TRL's fused LM head for all values that ``DPOTrainer`` logs; for the reference, log-probabilities only."""

    def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logged = ("entropy", "mean_logits", "is_top1") if hidden.requires_grad else ()
        return trl_token_logps(("log_probs", *logged), hidden, weight, targets)

    return from_token_logps(token_logps, inputs)


def trl_token_logps(outputs: tuple[str, ...], hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import add_fused_lm_head

    model = ModelStub()
    model.config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace())
    model.base_model = lambda **_: types.SimpleNamespace(last_hidden_state=hidden)
    model.get_output_embeddings = lambda: types.SimpleNamespace(weight=weight, bias=None)
    add_fused_lm_head(model, outputs=outputs)
    return model.forward(fused_lm_head=True, shift_labels=targets).log_probs


class ModelStub:
    """The part of a Transformers model that ``add_fused_lm_head`` uses; it replaces ``forward``."""

    def forward(self) -> None: ...


# ---------------------------------------------------------------- Liger


def liger(inputs: Inputs, compiled: bool = False) -> Result:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, (*_, expert, synthetic) = LigerFusedLinearDPOLoss(beta=BETA, compiled=compiled)(
        inputs.weight, inputs.hidden, inputs.targets, ref_input=inputs.ref_hidden, ref_weight=inputs.ref_weight
    )
    return Result(loss, torch.cat([expert, synthetic]) / BETA)


def liger_compiled(inputs: Inputs) -> Result:
    return liger(inputs, compiled=True)


# ---------------------------------------------------------------- Cut Cross-Entropy


def cce(inputs: Inputs) -> Result:
    """Call CCE in its exact mode, which leaves out no entry of the gradient."""
    return from_token_logps(functools.partial(cce_token_logps, filter_eps=None), inputs)


def cce_default(inputs: Inputs) -> Result:
    """Call CCE in its default mode, which skips tiles of the gradient whose probabilities are all below 2⁻¹²."""
    return from_token_logps(cce_token_logps, inputs)


def cce_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, **options: None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none", **options)


# ---------------------------------------------------------------- PyTorch


def torch_linear_cross_entropy(inputs: Inputs) -> Result:
    return from_token_logps(torch_linear_cross_entropy_token_logps, inputs)


def torch_linear_cross_entropy_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    flat = hidden.flatten(0, 1), weight, targets.flatten()
    return -F.linear_cross_entropy(*flat, reduction="none", options=options).view(targets.shape)


def torch_plain(inputs: Inputs) -> Result:
    """Compute the logits in the inputs' dtype and the softmax in fp32."""
    return from_token_logps(plain_token_logps, inputs)


def torch_compile(inputs: Inputs) -> Result:
    return compiled_plain()(inputs)


@functools.cache
def compiled_plain() -> Callable[[Inputs], Result]:
    return torch.compile(torch_plain, dynamic=False)


def plain_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logps = (hidden @ weight.T).float().log_softmax(-1)
    return logps.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1).masked_fill(targets == IGNORE, 0)


def floor(inputs: Inputs) -> Result:
    """Compute the bare matrix products: the policy's forward, d hidden, d weight if needed, the reference's forward.

    The products go through one buffer of a few sequences in the inputs' dtype. There is no softmax, no loss, and no
    real gradient.
    """
    hidden, weight = inputs.hidden.detach()[inputs.targets != IGNORE], inputs.weight.detach()
    rows = FLOOR_ROWS if hidden.device.type == "cpu" else len(hidden)
    buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight) if inputs.weight.requires_grad else None
    for part, d_part in zip(hidden.split(rows), d_hidden.split(rows), strict=True):
        z = torch.mm(part, weight.T, out=buffer[: len(part)])
        torch.mm(z, weight, out=d_part)
        if d_weight is not None:
            d_weight.addmm_(z.T, part)
    if inputs.ref_hidden is not None:
        for part in inputs.ref_hidden[inputs.targets != IGNORE].split(rows):
            torch.mm(part, inputs.ref_weight.T, out=buffer[: len(part)])
    return Result(hidden.new_zeros(()), None)


FLOOR_ROWS = 256  # rows of the buffer on a CPU: it stays in the last-level cache

PEERS: dict[str, Callable[[Inputs], Result]] = {
    "irlfast": irlfast,
    "irlfast, recompute": irlfast_recompute,
    "irlfast, skipping": irlfast_skipping,
    "irlfast, epilogue": irlfast_epilogue,
    "irlfast, cuda": irlfast_cuda,
    "materialised": materialised,
    "TRL": trl,
    "TRL, as DPOTrainer": trl_dpo_trainer,
    "Liger": liger,
    "Liger compiled": liger_compiled,
    "CCE exact": cce,
    "CCE default": cce_default,
    "torch": torch_plain,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "torch.compile": torch_compile,
    "bare products": floor,
}


def reason_not_to_run(name: str, inputs: Inputs) -> str | None:
    """Return why a peer cannot run on these inputs, or None."""
    package = {"TRL": "trl", "materialised": "trl", "Liger": "liger-kernel", "CCE": "cut-cross-entropy"}
    for prefix, distribution in package.items():
        if name.startswith(prefix) and version(distribution) is None:
            return f"{distribution} is not installed"
    kernels = ("CCE", "irlfast, skipping", "irlfast, epilogue", "irlfast, cuda")
    if name.startswith(kernels) and inputs.hidden.device.type != "cuda":
        return "its kernels need a GPU"
    if name == "irlfast, cuda" and native.cuda is None:
        return "irlfast was installed without nvcc"
    if name.startswith("CCE") and inputs.hidden.dtype == torch.float32:
        return "its backward takes bf16 and fp16 only"
    if name.startswith("Liger") and inputs.ref_hidden is None:
        return "takes no cached reference"
    if name == "torch linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"absent in torch {torch.__version__}"
    return None


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
