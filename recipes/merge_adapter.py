"""Merges an adapter that lora_rm trained, proves the rewards, and exports the result.

    python recipes/merge_adapter.py runs/quickstart --merge.overwrite True
    python recipes/merge_adapter.py path/to/adapter --merge.dtype float32

The base is found by the name that the adapter remembers; one that moved is named with `lora-rm merge RUN --model.base
NEW`. The merged model lands in RUN/merged, the export in RUN/export/huggingface (or beside the adapter's folder);
`--merge.overwrite True` replaces earlier ones.
"""

import sys
from pathlib import Path

from lora_rm.config import Settings, settings_from_command_line
from lora_rm.console import plain_errors
from lora_rm.errors import ConfigError
from lora_rm.workflow import export_run, merge_run


def main(path: Path, settings: Settings) -> None:
    """Merge, verify, export."""
    merged = merge_run(path, settings)
    export_run(merged, overwrite=settings.merge.overwrite)


if __name__ == "__main__":
    with plain_errors():
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            raise ConfigError("Give an adapter. Write: python recipes/merge_adapter.py RUN_OR_ADAPTER")
        run = Path(sys.argv[1])
        preset = [str(run / "config.yaml")] if (run / "config.yaml").is_file() else []
        main(run, settings_from_command_line([sys.argv[0], *preset, *sys.argv[2:]]))
