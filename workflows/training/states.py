"""A stage of training whose folder is on S3: its states, and files that workers write locally first.

Knows nothing of what is trained.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemBase

from wallaroo.model.checkpoint import FILE_LIST
from wallaroo.model.training.log import ERRORS, METRICS
from wallaroo.model.training.lora import ABOUT
from wallaroo.model.training.samples import SAMPLES
from wallaroo.model.training.state import WHOLE
from wallaroo.workflows import storage


class S3States:
    """States on S3, see `model.training.state.Files`.

    Args:
        folder: Of all states of a stage, `s3://...`.
    """

    on_disk = False

    def __init__(self, folder: str):
        self.folder = folder

    def system(self) -> FileSystemBase:
        """The file system for torch.distributed.checkpoint."""
        return _S3System()

    def read(self, path: str) -> bytes | None:
        """The bytes of a file; None if there is none."""
        try:
            return storage.read_bytes(path)
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        """Writes a file atomically.

        Args:
            path: Of the file.
            data: Its bytes.
        """
        storage.write_atomic(path, data)

    def whole(self) -> list[str]:
        """Names of the folders that hold a file WHOLE."""
        return [name for name, _, file in self._files() if file == WHOLE]

    def folders(self) -> list[str]:
        """Names of all folders."""
        return sorted({name for name, _, _ in self._files()})

    def _files(self) -> list[tuple[str, str, str]]:
        return [file.relative.partition("/") for file in storage.list_files(self.folder)]

    def remove(self, path: str) -> None:
        """Removes a folder with its files, WHOLE first, so that no half of it counts as a state."""
        storage.delete(storage.join(path, WHOLE))
        for file in storage.list_files(path):
            storage.delete(file.path)


class _S3System(FileSystemBase):
    """S3 as a file system of torch.distributed.checkpoint."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        where = str(path)
        if mode == "rb":
            # Buffered: a tensor is read in many small pieces.
            with storage.open_source(where) as file:
                yield file
        else:
            with storage.write_stream(where) as stream:
                yield _Counted(stream)

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return storage.join(str(path), suffix)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        # The file is small: it lists where the tensors are. One PUT completes the state.
        storage.write_atomic(str(new_path), storage.read_bytes(str(path)))
        storage.delete(str(path))

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return storage.is_s3(str(checkpoint_id))

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return storage.exists(str(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        storage.delete(str(path))


class _Counted(io.BufferedIOBase):
    """A stream for writing that counts its bytes, which an upload does not."""

    def __init__(self, stream: Any):
        self.stream, self.done = stream, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.stream.write(data)
        self.done += size
        return size

    def tell(self) -> int:
        return self.done


class Published:
    """Files in a worker's local folder, uploaded as they change.

    Args:
        local: Folder of the worker.
        folder: Folder of the stage on S3.
    """

    def __init__(self, local: str, folder: str):
        self.local, self.folder = Path(local), folder
        self._sizes: dict[str, int] = {}

    def fetch_log(self) -> None:
        """Downloads the files of an earlier start to which this one adds lines."""
        for name in (METRICS, ERRORS, SAMPLES):
            try:
                data = storage.read_bytes(storage.join(self.folder, name))
            except FileNotFoundError:
                continue
            (self.local / name).write_bytes(data)

    def publish(self) -> None:
        """Uploads the files of the log and samples whose size has changed since the last time."""
        for file in self.local.iterdir():
            if file.is_file() and self._sizes.get(file.name) != file.stat().st_size:
                data = file.read_bytes()
                storage.write_atomic(storage.join(self.folder, file.name), data)
                self._sizes[file.name] = len(data)

    def publish_result(self, name: str) -> None:
        """Uploads what the stage has made, the file that marks it whole last.

        Args:
            name: Folder in the worker's.
        """
        files = sorted((self.local / name).iterdir(), key=lambda file: file.name in (FILE_LIST, ABOUT))
        for file in files:
            with (
                storage.write_stream(storage.join(self.folder, name, file.name)) as out,
                open(file, "rb") as data,
            ):
                while chunk := data.read(8 << 20):
                    out.write(chunk)
