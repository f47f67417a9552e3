"""200 steps on toy streets with every shortcut and with none: what comes out must be the same within noise.

Without: transformers' network and loss, whole images augmented before they are cropped, a mask for each class. Both
start from the same weights and draw the same images and the same augmentation; only the points of the loss differ.
"""

import statistics
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.bench import Row
from benchmarks.data import plain_augmentation
from benchmarks.peer import normalized, our_names, peer_network
from eomt.data.datamodule import SegmentationDataModule
from eomt.data.toy_streets import toy_streets
from eomt.training.class_scores import iou_per_class
from eomt.training.mask_classification_semantic import MaskClassificationSemantic
from eomt.training.schedules import mask_probability

STEPS, SEEDS, BATCH, SIDE = 200, (0, 1, 2), 4, 128
WIDTH, DEPTH, HEADS, BLOCKS, QUERIES, POINTS = 192, 6, 3, 3, 50, 2048


def rows(device: str) -> list[Row]:
    data = toy_streets(num_train=100, num_val=30, img_size=[SIDE, SIDE], batch_size=BATCH, num_workers=0)
    scores = {"peer": [], "ours": []}
    for seed in SEEDS:
        scores["peer"].append(without(data, seed, device))
        scores["ours"].append(with_all(data, seed, device))
    mean = {side: statistics.mean(values) for side, values in scores.items()}
    spread = {side: statistics.stdev(values) for side, values in scores.items()}
    noise = 2 * (sum(value**2 for value in spread.values()) / len(SEEDS)) ** 0.5  # two standard errors
    shown = [f"{100 * mean[side]:.2f} ± {100 * spread[side]:.2f}" for side in scores]
    return [
        Row(
            f"mIoU after {STEPS} steps on toy streets, {len(SEEDS)} seeds, without and with the shortcuts",
            *shown,
            mean["ours"] / mean["peer"],
            f"apart <= {100 * noise:.2f}",
            abs(mean["ours"] - mean["peer"]) <= noise,
            facts={"miou": scores, "seeds": SEEDS},
        )
    ]


def module_with(network: nn.Module, data: SegmentationDataModule) -> MaskClassificationSemantic:
    """Ours, with the peer's weights."""
    kwargs = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    module = MaskClassificationSemantic(
        (SIDE, SIDE), data.num_classes, lr=5e-4, llrd=1.0, backbone_name="vit_small_patch14_reg4_dinov2",
        backbone_kwargs=kwargs, pretrained=False, num_q=QUERIES, num_blocks=BLOCKS, num_points=POINTS,
    )  # fmt: skip
    missing, unknown = module.network.load_state_dict(our_names(network.state_dict()), strict=False)
    if unknown or set(missing) - {"encoder.pixel_mean", "encoder.pixel_std"}:
        raise AssertionError(f"weights differ: {missing}, {unknown}")
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module


def peer_with(data: SegmentationDataModule, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = peer_network(WIDTH, DEPTH, HEADS, SIDE, data.num_classes, QUERIES, BLOCKS, train_num_points=POINTS)
    for name, parameter in network.named_parameters():
        if "layer_scale" in name:
            nn.init.ones_(parameter)
    return network


def steps(network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """Warm-up, fading masks, clipping: what surrounds a step on either side."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / STEPS) ** 0.9
        network.attn_mask_probs.fill_(mask_probability(step, 0, STEPS))
        optimizer.zero_grad()
        yield step
        nn.utils.clip_grad_norm_(network.parameters(), 0.01)
        optimizer.step()


def picked(step: int, seed: int, images: int) -> list[tuple[int, int]]:
    """Which images a step takes, and the seed of each one's augmentation."""
    generator = torch.Generator().manual_seed((seed << 20) + step)
    indices = torch.randint(images, (BATCH,), generator=generator).tolist()
    return list(zip(indices, torch.randint(2**62, (BATCH,), generator=generator).tolist(), strict=True))


def with_all(data: SegmentationDataModule, seed: int, device: str) -> float:
    module = module_with(peer_with(data, seed), data).to(device).train()
    torch.manual_seed(seed)
    for step in steps(module.network, module.optimizer()):
        images, labels = zip(*(data.train_set[pair] for pair in picked(step, seed, len(data.train_set))), strict=True)
        module.training_step((torch.stack(images).to(device), torch.stack(labels).to(device)), 0).backward()
    return miou(module, data)


def without(data: SegmentationDataModule, seed: int, device: str) -> float:
    network = peer_with(data, seed).to(device).train()
    whole = data.train_set.with_transform(None)
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 5e-4} for p in network.parameters()], weight_decay=0.05)
    torch.manual_seed(seed)
    for step in steps(network, optimizer):
        views = [plain_view(*whole[index], view) for index, view in picked(step, seed, len(whole))]
        images, masks, classes = zip(*views, strict=True)
        network(
            normalized(torch.stack(images).to(device) / 255),
            mask_labels=[mask.float().to(device) for mask in masks],
            class_labels=[torch.tensor(known).to(device) for known in classes],
        ).loss.backward()
    return miou(module_with(network, data).to(device), data)


def plain_view(image: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor, list[int]]:
    classes = [k for k in labels.unique().tolist() if k != 255]
    return plain_augmentation(image, torch.stack([labels == k for k in classes]), classes, seed, (SIDE, SIDE))


@torch.no_grad()
def miou(module: MaskClassificationSemantic, data: SegmentationDataModule) -> float:
    """Over the validation images, as training computes it."""
    module.eval()
    for image, labels in data.val_set:
        module.validation_step(([image.to(module.device)], [labels.to(module.device)]), 0)
    return iou_per_class(module.confusion.compute()).nanmean().item()
