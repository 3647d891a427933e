"""LoRA adapters of PEFT: reading, mapping to the base's tensors, low-rank products."""
