import pytest
from hlo_texts import MESH, PIECES, PIECES_CALLED, V5E, X, hlo, receive, send

from ring_attention.planning.hlo.peak_times import PeakTimes, flops_of
from ring_attention.planning.hlo.program import Program
from ring_attention.planning.hlo.transfers import transfers


def test_peak_times_of_a_gather_in_pieces_are_none():
    program = Program.parse(hlo(PIECES_CALLED, PIECES))
    times, entry = PeakTimes(program, V5E), program.computations["ENTRY"]
    taken = {name: times.of("ENTRY", x).seconds for name, x in entry.items() if x.opcode == "fusion"}
    assert taken == {
        "%async-collective-start.3": 0,
        "%fusion.648": pytest.approx(2 * 1024 * 1024 * 512 / V5E.flops),
        "%async-collective-done.3": 0,
    }


BRANCHES = """
%short (a: f32[1000]) -> f32[1000] {
  %a = f32[1000] parameter(0)
  ROOT %a2 = f32[1000] negate(%a)
}

%long (b: f32[1000]) -> f32[1000] {
  %b = f32[1000] parameter(0)
  %b2 = f32[1000] negate(%b)
  ROOT %b3 = f32[1000] negate(%b2)
}

%test (i: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  ROOT %yes = pred[] custom-call(%i), custom_call_target="anything"
}
"""


def test_peak_times_take_the_longest_branch_and_one_turn():
    lines = """  %x = f32[1000] parameter(0)
  %which = s32[] constant(0)
  %c = f32[1000] conditional(%which, %x, %x), branch_computations={%short, %long}
  %called = f32[1000] call(%x), to_apply=%short
  %w = f32[1000] while(%x), condition=%test, body=%long
  %w3 = f32[1000] while(%x), condition=%test, body=%long, backend_config={"known_trip_count":{"n":"3"}}
"""
    program = Program.parse(hlo(lines, BRANCHES))
    times, one = PeakTimes(program, V5E), 8000 / V5E.memory_bandwidth
    found = {name: times.of("ENTRY", x) for name, x in program.computations["ENTRY"].items()}
    assert [found[name].seconds for name in ("%c", "%called", "%w", "%w3")] == pytest.approx(
        [2 * one, one, 2 * one, 6 * one]
    )
    assert [found[name].unknown_loops for name in ("%c", "%w", "%w3")] == [0, 1, 0]
    beside = send("k", "x") + lines.partition("\n")[2] + receive("k")
    (permute,) = transfers(hlo(X + beside, BRANCHES), V5E, MESH)
    assert (permute.unknown_loops, permute.compute_seconds) == (1, pytest.approx(11 * one))


def _flops(line: str, *operands: str) -> float:
    given = "".join(f"  %p{i} = {shape} parameter({i})\n" for i, shape in enumerate(operands))
    names = ", ".join(f"%p{i}" for i in range(len(operands)))
    program = Program.parse(hlo(given + "  " + line.replace("(...)", f"({names})")))
    return flops_of(program, "ENTRY", program.root("ENTRY"))


def test_flops_of_dots_and_convolutions():
    dot = "ROOT %d = f32[4,512,128] dot(...), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
    assert _flops(dot + "rhs_contracting_dims={1}", "f32[4,512,256]", "f32[4,256,128]") == 2 * 4 * 512 * 128 * 256
    plain = "ROOT %c = bf16[1024,2048] convolution(...), dim_labels=bf_io->bf"
    assert _flops(plain, "bf16[1024,512]", "bf16[512,2048]") == 2 * 1024 * 512 * 2048
    heads = (
        "ROOT %c = bf16[1024,4,128] convolution(...), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_i0o->b0f"
    )
    assert _flops(heads, "bf16[1024,700,1]", "bf16[700,4,128]") == 2 * 1024 * 700 * 4 * 128
    out = "ROOT %c = bf16[1024,900,1] convolution(...), window={size=8}, dim_labels=b0f_0io->bf0"
    assert _flops(out, "bf16[1024,8,128]", "bf16[8,128,900]") == 2 * 1024 * 900 * 8 * 128
    image = "ROOT %c = f32[1,5,3] convolution(...), window={size=3 pad=1_1 stride=2}, dim_labels=b0f_0io->b0f"
    assert _flops(image, "f32[1,9,2]", "f32[3,2,3]") == 2 * 3 * 2 * (3 * 5 - 2)  # two of 15 meet the padding


def _cudnn(backward: bool, mask: str, window: int = 0) -> str:
    shape = (
        '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["1", "32", "8192", "4096"], "layout": {}}'
    )
    config = f'{{"fmha_scale": 0.08, {shape}, "mask_type": "{mask}", "sliding_window_length": {window}}}'
    return (
        f'ROOT %a = (bf16[1,32,8192,128], u8[0]) custom-call(...), custom_call_target="__cudnn$fmhaSoftmax'
        f'{"Backward" * backward}", backend_config={{"cudnn_fmha_backend_config": {config}}}'
    )


@pytest.mark.parametrize(("backward", "times"), [(False, 4), (True, 10)])
def test_flops_of_cudnn_follow_its_scores_and_mask(backward, times):
    arrays = ("bf16[1,32,8192,128]", "bf16[1,8,4096,128]")
    full = times * 32 * 8192 * 4096 * 128
    assert _flops(_cudnn(backward, "NO_MASK"), *arrays) == full
    assert _flops(_cudnn(backward, "CAUSAL"), *arrays) == full / 2
    assert _flops(_cudnn(backward, "CAUSAL", 512), *arrays) == full / 8


def test_flops_of_cublas_and_of_unknown_calls():
    gemm = (
        'ROOT %g = (bf16[64,96], s8[1000]) custom-call(...), custom_call_target="__cublas$gemm", backend_config={'
        '"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"rhs_contracting_dimensions":["0"]}}}'
    )
    assert _flops(gemm, "bf16[64,32]", "bf16[32,96]") == 2 * 64 * 32 * 96
    assert _flops('ROOT %o = f32[8] custom-call(...), custom_call_target="other"', "f32[8]") == 0


@pytest.mark.parametrize(
    ("line", "tpu_bytes"),
    [
        ("%y = f32[64,1000]{1,0:T(8,128)} negate(%p)", 2 * 256_000),
        ("%y = f32[64,1000]{1,0:T(8,128)S(1)} negate(%p)", 256_000),
        ("%y = f32[1000]{0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,1000}", 2 * 4000),
        ("%y = f32[64,1000]{1,0} dynamic-update-slice(%p, %u, %i)", 2 * 4000),
        ("%y = f32[1000]{0} fusion(%p, %i), kind=kLoop, calls=%sliced", 2 * 4000),
        ("%y = f32[64,1000]{1,0} fusion(%p, %u, %i), kind=kLoop, calls=%updated", 2 * 4000),
        ("%y = f32[64,1000]{1,0} copy-done(%p)", 0),
        ("%y = f32[64,1000]{1,0} bitcast(%p)", 0),
    ],
)
def test_peak_times_count_bytes_of_hbm_and_of_slices(line, tpu_bytes):
    called = """%sliced (a: f32[64,1000], b: s32[]) -> f32[1000] {
  %a = f32[64,1000] parameter(0)
  %b = s32[] parameter(1)
  %s = f32[1,1000] dynamic-slice(%a, %b), dynamic_slice_sizes={1,1000}
  ROOT %n = f32[1000] negate(%s)
}

%updated (c: f32[64,1000], d: f32[1,1000], e: s32[]) -> f32[64,1000] {
  %c = f32[64,1000] parameter(0)
  %d = f32[1,1000] parameter(1)
  %e = s32[] parameter(2)
  ROOT %o = f32[64,1000] dynamic-update-slice(%c, %d, %e)
}
"""
    given = """  %p = f32[64,1000]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %u = f32[1,1000]{1,0} parameter(2)
"""
    program = Program.parse(hlo(given + f"  {line}\n", called))
    seconds = PeakTimes(program, V5E).of("ENTRY", program.computations["ENTRY"]["%y"]).seconds
    assert seconds * V5E.memory_bandwidth == pytest.approx(tpu_bytes, abs=1e-3)
