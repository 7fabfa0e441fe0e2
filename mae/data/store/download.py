"""Downloads of whole remote shards."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import BinaryIO

from mae.data.store import storage
from mae.data.store.connection import retried, stream
from mae.data.store.errors import RangesIgnoredError, TransientError
from mae.data.store.storage import Shard, check_not_replaced, read_range

DOWNLOAD_BLOCK = 16 << 20
DOWNLOADS_AT_ONCE = 4


def download(shard: Shard, file: BinaryIO) -> None:
    """Write a remote shard into the empty, seekable `file`.

    Blocks are read in parallel, and a failure repeats one block. From a server without ranges the shard is read
    as one stream, and a failure starts again at the first byte.

    Raises:
        UserError: see `read_range`.
    """
    try:
        for block in _blocks(shard):
            file.write(block)
    except RangesIgnoredError:
        retried(shard.url, lambda: _copy_stream(shard, file))
    retried(shard.url, lambda: check_not_replaced(shard))


def _blocks(shard: Shard) -> Iterator[bytes]:
    spans = ((at, min(at + DOWNLOAD_BLOCK, shard.size)) for at in range(0, shard.size, DOWNLOAD_BLOCK))
    pool = ThreadPoolExecutor(DOWNLOADS_AT_ONCE)
    try:
        pending: deque[Future[bytes]] = deque(
            pool.submit(read_range, shard, *span) for span in islice(spans, DOWNLOADS_AT_ONCE)
        )
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(read_range, shard, *span) for span in islice(spans, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _copy_stream(shard: Shard, file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()
    for chunk in stream(shard.url, storage.STALL_SECONDS):
        file.write(chunk)
    if file.tell() != shard.size:
        check_not_replaced(shard)
        raise TransientError(f"got {file.tell()} of {shard.size} bytes")
