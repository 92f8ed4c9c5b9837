"""For which accelerators there is code of their own in what is traced, beside what XLA compiles for any device.

The platform that is lowered for decides which of it runs, not the one that traces.
"""

import os

import jax

VARIABLE = 'LPMM_KERNEL'

Runs = dict[str, tuple[str, ...]]

_CUDA: Runs = {'cuda': ('cuda',)}
_TPU: Runs = {'tpu': ('tpu',)}
_RUNS: dict[str, Runs] = {
  '0': {},
  '1': _CUDA | _TPU,
  'cuda': _CUDA,
  'tpu': _TPU,
  'interpret': {'cuda': ('cuda', 'cpu')},
  'interpret_tpu': {'tpu': ('tpu', 'cpu')},
}
_DEFAULTS = {'gpu': _CUDA, 'tpu': _TPU}


def chosen() -> Runs:
  """By accelerator, the platforms on which its code shall run, as the environment variable LPMM_KERNEL has it.

  '0' is for none, so that all platforms run the same code; '1' for that of NVIDIA GPUs and of TPUs wherever a step is
  lowered for them, whether there is one or not, and 'cuda' or 'tpu' for one of them, which spares the tracing of the
  other; 'interpret' and 'interpret_tpu' are for one of them on a CPU too, for tests. Unset, it is only that of the
  platform that JAX has, which spares a CPU the tracing, and `jax.export` the kernel: Triton's programs cannot be
  exported, so on a GPU set it to '0' for that.

  Raises:
    ValueError: for another value.
  """
  value = os.environ.get(VARIABLE)
  if value is None:
    return _DEFAULTS.get(jax.default_backend(), {})
  if value not in _RUNS:
    raise ValueError(f'{VARIABLE}={value!r} must be one of {", ".join(_RUNS)}')
  return _RUNS[value]
