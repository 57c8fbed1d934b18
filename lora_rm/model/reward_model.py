"""A 4-bit base, LoRA adapters and a float32 score head with one logit."""

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from lora_rm import processes
from lora_rm.config import AdapterSettings, DataSettings, ModelSettings
from lora_rm.console import progress, say
from lora_rm.data.batches import (
    Batching,
    Core,
    TreeBatch,
    build_batch,
    microbatches,
    num_tokens,
    shares_of_rows,
)
from lora_rm.data.tokens import ChatTokenizer, TokenTree
from lora_rm.errors import ModelError, first_line
from lora_rm.model import tree_attention
from lora_rm.model.adapted_linear import join_products
from lora_rm.model.adapter import (
    ChangedBase,
    start_from_activations,
    start_matrices,
)
from lora_rm.model.base import BaseModel, find_base, read_auto_config, read_json
from lora_rm.model.checkpointing import Mode, set_checkpointing
from lora_rm.model.classifier import (
    check_length,
    load_classifier,
    loadable_config,
    make_trainable,
    quiet,
    start_head,
    stored_head,
    wanted_quantization,
)
from lora_rm.model.cpu_attention import is_to_be_had
from lora_rm.model.device import is_out_of_memory, pick_compute_dtype, pick_device
from lora_rm.model.elementwise import fuse_elementwise
from lora_rm.model.quantization import (
    DTYPES,
    Quantization,
    StoredLinear,
    dtype_name,
    keep_stored,
    make_exact,
    quant_state,
    quantized_layers,
)
from lora_rm.model.record import (
    check_base,
    check_codes,
    check_files,
    is_merged,
    read_adapter_config,
    read_head,
    read_record,
    recorded_base,
    recorded_quantization,
    start_from_saved,
    write_record,
)
from lora_rm.model.sharding import Shell, set_gathered_dtype
from lora_rm.model.tree_attention import LastLayer, time_cores

BATCHINGS: tuple[Batching, ...] = ("shared", "packed", "padded")

TOLERANCE = 1e-4
"""Largest difference between two exact ways of computing in float32, as a share of the largest reward."""


@dataclass(frozen=True, slots=True)
class Trainable:
    """Numbers of parameters."""

    adapter: int
    head: int
    total: int


class RewardModel(nn.Module):
    """Rewards of answers: backbone, adapter, and the head read at each answer's last token.

    `model` is the transformers (or PEFT) model, `chat` the tokenizer, `base` where the weights lie,
    `quantization` how they are stored, and `batching` how a row of answers is computed.
    """

    def __init__(
        self,
        model: Any,
        *,
        chat: ChatTokenizer,
        base: BaseModel,
        quantization: Quantization,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.model = model
        self.chat = chat
        self.base = base
        self.quantization = quantization
        self.batching: Batching = "padded"
        self.changed_base: ChangedBase | None = None
        self.is_sharded = False
        self._last_layer: LastLayer | None = None
        self._cores: dict[torch.dtype, Sequence[Core]] = {}
        self._plain_attention: str = self.classifier.config._attn_implementation
        self.set_compute_dtype(compute_dtype)

    # -- making and opening -------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        base: str | BaseModel,
        *,
        settings: ModelSettings | None = None,
        adapter: AdapterSettings | None = None,
        data: DataSettings | None = None,
        seed: int = 0,
        sharded: bool = False,
    ) -> "RewardModel":
        """Makes a new reward model on a base model.

        Args:
            base: Hub id, local folder, GGUF file or built-in name; or a base found before.
            settings: Quantisation, types, head start and device.
            adapter: LoRA settings; None: no adapter, and every weight frozen but the head.
            data: Whose chat template and special tokens hold; None: those of the base.
            seed: Of head and adapter.
            sharded: Share the frozen weights out over the processes, which must all call this and whatever computes
                rewards after it.

        Raises:
            ModelError: If the base cannot be used, or the head is not what it must be.
        """
        settings = settings or ModelSettings()
        found = base if isinstance(base, BaseModel) else find_base(base, settings.revision)
        chat = ChatTokenizer.load(found.path, data)
        quantization = wanted_quantization(settings)
        device = pick_device(settings.device)
        compute_dtype = pick_compute_dtype(settings.compute_dtype, device)
        config = loadable_config(found, quantization, chat)
        if adapter is not None and quantization.kind != "none" and is_merged(found.path):
            raise ModelError(
                f"{found.name}: is a merged model of lora_rm. Stored in {quantization.kind} anew it would lose what was trained (in "
                "nf4 rewards moved by 163 % of their spread in one measurement). To train on, give the run's own model.base and "
                "adapter.start_from RUN; or set model.quantization none and model.load_dtype float32."
            )
        load = partial(load_classifier, found, config, quantization, compute_dtype)
        shell = Shell(load, device) if sharded else None
        model = shell.model if shell else load({"": device})
        start_head(model.score.weight, found, settings.head_init, seed)
        changed_base = None
        if adapter is None:
            model = make_trainable(model, None)
        else:
            torch.manual_seed(seed)
            model = make_trainable(model, adapter)
            changed_base = start_matrices(model, adapter, found)
            if adapter.start_from is not None:
                record = start_from_saved(model, Path(adapter.start_from), found, quantization)
                _tell_other_tokens(adapter.start_from, record, chat)
        if shell:
            shell.fill(torch.float32 if compute_dtype == torch.float32 else quantization.load_dtype)
        made = cls(model, chat=chat, base=found, quantization=quantization, compute_dtype=compute_dtype)
        made.changed_base = changed_base
        made.is_sharded = sharded
        return made._ready()

    @classmethod
    def load_adapter(
        cls, folder: Path, *, device: str = "auto", compute_dtype: str = "auto", base: str | None = None
    ) -> "RewardModel":
        """Opens a saved adapter on the base it was trained on, quantised as it was then.

        Args:
            folder: Written by `save`.
            device: As in `model.device`.
            compute_dtype: As in `model.compute_dtype`.
            base: Where the base lies now, if not where it lay.

        Raises:
            ModelError: If a file is missing or damaged, the head is missing or has not one logit, or the base's
                quantised codes are not those of training.
        """
        record = read_record(folder)
        check_files(folder, record)
        found = find_base(base, record["base"]["revision"]) if base else recorded_base(folder)
        check_base(folder, record, found)
        quantization = recorded_quantization(record)
        target = pick_device(device)
        dtype = pick_compute_dtype(compute_dtype, target)
        chat = ChatTokenizer.load(folder)
        config = loadable_config(found, quantization, chat)
        model = load_classifier(found, config, quantization, dtype, {"": target})
        head = read_head(folder)
        if head.shape != model.score.weight.shape:
            raise ModelError(
                f"{folder}: its score head has shape {list(head.shape)}, the base {found.name} needs "
                f"{list(model.score.weight.shape)}. The adapter belongs to another base."
            )
        check_codes(model, record, folder, found)
        lora = read_adapter_config(folder)
        try:
            with quiet("peft"):
                peft_model = PeftModel.from_pretrained(
                    model, str(folder), is_trainable=False, config=lora, torch_device=str(target)
                )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"{folder}: its matrices do not fit adapter_config.json or the base {found.name} ({first_line(error)}). Copy the folder "
                "again."
            ) from None
        opened = cls(peft_model, chat=chat, base=found, quantization=quantization, compute_dtype=dtype)
        opened.head.data.copy_(head)  # PEFT casts it to the base's type when it loads
        return opened._ready()

    @classmethod
    def load_merged(cls, folder: Path, *, device: str = "auto", compute_dtype: str = "auto") -> "RewardModel":
        """Opens a merged or exported model, with its head in float32.

        For products in float32 or in the type they are stored in, weights stay as they are. Rounded to bfloat16, others
        would give other rewards (1.8 % of the spread), so `compute_dtype` auto is then float16 for those stored in it on
        a GPU, as in vLLM, and else float32.

        Raises:
            ModelError: If it has no score head, or one that has not one logit.
        """
        target = pick_device(device)
        dtype = pick_compute_dtype(compute_dtype, target)
        base = find_base(str(folder))
        if read_json(base.path / "config.json").get("model_type") is None:
            raise ModelError(f"{folder}: config.json names no model_type. Give the folder of a merged model.")
        chat = ChatTokenizer.load(base.path)
        head = stored_head(base)
        if head is None:
            raise ModelError(
                f"{base.path}: has no score.weight. It is no reward model; a fresh head would be random."
            )
        stored = DTYPES.get(dtype_name(read_auto_config(base).dtype), torch.float32)
        if compute_dtype == "auto" and dtype == torch.bfloat16 != stored:
            dtype = stored if target.type == "cuda" and stored == torch.float16 else torch.float32
        load_dtype = stored if dtype == torch.float32 else dtype
        quantization = Quantization(kind="none", double=False, load_dtype=load_dtype)
        config = loadable_config(base, quantization, chat)
        model = load_classifier(base, config, quantization, dtype, {"": target})
        model.requires_grad_(False)
        keep_stored(model)
        for module in model.modules():  # Gemma's, which transformers makes in the type of the weights
            if hasattr(module, "scalar_embed_scale"):
                exact = torch.tensor(module.scalar_embed_scale, dtype=torch.float32, device=target)
                module.embed_scale = exact
        opened = cls(model, chat=chat, base=base, quantization=quantization, compute_dtype=dtype)
        opened.head.data.copy_(head)
        return opened._ready()

    # -- computing ----------------------------------------------------------------------------------------

    def rewards(self, batch: TreeBatch) -> torch.Tensor:
        """Rewards of a batch's answers, (R,) float32, in the order of `batch.preferences`.

        Only the decoder runs: no logits over the vocabulary, and the head sees R hidden states.
        """
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        if batch.plan is not None:
            inputs["tree_plan"] = batch.plan
        else:
            inputs["attention_mask"] = batch.attention_mask
        device_type = batch.input_ids.device.type
        use_autocast = self.compute_dtype != torch.float32
        with torch.autocast(device_type, dtype=self.compute_dtype, enabled=use_autocast):
            hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        with torch.autocast(device_type, enabled=False):
            at_scores = hidden.flatten(0, 1)[batch.score_index].float()
            return F.linear(at_scores, self.head).squeeze(-1)

    @torch.no_grad()
    def score(
        self, trees: list[TokenTree], tokens_per_microbatch: int = 2048, *, together: bool = False
    ) -> list[list[float]]:
        """Rewards of every tree's answers, without gradients, in the order given.

        Args:
            trees: To be scored.
            tokens_per_microbatch: Tokens computed at once; 2,048 of a 14B model in float32 take 0.6 GiB.
            together: Every process calls this with the same trees and scores its share of them, if there are several.

        Raises:
            ModelError: If a conversation is longer than the model takes.
        """
        lengths = (len(tree.prompt_ids) + max(map(len, tree.answer_ids)) for tree in trees)
        check_length(self.classifier.config, max(lengths, default=0), "A conversation")
        self.check_ids(trees)
        was_training = self.training
        self.eval()
        numbers = {id(tree): number for number, tree in enumerate(trees)}
        once = [trees[number] for number in numbers.values()]
        rank, count = (processes.rank(), processes.count()) if together else (0, 1)
        found: dict[int, list[float]] = {}
        with progress("scoring", len(once)) as advance:
            for start in range(0, len(once), 512):
                rows = microbatches(once[start : start + 512], tokens_per_microbatch, self.batching, count)
                shares = shares_of_rows(rows, self.batching, count)
                for group in shares[rank]:
                    rewards = iter(self.rewards(self.batch(group)).tolist())
                    for tree in group:
                        found[numbers[id(tree)]] = [next(rewards) for _ in tree.answer_ids]
                    advance(len(group))
                self.idle(max(map(len, shares)) - len(shares[rank]))
        self.train(was_training)
        if count > 1:
            found = {number: rewards for own in processes.gather(found) for number, rewards in own.items()}
        return [found[numbers[id(tree)]] for tree in trees]

    def check_ids(self, trees: Sequence[TokenTree]) -> None:
        """Refuses a token without embedding, which a GPU tells by an assertion that ends the process.

        Raises:
            ModelError: Naming the token.
        """
        vocabulary = self.classifier.config.get_text_config().vocab_size
        largest = max(
            (max(ids) for tree in trees for ids in (tree.prompt_ids, *tree.answer_ids) if ids), default=0
        )
        if largest >= vocabulary:
            raise ModelError(
                f"{self.base.name}: the token {self.chat.tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, but the "
                f"model has {vocabulary} embeddings: it was added to the tokenizer alone. Call "
                "model.resize_token_embeddings(len(tokenizer)) and save both, or give another data.chat_template."
            )

    def idle(self, passes: int) -> None:
        """Takes part in passes of other processes that have more rows; adds nothing to the gradients.

        Needed where the base is sharded, since every process gives its part of the weights to every pass.
        """
        if not self.is_sharded:
            return
        for _ in range(passes):
            rewards = self.rewards(self.batch([TokenTree([0], ([0],))]))
            if torch.is_grad_enabled():
                (rewards.sum() * 0.0).backward()

    def forget_pass(self) -> None:
        """Lets go of the weights that were gathered for a pass that failed, if the base is sharded."""
        if self.is_sharded:
            self.backbone.reset_iter_state()

    def start_from_data(self, trees: list[TokenTree], tokens_per_microbatch: int = 4096) -> None:
        """Starts the adapter from what its layers see of the data, as `adapter.init` eva wants it.

        Raises:
            ModelError: If no row has as many tokens as the adapter has ranks; PEFT would wait for one for ever.
        """
        self.eval()
        groups = microbatches(trees, tokens_per_microbatch, self.batching)
        longest = max(num_tokens(group, self.batching) for group in groups)
        rank = self.model.peft_config["default"].r
        if longest < rank:
            raise ModelError(
                f"adapter.init eva finds {rank} directions in rows of at least {rank} tokens, and the longest here has {longest}. Give "
                "more data, a larger train.tokens_per_microbatch, or another adapter.init."
            )
        spared, self._last_layer = self._last_layer, None
        if spared:  # it sees the answers' ends alone, fewer than PEFT needs in a row
            spared.remove()
        say(
            f"Looking at the activations of {len(trees)} preferences, from which the adapter starts (EVA) ..."
        )
        with torch.no_grad():
            start_from_activations(self.model, self.rewards, [self.batch(group) for group in groups])
        if spared:
            self.spare_last_layer()

    def batch(self, preferences: list[TokenTree]) -> TreeBatch:
        """Builds a batch the way this model computes it, on its device."""
        return build_batch(preferences, self.batching, self.core).to(self.device)

    @property
    def core(self) -> Core:
        """How attention is computed: the fastest core for the present type of products, found once for each type."""
        return self.exact_cores()[0]

    def set_core(self, core: Core) -> None:
        """Computes attention in this way, for the present type of products, without asking whether it is exact."""
        self._cores[self.compute_dtype] = [core]

    def exact_cores(self) -> Sequence[Core]:
        """The cores that are exact on this device for the present type of products, fastest first."""
        if self.compute_dtype not in self._cores:
            self._cores[self.compute_dtype] = self._find_cores()
        return self._cores[self.compute_dtype]

    def _find_cores(self) -> Sequence[Core]:
        if self.device.type == "cpu":
            return cores_of_cpu(self.classifier.config, self.compute_dtype)
        seconds = time_cores(self.device, self.compute_dtype, *_heads(self.classifier.config))
        return sorted(seconds, key=lambda core: seconds[core]) or ["answers"]

    def choose_batching(self, wanted: str = "auto") -> Batching:
        """Picks how rows are computed: the first way that this model computes exactly.

        One small tree is scored in each way and compared with padded rows through the model's own attention;
        every layer must have called the tree attention once.

        Args:
            wanted: `auto`, or the only way allowed.

        Raises:
            ModelError: If `wanted` is not exact for this model.
        """
        with self._random_head():
            with self.precise():
                self.set_batching("padded")
                probe = _probe(self.classifier.config.get_text_config().vocab_size)
                try:
                    expected = torch.tensor([reward for rewards in self.score(probe) for reward in rewards])
                except (AttributeError, TypeError) as error:  # a router that PEFT takes for a linear layer
                    raise ModelError(
                        f"{self.base.name}: its layers cannot be computed with this adapter ({error}). Name the layers to "
                        "adapt, as in --adapter.target-modules q_proj v_proj."
                    ) from None
                reasons = {}
                for batching in BATCHINGS[:-1]:
                    if wanted not in ("auto", batching):
                        continue
                    reasons[batching] = self._inexact(batching, probe, expected)
                    if not reasons[batching]:
                        self.spare_last_layer(lambda: not self._inexact(batching, probe, expected))  # noqa: B023
                        break
                else:
                    self.set_batching("padded")
            self._check_core(probe, expected)
        if self.batching != wanted and reasons:
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
            if wanted != "auto":
                raise ModelError(
                    f"train.batching is {wanted}, which is not exact for this model ({why}). Use auto."
                )
            if why:
                say(f"Batches are {self.batching}, because others are not exact for this model ({why}).")
        return self.batching

    def _check_core(self, probe: list[TokenTree], expected: torch.Tensor) -> None:
        """Picks the core for the type of training's products, and takes `answers` if this model cannot use it.

        A core may round as much as `answers` does in this type and model; a wrong mask is further off.
        """
        core = self.core
        if self.batching == "padded" or core == "answers":
            return
        # 16 steps of the type: 13 % in bfloat16
        tolerance = max(TOLERANCE, 16 * torch.finfo(self.compute_dtype).eps)
        reason = self._inexact(self.batching, probe, expected, tolerance)
        if not reason:
            return
        known = self.exact_cores()
        self.set_core("answers")
        with torch.no_grad():
            rounded = self.rewards(self.batch(probe)).cpu()
        noise = float((rounded - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        self._cores[self.compute_dtype] = known
        if not self._inexact(self.batching, probe, expected, max(tolerance, 2 * noise)):
            return
        say(
            f"Attention is computed answer by answer, because the core {core} does not suit this model ({reason})."
        )
        self.set_core("answers")

    @contextlib.contextmanager
    def _random_head(self) -> Iterator[None]:
        """A head that tells hidden states apart, for the check: one that starts at zero would hide every fault."""
        before = self.head.detach().clone()
        self.head.data.copy_(torch.randn(before.shape, generator=torch.Generator().manual_seed(0)))
        try:
            yield
        finally:
            self.head.data.copy_(before)

    def _inexact(
        self, batching: Batching, probe: list[TokenTree], expected: torch.Tensor, tolerance: float = TOLERANCE
    ) -> str:
        """Why a way of batching cannot be used, or nothing."""
        self.set_batching(batching)
        batch = self.batch(probe)
        assert batch.plan is not None
        try:
            with torch.no_grad():
                rewards = self.eval().rewards(batch).cpu()
        except (NotImplementedError, TypeError, ValueError, IndexError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            self.forget_pass()
            return first_line(error, 120)
        text, calls = self.classifier.config.get_text_config(), batch.plan.calls
        if len(calls) != text.num_hidden_layers:
            return f"{len(calls)} of {text.num_hidden_layers} layers use the tree attention"
        # the probe's conversations may be shorter than the window, so that rewards do not show it
        told, wanted = sum(window is not None for _, window in calls), _num_windowed(text)
        if told < wanted:
            return f"{told} of {wanted} layers tell the attention of their sliding window"
        difference = float((rewards - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        return "" if difference <= tolerance else f"rewards differ by {difference:.1e}"

    def spare_last_layer(self, is_exact: Callable[[], bool] = lambda: True) -> None:
        """Computes only the answers' ends in the last layer, if rewards stay the same."""
        if self._last_layer is None:
            self._last_layer = LastLayer(self.layers[-1])
            if not is_exact():
                self._last_layer.remove()
                self._last_layer = None

    def set_batching(self, batching: Batching) -> None:
        """Computes rows in this way without asking whether it is exact; `choose_batching` asks."""
        self.batching = batching
        name = self._plain_attention if batching == "padded" else tree_attention.NAME
        self.backbone.set_attn_implementation(name)

    def set_checkpointing(self, modes: Sequence[Mode]) -> None:
        """Sets which activations each decoder layer keeps for the backward pass."""
        config = self.model.peft_config["default"] if isinstance(self.model, PeftModel) else None
        max_rank = max([config.r, *config.rank_pattern.values()]) if config else 0
        set_checkpointing(list(self.layers), modes, max_rank)

    # -- types --------------------------------------------------------------------------------------------

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Sets the type of matrix products: 16-bit under autocast, or float32 throughout.

        Frozen weights that are not quantised (embeddings, norms) are held in float32 for float32 products,
        else in the type they were loaded in; the values do not change.
        """
        self.compute_dtype = dtype
        held = torch.float32 if dtype == torch.float32 else self.quantization.load_dtype
        for module in self.classifier.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.compute_dtype, module.compute_type_is_set = dtype, True
        as_stored = {id(module.weight) for module in quantized_layers(self.classifier).values()}
        as_stored |= {id(m.weight) for m in self.classifier.modules() if isinstance(m, StoredLinear)}
        for name, parameter in self.classifier.named_parameters():
            is_own = "lora_" in name or name.startswith("score")  # float32 always
            if isinstance(parameter, DTensor):
                continue  # its type is set where it is gathered
            if parameter.is_floating_point() and id(parameter) not in as_stored and not is_own:
                parameter.data = parameter.data.to(held)
        if self.is_sharded:
            set_gathered_dtype(self.classifier, held)

    @contextlib.contextmanager
    def precise(self) -> Iterator[None]:
        """Float32 products for a while, as verification and canaries need them."""
        before = self.compute_dtype
        self.set_compute_dtype(torch.float32)
        try:
            yield
        finally:
            self.set_compute_dtype(before)

    # -- parts --------------------------------------------------------------------------------------------

    @property
    def classifier(self) -> Any:
        """The transformers `*ForSequenceClassification`, with LoRA layers in place if there is an adapter."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def backbone(self) -> Any:
        """The decoder without head."""
        return getattr(self.classifier, self.classifier.base_model_prefix)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        count = self.classifier.config.get_text_config().num_hidden_layers
        decoder = getattr(self.backbone, "language_model", self.backbone)
        return next(m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count)

    @property
    def head(self) -> torch.Tensor:
        """The trained head's weight, (1, H) float32."""
        score = self.classifier.score
        return score.modules_to_save["default"].weight if hasattr(score, "modules_to_save") else score.weight

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.head.device

    def trainable(self) -> Trainable:
        """How many parameters are trained, and how many there are."""
        head = self.head.numel()
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        packed = {
            id(layer.weight): quant_state(layer).shape.numel()
            for layer in self.modules()
            if isinstance(layer, bnb.nn.Linear4bit)
        }
        base = sum(packed.get(id(parameter), parameter.numel()) for parameter in self.parameters())
        return Trainable(adapter=trained - head, head=head, total=base)

    # -- saving -------------------------------------------------------------------------------------------

    def save(self, folder: Path, record: dict[str, Any]) -> None:
        """Writes adapter, head, tokenizer and `lora_rm.json`.

        Plain PEFT opens the folder too, on a base loaded with `num_labels=1`.

        Args:
            folder: Made if need be.
            record: What `describe` gives, with settings and canaries.

        Raises:
            ModelError: If the head in the file is not the head in memory.
        """
        self._check_head()
        folder.mkdir(parents=True, exist_ok=True)
        # matrices are saved as they are: any other value would make PEFT start them anew when it opens the folder
        self.model.peft_config["default"].init_lora_weights = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(str(folder))
        if self.changed_base is not None:
            self.changed_base.convert(folder)
        if self.base.revision:  # of the hub: the folder it was fetched to is on this machine alone
            # not told to PEFT before it saves, for it would ask the hub what its `main` holds by now
            file = folder / "adapter_config.json"
            names = {"base_model_name_or_path": self.base.name, "revision": self.base.revision}
            file.write_text(json.dumps(read_json(file) | names, indent=2, sort_keys=True), encoding="utf-8")
        readme = folder / "README.md"
        readme.unlink(missing_ok=True)  # PEFT's card names a local path as the base model
        self.chat.save(folder)
        write_record(folder, record)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, which a server under another user cannot read
        if not torch.equal(read_head(folder), self.head.detach().cpu()):
            raise ModelError(f"{folder}: the saved score head is not the trained one.")

    def describe(self, hashes: dict[str, str]) -> dict[str, Any]:
        """What `lora_rm.json` says of base, storage and tokens.

        Args:
            hashes: Of the quantised codes (`code_hashes`).
        """
        return {
            "format": 1,
            "num_labels": 1,
            "model_type": self.classifier.config.model_type,
            "architecture": type(self.classifier).__name__,
            "base": {
                "name": self.base.name,
                "revision": self.base.revision,
                "files": self.base.file_hashes(),
            },
            "load_dtype": dtype_name(self.quantization.load_dtype),
            "quantization": {
                "kind": self.quantization.kind,
                "double": self.quantization.double,
                "codes": hashes,
            },
            "tokens": _tokens(self.chat),
        }

    def wrap_layers(self) -> None:
        """Lets layers compute with the stored weights, base and update as one product, and in fewer passes."""
        make_exact(self)
        join_products(self)
        fuse_elementwise(self)

    def _ready(self) -> "RewardModel":
        self.wrap_layers()
        self._check_head()
        return self

    def _check_head(self) -> None:
        """One logit, float32, finite, never quantised.

        Raises:
            ModelError: Otherwise.
        """
        head = self.head
        if head.dim() != 2 or head.shape[0] != 1:
            raise ModelError(
                f"The score head has shape {list(head.shape)}; a reward model has one logit: [1, hidden]."
            )
        if head.dtype != torch.float32 or hasattr(head, "quant_state"):
            raise ModelError(f"The score head is {head.dtype}; it must be a plain float32 tensor.")
        if not torch.isfinite(head).all():
            raise ModelError("The score head holds NaN or infinite values.")
        if (
            self.training
            and any("lora_" in n for n, p in self.named_parameters() if p.requires_grad)
            and not head.requires_grad
        ):
            raise ModelError("The score head is frozen while the adapter is trained.")


def cores_of_cpu(config: Any, dtype: torch.dtype) -> list[Core]:
    """The attention cores of a CPU for a type of products, fastest first; not timed, or runs of one seed could differ."""
    if dtype != torch.bfloat16:
        return ["answers"]
    return [*(("compiled",) if is_to_be_had(*_heads(config)) else ()), "blocks", "answers"]


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads of a model, key-value heads, and the size of a head."""
    text = config.get_text_config()
    heads: int = getattr(text, "num_attention_heads", 1)
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, getattr(text, "num_key_value_heads", None) or heads, size


def _num_windowed(text: Any) -> int:
    """How many layers of a decoder have a sliding window that its longest conversations leave."""
    window: int | None = getattr(text, "sliding_window", None)
    is_used = getattr(text, "use_sliding_window", True)
    if not window or not is_used or window >= getattr(text, "max_position_embeddings", math.inf):
        return 0
    types = getattr(text, "layer_types", None)
    return types.count("sliding_attention") if types else text.num_hidden_layers


def _probe(vocabulary: int) -> list[TokenTree]:
    """Two trees of three and two answers whose lengths all differ."""
    generator = torch.Generator().manual_seed(0)

    def some(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    return [TokenTree(some(7), (some(3), some(5), some(1))), TokenTree(some(2), (some(6), some(4)))]


def _tokens(chat: ChatTokenizer) -> dict[str, Any]:
    """What of tokenizer and template changes rewards."""
    return {
        "pad_id": chat.pad_id,
        "end_id": chat.end_id,
        "eos_id": chat.tokenizer.eos_token_id,
        "adds_bos": chat.adds_bos,
        "template_sha256": chat.template_hash,
    }


def _tell_other_tokens(folder: str, record: dict[str, Any], chat: ChatTokenizer) -> None:
    """Says which of them the adapter to start from, of this record, was trained with otherwise."""
    saved = record.get("tokens", {})
    others = [name for name, value in _tokens(chat).items() if saved.get(name) != value]
    if others:
        say(
            f"adapter.start_from: {folder} was trained with another {' and '.join(others)}, so its rewards are not what they were. "
            "Give its data.chat_template and tokenizer, unless the change is meant."
        )
