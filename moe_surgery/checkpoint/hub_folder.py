"""The files of a model on the hub: read by ranges over HTTP, or from the local cache where they are in it."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.http_connections import Connections
from moe_surgery.checkpoint.http_source import HttpSource, Location, RemoteStamp, Traffic
from moe_surgery.checkpoint.hub_errors import requesting
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.checkpoint.source import ByteSource, Folder
from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError, OutputError

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

__all__ = ["HubFolder"]

OPENED_AT_A_TIME: Final = 8

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _File:
    """A file as the hub lists it: its bytes, and the digest that is its ETag."""

    size: int
    etag: str


class HubFolder(Folder):
    """A model on the hub at one commit. Nothing is written to the cache.

    `commit` is what the revision stood for when the folder was opened, and what every request names; `traffic`
    counts what was fetched.
    """

    concurrent_opens = OPENED_AT_A_TIME

    def __init__(
        self,
        repository: str,
        revision: str | None = None,
        *,
        endpoint: str | None = None,
        token: str | bool | None = None,
        ops: FileOps | None = None,
    ) -> None:
        """The model `repository` at `revision` (a branch, tag or commit; default: the main branch).

        `endpoint` and `token` are huggingface_hub's unless given. Raises OutputError for a model or revision that
        does not exist or may not be read, or without a network or with HF_HUB_OFFLINE; NetworkError where the hub
        does not answer.
        """
        from huggingface_hub import constants

        name = f"{repository}@{revision}" if revision else repository
        self._hub = _Hub(repository, endpoint or constants.ENDPOINT, token, name)
        self._ops = ops or FileOps()
        info = self._hub.model_info(revision)
        if not info.sha:
            raise OutputError(f"{name}: the hub does not say which commit this is")
        self.commit = info.sha
        self.traffic = Traffic()
        self.path = Path(f"{repository}@{self.commit}")
        self._connections = Connections(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        self._files = _listed(info)
        self._inside = ""

    @property
    def hub_model(self) -> tuple[str, str]:
        return self._hub.repository, self.commit

    def listing(self) -> Mapping[str, bool]:
        names: dict[str, bool] = {}
        for path in self._files:
            if path.startswith(self._inside):
                name, slash, _ = path.removeprefix(self._inside).partition("/")
                names[name] = not slash
        return names

    def folder(self, name: str) -> HubFolder | None:
        inside = posixpath.normpath(posixpath.join(self._inside, name)) + "/"
        if inside == "./":
            inside = ""
        if inside.startswith("../") or not any(path.startswith(inside) for path in self._files):
            return None
        other = HubFolder.__new__(HubFolder)
        other.__dict__.update(self.__dict__)
        other._inside = inside
        other.path = Path(f"{self._hub.repository}@{self.commit}") / inside
        return other

    def open(self, name: str) -> ByteSource:
        path = self._path(name)
        where = printable(f"{self._hub.repository}@{self.commit}/{path}")
        if path not in self._files:
            kind = "a folder, not a file" if self.folder(name) else "not in the repository"
            raise (InvalidInputError if self.folder(name) else OutputError)(f"{where}: is {kind}")
        if (cached := self._cached(path)) is not None:
            return LocalFile(cached, self._ops)
        return HttpSource(where, partial(self._locate, path, where), self._connections, self.traffic)

    def nbytes(self, name: str) -> int:
        return self._files[self._path(name)].size

    def bytes_to_fetch(self, name: str) -> int:
        path = self._path(name)
        return self._files[path].size if self._cached(path) is None else 0

    def close(self) -> None:
        self._connections.close()

    def _path(self, name: str) -> str:
        """The path in the repository of the file `name` of this folder."""
        return posixpath.normpath(posixpath.join(self._inside, name))

    def _cached(self, path: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self._hub.repository, path, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def _locate(self, path: str, where: str) -> Location:
        location = self._hub.locate(path, self.commit, where)
        stamp, listed = location.stamp, self._files[path]
        if stamp.commit != self.commit or stamp.size != listed.size or stamp.etag != listed.etag:
            raise InvalidInputError(f"{where}: changed while it was being read; run again")
        return location


class _Hub:
    """Requests to the hub's API for one model, by huggingface_hub."""

    def __init__(self, repository: str, endpoint: str, token: str | bool | None, name: str) -> None:
        self.repository = repository
        self._endpoint = endpoint
        self._token = token
        self._name = name

    def model_info(self, revision: str | None) -> ModelInfo:
        """Commit and files of `revision`."""
        from huggingface_hub import HfApi, constants

        api = HfApi(self._endpoint, token=self._token, library_name="moe-surgery")
        timeout = constants.HF_HUB_ETAG_TIMEOUT

        def ask() -> ModelInfo:
            try:
                return api.model_info(
                    self.repository, revision=revision, files_metadata=True, timeout=timeout
                )
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reason = "does not answer as the hub does"
                raise OutputError(f"{self._name}: {self._endpoint} {reason}") from error

        return self._request(ask, self._name, revision)

    def locate(self, path: str, commit: str, where: str) -> Location:
        """Where the bytes of the file `path` are now."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.repository, path, revision=commit, endpoint=self._endpoint)
        ask = partial(get_hf_file_metadata, url, token=self._token, endpoint=self._endpoint)
        found = self._request(ask, where, commit)
        if found.size is None or found.etag is None or found.commit_hash is None:
            raise OutputError(f"{where}: the hub does not state its size, ETag and commit")
        headers = build_hf_headers(token=self._token, library_name="moe-surgery")
        if _origin(found.location) != _origin(self._endpoint):
            headers.pop("authorization", None)
        headers["Accept-Encoding"] = "identity"
        return Location(found.location, headers, RemoteStamp(found.commit_hash, found.etag, found.size))

    def _request(self, ask: Callable[[], Result], where: str, revision: str | None) -> Result:
        return requesting(ask, where, self.repository, revision, self._endpoint)


def _listed(info: ModelInfo) -> dict[str, _File]:
    """The files of a model by path. Paths that are not relative and plain are left out."""
    files: dict[str, _File] = {}
    for file in info.siblings or []:
        path, size = file.rfilename, file.size
        etag = file.lfs.sha256 if file.lfs else file.blob_id
        if posixpath.normpath(path) != path or path.startswith(("/", "../")) or "\\" in path:
            continue
        if size is not None and etag is not None:
            files[path] = _File(size, etag)
    return files


def _origin(url: str) -> list[str]:
    """Scheme, empty, and host with port."""
    return url.split("/", 3)[:3]
