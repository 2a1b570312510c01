"""lm-eval: the log-likelihoods that it gets from the server equal those of its own Hugging Face backend.

`scripts/test --all` installs it; without it this test is skipped. Both read the same weights, in float32.
"""

import json
from pathlib import Path

import pytest

from tests.support.client_commands import find_command, run_command
from tests.support.server import ServerProcess

TASKS = Path(__file__).parent / "tasks"
TASK = "minivllm_choices"
TOLERANCE = 1e-3

pytestmark = [
    pytest.mark.skipif(find_command("lm_eval") is None, reason="lm-eval is not installed (scripts/test --all)"),
    pytest.mark.timeout(600),
]


def evaluate(directory: Path, *arguments: str) -> list[tuple[float, bool]]:
    """The log-likelihood of every choice of the task's questions, and whether greedy decoding would say it."""
    output = directory / "output"
    common = ("--tasks", TASK, "--include_path", ".", "--log_samples", "--output_path", str(output))
    run_command("lm_eval", *arguments, *common, cwd=TASKS, home=directory / "home")
    [file] = output.rglob(f"samples_{TASK}_*.jsonl")
    samples = sorted(map(json.loads, file.read_text("utf-8").splitlines()), key=lambda sample: int(sample["doc_id"]))
    pairs = [pair for sample in samples for pair in sample["filtered_resps"]]
    return [(float(loglikelihood), str(is_greedy) == "True") for loglikelihood, is_greedy in pairs]


def test_log_likelihoods(server: ServerProcess, base_url: str, default_model_dir: Path, tmp_path: Path) -> None:
    remote = f"model=smol,base_url={base_url}/completions,tokenizer={default_model_dir},num_concurrent=4,max_retries=1"
    ours = evaluate(tmp_path / "ours", "--model", "local-completions", "--model_args", remote)
    local = f"pretrained={default_model_dir},dtype=float32"
    theirs = evaluate(
        tmp_path / "theirs", "--model", "hf", "--model_args", local, "--device", "cpu", "--batch_size", "8"
    )
    questions = (TASKS / "choices.jsonl").read_text("utf-8").splitlines()
    assert len(ours) == len(theirs) == sum(len(json.loads(question)["choices"]) for question in questions)
    assert [loglikelihood for loglikelihood, _ in ours] == pytest.approx(
        [loglikelihood for loglikelihood, _ in theirs], abs=TOLERANCE
    )
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
    assert any(is_greedy for _, is_greedy in ours)
