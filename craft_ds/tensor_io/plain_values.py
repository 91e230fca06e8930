"""Read `.pt` files of plain Python values without trusting them.

`torch.load(weights_only=True)` runs no foreign code, but a pickle of 30 bytes can still ask it for any amount
of memory (`bytearray(10**12)`). Here a pickle may contain values only: nothing is called but the constructors
of two containers, so that reading takes no more memory than a small multiple of the file's size.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

_MOST_BYTES = 1 << 30
_CONTAINERS = ("collections OrderedDict", "collections Counter")
# Everything that makes or calls an object; REDUCE calls what a GLOBAL named.
_CALLS = {
    *("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "BUILD"),
    *("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"),
}


def read_plain_values(path: Path) -> Any:
    """Return the value in a file that `torch.save` wrote.

    Args:
        path: The file; it holds numbers, texts, None, lists, tuples and dictionaries.

    Raises:
        ValueError: It is not such a file, or holds anything else.
        OSError: It cannot be read.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes, more than {_MOST_BYTES}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed, which torch.save never does")
            if any(entry.file_size > _MOST_BYTES for entry in entries):
                raise ValueError("it has an entry that is larger than the file")
            pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if len(pickles) != 1:
                raise ValueError("it is not a file of torch.save")
            _check_pickle(archive.read(pickles[0]))
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is not a file of torch.save ({error})") from error
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_pickle(content: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _CALLS or (opcode.name == "GLOBAL" and argument not in _CONTAINERS):
            raise ValueError(f"it holds something else than plain values: {argument or opcode.name}")
