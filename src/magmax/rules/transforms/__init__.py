"""Transforms of task vectors before a rule, and of the merged task vector after it."""
