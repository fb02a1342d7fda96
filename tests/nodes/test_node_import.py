"""Importing the pack: from any folder, without the network, without traces in the interpreter of the host."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from host_double import ROOT, Host, installed, loaded_pack
from node_pictures import boxes, noise
from node_schemas import EMBEDDED, recorded, reduced

import mimicbrush_core.editing


@pytest.fixture
def pack_folder(tmp_path):
    """pack_folder(name): a copy of what is installed of the pack, in a folder of that name."""

    def copy(name):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(ROOT / "__init__.py", folder)
        for part in ("nodes", "mimicbrush_core"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        return folder

    return copy


@pytest.mark.parametrize("name", ["weird name-1", "v1.2.3", "nodes", "mimicbrush_core"])
def test_the_folder_may_have_any_name(pack_folder, tmp_path, name):
    with installed(Host(tmp_path / "models")), loaded_pack(pack_folder(name)) as pack:
        assert reduced(pack.object_info()) == recorded()
        model = pack.call("Load", model_name=EMBEDDED).model
        reference = pack.call("EncodeReference", model=model, picture=noise(1, 40, 40)).reference
        given = {"model": model, "reference": reference, "source": noise(1, 40, 40), "mask": boxes(40, 40, (9, 9))}
        assert pack.call("Sampler", **given).image.isfinite().all()


def test_the_pack_s_core_is_its_own(pack):
    assert pack.core("editing") is not mimicbrush_core.editing
    assert pack.core("errors").PictureError.__module__ == pack.module.__name__ + ".mimicbrush_core.errors"


def test_the_stand_in_and_the_pack_leave_nothing_behind(tmp_path):
    before, path = dict(sys.modules), list(sys.path)
    with installed(Host(tmp_path / "models")), loaded_pack(ROOT):
        assert "comfy.utils" in sys.modules
    for name in set(sys.modules) - set(before):
        assert not name.startswith(("comfy", "folder_paths", str(ROOT)))
    assert sys.path == path


CLEAN_IMPORT = """
    import os, socket, sys
    sys.path.insert(0, {double!r})
    from host_double import Host, installed, loaded_pack
    from pathlib import Path

    class Refusing(socket.socket):
        def __init__(self, *args, **kwargs):
            raise AssertionError("a socket was opened")

    socket.socket = socket.create_connection = socket.getaddrinfo = Refusing
    with installed(Host(Path({models!r}))):
        before, path, environment = set(sys.modules), list(sys.path), dict(os.environ)
        folder = Path({folder!r})
        with loaded_pack(folder) as pack:
            assert len(pack.nodes) == {count}
            assert sys.path == path, "sys.path was changed"
            assert dict(os.environ) == environment, "the environment was changed"
            # An absolute import of the pack's parts would find another pack's, or the host's `nodes`.
            stray = [name for name in sys.modules if name.split(".")[0] in ("mimicbrush_core", "nodes")]
            assert not stray, stray
            assert not os.path.exists({models!r}), "a folder was made"
"""


@pytest.mark.parametrize("linked", [False, True])
def test_importing_opens_no_socket_and_changes_nothing_around_it(pack_folder, tmp_path, linked):
    folder = tmp_path / "weird name-1"
    if linked:
        folder.symlink_to(ROOT, target_is_directory=True)
    else:
        pack_folder(folder.name)
    script = textwrap.dedent(CLEAN_IMPORT).format(
        double=str(Path(__file__).parent), models=str(tmp_path / "models"), folder=str(folder), count=len(recorded())
    )
    # Isolated: neither this folder nor PYTHONPATH helps the imports.
    result = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
