"""Hugging Face checkpoints in and out: Llama, Mistral, Qwen2 and Qwen3.

From a folder to a model: `source` opens the files, `config` says what its config.json means, `loading` puts the tensors
into sharded arrays, by the table of `names`. And back: `export` writes them, into the folder that they came from
(`manifest`) or a standard one.
"""
