"""What ComfyUI shows of the nodes in other languages, and their help pages: complete, in step with the schemas."""

import ast
import json
import re
from pathlib import Path

import pytest
from node_schemas import recorded

ROOT = Path(__file__).parents[1]
LOCALES = ("en", "zh", "ja", "ko")
TRANSLATED = LOCALES[1:]
SCRIPT = {"zh": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff\u4e00-\u9fff]", "ko": "[\uac00-\ud7a3]"}
SAME_EVERYWHERE = {"x", "y"}

WEB = ROOT / "web"
DOCS = WEB / "docs"
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(|^\[[^\]]+\]:|<a\s|https?://", re.MULTILINE)
MAX_IMAGE_BYTES = 40_000

SCHEMAS = recorded()


def no_repeats(pairs):
    keys = [key for key, _ in pairs]
    assert len(set(keys)) == len(keys), f"a key is there twice: {keys}"
    return dict(pairs)


def read(locale, name):
    return json.loads((ROOT / "locales" / locale / name).read_text("utf-8"), object_pairs_hook=no_repeats)


def inputs_of(info):
    return {**info["input"]["required"], **info["input"].get("optional", {})}


def english():
    """What the schemas say, in the form of nodeDefs.json. Outputs are counted, as the frontend looks them up."""
    return {
        node: {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": {
                name: {"name": name, "tooltip": settings["tooltip"]} for name, (_, settings) in inputs_of(info).items()
            },
            "outputs": {
                str(index): {"name": name, "tooltip": tooltip}
                for index, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
            },
        }
        for node, info in SCHEMAS.items()
    }


def texts(tree, path=()):
    """{path: text} of all that is nested in a JSON object."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, part in tree.items() for key, value in texts(part, (*path, name)).items()}


def page(node, locale):
    return DOCS / f"{node}.md" if locale == "en" else DOCS / node / f"{locale}.md"


NODE_PAGES = [pytest.param(node, locale, id=f"{node}-{locale}") for node in SCHEMAS for locale in LOCALES]


# --- names and tooltips --------------------------------------------------------------------------------------


def test_these_languages_are_there():
    assert {folder.name for folder in (ROOT / "locales").iterdir()} == set(LOCALES)
    for locale in LOCALES:
        names = {file.name for file in (ROOT / "locales" / locale).iterdir()}
        assert names == {"main.json", "nodeDefs.json"}  # the host reads commands.json and settings.json, too


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("name", ["main.json", "nodeDefs.json"])
def test_the_files_are_utf8_json_with_each_key_once(locale, name):
    assert isinstance(read(locale, name), dict)
    data = (ROOT / "locales" / locale / name).read_bytes()
    assert data.endswith(b"}\n") and b"\\u" not in data and b"\r" not in data


@pytest.mark.parametrize("locale", LOCALES)
def test_every_language_has_what_the_schemas_have(locale):
    assert texts(read(locale, "nodeDefs.json")).keys() == texts(english()).keys()


def test_english_is_what_the_schemas_say():
    assert read("en", "nodeDefs.json") == english()


@pytest.mark.parametrize("locale", LOCALES)
def test_every_category_has_a_name(locale):
    categories = {part for info in SCHEMAS.values() for part in info["category"].split("/")}
    assert read(locale, "main.json").keys() == {"nodeCategories"}
    assert read(locale, "main.json")["nodeCategories"].keys() == categories


@pytest.mark.parametrize("locale", LOCALES)
def test_every_text_is_a_text_that_the_frontend_shows_as_it_is(locale):
    for path, text in {**texts(read(locale, "nodeDefs.json")), **texts(read(locale, "main.json"))}.items():
        assert isinstance(text, str) and text.strip(), path
        assert text == text.strip(), path
        assert not re.search(r"[{}@|<>\n]", text), path  # signs of vue-i18n's message language, and of HTML


@pytest.mark.parametrize("locale", TRANSLATED)
def test_nothing_was_left_in_english(locale):
    told = texts(read(locale, "nodeDefs.json"))
    assert {path for path, text in told.items() if not re.search(SCRIPT[locale], text)} == {
        path for path, text in texts(english()).items() if text in SAME_EVERYWHERE
    }


@pytest.mark.parametrize("locale", TRANSLATED)
def test_translations_give_the_numbers_and_files_of_the_english_text(locale):
    told = texts(read(locale, "nodeDefs.json"))
    for path, text in texts(english()).items():
        facts = re.findall(r"\d+(?:\.\d+)?|models/\w*|\.safetensors|MimicBrush|fp32|ddim", text)
        assert [fact for fact in facts if fact not in told[path]] == [], path


@pytest.mark.parametrize("locale", TRANSLATED)
def test_translations_name_the_options_as_the_widget_shows_them(locale):
    told = read(locale, "nodeDefs.json")
    for node, info in SCHEMAS.items():
        for name, (kind, settings) in inputs_of(info).items():
            if kind == "COMBO":
                text, given = told[node]["inputs"][name]["tooltip"], settings["tooltip"]
                assert [one for one in settings["options"] if one in given and one not in text] == [], (node, name)
                latin = re.findall(r"[A-Za-z][\w']*(?:[ .][\w']+)*", text, re.ASCII)  # options stay as they are
                known = [given, *settings["options"]]
                assert [one for one in latin if not any(one in source for source in known)] == [], (node, name)


@pytest.mark.parametrize("locale", TRANSLATED)
def test_other_nodes_are_called_as_they_are_titled(locale):
    told = read(locale, "nodeDefs.json")
    translations = texts(told)
    for path, text in texts(english()).items():
        for node, info in SCHEMAS.items():
            if info["display_name"] in text:
                assert told[node]["display_name"] in translations[path], (path, info["display_name"])


@pytest.mark.parametrize("locale", TRANSLATED)
def test_one_word_for_one_thing(locale):
    words = {}
    told = texts(read(locale, "nodeDefs.json"))
    for path, text in texts(english()).items():
        if path[-1] == "name":
            words.setdefault(text.replace("_", " "), set()).add(told[path])
    assert {name: given for name, given in words.items() if len(given) > 1} == {}


@pytest.mark.parametrize("locale", TRANSLATED)
def test_no_two_inputs_or_nodes_share_a_name(locale):
    told = read(locale, "nodeDefs.json")
    for names in (
        [node["display_name"] for node in told.values()],
        *([one["name"] for one in node[side].values()] for node in told.values() for side in ("inputs", "outputs")),
    ):
        assert len(set(names)) == len(names)


# --- help pages ----------------------------------------------------------------------------------------------


def test_the_pack_serves_the_pages_and_no_scripts():
    module = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    given = {
        target.id: ast.literal_eval(statement.value)
        for statement in module.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    }
    assert given["WEB_DIRECTORY"] == "./web" and "WEB_DIRECTORY" in given["__all__"]
    assert {file.suffix for file in WEB.rglob("*") if file.is_file()} == {".md", ".jpg"}


def test_there_is_a_page_for_every_node_in_every_language_and_no_other():
    assert set(DOCS.rglob("*.md")) == {page(node, locale) for node in SCHEMAS for locale in LOCALES}


@pytest.mark.parametrize(("node", "locale"), NODE_PAGES)
def test_a_page_names_what_the_node_shows(node, locale):
    text = page(node, locale).read_text("utf-8")
    told, original = read(locale, "nodeDefs.json")[node], english()[node]
    assert text.startswith(f"# {told['display_name']}\n")
    shown = [row for row in re.findall(r"^\| (.+?) \| .+ \|$", text, re.MULTILINE) if "`" in row]
    expected = []
    for side in ("inputs", "outputs"):
        for key, one in told[side].items():
            code = f"`{original[side][key]['name']}`"
            expected.append(code if f"`{one['name']}`" == code else f"{one['name']}<br>{code}")
    assert shown == expected


@pytest.mark.parametrize("node", SCHEMAS)
@pytest.mark.parametrize("locale", TRANSLATED)
def test_a_page_says_as_much_as_the_english_one(node, locale):
    def shape(text):
        lines = [line for line in text.splitlines() if line]
        return [IMAGE.findall(line) or re.match(r"#+ |- |\||\*|", line).group() for line in lines]

    text = page(node, locale).read_text("utf-8")
    assert shape(text) == shape(page(node, "en").read_text("utf-8"))
    assert not [line for line in text.splitlines() if len(line) > 12 and not re.search(SCRIPT[locale] + r"|\||!", line)]


@pytest.mark.parametrize(("node", "locale"), NODE_PAGES)
def test_a_page_names_other_nodes_as_they_are_titled(node, locale):
    told, text = read(locale, "nodeDefs.json"), page(node, locale).read_text("utf-8")
    for other, info in SCHEMAS.items():
        if info["display_name"] in page(node, "en").read_text("utf-8"):
            assert told[other]["display_name"] in text
        assert locale == "en" or info["display_name"] not in text


@pytest.mark.parametrize(("node", "locale"), NODE_PAGES)
def test_what_a_page_quotes_is_on_the_screen_or_on_the_disk(node, locale):
    known = {".safetensors", "models", "models/", "MimicBrush"} | {
        f"models/{folder}" for folder in ("mimicbrush", "paint_by_example", "magic_fixup", "smartbrush")
    }
    for info in SCHEMAS.values():
        known |= {*inputs_of(info), *info["output_name"]}
        for _, settings in inputs_of(info).values():
            known |= {*settings.get("options", ()), settings.get("default")}
    assert set(re.findall(r"`([^`]+)`", page(node, locale).read_text("utf-8"))) <= known


@pytest.mark.parametrize(("node", "locale"), NODE_PAGES)
def test_pictures_are_there_and_nothing_else_is_linked(node, locale):
    text = page(node, locale).read_text("utf-8")
    for link in IMAGE.findall(text):
        assert link.startswith("images/")  # the frontend puts /extensions/PACK/docs/ in front, for every language
        assert (DOCS / link).is_file(), link
    assert not LINK.search(text)  # other links would be looked up beside ComfyUI's own page


def test_every_picture_is_used_and_small_and_made_by_the_script():
    files = {f"images/{file.name}": file for file in (DOCS / "images").iterdir()}
    assert set(files) == {link for node in SCHEMAS for link in IMAGE.findall(page(node, "en").read_text("utf-8"))}
    script = (ROOT / "docs" / "make_effects.py").read_text("utf-8")
    for file in files.values():
        data = file.read_bytes()
        assert data.startswith(b"\xff\xd8\xff") and len(data) <= MAX_IMAGE_BYTES, file.name
        assert f'"{file.stem}"' in script, file.name
