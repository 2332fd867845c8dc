"""Files and folders of object stores by URL: s3://, gs://, and whatever else fsspec finds a package for.

Work is done in local folders; whole files are fetched before it and put in a store after it. Credentials and endpoints
are those that the package of a store finds in the environment. Its own retries are the only ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from collie_core.errors import RunError

if TYPE_CHECKING:
    from os import PathLike

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least: C:// is a drive
_PASSWORD = re.compile(r"://[^/@:]*:(?!\d+(/|$))[^@]*@")  # user:password@, and not host:port/
_SIGNATURE = re.compile(r"\?.*(signature|sig|token|key|secret|password)=", re.IGNORECASE)
_STAMPS = (  # by which stores tell that a file has changed; checksums first
    *("ETag", "etag", "blob_id", "Content-MD5", "generation"),
    *("LastModified", "Last-Modified", "last_modified", "mtime", "created"),
)


class StorageError(RunError):
    """A store cannot be reached, or does not do what is asked."""


class StorageNameError(StorageError):
    """A URL that leads nowhere, or may not be used."""

    exit_code = 2


def is_url(name: str | PathLike[str]) -> bool:
    """Whether this is `scheme://...`, and not a path or a hub id."""
    return isinstance(name, str) and _URL.match(name) is not None


def local_folder(name: str) -> str:
    """The path of a local copy of the folder that a URL names (see `fetch`); any other name as it is.

    Raises:
        StorageError: see `fetch`; or it is a file.
    """
    if not is_url(name):
        return name
    copy = fetch(name)
    if not copy.is_dir():
        raise StorageNameError(f"{name} is a file, and a folder is needed here")
    return str(copy)


def fetch(url: str) -> Path:
    """A local copy of a file or folder, in the user's cache.

    One that is there is used again as long as the store has the same: a look at its list of files tells. Any number of
    processes may call this at once: one of them fetches, the others of the machine wait for it.

    Raises:
        StorageError: there is none, it cannot be read, or it changes meanwhile.
    """
    from filelock import FileLock

    place = Place(url)
    files = place.require_files()
    version = _version(url, files)
    folder = user_cache("stores") / _digest(place.url) / version
    final = folder / (PurePosixPath(place.path).name or "root")
    if folder.is_dir():
        return final
    with _told(url, "fetched"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                beside = folder.with_name(f"{version}.new")
                shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
                place.get(files, beside / final.name)
                if _version(url, place.files()) != version:
                    raise StorageError(f"{url} has changed while it was fetched; start again when it is whole")
                beside.rename(folder)
    return final


def version_of(copy: Path) -> str:
    """What tells the contents of a copy that `fetch` gave, on any machine; another object has another."""
    return copy.parent.name


def put_folder(local: Path, url: str, last: str = "") -> None:
    """Put all files of a folder below `url`, in place of those of the same names.

    Args:
        local: the folder.
        url: of the folder in the store.
        last: the file that comes when all others are there, so that whoever finds it finds everything.

    Raises:
        StorageError: the store refuses, or there are other files already: nothing is written then, since nothing that
            is somebody else's is deleted, and a mixture would be of no use.
    """
    place = Place(url)
    names = sorted(str(path.relative_to(local).as_posix()) for path in local.rglob("*") if not path.is_dir())
    there = place.files()
    if strays := sorted(there.keys() - set(names)):
        raise StorageNameError(f"{url} holds other files ({', '.join(strays[:3])}); name another folder")
    if last in there:
        place.remove([last])
    place.put(local, [name for name in names if name != last])
    place.put(local, [name for name in names if name == last])


def exists(url: str) -> bool:
    """Whether a file, or anything below a folder, is there."""
    return bool(Place(url).files())


def refuse_secrets(url: str) -> None:
    """A URL is shown and written down, so a password has no place in it.

    Raises:
        StorageNameError: it has one; the message does not.
    """
    if _PASSWORD.search(url) or _SIGNATURE.search(url):
        scheme, _, rest = url.partition("://")
        shown = rest.rpartition("@")[2].partition("?")[0]
        raise StorageNameError(
            f"the URL of {scheme}://{shown} has credentials in it, which would be written down; leave them to the "
            "environment, where the store's package looks for them"
        )


def user_cache(name: str) -> Path:
    """A folder of CoLLiE in the user's cache: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "collie" / name


class Place:
    """A file or folder in a store. Names of files are relative to it; "" is the place itself, when it is a file.

    Raises:
        StorageError: no file system of that scheme, or its package is missing.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs: Any
        self._fs, self.path = _file_system(url)

    def files(self) -> dict[str, Mapping[str, Any]]:
        """What the store says of each file; none where there is nothing."""
        with _told(self.url, "listed"):
            self._fs.invalidate_cache()  # of listings: others write too
            try:
                found = self._found()
            except FileNotFoundError:
                found = {}
        files = {name.removeprefix(self.path).lstrip("/"): facts for name, facts in found.items()}
        for name in files:
            if ".." in PurePosixPath(name).parts:
                raise StorageError(f"{self.url} holds {name}, which would lie outside its folder")
        return files

    def require_files(self) -> dict[str, Mapping[str, Any]]:
        """`files`, of which there must be some.

        Raises:
            StorageNameError: there are none.
        """
        files = self.files()
        if not files:
            raise StorageNameError(f"{self.url} does not exist, or cannot be seen with these credentials")
        return files

    def get(self, files: Mapping[str, Mapping[str, Any]], target: Path) -> None:
        """Copy files, as `files` has them, to `target`."""
        targets = [target / name for name in files]
        for path in targets:
            path.parent.mkdir(parents=True, exist_ok=True)
        with _told(self.url, "fetched"):
            self._fs.get([self._of(name) for name in files], list(map(str, targets)))
        for path, facts in zip(targets, files.values(), strict=True):
            found = path.stat().st_size
            if facts.get("size") not in (found, None):
                raise StorageError(f"{self.url}: {path.name} came with {found} of {facts['size']} bytes; start again")

    def put(self, source: Path, names: Sequence[str]) -> None:
        """Copy the named files of a local folder here, in this order."""
        with _told(self.url, "written"):
            for name in names:  # one by one: the parts of a large file are in memory, and sent at once
                self._fs.put_file(str(source / name), self._of(name))

    def remove(self, names: Sequence[str]) -> None:
        """Delete files, in this order."""
        with _told(self.url, "deleted"):
            for name in names:  # one by one: `rm` of a list takes names for patterns
                self._fs.rm_file(self._of(name))

    def blocks(self, name: str, size: int = 1 << 22) -> Iterator[bytes]:
        """The bytes of a file, so many at a time."""
        with _told(f"{self.url}/{name}", "read"), self._fs.open(self._of(name), "rb", block_size=size) as file:
            while block := file.read(size):
                yield block

    def read(self, name: str) -> bytes:
        """A small file."""
        with _told(f"{self.url}/{name}", "read"):
            return bytes(self._fs.cat_file(self._of(name)))

    def _found(self) -> Mapping[str, Mapping[str, Any]]:
        """By full path. A web server has files: it lists none, and its pages are not to be searched for links."""
        if self.url.startswith(("http://", "https://")):
            return {self.path: self._fs.info(self.path)}
        found: Mapping[str, Mapping[str, Any]] = self._fs.find(self.path, detail=True)
        return found

    def _of(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path


# -- how ------------------------------------------------------------------------------------------------------------


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    refuse_secrets(url)
    scheme = url.partition("://")[0]
    options = {"auto_mkdir": True} if scheme in ("file", "local") else {}
    try:
        system, path = url_to_fs(url, **options)
    except ImportError as error:
        hint = "; pip install 'collie-core[s3]'" if scheme == "s3" else ""
        raise StorageNameError(f"{scheme}:// cannot be used yet: {_sentence(error)}{hint}") from error
    except ValueError as error:
        raise StorageNameError(f"{url}: {_sentence(error)}") from error
    except Exception as error:  # (some look for credentials now, and miss them in types of their own)
        raise StorageError(f"{url} cannot be reached: {_sentence(error)}") from error
    return system, path.rstrip("/")


def _version(url: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """A name that is another one when any file is."""
    found = []
    for name, facts in sorted(files.items()):
        stamp = next((str(facts[key]) for key in _STAMPS if facts.get(key) is not None), None)
        if stamp is None:
            raise StorageNameError(
                f"{url}: the server tells neither a checksum nor a time of {name or 'the file'}, so a change would not "
                "be noticed; download it, and name the local copy"
            )
        found.append([name, facts.get("size"), stamp])
    return _digest(json.dumps(found))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def _told(url: str, done: str) -> Iterator[None]:
    """Raises StorageError: in one sentence, whatever the package of the store raises."""
    try:
        yield
    except RunError:
        raise
    except FileNotFoundError as error:
        raise StorageNameError(f"{url} cannot be {done}: there is no such file, folder or bucket") from error
    except Exception as error:  # (botocore, aiohttp and the like raise types of their own)
        raise StorageError(f"{url} cannot be {done}: {_sentence(error)}") from error


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
