"""Adapter + base -> merged weights, streamed tensor by tensor.

What a merge must add to is the base that the adapter was trained on: each weight goes through the same NF4
quantisation and back, bit for bit, and gets its update in float32. How the sum is stored decides as much:
the dequantised values are bfloat16 values, so rounding to bfloat16 by nearest swallows every update smaller
than half a step, always; float16 has three more bits.
"""

import ctypes
import hashlib
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from peft.utils.other import get_pattern_key
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from lora_rm.checkpoint import RunFolder
from lora_rm.config import MergeSettings
from lora_rm.console import progress, say
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.errors import MergeError, StorageError, storing
from lora_rm.model.adapter import WEIGHTS, lora_layers
from lora_rm.model.base import BaseModel, file_sha256, read_auto_config, read_json
from lora_rm.model.quantization import PIECE as QUANTIZED_PIECE
from lora_rm.model.quantization import Quantization, StoredCodes, is_stored_in_4_bit, stored_codes
from lora_rm.model.record import (
    HEAD_KEY,
    MERGE_RECORD,
    RECORD,
    check_files,
    read_adapter_config,
    read_head,
    read_record,
    recorded_base,
    recorded_quantization,
)
from lora_rm.model.reward_model import RewardModel
from lora_rm.model.tensor_files import StoredTensor, TensorWriter, stored_tensors, tensors_by_name
from lora_rm.unfinished import UnfinishedFolder, unfinished_folder

OVERFLOWING = ("gemma", "gemma2", "gemma3", "gemma3_text", "glm4", "t5gemma")
"""Families whose activations are known to overflow in float16 (vLLM refuses float16 for gemma2, gemma3, glm4)."""

PIECE = 2**18
"""Values of a weight that are merged at once: half the calls, in which threads wait for each other, of a piece that
is quantised, and no passes that a cache would have to serve."""

FLUSHED = 2**24
"""Bytes of a tensor after which its file is brought to the disk while the next is computed. By itself the system begins
when a tenth of the memory waits to be written, and a large last file would be waited for in the end."""

FLOAT16_LIMIT = 65520.0
"""The smallest value that float16 rounds to infinity."""

Rounding = Literal["float16", "bfloat16", "float32", "bfloat16_nearest"]
T = TypeVar("T")
Visitor = Callable[[int, torch.Tensor], T]
Values = Callable[[int, int], torch.Tensor]

STORED = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bfloat16_nearest": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter does to one weight; its matrices stay on the disk until they are used."""

    a: StoredTensor
    """LoRA A, (rank, in)."""

    b: StoredTensor
    """LoRA B, (out, rank)."""

    scale: float
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""

    magnitude: StoredTensor | None
    """DoRA's magnitude of each output row, (out,)."""

    transposed: bool
    """Whether the checkpoint stores the weight as (in, out), as GPT-2's Conv1D does."""

    def adder(
        self, values: Values, shape: tuple[int, ...]
    ) -> tuple[Callable[[int, torch.Tensor], None], Callable[[], float]]:
        """What adds the update in place, given the first stored row of a part of the weight and that part, in float32.

        Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685), eq. 3; DoRA, Liu et al. 2024 (arXiv 2402.09353), eq. 5.

        Args:
            values: Of the weight, from a first to a last one.
            shape: Of the weight as it is stored.

        Returns:
            That function, and another for the squared norm of all that was added.
        """
        a, b = self.a.read().float(), self.b.read().float()
        left, right = (a.T.contiguous(), b.T) if self.transposed else (b, a)

        def add(row: int, part: torch.Tensor) -> None:
            part.addmm_(left[row : row + len(part)], right, alpha=self.scale)

        def square() -> float:
            """|s B A|^2 = s^2 tr(B^T B A A^T), which costs next to nothing."""
            wide, narrow = a.double(), b.double()
            return self.scale**2 * float(((narrow.T @ narrow) * (wide @ wide.T)).sum())

        if self.magnitude is None:
            return add, square
        magnitude = self.magnitude.read().float()
        squares: list[float] = []

        def scale(row: int, part: torch.Tensor) -> None:
            before = part.clone()
            add(row, part)
            if self.transposed:
                part.mul_(of_columns)
            else:
                rows = slice(row, row + len(part))
                part.mul_((magnitude[rows] / torch.linalg.norm(part, dim=1))[:, None])
            squares.append(float(before.sub_(part).square_().sum(dtype=torch.float64)))

        if self.transposed:
            # a column of the stored weight is an output row: its norm is known only when all rows have been read
            norms = torch.zeros(shape[1], dtype=torch.float64)
            rows = max(1, PIECE // shape[1])
            for row in range(0, shape[0], rows):
                part = values(row * shape[1], min(row + rows, shape[0]) * shape[1]).float().view(-1, shape[1])
                add(row, part)
                norms += part.double().square_().sum(0)
            of_columns = (magnitude / norms.sqrt()).float()
        return scale, lambda: math.fsum(squares)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What was done; lies in the merged folder as `lora_rm_merge.json`."""

    base: str
    base_weights: str
    dtype: str
    adapter_sha256: str
    adds_bos: bool
    """Whether the tokenizer puts a BOS before a text by itself."""

    num_tensors: int
    num_updated: int


class MergePlan:
    """Everything about a merge that is known before the first tensor is read.

    Attributes say which stored tensor goes where under which name, what update it gets, and how it is stored.

    Raises:
        MergeError: If base and adapter do not fit, or the adapter holds something that cannot be merged.
    """

    def __init__(self, adapter: Path, settings: MergeSettings) -> None:
        self.adapter = adapter
        self.record = read_record(adapter)
        check_files(adapter, self.record)
        self.quantization: Quantization = recorded_quantization(self.record)
        self.base = recorded_base(adapter)
        self.head = read_head(adapter)
        self.config, self.transposed, renamings = target_of(self.base)
        self.updates, biases = read_updates(adapter, self.transposed)
        self.mode = settings.base
        if self.mode == "auto":
            self.mode = "original" if self.quantization.kind == "none" else "dequantized"
        self.rounding = rounding_of(settings.dtype, self.quantization, self.config.model_type)
        self.shards, self.stored_as = _shards(self.base, set(self.transposed), renamings)
        stored = (tensor for shard in self.shards.values() for tensor in shard.values())
        if self.mode != "dequantized" and any(isinstance(tensor, StoredCodes) for tensor in stored):
            raise MergeError(
                f"{self.base.name}: is stored in 4 bit and has no other values; --merge.base {self.mode} needs "
                "original weights. Use --merge.base dequantized."
            )
        self._check_base(biases)
        for shard in self.shards.values():
            shard |= {name: bias for name, bias in biases.items() if name in shard}

    @property
    def dtype(self) -> torch.dtype:
        """Type of what is written, the head apart."""
        return STORED[self.rounding]

    def identity(self) -> dict[str, Any]:
        """What has to be the same for the shards of two merges to be the same bytes."""
        stats = {file.name: file.stat() for file in self.base.weight_files}
        return {
            "version": 2,  # of the arithmetic
            "adapter": {
                **{file: self.record["files"][file] for file in (WEIGHTS, "adapter_config.json")},
                RECORD: file_sha256(self.adapter / RECORD),
            },
            "base": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()],
            "mode": self.mode,
            "rounding": self.rounding,
        }

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return sum(tensor.num_bytes for shard in self.shards.values() for tensor in shard.values())

    def keeps(self, name: str, tensor: StoredTensor) -> bool:
        """Whether what is written are the bytes of the base."""
        keeps_values = self.load_dtype is None or self.load_dtype in (tensor.dtype, torch.float32)
        return (
            name not in self.updates
            and not self.is_quantized(name)
            and keeps_values
            and tensor.dtype == self.dtype
        )

    def is_quantized(self, name: str) -> bool:
        """Whether the values to merge into are those of a weight's codes."""
        codes = self.record["quantization"]["codes"]
        return self.mode == "dequantized" and name.removesuffix(".weight") in codes

    @property
    def load_dtype(self) -> torch.dtype | None:
        """The type that the base's values are rounded to, as they were in training; None: they are not."""
        return self.quantization.load_dtype if self.is_trained_model else None

    @property
    def is_trained_model(self) -> bool:
        """Whether the merged weights are those that training saw, with the update."""
        return self.mode == "dequantized" or self.quantization.kind == "none"

    def visit(
        self, name: str, tensor: StoredTensor, use: Visitor[T], workers: "Workers"
    ) -> tuple[list[T], float]:
        """Calls `use` with the exact merged values of a tensor, piece by piece, in several threads.

        Args:
            name: Of the tensor in the model.
            tensor: Where the base has it.
            use: Called with the number of a piece's first value, and the piece in flat float32, the callee's own.
            workers: Where the calls are made.

        Returns:
            What `use` returned, in the order of the values; the squared norm of the update, 0 without one.

        Raises:
            MergeError: If the base's codes are not those of training.
        """
        update = self.updates.get(name)
        columns = 1 if update is None and not self.is_quantized(name) else tensor.shape[1]
        num_rows, rows = math.prod(tensor.shape) // columns, max(1, PIECE // columns)
        with tensor.open() as read:
            values, finished = self._values(name, tensor, read, workers)
            add, square = (None, float) if update is None else update.adder(values, tensor.shape)

            def piece(row: int) -> T:
                part = values(row * columns, min(row + rows, num_rows) * columns).float()
                if add is not None:
                    add(row, part.view(-1, columns))
                return use(row * columns, part)

            found = workers.each(piece, range(0, num_rows, rows))
            finished()
        return found, square()

    def _values(
        self, name: str, tensor: StoredTensor, read: Values, workers: "Workers"
    ) -> tuple[Values, Callable[[], None]]:
        """What a tensor is before the update: a function of the first and last value, and one to call at the end."""
        dtype = self.load_dtype or tensor.dtype
        if not self.is_quantized(name):
            return (lambda start, stop: read(start, stop).to(dtype)), lambda: None
        whole: tuple[torch.Tensor, str] | None = None  # what cannot be done by pieces
        if isinstance(tensor, StoredCodes):
            whole = tensor.dequantize()
        elif self.transposed[name]:
            weight, found = self.quantization.round_trip(tensor.read().T.contiguous())
            whole = weight.T.contiguous(), found
        elif not self.quantization.by_rows(tensor.shape):
            whole = self.quantization.round_trip(tensor.read())
        if whole:
            self._check_codes(name, whole[1])
            flat = whole[0].view(-1)
            return (lambda start, stop: flat[start:stop].clone()), lambda: None
        num_rows, columns = tensor.shape
        rows = max(1, QUANTIZED_PIECE // columns)
        codes = self.quantization.codes(tensor.shape)

        def quantize(row: int) -> None:
            stop = min(row + rows, num_rows)
            values = read(row * columns, stop * columns).to(dtype)
            codes.quantize(row, values.view(-1, columns))

        workers.each(quantize, range(0, num_rows, rows))
        codes.finish()
        hashing = workers.pool.submit(codes.sha256)
        return (
            lambda start, stop: codes.dequantize(start // columns, (stop - start) // columns, dtype).view(-1),
            lambda: self._check_codes(name, hashing.result()),
        )

    def _check_codes(self, name: str, found: str) -> None:
        if found != self.record["quantization"]["codes"][name.removesuffix(".weight")]:
            raise MergeError(
                f"{name}: its {self.quantization.kind} codes are not those the adapter was trained on. The base has "
                f"changed since, or this machine quantises differently. Give an unchanged copy of {self.record['base']['name']} "
                "(`lora-rm merge RUN --model.base FOLDER`), or merge on the machine that trained it."
            )

    def _check_base(self, biases: dict[str, StoredTensor]) -> None:
        shapes = {name: t.shape for shard in self.shards.values() for name, t in shard.items()}
        for name, bias in biases.items():
            if shapes[name] != bias.shape:
                raise MergeError(
                    f"{name}: the base's is {list(shapes[name])}, the adapter's {list(bias.shape)}."
                )
        for name, update in self.updates.items():
            expected = (update.b.shape[0], update.a.shape[1])
            found = shapes[name][::-1] if update.transposed else shapes[name]
            if found != expected:
                raise MergeError(
                    f"{name}: the base's weight is {list(found)}, the adapter's update {list(expected)}."
                )


def merge(adapter: Path, output: Path, settings: MergeSettings | None = None) -> MergeReport:
    """Writes the merged model as a transformers folder.

    Memory: the 4-bit codes of one adapted tensor, its matrices A and B, and a few MiB a thread. The folder appears
    under its name only when it is whole; a merge that was killed goes on at its last whole shard when it is
    started again.

    Args:
        adapter: Folder written by `RewardModel.save`.
        output: Folder to make.
        settings: Base, storage type, overwriting.

    Raises:
        MergeError: If the output exists, base and adapter do not fit, the disk is too small, another process
            merges into the same folder, or a value does not fit float16.
    """
    settings = settings or MergeSettings()
    if output.exists() and not settings.overwrite:
        raise MergeError(f"{output}: exists already. Remove it, or use --merge.overwrite True.")
    plan = MergePlan(adapter, settings)
    check_replaceable(output, adapter, plan.base.path)
    try:
        return _merge(plan, output)
    except _DoesNotFit as overflow:
        if settings.dtype != "auto":
            raise MergeError(
                f"{overflow.name}: a value of {overflow.value:.4g} does not fit float16. Use --merge.dtype float32."
            ) from None
        say(f"{overflow.name} holds {overflow.value:.4g}, too large for float16: storing float32 instead.")
    return _merge(MergePlan(adapter, replace(settings, dtype="float32")), output)


def check_replaceable(out: Path, *sources: Path) -> None:
    """Looks at what would be deleted when `out` is replaced.

    Args:
        out: To be replaced.
        sources: Folders that what is written is made from.

    Raises:
        MergeError: If it is anything else than an earlier merge or export, or a source.
    """
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    is_ours = names & {"parity.json", MERGE_RECORD} and RunFolder.find(out) is None
    is_file = out.exists() and not out.is_dir()
    if is_file or (names and not is_ours) or out.resolve() in [source.resolve() for source in sources]:
        raise MergeError(
            f"{out}: is not replaced, since it is a file, holds something else than an earlier merge or export, or is what this "
            "one is made from. Choose another --out, or remove it yourself."
        )


def check_mergeable(model: RewardModel) -> None:
    """Finds by names alone, before anything is trained, what a merge would refuse afterwards.

    A family whose tensors transformers fuses is no error: its adapter can be trained and scored.

    Raises:
        MergeError: If the adapter trains something that is no single weight of the base.
    """
    _, modules, renamings = target_of(model.base)
    for name, _ in lora_layers(model.classifier):
        if f"{name}.weight" not in modules:
            raise MergeError(
                f"{name}: is adapted, but is no single weight of the base, so no merge could add to it. {_EXPERTS}"
            )
    try:
        _shards(model.base, set(modules), renamings)
    except MergeError as error:
        say(f"What is trained here can be scored, but not merged or exported. {error}")


_EXPERTS = (
    "Experts are fused: name the layers to train, as in --adapter.target-modules q_proj k_proj v_proj o_proj."
)


def is_unverified(adapter: Path, output: Path, settings: MergeSettings) -> bool:
    """Whether `output` is this very merge, whose verification was interrupted: it need not be written again."""
    file = output / MERGE_RECORD
    if settings.overwrite or not file.is_file() or (output / "parity.json").is_file():
        return False
    plan, made = MergePlan(adapter, settings), read_json(file)
    # auto ends with float32 where a value does not fit float16
    roundings = (plan.rounding, "float32" if settings.dtype == "auto" else plan.rounding)
    is_same = made.get("adapter_sha256") == plan.record["files"][WEIGHTS]
    return is_same and made.get("base_weights") == plan.mode and made.get("dtype") in roundings


def _merge(plan: MergePlan, output: Path) -> MergeReport:
    with unfinished_folder(output, plan.identity(), "merge") as folder:
        _check_space(plan, output, folder)
        with storing(output):
            report = _write(plan, folder)
    if not plan.is_trained_model:
        say("Merged into the original base, which the adapter was not trained on: this is another model.")
    return report


def _check_space(plan: MergePlan, output: Path, folder: UnfinishedFolder) -> None:
    needed = sum(
        math.prod(tensor.shape) * plan.dtype.itemsize
        for file, tensors in plan.shards.items()
        if file not in folder.finished
        for tensor in tensors.values()
    )
    free = shutil.disk_usage(folder.path).free
    if needed > free:  # a StorageError: what an earlier call finished stays
        raise StorageError(
            f"{output}: the merged model needs {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free. "
            "Make room, or choose another folder with --out."
        )


def check_weights(plan: MergePlan, merged: Path) -> dict[str, float]:
    """Compares what lies on the disk with the exact merge, tensor by tensor, without a forward pass.

    Returns:
        Of each updated tensor: norm of (written - exact) over norm of the update.

    Raises:
        MergeError: If a tensor or the head is missing, left over, not finite or wrong.
    """
    written = tensors_by_name(sorted(merged.glob("*.safetensors")))
    expected = {name: tensor for shard in plan.shards.values() for name, tensor in shard.items()}
    differing = written.keys() ^ {*(plan.stored_as[name] for name in expected), "score.weight"}
    if differing:
        raise MergeError(f"{merged}: tensors missing or left over: {sorted(differing)[:5]}.")
    if not torch.equal(written["score.weight"].read(), plan.head):
        raise MergeError(f"{merged}: its score head is not the trained one.")
    errors = {}
    with Workers() as workers, progress("checking weights", plan.num_bytes, in_bytes=True) as advance:
        for name, tensor in expected.items():
            errors[name] = _distance(plan, name, tensor, written[plan.stored_as[name]], workers)
            advance(tensor.num_bytes)
    return {name: errors[name] for name in plan.updates}


def _distance(
    plan: MergePlan, name: str, source: StoredTensor, written: StoredTensor, workers: "Workers"
) -> float:
    """Of an updated tensor, the error's share of the update; a wrong or broken tensor is an error."""
    if written.shape != source.shape:
        raise MergeError(f"{name}: has shape {list(written.shape)}, expected {list(source.shape)}.")
    # a 16-bit step is 2^-8 of a value in bfloat16 and 2^-11 (or 2^-25 in all) in float16
    step = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-22}[written.dtype]

    def compare(start: int, exact: torch.Tensor) -> float:
        found = read(start, start + len(exact)).float()
        if not torch.isfinite(found).all():
            raise MergeError(f"{name}: holds NaN or infinite values.")
        difference = found.sub_(exact)
        error = float(torch.dot(difference, difference))
        if bool((difference.abs_() > exact.abs_().mul_(step).add_(2**-24)).any()):
            raise MergeError(f"{name}: what was written is not the merged weight.")
        return error

    with written.open() as read:
        squares, update = plan.visit(name, source, compare, workers)
    return math.sqrt(math.fsum(squares) / update) if update else 0.0


class Workers:
    """As many threads as torch uses, each computing with one: a piece stays in the cache of its core."""

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.count, initializer=_compute_alone)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        torch.set_num_threads(self.count)

    def each(self, use: Callable[[int], T], starts: range) -> list[T]:
        """What `use` returns for every start, in order; a thread that is free takes the next one."""
        left = deque(starts)
        found: dict[int, T] = {}

        def work() -> None:
            while left:
                try:
                    start = left.popleft()
                except IndexError:  # another thread was quicker
                    return
                try:
                    found[start] = use(start)
                except BaseException:
                    left.clear()
                    raise

        for job in [self.pool.submit(work) for _ in range(self.count)]:  # one a piece would cost 30 us each
            job.result()
        return [found[start] for start in starts]


def _compute_alone() -> None:
    """Keeps the calls of this thread in this thread.

    bitsandbytes has an OpenMP of its own, which torch's setting does not reach: each worker's calls would start a
    team of threads, and the teams wait for each other in busy loops.
    """
    torch.set_num_threads(1)
    with suppress(OSError):  # where /proc is not, as on macOS
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            if "libgomp" in line and "r-xp" in line:
                ctypes.CDLL(line.split(maxsplit=5)[5]).omp_set_num_threads(1)


def _write(plan: MergePlan, unfinished: UnfinishedFolder) -> MergeReport:
    """Writes all shards but those that are finished, and what else belongs to a model."""
    folder = unfinished.path
    index: dict[str, str] = {}
    total = 0
    last = list(plan.shards)[-1]
    with (
        Workers() as workers,
        ThreadPoolExecutor(1) as flushing,
        progress("merging", plan.num_bytes, in_bytes=True) as advance,
    ):
        flushed = []
        for file, tensors in plan.shards.items():
            header = {plan.stored_as[name]: (plan.dtype, tensor.shape) for name, tensor in tensors.items()}
            if file == last:
                header["score.weight"] = (torch.float32, tuple(plan.head.shape))
            if file in unfinished.finished:
                advance(sum(tensor.num_bytes for tensor in tensors.values()))
            else:
                writer = TensorWriter(folder / file, header)
                following = [*tensors.values(), None][1:]
                for (name, tensor), next_one in zip(tensors.items(), following, strict=True):
                    if next_one is not None:
                        next_one.announce()
                    _write_tensor(plan, name, tensor, writer, workers)
                    if tensor.num_bytes >= FLUSHED:
                        flushed.append(flushing.submit(writer.flush))
                    advance(tensor.num_bytes)
                if file == last:
                    writer.write("score.weight", plan.head)
                flushed.append(flushing.submit(_finish, unfinished, writer))
            index.update(dict.fromkeys(header, file))
            total += sum(math.prod(shape) * dtype.itemsize for dtype, shape in header.values())
        for job in flushed:
            job.result()
    if list(plan.shards) != ["model.safetensors"]:  # any other name transformers finds by the index alone
        values = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    chat = ChatTokenizer.load(plan.adapter)
    _write_config(plan, chat, folder)
    report = MergeReport(
        base=plan.base.name,
        base_weights=plan.mode,
        dtype=plan.rounding,
        adapter_sha256=plan.record["files"][WEIGHTS],
        adds_bos=chat.adds_bos,
        num_tensors=len(plan.stored_as),
        num_updated=len(plan.updates),
    )
    record = asdict(report) | {"length_policy": plan.record.get("length_policy")}
    (folder / MERGE_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return report


def _finish(folder: UnfinishedFolder, writer: TensorWriter) -> None:
    """Brings a shard to the disk, then notes that it is there."""
    writer.close()
    folder.finish(writer.file.name, writer.file)


def _write_tensor(
    plan: MergePlan, name: str, tensor: StoredTensor, writer: TensorWriter, workers: Workers
) -> None:
    """Writes one tensor."""
    own_name = plan.stored_as[name]
    if plan.keeps(name, tensor):

        def copy(start: int) -> None:
            writer.write(own_name, read(start, min(start + 4 * PIECE, num_values)), start)

        num_values = math.prod(tensor.shape)
        with tensor.open() as read:
            workers.each(copy, range(0, num_values, 4 * PIECE))
        return

    def store(start: int, exact: torch.Tensor) -> None:
        # a sum of squares below that of the limit holds no value above it, and is the cheapest look at them all
        if plan.rounding == "float16" and not float(torch.dot(exact, exact)) < FLOAT16_LIMIT**2:
            largest = float(exact.abs().max())
            if not largest < FLOAT16_LIMIT:  # NaN too
                raise _DoesNotFit(name, largest)
        writer.write(own_name, _stored(exact, plan.rounding, f"{name}:{start}"), start)

    plan.visit(name, tensor, store, workers)


def _stored(exact: torch.Tensor, rounding: Rounding, seed: str) -> torch.Tensor:
    """Rounds float32 values to what is stored.

    bfloat16 is rounded up with the probability of what would be cut off, so small updates survive on average;
    the seed is the tensor's name and the place of the piece, so two merges give the same bytes.
    """
    if rounding != "bfloat16":
        return exact.to(STORED[rounding])
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    )
    # 64 random bits for four values
    noise = torch.empty(-(-len(exact) // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    bits = exact.view(torch.int32) + (noise.view(torch.int16)[: len(exact)].to(torch.int32) & 0xFFFF)
    return bits.bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


def rounding_of(wanted: str, quantization: Quantization, model_type: str) -> Rounding:
    """How merged weights are stored: `merge.dtype`, or what auto stands for."""
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    # bfloat16 would not pass the verification: 1.18 % of the spread on average and 5.08 % at most on the quickstart's run
    return "float32" if quantization.load_dtype == torch.float32 or model_type in OVERFLOWING else "float16"


def target_of(base: BaseModel) -> tuple[Any, dict[str, bool], list[WeightRenaming]]:
    """What the merged model is made of.

    Returns:
        Its configuration; its parameters but the head, name -> stored transposed; and how transformers renames
        tensors when it loads such a checkpoint (Gemma 3 with images, for one).
    """
    config = read_auto_config(base)
    if is_stored_in_4_bit(config):
        del config.quantization_config  # the merged model is not
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    names = {name: name in transposed for name, _ in model.named_parameters() if name != "score.weight"}
    names |= {name: False for name in model.state_dict() if name not in names and name != "score.weight"}
    config.architectures = [type(model).__name__]
    renamings = [rule for rule in get_model_conversion_mapping(model) if type(rule) is WeightRenaming]
    return config, names, renamings


def read_updates(
    adapter: Path, modules: dict[str, bool]
) -> tuple[dict[str, Update], dict[str, StoredTensor]]:
    """The updates by weight name, and trained biases, which replace the base's; every tensor must be used.

    PEFT writes biases with `bias` all or lora_only; settings here do not reach it.
    """
    config = read_adapter_config(adapter)
    parts: dict[str, dict[str, StoredTensor]] = {}
    biases: dict[str, StoredTensor] = {}
    for tensor in stored_tensors(adapter / WEIGHTS):
        key = tensor.name
        if key == HEAD_KEY:
            continue
        bias = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if bias.endswith(".bias") and bias in modules:
            biases[bias] = tensor
            continue
        name, found, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
        if not found or kind not in ("A.weight", "B.weight", "magnitude_vector"):
            raise MergeError(
                f"{adapter}: holds {key}, which cannot be merged. Known are lora_A, lora_B, DoRA's magnitude, and biases "
                "that the base has too; train without others (PEFT's lora_bias adds biases to lora_B)."
            )
        parts.setdefault(name, {})[kind] = tensor
    updates = {}
    for name, part in parts.items():
        weight = f"{name}.weight"
        if weight not in modules or not {"A.weight", "B.weight"} <= part.keys():
            raise MergeError(
                f"{adapter}: its update of {name} fits no weight of the base, or is not whole. {_EXPERTS}"
            )
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
    return updates, biases


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
    files = {file.name: stored_tensors(file) for file in base.weight_files}
    codes = stored_codes([tensor for tensors in files.values() for tensor in tensors])
    for file, tensors in files.items():
        own = shards[file] = {}
        for tensor in tensors:
            renamed = tensor.name
            for rule in renamings:
                renamed, _ = rule.rename_source_key(renamed)
            name = next((p + renamed for p in prefixes if p + renamed in missing), None)
            if name is not None:
                missing.discard(name)
                own[name] = codes.get(tensor.name, tensor)
                stored_as[name] = name if renamed == tensor.name else tensor.name
    if missing:
        raise MergeError(
            f"{base.name}: {len(missing)} weights of the merged model are not in its files under their names "
            f"(first: {min(missing)}). Families whose tensors transformers fuses or splits when it loads them cannot be merged yet."
        )
    return {name: own for name, own in shards.items() if own}, stored_as


def _write_config(plan: MergePlan, chat: ChatTokenizer, folder: Path) -> None:
    config = plan.config
    config.problem_type = "regression"  # else the pipeline and vLLM return sigmoid(reward)
    config.dtype = plan.dtype
    text = config.get_text_config()
    config.pad_token_id = text.pad_token_id = chat.pad_id
    text.dtype = plan.dtype
    config.save_pretrained(folder)
    _tell_older_readers(folder)
    chat.save(folder)


def _tell_older_readers(folder: Path) -> None:
    """Writes a model's rotary positions in the words of transformers 4 too, for it takes the default for what it cannot read.

    (4.57 opened a Llama of `rope_theta` 100,000 with 10,000.) Left out where version 5 would read something else then.
    """
    file = folder / "config.json"
    before, text = _read_rope(folder), file.read_text(encoding="utf-8")
    values = json.loads(text)
    own = values.get("text_config") or values
    rope = own.get("rope_parameters") or {}
    if "full_attention" in rope:  # Gemma 3
        if "rope_theta" in (rope.get("sliding_attention") or ()):
            own["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    apart = ("rope_theta", "partial_rotary_factor")
    own |= {name: rope[name] for name in apart if name in rope}
    if rope.get("rope_type", "default") != "default":
        own["rope_scaling"] = {name: value for name, value in rope.items() if name not in apart}
    if rope.get("rope_type") == "longrope":  # version 4 allows no other keys
        own["rope_scaling"] = {"type": "longrope"} | {n: rope[n] for n in ("short_factor", "long_factor")}
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    try:
        is_same = _read_rope(folder) == before
    except Exception:  # of any kind: version 5 mixes its own words with those of 4, and asks for others
        is_same = False
    if not is_same:
        file.write_text(text, encoding="utf-8")


def _read_rope(folder: Path) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return {name: value for name, value in rope.items() if name != "type"}  # what version 4 calls rope_type


class _DoesNotFit(MergeError):
    """A value is too large for float16."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(name)
        self.name, self.value = name, value
