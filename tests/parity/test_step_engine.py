"""The teaching engine on the real model: its text, its K/V and its errors, beside Hugging Face's own cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm import MiniVLLMEngine
from minivllm.errors import InvalidRequestError, OverloadedError
from minivllm.sampling_params import SamplingParams
from tests.support.models import hf_greedy, hf_model

QUESTION = "What is the capital of France?"
NUM_BLOCKS = 20
ENDLESS = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


@pytest.fixture(scope="module")
def shared_engine(default_model_dir: Path) -> MiniVLLMEngine:
    return MiniVLLMEngine(
        str(default_model_dir), device="cpu", num_gpu_blocks_override=NUM_BLOCKS, max_num_seqs=4, max_model_len=256
    )


@pytest.fixture
def engine(shared_engine: MiniVLLMEngine) -> Iterator[MiniVLLMEngine]:
    """Checks after the test that every block belongs to a registered request, and to none when all are freed."""
    yield shared_engine
    kv = shared_engine._core.kv
    kv.check_integrity(shared_engine.requests[req_id].request for req_id in shared_engine.requests)
    for req_id in list(shared_engine.requests):
        shared_engine.free(req_id)
    kv.check_integrity([])
    assert sorted(shared_engine._free_rows) == [0, 1, 2, 3]


def decode(engine: MiniVLLMEngine, req_id: int, num_steps: int) -> None:
    for _ in range(num_steps):
        engine.decode_step([req_id])


def hf_cache(directory: Path, token_ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer, K and V [1, num_kv_heads, num_tokens, head_dim] as Hugging Face caches them."""
    with torch.inference_mode():
        output: Any = hf_model(directory)(input_ids=torch.tensor([token_ids]), use_cache=True)
    return [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def test_the_real_model_answers(engine: MiniVLLMEngine, default_model_dir: Path) -> None:
    req_id = engine.register_request(QUESTION)
    prompt = list(engine.tokens[req_id])
    assert engine.get_text(req_id).endswith(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    first = engine.prefill([req_id])
    assert engine.tokens[req_id] == prompt + first
    while not engine.is_finished(req_id):
        engine.decode_step([req_id])
    output = engine.tokens[req_id][len(prompt) :]
    assert output == hf_greedy(default_model_dir, prompt, len(output))
    assert output[-1] == 2  # <|im_end|>
    assert "Paris" in engine.get_output(req_id)
    assert engine.get_text(req_id).endswith(engine.get_output(req_id) + "<|im_end|>")
    assert engine.requests[req_id].prompt == QUESTION
    assert engine.requests[req_id].position == len(prompt) + len(output) - 1


def test_slice_kv_is_the_cache_of_hugging_face(engine: MiniVLLMEngine, default_model_dir: Path) -> None:
    req_id = engine.register_request(QUESTION)
    engine.prefill([req_id])
    decode(engine, req_id, 3)
    ours = engine.slice_kv(req_id)
    theirs = hf_cache(default_model_dir, engine.tokens[req_id][:-1])
    assert len(ours) == len(theirs) == 30
    for (our_key, our_value), (their_key, their_value) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_key, their_key, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(our_value, their_value, rtol=1e-3, atol=1e-3)
    assert torch.equal(engine.kv[req_id][0][0], ours[0][0])
    assert len(set(engine.kv.block_table(req_id))) == -(-ours[0][0].shape[2] // 16)


def test_gather_kv_pads_on_the_left(engine: MiniVLLMEngine, default_model_dir: Path) -> None:
    req_ids = [engine.register_request(text) for text in (QUESTION, "Hi", "Tell me a story about a very small model.")]
    engine.prefill(req_ids)
    gathered, mask = engine.gather_kv(req_ids)
    lengths = [len(engine.tokens[req_id]) - 1 for req_id in req_ids]
    assert mask.sum(1).tolist() == lengths
    for row, (req_id, length) in enumerate(zip(req_ids, lengths, strict=True)):
        padding = max(lengths) - length
        assert mask[row].tolist() == [0] * padding + [1] * length
        theirs = hf_cache(default_model_dir, engine.tokens[req_id][:-1])
        for ours, their in zip(gathered, theirs, strict=True):
            for our, expected in zip(ours, their, strict=True):
                assert our.shape == (3, 3, max(lengths), 64)
                assert not our[row, :, :padding].any()
                torch.testing.assert_close(our[row, :, padding:], expected[0], rtol=1e-3, atol=1e-3)


def test_requests_may_be_decoded_in_any_company(engine: MiniVLLMEngine) -> None:
    first, second = (engine.register_request(text, ENDLESS) for text in (QUESTION, "Count to five."))
    engine.prefill([first])
    decode(engine, first, 4)
    engine.prefill([second])
    for _ in range(4):
        assert len(engine.decode_step([second, first])) == 2
    together = {req_id: engine.get_output(req_id) for req_id in (first, second)}
    for req_id, num_steps in ((first, 8), (second, 4)):
        alone = engine.register_request(engine.requests[req_id].prompt, ENDLESS)
        engine.prefill([alone])
        decode(engine, alone, num_steps)
        assert engine.get_output(alone) == together[req_id]


def test_finished_requests_stand_still(engine: MiniVLLMEngine) -> None:
    req_id = engine.register_request(QUESTION, SamplingParams(temperature=0.0, max_tokens=2))
    engine.prefill([req_id])
    assert not engine.is_finished(req_id)
    assert len(engine.decode_step([req_id])) == 1
    assert engine.is_finished(req_id)
    assert engine.decode_step([req_id]) == []


def test_misuse_is_named_and_changes_nothing(engine: MiniVLLMEngine) -> None:
    first, second = engine.register_request(QUESTION), engine.register_request("Hi")
    with pytest.raises(InvalidRequestError, match=f"request {first} is waiting, not decode"):
        engine.decode_step([first])
    with pytest.raises(InvalidRequestError, match="name a request twice"):
        engine.prefill([first, first])
    with pytest.raises(InvalidRequestError, match="request 999 is not registered"):
        engine.prefill([first, 999])
    engine.prefill([first])
    with pytest.raises(InvalidRequestError, match=f"request {first} is decode, not waiting"):
        engine.prefill([second, first])
    assert len(engine.prefill([second])) == 1
    with pytest.raises(InvalidRequestError, match="is not registered"):
        engine.free(999)


def test_a_full_cache_is_named_and_can_be_retried(engine: MiniVLLMEngine, default_model_dir: Path) -> None:
    long, short = "word " * 200, QUESTION
    req_ids = [engine.register_request(text) for text in (short, long, long + "again")]
    with pytest.raises(OverloadedError, match=f"no room in the KV cache is left for request {req_ids[2]}"):
        engine.prefill(req_ids)
    prompt = list(engine.tokens[req_ids[0]])
    engine.prefill(req_ids[:2])
    engine.free(req_ids[1])
    engine.prefill(req_ids[2:])
    decode(engine, req_ids[0], 5)
    assert engine.tokens[req_ids[0]] == prompt + hf_greedy(default_model_dir, prompt, 6)


def test_a_decode_without_room_can_be_retried(engine: MiniVLLMEngine, default_model_dir: Path) -> None:
    req_id = engine.register_request(QUESTION, ENDLESS)
    prompt = list(engine.tokens[req_id])
    engine.prefill([req_id])
    pool = engine._core.kv.pool
    taken = pool.allocate(pool.num_unused)
    room = 16 - len(prompt) % 16
    decode(engine, req_id, room)
    for _ in range(2):
        with pytest.raises(OverloadedError, match="no room in the KV cache"):
            engine.decode_step([req_id])
    pool.release(taken)
    decode(engine, req_id, 2)
    assert engine.tokens[req_id] == prompt + hf_greedy(default_model_dir, prompt, room + 3)
