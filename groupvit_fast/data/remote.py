"""Shards that lie elsewhere: downloaded whole into a local cache, from where they are read like any other.

URLs are opened by the webdataset library: `pipe:COMMAND` runs the command, http(s) goes through curl and
s3 through `aws s3 cp`. A download that fails is tried again with growing pauses; what stays broken is an
error that names the shard.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from groupvit_fast.console import UserError

_log = logging.getLogger("groupvit_fast")
SCHEMES = ("http://", "https://", "s3://", "pipe:")
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
STALL_SECONDS = 30  # a server that sends next to nothing for so long counts as gone
_BLOCK = 1 << 20
_TAR_END = bytes(512)
_HOPELESS = re.compile(r"error: 4(0[0-79]|1\d|2[0-8])\b|\((403|404)\)|NoSuchKey|AccessDenied")


class MissingShard(UserError):
    """The shard is not there: trying again will not help."""


def is_remote(spec: object) -> bool:
    """Whether a shard's name is a URL or a pipe."""
    return str(spec).startswith(SCHEMES)


class ShardCache:
    """A folder of downloaded shards, shared by the processes of a machine; at most `limit` bytes if given.

    A file appears under its name only when it is complete. Over the limit the shards that were asked for
    longest ago go first; a process that has one of them open goes on reading it.
    """

    def __init__(self, folder: str | Path, limit: int | None = None):
        self.folder, self.limit = Path(folder).expanduser(), limit
        if limit is not None and limit <= 0:
            raise UserError(f"shard cache limit {limit} must be more than 0 bytes")

    def path(self, url: str) -> Path:
        """Where the shard lies once it is here."""
        name = re.sub(r"[^\w.-]+", "_", url.rpartition("/")[2] or url)[-60:]
        return (
            self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name.removesuffix('.tar')}.tar"
        )

    def fetch(self, url: str) -> Path:
        """The local copy of a shard, downloaded now unless it is here already."""
        path = self.path(url)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(path):
                while not _mark_used(path):
                    self._download(url, path)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{url}: cannot be kept in {self.folder} ({reason}); see --shard-cache"
            ) from error
        if self.limit is not None:
            self._make_room(keep=path)
        return path

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """One process downloads a shard, the others wait for it."""
        with open(path.with_name(f".{path.name}.lock"), "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _download(self, url: str, path: Path) -> None:
        """Try until the shard is whole. A tar ends with zeros, so one that was cut off is noticed."""
        temporary = path.with_name(f".{path.name}.part")
        sizes: list[int] = []
        for pause in (*PAUSES, None):
            try:
                problem = _copy(url, temporary)
                sizes.append(temporary.stat().st_size)
                whole = _ends_like_a_tar(temporary)
                if not problem and not whole and sizes.count(sizes[-1]) > 2:
                    _log.warning("%s has no end mark: it is kept as it is, its last sample may be cut", url)
                    whole = True
                if not problem and whole:
                    os.utime(temporary, (0, 0))  # the same content keeps its index after another download
                    os.replace(temporary, path)
                    return
            finally:
                temporary.unlink(missing_ok=True)
            problem = problem or f"cut off after {sizes[-1]} bytes"
            if _HOPELESS.search(problem):
                raise MissingShard(f"{url}: {problem}")
            if pause is not None:
                _log.warning("%s: %s; trying again in %g s", url, problem, pause)
                time.sleep(pause)
        raise UserError(f"{url}: not downloaded after {len(PAUSES) + 1} tries ({problem})")

    def _make_room(self, keep: Path) -> None:
        files = {}
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process makes room as well
                files[path] = path.stat()
        total = sum(status.st_size for status in files.values())
        for path, status in sorted(files.items(), key=lambda item: item[1].st_atime_ns):
            if total <= self.limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= status.st_size


def _copy(url: str, target: Path) -> str:
    """Write what the URL holds to `target`; returns what went wrong, in a few words, or nothing."""
    from webdataset.gopen import gopen

    with tempfile.NamedTemporaryFile(suffix=".err") as complaints:
        command = f"{{ {_command(url)}; }} 2>{shlex.quote(complaints.name)}"
        with open(target, "wb") as file:
            stream = gopen(f"pipe:{command}", bufsize=_BLOCK)
            try:
                shutil.copyfileobj(stream, file, _BLOCK)
                stream.close()
                return ""
            except OSError as error:
                if error.errno is not None:  # the disk, not the download
                    raise
                text = complaints.read().decode("utf-8", "replace").split("\n")
                said = " ".join(line.strip() for line in text if line.strip())[-200:]
                return said or f"exit status {stream.status}"


def _command(url: str) -> str:
    """The shell command that writes the shard to its standard output."""
    if url.startswith("pipe:"):
        return url[len("pipe:") :].strip().rstrip(";")
    quoted = shlex.quote(url)
    if url.startswith("s3://"):
        return f"aws s3 cp {quoted} -"
    return f"curl -fsSL --connect-timeout 20 --speed-limit 1 --speed-time {STALL_SECONDS} {quoted}"


def _ends_like_a_tar(path: Path) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < len(_TAR_END):
            return False
        file.seek(-len(_TAR_END), os.SEEK_END)
        return file.read() == _TAR_END


def _mark_used(path: Path) -> bool:
    """Note the time as the file's access time (its time of change belongs to the index); False: not there."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True
