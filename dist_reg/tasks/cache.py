"""Tokenized rows kept on disk, found again by the content of everything they follow from."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_reg.errors import reason

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

WORTH_KEEPING = 0.5
"""Seconds of work below which rows are tokenized again every time."""


def folder() -> Path | None:
    """Where tokenized rows are kept: DIST_REG_CACHE, or dist-reg in the user's cache folder; None where that is `off`."""
    named = os.environ.get("DIST_REG_CACHE")
    if named == "off":
        return None
    if named:
        return Path(named).expanduser() / "tokenized"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "dist-reg" / "tokenized"


def kept(rows: Dataset, tokenizer: Any, how: Any, make: Callable[[], Dataset]) -> Dataset:
    """`make()`, or what it returned when it was called for the same rows, tokenizer and `how` (plain data).

    Rows, tokenizer, versions and this package's own code are told by their content, so nothing that is kept is ever out of
    date. What is found is mapped into memory. Where the folder cannot be written, or a file in it read, rows are made anew.
    """
    where = folder()
    if where is None or not getattr(tokenizer, "is_fast", False):
        return make()
    path = where / f"{key(rows, tokenizer, how)}.arrow"
    found = _read(path)
    if found is not None:
        return found
    start = time.perf_counter()
    made = make()
    if time.perf_counter() - start > WORTH_KEEPING:
        _write(made, path)
    return made


def key(rows: Dataset, tokenizer: Any, how: Any) -> str:
    """What the tokenized rows follow from, in 32 hexadecimal digits."""
    import datasets
    import tokenizers
    import transformers

    digest = hashlib.blake2b(digest_size=16)
    own: Any = tokenizer
    backend = own.backend_tokenizer
    backend.no_truncation()  # what an earlier call left there; every call says it anew
    backend.no_padding()
    told = [
        [library.__version__ for library in (datasets, tokenizers, transformers)],
        type(own).__name__,
        own.special_tokens_map,
        own.model_input_names,
        getattr(own, "chat_template", None),
        own.padding_side,
        own.truncation_side,
        how,
    ]
    text = json.dumps(told, default=str, sort_keys=True)
    if "strftime_now" in text:  # a chat template that writes the date
        text += datetime.date.today().isoformat()
    digest.update(text.encode())
    digest.update(backend.to_str().encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    _digest_rows(rows, digest)
    return digest.hexdigest()


def _digest_rows(rows: Dataset, digest: Any) -> None:
    import pyarrow

    flat: Any = rows if rows._indices is None else rows.flatten_indices()
    table = flat.data.table

    class Sink:
        closed = False

        def write(self, data: Any) -> int:
            digest.update(data)
            return len(data)

        def flush(self) -> None: ...

        def close(self) -> None: ...

    plain = table.replace_schema_metadata(None).combine_chunks()
    with pyarrow.ipc.new_stream(pyarrow.PythonFile(Sink(), mode="w"), plain.schema) as stream:
        stream.write_table(plain)


def _read(path: Path) -> Dataset | None:
    from datasets import Dataset

    if not path.is_file():
        return None
    try:
        found = Dataset.from_file(str(path))
    except Exception as error:  # pyarrow, datasets and the system each have their own
        logger.warning("%s cannot be read (%s); its rows are tokenized again.", path, reason(error))
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # so that what nobody uses can be told by its age
    return found


def _write(made: Dataset, path: Path) -> None:
    import pyarrow

    table: Any = made.data.table
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as partial:
            try:
                with pyarrow.ipc.new_stream(partial, table.schema) as stream:
                    stream.write_table(table)
                partial.close()
                os.replace(partial.name, path)
            except BaseException:
                os.unlink(partial.name)
                raise
    except OSError as error:
        logger.warning("tokenized rows cannot be kept in %s (%s).", path.parent, reason(error))


@contextlib.contextmanager
def every_core() -> Iterator[None]:
    """Let tokenizers use all cores: one process of a node is at work here, and the others wait for it."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
