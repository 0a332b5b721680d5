"""What the five task packages share: processes, seeds, checkpoints, samplers, logs, run folders."""
