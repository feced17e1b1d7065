"""Hugging Face checkpoints in and out.

What is particular to a family is a row of `families`. From a folder to a model: `source` opens the files, `config` says
what its config.json means, `loading` puts the tensors into sharded arrays, by the table of `names`. And back: `export`
writes them, into the folder that they came from (`manifest`) or a standard one.
"""
