"""Groups parameters by their learning rates."""

from collections.abc import Collection

from torch import nn

from eomt.lora.groups import parameter_groups
from eomt.models.eomt import EoMT


def backbone_rates(network: EoMT, lr: float, llrd: float, decay_masked_blocks: bool) -> dict[int, float]:
    """Base learning rate of every backbone parameter, by `id`.

    Layer-wise decay: `lr * llrd ** (blocks above it)`; embeddings as the first block, the final norm at `lr`. With
    `decay_masked_blocks=False` the blocks that see the queries keep `lr`.
    """
    blocks = network.encoder.blocks
    rates = {id(p): lr * llrd ** (len(blocks) - 1) for p in network.encoder.parameters()}
    rates |= {id(p): lr for p in network.encoder.norm.parameters()}
    for i, block in enumerate(blocks):
        exempt = not decay_masked_blocks and i >= len(blocks) - network.num_blocks
        rates |= {id(p): lr if exempt else lr * llrd ** (len(blocks) - 1 - i) for p in block.parameters()}
    return rates


def param_groups(
    network: EoMT,
    adapters: Collection[nn.Parameter],
    lr: float,
    lora_lr: float,
    llrd: float,
    decay_masked_blocks: bool,
    weight_decay: float,
) -> list[dict]:
    """The trainable parameters in groups; see `eomt.lora.groups.parameter_groups`.

    Adapters have no layer-wise decay; only the backbone waits through the first warm-up.
    """
    rates = backbone_rates(network, lr, llrd, decay_masked_blocks)
    return parameter_groups(network, lr, lora_lr, weight_decay, rates, adapters)
