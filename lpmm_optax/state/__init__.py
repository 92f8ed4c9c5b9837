"""What can be done with parameters and optimizer state: saved, converted, placed, reported on."""
