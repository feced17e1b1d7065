import re

import jax
import numpy as np
import pytest

import ring_attention as ra
from ring_attention.parallel.mesh import AXES, resolve_mesh_shape


def test_make_mesh_forms_one_ring_by_default():
    mesh = ra.make_mesh()
    assert dict(mesh.shape) == dict(dp=1, fsdp=1, sp=8, tp=1)
    assert mesh.axis_names == AXES
    assert mesh.devices.ravel().tolist() == jax.devices()


def test_make_mesh_varies_tp_fastest():
    devices = jax.devices()[::-1]
    mesh = ra.make_mesh(dp=2, sp=2, tp=2, devices=devices)
    np.testing.assert_array_equal(mesh.devices, np.array(devices).reshape(2, 1, 2, 2))
    assert mesh.devices[0, 0, 0].tolist() == devices[:2]  # tp: neighbours
    assert mesh.devices[0, 0, :, 0].tolist() == devices[:4:2]


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        (dict(sp=2, fsdp=-1), (1, 4, 2, 1)),
        (dict(dp=-1, sp=1), (8, 1, 1, 1)),
        (dict(dp=2, fsdp=2, sp=-1, tp=2), (2, 2, 1, 2)),
        (dict(sp=4, tp=2), (1, 1, 4, 2)),
    ],
    ids=str,
)
def test_make_mesh_gives_minus_one_what_others_leave(sizes, want):
    assert tuple(ra.make_mesh(**sizes).shape.values()) == want


def test_make_mesh_takes_some_of_the_devices():
    mesh = ra.make_mesh(devices=jax.devices()[2:5])
    assert dict(mesh.shape) == dict(dp=1, fsdp=1, sp=3, tp=1)
    assert mesh.devices.ravel().tolist() == jax.devices()[2:5]


def test_mesh_shape_is_resolved_without_devices():
    assert resolve_mesh_shape(dict(dp=4, sp=-1), 4096) == dict(dp=4, sp=1024)
    assert resolve_mesh_shape(dict(dp=4, sp=8), 32) == dict(dp=4, sp=8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            dict(sp=3),
            "mesh dp=1, fsdp=1, sp=3, tp=1 needs exactly 3 devices, got 8; change the sizes or pass devices=",
        ),
        (
            dict(tp=3),
            "mesh dp=1, fsdp=1, sp=-1, tp=3 needs a multiple of 3 devices, got 8; change the sizes or pass devices=",
        ),
        (
            dict(dp=-1),
            "mesh has dp=-1, fsdp=1, sp=-1, tp=1, need whole positive sizes, or -1 once; use 1 to leave an axis out",
        ),
        (
            dict(sp=0),
            "mesh has dp=1, fsdp=1, sp=0, tp=1, need whole positive sizes, or -1 once; use 1 to leave an axis out",
        ),
        (
            dict(sp=-2),
            "mesh has dp=1, fsdp=1, sp=-2, tp=1, need whole positive sizes, or -1 once; use 1 to leave an axis out",
        ),
    ],
    ids=str,
)
def test_make_mesh_refuses_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ra.make_mesh(**sizes)
