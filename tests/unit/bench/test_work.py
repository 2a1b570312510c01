"""The work that is measured: nano-vllm's to the token, and its parts."""

import random

import pytest

from minivllm.bench.offline.work import Work, nano_work, uniform_work

NANO = (256, (100, 1024), (100, 1024), 151_936)


def test_nano_work_is_that_of_nano_vllm() -> None:
    random.seed(0)  # as its bench.py does
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    output_lens = [random.randint(100, 1024) for _ in range(256)]
    work = nano_work(*NANO)
    assert (work.prompts, work.output_lens) == (prompts, output_lens)
    assert work.num_output_tokens == 133_966


def test_a_small_vocabulary_bounds_the_token_ids() -> None:
    work = nano_work(8, (1, 9), (2, 3), 50)
    assert max(map(max, work.prompts)) <= 49
    assert all(1 <= len(prompt) <= 9 for prompt in work.prompts)
    assert set(work.output_lens) == {2, 3}


@pytest.mark.parametrize("lens", [[1], [1, 2, 7], [5, 1]])
def test_decode_reads_and_prefill_pairs_counted_one_by_one(lens: list[int]) -> None:
    work = Work([[0] * (3 + i) for i in range(len(lens))], lens)
    reads = 0
    for prompt, n in zip(work.prompts, lens, strict=True):
        for num_outputs in range(1, n):  # a decode pass follows every output token but the last
            reads += len(prompt) + num_outputs
    assert work.num_decode_reads == reads
    assert work.num_prefill_pairs == sum(sum(range(1, len(prompt) + 1)) for prompt in work.prompts)


def test_parts_and_static_batches() -> None:
    work = uniform_work(random.Random(1), 5, 4, 9, 100)
    assert (len(work.prompts), work.num_prompt_tokens, work.output_lens) == (5, 20, [9] * 5)
    part = work.part(3, 2)
    assert (part.prompts, part.output_lens) == (work.prompts[:3], [2, 2, 2])
    assert work.part(None, None) == work
    assert [len(batch.prompts) for batch in work.static_batches(2)] == [2, 2, 1]
    assert [p for batch in work.static_batches(2) for p in batch.prompts] == work.prompts
