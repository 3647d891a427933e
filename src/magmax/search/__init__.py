"""The search for the settings of a merge that score best.

`config.py` reads the recipe of a search, `trials.py` merges and scores with one choice of settings, `runner.py` has
Optuna choose them and keeps every trial, `trial_results.py` says which were best.
"""
