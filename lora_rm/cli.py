"""`lora-rm COMMAND`: thin functions over the library, one a command."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TextIO

from lora_rm import __version__
from lora_rm.config import GLOB, Settings, dump_settings, flat, help_text, load_settings, with_whole_paths
from lora_rm.console import plain_errors
from lora_rm.data.files import JSON_LINES, SUFFIXES, BadRow, Row, find_files, read_rows
from lora_rm.errors import ConfigError
from lora_rm.export import TARGETS

MANUAL = """\
lora-rm: train a reward model with QLoRA on one consumer GPU, merge it, prove it, take it with you.

usage
  lora-rm COMMAND [ARGUMENTS] [--section.setting VALUE ...]

commands
  train  [PRESET|RUN]    preferences in, trained and evaluated adapter out (--resume goes on)
  merge  RUN             adapter + base -> merged model, and the proof that rewards stayed the same
  export RUN             merged model -> a folder that other programs open (--to huggingface, onnx, ...)
  eval   MODEL           accuracy of a run, adapter or export on preferences (--data.eval FILE)
  score  MODEL [FILE]    rewards of conversations, one JSON object a line
  plan   [PRESET|MODEL]  memory and time of a run, out of config.json alone (--gpu 24GiB)
  doctor [PATH]          what is wrong with this machine, a data file, a model or a run, and what to do
  config [PRESET|RUN]    the settings as they would be used, as YAML

settings
  Precedence: default < preset file < flag. `lora-rm COMMAND --help` shows the settings of a command with
  their units and defaults. Several mistakes are reported together; nothing starts before all are mended.
  `lora-rm --version` prints the version.

examples
  lora-rm train recipes/presets/quickstart.yaml
  lora-rm train --model.base Qwen/Qwen3-8B --data.train pairs.jsonl --output-dir runs/mine
  lora-rm plan Qwen/Qwen3-32B --gpu 24GiB
  lora-rm train runs/mine --resume
  lora-rm merge runs/mine
  lora-rm export runs/mine --to huggingface --out my-reward-model
  lora-rm export runs/mine --to onnx --dtype int8
  lora-rm eval my-reward-model --data.eval held_out.jsonl
  lora-rm score my-reward-model conversations.jsonl
  lora-rm doctor pairs.jsonl --model.base Qwen/Qwen3-8B

exit status
  0 done; 1 a mistake that the message explains, a fault that the doctor found, or a plan that does not fit;
  130 stopped; a training goes on with --resume.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        _write(MANUAL)
        return 0
    if words[0] == "--version":
        _write(f"lora-rm {__version__}\n")
        return 0
    name, *rest = words
    with plain_errors():
        if name not in COMMANDS:
            raise ConfigError(
                f"{name!r} is no command. Commands: {', '.join(COMMANDS)}. `lora-rm --help` explains them."
            )
        try:
            COMMANDS[name](rest)
        except BrokenPipeError:
            # who read the output, like `head`, has enough; the interpreter would complain of what is left in the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
    return 0


def train(words: Sequence[str]) -> None:
    """`lora-rm train [PRESET|RUN] [--resume] [settings]`."""
    parser = _parser("train", "[PRESET|RUN]", "Trains adapter and head, evaluates before and after.")
    _add_preset(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of output_dir"
    )
    parser.add_argument(
        "--resume.allow",
        dest="allow",
        action="store_true",
        help="resume although settings that do not change what is trained differ",
    )
    options, flags = _parse(parser, words, only=())
    preset = _preset(options.preset) or options.preset
    if (options.resume or options.allow) and preset:
        file = Path(preset)
        if file.name == "config.yaml" and (file.parent / "inputs.json").is_file():
            # the run lies where its file lies, wherever it was begun; a flag still has the last word
            flags = ["--output-dir", str(file.parent), *flags]
    settings = load_settings(preset, flags)
    from lora_rm.workflow import train_run

    train_run(settings, resume=options.resume or options.allow, allow=options.allow)


def merge(words: Sequence[str]) -> None:
    """`lora-rm merge RUN [--out DIR] [--with RUN ... --weights W,W] [--model.base NEW] [settings]`."""
    parser = _parser(
        "merge", "RUN", "Merges an adapter that lora_rm trained into its base, and verifies the rewards."
    )
    parser.add_argument(
        "run", metavar="RUN", help="run folder, or the folder of an adapter that lora_rm trained"
    )
    parser.add_argument("--out", metavar="DIR", help="folder to make; default RUN/merged")
    parser.add_argument(
        "--model.base",
        metavar="NEW",
        dest="base",
        help="where the base lies now, if not where it lay in training; must be the same files, and is kept",
    )
    parser.add_argument(
        "--with",
        metavar="RUN",
        action="append",
        dest="others",
        default=[],
        help="combine with the adapter of another run on the same base; may be repeated; needs --out, and makes (or replaces) OUT-adapter",
    )
    parser.add_argument(
        "--weights", metavar="W,W,...", help="of RUN and of every --with (default: their average)"
    )
    options, flags = _parse(parser, words, only=("merge", "verify"))
    settings = _settings_of(options.run, flags)
    paths = [Path(options.run), *map(Path, options.others)]
    weights = _weights(options.weights, len(paths))
    out = Path(options.out) if options.out else None
    if len(paths) > 1 and out is None:
        raise ConfigError("--with makes a model of several runs, which lies in none of them. Add --out DIR.")
    from lora_rm.workflow import combine_runs, merge_run

    if len(paths) > 1 and out is not None:
        combined = combine_runs(paths, weights, out.with_name(f"{out.name}-adapter"), base=options.base)
        merge_run(combined, settings, out=out)
    else:
        merge_run(paths[0], settings, out=out, base=options.base)


def _weights(text: str | None, count: int) -> list[float]:
    """The weights of several adapters."""
    if text is None:
        return [1 / count] * count
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        weights = []
    if count == 1 or len(weights) != count:
        raise ConfigError(
            f"--weights is {text}, for {count} runs. Give as many numbers as runs (RUN and every --with), as in 0.7,0.3."
        )
    return weights


def export(words: Sequence[str]) -> None:
    """`lora-rm export RUN --to TARGET [--out DIR] [--dtype TYPE] [--push REPOSITORY]`."""
    parser = _parser(
        "export", "RUN", "Writes a merged model in the form that other programs open, and checks its rewards."
    )
    parser.add_argument("run", metavar="RUN", help="run folder with a merged model, or the merged folder")
    parser.add_argument(
        "--to",
        default=TARGETS[0],
        choices=TARGETS,
        metavar="TARGET",
        help=f"{', '.join(TARGETS)} (default: {TARGETS[0]})",
    )
    parser.add_argument("--out", metavar="DIR", help="folder to make; default RUN/export/TARGET")
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="weights of onnx (float32, int8), torch-export (float32, float16, bfloat16), gguf (float32, float16, Q8_0, ...)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--push",
        metavar="REPOSITORY",
        help="also upload to this hub repository; a new one is private, one that exists stays as it is. Its parity.json holds "
        "held-out conversations as text",
    )
    options, _ = _parse(parser, words, only=None)
    from lora_rm.workflow import export_run

    export_run(
        Path(options.run),
        to=options.to,
        out=Path(options.out) if options.out else None,
        dtype=options.dtype,
        overwrite=options.overwrite,
        push_to=options.push,
    )


def evaluate(words: Sequence[str]) -> None:
    """`lora-rm eval MODEL [settings]`."""
    parser = _parser("eval", "MODEL", "Counts how many held-out pairs a model puts in the right order.")
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="run, adapter, merged model, export to huggingface, vllm or gguf, or hub id",
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    options, flags = _parse(parser, words, only=("data",))
    _settings_of(options.model, flags)  # flags that cannot be are told before torch is imported
    from lora_rm.workflow import evaluate_model, trained_length

    length = [f"--data.{key}={value}" for key, value in trained_length(Path(options.model)).items()]
    settings = load_settings(_preset(options.model), [*length, *flags])  # a flag has the last word
    evaluate_model(Path(options.model), settings, Path(options.json) if options.json else None)


def score(words: Sequence[str]) -> None:
    """`lora-rm score MODEL [FILE] [--out FILE [--resume]]`."""
    parser = _parser(
        "score", "MODEL [FILE]", "Prints the reward of every conversation, one JSON object a line."
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="run, adapter, merged model, export to huggingface, vllm or gguf, or hub id",
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help=f"{', '.join(SUFFIXES)}; default: JSON lines of standard input",
    )
    parser.add_argument("--out", metavar="FILE", help="write there instead of to standard output")
    parser.add_argument("--resume", action="store_true", help="go on with an --out that was not finished")
    parser.add_argument(
        "--model.device", metavar="DEVICE", help="auto, cpu, cuda, ... (default: of the run, or auto)"
    )
    parser.add_argument(
        "--model.compute-dtype",
        metavar="TYPE",
        help="of products: auto, float32, bfloat16 or float16 (default: of the run, or auto)",
    )
    parser.epilog = (
        'A line is {"messages": [...]}, {"prompt": ..., "response": ...} or {"prompt": ..., "responses": [...]}; '
        "it comes back with its reward or rewards."
    )
    options, _ = _parse(parser, words, only=None)
    if options.resume and options.out is None:
        raise ConfigError("--resume goes on with a file: give it with --out FILE.")
    flags = [f"--{key}={value}" for key, value in vars(options).items() if key.startswith("model.") and value]
    model = load_settings(_preset(options.model), flags).model
    how: dict[str, Any] = {"device": model.device, "compute_dtype": model.compute_dtype}
    source = _stdin() if options.file is None else _open(options.file)
    name = options.file or "standard input"
    from lora_rm.score_file import NUM_TOGETHER, score_file, score_lines

    with source as lines:
        if options.out:
            score_file(options.model, lines, name, Path(options.out), resume=options.resume, **how)
            return
        # who talks to standard input line by line gets each answer at once
        together = NUM_TOGETHER if options.file else 1
        for line in score_lines(options.model, lines, name, together=together, **how):
            _write(line + "\n")


def plan(words: Sequence[str]) -> None:
    """`lora-rm plan [PRESET|MODEL] [--gpu SIZE] [--calibrate] [settings]`."""
    parser = _parser(
        "plan",
        "[PRESET|MODEL]",
        "Tells whether a training fits, reading no more of the model than config.json; exit status 1 if it does not.",
    )
    parser.add_argument(
        "source", nargs="?", metavar="PRESET|MODEL", help="YAML file of settings, run folder, or a base model"
    )
    parser.add_argument("--gpu", metavar="SIZE", help="plan for a CUDA card of that memory, like 24GiB")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure this machine first, and keep what was found"
    )
    options, flags = _parse(parser, words, only=())
    preset = _preset(options.source)
    base = ["--model.base", options.source] if options.source and not preset else []
    settings = load_settings(preset, [*base, *flags])
    from lora_rm.plan import calibrate, read_memory, show_plan
    from lora_rm.plan import plan as plan_run

    memory = None if options.gpu is None else read_memory(options.gpu)
    if options.calibrate:
        calibrate(settings.model.device)
        if not settings.model.base:
            return
    if not show_plan(plan_run(settings, memory, gpu=memory is not None)):
        raise SystemExit(1)


def doctor(words: Sequence[str]) -> None:
    """`lora-rm doctor [DATA FILE|MODEL|RUN] [--json FILE] [settings]`."""
    parser = _parser(
        "doctor",
        "[DATA FILE|MODEL|RUN]",
        "Says what is wrong and what to do; ends with exit status 1 if there is a fault.",
    )
    parser.add_argument(
        "source",
        nargs="?",
        metavar="DATA FILE|MODEL|RUN",
        help="preferences (of the hub with their part, org/name:part); a base, adapter, merged model or export to huggingface or "
        "vllm; or a run folder. None: this machine",
    )
    parser.add_argument("--json", metavar="FILE", help="write the findings there too")
    options, flags = _parse(parser, words, only=("model", "data"))
    settings = load_settings(_preset(options.source), flags)
    from lora_rm.doctor import doctor as examine_and_show

    findings = examine_and_show(options.source, settings, Path(options.json) if options.json else None)
    if any(finding.status == "fault" for finding in findings):
        raise SystemExit(1)


def config(words: Sequence[str]) -> None:
    """`lora-rm config [PRESET|RUN] [settings]`."""
    parser = _parser(
        "config", "[PRESET|RUN]", "Prints the settings as they would be used; saved, it is a preset."
    )
    _add_preset(parser)
    options, flags = _parse(parser, words, only=())
    _write(dump_settings(load_settings(_preset(options.preset) or options.preset, flags)))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "merge": merge,
    "export": export,
    "eval": evaluate,
    "score": score,
    "plan": plan,
    "doctor": doctor,
    "config": config,
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `ConfigError`s."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. `{self.prog} --help` explains the arguments.")


def _parser(command: str, positional: str, description: str) -> _Parser:
    usage = f"lora-rm {command} {positional} [options] [--section.setting VALUE ...]"
    parser = _Parser(
        prog=f"lora-rm {command}", usage=usage, description=description, add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this page")
    return parser


def _add_preset(parser: _Parser) -> None:
    parser.add_argument(
        "preset",
        nargs="?",
        metavar="PRESET|RUN",
        help="YAML file of settings, or the run folder that holds one; none: the defaults",
    )


def _parse(
    parser: _Parser, words: Sequence[str], only: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Splits a command's own options from settings; prints the help page if asked.

    `only` names the sections of settings that the help shows: () for all, None for a command without settings.
    """
    if "-h" in words or "--help" in words:
        _write(parser.format_help())
        if only is not None:
            preset = next(filter(None, map(_preset, words)), None)
            page = help_text(parser.prog, load_settings(preset), only)
            _write("\n" + page.split("\n\n", 1)[-1])  # without tyro's own usage line
        raise SystemExit(0)
    own: list[str] = []
    flags: list[str] = []
    known = {option: action for action in parser._actions for option in action.option_strings}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")  # in settings they are the same
        if name in known:
            own.append(name + equals + value)
            if known[name].nargs != 0 and "=" not in word and rest:
                own.append(rest.pop(0))
        elif word.startswith("--"):
            flags.append(word)
            while "=" not in word and rest and not rest[0].startswith("--"):
                flags.append(rest.pop(0))
        else:
            own.append(word)
    options = parser.parse_args(own)
    if only is None and flags:
        raise ConfigError(f"{flags[0]} is no option of this command. Add --help to see those it has.")
    return options, flags


def _preset(source: str | None) -> str | None:
    """The file of settings that a run folder holds, or that is a preset; None for anything else."""
    if source is None:
        return None
    file = Path(source, "config.yaml")
    return str(file) if file.is_file() else source if source.endswith((".yaml", ".yml")) else None


FIXED = (
    "model.base", "model.revision", "model.quantization", "model.double_quantization", "model.load_dtype", "model.head_init",
    "data.chat_template", "data.allow_special_tokens", "adapter",
)  # fmt: skip
"""Settings and sections that a trained model was made with and keeps."""


def _settings_of(model: str, flags: Sequence[str]) -> Settings:
    """Settings for a model that is there: its own if it is a run, and flags over them.

    Raises:
        ConfigError: If flags ask for another model.
    """
    settings, own = (load_settings(_preset(model), words) for words in (flags, []))
    asked, known = flat(with_whole_paths(settings)), flat(with_whole_paths(own))
    for key, value in asked.items():
        if (key in FIXED or key.partition(".")[0] in FIXED) and value != known[key]:
            raise ConfigError(
                f"{key} is {value!r}, but {model} is trained already and keeps its own. Leave the flag out."
            )
    return settings


def _open(path: str) -> AbstractContextManager[Iterable[str | Row | BadRow]]:
    """The rows of what training reads; of a file of JSON lines the lines, as they come."""
    known = path.lower().endswith(SUFFIXES) and not path.lower().endswith(JSON_LINES)
    if known or GLOB.search(path) or Path(path).is_dir():
        find_files(path)
        return nullcontext(read_rows(path))
    try:
        # bytes that are not UTF-8 come out as halves of characters, which are refused with their line
        return Path(path).open(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{path}: cannot be read ({reason}). Give a file, or a folder or pattern of files."
        ) from None


def _stdin() -> TextIO:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
