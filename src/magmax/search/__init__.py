"""The search for the settings of a merge that score best.

`given.py` reads the recipe of a search, `trial.py` merges and scores with one choice of settings, `study.py` has Optuna
choose them and keeps every trial, `results.py` says which were best.
"""
