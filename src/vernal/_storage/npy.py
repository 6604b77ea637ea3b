"""Arrays in NumPy's `.npy` format, as uncompressed members of a zip archive.

Each is read straight into its own memory. Everything is checked before it is used,
nothing is evaluated, and no more is allocated than the file has.
"""

import math
import re
import struct
import zipfile
import zlib
from io import BufferedReader
from typing import IO, NamedTuple

import numpy as np

# The flag of a name in UTF-8: the only one that an uncompressed member has.
_UTF8 = 0x800

_LOCAL_HEADER = 30
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '([<>|=][a-zA-Z]\d*(?:\[\w+\])?)', "
    rb"'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n"
)
# The header of an array of 64 dimensions is shorter.
_LONGEST_HEADER = 4096

# JAX takes over memory with this alignment, and copies other memory.
_ALIGNMENT = 64


class Member(NamedTuple):
    """The bytes of a member in a file."""

    start: int
    size: int
    crc: int


class StoredArray(NamedTuple):
    """An array in a file, as the header of its `.npy` member describes it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool
    numbers: Member
    """Their checksum is that of the archive, which counts the header in."""
    header_crc: int


def list_members(file: IO[bytes]) -> tuple[list[zipfile.ZipInfo], list[int]]:
    """Returns the members in the order in which they lie, and where each must end."""
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        end = archive.start_dir
    return entries, [*(entry.header_offset for entry in entries[1:]), end]


def locate(file: IO[bytes], entry: zipfile.ZipInfo, end: int) -> Member:
    """Finds the bytes of a member, which must be uncompressed and fill its place."""
    name = entry.orig_filename
    encoded = name.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ~_UTF8:
        raise ValueError(f"its member {name!r} is compressed or encrypted")
    file.seek(max(entry.header_offset, 0))
    header = file.read(_LOCAL_HEADER + len(encoded))
    if header[:4] != b"PK\x03\x04" or header[_LOCAL_HEADER:] != encoded:
        raise ValueError(f"its member {name!r} is not where it should be")
    start = entry.header_offset + sum(struct.unpack("<HH", header[26:30]))
    start += _LOCAL_HEADER
    if entry.file_size != entry.compress_size or start + entry.file_size != end:
        raise ValueError(f"its member {name!r} has another size than its place")
    return Member(start, entry.file_size, entry.CRC)


def read_bytes(file: IO[bytes], member: Member) -> bytes:
    file.seek(member.start)
    data = file.read(member.size)
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise ValueError("a checksum differs")
    return data


def read_header(file: IO[bytes], member: Member) -> StoredArray:
    """Reads the header of an array, and checks that it has the size of its member."""
    file.seek(member.start)
    head = file.read(min(member.size, _LONGEST_HEADER))
    begin = len(_MAGIC) + 2
    match = _HEADER.match(head, begin)
    length = int.from_bytes(head[begin - 2 : begin], "little")
    if not head.startswith(_MAGIC) or not match or match.end() != begin + length:
        raise ValueError("an array is not described as it should be")
    descr, is_fortran, sides = match.groups()
    dtype = np.dtype(descr.decode())
    shape = tuple(int(side) for side in sides.split(b",") if side.strip())
    start, size = member.start + match.end(), member.size - match.end()
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != size:
        raise ValueError("an array has another size than it says")
    numbers = Member(start, size, member.crc)
    header_crc = zlib.crc32(head[: match.end()])
    return StoredArray(dtype, shape, is_fortran == b"True", numbers, header_crc)


def read_array(file: BufferedReader, array: StoredArray) -> np.ndarray:
    """Reads the numbers into new memory."""
    start, size, crc = array.numbers
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    skip = -memory.__array_interface__["data"][0] % _ALIGNMENT
    data = memory[skip : skip + size]
    file.seek(start)
    is_cut = file.readinto(data.data) != size
    if is_cut or zlib.crc32(data.data, array.header_crc) != crc:
        raise ValueError("a checksum differs")
    sides = array.shape[::-1] if array.is_fortran else array.shape
    numbers = data.view(array.dtype).reshape(sides)
    return numbers.T if array.is_fortran else numbers


def write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Writes an array of a dtype that NumPy has."""
    plain = array.view(array.dtype.str)  # NumPy warns of what else a dtype may hold
    with archive.open(name, "w", force_zip64=True) as member:
        np.lib.format.write_array(member, plain, (1, 0), allow_pickle=False)


def numpy_view(array: np.ndarray) -> np.ndarray:
    """Views a dtype that NumPy itself does not have, such as bfloat16, as integers."""
    if is_extended(array.dtype):
        return array.view(f"u{array.dtype.itemsize}")
    return array


def is_extended(dtype: np.dtype) -> bool:
    """Whether a dtype comes from another package than NumPy."""
    return dtype.isbuiltin == 2
