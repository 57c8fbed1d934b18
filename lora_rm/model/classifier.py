"""The base as one of transformers' sequence classifiers with one logit, quantised, and LoRA layers in it."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from lora_rm.config import AdapterSettings, ModelSettings
from lora_rm.console import console, say
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.errors import ModelError
from lora_rm.model.adapter import lora_config, lora_layers
from lora_rm.model.base import BaseModel, read_auto_config
from lora_rm.model.quantization import (
    DTYPES,
    Quantization,
    is_stored_in_4_bit,
    quantized_alike,
    quantized_layers,
)
from lora_rm.model.record import one_logit
from lora_rm.model.tensor_files import find_tensor

OTHER_HEADS = (
    "value_head.weight", "v_head.summary.weight", "v_head.weight", "reward_head.weight", "rm_head.weight",
    "regression_layer.weight", "score.0.weight",
)  # fmt: skip
"""Heads of reward models that OpenRLHF, TRL's and LLaMA-Factory's value heads, ArmoRM and others write."""


def wanted_quantization(settings: ModelSettings) -> Quantization:
    """How a run's base is to be quantised."""
    return Quantization(
        kind=settings.quantization,
        double=settings.double_quantization,
        load_dtype=DTYPES[settings.load_dtype],
    )


def stored_head(base: BaseModel) -> torch.Tensor | None:
    """The head that a model folder holds, (1, H) float32, or None."""
    head = find_tensor(base.weight_files, "score.weight")
    if head is not None:
        return one_logit(head, base.path)
    beside = [
        file
        for name in ("value_head.safetensors", "v_head.safetensors")
        if (file := base.path / name).is_file()
    ]
    for name in OTHER_HEADS:
        if find_tensor([*base.weight_files, *beside], name) is not None:
            raise ModelError(
                f"{base.path}: holds a head named {name}, which transformers does not read, so training and rewards would begin "
                "with a new one. Store it as score.weight, shape [1, hidden], or take it out if it is not wanted."
            )
    return None


def start_head(head: torch.Tensor, base: BaseModel, init: str, seed: int) -> None:
    """Gives a head the values that training starts from: those of a base that is a reward model already, or `model.head_init`.

    Args:
        head: (1, H) float32.
        base: Whose head it is.
        init: zero or normal.
        seed: Of the random values.
    """
    stored = stored_head(base)
    if stored is not None:
        say(f"{base.name} is a reward model already: training goes on from its score head.")
        head.data.copy_(stored)
    elif init == "zero":
        nn.init.zeros_(head)
    else:  # Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1
        generator = torch.Generator().manual_seed(seed)
        head.data.copy_(torch.randn(head.shape, generator=generator) / (head.shape[1] + 1) ** 0.5)


def read_config(base: BaseModel) -> Any:
    """The configuration of a base, as that of a classifier with one logit and without dropout of its own.

    Some bases (GPT-2, Seed-OSS) would draw other activations for every pass, and answers that share a prompt would share
    its draws. TRL turns them off too; `adapter.dropout` is the adapter's alone.

    Raises:
        ModelError: If transformers has no sequence classifier of its kind.
    """
    config = read_auto_config(base)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ModelError(
            f"{base.name}: transformers has no sequence classifier for model type {config.model_type}, "
            "so no program could open the exported reward model."
        )
    config.num_labels = 1
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def has_absolute_positions(config: Any) -> bool:
    """Whether a token's position is counted from the start of its row, as in GPT-2: then rows cannot be padded on the left."""
    return not hasattr(config.get_text_config(), "rope_parameters")


def longest_conversation(config: Any) -> tuple[int, str] | None:
    """The most tokens that a conversation may have, and why; None if only memory limits it.

    Two kinds of rotary positions take other frequencies for all of a row as soon as one conversation in it is longer
    than the model was first trained on, so a reward would depend on its neighbours in the row.

    Args:
        config: Of `read_config`.
    """
    text = config.get_text_config()
    most: int | None = getattr(text, "max_position_embeddings", None)
    if most is None:
        return None
    if has_absolute_positions(config):
        return most, "the model has no positions beyond"
    rope = text.rope_parameters or {}
    limits: list[int] = [
        values.get("original_max_position_embeddings", most) if values["rope_type"] == "longrope" else most
        for values in (rope, *rope.values())
        if isinstance(values, dict) and values.get("rope_type") in ("dynamic", "longrope")
    ]
    why = (
        "with a longer conversation in a row, all its rotary positions change (rope_type dynamic or longrope)"
    )
    return (min(limits), why) if limits else None


def check_length(config: Any, length: int, what: str) -> None:
    """Refuses a length that no conversation may have.

    Args:
        config: Of `read_config`.
        length: Tokens.
        what: What has this length, for the message.

    Raises:
        ModelError: If it is more than `longest_conversation`.
    """
    longest = longest_conversation(config)
    if longest and length > longest[0]:
        raise ModelError(
            f"{what} is {length} tokens long; this model takes at most {longest[0]}: {longest[1]}. "
            f"Shorten it; in training and evaluation data.max_length {longest[0]} leaves such out."
        )


def new_classifier(config: Any, name: str, dtype: torch.dtype | None = None) -> Any:
    """A classifier with weights that mean nothing, on torch's default device; none is read.

    Args:
        config: Of `read_config`.
        name: Of the base, for the message.
        dtype: Of its weights.

    Raises:
        ModelError: If its head is not a linear layer over the last token.
    """
    try:
        model: Any = AutoModelForSequenceClassification.from_config(
            config, dtype=dtype, attn_implementation=plain_attention(config)
        )
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{name}: no model can be made from its config.json ({type(error).__name__}: {error}). Fetch it again."
        ) from None
    if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.bias is not None:
        raise ModelError(
            f"{name}: {type(model).__name__} has no linear layer `score` over the last token. "
            "Reward models are made from decoder-only models; encoders are not."
        )
    return model


def make_trainable(model: Any, adapter: AdapterSettings | None) -> Any:
    """Freezes a classifier but for its head, and wraps it with LoRA layers if there is an adapter.

    Raises:
        ModelError: If a target of the adapter names no layer.
    """
    model.requires_grad_(False)
    if adapter is None:
        model.score.requires_grad_(True)
        return model
    config = lora_config(adapter, getattr(model, model.base_model_prefix))
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    try:
        with quiet("peft"):
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"No adapter can be put on adapter.target_modules {list(adapter.target_modules)} with adapter.layers_to_transform "
            f"{list(adapter.layers_to_transform)} ({error}). Layers are named {', '.join(sorted(names))}."
        ) from None
    found = [name for name, _ in lora_layers(adapted)]
    _check_patterns(adapter, found, model.config.get_text_config().num_hidden_layers)
    for target in adapter.target_modules:
        if target != "all-linear" and not any(f".{name}".endswith(f".{target}") for name in found):
            raise ModelError(
                f"adapter.target_modules has {target!r}, but no layer that gets an adapter ends so. Layers are named "
                f"{', '.join(sorted(names))}."
            )
    return adapted


def _check_patterns(adapter: AdapterSettings, found: Sequence[str], num_layers: int) -> None:
    """Raises if a setting that picks layers picks none; PEFT says nothing then.

    Raises:
        ModelError: Naming it.
    """
    if beyond := [number for number in adapter.layers_to_transform if number >= num_layers]:
        raise ModelError(
            f"adapter.layers_to_transform has {beyond}; this model has {num_layers} layers, 0 to {num_layers - 1}. Its upper half is "
            f"{list(range(num_layers // 2, num_layers))}."
        )
    if "all-linear" in adapter.target_modules and len(adapter.target_modules) > 1:
        raise ModelError(
            f"adapter.target_modules has all-linear and {len(adapter.target_modules) - 1} more, of which PEFT would take the latter "
            "alone. Give all-linear, or names."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(adapter, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in found):  # PEFT's own rule
                raise ModelError(
                    f"adapter.{key} has {pattern!r}, which no layer with an adapter is called. Those are called {found[0]} and so on: "
                    "give the end of a name, or a regular expression for one."
                )


def plain_attention(config: Any) -> str | None:
    """The attention of padded batches, by transformers' name; None: its default."""
    softcapped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if softcapped else None


def loadable_config(base: BaseModel, quantization: Quantization, chat: ChatTokenizer) -> Any:
    """The configuration to load a base with; whatever can be wrong with the base is looked for first.

    Args:
        base: Where the weights lie.
        quantization: How they are to be stored.
        chat: Its padding token becomes the model's.

    Raises:
        ModelError: If transformers has no such classifier, or the head or the padding token cannot be used.
    """
    config = read_config(base)
    if is_stored_in_4_bit(config) and quantization.kind != "nf4":
        raise ModelError(
            f"{base.name}: is stored in 4 bit. Set model.quantization nf4, or give the original model."
        )
    stored_head(base)  # raises if there is one of more than one logit
    with torch.device("meta"):
        new_classifier(config, base.name)
    vocabulary = config.get_text_config().vocab_size
    if chat.pad_id >= vocabulary:
        raise ModelError(
            f"{base.name}: its padding token {chat.tokenizer.pad_token!r} has the id {chat.pad_id}, but the model has {vocabulary} "
            "embeddings: a token was added to the tokenizer alone. Call model.resize_token_embeddings(len(tokenizer)) and save "
            "both, or take the token out of the tokenizer's files."
        )
    config.get_text_config().pad_token_id = chat.pad_id
    return config


def load_classifier(
    base: BaseModel,
    config: Any,
    quantization: Quantization,
    compute_dtype: torch.dtype,
    device_map: dict[str, Any],
) -> Any:
    """The classifier of a base with its weights, quantised on the way in; its head is float32.

    Args:
        base: Where the weights lie.
        config: Of `loadable_config`.
        quantization: How they are stored.
        compute_dtype: Of the products with quantised weights.
        device_map: Of transformers: what goes where.

    Raises:
        ModelError: If the head is not what it must be.
    """
    with quiet("transformers"), quantized_alike():
        model = AutoModelForSequenceClassification.from_pretrained(
            base.path,
            config=config,
            dtype=quantization.load_dtype,
            quantization_config=quantization.config(compute_dtype),
            device_map=device_map,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=plain_attention(config),
        )
    if type(model.score) is not nn.Linear:
        raise ModelError(
            f"{base.name}: its score head was quantised ({type(model.score).__name__}); it must never be."
        )
    if is_stored_in_4_bit(
        config
    ):  # then transformers 5.23 leaves what is not quantised in the type of the files
        codes = {id(layer.weight) for layer in quantized_layers(model).values()}
        for parameter in model.parameters():
            if id(parameter) not in codes:
                parameter.data = parameter.data.to(quantization.load_dtype)
    model.score.weight.data = model.score.weight.data.float()
    one_logit(model.score.weight, base.path)
    return model


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silences a library's warnings and bars: a fresh head is what is wanted here, not a mistake."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    if not console.is_terminal:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
