"""The paper's analyses, of checkpoints and of benchmark results, as tidy records; nothing here draws."""
