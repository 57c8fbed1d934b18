"""A training run killed again and again, and whether its result is that of the run that was left alone.

    python benchmarks/kill_resume.py [--kills 200] [--signals KILL TERM INT] [--quick] [--trl 0] [--json FILE]

A QLoRA run on an NF4 base (tiny, random) with adapter dropout 0.1, several microbatches a step, two epochs,
evaluations and the best checkpoint is killed at random moments, a third of them while a checkpoint is being
written and a third inside an evaluation, and resumed each time. A kill is survived if the run it hit ends with
bit for bit the adapter of the undisturbed run and the same lines in metrics.jsonl, each step once.

The clock goes backwards meanwhile: in every life of a run, by an hour from one to the next, and in the times of
checkpoints, of which the newest gets the oldest.

Each life of a run is a process of its own, forked after the imports: 200 lives take minutes instead of half an
hour. With `--trl N` TRL's RewardTrainer is killed N times too, and resumed from its newest checkpoint.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork must not inherit a pool of threads

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lora_rm.train as training
from lora_rm.config import Settings, check_settings
from lora_rm.console import plain_errors, show_table
from lora_rm.model.base import BUILTIN, find_base
from lora_rm.workflow import train_run

MOMENTS = ("anywhere", "writing a checkpoint", "evaluating")
NOT_COMPARED = {"seconds", "tokens_per_second", "memory_gib"}


def main() -> None:
    """Kills, compares and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="kills in all (default: 200)")
    parser.add_argument("--signals", nargs="+", choices=["KILL", "TERM", "INT"], default=["KILL"])
    parser.add_argument("--quick", action="store_true", help="12 kills: under a minute")
    parser.add_argument("--trl", type=int, default=0, metavar="N", help="kill TRL's trainer so often too")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch, "base"))
        rows = kill_ours(
            base, Path(scratch), 12 if options.quick else options.kills, options.signals, options.seed
        )
        if options.trl:
            rows += kill_trl(base, Path(scratch), options.trl, options.seed)
    show_table(
        "Runs killed and resumed",
        ("trainer, moment of the kill", "signal", "kills", "bit-identical at the end"),
        [(row["what"], row["signal"], row["kills"], f"{row['survived']} of {row['kills']}") for row in rows],
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if any(row["survived"] < row["kills"] for row in rows if row["ours"]):
        sys.exit(1)


def make_base(folder: Path) -> Path:
    """A random Llama of 3 narrow layers with the built-in model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(find_base(BUILTIN).path)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_settings(base: Path, folder: Path) -> Settings:
    """Two epochs of six steps, each of several microbatches."""
    return check_settings(
        {
            "output_dir": str(folder),
            "model": {"base": str(base), "device": "cpu"},
            "adapter": {"rank": 4, "alpha": 12, "dropout": 0.1},
            "data": {"train": "builtin:checkable", "max_train": 48, "max_eval": 24},
            "train": {
                "preferences_per_step": 8, "tokens_per_microbatch": 512, "num_epochs": 2, "learning_rate": 1e-3,
                "eval_every_steps": 3, "save_every_steps": 2, "keep_checkpoints": 2, "checkpointing": "none",
            },
        }
    )  # fmt: skip


def kill_ours(base: Path, scratch: Path, kills: int, signals: list[str], seed: int) -> list[dict[str, Any]]:
    """Kills our run; a row for every moment and signal."""
    straight = run_settings(base, scratch / "straight")
    started = time.monotonic()
    assert os.waitpid(fork(lambda: train_run(straight)), 0)[1] == 0, "the undisturbed run failed"
    whole = time.monotonic() - started
    expected = result(scratch / "straight")
    generator, counts, survived = random.Random(seed), Counter[Any](), Counter[Any]()
    number, lives, pending = 0, 0, Counter[Any]()
    while True:
        folder = scratch / f"run{number}"
        settings = run_settings(base, folder)
        mark = scratch / f"run{number}.evaluating"
        is_resumed = (folder / "config.yaml").is_file()
        left = kills - counts.total()
        # the moment that was hit least: not every life lasts until the one that was drawn
        hits = {moment: sum(counts[moment, name] for name in signals) for moment in MOMENTS}
        wanted = min(MOMENTS, key=lambda m: (hits[m], generator.random())), generator.choice(signals)
        turn_clocks_back(folder / "checkpoints")
        lives, born = lives + 1, time.monotonic()
        child = fork(lambda: live(settings, is_resumed, mark, lives))  # noqa: B023
        if left:
            hit = strike(
                child, wanted, folder, mark, generator.uniform(0, whole), generator.uniform(0, 0.004)
            )
        else:
            hit = None
        status = os.waitpid(child, 0)[1]
        if hit and status != 0:
            counts[hit] += 1
            pending[hit] += 1
            continue
        assert status == 0, f"a resumed run failed with status {status}"
        if not is_resumed:  # the first one also filled caches
            whole = min(whole, time.monotonic() - born)
        if result(folder) == expected:
            survived += pending
        number, pending = number + 1, Counter()
        if not left:
            break
    return [
        {"what": f"lora_rm, {moment}", "signal": name, "kills": count, "survived": survived[moment, name], "ours": True}
        for (moment, name), count in sorted(counts.items())
    ]  # fmt: skip


def turn_clocks_back(checkpoints: Path) -> None:
    """Makes the newest checkpoint look like the oldest."""
    for age, folder in enumerate(sorted(checkpoints.glob("step-*"))):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (1e9 - 1e6 * age,) * 2)


def live(settings: Settings, resume: bool, mark: Path, number: int) -> None:
    """One life of a run, which leaves a mark while it evaluates, under a clock that runs backwards."""
    real, born = training.evaluate, time.time() - 3600 * number
    begun = time.monotonic()
    time.time = lambda: born - (time.monotonic() - begun)
    time.time_ns = lambda: int(1e9 * time.time())

    def marked(*arguments: Any) -> Any:
        mark.touch()
        try:
            return real(*arguments)
        finally:
            mark.unlink(missing_ok=True)

    training.evaluate = marked
    with plain_errors():
        train_run(settings, resume=resume)


def strike(
    child: int, wanted: tuple[str, str], folder: Path, mark: Path, delay: float, small_delay: float
) -> tuple[str, str] | None:
    """Sends the signal at the moment wanted; None if the process had ended before."""
    moment, name = wanted
    started = time.monotonic()
    mark.unlink(missing_ok=True)
    stale = {path.stat().st_ino for path in (folder / "checkpoints").glob(".*.partial")}
    while time.monotonic() - started < 60:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return None
        if moment == "anywhere" and time.monotonic() - started >= delay:
            break
        if moment == "evaluating" and mark.exists():
            time.sleep(5 * small_delay)
            break
        partial = list((folder / "checkpoints").glob(".*.partial"))
        if moment == "writing a checkpoint" and any(_inode(path) not in stale for path in partial):
            time.sleep(small_delay)
            break
        time.sleep(0.0002)
    os.kill(child, getattr(signal, f"SIG{name}"))
    return wanted


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def fork(work: Callable[[], object]) -> int:
    """A child process that does the work and prints nothing; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        log = os.open(os.environ.get("KILL_RESUME_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(silent, 1)
        os.dup2(log, 2)
        work()
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def result(folder: Path) -> dict[str, Any]:
    """What must be equal: the adapter's bytes, and every number of every step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "adapter": hashlib.sha256(
            (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        ).hexdigest(),
        "metrics": [{key: line[key] for key in line if key not in NOT_COMPARED} for line in lines],
        "evaluation": json.loads((folder / "eval.json").read_text()),
    }


# -- TRL --------------------------------------------------------------------------------------------------


def kill_trl(base: Path, scratch: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """The same with TRL's RewardTrainer on the same base in NF4, resumed as its documentation says."""
    straight = [scratch / "trl-straight", scratch / "trl-again"]
    for folder in straight:
        started = time.monotonic()
        assert os.waitpid(fork(lambda: train_trl(base, folder)), 0)[1] == 0, "TRL's undisturbed run failed"  # noqa: B023
        whole = time.monotonic() - started
    expected, again = ((folder / "final.bin").read_bytes() for folder in straight)
    assert expected == again, "two undisturbed runs of TRL differ: nothing can be compared"
    generator, count, survived, number, pending = random.Random(seed), 0, 0, 0, 0
    while True:
        folder = scratch / f"trl{number}"
        child = fork(lambda: train_trl(base, folder))  # noqa: B023
        hit = None
        if count < kills:
            delay = generator.uniform(0, whole)
            hit = strike(child, ("anywhere", "KILL"), folder, folder / "none", delay, 0.0)
        status = os.waitpid(child, 0)[1]
        if hit and status != 0 and os.WIFSIGNALED(status):
            count, pending = count + 1, pending + 1
            continue
        if status == 0 and (folder / "final.bin").read_bytes() == expected:
            survived += pending
        number, pending = number + 1, 0
        if count >= kills:
            break
    return [{"what": "TRL, anywhere", "signal": "KILL", "kills": count, "survived": survived, "ours": False}]


def train_trl(base: Path, folder: Path) -> None:
    """One life of TRL's run."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification
    from transformers.trainer_utils import get_last_checkpoint
    from trl import RewardConfig, RewardTrainer

    from lora_rm.data.checkable import checkable_preferences
    from lora_rm.model.quantization import Quantization

    rows = [
        {"prompt": list(p.prompt), "chosen": list(p.answers[0]), "rejected": list(p.answers[1])}
        for p in checkable_preferences(48, 12)[0]
    ]
    stored = Quantization(kind="nf4", double=True, load_dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.bfloat16, quantization_config=stored.config(torch.bfloat16)
    )
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, bf16=True, save_steps=2,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2, learning_rate=1e-3,
            save_total_limit=2, logging_steps=1,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=12, lora_dropout=0.1, target_modules="all-linear"),
    )  # fmt: skip
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=newest)
    parts = [
        p.detach().float().cpu().numpy().tobytes() for p in trainer.model.parameters() if p.requires_grad
    ]
    (folder / "final.bin").write_bytes(b"".join(parts))


if __name__ == "__main__":
    with plain_errors():
        main()
