"""`python -m lpmm_optax.self_check`: prints whether this device gives the CPU's bits, and how fast it steps."""

import sys

import lpmm_optax

if __name__ == '__main__':
  found = lpmm_optax.self_check()
  print(found)
  sys.exit(0 if found.has_the_bits_of_a_cpu else 1)
