"""Checkpoints on other machines: the Hugging Face hub, URLs, ranges and uploads."""
