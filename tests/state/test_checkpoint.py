"""Checkpoints: every optimizer's state comes back bit for bit, by every route, on every mesh; or there is an error."""

import functools
import gc
import json
import shutil

from flax import nnx
from flax import serialization
import flax.linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from runs import assert_same_bits
from runs import slow

import lpmm_optax as lpmm
from lpmm_optax import checkpoint
from lpmm_optax.state import _description

pytestmark = pytest.mark.usefixtures('compile_fast')

DENSE = {
  'layer': {'kernel': jax.random.normal(jax.random.key(0), (64, 256)), 'bias': jnp.zeros(256)},
  'scale': jnp.ones(()),
}


def gradient(i):
  keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), 3)
  leaves, treedef = jax.tree.flatten(DENSE)
  return treedef.unflatten(0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True))


def in_microbatches(tx, **kwargs):
  return lpmm.MultiSteps(tx, 3, **kwargs)


# With parameters in the given format. The checkpoint is taken after four steps: within an accumulation of three.
RUNS = {
  'sgdm': (lpmm.INT8, lambda: lpmm.sgdm(0.1)),
  'sgdm, int4': (lpmm.INT4, lambda: lpmm.sgdm(0.1, formats=lpmm.INT4)),
  'sgdm, int16': (lpmm.INT16, lambda: lpmm.sgdm(optax.linear_schedule(0.1, 0.0, 10), formats=lpmm.BFLOAT16)),
  'adamw': (lpmm.INT8, lambda: lpmm.adamw(0.01)),
  'adamw, int4': (lpmm.INT8, lambda: lpmm.adamw(0.01, formats=lpmm.INT4)),
  'adamw, bfloat16': (lpmm.BFLOAT16, lambda: lpmm.adamw(0.01, formats={'nu': lpmm.BFLOAT16})),
  'lion': (lpmm.INT8, lambda: lpmm.lion(0.01)),
  'low_precision': (lpmm.INT8, lambda: lpmm.low_precision(optax.rmsprop(0.01, momentum=0.9))),
  'clipped, if finite': (
    lpmm.INT8,
    lambda: lpmm.apply_if_finite(lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.sgdm(0.1)), 3),
  ),
  'microbatches': (lpmm.INT8, lambda: in_microbatches(lpmm.adamw(0.01))),
  'microbatches, int4': (lpmm.INT8, lambda: in_microbatches(lpmm.sgdm(0.1), accumulator=lpmm.INT4)),
  'into momentum': (lpmm.INT8, lambda: in_microbatches(lpmm.sgdm(0.1), accumulator=lpmm.INTO_MOMENTUM)),
}


def start(name):
  format, make = RUNS[name]
  params, tx = lpmm.quantize(DENSE, format), make()
  return tx, (params, tx.init(params))


@functools.cache
def trained(name):
  """The step, and the states after four and after eight of them."""
  with jax.numpy_dtype_promotion('standard'):
    tx, state = start(name)
    step = jax.jit(lambda state, grads: lpmm.step(tx, grads, *state))
    states = [state]
    for i in range(8):
      states.append(step(states[-1], gradient(i)))
  return step, states[4], states[8]


def abstract(tree, shardings=None):
  shape = lambda x, sharding=None: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=sharding)
  return jax.tree.map(shape, tree) if shardings is None else jax.tree.map(shape, tree, shardings)


def shardings_of(tree):
  """Where arrays are, without which Orbax warns that it looks into the checkpoint."""
  return jax.tree.map(lambda x: jnp.asarray(x).sharding, tree)


def manager(folder, asynchronous=False):
  return ocp.CheckpointManager(
    folder, options=ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous, max_to_keep=2)
  )


# ---------------------------------------------------------------------------------------------------------------------
# Routes. Each takes a folder, a state, and one of the same structure with other contents.
# ---------------------------------------------------------------------------------------------------------------------


def by_our_args(folder, state, like, asynchronous=False):
  with manager(folder, asynchronous) as m:
    m.save(0, args=checkpoint.Save(state))
    m.wait_until_finished()
    return m.restore(0, args=checkpoint.Restore(abstract(like)))


def by_standard_args(folder, state, like):
  with manager(folder) as m:
    m.save(0, args=ocp.args.StandardSave(state))
    return m.restore(0, args=ocp.args.StandardRestore(abstract(like, shardings_of(like))))


def by_standard_checkpointer(folder, state, like):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / 'state', state)
    checkpointer.wait_until_finished()
    return checkpointer.restore(folder / 'state', abstract(like, shardings_of(like)))


def by_our_handler(folder, state, like):
  with ocp.Checkpointer(checkpoint.Handler()) as checkpointer:
    checkpointer.save(folder / 'state', args=checkpoint.Save(state))
    return checkpointer.restore(folder / 'state', args=checkpoint.Restore(like))


def by_flax(folder, state, like):
  (folder / 'state').write_bytes(serialization.to_bytes(state))
  return serialization.from_bytes(like, (folder / 'state').read_bytes())


ROUTES = {
  'manager': by_our_args,
  'asynchronous manager': functools.partial(by_our_args, asynchronous=True),
  'manager, StandardSave': by_standard_args,
  'StandardCheckpointer': by_standard_checkpointer,
  'Checkpointer': by_our_handler,
  'flax.serialization': by_flax,
}


# Every route with one optimizer, and every optimizer by two of them.
OTHERS = [name for name in RUNS if name not in ('microbatches', 'adamw')]


@pytest.mark.parametrize(
  ('route', 'name'),
  [
    ('manager', 'adamw'),
    ('flax.serialization', 'adamw'),
    *slow(*((route, 'microbatches') for route in ROUTES)),
    *slow(*((route, name) for route in ('manager', 'flax.serialization') for name in OTHERS)),
  ],
)
def test_a_restored_run_continues_with_the_same_bits(tmp_path, route, name):
  step, halfway, end = trained(name)
  restored = ROUTES[route](tmp_path, halfway, start(name)[1])
  assert_same_bits(restored, halfway)
  for i in range(4, 8):
    restored = step(restored, gradient(i))
  assert_same_bits(restored, end)


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(1)(nn.relu(nn.Dense(256)(x)))


def test_a_linen_train_state_is_restored_into_a_new_one(tmp_path):
  x, model = jnp.ones((8, 64)), Mlp()
  weights = model.init(jax.random.key(0), x)['params']

  def new():
    params = lpmm.quantize(weights, lpmm.INT8)
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

  @jax.jit
  def step(state):
    grads = jax.grad(lambda w: jnp.mean(model.apply({'params': w}, x) ** 2))(lpmm.dequantize(state.params))
    return state.apply_gradients(grads=grads)

  tx = lpmm.adamw(0.01)
  state = step(step(new()))
  restored = by_our_args(tmp_path, state, new())  # Whose step is a number of Python's yet.
  assert_same_bits(step(restored), step(state))
  assert int(restored.step) == 2


class NnxMlp(nnx.Module):
  def __init__(self):
    self.hidden = nnx.Linear(64, 256, rngs=nnx.Rngs(0))
    self.out = nnx.Linear(256, 1, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.out(nnx.relu(self.hidden(x)))


def test_an_nnx_model_and_its_optimizer_are_restored_into_new_ones(tmp_path):
  x, graph = jnp.ones((8, 64)), nnx.graphdef(NnxMlp())

  def new():
    model = NnxMlp()
    nnx.update(model, lpmm.quantize(nnx.as_pure(nnx.state(model, nnx.Param)), lpmm.INT8))
    return model, nnx.Optimizer(model, lpmm.adamw(0.01), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    params = nnx.state(model, nnx.Param)
    optimizer.update(model, jax.grad(lambda w: jnp.mean(nnx.merge(graph, w)(x) ** 2))(lpmm.dequantize(params)))

  trained_pair, restored_pair = new(), new()
  step(*trained_pair)
  with manager(tmp_path) as m:
    m.save(0, args=checkpoint.Save(nnx.state(trained_pair)))
    nnx.update(restored_pair, m.restore(0, args=checkpoint.Restore(nnx.state(restored_pair))))
  step(*trained_pair)
  step(*restored_pair)
  assert_same_bits(nnx.as_pure(nnx.state(restored_pair)), nnx.as_pure(nnx.state(trained_pair)))


@pytest.mark.slow
def test_a_save_in_the_background_is_of_the_state_before_the_next_step(tmp_path):
  params = lpmm.quantize({'w': jax.random.normal(jax.random.key(0), (2048, 2048))}, lpmm.INT8)
  tx = lpmm.sgdm(0.1)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state):
    return lpmm.step(tx, {'w': jnp.ones((2048, 2048))}, params, state)

  params, state = step(params, tx.init(params))
  expected = jax.tree.map(lambda x: np.array(x), (params, state))
  like = abstract(expected)
  with manager(tmp_path, asynchronous=True) as m:
    m.save(0, args=checkpoint.Save((params, state)))
    for _ in range(3):
      params, state = step(params, state)  # Into the same memory.
    m.wait_until_finished()
    assert_same_bits(m.restore(0, args=checkpoint.Restore(like)), expected)


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint says of itself, and what it refuses
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A folder with a checkpoint of 'sgdm' by our arguments, and the state in it."""
  folder, (_, state, _) = tmp_path_factory.mktemp('saved'), trained('sgdm')
  with manager(folder) as m:
    m.save(4, args=checkpoint.Save(state))
  return folder, state


def test_a_checkpoint_says_version_and_formats(saved):
  folder, _ = saved
  text = json.loads((folder / '4' / 'default' / checkpoint.FILE_NAME).read_text())
  description = checkpoint.read_description(folder / '4' / 'default')
  assert description == text
  assert description['lpmm_optax'] == lpmm.__version__
  stored = {path: (entry['shape'], entry['stored']) for path, entry in description['arrays'].items()}
  assert stored == {
    '0/layer/bias': ([256], 'float32'),
    '0/layer/kernel': ([64, 256], 'int8, scales_of_64'),
    '0/scale': ([], 'float32'),
    '1/inner_state/1/count': ([], 'int32'),
    '1/inner_state/1/momentum': ([], 'float32'),
    '1/inner_state/1/trace/layer/bias': ([256], 'float32'),
    '1/inner_state/1/trace/layer/kernel': ([64, 256], 'int8, scales_of_128'),
    '1/inner_state/1/trace/scale': ([], 'float32'),
    '1/key': ([2], 'uint32'),
    '1/step': ([], 'int32'),
  }


def other(format=lpmm.INT8, make=lpmm.sgdm, dense=DENSE, **kwargs):
  """A state to restore into, of learning rate 0.1."""
  params = dense if format is None else lpmm.quantize(dense, format)
  return params, make(0.1, **kwargs).init(params)


KERNEL, TRACE = '0/layer/kernel', '1/inner_state/1/trace/layer/kernel'
SAVED_AS = r'\[64, 256\] as int8, scales_of_{}'
# What it is restored into, by our arguments: (leaf, what is said of it).
OTHERS = {
  'parameters in int4': (lambda: other(lpmm.INT4), KERNEL, SAVED_AS.format(64) + '.*as int4, scales_of_64'),
  'parameters in int16': (lambda: other(lpmm.INT16), KERNEL, SAVED_AS.format(64) + '.*as int16, scales_of_64'),
  'parameters in bfloat16': (lambda: other(lpmm.BFLOAT16), KERNEL, SAVED_AS.format(64) + '.*as bfloat16'),
  'dense parameters': (lambda: other(None), KERNEL, SAVED_AS.format(64) + '.*as float32'),
  'parameters in blocks of 32': (
    lambda: other(lpmm.Format(block_size=32)),
    KERNEL,
    SAVED_AS.format(64) + '.*as int8, scales_of_32',
  ),
  'momentum in blocks of 32': (
    lambda: other(formats=lpmm.Format(block_size=32)),
    TRACE,
    SAVED_AS.format(128) + '.*as int8, scales_of_32',
  ),
  'momentum in int16': (lambda: other(formats=lpmm.INT16), TRACE, SAVED_AS.format(128) + '.*as int16, scales_of_128'),
}
TREES = {
  'another optimizer': (lambda: other(make=lpmm.adamw), '1/inner_state/0/mu/layer/bias'),
  'another form of momentum': (lambda: other(error_feedback=False), '1/inner_state/1/count'),
  'microbatches': (lambda: other(make=lambda rate: lpmm.MultiSteps(lpmm.sgdm(rate), 2)), '1/mini_step'),
  'a leaf more': (lambda: other(dense=DENSE | {'new': jnp.ones(3)}), '0/new'),
  'a leaf less': (lambda: other(dense={'layer': DENSE['layer']}), '0/scale'),
}


@pytest.mark.parametrize('name', OTHERS)
def test_restoring_into_other_formats_names_the_leaf_and_both(saved, name):
  folder, _ = saved
  make, leaf, message = OTHERS[name]
  with manager(folder) as m, pytest.raises(ValueError, match=f'^{leaf}: .*{message}.*lpmm_optax.convert'):
    m.restore(4, args=checkpoint.Restore(make()))


@pytest.mark.parametrize('name', TREES)
def test_restoring_into_another_tree_names_what_differs(saved, name):
  folder, _ = saved
  make, leaf = TREES[name]
  with manager(folder) as m, pytest.raises(ValueError, match=f'is not of the tree.* {leaf} '):
    m.restore(4, args=checkpoint.Restore(make()))


def test_restoring_into_another_shape_names_the_leaf(saved):
  folder, _ = saved
  dense = DENSE | {'layer': DENSE['layer'] | {'bias': jnp.zeros(128)}}
  with (
    manager(folder) as m,
    pytest.raises(ValueError, match=r'^0/layer/bias: .*\[256\] as float32.*\[128\] as float32'),
  ):
    m.restore(4, args=checkpoint.Restore(other(dense=dense)))


@pytest.mark.parametrize('name', [*OTHERS, *TREES])
def test_orbax_alone_refuses_other_formats_and_trees(saved, name):
  # By the same layout of the arrays, which our arguments leave as it is.
  folder, _ = saved
  make = (OTHERS | TREES)[name][0]
  with ocp.StandardCheckpointer() as checkpointer, pytest.raises(ValueError, match='tree structures do not match'):
    checkpointer.restore(folder / '4' / 'default', make())


@pytest.mark.parametrize('name', OTHERS)
def test_flax_refuses_other_formats(saved, name):
  _, state = saved
  make, leaf, _ = OTHERS[name]
  data = serialization.to_bytes(state)
  if name == 'dense parameters':
    # Flax puts what was saved in the place of an array, whatever it is; here it is seen at once.
    restored = serialization.from_bytes(make(), data)
    assert isinstance(restored[0]['layer']['kernel'], dict)
    return
  with pytest.raises(ValueError, match=f'^{leaf}: saved as int8, .*, written by lpmm_optax .*lpmm_optax.convert'):
    serialization.from_bytes(make(), data)
  dense = serialization.to_bytes(other(None))
  with pytest.raises(ValueError, match=r'^0/layer/kernel: saved as a dense array'):
    serialization.from_bytes(make(), dense)


def test_flax_refuses_another_shape_of_a_quantized_array(saved):
  _, state = saved
  dense = DENSE | {'layer': DENSE['layer'] | {'kernel': jnp.ones((64, 128))}}
  with pytest.raises(ValueError, match=r'^0/layer/kernel/int8: saved with shape \(64, 256\).*\(64, 128\)'):
    serialization.from_bytes(other(dense=dense), serialization.to_bytes(state))


def test_a_checkpoint_without_description_is_told_apart(tmp_path, saved):
  _, state = saved
  with manager(tmp_path) as m:
    m.save(0, args=ocp.args.StandardSave(state))
  message = r'not saved by lpmm_optax.checkpoint.Save; .*StandardRestore'
  with ocp.Checkpointer(checkpoint.Handler()) as checkpointer, pytest.raises(FileNotFoundError, match=message):
    checkpointer.restore(tmp_path / '0' / 'default', args=checkpoint.Restore(state))


# Orbax leaves coroutines behind where it cannot read.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage', ['one bit', 'second half cut', 'gone'])
def test_a_damaged_file_is_an_error_and_never_another_state(tmp_path, saved, damage):
  folder, state = saved
  whole = folder / '4' / 'default'
  errors = []
  for i, file in enumerate(sorted(path.relative_to(whole) for path in whole.rglob('*') if path.is_file())):
    copy = tmp_path / str(i)
    shutil.copytree(whole, copy)
    data = bytearray((copy / file).read_bytes())
    (copy / file).unlink()
    if damage == 'one bit':
      data[len(data) // 2] ^= 1
      (copy / file).write_bytes(data)
    elif damage == 'second half cut':
      (copy / file).write_bytes(data[: len(data) // 2])
    try:
      with ocp.Checkpointer(checkpoint.Handler()) as checkpointer:
        restored = checkpointer.restore(copy, args=checkpoint.Restore(abstract(state)))
    except (ValueError, FileNotFoundError) as error:
      errors.append(str(error))
    else:
      # A file of which nothing was needed.
      assert_same_bits(restored, state)
  gc.collect()  # What Orbax leaves behind, here and not in the next test.
  # Manifest, tree, description and arrays, at the least.
  assert len(errors) >= 4
  assert all('damaged' in error or checkpoint.FILE_NAME in error for error in errors)


def test_a_damaged_array_that_can_be_read_is_named(tmp_path, saved):
  folder, state = saved
  copy = tmp_path / 'copy'
  shutil.copytree(folder / '4' / 'default', copy)
  text = json.loads((copy / checkpoint.FILE_NAME).read_text())
  text['arrays'][TRACE]['checksum'] ^= 1
  (copy / checkpoint.FILE_NAME).write_text(json.dumps(text))
  with ocp.Checkpointer(checkpoint.Handler()) as checkpointer, pytest.raises(ValueError, match=f'damaged.*: {TRACE}$'):
    checkpointer.restore(copy, args=checkpoint.Restore(abstract(state)))


def test_cut_bytes_of_flax_are_an_error(saved):
  _, state = saved
  data = serialization.to_bytes(state)
  for size in (0, 10, len(data) // 2, len(data) - 1):
    with pytest.raises(ValueError, match=r'incomplete input|Unpack failed'):
      serialization.from_bytes(state, data[:size])


@pytest.mark.parametrize(
  'x',
  [
    jnp.arange(6).reshape(2, 3),
    jnp.linspace(0, 1, 7),
    jnp.ones((3, 5), jnp.bfloat16),
    jnp.array([True, False]),
    jnp.arange(-3, 4).astype(jnp.int4),
    jax.random.key(3),
    np.arange(5, dtype=np.int64),
    np.linspace(0, 1, 3),
    np.float64(0.5),
    jnp.zeros((0, 3)),
  ],
  ids=str,
)
def test_checksums_tell_values_and_places_apart(x):
  checksum = lambda x: _description.describe({'x': x}, '')['arrays']['x']['checksum']
  assert checksum(x) == checksum(x)
  # Of the bits, whoever holds them; but JAX has no 64 bits here.
  if isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    assert checksum(x) == checksum(np.asarray(x))
  if np.size(x) > 1 and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    values = np.asarray(x)
    assert checksum(np.roll(values, 1)) != checksum(x) or np.all(values == values.flat[0])
    changed = values.copy()
    changed.flat[-1] = changed.flat[0] if changed.flat[-1] != changed.flat[0] else 0
    assert checksum(changed) != checksum(x)


# ---------------------------------------------------------------------------------------------------------------------
# Meshes
# ---------------------------------------------------------------------------------------------------------------------

# Devices along the two axes, and how the kernel is split.
PLACES = {
  'one device': ((1, 1), P()),
  'two, replicated': ((2, 1), P()),
  'four, by rows': ((4, 1), P('x', None)),
  'eight, by columns': ((1, 8), P(None, 'y')),
  'eight, by both': ((4, 2), P('x', 'y')),
}


def placed(place, tree, params, axis_type=AxisType.Auto):
  sizes, spec = PLACES[place]
  mesh = jax.make_mesh(sizes, ('x', 'y'), axis_types=(axis_type,) * 2, devices=jax.devices()[: sizes[0] * sizes[1]])
  specs = {'layer': {'kernel': spec, 'bias': P()}, 'scale': P()}
  return lpmm.shardings(tree, params, specs, mesh)


@pytest.mark.parametrize('axis_type', [AxisType.Explicit, *slow(AxisType.Auto)], ids=lambda t: t.name)
@pytest.mark.parametrize('name', ['microbatches', *slow('sgdm', 'adamw, int4')])
def test_a_checkpoint_of_any_mesh_is_restored_onto_any_other(tmp_path, name, axis_type):
  _, state, _ = trained(name)
  for place in PLACES:
    where = placed(place, state, state[0], axis_type)
    with manager(tmp_path / place) as m:
      m.save(0, args=checkpoint.Save(jax.device_put(state, where)))
      for other_place in PLACES:
        # All pairs would take a minute.
        if len({place, other_place} & {'one device', 'eight, by both'}) == 1:
          target = placed(other_place, state, state[0], axis_type)
          restored = m.restore(0, args=checkpoint.Restore(abstract(state, target)))
          assert_same_bits(restored, state)
          jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f'{x.sharding}'), restored, target
          )


@pytest.mark.parametrize('place', PLACES)
def test_a_state_is_sharded_as_its_parameters(place):
  tx = lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.adamw(0.01))
  params = lpmm.quantize(DENSE, lpmm.INT8)
  state = tx.init(params)
  where_params, where_state = placed(place, (params, state), params)
  kernel = where_params['layer']['kernel']
  for field in ('mu', 'nu'):
    moment = optax.tree.get(where_state, field)['layer']
    assert moment['kernel'].codes == kernel.codes
    assert moment['bias'] == where_params['layer']['bias']
  sizes, spec = PLACES[place]
  assert kernel.codes.shard_shape((64, 256)) == tuple(
    n // {'x': sizes[0], 'y': sizes[1]}.get(name, 1) for n, name in zip((64, 256), (*spec, None, None), strict=False)
  )
  assert where_state[1].step.spec == where_state[1].key.spec == P()
  # Four scales per row, which eight devices cannot share.
  assert kernel.scales.spec == (P(None, None) if place == 'eight, by columns' else kernel.codes.spec)
  initialised = jax.jit(tx.init, out_shardings=where_state)(jax.device_put(params, where_params))
  jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f'{x.sharding}'), initialised, where_state
  )


def test_state_that_is_kept_below_a_parameter_is_sharded_as_it_is():
  zeros = lambda params: jax.tree.map(lambda p: {'m': jnp.zeros_like(p)}, params)
  inner = optax.GradientTransformation(zeros, lambda updates, state, params=None: (updates, state))
  params = lpmm.quantize({'layer': {'kernel': jnp.ones((64, 256))}}, lpmm.INT8)
  state = lpmm.low_precision(inner).init(params)
  mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
  where = lpmm.shardings(state, params, P('x', None), mesh).inner_state['layer']['kernel']['m']
  assert where.codes.spec == where.scales.spec == P('x', None)


@pytest.mark.parametrize(
  ('specs', 'message'),
  [
    ({'layer': P('x', None)}, 'a PartitionSpec per parameter'),
    ({'layer': {'kernel': 'x', 'bias': P()}, 'scale': P()}, "^layer/kernel: expected a PartitionSpec, got 'x'"),
    ({'layer': {'kernel': P(None, None, 'x'), 'bias': P()}, 'scale': P()}, '^layer/kernel: .* more axes'),
    ({'layer': {'kernel': P('x', None), 'bias': P()}, 'scale': P('x')}, '^scale: .* more axes'),
    ({'layer': {'kernel': P('z', None), 'bias': P()}, 'scale': P()}, '^layer/kernel: .*z'),
  ],
  ids=str,
)
def test_specs_that_do_not_fit_are_named(specs, message):
  params = lpmm.quantize(DENSE, lpmm.INT8)
  mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
  with pytest.raises(ValueError, match=message):
    lpmm.shardings(params, params, specs, mesh)


def test_a_shape_that_a_mesh_cannot_split_is_named():
  params = {'w': jnp.ones((6, 4))}
  mesh = jax.make_mesh((4,), ('x',), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  with pytest.raises(ValueError, match=r'^w: .* does not split the shape \(6, 4\) over Mesh'):
    lpmm.shardings(params, params, P('x'), mesh)
