"""What an Optax transformation computes, leaf by leaf: programs, plans, and the formats that suit its state."""
