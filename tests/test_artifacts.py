"""Files are whole or not there, whatever fails and wherever it fails; what is read back was checked."""

import errno
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from faulty_disk import Disk
from hypothesis import given, settings
from hypothesis import strategies as st

from recover.base import artifacts
from recover.base.errors import ArtifactError
from recover.run.directory import RunDirectory


class Crash(BaseException):
    """The process is gone: nothing after it reaches the disk, clean-up included."""


def crash() -> NoReturn:
    raise Crash


def every_failure(
    tmp_path: Path, prepare: Callable[[Path], None], work: Callable[[Path], None]
) -> Iterator[tuple[Path, bool]]:
    """Run `work` in a fresh folder for every call at which it can crash or err; yields folder and if it was done."""
    errors = (None, errno.ENOSPC, errno.EIO)
    for kind, error in enumerate(errors):
        for at in range(1, 100):
            folder = tmp_path / f"{kind}-{at}"
            folder.mkdir()
            prepare(folder)
            disk = Disk(at, error, die=crash)
            try:
                with disk.installed():
                    work(folder)
                done = True
            except (Crash, ArtifactError):
                done = False
            yield folder, done
            if disk.calls < at:
                assert at > 3, "nothing was intercepted"
                break
        else:
            raise AssertionError("work never ended")


def test_a_file_is_old_or_new_after_any_failure(tmp_path: Path) -> None:
    old, new = {"step": 1, "text": "o" * 1000}, {"step": 2, "text": "n" * 1000}
    work = lambda folder: artifacts.write_json(folder / "a.json", new)  # noqa: E731
    for folder, done in every_failure(tmp_path, lambda folder: artifacts.write_json(folder / "a.json", old), work):
        found = artifacts.read_json(folder / "a.json")
        assert found == new if done else found in (old, new)
        artifacts.settle(folder, r"a\.json")
        assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_a_log_keeps_its_lines_after_any_failure(tmp_path: Path) -> None:
    first, second, third = ({"epoch": epoch, "text": "x" * 100} for epoch in (1, 2, 3))
    work = lambda folder: artifacts.append_jsonl(folder / "log.jsonl", second)  # noqa: E731
    for folder, done in every_failure(
        tmp_path, lambda folder: artifacts.append_jsonl(folder / "log.jsonl", first), work
    ):
        found = artifacts.read_jsonl(folder / "log.jsonl")
        assert found == [first, second] if done else found in ([first], [first, second])
        artifacts.append_jsonl(folder / "log.jsonl", third)
        assert artifacts.read_jsonl(folder / "log.jsonl") == [*found, third]


def make(folder: Path, text: str) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text(text)
    (folder / "inner" / "b.bin").write_bytes(text.encode() * 100)
    return folder


@pytest.mark.parametrize("replaces", [False, True])
def test_a_published_folder_is_old_or_new_after_any_failure(tmp_path: Path, replaces: bool) -> None:
    def prepare(folder: Path) -> None:
        if replaces:
            artifacts.publish(make(folder / "best.tmp", "old"), folder / "best")
        make(folder / "best.tmp", "new")

    def work(folder: Path) -> None:
        artifacts.publish(folder / "best.tmp", folder / "best")

    for folder, done in every_failure(tmp_path, prepare, work):
        artifacts.settle(folder, "best")
        if not (folder / "best").exists():
            assert not replaces and not done
        else:
            artifacts.check_manifest(folder / "best")
            text = (folder / "best" / "a.txt").read_text()
            assert text == "new" if done else text in ("old", "new")
            assert text == "new" or replaces
        if (folder / "best.tmp").exists():
            work(folder)
            artifacts.check_manifest(folder / "best")
            assert (folder / "best" / "a.txt").read_text() == "new"
        assert [path.name for path in folder.iterdir()] == ["best"]


def test_a_stage_is_done_or_not_after_any_failure(tmp_path: Path) -> None:
    marks = {"prune": {"count": 4}}
    work = lambda folder: RunDirectory(folder).mark_done("prune", marks)  # noqa: E731
    for folder, done in every_failure(tmp_path, lambda folder: None, work):
        assert (RunDirectory(folder).stale_reason("prune", marks) is None) or not done


def test_a_full_disk_is_named_with_the_bytes_needed(tmp_path: Path) -> None:
    opening = 2  # the first call makes the folder
    with Disk(opening, errno.ENOSPC).installed():
        with pytest.raises(ArtifactError, match=r"a\.bin: disk full: 1,234 bytes to write, [\d,]+ bytes free"):
            artifacts.write_bytes(tmp_path / "a.bin", b"x" * 1234)


def test_what_cannot_be_written_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match=r"file/a\.json: "):
        artifacts.write_json(tmp_path / "file" / "a.json", 1)
    with pytest.raises(ArtifactError, match=r"file/a\.jsonl: "):
        artifacts.append_jsonl(tmp_path / "file" / "a.jsonl", 1)
    with pytest.raises(ArtifactError):
        with RunDirectory(tmp_path / "file").lock():
            pass


def test_json_is_strict_and_takes_what_records_hold(tmp_path: Path) -> None:
    value = {
        "nan": math.nan,
        "inf": [math.inf],
        3: np.float32(0.5),
        "array": np.arange(3),
        "path": Path("a/b"),
        "é": (1, True),
    }
    artifacts.write_json(tmp_path / "a.json", value)
    expected = {"nan": None, "inf": [None], "3": 0.5, "array": [0, 1, 2], "path": "a/b", "é": [1, True]}
    assert artifacts.read_json(tmp_path / "a.json") == expected
    with pytest.raises(TypeError, match="object cannot be written"):
        artifacts.write_json(tmp_path / "a.json", object())
    assert artifacts.read_json(tmp_path / "a.json") == expected


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:0e.-\\u ', max_size=40).map(str.encode))
def test_any_bytes_are_a_value_or_an_artifact_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(data)
    for read in (artifacts.read_json, artifacts.read_jsonl):
        try:
            read(path)
        except ArtifactError as error:
            assert str(path) in str(error)


BROKEN = [b"", b"{", b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000, b"NaN,"]


@pytest.mark.parametrize("data", BROKEN, ids=[repr(data[:8]) for data in BROKEN])
def test_broken_json_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"a\.json: corrupt JSON"):
        artifacts.read_json(path)
    path.write_bytes(b'{"fine": 1}\n' + data.replace(b"\n", b"") + b"\n")
    with pytest.raises(ArtifactError, match=r"a\.json:2: corrupt JSON"):
        artifacts.read_jsonl(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for read in (artifacts.read_json, artifacts.read_jsonl, artifacts.sha256):
        with pytest.raises(ArtifactError, match="nothing"):
            read(tmp_path / "nothing")


def test_a_long_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b'{"b": "' + b"x" * 200_000)
    assert artifacts.read_jsonl(path) == [{"a": 1}]
    artifacts.append_jsonl(path, {"c": 3})
    assert artifacts.read_jsonl(path) == [{"a": 1}, {"c": 3}]


DAMAGE: list[tuple[str, Callable[[Path], Any]]] = [
    ("a.txt has changed", lambda folder: (folder / "a.txt").write_text("oLd")),
    ("a.txt has changed", lambda folder: (folder / "a.txt").write_text("old\0")),
    ("a.txt has changed", lambda folder: (folder / "a.txt").write_text("")),
    ("inner/b.bin is missing", lambda folder: (folder / "inner" / "b.bin").unlink()),
    ("c.txt is not listed", lambda folder: (folder / "c.txt").write_text("")),
    ("not a manifest", lambda folder: (folder / artifacts.MANIFEST).write_text("[]")),
    ("corrupt JSON", lambda folder: (folder / artifacts.MANIFEST).write_text("{")),
    ("no such file", lambda folder: (folder / artifacts.MANIFEST).unlink()),
    ("../a.txt lies outside", lambda folder: (folder / artifacts.MANIFEST).write_text('{"files": {"../a.txt": {}}}')),
]  # fmt: skip


@pytest.mark.parametrize(("message", "damage"), DAMAGE, ids=[f"{number} {row[0]}" for number, row in enumerate(DAMAGE)])
def test_damage_to_a_published_folder_is_found(tmp_path: Path, message: str, damage: Callable[[Path], Any]) -> None:
    artifacts.publish(make(tmp_path / "best.tmp", "old"), tmp_path / "best")
    (tmp_path / "best" / artifacts.DONE).write_text("{}")
    artifacts.check_manifest(tmp_path / "best")
    damage(tmp_path / "best")
    with pytest.raises(ArtifactError, match=message.replace(".", r"\.")):
        artifacts.check_manifest(tmp_path / "best")


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    artifacts.publish(make(tmp_path / "best.tmp", "old"), tmp_path / "best")
    path = tmp_path / "best" / "inner" / "b.bin"
    whole = path.read_bytes()
    for position in range(0, len(whole) * 8, 7):
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(ArtifactError):
            artifacts.check_manifest(tmp_path / "best")


def test_a_folder_that_goes_while_it_is_checked_is_an_error_of_ours(tmp_path, monkeypatch):
    """As when a training puts an old checkpoint away while `recover show` looks at it."""
    artifacts.write_text(tmp_path / "old" / "a.txt", "a")
    artifacts.write_manifest(tmp_path / "old")
    listed = artifacts._listed

    def gone_meanwhile(folder: Path) -> list[Path]:
        assert listed(folder)
        shutil.rmtree(folder)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))  # as a scan that has begun says

    monkeypatch.setattr(artifacts, "_listed", gone_meanwhile)
    with pytest.raises(ArtifactError, match="old: No such file"):
        artifacts.check_manifest(tmp_path / "old")
