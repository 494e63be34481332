"""The README in an artifact's folder: how the file runs with its runtime alone, without edgejoule.

The runtime's own lines come from the backend (``handover``); the images' preprocessing and what the file was compiled from, from the
artifact. The README is no part of the artifact's identity: its hash stands in no manifest. Runs nothing.
"""

from __future__ import annotations

from pathlib import Path

from edgejoule.caveats import UNRANKED
from edgejoule.records import Artifact, Preprocessing
from edgejoule.seams import Backend, Handover

NAME = "README.md"


def write_readme(backend: Backend, artifact: Artifact) -> None:
    """Writes ``README.md`` into the artifact's folder; nothing for a backend that says nothing. Raises OSError."""
    tell = getattr(backend, "handover", None)
    if tell is not None:
        (Path(artifact.folder) / NAME).write_text(readme(artifact, tell(artifact)), encoding="utf-8")


def readme(artifact: Artifact, how: Handover) -> str:
    """Markdown. Its Python block reads photo.jpg beside the file and prints the class; ``run`` is the runtime's part."""
    spec, parity = artifact.variant.spec, artifact.parity
    shape = (artifact.batch, *spec.preprocessing.input_size)
    checked = f"; same top-1 as the float32 network on {parity.top1_agreement:.1%} of {parity.n} images" if parity else "; not run here"
    lines = [
        f"# {artifact.label}",
        "",
        f"{artifact.info.precision if parity else artifact.precision}, {artifact.info.runtime if parity else artifact.backend}{checked}. "
        f"Takes float32 {shape}, gives logits ({artifact.batch}, {spec.num_classes}) of {spec.dataset}. Licence: {spec.licence}.",
        *_refusals(artifact),
        "",
        f"    {how.install}",
        "",
        "```python",
        how.python.rstrip(),
        *_preprocessing(spec.preprocessing, artifact.batch),
        "print(run(images).argmax(1))",
        "```",
    ]
    if how.cpp:
        lines += ["", "```cpp", how.cpp.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _refusals(artifact: Artifact) -> list[str]:
    """What the truth gate says against the file: whoever gets the folder alone must read it too."""
    found = [f"{doubt.code.replace('_', ' ')}: {doubt.seen}" for doubt in artifact.caveats if doubt.code in UNRANKED]
    return ["", f"**Not to be ranked or shipped as it is:** {'; '.join(found)}."] if found else []


def _preprocessing(images: Preprocessing, batch: int) -> list[str]:
    """The lines that make ``images`` (B, C, H, W) of photo.jpg: as ``data.crop`` and ``data.normalise`` do."""
    _, height, width = images.input_size
    tall, wide = int(height / images.crop_pct), int(width / images.crop_pct)
    size = f"({wide}, {tall})" if images.crop_mode == "squash" else f"[int({tall} * side / min(photo.size)) for side in photo.size]"
    return [
        "import numpy as np",
        "from PIL import Image",
        'photo = Image.open("photo.jpg").convert("RGB")',
        f"photo = photo.resize({size}, Image.Resampling.{images.interpolation.upper()})",
        f"x, y = round((photo.width - {width}) / 2), round((photo.height - {height}) / 2)",
        f"pixels = np.asarray(photo.crop((x, y, x + {width}, y + {height})), np.float32) / 255",
        f"pixels = (pixels - np.float32({list(images.mean)})) / np.float32({list(images.std)})",
        f"images = np.repeat(pixels.transpose(2, 0, 1)[None], {batch}, 0)  # (B, C, H, W)",
    ]
