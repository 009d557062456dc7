"""The scoring log and its workers: whole or absent, first commit wins, the same selection from any number of workers, whoever dies."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from fastssl.errors import DataError
from fastssl.selftrain import files, lease, score
from fastssl.selftrain.lease import Claims
from fastssl.selftrain.log import Log, Part
from fastssl.selftrain.rules import Rule
from fastssl.selftrain.select import select
from tests.selftrain.parts import Killed, NoSource, Stub, fill, in_threads, make_log, scores_of


@pytest.fixture(autouse=True)
def no_images(monkeypatch):
    monkeypatch.setattr(score, "_open_pool", lambda log, scorer: NoSource())
    monkeypatch.setattr(score, "POLL_S", 0.01)


def quiet(text):
    pass


def selection_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wanted")
    select(fill(make_log(folder / "log")), Rule(k=6), folder / "out")
    return selection_bytes(folder / "out")


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, wanted, workers):
    log = make_log(tmp_path / "log")
    done = {}

    def worker(number):
        done[number] = score.work(make_log(tmp_path / "log"), Stub(pause_s=0.002), say=quiet, lease_s=5)

    in_threads(worker, workers)
    assert sum(w.units for w in done.values()) == 10 and sum(w.images for w in done.values()) == 47
    assert not list((log.folder / "claims").iterdir()) and not list(log.folder.rglob("*.tmp"))
    select(log, Rule(k=6), tmp_path / "out")
    assert selection_bytes(tmp_path / "out") == wanted


def killed_worker(folder, units):
    """A process of its own that is ended by SIGKILL in the middle of a unit, after it has committed ``units`` others."""
    pid = os.fork()
    if pid == 0:

        class Mortal(Stub):
            def score(self, source, rows_N, p):
                if len(self.units) == units:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().score(source, rows_N, p)

        score.work(make_log(folder), Mortal(), say=quiet, lease_s=0.2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("after", [[0], [3, 2], [1, 0, 5]])
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_killed_workers_lose_their_unit_only(tmp_path, wanted, monkeypatch, after, where):
    """The next worker takes the dead one's unit over: at once on the same machine, else after the lease."""
    log, left = make_log(tmp_path / "log"), 10
    for number, units in enumerate(after):
        if where == "elsewhere":
            monkeypatch.setattr(lease.socket, "gethostname", lambda number=number: f"machine{number}")
        killed_worker(tmp_path / "log", units)
        left -= units
        assert len(log.missing()) == left, "everything but the unit in hand is committed"
        assert len(list((log.folder / "claims").iterdir())) >= 1
    if where == "elsewhere":
        monkeypatch.setattr(lease.socket, "gethostname", lambda: "the last one")
    begun = time.monotonic()
    score.work(log, Stub(), say=quiet, lease_s=0.2 if where == "elsewhere" else 1000)
    if where == "elsewhere":
        assert time.monotonic() - begun >= 0.2
    select(log, Rule(k=6), tmp_path / "out")
    assert selection_bytes(tmp_path / "out") == wanted


def test_a_worker_that_is_stopped_gives_its_unit_back_at_once(tmp_path):
    log = make_log(tmp_path / "log")
    with pytest.raises(Killed):
        score.work(log, Stub(die_at=0), say=quiet, lease_s=1000)
    assert not list((log.folder / "claims").iterdir())


def test_two_coordinators_commit_once(tmp_path, wanted):
    """Both score every unit, because neither respects claims; the first record stays."""
    log = make_log(tmp_path / "log")

    def worker(number):
        mine = make_log(tmp_path / "log")
        for unit in mine.units:
            rows = mine.rows(unit)
            cls, scores = scores_of(rows, 3)
            mine.commit(unit, Part(rows.astype(np.uint64), cls, scores + np.float32(1e-6) * number), [])

    in_threads(worker, 4)
    names = {log.record(unit)["file"] for unit in log.units}
    assert {path.name for path in (log.folder / "parts").iterdir()} >= names and len(names) == 10
    first = select(log, Rule(k=6), tmp_path / "a").info["rows_digest"]
    assert first == select(Log(tmp_path / "log"), Rule(k=6), tmp_path / "b").info["rows_digest"]


def test_a_committed_unit_is_never_replaced(tmp_path):
    log = fill(make_log(tmp_path / "log"))
    unit = log.units[0]
    before = log.read(unit)
    assert not log.commit(unit, Part(before.id_N, before.cls_NP, before.score_NP + 1), [])
    assert (log.read(unit).score_NP == before.score_NP).all()
    assert len(list((log.folder / "parts").iterdir())) == len(log.units), "what came second is not kept"


def test_a_changed_teacher_is_refused(tmp_path):
    fill(make_log(tmp_path / "log"))
    with pytest.raises(DataError, match="other work: teacher differs"):
        make_log(tmp_path / "log", teacher="b")
    with pytest.raises(DataError, match="p differs"):
        make_log(tmp_path / "log", p=2)
    assert make_log(tmp_path / "log").missing() == []


def test_a_damaged_unit_is_named_and_mended(tmp_path, wanted):
    log = fill(make_log(tmp_path / "log"))
    file = log.folder / "parts" / log.record(log.units[3])["file"]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="unit 00003 .* is damaged .*--mend"):
        select(log, Rule(k=6), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (log.folder / "units" / "00005.json").write_text('{"sha256": "0"}')
    assert log.mend() == ["00003", "00005"] and [u.name for u in log.missing()] == ["00003", "00005"]
    fill(log)
    select(log, Rule(k=6), tmp_path / "out")
    assert selection_bytes(tmp_path / "out") == wanted


def test_a_unit_of_another_log_is_refused(tmp_path):
    log, other = fill(make_log(tmp_path / "log")), fill(make_log(tmp_path / "other", teacher="b"))
    name = log.units[0].name
    shutil.copy(other.folder / "units" / f"{name}.json", log.folder / "units" / f"{name}.json")
    shutil.copy(other.folder / "parts" / other.record(other.units[0])["file"], log.folder / "parts")
    with pytest.raises(DataError, match="belongs to another log"):
        list(log.parts())


def test_an_incomplete_log_is_not_selected_from(tmp_path):
    log = make_log(tmp_path / "log")
    with pytest.raises(DataError, match="10 of 10 units are not scored yet"):
        select(log, Rule(k=6), tmp_path / "out")


def test_a_full_disk_commits_nothing(tmp_path, monkeypatch):
    log = make_log(tmp_path / "log")
    real = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DataError, match="the disk is full"):
        fill(log)
    monkeypatch.setattr(files.os, "fsync", real)
    assert len(log.missing()) == 10 and not list(log.folder.rglob("*.tmp"))
    fill(log)


def test_scores_that_cannot_be_ranked_go_to_the_bad_table(tmp_path):
    class Broken(Stub):
        def score(self, source, rows_N, p):
            cls, scores = scores_of(rows_N, p)
            scores[rows_N == 7] = np.nan
            scores[rows_N == 23, 1] = np.inf
            return cls, scores

    log = make_log(tmp_path / "log")
    score.work(log, Broken(), say=quiet)
    assert log.bad() == [(7, "scores are not finite"), (23, "scores are not finite")]
    made = select(log, Rule(k=100), tmp_path / "out")
    assert made.info["bad_images"] == 2 and made.info["pool"]["ranked"] == 45
    assert not np.isin([7, 23], made.columns("image_id")["image_id"]).any()

    class Hopeless(Stub):
        def score(self, source, rows_N, p):
            cls, scores = scores_of(rows_N, p)
            return cls, scores * np.float32(np.nan)

    with pytest.raises(DataError, match="all 5 images are not finite"):
        score.work(make_log(tmp_path / "other"), Hopeless(), say=quiet)


def test_images_that_cannot_be_decoded_are_counted(tmp_path, monkeypatch):
    class Source(NoSource):
        bad_row_ids = {4, 46}

    monkeypatch.setattr(score, "_open_pool", lambda log, scorer: Source())
    log = make_log(tmp_path / "log")
    assert score.work(log, Stub(), say=quiet).bad == 2
    assert log.bad() == [(4, "cannot be decoded"), (46, "cannot be decoded")]


def test_commit_checks_what_it_is_given(tmp_path):
    log = make_log(tmp_path / "log")
    rows = log.rows(log.units[0]).astype(np.uint64)
    cls, scores = scores_of(rows, 3)
    with pytest.raises(DataError, match="not finite"):
        log.commit(log.units[0], Part(rows, cls, scores * np.float32(np.nan)), [])
    with pytest.raises(DataError, match="are not the unit's 5 rows"):
        log.commit(log.units[0], Part(rows[:4], cls[:4], scores[:4]), [])
    with pytest.raises(DataError, match="do not fit"):
        log.commit(log.units[0], Part(rows, cls[:, :2], scores[:, :2]), [])
    with pytest.raises(DataError, match="p = 6"):
        make_log(tmp_path / "other", p=6)
    with pytest.raises(DataError, match="no scoring log"):
        Log(tmp_path / "nowhere")


# --- leases -----------------------------------------------------------------------------------------------------------------------


def claim_of(owner, beat=0):
    return json.dumps({**owner, "beat": beat})


def other_machine(**values):
    return {"host": "elsewhere", "boot": "x", "pid": 1, "token": "t", **values}


def test_a_lease_is_measured_by_the_watchers_own_clock(tmp_path, monkeypatch):
    """File times and clocks of other machines may be wrong by years: only change counts."""
    now = [1000.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: now[0])
    me = Claims(tmp_path, lease_s=10)
    claim = tmp_path / "u.claim"
    claim.write_text(claim_of(other_machine()))
    for skewed in (0, 4e9):
        os.utime(claim, (skewed, skewed))
        assert not me.take("u")
    now[0] += 9.9
    assert not me.take("u")
    claim.write_text(claim_of(other_machine(), beat=1))  # a sign of life: the watch starts again
    now[0] += 9.9
    assert not me.take("u")
    now[0] += 9.9
    assert not me.take("u")
    now[0] += 0.2
    assert me.take("u") and json.loads(claim.read_text())["token"] == me.owner["token"]


def test_a_dead_process_of_this_machine_is_given_up_at_once(tmp_path):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    me = Claims(tmp_path, lease_s=1000)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for its status yet
    (tmp_path / "z.claim").write_text(claim_of({**me.owner, "pid": pid, "token": "t"}))
    assert me.take("z")
    os.waitpid(pid, 0)
    (tmp_path / "u.claim").write_text(claim_of({**me.owner, "pid": pid, "token": "t"}))
    assert me.take("u")
    (tmp_path / "v.claim").write_text(claim_of({**me.owner, "pid": os.getppid(), "token": "t"}))
    assert not me.take("v"), "a living one is not"
    (tmp_path / "w.claim").write_text(claim_of({**me.owner, "host": "elsewhere", "pid": pid, "token": "t"}))
    assert not me.take("w"), "nor one of another machine with that number"
    (tmp_path / "x.claim").write_text("")
    assert not me.take("x"), "an unreadable claim is waited for like any other"


def test_a_claim_that_came_to_life_is_put_back(tmp_path, monkeypatch):
    """Between reading a stale claim and moving it, another worker has taken the unit over."""
    me = Claims(tmp_path, lease_s=0.01)
    claim = tmp_path / "u.claim"
    claim.write_text(claim_of(other_machine()))
    assert not me.take("u")
    time.sleep(0.02)
    fresh = claim_of(other_machine(token="fresh"))
    rename = os.rename
    monkeypatch.setattr(lease.os, "rename", lambda a, b: (claim.write_text(fresh), rename(a, b)))
    assert not me.take("u")
    assert claim.read_text() == fresh and [p.name for p in tmp_path.iterdir()] == ["u.claim"]


def test_only_one_of_many_takes_a_stale_claim(tmp_path):
    for number in range(20):
        (tmp_path / f"u{number}.claim").write_text(claim_of(other_machine()))
    taken = []

    def worker(_):
        with Claims(tmp_path, lease_s=0.05) as me:
            for _ in range(2):
                taken.extend(n for n in range(20) if me.take(f"u{n}"))
                time.sleep(0.06)
            time.sleep(0.1)

    in_threads(worker, 4)
    assert sorted(taken) == sorted(set(taken)) and len(taken) == 20


def test_a_claim_is_kept_alive_and_let_go(tmp_path):
    with Claims(tmp_path, lease_s=0.08) as me:
        assert me.take("u") and not Claims(tmp_path, lease_s=5).take("u")
        first = (tmp_path / "u.claim").read_text()
        time.sleep(0.15)
        assert json.loads((tmp_path / "u.claim").read_text())["beat"] > json.loads(first)["beat"]
        watcher = Claims(tmp_path, lease_s=0.08)
        watcher.owner["boot"] = "another"
        for _ in range(10):
            assert not watcher.take("u")
            time.sleep(0.02)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no lease"):
        Claims(tmp_path, lease_s=0)
