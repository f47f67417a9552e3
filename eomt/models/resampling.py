"""Position and patch embeddings at other sizes, and a record of what they were."""

import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from eomt.fingerprints import combine_hashes, hash_tensors


def create_resized(
    create: Callable[..., nn.Module], compare: bool, img_size: tuple[int, int], patch_size: int
) -> nn.Module:
    """Creates a timm model at its published sizes and resamples it; the attribute `resampled` says what was stored.

    With `compare`, the model that timm makes at these sizes at once is taken where the two differ: weights of one's own
    file may have other sizes than the model, and FlexiViT is resampled otherwise when it is loaded. What the file holds
    is not known then: None in place of SHA-256.
    """
    backbone = create()
    backbone.resampled = resize(backbone, img_size, patch_size)
    if not compare:
        return backbone
    with torch.random.fork_rng(devices=[]):  # what is drawn later is the same, compared or not
        direct = create(img_size=img_size, patch_size=patch_size)
    tensors = backbone.state_dict()
    differing = [name for name, tensor in direct.state_dict().items() if not torch.equal(tensor, tensors[name])]
    if not differing:
        return backbone
    direct.resampled = dict.fromkeys(differing)
    return direct


def resize(backbone: nn.Module, img_size: tuple[int, int], patch_size: int) -> dict[str, str]:
    """Resamples position and patch embeddings to other sizes; returns SHA-256 of what they were, by name."""
    before = dict(backbone.state_dict())
    backbone.set_input_size(img_size=img_size, patch_size=patch_size)
    after = backbone.state_dict()
    names = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    return hash_tensors({name: before[name] for name in names})


def record_resampling(
    backbone: nn.Module, stored: Mapping[str, Tensor], resampled: Collection[str], differences: bool
) -> None:
    """Keeps SHA-256 of what a file holds of resampled tensors, by name, in the backbone's attribute `resampled`.

    Call it before the tensors are loaded. One that replaces another is no longer resampled, unless it was itself;
    differences are added to what is there, so that both count.
    """
    marks = dict(getattr(backbone, "resampled", {}))
    for name, digest in hash_tensors({key: t for key, t in stored.items() if key in resampled or key in marks}).items():
        if differences:
            start = marks.get(name) or hash_tensors({name: backbone.state_dict()[name]})[name]
            marks[name] = combine_hashes({"start": start, "difference": digest})
        elif name in resampled:
            marks[name] = digest
        else:
            del marks[name]
    backbone.resampled = marks


def fit_pos_embed(
    tensor: Tensor, prefix: int, grid: tuple[int, int], patch_size: int, img_size: tuple[int, int] | None
) -> tuple[Tensor, tuple[int, int] | None]:
    """Returns position embeddings [1, prefix + N, C] of a file for a grid of patches, and the grid that they had.

    As many patches may be another grid: 4x8 are as many as 8x4. Without the file's image size the embeddings tell.
    None in place of the grid: they are as they were.
    """
    patches = tensor.shape[1] - prefix
    if img_size:
        old = tuple(length // patch_size for length in img_size)
    else:
        old = find_grid(tensor[0, prefix:]) or (grid if patches == math.prod(grid) else None)
    if old == grid and patches == math.prod(grid):
        return tensor, None
    old = old or square_grid(patches)
    return resample_pos_embed(tensor, prefix, old, grid), old


def find_grid(embeddings: Tensor) -> tuple[int, int] | None:
    """The grid in which neighbours among embeddings [N, C] are most alike, or None where no grid stands out.

    Learnt embeddings vary smoothly over the image; the right grid was ahead by 19 % or more in pretrained ones that
    were resampled to twelve grids, by 1 % or less in random ones.
    """
    count = len(embeddings)
    roughness = {}
    for rows in (rows for rows in range(2, count // 2 + 1) if count % rows == 0):
        grid = embeddings.detach().float().unflatten(0, (rows, -1))
        roughness[rows] = (grid.diff(dim=0).pow(2).mean() + grid.diff(dim=1).pow(2).mean()).item()
    first, second = sorted(roughness, key=roughness.get)[:2] if len(roughness) > 1 else (0, 0)
    clear = len(roughness) > 1 and roughness[second] > 1.1 * roughness[first]
    return (first, count // first) if clear else None


def square_grid(patches: int) -> tuple[int, int]:
    """The grid of embeddings that tell nothing else, or ValueError where they are no square."""
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ValueError(
            f"position embeddings for {patches} patches are no square, the file does not say which img_size it is for, "
            "and they do not tell: train at the checkpoint's own img_size"
        )
    return side, side


def resample_pos_embed(tensor: Tensor, prefix: int, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embeddings [1, prefix + N, C] of one patch grid, interpolated to another.

    Raises:
        ValueError: as many embeddings do not make the old grid.
    """
    from timm.layers import resample_abs_pos_embed  # reading weights alone needs no timm

    patches = tensor.shape[1] - prefix
    if math.prod(old_grid) != patches:
        raise ValueError(
            f"position embeddings for {patches} patches are no {old_grid[0]}x{old_grid[1]} grid: "
            "train at the checkpoint's own img_size"
        )
    return resample_abs_pos_embed(tensor, list(new_grid), list(old_grid), num_prefix_tokens=prefix)
