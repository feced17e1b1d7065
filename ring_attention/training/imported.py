"""A Hugging Face checkpoint as a folder that train.py's other tools read, like that of a run."""

import json
import os
from pathlib import Path

from jax.sharding import Mesh

from ring_attention.data.config import DataConfig
from ring_attention.models.hf.loading import Progress, load_parameters
from ring_attention.models.hf.manifest import FILES, FOLDER, TOKENIZER, Kept, keep
from ring_attention.models.hf.source import Source
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config import AttentionConfig, OptimizerConfig, TrainConfig
from ring_attention.training.config_values import config_to_dict
from ring_attention.training.new_folder import new_folder
from ring_attention.training.run_folder import VERSION, RunFolder


def config_of(source: Source) -> TrainConfig:
    """What a run that made this checkpoint would have had for a config, as far as the checkpoint says."""
    config = source.config
    return TrainConfig(
        name=source.path.absolute().name,
        model=config.model,
        seq_len=config.max_len,
        num_steps=1,
        attention=AttentionConfig(window=config.window),
        data=DataConfig(tokenizer=str(source.path.absolute() / TOKENIZER)),
        optimizer=OptimizerConfig(warmup_steps=0),
    )


def import_hf(source: Source, out: Path, mesh: Mesh, progress: Progress) -> Kept:
    """Write the folder `out`: config.json, a checkpoint of the parameters with fingerprints, and `hf/`.

    Args:
      source: of `open_source`.
      out: that does not exist, or is empty.
      mesh: whose devices hold the parameters meanwhile.
      progress: told of each tensor.

    Raises:
      ConfigError: if the checkpoint is damaged, or `out` cannot be made.
      RunError: if the disk refuses.
    """
    with new_folder(out, 4 * source.config.model.num_parameters, "--out") as partial:
        kept = keep(source, partial / FOLDER)
        params = load_parameters(source, mesh, progress=progress)
        folder = RunFolder(partial)
        with Checkpoints(folder.checkpoints) as checkpoints:
            checkpoints.save(0, {"params": params}, {})
        config = config_to_dict(config_of(source))
        config["data"]["tokenizer"] = os.path.join(out.absolute(), FOLDER, FILES, TOKENIZER)
        folder.config.write_text(json.dumps({"version": VERSION} | config, indent=2) + "\n", encoding="utf-8")
    return kept
