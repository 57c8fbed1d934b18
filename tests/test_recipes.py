"""Every preset parses, every recipe runs on a tiny model, and a copy of its file elsewhere finds what it imports."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_rm.config import load_settings

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "recipes" / "presets").glob("*.yaml"))
TINY = [
    "--data.max-train", "24", "--data.max-eval", "12", "--train.max-steps", "2", "--train.learning-rate", "1e-3",
    "--adapter.rank", "4", "--model.compute-dtype", "float32", "--train.checkpointing", "none",
    "--model.head-init", "zero", "--merge.dtype", "float32",
]  # fmt: skip


def recipe(file, *words):
    return subprocess.run(
        [sys.executable, str(file), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_parses(preset):
    settings = load_settings(preset)
    assert settings.model.base
    assert settings.output_dir == f"runs/{preset.stem}"
    text = preset.read_text()
    assert preset.stem == "quickstart" or "NOT RUN HERE" in text
    assert f"recipes/presets/{preset.name}" in text


@pytest.mark.parametrize(
    ("data", "folder"),
    [("my data/pairs.jsonl.gz", "runs/pairs"), ("org/name", "runs/name"), ("", "runs/quickstart")],
)
def test_the_quickstart_on_own_data_has_a_run_folder_of_its_own(data, folder):
    command = ["make", "--no-print-directory", "quickstart", f"DATA={data}", "VENV=/venv", "ARGS=--seed 2"]
    made = subprocess.run(
        [*command, "-n", "-o", "setup"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    words = made.stdout.replace("/venv/bin/python", "printf '%s\\n'")
    printed = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=True).stdout
    file, preset, *flags = printed.splitlines()
    settings = load_settings(ROOT / preset, flags)
    assert (settings.output_dir, settings.seed, file) == (folder, 2, "recipes/qlora_reward_model.py")
    assert settings.data.train == (data or "builtin:checkable")
    assert settings.overwrite is (not data)  # hours of work on one's own data are not replaced unasked


def test_there_is_a_preset_for_every_family_that_is_promised():
    names = {path.stem for path in PRESETS}
    assert names >= {
        "quickstart",
        "llama3.1_8b",
        "qwen3_8b",
        "qwen3_14b",
        "gemma3_12b",
        "mistral_small_24b",
        "qwen3_32b",
    }


def run_here(monkeypatch, file, *words):
    """Runs a recipe in this process."""
    monkeypatch.setattr(sys, "argv", [str(file), *map(str, words)])
    runpy.run_path(str(file), run_name="__main__")


@pytest.mark.slow
def test_every_recipe_runs_on_a_tiny_model(base, tmp_path, monkeypatch, scored_here):
    folder, run = ROOT / "recipes", tmp_path / "run"
    words = ["--model.base", base, "--data.train", "builtin:checkable", "--output-dir", run, *TINY]
    preset = [folder / "presets/quickstart.yaml", "--adapter.layers-to-transform", "[]"]
    done = recipe(folder / "qlora_reward_model.py", *preset, *words)
    assert done.returncode == 0, done.stderr
    assert (run / "summary.json").is_file()
    assert (run / "export/huggingface/README.md").is_file()
    evaluation = json.loads((run / "eval.json").read_text())
    assert evaluation["before"]["pairs"]["num_ties"] == 12  # the head was zero, so this was before training
    assert evaluation["after"]["pairs"]["num_ties"] < 12
    assert json.loads((run / "parity.json").read_text())["merge"]["dtype"] == "float32"
    assert "held-out accuracy" in done.stdout
    assert recipe(folder / "merge_adapter.py", run).returncode == 1
    # the command of its own first lines, after a run that went all the way
    made = [run / "merged", run / "export/huggingface"]
    before = [path.stat().st_mtime_ns for path in made]
    docs = (folder / "merge_adapter.py").read_text()
    (words,) = re.findall(r"merge_adapter.py runs/quickstart (.*)", docs)
    run_here(monkeypatch, folder / "merge_adapter.py", run, *words.split())
    assert len(scored_here) == 3
    assert (run / "export/huggingface/model.safetensors").is_file()
    assert all(path.stat().st_mtime_ns > time for path, time in zip(made, before, strict=True))


@pytest.mark.parametrize("words", [["qlora_reward_model.py"], ["merge_adapter.py", "run"]], ids="".join)
def test_a_copy_of_a_recipe_finds_all_that_it_imports(tmp_path, monkeypatch, capsys, words):
    copy = shutil.copy(ROOT / "recipes" / words[0], tmp_path / "mine.py")
    with pytest.raises(SystemExit, match="0"):
        run_here(monkeypatch, copy, *words[1:], "--help")
    assert "usage: mine.py [PRESET]" in capsys.readouterr().out


def test_a_recipe_tells_mistakes_without_a_traceback():
    done = recipe(
        ROOT / "recipes/qlora_reward_model.py", "--train.learning-rat", "1e-5", "--adapter.rank", "0"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "train.learning_rat is not a setting. Did you mean train.learning_rate?" in done.stderr
    assert "adapter.rank is '0'" in done.stderr


def test_every_command_in_the_readmes_exists():
    """Presets, recipes, benchmarks and commands that the pages name are there, with settings that parse."""
    from lora_rm.cli import COMMANDS

    for page in (ROOT / "README.md", ROOT / "recipes/README.md"):
        text = page.read_text()
        for path in re.findall(r"(?:recipes|benchmarks)/[\w./]+\.(?:py|yaml|md)", text):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
        for command in re.findall(r"^lora-rm (\w+)", text, re.MULTILINE):
            assert command in COMMANDS, f"{page.name}: lora-rm {command}"
        for line in re.findall(r"^lora-rm train .*", text.replace("\\\n", " "), re.MULTILINE):
            words = line.split("#")[0].split()[2:]
            flags = [word for word in words if word != "--resume"]
            if flags and not flags[0].startswith("--"):
                flags = flags[1:]
            load_settings(None, flags)
