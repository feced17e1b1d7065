"""The fused kernels bind private functions of JAX by what these take, not by the number of the release."""

import re

import jax
import jax.numpy as jnp
import pytest

from ring_attention.attention.kernels import cudnn, splash, splash_calls
from ring_attention.attention.kernels.contract import require_signature
from ring_attention.attention.mask_spec import MaskSpec

Q = {
    "cudnn": jax.ShapeDtypeStruct((1, 4, 256, 64), jnp.bfloat16),
    "splash": jax.ShapeDtypeStruct((1, 4, 256, 64), "float32"),
}
ADAPTERS = {"cudnn": cudnn, "splash": splash}
LIBRARIES = {"cudnn": cudnn._library(), "splash": splash_calls.library()}
LOOKS = [cudnn._require_bindings, splash_calls.require_bindings]
BOUND = {
    "cudnn": ["_dot_product_attention_fwd_cuda_lowering", "_dot_product_attention_bwd_cuda_lowering"],
    "splash": ["_splash_attention_forward", "_splash_attention_bwd_dq", "_splash_attention_bwd_dkv", "SegmentIds"],
}
EACH = [(kernel, name) for kernel, names in BOUND.items() for name in names]


@pytest.fixture(autouse=True)
def _look_again():
    for look in LOOKS:
        look.cache_clear()
    yield
    for look in LOOKS:
        look.cache_clear()


@pytest.mark.parametrize("kernel", ADAPTERS)
def test_kernels_fit_the_installed_jax_whatever_its_number(kernel, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "9.9.9")
    ADAPTERS[kernel].check(MaskSpec(scale=1.0), Q[kernel])


@pytest.mark.parametrize(("kernel", "name"), EACH)
def test_kernels_refuse_a_function_that_needs_another_argument(kernel, name, monkeypatch):
    monkeypatch.setattr(LIBRARIES[kernel], name, lambda *, brand_new: None)
    with pytest.raises(ValueError, match=f'impl="{kernel}" does not fit jax .* needs brand_new .*use impl="xla", or'):
        ADAPTERS[kernel].check(MaskSpec(scale=1.0), Q[kernel])


@pytest.mark.parametrize(("kernel", "name"), EACH)
def test_kernels_refuse_a_function_that_is_gone(kernel, name, monkeypatch):
    monkeypatch.delattr(LIBRARIES[kernel], name)
    with pytest.raises(ValueError, match=f'impl="{kernel}" does not fit jax .*{name}.*; use impl="xla"'):
        ADAPTERS[kernel].check(MaskSpec(scale=1.0), Q[kernel])


def test_cudnn_leaves_out_score_modifiers_where_jax_has_none(monkeypatch):
    def older(ctx, query, scale): ...
    def newer(ctx, query, scale, score_mod_name, score_mod_jaxpr): ...

    for lowering, expected in {older: {}, newer: dict(score_mod_name=None, score_mod_jaxpr=None)}.items():
        monkeypatch.setattr(cudnn._library(), "_dot_product_attention_fwd_cuda_lowering", lowering)
        assert cudnn._new_settings() == expected


def test_require_signature_says_what_is_missing_and_unknown():
    def renamed(q, *, window, bias=None):
        return q, window, bias

    with pytest.raises(ValueError, match=re.escape("renamed needs window and does not know width; use")):
        require_signature("made up", renamed, ["q", "width"])
    require_signature("made up", renamed, ["q", "window"])
    require_signature("made up", lambda *operands, **settings: None, ["q", "width"])
