"""Tokenizers and running servers for the tests of the frontend."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from frontend.tokenizer import Tokenizer
from tests.support.fake_engine import FakeEngine
from tests.unit.frontend.running import RunningFrontend

CORPUS = [
    "hello world, this is a small corpus",
    "héllo wörld — naïve café",
    "日本語のテキスト 😀🎉",
    "stop end the of and",
] * 4
SPECIAL = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: every byte has a token, characters are split freely."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("plain added", normalized=False)])
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """Llama-2's kind: ▁ for spaces, byte tokens for what is not in the vocabulary, first space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "�"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz,.é日", "▁h", "▁he", "ll", "▁hell", "▁hello"]
    merges = [("▁", "h"), ("▁h", "e"), ("l", "l"), ("▁he", "ll"), ("▁hell", "o")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """The Metaspace decoder on a Unigram model."""
    vocab = [("<unk>", 0.0), ("▁", -2.0), ("▁hello", -1.0), *((char, -3.0) for char in "abcdefghijklmnopqrstuvwxyz日")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def words() -> tokenizers.Tokenizer:
    """No decoder at all: words joined by spaces."""
    vocab = {word: i for i, word in enumerate(["<unk>", "hello", "world", "日本", "stop", "end"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


BACKENDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "words": words,
}


@pytest.fixture(scope="session", params=[*BACKENDS, "default_model"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of tokenizer in turn, the default model's included."""
    if request.param == "default_model":
        return Tokenizer.from_directory(request.getfixturevalue("default_model_dir"))
    return Tokenizer(BACKENDS[request.param](), {})


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory with a byte-level tokenizer and a ChatML template."""
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_level().save(str(directory / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(tokenizer_dir)


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A private directory whose path is short enough for sockets."""
    directory = Path(tempfile.mkdtemp(prefix="mv-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def engine(socket_dir: Path) -> Iterator[FakeEngine]:
    with FakeEngine(socket_dir) as engine:
        yield engine


@pytest.fixture
def start_frontend(socket_dir: Path, tokenizer_dir: Path) -> Iterator[Callable[..., RunningFrontend]]:
    """Start a frontend in a thread, with options of ServeConfig; stopped after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(RunningFrontend(socket_dir, tokenizer_dir, **options))


@pytest.fixture
def frontend(engine: FakeEngine, start_frontend: Callable[..., RunningFrontend]) -> RunningFrontend:
    """A frontend that is ready, connected to `engine`."""
    frontend = start_frontend()
    frontend.wait_until_ready()
    return frontend
