"""What the tests of planning/hlo share: compiled programs as text, cut down or put together line by line."""

from ring_attention.hardware.chips import CHIPS

V5E, H100 = CHIPS["v5e"], CHIPS["h100"]
MESH = dict(dp=1, fsdp=2, sp=4, tp=1)
RING = "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}"
BACK = "source_target_pairs={{0,3},{1,0},{2,1},{3,2},{4,7},{5,4},{6,5},{7,6}}"
"""Hops to the next device along sp, and to the one before."""

HEAD = "HloModule program, is_scheduled=true, num_partitions=8\n"
X = "  %x = f32[1000] parameter(0)\n"
ONE = 4000 / 45e9
"""What is sent, and the seconds that it takes a link of a v5e, alone."""


def hlo(lines: str, called: str = "") -> str:
    """A program whose entry has these lines."""
    return f"{HEAD}\n{called}\n\nENTRY %main (p: f32[4]) -> f32[4] {{\n{lines.rstrip()}\n}}\n"


def send(name: str, operand: str, pairs: str = RING, more: str = "", of: str = "f32[1000]") -> str:
    """A line that starts to send an operand."""
    return f"  %{name} = ({of}, {of}) collective-permute-start(%{operand}), {pairs}{more}\n"


def receive(name: str, of: str = "f32[1000]") -> str:
    """A line that awaits what was started."""
    return f"  %{name}.end = {of} collective-permute-done(%{name})\n"


def kernel(name: str, seconds: float) -> str:
    """A line of work that takes a v5e so long."""
    size = round(seconds * V5E.memory_bandwidth / 4) - 1000
    return f'  %{name} = f32[{size}] custom-call(%x), custom_call_target="tpu_custom_call"\n'


# The forward pass of a ring on v5e:2x4 as libtpu 0.0.42 compiled it, cut down to one kernel, types and names as there.
TPU_RING = (
    HEAD
    + """
%body (wide.param.0: (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128])) -> (s32[]) {
  %constant.332 = s32[]{:T(128)} constant(1)
  %wide.param.0 = (s32[]{:T(128)}, bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)}, \
bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)}, /*index=3*/bf16[1,8,1024,128]{3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.1048 = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.0), index=1
  %copy.149 = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)S(1)} copy(%get-tuple-element.1048)
  %collective-permute-start = (bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)S(1)}, \
bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%copy.149), channel_id=1, RING, \
metadata={op_name="jit(fb)/jvp(jit(run))/shard_map/while/body/closed_call/ppermute" stack_frame_id=23}
  %get-tuple-element.1049 = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.0), index=2
  %collective-permute-start.1 = (bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)}, bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%get-tuple-element.1049), channel_id=1, RING, \
metadata={op_name="jit(fb)/jvp(jit(run))/shard_map/while/body/closed_call/ppermute" stack_frame_id=23}
  %get-tuple-element.1044 = s32[]{:T(128)} get-tuple-element(%wide.param.0), index=0
  %fusion.111 = bf16[8,1024,128]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.0), index=3
  %splash_mha_fwd_residuals.17 = (bf16[8,1024,128]{2,1,0:T(8,128)(2,1)S(1)}, f32[8,1024,128]{2,1,0:T(8,128)S(1)}) \
custom-call(%fusion.111, %copy.149), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256, \\"block_kv\\": 256}"
}}, metadata={op_name="jit(fb)/jvp(jit(run))/shard_map/while/body/closed_call/splash_mha_fwd_residuals/pallas_call"}, \
backend_config={"custom_call_config":{"body":"AAAA","cost_estimate":{"flops":"2147483648","transcendentals":"2097152"}}}
  %add.584 = s32[]{:T(128)} add(%get-tuple-element.1044, %constant.332)
  %collective-permute-done = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} \
collective-permute-done(%collective-permute-start)
  %collective-permute-done.1 = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} \
collective-permute-done(%collective-permute-start.1)
  ROOT %tuple.248 = (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128]) \
tuple(%add.584, %collective-permute-done, %collective-permute-done.1, %fusion.111)
}

%condition (wide.param.9: (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128])) -> pred[] {
  %constant.323 = s32[]{:T(128)} constant(6)
  %wide.param.9 = (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128]) parameter(0)
  %get-tuple-element.759 = s32[]{:T(128)} get-tuple-element(%wide.param.9), index=0
  ROOT %lt.226 = pred[]{:T(512)} compare(%get-tuple-element.759, %constant.323), direction=LT
}

ENTRY %main (k: bf16[1,4,1024,128], v: bf16[1,4,1024,128], q: bf16[1,8,1024,128]) -> bf16[1,4,1024,128] {
  %zero = s32[]{:T(128)} constant(0)
  %k = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %v = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %q = bf16[1,8,1024,128]{3,2,1,0:T(8,128)(2,1)} parameter(2)
  %copy.1 = s32[]{:T(128)} copy(%zero)
  %tuple.246 = (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128]) tuple(%copy.1, %k, %v, %q)
  %while.44 = (s32[], bf16[1,4,1024,128], bf16[1,4,1024,128], bf16[1,8,1024,128]) while(%tuple.246), \
condition=%condition, body=%body, metadata={op_name="jit(fb)/jvp(jit(run))/shard_map/while"}
  ROOT %out = bf16[1,4,1024,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%while.44), index=1
}
""".replace("RING", RING)
)


# An all-gather that libtpu runs in pieces beside a matrix product; from a training step on v5e:2x4.
PIECES = """
%fused_computation.727 (param_0.2719: bf16[1,128,4,128]) -> (bf16[1,128,4,128], bf16[1,1024,4,128], s32[2]) {
  %param_0.2719 = bf16[1,128,4,128]{3,1,2,0} parameter(0)
  %all-gather.147 = bf16[1,1024,4,128]{3,1,2,0} all-gather(%param_0.2719), channel_id=20, \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="3"}
  ROOT %custom-call.25 = (bf16[1,128,4,128], bf16[1,1024,4,128], s32[2]) custom-call(%all-gather.147), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.648 (param_0.2724: bf16[1,128,4,128], param_9: bf16[1024,512], param_10: bf16[1024,1024]) \
-> (bf16[1024,512], bf16[1,128,4,128], bf16[1,1024,4,128]) {
  %param_10 = bf16[1024,1024]{1,0} parameter(2)
  %param_9 = bf16[1024,512]{1,0} parameter(1)
  %convolution.139 = bf16[1024,512]{1,0} convolution(%param_10, %param_9), dim_labels=bf_io->bf
  %param_0.2724 = bf16[1,128,4,128] parameter(0)
  %all-gather.149 = bf16[1,1024,4,128] all-gather(%param_0.2724), channel_id=20, replica_groups={{0,1,2,3,4,5,6,7}}, \
dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="3"}
  ROOT %tuple.718 = (bf16[1024,512], bf16[1,128,4,128], bf16[1,1024,4,128]) \
tuple(%convolution.139, %param_0.2724, %all-gather.149)
}

%fused_computation.729 (param_0.2727: bf16[1,128,4,128]) -> bf16[1,1024,4,128] {
  %param_0.2727 = bf16[1,128,4,128] parameter(0)
  %all-gather.151 = bf16[1,1024,4,128] all-gather(%param_0.2727), channel_id=20, replica_groups={{0,1,2,3,4,5,6,7}}, \
dimensions={1}, use_global_device_ids=true, frontend_attributes={chain_id="3"}
  ROOT %custom-call.27 = bf16[1,1024,4,128] custom-call(%param_0.2727, %all-gather.151), \
custom_call_target="AsyncCollectiveDone"
}
"""


PIECES_CALLED = """  %p0 = bf16[1,128,4,128]{3,1,2,0} parameter(0)
  %p1 = bf16[1024,512]{1,0} parameter(1)
  %p2 = bf16[1024,1024]{1,0} parameter(2)
  %async-collective-start.3 = (bf16[1,128,4,128]{3,1,2,0}, bf16[1,1024,4,128]{3,1,2,0}, s32[2]{0}) fusion(%p0), \
kind=kCustom, calls=%fused_computation.727
  %part = bf16[1,128,4,128]{3,1,2,0} get-tuple-element(%async-collective-start.3), index=0
  %fusion.648 = (bf16[1024,512]{1,0}, bf16[1,128,4,128]{3,1,2,0}, bf16[1,1024,4,128]{3,1,2,0}) \
fusion(%part, %p1, %p2), kind=kOutput, calls=%async_collective_fusion.648
  %other = bf16[1,128,4,128]{3,1,2,0} get-tuple-element(%fusion.648), index=1
  ROOT %async-collective-done.3 = bf16[1,1024,4,128]{3,1,2,0} fusion(%other), kind=kCustom, calls=%fused_computation.729
"""
