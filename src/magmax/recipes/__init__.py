"""Recipes: a merge as a YAML file, ours or mergekit's, validated before any work."""
