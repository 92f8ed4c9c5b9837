"""The step of a training loop: in place, over microbatches, and in the backward pass."""
