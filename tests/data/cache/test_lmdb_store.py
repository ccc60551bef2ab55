import multiprocessing
import os
import shutil
import threading

import pytest

from emf_lightning.data.cache.lmdb_store import LmdbStore

MB = 2**20


def put(store: LmdbStore, *pairs: tuple[bytes, bytes]) -> None:
    with store.transaction(write=True) as transaction:
        for key, value in pairs:
            transaction.put(key, value)


def get(store: LmdbStore, key: bytes) -> bytes | None:
    with store.transaction() as transaction:
        value = transaction.get(key)
        return None if value is None else bytes(value)


def in_a_fork(work, *args) -> None:
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_what_was_put_is_found_and_the_folder_is_made(tmp_path):
    store = LmdbStore(str(tmp_path / "a" / "b"), MB)
    store.open()
    put(store, (b"key", b"value"))
    assert get(store, b"key") == b"value"
    assert get(store, b"other") is None
    assert store.used() >= store.page_size() > 0


def test_an_exception_undoes_the_transaction(tmp_path):
    store = LmdbStore(str(tmp_path), MB)
    with pytest.raises(TypeError):
        put(store, (b"key", b"value"), ("text is no key", b""))
    assert get(store, b"key") is None


def test_two_stores_of_one_folder_in_one_process_share_it(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    small, large = LmdbStore(str(tmp_path / "folder"), MB), LmdbStore(str(tmp_path / "link"), 8 * MB)
    small.open()
    large.open()
    put(large, (b"key", b"x" * 4 * MB))  # the larger limit holds
    assert len(get(small, b"key")) == 4 * MB


def test_a_child_reads_and_writes_what_its_parent_has_open(tmp_path):
    store = LmdbStore(str(tmp_path), MB)
    put(store, (b"parent", b"1"))

    def child() -> None:
        assert get(store, b"parent") == b"1"
        put(store, (b"child", b"2"))

    in_a_fork(child)
    assert get(store, b"child") == b"2"
    put(store, (b"parent", b"3"))
    in_a_fork(lambda: put(store, (b"again", get(store, b"parent"))))
    assert get(store, b"again") == b"3"


def test_a_fork_waits_for_the_transactions_of_other_threads(tmp_path):
    store = LmdbStore(str(tmp_path), 64 * MB)
    store.open()
    stop = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for i in range(10**6):
                put(store, (b"%d" % (i % 50), os.urandom(50_000)))
                if stop.is_set():
                    return
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    for i in range(10):
        in_a_fork(lambda i=i: put(store, (b"child %d" % i, b"1")))
    stop.set()
    thread.join(60)
    assert not failures
    assert all(get(store, b"child %d" % i) == b"1" for i in range(10))


def test_growth_by_a_process_that_is_allowed_more_is_followed(tmp_path):
    store = LmdbStore(str(tmp_path), MB)
    put(store, (b"key", b"value"))
    # Opened anew in the child only: the parent's own map stays small until it must follow.
    ready, done = multiprocessing.Event(), multiprocessing.Event()

    def child() -> None:
        ready.wait(60)
        put(LmdbStore(str(tmp_path), 16 * MB), (b"large", b"x" * 8 * MB))
        done.set()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert get(store, b"key") == b"value"  # opens it here, after the fork
    ready.set()
    assert done.wait(60)
    process.join(60)
    assert len(get(store, b"large")) == 8 * MB
    put(store, (b"more", b"y"))
    assert get(store, b"more") == b"y"


def test_a_folder_that_was_deleted_is_made_anew(tmp_path):
    store = LmdbStore(str(tmp_path / "folder"), MB)
    put(store, (b"key", b"value"))
    shutil.rmtree(tmp_path / "folder")
    store.open()
    assert get(store, b"key") is None
    put(store, (b"key", b"new"))
    assert (tmp_path / "folder" / "data.mdb").exists()


def test_a_folder_is_not_begun_on_a_full_disk_but_read_there(tmp_path, monkeypatch):
    store = LmdbStore(str(tmp_path / "there"), MB)
    put(store, (b"key", b"value"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 65_536}))
    with pytest.raises(ValueError, match=r"no room on the disk of '.*new' \(65,536 bytes\)"):
        LmdbStore(str(tmp_path / "new"), MB).open()
    store.open()
    assert get(store, b"key") == b"value"


def test_a_path_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ValueError, match=f"cannot write to the folder '{path}'.*choose another path"):
            LmdbStore(str(path), MB).open()


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "data.mdb").write_bytes(b"something else" * 10_000)
    with pytest.raises(ValueError, match=f"'{tmp_path}' holds no LMDB file.*delete it"):
        LmdbStore(str(tmp_path), MB).open()


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    def child() -> None:
        put(LmdbStore(str(tmp_path), MB), *((b"%d" % i, bytes(10_000)) for i in range(50)))

    in_a_fork(child)
    LmdbStore(str(tmp_path), MB).open()
    in_a_fork(lambda: None)  # closes it here
    os.truncate(tmp_path / "data.mdb", 300_000)
    with pytest.raises(ValueError, match=r"was cut short \(300,000 of .*delete it"):
        LmdbStore(str(tmp_path), MB).open()


def test_a_link_and_a_folder_that_others_have_replaced_are_followed(tmp_path):
    def write(folder: str, value: bytes) -> None:
        in_a_fork(lambda: put(LmdbStore(str(tmp_path / folder), MB), (b"key", value)))

    for name in ("a", "b", "c"):
        write(name, name.encode())
    link = LmdbStore(str(tmp_path / "link"), MB)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert get(link, b"key") == b"a"
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert get(link, b"key") == b"b"
    put(link, (b"key", b"new"))
    assert get(LmdbStore(str(tmp_path / "b"), MB), b"key") == b"new"
    assert get(LmdbStore(str(tmp_path / "a"), MB), b"key") == b"a"
    (tmp_path / "b").rename(tmp_path / "old")
    (tmp_path / "c").rename(tmp_path / "b")
    assert get(link, b"key") == b"c"
    assert get(LmdbStore(str(tmp_path / "old"), MB), b"key") == b"new"


def test_a_relative_path_is_that_of_the_working_directory(tmp_path, monkeypatch):
    store = LmdbStore("cache", MB)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert get(store, b"key") is None
        put(store, (b"key", name.encode()))
    for name in ("a", "b"):
        monkeypatch.chdir(tmp_path / name)
        assert get(store, b"key") == name.encode()


def test_a_child_follows_a_folder_that_was_replaced_before_and_after_the_fork(tmp_path):
    store = LmdbStore(str(tmp_path / "folder"), MB)
    put(store, (b"key", b"1"))

    def child() -> None:
        assert get(store, b"key") == b"1"
        shutil.rmtree(tmp_path / "folder")
        assert get(store, b"key") is None
        put(store, (b"key", b"2"))

    in_a_fork(child)
    assert get(store, b"key") == b"2"


def test_many_replaced_folders_leave_no_file_open(tmp_path):
    store = LmdbStore(str(tmp_path / "folder"), MB)
    put(store, (b"key", b"0"))
    before = len(os.listdir("/dev/fd"))
    for number in range(20):
        shutil.rmtree(tmp_path / "folder")
        assert get(store, b"key") is None
        put(store, (b"key", b"%d" % number))
    assert len(os.listdir("/dev/fd")) == before
