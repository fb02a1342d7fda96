"""Download MimicBrush and Convert MimicBrush: getting the released weights, only when asked to."""

from __future__ import annotations

import os

from comfy_api.latest import io

from ..mimicbrush_core.checkpoints import open_model
from ..mimicbrush_core.convert import PRECISIONS, convert
from ..mimicbrush_core.errors import ArgumentError
from ..mimicbrush_core.hub import RELEASES, download, plan_download
from ..mimicbrush_core.modules import MIMICBRUSH, TITLES
from . import host
from .schema import check_choice, schema

RELEASE_FOLDER = "mimicbrush_release"
SHOW, FETCH = "only show what it would fetch", "download"
NOT_ACCEPTED, ACCEPTED = "not accepted", "I accept: non-commercial research only"
RELEASED = {TITLES[system]: release for system, release in RELEASES.items()}
"""As the list calls them -> what is fetched."""


class DownloadMimicBrush(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushDownload",
            display_name="Download MimicBrush",
            description=(
                "Fetches the released weights of MimicBrush (about 10 GB) or Magic Fixup from their authors' page into "
                "the models folder: pinned to one version, checked by hash, and resumed where it stopped. They have "
                "licences of their own. Afterwards Convert MimicBrush makes one file of them."
            ),
            search_aliases=["mimicbrush", "download weights", "get model"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "action",
                    options=[SHOW, FETCH],
                    default=SHOW,
                    tooltip="Showing asks the page for the list of files and fetches nothing.",
                ),
                io.String.Input(
                    "folder",
                    default=RELEASE_FOLDER,
                    tooltip="Name of the folder inside models/ for the files as published; another one for each of "
                    "the weights.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(RELEASED),
                    optional=True,
                    tooltip="Whose weights. Those of Magic Fixup are under the Adobe Research License: non-commercial "
                    "research only, not for client work.",
                ),
                io.Combo.Input(
                    "licence",
                    options=[NOT_ACCEPTED, ACCEPTED],
                    optional=True,
                    tooltip="Needed for Magic Fixup only, whose weights are fetched for nobody who has not said so. "
                    "Read the licence on the page first.",
                ),
            ],
            outputs=[io.String.Output("release", display_name="release", tooltip="The folder's name, for Convert.")],
        )

    @classmethod
    def fingerprint_inputs(cls, action, folder, **choices) -> float:
        return float("nan")  # the disk may have changed: never answered from the cache

    @classmethod
    def execute(cls, action, folder, weights=TITLES[MIMICBRUSH], licence=NOT_ACCEPTED) -> io.NodeOutput:
        check_choice("weights", weights, RELEASED)
        check_choice("licence", licence, (NOT_ACCEPTED, ACCEPTED))
        release = RELEASED[weights]
        progress = host.TaskProgress()

        def show(one) -> None:
            progress((one.name, one.stage), one.done, one.total)

        plan = plan_download(host.release_folder(folder), release=release, on_progress=show)
        listed = [f"{file.size / 1e6:,.1f} MB  {file.name}" for file in plan.missing]
        if action == FETCH:
            download(plan, show, accepted=release.terms if licence == ACCEPTED else "")
            text = f"Complete and verified: {plan.folder}"
        elif listed:
            terms = [release.terms] if release.terms else []
            text = "\n".join([f"{release.repository}, commit {plan.revision}", *terms, *listed, f"into {plan.folder}"])
        else:
            text = f"Nothing to fetch: {plan.folder} is complete and verified."
        return io.NodeOutput(folder, ui=host.shown_text(cls, text))


class ConvertMimicBrush(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MimicBrushConvert",
            display_name="Convert MimicBrush",
            description=(
                "Makes one .safetensors file in models/mimicbrush of the weights as published, or in "
                "models/paint_by_example or models/magic_fixup of those for Paint by Example or Magic Fixup. Needed "
                "once; the node that loads it lists the file after R is pressed."
            ),
            search_aliases=["mimicbrush", "convert weights", "safetensors", "paint by example", "magic fixup"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.String.Input(
                    "release",
                    default=RELEASE_FOLDER,
                    tooltip="Name of the folder inside models/ that holds the files as published, or of the one file; "
                    "whose they are is recognised.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="fp16",
                    tooltip="fp16: half the size, and exactly what loading the published files in fp16 gives.",
                ),
                io.String.Input("name", default="mimicbrush", tooltip="Name of the new file, without ending."),
            ],
            outputs=[
                io.String.Output(
                    "model_name",
                    display_name="model name",
                    tooltip="As the node that loads it lists it.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, release, precision, name) -> float:
        return float("nan")

    @classmethod
    def execute(cls, release, precision, name) -> io.NodeOutput:
        file_name = host.plain_name(name.removesuffix(host.EXTENSION)) + host.EXTENSION
        source = host.release_folder(release)
        system = open_model(source).config["system"]
        if system not in host.FOLDERS:
            raise ArgumentError(f"{source} is {TITLES[system]}, for which there are no nodes to load it.")
        folder = host.model_folder(system)
        os.makedirs(folder, exist_ok=True)
        output = os.path.join(folder, file_name)
        written = convert(source, output, precision=precision, on_progress=host.TaskProgress())
        text = f"Wrote {written} ({written.stat().st_size / 1e9:.2f} GB), checked. Press R and choose it in Load."
        return io.NodeOutput(file_name, ui=host.shown_text(cls, text))
