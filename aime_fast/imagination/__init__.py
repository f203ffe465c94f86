"""The world model over time: what is inferred about a sequence, one frame at a time, and roll-outs scored in training."""
