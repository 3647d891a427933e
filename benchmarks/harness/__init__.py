"""What the benchmarks share: workloads, measuring, rivals, tables."""
