"""Morphed faces: a ViT pretrained by masking, adapted to tell them from bona fide ones."""
