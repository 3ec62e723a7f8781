"""What a run writes down of the place where it happens."""

import os
import subprocess

import pytest

from common import environment


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """``git(*words)`` in a checkout of one file, from which ``commit`` is told."""
    def git(*words):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *name, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    (tmp_path / "file").write_text("one")
    git("init"), git("add", "file"), git("commit", "-m", "first")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    return git


def test_the_commit_is_named_and_marked_where_files_differ(checkout, tmp_path):
    head = checkout("rev-parse", "HEAD").strip()
    assert environment.commit() == head
    (tmp_path / "file").write_text("two")
    assert environment.commit() == head + "+"


def test_asking_for_the_commit_writes_nothing_into_the_checkout(checkout, tmp_path):
    """A file that only looks changed makes git refresh its index, under a lock that a kill leaves behind."""
    os.utime(tmp_path / "file", (1, 1))
    before = (tmp_path / ".git" / "index").read_bytes()
    assert environment.commit() == checkout("rev-parse", "HEAD").strip()
    assert (tmp_path / ".git" / "index").read_bytes() == before
