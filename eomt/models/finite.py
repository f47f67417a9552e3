"""Whether tensors are numbers throughout: a network with NaN or infinity in it is neither saved nor scored."""

from collections.abc import Mapping

import torch
from torch import Tensor


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None; waits for the device once."""
    floating = {name: t.detach() for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floating:
        return None
    device = next(iter(floating.values())).device
    # the ends of the values in one pass, a twentieth of the time of isfinite, which builds another tensor
    ends = [torch.stack(torch.aminmax(t)).to(device, torch.double) for t in floating.values()]
    finite = torch.stack(ends).isfinite().all(1).tolist()
    return next((name for name, each in zip(floating, finite, strict=True) if not each), None)


def check_finite(tensors: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Raises ValueError, naming the first of them, where tensors hold NaN or infinity.

    Args:
        what: where the tensors are from. remedy: what to do about it.
    """
    if name := first_not_finite(tensors):
        raise ValueError(f"{what}: {name} holds NaN or infinity, training has diverged: {remedy}")
