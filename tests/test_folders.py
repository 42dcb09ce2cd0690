"""Files and folders are complete or absent, whatever other processes write, read or kill, and after power cuts."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import threading
from pathlib import Path

import pytest
import torch
from test_files import CONFIG, HIDDEN, VOCAB, elsewhere, flip, linux, memory, same, saved  # noqa: F401

from engram import EngramConfig, EngramMemory, TokenMap, build_optimizer
from engram.lm.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from engram.memory.saved import _check_some_blocks
from engram.memory.saved_manifest import read_manifest
from engram.storage import files, folders, locks
from engram.storage.files import NotSynced, write_whole, zero_digest
from engram.storage.folders import Replaced, pinned_folder, read_folder, whole_folder
from engram.storage.manifest import verify
from engram.storage.partial import remove_partial


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Readers beside writers.

RACE = """
torch.set_num_threads(1)
folder, memories, counts = Path(sys.argv[1]), [memory(seed, rows=100 + seed) for seed in range(3)], {}
memories[0].save(folder)
if (writer := os.fork()) == 0:
    for i in range(10**6):
        memories[i % 3].save(folder, overwrite=True)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    if sys.argv[2] == "verify":
        found = "whole" if all(result["problem"] is None for result in verify(folder)) else "damaged"
    else:
        loaded = EngramMemory.load(folder, sys.argv[2])
        found = "whole" if any(same(loaded, m) for m in memories) else "mixed"
    counts[found] = counts.get(found, 0) + 1
os.kill(writer, signal.SIGKILL)
os.waitpid(writer, 0)
memories[0].save(folder, overwrite=True)
print(list(counts), [p.name for p in folder.parent.iterdir()])
"""


@linux
@pytest.mark.parametrize("how", ["copy", "shared", "verify"])
def test_a_memory_that_is_read_beside_an_overwriting_process_is_the_old_one_or_the_new(how, tmp_path, elsewhere):  # noqa: F811
    _, out = elsewhere(RACE, tmp_path / "memory", how)
    assert out == "['whole'] ['memory']\n"


def replace_once(monkeypatch, where: str, write) -> list[int]:
    """Call write() once, just before the next call of the function `where`."""
    module, name = where.rsplit(".", 1)
    real, done = getattr(__import__(module, fromlist=[name]), name), list[int]()

    def slow(*args, **kwargs):
        if not done:
            done.append(1)
            write()
        return real(*args, **kwargs)

    monkeypatch.setattr(where, slow)
    return done


def without(what: str, monkeypatch) -> None:
    """Imitate a system that lacks locks on folders, paths of descriptors, or both."""
    if "locks" in what:
        import fcntl

        real = fcntl.flock

        def flock(handle, how):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(errno.ENOLCK, "No locks available")
            real(handle, how)

        monkeypatch.setattr(fcntl, "flock", flock)
    if "/proc" in what:
        monkeypatch.setattr(folders, "_open_folder", lambda folder: None)


@pytest.mark.parametrize("system", ["as it is", "no locks", "no /proc", "no locks, no /proc"])
@pytest.mark.parametrize(
    "where", ["engram.memory.saved.file_digest", "engram.memory.saved._open", "safetensors.torch.load_file"]
)
@pytest.mark.parametrize("mode", ["copy", "shared"])
def test_a_memory_that_is_replaced_while_it_is_read_is_never_mixed(saved, monkeypatch, system, where, mode):  # noqa: F811
    other = memory(seed=1, rows=300)
    without(system, monkeypatch)
    done = replace_once(monkeypatch, where, lambda: other.save(saved, overwrite=True))
    loaded = EngramMemory.load(saved, mode)
    assert done and (same(loaded, other) or same(loaded, memory()))
    assert loaded.tables[1].path in (None, saved / "layer-1.rows")
    assert names(saved.parent) == ["memory"] or "/proc" in system
    other.save(saved, overwrite=True)
    assert names(saved.parent) == ["memory"]


def test_a_copy_into_files_starts_again_if_its_source_was_replaced(saved, tmp_path, monkeypatch):  # noqa: F811
    without("no locks", monkeypatch)
    other = memory(seed=1)
    done = replace_once(monkeypatch, "safetensors.torch.load_file", lambda: other.save(saved, overwrite=True))
    loaded = EngramMemory.load(saved, rows_in=tmp_path / "work")
    assert done and same(loaded, other)
    loaded.close()


def test_a_folder_that_is_replaced_each_time_is_an_error_that_names_the_reason(saved, monkeypatch):  # noqa: F811
    without("no locks", monkeypatch)
    m, tries = memory(), []

    def read(path: Path) -> bytes:
        tries.append(path)
        m.save(saved, overwrite=True)
        return (path / "config.json").read_bytes()

    with pytest.raises(Replaced, match=rf"{saved} was replaced or removed by another process while it was read"):
        read_folder(saved, read)
    assert 10 < len(tries) < 100


@pytest.mark.parametrize("damage", ["flip", "missing", "config"])
def test_real_damage_is_refused_at_once_with_the_folders_own_name(saved, monkeypatch, damage):  # noqa: F811
    tried = []
    monkeypatch.setattr("engram.memory.saved.read_manifest", lambda home: tried.append(home) or read_manifest(home))
    if damage == "flip":
        flip(saved / "layer-3.rows", 40)
    elif damage == "missing":
        (saved / "layer-3.rows").unlink()
    else:
        (saved / "config.json").write_bytes(b"\xff" + (saved / "config.json").read_bytes()[1:])
    for mode in ("copy", "shared"):
        with pytest.raises(ValueError, match=re.escape(str(saved))) as error:
            EngramMemory.load(saved, mode)
        assert "/proc/" not in str(error.value)
    assert len(tried) == 2
    assert not any("/proc/" in str(result) for result in verify(saved))


@linux
def test_readers_keep_a_replaced_folder_until_the_last_of_them_ends(saved, tmp_path):  # noqa: F811
    kept = (saved / "layer-1.rows").read_bytes()
    with pinned_folder(saved) as first:
        with pinned_folder(saved) as second:
            memory(seed=1).save(saved, overwrite=True)
            assert (first / "layer-1.rows").read_bytes() == (second / "layer-1.rows").read_bytes() == kept
        assert (first / "layer-1.rows").read_bytes() == kept
        memory(seed=2).save(saved, overwrite=True)
        assert (first / "layer-1.rows").read_bytes() == kept
    assert names(tmp_path) == ["memory"]


@linux
def test_a_pinned_folder_that_is_deleted_by_hand_is_reported(saved):  # noqa: F811
    with pytest.raises(Replaced, match="removed"), pinned_folder(saved) as path:
        for file in saved.iterdir():
            file.unlink()
        saved.rmdir()
        (path / "config.json").read_bytes()


@pytest.mark.parametrize("system", ["as it is", "no locks"])
def test_a_checkpoint_that_is_rewritten_while_it_is_read_is_not_mixed(tmp_path, monkeypatch, system):
    one, two, into = (memory(seed) for seed in range(3))
    step = save_checkpoint(tmp_path, one, build_optimizer(one), 1, {"text": "one"})
    without(system, monkeypatch)

    def write():
        save_checkpoint(tmp_path, two, build_optimizer(two), 1, {"text": "two"})

    for where in ("engram.lm.checkpoint.read_rows", "safetensors.torch.load_file"):
        done = replace_once(monkeypatch, where, write)
        manifest = load_checkpoint(step, into)
        assert done and same(into, {"one": one, "two": two}[manifest["facts"]["text"]])
        monkeypatch.undo()
        save_checkpoint(tmp_path, one, build_optimizer(one), 1, {"text": "one"})
        without(system, monkeypatch)


@linux
def test_a_checkpoint_that_keep_removes_stays_until_its_reader_ends(tmp_path):
    m = memory()
    step = save_checkpoint(tmp_path, m, build_optimizer(m), 1, {})
    with pinned_folder(step) as path:
        save_checkpoint(tmp_path, m, build_optimizer(m), 2, {}, keep=1)
        assert (path / "tables.1.rows").stat().st_size and names(tmp_path)[-1] == "step-00000002"
    assert names(tmp_path) == ["step-00000002"]


def test_a_reader_waits_while_a_writer_is_between_its_two_renames(saved, monkeypatch):  # noqa: F811
    old = saved.parent / ".memory.old-abc_123"
    old.mkdir()
    os.rename(saved, old / "memory")
    threading.Timer(0.1, lambda: os.rename(old / "memory", saved)).start()
    assert same(EngramMemory.load(saved), memory())


# Which blocks a shared memory checks.


def checked(blocks: list[str], count: int | None = None) -> list[int]:
    """Return the numbers of the blocks that are read of a file with these digests, in blocks of 100 bytes."""
    size = 100 * len(blocks) if count is None else count
    entry = {"bytes": size, "xxh3_128": "", "blocks": blocks}
    found: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", 100)
        patch.setattr("engram.memory.saved.bad_blocks", lambda path, entry, only: found.extend(only))
        _check_some_blocks(Path("home"), {"tables": {"1": {"file": "rows"}}, "files": {"rows": entry}})
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7])
def test_without_holes_the_first_the_middle_and_the_last_block_are_checked(count):
    assert checked([f"digest {i}" for i in range(count)]) == sorted({0, count // 2, count - 1})
    assert checked(["the same"] * count) == sorted({0, count // 2, count - 1})


def test_holes_are_left_out_by_their_digest_whatever_is_most_common():
    hole, last = zero_digest(100), zero_digest(30)
    assert checked([hole, "a", hole, "b", "c", hole]) == [1, 3, 4]
    assert checked(["a", hole, "a", "a", last], 430) == [0, 2, 3]
    assert checked([hole, "a", "a", "b", "b", "b", hole]) == [1, 3, 5]
    assert checked([hole, hole, last], 230) == [0, 1, 2], "nothing was written: the holes must be holes"
    assert checked(["x", last], 130) == [0]


def test_choosing_blocks_takes_time_in_proportion_to_their_number():
    digests = [f"digest {i}" for i in range(200_000)]  # 3 TiB; comparing each with each would take minutes
    assert checked(digests) == [0, 100_000, 199_999]


def test_a_flipped_byte_in_any_of_the_checked_blocks_is_refused(tmp_path):
    config = CONFIG.replace(layers=(1,), rows_per_head=200_003, table_init="zero")
    m = memory(config=config)
    m.tables[1].write(torch.arange(m.tables[1].rows), torch.randn(m.tables[1].rows, 8))
    home = m.save(tmp_path / "memory")
    for block in (0, 1):
        flip(home / "layer-1.rows", block * files.BLOCK + 77)
        with pytest.raises(ValueError, match=f"block {block} of 2 does not have its digest"):
            EngramMemory.load(home, "shared")
        flip(home / "layer-1.rows", block * files.BLOCK + 77)
    EngramMemory.load(home, "shared")


# Writers beside writers.


@linux
def test_processes_that_save_over_each_other_all_succeed(tmp_path, elsewhere):  # noqa: F811
    code = """
torch.set_num_threads(1)
folder, m = Path(sys.argv[1]), memory()
children = []
for _ in range(3):
    if (child := os.fork()) == 0:
        end, count = time.monotonic() + 1.0, 0
        while time.monotonic() < end or count < 5:
            m.save(folder, overwrite=True)
            count += 1
        os._exit(0)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children], same(m, EngramMemory.load(folder)), os.listdir(folder.parent))
"""
    _, out = elsewhere(code, tmp_path / "memory")
    assert out == "[0, 0, 0] True ['memory']\n"


@pytest.mark.parametrize("moment", ["before the lock", "locked", "removed under the lock"])
def test_a_folder_that_another_writer_took_for_a_leftover_is_made_again(tmp_path, monkeypatch, moment):
    hold, taken = locks.open_locked, []

    def raced(path):
        if taken or not path.name.startswith(".new.partial"):
            return hold(path)
        taken.append(path)
        if moment == "before the lock":
            path.rmdir()
        elif moment == "locked":
            raise BlockingIOError(errno.EWOULDBLOCK, "held")
        handle = hold(path)
        path.rmdir()
        return handle

    monkeypatch.setattr("engram.storage.partial.open_locked", raced)
    with whole_folder(tmp_path / "new", overwrite=False) as partial:
        (partial / "file").write_text("text")
    assert taken and (tmp_path / "new" / "file").read_text() == "text"


def test_a_target_that_another_writer_makes_first_is_replaced_or_refused(tmp_path):
    for overwrite in (True, False):
        target = tmp_path / str(overwrite)
        rename: list[int] = []

        def late(a, b, target=target, rename=rename, real=os.rename):
            if not rename:
                rename.append(1)
                target.mkdir()
                (target / "theirs").write_text("")
            real(a, b)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "rename", late)
            try:
                with whole_folder(target, overwrite) as partial:
                    (partial / "ours").write_text("")
            except FileExistsError as error:
                assert not overwrite and "give a new folder" in str(error)
        assert names(target) == (["ours"] if overwrite else ["theirs"])
    assert names(tmp_path) == ["False", "True"]


# Power loss: everything is on the disk before it has its name.


@pytest.fixture
def synced(monkeypatch) -> set[tuple[int, int]]:
    """Set of the files and folders that were synced, as (device, inode)."""
    found, fsync = set(), os.fsync

    def record(handle):
        status = os.fstat(handle)
        found.add((status.st_dev, status.st_ino))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    return found


def unsynced(folder: Path, synced: set[tuple[int, int]]) -> list[str]:
    every = [folder.parent, folder, *folder.rglob("*")]
    return [str(p) for p in every if (p.stat().st_dev, p.stat().st_ino) not in synced]


def test_every_file_of_a_folder_is_synced_with_its_name(tmp_path, synced):
    m = memory(config=CONFIG.replace(head_dim=32, table_init="zero"))
    step = save_checkpoint(tmp_path / "run", m, build_optimizer(m), 1, {})
    m.encode_tables("pq4", tmp_path / "encoded")
    home = m.save(tmp_path / "memory")
    with whole_folder(tmp_path / "deep", overwrite=False) as partial:
        (partial / "a" / "b").mkdir(parents=True)
        (partial / "a" / "b" / "file").write_text("text")
    for folder in (step, home, tmp_path / "encoded", tmp_path / "deep"):
        assert unsynced(folder, synced) == []


def test_single_files_are_synced_with_their_names(tmp_path, synced):
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
    write_whole(tmp_path / "one" / "file", b"text")
    TokenMap.identity(9).save(tmp_path / "two" / "map")
    EngramMemory(CONFIG, TokenMap.identity(VOCAB), HIDDEN, folder=tmp_path / "three").close()
    for folder in ("one", "two", "three"):
        assert unsynced(tmp_path / folder, synced) in ([], [str(tmp_path)])


@pytest.mark.parametrize("old", [True, False])
def test_a_complete_folder_whose_name_the_disk_did_not_confirm_is_reported(tmp_path, monkeypatch, old):
    target, fsync = tmp_path / "memory", os.fsync
    if old:
        memory().save(target)
    parent = os.stat(tmp_path).st_ino

    def broken(handle):
        if os.fstat(handle).st_ino == parent:
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(NotSynced, match=r"memory is complete, and what it replaced.*Input/output error") as error:
        memory(seed=1).save(target, overwrite=True)
    assert "half-written" not in str(error.value)
    assert same(EngramMemory.load(target), memory(seed=1)) and names(tmp_path) == ["memory"]
    m = memory()
    with pytest.raises(NotSynced, match=r"step-00000001 is complete, and"):
        parent = os.stat(tmp_path / "memory").st_ino
        save_checkpoint(tmp_path / "memory", m, build_optimizer(m), 1, {})
    assert checkpoints(tmp_path / "memory")
    parent = os.stat(tmp_path).st_ino
    with pytest.raises(NotSynced, match="file is complete, and"):
        write_whole(tmp_path / "file", b"text")
    assert (tmp_path / "file").read_bytes() == b"text"


@pytest.mark.parametrize("what", ["saved", "replaced", "encoded"])
def test_a_folder_is_removed_if_the_disk_did_not_confirm_a_file_in_it(tmp_path, monkeypatch, what):
    m, old, fsync = memory(config=CONFIG.replace(head_dim=32, table_init="zero")), memory(seed=1), os.fsync
    if what == "replaced":
        old.save(tmp_path / "memory")

    def broken(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=r"Nothing half-written was left|did not confirm") as error:
        m.encode_tables("pq4", tmp_path) if what == "encoded" else m.save(tmp_path / "memory", overwrite=True)
    assert not isinstance(error.value, NotSynced)
    assert names(tmp_path) == (["memory"] if what == "replaced" else [])
    assert what != "replaced" or same(EngramMemory.load(tmp_path / "memory"), old)


def test_a_file_that_cannot_be_synced_does_not_get_its_name(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"old")

    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "file", b"new")
    with pytest.raises(OSError, match=r"could not save the memory.*Nothing half-written was left"):
        memory().save(tmp_path / "memory")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"


@linux
def test_a_system_that_cannot_sync_read_only_descriptors_or_folders_can_save(tmp_path, monkeypatch):
    import fcntl

    real_fsync = os.fsync

    def syncing(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", syncing)
    assert same(EngramMemory.load(memory().save(tmp_path / "memory")), memory())
    write_whole(tmp_path / "file", b"text")
    m = memory()
    save_checkpoint(tmp_path / "run", m, build_optimizer(m), 1, {})


# Names.


@pytest.mark.parametrize("name", ["a[b]", "a**b", "*", "a?b", "[!a]", "plain", "a.partial-1-1"])
def test_leftovers_are_removed_by_their_exact_name(tmp_path, name):
    mine = [f".{name}.partial-12-345", f".{name}.partial-12"]
    others = [f".{name}.partial-notes", f".{name}.partial-12-345-mine", f"{name}.partial-1-2", ".ab.partial-1-1"]
    for left in mine + others:
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_text("")
    (tmp_path / f".{name}.partial-77-77").write_text("a file, as older versions left them")
    memory().save(tmp_path / name)
    assert names(tmp_path) == sorted([*others, name])
    assert same(EngramMemory.load(tmp_path / name), memory())
    memory(seed=1).save(tmp_path / name, overwrite=True)
    assert names(tmp_path) == sorted([*others, name])


@pytest.mark.parametrize("name", ["a[b]", "a**b", "*"])
def test_the_old_folder_of_a_cut_save_is_named_whatever_its_name(tmp_path, name):
    (tmp_path / f".{name}.old-abcd_123").mkdir()
    memory().save(tmp_path / "memory")
    os.rename(tmp_path / "memory", tmp_path / f".{name}.old-abcd_123" / name)
    with pytest.raises(FileNotFoundError, match=r"a save was cut short: rename .*\.old-abcd_123"):
        EngramMemory.load(tmp_path / name)


def test_leftovers_of_a_run_are_removed_and_a_users_folders_stay(tmp_path):
    for left in (
        ".step-00000007.partial-1-1",
        ".step-00000003.partial-1",
        ".step-best.partial-notes",
        ".step-x.partial-1-1",
    ):
        (tmp_path / left).mkdir()
    m = memory()
    save_checkpoint(tmp_path, m, build_optimizer(m), 1, {})
    assert names(tmp_path) == [".step-best.partial-notes", ".step-x.partial-1-1", "step-00000001"]


@linux
def test_a_leftover_that_a_running_process_has_locked_stays(tmp_path):
    held = tmp_path / ".new.partial-1-1"
    held.mkdir()
    handle = locks.open_locked(held)
    assert handle is not None
    remove_partial(tmp_path, "new")
    assert held.exists()
    os.close(handle)
    remove_partial(tmp_path, "new")
    assert not held.exists()


# Names that somebody else put there.


def test_links_at_predictable_names_are_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "shared").mkdir()
    clock = iter(range(10**6))
    monkeypatch.setattr("engram.storage.partial.time.time_ns", lambda: next(clock))
    for number in range(3):
        for name in ("file", "rows.json", "map"):
            (tmp_path / "shared" / f".{name}.partial-{os.getpid()}-{number}").symlink_to(victim)
    for name in ("file", "rows.json", "map"):
        for old in (f".{name}.{os.getpid()}.tmp", f"{name}.{os.getpid()}.tmp"):
            (tmp_path / "shared" / old).symlink_to(victim)
    write_whole(tmp_path / "shared" / "file", b"text")
    TokenMap.identity(9).save(tmp_path / "shared" / "map")
    EngramMemory(CONFIG, TokenMap.identity(VOCAB), HIDDEN, folder=tmp_path / "shared").close()
    assert victim.read_text() == "precious"
    assert (tmp_path / "shared" / "file").read_bytes() == b"text"
    assert not any((tmp_path / "shared" / name).is_symlink() for name in ("file", "rows.json", "map"))


def test_a_file_has_the_mode_of_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            write_whole(tmp_path / "file", b"text")
            TokenMap.identity(9).save(tmp_path / "map")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
        assert stat.S_IMODE((tmp_path / "map").stat().st_mode) == mode


def test_a_file_written_to_the_name_of_a_link_replaces_only_the_link(tmp_path):
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    write_whole(tmp_path / "file", b"text")
    assert (tmp_path / "elsewhere").read_text() == "precious" and not (tmp_path / "file").is_symlink()


# Encoded tables: rows and codebooks come together, and what a killed or failed encoder leaves is cleared.

SMALL_DISK = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = CONFIG.replace(head_dim=32, table_init="zero")
m, folder = memory(config=config), Path(sys.argv[1])
def attempt(codec, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        m.encode_tables(codec, folder)
    except Exception as error:
        print(type(error).__name__, m.codec, os.listdir(folder))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for limit in (100, 5_000, 20_000):  # nothing fits; rows alone; rows and half the codebooks
    attempt(sys.argv[2], limit)
m.encode_tables(sys.argv[2], folder)
print(sorted(os.listdir(folder)))
"""


@linux
@pytest.mark.parametrize("codec", ["pq4", "pq8", "fp8", "int4"])
def test_an_encoder_that_ran_out_of_space_can_try_again(tmp_path, elsewhere, codec):  # noqa: F811
    status, out = elsewhere(SMALL_DISK, tmp_path, codec)
    *failed, last = out.splitlines()
    assert status == 0 and failed and set(failed) == {"OSError None []"}, out
    books = [f"layer-{layer}.{codec}.codebooks" for layer in (1, 3)] if codec.startswith("pq") else []
    assert last == str(sorted([*books, *(f"layer-{layer}.{codec}" for layer in (1, 3))]))


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("mmap.mmap", errno.ENOMEM),
        ("os.open", errno.EMFILE),
        ("os.open", errno.ENOSPC),
        ("os.fsync", errno.EIO),
        ("os.replace", errno.EIO),
    ],
)
def test_an_encoder_that_meets_an_error_anywhere_leaves_nothing_and_can_try_again(tmp_path, where, number):
    module, name = where.split(".")
    m, real = memory(config=CONFIG.replace(head_dim=32, table_init="zero")), getattr(__import__(module), name)
    for fails_at in range(0, 60, 3):
        calls = []

        def broken(*args, fails_at=fails_at, calls=calls, **kwargs):
            calls.append(1)
            if len(calls) == fails_at + 1:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"engram.storage.mapping.mmap.{name}" if module == "mmap" else where, broken)
            try:
                m.encode_tables("pq4", tmp_path)
                break
            except OSError:
                assert m.codec is None
        assert all(".partial-" in left for left in names(tmp_path)), "the error came while leftovers were removed"
    if m.codec is None:
        m.encode_tables("pq4", tmp_path)
    expected = sorted(f"layer-{layer}.pq4{books}" for layer in (1, 3) for books in ("", ".codebooks"))
    assert [left for left in names(tmp_path) if ".partial-" not in left] == expected


@linux
def test_files_of_a_killed_encoder_or_gguf_writer_are_removed_by_the_next(tmp_path, elsewhere):  # noqa: F811
    code = """
from engram.integrations.formats import convert
config = CONFIG.replace(head_dim=32, table_init="zero")
m, folder = memory(config=config), Path(sys.argv[1])
m.save(folder / "memory")
def killed(work, *names):
    import engram.tables.encoded, engram.integrations.formats.conversion
    if (child := os.fork()) == 0:
        for module in (engram.tables.encoded, engram.integrations.formats.conversion):
            module.put = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        work()
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = sorted(os.listdir(folder))
    work()
    print(len(left), any(".partial-" in name for name in left), sorted(os.listdir(folder)))
torch.set_num_threads(1)
killed(lambda: m.encode_tables("pq4", folder))
killed(lambda: convert(folder / "memory", folder / "x.gguf", "gguf"))
"""
    _, out = elsewhere(code, tmp_path)
    tables = [f"layer-{layer}.pq4{books}" for layer in (1, 3) for books in ("", ".codebooks")]
    assert out == f"2 True {[*tables, 'memory']}\n6 True {[*tables, 'memory', 'x.gguf']}\n", out


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_damaged_codebooks_are_refused_by_name(tmp_path, content):
    from safetensors.torch import save

    from engram.tables import EncodedTable

    m = memory(config=CONFIG.replace(head_dim=32, table_init="zero"))
    m.encode_tables("pq4", tmp_path)
    rows = m.tables[1].rows
    m.close()
    (tmp_path / "layer-1.pq4.codebooks").write_bytes(save({"other": torch.zeros(3)}) if content is None else content)
    with pytest.raises(ValueError, match=r"layer-1\.pq4\.codebooks (is damaged|holds)"):
        EncodedTable(rows, 32, "pq4", tmp_path / "layer-1.pq4", mode="r")


# Links at the names of rows.


@pytest.mark.parametrize("name", ["layer-1.rows", "layer-3.rows", "layer-1.rows.v"])
def test_rows_behind_a_link_are_not_trained(tmp_path, name):
    (tmp_path / "theirs").mkdir()
    m = EngramMemory(CONFIG, TokenMap.identity(VOCAB), HIDDEN, folder=tmp_path / "mine")
    build_optimizer(m)
    m.close()
    before = (tmp_path / "mine" / name).read_bytes()
    os.rename(tmp_path / "mine" / name, tmp_path / "theirs" / name)
    (tmp_path / "mine" / name).symlink_to(tmp_path / "theirs" / name)
    with pytest.raises(OSError, match=rf"{name} is a symbolic link"):
        build_optimizer(EngramMemory(CONFIG, TokenMap.identity(VOCAB), HIDDEN, folder=tmp_path / "mine"))
    (tmp_path / "theirs" / name).unlink()
    with pytest.raises((OSError, ValueError), match=r"is a symbolic link|holds the rows of layers"):
        build_optimizer(EngramMemory(CONFIG, TokenMap.identity(VOCAB), HIDDEN, folder=tmp_path / "mine"))
    assert not (tmp_path / "theirs" / name).exists() and before


def test_a_linked_folder_is_trained_and_linked_rows_are_read(saved, tmp_path):  # noqa: F811
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    EngramMemory(CONFIG, TokenMap.identity(VOCAB), HIDDEN, folder=tmp_path / "link").close()
    assert (tmp_path / "real" / "layer-1.rows").exists()
    os.rename(saved / "layer-1.rows", tmp_path / "blob")  # as in a cache of downloads
    (saved / "layer-1.rows").symlink_to("../blob")
    for mode in ("copy", "shared"):
        assert same(EngramMemory.load(saved, mode), memory())


# What is converted and offloaded.


@pytest.mark.parametrize("to", ["engram", "deepseek-v4.1", "gguf"])
@pytest.mark.parametrize("system", ["as it is", "no locks"])
def test_convert_reads_one_memory_although_its_source_is_replaced(tmp_path, monkeypatch, to, system):
    import engram.integrations.formats.conversion as formats

    config = EngramConfig(
        layers=(1, 3), heads=2, head_dim=64, rows_per_head=997, pad_id=2, conv_kernel=0, boundary="dead"
    )  # one that every format can hold
    one, two = memory(config=config), memory(seed=1, config=config)
    source = one.save(tmp_path / "source")
    formats.convert(source, tmp_path / "expected", to)
    without(system, monkeypatch)
    name = {"engram": "write_engram", "gguf": "write_gguf"}.get(to, "write_safetensors")
    done = replace_once(
        monkeypatch, f"engram.integrations.formats.conversion.{name}", lambda: two.save(source, overwrite=True)
    )
    try:
        formats.convert(source, tmp_path / "found", to)
    except Replaced as error:
        assert system == "no locks" and f"{source} was replaced" in str(error)
        assert not (tmp_path / "found").exists()
    else:
        for path in [tmp_path / "expected", *(tmp_path / "expected").rglob("*")]:
            twin = tmp_path / "found" / path.relative_to(tmp_path / "expected")
            varies = path.name in ("token_map.safetensors", "manifest.json")  # the order of metadata
            assert path.is_dir() or varies or path.read_bytes() == twin.read_bytes()
    assert done and same(EngramMemory.load(source), two)
    assert not [left for left in names(tmp_path) if left.startswith(".")]


@pytest.mark.parametrize("name", ["../theirs", "layer-1.other", "/etc/passwd", "sub/rows", ".."])
def test_offloaded_tables_lie_in_files_that_their_manifest_lists(tmp_path, name):
    from engram.integrations.transformers.offload import FORMAT, _open, _store
    from engram.storage.manifest import manifest_digest

    rows = torch.arange(40, dtype=torch.float32).view(10, 4)
    tables = _store({1: (10, 4, "float32")}, lambda layer: iter([rows]), tmp_path / "home")
    assert torch.equal(tables[1].tensor, rows) and tables[1].path == tmp_path / "home" / "layer-1.float32"
    (tmp_path / "theirs").write_bytes(bytes(160))
    manifest = json.loads((tmp_path / "home" / "manifest.json").read_text())
    assert manifest["format"] == FORMAT
    manifest["tables"]["1"]["file"] = name
    manifest["digest"] = manifest_digest(manifest)
    (tmp_path / "home" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"{tmp_path / 'home'}.manifest\.json names"):
        _open(tmp_path / "home")


@pytest.mark.parametrize("part", [1, 7, 100])
def test_a_header_that_is_written_in_parts_is_complete(tmp_path, monkeypatch, part):
    from engram.integrations.formats import gguf
    from engram.integrations.formats import safetensors_io as tensors

    class Short:
        """A file whose writes accept only a part of the bytes."""

        def __init__(self, path, *args, **kwargs):
            self.file = open(path, *args, **kwargs)

        def write(self, data):
            return self.file.write(data[:part])

        def __getattr__(self, name):
            return getattr(self.file, name)

    rows = torch.arange(12, dtype=torch.float32).view(3, 4)
    monkeypatch.setattr(tensors, "open", Short, raising=False)
    writers = {
        "x.safetensors": lambda path: tensors.Writer(path, {"rows": ("F32", (3, 4))}, {"about": "a test"}),
        "x.gguf": lambda path: gguf.GgufWriter(path, {"rows": ("F32", (3, 4))}, {"about": "a test"}),
    }
    for name, make in writers.items():
        writer = make(tmp_path / name)
        writer.append("rows", rows)
        writer.close()
    monkeypatch.undo()
    found = tensors.read_header(tmp_path / "x.safetensors")[0]["rows"], gguf.read_gguf(tmp_path / "x.gguf")[0]["rows"]
    assert all(torch.equal(stored.read(), rows) for stored in found)


@pytest.mark.parametrize("at", [0, 9, 40])
def test_a_header_that_does_not_read_back_as_written_is_refused(tmp_path, at):
    from engram.integrations.formats import gguf
    from engram.integrations.formats import safetensors_io as tensors

    makers = (
        lambda path: tensors.Writer(path, {"rows": ("F32", (3, 4))}, {}),
        lambda path: gguf.GgufWriter(path, {"rows": ("F32", (3, 4))}, {}),
    )
    for number, make in enumerate(makers):
        path = tmp_path / str(number)
        writer = make(path)
        writer.append("rows", torch.zeros(3, 4))
        flip(path, at)
        with pytest.raises(OSError, match=f"{path}: the header does not read back"):
            writer.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_header_that_cannot_be_written_names_its_file(tmp_path, monkeypatch, error):
    from engram.integrations.formats import safetensors_io as tensors

    class Full:
        def __init__(self, *args, **kwargs):
            pass

        def write(self, data):
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(tensors, "open", Full, raising=False)
    with pytest.raises(OSError, match=f"could not write the header of {tmp_path / 'x'}: {os.strerror(error)}"):
        tensors.Writer(tmp_path / "x", {"rows": ("F32", (3, 4))}, {})
