"""Proof that LoRA trains what it should, before, during and after training.

Adapters that are frozen by a later line, bypassed by a layer's forward, or missing from the optimiser leave a run that
looks fine. Each check ends in a sentence that names the layers.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eomt.command_line import RunError
from eomt.fingerprints import base_tensors, combine_hashes, hash_tensors, is_adapter, plain_name
from eomt.lora.methods import update_norms
from eomt.lora.parts import AuditedPart, parts_to_audit
from eomt.lora.probing import bypass_detail, bypass_hint, disabled, probing, relative_change, tensors_in
from eomt.lora.ties import once_each, tied_outside, unique
from lora_config import LoRASettings, adapted_layers, find_targets, listed

log = logging.getLogger(__name__)

REENTRANT = "re-entrant activation checkpointing cuts adapters off their gradient: checkpoint with use_reentrant=False"


class AuditError(RunError):
    """LoRA would not train what it should; the sentence names the layers."""


class LoRAAudit:
    """Proof that LoRA trains what it should, in all adapted parts of a network.

    Build it after the parts were adapted. Call `before_training` once, `after_backward` before and `after_step` after
    each optimiser step, `at_end` at the end. Results collect in `results`, {check: {"passed": bool, "detail": str}};
    the first failure raises.

    Args:
        network: everything that trains; its names appear in the messages.
        adapted: a module inside it (or itself) that apply_lora adapted. All others that were adapted count as well.
        settings: what was asked for there. None: what it was adapted with, as for the others.
        trainable_elsewhere: parameters besides the adapters that are meant to train, such as queries and heads. None:
            whatever trains outside the adapted parts, and what was given to `adapt` as `also`.
        base_fingerprint: fingerprint(adapted) taken right after the base weights were loaded, if there is one.
        deadline: optimiser steps within which every adapter must have trained (a warm-up starts at rate 0).
    """

    def __init__(
        self,
        network: nn.Module,
        adapted: nn.Module | None = None,
        settings: LoRASettings | None = None,
        trainable_elsewhere: Collection[nn.Parameter] | None = None,
        base_fingerprint: str | None = None,
        deadline: int = 20,
    ) -> None:
        self.network, self.deadline = network, deadline
        self.results: dict[str, dict[str, Any]] = {}
        self.complete = False
        self._names = {id(p): plain_name(name) for name, p in network.named_parameters()}
        self._parts = parts_to_audit(network, adapted, settings, base_fingerprint)
        self._layers = {name: layer for part in self._parts for name, layer in part.layers.items()}
        known = {id(layer) for layer in self._layers.values()}
        if by_hand := [name for name, layer in adapted_layers(network).items() if id(layer) not in known]:
            raise AuditError(f"LoRA audit: {listed(by_hand)} carry adapters without `adapt`; let it put them there")
        self._adapters = {
            self._names.get(id(p), name): p
            for layer in self._layers.values()
            for name, p in layer.named_parameters()
            if is_adapter(name)
        }
        self._elsewhere = self._trained_elsewhere() if trainable_elsewhere is None else unique(trainable_elsewhere)
        places = {id(module): f"{name}." if name else "" for name, module in network.named_modules()}
        self._tied = [
            (part.module.get_parameter(name), f"{listed(others)} is tied to {places.get(id(part.module), '')}{name}")
            for part in self._parts
            for name, others in tied_outside(part.module, network).items()
        ]
        self._without_gradient = dict(self._adapters)
        self._gradients: dict[str, float] = {}  # the last norm, where it was zero or not finite
        self._first_step: int | None = None
        self._steps = 0
        self._frozen: dict[str, str] = {}

    def _trained_elsewhere(self) -> list[nn.Parameter]:
        own = {id(p) for part in self._parts for p in part.module.parameters()}
        also = [p for part in self._parts for p in getattr(part.module, "lora_also", ())]
        return unique([*(p for p in self.network.parameters() if p.requires_grad and id(p) not in own), *also])

    def before_training(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        forward: Callable[[], Any],
        resumed: bool = False,
    ) -> None:
        """All checks that need no training step.

        Args:
            optimizer: the one that will train the network (anything with `param_groups`), or several.
            forward: runs the network on a probe input and returns its outputs: tensors, in whatever nesting of lists,
                mappings and dataclasses. It is called twice, in eval mode and outside autocast for the strictest
                comparison; gradients, modes and random state are left as they were.
            resumed: adapters were loaded from a checkpoint, so they may change the output from the start, as those of
                `load_adapter` may.

        Raises:
            AuditError: a check failed.
        """
        self._check("targets_found", self._targets_problem(), f"{len(self._layers)} layers adapted")
        self._check(
            "adapters_trainable", self._frozen_adapters(), f"{len(self._adapters)} adapter tensors require grad"
        )
        detail = f"besides adapters, {len(self._elsewhere)} tensors"
        self._check("only_intended_trainable", self._unintended(), "; ".join([detail, *self._frozen_by_ties()]))
        self._check("optimizer_complete", self._optimizer_problem(optimizer), "each trainable parameter exactly once")
        hashes = self._hashes()
        base_problem = next(filter(None, (self._base_problem(part, hashes) for part in self._parts)), None)
        self._check("base_as_loaded", base_problem, "base weights are those the adapters were applied to")
        self._frozen = {name: hashes[id(tensor)] for name, tensor in self._frozen_tensors().items()}
        with probing(self.network), torch.enable_grad():
            outputs = tensors_in(forward())
            try:
                gradients = self._output_gradients(outputs)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                raise AuditError(f"LoRA audit: {REENTRANT}") from error
        self._check("adapters_change_output", self._bypass_problem(gradients), bypass_detail(gradients))
        resumed = resumed or any(hasattr(part.module, "lora_loaded") for part in self._parts)
        self._check("output_unchanged_at_start", *self._start_problem(outputs, forward, resumed))

    def after_backward(self) -> None:
        """Call before each optimiser step: notes which adapter tensors have had a finite, non-zero gradient."""
        with_grad = {name: p.grad for name, p in self._without_gradient.items() if p.grad is not None}
        if not with_grad:
            return
        norms = torch.stack(torch._foreach_norm(list(with_grad.values()))).tolist()  # one wait for the device
        for name, norm in zip(with_grad, norms, strict=True):
            self._gradients[name] = norm
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
            known = [part for part in self._parts if part.settings]  # not of another method's saved adapter
            wanted = [f"{part.prefix}{name}" for part in known for name in find_targets(part.module, part.settings)]
        except ValueError as error:
            return str(error)
        given = [name for part in known for name in part.layers]
        if missing := [name for name in wanted if name not in self._layers]:
            return f"requested layers carry no adapter: {listed(missing)}; call apply_lora with these settings"
        if twice := self._registered_handle():
            return (
                f"the adapters stand in the state dict twice, as {twice}, too: keep PEFT's handle out of registered "
                "submodules, as what `adapt` returns does"
            )
        if extra := [name for name in given if name not in wanted]:
            return f"layers carry adapters that were not requested: {listed(extra)}; name them in target_modules"
        return None

    def _registered_handle(self) -> str | None:
        """The second name of an adapter that the network holds both in its place and through PEFT's handle."""
        names: dict[int, list[str]] = {}
        for name, p in self.network.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        several = (names[id(p)] for p in self._adapters.values() if len(names.get(id(p), ())) > 1)
        return next((name for found in several for name in found if "base_model.model." in name), None)

    def _frozen_adapters(self) -> str | None:
        frozen = [name for name, p in self._adapters.items() if not p.requires_grad]
        return (
            f"adapters are frozen: {listed(frozen)}; freeze the base before apply_lora, not after" if frozen else None
        )

    def _unintended(self) -> str | None:
        intended = {id(p) for p in (*self._adapters.values(), *self._elsewhere)}
        if extra := [p for p in self._trainable() if id(p) not in intended]:
            tied = [sentence for p, sentence in self._tied if any(p is other for other in extra)]
            also = f"{listed(tied)}: give that module to `adapt` or `load_adapted` as `also`"
            names = listed(self._names[id(p)] for p in extra)
            return (
                f"meant to be frozen, but trainable: {names}; {also if tied else 'set requires_grad_(False) on them'}"
            )
        if frozen := [self._names.get(id(p), "?") for p in self._elsewhere if not p.requires_grad]:
            return f"meant to train, but frozen: {listed(frozen)}; set requires_grad_(True) on them after apply_lora"
        return None

    def _frozen_by_ties(self) -> list[str]:
        """Says which parameters outside the adapted parts are frozen because they are tied to one inside."""
        said = [f"{sentence}, which is frozen" for p, sentence in self._tied if not p.requires_grad]
        for sentence in said:
            log.warning(
                "LoRA audit: %s; give that module to `adapt` or `load_adapted` as `also` if it is to train", sentence
            )
        return said

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def _optimizer_problem(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> str | None:
        optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        times = Counter(id(p) for one in optimizers for group in one.param_groups for p in group["params"])
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

    def _hashes(self) -> dict[int, str]:
        """SHA-256 of each base tensor, once, by its `id`."""
        modules = (self.network, *(part.module for part in self._parts))
        return hash_tensors({id(tensor): tensor for module in modules for tensor in base_tensors(module).values()})

    def _base_problem(self, part: AuditedPart, hashes: Mapping[int, str]) -> str | None:
        base = getattr(part.module, "lora_base", None)
        recorded = base and base.hashes
        expected = getattr(part.module, "lora_cast_hashes", recorded)
        if recorded is None and part.fingerprint is None:
            return None  # adapted by hand with PEFT: nothing to compare with
        tensors = base_tensors(part.module)
        now = {name: hashes[id(tensor)] for name, tensor in tensors.items()}
        remedy = "load weights, and change precision or sizes, before apply_lora"
        changed = [
            name
            for name, tensor in once_each(tensors).items()
            if recorded and not tensor.requires_grad and now[name] != expected.get(name)
        ]
        if changed and (casts := {p.dtype for p in self._adapters.values()} - {torch.float32}):
            remedy = (
                f"the adapters are {listed(map(str, casts))}, so the whole network was converted since, as "
                "trainer.precision=bf16-true does; set trainer.precision=bf16-mixed"
            )
        if changed:
            names = listed(f"{part.prefix}{name}" for name in changed)
            return f"base weights changed after the adapters were applied: {names}; {remedy}"
        if part.fingerprint not in (None, combine_hashes(recorded or now)):
            return f"base weights are not the ones that were loaded (their fingerprint differs); {remedy}"
        return None

    def _frozen_tensors(self) -> dict[str, Tensor]:
        """Frozen parameters of the network and the adapted parts' buffers, which their adapters rely on as well."""
        buffers = {id(buffer) for part in self._parts for buffer in part.module.buffers()}
        return {
            name: tensor
            for name, tensor in once_each(base_tensors(self.network)).items()
            if id(tensor) in buffers or (isinstance(tensor, nn.Parameter) and not tensor.requires_grad)
        }

    def _output_gradients(self, outputs: list[Tensor]) -> dict[str, Tensor | None]:
        """Gradient of a random projection of the outputs with respect to each adapter (LoRA's B)."""
        weights = {name: part.method.probe(layer) for part in self._parts for name, layer in part.layers.items()}
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
        with probing(self.network), disabled(self._layers.values()), torch.no_grad():
            plain = tensors_in(forward())
        rounding = not all(part.method.exact_at_start(part.settings) for part in self._parts)
        low = any(output.dtype in (torch.float16, torch.bfloat16) for output in plain)
        tolerance = (5e-2 if low else 1e-3) if rounding else 1e-5
        changes = [relative_change(a.detach(), b) for a, b in zip(outputs, plain, strict=True)]
        change = max(changes, default=0.0)
        if all(change <= tolerance for change in changes):  # false for NaN
            return None, f"relative change {change:.1e}, at most {tolerance:.0e} allowed"
        moved = [f"{p.prefix}{name}" for p in self._parts for name, norm in update_norms(p.module).items() if norm > 0]
        problem = (
            f"adapters change the output before training, by {change:.1e} where {tolerance:.0e} is allowed; layers "
            f"with an update: {listed(moved) or 'none'}; apply fresh adapters, or say that the run is resumed"
        )
        return problem, ""

    def _zero_updates(self) -> list[str]:
        norms = {name: part.method.size(layer) for part in self._parts for name, layer in part.layers.items()}
        return [name for name, (norm, bound) in norms.items() if not norm > 1e-6 * bound]  # rounding is no update

    def _finish(self, zero: list[str]) -> None:
        waited = f"after {self._steps} optimiser steps"
        missing = list(self._without_gradient)
        self._check(
            "adapters_received_gradients",
            missing and f"no non-zero gradient {waited} in {listed(missing)}; {self._cause(missing)}",
            f"{len(self._adapters)} adapter tensors {waited}",
        )
        updates = " or ".join(dict.fromkeys(part.method.update for part in self._parts))
        self._check(
            "updates_nonzero",
            zero and f"the update {updates} is still zero {waited} in {listed(zero)}; look at their learning rate",
            f"{len(self._layers)} layers {waited}",
        )
        self.complete = True

    def _cause(self, missing: Collection[str]) -> str:
        """What keeps adapters from having a gradient, and what to do."""
        if not any(name in self._gradients for name in missing):
            return f"the loss does not reach them: it is computed without these layers, or {REENTRANT}"
        if not all(math.isfinite(self._gradients.get(name, 0)) for name in missing):
            return "their gradients are not finite; lower the learning rate, or look for a division by zero in the loss"
        return "their gradients are zero: the other factor has not moved, its learning rate is still 0"

    def _bypass_problem(self, gradients: Mapping[str, Tensor | None]) -> str | None:
        bypassed = [name for name, gradient in gradients.items() if gradient is None]
        if not bypassed:
            return None
        parents = [
            part.module.get_submodule(name.removeprefix(part.prefix).rpartition(".")[0])
            for part in self._parts
            for name in part.layers
            if name in bypassed
        ]
        hint = next((hint for parent in parents if (hint := bypass_hint(parent))), "")
        return (
            f"the output does not depend on the adapters of {listed(bypassed)}: the forward pass goes around them, for "
            f"example by reading the layer's `.weight`{hint}, by detaching, or in re-entrant activation checkpoints; "
            "make it call the layers, checkpoint with use_reentrant=False, or leave them out of target_modules"
        )
