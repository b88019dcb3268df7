"""Write the generator of a run as a folder that other software reads, in the layout of the model hubs.

python -m dist_dcgan.export runs/default --out bedrooms
python bedrooms/sample.py bedrooms.png                       # needs numpy, Pillow and onnxruntime only

The folder holds weights (safetensors), configuration, a model card, and the network as ONNX for any batch size.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg
from torch import nn

from dist_dcgan.drawing import reported_as
from dist_dcgan.run.checkpoint import list_checkpoints, load_checkpoint
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.export import export_folder
from dist_dcgan.run.history import read_log, reported_reading
from dist_dcgan.trained import Trained, load_trained
from shards.common.command_line import Options, UserPath, build, parse_flags, run
from shards.common.errors import UserError
from shards.common.files import publish
from shards.common.messages import say
from shards.common.streams import output_is_optional

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MOST_DIFFERENCE = 1e-4
"""Between a value of torch and of onnxruntime, for images in [-1, 1]."""
_CHECKED = 64
"""Images that are compared."""


class Export(Options):
    """Write the generator of a run as a folder that other software reads."""

    run_dir: CliPositionalArg[UserPath]
    """Folder of the run."""
    out: UserPath
    """New folder to write."""
    best: bool = False
    """Export the best generator so far by KID instead of the latest."""
    licence: str = Field("unknown", pattern=r"^[A-Za-z0-9.+-]{1,64}$")
    """Licence of the weights for the model card, as the hubs name it, such as mit or cc0-1.0."""
    onnx: bool = True
    """Also write the network as ONNX, with a script that draws from it; needs the extra `onnx`."""


def main(argv: Sequence[str]) -> None:
    """Write the folder and print its path."""
    options = build(Export, parse_flags(Export, argv, "python -m dist_dcgan.export", about=__doc__))
    output_is_optional()
    if os.path.lexists(options.out):
        raise UserError(f"{options.out} exists: name another with --out")
    if not options.out.parent.is_dir():
        raise UserError(f"no folder {options.out.parent} for --out {options.out.name}: make it first")
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if options.onnx and missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}, or leave it out with --no-onnx"
        )
    trained = load_trained(options.run_dir, options.best, torch.device("cpu"))
    with reported_reading(options.run_dir):
        facts = facts_of(options.run_dir, trained)
    with reported_as(options.out), new_folder(options.out) as folder:
        export_folder(folder, trained.network, trained.description)
        if options.onnx:
            publish(folder / "model.onnx", to_onnx(trained))
            publish(folder / "sample.py", script(trained.description).encode())
        publish(folder / "README.md", card(trained.description, facts, options).encode())
    say(f"generator of step {trained.description['step']} in {options.out}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder that gets its name when the block ends, and is removed if the block raises."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        os.rename(temporary, path)  # replaces an empty folder at most
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def facts_of(path: Path, trained: Trained) -> dict[str, str]:
    """Return what the run says of its training; what it does not say is left out."""
    run_directory = RunDirectory(path)
    facts: dict[str, str] = {}
    checkpoints = list_checkpoints(run_directory.checkpoints)
    if checkpoints:
        with suppress(ValueError, KeyError):  # a damaged one says nothing
            digest = load_checkpoint(checkpoints[-1]).values["manifest_digest"]
            facts["Data set (digest of its shards)"] = f"`{digest}`"
    seen = [row for row in read_log(run_directory).rows if row.step <= trained.description["step"]]
    if seen:
        facts["Training images seen"] = f"{seen[-1].images:,}"
    if seen and seen[-1].kid is not None:
        facts["Last KID in training (EfficientNet-Lite0 unless configured)"] = f"{seen[-1].kid:.4f}"
    return facts


def to_onnx(trained: Trained) -> bytes:
    """Return the network as ONNX, z to images in [-1, 1]; raises UserError if onnxruntime draws other images."""
    import onnxruntime  # type: ignore[import-untyped]

    z = trained.latents(range(_CHECKED))
    program = torch.onnx.export(
        _Contiguous(trained.network).eval(),
        (z[:2],),
        input_names=["z"],
        output_names=["images"],
        dynamic_shapes=({0: torch.export.Dim("images")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"z": z.numpy()})
    with torch.no_grad():
        expected = trained.network(z).numpy()
    difference = float(np.abs(found - expected).max())
    if not difference <= MOST_DIFFERENCE:
        raise UserError(f"onnxruntime draws other images than torch (difference {difference:.2g}): use --no-onnx")
    return content


class _Contiguous(nn.Module):
    """The network on plain memory, as ONNX knows no other."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return one image per row of z."""
        images: torch.Tensor = self.network(z)
        return images.contiguous()


def card(description: dict[str, Any], facts: dict[str, str], options: Export) -> str:
    """Return the model card, with the metadata that the hubs read."""
    scores = {name.removeprefix("quality/"): f"{value:.4f}" for name, value in description["scores"].items()}
    rows = {"Step": f"{description['step']:,}", **facts, **scores, "Weights (SHA-256)": f"`{description['sha256']}`"}
    return _CARD.format(
        licence=options.licence,
        size=description["architecture"]["image_size"],
        latent=description["architecture"]["latent_dim"],
        distribution="uniform in [-1, 1]" if description["latent"] == "uniform" else "standard normal",
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        script=_WITH_SCRIPT if options.onnx else "",
    )


_CARD = """---
license: {licence}
library_name: dist_dcgan
pipeline_tag: unconditional-image-generation
tags:
- gan
- dcgan
---

# DCGAN generator

The averaged generator of a DCGAN (Radford et al. 2015, arXiv 1511.06434), trained with dist_dcgan. It maps {latent}
numbers, {distribution}, to an image of {size}x{size} pixels with values in [-1, 1].

| | |
|---|---|
{table}

## Sample

With dist_dcgan, which takes this folder like the folder of a run:

    python -m dist_dcgan.sample FOLDER --out grid.png --seeds 0-63
    python -m dist_dcgan.walk FOLDER --out walk.webp --loop
{script}"""
_WITH_SCRIPT = """
Without it, with numpy, Pillow and onnxruntime; the seeds are the same:

    python sample.py grid.png 64
"""
_UNIFORM = "z = (bits(seed, DIM) >> np.uint64(40)) * 2.0**-23 - 1"
_NORMAL = """both = bits(seed, -(-DIM // 2))
    radius = np.sqrt(-2 * np.log(((both >> np.uint64(40)) + np.uint64(1)) * 2.0**-24))
    angle = (both & np.uint64(0xFFFFFF)) * (2 * np.pi * 2.0**-24)
    z = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:DIM]"""


def script(description: dict[str, Any]) -> str:
    """Return a script that draws from the ONNX file, whose seeds are those of `dist_dcgan.sample`."""
    dim = description["architecture"]["latent_dim"]
    drawn = _NORMAL if description["latent"] == "normal" else _UNIFORM
    return f'''"""Draw a grid: python sample.py OUT.png [NUMBER OF IMAGES] (needs numpy, Pillow and onnxruntime)."""
import hashlib, pathlib, sys
import numpy as np, onnxruntime
from PIL import Image

DIM = {dim}

def bits(seed, count):  # SplitMix64 of a counter, keyed by the seed
    key = np.frombuffer(hashlib.blake2b(f"{{seed}}/samples/0".encode(), digest_size=8).digest(), "<u8")
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)

def latent(seed):
    {drawn}
    return z.astype(np.float32)

out, count = (*sys.argv[1:], "64")[:2] if 2 <= len(sys.argv) <= 3 else sys.exit(__doc__)
count = int(count) if count.isdecimal() and int(count) > 0 else sys.exit(__doc__)
model = onnxruntime.InferenceSession(str(pathlib.Path(__file__).with_name("model.onnx")))
images = model.run(None, {{"z": np.stack([latent(seed) for seed in range(count)])}})[0]
pixels = ((images + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
columns = round(count**0.5)
pixels = np.concatenate([pixels, np.zeros_like(pixels[: -count % columns])])  # an incomplete last row
rows = [np.hstack(pixels[i : i + columns]) for i in range(0, len(pixels), columns)]
Image.fromarray(np.vstack(rows)).save(out)
'''


def command() -> None:
    """Run it as an installed command."""
    run(main)


if __name__ == "__main__":
    command()
