"""The command line: pages, exit states, and mistakes without a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lora_rm import __version__
from lora_rm.cli import COMMANDS, _weights, main
from lora_rm.config import check_settings, load_settings
from lora_rm.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command in this process; gives its exit status, output and errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
        done = capsys.readouterr()
        return status, done.out, done.err

    return run


def start(*words, **environment):
    """Runs a command as the user does, in a process of its own."""
    command = [sys.executable, "-m", "lora_rm.cli", *words]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",), ("help",)])
def test_the_first_page_names_every_command(run, words):
    status, page, errors = run(*words)
    assert (status, errors) == (0, "")
    for name in COMMANDS:
        assert f"\n  {name} " in page


def test_the_version_is_printed(run):
    assert run("--version") == (0, f"lora-rm {__version__}\n", "")


@pytest.mark.parametrize(
    ("name", "shown", "hidden"),
    [
        ("train", ["PRESET", "--resume", "--train.learning-rate", "--model.base", "--seed"], []),
        ("merge", ["RUN", "--out DIR", "--merge.dtype", "--verify.max-change"], ["--train.", "--seed"]),
        ("export", ["RUN", "--to TARGET", "torch-export", "--out DIR", "--dtype TYPE", "--overwrite", "--push REPOSITORY"], ["--train.", "--merge."]),
        ("eval", ["MODEL", "--json FILE", "--data.eval"], ["--train.learning-rate", "--seed"]),
        ("score", ["MODEL", "FILE", ".csv.gz", "--model.device", '{"messages": [...]}'], ["--train.", "--data.", "--model.base"]),
        ("plan", ["PRESET|MODEL", "--gpu SIZE", "--calibrate", "--data.max-length", "--model.base"], []),
        ("doctor", ["DATA FILE|MODEL|RUN", "--json FILE", "--model.base", "--data.eval"], ["--train."]),
        ("config", ["PRESET", "--train.learning-rate", "--seed"], []),
    ],
)  # fmt: skip
def test_every_command_has_a_page_with_its_own_settings(run, name, shown, hidden):
    for words in ((name, "--help"), (name, "-h"), (name, "something", "--help")):
        status, page, errors = run(*words)
        assert (status, errors) == (0, "")
        assert page.startswith(f"usage: lora-rm {name} ")
        assert [text for text in shown if text not in page] == []
        assert [text for text in hidden if text in page] == []


def test_every_command_is_tested_for_its_page():
    (mark,) = test_every_command_has_a_page_with_its_own_settings.pytestmark
    assert [case[0] for case in mark.args[1]] == list(COMMANDS)


def test_the_page_shows_the_values_of_a_preset_as_defaults(run, tmp_path):
    preset = tmp_path / "own.yaml"
    preset.write_text("adapter: {rank: 48}\n")
    status, page, _ = run("train", str(preset), "--help")
    assert status == 0
    assert "(default: 48)" in page
    assert "(default: 48)" not in run("train", "--help")[1]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_page_can_be_read_in_any_encoding(encoding):
    done = start("merge", "--help", PYTHONIOENCODING=encoding)
    assert done.stderr == ""
    assert done.returncode == 0
    assert "--merge.dtype" in done.stdout
    assert done.stdout.count("usage:") == 1


@pytest.mark.parametrize("words", [["config"], ["train", "--help"]])
def test_a_reader_that_leaves_early_is_no_mistake(words):
    command = [sys.executable, "-m", "lora_rm.cli", *words]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


MISTAKES = [
    (["trian"], "ConfigError: 'trian' is no command. Commands: train, merge"),
    (["train", "--train.lerning-rate", "1"], "train.lerning_rate is not a setting. Did you mean train.learning_rate?"),
    (["train", "--learning-rate=1"], "Did you mean train.learning_rate?"),
    (["train", "--adapter.rank", "0", "--train.num-epoch", "1"], "ConfigError: 2 settings cannot be used"),
    (["train", "absent.yaml"], "absent.yaml: cannot be read (No such file or directory)"),
    (["train", "one.yaml", "two.yaml"], "two.yaml"),
    (["train", "--resume=yes"], "--resume"),
    (["train", "--seed"], "seed has no value"),
    (["config", "absent.yaml"], "absent.yaml: cannot be read"),
    (["merge"], "RUN. `lora-rm merge --help`"),
    (["merge", "runs/a", "runs/b"], "runs/b"),
    (["merge", "runs/a", "--with", "runs/b"], "--with makes a model of several runs, which lies in none of them. Add --out"),
    (["merge", "runs/a", "--with", "runs/b", "--weights", "1"], "--weights is 1, for 2 runs. Give as many numbers as runs"),
    (["merge", "runs/a", "--weights", "1"], "--weights is 1, for 1 runs"),
    (["merge", "runs/a", "--out"], "--out"),
    (["merge", "runs/a", "--merge.dtype", "float8"], "merge.dtype is 'float8'; allowed: 'auto', 'float16'"),
    (["export"], "RUN"),
    (["export", "runs/a", "--to", "floppy"], "floppy"),
    (["export", "runs/a", "--merge.dtype", "float16"], "--merge.dtype is no option of this command"),
    (["eval", "runs/a", "--data.max-evil", "1"], "Did you mean data.max_eval?"),
    (["score", "runs/a", "lines.jsonl", "--fast"], "--fast is no option of this command"),
    (["score", "runs/a", "absent.jsonl"], "absent.jsonl: cannot be read"),
    (["score", "runs/a", "--model.compute-dtype", "float8"], "model.compute_dtype is 'float8'; allowed: 'auto'"),
    (["score", "runs/a", "--data.max-length", "9"], "--data.max-length is no option of this command"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_message_and_exit_state_1(run, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, output, errors = run(*words)
    assert (status, output) == (1, "")
    assert errors.startswith("ConfigError: ")
    assert message in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["train"], "DataError: data.train is not set"),
        (["train", "--data.train", "builtin:checkable", "--model.base", "absent/folder/x"], "ModelError: "),
        (["train", "--data.train", "absent.jsonl"], "DataError: absent.jsonl: no such file"),
        (["train", "--data.train", "a/b", "--data.eval", "no.csv"], "DataError: no.csv: no such file"),
        (
            ["train", "--data.train", "a/b", "--data.chat-template", "c.jinja"],
            "ModelError: data.chat_template is c.jinja",
        ),
        (
            ["train", "runs/absent", "--resume"],
            "ConfigError: runs/absent: cannot be read (No such file or directory)",
        ),
        (["merge", "runs/absent"], "ConfigError: runs/absent: there is no such folder"),
        (["export", "runs/absent"], "ConfigError: runs/absent: there is no such folder"),
        (["eval", "absent"], "ConfigError: data.eval is not set, and absent is no run folder"),
        (
            ["eval", "runs/absent"],
            "there is no folder runs/absent, and runs/absent cannot be fetched from the hub",
        ),
        (["eval", "absent", "--data.eval", "x.jsonl"], "ModelError: absent: is no run"),
        (["eval", "."], "ConfigError: data.eval is not set"),
        (["plan", "runs/absent"], "ModelError: model.base: there is no folder runs/absent"),
        (["score", "absent"], "ModelError: absent: is no run"),
        (
            ["score", "runs/absent"],
            "there is no folder runs/absent, and runs/absent cannot be fetched from the hub",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_commands_cannot_find_is_named_without_a_traceback(run, words, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, errors = run(*words)
    assert status == 1
    assert error in errors.splitlines()[0]
    assert "Traceback" not in errors


def test_a_tracker_that_is_not_installed_is_told_at_the_start(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    status, _, errors = run("train", "--train.trackers", "tensorboard", "wandb")
    assert status == 1
    assert "ConfigError: train.trackers asks for wandb, not installed" in errors
    assert "pip install wandb`" in errors


def test_mistakes_look_the_same_in_a_process_of_their_own():
    done = start("train", "--adapter.rank", "0", "--foo", "1")
    assert (done.returncode, done.stdout) == (1, "")
    first, *rest = done.stderr.splitlines()
    assert first == "ConfigError: 2 settings cannot be used:"
    assert [line.split()[0] for line in rest] == ["foo", "adapter.rank"]


def test_config_writes_a_preset_that_gives_the_same_settings(run, tmp_path):
    preset = tmp_path / "first.yaml"
    preset.write_text("seed: 4\ndata: {train: a.jsonl}\nadapter: {rank: 8, rank_pattern: {q_proj: 2}}\n")
    flags = ["--train.learning-rate", "3e-5", "--adapter.target-modules", "q_proj", "v_proj"]
    status, text, errors = run("config", str(preset), *flags)
    assert (status, errors) == (0, "")
    second = tmp_path / "second.yaml"
    second.write_text(text)
    settings = load_settings(preset, flags)
    assert load_settings(second) == settings == check_settings(yaml.safe_load(text))
    assert (settings.seed, settings.adapter.rank, settings.train.learning_rate) == (4, 8, 3e-5)
    assert run("config", str(second))[1] == text
    assert yaml.safe_load(run("config")[1])["train"]["learning_rate"] == 1e-4


def test_flags_may_stand_before_and_after_the_arguments(run, tmp_path):
    preset = tmp_path / "own.yaml"
    preset.write_text("seed: 4\n")
    for words in ([str(preset), "--adapter.rank", "2"], ["--adapter.rank=2", str(preset)]):
        status, text, _ = run("config", *words)
        found = yaml.safe_load(text)
        assert (status, found["seed"], found["adapter"]["rank"]) == (0, 4, 2)


def test_a_command_reads_the_settings_of_its_run(run, tmp_path):
    (tmp_path / "config.yaml").write_text("verify: {max_change: -3}\n")
    for name in ("merge", "eval"):
        status, _, errors = run(name, str(tmp_path))
        assert status == 1
        assert "verify.max_change is -3" in errors


def test_an_evaluation_changes_nothing_of_the_model(run, tmp_path):
    (tmp_path / "config.yaml").write_text("data: {chat_template: plain}\nadapter: {rank: 8}\n")
    for flags in (
        ["--data.chat-template", "tokenizer"],
        ["--data.allow-special-tokens", "True"],
        ["--adapter.rank", "4"],
        ["--model.base", "a/b"],
    ):
        status, _, errors = run("eval", str(tmp_path), *flags)
        assert status == 1
        assert f"ConfigError: {flags[0][2:].replace('-', '_')} is " in errors
        assert "keeps its own. Leave the flag out." in errors
    same = run("eval", str(tmp_path), "--data.chat-template", "plain", "--data.eval", "x.jsonl")[2]
    assert "keeps its own" not in same
    assert (
        "keeps its own"
        in run("eval", "my-model", "--data.eval", "x.jsonl", "--data.chat-template", "plain")[2]
    )


def test_a_run_folder_is_a_preset_of_every_command_that_takes_one(run, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 6\nmodel: {base: a/b}\nadapter: {rank: 48}\n")
    status, text, errors = run("config", str(folder), "--adapter.alpha", "7")
    assert (status, errors) == (0, "")
    found = yaml.safe_load(text)
    assert (found["seed"], found["adapter"]["rank"], found["adapter"]["alpha"]) == (6, 48, 7.0)
    assert run("config", str(folder / "config.yaml"), "--adapter.alpha", "7") == (0, text, "")
    for name in ("train", "config", "plan"):
        assert "(default: 48)" in run(name, str(folder), "--help")[1]
    planned = []
    monkeypatch.setattr("lora_rm.plan.plan", lambda settings, *_, **__: planned.append(settings))
    monkeypatch.setattr("lora_rm.plan.show_plan", lambda _: True)
    for words in ([str(folder)], [str(folder / "config.yaml")], ["c/d"], []):
        assert run("plan", *words)[0] == 0
    assert [(s.model.base, s.seed) for s in planned] == [("a/b", 6), ("a/b", 6), ("c/d", 0), ("", 0)]
    assert "runs/absent: cannot be read (No such file or directory)" in run("config", "runs/absent")[2]


def test_a_merge_refuses_to_make_the_base_another_one(run, tmp_path):
    (tmp_path / "config.yaml").write_text("adapter: {rank: 8}\n")
    for flags in (["--adapter.rank", "4"], ["--model.quantization", "none"], ["--model.load-dtype=float32"]):
        status, _, errors = run("merge", str(tmp_path), *flags)
        assert status == 1
        assert f"{tmp_path} is trained already and keeps its own. Leave the flag out." in errors
    for same in (["--adapter.rank", "8"], ["--model.base", "elsewhere"], ["--model.base=elsewhere"]):
        assert "holds no adapter yet" in run("merge", str(tmp_path), *same)[2]


def test_resume_goes_on_with_a_run_and_starts_none(run, tmp_path):
    status, _, errors = run("train", "--output-dir", str(tmp_path / "run"), "--resume")
    assert status == 1
    assert "there is no run to resume" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_stands_for_its_settings(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "lora_rm.workflow.train_run", lambda settings, **how: asked.append((settings, how["resume"]))
    )
    (tmp_path / "config.yaml").write_text("seed: 5\noutput_dir: elsewhere\n")
    (tmp_path / "inputs.json").write_text("{}")
    for words in ([str(tmp_path)], [str(tmp_path), "--resume"]):
        assert run("train", *words)[0] == 0
    assert [(s.seed, s.output_dir, resume) for s, resume in asked] == [
        (5, "elsewhere", False),
        (5, str(tmp_path), True),
    ]


def test_the_weights_of_adapters_are_their_average_or_one_number_a_run(run, monkeypatch):
    assert _weights(None, 4) == [0.25] * 4
    assert _weights(None, 1) == [1.0]
    assert _weights("0.7,0.3", 2) == [0.7, 0.3]
    for text, count in (("a,b", 2), ("1", 2), ("1,2,3", 2), ("", 2), ("1", 1)):
        with pytest.raises(ConfigError, match=f"--weights is {text}, for {count} runs"):
            _weights(text, count)
    asked = []
    monkeypatch.setattr(
        "lora_rm.workflow.combine_runs", lambda *words, base: asked.append(words) or Path("combined")
    )
    monkeypatch.setattr("lora_rm.workflow.merge_run", lambda path, _, out: asked.append((path, out)))
    words = ["merge", "a", "--with", "b", "--with", "c", "--out", "x/mine"]
    assert run(*words, "--weights", "0.5,0.2,0.3")[0] == run(*words)[0] == 0
    paths, combined = [Path("a"), Path("b"), Path("c")], (Path("combined"), Path("x/mine"))
    assert asked == [
        (paths, [0.5, 0.2, 0.3], Path("x/mine-adapter")), combined, (paths, [1 / 3] * 3, Path("x/mine-adapter")), combined,
    ]  # fmt: skip


def test_merge_and_export_write_to_out_and_replace_when_told(run, tmp_path):
    """Each stops at the first thing that is wrong, which tells what it was about to do."""
    folder, out = tmp_path / "merged", tmp_path / "mine"
    folder.mkdir()
    out.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "parity.json").write_text('{"passed": false}')
    quantization = {"kind": "nf4", "double": True, "codes": {}}
    record = {
        "format": 1,
        "base": {"name": "a/b", "files": {}},
        "load_dtype": "bfloat16",
        "quantization": quantization,
        "files": {"adapter_model.safetensors": "00", "adapter_config.json": "00"},
    }
    (folder / "lora_rm.json").write_text(json.dumps(record))
    assert f"MergeError: {out}: exists already" in run("merge", str(folder), "--out", str(out))[2]
    assert f"MergeError: {out}: exists already" in run("export", str(folder), "--out", str(out))[2]
    found = run("export", str(folder), "--out", str(out), "--overwrite")[2]
    assert "changed by more than was allowed" in found
