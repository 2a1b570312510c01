"""guidellm and aiperf with a local tokenizer: no request fails, and they count the tokens that the server counts.

`scripts/test --all` installs them; without them these tests are skipped.
"""

import json
from pathlib import Path

import pytest

from tests.support.client_commands import find_command, run_command
from tests.support.server import Metrics, ServerProcess

NUM_REQUESTS, INPUT_LEN, OUTPUT_LEN = 12, 32, 16


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_command(name) is None, reason=f"{name} is not installed (scripts/test --all)")


def check_server(before: Metrics, after: Metrics) -> None:
    """The server has answered these requests, and no others, with the tokens that were asked for."""

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert after.answered["length"] - before.answered.get("length", 0) == NUM_REQUESTS
    assert grown("minivllm:requests_submitted_total") == NUM_REQUESTS
    assert grown("vllm:prompt_tokens_total") == NUM_REQUESTS * INPUT_LEN
    assert grown("vllm:generation_tokens_total") == NUM_REQUESTS * OUTPUT_LEN


@needs("guidellm")
def test_guidellm(server: ServerProcess, default_model_dir: Path, tmp_path: Path) -> None:
    before = server.settle()
    run_command(
        "guidellm", "run", "--disable-console",
        "--backend", f"kind=openai_http,target={server.url},model=smol,request_format=/v1/completions",
        "--profile", "kind=concurrent,streams=4",
        "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
        "--data", f"kind=synthetic_text,prompt_tokens={INPUT_LEN},output_tokens={OUTPUT_LEN}",
        "--tokenizer", f"kind=huggingface_auto,model={default_model_dir}",
        "--output", "kind=json,path=report.json",
        cwd=tmp_path, home=tmp_path / "home",
    )  # fmt: skip
    check_server(before, server.settle())
    [benchmark] = json.loads((tmp_path / "report.json").read_text("utf-8"))["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (NUM_REQUESTS, 0, 0)
    requests = benchmark["requests"]["successful"]
    assert {request["input_metrics"]["text_tokens"] for request in requests} == {INPUT_LEN}
    assert {request["output_metrics"]["text_tokens"] for request in requests} == {OUTPUT_LEN}


@needs("aiperf")
def test_aiperf(server: ServerProcess, default_model_dir: Path, tmp_path: Path) -> None:
    before = server.settle()
    run_command(
        "aiperf", "profile", "--model", "smol", "--url", server.url, "--endpoint-type", "completions", "--streaming",
        "--tokenizer", str(default_model_dir), "--request-count", str(NUM_REQUESTS), "--concurrency", "4",
        "--isl", str(INPUT_LEN), "--osl", str(OUTPUT_LEN), "--extra-inputs", "ignore_eos:true", "--random-seed", "1",
        "--ui", "none",
        cwd=tmp_path, home=tmp_path / "home",
    )  # fmt: skip
    check_server(before, server.settle())
    [file] = tmp_path.rglob("profile_export.jsonl")
    records = list(map(json.loads, file.read_text("utf-8").splitlines()))
    assert [record.get("error") for record in records] == [None] * NUM_REQUESTS
    for metrics in (record["metrics"] for record in records):
        assert metrics["input_sequence_length"]["value"] == metrics["usage_prompt_tokens"]["value"] == INPUT_LEN
        # Its own count of the output is of the text, tokenized again, which need not give the same tokens.
        assert metrics["usage_completion_tokens"]["value"] == OUTPUT_LEN
