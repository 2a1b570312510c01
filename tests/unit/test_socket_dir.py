"""The private directory of a run goes away with the run, and nothing else does."""

from pathlib import Path

import pytest

from minivllm.errors import StartupError
from minivllm.transport import CONFIG_FILE, METRICS_DIR, make_socket_dir, remove_socket_dir


def fill(directory: Path) -> None:
    for name in ("engine-input.sock", "engine-output.sock", CONFIG_FILE):
        (directory / name).write_text("")
    (directory / METRICS_DIR).mkdir()
    (directory / METRICS_DIR / "counter.db").write_text("")


def test_fresh_directory_is_private_and_removed_whole() -> None:
    directory = make_socket_dir()
    assert directory.stat().st_mode & 0o777 == 0o700
    fill(directory)
    for _ in range(2):  # launcher and engine core may both do it
        remove_socket_dir(directory)
        assert not directory.exists()


def test_own_files_of_the_user_stay(tmp_path: Path) -> None:
    directory = make_socket_dir(tmp_path / "mine")
    fill(directory)
    (directory / "precious").write_text("")
    remove_socket_dir(directory)
    assert [path.name for path in directory.iterdir()] == ["precious"]


def test_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    with pytest.raises(StartupError, match="must belong to you alone"):
        make_socket_dir(shared)
