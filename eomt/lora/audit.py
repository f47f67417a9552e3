"""Proof that LoRA trains what it should, before, during and after training.

Adapters that are frozen by a later line, bypassed by a layer's forward, or missing from the optimiser leave a run that
looks fine. Each check ends in a sentence that names the layers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eomt.command_line import RunError
from eomt.fingerprints import base_tensors, combine_hashes, hash_tensors, is_adapter, tensor_hashes
from eomt.lora.methods import method_of, update_norms
from lora_config import LoRASettings, adapted_layers, find_targets, listed

log = logging.getLogger(__name__)


class AuditError(RunError):
    """LoRA would not train what it should; the sentence names the layers."""


class LoRAAudit:
    """Proof that LoRA trains what it should.

    Build it after apply_lora. Call `before_training` once, `after_backward` before and `after_step` after each
    optimiser step, `at_end` at the end. Results collect in `results`, {check: {"passed": bool, "detail": str}}; the
    first failure raises.

    Args:
        network: everything that trains; its names appear in the messages.
        adapted: the module inside it (or itself) that apply_lora adapted.
        settings: what was asked for.
        trainable_elsewhere: parameters besides the adapters that are meant to train, such as queries and heads. None:
            whatever trains outside `adapted`.
        base_fingerprint: fingerprint(adapted) taken right after the base weights were loaded, if there is one.
        deadline: optimiser steps within which every adapter must have trained (a warm-up starts at rate 0).
    """

    def __init__(
        self,
        network: nn.Module,
        adapted: nn.Module,
        settings: LoRASettings,
        trainable_elsewhere: Collection[nn.Parameter] | None = None,
        base_fingerprint: str | None = None,
        deadline: int = 20,
    ) -> None:
        self.network, self.adapted, self.settings = network, adapted, settings
        self.base_fingerprint, self.deadline = base_fingerprint, deadline
        self.results: dict[str, dict[str, Any]] = {}
        self.complete = False
        self._names = {id(p): name.replace(".base_layer.", ".") for name, p in network.named_parameters()}
        self._layers = adapted_layers(adapted)
        self._method = method_of(adapted)
        self._adapters = {
            self._names.get(id(p), name): p
            for layer in self._layers.values()
            for name, p in layer.named_parameters()
            if is_adapter(name)
        }
        own = {id(p) for p in adapted.parameters()}
        self._elsewhere = (
            [p for p in network.parameters() if p.requires_grad and id(p) not in own]
            if trainable_elsewhere is None
            else list(trainable_elsewhere)
        )
        self._without_gradient = dict(self._adapters)
        self._first_step: int | None = None
        self._steps = 0
        self._frozen: dict[str, str] = {}

    def before_training(
        self,
        optimizer: torch.optim.Optimizer,
        forward: Callable[[], Tensor | Sequence[Tensor]],
        resumed: bool = False,
    ) -> None:
        """All checks that need no training step.

        Args:
            optimizer: the one that will train the network (anything with `param_groups`).
            forward: runs the network on a probe input and returns its outputs, one tensor or nested lists of them. It
                is called twice, in eval mode and outside autocast for the strictest comparison; gradients, modes and
                random state are left as they were.
            resumed: adapters were loaded from a checkpoint, so they may change the output from the start.

        Raises:
            AuditError: a check failed.
        """
        self._check("targets_found", self._targets_problem(), f"{len(self._layers)} layers adapted")
        self._check(
            "adapters_trainable", self._frozen_adapters(), f"{len(self._adapters)} adapter tensors require grad"
        )
        self._check("only_intended_trainable", self._unintended(), f"besides adapters, {len(self._elsewhere)} tensors")
        self._check("optimizer_complete", self._optimizer_problem(optimizer), "each trainable parameter exactly once")
        self._check("base_as_loaded", self._base_problem(), "base weights are those the adapters were applied to")
        self._frozen = hash_tensors(self._frozen_tensors())
        with _probing(self.network), torch.enable_grad():
            outputs = _tensors(forward())
            gradients = self._output_gradients(outputs)
        self._check("adapters_change_output", _bypass_problem(gradients), _bypass_detail(gradients))
        self._check("output_unchanged_at_start", *self._start_problem(outputs, forward, resumed))

    def after_backward(self) -> None:
        """Call before each optimiser step: notes which adapter tensors have had a finite, non-zero gradient."""
        with_grad = {name: p.grad for name, p in self._without_gradient.items() if p.grad is not None}
        if not with_grad:
            return
        norms = torch.stack(torch._foreach_norm(list(with_grad.values()))).tolist()  # one wait for the device
        for name, norm in zip(with_grad, norms, strict=True):
            if 0 < norm < float("inf"):
                del self._without_gradient[name]

    def after_step(self, step: int) -> None:
        """Call after each optimiser step with its running number (a resumed run may begin anywhere).

        Raises:
            AuditError: at the deadline, an adapter tensor had no gradient yet or an update B A is still zero.
        """
        if self.complete:
            return
        self._first_step = step if self._first_step is None else self._first_step
        self._steps = step - self._first_step + 1
        at_deadline = self._steps >= self.deadline
        if self._without_gradient and not at_deadline:
            return
        zero = self._zero_updates()
        if at_deadline or not zero:
            self._finish(zero)

    def at_end(self) -> None:
        """Call when training has ended, before merging.

        Raises:
            AuditError: adapters did not train, or a frozen tensor is not what it was.
        """
        if not self.complete and self._steps < 3:  # B starts at zero, so A has no gradient before B has moved
            log.warning("LoRA audit: %d optimiser steps are too few to see every adapter train", self._steps)
            self.results["adapters_trained"] = {"passed": False, "detail": f"only {self._steps} steps, too few to tell"}
        elif not self.complete:
            self._finish(self._zero_updates())
        now = hash_tensors({name: t for name, t in base_tensors(self.network).items() if name in self._frozen})
        changed = [name for name, digest in self._frozen.items() if now.get(name) != digest]
        problem = changed and (
            f"frozen tensors changed during training: {listed(changed)}; look for code that writes to them in place, "
            "or for layers with running statistics, which must stay in eval mode"
        )
        self._check("frozen_unchanged", problem, f"{len(now)} frozen tensors are bit-identical to the start")

    def _check(self, name: str, problem: str | list | None, detail: str) -> None:
        self.results[name] = {"passed": not problem, "detail": problem or detail}
        if problem:
            raise AuditError(f"LoRA audit, {name}: {problem}")

    def _targets_problem(self) -> str | None:
        try:
            wanted = find_targets(self.adapted, self.settings)
        except ValueError as error:
            return str(error)
        if missing := [name for name in wanted if name not in self._layers]:
            return f"requested layers carry no adapter: {listed(missing)}; call apply_lora with these settings"
        if extra := [name for name in self._layers if name not in wanted]:
            return f"layers carry adapters that were not requested: {listed(extra)}; name them in target_modules"
        return None

    def _frozen_adapters(self) -> str | None:
        frozen = [name for name, p in self._adapters.items() if not p.requires_grad]
        return (
            f"adapters are frozen: {listed(frozen)}; freeze the base before apply_lora, not after" if frozen else None
        )

    def _unintended(self) -> str | None:
        intended = {id(p) for p in (*self._adapters.values(), *self._elsewhere)}
        if extra := [self._names[id(p)] for p in self._trainable() if id(p) not in intended]:
            return f"meant to be frozen, but trainable: {listed(extra)}; set requires_grad_(False) on them"
        if frozen := [self._names.get(id(p), "?") for p in self._elsewhere if not p.requires_grad]:
            return f"meant to train, but frozen: {listed(frozen)}; set requires_grad_(True) on them after apply_lora"
        return None

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def _optimizer_problem(self, optimizer: torch.optim.Optimizer) -> str | None:
        times = Counter(id(p) for group in optimizer.param_groups for p in group["params"])  # frozen ones do no harm
        if missing := [self._names[id(p)] for p in self._trainable() if not times[id(p)]]:
            cause = (
                "it was built before the adapters were applied; build it after"
                if set(missing) & set(self._adapters)
                else "add them to a parameter group"
            )
            return f"trainable, but not in the optimiser: {listed(missing)}; {cause}"
        if twice := [self._names[id(p)] for p in self._trainable() if times[id(p)] > 1]:
            return f"in the optimiser more than once: {listed(twice)}; list each parameter in one group only"
        return None

    def _base_problem(self) -> str | None:
        base = getattr(self.adapted, "lora_base", None)
        recorded = base and base.hashes
        expected = getattr(self.adapted, "lora_cast_hashes", recorded)
        if recorded is None and self.base_fingerprint is None:
            return None  # adapted by hand with PEFT: nothing to compare with
        now = tensor_hashes(self.adapted)
        remedy = "load weights, and change precision or sizes, before apply_lora"
        trained = {n for n, t in base_tensors(self.adapted).items() if t.requires_grad}
        if recorded and (changed := [n for n in now if n not in trained and now[n] != expected.get(n)]):
            return f"base weights changed after the adapters were applied: {listed(changed)}; {remedy}"
        if self.base_fingerprint not in (None, combine_hashes(recorded or now)):
            return f"base weights are not the ones that were loaded (their fingerprint differs); {remedy}"
        return None

    def _frozen_tensors(self) -> dict[str, Tensor]:
        """Frozen parameters of the network and the adapted module's buffers, which its adapters rely on as well."""
        buffers = {id(buffer) for buffer in self.adapted.buffers()}
        return {
            name: tensor
            for name, tensor in base_tensors(self.network).items()
            if id(tensor) in buffers or (isinstance(tensor, nn.Parameter) and not tensor.requires_grad)
        }

    def _output_gradients(self, outputs: list[Tensor]) -> dict[str, Tensor | None]:
        """Gradient of a random projection of the outputs with respect to each adapter (LoRA's B)."""
        weights = {name: self._method.probe(layer) for name, layer in self._layers.items()}
        outputs = [output for output in outputs if output.requires_grad]
        if not outputs:
            return dict.fromkeys(weights)
        generator = torch.Generator().manual_seed(0)
        projections = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, list(weights.values()), projections, allow_unused=True)
        return dict(zip(weights, gradients, strict=True))

    def _start_problem(self, outputs: list[Tensor], forward: Callable, resumed: bool) -> tuple[str | None, str]:
        if resumed:
            return None, "resumed from trained adapters, nothing to compare"
        with _probing(self.network), _disabled(self._layers.values()), torch.no_grad():
            plain = _tensors(forward())
        rounding = not self._method.exact_at_start(self.settings)
        low = any(output.dtype in (torch.float16, torch.bfloat16) for output in plain)
        tolerance = (5e-2 if low else 1e-3) if rounding else 1e-5
        changes = [_relative_change(a.detach(), b) for a, b in zip(outputs, plain, strict=True)]
        change = max(changes, default=0.0)
        if all(change <= tolerance for change in changes):  # false for NaN
            return None, f"relative change {change:.1e}, at most {tolerance:.0e} allowed"
        moved = [name for name, norm in update_norms(self.adapted).items() if norm > 0]
        problem = (
            f"adapters change the output before training, by {change:.1e} where {tolerance:.0e} is allowed; layers "
            f"with an update: {listed(moved) or 'none'}; apply fresh adapters, or say that the run is resumed"
        )
        return problem, ""

    def _zero_updates(self) -> list[str]:
        norms = {name: self._method.size(layer) for name, layer in self._layers.items()}
        return [name for name, (norm, bound) in norms.items() if not norm > 1e-6 * bound]  # rounding is no update

    def _finish(self, zero: list[str]) -> None:
        waited = f"after {self._steps} optimiser steps"
        missing = list(self._without_gradient)
        self._check(
            "adapters_received_gradients",
            missing
            and f"no non-zero gradient {waited} in {listed(missing)}; the loss does not reach them, or their "
            "learning rate is still 0",
            f"{len(self._adapters)} adapter tensors {waited}",
        )
        self._check(
            "updates_nonzero",
            zero
            and f"the update {self._method.update} is still zero {waited} in {listed(zero)}; look at their "
            "learning rate",
            f"{len(self._layers)} layers {waited}",
        )
        self.complete = True


def _bypass_problem(gradients: Mapping[str, Tensor | None]) -> str | None:
    if bypassed := [name for name, gradient in gradients.items() if gradient is None]:
        return (
            f"the output does not depend on the adapters of {listed(bypassed)}: the forward pass goes around them, for "
            "example by reading the layer's `.weight` (for timm's Eva set `attn.qkv_bias_separate = True`), or by "
            "detaching; make it call the layers, or leave them out of target_modules"
        )
    return None


def _bypass_detail(gradients: Mapping[str, Tensor | None]) -> str:
    silent = [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()]
    if silent:  # a head or layer scale that starts at zero: the gradients during training will tell
        return f"all layers are in use; behind {listed(silent)} the network still multiplies by zero"
    return f"the outputs have a gradient in all {len(gradients)} layers"


def _relative_change(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    if not b.numel():
        return 0.0
    a, b = a.float(), b.float()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def _tensors(outputs: Tensor | Iterable | None) -> list[Tensor]:
    """The floating-point tensors in nested lists and tuples."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    return [tensor for output in outputs or () for tensor in _tensors(output)]


@contextmanager
def _probing(network: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's mode and the random state afterwards as before."""
    modes = [(module, module.training) for module in network.modules()]
    devices = sorted({p.device.index for p in network.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        network.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _disabled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Adapters off inside. PEFT switches requires_grad along with them, so it is put back."""
    layers = list(layers)
    wanted = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p, requires_grad in wanted:
            p.requires_grad_(requires_grad)
