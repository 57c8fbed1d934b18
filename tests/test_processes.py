"""Several processes train what one process trains."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import back_to, launched, numbers, with_values
from safetensors.torch import load_file

from lora_rm import processes
from lora_rm.config import Settings, save_settings
from lora_rm.data.batches import microbatches, num_tokens, shares_of_rows
from lora_rm.data.split import load_data
from lora_rm.data.tokens import ChatTokenizer
from lora_rm.errors import ConfigError
from lora_rm.model.base import find_base
from lora_rm.train import rows_of_steps
from lora_rm.workflow import train_run


def tokens_of_steps(settings: Settings, num_processes: int, monkeypatch) -> list[int]:
    """What so many processes compute in each of three steps."""
    chat = ChatTokenizer.load(find_base(settings.model.base).path)
    trees = load_data(settings.data, chat, seed=settings.seed).train.trees
    with monkeypatch.context() as patch:
        patch.setattr(processes, "count", lambda: num_processes)
        steps = list(rows_of_steps(trees, settings, 3, "shared", settings.train.row))
    return [sum(num_tokens(row, "shared") for row in rows) for rows in steps]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "sharding", "launcher"),
    [(2, "none", "accelerate"), (4, "none", "torchrun on two machines"), (4, "full", "torchrun")],
)
def test_several_processes_train_what_one_does(settings, tmp_path, monkeypatch, count, sharding, launcher):
    """Unequal trees, 21 evaluation prompts over the processes, three steps and an evaluation after each."""
    more = {"max_steps": 3, "eval_every_steps": 1, "tokens_per_microbatch": 400, "log_every_steps": 1}
    alone = with_values(settings, tmp_path / "alone", **more)
    together = with_values(settings, tmp_path / "together", **more, sharding=sharding)
    train_run(alone)
    done = launched(together, tmp_path, count, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 1/3") == 1  # only the first process prints
    one, one_evaluations = numbers(tmp_path / "alone")
    other, other_evaluations = numbers(tmp_path / "together")
    assert [line["step"] for line in other] == [1, 2, 3]
    for expected, found in zip(one, other, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert found["num_preferences"] == expected["num_preferences"] == 8
        assert found["accuracy"] == expected["accuracy"]
        for name in ("margin", "reward_mean", "reward_spread"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    # every row of every process has its own copy of what its conversations begin with
    for lines, num_processes in ((one, 1), (other, count)):
        expected = tokens_of_steps(alone, num_processes, monkeypatch)
        assert [line["num_tokens"] for line in lines] == expected
    for expected, found in zip(one_evaluations, other_evaluations, strict=True):
        assert found["eval"]["accuracy"] == expected["eval"]["accuracy"]
        for name in ("loss", "margin"):
            assert found["eval"][name] == pytest.approx(expected["eval"][name], rel=1e-5, abs=1e-6), name
    weights = [
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("alone", "together")
    ]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-3, atol=2e-5)


DYING = """\
import os, signal, sys
from lora_rm import processes
from lora_rm.cli import main
from lora_rm.metrics import MetricsLog

real = MetricsLog.step

def step(self, number, values):
    if number == 3 and not processes.IS_FIRST:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, number, values)

if __name__ == "__main__":
    main(["train", sys.argv[1]])
    MetricsLog.step = step
    sys.exit(main(["train", sys.argv[2]]))
"""
"""Two trainings; of the second, every process but the first dies in step 3, when all have the sums of its gradients."""


@pytest.mark.slow
def test_a_sharded_run_of_which_a_process_is_killed_goes_on_as_if_nothing_had_happened(settings, tmp_path):
    """SIGKILL hits one of two processes after a checkpoint; each draws the dropout that it would have drawn."""
    values = {"max_steps": 6, "save_every_steps": 2, "tokens_per_microbatch": 300, "sharding": "full"}
    whole, cut = (with_values(settings, tmp_path / name, **values) for name in ("whole", "cut"))
    whole, cut = (replace(own, adapter=replace(own.adapter, dropout=0.3)) for own in (whole, cut))
    save_settings(whole, tmp_path / "whole.yaml")
    (tmp_path / "dying.py").write_text(DYING)
    done = launched(cut, tmp_path, 2, program=[str(tmp_path / "dying.py"), str(tmp_path / "whole.yaml")])
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert (tmp_path / "cut" / "checkpoints" / "step-000002").is_dir()
    assert not (tmp_path / "cut" / "adapter").exists()
    done = launched(cut, tmp_path, 2, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Going on from" in done.stdout
    one, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut")
    )
    for name, expected in one.items():
        assert torch.equal(other[name], expected), name
    one, other = (numbers(tmp_path / name)[0] for name in ("whole", "cut"))
    assert [line["loss"] for line in other] == [line["loss"] for line in one]


STOPPED = """
import os, signal, sys, torch
from lora_rm import train
from lora_rm.cli import main

take_step = train._take_step

def stopped(model, step, *words):
    if step.number == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    found = take_step(model, step, *words)
    print(f"seed {torch.initial_seed()}", flush=True)
    return found

train._take_step = stopped
main(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_each_has_dropout_of_its_own(settings, tmp_path):
    own = with_values(settings, tmp_path / "run", max_steps=4, save_every_steps=4)
    (tmp_path / "stopped.py").write_text(STOPPED)
    done = launched(own, tmp_path, 2, program=[str(tmp_path / "stopped.py")])
    assert done.returncode != 0
    assert "Stopped at step 2 of 4" in done.stderr
    assert len(set(re.findall("seed [0-9]+", done.stdout))) == 4  # two processes, two steps
    train_run(own, resume=True)
    assert [line["step"] for line in numbers(tmp_path / "run")[0]] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_recipe_runs_in_two_processes_and_one_of_them_merges(settings, tmp_path):
    own = with_values(settings, tmp_path / "run", max_steps=1, sharding="full")
    done = launched(own, tmp_path, 2, program=["recipes/qlora_reward_model.py"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The export lies in") == 1
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_resume_with_another_number_of_processes(settings, tmp_path, capsys):
    """Two processes and then one, and the other way round."""
    folders = tmp_path / "one", tmp_path / "two"
    one, two = (with_values(settings, folder, max_steps=4, save_every_steps=2) for folder in folders)
    for count, wanted in ((1, one), (2, two)):  # this process would keep the lock of a run
        assert launched(wanted, tmp_path, count).returncode == 0
    expected = [line["loss"] for line in numbers(folders[0])[0]]
    found = [numbers(folders[1])[0]]
    for folder in folders:
        back_to(folder, 2)
    done = launched(one, tmp_path, 2, "--resume")
    assert "step-000002" in done.stdout, done.stderr[-3000:]
    train_run(two, resume=True)
    assert "step-000002" in capsys.readouterr().out
    found += [numbers(folder)[0] for folder in folders]
    for lines in found:
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)


def test_rows_are_shared_out_by_tokens_and_every_process_has_some(trees):
    rows = microbatches(trees[:40], 10_000, "shared", 4)
    assert len(rows) == 4
    shares = shares_of_rows(rows, "shared", 4)
    assert sorted(id(t) for share in shares for row in share for t in row) == sorted(map(id, trees[:40]))
    loads = [sum(num_tokens(row, "shared") for row in share) for share in shares]
    assert max(loads) < 1.1 * min(loads)
    assert shares_of_rows(rows, "shared", 1) == [rows]


def test_a_lone_process_is_the_first_whatever_rank_a_job_system_left_it():
    program = "from lora_rm import processes; print(processes.IS_FIRST)"
    environment = {**os.environ, "RANK": "1"} | {"WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


def test_more_processes_than_gpus_are_told(monkeypatch):
    monkeypatch.setattr(processes, "LAUNCHED", 2)
    monkeypatch.setattr(processes, "LOCAL_COUNT", 2)
    monkeypatch.setattr(processes, "LOCAL_RANK", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 processes were started on this machine, and torch finds 1 GPUs"):
        processes.join("auto")


def test_the_library_trains_in_one_process_without_being_launched():
    from lora_rm import processes

    assert (processes.rank(), processes.count(), processes.IS_FIRST) == (0, 1, True)
    assert processes.gather("a") == ["a"]
