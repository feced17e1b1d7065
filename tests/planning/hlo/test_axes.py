import pytest
from hlo_texts import BACK, MESH, RING, TPU_RING, hlo

from ring_attention.planning.hlo.transfers import collectives_by_axis


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "sp"),
        ("replica_groups=[2,4]<=[8]", "sp"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "fsdp"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "fsdp"),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "sp"),  # a part of it
        ("replica_groups=[1,8]<=[8]", "fsdp+sp"),
        ("replica_groups={}", "fsdp+sp"),
        ("replica_groups={{0,5},{1,4},{2,7},{3,6}}", "?"),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", "?"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "sp"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", "sp"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", "sp"),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_0','axis_1'}", "fsdp+sp"),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", "?"),
    ],
)
def test_axes_of_reads_every_notation(groups, axes):
    text = hlo(f"  %p = f32[4] parameter(0)\n  ROOT %r = f32[4] all-reduce(%p), channel_id=1, {groups}, to_apply=%a")
    (row,) = collectives_by_axis(text, MESH)
    assert (row.kind, row.axes, row.runs, row.bytes) == ("all-reduce", axes, 1, 16)


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [(RING, "sp"), (BACK, "sp"), ("source_target_pairs={{0,4},{4,0}}", "fsdp"), ("source_target_pairs={{0,1}}", "sp")]
    + [("source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}", "fsdp+sp")]
    + [("source_target_pairs={{0,5},{5,0}}", "?")],
)
def test_axes_of_a_permute_are_those_of_its_rings(pairs, axes):
    text = hlo(f"  %p = f32[4] parameter(0)\n  ROOT %r = f32[4] collective-permute(%p), {pairs}")
    assert [row.axes for row in collectives_by_axis(text, MESH)] == [axes]


def test_axes_of_refuses_devices_beyond_the_mesh():
    with pytest.raises(ValueError, match="mesh_shape has 4 devices, but .* is for device 7; pass the shape"):
        collectives_by_axis(TPU_RING, dict(dp=1, fsdp=1, sp=4, tp=1))
