"""Inference with LoRA: the deployed network without adapters, with them beside its weights, and merged into them."""

from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.bench import Case, Work
from benchmarks.peer import SIZES, our_network
from benchmarks.step import autocast
from eomt.lora.files import BASE, use_adapter
from eomt.lora.merging import merge
from eomt.models.eomt import EoMT
from lora_config import LoRASettings, adapted_layers, apply_lora

Logits = tuple[Tensor, Tensor]  # of masks [1, Q, H/4, W/4], of classes [1, Q, K + 1]


def network(device: str, size: str | None = None, side: int | None = None) -> EoMT:
    """A network of this size for images of that side, in pixels; None: as large as suits the device."""
    torch.manual_seed(0)
    name = SIZES[size or ("small" if device == "cpu" else "large")][3]
    side = side or (512 if device == "cpu" else 1024)
    model = our_network(name, (side, side), classes=19, queries=100, blocks=4)
    unscale_layers(model)
    return model.eval().to(device)


def unscale_layers(model: nn.Module) -> None:
    """Untrained, its layer scales are 1e-5, so that blocks would do next to nothing."""
    for name, parameter in model.named_parameters():
        if name.endswith((".ls1.gamma", ".ls2.gamma")):
            nn.init.ones_(parameter)


def adapted(device: str, size: str | None = None, side: int | None = None) -> tuple[EoMT, PeftModel]:
    """The same network with adapters of rank 16 at qkv and proj of all blocks, as if they had been trained."""
    model = network(device, size, side)
    handle = apply_lora(model.encoder.backbone, LoRASettings(rank=16, target_modules=("attn.qkv", "attn.proj")))
    generator = torch.Generator().manual_seed(1)
    for layer in adapted_layers(model.encoder.backbone).values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    return model, handle


def merged(device: str, size: str | None = None, side: int | None = None) -> EoMT:
    model, handle = adapted(device, size, side)
    merge(handle)
    return model


def inference(model: EoMT, device: str) -> Work:
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(1, 3, *model.encoder.img_size, generator=generator).to(device)

    @torch.no_grad()
    def infer() -> Logits:
        with autocast(device), model.deployed():
            (mask_logits,), (class_logits,) = model(image)
        return mask_logits, class_logits

    return infer


def apart(one: Logits, other: Logits) -> float:
    """Largest difference of mask and class logits, relative to the largest of them."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(one, other, strict=True))


def check_unmerged(plain: Logits, ours: Logits) -> str:
    """With its adapters the network is another one; without them it is the plain one."""
    device = plain[0].device.type
    model, handle = adapted(device)
    use_adapter(handle, BASE)
    without = apart(inference(model, device)(), plain)
    if without > 0 or not apart(ours, plain) > 0.01:
        raise AssertionError(f"from the plain network: {without:.1e} without adapters, {apart(ours, plain):.1e} with")
    return f"switched off, equal to the plain network; in use, logits differ by {apart(ours, plain):.2f} of the largest"


def check_merged(plain: Logits, ours: Logits) -> str:
    """The merged network and the unmerged one are the same, rounded at other places."""
    device = plain[0].device.type
    difference = apart(ours, inference(adapted(device)[0], device)())
    if difference > (1e-4 if device == "cpu" else 5e-2) or not apart(ours, plain) > 0.01:
        raise AssertionError(f"merged and unmerged logits differ by {difference:.1e} of the largest")
    return f"logits differ from those of the unmerged network by {difference:.1e} of the largest"


def cases(device: str) -> list[Case]:
    what = "inference, ViT-S/16 512x512 (GPU: ViT-L/16 1024x1024, bf16), LoRA r=16 at qkv and proj"
    case = partial(Case, peer="without adapter", build_peer=lambda d: inference(network(d), d), rounds=25)
    return [
        case(
            name="infer.unmerged",
            what=f"{what}, unmerged",
            build_ours=lambda d: inference(adapted(d)[0], d),
            check=check_unmerged,
            time_target=1.15,
        ),
        case(
            name="infer.merged",
            what=f"{what}, merged",
            build_ours=lambda d: inference(merged(d), d),
            check=check_merged,
            time_target=1.02,
        ),
    ]
