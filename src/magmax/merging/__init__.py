"""Where files and rules meet: merging, the running merge, sweeps and surveys."""
