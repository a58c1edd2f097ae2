"""FLOPs of products and kernels in HLO text, against sums over ones and by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sft_jax.planning.hlo import parse
from sft_jax.planning.kernel_flops import causal_share, kernel_flops
from sft_jax.planning.product_flops import flops_at_rate


def flops_of(function, *shapes, dtype=jnp.float32, double_rate=()):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    program = parse(jax.jit(function).lower(*arguments).as_text(dialect="hlo"))
    return flops_at_rate(program, program.entry, double_rate)


CONVOLUTIONS = [
    {"padding": [(0, 0), (0, 0)]},
    {"padding": [(1, 2), (2, 1)]},
    {"padding": [(-1, 2), (0, -1)]},
    {"padding": [(2, 1), (1, 1)], "window_strides": (2, 3)},
    {"padding": [(1, 1), (0, 2)], "lhs_dilation": (3, 1)},
    {"padding": [(4, 0), (1, 1)], "rhs_dilation": (2, 3)},
    {"padding": [(1, 2), (3, 1)], "window_strides": (2, 1), "lhs_dilation": (2, 3), "rhs_dilation": (1, 2)},
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (1, 2)])
def test_flops_of_a_convolution_are_those_of_ones(options, groups):
    """The outputs of a convolution of ones count the pairs that meet; padding and holes of a dilated input do not."""
    features, batches = groups
    options = {"window_strides": (1, 1)} | options

    def convolve(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, dimension_numbers=numbers, feature_group_count=features, batch_group_count=batches, **options
        )

    shapes = (2, 7, 8, 4), (3, 2, 4 // features, 6)
    pairs = convolve(*(jnp.ones(shape) for shape in shapes)).sum()
    assert flops_of(convolve, *shapes) == 2 * pairs > 0


def test_flops_of_a_dot():
    """Batch sizes count once, contracted ones once per output."""
    assert flops_of(lambda x, y: jnp.einsum("bijk,bkjl->bil", x, y), (2, 3, 5, 7), (2, 7, 5, 11)) == (
        2 * 2 * 3 * 11 * 5 * 7
    )


# As the TPU compiler writes a batch of 8 products [4, 16] · [16, 32] (stride and dilation pair the batches), and an
# outer product.
BATCH = """
%inner (x: bf16[8,4,16], w: bf16[8,16,32]) -> bf16[8,4,32] {
  %x = bf16[8,4,16]{2,1,0} parameter(0)
  %w = bf16[8,16,32]{2,1,0} parameter(1)
  ROOT %c = bf16[8,4,32]{2,1,0} convolution(%x, %w), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}

%outer (x: bf16[4,1,16], w: bf16[4,8,16]) -> f32[4,8] {
  %x.1 = bf16[4,1,16]{2,1,0} parameter(0)
  %w.1 = bf16[4,8,16]{2,1,0} parameter(1)
  %nested = bf16[8,4,32]{2,1,0} fusion(%x, %w), kind=kOutput, calls=%inner
  ROOT %c.1 = f32[4,8]{1,0} convolution(%x.1, %w.1), window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=b0f_o0i->b0
}

ENTRY %main (x: bf16[8,4,16]) -> bf16[8,4,32] {
  %x.2 = bf16[8,4,16]{2,1,0} parameter(0)
  ROOT %f = bf16[8,4,32]{2,1,0} fusion(%x.2), kind=kOutput, calls=%outer
}
"""


def test_flops_of_batches_and_outer_products():
    program = parse(BATCH)
    assert flops_at_rate(program, "inner", ()) == 8 * 2 * 4 * 16 * 32
    assert flops_at_rate(program, "main", ()) == 8 * 2 * 4 * 16 * 32 + 2 * 4 * 8 * 16


@pytest.mark.parametrize(("double_rate", "share"), [((), 1), (("s8",), 1 / 2), (("f8e4m3fn",), 1)])
def test_a_dtype_of_twice_the_rate_counts_half(double_rate, share):
    def multiply(x, y):
        return lax.dot(x, y, preferred_element_type=jnp.int32)

    whole = 2 * 4 * 8 * 16
    assert flops_of(multiply, (4, 8), (8, 16), dtype=jnp.int8, double_rate=double_rate) == whole * share
    assert flops_of(jnp.dot, (4, 8), (8, 16), double_rate=double_rate) == whole


KERNEL = """
ENTRY %main () -> f32[] {{
  %mask = s8[1,{grid}]{{2,1,0}} constant(0)
  %q = bf16[3,8,2048,128]{{3,2,1,0}} constant(0)
  %k = bf16[3,2,2048,128]{{3,2,1,0}} constant(0)
  %v = bf16[3,2,2048,64]{{3,2,1,0}} constant(0)
  %segments = s32[3,2048,128]{{2,1,0}} constant(0)
  %kernel.1 = {result} custom-call(%mask, %q, /*index=2*/%k, %v, %segments), custom_call_target="tpu_custom_call", \
frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q{suffix}\\": 512, \\"block_kv{suffix}\\": 512, \\"q_layout\\": 1}}"
}}}}, metadata={{op_name="jit(f)/splash_mha_{phase}_segmented"}}, backend_config={{"custom_call_config":{{}}}}
  ROOT %one = f32[] constant(1)
}}
"""
PAIRS = 3 * 8 * 2048 * 2048  # of queries and keys, all heads


@pytest.mark.parametrize(
    ("phase", "result", "widths"),
    [
        ("fwd", "bf16[3,8,2048,64]{3,2,1,0}", 128 + 64),
        ("dq", "(f32[3,512,128]{2,1,0}, bf16[3,8,2048,128]{3,2,1,0})", 128 + 64 + 128),
        ("dkv", "(bf16[3,2,2048,128]{3,2,1,0}, bf16[3,2,2048,64]{3,2,1,0})", 128 + 64 + 64 + 128),
        ("dkv", "(bf16[3,4,8,2048,128]{4,3,2,1,0}, bf16[3,2,2048,64]{3,2,1,0})", 128 + 64 + 64 + 128 + 128),
    ],
)
def test_flops_of_splash_attention(phase, result, widths):
    """Values of another head dim than keys (128 and 64); ten of sixteen blocks; the fused kernel also writes dq."""
    suffix = "" if phase == "fwd" else f"_{phase}"
    program = parse(KERNEL.format(phase=phase, result=result, suffix=suffix, grid="4,4"))
    kernel = program["main"].instructions["kernel.1"]
    found = kernel_flops(program["main"], kernel)
    assert found is not None
    assert (found.flops, found.share, found.is_attention) == (2 * PAIRS * 10 / 16 * widths, 10 / 16, True)


@pytest.mark.parametrize(("phase", "grid"), [("fwd", "4,2"), ("dkv", "2,4")])
def test_flops_of_a_sliding_window_are_those_of_its_grid(phase, grid):
    suffix = "" if phase == "fwd" else "_dkv"
    text = KERNEL.format(phase=phase, result="bf16[3,8,2048,64]{3,2,1,0}", suffix=suffix, grid=grid)
    program = parse(text)
    found = kernel_flops(program["main"], program["main"].instructions["kernel.1"])
    assert found is not None
    assert found.share == (1 + 2 + 2 + 2) / 16


@pytest.mark.parametrize("phase", ["fwd", "dq"])
def test_queries_may_have_their_length_last(phase):
    """Layout 2 is ``[H, T]``."""
    suffix = "" if phase == "fwd" else "_dq"
    text = KERNEL.format(phase=phase, result="bf16[3,8,2048,64]{3,2,1,0}", suffix=suffix, grid="4,4")
    turned = text.replace("%q = bf16[3,8,2048,128]", "%q = bf16[3,8,128,2048]").replace(
        'q_layout\\": 1', 'q_layout\\": 2'
    )
    assert turned.count("2048]") == text.count("2048]") + 1
    found = [
        kernel_flops(body, body.instructions["kernel.1"]) for body in (parse(one)["main"] for one in (text, turned))
    ]
    assert found[0] == found[1] is not None


def test_share_of_causal_blocks():
    assert causal_share(2048, 2048, (2048, 2048)) == 1
    assert causal_share(2048, 2048, (1024, 512)) == (2 + 4) / 8
    assert causal_share(2048, 2048, (512, 512), height=3) == (3 + 3 + 2 + 1) / 16
    assert causal_share(1024, 4096, (512, 512)) == (4 + 8) / 16  # a quarter of the queries, spread over the sequence


OTHER = """
ENTRY %main () -> f32[] {
  %a.1 = bf16[64,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"body":"x","cost_estimate":{"transcendentals":"0","flops":"4096","bytes_accessed":"1"}}}
  %b.1 = bf16[64,64]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"flags":{}}
  ROOT %one = f32[] constant(1)
}
"""


def test_flops_of_other_kernels_are_their_own_estimate():
    body = parse(OTHER)["main"]
    found = kernel_flops(body, body.instructions["a.1"])
    assert found is not None
    assert (found.flops, found.is_attention, found.share) == (4096, False, 1)
    assert kernel_flops(body, body.instructions["b.1"]) is None
