"""All labs: name, idea, what is broken on purpose. Imports none of them, so that the list is there at once."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minivllm.labs.findings import Findings
    from minivllm.labs.workbench import Workbench


@dataclass(frozen=True, slots=True)
class Lab:
    """The module minivllm/labs/`name` with underscores has a function `run(bench) -> Findings`."""

    name: str
    title: str
    idea: str
    break_it: str

    def run(self, bench: "Workbench") -> "Findings":
        """Do the experiment. Raises `StartupError`."""
        module = importlib.import_module(f"minivllm.labs.{self.name.replace('-', '_')}")
        findings: Findings = module.run(bench)
        return findings


ALL = "all"  # for `minivllm lab all`

LABS = {
    lab.name: lab
    for lab in (
        Lab(
            "prefill-vs-decode",
            "prefill and decode",
            "A prompt goes through the model in one pass, so all its tokens share every weight that is read. An output "
            "token needs a pass of its own, which reads all weights again: the same arithmetic, starved of data.",
            "the prompt in chunks of 8 tokens",
        ),
        Lab(
            "kv-memory",
            "the KV cache and its memory",
            "Attention needs keys and values of all tokens before. Keeping them makes decoding cheap and costs memory "
            "that grows with every token of every request, until it outweighs the model.",
            "blocks of 512 tokens",
        ),
        Lab(
            "batching",
            "static and continuous batching",
            "A decode pass of many requests costs little more than of one, so they run together. A static batch waits "
            "for its longest request; a continuous one lets the next request in at the very step at which one ends.",
            "one request at a time, --max-num-seqs 1",
        ),
        Lab(
            "latency-throughput",
            "latency against throughput",
            "A larger batch makes more tokens per second and makes each of them later. Where throughput stops "
            "growing, only waiting does: that is the knee.",
            "no batching at the same arrival rate, --max-num-seqs 1",
        ),
        Lab(
            "streaming",
            "what a token passes on its way",
            "A token is sampled in the engine core, crosses a socket, becomes text in the frontend, and leaves as a "
            "server-sent event. Nearly all of its time is the forward pass; all that streaming must do is not to wait.",
            "no streaming: the client gets the whole answer at its end",
        ),
        Lab(
            "scheduling",
            "a long prompt among decoding requests",
            "Prompts come in chunks, and a decode pass runs between two of them. The size of a chunk bounds the gap "
            "that everybody else's stream has; when memory runs out, the youngest request gives way.",
            "the whole prompt in one chunk; and a pool too small for all",
        ),
        Lab(
            "prefix-sharing",
            "shared prefixes",
            "Requests that begin with the same tokens need the same keys and values. Full blocks are found by a hash "
            "of all tokens up to their end, so that only what is new is computed.",
            "--no-enable-prefix-caching; and a pool that must evict",
        ),
        Lab(
            "paging",
            "blocks against contiguous slots",
            "Who reserves a whole context for each request wastes what is never used. Blocks are given as tokens come, "
            "so that a request wastes less than one block.",
            "one slot of the whole context for each request",
        ),
    )
}
