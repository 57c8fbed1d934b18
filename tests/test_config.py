"""Settings: where values come from, what is refused, and that reading them costs no torch."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_rm.config import (
    OTHER_NAMES,
    Settings,
    check_settings,
    dump_settings,
    flat,
    help_text,
    load_settings,
    save_settings,
    settings_from_command_line,
    with_whole_paths,
)
from lora_rm.data.files import find_files
from lora_rm.errors import ConfigError

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "recipes" / "presets").glob("*.yaml"))


def write(folder, text):
    file = folder / "preset.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def keys():
    """Every dotted key with its value in the default settings."""
    for section in dataclasses.fields(Settings):
        value = getattr(Settings(), section.name)
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield f"{section.name}.{field.name}", getattr(value, field.name)
        else:
            yield section.name, value


def get(settings, key):
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


# Where values come from.


def test_default_then_preset_then_flag(tmp_path):
    preset = write(tmp_path, "seed: 5\nadapter:\n  rank: 8\n  alpha: 3\ntrain:\n  num_epochs: 2\n")
    settings = load_settings(preset, ["--adapter.rank", "4", "--train.max-steps", "7"])
    assert (settings.adapter.rank, settings.train.max_steps) == (4, 7)
    assert (settings.seed, settings.adapter.alpha, settings.train.num_epochs) == (5, 3.0, 2.0)
    assert (settings.adapter.dropout, settings.train.learning_rate) == (0.0, 1e-4)


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "train: {}\nmodel:\n"])
def test_an_empty_file_or_section_is_the_default(tmp_path, text):
    assert load_settings(write(tmp_path, text)) == Settings() == load_settings()


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--train.learning-rate", "3e-4"], "train.learning_rate", 3e-4),
        (["--train.learning_rate", "3e-4"], "train.learning_rate", 3e-4),
        (["--train.learning-rate=3e-4"], "train.learning_rate", 3e-4),
        (["--seed", "-1"], "seed", -1),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--overwrite", "true"], "overwrite", True),
        (["--model.double-quantization=no"], "model.double_quantization", False),
        (["--output-dir", "runs/a=b c"], "output_dir", "runs/a=b c"),
        (["--output-dir", "7"], "output_dir", "7"),
        (["--data.eval", "none"], "data.eval", None),
        (["--model.revision", "Null"], "model.revision", None),
        (["--data.eval", "held-out.jsonl"], "data.eval", "held-out.jsonl"),
        (["--adapter.target-modules", "q_proj"], "adapter.target_modules", ("q_proj",)),
        (["--adapter.target-modules", "q_proj", "v_proj"], "adapter.target_modules", ("q_proj", "v_proj")),
        (["--adapter.target-modules", "[q_proj, v_proj]"], "adapter.target_modules", ("q_proj", "v_proj")),
        (["--adapter.target-modules", "q_proj, v_proj"], "adapter.target_modules", ("q_proj", "v_proj")),
        (["--adapter.target-modules", "q_proj,k_proj", "v_proj"], "adapter.target_modules", ("q_proj", "k_proj", "v_proj")),
        (["--adapter.layers-to-transform", "1,2"], "adapter.layers_to_transform", (1, 2)),
        (["--train.trackers=wandb,trackio"], "train.trackers", ("wandb", "trackio")),
        (["--adapter.layers-to-transform=[1, 2]"], "adapter.layers_to_transform", (1, 2)),
        (["--adapter.layers-to-transform", "1", "2"], "adapter.layers_to_transform", (1, 2)),
        (["--train.trackers", "[]"], "train.trackers", ()),
        (["--adapter.rank-pattern", "{q_proj: 8, '.*up': 2}"], "adapter.rank_pattern", {"q_proj": 8, ".*up": 2}),
        (["--data.columns", "{prompt: query, chosen: winner}"], "data.columns", {"prompt": "query", "chosen": "winner"}),
        (["--adapter.alpha-pattern={q_proj: 1e1}"], "adapter.alpha_pattern", {"q_proj": 10.0}),
    ],
    ids=str,
)  # fmt: skip
def test_flags(flags, key, value):
    settings = load_settings(None, flags)
    assert get(settings, key) == value
    assert type(get(settings, key)) is type(value)
    others = {name for name, default in keys() if get(settings, name) != default}
    assert others <= {key}


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1e-4", 1e-4), ("2", 2.0), ("1.0e-5", 1e-5)])
def test_yaml_numbers_without_a_point_are_numbers(tmp_path, text, value):
    found = load_settings(write(tmp_path, f"train:\n  learning_rate: {text}\n")).train.learning_rate
    assert found == value
    assert type(found) is float


@pytest.mark.parametrize("text", ["none", "None", "null", "~"])
def test_none_in_a_file_is_none_as_in_a_flag(tmp_path, text):
    settings = load_settings(write(tmp_path, f"data: {{eval: {text}}}\nmodel: {{revision: {text}}}\n"))
    assert (settings.data.eval, settings.model.revision) == (None, None)


# What is refused.


@pytest.mark.parametrize(
    ("text", "flags", "parts"),
    [
        # unknown keys, with the nearest
        ("train: {lerning_rate: 1}", [], ["train.lerning_rate is not a setting", "mean train.learning_rate?"]),
        ("", ["--train.lerning-rate", "1"], ["train.lerning_rate is not", "mean train.learning_rate?"]),
        ("", ["--adapter.r=8"], ["adapter.r is not a setting"]),
        ("learning_rate: 1", [], ["learning_rate is not a setting", "mean train.learning_rate?"]),
        ("zzz: 1", [], ["zzz is not a setting", "--help"]),
        # out of range or of the wrong type
        ("adapter: {rank: 0}", [], ["adapter.rank is 0", "greater than or equal to 1"]),
        ("adapter: {rank: 2.5}", [], ["adapter.rank is 2.5", "integer"]),
        ("adapter: {dropout: 1.0}", [], ["adapter.dropout is 1.0", "less than 1"]),
        ("data: {eval_share: 0}", [], ["data.eval_share is 0", "greater than 0"]),
        ("data: {eval_share: 1}", [], ["data.eval_share is 1", "less than 1"]),
        ("data: {max_dropped_share: 1.1}", [], ["data.max_dropped_share is 1.1", "less than or equal to 1"]),
        ("loss: {label_smoothing: 0.5}", [], ["loss.label_smoothing is 0.5", "less than 0.5"]),
        ("train: {learning_rate: .nan}", [], ["train.learning_rate is nan", "a finite number"]),
        ("train: {learning_rate: fast}", [], ["train.learning_rate is 'fast'", "number"]),
        ("", ["--train.learning-rate", "-1e-4"], ["train.learning_rate is '-1e-4'", "greater than 0"]),
        ("model: {quantization: nf5}", [], ["model.quantization is 'nf5'", "'nf4', 'int8' or 'none'"]),
        ("model: {base: 7}", [], ["model.base is 7", "string"]),
        ("overwrite: maybe", [], ["overwrite is 'maybe'", "boolean"]),
        ("adapter: {rank_pattern: [1]}", [], ["adapter.rank_pattern is [1]", "dictionary"]),
        ("train: {trackers: [wandb, mlflow]}", [], ["train.trackers.1 is 'mlflow'", "'trackio'"]),
        ("train: 3", [], ["train is 3"]),
        ("train: 3", ["--train.seed", "3"], ["train is 3", "train.seed is not a setting"]),
        ("adapter: {rank: true}", [], ["adapter.rank is True", "numbers, which true and false are not"]),
        ("train: {eval_every_steps: yes}", [], ["train.eval_every_steps is True", "numbers"]),
        ("adapter: {rank_pattern: {q: true}}", [], ["adapter.rank_pattern is {'q': True}", "numbers"]),
        ("train: {tokens_per_microbatch: 4k}", [], ["train.tokens_per_microbatch is '4k'; allowed: integer or 'auto'."]),
        ("train: {tokens_per_microbatch: 8}", [], ["microbatch is 8; allowed: greater than or equal to 16 or 'auto'."]),
        ("overwrite: 2", [], ["overwrite is 2; allowed: boolean."]),
        # names that other tools have
        ("", ["--lr", "1"], ["lr is not a setting. Did you mean train.learning_rate?"]),
        ("", ["--train.lr", "1"], ["Did you mean train.learning_rate?"]),
        ("", ["--adapter.r", "8"], ["Did you mean adapter.rank?"]),
        ("", ["--train.epochs", "3"], ["Did you mean train.num_epochs?"]),
        ("", ["--train.batch_size", "8"], ["Did you mean train.preferences_per_step?"]),
        ("", ["--adapter", "{rank: 8}"], ["adapter is a section", "--adapter.rank VALUE"]),
        # flags that are no flags
        ("", ["fast"], ["'fast'", "flag was expected"]),
        ("", ["--seed"], ["seed has no value", "--seed VALUE"]),
        ("", ["--seed", "1", "2"], ["seed takes one value, found 2: '1 2'"]),
        ("", ["--adapter.rank-pattern", "{q: [}"], ["adapter.rank_pattern is '{q: [}'"]),
        # contradictions
        ("adapter: {init: pissa}", [], ["adapter.init is pissa", "quantization none with model.load_dtype"]),
        ("adapter: {init: olora}\nmodel: {quantization: none}", [], ["adapter.init is olora", "load_dtype float32"]),
        ("adapter: {init: loftq}\nmodel: {quantization: int8}", [], ["adapter.init is loftq", "quantization nf4"]),
        ("adapter: {init: loftq, use_dora: true}", [], ["use_dora cannot be joined with adapter.init loftq"]),
        (
            "adapter: {init: olora, use_dora: true}\nmodel: {quantization: none, load_dtype: float32}",
            [],
            ["use_dora cannot be joined with adapter.init olora"],
        ),
        ("adapter: {init: orthogonal, rank: 5}", [], ["adapter.rank is 5", "even"]),
        ("adapter: {init: orthogonal, rank_pattern: {q: 3}}", [], ["even ranks everywhere"]),
        ("adapter: {rank_pattern: {q: 0}}", [], ["adapter.rank_pattern.q is 0", "greater than or equal to 1"]),
        ("model: {quantization: none}\nmerge: {base: dequantized}", [], ["merge.base is dequantized", "original"]),
        ("train: {early_stopping: 2}", [], ["train.early_stopping needs train.eval_every_steps"]),
        # files
        ("- seed", [], ["preset.yaml: holds a list"]),
        ("train: [", [], ["preset.yaml: is not YAML"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_names_the_key_what_was_found_and_what_is_allowed(tmp_path, text, flags, parts):
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, text), flags)
    for part in parts:
        assert part in str(caught.value)


def test_several_mistakes_are_one_error_that_names_each(tmp_path):
    preset = write(tmp_path, "train: {num_epoch: 1, weight_decay: -1}\nadapter: {rank: 0}\nfoo: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(preset, ["--seed", "x", "--adapter.alfa", "1", "--train.learning-rate", "0"])
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("7 settings cannot be used")
    expected = {
        "train.num_epoch": "train.num_epochs?",
        "train.weight_decay": "is -1",
        "adapter.rank": "is 0",
        "foo": "is not a setting",
        "seed": "is 'x'",
        "adapter.alfa": "adapter.alpha?",
        "train.learning_rate": "is '0'",
    }
    found = {line.split()[0]: line for line in lines}
    assert found.keys() == expected.keys()
    for key, part in expected.items():
        assert part in found[key]


def test_several_contradictions_are_one_error():
    with pytest.raises(
        ConfigError, match=r"(?s)^2 settings.*merge\.base is dequantized.*train\.early_stopping"
    ):
        check_settings(
            {
                "model": {"quantization": "none"},
                "merge": {"base": "dequantized"},
                "train": {"early_stopping": 1},
            }
        )


def test_a_missing_or_unreadable_preset_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read .* \.yaml file"):
        load_settings(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: is not YAML"):
        load_settings(tmp_path / "latin.yaml")


def test_the_right_name_in_the_wrong_section_is_nearer_than_another_name():
    with pytest.raises(ConfigError, match=r"model\.rank is not a setting\. Did you mean adapter\.rank\?"):
        check_settings({"model": {"rank": 8}})


def test_names_of_other_tools_lead_to_settings_that_there_are():
    known = dict(keys())
    assert OTHER_NAMES.keys().isdisjoint(name.rpartition(".")[2] for name in known)
    for other, key in OTHER_NAMES.items():
        assert key in known, other
        for name in (other, f"train.{other}"):
            with pytest.raises(ConfigError) as error:
                load_settings(None, [f"--{name}", "1"])
            assert str(error.value) == f"{name} is not a setting. Did you mean {key}?"
    for other in (
        "per-device-train-batch-size",
        "cutoff_len",
        "lora_target",
        "pretrain",
        "load_in_4bit",
        "val_size",
    ):
        assert other.replace("-", "_") in OTHER_NAMES


def test_a_misspelt_section_is_not_taken_for_a_setting_of_another():
    with pytest.raises(ConfigError, match="trian is not a setting") as caught:
        check_settings({"trian": {"learning_rate": 1e-4}})
    assert "data.train" not in str(caught.value)
    assert "Did you mean train" in str(caught.value)


def test_a_section_written_twice_is_not_lost_in_silence(tmp_path):
    preset = write(tmp_path, "train:\n  num_epochs: 3\nseed: 1\ntrain:\n  max_steps: 9\n")
    with pytest.raises(ConfigError, match="train"):
        load_settings(preset)


# What is written.

# PyYAML folds three further line breaks, which no path or pattern needs, into spaces; NUL and addresses are refused
ODD_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\x85\u2028\u2029"), max_size=20
).filter(lambda text: "://" not in text)


@settings(deadline=None)
@given(
    name=ODD_TEXT | st.sampled_from(["null", "no", "3e-4", "1_000", "'", "~", "a: b", "# a", "12:30"]),
    rate=st.floats(1e-300, 1e300),
    pattern=st.dictionaries(ODD_TEXT.map(re.escape), st.integers(1, 64), max_size=3),
    modules=st.lists(ODD_TEXT, max_size=3),
    held_out=st.none() | ODD_TEXT,
)  # fmt: skip
def test_saved_settings_load_again_to_equal_settings(
    tmp_path_factory, name, rate, pattern, modules, held_out
):
    written = check_settings(
        {
            "output_dir": name,
            "overwrite": True,
            "adapter": {"rank_pattern": pattern, "target_modules": modules, "layers_to_transform": [2, 5]},
            "data": {"eval": held_out},
            "train": {"learning_rate": rate, "trackers": ["wandb"]},
        }
    )
    file = tmp_path_factory.getbasetemp() / "saved.yaml"
    save_settings(written, file)
    assert load_settings(file) == written
    assert file.read_text(encoding="utf-8") == dump_settings(written)


def test_flat_names_every_setting_once_in_the_order_of_the_file():
    values = flat(
        check_settings({"adapter": {"rank_pattern": {"q_proj": 8}}, "train": {"trackers": ["wandb"]}})
    )
    assert list(values)[:4] == ["output_dir", "seed", "overwrite", "model.base"]
    assert (values["adapter.rank_pattern"], values["train.trackers"]) == ({"q_proj": 8}, ("wandb",))
    sections = [value for value in vars(Settings()).values() if dataclasses.is_dataclass(value)]
    assert len(values) == 3 + sum(len(vars(section)) for section in sections)


def test_settings_of_a_recipe_come_from_its_preset_and_flags(tmp_path, capsys):
    preset = write(tmp_path, "seed: 5\nadapter: {rank: 8}\n")
    settings = settings_from_command_line(["recipes/recipe.py", str(preset), "--adapter.rank", "4"])
    assert (settings.seed, settings.adapter.rank) == (5, 4)
    assert settings_from_command_line(["recipe.py", "--seed", "3"]).seed == 3
    for word in ("--help", "-h"):
        with pytest.raises(SystemExit, match="0"):
            settings_from_command_line(["recipes/recipe.py", str(preset), word])
        page = capsys.readouterr().out
        assert "recipe.py" in page
        assert "(default: 8)" in page


def test_the_help_shows_every_setting_with_its_meaning(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    page = help_text("lora-rm train")
    missing = [key for key, _ in keys() if f"--{key.replace('_', '-')} " not in page]
    assert not missing
    words = " ".join(page.replace("│", " ").split())
    assert "Rank r of every pair of LoRA matrices. (default: 16)" in words
    assert "--adapter.rank" not in help_text("lora-rm merge", only=("merge",))


def test_local_data_is_found_from_any_directory(tmp_path, monkeypatch):
    here = tmp_path / "run [1]"
    (here / "data").mkdir(parents=True)
    (here / "data" / "a.jsonl").write_text("")
    monkeypatch.chdir(here)
    for name, expected in (
        ("data/a.jsonl", f"{here}/data/a.jsonl"),
        ("./data", f"{here}/data"),
        ("data/../data/*.jsonl", f"{tmp_path}/run [[]1]/data/*.jsonl"),
        (f"{tmp_path}/*.jsonl", f"{tmp_path}/*.jsonl"),
        ("org/name:part", "org/name:part"),
        ("absent.jsonl", "absent.jsonl"),
    ):
        data = with_whole_paths(check_settings({"data": {"train": name, "eval": name}})).data
        assert (data.train, data.eval) == (expected, expected)
        assert with_whole_paths(Settings(data=data)).data == data
    monkeypatch.chdir(tmp_path)
    assert find_files(f"{tmp_path}/run [[]1]/data/*.jsonl") == [here / "data" / "a.jsonl"]


# What it costs.

HEAVY = {"torch", "transformers", "peft", "datasets", "numpy", "pyarrow"}


@pytest.mark.parametrize("module", ["lora_rm", "lora_rm.config", "lora_rm.cli"])
def test_importing_settings_or_commands_imports_no_torch(module):
    code = f"import sys, {module}; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["plan", "--help"], ["config"], ["--version"]]
)
def test_commands_that_compute_nothing_import_no_torch(words):
    """So they answer in half a second."""
    code = f"""\
import sys
from lora_rm.cli import main
try:
    main({words})
finally:
    print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (bool(done.stdout), done.stderr.strip()) == (True, "[]")
