"""What `train_dit.py` is made of: configuration, batches, average, run folder, curves. The loop itself is there."""
