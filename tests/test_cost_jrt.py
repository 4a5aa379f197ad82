"""The accountant of JRT-RNN against the model (parameters) and counted matrix products, and the published sizes."""

import pytest
import torch
from matrix_products import MatrixProducts
from tiny_jrt import tiny_jrt, tokens

from varidepth import JRTConfig, JRTForCausalLM
from varidepth.analysis.cost import count_parameters, forward_flops, full_routing
from varidepth.analysis.jrt_cost import jrt_flops
from varidepth.modeling import prefix_linear_attention, window_blocks


SHAPES = {
    "taylor": {},
    "elu": {"feature_map": "elu"},
    "softmax, grouped": {"feature_map": "softmax", "num_key_value_heads": 2},
    "causal": {"prefix_length": 0},
    "untied, other taps": {"tie_word_embeddings": False, "conv_kernel_size": 4, "sliding_window": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_equal_those_of_the_model(shape):
    model = tiny_jrt(**SHAPES[shape])
    assert count_parameters(model.config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_flops_equal_those_counted(shape):
    model = tiny_jrt(attention="eager", **SHAPES[shape])
    ids = tokens(1, 150)
    for length in (2, 40, 150):
        with MatrixProducts() as counted:
            model(ids[:, :length], use_cache=False)
        assert counted.flops == forward_flops(model.config, full_routing(model.config, length)).total
    cache = None
    for start, stop in ((0, 90), (90, 91), (91, 100), (100, 101)):
        with MatrixProducts() as counted:
            cache = model(ids[:, start:stop], cache=cache, use_cache=True, logits_to_keep=1).cache
        assert counted.flops == jrt_flops(model.config, stop - start, start, logits=1).total


@torch.no_grad()
def test_flops_of_long_rows_in_blocks(monkeypatch):
    model = tiny_jrt(attention="eager")
    monkeypatch.setattr(prefix_linear_attention, "BLOCK_TOKENS", 128)
    with MatrixProducts() as counted:
        model(tokens(1, 300), use_cache=False)
    window = jrt_flops(model.config, 300).attention
    assert counted.flops == jrt_flops(model.config, 300).total
    # windows cost the same for each token behind the first block
    monkeypatch.setattr(window_blocks, "BLOCK_TOKENS", 100)
    assert jrt_flops(model.config, 300).attention == 4 * 32 * 100 * (100 + 2 * 104) < window


def test_published_sizes():
    assert count_parameters(JRTConfig.preset("360m")).total == 356_578_304
    assert count_parameters(JRTConfig.preset("1.3b")).total == 1_375_143_168
    with torch.device("meta"):
        model = JRTForCausalLM(JRTConfig.preset("360m"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 356_578_304
