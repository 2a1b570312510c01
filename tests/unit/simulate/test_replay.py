"""A recorded run replays decision by decision without the model; a log that was changed does not."""

from pathlib import Path

import msgspec
import pytest

from engine_core.decision_log import Abort, Entry, Fail, Launch, Tokens
from minivllm.cli import main
from minivllm.errors import StartupError
from minivllm.sampling_params import SamplingParams
from minivllm.simulate.replay import ReplayError, replay
from tests.support.engines import Result, assert_idle, run_to_end, step_once
from tests.support.fake_runner import make_fake_engine


def record(path: Path, depth: int, fail: str = "") -> None:
    """A crowded run: shared prefixes, preemption in a small pool, chunks, a stop token, an abort, maybe a failure."""
    engine, runner = make_fake_engine(
        depth,
        record=path,
        block_size=2,
        num_gpu_blocks_override=14,
        max_num_seqs=4,
        max_num_batched_tokens=6,
    )
    for index in range(7):
        params = SamplingParams(max_tokens=12 + index, stop_token_ids=(2,) if index == 3 else (), logprobs=index % 2)
        engine.add_request(f"r{index}", [1, 2, 3, 4, index % 5][: 3 + index % 3], params)
    results: dict[str, Result] = {}
    for _ in range(5):
        step_once(engine, results)
    engine.abort(["r1", "unknown"])
    if fail:
        setattr(runner, fail, MemoryError("nothing left"))
    step_once(engine, results)
    engine.add_request("late", [1, 2, 3, 4], SamplingParams(max_tokens=8), output_token_ids=[0, 1])
    run_to_end(engine)
    assert_idle(engine)
    assert engine.scheduler.num_preemptions
    assert engine.decision_log is not None
    engine.decision_log.close()


def entries(path: Path) -> list[Entry]:
    decoder = msgspec.json.Decoder(Entry)
    return [decoder.decode(line) for line in path.read_bytes().splitlines()]


def write(path: Path, log: list[Entry]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in log))


@pytest.mark.parametrize("fail", ["", "fail_launch", "fail_collect"])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_recorded_run_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str], depth: int, fail: str) -> None:
    path = tmp_path / "log.jsonl"
    record(path, depth, fail)
    log = entries(path)
    assert any(isinstance(entry, Abort) for entry in log)
    assert any(isinstance(entry, Fail) for entry in log) == bool(fail)
    assert main(["replay", str(path)]) == 0
    num_passes = sum(isinstance(entry, Launch) for entry in log)
    assert f"8 requests, 1 aborts, {sum(entry.__class__.__name__ == 'Step' for entry in log)} steps" in (
        out := capsys.readouterr().out
    )
    assert f"all {num_passes} passes are the same" in out


def test_a_log_cut_off_in_a_line_or_a_step_replays_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    record(path, 0)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    last_launch = max(index for index, line in enumerate(lines) if b'"launch"' in line)
    path.write_bytes(b"".join(lines[: last_launch + 1]) + lines[last_launch + 1][:5])
    counts = replay(path)
    assert counts["Launch"] == sum(b'"launch"' in line for line in lines)


def test_another_decision_is_the_first_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.jsonl"
    record(path, 0)
    log = entries(path)
    index = [index for index, entry in enumerate(log) if isinstance(entry, Launch)][3]
    launch = log[index]
    assert isinstance(launch, Launch)
    log[index] = msgspec.structs.replace(launch, starts=[start + 1 for start in launch.starts])
    write(path, log)
    assert main(["replay", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"line {index + 1}: the replay decides otherwise" in error
    assert "log:" in error
    assert "replay:" in error


def test_another_token_leads_to_another_decision(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    record(path, 1)
    log = entries(path)
    for index, entry in enumerate(log):
        if isinstance(entry, Tokens) and len(entry.token_ids) > 1:
            log[index] = Tokens([(token + 1) % 5 for token in entry.token_ids])
    write(path, log)
    with pytest.raises(ReplayError, match="line "):
        replay(path)


def test_missing_steps_and_tokens_are_differences(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    record(path, 0)
    log = entries(path)
    first_tokens = next(index for index, entry in enumerate(log) if isinstance(entry, Tokens))
    write(path, log[:first_tokens] + log[first_tokens + 1 :])
    with pytest.raises(ReplayError, match="collects"):
        replay(path)
    first_step = next(index for index, entry in enumerate(log) if entry.__class__.__name__ == "Step")
    write(path, log[:first_step] + log[first_step + 1 :])
    with pytest.raises(ReplayError, match="does nothing"):
        replay(path)


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with pytest.raises(StartupError, match="No such file"):
        replay(path)
    path.write_text('{"what": "nonsense"}\n')
    with pytest.raises(StartupError, match="line 1"):
        replay(path)
    path.write_text('{"what": "step"}\n')
    with pytest.raises(StartupError, match="not a decision log"):
        replay(path)


def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--record"):
        make_fake_engine(0, record=tmp_path / "missing" / "log.jsonl", num_gpu_blocks_override=4)
