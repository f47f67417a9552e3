"""LoRA on networks of others: targets by role, stacks, one order of freezing, the audit and its callback."""

import lightning
import pytest
import torch
from conftest import fit
from torch import nn
from torch.utils.data import DataLoader

from eomt.lora.adapting import adapt, load_adapted
from eomt.lora.audit import AuditError
from eomt.lora.groups import parameter_groups
from eomt.training.audit_callback import AuditAdapters
from lora_config import LoRASettings

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to adapt")
QKV = ("query", "key", "value")


def text_config(**sizes):
    small = dict(vocab_size=30, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2, encoder_layers=2)
    small |= dict(decoder_layers=3, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16)
    return transformers.MBartConfig(**small | sizes)


def vision():
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, mlp_ratio=2)
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))


class Answers(lightning.LightningModule):
    """Two pretrained encoders with an adapter each, and a head."""

    def __init__(self, lora_lr=1e-2):
        super().__init__()
        torch.manual_seed(0)
        self.vision, self.text = vision(), transformers.MBartModel(text_config()).encoder
        self.head = nn.Linear(16, 3)
        self.vision_lora = adapt(self.vision, LoRASettings(rank=2, target_modules=QKV), network=self)
        self.text_lora = adapt(self.text, LoRASettings(rank=4, alpha=8, target_modules=QKV), network=self)
        self.lora_lr = lora_lr

    def training_step(self, batch, batch_idx):
        images, tokens = batch
        pooled = self.vision(images).pooler_output + self.text(tokens).last_hidden_state.mean(1)
        loss = self.head(pooled).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(parameter_groups(self, lr=1e-3, lora_lr=self.lora_lr))


def batches(steps=4):
    generator = torch.Generator().manual_seed(1)
    pairs = [(torch.rand(3, 28, 28, generator=generator), torch.arange(3, 8)) for _ in range(2 * steps)]
    return DataLoader(pairs, batch_size=2)


def test_two_adapted_encoders_pass_the_audit_with_one_line():
    module, audit = Answers(), AuditAdapters()
    fit(module, batches(), audit, max_steps=4)
    assert audit.audit.complete and all(result["passed"] for result in audit.audit.results.values())


def test_adapters_without_learning_rate_stop_any_module():
    with pytest.raises(AuditError, match=r"vision.*lora_A.*learning rate"):
        fit(Answers(lora_lr=0.0), batches(24), AuditAdapters(), max_steps=24)


def test_adapters_of_two_encoders_come_back_from_a_folder_each(tmp_path):
    module = Answers()
    fit(module, batches(), max_steps=2)
    module.vision_lora.save(tmp_path / "vision")
    module.text_lora.save(tmp_path / "text")
    torch.manual_seed(0)
    images, text = vision(), transformers.MBartModel(text_config()).encoder
    again = [load_adapted(images, tmp_path / "vision"), load_adapted(text, tmp_path / "text")]
    assert [part.settings.rank for part in again] == [2, 4]
    for part, own in zip(again, (module.vision, module.text), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part.module.parameters(), own.parameters(), strict=True))
    assert not any("vision_lora" in key for key in module.state_dict())
