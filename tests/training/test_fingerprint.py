import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_attention.training.fault_tolerance.integrity import fingerprints

DTYPES = [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, jnp.bool_]


def some(dtype, seed=0, shape=(16, 24)):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2, shape), dtype)


def flipped(x, place):
    """`x` with the lowest bit of one element flipped."""
    x = np.asarray(x).copy()
    x.view(np.uint8).reshape(*x.shape, x.dtype.itemsize)[(*place, 0)] ^= 1
    return jnp.asarray(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_flipped_bit_anywhere_changes_it(dtype):
    x = some(dtype)
    random = np.random.default_rng(1)
    for _ in range(5):
        place = random.integers(0, 16), random.integers(0, 24)
        assert fingerprints({"x": x}) != fingerprints({"x": flipped(x, place)})


def test_the_same_change_in_two_places_and_two_swapped_values_change_it():
    x = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    negated, swapped = x.copy(), x.copy()
    negated[2:6] *= -1
    swapped[[1, 3]] = x[[3, 1]]
    assert len({fingerprints({"x": jnp.asarray(each)})["x"] for each in (x, negated, swapped, x.T)}) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_does_not_depend_on_where_the_array_lies(dtype):
    x = some(dtype)
    meshes = [Mesh(np.array(jax.devices()[:2]), ("a",)), Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))]
    placed = [x, *(jax.device_put(x, NamedSharding(mesh, P("a", *mesh.axis_names[1:]))) for mesh in meshes)]
    assert len({fingerprints({"x": each})["x"] for each in placed}) == 1


def test_arrays_are_named_by_their_paths_and_random_keys_count():
    names = fingerprints({"params": {"w": jnp.ones(3)}, "keys": (jax.random.key(1), jax.random.key(2))})
    assert sorted(names) == ["keys.0", "keys.1", "params.w"]
    assert names["keys.0"] != names["keys.1"]
