"""What the user sees of the nodes: names, inputs, tooltips; and that it is what real hosts say."""

import dataclasses
import json

import pytest
from host_double import ROOT, Host, OldSchema, installed, loaded_pack
from node_schemas import LOADERS, embedded, record, recorded, reduced

NODES = (
    "MimicBrushLoad",
    "MimicBrushEncodeReference",
    "MimicBrushCombineReferences",
    "MimicBrushDepthCondition",
    "MimicBrushSampler",
    "MimicBrushAcceleration",
    "MimicBrushImitativeModel",
    "MimicBrushReliance",
    "MimicBrushCorrespondence",
    "MimicBrushLoadPaintByExample",
    "MimicBrushPaintByExample",
    "MimicBrushLoadMagicFixup",
    "MimicBrushMagicFixup",
    "MimicBrushLoadSmartBrush",
    "MimicBrushSmartBrush",
    "MimicBrushMaskPrecision",
    "MimicBrushChangeMask",
    "MimicBrushBackgroundBlend",
    "MimicBrushCoarseEdit",
    "MimicBrushExamplePictures",
    "MimicBrushDownload",
    "MimicBrushConvert",
)


def inputs_of(info):
    """{name: (type, settings)} of a node's own inputs."""
    return {**info["input"]["required"], **info["input"].get("optional", {})}


ALL_INPUTS = [(node, name, *entry) for node, info in recorded().items() for name, entry in inputs_of(info).items()]


def of_type(*types):
    cases = [pytest.param(one[3], id=f"{one[0]}.{one[1]}") for one in ALL_INPUTS if one[2] in types]
    assert cases
    return pytest.mark.parametrize("settings", cases)


def test_the_schemas_are_those_that_real_hosts_were_seen_to_show(pack):
    assert reduced(pack.object_info()) == recorded()


def test_these_nodes_are_there(pack):
    assert tuple(pack.nodes) == NODES and set(recorded()) == set(NODES)


def test_the_pack_exports_one_interface_only(pack):
    assert not hasattr(pack.module, "NODE_CLASS_MAPPINGS")  # its presence would hide the entry point


@pytest.mark.parametrize("node", NODES)
def test_every_node_says_what_it_is(node):
    info = recorded()[node]
    assert info["category"] == "MimicBrush" and node.startswith("MimicBrush")
    assert info["display_name"] and len(info["description"]) > 40
    assert info["output_node"] == (node in ("MimicBrushDownload", "MimicBrushConvert", "MimicBrushCoarseEdit"))


@pytest.mark.parametrize("node", NODES)
def test_everything_has_a_tooltip(node):
    info = recorded()[node]
    told = {name: settings.get("tooltip") for name, (_, settings) in inputs_of(info).items()}
    told |= dict(zip(info["output_name"], info["output_tooltips"], strict=True))
    assert [name for name, tooltip in told.items() if not tooltip or len(tooltip) < 5] == []


@of_type("INT", "FLOAT")
def test_numbers_have_a_range_and_a_default_in_it(settings):
    assert settings["min"] <= settings["default"] <= settings["max"]
    assert settings["min"] < settings["max"]


@of_type("FLOAT")
def test_fractions_have_a_step(settings):
    assert 0 < settings["step"] < settings["max"] - settings["min"]


@of_type("COMBO")
def test_choices_have_options_and_a_default_among_them(settings):
    options = settings["options"]
    assert options and len(set(options)) == len(options)
    assert settings.get("default", options[0]) in options


def test_the_text_has_only_characters_every_windows_console_knows():
    json.dumps(recorded(), ensure_ascii=False).encode("cp1252")


def test_the_embedded_model_is_offered_after_the_user_s_files(pack, host):
    for node, system in LOADERS.items():
        folder = host.models / pack.part("host").FOLDERS[system]
        folder.mkdir(parents=True)
        (folder / "mine.safetensors").write_bytes(b"")
        options = pack.object_info()[node]["input"]["required"]["model_name"][1]["options"]
        assert options == ["mine.safetensors", embedded(system)]


def test_search_words_reach_hosts_that_know_them(pack):
    assert all("mimicbrush" in node.define_schema().search_aliases for node in pack.nodes.values())


def test_an_older_host_gets_the_same_without_what_it_does_not_know(tmp_path):
    with installed(Host(tmp_path / "models", OldSchema)), loaded_pack(ROOT) as pack:
        assert reduced(pack.object_info()) == recorded()
        assert "search_aliases" not in {
            field.name for node in pack.nodes.values() for field in dataclasses.fields(node.define_schema())
        }


def test_the_record_is_written_as_it_is_read(pack, tmp_path, monkeypatch):
    monkeypatch.setattr("node_schemas.RECORDED", tmp_path / "schemas.json")
    record(pack.object_info())
    assert recorded() == reduced(pack.object_info())
