"""featcache/gather.py says what these are."""

from featcache.gather import Job

class Pool:
    def __new__(cls, threads: int, direct: bool, keep: bool, /) -> Pool: ...
    def submit(
        self, rows: int, files: list[int | bytes], parts: tuple[object, ...],
        checksums: object, compare: object, /,
    ) -> Job: ...  # fmt: skip
    def close(self) -> None: ...

def checksum(first: object, second: object, /) -> int: ...
