"""Hugging Face's `generate()` on the same weights, device and work, in a process of its own.

A process, because the memory it takes is then surely free again when the engine sizes its KV cache.
"""

import gc
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from engine_core.model_loader import load_model
from minivllm.bench.offline.runs import MeasurementError
from minivllm.bench.offline.work import Work
from minivllm.config import EngineConfig


@dataclass(frozen=True, slots=True)
class HFJob:
    """Work to time, in static batches of `batch_size` requests."""

    config: EngineConfig
    directory: Path
    works: list[Work]
    temperature: float
    batch_size: int
    repeats: int


def time_hf(job: HFJob) -> list[float]:
    """Median seconds of each work, or raises `MeasurementError` that says why there are none."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        try:
            return executor.submit(time_hf_here, job).result()
        except BrokenProcessPool as error:
            raise MeasurementError("Hugging Face's process was killed: out of memory?") from error
        except (RuntimeError, ValueError) as error:
            raise MeasurementError(f"Hugging Face failed: {str(error).splitlines()[0]}") from error


def load_hf(config: EngineConfig, directory: Path) -> PreTrainedModel:
    """The model as the engine's own loader reads it, unfused, with Hugging Face's attention and no end of sequence."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = load_model(config.model_copy(update={"enforce_eager": True}), directory)
    model = loaded.model
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # the few models that sdpa cannot run
        model.set_attn_implementation("eager")
    return model


@torch.inference_mode()
def generate(model: PreTrainedModel, work: Work, temperature: float) -> list[list[int]]:
    """One static batch, padded on the left, until its longest request is done: each request's output tokens."""
    longest = max(map(len, work.prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in work.prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in work.prompts], device=model.device
    )
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=max(work.output_lens), pad_token_id=0, **sampling)
    model.generation_config = GenerationConfig(pad_token_id=0)  # the model's own may end a sequence or filter tokens
    rows = model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()  # type: ignore[operator]
    return [row[:n] for row, n in zip(rows, work.output_lens, strict=True)]


def time_hf_here(job: HFJob) -> list[float]:
    """The same in this process, for whoever has sized its own KV cache already. Raises what Hugging Face raises."""
    model = load_hf(job.config, job.directory)
    generate(model, job.works[0].part(8, 4), job.temperature)
    return [median(_seconds(model, work, job) for _ in range(job.repeats)) for work in job.works]


def _seconds(model: PreTrainedModel, work: Work, job: HFJob) -> float:
    gc.collect()
    start = time.perf_counter()
    for batch in work.static_batches(job.batch_size):
        outputs = generate(model, batch, job.temperature)
        if [len(output) for output in outputs] != batch.output_lens:
            raise ValueError(f"it generated other than the {batch.num_output_tokens} tokens that were asked for")
    return time.perf_counter() - start
