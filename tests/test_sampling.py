"""The denoising loop: schedulers, spacings, explicit lists, seeds, batches, guidance, ranges of references."""

import pytest
import torch

from mimicbrush_core.errors import ArgumentError, Cancelled
from mimicbrush_core.modules import bundled_config
from mimicbrush_core.references import Reference, ReferenceUse
from mimicbrush_core.sampling import (
    MAX_STEPS,
    SCHEDULERS,
    SPACINGS,
    denoise,
    guide,
    initial_noise,
    make_scheduler,
    predicted_original,
)
from mimicbrush_core.systems.mimicbrush import SourceCondition

SIZE = 16
SPREAD = 0.5
MEAN = torch.linspace(-1, 1, 4).view(1, 4, 1, 1)
SCHEDULES = ("mimicbrush_sd15", "mimicbrush_small")


def schedule(name="mimicbrush_sd15", **changes):
    return {**bundled_config(name)["scheduler"], **changes}


def predictor(scheduler):
    """The exact model of normally distributed pictures (MEAN, SPREAD), in the schedule's terms."""

    def predict(latents, timestep):
        alpha = scheduler.alphas_cumprod[int(timestep)]
        noise_variance = 1 - alpha
        gain = alpha.sqrt() * SPREAD**2 / (alpha * SPREAD**2 + noise_variance)
        picture = MEAN + gain * (latents - alpha.sqrt() * MEAN)
        if scheduler.config.prediction_type == "v_prediction":
            return (alpha.sqrt() * latents - picture) / noise_variance.sqrt()
        return (latents - alpha.sqrt() * picture) / noise_variance.sqrt()

    return predict


def run(scheduler, noise, **options):
    return denoise(predictor(scheduler), noise, scheduler, **options)


def noises(count=2):
    return initial_noise(range(count), (4, 8, 8))


# -------------------- the loop on an exact model


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_reaches_the_exact_answer(name, config):
    # The exact flow maps noise to MEAN + SPREAD * noise.
    noise = noises()
    latents = run(make_scheduler(schedule(config), name, 120), noise)
    assert (latents - (MEAN + SPREAD * noise)).abs().max() < 0.1


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", (1, 2, 7))
def test_step_reports(name, steps):
    scheduler, infos = make_scheduler(schedule(), name, steps), []
    latents = run(scheduler, noises(), on_step=infos.append)
    assert [info.step for info in infos] == list(range(1, len(scheduler.timesteps) + 1))
    assert {info.steps for info in infos} == {len(scheduler.timesteps)}
    assert [info.timestep for info in infos] == scheduler.timesteps.tolist()
    assert all(info.predicted_latents.shape == latents.shape for info in infos)


# -------------------- spacings


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_spacing_of_every_scheduler_reaches_the_exact_answer(name, spacing, config):
    noise = noises()
    for steps in (1, 2, 7, 30, 120):
        scheduler = make_scheduler(schedule(config), name, steps, spacing)
        timesteps = scheduler.timesteps.double()
        assert len(timesteps) == steps
        # Karras levels lie so close where there is little noise that two may round to one timestep.
        assert (timesteps.diff() <= 0).all() and 0 <= timesteps[-1] <= timesteps[0] <= 999
        latents = run(scheduler, noise)
        assert latents.isfinite().all()
    # The error falls with the number of steps; 0.1 as for the schedulers' own spacing.
    assert (latents - (MEAN + SPREAD * noise)).abs().max() < 0.1


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("spacing", (None, *SPACINGS))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_most_steps_that_are_accepted_can_be_run(name, spacing, config):
    noise = initial_noise([0], (4, 1, 1))
    assert run(make_scheduler(schedule(config), name, MAX_STEPS, spacing), noise).isfinite().all()


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_spacing_is_the_models_own(name, config):
    plain = SCHEDULERS[name].from_config(schedule(config))
    plain.set_timesteps(10)
    own = schedule(config)["timestep_spacing"]
    for spacing in (None, own):
        scheduler = make_scheduler(schedule(config), name, 10, spacing)
        assert type(scheduler) is SCHEDULERS[name]
        assert torch.equal(scheduler.timesteps, plain.timesteps)
        assert scheduler.config.timestep_spacing == own and not scheduler.config.get("use_karras_sigmas")


def test_named_spacings_are_what_they_are_called():
    def timesteps(spacing):
        return make_scheduler(schedule(), "ddim", 4, spacing).timesteps.tolist()

    assert timesteps("leading") == [751, 501, 251, 1]
    assert timesteps("trailing") == [999, 749, 499, 249]
    assert timesteps("linspace") == [999, 666, 333, 0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_karras_spreads_the_seventh_roots_of_the_noise_levels_evenly(name):
    sigmas = make_scheduler(schedule(), name, 12, "karras").sigmas[:12].double() ** (1 / 7)
    gaps = sigmas.diff()
    assert gaps.max() < 0 and (gaps - gaps.mean()).abs().max() < 1e-3 * gaps.mean().abs()


def test_cancelling_in_a_report():
    calls = []

    def cancel(info):
        calls.append(info.step)
        if info.step == 2:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        run(make_scheduler(schedule(), "ddim", 5), noises(), on_step=cancel)
    assert calls == [1, 2]


@pytest.mark.parametrize("config", SCHEDULES)
@pytest.mark.parametrize("timestep", (999, 500, 1))
def test_predicted_original_inverts_the_noising(config, timestep):
    scheduler = make_scheduler(schedule(config), "ddim", 10)
    picture, noise = noises()[:1], noises()[1:]
    alpha = scheduler.alphas_cumprod[timestep]
    noised = alpha.sqrt() * picture + (1 - alpha).sqrt() * noise
    output = noise
    if scheduler.config.prediction_type == "v_prediction":
        output = alpha.sqrt() * noise - (1 - alpha).sqrt() * picture
    found = predicted_original(scheduler, output, torch.tensor(timestep), noised)
    assert torch.allclose(found, picture, atol=1e-4)


# -------------------- explicit lists


def sigma_of(scheduler, timesteps):
    alphas = scheduler.alphas_cumprod.double()[timesteps]
    return ((1 - alphas) / alphas).sqrt().tolist()


@pytest.mark.parametrize("name", ("ddim", "euler"))
def test_listed_timesteps_are_ddim(name):
    plain = make_scheduler(schedule(set_alpha_to_one=True), "ddim", 10)
    listed = make_scheduler(schedule(), name, timesteps=plain.timesteps.tolist())
    assert listed.timesteps.tolist() == plain.timesteps.tolist()
    expected = run(plain, noises())
    assert (run(listed, noises()) - expected).abs().max() < 1e-4


def test_listed_timesteps_end_at_no_noise():
    # The original's DDIM ends at the first timestep's noise (set_alpha_to_one false), 3 % of the signal.
    plain = make_scheduler(schedule(), "ddim", 10)
    listed = make_scheduler(schedule(), "ddim", timesteps=plain.timesteps.tolist())
    difference = (run(listed, noises()) - run(plain, noises())).abs().max()
    assert 0 < difference < 0.03


def test_listed_timesteps_of_the_small_model():
    plain = make_scheduler(schedule("mimicbrush_small"), "ddim", 10)
    listed = make_scheduler(schedule("mimicbrush_small"), "ddim", timesteps=plain.timesteps.tolist())
    assert (run(listed, noises()) - run(plain, noises())).abs().max() < 2e-3


def test_listed_sigmas_are_the_listed_timesteps():
    timesteps = [981, 700, 420, 141, 20]
    by_time = make_scheduler(schedule(), "ddim", timesteps=timesteps)
    by_sigma = make_scheduler(schedule(), "ddim", sigmas=[*sigma_of(by_time, timesteps), 0.0])
    assert len(by_sigma.timesteps) == 5
    assert torch.allclose(by_sigma.timesteps.float(), by_time.timesteps.float(), atol=0.01)
    assert torch.allclose(by_sigma.sigmas, by_time.sigmas, rtol=1e-4)


def test_a_sigma_list_may_end_early():
    scheduler = make_scheduler(schedule(), "euler", sigmas=[10.0, 3.0, 1.0])
    assert len(scheduler.timesteps) == 2 and scheduler.sigmas[-1] == 1.0


def test_lists_of_one_timestep():
    scheduler = make_scheduler(schedule(), "ddim", timesteps=[999])
    assert run(scheduler, noises()).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"name": "heun", "steps": 5}, "heun.*ddim, euler, dpmpp_2m, unipc"),
        ({"steps": 5, "spacing": "cosine"}, "cosine.*leading, trailing, linspace, karras"),
        ({"steps": 5, "spacing": ""}, "Unknown spacing ''"),
        ({"steps": 0}, "steps is 0.*1 and 500"),
        ({"steps": -3}, "steps is -3"),
        ({"steps": 1001}, "steps is 1001"),
        ({}, "exactly one"),
        ({"steps": 5, "timesteps": [3, 1]}, "exactly one"),
        ({"timesteps": [3, 1], "sigmas": [3.0, 0.0]}, "exactly one"),
        ({"timesteps": []}, "descending"),
        ({"timesteps": [100, 500]}, "descending.*100, 500"),
        ({"timesteps": [500, 500]}, "descending"),
        ({"timesteps": [1000, 500]}, "1000"),
        ({"timesteps": [500, -1]}, "-1"),
        ({"sigmas": [3.0]}, "descending"),
        ({"sigmas": [0.0, 3.0]}, "descending"),
        ({"sigmas": [3.0, -1.0]}, "-1"),
        ({"sigmas": [3.0, float("nan"), 0.0]}, "nan"),
        ({"sigmas": [float("inf"), 1.0, 0.0]}, "inf"),
        ({"name": "unipc", "timesteps": [500, 1]}, "unipc"),
        ({"name": "dpmpp_2m", "sigmas": [3.0, 0.0]}, "dpmpp_2m"),
        ({"timesteps": list(range(20))}, r"7, \.\.\."),
    ),
)
def test_refused_settings(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        make_scheduler(schedule(), **arguments)


# -------------------- seeds


def test_a_seed_is_the_same_noise_alone_and_in_a_batch():
    shape = (4, 8, 12)
    batch = initial_noise([5, 0, 2**63 - 1, 5], shape)
    assert batch.shape == (4, *shape) and batch.dtype == torch.float32 and batch.device.type == "cpu"
    for seed, noise in zip((5, 0, 2**63 - 1, 5), batch, strict=True):
        assert torch.equal(initial_noise([seed], shape)[0], noise)
    assert not torch.equal(batch[0], batch[1])


def test_drawing_noise_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    initial_noise([5], (4, 8, 8))
    assert torch.equal(torch.rand(3), expected)


def test_guidance_formula():
    unconditional, conditional = noises()
    assert torch.equal(guide(unconditional, conditional, 0.0), unconditional)
    assert torch.allclose(guide(unconditional, conditional, 1.0), conditional, atol=1e-6)
    expected = 5 * conditional - 4 * unconditional
    assert torch.allclose(guide(unconditional, conditional, 5.0), expected, atol=1e-5)


# -------------------- with the recorded networks


@pytest.fixture(scope="module")
def conditions(golden):
    """A recorded condition and (latents, tokens) of a reference, cut to small latents."""
    step = golden("step")

    def cut(name):
        return step[f"in.{name}"][:, :, :SIZE, :SIZE].contiguous()

    condition = SourceCondition(cut("mask"), cut("masked_image_latents"), cut("depth_feature"))
    return condition, cut("reference_latents"), step["in.cond_embeds"]


@pytest.fixture
def reference(model, conditions):
    return Reference(*conditions[1:], owner=model)


def sample(model, conditions, references, seeds=(3,), name="ddim", steps=3, guidance=5.0, spacing=None, **options):
    scheduler = make_scheduler(model.config["scheduler"], name, steps, spacing)
    noise = initial_noise(seeds, (4, SIZE, SIZE))
    return model.sample(conditions[0], references, noise, scheduler, guidance, **options)


@pytest.fixture
def rows_seen(model):
    """The batch sizes that the U-Net is called with."""
    rows = []
    hook = model.modules.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    yield rows
    hook.remove()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_runs_on_a_model(model, conditions, reference, name):
    latents = sample(model, conditions, [ReferenceUse(reference, 1.0)], name=name, steps=4)
    assert latents.shape == (1, 4, SIZE, SIZE) and latents.isfinite().all()
    assert 0.5 < latents.std() < 100


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_spacing_runs_on_a_model(model, conditions, reference, name, spacing):
    latents = sample(model, conditions, [ReferenceUse(reference)], name=name, steps=3, spacing=spacing)
    assert latents.shape == (1, 4, SIZE, SIZE) and latents.isfinite().all()
    assert reference.features_computed == 3


def test_a_batch_equals_its_pictures(model, conditions, reference, rows_seen):
    seeds = (3, 4, 5)
    together = sample(model, conditions, [ReferenceUse(reference, 1.0)], seeds)
    assert rows_seen == [6, 6, 6]
    for row, seed in enumerate(seeds):
        alone = sample(model, conditions, [ReferenceUse(reference, 1.0)], (seed,))
        assert (together[row] - alone[0]).abs().max() <= 1e-4 * alone.abs().max()


def test_guidance_1_evaluates_only_the_conditional_row(model, conditions, reference, rows_seen):
    one = sample(model, conditions, [ReferenceUse(reference, 1.0)], guidance=1.0)
    assert rows_seen == [1, 1, 1]
    both = sample(model, conditions, [ReferenceUse(reference, 1.0)], guidance=1.0 + 1e-6)
    assert rows_seen[3:] == [2, 2, 2]
    assert (one - both).abs().max() <= 1e-4 * both.abs().max()


def test_no_counting_reference_is_the_unconditional_prediction(model, conditions, reference, rows_seen):
    nothing = sample(model, conditions, [])
    ignored = sample(model, conditions, [ReferenceUse(reference, 0.0)])
    assert rows_seen == [1] * 6
    assert torch.equal(nothing, ignored)
    assert reference.features_computed == 0
    # Guidance 0 is the unconditional row of a guided run.
    guided = sample(model, conditions, [ReferenceUse(reference, 1.0)], guidance=0.0)
    assert (nothing - guided).abs().max() <= 1e-4 * guided.abs().max()


def test_several_references(model, conditions, reference):
    other = Reference(reference.latents.flip(-1).contiguous(), reference.tokens, owner=model)
    one = sample(model, conditions, [ReferenceUse(reference, 1.0)])
    both = sample(model, conditions, [ReferenceUse(reference, 1.0), ReferenceUse(other, 1.0)])
    swapped = sample(model, conditions, [ReferenceUse(other, 1.0), ReferenceUse(reference, 1.0)])
    assert (one - both).abs().max() > 1e-2 * one.abs().max()
    assert (both - swapped).abs().max() <= 1e-4 * both.abs().max()


def test_two_samplings_share_features(model, conditions, reference):
    first = sample(model, conditions, [ReferenceUse(reference, 1.0)])
    computed = reference.features_computed
    assert computed == 3
    assert torch.equal(sample(model, conditions, [ReferenceUse(reference, 1.0)]), first)
    assert reference.features_computed == computed


def test_features_computed_on_the_way_give_the_same_result(model, conditions, reference):
    first = sample(model, conditions, [ReferenceUse(reference, 1.0)])
    small = Reference(reference.latents, reference.tokens, owner=model, store_bytes=0)
    assert (sample(model, conditions, [ReferenceUse(small, 1.0)]) - first).abs().max() <= 1e-4 * first.abs().max()
    assert small.stored_bytes == 0


def test_a_cancelled_sampling_leaves_the_model_as_it_was(model, conditions, reference):
    networks = model.modules.unet, model.modules.reference_unet
    before = [network.attn_processors for network in networks]

    def cancel(*_):
        raise Cancelled("stop")

    for stage in ("on_features", "on_step"):
        with pytest.raises(Cancelled):
            sample(model, conditions, [ReferenceUse(reference, 1.0)], **{stage: cancel})
        assert [network.attn_processors for network in networks] == before
        reference.clear()


def test_references_that_do_not_fit(model, conditions, reference):
    stranger = Reference(reference.latents, reference.tokens, owner=object())
    with pytest.raises(ArgumentError, match="another model"):
        sample(model, conditions, [ReferenceUse(stranger, 1.0)])
    small = Reference(reference.latents[..., :8], reference.tokens, owner=model)
    with pytest.raises(ArgumentError, match=r"for a size of 64, this edit has 128\."):
        sample(model, conditions, [ReferenceUse(small, 1.0)])


# -------------------- several references, and ranges of steps

CLOSE = 1e-4  # of the largest latent: the same sums in another order, in single precision


def assert_close(latents, expected):
    assert (latents - expected).abs().max() <= CLOSE * expected.abs().max()


def apart(latents, others):
    return (latents - others).abs().max() > 10 * CLOSE * others.abs().max()


@pytest.fixture
def other(reference, model):
    return Reference(reference.latents.flip(-1).contiguous(), -reference.tokens, owner=model)


def predictions(model, conditions, references, steps=4, **options):
    """What the model predicts the picture to be, after each step."""
    infos = []
    sample(model, conditions, references, steps=steps, on_step=infos.append, **options)
    return [info.predicted_latents for info in infos]


@pytest.mark.parametrize("guidance", (1.0, 5.0))
def test_a_reference_that_starts_half_way_leaves_the_first_half_unconditional(model, conditions, reference, guidance):
    written = []
    nothing = predictions(model, conditions, [], guidance=guidance)
    late = predictions(
        model, conditions, [ReferenceUse(reference, start=0.5)], guidance=guidance, on_features=written.append
    )
    assert torch.equal(late[0], nothing[0]) and torch.equal(late[1], nothing[1])
    assert apart(late[2], nothing[2])
    assert reference.features_computed == sum(written) == 2
    timesteps = make_scheduler(model.config["scheduler"], "ddim", 4).timesteps.tolist()
    assert reference.missing(timesteps) == timesteps[:2]


def test_a_reference_that_ends_half_way_is_read_in_the_first_half_only(model, conditions, reference, rows_seen):
    whole = predictions(model, conditions, [ReferenceUse(reference)])
    assert rows_seen == [2] * 4
    early = Reference(reference.latents, reference.tokens, owner=model)
    halved = predictions(model, conditions, [ReferenceUse(early, end=0.5)])
    assert rows_seen[4:] == [2, 2, 1, 1]
    for step in (0, 1):  # not to the bit: features are written in batches, here of two
        assert_close(halved[step], whole[step])
    assert apart(halved[2], whole[2])
    assert early.features_computed == 2


def test_one_reference_in_two_ranges_that_meet_is_one_reference(model, conditions, reference):
    whole = sample(model, conditions, [ReferenceUse(reference)], steps=4)
    halves = [ReferenceUse(reference, end=0.5), ReferenceUse(reference, start=0.5)]
    assert torch.equal(sample(model, conditions, halves, steps=4), whole)
    assert reference.features_computed == 4


def test_references_take_turns(model, conditions, reference, other):
    first = predictions(model, conditions, [ReferenceUse(reference)])
    references = (Reference(one.latents, one.tokens, owner=model) for one in (reference, other))
    one, two = (ReferenceUse(one, 1.0, *span) for one, span in zip(references, ((0, 0.5), (0.5, 1)), strict=True))
    turns = predictions(model, conditions, [one, two])
    for step in (0, 1):
        assert_close(turns[step], first[step])
    assert apart(turns[2], first[2])
    assert apart(turns[2], predictions(model, conditions, [one])[2])
    assert one.reference.features_computed == two.reference.features_computed == 2


def test_a_single_step_is_read_by_ranges_that_begin_at_0(model, conditions, reference):
    nothing = sample(model, conditions, [], steps=1)
    assert torch.equal(sample(model, conditions, [ReferenceUse(reference, start=0.5)], steps=1), nothing)
    assert reference.features_computed == 0
    assert apart(sample(model, conditions, [ReferenceUse(reference, end=0.5)], steps=1), nothing)


@pytest.mark.parametrize("guidance", (1.0, 5.0))
@pytest.mark.parametrize("weights", ((0.5, 0.5), (0.25, 0.25, 0.5)))
def test_one_reference_in_shares_is_one_reference(model, conditions, reference, weights, guidance):
    once = sample(model, conditions, [ReferenceUse(reference)], guidance=guidance)
    shares = [ReferenceUse(reference, weight) for weight in weights]
    assert_close(sample(model, conditions, shares, guidance=guidance), once)
    assert apart(sample(model, conditions, [ReferenceUse(reference)] * 2, guidance=guidance), once)
    assert reference.features_computed == 3


def test_the_order_of_references_does_not_matter(model, conditions, reference, other):
    third = Reference(reference.latents.flip(-2).contiguous(), 0.5 * reference.tokens, owner=model)
    uses = [ReferenceUse(reference, 0.7), ReferenceUse(other, 1.0, end=0.5), ReferenceUse(third, 1.6)]
    latents = sample(model, conditions, uses, steps=2)
    for order in ((2, 0, 1), (1, 2, 0), (2, 1, 0)):
        assert_close(sample(model, conditions, [uses[index] for index in order], steps=2), latents)
    assert apart(sample(model, conditions, uses[:2], steps=2), latents)


def test_unconditional_rows_do_not_notice_references(model, conditions, reference, other, rows_seen):
    nothing = sample(model, conditions, [], seeds=(3, 4))
    uses = [ReferenceUse(reference), ReferenceUse(other, 2.0)]
    # Guidance 0 is the unconditional rows' prediction.
    guided = sample(model, conditions, uses, seeds=(3, 4), guidance=0.0)
    assert rows_seen == [2] * 3 + [4] * 3
    assert_close(guided, nothing)
