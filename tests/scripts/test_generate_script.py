"""Generation as a person calls it."""

import dataclasses
import json
import re
import subprocess

import jax
import pytest
from command_lines import REPOSITORY, call_command, run_command, words_of
from hf_folders import QWEN3, write_folder
from small_tokenizers import write_tokenizer

import ring_attention as ra
from ring_attention.commands import generate as command
from ring_attention.data.tokenizers import load_tokenizer
from ring_attention.inference.ends import end_tokens
from ring_attention.models.config import ModelConfig
from ring_attention.training.checkpoints import Checkpoints
from ring_attention.training.config import AttentionConfig, TrainConfig
from ring_attention.training.hf_conversion import write_tokenizer as export_tokenizer
from ring_attention.training.run_folder import open_run_folder
from ring_attention.training.state import make_state
from ring_attention.training.trained_model import open_trained_model

pytestmark = pytest.mark.usefixtures("plain_kernel")

MODEL = ModelConfig(vocab_size=264, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=24)
FIGURES = re.compile(
    r"\[(?P<length>\d+) tokens; read in [\d.]+ s; (?P<new>\d+) new ones, [\d.,]+ tokens/s; "
    r"cache (?P<mib>[\d.]+) MiB on each device\]"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a run whose model knows nothing, but says so definitely."""
    path = tmp_path_factory.mktemp("run")
    config = TrainConfig(name="x", model=MODEL, seq_len=64, num_steps=200, run_dir=str(path))
    config = dataclasses.replace(config, attention=AttentionConfig(window=20, block_kv=16))
    state = make_state(config, ra.make_mesh(sp=1, devices=jax.devices()[:1]))
    state = state._replace(params=state.params | {"unembed": state.params["unembed"] * 1000})
    with open_run_folder(config) as folder, Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(1, state, {})
    return path


@pytest.fixture
def generate(checkpoint, capsys):
    assert jax.device_count() == 8  # they have started, so that the command cannot choose another number

    def run(*flags):
        """(exit status, stdout, stderr)."""
        status = call_command("generate.py", command.main, f"--checkpoint={checkpoint}", *flags)
        return status, *capsys.readouterr()

    return run


def test_generate_continues_a_prompt_on_any_mesh_and_ends_before_a_stop(generate, tmp_path):
    """And reads a file without its last line break."""
    flags = ["--prompt=Grüße", "--max_new_tokens=20"]
    status, out, err = generate(*flags)
    assert status == 0
    found = FIGURES.search(err)
    assert (found["length"], found["new"]) == (str(1 + len("Grüße".encode())), "20")
    (tmp_path / "prompt.txt").write_text("Grüße\n")
    spread = generate(f"--prompt_file={tmp_path}/prompt.txt", "--max_new_tokens=20", "--sp=4", "--tp=2")
    assert spread[:2] == (status, out)
    assert FIGURES.search(spread[2])["length"] == found["length"]
    other = generate("--prompt=Gruße", "--max_new_tokens=20")
    assert other[1] != out, "the control"
    stop = out[5:8]
    _, cut, err = generate(*flags, f"--stop={stop}")
    assert cut == out[: out.index(stop)] + "\n"
    assert int(FIGURES.search(err)["new"]) < 20


@pytest.mark.slow
def test_generate_continues_prompts_of_a_file_as_if_alone(generate, tmp_path):
    texts, path = ["def main(", "a", "Grüße, 世界"], tmp_path / "prompts.jsonl"
    path.write_text("\n".join([json.dumps(texts[0]), "", *(json.dumps({"prompt": text}) for text in texts[1:])]))
    flags = ["--temperature=0.7", "--top_p=0.9", "--max_new_tokens=8"]
    status, out, err = generate(f"--prompt_file={path}", *flags, "--batch_size=2", "--seed=5")
    assert status == 0
    alone = [generate(f"--prompt={text}", *flags, f"--seed={5 + n}")[1] for n, text in enumerate(texts)]
    assert out == "".join(f"--- {path}:{line}\n{text}" for line, text in zip((1, 3, 4), alone, strict=True))
    assert len(set(alone)) == 3
    assert "2 prompts of 2 to 10 tokens" in err


@pytest.fixture
def fed(monkeypatch):
    """fed(flags) -> (what the model is fed for each prompt, what ends continuations); nothing is computed."""

    def run(*flags):
        seen = []
        monkeypatch.setattr(command, "open_generator", lambda *_: None)
        monkeypatch.setattr(command, "continue_prompts", lambda *given, **_: seen.append((given[2], given[4])))
        assert call_command("generate.py", command.main, *flags) == 0
        return [prompt.tokens.tolist() for prompts, _ in seen for prompt in prompts], seen[0][1]

    return run


@pytest.mark.parametrize(
    ("name", "contents", "texts"),
    [
        ("a.txt", b"one\r\ntwo\r\n", [b"one\r\ntwo"]),
        ("a.txt", b"one\r", [b"one\r"]),
        ("a.txt", b"\xef\xbb\xbfone\n\n", [b"one\n"]),
        ("a.jsonl", b'"one"\r\n\r\n{"text": "two"}\r\n', [b"one", b"two"]),
        ("a.jsonl", '"one\u2028\u2029\x85and"\n"two"'.encode(), ["one\u2028\u2029\x85and".encode(), b"two"]),
        ("a.JSONL", b'\xef\xbb\xbf"one"', [b"one"]),
        ("a.ndjson", b'"one"\n"two"\n', [b"one", b"two"]),
    ],
)
def test_generate_cuts_a_prompt_file_at_line_feeds_alone(fed, checkpoint, tmp_path, name, contents, texts):
    (tmp_path / name).write_bytes(contents)
    prompts, _ = fed(f"--checkpoint={checkpoint}", f"--prompt_file={tmp_path / name}")
    assert prompts == [[256, *text] for text in texts]


@pytest.fixture
def chat(tmp_path):
    """The folder of a Hugging Face checkpoint as Qwen's: nothing is put first, texts end with <|im_end|>."""
    write_folder(tmp_path / "chat", QWEN3 | dict(vocab_size=264, bos_token_id=256, eos_token_id=258))
    about = dict(bos_token=None, eos_token="<|im_end|>")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|other|>"]
    write_tokenizer(tmp_path / "chat", special, tokenizer_config=about)
    return tmp_path / "chat"


def test_generate_takes_special_tokens_of_prompts_and_stops(fed, chat):
    flags = [f"--checkpoint={chat}", "--prompt=<|im_start|>hi<|im_end|>"]
    assert fed(*flags) == ([[257, *b"hi", 258]], [256, 258])
    assert fed(*flags, "--stop=<|other|>", "--stop=x")[1] == [256, 258, 259]
    assert fed(*flags, "--plain_text")[0] == [[*b"<|im_start|>hi<|im_end|>"]]


def test_generate_feeds_what_the_model_was_trained_on(fed, chat, checkpoint, capsys):
    assert fed(f"--checkpoint={chat}", "--prompt=hi")[0] == [[*b"hi"]]
    tokenizer = f"--tokenizer={chat}/tokenizer.json"
    assert fed(f"--checkpoint={checkpoint}", tokenizer, "--prompt=hi")[0] == [[256, *b"hi"]]
    write_tokenizer(chat, ["<s>", "</s>"], before=["<s>"])
    assert fed(f"--checkpoint={chat}", "--prompt=hi")[0] == [[256, *b"hi"]]
    assert fed(f"--checkpoint={chat}", "--prompt=hi", "--no_document_start")[0] == [[*b"hi"]]
    assert "put before it" not in capsys.readouterr().err
    assert fed(f"--checkpoint={chat}", "--prompt=<s>hi")[0] == [[256, 256, *b"hi"]]
    assert "prompt begins with the token that is put before it, too; --no_document" in capsys.readouterr().err


def test_generate_ends_where_hugging_face_files_say(tmp_path, capsys):
    write_folder(tmp_path / "hf", QWEN3 | dict(vocab_size=264))
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    config = TrainConfig(name="x", model=MODEL, seq_len=64, num_steps=200)
    export_tokenizer(config, tmp_path / "hf")
    trained = open_trained_model(str(tmp_path / "hf"))
    assert {7, 9} < set(end_tokens(trained, load_tokenizer(trained.config.data.tokenizer)))
    flags = [f"--checkpoint={tmp_path}/hf", "--prompt=abc", "--max_new_tokens=5", "--no_document_start"]
    for dtype in ("float32", "bfloat16"):
        assert call_command("generate.py", command.main, *flags, f"--dtype={dtype}", "--capacity=1024") == 0
    mib = [float(found["mib"]) for found in FIGURES.finditer(capsys.readouterr().err)]
    assert mib == [0.6, 0.3], "3 layers, K and V, 2 heads of 12 numbers of 4 and 2 bytes, 1,024 tokens"
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    assert call_command("generate.py", command.main, *flags) == 2
    assert "eos_token_id='</s>': need ids of tokens" in capsys.readouterr().err


def test_generate_notes_a_cache_longer_than_the_run(generate, monkeypatch):
    monkeypatch.setattr(command, "continue_prompts", lambda *_, **__: None)
    _, _, err = generate("--prompt=abc", "--max_new_tokens=4", "--capacity=65")
    assert err.startswith("Note: up to 65 tokens, but the model was trained on sequences of 64.")
    _, _, err = generate("--prompt=abc", "--max_new_tokens=4", "--capacity=64")
    assert "Note" not in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt="], "prompt: is empty; write at least a character"),
        ([], "got no prompt, need one"),
        (["--prompt=a", "--prompt_file=b"], "got prompt and prompt_file, need one"),
        (["--prompt=\udcff"], "prompt: is not UTF-8 at character 0"),
        (["--prompt_file=nowhere.txt"], "prompt_file=nowhere.txt: cannot be read (No such file or directory)"),
        (
            ["--prompt=abc", "--capacity=5", "--max_new_tokens=9"],
            "a prompt of 4 tokens and max_new_tokens=9 do not fit",
        ),
        (["--prompt=abc", "--max_new_tokens=0"], "max_new_tokens=0: must be positive"),
        (["--prompt=abc", "--batch_size=-1"], "batch_size=-1: must be positive"),
        (["--prompt=abc", "--strategy=rng"], "strategy='rng': is not known; choose one of single_device"),
        (["--prompt=abc", "--strategy=sparse"], "strategy='sparse' is not exact"),
        (["--prompt=abc", "--temperature=-1"], "temperature=-1.0 must be a number, 0 or more"),
        (["--prompt=abc", "--top_k=3"], "top_k=3 with temperature=0"),
        (["--prompt=abc", "--sp=5000"], "cannot simulate 5000 devices, need 1 to 4096"),
        (["--prompt=abc", "--sp=0"], "mesh.sp=0: must be positive or -1"),
        (["--prompt=abc", "--seed=-1"], "seed=-1: must lie in [0, 2**32)"),
        (["--prompt=abc", "--stop="], "stop='': would end everything at once"),
        (["--prompt=abc", "--tokenizer=nowhere.json"], "data.tokenizer='nowhere.json': is neither 'bytes' nor a file"),
        (["--checkpoint=nowhere", "--prompt=abc"], "checkpoint='nowhere': has no config.json"),
    ],
)
def test_a_mistake_costs_one_line_and_no_compilation(generate, flags, words, monkeypatch):
    monkeypatch.setattr(jax, "jit", None)
    status, out, err = generate(*flags)
    assert (status, out) == (2, "")
    assert err.startswith("generate.py: error: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b'{"x": 1}', ":1: is neither a string nor an object"),
        (b'"a"\n"b', ":2: is no JSON (Unterminated string"),
        (b"", "holds no line; write one prompt on each"),
        (b'"a"\n""\n', ":2: is empty"),
        (b"\xff", "byte 0 is not UTF-8"),
    ],
)
def test_generate_says_where_a_file_holds_no_prompt(generate, tmp_path, contents, words):
    (tmp_path / "prompts.jsonl").write_bytes(contents)
    status, out, err = generate(f"--prompt_file={tmp_path}/prompts.jsonl")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


@pytest.mark.slow
def test_generate_writes_text_alone_to_stdout(checkpoint):
    flags = [f"--checkpoint={checkpoint}", "--prompt=abc"]
    done = run_command("generate.py", *flags, "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    assert "tokens/s" not in done.stdout
    head = f"{' '.join([*words_of('generate.py'), *flags])} --max_new_tokens=50000 --temperature=1 | head -c 3"
    done = subprocess.run(["bash", "-c", head], cwd=REPOSITORY, capture_output=True, timeout=300)
    assert len(done.stdout) == 3
    assert b"Traceback" not in done.stderr
