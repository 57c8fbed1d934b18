"""Every setting once, with its meaning, its unit and its default.

The text under a field is its only documentation: `lora-rm train --help` prints it. YAML files hold values
only. Precedence: default < preset file < flag. This module imports no torch, so help and mistakes show at once.
"""

import dataclasses
import difflib
import glob
import json
import os
import re
import reprlib
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Interval
from pydantic import AllowInfNan, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from lora_rm.errors import ConfigError, redacted

Count = Annotated[int, Interval(ge=1, lt=2**31)]
CountOrNone = Annotated[int, Interval(ge=0, lt=2**31)]
Share = Annotated[float, Interval(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Ge(0.0), AllowInfNan(False)]
Positive = Annotated[float, Gt(0.0), AllowInfNan(False)]


def _or_none(value: Any) -> Any:
    """None for the words that say so, which YAML takes for texts."""
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value


GLOB = re.compile(r"[*?[]")
"""What makes a pattern of a path."""

TextOrNone = Annotated[str | None, BeforeValidator(_or_none)]


MAX_YAML = 2**17
"""Longest YAML text, in characters; a preset has a few thousand, and PyYAML reads about 50,000 a second."""


class _Loader(yaml.SafeLoader):
    """Reads YAML as PyYAML does, but for two things.

    A key given twice is an error: PyYAML would forget the first. So is an alias (`*name`): nine lines of aliases to
    aliases stand for a billion values.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses aliases."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not read; write the value out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses doubled keys."""
        found: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in found:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {_short(key)} stands twice", node.start_mark
                )
            found |= {key} if isinstance(key, Hashable) else set()  # PyYAML refuses the others
        return super().construct_mapping(node, deep)


class _Section:
    """Makes an unknown key an error in every settings class."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(_Section):
    """The base model, how it is stored while training, and the score head on top."""

    base: str = ""
    """Base model: a hub id, a local folder, a .gguf file, or builtin:smollm2-135m. Required."""

    revision: TextOrNone = None
    """Commit, tag or branch of a hub model; a commit makes the run repeatable."""

    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """Storage of the frozen linear layers: 4-bit NF4 (QLoRA), 8-bit (the codes of LLM.int8, with inputs as they are), or none."""

    double_quantization: bool = True
    """Quantise NF4's block constants too: 4.127 instead of 4.5 bits a weight."""

    load_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type the base's weights are read in; with nf4 it decides the codes, with quantization none it is the type they are
    rounded to."""

    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of matrix products in training, evaluation and scoring; auto: bfloat16 where the machine has it, else float32.
    What proves a merge or an export is computed in float32."""

    head_init: Literal["normal", "zero"] = "normal"
    """Start of the score head: normal with standard deviation 1/sqrt(hidden + 1), or zero. A base that is a reward model
    already keeps its head."""

    device: str = "auto"
    """Where the model runs: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings(_Section):
    """The LoRA adapter; names and meanings are those of peft.LoraConfig."""

    rank: Annotated[int, Interval(ge=1, le=2**16)] = 16
    """Rank r of every pair of LoRA matrices."""

    alpha: Positive = 32.0
    """LoRA alpha; the update is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."""

    dropout: Annotated[float, Interval(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the input of the LoRA matrices (probability)."""

    target_modules: tuple[str, ...] = ("all-linear",)
    """Layers that get an adapter: name endings, or all-linear for every linear layer of the decoder."""

    layers_to_transform: tuple[CountOrNone, ...] = ()
    """Decoder layers that get an adapter, counted from 0; none: all. Below the first of them no gradient is
    computed, so adapting the upper half alone saves a quarter of a step's products."""

    rank_pattern: dict[str, Count] = dataclasses.field(default_factory=dict)
    """Ranks for some layers: {name or regular expression: rank}."""

    alpha_pattern: dict[str, Positive] = dataclasses.field(default_factory=dict)
    """Alphas for some layers: {name or regular expression: alpha}."""

    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (rank-stabilised LoRA, arXiv 2312.03732)."""

    use_dora: bool = False
    """Train a magnitude per output row as well (DoRA, arXiv 2402.09353)."""

    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"] = "default"
    """Start of the LoRA matrices. loftq (arXiv 2310.08659) makes up for 4-bit storage and needs nf4; pissa
    (arXiv 2404.02948) and olora (arXiv 2406.01775) change the base and need model.quantization none with model.load_dtype
    float32; orthogonal needs even ranks; eva (arXiv 2410.07170) looks at the activations over the data first, which takes a while."""

    start_from: TextOrNone = None
    """Run or adapter of lora_rm, on the same base, whose matrices and score head training starts from."""

    lora_plus_ratio: Annotated[float, Ge(1.0)] = 1.0
    """Learning rate of the B matrices over that of the A matrices (LoRA+, arXiv 2402.12354)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(_Section):
    """Preferences: where they come from, how they are checked, split and cut."""

    train: str = ""
    """Training preferences: a .jsonl, .json, .csv (each also .gz) or .parquet file, a folder of such files or a
    pattern in quotes ('data/*.jsonl'), a datasets folder, a hub data set (org/name, or org/name:part for one of its
    configurations or folders), or builtin:checkable. Required."""

    train_split: str = "train"
    """Split of a hub data set or datasets folder that is trained on."""

    eval: TextOrNone = None
    """Evaluation preferences, of the same kinds as train; none: a share of the prompts is held out."""

    eval_split: str = "test"
    """Split of the evaluation data set."""

    eval_share: Annotated[float, Interval(gt=0.0, lt=1.0)] = 0.1
    """Share of the prompts held out for evaluation when eval is not given."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Columns that are called otherwise in the files of train and eval: {name here: name there}, as in
    {prompt: query, chosen: winner}."""

    max_train: CountOrNone = 0
    """Train on at most so many preferences, taken at random; 0: on all."""

    max_eval: CountOrNone = 0
    """Evaluate on at most so many preferences, taken at random; 0: on all."""

    max_length: Annotated[int, Interval(ge=8, lt=2**31)] = 1024
    """Longest conversation, prompt and one answer, in tokens."""

    length_policy: Literal["drop", "truncate_prompt"] = "drop"
    """What to do with a longer one: drop the preference, or cut the start of its prompt."""

    on_bad_row: Literal["raise", "skip"] = "raise"
    """A row that cannot be read, or that the chat template refuses, stops the run, or is counted and left out."""

    max_dropped_share: Share = 0.1
    """More than this share of rows dropped, for whatever reason, is an error."""

    chat_template: str = "tokenizer"
    """The tokenizer's own template, plain (Human/Assistant lines), or the path of a .jinja file."""

    allow_special_tokens: bool = False
    """Whether a special token of the chat template that is written inside a message, such as <|im_end|>, becomes
    a control token; False: it stays the text that it is. Kept with the adapter: scoring does the same."""

    num_workers: Annotated[int, Interval(ge=0, le=1024)] = 0
    """Processes that turn text into tokens; 0: as many as there are cores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings(_Section):
    """What is minimised; the kind of each row (pair, ranking, rating) picks the formula."""

    pair: Literal["bradley_terry", "rao_kupper", "davidson"] = "bradley_terry"
    """Model of a pair. rao_kupper and davidson give ties a probability of their own."""

    use_margin: bool = False
    """Ask for a difference of at least the row's margin (Llama 2, arXiv 2307.09288, eq. 2)."""

    label_smoothing: Annotated[float, Interval(ge=0.0, lt=0.5)] = 0.0
    """Probability that a label is the wrong way round."""

    centering: NonNegative = 0.0
    """Weight of the squared sum of a pair's rewards (Eisenstein et al. 2023, arXiv 2312.09244)."""

    tie_strength: Positive = 1.0
    """How likely ties are: eta = 1 + tie_strength of Rao-Kupper, nu of Davidson."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(_Section):
    """The optimisation."""

    num_epochs: Annotated[float, Interval(gt=0.0, le=1e6)] = 1.0
    """Passes over the training preferences; may be a fraction."""

    max_steps: CountOrNone = 0
    """At most so many optimizer steps, which may be fewer than num_epochs gives, never more; 0: after num_epochs."""

    preferences_per_step: Count = 32
    """Preferences whose gradients make one optimizer step."""

    tokens_per_microbatch: Annotated[int, Interval(ge=16, lt=2**31)] | Literal["auto"] = 4096
    """Tokens computed at once; sets the memory needed, never the result. auto: as many as fit, up to 16384."""

    learning_rate: Positive = 1e-4
    """Highest learning rate."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up; linear and cosine end at zero."""

    warmup_share: Share = 0.03
    """Share of the steps over which the learning rate rises from zero."""

    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW in float32, or bitsandbytes' paged 8-bit AdamW (GPU only)."""

    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""

    adam_beta1: Annotated[float, Interval(ge=0.0, lt=1.0)] = 0.9
    """Decay of AdamW's first moment."""

    adam_beta2: Annotated[float, Interval(ge=0.0, lt=1.0)] = 0.999
    """Decay of AdamW's second moment."""

    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm; 0: never."""

    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Activations kept for the backward pass. none: all; selective: results of matrix products and attention, about two
    thirds of the memory of all; full: each layer's input, least memory, steps longer by about half (by 80 % where rows
    are small for a fast card); auto: as much as the
    planned memory allows, layer by layer."""

    batching: Literal["auto", "shared", "packed", "padded"] = "auto"
    """How rows are computed: prompt shared by its answers, answers packed, or padded; auto: the first
    of these that a check at the start finds exact for this model."""

    sharding: Literal["none", "full"] = "none"
    """With several processes, what each holds of the frozen base: all of it, or a part (full: FSDP2, for a base
    too large for one card; a layer's weights are gathered when they are needed, so a step takes longer)."""

    log_every_steps: Count = 1
    """Steps between lines on the console, where it is no terminal; metrics.jsonl gets every step."""

    eval_every_steps: CountOrNone = 0
    """Steps between evaluations; the adapter is then that of the lowest evaluation loss, not of the last step.
    0: only at the end, and the last step's."""

    early_stopping: CountOrNone = 0
    """Stop after so many evaluations without a better loss; 0: never."""

    save_every_steps: CountOrNone = 100
    """Steps between checkpoints, of which the last step gets one too; 0: only when interrupted."""

    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept; the best one is kept beside them."""

    max_skipped_steps: Count = 5
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that get the metrics beside metrics.jsonl."""

    @property
    def row(self) -> int:
        """Tokens of a microbatch; 4096 for auto, until `lora_rm.plan.fit` has made a number of it."""
        return 4096 if self.tokens_per_microbatch == "auto" else self.tokens_per_microbatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeSettings(_Section):
    """How the adapter is added to the base."""

    base: Literal["auto", "dequantized", "original", "requantizable"] = "auto"
    """Weights that the adapter is added to: those it was trained on, out of their 4-bit codes
    (dequantized; auto after 4-bit and 8-bit training), or the original ones, which make another model: original;
    or requantizable: the original ones too, for loading in 4 bit again, which is measured then. On dequantized weights 4 bit
    swallows the update. The better way to serve 4 bit is the 4-bit base with the adapter beside it."""

    dtype: Literal["auto", "float16", "bfloat16", "float32", "bfloat16_nearest"] = "auto"
    """Type that is written; auto: float16, or float32, which takes twice the disk, where float16 overflows (Gemma, GLM-4)
    or the base was read in float32. bfloat16 is rounded stochastically and fails the verification as it is set (1.2 % of
    the reward spread on average in one measurement); bfloat16_nearest swallows small updates: 1.8 % to 19 % of the
    spread, measured on two runs."""

    overwrite: bool = False
    """Replace an earlier merge."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifySettings(_Section):
    """How close the merged model must come to the trained one."""

    max_change: NonNegative = 0.02
    """Largest change of one reward, as a share of the spread (standard deviation) of rewards."""

    max_mean_change: NonNegative = 0.005
    """Largest mean change, as a share of the spread."""

    num_answers: Count = 64
    """Held-out answers scored on both sides, beside the canaries."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Section):
    """Settings of a run."""

    output_dir: str = "runs/reward-model"
    """Run folder; all that the run makes lies in it, but for token ids and converted models in the cache
    ($LORA_RM_CACHE)."""

    seed: Annotated[int, Interval(gt=-(2**32), lt=2**32)] = 0
    """Seed of the head, the adapter, the order of the data, dropout, and of which prompts are held out and which rows a limit
    takes: give data.eval to compare seeds."""

    overwrite: bool = False
    """Remove an earlier run in output_dir first."""

    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings = DataSettings()
    loss: LossSettings = LossSettings()
    train: TrainSettings = TrainSettings()
    merge: MergeSettings = MergeSettings()
    verify: VerifySettings = VerifySettings()


def load_settings(preset: str | Path | None = None, flags: Sequence[str] = ()) -> Settings:
    """Reads a preset file, then the flags over it.

    Args:
        preset: A YAML file of values, or None for the defaults.
        flags: Words like `--adapter.rank 8`; `-` and `_` are the same, `--key=value` works, a list takes
            several words or a YAML list, a mapping takes a YAML mapping.

    Raises:
        ConfigError: Naming every unknown key and every value out of range at once.
    """
    values = read_yaml(preset) if preset is not None else {}
    mistakes = _merge_flags(values, flags)
    return check_settings(values, mistakes)


def settings_from_command_line(words: Sequence[str]) -> Settings:
    """Settings of a recipe called as `recipe.py [PRESET] [--section.setting VALUE ...]`.

    Args:
        words: `sys.argv`; with --help the page is printed and the program ends.

    Raises:
        ConfigError: As `load_settings`.
    """
    name, *rest = words
    preset = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if "--help" in rest or "-h" in rest:
        print(help_text(f"{Path(name).name} [PRESET]", load_settings(preset)))  # noqa: T201
        raise SystemExit(0)
    return load_settings(preset, rest)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping of settings.

    Raises:
        ConfigError: If the file is missing, is not YAML, or holds no mapping.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_YAML + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not YAML: {error}. Write one `key: value` a line.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({reason}). Give the path of a .yaml file.") from None
    if len(text) > MAX_YAML:
        raise ConfigError(
            f"{path}: is longer than {MAX_YAML:,} characters, which no preset is. Give the path of a preset."
        )
    try:
        values = _parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: is not YAML: {error}. Write one `key: value` a line.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: holds a {type(values).__name__}. Write sections like `train:` with values under them."
        )
    return {
        key: ({} if section is None and key in _sections() else section) for key, section in values.items()
    }


def _parse_yaml(text: str) -> Any:
    """The values of a YAML text.

    Raises:
        ConfigError: If it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError("nested too deep") from None
    except (
        Exception
    ) as error:  # PyYAML lets out what `int`, `datetime` and its own tables raise at odd values
        raise ConfigError(" ".join(str(error).split())[:500] or type(error).__name__) from None


def check_settings(values: Mapping[str, Any], mistakes: Sequence[str] = ()) -> Settings:
    """Turns nested values into `Settings`, collecting every mistake into one error.

    Args:
        values: Nested as in a preset file.
        mistakes: Sentences about mistakes found before, reported together with those found here.

    Raises:
        ConfigError: With one line a mistake: the key, what was found, what is allowed.
    """
    mistakes = list(mistakes)
    settings = None
    try:
        settings = TypeAdapter(Settings).validate_python(values)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for item in error.errors():
            key = _key(item["loc"])
            if item["type"] == "unexpected_keyword_argument":
                mistakes.append(_unknown_key(key))
            else:  # of a setting of several types, one mistake each
                found.setdefault(f"{key[:200]} is {_found(item)}", []).append(_allowed(item["msg"]))
        mistakes += [f"{start}; allowed: {' or '.join(allowed)}." for start, allowed in found.items()]
    mistakes += _booleans(values)
    if settings is not None:
        mistakes += _unsafe_texts(settings) + _contradictions(settings)
    if settings is None or mistakes:
        unique = list(dict.fromkeys(mistakes))
        if len(unique) == 1:
            raise ConfigError(unique[0])
        raise ConfigError(
            f"{len(unique)} settings cannot be used:\n" + "\n".join(f"  {line}" for line in unique)
        )
    return settings


def with_whole_paths(settings: Settings) -> Settings:
    """Settings whose local files and folders are found from any directory; hub ids and other names stay."""

    def whole(name: str) -> str:
        try:
            path = Path(name).expanduser()
            if name and path.exists():
                return os.path.normpath(path.absolute())
            # the folder it starts from is none of the pattern
            return os.path.normpath(glob.escape(str(Path.cwd())) / path) if GLOB.search(name) else name
        except (OSError, ValueError, RuntimeError):  # too long, NUL, ~nobody: told where it is opened
            return name

    data, template = settings.data, settings.data.chat_template
    data = dataclasses.replace(
        data,
        train=whole(data.train),
        eval=None if data.eval is None else whole(data.eval),
        chat_template=template if template in ("tokenizer", "plain") else whole(template),
    )
    model = dataclasses.replace(settings.model, base=whole(settings.model.base))
    start = settings.adapter.start_from
    adapter = dataclasses.replace(settings.adapter, start_from=None if start is None else whole(start))
    return dataclasses.replace(settings, data=data, model=model, adapter=adapter)


def save_settings(settings: Settings, path: Path) -> None:
    """Writes the settings as a YAML file that runs again as a preset."""
    path.write_text(dump_settings(settings), encoding="utf-8")


def dump_settings(settings: Settings) -> str:
    """The settings as YAML text, every value resolved."""
    plain = json.loads(json.dumps(dataclasses.asdict(settings)))  # lists for tuples, which YAML does not know
    return redacted(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100))


def help_text(command: str, preset: Settings | None = None, only: Sequence[str] = ()) -> str:
    """Every setting with its meaning and default, as a page for the terminal.

    Args:
        command: Name to show, like `lora-rm train`.
        preset: Settings whose values are shown as the defaults.
        only: Sections to show; empty: all.
    """
    import tyro

    default: Any = preset or Settings()
    described: type[Any] = Settings
    if only:
        described = dataclasses.make_dataclass(
            "Settings",
            [(name, _sections()[name], getattr(default, name)) for name in only],
            frozen=True,
            kw_only=True,
        )
        default = described()
    parser = tyro.extras.get_parser(
        described, prog=command, default=default, config=(tyro.conf.FlagConversionOff,)
    )
    return parser.format_help()


def _sections() -> dict[str, type[Any]]:
    return {
        field.name: field.type
        for field in dataclasses.fields(Settings)
        if isinstance(field.type, type) and issubclass(field.type, _Section)
    }


def _keys() -> Iterator[tuple[str, Any]]:
    """Every dotted key with its annotation."""
    for field in dataclasses.fields(Settings):
        if field.name in _sections():
            for inner in dataclasses.fields(_sections()[field.name]):
                yield f"{field.name}.{inner.name}", inner.type
        else:
            yield field.name, field.type


def flat(settings: Settings) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return {key: attrgetter(key)(settings) for key, _ in _keys()}


def _merge_flags(values: dict[str, Any], flags: Sequence[str]) -> list[str]:
    """Writes flags into the nested values; returns sentences about those that cannot be."""
    mistakes: list[str] = []
    annotations = dict(_keys())
    words = list(flags)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            mistakes.append(
                f"{word!r} stands where a flag was expected. Write flags like --train.learning-rate 1e-5."
            )
            continue
        name, has_value, inline = word[2:].partition("=")
        key = name.replace("-", "_")
        given = [inline] if has_value else []
        while not has_value and words and not words[0].startswith("--"):
            given.append(words.pop(0))
        if key not in annotations:
            mistakes.append(_unknown_key(key))
        elif not given:
            mistakes.append(f"{key} has no value. Write --{name} VALUE.")
        else:
            value, mistake = _flag_value(key, annotations[key], given)
            if mistake:
                mistakes.append(mistake)
                continue
            section, _, field = key.rpartition(".")
            target = values.setdefault(section, {}) if section else values
            if isinstance(target, dict):  # else the preset is wrong there, which is reported for itself
                target[field] = value
    return mistakes


def _flag_value(key: str, annotation: Any, given: list[str]) -> tuple[Any, str]:
    """The value of one flag's words, and a sentence if they do not fit together."""
    origin = typing.get_origin(annotation)
    if origin in (tuple, dict):
        try:
            parsed = _parse_yaml(given[0]) if len(given) == 1 and len(given[0]) <= MAX_YAML else given
        except ConfigError:
            parsed = given[0]
        if origin is tuple and (len(given) > 1 or not isinstance(parsed, list)):
            parsed = [part.strip() for word in given for part in word.split(",")]
        return parsed, ""
    if len(given) > 1:
        # the shell has made file names of a pattern
        way = "Put a pattern of files in quotes" if key in ("data.train", "data.eval") else "Give one"
        return None, f"{key} takes one value, found {len(given)}: {_short(' '.join(given))}. {way}."
    return given[0], ""


OTHER_NAMES = {
    "lr": "train.learning_rate",
    "epochs": "train.num_epochs",
    "num_train_epochs": "train.num_epochs",
    "max_epochs": "train.num_epochs",
    "batch_size": "train.preferences_per_step",
    "train_batch_size": "train.preferences_per_step",
    "per_device_train_batch_size": "train.preferences_per_step",
    "gradient_accumulation_steps": "train.preferences_per_step",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup_share",
    "warmup_steps": "train.warmup_share",
    "optim": "train.optimizer",
    "gradient_checkpointing": "train.checkpointing",
    "logging_steps": "train.log_every_steps",
    "eval_steps": "train.eval_every_steps",
    "save_steps": "train.save_every_steps",
    "save_total_limit": "train.keep_checkpoints",
    "report_to": "train.trackers",
    "center_rewards_coefficient": "loss.centering",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "datasets": "data.train",
    "eval_dataset": "data.eval",
    "val_size": "data.eval_share",
    "val_set_size": "data.eval_share",
    "max_seq_length": "data.max_length",
    "max_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "pretrain": "model.base",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "bf16": "model.compute_dtype",
    "fp16": "model.compute_dtype",
    "output": "output_dir",
    "out_dir": "output_dir",
    "save_path": "output_dir",
}
"""What TRL, PEFT, LLaMA-Factory, axolotl and OpenRLHF call a setting, where its name here is another."""


def _unknown_key(key: str) -> str:
    if key in _sections():
        return f"{key} is a section. Give its settings one by one, as in --{key}.{dataclasses.fields(_sections()[key])[0].name} VALUE."
    names = [name for name, _ in _keys()]
    last = key.rpartition(".")[2]
    near = [name for name in names if name.rpartition(".")[2] == last]  # the right name in the wrong section
    if not near and last in OTHER_NAMES:
        near = [OTHER_NAMES[last]]
    near = near or difflib.get_close_matches(key, [*names, *_sections()], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else " `lora-rm train --help` lists every setting."
    return f"{_short(key)[1:-1]} is not a setting.{hint}"


def _key(place: Sequence[int | str]) -> str:
    """The dotted name of what pydantic found a mistake in."""
    parts = [str(part) for part in place]
    annotation = dict(_keys()).get(".".join(parts[:2]))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = parts[:2]  # pydantic adds its name of the type that it tried
    return ".".join(parts)


def _found(item: Any) -> str:
    value = item["input"]
    if dataclasses.is_dataclass(value) or (isinstance(value, dict) and "dataclass" in item["type"]):
        value = type(value).__name__
    return _short(value)


def _allowed(message: str) -> str:
    """What pydantic says is allowed, in this project's words."""
    allowed = message.removeprefix("Input should be ").removeprefix("a valid ").replace("tuple", "list")
    return allowed.split(", unable to")[0]


def _booleans(values: Mapping[str, Any]) -> list[str]:
    """Mistakes where a number is true or false, which pydantic takes for 1 and 0."""
    mistakes = []
    for key, annotation in _keys():
        section, _, name = key.rpartition(".")
        held = values.get(section) if section else values
        value = held.get(name) if isinstance(held, Mapping) else None
        inner = (
            value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        )
        if _is_number(annotation) and any(isinstance(item, bool) for item in inner):
            mistakes.append(f"{key} is {_short(value)}; allowed: numbers, which true and false are not.")
    return mistakes


def _is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_is_number, typing.get_args(annotation)))


def _short(value: Any) -> str:
    """A value, for a message: on one line, and short whatever it is."""
    if isinstance(value, int) and abs(value) > 10**18:
        return "a huge number"
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 120
    return shortener.repr(value)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the settings with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            inner = f"{key}.{name}" if key else str(name)
            yield inner, str(name)
            yield from _texts(item, inner)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)


def _unsafe_texts(settings: Settings) -> list[str]:
    """Texts that no file name, log or card may hold: settings are written to all of them."""
    mistakes = []
    for key, text in _texts(dataclasses.asdict(settings)):
        if "\0" in text or (not text.isascii() and text != text.encode(errors="ignore").decode()):
            mistakes.append(
                f"{_short(key)[1:-1]} is {_short(text)}; allowed: text without NUL and half characters."
            )
        elif "://" in text:
            mistakes.append(
                f"{key} is {_short(redacted(text))}; an address is not read. Download it, and give the file or folder."
            )
        elif redacted(text) != text:
            mistakes.append(
                f"{key} holds the value of a secret environment variable ({_short(redacted(text))}), and settings are "
                "saved and published. Leave it in the environment, where the hub's and trackers' clients find it."
            )
    return mistakes


def _contradictions(settings: Settings) -> list[str]:
    """Settings that are fine alone and not together."""
    mistakes = []
    init, quantization = settings.adapter.init, settings.model.quantization
    if init in ("pissa", "olora") and (quantization, settings.model.load_dtype) != ("none", "float32"):
        mistakes.append(
            f"adapter.init is {init}, which takes part of the base's weights away and trains it. In {quantization} "
            f"read as {settings.model.load_dtype} what is left would be rounded to other weights than the merge "
            "adds to. Use model.quantization none with model.load_dtype float32, or another adapter.init."
        )
    if init == "loftq" and quantization != "nf4":
        mistakes.append(
            f"adapter.init is loftq, which makes up for what 4-bit storage loses, but model.quantization is "
            f"{quantization}. Use model.quantization nf4, or another adapter.init."
        )
    if init in ("pissa", "olora", "loftq") and settings.adapter.use_dora:
        mistakes.append(
            f"adapter.use_dora cannot be joined with adapter.init {init}. Use adapter.init default."
        )
    if settings.adapter.start_from is not None and init != "default":
        mistakes.append(
            f"adapter.init is {init}, but adapter.start_from gives the matrices to start from. Leave one of them out."
        )
    ranks = [settings.adapter.rank, *settings.adapter.rank_pattern.values()]
    if init == "eva" and settings.adapter.rank_pattern:
        mistakes.append(
            "adapter.rank_pattern cannot be joined with adapter.init eva: PEFT gives layers that see the same inputs one rank. Leave "
            "one of them out."
        )
    if init == "orthogonal" and any(rank % 2 for rank in ranks):
        mistakes.append(f"adapter.rank is {ranks[0]}; adapter.init orthogonal needs even ranks everywhere.")
    if settings.model.quantization == "none" and settings.merge.base == "dequantized":
        mistakes.append("merge.base is dequantized, but model.quantization is none. Use merge.base original.")
    if settings.train.sharding == "full":
        refused = {
            "model.quantization int8": quantization == "int8",
            "adapter.use_dora": settings.adapter.use_dora,
            f"adapter.init {init}": init in ("pissa", "olora", "loftq"),
        }
        mistakes += [
            f"train.sharding is full, which cannot be joined with {name}: it needs whole weights in one process. "
            "Use train.sharding none, or change the other."
            for name, is_set in refused.items()
            if is_set
        ]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings.adapter, key):
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                mistakes.append(
                    f"adapter.{key} has {_short(pattern)}, which is no regular expression ({error})."
                )
    if settings.train.early_stopping and not settings.train.eval_every_steps:
        mistakes.append("train.early_stopping needs train.eval_every_steps above 0.")
    return mistakes
