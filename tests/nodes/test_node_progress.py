"""What the user sees while a node runs, cancelling, and what the memory manager is asked for."""

import gc
import weakref

import pytest
import torch
from host_double import InterruptProcessingException, NotOnDevice
from node_pictures import boxes, noise
from node_schemas import EMBEDDED
from PIL import Image

from mimicbrush_core.modules import parts_of

H, W = 72, 96
SOURCE, MASK = noise(1, H, W), boxes(H, W, (20, 20))


@pytest.fixture
def fresh(pack, model):
    """A reference whose features are not computed yet."""
    return pack.call("EncodeReference", model=model, picture=noise(1, 40, 40)).reference


def processors(pack, model):
    blocks = pack.core("attention").reading_blocks
    unets = (model.model.modules.unet, model.model.modules.reference_unet)
    return [block.attn1.processor for unet in unets for block in blocks(unet).values()]


# --- progress ----------------------------------------------------------------------------------------------


def test_progress_rises_to_the_total(host, sample, fresh):
    sample(noise(3, H, W), MASK, reference=fresh, steps=6, at_once=2)
    [bar] = host.bars
    # Six features, four at once; then six steps for each of two chunks.
    assert bar.values == [4, *range(6, 19)]
    assert {total for _, total, _ in bar.updates} == {18}


def test_a_reference_that_is_known_is_not_counted_again(host, sample, fresh):
    sample(SOURCE, MASK, reference=fresh, steps=4)
    sample(SOURCE, MASK, reference=fresh, steps=4, seed=1)
    assert host.bars[1].values == [1, 2, 3, 4] and host.bars[1].updates[-1][1] == 4


def test_frames_that_are_left_alone_are_not_counted(host, sample, reference):
    sample(SOURCE, boxes(H, W, (20, 20), None, None), reference=reference, steps=2, at_once=1)
    assert host.bars[0].values[-1] == host.bars[0].updates[-1][1] == 2 + 2


def test_a_quick_edit_still_shows_a_preview(host, sample, model, reference):
    sample(SOURCE, MASK, reference=reference)
    kind, picture, side = host.bars[0].previews[0]
    assert kind == "JPEG" and isinstance(picture, Image.Image) and picture.size == (128, 128) and side == 512


def test_previews_show_the_picture_as_it_becomes(host, sample, pack, monkeypatch):
    monkeypatch.setattr(pack.part("host"), "PREVIEW_SHARE", float("inf"))  # all of them
    result = sample(noise(1, 128, 128), boxes(128, 128, (40, 40), side=48), steps=3)
    previews = host.bars[0].previews
    assert len(previews) == 3
    last = torch.frombuffer(bytearray(previews[-1][1].tobytes()), dtype=torch.uint8).view(128, 128, 3) / 255
    assert (last - result.raw[0]).abs().max() <= 1 / 255 + 1e-6


def test_previews_take_a_tenth_of_the_time_at_most(host, sample, pack, monkeypatch):
    now = 0.0
    preview = pack.core("systems.mimicbrush").MimicBrush.preview

    def slow_preview(self, latents):
        nonlocal now
        now += 1.0
        return preview(self, latents)

    def slow_features(bar):
        nonlocal now
        now += 1.0  # each step

    monkeypatch.setattr(pack.core("systems.mimicbrush").MimicBrush, "preview", slow_preview)
    monkeypatch.setattr(pack.part("host").time, "monotonic", lambda: now)
    host.on_update = slow_features
    sample(SOURCE, MASK, steps=40)
    shown = len(host.bars[0].previews)
    assert 4 <= shown <= 0.12 * now


# --- cancelling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 7])
def test_cancelling_stops_at_once_and_leaves_the_model_as_it_was(pack, host, sample, model, fresh, at):
    """After `at` updates: while the reference's features are written (1), and while sampling."""
    settings = {"steps": 8, "seed": 3, "guidance": 2.0}
    expected = sample(SOURCE, MASK, **settings).image
    own = processors(pack, model)
    host.reset()
    host.on_update = lambda bar: host.interrupt() if len(bar.updates) == at else None
    with pytest.raises(InterruptProcessingException) as raised:
        sample(SOURCE, MASK, reference=fresh, **settings)
    assert type(raised.value) is InterruptProcessingException and raised.value.__cause__ is None
    assert len(host.bars[0].updates) == at
    assert processors(pack, model) == own and not host.interrupted
    host.reset()
    assert torch.equal(sample(SOURCE, MASK, **settings).image, expected)
    again = sample(SOURCE, MASK, reference=fresh, **settings).image  # what was computed of it is whole
    untouched = pack.call("EncodeReference", model=model, picture=noise(1, 40, 40)).reference
    assert torch.equal(again, sample(SOURCE, MASK, reference=untouched, **settings).image)


def test_cancelling_before_the_first_step_is_noticed(host, sample):
    host.interrupt()
    with pytest.raises(InterruptProcessingException):
        sample(SOURCE, MASK, steps=2)
    assert host.bars == []


def test_encoding_and_depth_can_be_cancelled(pack, host, model):
    for node, inputs in (("EncodeReference", {"picture": noise(2, 40, 40)}), ("DepthCondition", {"source": SOURCE})):
        host.interrupt()
        with pytest.raises(InterruptProcessingException):
            pack.call(node, model=model, **inputs)


# --- memory ------------------------------------------------------------------------------------------------


def test_the_stand_in_notices_what_was_not_brought(host, model):
    with pytest.raises(NotOnDevice):
        model.model.estimate_depth(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())
    model.bring("depth").estimate_depth(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())
    model.bring("unet", "reference")
    with pytest.raises(NotOnDevice):
        model.model.estimate_depth(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())


@pytest.mark.parametrize("zoom", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
def test_no_node_uses_a_part_it_did_not_bring(pack, host, model, zoom, drawn):
    """The stand-in's device holds the parts of the last request only; all chains must run on it."""
    inputs = {"depth_picture": noise(1, H, W)} if drawn else {}
    reference = pack.call("EncodeReference", model=model, picture=noise(2, 40, 40)).reference
    depth = pack.call("DepthCondition", model=model, source=SOURCE, strength=0.5, **inputs).depth
    given = {"model": model, "source": SOURCE, "mask": MASK, "zoom": zoom, "guidance": 2.0}
    for one in (None, depth):
        pack.call("Sampler", reference=reference, depth=one, **given)
    assert [len(load.models) for load in host.loads][1:] == [1, 3, 4 if zoom else 3]


def test_the_depth_network_is_brought_for_the_models_constants_only_once(pack, host):
    model = pack.call("Load", model_name=EMBEDDED).model
    for _ in range(2):
        pack.call("EncodeReference", model=model, picture=noise(2, 40, 40))
    assert [len(load.models) for load in host.loads] == [3, 2]


def test_parts_are_brought_whole_and_with_room_for_the_work(host, sample, fresh):
    host.reset()
    rooms = []
    for count, at_once in ((1, 4), (4, 4), (16, 16), (16, 4)):
        sample(noise(count, 16, 16), boxes(16, 16, (0, 0), side=9), reference=fresh, at_once=at_once)
        rooms.append(host.loads[-1].memory)
    assert all(load.whole for load in host.loads)
    assert 50e6 < rooms[0] <= rooms[1] < rooms[2] and rooms[1] == rooms[3]


def test_the_manager_knows_every_part_of_every_system(pack):
    host = pack.part("host")
    assert host.PART_GROUPS.keys() == host.FOLDERS.keys() > {"mimicbrush"}
    for system, groups in host.PART_GROUPS.items():
        assert sorted(name for names in groups.values() for name in names) == sorted(parts_of({"system": system}))


def test_nothing_of_a_model_stays_when_the_host_lets_its_wires_go(pack, host):
    model = pack.call("Load", model_name=EMBEDDED).model
    reference = pack.call("EncodeReference", model=model, picture=noise(1, 40, 40)).reference
    given = {"model": model, "reference": reference, "source": SOURCE, "mask": MASK}
    result = pack.call("Sampler", **given)
    gone = [weakref.ref(one) for one in (model, model.model, model.model.modules.unet, reference[0].reference)]
    del model, reference, given
    host.reset()
    gc.collect()
    assert [one() for one in gone] == [None] * 4
    assert result.image.isfinite().all()
