"""Weight files of every origin and in every state of damage: what they are called, refused with, and never do."""

import gzip
import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from model_files import CHECKPOINT, DEPTH, SINGLE, UNET_KEY, VAE, VAE_FOLDER, flip
from safetensors.torch import load_file, save_file

from mimicbrush_core import verify, weight_files
from mimicbrush_core.checkpoints import load_modules
from mimicbrush_core.cli import main
from mimicbrush_core.errors import ModelFileError
from mimicbrush_core.recognition import recognise
from mimicbrush_core.verify import LOCK_NAME, describe, inspect
from mimicbrush_core.weight_files import SafetensorsFile, check_integrity, file_sha256


class Harmful:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def tensors(*names, shape=(2,)):
    return {name: torch.zeros(shape) for name in names}


MAGIC_FIXUP = tensors("model.diffusion_model.out.0.weight", "model.reference_model.out.0.weight")
PAINT_BY_EXAMPLE = tensors("model.diffusion_model.out.0.weight", "cond_stage_model.mapper.resblocks.0.ln_1.weight")
SDXL = tensors("model.diffusion_model.out.0.weight", "conditioner.embedders.0.x", "first_stage_model.encoder.x")
SD = {
    **tensors("first_stage_model.encoder.down.0.x", "first_stage_model.decoder.up.0.x", "cond_stage_model.x"),
    "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
}
SD_INPAINTING = {**SD, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}
LORA = tensors("lora_unet_down_blocks_0.lora_up.weight", "lora_unet_down_blocks_0.lora_down.weight")
CLIP = tensors("vision_model.encoder.layers.0.mlp.fc1.weight")
UNET = tensors("down_blocks.0.x", "mid_block.x", "conv_out.weight")
FLUX_VAE = {
    **tensors("encoder.down.0.x", "decoder.up.0.x"),
    "decoder.conv_in.weight": torch.zeros(8, 16, 3, 3),
}
DEPTH_SMALL = {**tensors("depth_head.x"), "pretrained.cls_token": torch.zeros(1, 1, 384)}

HTML = b"\n<!DOCTYPE html>\n<html><head><title>Access denied</title></head></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 4265380512\n"


def cut(name, length):
    return lambda world: world.replace(name, world.file(name).read_bytes()[:length])


def put(name, content):
    return lambda world: world.replace(name, content)


def put_pickle(name, content, **how):
    return lambda world: torch.save(content, world.file(name), **how)


def put_tensors(name, content):
    return lambda world: save_file({key: value.clone() for key, value in content.items()}, world.file(name))


def put_link(name, target):
    def spoil(world):
        world.file(name).unlink()
        world.file(name).symlink_to(target)

    return spoil


def put_folder(name):
    def spoil(world):
        world.file(name).unlink()
        world.file(name).mkdir()

    return spoil


def put_pipe(world):
    world.file(CHECKPOINT).unlink()
    os.mkfifo(world.file(CHECKPOINT))


def in_part(part, change):
    return lambda world: world.change_part(part, change)


def in_tensors(name, change):
    return lambda world: world.change_tensors(name, change)


def in_config(**changes):
    return lambda world: world.change_config(**changes)


def in_header(change):
    return lambda world: world.change_header(change)


def in_json(name, **changes):
    def spoil(world):
        stored = json.loads(world.file(name).read_text())
        world.file(name).write_text(json.dumps({**stored, **changes}))

    return spoil


def set_value(key, index, value):
    def change(state):
        state[key] = state[key].clone()
        state[key].view(-1)[index] = value

    return change


def set_entry(key, value):
    return lambda state: state.update({key: value})


def drop(key):
    return lambda state: state.pop(key)


def flip_at(name, find, after=0):
    """Flip a bit of the byte `after` bytes behind the first occurrence of `find`."""
    return lambda world: flip(world.file(name), world.file(name).read_bytes().index(find) + after)


def flip_in_zip(record):
    """Flip a bit in the middle of one record of the checkpoint."""

    def spoil(world):
        with zipfile.ZipFile(world.file(CHECKPOINT)) as archive:
            info = next(info for info in archive.infolist() if info.filename.endswith(record))
        start = info.header_offset + 30 + len(info.filename)
        content = world.file(CHECKPOINT).read_bytes()
        extra = int.from_bytes(content[info.header_offset + 28 : info.header_offset + 30], "little")
        flip(world.file(CHECKPOINT), start + extra + info.file_size // 2)

    return spoil


def plant(how):
    def spoil(world):
        harmful = Harmful(world.marker)
        if how == "bare":
            world.replace(CHECKPOINT, pickle.dumps(harmful, protocol=2))
        else:
            world.save_parts({**world.parts(), "unet": harmful}, _use_new_zipfile_serialization=how == "zip")

    return spoil


def zip_of_something(world):
    with zipfile.ZipFile(world.file(CHECKPOINT), "w") as archive:
        archive.writestr("MimicBrush/readme.md", "hello")


def depth_folder(**entries):
    config = {"model_type": "depth_anything", "backbone_config": {"out_indices": [9, 10, 11, 12]}, **entries}
    return lambda world: world.file("depth_model/config.json").write_text(json.dumps(config))


def shift_offsets(header):
    first = next(name for name in header if name != "__metadata__")
    header[first]["data_offsets"] = [0, 4]


def only_text_entries(header):
    for name in header.keys() - {"__metadata__"}:
        header[name] = "text"


UNET_SINGLE = f"unet.{UNET_KEY}"

# name: (what is loaded, how it is spoiled, what the message must say beside the file's name)
RELEASE_CASES = {
    "cut in half": (CHECKPOINT, cut(CHECKPOINT, 20_000), ["cut off", "Download"]),
    "last bytes missing": (CHECKPOINT, cut(CHECKPOINT, -1), ["cut off", "Download"]),
    "four bytes": (CHECKPOINT, cut(CHECKPOINT, 4), ["cut off", "Download"]),
    "one byte": (CHECKPOINT, put(CHECKPOINT, b"P"), ["1 bytes", "expected", "Download"]),
    "zero length": (CHECKPOINT, put(CHECKPOINT, b""), ["empty", "0 bytes", "Download"]),
    "a folder": (CHECKPOINT, put_folder(CHECKPOINT), ["folder", "expected"]),
    "links in a circle": (CHECKPOINT, put_link(CHECKPOINT, "mimicbrush.bin"), ["circle", "Remove the link"]),
    "broken link": (CHECKPOINT, put_link(CHECKPOINT, "gone.bin"), ["link to gone.bin", "not exist"]),
    "a pipe": (CHECKPOINT, put_pipe, ["pipe", "expected"]),
    "web page": (CHECKPOINT, put(CHECKPOINT, HTML), ["web page", "download failed"]),
    "xml": (CHECKPOINT, put(CHECKPOINT, b"<?xml version='1.0'?><Error>AccessDenied</Error>"), ["failed download"]),
    "git-LFS pointer": (CHECKPOINT, put(CHECKPOINT, LFS), ["git-LFS pointer", "git lfs pull"]),
    "JSON text": (CHECKPOINT, put(CHECKPOINT, b'{"error": "Repository not found"}'), ["JSON", "Download"]),
    "zeros only": (CHECKPOINT, put(CHECKPOINT, bytes(5000)), ["zeros", "Download"]),
    "a picture": (CHECKPOINT, put(CHECKPOINT, b"\x89PNG\r\n\x1a\n" + bytes(50)), ["a picture"]),
    "compressed": (CHECKPOINT, put(CHECKPOINT, gzip.compress(b"x" * 999)), ["compressed", "Unpack"]),
    "GGUF": (CHECKPOINT, put(CHECKPOINT, b"GGUF\x03\0\0\0" + bytes(90)), ["GGUF", "safetensors"]),
    "noise": (CHECKPOINT, put(CHECKPOINT, b"\xa5\x17" * 300), ["600 bytes", "expected", "Download"]),
    "foreign zip": (CHECKPOINT, zip_of_something, ["zip archive", "readme.md", "Unpack"]),
    "bit flipped in a weight": (CHECKPOINT, flip_in_zip("/data/0"), ["damaged", "/data/0", "checksum"]),
    "bit flipped in the table": (CHECKPOINT, flip_in_zip("/data.pkl"), ["Download"]),
    "code in a pickle": (CHECKPOINT, plant("zip"), ["run code", "mkdir", "nothing of it was run"]),
    "code in an old pickle": (CHECKPOINT, plant("old"), ["run code", "mkdir", "nothing of it was run"]),
    "code in a bare pickle": (CHECKPOINT, plant("bare"), ["run code", "mkdir", "nothing of it was run"]),
    "a list": (CHECKPOINT, put_pickle(CHECKPOINT, [1, 2]), ["holds a list", "dictionary"]),
    "empty dictionary": (CHECKPOINT, put_pickle(CHECKPOINT, {}), ["'unet'", "nothing"]),
    "part missing": (
        CHECKPOINT,
        lambda world: world.save_parts({"unet": world.parts()["unet"]}),
        ["'referencenet'", "has unet"],
    ),
    "part is a tensor": (
        CHECKPOINT,
        lambda world: world.save_parts({**world.parts(), "unet": torch.zeros(2)}),
        ["'unet'", "has"],
    ),
    "key missing": (CHECKPOINT, in_part("unet", drop(UNET_KEY)), [UNET_KEY, "is missing", "verify"]),
    "key too many": (CHECKPOINT, in_part("image_proj", set_entry("surplus", torch.ones(1))), ["'surplus'", "not expe"]),
    "wrong shape": (CHECKPOINT, in_part("unet", set_entry(UNET_KEY, torch.ones(3))), [UNET_KEY, "[3]", "[8, 8]"]),
    "NaN": (CHECKPOINT, in_part("unet", set_value(UNET_KEY, 5, torch.nan)), [UNET_KEY, "1 NaN", "finite"]),
    "infinity": (CHECKPOINT, in_part("referencenet", set_value(UNET_KEY, 0, torch.inf)), [UNET_KEY, "1\ninfinite"]),
    "whole numbers": (
        CHECKPOINT,
        in_part("unet", set_entry(UNET_KEY, torch.ones(8, 8, dtype=torch.int64))),
        [UNET_KEY, "int64", "floating-point"],
    ),
    "sparse": (
        CHECKPOINT,
        in_part("unet", set_entry(UNET_KEY, torch.eye(8).to_sparse())),
        [UNET_KEY, "sparse", "expected"],
    ),
    "not a tensor": (CHECKPOINT, in_part("unet", set_entry(UNET_KEY, "text")), [UNET_KEY, "str", "a tensor"]),
    "Magic Fixup": (CHECKPOINT, put_pickle(CHECKPOINT, MAGIC_FIXUP), ["Magic Fixup", "mimicbrush", "'unet'"]),
    "Magic Fixup by DeepSpeed": (
        CHECKPOINT,
        put_pickle(CHECKPOINT, {f"_forward_module.{name}": value for name, value in MAGIC_FIXUP.items()}),
        ["Magic Fixup"],
    ),
    "Paint by Example": (CHECKPOINT, put_pickle(CHECKPOINT, {"state_dict": PAINT_BY_EXAMPLE}), ["Paint by Example"]),
    "Stable Diffusion": (CHECKPOINT, put_pickle(CHECKPOINT, {"state_dict": SD}), ["Stable Diffusion 1.x", "--vae"]),
    "IP-Adapter": (CHECKPOINT, put_pickle(CHECKPOINT, {"image_proj": {}, "ip_adapter": {}}), ["IP-Adapter"]),
    "no VAE": (None, lambda world: shutil.rmtree(world.file(VAE_FOLDER)), ["no vae", "sd-vae-ft-mse"]),
    "no depth": (None, lambda world: shutil.rmtree(world.file("depth_model")), ["no depth", "vitb14"]),
    "VAE folder empty": (VAE_FOLDER, lambda world: world.file(VAE).unlink(), ["no weight file", "looked for"]),
    "VAE of Flux": (VAE, put_tensors(VAE, FLUX_VAE), ["another system (16", "4 latent channels"]),
    "VAE is SDXL": (VAE, put_tensors(VAE, SDXL), ["Stable Diffusion XL", "expected"]),
    "VAE is a LoRA": (VAE, put_tensors(VAE, LORA), ["LoRA", "VAE was expected"]),
    "VAE is the depth": (VAE, lambda world: shutil.copy(world.file(DEPTH), world.file(VAE)), ["Depth Anything"]),
    "depth is the VAE": (DEPTH, lambda world: shutil.copy(world.file(VAE), world.file(DEPTH)), ["VAE of", "expected"]),
    "VAE of another class": (
        "sd-vae-ft-mse/config.json",
        in_json("sd-vae-ft-mse/config.json", _class_name="VQModel"),
        ["VQModel", "AutoencoderKL was expected"],
    ),
    "VAE of SDXL's scale": (
        "sd-vae-ft-mse/config.json",
        in_json("sd-vae-ft-mse/config.json", scaling_factor=0.13025),
        ["scaling_factor", "0.13025", "0.18215"],
    ),
    "VAE configuration broken": (
        "sd-vae-ft-mse/config.json",
        put("sd-vae-ft-mse/config.json", b'{"_class'),
        ["JSON", "Download"],
    ),
    "VAE configuration not UTF-8": (
        "sd-vae-ft-mse/config.json",
        put("sd-vae-ft-mse/config.json", b"\xff\xfe{}"),
        ["JSON", "Download"],
    ),
    "VAE configuration nonsense": (
        VAE,
        in_json("sd-vae-ft-mse/config.json", block_out_channels="many"),
        ["'vae'", "configuration"],
    ),
    "VAE with NaN": (VAE, in_tensors(VAE, set_value("quant_conv.bias", 0, torch.nan)), ["quant_conv.bias", "1 NaN"]),
    "VAE web page": (VAE, put(VAE, HTML), ["web page"]),
    "depth v2": (
        "depth_model/config.json",
        depth_folder(backbone_config={"out_indices": [3, 6, 9, 12]}),
        ["out_indices", "[3, 6, 9, 12]", "v2"],
    ),
    "metric depth": ("depth_model/config.json", depth_folder(depth_estimation_type="metric"), ["metric", "relative"]),
    "another depth model": ("depth_model/config.json", depth_folder(model_type="dpt"), ["'dpt'", "depth_anything"]),
    "depth of another size": (DEPTH, put_tensors(DEPTH, DEPTH_SMALL), ["depth_network", "missing"]),
    "depth LFS pointer": (DEPTH, put(DEPTH, LFS), ["git-LFS pointer"]),
}

SINGLE_CASES = {
    "cut in half": (cut(SINGLE, 200_000), ["cut off", "expected", "Download"]),
    "last byte missing": (cut(SINGLE, -1), ["cut off", "bytes, expected"]),
    "cut inside the header": (cut(SINGLE, 1000), ["header should be", "cut off"]),
    "five bytes": (cut(SINGLE, 5), ["5 bytes", "expected"]),
    "zero length": (put(SINGLE, b""), ["empty", "Download"]),
    "bytes too many": (
        lambda world: world.replace(SINGLE, world.file(SINGLE).read_bytes() + b"\0" * 7),
        ["7 bytes too many", "expected"],
    ),
    "web page": (put(SINGLE, HTML), ["web page", "download failed"]),
    "git-LFS pointer": (put(SINGLE, LFS), ["git-LFS pointer"]),
    "a folder": (put_folder(SINGLE), ["no checkpoint", "mimicbrush.bin"]),
    "links in a circle": (put_link(SINGLE, SINGLE), ["circle"]),
    "header length flipped": (lambda world: flip(world.file(SINGLE), 3, 6), ["header should be", "damaged"]),
    "header not JSON": (flip_at(SINGLE, b'"__metadata__"'), ["header is not valid JSON", "Download"]),
    "header not UTF-8": (lambda world: flip(world.file(SINGLE), 20, 7), ["header is not valid JSON"]),
    "header empty": (
        lambda world: world.replace(SINGLE, (2).to_bytes(8, "little") + b"{}"),
        ["'mimicbrush' entry", "Give"],
    ),
    "header of another file": (in_header(lambda header: header.clear()), ["bytes too many", "expected"]),
    "header entries of text": (in_header(only_text_entries), ["header", "Download"]),
    "header entry without offsets": (
        in_header(lambda header: header[UNET_SINGLE].pop("data_offsets")),
        ["header is damaged", "data_offsets"],
    ),
    "header offsets overlap": (in_header(shift_offsets), ["header is damaged", "Download"]),
    "header dtype unknown": (in_header(lambda header: header[UNET_SINGLE].update(dtype="F33")), ["header is damaged"]),
    "header key flipped": (flip_at(SINGLE, b'"unet.mid_block.attentions.0.norm.weight"', 12), ["unet", "missing"]),
    "header shape changed": (
        in_header(lambda header: header[UNET_SINGLE].update(shape=[4, 16])),
        [UNET_KEY, "[4, 16]", "[8, 8]"],
    ),
    "no configuration": (put_tensors(SINGLE, tensors("x")), ["'mimicbrush' entry", "Give"]),
    "saved by another program": (
        lambda world: save_file(load_file(world.file(SINGLE)), world.file(SINGLE)),
        ["without the configuration", "Convert the original"],
    ),
    "Magic Fixup": (put_tensors(SINGLE, MAGIC_FIXUP), ["Magic Fixup"]),
    "Paint by Example": (put_tensors(SINGLE, PAINT_BY_EXAMPLE), ["Paint by Example"]),
    "SDXL": (put_tensors(SINGLE, SDXL), ["Stable Diffusion XL"]),
    "Stable Diffusion": (put_tensors(SINGLE, SD), ["Stable Diffusion 1.x", "VAE can be used"]),
    "Stable Diffusion inpainting": (put_tensors(SINGLE, SD_INPAINTING), ["1.x inpainting"]),
    "LoRA": (put_tensors(SINGLE, LORA), ["LoRA"]),
    "CLIP": (put_tensors(SINGLE, CLIP), ["CLIP vision"]),
    "one part": (
        put_tensors(SINGLE, {**UNET, "conv_in.weight": torch.zeros(8, 13, 3, 3)}),
        ["imitative U-Net", "one part"],
    ),
    "SmartBrush": (put_tensors(SINGLE, {**UNET, "conv_in.weight": torch.zeros(8, 5, 3, 3)}), ["SmartBrush"]),
    "configuration without system": (
        in_config(system=None),
        ["None", "'mimicbrush' or 'paint-by-example' or 'magic-fixup' or 'smartbrush' was expected"],
    ),
    "configuration of another system": (
        in_config(system="brushnet"),
        ["'brushnet'", "'mimicbrush' or 'paint-by-example' or 'magic-fixup' or 'smartbrush' was expected"],
    ),
    "configuration from the future": (in_config(version=7), ["version 7", "expected 1", "Update"]),
    "configuration without a section": (in_config(vae=None), ["no 'vae'", "expected"]),
    "configuration section of text": (in_config(unet="big"), ["no 'unet'", "expected"]),
    "configuration of nonsense": (in_config(unet={"block_out_channels": -1}), ["'unet'", "configuration"]),
    "configuration with an unknown VAE": (in_config(vae={"class": "os.system"}), ["'os.system'", "AutoencoderKL"]),
    "configuration not JSON": (
        in_header(lambda header: header["__metadata__"].update(mimicbrush="{")),
        ["not valid JSON", "damaged"],
    ),
    "configuration a list": (
        in_header(lambda header: header["__metadata__"].update(mimicbrush="[]")),
        ["a list", "expected an object"],
    ),
    "metadata not text": (in_header(lambda header: header.update(__metadata__={"mimicbrush": 3})), ["__metadata__"]),
    "key missing": (in_tensors(SINGLE, drop(UNET_SINGLE)), ["'unet'", UNET_KEY, "is missing"]),
    "key too many": (in_tensors(SINGLE, set_entry("vae.surplus", torch.ones(1))), ["'surplus'", "not expected"]),
    "foreign key": (in_tensors(SINGLE, set_entry("text.x", torch.ones(1))), ["'text.x'", "keys begin"]),
    "wrong shape": (in_tensors(SINGLE, set_entry(UNET_SINGLE, torch.ones(2))), [UNET_KEY, "[2]", "[8, 8]"]),
    "NaN": (in_tensors(SINGLE, set_value(UNET_SINGLE, 0, torch.nan)), [UNET_KEY, "1 NaN", "finite"]),
    "infinity": (in_tensors(SINGLE, set_value(UNET_SINGLE, 0, -torch.inf)), [UNET_KEY, "1\ninfinite"]),
    "whole numbers": (
        in_tensors(SINGLE, set_entry(UNET_SINGLE, torch.ones(8, 8, dtype=torch.int32))),
        [UNET_KEY, "int32"],
    ),
}


def refusal(path, config=None, **options):
    with pytest.raises(ModelFileError) as caught:
        load_modules(path, config=config, **options)
    return str(caught.value)


def assert_refused(world, path, file, words):
    """Loading and verifying say the same, name the file, and neither write nor execute anything."""
    before = world.snapshot() if words[0] != "pipe" else None
    message = refusal(path, world.config)
    report = inspect(path, config=world.config)
    assert not report.usable and (report.problems or report.notes)
    assert not world.marker.exists()
    if before is not None:
        assert world.snapshot() == before
    assert str(file) in message
    for word in words:
        assert word.replace("\n", " ").lower() in message.replace("\n", " ").lower(), message


@pytest.mark.parametrize("case", RELEASE_CASES)
def test_a_spoiled_release_is_refused(world, case):
    file, spoil, words = RELEASE_CASES[case]
    spoil(world)
    assert_refused(world, world.folder, world.file(file) if file else world.folder, words)


@pytest.mark.parametrize("case", SINGLE_CASES)
def test_a_spoiled_single_file_is_refused(world, case):
    spoil, words = SINGLE_CASES[case]
    spoil(world)
    assert_refused(world, world.file(SINGLE), world.file(SINGLE), words)


def test_the_table_is_long_enough_and_starts_from_files_that_load(micro):
    assert len(RELEASE_CASES) + len(SINGLE_CASES) >= 100
    folder, config = micro
    load_modules(folder, config=config)
    load_modules(folder / SINGLE)
    assert inspect(folder, config=config).usable and inspect(folder / SINGLE).usable


def test_the_marker_works(tmp_path):
    pickle.loads(pickle.dumps(Harmful(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ("two words", "模型 ünï", "-o", "a'b\"c", "x" * 200, "new\nline", "%s {0}"))
@pytest.mark.parametrize("good", (True, False))
def test_any_name_will_do(world, name, good):
    path = world.folder / name / ".." / name / f"{name}.bin"
    (world.folder / name).mkdir()
    shutil.copy(world.file(SINGLE), path)
    if good:
        load_modules(path)
        assert inspect(path).usable
        return
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in refusal(path) and "cut off" in refusal(path)
    assert path.name in describe(inspect(path))


@pytest.mark.parametrize("name", ("nul\0byte", "y" * 300, "missing", "file/below"))
def test_names_that_cannot_be(world, name):
    (world.folder / "file").write_bytes(b"")
    message = refusal(world.folder / name)
    assert ascii(name)[1:-1] in ascii(message) or repr(name)[1:-1] in message
    assert not inspect(world.folder / name).usable


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no such permissions here")
@pytest.mark.parametrize("what", ("file", "folder"))
def test_without_permission(world, what, tmp_path_factory):
    """Root may read everything, so the test becomes somebody else for a moment."""
    for folder in (world.folder, *world.folder.parents):
        if folder.is_relative_to(tmp_path_factory.getbasetemp().parent):
            folder.chmod(0o755)
    spoiled = world.file(SINGLE) if what == "file" else world.folder
    spoiled.chmod(0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        message = refusal(spoiled)
        report = inspect(spoiled)
    finally:
        if root:
            os.seteuid(0)
        spoiled.chmod(0o755)
    assert str(spoiled) in message and "may not be read" in message and "permission" in message
    assert report.problems == (message,)


def test_a_value_that_half_precision_cannot_hold(world):
    world.change_tensors(SINGLE, set_value(UNET_SINGLE, 0, 70000.0))
    load_modules(world.file(SINGLE))
    load_modules(world.file(SINGLE), dtype=torch.bfloat16)
    message = refusal(world.file(SINGLE), dtype=torch.float16)
    assert UNET_KEY in message and "7e+04" in message and "6.55e+04" in message and "bf16" in message


@pytest.mark.parametrize("name", (SINGLE, CHECKPOINT))
def test_content_counts_not_the_name(world, name):
    """A .bin that is a safetensors file, and the other way round."""
    swapped = world.file(name).with_suffix(".bin" if name == SINGLE else ".safetensors")
    world.file(name).rename(swapped)
    load_modules(swapped, config=world.config)
    assert inspect(swapped, config=world.config).usable


# -------------------- flipped bits that stay finite


def test_a_flipped_bit_in_the_data_of_a_file_written_here_is_found_by_its_checksum(world):
    path = world.file(SINGLE)
    assert check_integrity(path)
    for offset in (-1, -100_000, path.stat().st_size // 2):
        flip(path, offset)
        report = inspect(path)
        assert not report.usable and "SHA-256" in report.problems[0] and "expected" in report.problems[0]
        assert inspect(path, deep=False).usable  # only headers are read then
        flip(path, offset)
    flip(path, path.read_bytes().index(b"0.18215") + 3)  # a setting in the header
    assert not inspect(path).usable


def test_a_flipped_bit_elsewhere_is_left_to_the_hash_and_said_so(world):
    before = file_sha256(world.file(VAE))
    flip(world.file(VAE), -4)
    report = inspect(world.file(VAE_FOLDER), config=world.config, hash=True)
    assert report.usable and not check_integrity(world.file(VAE))
    assert report.sha256[os.path.basename(VAE)] != before
    assert any("SHA-256 only" in note for note in report.notes)


def test_the_lock_file_of_a_download_is_compared(world):
    entry = {"size": 1, "kind": "sha256", "digest": file_sha256(world.file(VAE))}
    world.file(LOCK_NAME).write_text(json.dumps({"format": 1, "files": {VAE: entry}}))
    assert inspect(world.folder, config=world.config, hash=True).usable
    flip(world.file(VAE), -4)
    report = inspect(world.folder, config=world.config, hash=True)
    assert not report.usable and LOCK_NAME in report.problems[0] and entry["digest"] in report.problems[0]
    world.file(LOCK_NAME).write_text("{")
    report = inspect(world.file(VAE), config=world.config, hash=True)
    assert not report.usable and LOCK_NAME in report.problems[0]


def test_the_lock_file_has_one_name():
    from mimicbrush_core import hub

    assert verify.LOCK_NAME == hub.LOCK_NAME


def test_zips_without_checksums_are_read(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "get_crc32_options", lambda: False)
        parts = world.parts()
        torch.serialization.set_crc32_options(False)
        try:
            world.save_parts(parts)
        finally:
            torch.serialization.set_crc32_options(True)
    assert not check_integrity(world.file(CHECKPOINT))
    load_modules(world.folder, config=world.config)


# -------------------- what a file is


KINDS = {
    "magic-fixup-original": MAGIC_FIXUP,
    "magic-fixup-headerless": tensors("unet.x", "detail_extractor.x", "vae.x"),
    "paint-by-example-original": {"state_dict": PAINT_BY_EXAMPLE},
    "paint-by-example-image-encoder": tensors("uncond_vector", "mapper.blocks.0.norm1.weight"),
    "paint-by-example-headerless": tensors("unet.x", "exemplar_encoder.x", "vae.x"),
    "sdxl": SDXL,
    "stable-diffusion": SD,
    "stable-diffusion-inpainting": SD_INPAINTING,
    "stable-diffusion-2": {**SD, **tensors("cond_stage_model.model.x")},
    "lora": LORA,
    "clip-vision": CLIP,
    "clip-text": tensors("text_model.encoder.layers.0.x"),
    "controlnet": tensors("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"),
    "ip-adapter": {"image_proj": {}, "ip_adapter": {}},
    "other-diffusion": tensors("double_blocks.0.x", "single_blocks.0.x"),
    "unet": {**UNET, "conv_in.weight": torch.zeros(8, 4, 3, 3)},
    "unet-inpainting": {**UNET, "conv_in.weight": torch.zeros(8, 9, 3, 3)},
    "smartbrush-headerless": tensors("unet.x", "text_encoder.x", "vae.x"),
    "smartbrush-unet": {**UNET, "conv_in.weight": torch.zeros(8, 5, 3, 3)},
    "mimicbrush-unet": {**UNET, "conv_in.weight": torch.zeros(8, 13, 3, 3)},
    "mimicbrush-referencenet": {"down_blocks.0.x": 0, "mid_block.x": 0, "conv_in.weight": torch.zeros(8, 4, 3, 3)},
    "mimicbrush-depth-guider": tensors("conv_in.weight", "blocks.0.weight", "conv_out.weight"),
    "mimicbrush-image-proj": tensors("projector.weight", "projector.bias"),
    "mimicbrush-headerless": tensors("unet.x", "reference_unet.x"),
    "mimicbrush-original": {"unet": {}, "referencenet": {}},
    "vae-diffusers": tensors("encoder.down_blocks.0.x", "decoder.up_blocks.0.x"),
    "vae-single-file": tensors("first_stage_model.encoder.down.0.x", "first_stage_model.decoder.up.0.x"),
    "vae-other": FLUX_VAE,
    "vae-tiny": tensors("encoder.layers.0.weight", "decoder.layers.0.weight"),
    "depth-anything": DEPTH_SMALL,
    "depth-anything-transformers": {
        "backbone.embeddings.cls_token": torch.zeros(1, 1, 768),
        **tensors("neck.x", "head.x"),
    },
    "unknown": tensors("weight"),
}


@pytest.mark.parametrize("name", KINDS)
def test_recognised_by_content(name):
    assert recognise(KINDS[name]).name == name


@pytest.mark.parametrize(("width", "size"), ((384, "S"), (768, "B"), (1024, "L"), (1536, "G")))
def test_size_of_depth_anything(width, size):
    content = {**tensors("depth_head.x"), "pretrained.cls_token": torch.zeros(1, 1, width)}
    assert f"Depth Anything {size} " in recognise(content).title


def test_report_of_a_release(world):
    report = inspect(world.folder, config=world.config, hash=True)
    assert (report.kind, report.use, report.usable, report.deep) == (
        "mimicbrush-release",
        "model",
        True,
        True,
    )
    assert [file.kind for file in report.files] == [
        "mimicbrush-original",
        "vae-diffusers",
        "depth-anything-transformers",
    ]
    assert report.bytes == sum(world.file(name).stat().st_size for name in (CHECKPOINT, VAE, DEPTH))
    counted = sum(value.numel() for part in world.parts().values() for value in part.values())
    assert report.files[0].parameters == counted and report.files[0].precisions == {"float16": counted}
    assert set(report.precisions) == {"float16", "float32"}
    assert report.sha256["mimicbrush.bin"] == file_sha256(world.file(CHECKPOINT))
    assert "docs/licences.md" in report.licence and "OpenRAIL" in report.licence
    text = describe(report)
    assert "usable      yes, as model" in text and "float16" in text and report.sha256["mimicbrush.bin"] in text
    assert json.loads(report.to_json())["files"][1]["parts"][0]["precisions"] == {"float32": report.files[1].parameters}


def test_report_of_an_incomplete_release(world):
    shutil.rmtree(world.file(VAE_FOLDER))
    world.file(DEPTH).write_bytes(LFS)
    report = inspect(world.folder, config=world.config)
    assert not report.usable and report.missing == ("vae: sd-vae-ft-mse or vae",)
    assert len(report.problems) == 2 and "LFS" in " ".join(report.problems)


def test_a_release_wants_the_original_checkpoint(world):
    shutil.copy(world.file(SINGLE), world.file(CHECKPOINT))
    report = inspect(world.folder, config=world.config)
    assert not report.usable and "expected the checkpoint" in report.problems[0]
    assert "'unet'" in refusal(world.folder, world.config)


def test_report_names_missing_keys_and_every_damaged_part(world):
    def spoil(state):
        del state[UNET_SINGLE], state["vae.quant_conv.bias"]
        state["depth_network.head.conv1.bias"] = torch.full_like(state["depth_network.head.conv1.bias"], torch.nan)

    world.change_tensors(SINGLE, spoil)
    report = inspect(world.file(SINGLE))
    assert set(report.missing) == {UNET_SINGLE, "vae.quant_conv.bias"}
    assert sum("is missing" in problem for problem in report.problems) == 2
    assert any("head.conv1.bias" in problem and "2 NaN" in problem for problem in report.problems)


def test_values_are_looked_at_where_that_is_cheap_or_asked_for(world, monkeypatch):
    world.change_tensors(SINGLE, set_value(UNET_SINGLE, 0, torch.nan))
    assert not inspect(world.file(SINGLE)).usable
    assert inspect(world.file(SINGLE), deep=False).usable
    monkeypatch.setattr(verify, "DEEP_BELOW_BYTES", 10)
    assert inspect(world.file(SINGLE)).usable
    assert not inspect(world.file(SINGLE), deep=True).usable


@pytest.mark.parametrize(
    ("pipeline", "kind"),
    (("PaintByExamplePipeline", "paint-by-example-folder"), ("StableDiffusionPipeline", "pipeline-folder")),
)
def test_diffusers_folders(world, pipeline, kind):
    world.file("model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    report = inspect(world.folder, config=world.config)
    assert report.kind == kind and not report.usable and "OpenRAIL" in report.licence


def test_a_whole_checkpoint_is_usable_as_a_vae(world, tmp_path):
    """With diffusers' names under the checkpoint's prefix: the layout is tested in test_checkpoints."""
    state = {f"first_stage_model.{name}": value for name, value in load_file(world.file(VAE)).items()}
    path = tmp_path / "sd.safetensors"
    save_file({**state, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}, path)
    report = inspect(path, config=world.config)
    assert report.kind == "stable-diffusion" and report.use == "vae" and "VAE can be used" in report.notes[0]


def test_folder_with_nothing(tmp_path):
    report = inspect(tmp_path)
    assert report.kind == "no-weights" and not report.usable and "no weight file" in report.problems[0]


def test_verify_command(world, capsys):
    assert main(["verify", str(world.file(SINGLE)), "--hash"]) == 0
    out = capsys.readouterr().out
    assert "MimicBrush" in out and file_sha256(world.file(SINGLE)) in out
    assert main(["verify", str(world.folder), "--json"]) == 4  # of another size than SD-1.5
    streams = capsys.readouterr()
    assert json.loads(streams.out)["kind"] == "mimicbrush-release" and "another model" in streams.err
    assert main(["verify", str(world.folder / "missing")]) == 4
    assert "There is no file" in capsys.readouterr().err


def test_tensors_are_read_lazily(world):
    """Only the names asked for, and nothing is copied: the file may be far larger than memory."""
    assert set(SafetensorsFile(world.file(SINGLE)).tensors("image_projection.")) == {
        "image_projection.projector.weight",
        "image_projection.projector.bias",
    }


def test_a_single_file_s_header_is_parsed_once_for_all_parts(world, monkeypatch):
    parsed, real = [], weight_files._header
    monkeypatch.setattr(weight_files, "_header", lambda path: parsed.append(path) or real(path))
    load_modules(world.file(SINGLE))
    assert parsed == [world.file(SINGLE)]
