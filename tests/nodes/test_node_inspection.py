"""Reference Reliance and Correspondence: the same edit as the sampler's, what is shown of it, cancelling."""

import pytest
import torch
from host_double import InterruptProcessingException
from node_pictures import boxes, noise

H, W = 72, 96
SOURCE, MASK = noise(1, H, W), boxes(H, W, (20, 20))
NODES = ("Reliance", "Correspondence")


@pytest.fixture
def look(pack, model, reference):
    """look(node, **inputs): with this module's model and reference, on SOURCE and MASK."""

    def run(node, **inputs):
        given = {"model": model, "reference": reference, "source": SOURCE, "mask": MASK}
        return pack.call(node, **given | inputs)

    return run


@pytest.fixture
def refusal(pack):
    return pack.core("errors").ArgumentError


def marks(*places):
    """A mask with a dot of 3 x 3 pixels around each (x, y)."""
    mask = torch.zeros(1, H, W)
    for x, y in places:
        mask[0, y - 1 : y + 2, x - 1 : x + 2] = 1
    return mask


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize(
    "inputs",
    [{}, {"steps": 3, "guidance": 3.0, "seed": 5, "sampler": "dpmpp_2m", "scheduler": "trailing"}, {"zoom": True}],
)
def test_the_edit_is_the_sampler_s(look, sample, node, inputs):
    expected = sample(SOURCE, MASK, **inputs).image
    assert torch.equal(look(node, **inputs).image, expected)


@pytest.mark.parametrize("node", NODES)
def test_depth_and_acceleration_count_as_in_the_sampler(pack, model, look, sample, node):
    source, mask = noise(1, 300, 300), boxes(300, 300, (100, 100))
    inputs = {
        "depth": pack.call("DepthCondition", model=model, source=noise(2, 300, 300, seed=3)).depth,
        "acceleration": pack.call("Acceleration", deep_every=2).acceleration,
        "steps": 3,
        "zoom": True,
    }
    shown = look(node, source=source, mask=mask, **inputs).image
    assert shown.shape == source.shape
    assert (shown - sample(source, mask, **inputs).image[:1]).abs().max() <= 1 / 255 + 1e-6
    assert not torch.equal(shown, look(node, source=source, mask=mask, steps=3, zoom=True).image)


def test_reliance_is_a_mask_and_a_picture(look):
    result = look("Reliance")
    assert result.reliance.shape == (1, H, W) and result.reliance.dtype == torch.float32
    assert result.reliance.min() > 0 and result.reliance.max() <= 1
    assert result.overlay.shape[0] == 1 and result.overlay.shape[2:] == (512, 3)  # enlarged, a legend below
    assert 512 * H // W < result.overlay.shape[1] < 512 and result.overlay.min() >= 0 and result.overlay.max() <= 1
    assert (look("Reliance", blocks="fine").reliance != look("Reliance", blocks="coarse").reliance).any()


def test_of_a_batch_the_first_picture_is_looked_at(look):
    batch = {"source": noise(3, H, W), "mask": boxes(H, W, (20, 20), (40, 60), (30, 30))}
    for node in NODES:
        assert torch.equal(look(node, **batch).image, look(node).image)


def test_points_are_spread_or_marked(look):
    spread = look("Correspondence", points=3).drawing
    assert spread.shape[0] == 1 and spread.shape[1] > 512 and spread.shape[2] > 900  # the edit beside the reference
    marked = look("Correspondence", points=3, marks=marks((30, 30), (34, 25))).drawing
    again = look("Correspondence", points=9, marks=marks((30, 30), (34, 25))).drawing
    assert torch.equal(marked, again) and not torch.equal(marked, spread)


def test_what_cannot_be_looked_at_is_refused(look, refusal, host):
    large = {"source": noise(1, 300, 300), "mask": boxes(300, 300, (10, 10)), "zoom": True}
    beyond = torch.nn.functional.pad(marks((90, 50)), (200, 4, 200, 28))
    for node, inputs, message in (
        ("Reliance", {"blocks": "deepest"}, "blocks is 'deepest'"),
        ("Reliance", {"start": 0.5}, "None of the 1 steps lies between"),
        ("Correspondence", large | {"marks": beyond}, "outside of the window"),
    ):
        with pytest.raises(refusal, match=message):
            look(node, **inputs)
    assert host.bars == []


@pytest.mark.parametrize("node", NODES)
def test_it_shows_progress_and_can_be_cancelled(host, look, node):
    look(node, steps=5)
    [bar] = host.bars
    assert bar.values[-1] == bar.updates[-1][1] >= 5
    host.on_update = lambda bar: host.interrupt()
    with pytest.raises(InterruptProcessingException):
        look(node, steps=5, seed=1)
    host.on_update = lambda bar: None
    assert look(node, steps=5, seed=1).image.shape == SOURCE.shape
