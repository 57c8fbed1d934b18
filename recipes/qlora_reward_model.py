"""The whole story: preferences in, merged and proven reward model out.

    python recipes/qlora_reward_model.py recipes/presets/quickstart.yaml
    python recipes/qlora_reward_model.py recipes/presets/qwen3_8b.yaml --data.train pairs.jsonl

Hardware, minutes and the numbers to expect: recipes/README.md. Every step is one call; copy this file and
change what you like, it uses public functions of lora_rm only.
"""

import sys
import time

from lora_rm import processes
from lora_rm.checkpoint import RunFolder
from lora_rm.config import Settings, settings_from_command_line
from lora_rm.console import plain_errors
from lora_rm.plan import fit
from lora_rm.train import train
from lora_rm.workflow import (
    check_start,
    evaluate_after,
    evaluate_before,
    export_run,
    merge_run,
    open_model,
    read_data,
    save_adapter,
    summarize,
)


def main(settings: Settings) -> None:
    """Goes all the way, in the order in which it is written."""
    started = time.monotonic()
    processes.join(settings.model.device)  # under torchrun or accelerate launch
    check_start(settings)
    settings, planned = fit(settings)
    run = RunFolder.create(settings)
    model = open_model(settings, planned)
    data = read_data(settings, model, run)
    evaluate_before(model, data, settings, run)
    train(model, data, settings, run)
    evaluate_after(model, data, settings, run)
    save_adapter(model, data, settings, run)
    if not processes.IS_FIRST:
        return
    del model  # the merged one is scored in a process of its own, which needs the device
    merge_run(run.path, settings)
    export_run(run.path)
    summarize(run, started)


if __name__ == "__main__":
    with plain_errors():
        main(settings_from_command_line(sys.argv))
