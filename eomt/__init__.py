"""EoMT, a plain ViT that segments, fine-tuned with and without LoRA."""

__version__ = "0.1.0"
