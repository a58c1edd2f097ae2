"""The lease on a folder in a bucket, on a file system in memory."""

import fsspec
import pytest

from sft_jax.errors import UserError
from sft_jax.files import lease
from sft_jax.files.lease import Lease

pytestmark = pytest.mark.smoke


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.02)
    files = fsspec.filesystem("memory")
    files.pipe_file("/runs/a/config.yaml", b"")
    yield files
    files.rm("/runs", recursive=True)


def test_one_holds_it_until_it_releases_it(bucket, capsys):
    first, second = (Lease(bucket, "/runs/a", "mem://runs/a") for _ in range(2))
    assert first.holder() is None
    assert first.take() is None
    assert first.holder() is None
    assert "process " in str(second.holder())
    assert "mem://runs/a: was in use by process" in capsys.readouterr().err
    first.release()
    assert second.holder() is None
    assert second.take() is None
    second.release()
    assert bucket.ls("/runs/a", detail=False) == ["/runs/a/config.yaml"]


def test_one_that_died_loses_it(bucket):
    dead, heir = (Lease(bucket, "/runs/a", "mem://runs/a") for _ in range(2))
    dead.take()
    dead._stopped.set()  # no heartbeat any more
    assert heir.holder() is None
    assert heir.take() is None
    heir.release()


def test_one_that_was_silent_for_too_long_stops(bucket):
    silent, heir = (Lease(bucket, "/runs/a", "mem://runs/a") for _ in range(2))
    silent.take()
    heir.take()
    silent._thread.join(5)
    with pytest.raises(UserError, match=r"mem://runs/a: was taken over by process \d+ .*; this process stops"):
        silent.check()
    heir.check()
    silent.release()
    assert bucket.exists("/runs/a/.lease")
    heir.release()


def test_of_two_that_begin_at_once_one_wins(bucket, monkeypatch):
    one, other = (Lease(bucket, "/runs/a", "mem://runs/a") for _ in range(2))

    def meanwhile(seconds):
        monkeypatch.setattr(lease.time, "sleep", lambda seconds: None)
        assert other.take() is None

    monkeypatch.setattr(lease.time, "sleep", meanwhile)
    assert "process " in str(one.take())
    other.release()
