"""What happens to a run when its disk, its folder, its inputs or its device fail."""

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import changed, data_of, make_base, rewrite_manifest

from lora_rm import train as training
from lora_rm.checkpoint import RunFolder
from lora_rm.combine import combine
from lora_rm.config import check_settings, dump_settings, save_settings
from lora_rm.data import tokens
from lora_rm.errors import ConfigError, DataError, LoraRmError, ModelError, StorageError
from lora_rm.merge import merge
from lora_rm.model.adapter import WEIGHTS
from lora_rm.model.base import _builtin_gguf, find_base
from lora_rm.model.record import RECORD
from lora_rm.model.reward_model import RewardModel
from lora_rm.score import Scorer, load_reward_model
from lora_rm.score_file import score_file, score_lines
from lora_rm.train import train
from lora_rm.unfinished import unfinished_folder
from lora_rm.workflow import export_run, merge_run, open_model, train_run

SMALL_DISK = """\
import os, subprocess, sys
folder, kilobytes, program = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)
os.execv(sys.executable, [sys.executable, "-c", program, folder])
"""


def on_a_small_disk(folder, kilobytes: int, program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program whose `sys.argv[1]` is a file system of so many kilobytes, seen by it alone."""
    folder.mkdir()
    probe = subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this machine lets no process mount a file system of its own")
    return subprocess.run(
        ["unshare", "-Urm", sys.executable, "-c", SMALL_DISK, str(folder), str(kilobytes), program],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path):
    """The second checkpoint does not fit: it leaves nothing behind, and the first is still the newest whole one."""
    program = """\
import sys, torch
from pathlib import Path
from lora_rm.checkpoint import newest_checkpoint, save_checkpoint
from lora_rm.errors import StorageError
folder = Path(sys.argv[1]) / "checkpoints"
model = torch.nn.Linear(500, 100)
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
for step in (1, 2):
    model(torch.ones(500)).sum().backward()
    optimizer.step()
    try:
        save_checkpoint(folder / f"step-{step:06d}", **parts, progress={"step": step, "best_step": 0})
    except StorageError as error:
        print(step, error)
print(newest_checkpoint(folder)[0].name, sorted(p.name for p in folder.iterdir()))
"""
    done = on_a_small_disk(tmp_path / "disk", 1000, program)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("2 ")
    assert "step-000002: cannot be written" in first
    assert "No space left on device" in first
    assert "--resume" in first
    assert last == "step-000001 ['step-000001']"


def test_a_checkpoint_gets_its_name_when_all_of_it_and_the_metrics_are_on_the_disk(
    settings, trees, monkeypatch
):
    """What a power cut leaves; each flush and each rename, in order."""
    done, flush, rename = [], os.fsync, Path.rename

    def noting_flush(descriptor):
        flush(descriptor)
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def noting_rename(path, target):
        done.append(f"{path.name} -> {Path(target).name}")
        return rename(path, target)

    own = changed(settings, train={"max_steps": 1, "save_every_steps": 1})
    model, run = open_model(own), RunFolder.create(own)
    monkeypatch.setattr(os, "fsync", noting_flush)
    monkeypatch.setattr(Path, "rename", noting_rename)
    train(model, data_of(trees[:8]), own, run)
    named = done.index(".step-000001.partial -> step-000001")
    written = {file.name for file in (run.checkpoints / "step-000001").iterdir()}
    assert {"metrics.jsonl", ".step-000001.partial", *written} <= {*done[:named]}
    assert "checkpoints" in done[named:]


def test_a_full_disk_under_metrics_says_so_and_the_lines_before_stay(tmp_path):
    program = """\
import json, sys
from pathlib import Path
from lora_rm.errors import StorageError
from lora_rm.metrics import MetricsLog
file = Path(sys.argv[1]) / "metrics.jsonl"
log = MetricsLog(file, 100)
try:
    for step in range(1, 100):
        log._write({"step": step, "filler": "x" * 3000})
except StorageError as error:
    print(error)
again = MetricsLog(file, 100, first_step=1)  # a run that goes on, with space again or not
steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
print(steps == list(range(1, step)), len(again.written) == len(steps) > 5)
"""
    done = on_a_small_disk(tmp_path / "disk", 60, program)
    assert done.returncode == 0, done.stderr
    message, facts = done.stdout.splitlines()
    assert "metrics.jsonl: cannot be written (No space left on device)" in message
    assert facts == "True True"


def test_a_disk_that_fills_under_a_merge_keeps_what_is_whole(trained, tmp_path):
    """The disk is full although the check before said otherwise; with more room the same call ends with the same bytes."""
    program = f"""\
import shutil, subprocess, sys
from pathlib import Path
from lora_rm import merge as merging
from lora_rm.errors import StorageError
adapter, out = Path({str(trained)!r}), Path(sys.argv[1]) / "merged"
merging._check_space = lambda *_: None  # other programs may fill a disk after it
try:
    merging.merge(adapter, out)
except StorageError as error:
    print(error)
print(out.exists())
subprocess.run(["mount", "-o", "remount,size=20m", sys.argv[1]], check=True)
merging.merge(adapter, out)
merging.merge(adapter, Path({str(tmp_path)!r}) / "elsewhere")
print(*(len({{(folder / "model.safetensors").read_bytes() for folder in (out, Path({str(tmp_path)!r}) / "elsewhere")}}),))
"""
    done = on_a_small_disk(tmp_path / "disk", 150, program)
    assert done.returncode == 0, done.stderr[-3000:]
    message, was_there, num_different = done.stdout.splitlines()
    assert "merged: cannot be written (No space left on device)" in message
    assert (was_there, num_different) == ("False", "1")


def test_a_disk_that_fills_before_the_adapter_is_saved_costs_nothing_but_the_last_steps(settings, tmp_path):
    """Another program takes the rest of the disk after the last evaluation; when it is gone, the run ends as it would have."""
    short = changed(settings, train={"max_steps": 3, "save_every_steps": 2}, data={"max_eval": 20})
    (tmp_path / "short.yaml").write_text(dump_settings(short))
    program = f"""\
import dataclasses, json, sys
from pathlib import Path
from lora_rm import workflow
from lora_rm.config import load_settings
from lora_rm.errors import StorageError
disk, elsewhere = Path(sys.argv[1]), Path({str(tmp_path)!r})
settings = load_settings(elsewhere / "short.yaml")
there, here = (dataclasses.replace(settings, output_dir=str(place / "run")) for place in (disk, elsewhere))
real, found = workflow.evaluate_after, {{}}
def filling(*args):
    real(*args)
    with (disk / "others").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(512)):
                pass
        except OSError:
            pass
workflow.evaluate_after = filling
try:
    workflow.train_run(there)
except StorageError as error:
    found["message"] = str(error)
found["record"] = (disk / "run" / "adapter" / "lora_rm.json").exists()
workflow.evaluate_after = real
(disk / "others").unlink()
workflow.train_run(there, resume=True)
workflow.train_run(here)
names = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json")
found["same"] = all((disk / "run/adapter" / name).read_bytes() == (elsewhere / "run/adapter" / name).read_bytes() for name in names)
(elsewhere / "found.json").write_text(json.dumps(found))
"""
    done = on_a_small_disk(tmp_path / "disk", 4000, program)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert "adapter: cannot be written (No space left on device" in found["message"]
    assert (found["record"], found["same"]) == (False, True)


@pytest.mark.parametrize("early_stopping", [0, 1])
def test_what_comes_after_the_last_step_can_fail_without_a_step_being_repeated(
    settings, monkeypatch, early_stopping
):
    """Too little memory for the last evaluation; stopped early, training ends at step 2 of 4."""
    own = changed(
        settings,
        train={"max_steps": 4, "eval_every_steps": early_stopping, "early_stopping": early_stopping},
        data={"max_eval": 20},
    )
    evaluation = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda *a: dataclasses.replace(evaluation(*a), loss=0.5))
    straight = train_run(changed(own, output_dir=f"{own.output_dir}-straight"))

    def refusing(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with monkeypatch.context() as patched:
        patched.setattr("lora_rm.workflow.evaluate_after", refusing)
        with pytest.raises(torch.OutOfMemoryError):
            train_run(own)
    monkeypatch.setattr(training, "_gradients", lambda *_: pytest.fail("a step is repeated"))
    run = train_run(own, resume=True)
    for name in ("adapter/adapter_model.safetensors", "eval.json"):
        assert (run.path / name).read_bytes() == (straight.path / name).read_bytes(), name
    weights = run.adapter / "adapter_model.safetensors"
    whole, before = weights.read_bytes(), weights.stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr("lora_rm.workflow.evaluate_after", lambda *_: pytest.fail("nothing is missing"))
        train_run(own, resume=True)
    assert weights.stat().st_mtime_ns == before
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    train_run(own, resume=True)
    assert weights.read_bytes() == whole


class Dying:
    """A tokenizer whose process ends in the middle of its work, as one that the system kills for memory."""

    def ids(self, _):
        os._exit(9)


def test_a_process_that_tokenises_and_dies_is_told(monkeypatch):
    monkeypatch.setattr(tokens, "PARALLEL_FROM", 1)
    with pytest.raises(DataError, match=r"2 processes that tokenise has died.*data.num_workers 1"):
        tokens._tokenize_all([((), ())] * 600, Dying(), 2)


def test_a_start_that_failed_does_not_refuse_the_corrected_command(settings, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}\n")
    with pytest.raises(DataError):
        train_run(changed(settings, data={"train": str(file)}))
    run = RunFolder.create(settings)
    assert run.settings() == settings
    (run.path / "metrics.jsonl").touch()
    (run.path / "checkpoints").mkdir()
    RunFolder.create(settings)
    (run.path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="a run lies here already"):
        RunFolder.create(settings)
    (run.path / "metrics.jsonl").unlink()
    run.config.write_text("# by hand\n" + run.config.read_text())
    with pytest.raises(ConfigError, match="a run lies here already"):
        RunFolder.create(settings)


def test_a_run_goes_on_from_another_directory(settings, base, tmp_path, monkeypatch):
    """Files given relatively are the same files there; names that are no files stay as they are."""
    for name in ("pairs.jsonl", "own.jinja"):
        (tmp_path / name).write_text("")
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    files = {"train": "pairs.jsonl", "eval": "org/name", "chat_template": "own.jinja"}
    relative = changed(settings, data=files, model={"base": "base"})
    run = RunFolder.create(relative)
    saved = run.settings()
    assert (saved.data.train, saved.data.eval) == (str(tmp_path / "pairs.jsonl"), "org/name")
    assert (saved.data.chat_template, saved.model.base) == (
        str(tmp_path / "own.jinja"),
        str(tmp_path / "base"),
    )
    assert RunFolder.create(relative, resume=True).settings() == saved
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert RunFolder.create(saved, resume=True).settings() == saved
    again = changed(saved, data={"train": "../pairs.jsonl"})
    assert RunFolder.create(again, resume=True).settings() == saved
    there = changed(saved, data={"train": "../elsewhere/pairs.jsonl"})
    with pytest.raises(ConfigError, match=r"data\.train was.*add --resume.allow"):
        RunFolder.create(there, resume=True)


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_loaded(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/run: cannot be written"):
        train_run(changed(settings, output_dir=str(tmp_path / "file" / "run")))


def test_a_read_only_run_folder_is_named_before_anything_is_loaded(settings, tmp_path):
    """A file system mounted read-only, which stops root too: for a new run and for one that goes on."""
    program = f"""\
import json, subprocess, sys
from pathlib import Path
from lora_rm.checkpoint import RunFolder, save_checkpoint
from lora_rm.config import check_settings, dump_settings
from lora_rm.errors import StorageError
from lora_rm.metrics import MetricsLog
begun, new = (
    check_settings({{"output_dir": sys.argv[1] + name, "model": {{"base": {settings.model.base!r}}}}}) for name in ("/run", "/new")
)
run = RunFolder.create(begun)
(run.path / "metrics.jsonl").write_text('{{"step": 1}}\\n')
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
for act in (
    lambda: RunFolder.create(new),
    lambda: RunFolder.create(begun, resume=True),
    lambda: run.write_json("eval.json", {{}}),
    lambda: MetricsLog(run.metrics, 9)._write({{"step": 2}}),
):
    try:
        act()
        print("written")
    except StorageError as error:
        print(error)
"""
    done = on_a_small_disk(tmp_path / "disk", 1000, program)
    assert done.returncode == 0, done.stderr[-3000:]
    messages = done.stdout.splitlines()
    assert len(messages) == 4
    for message, name in zip(messages, ("new", "config.yaml", "eval.json", "metrics.jsonl"), strict=True):
        assert f"{name}: cannot be written (Read-only file system)" in message


def test_two_processes_cannot_work_in_one_run_folder(settings):
    """The other one is a real process; it is named, and once it is killed the folder is free."""
    program = """\
import sys, time
from pathlib import Path
from lora_rm.checkpoint import RunFolder
RunFolder(Path(sys.argv[1])).lock()
print("locked", flush=True)
time.sleep(60)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program, settings.output_dir], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"process {other.pid} .*works in this run folder"):
            RunFolder.create(settings)
    finally:
        other.kill()
        other.wait()
    assert RunFolder.create(settings).config.is_file()


def test_a_base_or_data_that_changed_since_do_not_go_on(settings, tmp_path):
    base = make_base(tmp_path / "base")
    own = changed(settings, model={"base": str(base)}, train={"max_steps": 2, "save_every_steps": 1})
    run = train_run(own)
    inputs = json.loads((run.path / "inputs.json").read_text())
    weights = next(base.glob("*.safetensors"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # one bit
    with pytest.raises(ConfigError, match=r"other inputs.*model.base model.safetensors"):
        train_run(own, resume=True)
    weights.write_bytes(good)
    (run.path / "inputs.json").write_text(json.dumps({**inputs, "data.eval": "0" * 64}))
    with pytest.raises(ConfigError, match=r"other inputs.*\(data.eval\)"):
        train_run(own, resume=True)
    (run.path / "inputs.json").write_text(json.dumps(inputs))
    train_run(own, resume=True)


def test_settings_that_change_nothing_may_differ_at_resume_if_that_is_allowed(settings):
    run = RunFolder.create(settings)
    often = changed(settings, train={"save_every_steps": 7})
    with pytest.raises(ConfigError, match=r"train.save_every_steps was 100, is 7.*add --resume.allow"):
        RunFolder.create(often, resume=True)
    other = changed(often, train={"learning_rate": 1.0})
    for allow in (False, True):
        with pytest.raises(
            ConfigError, match=r"settings differ.*\(train.learning_rate was 0.001, is 1.0\).*another run"
        ):
            RunFolder.create(other, resume=True, allow=allow)
    moved = changed(often, model={"revision": "abc"})
    with pytest.raises(ConfigError, match=r"\(model.revision was None, is 'abc'\).*another run"):
        RunFolder.create(moved, resume=True, allow=True)
    assert run.settings() == settings
    # on another machine; what lies there is compared by its hashes
    often = changed(often, model={"base": "/elsewhere/base"}, data={"train": "/elsewhere/pairs.jsonl"})
    assert RunFolder.create(often, resume=True, allow=True).settings() == often


def test_out_of_memory_halves_the_rows_and_changes_nothing_else(settings, trees, monkeypatch, capsys):
    """An allocator's refusal of rows above 200 tokens, at the third step, against rows of 128 from there on.

    The double stands at the model, where the allocator of a device would raise, and leaves what a step leaves that
    fails late: gradients, and random numbers that were drawn. Dropout is on.
    """
    wide = changed(settings, adapter={"dropout": 0.1}, train={"tokens_per_microbatch": 512, "max_steps": 5})
    real, calls = RewardModel.rewards, []

    def refusing(self, batch):
        calls.append(batch.input_ids.numel())
        rewards = real(self, batch)
        if seen() >= 2 and calls[-1] > 200:
            rewards.sum().backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return rewards

    def seen():
        return len(run.metrics.read_text().splitlines())

    run = RunFolder.create(wide)
    model = open_model(wide)
    monkeypatch.setattr(RewardModel, "rewards", refusing)
    progress = train(model, data_of(trees[:40]), wide, run)
    monkeypatch.setattr(RewardModel, "rewards", real)
    said = capsys.readouterr().out
    assert "Step 3 needs more memory than cpu has with rows of 512 tokens" in said
    assert "with rows of 128" in said
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["tokens_per_microbatch"] for line in lines] == [512, 512, 128, 128, 128]
    assert (progress.row, progress.step) == (128, 5)
    found = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    # the same, told beforehand: two steps with wide rows, a checkpoint, three with narrow ones
    told = changed(
        wide, output_dir=f"{wide.output_dir}-told", train={"save_every_steps": 2, "keep_checkpoints": 3}
    )
    again, other = RunFolder.create(told), open_model(told)
    train(other, data_of(trees[:40]), told, again)
    shutil.rmtree(again.checkpoints / "step-000004")
    shutil.rmtree(again.checkpoints / "step-000005")
    state = again.checkpoints / "step-000002" / "state.json"
    values = json.loads(state.read_text())
    values["progress"]["row"] = 128
    state.write_text(json.dumps(values))
    rewrite_manifest(state.parent)
    other = open_model(told)
    train(other, data_of(trees[:40]), told, again, resume=True)
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, found[name]), name


def test_a_preference_that_does_not_fit_alone_stops_the_run(settings, trees, monkeypatch):
    def refusing(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model, run = open_model(settings), RunFolder.create(settings)
    monkeypatch.setattr(RewardModel, "rewards", refusing)
    with pytest.raises(ModelError, match=r"Step 1 needs more memory.*one preference a row.*lora-rm plan"):
        train(model, data_of(trees[:16]), settings, run)


@pytest.mark.parametrize(
    ("error", "is_met"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
    ],
)
def test_only_too_little_memory_halves_the_rows(settings, trees, monkeypatch, error, is_met):
    """Of a sharded base not even that: the other processes wait for this one's part of the weights."""

    def refusing(self, batch):
        raise error

    model = open_model(settings)
    monkeypatch.setattr(RewardModel, "rewards", refusing)
    arguments = model, [model.batch(trees[:2])], 2, settings, training._loss_scale(model)
    for is_sharded in (False, True):
        model.is_sharded = is_sharded
        if is_met and not is_sharded:
            assert training._gradients(*arguments) is None
        else:
            with pytest.raises(type(error)) as raised:
                training._gradients(*arguments)
            assert raised.value is error


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_broken_file_of_a_base_is_named(base, tmp_path, name, fault):
    own = shutil.copytree(base, tmp_path / "broken")
    break_file(own / name, fault)
    with pytest.raises(ModelError, match=f"(?s){own}.*(Fetch|Convert|Give|Choose) "):
        RewardModel.load(str(own))


@pytest.mark.parametrize("fault", ["truncated", "random", "missing"])
def test_a_broken_gguf_is_named_and_leaves_nothing(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("LORA_RM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    if fault == "truncated":
        file.write_bytes(_builtin_gguf().read_bytes()[:100_000])
    elif fault == "random":
        file.write_bytes(b"GGUF" + bytes(range(256)) * 8)
    with pytest.raises(ModelError, match=f"{file}.*(Fetch it again|Give the path)"):
        find_base(str(file))
    assert [*(tmp_path / "cache").rglob("*.*")] == []


def break_file(file, fault):
    good = file.read_bytes()
    if fault == "truncated":
        file.write_bytes(good[: len(good) // 2])
    elif fault == "missing":
        file.unlink()
    elif file.suffix == ".json":
        file.write_bytes(good.replace(b"{", b"\xff", 1))
    else:  # the length of the header
        file.write_bytes(bytes([good[0] ^ 0x40]) + good[1:])


def test_a_flipped_bit_of_an_adapter_is_found(trained, tmp_path):
    """One in each file, also where what it holds can still be read: an alpha of 13 for 12."""
    adapter = shutil.copytree(trained, tmp_path / "adapter")
    names = sorted(file.name for file in adapter.iterdir() if file.name != "lora_rm.json")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        *names
    }
    for name in names:
        file = adapter / name
        good = file.read_bytes()
        at = good.index(b'"lora_alpha": 12') + 15 if name == "adapter_config.json" else len(good) // 2
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        for opened in (
            RewardModel.load_adapter,
            lambda folder: merge(folder, tmp_path / "merged"),
            lambda folder: combine([folder, folder], (0.5, 0.5), tmp_path / "both"),
        ):
            with pytest.raises(ModelError, match=f"{name}: is not the file that was saved"):
                opened(adapter)
        file.write_bytes(good)
    RewardModel.load_adapter(adapter)


def test_a_run_that_did_not_reach_its_end_says_how_to_go_on(settings):
    run = RunFolder.create(settings)
    for act in (load_reward_model, lambda path: merge_run(path, settings)):
        with pytest.raises(ModelError, match=r"holds no adapter yet: .*lora-rm train .*config.yaml --resume"):
            act(run.path)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "lora_rm.json", "tokenizer.json"]
)
def test_a_broken_file_of_an_adapter_is_named(settings, tmp_path_factory, trained, tmp_path, name, fault):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained, adapter)
    break_file(adapter / name, fault)
    for opened in (RewardModel.load_adapter, lambda folder: merge(folder, tmp_path / "merged")):
        with pytest.raises(ModelError, match=str(adapter)):
            opened(adapter)


def test_a_hub_that_does_not_answer_is_named_with_a_way_out():
    """A port at which nobody listens, asked for real."""
    program = """\
from lora_rm.errors import ModelError
from lora_rm.model.base import find_base, find_config
for find in (find_base, find_config):
    try:
        find("some-org/some-model")
    except ModelError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    messages = done.stdout.splitlines()
    assert len(messages) == 2, done.stderr[-2000:]
    for message in messages:
        assert "some-org/some-model" in message
        assert "cannot be fetched from the hub" in message
        assert "folder" in message


def test_scores_of_a_killed_call_are_not_computed_again(trained, tmp_path, monkeypatch):
    """Killed in the middle of the third line; the file becomes the bytes of an undisturbed call."""
    lines = [
        json.dumps({"prompt": f"What is {n} + 2?", "responses": [f"{n + 2}.", "I don't know."]})
        for n in range(6)
    ]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert score_file(str(trained), lines, "lines", whole) == 6
    expected = whole.read_bytes()
    cut.write_bytes(expected[: expected.index(b"What is 2") + 20])
    with pytest.raises(ConfigError, match="exists already.*--resume"):
        score_file(str(trained), lines, "lines", cut)
    scored, real = [], Scorer.score_ids
    monkeypatch.setattr(
        Scorer, "score_ids", lambda self, rows, groups: scored.append(len(rows)) or real(self, rows, groups)
    )
    assert score_file(str(trained), ["", *lines], "lines", cut, resume=True) == 6
    assert (cut.read_bytes(), scored) == (expected, [12])
    # in groups of two lines: the one of the last finished line is scored again, which tells that the model is the same
    two = json.dumps({"prompt": "Name a fruit.", "response": "Pear.", "reward": "of another model"})
    groups = [list(score_lines(str(trained), [*lines, two], "lines", together=2))]
    scored.clear()
    groups.append(list(score_lines(str(trained), [*lines, two], "lines", groups[0][:4], together=2)))
    assert (groups[1], scored) == (groups[0][4:], [4, 4, 1])
    assert isinstance(json.loads(groups[0][-1])["reward"], float)
    scored = [json.loads(text) for text in groups[0][:4]]
    other = [json.dumps({**one, "rewards": [reward + 7 for reward in one["rewards"]]}) for one in scored]
    with pytest.raises(DataError, match="lines line 3: had the reward .* another model was used"):
        list(score_lines(str(trained), lines, "lines", other, together=2))
    with pytest.raises(DataError, match="lines line 1: is not the conversation that was scored earlier"):
        score_file(str(trained), lines[::-1], "lines", cut, resume=True)
    own = tmp_path / "own.jsonl"
    own.write_text(lines[0])
    for name, text in (
        ("lines", '{"prompt": 1}\nhalf a line'),
        ("lines", "no JSON\n"),
        (str(own), lines[0]),
        ("lines", '{"a": 1}'),
        ("lines", "a word"),
    ):
        own.write_text(text)
        with pytest.raises(ConfigError, match="holds lines that are no rewards"):
            score_file(str(trained), lines, name, own, resume=True)
        assert own.read_text() == text


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """An adapter folder of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    values = {
        "output_dir": str(folder / "run"),
        "model": {"base": str(base), "compute_dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 12},
        "data": {"train": "builtin:checkable", "max_train": 16, "max_eval": 12},
        "train": {"max_steps": 1, "preferences_per_step": 8},
    }
    return train_run(check_settings(values)).adapter


def test_output_folders_may_be_links(settings, tmp_path):
    """What a link points to is replaced; the link, its neighbours and what links inside it point to stay."""
    disk = tmp_path / "disk"
    (disk / "target").mkdir(parents=True)
    for name in ("neighbour", "target/config.yaml", "elsewhere"):
        (disk / name).write_text("{}")
    (disk / "target" / "merged").symlink_to(disk / "elsewhere")
    link = tmp_path / "link"
    link.symlink_to(disk / "target")
    RunFolder.create(changed(settings, output_dir=str(link), overwrite=True)).begin()
    assert [path.name for path in link.iterdir()] == ["config.yaml"]
    assert (link / "config.yaml").read_text() != "{}"
    with unfinished_folder(link, 1, "merge") as folder:
        folder.once("a", lambda file: file.write_text("a"))
    assert [path.name for path in (disk / "target").iterdir()] == ["a"]
    assert link.is_symlink()
    assert sorted(path.name for path in disk.iterdir()) == ["elsewhere", "neighbour", "target"]


@pytest.mark.parametrize("name", ["adapter", "merged", "export"])
def test_a_run_of_which_only_its_results_are_left_is_not_overwritten(settings, name):
    run = RunFolder.create(settings)
    (run.path / name).mkdir()
    (run.path / name / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="a run lies here already"):
        RunFolder.create(settings)


@pytest.mark.parametrize(
    "name", ["data.json", "inputs.json", "eval.json", "held_out.json", "parity.json", "summary.json"]
)
def test_nothing_of_an_overwritten_run_stays(settings, name):
    run = RunFolder.create(settings)
    (run.path / name).write_text("{}")
    RunFolder.create(changed(settings, overwrite=True))
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_overwritten_by_one_that_can_begin_and_by_no_other(settings, tmp_path):
    """A bad row costs no finished adapter, nor does a resume after it in the same process."""
    short = changed(settings, train={"max_steps": 1})
    run = train_run(short)
    before = files_of(run.path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen":\n')
    for _ in range(2):
        with pytest.raises(LoraRmError):
            train_run(changed(short, overwrite=True, data={"train": str(bad)}))
        assert files_of(run.path) == before
        # finished; the order to overwrite is not remembered
        assert train_run(short, resume=True).path == run.path
        assert files_of(run.path) == before
    again = train_run(changed(short, overwrite=True, seed=1))
    assert again.settings().seed == 1
    after = files_of(run.path)
    assert after.keys() == before.keys()
    assert after[run.adapter / WEIGHTS] != before[run.adapter / WEIGHTS]


def test_overwriting_takes_away_a_link_and_not_the_folder_behind_it(settings, tmp_path):
    run = RunFolder.create(settings)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "kept").write_text("")
    (run.path / "merged").symlink_to(tmp_path / "disk")
    RunFolder.create(changed(settings, overwrite=True)).begin()
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "disk" / "kept").is_file()


def test_a_resumed_run_does_not_remember_that_it_may_be_overwritten(settings):
    """Else its config.yaml, trained once more by mistake, would delete it."""
    RunFolder.create(settings)
    assert not RunFolder.create(changed(settings, overwrite=True), resume=True).settings().overwrite


def test_a_half_written_checkpoint_is_taken_away_at_resume(settings):
    run = RunFolder.create(settings)
    (run.checkpoints / ".step-000009.partial").mkdir(parents=True)
    RunFolder.create(settings, resume=True)
    assert not list(run.checkpoints.iterdir())


def test_another_loss_is_another_run_whatever_is_allowed(settings):
    RunFolder.create(settings)
    with pytest.raises(ConfigError, match="another run"):
        RunFolder.create(changed(settings, loss={"centering": 0.1}), resume=True, allow=True)


def test_merge_and_export_are_refused_while_a_run_goes_on(settings, tmp_path):
    for name in ("merged", "adapter"):
        (tmp_path / "run" / name).mkdir(parents=True)
    save_settings(settings, tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "adapter" / RECORD).write_text("{}")
    other = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    for call in (lambda: merge_run(tmp_path / "run", settings), lambda: export_run(tmp_path / "run")):
        with pytest.raises(ConfigError, match="works in this run folder"):
            call()
    os.close(other)


def test_rows_halved_by_too_little_memory_stay_so_in_evaluation(settings, trees, monkeypatch):
    own = changed(settings, train={"tokens_per_microbatch": 512, "max_steps": 1, "eval_every_steps": 1})
    real, evaluate, rows = RewardModel.rewards, training.evaluate, []

    def refusing(self, batch):
        if torch.is_grad_enabled() and batch.input_ids.numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch)

    def noted(*words):
        rows.append(words[3])
        return evaluate(*words)

    run, model = RunFolder.create(own), open_model(own)
    monkeypatch.setattr(RewardModel, "rewards", refusing)
    monkeypatch.setattr(training, "evaluate", noted)
    train(model, data_of(trees[:8]), own, run)
    assert rows == [128]
