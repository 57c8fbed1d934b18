"""Adapter + base -> merged weights, streamed tensor by tensor.

What a merge must add to is the base that the adapter was trained on: each weight goes through the same NF4
quantisation and back, bit for bit, and gets its update in float32. How the sum is stored decides as much:
the dequantised values are bfloat16 values, so rounding to bfloat16 by nearest swallows every update smaller
than half a step, always; float16 has three more bits.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from lora_rm.config import MergeSettings
from lora_rm.console import progress, say
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.errors import MergeError
from lora_rm.model.base import BaseModel, find_base, read_auto_config
from lora_rm.model.quantization import Quantization
from lora_rm.model.reward_model import HEAD_KEY, read_head, read_record, recorded_quantization
from lora_rm.model.tensor_files import BLOCK, StoredTensor, TensorWriter, stored_tensors

OVERFLOWING = ("gemma", "gemma2", "gemma3", "gemma3_text", "glm4", "t5gemma")
"""Families whose activations are known to overflow in float16 (vLLM refuses float16 for gemma2, gemma3, glm4)."""

RECORD = "lora_rm_merge.json"
"""File in the merged folder that says what was merged into what, and how."""

Rounding = Literal["float16", "bfloat16", "float32", "bfloat16_nearest"]
STORED = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bfloat16_nearest": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter does to one weight."""

    a: torch.Tensor
    """LoRA A, (rank, in) float32."""

    b: torch.Tensor
    """LoRA B, (out, rank) float32."""

    scale: float
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""

    magnitude: torch.Tensor | None
    """DoRA's magnitude of each output row, (out,) float32."""

    transposed: bool
    """Whether the checkpoint stores the weight as (in, out), as GPT-2's Conv1D does."""


@dataclass(slots=True)
class MergeReport:
    """What was done; lies in the merged folder as `lora_rm_merge.json`."""

    base: str
    base_weights: str
    dtype: str
    adapter_sha256: str
    adds_bos: bool = False
    """Whether the tokenizer puts a BOS before a text by itself."""

    num_tensors: int = 0
    num_updated: int = 0
    rounding_error: dict[str, float] = field(default_factory=dict)
    """Of each updated tensor: norm of (written - exact sum) over norm of the update."""

    @property
    def worst_rounding(self) -> float:
        """The largest rounding error."""
        return max(self.rounding_error.values(), default=0.0)


class Plan:
    """Everything about a merge that is known before the first tensor is read.

    Attributes say which stored tensor goes where under which name, what update it gets, and how it is stored.

    Raises:
        MergeError: If base and adapter do not fit, or the adapter holds something that cannot be merged.
    """

    def __init__(self, adapter: Path, settings: MergeSettings, base: BaseModel | None = None) -> None:
        self.adapter = adapter
        self.record = read_record(adapter)
        self.quantization: Quantization = recorded_quantization(self.record)
        named = self.record["base"]
        self.base = base or find_base(named["name"], named["revision"])
        self.head = read_head(adapter)
        self.config, self.transposed, renamings = _target(self.base)
        self.updates = _updates(adapter, self.transposed)
        self.mode = settings.base
        if self.mode == "auto":
            self.mode = "original" if self.quantization.kind == "none" else "dequantized"
        self.rounding = _rounding(settings.dtype, self.quantization, self.config.model_type)
        self.shards, self.stored_as = _shards(self.base, set(self.transposed), renamings)
        self._check_base()

    @property
    def dtype(self) -> torch.dtype:
        """Type of what is written, the head apart."""
        return STORED[self.rounding]

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return sum(tensor.num_bytes for shard in self.shards.values() for tensor in shard.values())

    def exact(self, name: str, tensor: StoredTensor) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The exact merged values of a tensor, in flat pieces of float32, each with the update in it or None.

        Raises:
            MergeError: If the base's codes are not those of training.
        """
        seen_in_training = self.mode == "dequantized" or self.quantization.kind == "none"
        update = self.updates.get(name)
        is_quantized = name.removesuffix(".weight") in self.record["quantization"]["codes"]
        if update is None and not (is_quantized and self.mode == "dequantized"):
            for piece in tensor.blocks():
                yield (piece.to(self.quantization.load_dtype) if seen_in_training else piece).float(), None
            return
        weight = tensor.read()
        is_transposed = self.transposed[name]
        if is_quantized and self.mode == "dequantized":
            weight = self._round_trip(name, weight.T.contiguous() if is_transposed else weight)
            weight = weight.T.contiguous() if is_transposed else weight
        elif seen_in_training:
            weight = weight.to(self.quantization.load_dtype)
        if update is None:
            yield from ((part.float(), None) for part in weight.flatten().split(BLOCK // 4))
            return
        yield from _summed(weight, update)

    def _round_trip(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        values, found = self.quantization.round_trip(weight)
        if found != self.record["quantization"]["codes"][name.removesuffix(".weight")]:
            raise MergeError(
                f"{name}: its {self.quantization.kind} codes are not those the adapter was trained on. The base has "
                f"changed since, or this machine quantises differently. Find the base of {self.record['base']}, or "
                "use --merge.base original, which makes another model."
            )
        return values

    def _check_base(self) -> None:
        shapes = {name: t.shape for shard in self.shards.values() for name, t in shard.items()}
        for name, update in self.updates.items():
            expected = (update.b.shape[0], update.a.shape[1])
            found = shapes[name][::-1] if update.transposed else shapes[name]
            if found != expected:
                raise MergeError(
                    f"{name}: the base's weight is {list(found)}, the adapter's update {list(expected)}."
                )


def merge(
    adapter: Path, output: Path, settings: MergeSettings | None = None, *, base: BaseModel | None = None
) -> MergeReport:
    """Writes the merged model as a transformers folder.

    Memory: one adapted tensor with its codes, its dequantised values and a block of the sum, and the adapter.
    The folder appears under its name only when it is whole.

    Args:
        adapter: Folder written by `RewardModel.save`.
        output: Folder to make.
        settings: Base, storage type, overwriting.
        base: Where the base lies now, if not where it lay at training.

    Raises:
        MergeError: If the output exists, base and adapter do not fit, or a value does not fit float16.
    """
    settings = settings or MergeSettings()
    if output.exists() and not settings.overwrite:
        raise MergeError(f"{output}: exists already. Remove it, or use --merge.overwrite True.")
    plan = Plan(adapter, settings, base)
    output.parent.mkdir(parents=True, exist_ok=True)
    for stale in output.parent.glob(f".{output.name}.*.partial"):
        shutil.rmtree(stale)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        report = _write(plan, partial)
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except _DoesNotFit as overflow:
        if settings.dtype != "auto":
            raise MergeError(
                f"{overflow.name}: a value of {overflow.value:.4g} does not fit float16. Use --merge.dtype bfloat16 or float32."
            ) from None
        say(f"{overflow.name} holds {overflow.value:.4g}, too large for float16: storing bfloat16 instead.")
        return merge(adapter, output, _with_dtype(settings, "bfloat16"), base=base)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if plan.mode == "original" and plan.quantization.kind != "none":
        say("Merged into the original base, which the adapter was not trained on: this is another model.")
    if plan.rounding == "bfloat16_nearest":
        say(f"Rounding to the nearest bfloat16 lost up to {report.worst_rounding:.0%} of a tensor's update.")
    return report


def check_weights(plan: Plan, merged: Path) -> dict[str, float]:
    """Compares what lies on the disk with the exact merge, tensor by tensor, without a forward pass.

    Returns:
        Of each updated tensor: norm of (written - exact) over norm of the update.

    Raises:
        MergeError: If a tensor or the head is missing, left over, not finite or wrong.
    """
    written = {
        tensor.name: tensor
        for file in sorted(merged.glob("*.safetensors"))
        for tensor in stored_tensors(file)
    }
    expected = {name: tensor for shard in plan.shards.values() for name, tensor in shard.items()}
    differing = written.keys() ^ {*(plan.stored_as[name] for name in expected), "score.weight"}
    if differing:
        raise MergeError(f"{merged}: tensors missing or left over: {sorted(differing)[:5]}.")
    if not torch.equal(written["score.weight"].read(), plan.head):
        raise MergeError(f"{merged}: its score head is not the trained one.")
    errors = {}
    with progress("checking weights (MiB)", plan.num_bytes // 2**20) as advance:
        for name, tensor in expected.items():
            errors[name] = _distance(plan, name, tensor, written[plan.stored_as[name]])
            advance(tensor.num_bytes // 2**20)
    return {name: errors[name] for name in plan.updates}


def _distance(plan: Plan, name: str, source: StoredTensor, written: StoredTensor) -> float:
    """Of an updated tensor, the error's share of the update; a wrong or broken tensor is an error."""
    if written.shape != source.shape:
        raise MergeError(f"{name}: has shape {list(written.shape)}, expected {list(source.shape)}.")
    error = update = 0.0
    position = written.start
    for exact, delta in plan.exact(name, source):
        part = StoredTensor(name, written.file, written.dtype, tuple(exact.shape), position)
        position += part.num_bytes
        found = part.read().float()
        if not torch.isfinite(found).all():
            raise MergeError(f"{name}: holds NaN or infinite values.")
        difference = found - exact
        # a 16-bit step is 2^-8 of a value in bfloat16 and 2^-11 (or 2^-25 in all) in float16
        step = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-22}[written.dtype]
        if bool((difference.abs() > step * exact.abs() + 2**-24).any()):
            raise MergeError(f"{name}: what was written is not the merged weight.")
        if delta is not None:
            error += float(difference.double().square().sum())
            update += float(delta.double().square().sum())
    return math.sqrt(error / update) if update else 0.0


def _write(plan: Plan, folder: Path) -> MergeReport:
    report = MergeReport(
        base=plan.base.name,
        base_weights=plan.mode,
        dtype=plan.rounding,
        adapter_sha256=hashlib.sha256((plan.adapter / "adapter_model.safetensors").read_bytes()).hexdigest(),
    )
    index: dict[str, str] = {}
    total = 0
    with progress("merging (MiB)", plan.num_bytes // 2**20) as advance:
        for number, (file, tensors) in enumerate(plan.shards.items()):
            is_last = number == len(plan.shards) - 1
            header = {plan.stored_as[name]: (plan.dtype, tensor.shape) for name, tensor in tensors.items()}
            if is_last:
                header["score.weight"] = (torch.float32, tuple(plan.head.shape))
            writer = TensorWriter(folder / file, header)
            for name, tensor in tensors.items():
                _write_tensor(plan, name, tensor, writer, report)
                advance(tensor.num_bytes // 2**20)
            if is_last:
                writer.write(plan.head)
            writer.close()
            index.update(dict.fromkeys(header, file))
            total += sum(math.prod(shape) * dtype.itemsize for dtype, shape in header.values())
    if len(plan.shards) > 1:
        values = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    chat = ChatTokenizer.load(plan.adapter)
    report.adds_bos = chat.adds_bos
    _write_config(plan, chat, folder)
    (folder / RECORD).write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    return report


def _write_tensor(
    plan: Plan, name: str, tensor: StoredTensor, writer: TensorWriter, report: MergeReport
) -> None:
    generator = torch.Generator().manual_seed(_seed(name))
    error = update = 0.0
    for exact, delta in plan.exact(name, tensor):
        piece = _stored(exact, plan.rounding, generator)
        if plan.rounding == "float16" and not torch.isfinite(piece).all():
            raise _DoesNotFit(name, float(exact.abs().max()))
        if delta is not None:
            error += float((piece.float() - exact).double().square().sum())
            update += float(delta.double().square().sum())
        writer.write(piece)
    report.num_tensors += 1
    if name in plan.updates:
        report.num_updated += 1
        report.rounding_error[name] = math.sqrt(error / update) if update else 0.0


def _summed(weight: torch.Tensor, update: Update) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """W + scale B A in float32, a block of stored rows at a time; DoRA scales each output row.

    Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685), eq. 3; DoRA, Liu et al. 2024 (arXiv 2402.09353), eq. 5.
    """
    factor = None
    if update.magnitude is not None:
        full = (weight.T if update.transposed else weight).float() + update.scale * (update.b @ update.a)
        factor = update.magnitude / torch.linalg.norm(full, dim=1)
        del full
    rows = max(1, BLOCK // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].float()
        if update.transposed:
            delta = update.scale * (update.b @ update.a[:, start : start + rows]).T
        else:
            delta = update.scale * (update.b[start : start + rows] @ update.a)
        if factor is not None:
            scaled = factor[None, :] if update.transposed else factor[start : start + rows, None]
            delta = scaled * (part + delta) - part
        yield (part + delta).flatten(), delta.flatten()


def _stored(exact: torch.Tensor, rounding: Rounding, generator: torch.Generator) -> torch.Tensor:
    """Rounds float32 values to what is stored.

    bfloat16 is rounded up with the probability of what would be cut off, so small updates survive on average;
    the generator's seed comes from the tensor's name, so two merges give the same bytes.
    """
    if rounding != "bfloat16":
        return exact.to(STORED[rounding])
    noise = torch.randint(0, 2**16, exact.shape, generator=generator, dtype=torch.int32)
    bits = (exact.view(torch.int32) + noise) & -(2**16)
    return bits.view(torch.float32).to(torch.bfloat16)


def _rounding(wanted: str, quantization: Quantization, model_type: str) -> Rounding:
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    if quantization.load_dtype == torch.float32:
        return "float32"
    return "bfloat16" if model_type in OVERFLOWING else "float16"


def _target(base: BaseModel) -> tuple[Any, dict[str, bool], list[WeightRenaming]]:
    """What the merged model is made of.

    Returns:
        Its configuration; its parameters but the head, name -> stored transposed; and how transformers renames
        tensors when it loads such a checkpoint (Gemma 3 with images, for one).
    """
    config = read_auto_config(base)
    if getattr(config, "quantization_config", None) is not None:
        raise MergeError(
            f"{base.name}: is stored quantised. Merging needs 16- or 32-bit weights; give the original model."
        )
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    names = {name: name in transposed for name, _ in model.named_parameters() if name != "score.weight"}
    names |= {name: False for name in model.state_dict() if name not in names and name != "score.weight"}
    config.architectures = [type(model).__name__]
    renamings = [rule for rule in get_model_conversion_mapping(model) if type(rule) is WeightRenaming]
    return config, names, renamings


def _updates(adapter: Path, modules: dict[str, bool]) -> dict[str, Update]:
    """The updates by weight name; every tensor of the adapter must be used."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(HEAD_KEY)
    config = LoraConfig.from_pretrained(str(adapter))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, found, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
        if not found or kind not in ("A.weight", "B.weight", "magnitude_vector"):
            raise MergeError(
                f"{adapter}: holds {key}, which cannot be merged. Known are lora_A, lora_B and DoRA's magnitude."
            )
        parts.setdefault(name, {})[kind] = tensor.float()
    updates = {}
    for name, part in parts.items():
        weight = f"{name}.weight"
        if weight not in modules or not {"A.weight", "B.weight"} <= part.keys():
            raise MergeError(f"{adapter}: its update of {name} fits no weight of the base, or is not whole.")
        rank = part["A.weight"].shape[0]
        pattern = get_pattern_key(config.alpha_pattern.keys(), name)
        alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
        updates[weight] = Update(
            part["A.weight"],
            part["B.weight"],
            alpha / (math.sqrt(rank) if config.use_rslora else rank),
            part.get("magnitude_vector"),
            modules[weight],
        )
    return updates


def _shards(
    base: BaseModel, wanted: set[str], renamings: Sequence[WeightRenaming]
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, str]]:
    """By file of the base: the tensors to write, by their names in the model; and what each is stored as.

    A tensor that transformers renames keeps the name it has in the base's files, so that it is renamed again
    when the merged model is loaded.
    """
    stored_as: dict[str, str] = {}
    shards: dict[str, dict[str, StoredTensor]] = {}
    missing = set(wanted)
    # a checkpoint of the bare backbone lacks the prefix that a model with a head puts before its names
    prefixes = sorted({"", *(f"{name.split('.', 1)[0]}." for name in wanted)}, key=len)
    for file in base.weight_files:
        own = shards[file.name] = {}
        for tensor in stored_tensors(file):
            renamed = tensor.name
            for rule in renamings:
                renamed, _ = rule.rename_source_key(renamed)
            name = next((p + renamed for p in prefixes if p + renamed in missing), None)
            if name is not None:
                missing.discard(name)
                own[name] = tensor
                stored_as[name] = name if renamed == tensor.name else tensor.name
    if missing:
        raise MergeError(
            f"{base.name}: {len(missing)} weights of the merged model are not in its files under their names "
            f"(first: {min(missing)}). Families whose tensors transformers fuses or splits when it loads them cannot be merged yet."
        )
    return {name: own for name, own in shards.items() if own}, stored_as


def _write_config(plan: Plan, chat: ChatTokenizer, folder: Path) -> None:
    config = plan.config
    config.num_labels = 1
    config.problem_type = "regression"  # else the pipeline and vLLM return sigmoid(reward)
    config.dtype = plan.dtype
    text = config.get_text_config()
    config.pad_token_id = text.pad_token_id = chat.pad_id
    text.dtype = plan.dtype
    config.save_pretrained(folder)
    chat.save(folder)


class _DoesNotFit(Exception):
    """A value is too large for float16."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(name)
        self.name, self.value = name, value


def _with_dtype(settings: MergeSettings, dtype: Rounding) -> MergeSettings:
    return MergeSettings(base=settings.base, dtype=dtype, overwrite=settings.overwrite)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
