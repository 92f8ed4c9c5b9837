"""One leaf's update, in place: tiles, the barrier around products, and gradients."""
