"""PyTorch's file formats: state dicts, pickled models and distributed checkpoints, read without running code."""
