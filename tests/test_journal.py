"""The journal of a study: whatever byte of it is lost, the copy beside it has it."""

import contextlib
import json
import multiprocessing
import random

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from core.errors import StorageError, UserError
from core.run_names import JOURNAL_COPY
from distributed.run.journal import Journal, copy_of, mend_journal
from distributed.run.working_copy import DAMAGED
from distributed.search.study import together


def study_in(journal):
    storage = JournalStorage(Journal(journal))
    return optuna.create_study(storage=storage, study_name="brainsweep", load_if_exists=True)


def ask_once(journal):
    study_in(journal).ask()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_line_torn_off_anywhere_costs_that_line_alone(tmp_path, kept):
    journal = tmp_path / "study.journal"
    study = study_in(journal)
    for value in (1.0, 2.0):
        study.tell(study.ask(), value)
    whole = journal.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    journal.write_bytes(whole[: -len(last)] + last[: max(1, int(kept * len(last)) - 1)])

    copy_of(journal).unlink()  # as in runs of 0.2 and before
    (note,) = mend_journal(journal)
    assert note.startswith(f"{max(1, int(kept * len(last)) - 1)} bytes of half a line")
    resumed = study_in(journal)
    resumed.tell(1, 2.0)  # the value that was torn off
    resumed.tell(resumed.ask(), 3.0)
    assert [trial.value for trial in study_in(journal).trials] == [1.0, 2.0, 3.0]
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())
    assert mend_journal(journal) == []


def test_unmended_the_study_could_be_read_no_more(tmp_path):
    """Why `mend_journal` is there: Optuna would append to the half line, and we refuse to."""
    journal = tmp_path / "study.journal"
    study_in(journal).tell(study_in(journal).ask(), 1.0)
    journal.write_bytes(journal.read_bytes() + b'{"op_code":6,')
    with pytest.raises(StorageError, match="another process has written"):
        ask_once(journal)


def test_the_lock_of_a_writer_killed_in_a_folder_since_moved_is_cleared(tmp_path):
    (tmp_path / "here").mkdir()
    journal = tmp_path / "here" / "study.journal"
    ask_once(journal)
    (tmp_path / "here" / "study.journal.lock").symlink_to(journal)  # as Optuna makes it
    moved = (tmp_path / "here").rename(tmp_path / "there") / "study.journal"

    process = multiprocessing.get_context("fork").Process(target=ask_once, args=(moved,))
    mend_journal(moved)
    process.start()
    process.join(20)
    waits = process.is_alive()
    process.kill()
    assert not waits
    assert len(study_in(moved).trials) == 2


@pytest.fixture
def written(tmp_path):
    """A journal of two studies, which two storages write in turn, as the search and its baseline do."""
    journal = tmp_path / "study.journal"
    one = study_in(journal)
    other = optuna.create_study(storage=JournalStorage(Journal(journal)), study_name="l1-baseline")
    for value in range(4):
        one.tell(one.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), float(value))
        other.tell(other.ask(), float(value))
    return journal


def values_in(journal):
    """Read by Optuna itself."""
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return [trial.value for trial in optuna.load_study(study_name="brainsweep", storage=storage).trials]


def test_the_copy_has_every_line_of_every_storage(written):
    lines = copy_of(written).read_bytes().splitlines()
    assert [line[9:] for line in lines] == written.read_bytes().splitlines()
    assert mend_journal(written) == []


def test_any_byte_may_flip_in_either_file(written):
    whole, copied = written.read_bytes(), copy_of(written).read_bytes()
    random.seed(0)
    for file, content in ((written, whole), (copy_of(written), copied)):
        for place in random.sample(range(len(content)), 60):
            flipped = bytes([content[place] ^ 1 << random.randrange(8)])
            file.write_bytes(content[:place] + flipped + content[place + 1 :])
            notes = mend_journal(written)
            assert written.read_bytes() == whole
            assert copy_of(written).read_bytes() == copied
            assert notes == (
                [f"study.journal was damaged, and was made again from {JOURNAL_COPY}"]
                if file is written
                else []
            )
    assert values_in(written) == [0.0, 1.0, 2.0, 3.0]
    assert (written.parent / f"study.journal{DAMAGED}").exists()


def test_the_end_of_either_file_may_be_lost(written):
    whole, copied = written.read_bytes(), copy_of(written).read_bytes()
    for kept in (0, 1, 500, len(whole) - 1):
        written.write_bytes(whole[:kept])
        lost = whole.count(b"\n") - whole[:kept].count(b"\n")
        assert mend_journal(written) == [
            f"study.journal had lost its last {lost} lines, and they were taken from {JOURNAL_COPY}"
        ]
        assert written.read_bytes() == whole
        copy_of(written).write_bytes(copied[:kept])
        assert mend_journal(written) == []
        assert copy_of(written).read_bytes() == copied
    copy_of(written).unlink()
    assert mend_journal(written) == []
    assert copy_of(written).read_bytes() == copied


def test_a_line_that_is_damaged_in_both_is_named_and_nothing_is_touched(written):
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join([*lines[:3], lines[3].replace(b"{", b"(", 1), *lines[4:]]))
    copy_of(written).unlink()
    before = written.read_bytes()
    with pytest.raises(UserError, match=r"line 4 of .*study.journal is damaged .*from a backup"):
        mend_journal(written)
    assert written.read_bytes() == before


def test_after_mending_the_study_goes_on_and_is_copied(written):
    whole = written.read_bytes()
    written.write_bytes(whole[: len(whole) // 2])
    mend_journal(written)
    study = study_in(written)
    study.tell(study.ask(), 9.0)
    assert values_in(written) == [0.0, 1.0, 2.0, 3.0, 9.0]
    assert [
        line[9:] for line in copy_of(written).read_bytes().splitlines()
    ] == written.read_bytes().splitlines()


def test_a_journal_that_cannot_be_written_is_the_storages_fault(written, monkeypatch):
    study = study_in(written)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        study.ask()


def test_no_link_is_made_because_some_storage_has_none(tmp_path, monkeypatch):
    def no_links(*paths, **more):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.symlink", no_links)
    study = study_in(tmp_path / "study.journal")
    study.tell(study.ask(), 1.0)
    assert values_in(tmp_path / "study.journal") == [1.0]


def told(study, value):
    trial = study.ask()
    trial.set_user_attr("told", value)
    trial.suggest_float("x", 0, 1)
    study.tell(trial, value)


def test_what_is_told_together_is_one_write_and_is_read_before_and_after(written, monkeypatch):
    study, plain = study_in(written), study_in(written)
    syncs = []
    monkeypatch.setattr("os.fsync", syncs.append)
    before = written.read_bytes()
    with together(study):
        told(study, 5.0)
        told(study, 6.0)
        assert [trial.value for trial in study.trials][-2:] == [5.0, 6.0]
        assert written.read_bytes() == before  # a process that ends here has told nothing
    assert len(syncs) == 1
    told(study, 7.0)
    assert values_in(written)[-3:] == [5.0, 6.0, 7.0] == [trial.value for trial in plain.trials][-3:]
    assert mend_journal(written) == []
    with contextlib.suppress(KeyError), together(study):
        told(study, 8.0)
        raise KeyError
    assert values_in(written)[-1] == 8.0 == study.trials[-1].value  # the study in memory knows it


def test_what_others_have_written_stands_before_what_is_told_together(written):
    study, dashboard = study_in(written), study_in(written)
    told(dashboard, 5.0)
    with together(study):
        told(study, 6.0)
    told(dashboard, 7.0)
    assert [trial.value for trial in study.trials][-3:] == values_in(written)[-3:] == [5.0, 6.0, 7.0]
    numbers = [trial.number for trial in study.trials]
    assert numbers == list(range(len(numbers)))


def test_a_journal_that_another_process_has_written_to_meanwhile_is_not_continued(written):
    """Optuna takes a lock away that was held for half a minute."""
    study, other = study_in(written), study_in(written)

    def interrupted():
        with together(study):
            told(study, 5.0)
            written.with_name(f"{written.name}.lock").unlink()
            told(other, 6.0)

    with pytest.raises(StorageError, match="another process has"):
        interrupted()
    assert values_in(written)[-1] == 6.0
