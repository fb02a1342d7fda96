"""The pack under test, imported against the stand-in of its host, and the little pictures it is tested with."""

import shutil

import pytest
from host_double import ROOT, Host, installed, loaded_pack
from node_pictures import noise
from node_schemas import EMBEDDED


@pytest.fixture(scope="module")
def host_and_pack(tmp_path_factory):
    """Per test module, so that nothing of it is left in `sys.modules` for the tests of the core."""
    with installed(Host(tmp_path_factory.mktemp("host") / "models")) as host, loaded_pack(ROOT) as pack:
        yield host, pack


@pytest.fixture
def host(host_and_pack):
    host = host_and_pack[0]
    host.reset()
    yield host
    host.reset()
    shutil.rmtree(host.models, ignore_errors=True)


@pytest.fixture
def pack(host_and_pack, host):
    return host_and_pack[1]


@pytest.fixture
def models(request, host):
    """The folder inside models/ that the test module names as FOLDER, where Load looks; emptied after each test."""
    folder = host.models / request.module.FOLDER
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def mine(models, file):
    """mine.safetensors in there: the test module's model file."""
    return shutil.copy(file, models / "mine.safetensors")


@pytest.fixture(scope="module")
def load(request, host_and_pack, file):
    """load(node): what the wire carries of the test module's model file; nothing is left in its folder."""

    def run(node):
        host, pack = host_and_pack
        folder = host.models / request.module.FOLDER
        folder.mkdir(parents=True)
        shutil.copy(file, folder)
        loaded = pack.call(node, model_name=file.name, precision="fp32").model
        shutil.rmtree(host.models)
        return loaded

    return run


@pytest.fixture(scope="module")
def model(host_and_pack):
    """What a MIMICBRUSH_MODEL wire carries: the embedded model in fp32."""
    return host_and_pack[1].call("Load", model_name=EMBEDDED, precision="fp32").model


@pytest.fixture(scope="module")
def reference(host_and_pack, model):
    """What a MIMICBRUSH_REFERENCE wire carries: one random picture, encoded."""
    return host_and_pack[1].call("EncodeReference", model=model, picture=noise(1, 60, 50, seed=7)).reference


@pytest.fixture
def sample(pack, model, reference):
    """sample(source, mask, **inputs): the sampler with this module's model and reference."""

    def run(source, mask, **inputs):
        return pack.call("Sampler", **{"model": model, "reference": reference, "source": source, "mask": mask} | inputs)

    return run
