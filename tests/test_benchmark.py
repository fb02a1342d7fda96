"""The benchmarks' yardstick is the original, every variant predicts the same, the arithmetic and the counts are right.
No time is asserted."""

import gc
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as command
from benchmarks import batch, common, cost, edit, imports, memory, opt_ins, plots, profile, solvers, step, systems
from mimicbrush_core.attention import attention_with_lse
from mimicbrush_core.modules import PART_NAMES, Modules, bundled_config
from mimicbrush_core.references import Reference


class Clock:
    """Tells the time it was set to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def embedded():
    return common.whole_model(SimpleNamespace(small=True, weights=None, device="cpu", dtype="float32"))


# --- one step --------------------------------------------------------------------------------------------------


def test_yardstick_predicts_what_the_original_recorded():
    errors = step.golden_errors()
    assert set(errors) == {981, 501, 1}
    assert max(errors.values()) <= step.GOLDEN_TOLERANCE


def test_all_variants_predict_the_same():
    config = common.model_config(small=True)
    assert config["unet"]["block_out_channels"] == common.NARROW_CHANNELS
    inputs = step.random_inputs(config, 64, "cpu")
    model = step.StepModel(config, "cpu", torch.float32, inputs.unconditional_tokens)
    difference = step.differences(step.make_variants(model, inputs, ["channels_last"]))
    assert step.check_agreement(difference, 1e-4)
    assert 0 <= difference["channels_last"] <= 1e-4


def test_an_opt_in_leaves_the_exact_model_alone():
    config = common.model_config(small=True)
    inputs = step.random_inputs(config, 64, "meta")
    model = step.StepModel(config, "meta", torch.float32, inputs.unconditional_tokens)
    opt_in = opt_ins.OptIn(prepare=lambda copied: copied.modules.unet.to(torch.float16))
    assert opt_in.applied(model).dtype == torch.float16
    assert model.dtype == torch.float32


def test_counted_floors():
    """The design page's count at SD-1.5 sizes; its floors 0.42 and 1.04 for a known reference leave out the
    projection of the reference's tokens to keys and values, about 1 % more."""
    flops = step.count_flops(common.model_config(small=False), 512)
    assert flops[step.PLAIN] == pytest.approx(1.64e12, rel=0.01)
    assert flops[step.ORIGINAL] == pytest.approx(4.06e12, rel=0.01)
    assert flops[step.FIRST_RUN] / flops[step.ORIGINAL] <= 0.63
    assert flops[step.KNOWN] / flops[step.ORIGINAL] <= 0.43
    assert flops[step.KNOWN] / flops[step.PLAIN] <= 1.06


def test_ratios_beside_the_goals():
    flops = {step.ORIGINAL: 400, step.PLAIN: 100, step.KNOWN: 200}
    seconds = {
        step.ORIGINAL: [4.0, 8.0, 4.0],
        step.PLAIN: [1.0, 1.0, 1.0],
        step.KNOWN: [1.0, 4.0, 1.6],
        "own": [1, 2, 1],
    }
    found = step.all_ratios(flops, seconds)
    assert found["known reference / original"] == {
        "counted": 0.5, "median": 0.4, "min": 0.25, "max": 0.5, "rounds": [0.25, 0.5, 0.4]
    }  # fmt: skip
    assert found["own / plain"]["counted"] is None
    table = step.make_table(flops, seconds, {(step.KNOWN, step.ORIGINAL): 0.4, (step.KNOWN, step.PLAIN): 1.5})
    [row] = [line for line in table.splitlines() if step.KNOWN in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:] == ["0.500", "0.400 (0.250..0.500)", "0.40 met", "2.000", "1.600 (1.000..4.000)", "1.50 missed",
                         "1.600"]  # fmt: skip


# --- timing ----------------------------------------------------------------------------------------------------


def test_rounds_alternate_and_time_the_run_alone():
    clock, order = Clock(), []

    def variant(name, seconds):
        return common.Variant(run=lambda: (order.append(name), clock.sleep(seconds)), before=lambda: clock.sleep(100.0))

    found = common.time_rounds({"a": variant("a", 1.0), "b": variant("b", 2.0)}, 3, "cpu", clock)
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(order) == "abbaab"
    assert common.ratios({"a": [1.0, 6.0], "b": [2.0, 3.0]}, "a", "b") == [0.5, 2.0]
    assert common.spread([5.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 5.0}


def test_a_stage_within_another_counts_for_itself_only():
    clock = Clock()

    class Brush:
        def unconditional_tokens(self):
            clock.sleep(1)

        no_depth_feature = unconditional_tokens

        def encode_reference(self):
            clock.sleep(2)

        def encode_source(self):
            clock.sleep(4)
            self.no_depth_feature()

        def sample(self):
            clock.sleep(8)
            Reference.prepare()
            self.unconditional_tokens()

        def decode(self):
            clock.sleep(32)
            raise ZeroDivisionError

    def prepare():
        clock.sleep(16)

    brush, stages = Brush(), edit.StageClock(clock, "cpu")
    own = Brush.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reference, "prepare", prepare)
        for _ in range(2):  # each time from zero
            with stages.watching(brush):
                clock.sleep(64)
                for call in (brush.encode_reference, brush.encode_source, brush.sample):
                    call()
                with pytest.raises(ZeroDivisionError):
                    brush.decode()
                clock.sleep(64)
        assert Reference.prepare is prepare
    assert stages.seconds == {
        "constants": 2, "reference": 2, "source": 4, "features": 16, "loop": 8, "decoding": 32, "checks, pasting": 128
    }  # fmt: skip
    assert brush.sample.__func__ is own


# --- counting --------------------------------------------------------------------------------------------------


def count(*cases):
    found = cost.counted(common.model_config(small=True), 64, torch.float32, cases)
    return [found[case] for case in cases]


def test_counts_follow_the_code_that_runs(monkeypatch):
    known, first = cost.Case(step.KNOWN), cost.Case(step.FIRST_RUN)
    [merged] = count(known)
    monkeypatch.setattr(step.attention, "blend_by_merging", step.blend_by_two_calls)
    [by_two_calls, written] = count(known, first)
    assert by_two_calls > merged
    assert written > 1.2 * by_two_calls


def test_counts_by_steps_references_and_batch():
    varied = ({}, {"steps": 2}, {"steps": 3}, {"references": 2}, {"batch": 2})
    one, two, three, known_two, pair = count(*(cost.Case(step.KNOWN, **values) for values in varied))
    first, first_two, first_pair = count(*(cost.Case(step.FIRST_RUN, **values) for values in (varied[0], *varied[3:])))
    assert three - two == two - one
    assert first_two - known_two == 2 * (first - one)  # each reference is written once
    assert first_pair - pair == first - one  # once for all pictures
    assert one < pair <= 2 * one


def test_costs_are_told_in_plain_steps_a_picture():
    case = cost.Case(step.KNOWN, batch=4)
    points = [("batch", case), ("batch", cost.Case(step.FIRST_RUN, batch=4))]
    point, other = cost.records(points, 50, {case: 400, points[1][1]: 600}, {case: [6.0, 4.0, 10.0]})
    assert (point["series"], point["value"], point["counted"]) == ("batch", 4, 8)
    assert cost.per_picture(point) == {"counted": 2, "measured": {"median": 1.5, "min": 1.0, "max": 2.5}}
    assert cost.per_picture(other) == {"counted": 3, "measured": None}


def test_live_bytes():
    with memory.LiveBytes() as live:
        first = torch.empty(100, device="meta")
        view = first[10:]
        assert (live.now, live.peak) == (400, 400)
        second = first + 1
        del first
        assert (live.now, live.peak) == (800, 800)  # the view holds it
        del view
        assert (live.now, live.peak) == (400, 800)
        live.reset_peak()
        assert live.peak == 400
        del second
        assert live.now == 0
        torch.empty(1000)  # not on the device that is counted
        assert live.peak == 400


def test_fused_attention_allocates_no_scores():
    query, key = torch.empty(1, 2, 64, 8, device="meta"), torch.empty(1, 2, 512, 8, device="meta")
    with memory.fused_attention(), memory.LiveBytes([query, key]) as live:
        before = live.now
        output = F.scaled_dot_product_attention(query, key, key)
        assert output.shape == query.shape
        assert live.peak - before == 4 * query.numel()
        del output
        output, lse = attention_with_lse(query, key, key)
        assert (output.shape, lse.shape) == (query.shape, query.shape[:-1])
        assert live.now - before == 4 * (query.numel() + lse.numel())


def test_counted_memory_of_an_edit():
    config = bundled_config("mimicbrush_small")
    half, full = (memory.count_stages(config, 128, 4, dtype) for dtype in (torch.float16, torch.float32))
    assert list(half) == [*memory.STAGE_PARTS, "kept features"]
    tokens = {8: 64, 16: 256, 4: 16}  # by latent side
    assert half["kept features"] % (2 * 4 * tokens[4]) == 0
    assert full["kept features"] == 2 * half["kept features"] > 0
    assert full["sampling"] > 1.5 * half["sampling"] > 0
    assert memory.count_stages(config, 128, 8, torch.float16)["kept features"] == 2 * half["kept features"]


def test_peaks_from_weights_and_stages():
    weights = dict.fromkeys(PART_NAMES, 10) | {"image_encoder": 500, "unet": 100, "reference_unet": 90}
    stages = {"reference": 1, "source": 2, "features": 3, "sampling": 4, "decoding": 30, "kept features": 70}
    found = memory.peaks(weights, stages)
    assert found["all resident"] == sum(weights.values()) + 70 + 30
    assert found["nodes"] == 500 + 10 + 10 + 1  # Encode Reference
    assert found["offload"] == 500 + 10 + 10 + 1
    weights["image_encoder"] = 10
    found = memory.peaks(weights, stages)
    assert found["nodes"] == 10 + 10 + 100 + 90 + 70 + 30  # the sampler, decoding
    assert found["offload"] == 100 + 4


def test_weights_are_held_once():
    config = bundled_config("mimicbrush_small")
    modules = Modules(**{name: common.random_part(name, config) for name in PART_NAMES})
    assert memory.check_held_once(modules) == sum(memory.count_weights(modules).values())

    modules.unet.conv_out.bias = modules.unet.conv_out.bias.__class__(modules.unet.conv_out.weight[0, 0, 0])
    with pytest.raises(RuntimeError, match="storage"):
        memory.check_held_once(modules)


# --- edits and batches -----------------------------------------------------------------------------------------


def test_all_ways_through_a_batch_give_the_same_pictures(embedded):
    runs = batch.BatchRuns(embedded, 4, 128, None, batch.AT_ONCE)
    assert list(runs.ways) == ["separate", "one reference", "1 at once", "4 at once"]
    assert len({mask.tobytes() for mask in runs.mask_list}) == 4
    chosen = SimpleNamespace(device="cpu", rounds=1, clock="wall")
    found = batch.measure(runs, chosen)
    assert [one["way"] for one in found] == list(runs.ways)
    assert max(one["levels"] for one in found) <= 1
    assert found[0]["ratio"] == {"median": 1, "min": 1, "max": 1}


def test_each_kind_of_edit_starts_where_it_says(embedded):
    edits = edit.EditRuns(embedded, 128, "cpu", Clock())
    variants = {
        state: edits.variant(edit.EditCase(state, 2))
        for state in (edit.FIRST_EDIT, edit.NEW_REFERENCE, edit.KNOWN_REFERENCE)
    }
    variants[edit.FIRST_EDIT].before()
    assert not embedded.knows_constants
    variants[edit.NEW_REFERENCE].before()
    assert embedded.knows_constants
    variants[edit.KNOWN_REFERENCE].before()
    with pytest.MonkeyPatch.context() as patch:  # nothing of a known reference is computed again
        patch.setattr(embedded, "encode_reference", None)
        patch.setattr(embedded.modules.reference_unet, "forward", None)
        variants[edit.KNOWN_REFERENCE].run()
    [run] = edits.runs[edit.EditCase(edit.KNOWN_REFERENCE, 2)]
    assert run.result.settings.steps == 2
    assert run.peak is None


def test_an_edit_s_record():
    case, known = edit.EditCase(edit.NEW_REFERENCE, 50), edit.EditCase(edit.KNOWN_REFERENCE, 50)
    picture = torch.zeros(4, 4, 3, dtype=torch.uint8).numpy()
    result = SimpleNamespace(raw=picture, settings=SimpleNamespace(steps=50))
    stages = dict.fromkeys(edit.STAGE_NAMES, 0.0)
    runs = [edit.Run(stages | {"loop": loop, "features": 1.0, "decoding": 2.0}, 7, result) for loop in (1.0, 3.0, 5.0)]
    seconds = {case: [6.0, 9.0, 12.0], known: [3.0, 3.0, 3.0]}
    found = edit.record(case, runs, seconds, runs[0], picture[..., 0] + 1, {case: 8e12})
    assert found["loop"] == 4  # the median run's features and loop
    assert found["tflops"] == 2
    assert found["ratio"]["median"] == 3
    assert found["shares"]["decoding"] == pytest.approx(2 / 6)
    assert (found["peak"], found["psnr"]) == (7, 100)
    titles, _, cells = (line.split("|") for line in edit.make_table([found], roof=4.0).splitlines())
    assert {t.strip(): c.strip() for t, c in zip(titles, cells, strict=True)}["% of the roof"] == "50.0"


# --- imports, solvers, profile ---------------------------------------------------------------------------------


def test_import_times_are_summed_by_package():
    report = """import time: self [us] | cumulative | imported package
import time:      1000 |       1000 |   torch._C
import time:    500000 |    2000000 | torch
import time:       250 |        250 |     json.decoder
"""
    assert imports.sums_by_package(report) == {"torch": 0.501, "json": 0.00025}
    assert imports.added(["json", "torch", "tqdm"], ["torch"]) == ["tqdm"]


@pytest.mark.parametrize("brought, status", [("tqdm", 0), ("scipy", 1)])
def test_bringing_something_heavy_fails(monkeypatch, tmp_path, brought, status):
    bodies = dict.fromkeys(imports.BODIES, "pass")
    bodies[imports.PACK] = f"import types; sys.modules[{brought!r}] = types.ModuleType({brought!r})"
    monkeypatch.setattr(imports, "BODIES", bodies)
    path = tmp_path / "imports.json"
    assert imports.main(["--rounds", "1", "--json", str(path)]) == status
    assert json.loads(path.read_text())["brought"] == {imports.CORE: [], imports.PACK: [brought]}


def test_the_pack_imports_nothing_heavy():
    packages = {name: imports.imported(name)["packages"] for name in (imports.LIBRARIES, imports.PACK)}
    assert "torch" in packages[imports.PACK]
    assert not set(imports.HEAVY) & set(imports.added(packages[imports.PACK], packages[imports.LIBRARIES]))


def test_fewest_steps_within_a_distance():
    distances = {1: 0.9, 2: 0.09, 4: 0.3, 8: 0.08, 16: 0.01}
    points = [
        {"solver": "ddim", "spacing": "leading", "steps": steps, "distance": {"median": distance}}
        for steps, distance in distances.items()
    ]
    points.append({"solver": "euler", "spacing": "leading", "steps": 1, "distance": {"median": math.nan}})
    assert solvers.fewest(points, "ddim", "leading", 0.1) == 8  # 2 was luck: 4 is further off
    assert solvers.fewest(points, "ddim", "leading", 0.5) == 2
    assert solvers.fewest(points, "ddim", "leading", 0.001) is None
    assert solvers.fewest(points, "euler", "leading", 0.5) is None
    assert solvers.relative_distance(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(
        math.sqrt(1 / 34)
    )


def test_a_scene_is_at_no_distance_from_itself(embedded):
    scene = solvers.Scene(embedded, solvers.EXAMPLES[0], None)
    assert scene.distance("ddim", "trailing", solvers.YARDSTICK_STEPS) == 0
    assert scene.distance("ddim", None, 10, seed=1) > 0.1
    assert scene.distance("ddim", None, 2) > scene.distance("ddim", None, 20) > 0


def test_only_the_second_step_is_profiled():
    value = torch.ones(4)

    def sample(on_step):
        for index, clones in enumerate((5, 2, 7)):
            for _ in range(clones):
                value.clone()
            on_step(SimpleNamespace(step=index + 1))

    found = profile.summary(profile.profile_second_step(sample, "cpu"), "cpu")
    assert found["counts"]["clones"] == 2
    assert sum(share for *_, share in found["operators"]) == pytest.approx(1)


# --- each runs, and all together -------------------------------------------------------------------------------

SMALL = {
    "step_64": (step, ["--size", "64", "--rounds", "1"]),
    "cost": (cost, ["--at-most", "1.5", "--rounds", "1"]),
    "edit_small": (edit, ["--rounds", "1", "--accelerate", "deep_every_2"]),
    "batch_small": (batch, ["--rounds", "1", "--counts", "2"]),
    "memory": (memory, []),
    "memory_counted": (memory, ["--count"]),
    "solvers": (solvers, []),
    "profile": (profile, []),
    "systems": (systems, ["--rounds", "1"]),
}


@pytest.fixture(scope="module")
def small_results(tmp_path_factory):
    """What every benchmark writes at --small."""
    folder = tmp_path_factory.mktemp("results")
    for name, (module, arguments) in SMALL.items():
        assert module.main(["--small", *arguments, "--json", str(folder / f"{name}.json")]) == 0, name
    gc.collect()
    return command.read_results(folder)


def test_each_runs_and_says_what_it_found(small_results):
    assert set(small_results) == set(SMALL)
    for data in small_results.values():
        assert data["facts"]["torch"] == torch.__version__
        assert data["table"].count("\n") >= 2
    measured = [point["measured"] for point in small_results["cost"]["points"] if point["measured"]]
    assert measured and all(one["min"] <= one["median"] <= one["max"] for one in measured)


def test_a_step_of_the_other_systems_costs_no_more_than_their_networks():
    counts = systems.counted(small=False, side=32)
    assert counts["MimicBrush, known reference"] < counts["MimicBrush, new reference"] < 1.7
    for title in ("Paint by Example", "SmartBrush"):
        assert counts[title] < 1  # the rows share their start, and there are fewer tokens
    assert counts["Magic Fixup"] < 1.15  # two U-Nets, but one row


def test_plots_are_drawn(small_results, tmp_path):
    paths = plots.draw_all(small_results, tmp_path)
    assert [path.name for path in paths] == ["size.png", "cost.png", "solvers.png", "edit.png"]
    assert all(path.stat().st_size > 5000 for path in paths)
    assert plots.draw_all({"gpu_cost": small_results["cost"]}, tmp_path, "gpu_")[0].name == "gpu_size.png"


def test_the_page_has_a_place_for_every_result():
    page = command.PAGE.read_text()
    facts = {"cpu": "some", "load": [0.5, 1.0], "gpu": None}
    for name in command.QUICK | command.FULL | command.GPU:
        filled = command.filled_page(page, {name: {"table": "| new |", "facts": facts}})
        assert filled.count("| new |\n\n*cpu some; load 0.5*\n") == 1
        assert command.filled_page(filled, {name: {"table": "| new |", "facts": facts}}) == filled
    with pytest.raises(ValueError, match="'other'"):
        command.filled_page(page, {"other": {"table": "", "facts": {}}})


def test_every_command_of_the_presets_is_understood():
    modules = {module.__name__.split(".")[1]: module for module, _ in SMALL.values()} | {"imports": imports}
    for line in (command.QUICK | command.FULL | command.GPU).values():
        name, *arguments = line.split()
        modules[name].parse_arguments([*arguments, "--json", "x"])


def test_one_command_runs_the_chosen_ones(monkeypatch, tmp_path):
    lines = []

    def run(line, cwd):
        lines.append(line[1:])
        return SimpleNamespace(returncode=int("benchmarks.imports" in line))

    monkeypatch.setattr(command.subprocess, "run", run)
    chosen = ["--only", "step_256", "imports", "--clock", "process"]
    assert command.main([str(tmp_path), *chosen]) == 1  # one of them failed
    [timed, other] = lines
    assert timed[:2] == ["-m", "benchmarks.step"] and "--clock process" in " ".join(timed)
    assert other[:2] == ["-m", "benchmarks.imports"] and "--clock" not in other
    assert command.main([str(tmp_path), "--only"]) == 0 and len(lines) == 2
