"""Where a network's weights come from: the model hub or its local cache, or a file; and what identifies them.

The hub's files are reached through huggingface_hub, which timm itself uses, so ``HF_HOME``, ``HF_HUB_CACHE``, ``HF_ENDPOINT``
and ``HF_HUB_OFFLINE`` mean what they mean there. Whether the hub answers is asked once per process. Only safe formats are read:
safetensors, or ``torch.load(weights_only=True)``. Knows no architecture: timm's own code fits the tensors into the module.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgejoule.errors import ModelError

FILENAMES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
REACH_TIMEOUT_S = 3.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_files: dict[str, Path] = {}  # sha256 -> a user's weights file, seen in this process


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of pretrained weights: ``path`` is None where it has not been downloaded yet."""

    repository: str
    filename: str
    sha256: str
    path: Path | None


@functools.cache
def hub_reachable() -> bool:
    """Whether the hub answers within three seconds, name resolution included; False in offline mode. Asked once per process."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=REACH_TIMEOUT_S).close()
        except urllib.error.HTTPError as error:  # it answered; refusals of a proxy or server come with these codes
            answered.append(error.code not in (403, 407, 502, 503, 504))
        except (OSError, ValueError):
            answered.append(False)
        else:
            answered.append(True)

    thread = threading.Thread(target=ask, daemon=True)  # urllib's timeout does not cover the look-up of the name
    thread.start()
    thread.join(REACH_TIMEOUT_S)
    return bool(answered and answered[0])


def find_pretrained(config: dict[str, Any]) -> HubFile | None:
    """The pretrained weights of a timm configuration, from the hub's cache, else from the hub; None where neither has them."""
    repository = config.get("hf_hub_id")
    if not repository:
        return None
    names = (str(config["hf_hub_filename"]),) if config.get("hf_hub_filename") else FILENAMES
    for name in names:
        if (path := _cached(repository, name)) is not None:
            return HubFile(repository, name, _blob_sha256(path), path)
    if not hub_reachable():
        return None
    for name in names:
        if (sha256 := _hub_sha256(repository, name)) is not None:
            return HubFile(repository, name, sha256, None)
    return None


def fetch(file: HubFile) -> Path:
    """The file on this machine, downloaded if need be and checked against its sha256. Raises ModelError."""
    path = file.path or _download(file)
    if sha256_of(path) != file.sha256:
        raise ModelError(f"the weights {path} are damaged (their sha256 is not {file.sha256[:12]}…): delete the file and run again")
    return path


def remember(text: str) -> str:
    """The sha256 of a user's weights file, which ``recall`` finds again. Raises ModelError for no such file or an unsafe format."""
    path = Path(text).expanduser()
    if not path.is_file():
        raise ModelError(f'no weights file {text!r}: expected "auto", "random", "pretrained" or the path of a safetensors or .pth file')
    if path.suffix not in SUFFIXES:
        raise ModelError(f"cannot read weights from {path.name}: expected a name ending in {', '.join(SUFFIXES)}")
    sha256 = sha256_of(path)
    _files[sha256] = path.resolve()
    return sha256


def recall(sha256: str) -> Path | None:
    """The user's file of this sha256; None if this process has not seen one. Raises ModelError where the file has changed."""
    path = _files.get(sha256)
    if path is not None and sha256_of(path) != sha256:
        raise ModelError(f"{path} has changed since it was chosen: name it again to use what it holds now")
    return path


def read_state(path: Path, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name; of a training run's, the averaged weights unless ``use_ema`` is False.

    Raises ModelError for a file that is damaged or holds more than tensors.
    """
    import pickle

    from safetensors import SafetensorError
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(path), use_ema=use_ema, weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot read weights from {path} ({reason}): expected safetensors, or a .pth file that holds only tensors"
        ) from error
    if not state or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ModelError(f"{path} holds no state dictionary: expected tensors by name")
    return dict(state)


def sha256_of(path: Path) -> str:
    """A file's sha256. Raises ModelError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ModelError(f"cannot read {path} ({error.strerror}): expected a readable weights file") from error
    return digest.hexdigest()


def state_sha256(module: torch.nn.Module) -> str:
    """A hash of all parameters and buffers, by name: the identity of weights that come with a user's own code."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _cached(repository: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name)
    return Path(found) if isinstance(found, str) else None


def _blob_sha256(path: Path) -> str:
    """The hub names the blobs of large files by their sha256; where links are not possible the file itself is hashed."""
    name = path.resolve().name
    return name if _SHA256.fullmatch(name) else sha256_of(path)


def _network_errors() -> tuple[type[BaseException], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's client changed its HTTP library more than once; that library's root error is among its own error's parents.
    roots = [parent for parent in HfHubHTTPError.__mro__ if parent.__name__ in ("HTTPError", "RequestException")]
    return (*roots, OSError, ValueError)


def _hub_sha256(repository: str, name: str) -> str | None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        etag = get_hf_file_metadata(hf_hub_url(repository, name), timeout=REACH_TIMEOUT_S).etag
    except _network_errors():
        return None
    return etag if etag and _SHA256.fullmatch(etag) else None


def _download(file: HubFile) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(file.repository, file.filename))
    except _network_errors() as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f'cannot download {file.repository} from the hub ({reason}): try again, or ask for weights = "random"') from error
