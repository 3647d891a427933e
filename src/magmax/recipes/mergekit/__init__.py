"""mergekit's YAML recipes as plans: the same words, the same meaning, our arithmetic; the rest refused by its line."""

from .translation import build_request, is_mergekit

__all__ = ["build_request", "is_mergekit"]
