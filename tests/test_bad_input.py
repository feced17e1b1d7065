"""What people get wrong, and what they are told: one line that says what, got, need and remedy, before any compilation.

`TABLE` is to be read; a row says what is wrong, how it comes about, and what the one line must hold.
"""

import dataclasses
import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tokenizers
from jax.sharding import PartitionSpec as Spec

import ring_attention as ra
from ring_attention.data.bad_documents import Reason
from ring_attention.data.config import DataConfig
from ring_attention.data.loader import TrainLoader
from ring_attention.data.sources import open_documents
from ring_attention.data.tokenizers import load_tokenizer
from ring_attention.parallel.mesh import resolve_mesh_shape
from ring_attention.training.batches import Corpus
from ring_attention.training.config import OptimizerConfig
from ring_attention.training.config_values import config_from_dict, config_to_dict
from ring_attention.training.flags import load_config, parse_config
from ring_attention.training.validate import check_vocabulary, validate_config

CONFIGS = Path(__file__).parent.parent / "configs"
KEY = np.array([0, 7], np.uint32)
IDS = np.zeros((2, 48), np.int32)
AT = np.arange(48)


class Row(NamedTuple):
    """A mistake.

    Attributes:
      what: is wrong.
      do: makes the mistake, given an empty folder.
      got: what the message shows of it.
      need: what the message asks for.
      remedy: what it proposes, after a semicolon.
      counted: the reason under which data are left out that have this fault, where bad_documents="skip".
    """

    what: str
    do: Callable[[Path], object]
    got: str
    need: str
    remedy: str
    counted: Reason | None = None


# --- How the mistakes are made ----------------------------------------------------------------------------------------


def arrays(B=2, T=48, H=4, K=2, D=8, S=None, dtype="float32"):
    """q, k and v, in NumPy, so that to make them compiles nothing."""
    return [np.zeros((B, *shape, D), dtype) for shape in ((T, H), (S or T, K), (S or T, K))]


def ring(sizes=None, mesh=None, **arguments):
    """ra.ring_attention of arrays of these sizes over a ring of 4, and heads over 2 devices."""
    return lambda _: ra.ring_attention(*arrays(**sizes or {}), mesh=mesh or ra.make_mesh(sp=4, tp=2), **arguments)


def context(strategy, **arguments):
    """ra.context_attention by this strategy over 8 devices."""
    return lambda _: ra.context_attention(*arrays(), mesh=ra.make_mesh(sp=8), strategy=strategy, **arguments)


def block(sizes=None, **arguments):
    """ra.blockwise_attention."""
    return lambda _: ra.blockwise_attention(*arrays(**sizes or {}), **arguments)


def flax(call=None, **settings):
    """A layer's call of ra.flax_attention_fn."""
    return lambda _: ra.flax_attention_fn(mesh=ra.make_mesh(sp=8), **settings)(*arrays(), **call or {})


def call(function, *arguments, **keywords):
    return lambda _: function(*arguments, **keywords)


def start(*argv):
    """All that train.py looks at before it makes a folder and compiles."""
    config = parse_config(list(argv), str(CONFIGS / "tiny.py"))
    mesh = resolve_mesh_shape(dataclasses.asdict(config.mesh), jax.device_count())
    validate_config(config, mesh, jax.default_backend())
    corpus = Corpus.open(config.data)
    check_vocabulary(config, corpus.tokenizer)


def flags(*argv):
    """train.py with these flags."""
    return lambda _: start(*argv)


def given(*fields):
    """train.py of configs/tiny.py, which has fsdp=2, sp=2, tp=2, T=256, H=4, K=2 and M=32, with other fields."""
    return flags(*(f"--config.{field}" for field in fields))


def config_file(text):
    """train.py with a config file that says so."""

    def do(folder):
        (folder / "mine.py").write_text(text)
        start(f"--config={folder}/mine.py")

    return do


def stored(section, **fields):
    """A run's stored config with these values instead."""
    values = config_to_dict(load_config(CONFIGS / "tiny.py"))
    values |= {section: values[section] | fields} if section else fields
    return call(config_from_dict, values)


def data(name, content, **fields):
    """A good document, and beside it this file."""

    def do(folder, **more):
        (folder / "good.txt").write_text("a good document")
        (folder / name).write_bytes(content)
        return open_documents(DataConfig(paths=f"{folder}/*", **fields, **more))

    return do


def lines(content, **fields):
    """A JSONL file with this line between two good ones."""
    return data("a.jsonl", b'{"text": "first"}\n' + content + b'\n{"text": "third"}\n', **fields)


def swap_halves(content):
    return content[len(content) // 2 :] + content[: len(content) // 2]


def paths(pattern):
    return lambda folder: open_documents(DataConfig(paths=pattern.format(folder)))


def loader(**sizes):
    """A loader of one document."""

    def do(folder):
        (folder / "a.txt").write_text("text")
        source = open_documents(DataConfig(paths=f"{folder}/a.txt"))
        sizes_ = dict(seq_len=32, batch_size=2, streams=1, layout=ra.SequenceLayout("zigzag", 4)) | sizes
        TrainLoader(source, load_tokenizer("bytes"), seed=0, **sizes_)

    return do


def tokenizer(vocabulary, text=None, *argv):
    """A tokenizer.json with this vocabulary: encode `text`, or start train.py with it."""

    def do(folder):
        words = tokenizers.models.WordLevel(vocabulary, "[UNK]") if vocabulary else tokenizers.models.BPE()
        tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
        if text is None:
            start(f"--config.data.tokenizer={folder}/tokenizer.json", *argv)
        else:
            load_tokenizer(str(folder / "tokenizer.json")).encode(text)

    return do


def tokenizer_file(content):
    def do(folder):
        (folder / "tokenizer.json").write_bytes(content)
        load_tokenizer(str(folder / "tokenizer.json"))

    return do


def mixed_dtypes(_):
    q, k, v = arrays()
    ra.ring_attention(q, k.astype("float16"), v, mesh=ra.make_mesh(sp=8))


# --- The table --------------------------------------------------------------------------------------------------------

CALLS = [
    Row("query heads that tp does not divide", ring(dict(H=3, K=1)), "heads of q=3", "divisible by tp=2", "use fewer"),
    Row("key heads that tp does not divide", ring(dict(K=1)), "heads of k=1", "divisible by tp=2", "use fewer devices"),
    Row("key heads that do not divide query heads", ring(dict(K=3)), "K=3", "K must divide H", "repeat heads of k"),
    Row(
        "segments of queries alone, beside keys of another length",
        ring(dict(S=56), segment_ids=np.zeros((2, 48), int)),
        "T=48 queries",
        "S=56 keys",
        "give kv_segment_ids [B,S] as well",
    ),
    Row(
        "a batch that the mesh does not divide",
        lambda _: ra.ring_attention(*arrays(B=3), mesh=ra.make_mesh(dp=2, fsdp=2, sp=2)),
        "batch of q=3",
        "divisible by dpxfsdp=4",
        "use fewer devices",
    ),
    Row("whole numbers for numbers", ring(dict(dtype="int32")), "dtype int32", "need float32, bfloat16", "cast q, k"),
    Row("64 bits", ring(dict(dtype="float64")), "dtype float64", "need float32, bfloat16 or", "cast q, k and v"),
    Row("dtypes that differ", mixed_dtypes, "float32, float16, float32", "dtypes", "cast them to one"),
    Row(
        "no axis of heads",
        call(ra.blockwise_attention, *(x[:, :, 0] for x in arrays())),
        "q has 3 axes with shape (2, 48, 8)",
        "need 4: [batch, tokens, heads, head_dim]",
        "reshape it",
    ),
    Row("no tokens", block(dict(T=0)), "q has shape (2, 0, 4, 8)", "need at least 1 of everything", "leave out"),
    Row("no sequences", ring(dict(B=0)), "q has shape (0, 48, 4, 8)", "need at least 1 of", "leave out empty"),
    Row("lists", call(ra.blockwise_attention, [1.0], [2.0], [3.0]), "q is [1.0]", "need an array", "wrap it in jnp"),
    Row("no mesh", ring(mesh={"sp": 8}), "mesh={'sp': 8}", "is no jax.sharding.Mesh", "make one with make_mesh"),
    Row("an axis that the mesh lacks", ring(axis_name="ring"), "axis_name='ring'", "which has {'dp': 1", "name one"),
    Row("a spec without the ring", ring(spec=Spec("sp")), "spec=P", "must shard axis 1 (tokens)", "for example"),
    Row("a spec with an unknown axis", ring(spec=Spec("rows", "sp")), "names 'rows'", "the mesh has", "drop it from"),
    Row("an unknown layout", ring(layout="spiral"), "layout='spiral'", "is not known", "choose one of 'contiguous'"),
    Row("a layout that is none", ring(layout=3), "layout=3", "is not known", "choose one of 'contiguous', 'striped'"),
    Row("a layout of another ring", ring(layout=ra.SequenceLayout("striped", 8)), "size=8", "axis has 4", "use Seq"),
    Row("an unknown kernel", ring(impl="magic"), "impl='magic'", "is not known", "choose one of 'auto'"),
    Row("a kernel for TPU on CPU", ring(impl="splash"), "impl='splash'", "runs on tpu devices", 'use impl="auto"'),
    Row(
        "a kernel without dropout",
        block(impl="splash", dropout_rate=0.1, dropout_key=KEY),
        'impl="splash"',
        "has no dropout_rate",
        'leave it out, or use impl="xla"',
    ),
    Row("a negative window", ring(window=-1), "window=-1", "must be a whole number of tokens", "None sees all"),
    Row("a window of nothing", block(window=0), "window=0", "1 (itself alone) or more", "None sees all"),
    Row("a window of a fraction", ring(window=2.5), "window=2.5", "must be a whole number", "None sees all"),
    Row("a window that is no number", ring(window=True), "window=True", "must be a whole number", "None sees all"),
    Row("a window in a list", ring(window=[8]), "window=[8]", "must be a whole number", "None sees all"),
    Row("a softcap that is no number", ring(softcap=float("nan")), "softcap=nan", "finite positive", "None leaves"),
    Row("a softcap in words", block(softcap="50"), "softcap='50'", "must be a finite positive", "None leaves it"),
    Row("an infinite scale", block(scale=float("inf")), "scale=inf", "must be a finite number", "None leaves it out"),
    Row("causal in words", ring(causal="no"), "causal='no'", "must be True or False", "leave it out"),
    Row("dropout of all", ring(dropout_rate=1.0, dropout_key=KEY), "dropout_rate=1.0", "less than 1", "0 leaves"),
    Row("dropout in words", block(dropout_rate="0.1"), "dropout_rate='0.1'", "must be at least 0", "0 leaves dropout"),
    Row("dropout without a key", block(dropout_rate=0.1), "dropout_rate=0.1", "needs", "jax.random.key(seed)"),
    Row("a seed for a key", ring(dropout_rate=0.1, dropout_key=7), "_key=7", "one random key", "pass jax"),
    Row(
        "many keys",
        block(dropout_rate=0.1, dropout_key=np.zeros((2, 2), np.uint32)),
        "dropout_key=array(",
        "must be one random key",
        "pass jax.random.key(seed)",
    ),
    Row("sinks for key heads", ring(sinks=np.zeros(2)), "sinks has shape (2,)", "need [H=4]", "reshape"),
    Row("sinks for key heads", block(sinks=np.zeros(2)), "sinks has shape (2,)", "need [H=4]", "reshape"),
    Row("slopes with an axis", ring(alibi_slopes=np.ones((4, 1))), "has shape (4, 1)", "need [H=4]", "reshape"),
    Row(
        "segments of another length", ring(segment_ids=IDS[:, :24]), "segment_ids has shape (2, 24)", "T=48", "reshape"
    ),
    Row("segments of one axis", block(segment_ids=IDS[0]), "segment ids of q has shape (48,)", "need [B=2", "reshape"),
    Row("segments of fractions", ring(segment_ids=IDS * 0.5), "dtype float64", "need integers", "cast it to int32"),
    Row("segments that are a mask", block(segment_ids=IDS == 0), "dtype bool", "need integers", "cast it to int32"),
    Row("segments past 32 bits", ring(segment_ids=IDS + np.int64(2**40)), "109951162777", "need -2", "count"),
    Row("segments of keys alone", block(kv_segment_ids=IDS), "kv_segment_ids", "needs segment_ids", "give both"),
    Row("segments of queries alone", block(dict(S=56), segment_ids=IDS), "T=48 queries", "S=56", "give kv_segment_ids"),
    Row("a bound on no segments", ring(max_segment_len=8), "max_segment_len=8", "there are none", "give segment_ids"),
    Row("positions of another length", block(q_positions=AT[1:]), "has shape (47,)", "need [T=48]", "reshape"),
    Row("positions of another batch", block(kv_positions=np.tile(AT, (3, 1))), "(3, 48)", "need [B=2,", "reshape"),
    Row("positions of fractions", block(q_positions=AT + 0.5), "dtype float64", "need integers", "cast it to int32"),
    Row("positions past 32 bits", block(q_positions=AT + 2**40), "1099511627823", "need -1073741823", "count from 0"),
    Row("positions far below 0", block(kv_positions=AT - 2**31), "-2147483648", "need -1073741823 to", "count from 0"),
    Row("positions in a list", block(q_positions=[0, 1]), "q_positions is [0, 1]", "need an array", "wrap it in jnp"),
    Row("tiles that are a number", ring(block_sizes=128), "=128", "must be a BlockSizes", "write Block"),
    Row("tiles of nothing", call(ra.BlockSizes, q=0), "q=0", "must be whole and positive", "leave them out"),
    Row("tiles of a fraction", call(ra.BlockSizes, kv=2.5), "kv=2.5", "must be whole and positive", "leave them out"),
    Row("a switch in words", ring(duplex="yes"), "duplex='yes'", "must be True or False", "leave it out"),
    Row("an unknown strategy", context("rings"), "strategy='rings'", "is not known", "choose one of 'all_gather'"),
    Row("an option of another", context("usp", duplex=True), "'duplex'", "neither an argument nor", "its options are"),
    Row("P that exceeds heads", context("ulysses"), "shares 4 query heads out among 8", "do not", "ulysses_size=4"),
    Row("P that USP cannot cut", context("usp", ulysses_size=3), "ulysses_size=3", "must divide the 8", "leave it out"),
    Row("U of nothing", context("usp", ulysses_size=0), "ulysses_size=0", "must be a whole number, 1", "leave it out"),
    Row("groups of heads", context("all_gather", head_groups=3), "head_groups=3", "must divide the 2", "leave it out"),
    Row("one device of many", context("single_device"), "'sp' has 8", "the whole sequence on one", "make the mesh"),
    Row("a window left out", context("sliding_window"), "got no window", "window", "give window="),
    Row("a stride for no ring", context("sparse", stride=5), "got stride=5", "a multiple of the 8", "stride=40"),
    Row("a shard function outside", call(ra.ring_attention_shard, *arrays()), "axis_name='sp'", "need the", "call it"),
    Row("chunks of nothing", call(ra.blockwise_feedforward, abs, AT[None], chunk_size=0), "=0", "positive", "use 1"),
    Row("chunks of no axis", call(ra.blockwise_feedforward, abs, AT, chunk_size=8), "(48,)", "need [..", "give it"),
    Row("chunks for no function", call(ra.blockwise_feedforward, 3, AT, chunk_size=8), "fn is 3", "need a", "pass"),
    Row("Flax's mask", flax(dict(mask=IDS)), "mask has shape (2, 48)", "no place for a mask", "flax_attention_fn("),
    Row("Flax's dropout", flax(dropout_rate=0.1), "dropout_rate", "dropout is the layer's", "give the layer"),
    Row("Flax's cache", flax(dict(bias=IDS)), "bias has shape (2, 48)", "no place for a bias", "leave it out"),
]

LAYOUTS = [
    Row("a mesh of other devices", call(ra.make_mesh, sp=3), "sp=3", "needs exactly 3 devices,", "change the sizes"),
    Row("a mesh without devices", call(ra.make_mesh, devices=[]), "got 0 devices", "need at least 1", "leave devices="),
    Row("a mesh of nothing", call(ra.make_mesh, sp=0), "sp=0", "need whole positive sizes", "use 1 to leave"),
    Row("a mesh with two rests", call(ra.make_mesh, dp=-1), "dp=-1", "or -1 once", "use 1 to leave an axis out"),
    Row("a mesh in words", call(ra.make_mesh, sp="8"), "sp='8'", "need whole positive sizes", "use 1 to leave"),
    Row("a mesh past 64 bits", call(ra.make_mesh, dp=2**32, fsdp=2**32), "got 8", "a multiple of", "change the sizes"),
    Row("an unknown layout", call(ra.SequenceLayout, "zig", 4), "layout='zig'", "is not known", "choose one of"),
    Row("a ring of nothing", call(ra.SequenceLayout, "zigzag", 0), "ring_size=0", "must be positive", "use mesh.shape"),
    Row("a ring of a fraction", call(ra.SequenceLayout, "zigzag", 2.5), "=2.5", "positive and whole", "use"),
    Row("stripes in zigzag", call(ra.SequenceLayout, "zigzag", 4, 2), "stripe=2", "layout='zigzag'", "need 1, or more"),
    Row("a device of no speed", call(ra.SequenceLayout.for_speeds, [1, 0]), "[1, 0]", "positive numbers", "give"),
    Row(
        "a length that zigzag does not divide",
        call(ra.SequenceLayout("zigzag", 4).check_length, 36),
        "seq_len=36",
        "divisible by 2*sp (zigzag)=8",
        'pad to 40 or use layout="striped"',
    ),
    Row(
        "more tokens than 32 bits",
        call(ra.SequenceLayout("zigzag", 4).check_length, 2**31),
        "=2147483648",
        "int32",
        "ch",
    ),
]

CONFIGURATIONS = [
    Row("a length that does not divide", given("seq_len=254"), "seq_len=254", "divisible by", "pad to 256"),
    Row("a length past 32 bits", given("seq_len=2147483648"), "seq_len=2147483648", "at most 2147483647", "give"),
    Row("a length of nothing", given("seq_len=0"), "seq_len=0", "must be positive", "give at least 1"),
    Row("more than 64 bits", given(f"seed={10**20}"), f"seed={10**20}", "more than 64 bits", "give a whole"),
    Row("a batch that does not divide", given("batch_size=3", "eval_sequences=3"), "=3", "by dp*fsdp=2", "use 4"),
    Row(
        "heads that tp does not divide",
        given("mesh.tp=4", "mesh.fsdp=1"),
        "num_kv_heads=2",
        "4",
        "use",
    ),
    Row("heads that do not divide", given("model.num_kv_heads=3"), "num_kv_heads=3", "must divide", "set both"),
    Row("a hidden width that does not", given("model.ffn_dim=63"), "ffn_dim=63", "divisible by", "use 64"),
    Row("an odd vocabulary", given("model.vocab_size=265"), "vocab_size=265", "divisible by tp=2", "use 266"),
    Row("an odd head", given("model.head_dim=7"), "model.head_dim=7", "must be even", "use 32, 64 or 128"),
    Row(
        "P that exceeds heads",
        given("attention.strategy=ulysses", "mesh.fsdp=1", "mesh.sp=4"),
        "2 query heads",
        "among 4 devices, which do not divide",
        "use strategy=",
    ),
    Row("a window left out", given("attention.strategy=sliding_window"), "got no window", "window", "give"),
    Row("a negative window", given("attention.window=-1"), "window=-1", "must not be negative", "0 leaves"),
    Row("an unknown strategy", given("attention.strategy=rings"), "='rings'", "is not known", "choose one"),
    Row("an unknown layout", given("attention.layout=ring"), "layout='ring'", "is not known", "choose one of"),
    Row("an unknown kernel", given("attention.impl=magic"), "impl='magic'", "is not known", "choose one of"),
    Row("a kernel for TPU", given("attention.impl=splash"), "='splash'", "runs on tpu devices", "use"),
    Row("an option of another", given("attention.stride=8"), "stride=8", "is no option of", "leave it out"),
    Row("speeds in words", given("attention.speeds=1 fast"), "='1 fast'", "positive numbers", "for example"),
    Row("tiles of nothing", given("attention.block_q=0"), "block_q=0", "must be positive", "leave it"),
    Row("no learning rate", given("optimizer.learning_rate=nan"), "='nan'", "a finite number", "write it"),
    Row("an infinite rate", given("optimizer.learning_rate=1e999"), "='1e999'", "a finite number", "write"),
    Row("a negative rate", given("optimizer.learning_rate=-1"), "=-1.0", "must be positive", "leave it"),
    Row("no rate, in Python", call(OptimizerConfig, learning_rate=float("nan")), "=nan", "positive", "leave it out"),
    Row("a long warm-up", given("optimizer.warmup_steps=12"), "=12", "less than num_steps", "shorten"),
    Row("a mesh of other devices", given("mesh.sp=3"), "sp=3", "needs exactly 12", "change the sizes"),
    Row("two rests of a mesh", given("mesh.sp=-1", "mesh.dp=-1"), "=-1", "only one axis may be", "give"),
    Row("a field that is none", flags("--config.seq_length=9"), "seq_length='9'", "no such field", "did you mean"),
    Row("a section that is none", flags("--config.data=stdlib"), "data='stdlib'", "is a section", "set one of its"),
    Row("a flag that is none", flags("--seq_len=9"), "--seq_len=9", "no such flag", "did you mean --config.seq_len?"),
    Row("a flag of dashes", flags("---"), "--", "no such flag", "write --config=PATH"),
    Row("a stray word", flags("tiny"), "'tiny'", "is not a flag", "write --config=PATH"),
    Row("text for a number", given("num_steps=1e3"), "='1e3'", "a whole number", "--config.num_steps="),
    Row("a number for a switch", given("attention.duplex=1"), "='1'", "true or false", ".duplex=false"),
    Row("no file", flags("--config=configs/tinny.py"), "--config=configs/tinny.py", "no such file", "did you mean"),
    Row("a file without a config", config_file("x = 1"), "mine.py", "defines no get_config", "add `def get_config()"),
    Row("a file with another thing", config_file("get_config = dict"), "returned dict", "get_config", "let it"),
    Row("a file that fails", config_file("import missing"), "ModuleNotFound", "No module", "correct the file"),
    Row("a file that is no Python", config_file("\0"), "mine.py", "null bytes", "correct the file"),
    Row("a stored field of another type", stored("", seq_len="256"), "seq_len='256'", "is str", "give a whole number"),
    Row("a stored field past all bounds", stored("optimizer", b1=10**400), "b1=1", "more than 64 bits", "smaller"),
    Row("a stored section of text", stored("", mesh="8"), "mesh='8'", "is a section", "give an object"),
    Row("a stored field of lines", stored("model", **{"a\nb": 1}), r"model.a\nb", "no such field", "model has"),
]

DATA = [
    Row("no file", paths("{}/*.txt"), "/*.txt'", "no file matches", "check the spelling"),
    Row("a folder", paths("{}"), "data.paths='/", "no file matches", "it is a directory, write"),
    Row("a name that no file has", paths("{}/\0"), r"\x00'", "no file matches", "check the spelling"),
    Row("nothing", call(DataConfig, paths=" , "), "paths=' , '", "names no file", "give globs such as"),
    Row(
        "empty files",
        lambda folder: (folder / "a.txt").touch() or open_documents(DataConfig(paths=f"{folder}/*")),
        "no document to read",
        "(1 empty)",
        "name files that hold text",
    ),
    Row("a binary file", data("b", b"ab\0"), "/b holds a NUL byte at byte offset 2", "binary", "leave", Reason.BINARY),
    Row("text in UTF-16", data("b", "ab".encode("utf-16-le")), "offset 1", "binary", "iconv -f UTF-16", Reason.BINARY),
    Row("invalid UTF-8", data("b", b"caf\xe9 "), "byte offset 3", "UTF-8", "convert it", Reason.NOT_UTF8),
    Row("half a character", data("b", "世".encode()[:-1]), "byte offset 0", "UTF-8", "convert it", Reason.NOT_UTF8),
    Row("a line of invalid UTF-8", lines(b'{"text": "\xe9"}'), "a.jsonl:2", "offset 28", "convert it", Reason.NOT_UTF8),
    Row("a truncated archive", data("b.gz", gzip.compress(b"text")[:-9]), "b.gz", "ended", "repair", Reason.UNREADABLE),
    Row("an archive that is none", data("b.gz", b"text"), "b.gz", "Not a gzipped", "repair it", Reason.UNREADABLE),
    Row(
        "a swapped archive", data("b.gz", swap_halves(gzip.compress(b"t"))), "b.gz", "gzip", "repair", Reason.UNREADABLE
    ),
    Row(
        "truncated lines", data("b.jsonl.gz", gzip.compress(b"{")[:-9]), ".jsonl.gz", "end", "repair", Reason.UNREADABLE
    ),
    Row("a line that is no JSON", lines(b'{"text": "'), "a.jsonl:2", "is not JSON", "repair that", Reason.NOT_JSON),
    Row("a line that is no object", lines(b"[1]"), "a.jsonl:2 holds a list", "not an", "write {", Reason.NOT_JSON),
    Row("a line nested too deeply", lines(b"[" * 10**5), "a.jsonl:2", "nested too deeply", "repair", Reason.NOT_JSON),
    Row("a line without the field", lines(b'{"body": 1}'), "['body']", "only", "name the one", Reason.WITHOUT_FIELD),
    Row("a field without a string", lines(b'{"text": 1}'), "a int there", "not a string", "name one", Reason.NOT_TEXT),
    Row("half a surrogate pair", lines(rb'{"text": "\ud8ff"}'), "at char", "half", "repair", Reason.HALF_A_CHARACTER),
    Row(
        "a long line", lines(b'{"text": "too long"}', max_document_bytes=17), "=17", "than 17", "split", Reason.TOO_LONG
    ),
    Row("a long file", data("b", b"x" * 16, max_document_bytes=15), "=15", "more than 15", "split", Reason.TOO_LONG),
    Row(
        "a bomb",
        data("b.gz", gzip.compress(b"x" * 10**6), max_document_bytes=99),
        "99",
        "more",
        "split",
        Reason.TOO_LONG,
    ),
    Row("what to do in other words", call(DataConfig, bad_documents="drop"), "='drop'", "is not known", "choose"),
    Row("no bytes at all", call(DataConfig, max_document_bytes=0), "=0", "must lie in [1, 2147483647]", "leave it out"),
    Row("nothing held out", call(DataConfig, holdout_fraction=0.0), "=0.0", "must lie between 0 and 1", "0.05 holds"),
    Row("no streams", call(DataConfig, streams=0), "data.streams=0", "must lie in [1, 65536]", "use 1 to read"),
    Row("a thousand million streams", call(DataConfig, streams=10**9), "=1000000000", "in [1, 65536]", "use 1"),
    Row("a loader of no tokens", loader(seq_len=0), "seq_len=0", "must be positive", "choose at least 1"),
    Row("a loader of no rows", loader(batch_size=0), "batch_size=0", "must be positive", "choose at least 1"),
    Row("a loader of odd rows", loader(seq_len=36), "seq_len=36", "divisible by 2*sp (zigzag)=8", "pad to 40"),
]

TOKENIZERS = [
    Row("no tokenizer", given("data.tokenizer=byte"), "'byte'", "neither 'bytes' nor a file", "give the path"),
    Row("a file that is none", tokenizer_file(b"{}"), "tokenizer.json'", "no Hugging Face tokenizer", "give the path"),
    Row("a file that is binary", tokenizer_file(b"\0\xff"), "tokenizer.json'", "no Hugging Face", "give the path"),
    Row("an empty vocabulary", tokenizer({}), "tokenizer.json'", "has an empty vocabulary", "train it first"),
    Row("ids past the vocabulary", tokenizer({"a": 0, "b": 300}), "model.vocab_size=264", "302 tokens", "use"),
    Row("ids past all tables", tokenizer({"a": 2**24}), "ids up to 16,777,216", "need less than", "number its tokens"),
    Row("a text without tokens", tokenizer({"a": 0}, b"b"), "cannot encode a document", "begins b'b'", "give the"),
    Row("tokens without a text", call(load_tokenizer("bytes").token_bytes, [65, 257]), "[257]", "outside", "use the"),
]

TABLE = [*CALLS, *LAYOUTS, *CONFIGURATIONS, *DATA, *TOKENIZERS]


# --- What is true of all of them --------------------------------------------------------------------------------------

compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _seconds, **_: compilations.append(event) if event.endswith("backend_compile_duration") else None
)


def count_compilations(do, *arguments):
    """(what was raised or None, how many programs were compiled) as if nothing had been compiled before."""
    jax.clear_caches()
    compilations.clear()
    raised = None
    try:
        do(*arguments)
    except (ValueError, TypeError) as error:
        raised = error
    return raised, len(compilations)


def names(rows):
    return [f"{index} {row.what}" for index, row in enumerate(rows)]


@pytest.mark.parametrize("row", TABLE, ids=names(TABLE))
def test_a_mistake_is_refused_in_one_line_before_anything_compiles(row, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    error, compiled = count_compilations(row.do, tmp_path)
    assert error is not None, "not refused"
    message = str(error)
    assert compiled == 0
    assert message.isprintable(), "more than one line"
    fault, _, remedy = message.partition("; ")
    assert row.got in fault, f"does not say what it got: {message}"
    assert row.need in message, f"does not say what it needs: {message}"
    assert row.remedy in remedy, f"does not say what to do: {message}"


SKIPPED = [row for row in TABLE if row.counted]


@pytest.mark.parametrize("row", SKIPPED, ids=names(SKIPPED))
def test_bad_data_are_left_out_counted_and_reported_where_the_config_says_so(row, tmp_path):
    source = row.do(tmp_path, bad_documents="skip")
    assert source.report.counts == {row.counted: 1}
    assert source[len(source) - 1].text == b"a good document"
    assert row.got in source.report.lines()[1] or "max_document_bytes" in str(count_compilations(row.do, tmp_path)[0])


def test_the_table_has_sixty_rows_and_more():
    assert len(TABLE) > 60
    assert len(SKIPPED) > 10


def test_the_count_sees_a_program_each_time_that_it_is_called_for():
    chunks = call(ra.blockwise_feedforward, jax.nn.silu, np.zeros((8, 4), np.float32), chunk_size=8)
    for good in (chunks, chunks, block(dict(T=8))):
        error, compiled = count_compilations(good, None)
        assert error is None
        assert compiled > 0


def test_the_calls_without_the_mistakes_are_not_refused(tmp_path):
    for good in (ring(), context("ring"), block(), flax()):
        jax.eval_shape(functools.partial(good, None))
    for good in (loader(), data("b.txt", b"text"), lines(b'{"text": "second"}'), tokenizer({"a": 0})):
        assert count_compilations(good, tmp_path) == (None, 0)


def test_a_good_start_is_not_refused(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert count_compilations(start) == (None, 0)


def test_a_good_stored_config_comes_back():
    values = json.loads(json.dumps(config_to_dict(load_config(CONFIGS / "tiny.py"))))
    assert config_from_dict(values) == load_config(CONFIGS / "tiny.py")
