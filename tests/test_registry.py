"""What the ComfyUI registry is told of the pack, and what its archive holds: complete, in step, nothing forbidden."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

import mimicbrush_core

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT, COMFY = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
WORKFLOWS = ROOT / ".github" / "workflows"

MAX_ICON_BYTES = 64_000
MAX_ICON_SIZE = (800, 400)  # px, the registry's

NEEDED = ("__init__.py", "nodes", "mimicbrush_core", "web", "locales", "workflows", "pyproject.toml")
NEEDED += ("requirements.txt", "README.md", "CHANGELOG.md", "LICENSE")
LEFT_OUT = ("tests", "benchmarks", ".github", ".ci")


# -- what the registry is told


def test_name_and_version_are_what_the_registry_takes():
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*", PROJECT["name"]) and len(PROJECT["name"]) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"]), "spelled out: ComfyUI Manager reads it from here"


@pytest.mark.parametrize("table, key", [(COMFY, "PublisherId"), (COMFY, "DisplayName"), (PROJECT, "description")])
def test_what_the_registry_shows_is_there(table, key):
    assert table[key].strip()


def test_the_owner_s_values_are_one_block():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    block = text[text.index("# ---- The owner's values") : text.index("# ---- end of the owner's values")]
    for value in (PROJECT["name"], PROJECT["urls"]["Repository"], COMFY["PublisherId"], COMFY["Icon"]):
        assert f'"{value}"' in block


def test_icon_lies_in_the_repository_and_is_small():
    repository = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", PROJECT["urls"]["Repository"])
    prefix = f"https://raw.githubusercontent.com/{repository[1]}/main/"
    assert COMFY["Icon"].startswith(prefix), "the icon's address is of another repository"
    file = ROOT / COMFY["Icon"].removeprefix(prefix)
    assert file.stat().st_size <= MAX_ICON_BYTES
    with Image.open(file) as icon:
        assert icon.format == "PNG"
        assert icon.width <= MAX_ICON_SIZE[0] and icon.height <= MAX_ICON_SIZE[1]


def test_oldest_comfyui_is_the_one_that_is_tested():
    oldest = re.fullmatch(r">=(\d+\.\d+\.\d+)", COMFY["requires-comfyui"])[1]
    assert f"comfyui: [v{oldest}, master]" in (WORKFLOWS / "comfyui.yml").read_text("utf-8")


def test_publishing_waits_for_the_owner_s_values():
    """The workflow's pattern finds each placeholder, and nothing in filled-in values."""
    command = re.search(r"! grep .*'(.+)' pyproject\.toml", (WORKFLOWS / "publish.yml").read_text("utf-8"))
    for line in ('PublisherId = "PUBLISHER"', 'Repository = "https://github.com/OWNER/REPOSITORY"'):
        assert re.search(command[1], line)
    assert not re.search(command[1], 'Repository = "https://github.com/someone/mimicbrush"')


def test_publishing_uses_a_pinned_action_and_the_named_secret():
    text = (WORKFLOWS / "publish.yml").read_text("utf-8")
    assert re.search(r"uses: Comfy-Org/publish-node-action@[0-9a-f]{40}\b", text)
    assert "${{ secrets.REGISTRY_ACCESS_TOKEN }}" in text


# -- versions


def test_version_is_the_same_everywhere():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[1]
    assert PROJECT["version"] == mimicbrush_core.__version__ == newest


@pytest.mark.parametrize("file", sorted((ROOT / "workflows").glob("*.json")), ids=lambda file: file.stem)
def test_templates_name_the_pack_and_its_version(file):
    ours = [node for node in nodes_of(json.loads(file.read_text("utf-8"))) if node["type"].startswith("MimicBrush")]
    assert ours
    for node in ours:
        properties = node["properties"]
        assert (properties["cnr_id"], properties["ver"]) == (PROJECT["name"], PROJECT["version"])


def test_compatibility_page_has_what_the_workflow_runs():
    runs = re.findall(
        r"transformers: (\S+), diffusers: (\S+), numpy: (\S+),", (WORKFLOWS / "tests.yml").read_text("utf-8")
    )
    page = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
    assert runs
    for versions in runs:
        assert f"| {' | '.join(versions)} |" in page


def test_requirements_are_diffusers_alone_and_capped():
    """One line: more would touch what ComfyUI brought; uncapped, pip would break ComfyUI beside transformers 4."""
    assert re.fullmatch(r"diffusers>=(\d+\.\d+),<\d+\.\d+\n", (ROOT / "requirements.txt").read_text("utf-8"))


# -- the archive


@pytest.fixture(scope="module")
def archive():
    """The paths of the registry's archive: what git tracks, or would, less what .comfyignore names."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what would be published is not known")
    return git_files("--exclude-standard") - git_files("--ignored", "--exclude-from=.comfyignore")


@pytest.mark.parametrize("part", NEEDED)
def test_archive_has_all_that_the_pack_needs(archive, part):
    needed = {path for path in git_files("--exclude-standard") if path.split("/")[0] == part}
    assert needed and needed <= archive


def test_archive_has_nothing_of_the_workshop(archive):
    inside = {path for path in archive if path.split("/")[0] in LEFT_OUT}
    assert inside <= {"benchmarks/README.md"}  # docs/ links to it


def test_archive_s_pages_link_to_what_is_in_it(archive):
    pages = [path for path in archive if path.endswith(".md") and not path.startswith("web/")]
    assert pages
    for page in pages:
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / page).read_text("utf-8")):
            target = ((ROOT / page).parent / link).resolve().relative_to(ROOT)
            assert target.as_posix() in archive, f"{page}: {link}"


FIRST_EDIT = """
    import sys
    sys.path.insert(0, {double!r})
    from host_double import Host, installed, loaded_pack
    from pathlib import Path

    with installed(Host(Path({models!r}))), loaded_pack(Path({folder!r})) as pack:
        given = pack.call("ExamplePictures", size=64)
        model = pack.call("Load").model
        reference = pack.call("EncodeReference", model=model, picture=given.reference).reference
        edited = pack.call("Sampler", model=model, reference=reference, source=given.source, mask=given.mask, steps=2)
        assert not edited.image.equal(given.source)
"""


def test_archive_alone_edits_a_picture(archive, tmp_path):
    folder = tmp_path / "mimicbrush"
    for path in archive:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    script = textwrap.dedent(FIRST_EDIT).format(
        double=str(ROOT / "tests" / "nodes"), models=str(tmp_path / "models"), folder=str(folder)
    )
    # Isolated: neither this folder nor PYTHONPATH helps the imports.
    result = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# -- the nodes' source

SOURCES = [ROOT / "__init__.py", *sorted((ROOT / "nodes").rglob("*.py"))]
FORBIDDEN = (
    r"\.cuda\s*\(",
    r"\.to\s*\(\s*(torch\.device\s*\(\s*)?[\"']cuda",
    r"\btorch\.(cuda\.amp\.|amp\.)?autocast\b",
    r"(?<![\w.])(torch\.)?nn\.(Linear|Conv[123]d|ConvTranspose[12]d|LayerNorm|GroupNorm|Embedding)\s*\(",
    r"\btorch\.load\s*\(",
    r"\btorch\.cuda\.empty_cache\s*\(",
)
"""What comfy-test's level "syntax" refuses or warns of in nodes: ComfyUI's memory management cannot see it."""


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nodes_have_nothing_that_comfy_test_refuses(file):
    text = file.read_text("utf-8")
    text.encode("cp1252")  # Windows' own encoding
    assert not [pattern for pattern in FORBIDDEN if re.search(pattern, text)]


@pytest.mark.parametrize(
    "line",
    [
        "model.cuda()",
        "model.to('cuda:0')",
        'model.to(torch.device("cuda"))',
        'with torch.autocast("cuda"):',
        "self.proj = nn.Linear(4, 4)",
        "self.conv = torch.nn.Conv2d(4, 4, 1)",
        'torch.load("model.bin")',
        "torch.cuda.empty_cache()",
    ],
)
def test_what_comfy_test_refuses_is_recognised(line):
    assert [pattern for pattern in FORBIDDEN if re.search(pattern, line)]


# -- helpers


def nodes_of(tree):
    """All nodes of a workflow, those in its subgraphs too."""
    for graph in (tree, *tree.get("definitions", {}).get("subgraphs", [])):
        yield from graph["nodes"]


def git_files(*options):
    """The paths of the files that git tracks, or would, relative to the pack's folder."""
    command = ["git", "ls-files", "--cached", "--others", "-z", *options]
    paths = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return {path for path in paths if (ROOT / path).is_file()}
