"""Groups parameters by their learning rates."""

from collections.abc import Collection, Iterator

from torch import nn

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
    """The trainable parameters in few groups: one for each kind, learning rate and weight decay.

    Adapters have their own rate, no layer-wise decay and no weight decay. `kind` is "lora", "heads" or "backbone"; only
    the backbone waits through the first warm-up.
    """
    rates = backbone_rates(network, lr, llrd, decay_masked_blocks)
    adapter_ids = {id(p) for p in adapters}

    def kinds() -> Iterator[tuple[nn.Parameter, tuple[str, float, float]]]:
        for p in network.parameters():
            if not p.requires_grad:
                continue
            if id(p) in adapter_ids:
                yield p, ("lora", lora_lr, 0.0)
            elif id(p) in rates:
                yield p, ("backbone", rates[id(p)], weight_decay)
            else:
                yield p, ("heads", lr, weight_decay)

    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for p, key in kinds():
        groups.setdefault(key, []).append(p)
    return [
        {"params": params, "kind": kind, "lr": rate, "weight_decay": decay}
        for (kind, rate, decay), params in groups.items()
    ]
