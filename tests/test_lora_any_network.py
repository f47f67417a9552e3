"""LoRA on networks of others: targets by role, stacks, one order of freezing, the audit and its callback."""

import re
from pathlib import Path

import lightning
import pytest
import torch
from conftest import fit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import SumMetric

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


class Small(lightning.LightningModule):
    """A network of two layers that counts what it saw."""

    def __init__(self, lora=True, by_hand=False):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.seen = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), SumMetric()
        self.lora = adapt(self.encoder, LoRASettings(rank=1, target_modules=["0", "2"]) if lora else None)
        self.head = nn.Linear(2, 1)
        self.automatic_optimization = not by_hand

    def training_step(self, batch, batch_idx):
        self.seen.update(len(batch))
        loss = self.head(self.encoder(batch)).square().mean()
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss, "batch_size": len(batch)}

    def configure_optimizers(self):
        return torch.optim.AdamW(parameter_groups(self, lr=1e-2))


def vectors():
    return DataLoader(torch.rand(8, 3, generator=torch.Generator().manual_seed(1)), batch_size=2)


def test_the_probe_leaves_metrics_as_they_were():
    module, audit = Small(), AuditAdapters()
    trainer = fit(module, vectors(), audit, max_steps=4)
    assert audit.audit.complete and module.seen.compute() == 8
    assert trainer.logged_metrics.keys() == {"loss"} and "log" not in vars(module)


class WithoutIndex(Small):
    """Its step takes the batch alone."""

    def training_step(self, batch):
        return super().training_step(batch, 0)


class SkipsFirst(Small):
    """Its first step has no loss."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 0 else super().training_step(batch, batch_idx)


class WithQueue(Small):
    """Its step writes into buffers, in place and anew."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("queue", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        self.queue[self.steps % 4] = 1
        self.steps = self.steps + 1
        return super().training_step(batch, batch_idx)["loss"] + self.norm(self.encoder(batch)).square().mean()


def test_a_step_may_take_the_batch_alone():
    audit = AuditAdapters()
    fit(WithoutIndex(), vectors(), audit, max_steps=4)
    assert audit.audit.complete


def test_a_first_step_without_a_loss_is_told_with_the_way_out():
    with pytest.raises(AuditError, match=r"training_step returned None.*give AuditAdapters\(forward="):
        fit(SkipsFirst(), vectors(), AuditAdapters(), max_steps=3)
    audit = AuditAdapters(forward=lambda module, batch: module.head(module.encoder(batch)))
    fit(SkipsFirst(), torch.rand(9, 2, 3), audit, max_steps=4, max_epochs=1)
    assert audit.begun


def test_the_probe_leaves_buffers_as_they_were():
    module = WithQueue()
    seen = []
    module.on_train_batch_start = lambda batch, index: seen.append((module.steps.item(), module.queue.sum().item()))
    fit(module, vectors(), AuditAdapters(), max_steps=4)
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)] and module.steps == 4 and module.state_dict()["steps"] == 4


def test_manual_optimisation_needs_a_probe_and_passes_with_one():
    with pytest.raises(ValueError, match=r"Small optimises by hand: give AuditAdapters\(forward="):
        fit(Small(by_hand=True), vectors(), AuditAdapters())
    audit = AuditAdapters(forward=lambda module, batch: module.head(module.encoder(batch)))
    fit(Small(by_hand=True), vectors(), audit, max_steps=4)
    assert audit.audit.complete


def test_a_module_without_adapters_trains_without_an_audit():
    audit = AuditAdapters()
    fit(Small(lora=False), vectors(), audit)
    assert audit.audit is None


def test_bf16_true_is_named_before_a_step_is_taken():
    with pytest.raises(AuditError, match=r"bf16-true does; set trainer\.precision=bf16-mixed"):
        fit(Small(), vectors(), AuditAdapters(), precision="bf16-true")


def test_the_guide_s_lines_run(tmp_path, monkeypatch):
    guide = (Path(__file__).parent.parent / "docs" / "lora.md").read_text()
    section = guide.split("## LoRA on your own network")[1].split("\n## ")[0]
    short, whole = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(short.replace("\n\n", "\n").splitlines()) <= 10
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 2
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    places = {"loader": loader, "__name__": "guide"}
    for number, code in enumerate((whole, short)):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        if code is short:  # with a module that has no adapters
            places["module"].lora.merge()
        exec(code, places)
        assert LoRASettings.from_adapter("adapter").rank == 4
