"""Fine-tuning task after task: the loop, penalties, snapshots and several processes."""
