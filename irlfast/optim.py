"""RMSprop, the optimiser of IRFT and SPIN, in one pass over parameters, gradients and state."""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop

from irlfast import native

RENAMED = {"square_avg": "exp_avg_sq", "momentum_buffer": "exp_avg"}
NATIVE = (torch.float32, torch.bfloat16)


class FusedRMSprop(torch.optim.Optimizer):
    """``torch.optim.RMSprop`` with its arguments and its results to fp32 rounding, several times faster on a CPU.

    A parameter in bf16 gets an fp32 ``master`` copy. The step updates the copy, and writes the parameter from it in the
    same pass. Gradients may be fp32 or bf16.

    The native pass takes dense, contiguous tensors on the CPU, or on a GPU where installation built ``irlfast._cuda``
    (one launch for hundreds of parameters). PyTorch's own steps take all other tensors. States have Adam's names where
    possible: ``exp_avg_sq`` (torch: square_avg) and, with momentum, ``exp_avg`` (momentum_buffer).

    DeepSpeed's universal checkpoints, which change the number of processes, work under ZeRO 1 to 3: convert with
    ``python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state``. They contain Adam's two states only. So
    ``grad_avg`` (``centered``) is lost and starts anew. And they need both states, so ``state_dict`` has an ``exp_avg``
    of zeros where there is no momentum: it takes 4 bytes in all, and loading drops it.

    Raises:
        ValueError: an option is below 0, ``alpha`` is not below 1, or a state does not have its parameter's shape.
        RuntimeError: a gradient is sparse.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        for name, value in options.items():
            if not value >= 0:
                raise ValueError(f"{name}: found {value}, expected a number >= 0")
        if not alpha < 1:
            raise ValueError(f"alpha: found {alpha}, expected a number < 1")
        super().__init__(params, options | {"centered": centered, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters; return the result of ``closure``."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            ours: list[Tensor] = []
            others: list[Tensor] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("FusedRMSprop: found a sparse gradient, expected dense ones")
                fit_state(self.state[parameter], parameter, group)
                (ours if is_native(parameter, self.state[parameter]) else others).append(parameter)
            update_natively(ours, self.state, group)
            update_by_torch(others, self.state, group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's, with an ``exp_avg`` of zeros where there is none."""
        result = super().state_dict()
        for number, state in result["state"].items():
            if "exp_avg_sq" in state:
                zeros = state["exp_avg_sq"].new_zeros(()).expand_as(state["exp_avg_sq"])
                result["state"][number] = {"exp_avg": zeros} | state
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of ``torch.optim.RMSprop``."""
        super().load_state_dict(state_dict)
        # PyTorch casts all states but the step to the parameter's dtype; here they stay fp32 for a bf16 parameter.
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        for number, (parameter, group) in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name != "step":
                    self.state[parameter].pop(name)
                    if (ours := RENAMED.get(name, name)) in ("master", *averages(group)):
                        self.state[parameter][ours] = value.to(parameter.device, copy=True)


def averages(group: dict[str, Any]) -> list[str]:
    """The names of the states that a group's options need."""
    wanted = {"exp_avg_sq": True, "exp_avg": group["momentum"] > 0, "grad_avg": group["centered"]}
    return [name for name, wants in wanted.items() if wants]


def fit_state(state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
    """Create a parameter's state, or bring it to the parameter's device and dtype after loading, casting or moving."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    if parameter.dtype != torch.bfloat16:
        state.pop("master", None)
    elif "master" not in state:
        state["master"] = parameter.detach().float()
    else:
        state["master"] = state["master"].to(parameter.device, torch.float32)
    like = state.get("master", parameter)
    if not group["momentum"]:
        state.pop("exp_avg", None)  # the zeros of a universal checkpoint
    for name in averages(group):
        if name not in state:
            state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
        state[name] = state[name].to(like.device, like.dtype)
        if state[name].shape != parameter.shape:
            shape, expected = list(state[name].shape), list(parameter.shape)
            raise ValueError(f"FusedRMSprop: found state {name} of shape {shape}, expected {expected}")


def module_for(device: torch.device) -> Any:
    """The native module for this device, or None."""
    if native.cuda is not None and native.cuda.device == device.type and runs(native.cuda, device):
        return native.cuda
    return native.cpu if device.type == "cpu" else None


@functools.cache
def runs(module: Any, device: torch.device) -> bool:
    """Return whether the GPU and its driver can run the compiled module: one element is updated to see."""
    one = torch.zeros(3, 1, dtype=torch.float32, device=device)
    addresses = (part.data_ptr() for part in one)
    try:
        with torch.cuda.device_of(one):
            module.rmsprop([(1, *addresses, 0, 0, 0, False)], *[0.0] * 6, native.stream(device))
    except RuntimeError as error:
        warnings.warn(f"irlfast._cuda does not run on {device} ({error}); PyTorch's RMSprop does", stacklevel=1)
        return False
    return True


def is_native(parameter: Tensor, state: dict[str, Any]) -> bool:
    """Return whether a native module takes this parameter, its gradient and its state."""
    tensors: Any = parameter, parameter.grad, *(value for name, value in state.items() if name != "step")
    fits = (t.device == parameter.device and t.dtype in NATIVE and t.is_contiguous() for t in tensors)
    return module_for(parameter.device) is not None and all(fits)


def update_natively(parameters: list[Tensor], state: Any, group: dict[str, Any]) -> None:
    for parameter in parameters:
        state[parameter]["step"] += 1
    options = [float(group[name]) for name in ("lr", "alpha", "eps", "weight_decay", "momentum")]
    options.append(-1.0 if group["maximize"] else 1.0)
    for device in {parameter.device for parameter in parameters}:
        here = [parameter for parameter in parameters if parameter.device == device]
        rows = [row(parameter, state[parameter]) for parameter in here]
        module = module_for(device)
        with torch.cuda.device_of(here[0]):
            module.rmsprop(rows, *options, torch.get_num_threads() if module is native.cpu else native.stream(device))


def row(parameter: Tensor, state: dict[str, Any]) -> tuple[int | bool, ...]:
    """Size and addresses of a parameter, its gradient and state, as the native modules take them; 0 stands for none."""
    grad: Any = parameter.grad
    master, copy = (state["master"], parameter) if "master" in state else (parameter, None)
    tensors = (master, grad, state["exp_avg_sq"], state.get("grad_avg"), state.get("exp_avg"), copy)
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    return parameter.numel(), *addresses, grad.dtype == torch.bfloat16


def update_by_torch(parameters: list[Tensor], all_states: Any, group: dict[str, Any]) -> None:
    if not parameters:
        return
    states = [all_states[parameter] for parameter in parameters]
    updated = [state.get("master", parameter) for state, parameter in zip(states, parameters, strict=True)]
    grads: list[Any] = [parameter.grad for parameter in parameters]
    grads = [grad.to(target.dtype) for grad, target in zip(grads, updated, strict=True)]
    names = ("exp_avg_sq", "grad_avg", "exp_avg", "step")
    squares, averages, buffers, steps = ([state[name] for state in states if name in state] for name in names)
    rmsprop(
        updated,
        grads,
        squares,
        averages,
        buffers,
        steps,
        **{name: group[name] for name in ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")},
    )
    for parameter, state in zip(parameters, states, strict=True):
        if "master" in state:
            parameter.copy_(state["master"])
