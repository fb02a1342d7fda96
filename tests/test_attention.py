"""Reading references inside self-attention: the merged form, the plain ones, weights, rows, restoring."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from mimicbrush_core import attention
from mimicbrush_core.attention import CpuTrainingAttention, ReferenceFeatures, ReferenceReading, reading_blocks
from mimicbrush_core.references import write_features

TIMESTEP = 741


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def query_key_value(tokens=70, size=8, batch=2, heads=3, seed=0):
    return tuple(draw(batch, heads, tokens, size, seed=seed + index) for index in range(3))


def some_references(weights, size=8, batch=2, heads=3):
    result = []
    for index, weight in enumerate(weights):
        tokens = (70, 33, 129)[index % 3]
        key = 1.5 * draw(batch, heads, tokens, size, seed=10 + index)
        result.append((key, draw(batch, heads, tokens, size, seed=20 + index), weight))
    return result


def defined_blend(query, key, value, references):
    """The definition, in float64: half plain attention, half attention over everything, weights on keys."""
    query, key, value = query.double(), key.double(), value.double()
    scores = [query @ key.mT / math.sqrt(query.shape[-1])]
    plain = scores[0].softmax(-1) @ value
    values = [value]
    for ref_key, ref_value, weight in references:
        scores.append(query @ ref_key.double().mT / math.sqrt(query.shape[-1]) + math.log(weight))
        values.append(ref_value.double())
    joint = torch.cat(scores, -1).softmax(-1) @ torch.cat(values, -2)
    return 0.5 * joint + 0.5 * plain


# -------------------- the arithmetic


@pytest.mark.parametrize("weights", ((1.0,), (0.3,), (4.0,), (1.0, 1.0), (0.5, 2.0, 1.0)))
@pytest.mark.parametrize("size", (8, 5))
def test_both_forms_are_the_defined_blend(weights, size):
    query, key, value = query_key_value(size=size)
    references = some_references(weights, size=size)
    expected = defined_blend(query, key, value, references)
    for blend in (attention.blend_by_merging, attention.blend_by_two_calls):
        assert (blend(query, key, value, references) - expected).abs().max() <= 1e-5, blend.__name__


def test_order_of_references_does_not_matter():
    query, key, value = query_key_value()
    references = some_references((0.5, 2.0, 1.0))
    forward = attention.blend_by_merging(query, key, value, references)
    backward = attention.blend_by_merging(query, key, value, references[::-1])
    assert torch.allclose(forward, backward, atol=1e-5)


@pytest.mark.parametrize("queries_at_once", (7, 70, 1024))
def test_plain_fallback_equals_the_kernel(queries_at_once):
    query, key, value = query_key_value()
    key, value = key[:, :, :41], value[:, :, :41]
    output, lse = attention.attention_with_lse(query, key, value)
    plain, plain_lse = attention.plain_attention_with_lse(query, key, value, queries_at_once)
    expected = torch.logsumexp(query.double() @ key.double().mT / math.sqrt(8), -1)
    assert lse.dtype == plain_lse.dtype == torch.float32
    assert (output - plain).abs().max() <= 1e-5
    assert (lse - expected).abs().max() <= 1e-5 and (plain_lse - expected).abs().max() <= 1e-5


def test_merging_with_the_plain_fallback(monkeypatch):
    query, key, value = query_key_value()
    references = some_references((1.0, 0.5))
    expected = attention.blend_by_merging(query, key, value, references)
    monkeypatch.setattr(attention, "_lse_kernel", lambda query: attention.plain_attention_with_lse)
    merged = attention.blend_by_merging(query, key, value, references)
    assert torch.allclose(merged, expected, atol=1e-5)


def test_weight_is_a_bias_of_the_keys():
    query, key, value = query_key_value()
    ((ref_key, ref_value, _),) = some_references((1.0,))
    bias = torch.cat([torch.zeros(70), torch.full((ref_key.shape[2],), math.log(0.25))])
    keys, values = torch.cat([key, ref_key], 2), torch.cat([value, ref_value], 2)
    joint = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias[None, None, None])
    expected = 0.5 * joint + 0.5 * F.scaled_dot_product_attention(query, key, value)
    merged = attention.blend_by_merging(query, key, value, [(ref_key, ref_value, 0.25)])
    assert (merged - expected).abs().max() <= 1e-5


def test_a_reference_twice_is_the_reference_at_double_weight():
    query, key, value = query_key_value()
    ((ref_key, ref_value, _),) = some_references((1.0,))
    twice = attention.blend_by_merging(query, key, value, [(ref_key, ref_value, 1.0)] * 2)
    double = attention.blend_by_merging(query, key, value, [(ref_key, ref_value, 2.0)])
    assert torch.allclose(twice, double, atol=1e-5)


@pytest.mark.parametrize("scale", (1e-6, 60.0))
def test_extreme_scores_stay_finite(scale):
    query, key, value = query_key_value()
    ref_key, ref_value = scale * query.clone(), draw(*query.shape, seed=5)
    references = [(ref_key, ref_value, 1.0)]
    merged = attention.blend_by_merging(query, key, value, references)
    assert (merged - defined_blend(query, key, value, references)).abs().max() <= 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)))
def test_half_precision(dtype, tolerance):
    query, key, value = query_key_value()
    references = some_references((1.0, 0.5))
    expected = defined_blend(query, key, value, references)
    half = [(ref_key.to(dtype), ref_value.to(dtype), weight) for ref_key, ref_value, weight in references]
    for blend in (attention.blend_by_merging, attention.blend_by_two_calls):
        output = blend(query.to(dtype), key.to(dtype), value.to(dtype), half)
        assert output.dtype == dtype
        assert (output - expected).abs().max() <= tolerance
    _, lse = attention.plain_attention_with_lse(query.to(dtype), key.to(dtype), value.to(dtype))
    assert lse.dtype == torch.float32


def gradients(blend, tensors, weights):
    """What an arbitrary function of the blend gives to query, key, value and the references' keys and values."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    references = [(*leaves[3 + 2 * n : 5 + 2 * n], weight) for n, weight in enumerate(weights)]
    output = blend(*leaves[:3], references)
    towards = draw(*output.shape, seed=30).to(output.dtype)
    return torch.autograd.grad(output, leaves, towards)


@pytest.mark.parametrize("weights", ((1.0,), (0.3, 2.0)))
@pytest.mark.parametrize("scores_at_once", (1, 70 * 33 * 2, 1 << 20))
def test_gradients_on_the_cpu(monkeypatch, weights, scores_at_once):
    monkeypatch.setattr(attention._CpuAttention, "SCORES_AT_ONCE", scores_at_once)
    tensors = [*query_key_value(), *(t for reference in some_references(weights) for t in reference[:2])]
    expected = gradients(defined_blend, tensors, weights)
    found = gradients(attention.blend_by_merging, tensors, weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5
    halved = gradients(attention.blend_by_merging, [tensor.bfloat16() for tensor in tensors], weights)
    for ours, theirs in zip(halved, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_the_log_sum_exp_has_a_gradient_of_its_own():
    query, key, value = (tensor.requires_grad_() for tensor in query_key_value())
    _, lse = attention.attention_with_lse(query, key, value)
    found = torch.autograd.grad(lse.square().sum(), (query, key))
    expected = torch.logsumexp(query.double() @ key.double().mT / math.sqrt(8), -1)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), (query, key)), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5


# -------------------- inside a U-Net


@pytest.fixture
def unet(alt_unets):
    return alt_unets[0]


@pytest.fixture
def inputs(golden):
    """(model input [2,13,h,w], tokens [2,T,D])"""
    step = golden("alt_step")
    names = ("latents", "mask", "masked_image_latents", "depth_feature")
    one = torch.cat([step[f"in.{name}"] for name in names], 1)
    return torch.cat([one[:, :, :16, :24]] * 2), torch.cat([step["in.uncond_embeds"], step["in.cond_embeds"]])


@pytest.fixture
def banks(alt_unets, golden):
    step = golden("alt_step")
    latents = step["in.reference_latents"][:, :, :16, :24]
    return features(alt_unets[1], latents, step["in.cond_embeds"])


def features(reference_unet, latents, tokens):
    with torch.no_grad():
        return write_features(reference_unet, latents, torch.full((len(latents),), TIMESTEP), tokens)


def predict(unet, inputs, references=None, rows=None, grad=False):
    """The U-Net's answer; with references=None it is not patched at all."""
    with torch.set_grad_enabled(grad):
        if references is None:
            return unet(inputs[0], TIMESTEP, encoder_hidden_states=inputs[1]).sample
        with ReferenceReading(unet) as reading:
            reading.references, reading.reading_rows = references, rows
            return unet(inputs[0], TIMESTEP, encoder_hidden_states=inputs[1]).sample


def processors(unet):
    return {name: block.attn1.processor for name, block in reading_blocks(unet).items()}


def test_reading_blocks_are_middle_and_up_in_order_of_execution(unet, golden_meta, inputs):
    blocks = reading_blocks(unet)
    assert list(blocks) == golden_meta["alt_bank_pairs"]
    order = []
    hooks = [block.register_forward_hook(lambda *args, name=name: order.append(name)) for name, block in blocks.items()]
    predict(unet, inputs)
    for hook in hooks:
        hook.remove()
    assert order == list(blocks)


@pytest.mark.parametrize("how", ("no reference", "weight 0"))
def test_without_a_counting_reference_nothing_changes(unet, inputs, banks, how):
    references = [] if how == "no reference" else [ReferenceFeatures(banks, 0.0)]
    assert torch.equal(predict(unet, inputs, references), predict(unet, inputs))


def test_weight_0_beside_a_counting_reference(unet, inputs, banks):
    alone = predict(unet, inputs, [ReferenceFeatures(banks)])
    beside = predict(unet, inputs, [ReferenceFeatures(banks, 0.0), ReferenceFeatures(banks)])
    assert torch.equal(alone, beside)


def test_weight_leans_on_the_reference(unet, inputs, banks):
    plain = predict(unet, inputs)
    moved = [
        (predict(unet, inputs, [ReferenceFeatures(banks, weight)]) - plain).abs().mean()
        for weight in (1e-3, 0.1, 1.0, 10.0)
    ]
    assert moved == sorted(moved) and moved[0] < 0.1 * moved[2]


def test_processors_come_back(unet, inputs, banks):
    own, before = processors(unet), predict(unet, inputs)
    reading = ReferenceReading(unet)
    with reading:
        reading.references = [ReferenceFeatures(banks)]
        assert all(processor is not own[name] for name, processor in processors(unet).items())
    assert processors(unet) == own and not reading.references

    with pytest.raises(KeyError, match="mid_block"):
        predict(unet, inputs, [ReferenceFeatures({})])
    with pytest.raises(KeyboardInterrupt), ReferenceReading(unet):
        raise KeyboardInterrupt
    assert processors(unet) == own
    assert torch.equal(predict(unet, inputs), before)


def test_reading_rows(unet, inputs, banks):
    references = [ReferenceFeatures(banks)]
    plain, every = predict(unet, inputs), predict(unet, inputs, references)
    assert torch.equal(predict(unet, inputs, references, rows=2), every)
    last = predict(unet, inputs, references, rows=1)
    assert torch.equal(last[0], plain[0])
    assert torch.allclose(last[1], every[1], atol=1e-5)
    assert (every - plain).abs().amax((1, 2, 3)).min() > 0.1


def test_reference_of_another_size(unet, inputs, alt_unets, golden):
    step = golden("alt_step")
    larger = features(alt_unets[1], step["in.reference_latents"], step["in.cond_embeds"])
    references = [ReferenceFeatures(larger)]
    merged = predict(unet, inputs, references)
    assert merged.shape == (2, 4, 16, 24)
    assert torch.allclose(merged, predict(unet, inputs, references, grad=True), atol=1e-5)


def test_one_bank_for_a_whole_batch(unet, inputs, banks):
    repeated = {name: bank.repeat(2, 1, 1) for name, bank in banks.items()}
    one = predict(unet, inputs, [ReferenceFeatures(banks, 0.7)])
    assert torch.equal(one, predict(unet, inputs, [ReferenceFeatures(repeated, 0.7)]))


def test_a_batch_of_different_banks(unet, inputs, banks, alt_unets, golden):
    step = golden("alt_step")
    other = features(alt_unets[1], step["in.reference_latents"][:, :, 8:, 16:], step["in.cond_embeds"])
    both = {name: torch.cat([bank, other[name]]) for name, bank in banks.items()}
    together = predict(unet, inputs, [ReferenceFeatures(both)])
    for row, single in enumerate((banks, other)):
        expected = predict(unet, inputs, [ReferenceFeatures(single)])[row]
        assert torch.allclose(together[row], expected, atol=1e-5)


@pytest.mark.parametrize("weights", ((1.0,), (0.5, 2.0)))
def test_gradient_path_equals_inference_path(unet, inputs, banks, weights):
    references = [ReferenceFeatures(banks, weight) for weight in weights]
    merged = predict(unet, inputs, references, rows=1)
    differentiable = predict(unet, inputs, references, rows=1, grad=True)
    assert (merged - differentiable).abs().max() <= 2e-5


def test_gradient_reaches_every_bank_and_the_input(unet, inputs, banks):
    learned = {name: bank.clone().requires_grad_() for name, bank in banks.items()}
    latents = inputs[0].clone().requires_grad_()
    output = predict(unet, (latents, inputs[1]), [ReferenceFeatures(learned)], rows=1, grad=True)
    output[:1].sum().backward(retain_graph=True)
    assert all(bank.grad is None or not bank.grad.any() for bank in learned.values())
    output[1:].sum().backward()
    for name, bank in learned.items():
        assert bank.grad.isfinite().all() and bank.grad.any(), name
    assert latents.grad.isfinite().all() and latents.grad[1].any()


def test_training_on_the_cpu_computes_the_same(unet, alt_unets, inputs, golden):
    """Both U-Nets, with gradients, and their own processors afterwards."""
    step, reference_unet = golden("alt_step"), alt_unets[1]
    own = {id(layer): layer.processor for layer in every_attention(unet, reference_unet)}
    latents = step["in.reference_latents"][:, :, :16, :24].clone().requires_grad_()

    def learned():
        banks = write_features(reference_unet, latents, torch.tensor([TIMESTEP]), step["in.cond_embeds"])
        output = predict(unet, inputs, [ReferenceFeatures(banks)], rows=1, grad=True)
        return output, *torch.autograd.grad(output.square().sum(), latents)

    expected = learned()
    with pytest.raises(KeyboardInterrupt), CpuTrainingAttention(unet, reference_unet):
        assert not any(layer.processor is own[id(layer)] for layer in every_attention(unet, reference_unet))
        found = learned()
        raise KeyboardInterrupt
    assert {id(layer): layer.processor for layer in every_attention(unet, reference_unet)} == own
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def every_attention(*unets):
    return [module for one in unets for module in one.modules() if hasattr(module, "set_processor")]


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float16, 0.01), (torch.bfloat16, 0.06)))
def test_a_unet_in_half_precision(unet, inputs, banks, dtype, tolerance):
    # The float32 banks are cast on the way.
    half = copy.deepcopy(unet).to(dtype)
    references = [ReferenceFeatures(banks)]
    output = predict(half, tuple(tensor.to(dtype) for tensor in inputs), references, rows=1)
    assert output.dtype == dtype
    assert (output - predict(unet, inputs, references, rows=1)).abs().mean() <= tolerance
