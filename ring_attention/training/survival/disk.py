"""Whether the disk has room for a run's checkpoints, asked before anything compiles."""

import shutil
from pathlib import Path

from ring_attention.checks import require_field


def require_room(folder: Path, checkpoint_bytes: int, num_more: int) -> None:
    """Raise ConfigError unless the disk of `folder`, which exists, has room for so many more checkpoints."""
    free, need = shutil.disk_usage(folder).free, checkpoint_bytes * num_more
    require_field(
        free >= need,
        "run_dir",
        str(folder),
        f"its disk has {free / 2**20:,.0f} MiB free, and the run needs {need / 2**20:,.0f} MiB for {num_more} more "
        f"checkpoints of {checkpoint_bytes / 2**20:,.0f} MiB",
        "make room, or give a folder on another disk with --config.run_dir=PATH",
    )
