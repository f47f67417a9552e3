"""An adapter out of a finished full fine-tune: the truncated singular value decomposition of each layer's change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eomt.lora.methods import lora_factors
from lora_config import adapted_layers


@dataclass(frozen=True)
class Change:
    """The change of a layer's weights [out, in], as singular vectors and values: `left @ diag(values) @ right`.

    Args:
        left: [out, K]. values: [K], descending. right: [K, in]. base: norm of the weights that changed.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    base: float

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> Change:
        """Of two weight matrices, in float64: the smallest singular values are rounding otherwise."""
        before = before.detach().cpu().double()
        return cls(*torch.linalg.svd(after.detach().cpu().double() - before, full_matrices=False), before.norm().item())

    @property
    def norm(self) -> float:
        return self.values.norm().item()

    def kept(self, rank: int) -> float:
        """The share of the squared change that this rank keeps, the most that any such update can; 1 of none."""
        return (self.values[:rank].square().sum() / self.values.square().sum()).item() if self.norm else 1.0

    def rank_for(self, share: float) -> int:
        """The smallest rank that keeps this share of the squared change."""
        kept = self.values.square().cumsum(0)
        return int((kept < share * kept[-1]).sum()) + 1 if self.norm else 0

    def update(self, rank: int) -> Tensor:
        """The nearest matrix [out, in] of this rank."""
        return (self.left[:, :rank] * self.values[:rank]) @ self.right[:rank]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank], alike in size, with B A = `update(rank)`; zeros beyond K."""
        roots = self.values[:rank].sqrt()
        a, b = roots[:, None] * self.right[:rank], self.left[:, :rank] * roots
        more = rank - len(roots)
        return nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))


def changes(before: nn.Module, after: nn.Module, targets: Iterable[str]) -> dict[str, Change]:
    """The change of each target's weights between two modules of one structure."""
    return {
        name: Change.between(before.get_submodule(name).weight, after.get_submodule(name).weight) for name in targets
    }


@torch.no_grad()
def set_updates(module: nn.Module, found: Mapping[str, Change]) -> None:
    """Gives the LoRA adapters of a module the changes, as far as their ranks reach."""
    for name, layer in adapted_layers(module).items():
        a, b, scaling = lora_factors(layer)
        wanted_a, wanted_b = found[name].factors(len(a.weight))
        a.weight.copy_(wanted_a)
        b.weight.copy_(wanted_b / scaling)


def left_out(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], targets: Iterable[str]
) -> dict[str, dict[str, float]]:
    """The changed tensors that no update of the targets' weights can hold, such as norms, biases and embeddings.

    Returns:
        `norm` of the change and `relative` to the tensor's own, by name.
    """
    held = {f"{name}.weight" for name in targets}
    found = {}
    for name in before.keys() - held:
        if before[name].is_floating_point() and not torch.equal(before[name], after[name]):
            norm = (after[name].double() - before[name].double()).norm().item()
            found[name] = {"norm": norm, "relative": norm / max(before[name].double().norm().item(), 1e-30)}
    return dict(sorted(found.items(), key=lambda item: -item[1]["norm"]))
