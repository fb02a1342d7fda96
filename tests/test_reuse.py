"""Work that is not done twice: the same numbers, bit for bit, from less of it."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mimicbrush_core.reuse import KeptTokens, SharedStart, shared_modules
from mimicbrush_core.systems.mimicbrush import MimicBrush

TIMESTEP = torch.tensor(501)


@pytest.fixture
def unet(alt_unets):
    return alt_unets[0]


@pytest.fixture
def inputs(golden):
    """Two equal rows [2,13,h,w] and their two kinds of tokens [2,T,D]."""
    step = golden("alt_step")
    names = ("latents", "mask", "masked_image_latents", "depth_feature")
    one = torch.cat([step[f"in.{name}"] for name in names], 1)[:, :, :16, :24]
    return one.repeat(2, 1, 1, 1), torch.cat([step["in.uncond_embeds"], step["in.cond_embeds"]])


@torch.no_grad()
def predict(unet, inputs, tokens=None):
    return unet(inputs[0], TIMESTEP, encoder_hidden_states=inputs[1] if tokens is None else tokens).sample


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def tokens_flops(unet, tokens):
    """Of projecting tokens to keys and values, everywhere."""
    widths = [block.attn2.to_k.weight.shape for block in unet.modules() if hasattr(block, "attn2")]
    return sum(2 * 2 * tokens.shape[0] * tokens.shape[1] * rows * columns for rows, columns in widths)


def test_kept_tokens_change_nothing(unet, inputs):
    plain = predict(unet, inputs)
    with KeptTokens(unet):
        assert torch.equal(predict(unet, inputs), plain)
        assert torch.equal(predict(unet, inputs), plain)


def test_kept_tokens_are_projected_once(unet, inputs):
    plain = flops(lambda: predict(unet, inputs))
    with KeptTokens(unet):
        assert flops(lambda: predict(unet, inputs)) == plain
        assert flops(lambda: predict(unet, inputs)) == plain - tokens_flops(unet, inputs[1])


def test_other_tokens_are_noticed(unet, inputs):
    others = inputs[1].flip(1) * 2
    expected = predict(unet, inputs, others)
    with KeptTokens(unet):
        predict(unet, inputs)
        assert torch.equal(predict(unet, inputs, others), expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_few_tokens_serve_many_rows(unet, inputs, rows):
    """Each row of tokens serves as many rows in a row as the batch has more."""
    batch, tokens = inputs[0].repeat(2, 1, 1, 1) * torch.tensor([1, 2, 3, 4])[:, None, None, None], inputs[1][:rows]
    expected = predict(unet, (batch, tokens.repeat_interleave(4 // rows, 0)))
    with KeptTokens(unet):
        assert (predict(unet, (batch, tokens)) - expected).abs().max() <= 1e-5


def test_the_shared_start_changes_nothing(unet, inputs):
    plain = predict(unet, inputs)
    with SharedStart(unet) as start:
        for start.on in (True, False, True):
            assert torch.equal(predict(unet, inputs), plain)


def test_the_shared_start_is_computed_for_one_row(unet, inputs):
    ran = []
    hooks = [
        module.register_forward_hook(lambda module, given, output: ran.append((module, given[0][:1].clone())))
        for module in shared_modules(unet)
    ]
    whole = flops(lambda: predict(unet, inputs))
    for hook in hooks:
        hook.remove()
    one_row = sum(flops(partial(module, given)) for module, given in ran)
    with SharedStart(unet) as start:
        start.on = True
        assert one_row > 0 and flops(lambda: predict(unet, inputs)) == whole - one_row


def test_rows_that_differ_must_not_be_shared(unet, inputs):
    """The switch is the caller's: where the halves differ, sharing would show."""
    different = inputs[0].clone()
    different[1] *= 2
    plain = predict(unet, (different, inputs[1]))
    with SharedStart(unet) as start:
        assert torch.equal(predict(unet, (different, inputs[1])), plain)
        start.on = True
        assert not torch.equal(predict(unet, (different, inputs[1]))[1], plain[1])


@pytest.mark.parametrize("patch", [KeptTokens, SharedStart])
def test_the_unet_is_left_as_it_was(unet, inputs, patch):
    before = predict(unet, inputs)
    processors = [module.processor for module in unet.modules() if hasattr(module, "processor")]
    with pytest.raises(KeyboardInterrupt), patch(unet) as entered:
        entered.on = True
        predict(unet, inputs)
        raise KeyboardInterrupt
    assert processors == [module.processor for module in unet.modules() if hasattr(module, "processor")]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    assert torch.equal(predict(unet, (inputs[0] * torch.tensor([1, 2])[:, None, None, None], inputs[1]))[0], before[0])


def test_the_no_depth_feature_is_computed_once_for_each_size(monkeypatch):
    model = MimicBrush.load()
    projected = []
    forward = model.modules.depth_projector.forward
    monkeypatch.setattr(
        model.modules.depth_projector, "forward", lambda *given: projected.append(given[1]) or forward(*given)
    )
    first = model.no_depth_feature((32, 32))
    assert model.no_depth_feature((32, 32)) is first
    model.no_depth_feature((16, 16))
    assert projected == [(32, 32), (16, 16)]
    model.to("cpu")  # other weights may have come: constants are forgotten
    assert torch.equal(model.no_depth_feature((32, 32)), first) and len(projected) == 3
