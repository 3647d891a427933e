"""Merges of LoRA adapters into one adapter."""
