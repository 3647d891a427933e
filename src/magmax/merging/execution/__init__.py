"""How a merge is executed: threads, executors, Dask, CUDA."""
