"""A checkpoint's file, looked at before it is loaded: a stranger's may be made to run code, or to take all memory.

The file is a zip archive that torch wrote. Its parts must be stored as they are, and its pickle may ask for what
``common.checkpoint.save`` writes (tensors, numbers, text, lists, tuples, dicts), and for nothing else.
"""

import pickletools
import re
import struct
import zipfile
from typing import Any, BinaryIO

MAX_PICKLE = 8 * 2**20          # bytes; that of a ResNet-50's run with 600 tensors takes 0.1 MB
MAX_INTEGER = 2**512
MAX_TUPLE = 100_000             # values in it, those of the tuples in it too
MAX_HASHED = 10_000_000         # values in all keys
MAX_LONG = 10_000               # integers of more than 32 bits, which can be made to collide as keys

_TAKES_TO_MARK = {"TUPLE", "SETITEMS", "APPENDS"}
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "APPEND": 1, "REDUCE": 2, "BINPERSID": 1}

_OPCODES = {
    "PROTO", "STOP", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "BINPUT", "LONG_BINPUT", "BINGET",
    "LONG_BINGET", "BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE",
    "NEWTRUE", "NEWFALSE", "SETITEM", "SETITEMS", "APPEND", "APPENDS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "GLOBAL", "REDUCE", "BINPERSID"}
_GLOBALS = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v[23]|torch\.storage UntypedStorage|"
                      r"torch [A-Z][A-Za-z0-9]*Storage|torch (?:u?int|float|bfloat|complex)[0-9][a-z0-9_]*|torch bool")


class Refused(ValueError):
    """Why a file is not loaded."""


def check_container(file: BinaryIO) -> int:
    """Raises Refused for what ``save`` did not write, or what is damaged; the file's size in bytes if all is well."""
    start = file.read(4)
    if not start:
        raise Refused("damaged: the file is empty.")
    if start != b"PK\x03\x04":
        raise Refused("not a checkpoint of this project, or its beginning is damaged. Weights of another are taken "
                      "over by tools/import_weights.py.")
    size, content = check_archive(file)
    _check_pickle(content)
    file.seek(0)
    return size


def check_archive(file: BinaryIO) -> tuple[int, bytes]:
    """The size and the pickle of an archive that torch wrote, for this project or another; what the pickle asks for is
    not looked at. Raises Refused for a damaged one, and for one that would unfold into more than it is."""
    if not zipfile.is_zipfile(file):
        raise Refused("damaged: the file is cut off; its end is missing.")
    size = file.seek(0, 2)
    _check_end(file, size)
    with zipfile.ZipFile(file) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise Refused("refused: a TorchScript program, which is code. Save the state_dict() of the module.")
        _check_parts(archive.infolist(), size)
        return size, _pickle(archive)


def _check_end(file: BinaryIO, size: int) -> None:
    """The directory must stand just before the end that names its place, or two readers may find two directories."""
    file.seek(max(0, size - 42))
    locator, end = file.read(20), file.read(22)
    length, start, stop = *struct.unpack("<II", end[12:20]), size - 22
    if locator[:4] == b"PK\x06\x07":                      # zip64: once more, in 64 bits
        stop, = struct.unpack("<Q", locator[8:16])
        file.seek(min(stop, size))
        record = file.read(56)
        if record[:4] != b"PK\x06\x06" or stop + len(record) != size - 42:
            raise Refused("refused: its directory is not where it says.")
        length, start = struct.unpack("<QQ", record[40:56])
    if end[:4] != b"PK\x05\x06" or start + length != stop:
        raise Refused("refused: its directory is not where it says.")


def _check_parts(parts: list[zipfile.ZipInfo], size: int) -> None:
    names = [part.filename for part in parts]
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) != 1:
        raise Refused("refused: its parts are not those of one checkpoint.")
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
        raise Refused("refused: a part of it is compressed, which a checkpoint's never are.")
    if sum(part.file_size for part in parts) > size:
        raise Refused(f"refused: its parts claim to be larger than the file of {size:,} bytes.")


def _pickle(archive: zipfile.ZipFile) -> bytes:
    """The one part that says what the others are."""
    found = [part for part in archive.infolist() if part.filename.endswith("/data.pkl")]
    if len(found) != 1 or found[0].filename.count("/") != 1:
        raise Refused("not a checkpoint: its list of contents is missing.")
    if found[0].file_size > MAX_PICKLE:
        raise Refused(f"refused: {found[0].file_size:,} bytes of structure; at most {MAX_PICKLE:,} are read.")
    return archive.read(found[0])


def _check_pickle(content: bytes) -> None:
    sizes = _Sizes()
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
            raise Refused("refused: it holds more than tensors and plain values, and loading "
                          f"{_shown(argument)} could run code.")
        if opcode.name not in _OPCODES:
            raise Refused(f"refused: it holds more than tensors and plain values (the pickle's {opcode.name}), and "
                          "loading it could run code.")
        if opcode.name == "LONG1" and abs(argument or 0) >= MAX_INTEGER:
            raise Refused("refused: it holds a whole number of far too many digits.")
        sizes.take(opcode.name, argument)


class _Sizes:
    """How many values each value on the pickle's stack holds, repeated ones counted again: what hashing it would cost.

    A tuple that is a key is hashed while it is loaded, before anything else can look at it. -1 stands for OrderedDict.
    """

    def __init__(self) -> None:
        self.hashed = self.long = 0
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[int, int] = {}

    def take(self, name: str, argument: Any) -> None:
        try:
            self._take(name, argument)
        except (IndexError, KeyError) as error:
            raise Refused("damaged: its structure does not hold together.") from error

    def _take(self, name: str, argument: Any) -> None:
        if name == "MARK":
            self.marks.append(len(self.stack))
        elif name in _TAKES_TO_MARK or name in _TAKES:
            at = self.marks.pop() if name in _TAKES_TO_MARK else len(self.stack) - _TAKES[name]
            taken, self.stack[max(0, at):] = self.stack[at:], []
            if name.startswith("SETITEM"):
                self.hashed += sum(taken[::2])
            elif name.startswith("TUPLE"):
                self.stack.append(1 + sum(taken))
            elif name in ("REDUCE", "BINPERSID"):
                self.hashed += MAX_HASHED * (taken[0] == -1 and taken[-1] > 1)          # OrderedDict of something
                self.stack.append(1)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name not in ("PROTO", "STOP"):
            self.long += name == "LONG1"
            value = -1 if name == "GLOBAL" and "OrderedDict" in argument else 1
            self.stack.append(self.memo[argument] if name in ("BINGET", "LONG_BINGET") else value)
        if (self.stack and self.stack[-1] > MAX_TUPLE) or self.hashed >= MAX_HASHED or self.long > MAX_LONG:
            raise Refused("refused: tuples or keys in it would take too long to load.")


def _shown(name: Any) -> str:
    """Module and name, cut, without line breaks or control characters that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in str(name).replace(" ", "."))[:80]
