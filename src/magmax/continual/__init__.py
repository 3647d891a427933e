"""Learning tasks one after another: data, scenarios, heads, training and evaluation.

Import what you need from the module that holds it (`from magmax.continual.training.fit import fit`), so that torch is
loaded only where it is used.
"""
